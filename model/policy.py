"""The one shared-weight network, seen through two prompts: the student's x and the teacher's (x, C).

The network is an ordinary Hugging Face causal language model. This file is the model boundary: prompts and responses go
in as token ids, and what comes out is already shifted, so that place t of a (B, T) tensor belongs to response token t.
No other file shifts anything. Only response tokens are projected onto the vocabulary.
"""

import copy
import json
import math
import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

# transformers, FSDP2 and torch's checkpoints are imported where they are used: they take seconds, and --help needs none of them.
from harness import hub
from harness.command import CannotWrite
from model.checkpoint import cause
from model.head import View
from model.parallel import World, placed, reshard, states, whole

Ids = list[int]


class Policy:
    """The network with its tokenizer. A model on the meta device gets memory, but no weights yet.

    micro_batch_tokens: limit on rows x longest row of a forward pass; compute: dtype of passes over shards, by default bfloat16 on
    CUDA and the weights' own elsewhere; recompute: a micro-batch with more tokens stores only the input of each layer, and runs
    the layer again in the backward pass (activation checkpointing), by default never on a CPU and always on CUDA; temperature:
    that of the rollouts, at which tokens are scored; compiled: each layer is compiled by torch.compile, over shards only."""

    def __init__(
        self, model: nn.Module, tokenizer, micro_batch_tokens: int = 16384, world: World = World(),
        compute: torch.dtype | None = None, recompute: float | None = None, temperature: float = 1.0, compiled: bool = False,
    ):  # fmt: skip
        cuda = world.device.type == "cuda"
        self.tokenizer, self.micro_batch_tokens, self.world, self.device = tokenizer, micro_batch_tokens, world, world.device
        self.temperature, self.compiled = temperature, compiled
        self.recompute = (0 if cuda else math.inf) if recompute is None else recompute
        self.dtype = model.dtype  # of weights, gradients and optimizer
        self.compute = torch.bfloat16 if compute is None and cuda else compute
        self.score_dtype = torch.promote_types(self.dtype, torch.float32)  # of log-probs and everything formed from them
        self.vocabulary = len(model.get_output_embeddings().weight)
        # No dropout anywhere: the student that is scored is the student that sampled.
        for module in model.modules():
            rates = [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
            for name in rates + ["p"] * isinstance(module, nn.Dropout):
                setattr(module, name, 0.0)
        if self.recompute < math.inf:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = placed(model.eval(), world, self.compute, compiled)
        eos = model.generation_config.eos_token_id
        self.eos_ids = sorted({*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, _turn_end(tokenizer)} - {None})
        if not self.eos_ids:
            raise ValueError("neither the tokenizer nor the model's generation config names an end-of-sequence token")

    @classmethod
    def load(cls, path: str, dtype: torch.dtype = torch.float32, world: World = World(), **kwargs) -> "Policy":
        """Loads a Hugging Face folder or hub id whose weights are safetensors. Raises ValueError with one line if the model cannot
        be read, or cannot be trained here."""
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        try:
            hub.look(str(path))
            tokenizer = AutoTokenizer.from_pretrained(path)
            if not tokenizer("a").input_ids:  # transformers makes such a one for a folder without tokenizer files
                raise ValueError("there is no tokenizer")
            folder = hub.folder(str(path))
            model = _empty(AutoConfig.from_pretrained(folder), dtype)
            if (folder / "generation_config.json").exists():
                model.generation_config = GenerationConfig.from_pretrained(folder)
            _mend_generation_config(model)
            policy = cls(model, tokenizer, world=world, **kwargs)
            _fill(policy.model, folder)
            policy._check_head()
        except Exception as error:  # the libraries raise all kinds for a damaged folder
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"cannot load a model and its tokenizer from {path!r}: {reason}") from None
        return policy

    @torch.no_grad()
    def _check_head(self) -> None:
        """Raises ValueError for a head that is not a plain matrix (bias, scale, soft cap): log-probs would be wrong."""
        ids = torch.arange(min(8, self.vocabulary), device=self.device)[None]
        output = self.model.get_output_embeddings()
        hook = output.register_forward_hook(lambda module, args, logits: 1e4 * logits)  # a cap shows on large logits only
        logits = self.model(input_ids=ids, use_cache=False).logits[0].float() / 1e4
        hook.remove()
        hidden = states(self.model, ids)[0]
        plain = (hidden @ output.weight.T.to(hidden.dtype)).float()
        reshard(self.model)
        if not logits.isfinite().all():
            raise ValueError("its logits are not finite numbers")
        if getattr(output, "bias", None) is not None or (logits - plain).norm() > 0.02 * plain.norm():
            raise ValueError("its head is not a plain matrix on the last states (a bias, scale or cap on the logits)")

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `load`, transformers and vLLM can read, in the compute dtype. It replaces an older folder only once
        it is complete. Collective."""
        folder, tensors = Path(folder), whole(self.model, self.compute)
        weights = {name: w.cpu() for name, w in tensors if self.world.rank == 0}
        part, old = folder.with_name(f"part-{folder.name}"), folder.with_name(f"part-old-{folder.name}")

        def write() -> None:
            if hub.holds_others(folder):
                raise CannotWrite(f"{folder}: it is a folder that holds more than a model")
            for left in (part, old):
                shutil.rmtree(left, ignore_errors=True)
            try:
                self.model.save_pretrained(part, state_dict=weights)
                self.model.config.dtype = self.compute or self.dtype  # the library wrote the dtype of the shards
                self.model.config.save_pretrained(part)
                self.tokenizer.save_pretrained(part)
            except Exception as error:  # each library raises its own kinds
                shutil.rmtree(part, ignore_errors=True)
                raise CannotWrite(f"{folder}: {' '.join(str(error).split())}") from error
            if folder.exists():
                folder.rename(old)
            part.rename(folder)
            shutil.rmtree(old, ignore_errors=True)

        self.world.first(write)  # the others wait, so that nobody reads it too early

    def frozen_copy(self) -> nn.Module:
        """A copy of the network that is never trained by gradients (the EMA teacher, the fixed prior), sharded like the network."""
        if not self.world.sharded:
            return copy.deepcopy(self.model).requires_grad_(False)
        # deepcopy does not work on a sharded model. An empty twin takes no memory until it is sharded; then its shards are filled.
        twin = placed(_empty(self.model.config, self.dtype).eval(), self.world, self.compute, self.compiled).requires_grad_(False)
        reshard(self.model)
        for of in (nn.Module.parameters, nn.Module.buffers):
            for copied, original in zip(of(twin), of(self.model), strict=True):
                copied.copy_(original.detach())
        return twin

    def decode(self, response: Ids) -> str:
        """The response as text, without the token that ended it. Special tokens inside it stay, so it is graded as written."""
        return self.tokenizer.decode(response[:-1] if response and response[-1] in self.eos_ids else response)

    # ---- Scoring -----------------------------------------------------------------------------------------

    def micro_batches(self, rows: Iterable[int], lengths: Sequence[int]) -> list[list[int]]:
        """This process's micro-batches: `rows` sorted by length, cut so that none exceeds micro_batch_tokens (a longer row is alone
        in its own), and dealt to the processes in turn. An update depends on neither the cut nor the dealing, since
        `losses.sequence_weights` divides by the update's own N. Every process gets the same number of micro-batches, and where
        there are too few the last is empty, because a forward pass over shards needs every process."""
        ordered, size = sorted(rows, key=lambda row: lengths[row]), self.world.size
        batches = lambda limit: _packed(ordered, lengths, limit)  # noqa: E731
        rounds = -(-len(batches(self.micro_batch_tokens)) // size)
        # The smallest limit that needs no further round, so that no process waits while another has two rows.
        fits = lambda limit: len(batches(limit)) <= rounds * size  # noqa: E731
        mine = batches(1 + bisect_left(range(1, self.micro_batch_tokens), True, key=fits))[self.world.rank :: size]
        return mine + [[]] * (rounds - len(mine))

    def view(self, prompts: Sequence[Ids], responses: Sequence[Ids], model: nn.Module | None = None) -> View:
        """Runs the network over prompt + response. Rows are padded on the right, where a causal model never looks, so no attention
        mask is needed. `model`: other weights (an EMA copy, a fixed prior). Without rows, the view is empty, and a pass over one
        dummy response keeps the processes in step."""
        if not prompts:
            one = self.view([[0]], [[0]], model)
            return replace(one, hidden=one.hidden[:0], tokens=one.tokens[:0], mask=one.mask[:0], filled=0)
        model = self.model if model is None else model
        ids, tokens = (
            pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True).to(self.device)
            for rows in ([p + r for p, r in zip(prompts, responses)], responses)
        )  # (B, width), (B, T)
        mask = self.mask(responses)
        # The one shift of the code base: the state at place j predicts token j + 1.
        first = torch.tensor([len(p) - 1 for p in prompts], device=self.device)
        places = (first[:, None] + torch.arange(mask.shape[1], device=self.device)) * mask  # (B, T)
        # transformers recomputes in training mode only.
        model.train(torch.is_grad_enabled() and ids.numel() > self.recompute)
        hidden = states(model, ids)  # (B, width, H)
        model.eval()
        hidden = hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))  # (B, T, H)
        if self.temperature != 1:  # the head is linear, so this divides the logits
            hidden = hidden / self.temperature
        filled = sum(map(len, prompts)) + sum(map(len, responses))
        return View(hidden, tokens, mask, model.get_output_embeddings().weight, filled, ids.numel())

    @torch.no_grad()
    def _passes(
        self, count: int, of: Callable, read: Sequence[tuple], responses: Sequence[Ids], rows: Iterable[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Calls of(rows, *views) on each micro-batch, which returns `count` tensors (rows, T of the micro-batch). Returns them for
        all N responses, from all processes, as (count, N, T), 0 on padding and on rows not asked for. read: (prompts, model) of
        each view, where model None means our own weights."""
        longest = [max(map(len, row)) for row in zip(*(prompts for prompts, _ in read))]
        lengths = [prompt + len(r) for prompt, r in zip(longest, responses)]
        shape = count, *self.mask(responses).shape
        result = torch.zeros(shape, dtype=dtype or self.score_dtype, device=self.device)
        for batch in self.micro_batches(range(len(responses)) if rows is None else rows, lengths):
            some = [responses[i] for i in batch]
            views = [self.view([prompts[i] for i in batch], some, model) for prompts, model in read]
            for out, part in zip(result, of(batch, *views)) if batch else ():
                out[batch, : part.shape[1]] = part.to(out.dtype)
        reshard(self.model, *(model for _, model in read if model is not None))
        return self.world.sum(result)

    def score(
        self, prompts: Sequence[Ids], responses: Sequence[Ids], rows: Iterable[int] | None = None, model=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log p(y_t | prompt, y_<t) and the entropy of that distribution, without gradient, both (N, T) for all N responses, 0 on
        padding and on rows not asked for."""
        return self._passes(2, lambda _, view: view.score(), [(prompts, model)], responses, rows).unbind()

    def compare(
        self, prompts: Sequence[Ids], with_C: Sequence[Ids], responses: Sequence[Ids], rows: Iterable[int], model=None,
        expert: torch.Tensor | None = None, **how,
    ) -> torch.Tensor:  # fmt: skip
        """D between student and teacher at each token, without gradient, (N, T), 0 on padding and on rows not asked for. prompts,
        with_C: the student's and the teacher's prompts; model: the teacher's weights, None for our own; how: divergence and top_k
        as in `View.loss`; expert: (N, T) ids that replace the teacher."""

        def D(rows: list[int], view: View, teacher: View | None = None) -> list[torch.Tensor]:
            ids = None if expert is None else expert[rows, : view.mask.shape[1]]
            return [view.loss(lambda token: token.D, view.mask, teacher=teacher, expert=ids, **how)[1].D]

        read = [(prompts, None)] + [(with_C, model)] * (expert is None)
        return self._passes(1, D, read, responses, rows)[0]

    def draw(
        self, prompts: Sequence[Ids], responses: Sequence[Ids], rows: Iterable[int], model, seeds: Sequence[int]
    ) -> torch.Tensor:
        """A token drawn from `model` after (prompt, y_<t) at each place, (N, T) ids, 0 on padding and on rows not asked for.
        seeds: one for each of the N rows."""

        def drawn(rows: list[int], view: View) -> list[torch.Tensor]:
            generators, T = [torch.Generator().manual_seed(seeds[i]) for i in rows], view.mask.shape[1]
            uniform = torch.stack([torch.rand(T, generator=g, dtype=torch.float64) for g in generators])
            return [view.draw(uniform.to(self.device))]

        return self._passes(1, drawn, [(prompts, model)], responses, rows, torch.long)[0]

    def choose(self, prompts: Sequence[Ids], ids: Ids) -> torch.Tensor:
        """log p of each of `ids` as the token after each prompt, (N, len(ids)), at temperature 1."""

        def of(_, view: View) -> torch.Tensor:
            view.hidden = view.hidden * self.temperature
            return view.choices(torch.tensor(ids, device=self.device)).movedim(-1, 0)  # (k, rows, 1)

        logp = self._passes(len(ids), of, [(prompts, None)], [ids[:1]] * len(prompts))
        return logp.reshape(len(ids), len(prompts)).T

    def mask(self, responses: Sequence[Ids]) -> torch.Tensor:
        """(N, T), 1 on response tokens."""
        lengths = torch.tensor([len(r) for r in responses], device=self.device)
        return (torch.arange(max(map(len, responses), default=0), device=self.device) < lengths[:, None]).long()

    # ---- Updating ----------------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of this process's part of the loss, which is the sum over processes."""
        (loss * self.world.size).backward()  # sharding averages gradients over processes

    def step(self, optimizer: torch.optim.Optimizer, learning_rate: float, max_grad_norm: float, skip: bool = False) -> float:
        """One optimizer update from the accumulated gradients, clipped to max_grad_norm. Returns the norm before clipping, or nan
        if the update was skipped, by request or because the norm is not finite. The gradients are cleared either way."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()  # over all shards
        if skip or not math.isfinite(norm):
            norm = math.nan
        else:
            if not optimizer.state:
                torch.cuda.empty_cache()  # else its moments would lie among freed activations, and keep them from being returned
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm


def _packed(ordered: list[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Cuts rows, shortest first, into batches of at most `limit` padded tokens. A batch has at most a tenth of padding, or 1,024
    tokens of it, which are not worth another pass."""
    batches: list[list[int]] = []
    filled = 0
    for row in ordered:
        padded = (len(batches[-1]) + 1) * lengths[row] if batches else 0
        if not batches or padded > limit or padded - (filled + lengths[row]) > max(0.1 * padded, 1024):
            batches.append([])
            filled = 0
        batches[-1].append(row)
        filled += lengths[row]
    return batches


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, rate: float) -> None:
    """teacher ← (1 − rate) · teacher + rate · student, parameter by parameter, in the teacher's own precision."""
    reshard(teacher, student)
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.copy_((1 - rate) * t + rate * s.to(t.dtype))


