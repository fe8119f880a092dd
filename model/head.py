"""The vocabulary head in chunks of tokens: from hidden states to losses without a tensor of (T, V), forward or backward.

The logits are the largest tensor in training: 8,192 tokens of Qwen3 take 5 GB in float32, and plain autograd keeps several for
student and teacher. Here a chunk of tokens is projected into a buffer, its loss and its gradient are computed at once, and
the buffer is reused for the next chunk. The formulas stay in losses.py and are differentiated by autograd, on the few buckets
of a chunk. Only the step from log-probabilities to logits, the Jacobian of log softmax, is written out:

    L = f(log p),  g = dL / d log p   =>   dL / d logits_j = g_j − p_j Σ_k g_k

`View.loss` equals `losses.sequence_mean(objective(log p, losses.distillation_loss(...)), ...)` on whole logits, the readable
reference that tests/test_head.py compares it with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

BUFFER_BYTES = 80 << 20  # all buffers of logits together, on a CPU; ten times as much on CUDA
PLACES = 16  # the overlap of the two top k is measured at every 16th token, since the teacher's own top k takes a pass over V
COLUMNS = 4096  # columns of the vocabulary in a block, on a CPU, whose caches they fit; ten times as many on CUDA


@dataclass
class Scores:
    """What a pass measures at each response token, (B, T) each, detached, 0 on padding. logp: the student's log p(y_t); entropy:
    the student's, or None if not asked for; D: D(student, teacher); teacher_logp: the teacher's log p(y_t), 0 without a teacher;
    overlap: the share of the student's top k that is also in the teacher's, nan where it is not measured."""

    logp: Tensor
    entropy: Tensor | None
    D: Tensor
    teacher_logp: Tensor
    overlap: Tensor | None


@dataclass
class View:
    """One micro-batch of responses, each under its prompt. Use it before the next pass over shards. hidden: (B, T, H), the state
    that predicts response token t; tokens: (B, T) response ids, 0 on padding; mask: (B, T), 1 on response tokens including EOS;
    head: (V, H), a plain matrix (`Policy.load` refuses other heads); filled, padded: tokens through the network, without and
    with padding."""

    hidden: Tensor
    tokens: Tensor
    mask: Tensor
    head: Tensor
    filled: int = 0
    padded: int = 0

    def score(self) -> tuple[Tensor, Tensor]:
        """log p of each token and the entropy at its place, (B, T) each, no gradient."""

        def read(logits: Tensor, tokens: Tensor) -> Tensor:
            total = _logsumexp(logits)
            return torch.cat([logits.gather(-1, tokens[:, None]) - total, _entropy(logits, total)], -1)

        return self._read(read, self.tokens).unbind(-1)

    def choices(self, ids: Tensor) -> Tensor:
        """log p of a few tokens, (k,) ids, at each place, (B, T, k), no gradient."""
        return self._read(lambda logits: logits[:, ids] - _logsumexp(logits))

    def draw(self, uniform: Tensor) -> Tensor:
        """Draws a token at each place by inverting the cumulative distribution at `uniform`, (B, T) numbers in [0, 1), float64.
        Returns (B, T) ids, 0 on padding."""
        return self._read(lambda logits, uniform: invert(logits.double().softmax(-1), uniform).squeeze(-1), uniform)

    def loss(
        self, objective: Callable[[SimpleNamespace], Tensor], weights: Tensor, known: dict[str, Tensor] | None = None,
        teacher: "View | None" = None, divergence: Callable[[Tensor, Tensor], Tensor] | None = None, top_k: int | None = None,
        expert: Tensor | None = None, entropy: bool = False,
    ) -> tuple[Tensor, Scores]:  # fmt: skip
        """L = Σ weights · objective(t) over response tokens, differentiable in hidden and head, at O(chunk · V) memory.

        objective: a function of each token by itself. Its argument t has t.logp and t.D, (1, c) and live, and without gradient
        t.teacher_logp and each of `known` by name, (1, c); it returns (1, c). weights and each of `known`: (B, T). teacher: the
        teacher's view of the same responses, made without gradient. divergence: D as a function of (log_s, log_t), a sum over the
        last axis such as `losses.divergence` of a kind; None: D is 0. top_k: D over the student's top k tokens and a tail bucket
        (`losses.top_k_with_tail`); None: over all of V. expert: (B, T) ids from a black box that replaces the teacher, D is −log p
        of them. entropy: whether to measure it. Returns L () and the pass's scores.

        A chunk's gradients are computed in the forward pass, while its logits are in the buffer, so no product is done twice.
        backward only scales them, and can run once.
        """
        real, head = self.mask.bool(), self.head
        hidden, of_teacher = self.hidden[real], teacher.hidden[real] if teacher else None
        places = {"weights": weights, "tokens": self.tokens, "expert": expert, **(known or {})}
        places = {name: x[real] for name, x in places.items() if x is not None}
        need = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
        with torch.no_grad():
            buffer, *other = _buffers(hidden, head, 2 if teacher else 1)
            d_hidden, d_head = (torch.zeros_like(hidden), torch.zeros_like(head)) if need else (None, None)
            total, parts = buffer.new_zeros(()), []
            for first in range(0, max(len(hidden), 1), len(buffer)):  # without tokens, one empty chunk
                at = slice(first, first + len(buffer))
                teacher_logits = _project(of_teacher[at], teacher.head, other[0]) if teacher else None
                logits = _project(hidden[at], head, buffer)
                here = {name: x[at] for name, x in places.items()}
                value, scores = _chunk(objective, logits, teacher_logits, divergence, top_k, entropy, need, **here)
                total += value.detach().to(total.dtype)
                parts.append(vars(scores).values())
                if need:
                    d_logits = logits.to(head.dtype)
                    torch.mm(d_logits, head, out=d_hidden[at])
                    d_head.addmm_(d_logits.T, hidden[at])
            scores = Scores(*(None if x[0] is None else self._spread(torch.cat(x)) for x in zip(*parts)))
        return _Known.apply(total, hidden, head, [d_hidden, d_head]) if need else total, scores

    @torch.no_grad()
    def _read(self, read: Callable[..., Tensor], *places: Tensor) -> Tensor:
        """read(logits (c, V), each of `places` (c,)) of every chunk of response tokens. places: (B, T). Returns (B, T, ...)."""
        real = self.mask.bool()
        hidden = self.hidden[real]
        (buffer,) = _buffers(hidden, self.head)
        chunks = zip(*(x.split(len(buffer)) for x in (hidden, *(x[real] for x in places))))
        return self._spread(torch.cat([read(_project(h, self.head, buffer), *here) for h, *here in chunks]))

    def _spread(self, values: Tensor) -> Tensor:
        """Values of the response tokens, (n, ...), at their places, (B, T, ...), 0 on padding."""
        out = values.new_zeros(*self.mask.shape, *values.shape[1:])
        out[self.mask.bool()] = values
        return out


def invert(p: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative sum of p passes `uniform`. p: (n, V), float64, whose sum over 150,000 tokens is good to
    1e-11; uniform: (n,) in [0, 1). Returns (n, 1) ids, never one of probability 0."""
    cdf = p.cumsum(-1)
    return torch.searchsorted(cdf, uniform.unsqueeze(-1) * cdf[:, -1:], right=True).clamp(max=p.shape[-1] - 1)


