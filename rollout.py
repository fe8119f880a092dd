"""Samplers behind one interface of two calls: `sample` draws rollouts from the student, `sync` hands over its weights.
Beside them stands `ServedModel`, a model that somebody else serves.

Every random number is a function of (seed, row, t), where a row is one rollout of one call: a rerun gives the same
rollouts, however the rows were grouped into batches.
"""

import hashlib
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from policy import Ids, Policy


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


class _Draw(LogitsProcessor):
    """Draws the next token by inverting the cumulative distribution at one uniform number per (seed, row, t), notes its
    log-probability, and leaves it as the only choice, so that the library's greedy search follows."""

    def __init__(self, seeds: list[int], max_tokens: int, greedy: bool):
        generator = torch.Generator()
        self.uniform = torch.stack(
            [torch.rand(max_tokens, generator=generator.manual_seed(seed), dtype=torch.float64) for seed in seeds]
        )  # (rows, max_tokens)
        self.greedy, self.logp = greedy, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        log_p = torch.log_softmax(scores.float(), -1)  # (rows, V)
        if self.greedy:
            token = log_p.argmax(-1, keepdim=True)
        else:
            # In float64 the sum over 150,000 tokens is good to 1e-11; right=True never lands on a token of probability 0.
            cdf = log_p.double().exp().cumsum(-1)
            u = self.uniform[:, len(self.logp)].to(cdf.device).unsqueeze(-1) * cdf[:, -1:]
            token = torch.searchsorted(cdf, u, right=True).clamp(max=scores.shape[-1] - 1)
        self.logp.append(log_p.gather(-1, token).squeeze(-1).cpu())
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


class HFSampler:
    """Samples with transformers' own generate loop (KV cache, left padding, position ids). It shares the policy's
    weights, so there is nothing to push. max_batch_tokens bounds rows x (prompt + response) of one generate call. Each
    process of a group draws its share of the rows; all of them get all rollouts."""

    other_engine = False  # the log-probs are the trainer's own

    def __init__(self, policy: Policy, max_batch_tokens: int = 65536):
        self.policy, self.max_batch_tokens = policy, max_batch_tokens

    def sync(self, policy: Policy) -> None:
        self.policy = policy

    def sleep(self) -> None:
        """Gives up what only sampling needs, until the next `sync`. Here there is nothing."""

    @torch.no_grad()
    def sample(
        self, prompts: list[Ids], n: int, seed: int, max_tokens: int, temperature: float = 1.0, top_p: float = 1.0
    ) -> list[Rollout]:
        """n responses for each prompt, prompt by prompt: row i * n + j is response j to prompt i. temperature 0 takes
        the likeliest token."""
        world, count = self.policy.world, len(prompts) * n
        order = sorted(world.share(count), key=lambda row: len(prompts[row // n]))
        calls: list[list[int]] = []
        while order:
            size = max(1, self.max_batch_tokens // (len(prompts[order[-1] // n]) + max_tokens))
            calls.append(order[-size:])
            order = order[:-size]
        # Over shards every forward pass needs every process, so one with fewer rows generates some that nobody sees.
        calls += [[]] * (int(world.most(len(calls))) - len(calls))
        rollouts: dict[int, Rollout] = {}
        for rows in calls:
            drawn = self._generate(
                [prompts[row // n] for row in rows] or [[self.policy.eos_ids[0]]],
                [seed_for(seed, row) for row in rows] or [0],
                max_tokens,
                temperature,
                top_p,
            )
            rollouts.update(zip(rows, drawn))
        return world.collect([rollouts[row] for row in world.share(count)], count)

    def _generate(
        self, prompts: list[Ids], seeds: list[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[Rollout]:
        policy, width = self.policy, max(map(len, prompts))
        pad = policy.eos_ids[0]
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=policy.device)
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=policy.device)
        draw = _Draw(seeds, max_tokens, greedy=temperature == 0)
        warpers = [] if temperature in (0, 1) else [TemperatureLogitsWarper(temperature)]
        warpers += [] if top_p >= 1 else [TopPLogitsWarper(top_p)]
        config = GenerationConfig(
            max_new_tokens=max_tokens, do_sample=False, eos_token_id=policy.eos_ids, pad_token_id=pad, use_cache=True
        )
        # generate fills what a config leaves open from the model's own, which may carry settings that nobody asked for
        # (repetition_penalty, suppress_tokens, ...), so the model's is set aside during the call.
        processors = LogitsProcessorList([*warpers, draw])
        own, policy.model.generation_config = policy.model.generation_config, config
        try:
            out = policy.model.generate(
                ids, attention_mask=seen, generation_config=config, logits_processor=processors,
                synced_gpus=policy.world.size > 1,
            )  # fmt: skip
        finally:
            policy.model.generation_config = own
        out = out[:, width:].tolist()
        logp = torch.stack(draw.logp, 1).tolist()  # (rows, steps)
        rollouts = []
        for tokens, token_logp in zip(out, logp):
            ends = [t for t, token in enumerate(tokens) if token in policy.eos_ids]
            length = ends[0] + 1 if ends else len(tokens)
            rollouts.append(Rollout(tokens[:length], token_logp[:length], "stop" if ends else "length"))
        return rollouts


class ServedModel:
    """A model behind any OpenAI-compatible server. The key comes from the environment variable OPENAI_API_KEY alone."""

    def __init__(self, url: str, model: str, timeout: float = 60.0, at_once: int = 16):
        import openai  # half a second that only its users pay

        key = os.environ.get("OPENAI_API_KEY") or "none"  # local servers want none
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=2)
        self.model, self.at_once = model, at_once
        self.failures: Counter[str] = Counter()  # of the last call: what went wrong, how often

    def reply(
        self,
        messages: list[list[dict[str, str]]],
        seed: int,
        max_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[str]:
        """One reply to each conversation, "" where three attempts failed; `failures` then says why."""
        self.failures.clear()
        lock = threading.Lock()

        def ask(i: int) -> str:
            try:
                answer = self.client.chat.completions.create(
                    model=self.model, messages=messages[i], max_tokens=max_tokens, temperature=temperature, top_p=top_p,
                    seed=seed_for(seed, i) % 2**31,
                )  # fmt: skip
                if text := answer.choices[0].message.content:
                    return text
                raise ValueError("an empty reply")
            except Exception as error:  # the library's errors, and answers that are not of the protocol
                with lock:
                    self.failures[f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"] += 1
                return ""

        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(ask, range(len(messages))))