# ---- Loading ---------------------------------------------------------------------------------------------------


def _empty(config, dtype: torch.dtype) -> nn.Module:
    """The network of a configuration, which takes no memory before it is `placed`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _fill(model: nn.Module, folder: Path) -> None:
    """Reads each process's own slices of the files into its shards, so that no process holds the whole network."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.exists() and not (folder / files[0]).exists():
        files = sorted({*json.loads(index.read_text())["weight_map"].values()})
    reader = HuggingFaceStorageReader(folder)
    reader.fs.ls = lambda _: [str(folder / name) for name in files]  # else it reads every file in the folder, other variants too
    saved = model.state_dict()  # has only those buffers that a file holds
    tensors = dict(model.named_parameters()) | {name: x for name, x in model.named_buffers() if name in saved}
    try:
        reader.read_metadata()  # for a damaged file dcp.load would print a traceback
        dcp.load(tensors, storage_reader=reader)
    except BaseException as error:
        raise cause(error) from None


def _mend_generation_config(model: nn.Module) -> None:
    """Drops all but the token ids of a generation config that transformers refuses to write (one with a temperature but no
    do_sample, say): the trained model could not be saved."""
    config = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError:
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = type(config)(**ids)


def _turn_end(tokenizer) -> int | None:
    """The special token that the chat template writes after an assistant's turn. A base model's own end-of-text token is another
    one, but prompted with the template it may end its turn with this one."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "zqz"}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("zqz")[2].strip()
    special = (id for id, token in tokenizer.added_tokens_decoder.items() if token.special and after.startswith(str(token)))
    return next(special, None)
