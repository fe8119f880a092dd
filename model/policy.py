"""The one shared-weight network, seen through two prompts: the student's x and the teacher's (x, C).

The network is an ordinary Hugging Face causal language model. This file is the model boundary: prompts and responses go
in as token ids, and what comes out is already shifted, so that place t of a (B, T) tensor belongs to response token t.
Nothing after this file shifts anything. Only response places are projected on the vocabulary.
"""

import copy
import math
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from model import head
from harness import hub
from harness.command import CannotWrite

Ids = list[int]


@dataclass(frozen=True)
class World:
    """The processes of a run. Each holds the whole batch as data, so the loop reads as if it were alone; sampling, grading
    and forward passes are done on a share of the rows, and `collect` and `sum` bring the shares together. Both are
    collective: every process calls them, in the same order. One process without a group is the default."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    sharded: bool = False  # is there a group?

    @classmethod
    def start(cls) -> "World":
        """From the environment that torchrun sets. On CUDA even one process makes a group, so that one GPU and many run
        the same code: sharded layers, float32 weights, bfloat16 compute. Only the first process's standard output is kept.
        Raises ValueError for more processes than GPUs."""
        cuda = torch.cuda.is_available()
        if os.environ.get("RANK", "0") != "0":
            sys.stdout = open(os.devnull, "w")
        if "RANK" not in os.environ:
            if not cuda:
                return cls()
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": port}  # fmt: skip
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
        if cuda and device.index >= torch.cuda.device_count():
            raise ValueError(f"more processes on this machine than its {torch.cuda.device_count()} GPUs")
        if cuda:
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            # Processes wait for the slowest in sampling and grading, which may take longer than the library's ten minutes.
            backend, device_id = ("cpu:gloo,cuda:nccl", device) if cuda else ("gloo", None)
            dist.init_process_group(backend, timeout=timedelta(hours=2), device_id=device_id)
        return cls(dist.get_rank(), dist.get_world_size(), device, sharded=True)

    @staticmethod
    def end() -> None:
        """Leaves the group at a program's very end, unless vLLM lives in it: its engine does not outlive the group, and the exit
        ends both. One of several processes ends here and now: while the interpreter takes itself down, threads of torch's
        that are still alive abort a process now and then, and torchrun calls a run failed that has done everything."""
        if dist.is_initialized() and "vllm" not in sys.modules:
            several = dist.get_world_size() > 1
            dist.destroy_process_group()
            if several:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)

    def share(self, n: int) -> range:
        """The places in 0..n-1 that are this process's to do; `collect` puts the results back in order."""
        return range(self.rank, n, self.size)

    def collect(self, mine: list, n: int) -> list:
        """The n results in order, from every process's results for its `share(n)`."""
        if self.size == 1:
            return mine
        shares, out = [None] * self.size, [None] * n
        dist.all_gather_object(shares, mine)
        for rank, results in enumerate(shares):
            out[rank :: self.size] = results
        return out

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over processes."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def shared(self, function: Callable) -> Callable:
        """`function` takes lists with an entry a row and returns one; the result does each row in one process."""

        def divided(*columns: list) -> list:
            n = len(columns[0])
            return self.collect(function(*([column[i] for i in self.share(n)] for column in columns)), n)

        return function if self.size == 1 else divided

    def first(self, function: Callable):
        """What `function()` returns in process 0, everywhere; the others do not call it."""
        box = [function() if self.rank == 0 else None]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def wait(self) -> None:
        """Until every process has come this far."""
        self.first(lambda: None)

    def most(self, n: float) -> float:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return n
        numbers = [None] * self.size
        dist.all_gather_object(numbers, n)
        return max(numbers)


def shard(model: nn.Module, compute: torch.dtype | None) -> nn.Module:
    """FSDP2: every decoder layer a unit, and the root with embedding, norm and head. The shards stay in the model's dtype,
    gradients are averaged in it, and compute is in `compute` (None: the same)."""
    precision = (
        MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32) if compute else MixedPrecisionPolicy()
    )
    for layer in model.base_model.layers:
        fully_shard(layer, mp_policy=precision)
    fully_shard(model, mp_policy=precision)
    # The head is used outside of forward, on the states that this method returns: as a method of the root it gathers the
    # root's weights, which stay gathered until the backward pass is over.
    model.states = MethodType(_states, model)
    register_fsdp_forward_method(model, "states")
    return model