# ---- Chunks ----------------------------------------------------------------------------------------------------


def tokens_per_chunk(vocabulary: int, itemsize: int, device: str, buffers: int = 1) -> int:
    """How many tokens' logits fill the buffers: the student's, and where there is a teacher, the teacher's."""
    return max(1, BUFFER_BYTES * (10 if device == "cuda" else 1) // (max(itemsize, 4) * vocabulary * buffers))


def _buffers(hidden: Tensor, head: Tensor, count: int = 1) -> list[Tensor]:
    n = tokens_per_chunk(len(head), head.element_size(), head.device.type, count)
    dtype = torch.promote_types(head.dtype, torch.float32)
    shape = max(1, min(n, len(hidden))), len(head)
    return [torch.empty(shape, dtype=dtype, device=head.device) for _ in range(count)]


def _project(hidden: Tensor, head: Tensor, buffer: Tensor) -> Tensor:
    """Logits (c, V) of a chunk, in the buffer, in float32 or more, since softmax over a large vocabulary loses too much in
    bfloat16. On a CPU the logits of a bfloat16 head are rounded first, as in transformers and vLLM."""
    logits = buffer[: len(hidden)]
    if head.dtype == buffer.dtype:
        return torch.mm(hidden, head.T, out=logits)
    if head.is_cuda:  # a float32 product, unrounded, without a copy
        return torch.mm(hidden, head.T, out_dtype=buffer.dtype, out=logits)
    return logits.copy_(hidden @ head.T)


def _blocks(logits: Tensor) -> tuple[Tensor, ...]:
    return logits.split(COLUMNS * (10 if logits.is_cuda else 1), -1)


def _logsumexp(logits: Tensor) -> Tensor:
    """(c, 1), without a second (c, V) tensor."""
    parts = [block.logsumexp(-1, keepdim=True) for block in _blocks(logits)]
    return torch.cat(parts, -1).logsumexp(-1, keepdim=True)


def _entropy(logits: Tensor, total: Tensor) -> Tensor:
    """(c, 1), a block of columns at a time. total: (c, 1), the logits' logsumexp."""
    entropy = torch.zeros_like(total)
    for block in _blocks(logits):
        log_p = (block - total).clamp_(min=-1e4)  # p = 0 adds nothing, where 0 · −inf would be nan
        entropy -= log_p.exp().mul_(log_p).sum(-1, keepdim=True)
    return entropy


# ---- The loss --------------------------------------------------------------------------------------------------


def _chunk(objective, logits, teacher_logits, divergence, top_k, entropy, need, *, weights, tokens, expert=None, **known):
    """Loss () and scores (c,) of one chunk. logits: (c, V), overwritten by dL / d logits if `need`; teacher_logits: overwritten.
    Autograd starts from a leaf: D itself where it is over all of V, else log p of the top k and the tail, where k may be 0."""
    targets = [ids.unsqueeze(-1) for ids in (expert, tokens) if ids is not None]  # (c, 1) each
    logit_of = torch.cat([logits.gather(-1, ids) for ids in targets], -1)  # (c, 1 or 2)
    teacher_logp = torch.zeros_like(logit_of[:, :1]) if teacher_logits is None else teacher_logits.gather(-1, targets[-1])
    compares = teacher_logits is not None and divergence is not None
    overlap, dense = None, compares and top_k is None
    if dense:
        total, total_t = _logsumexp(logits), _logsumexp(teacher_logits)  # (c, 1)
        H = _entropy(logits, total).squeeze(-1) if entropy else None
        leaf, slope = _compare(logits, total, teacher_logits, total_t, divergence)  # dD / d log s in logits, p in teacher_logits
    elif compares:
        top = logits.topk(top_k, dim=-1).indices  # (c, k), the largest first
        overlap = logits.new_full((len(logits),), torch.nan)
        here = slice(None, None, PLACES)
        overlap[here] = (top[here, :, None] == teacher_logits[here].topk(top_k, dim=-1).indices[:, None]).any(-1).float().mean(-1)
        total_t, _, log_t, _, _ = _split(teacher_logits, top, teacher_logits.amax(-1, keepdim=True))
        total, others, leaf, at_top, H = _split(logits, top, logits.gather(-1, top[:, :1]), entropy)
    else:
        total_t = 0.0 if teacher_logits is None else _logsumexp(teacher_logits)
        top = targets[-1][:, :0]
        total, others, leaf, at_top, H = _split(logits, top, logits.amax(-1, keepdim=True), entropy)
    teacher_logp = teacher_logp - total_t
    with torch.enable_grad():
        leaf, logp = leaf.requires_grad_(), (logit_of - total).T.requires_grad_()  # (1 or 2, c)
        D = torch.zeros_like(logp[-1:], requires_grad=True)
        if expert is not None:
            D = -logp[:1]
        elif compares:
            D = (leaf if dense else divergence(leaf, log_t)).unsqueeze(0)
        known = {"teacher_logp": teacher_logp.squeeze(-1)} | known
        t = SimpleNamespace(**{name: x.unsqueeze(0) for name, x in known.items()}, logp=logp[-1:], D=D)
        value = (weights * objective(t).squeeze(0)).sum()
        scores = Scores(logp[-1].detach(), H, D[0].detach(), teacher_logp.squeeze(-1), overlap)
        if not need:
            return value, scores
        by_logp, by_leaf = torch.autograd.grad(value, [logp, leaf], allow_unused=True, materialize_grads=True)
    by_logp, by_leaf = by_logp.to(logits.dtype).T, by_leaf.to(logits.dtype)  # (c, 1 or 2), and leaf's shape
    pull = by_logp.sum(-1, keepdim=True)
    if dense:
        by_D = by_leaf.unsqueeze(-1)
        logits.mul_(by_D).addcmul_(teacher_logits, pull + by_D * slope, value=-1)
    else:
        pull, tail = pull + by_leaf.sum(-1, keepdim=True), by_leaf[:, -1:]
        z = others + at_top.sum(-1, keepdim=True)
        share = torch.where(tail == 0, 0.0, tail / others)  # e^u times this: the tail's slope split as p_j / p_tail
        logits.mul_(share - pull / z)
        logits.scatter_(-1, top, by_leaf[:, :-1] - at_top / z * pull)
    for ids, by in zip(targets, by_logp.split(1, -1)):
        logits.scatter_add_(-1, ids, by)
    return value, scores


def _split(logits, top, largest, entropy=False) -> tuple[Tensor, ...]:
    """Of logits split into the top k and the tail: logsumexp (c, 1), the tail's sum of exp (c, 1), log p of the buckets (c, k + 1),
    exp of the top k (c, k), entropy (c,) or None. Every exp is of u = logits − largest, (c, 1), and logits are overwritten by it,
    with 0 at the top k. With z = Σ e^u the entropy is log z − (1/z) Σ u e^u."""
    at_top = logits.gather(-1, top) - largest
    exp_top, others, weighted = at_top.exp(), torch.zeros_like(largest), torch.zeros_like(largest)
    for block in _blocks(logits.scatter_(-1, top, -torch.inf)):
        block.sub_(largest)
        u = block.clamp(min=-1e4) if entropy else None  # e^u = 0 adds nothing, where 0 · −inf would be nan
        others += block.exp_().sum(-1, keepdim=True)
        if entropy:
            weighted += u.mul_(block).sum(-1, keepdim=True)
    z = others + exp_top.sum(-1, keepdim=True)
    log_z = z.log()
    weighted += (at_top.clamp(min=-1e4) * exp_top).sum(-1, keepdim=True)
    H = (log_z - weighted / z).squeeze(-1) if entropy else None
    return largest + log_z, others, torch.cat([at_top - log_z, others.log() - log_z], -1), exp_top, H


def _compare(logits, total, teacher_logits, total_t, divergence) -> tuple[Tensor, Tensor]:
    """D over all of V, a block of columns at a time: D (c,) and Σ dD / d log s (c, 1). logits: (c, V), overwritten by dD / d log s;
    total, total_t: (c, 1), their logsumexp and the teacher's; teacher_logits: overwritten by the student's probabilities."""
    D, slope = logits.new_zeros(len(logits)), logits.new_zeros(len(logits), 1)
    for student, teacher in zip(_blocks(logits), _blocks(teacher_logits)):
        with torch.enable_grad():
            log_s = (student - total).requires_grad_()
            part = divergence(log_s, teacher - total_t)
            (by_s,) = torch.autograd.grad(part.sum(), log_s)
        D += part.detach()
        slope += by_s.sum(-1, keepdim=True)
        torch.exp(log_s.detach(), out=teacher)
        student.copy_(by_s)
    return D, slope


class _Known(torch.autograd.Function):
    """A loss whose gradients by hidden states and head are already known: backward scales them."""

    @staticmethod
    def forward(ctx, value, hidden, head, gradients):
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, scale):
        if not ctx.gradients:
            raise RuntimeError("the gradients of this loss were taken once already: compute the loss again")
        d_hidden, d_head = (gradient.mul_(scale) for gradient in ctx.gradients)
        ctx.gradients.clear()  # nobody else holds them, so autograd takes them over without a copy
        return None, d_hidden, d_head, None
