"""The one shared-weight network, seen through two prompts: the student's x and the teacher's (x, C).

The network is an ordinary Hugging Face causal language model. This file is the model boundary: prompts and responses go
in as token ids, and what comes out is already shifted, so that place t of a (B, T) tensor belongs to response token t.
Nothing after this file shifts anything. Only response places are projected on the vocabulary.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

Ids = list[int]


@dataclass
class View:
    """One micro-batch of responses under one prompt each. hidden: (B, T, H), the state that predicts response token t;
    tokens: (B, T) response ids, 0 on padding; mask: (B, T), 1 on response tokens incl. EOS; head: (V, H)."""

    hidden: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    head: torch.Tensor

    def logits(self) -> torch.Tensor:
        """(B, T, V), at least float32: softmax over a large vocabulary loses too much in bfloat16. The head is a plain
        matrix, as in Qwen3 and OLMo3; scaled or capped logits (Gemma 2, Cohere) are not covered."""
        logits = self.hidden @ self.head.T
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Policy:
    """The network with its tokenizer. `micro_batch_tokens` bounds rows x longest row of one forward pass."""

    def __init__(self, model: nn.Module, tokenizer, micro_batch_tokens: int = 16384):
        self.model, self.tokenizer, self.micro_batch_tokens = model, tokenizer, micro_batch_tokens
        model.eval()  # no dropout anywhere: the student that is scored is the student that sampled
        eos = model.generation_config.eos_token_id
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        own = [tokenizer.eos_token_id, _turn_end(tokenizer)]
        self.eos_ids = sorted({*eos, *(token for token in own if token is not None)})
        if not self.eos_ids:
            raise ValueError("neither the tokenizer nor the model's generation config names an end-of-sequence token")

    @classmethod
    def load(cls, path: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **kwargs) -> "Policy":
        """From a Hugging Face folder or hub id. Raises ValueError with one line when there is no model to be read."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            if not tokenizer("a").input_ids:  # what transformers makes of a folder without tokenizer files
                raise ValueError("there is no tokenizer")
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"cannot load a model and its tokenizer from {path!r}: {reason}") from None
        return cls(model.to(device), tokenizer, **kwargs)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def vocabulary(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `load`, transformers and vLLM read."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def frozen_copy(self) -> nn.Module:
        """A copy of the network that never trains: the EMA teacher, or the fixed prior."""
        return copy.deepcopy(self.model).requires_grad_(False)

    def decode(self, response: Ids) -> str:
        """The response as text, without special tokens."""
        return self.tokenizer.decode(response, skip_special_tokens=True)

    # ---- Scoring -----------------------------------------------------------------------------------------

    def micro_batches(self, rows: Iterable[int], lengths: Sequence[int]) -> list[list[int]]:
        """`rows` sorted by length and cut so that none exceeds micro_batch_tokens (a longer row goes alone). The result
        of an optimizer step does not depend on the cut: `losses.sequence_mean` divides by the step's own N."""
        batches: list[list[int]] = []
        for row in sorted(rows, key=lambda row: lengths[row]):
            if batches and (len(batches[-1]) + 1) * lengths[row] <= self.micro_batch_tokens:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches

    def view(self, prompts: Sequence[Ids], responses: Sequence[Ids], model: nn.Module | None = None) -> View:
        """Runs the network over prompt + response. Rows are padded on the right, where a causal model never looks, so
        no attention mask is needed. `model`: another set of weights (an EMA copy, a fixed prior)."""
        model = self.model if model is None else model
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
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, width, H)
        hidden = hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))  # (B, T, H)
        return View(hidden, tokens, mask, model.get_output_embeddings().weight)

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Ids], responses: Sequence[Ids], rows: Iterable[int] | None = None, model=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Frozen log p(y_t | prompt, y_<t) and the entropy of the distribution it was drawn from, both (N, T) for all N
        responses, 0 on padding and on rows not asked for."""
        N, T = len(responses), max(map(len, responses))
        logp = torch.zeros(N, T, dtype=torch.promote_types(self.model.dtype, torch.float32), device=self.device)
        entropy = torch.zeros_like(logp)
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
        for batch in self.micro_batches(range(N) if rows is None else rows, lengths):
            view = self.view([prompts[i] for i in batch], [responses[i] for i in batch], model)
            drawn = torch.distributions.Categorical(logits=view.logits(), validate_args=False)
            t = view.mask.shape[1]
            logp[batch, :t] = drawn.log_prob(view.tokens) * view.mask
            entropy[batch, :t] = drawn.entropy() * view.mask
        return logp, entropy

    def mask(self, responses: Sequence[Ids]) -> torch.Tensor:
        """(N, T): 1 on response tokens, as `score` returns them."""
        lengths = torch.tensor([len(r) for r in responses], device=self.device)
        return (torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]).long()

    # ---- Updating ----------------------------------------------------------------------------------------

    def step(
        self, optimizer: torch.optim.Optimizer, learning_rate: float, max_grad_norm: float, skip: bool = False
    ) -> float:
        """One optimizer update from the accumulated gradients, clipped to max_grad_norm. Returns the norm before
        clipping, or nan when the update was skipped: by request, or because the norm is not finite. The gradients are
        gone afterwards either way."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm).item()
        if skip or not math.isfinite(norm):
            norm = math.nan
        else:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, rate: float) -> None:
    """teacher ← (1 − rate) · teacher + rate · student, parameter by parameter, in the teacher's own precision."""
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
