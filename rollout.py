"""Samplers behind one small interface: `sample` draws rollouts from the student, `sync` hands over the student's weights.

Every random number is a function of (seed, row, t), where a row is one rollout of one call, so a rerun gives the same
rollouts, however the rows are grouped into batches.
"""

import copy
import hashlib
import importlib.util
import os
import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from harness.command import Stopped
from model import head
from model.parallel import whole
from model.policy import Ids, Policy


def seed_for(*parts: int | str) -> int:
    """The one source of seeds: a 63-bit number from (run seed, step, purpose, row), the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Rollout:
    """One response. tokens: ids as sampled, EOS included; logp: log-probability of each under the distribution it was
    drawn from (after temperature and top_p; for greedy decoding, the model's own); finish: "stop", or "length" when it
    was cut at max_tokens."""

    tokens: Ids
    logp: list[float]
    finish: str


def grading(verify: Callable, problems: list, policy: Policy) -> Callable | None:
    """A callback for `sample` that starts to grade each finished row; None where the task's grader takes only whole batches
    (`model.parallel.Shared`). problems: one for each row."""
    begin = getattr(verify, "pool", None) and verify.begin
    return begin and (lambda row, rollout: begin(row, problems[row], policy.decode(rollout.tokens)))


class HFSampler:
    """Samples with the policy's own network through transformers (KV cache, left padding, position ids), so no weights are
    pushed. max_batch_tokens bounds rows x (prompt + response) of a batch. Each process draws its share of the rows and gets all
    rollouts."""

    other_engine = False  # the log-probs are the trainer's own

    def __init__(self, policy: Policy, max_batch_tokens: int = 65536):
        self.policy, self.max_batch_tokens = policy, max_batch_tokens

    def sync(self, policy: Policy) -> None:
        self.policy = policy

    def sleep(self) -> None:
        """Frees what only sampling needs, until the next `sync`; here that is nothing."""

    @torch.no_grad()
    def sample(
        self, prompts: list[Ids], n: int, seed: int, max_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
        finished: Callable[[int, Rollout], None] | None = None,
    ) -> list[Rollout]:  # fmt: skip
        """n responses to each prompt: row i * n + j is response j to prompt i. temperature 0 takes the likeliest token.
        finished(row, rollout) is called for each rollout as soon as it is drawn, in the process that drew it."""
        world, count = self.policy.world, len(prompts) * n
        order = sorted(world.share(count), key=lambda row: len(prompts[row // n]))
        calls: list[list[int]] = []
        while order:
            size = max(1, self.max_batch_tokens // (len(prompts[order[-1] // n]) + max_tokens))
            calls.append(order[-size:])
            order = order[:-size]
        # A forward pass over shards needs every process, so one with fewer rows draws a dummy row.
        calls += [[]] * (int(world.most(len(calls))) - len(calls))
        rollouts: dict[int, Rollout] = {}
        for rows in calls:
            x, seeds = [prompts[row // n] for row in rows] or [[0]], [seed_for(seed, row) for row in rows] or [0]
            rollouts |= zip(rows, self._draw(x, seeds, max_tokens, temperature, top_p))
            for row in rows if finished else ():
                finished(row, rollouts[row])
        rollouts = world.together(rollouts)
        return [rollouts[row] for row in range(count)]

    def _draw(self, prompts: list[Ids], seeds: list[int], max_tokens: int, temperature: float, top_p: float) -> list[Rollout]:
        """One response to each prompt. A token inverts the cumulative distribution at the uniform number of its (seed, t)."""
        from transformers import DynamicCache, TopPLogitsWarper

        policy, width, cache = self.policy, max(2, *map(len, prompts)), DynamicCache(config=self.policy.model.config)

        def logits(ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
            """(rows, V), of the token after ids (rows, t). seen: (rows, width), 0 on padding, cached tokens included."""
            places = (seen.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            how = dict(attention_mask=seen, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return policy.model(input_ids=ids, **how).logits[:, -1].float()

        # Each distinct prompt is read once, up to its last token. The pass over that token draws the first of every row.
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        rows = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=policy.device)
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in place], device=policy.device)
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in place], device=policy.device)
        logits(ids[:, :-1], seen[:, :-1])
        cache.batch_select_indices(rows)
        token, seen = ids[rows, -1:], seen[rows]
        numbers = [torch.rand(max_tokens, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        uniform, eos = torch.stack(numbers).to(policy.device), torch.tensor(policy.eos_ids, device=policy.device)
        going, drawn, logp = torch.ones_like(rows), [], []
        while len(drawn) < max_tokens and policy.world.sum(going.sum()):
            scores = logits(token, seen) / (temperature or 1)
            scores = TopPLogitsWarper(top_p)(token, scores) if temperature and top_p < 1 else scores
            log_p = torch.log_softmax(scores, -1)  # (rows, V)
            token = head.invert(log_p.double().exp(), uniform[:, len(drawn)]) if temperature else log_p.argmax(-1, keepdim=True)
            drawn.append(token)
            logp.append(log_p.gather(-1, token))
            going = going * ~torch.isin(token[:, 0], eos)
            seen = torch.cat([seen, torch.ones_like(token)], 1)
        rollouts = []
        for y, y_logp in zip(torch.cat(drawn, 1).tolist(), torch.cat(logp, 1).tolist()):
            n = next((t for t, token in enumerate(y, 1) if token in policy.eos_ids), len(y))
            rollouts.append(Rollout(y[:n], y_logp[:n], "stop" if y[n - 1] in policy.eos_ids else "length"))
        return rollouts


class StaleEngine(Stopped):
    """The engine does not compute the trainer's distribution."""


class VLLMSampler:
    """Samples with a vLLM engine in every process, which shares the device with the trainer. The engine holds the whole network
    in the trainer's compute dtype (float32 where that is float64), and no weights before the first `sync`. Everything here but
    `sleep` is collective. `gap`: mean |log p of the engine - log p of the trainer| after the last push, in nats a token, in the
    process where it is largest.

    path: folder or hub id, of which only the configuration is read. max_model_len: tokens of prompt and response together; a
    response that reaches it is cut, as at max_tokens. memory_share: the engine's share of the device's total memory. probes:
    prompts to check a push with until `sample` has been given others. gap_limit: `sync` raises above it. In float32 it is 1e-3,
    in bfloat16 0.5: rounding alone reaches 0.06 nats on text of high entropy, and stale weights or a stale cache whole nats."""

    # A run ends by returning from main while engine and process group are alive. Destroying the group under a living engine
    # breaks the exit, and llm.llm_engine.engine_core.shutdown() destroys the group too, so nothing collective can follow it.
    other_engine = True

    def __init__(self, policy: Policy, path: str, max_model_len: int, memory_share: float = 0.55, probes: list[Ids] = ()):
        # The engine seeds every generator of the process, and one of its parts lowers this limit: both are restored.
        states, recompile_limit = (random.getstate(), np.random.get_state()), torch.compiler.config.recompile_limit
        # The engine must live in this process, where the weights are.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM, SamplingParams  # takes many seconds, and not every machine has it

        self.policy, self.max_model_len, self.params = policy, max_model_len, SamplingParams
        self.dtype = policy.compute or (torch.float32 if policy.dtype == torch.float64 else policy.dtype)
        self.gap_limit = 1e-3 if self.dtype == torch.float32 else 0.5
        self.gap, self.probes = float("nan"), probes or [[policy.eos_ids[0]]]
        cuda = policy.device.type == "cuda"
        if not cuda:  # vLLM's CPU code packs a copy of each linear layer, and a push does not reach a tied head's copy
            import vllm._custom_ops

            vllm._custom_ops._supports_onednn = False
        # For some architectures (OLMo3) vLLM changes transformers' class, which the trainer uses as well.
        architecture = type(policy.model.base_model)
        init = architecture.__init__
        with torch.random.fork_rng([policy.device] if cuda else []):
            self.llm = LLM(
                path, dtype=self.dtype, load_format="dummy", max_model_len=max_model_len,
                gpu_memory_utilization=memory_share, enable_sleep_mode=cuda, enforce_eager=not cuda,
                # The defaults for a large GPU, 1024 rows and 16384 tokens, take GBs of tables and graphs.
                max_num_seqs=128, max_num_batched_tokens=max(8192, max_model_len),
                distributed_executor_backend="external_launcher" if policy.world.sharded else None,
                tensor_parallel_size=1, logprobs_mode="processed_logprobs", skip_tokenizer_init=True,
                enable_chunked_prefill=cuda,  # vLLM's CPU code cannot use a seed after a prompt read in chunks
                generation_config="vllm",  # ignore the model's own, which `sample` would have to undo
            )  # fmt: skip
        architecture.__init__, torch.compiler.config.recompile_limit = init, recompile_limit
        random.setstate(states[0])
        np.random.set_state(states[1])
        self.sleep()

    def sleep(self) -> None:
        """Frees the memory of weights and cache for the trainer until the next `sync`; on a CPU nothing is freed."""
        self.llm.sleep(level=2)
        self.awake = False

    def sync(self, policy: Policy) -> None:
        """Pushes the weights and checks on probes of up to 32 tokens that they arrived. Raises StaleEngine in every process if
        any engine disagrees with the trainer."""
        self.policy = policy
        torch.cuda.empty_cache()
        self.llm.wake_up(tags=["weights"])
        # Without an iterator, reload_weights would load the files at `path`.
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": whole(policy.model, self.dtype)})
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()  # keys and values of the old weights
        self.awake = True
        # Two probes for each process, drawn like rollouts from the last call's prompts, so that a stale cache shows as well.
        # Every process has all the numbers, so all of them reach the same conclusion.
        size = policy.world.size
        prompts = [self.probes[i % len(self.probes)] for i in range(2 * size)]
        drawn = self.sample(prompts, n=1, seed=0, max_tokens=32, temperature=policy.temperature)
        scored = policy.score(prompts, [r.tokens for r in drawn])[0].cpu()
        gaps = [(scored[i, : len(r.logp)] - torch.tensor(r.logp)).abs() for i, r in enumerate(drawn)]
        self.gap = torch.stack([torch.cat(gaps[rank::size]).mean() for rank in range(size)]).max().item()
        if not self.gap <= self.gap_limit:  # nan too
            raise StaleEngine(
                f"after the push, vLLM's log-probs are {self.gap:.3g} nats a token from the trainer's on average, and "
                f"{self.gap_limit:g} is the limit: the engine's weights are stale, or those of another model"
            )

    def sample(
        self, prompts: list[Ids], n: int, seed: int, max_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
        finished: Callable[[int, Rollout], None] | None = None,
    ) -> list[Rollout]:  # fmt: skip
        """Like HFSampler.sample. One process draws all rows of a prompt, so that the prompt is read once. Raises ValueError if
        a prompt leaves no room for a response, RuntimeError while the engine sleeps."""
        if not self.awake:
            raise RuntimeError("vLLM has no weights before the first sync(policy), nor between sleep() and the next")
        if (longest := max(map(len, prompts), default=0)) >= self.max_model_len:
            raise ValueError(f"a prompt of {longest} tokens leaves no room within max_model_len {self.max_model_len}")
        world = self.policy.world
        self.probes = prompts[: 2 * world.size] or self.probes
        rows = [i * n + j for i in world.share(len(prompts)) for j in range(n)]
        # Only the policy's EOS ids stop a row: ignore_eos disables those of the folder's generation_config.json.
        how = dict(temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop_token_ids=self.policy.eos_ids, ignore_eos=True,
                   logprobs=0, flat_logprobs=True, detokenize=False)  # fmt: skip
        params = [self.params(**how, seed=seed_for(seed, row)) for row in rows]
        ids = self.llm.enqueue([{"prompt_token_ids": prompts[row // n]} for row in rows], params, use_tqdm=False)
        row_of, drawn, engine = {id.split("-")[0]: row for id, row in zip(ids, rows)}, {}, self.llm.llm_engine
        while engine.has_unfinished_requests():
            for answer in engine.step():
                row, response = row_of[answer.request_id], answer.outputs[0]
                logp = [at[token].logprob for at, token in zip(response.logprobs, response.token_ids)]
                drawn[row] = Rollout(list(response.token_ids), logp, response.finish_reason)
                if finished:
                    finished(row, drawn[row])
        drawn = world.together(drawn)
        return [drawn[row] for row in range(len(prompts) * n)]


@contextmanager
def weights_of(model, sampler: "HFSampler | VLLMSampler", policy: Policy):
    """Yields the policy with another model's weights, in the sampler too, and then restores the sampler's. model None: as it is."""
    if model is None:
        yield policy
        return
    reader = copy.copy(policy)
    reader.model = model
    sampler.sleep()
    sampler.sync(reader)
    yield reader
    sampler.sleep()
    sampler.sync(policy)


def check_sampler(which: str) -> str:
    """The sampler's name, where "" means vLLM on a GPU and transformers on a CPU. Raises ValueError if vLLM is not installed."""
    which = which or ("vllm" if torch.cuda.is_available() else "hf")
    if which == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError("--sampler vllm, the default on a GPU: vllm is not installed; run.sh installs it there, or: --sampler hf")
    return which


def open_sampler(
    which: str, policy: Policy, path: str, longest: int, memory_share: float, probes: list[Ids] = ()
) -> "HFSampler | VLLMSampler":
    """The sampler by name (see `check_sampler`). longest: tokens of prompt and response together; the rest as in VLLMSampler."""
    if check_sampler(which) == "vllm":
        return VLLMSampler(policy, path, longest, memory_share, probes=probes)
    return HFSampler(policy)