def _states(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(B, width) ids to the last layer's states, (B, width, H)."""
    # Not by way of __call__, which vLLM replaces in the classes of some architectures (OLMo3) for its own use of them.
    return model.base_model.forward(input_ids=ids, use_cache=False).last_hidden_state


def whole(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of each parameter, layer by layer, in `dtype` (default: its own). Collective: every process
    runs through it to the end, whatever it does with the tensors. One tensor at a time is whole."""
    if isinstance(model, FSDPModule):
        model.reshard()  # a forward pass without gradients leaves the root gathered, in the compute dtype
    for name, p in model.named_parameters():
        p = p.detach().to(dtype or p.dtype)  # cast the shard first: half the traffic, the same bits
        yield name, p.full_tensor() if isinstance(p, DTensor) else p


@dataclass
class View:
    """One micro-batch of responses under one prompt each, to be used before the next pass over shards. hidden: (B, T, H),
    the state that predicts response token t; tokens: (B, T) response ids, 0 on padding; mask: (B, T), 1 on response
    tokens incl. EOS; head: (V, H), a plain matrix, as in Qwen3 and OLMo3: scaled or capped logits (Gemma 2, Cohere) are
    not covered. filled, padded: tokens that went through the network, without and with padding."""

    hidden: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    head: torch.Tensor
    filled: int = 0
    padded: int = 0

    def score(self) -> tuple[torch.Tensor, torch.Tensor]:
        """log p of each token and the entropy of the distribution it comes from, (B, T), 0 on padding, no gradient."""
        kept = self.mask.bool()
        return tuple(self._spread(x) for x in head.score(self.hidden[kept], self.head, self.tokens[kept]))

    def loss(
        self,
        objective: Callable[..., torch.Tensor],
        weights: torch.Tensor,
        given: Sequence[torch.Tensor] = (),
        teacher: "View | None" = None,
        kind: str = "kl_student_teacher",
        top_k: int | None = None,
        expert: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """L = Σ weights · objective(log p, D, *given) over response tokens, as `head.loss`, with tensors of (B, T): weights
        and each of `given`. teacher: the same responses in the teacher's view; expert: (B, T) tokens that it took, in its
        place. Returns L (), log p and D (B, T)."""
        kept = self.mask.bool()
        taught = (teacher.hidden[kept].detach(), teacher.head.detach()) if teacher else None
        total, logp, apart = head.loss(
            objective, weights[kept], self.hidden[kept], self.head, self.tokens[kept], [x[kept] for x in given],
            taught, kind, top_k, None if expert is None else expert[kept],
        )  # fmt: skip
        return total, self._spread(logp), self._spread(apart)

    def draw(self, uniform: torch.Tensor) -> torch.Tensor:
        """One token of the distribution at each place, from uniform numbers of (B, T); (B, T) ids, 0 on padding."""
        kept = self.mask.bool()
        return self._spread(head.draw(self.hidden[kept], self.head, uniform[kept]))

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        out = values.new_zeros(self.mask.shape)
        out[self.mask.bool()] = values
        return out


class Policy:
    """The network with its tokenizer. `micro_batch_tokens` bounds rows x longest row of one forward pass. compute: dtype
    of forward and backward passes over shards, bfloat16 on CUDA, else the weights' own. recompute: store a layer's input
    alone and run the layer again in the backward pass (activation checkpointing); on CUDA by default."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        micro_batch_tokens: int = 16384,
        world: World = World(),
        compute: torch.dtype | None = None,
        recompute: bool | None = None,
    ):
        self.tokenizer, self.micro_batch_tokens, self.world = tokenizer, micro_batch_tokens, world
        self.recompute = world.device.type == "cuda" if recompute is None else recompute
        self.dtype = model.dtype  # of weights, gradients and optimizer
        self.compute = torch.bfloat16 if compute is None and world.device.type == "cuda" else compute
        # No dropout anywhere: the student that is scored is the student that sampled.
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        if self.recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.eval()
        self.model = self._placed(model)
        eos = model.generation_config.eos_token_id
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        own = [tokenizer.eos_token_id, _turn_end(tokenizer)]
        self.eos_ids = sorted({*eos, *(token for token in own if token is not None)})
        if not self.eos_ids:
            raise ValueError("neither the tokenizer nor the model's generation config names an end-of-sequence token")

    @classmethod
    def load(cls, path: str, dtype: torch.dtype = torch.float32, **kwargs) -> "Policy":
        """From a Hugging Face folder or hub id. Raises ValueError with one line when there is no model to be read."""
        try:
            hub.look(str(path))
            tokenizer = AutoTokenizer.from_pretrained(path)
            if not tokenizer("a").input_ids:  # what transformers makes of a folder without tokenizer files
                raise ValueError("there is no tokenizer")
            model, found = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
            # What the file lacks, or has in another size, the library makes up at random.
            if wrong := [*sorted(found["mismatched_keys"]), *sorted(found["missing_keys"])]:
                first = wrong[0] if isinstance(wrong[0], str) else " ".join(map(str, wrong[0]))
                raise ValueError(
                    f"its weights are not those of its config.json: {len(wrong)} tensors, {first} among them"
                )
        except Exception as error:  # whatever the libraries make of a damaged folder
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"cannot load a model and its tokenizer from {path!r}: {reason}") from None
        return cls(model, tokenizer, **kwargs)

    def _placed(self, model: nn.Module) -> nn.Module:
        """On this process's device, in shards when there is a group."""
        return shard(model, self.compute) if self.world.sharded else model.to(self.world.device)

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def vocabulary(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `load`, transformers and vLLM read, in the compute dtype; an older one of the name is replaced
        when the new one is whole. Collective."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.model, options=options)  # in process 0; the others get none
        if self.world.rank == 0:
            # named_parameters counts a tied head once, as the embedding; the gathered dictionary holds it twice.
            once = {name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())}
            weights = {name: w.to(self.compute or w.dtype) for name, w in weights.items() if name in once}
            folder = Path(folder)
            if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists():
                raise CannotWrite(f"{folder}: it is a folder that holds other things than a model")
            part, old = folder.with_name(f"part-{folder.name}"), folder.with_name(f"part-old-{folder.name}")
            for left in (part, old):
                shutil.rmtree(left, ignore_errors=True)
            try:
                self.model.save_pretrained(part, state_dict=weights)
                config = copy.deepcopy(self.model.config)
                config.dtype = self.compute or self.dtype  # the library writes that of the shards
                config.save_pretrained(part)
                self.tokenizer.save_pretrained(part)
            except Exception as error:  # each of the libraries has its own
                shutil.rmtree(part, ignore_errors=True)
                raise CannotWrite(f"{folder}: {' '.join(str(error).split())}") from error
            if folder.exists():
                folder.rename(old)
            part.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        self.world.wait()  # nobody reads it before it is there

    def frozen_copy(self) -> nn.Module:
        """A copy of the network that never trains: the EMA teacher, or the fixed prior. Sharded like the network."""
        if not self.world.sharded:
            return copy.deepcopy(self.model).requires_grad_(False)
        # A sharded model cannot be copied whole. An empty twin takes no memory before it is cut to shards, which are filled.
        self.model.reshard()
        with torch.device("meta"):
            twin = AutoModelForCausalLM.from_config(self.model.config).to(self.dtype)
        twin = twin.to_empty(device="cpu")
        twin.tie_weights()
        twin = self._placed(twin.eval()).requires_grad_(False)
        with torch.no_grad():
            for mine, own in zip(twin.parameters(), self.model.parameters(), strict=True):
                mine.copy_(own)
            for mine, own in zip(twin.buffers(), self.model.buffers(), strict=True):
                mine.copy_(own)
        return twin

    def decode(self, response: Ids) -> str:
        """The response as text, without special tokens."""
        return self.tokenizer.decode(response, skip_special_tokens=True)

    # ---- Scoring -----------------------------------------------------------------------------------------

    def micro_batches(self, rows: Iterable[int], lengths: Sequence[int]) -> list[list[int]]:
        """This process's micro-batches: `rows` sorted by length, cut so that none exceeds micro_batch_tokens (a longer row
        goes alone), and dealt to the processes in turn. The result of an optimizer step depends neither on the cut nor on
        the dealing: `losses.sequence_weights` divides by the step's own N. Every process gets as many, the last one empty
        where there are fewer, since a forward pass over shards needs everybody."""
        ordered, size = sorted(rows, key=lambda row: lengths[row]), self.world.size
        rounds = -(-len(_packed(ordered, lengths, self.micro_batch_tokens)) // size)
        # The smallest micro-batches that need no further round: one process does not wait while another does two rows.
        low, high = 1, self.micro_batch_tokens
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(_packed(ordered, lengths, middle)) <= rounds * size else (middle + 1, high)
        mine = _packed(ordered, lengths, high)[self.world.rank :: size]
        return mine + [[]] * (rounds - len(mine))

    def view(self, prompts: Sequence[Ids], responses: Sequence[Ids], model: nn.Module | None = None) -> View:
        """Runs the network over prompt + response. Rows are padded on the right, where a causal model never looks, so
        no attention mask is needed. `model`: another set of weights (an EMA copy, a fixed prior). Without rows it is a view
        of none, by way of a pass over one token, which keeps the processes of a group in step."""
        model = self.model if model is None else model
        empty = not prompts
        if empty:
            prompts, responses = [[0]], [[0]]
        width = max(len(p) + len(r) for p, r in zip(prompts, responses))
        T = max(map(len, responses))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        tokens = torch.zeros(len(prompts), T, dtype=torch.long)
        mask = torch.zeros(len(prompts), T, dtype=torch.long)
        places = torch.zeros(len(prompts), T, dtype=torch.long)
        for i, (p, r) in enumerate(zip(prompts, responses)):
            ids[i, : len(p) + len(r)] = torch.tensor(p + r)
            tokens[i, : len(r)] = torch.tensor(r)
            mask[i, : len(r)] = 1
            # The one shift of the code base: the state at place j predicts token j + 1.
            places[i, : len(r)] = torch.arange(len(p) - 1, len(p) - 1 + len(r))
        ids, tokens, mask, places = (x.to(self.device) for x in (ids, tokens, mask, places))
        model.train(self.recompute and torch.is_grad_enabled())  # the library recomputes in this mode alone
        hidden = model.states(ids) if self.world.sharded else _states(model, ids)  # (B, width, H)
        model.eval()
        hidden = hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))  # (B, T, H)
        if empty:
            hidden, tokens, mask = hidden[:0], tokens[:0], mask[:0]
        filled = 0 if empty else sum(map(len, prompts)) + sum(map(len, responses))
        return View(hidden, tokens, mask, model.get_output_embeddings().weight, filled, ids.numel())

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Ids], responses: Sequence[Ids], rows: Iterable[int] | None = None, model=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Frozen log p(y_t | prompt, y_<t) and the entropy of the distribution it was drawn from, both (N, T) for all N
        responses, 0 on padding and on rows not asked for."""
        N, T = len(responses), max(map(len, responses), default=0)
        logp = torch.zeros(N, T, dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        entropy = torch.zeros_like(logp)
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
        for batch in self.micro_batches(range(N) if rows is None else rows, lengths):
            view = self.view([prompts[i] for i in batch], [responses[i] for i in batch], model)
            t = view.mask.shape[1]
            if batch:
                logp[batch, :t], entropy[batch, :t] = (x.to(logp.dtype) for x in view.score())
        self._reshard(model)
        return self.world.sum(logp), self.world.sum(entropy)

    @torch.no_grad()
    def compare(
        self, prompts: Sequence[Ids], with_C: Sequence[Ids], responses: Sequence[Ids], rows: Iterable[int], model=None,
        kind: str = "cross_entropy", top_k: int | None = None, expert: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """D of each token between student and teacher at these weights, (N, T), 0 on padding and on rows not asked for.
        prompts, with_C: the student's and the teacher's; model: the teacher's weights, None for our own; kind, top_k: as in
        `head.loss`; expert: (N, T) ids in the teacher's place, D is −log p of those."""
        N, T = len(responses), max(map(len, responses), default=0)
        apart = torch.zeros(N, T, dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        longer = with_C if expert is None else prompts
        for batch in self.micro_batches(rows, [len(p) + len(r) for p, r in zip(longer, responses)]):
            q, here = None, [responses[i] for i in batch]
            if expert is None:
                q = self.view([with_C[i] for i in batch], here, model)
            view = self.view([prompts[i] for i in batch], here)
            t = view.mask.shape[1]
            if batch:
                taken = None if expert is None else expert[batch, :t]
                found = view.loss(lambda logp, d: d, view.mask, (), q, kind, top_k, taken)[2]
                apart[batch, :t] = found.to(apart.dtype)
        self._reshard(model)
        return self.world.sum(apart)

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[Ids], responses: Sequence[Ids], rows: Iterable[int], model, seeds: Sequence[int]
    ) -> torch.Tensor:
        """A token that `model` takes after (prompt, y_<t) at each place, (N, T) ids, 0 on padding and on rows not asked for.
        seeds: one for each of the N rows."""
        taken = torch.zeros(len(responses), max(map(len, responses), default=0), dtype=torch.long, device=self.device)
        for batch in self.micro_batches(rows, [len(p) + len(r) for p, r in zip(prompts, responses)]):
            view = self.view([prompts[i] for i in batch], [responses[i] for i in batch], model)
            t = view.mask.shape[1]
            if batch:
                draws = [torch.Generator().manual_seed(seeds[i]) for i in batch]
                uniform = torch.stack([torch.rand(t, generator=g, dtype=torch.float64) for g in draws])
                taken[batch, :t] = view.draw(uniform.to(self.device))
        self._reshard(model)
        return self.world.sum(taken)

    @torch.no_grad()
    def choose(self, prompts: Sequence[Ids], ids: Ids) -> torch.Tensor:
        """log p of each of `ids` as the token after each prompt, (N, len(ids))."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        logp = torch.zeros(len(prompts), len(ids), dtype=dtype, device=self.device)
        for batch in self.micro_batches(range(len(prompts)), [len(p) + 1 for p in prompts]):
            view = self.view([prompts[i] for i in batch], [ids[:1]] * len(batch))
            if batch:
                logp[batch] = head.choices(view.hidden[:, 0], view.head, torch.tensor(ids, device=self.device)).to(
                    dtype
                )
        self._reshard()
        return self.world.sum(logp)

    def _reshard(self, model: nn.Module | None = None) -> None:
        """After passes without gradients, which no backward pass follows that would do it."""
        for each in {self.model, self.model if model is None else model} if self.world.sharded else ():
            each.reshard()

    def mask(self, responses: Sequence[Ids]) -> torch.Tensor:
        """(N, T): 1 on response tokens, as `score` returns them."""
        lengths = torch.tensor([len(r) for r in responses], device=self.device)
        return (torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]).long()

    # ---- Updating ----------------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of this process's part of the loss; the whole loss is the sum over processes, of whose
        gradients sharding takes the mean."""
        (loss * self.world.size).backward()

    def step(
        self, optimizer: torch.optim.Optimizer, learning_rate: float, max_grad_norm: float, skip: bool = False
    ) -> float:
        """One optimizer update from the accumulated gradients, clipped to max_grad_norm. Returns the norm before
        clipping, or nan when the update was skipped: by request, or because the norm is not finite. The gradients are
        gone afterwards either way."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()  # over all shards
        if skip or not math.isfinite(norm):
            norm = math.nan
        else:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm


def _packed(ordered: list[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Rows, shortest first, in batches of at most `limit` tokens with padding, of which padding is a tenth at most, or too
    little to be worth another pass."""
    batches: list[list[int]] = []
    filled = 0
    for row in ordered:
        padded = (len(batches[-1]) + 1) * lengths[row] if batches else 0
        if batches and padded <= limit and padded - (filled + lengths[row]) <= max(0.1 * padded, 1024):
            batches[-1].append(row)
            filled += lengths[row]
        else:
            batches.append([row])
            filled = lengths[row]
    return batches


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, rate: float) -> None:
    """teacher ← (1 − rate) · teacher + rate · student, parameter by parameter, in the teacher's own precision."""
    for model in (teacher, student):
        if isinstance(model, FSDPModule):
            model.reshard()  # after a pass without gradients the root stands gathered
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.copy_((1 - rate) * t + rate * s.to(t.dtype))


def _turn_end(tokenizer) -> int | None:
    """The special token that the chat template writes after an assistant's turn. A base model's own end of text is
    another one, but prompted with the template it may end its turn like this."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "zqz"}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("zqz")[2].strip()
    known = [token for token in tokenizer.all_special_tokens if after.startswith(token)]
    known += [
        str(token)
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and after.startswith(str(token))
    ]
    return tokenizer.convert_tokens_to_ids(known[0]) if known else None
