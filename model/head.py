"""The vocabulary head in chunks of tokens: from hidden states to losses without a tensor of (T, V), forward or backward.

A logits tensor is the largest thing in training: 8,192 tokens of Qwen3 are 5 GB in float32, and plain autograd keeps
several for student and teacher. Here a chunk of tokens is projected into a buffer, its loss and its gradient are taken on
the spot, and the buffer serves the next chunk. The formulas stay in losses.py and are differentiated by autograd, on the
few buckets of a chunk. Only the step from log-probabilities to logits, the Jacobian of log softmax, is written out:

    L = f(log p),  g = dL / d log p   =>   dL / d logits_j = g_j − p_j Σ_k g_k

`View.loss` returns what `losses.sequence_mean(objective(log p, losses.distillation_loss(...)), ...)` returns on whole logits,
which is the readable reference that tests/test_head.py compares it with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

BUFFER_BYTES = 80 << 20  # of the buffers of logits together on a CPU; on CUDA ten times as much
PLACES = 16  # the overlap of the two top k is taken at every 16th place: the teacher's own top k is one more pass over V
COLUMNS = 4096  # of the vocabulary, taken at a time on a CPU, where they fit its caches; on CUDA ten times as many


@dataclass
class Scores:
    """What a pass says of each response token, (B, T) each, detached, 0 on padding. logp: log p(y_t) of the student; entropy:
    of the distribution y_t comes from, or None where nobody asked; D: D(student, teacher); teacher_logp: log p(y_t) of the
    teacher; 0 without a teacher; overlap: the share of the student's top k that is in the teacher's, nan where nobody looked."""

    logp: Tensor
    entropy: Tensor | None
    D: Tensor
    teacher_logp: Tensor
    overlap: Tensor | None


@dataclass
class View:
    """One micro-batch of responses under one prompt each, to be used before the next pass over shards. hidden: (B, T, H),
    the state that predicts response token t; tokens: (B, T) response ids, 0 on padding; mask: (B, T), 1 on response
    tokens incl. EOS; head: (V, H), a plain matrix (`Policy.load` refuses other heads). filled, padded: tokens that went
    through the network, without and with padding."""

    hidden: Tensor
    tokens: Tensor
    mask: Tensor
    head: Tensor
    filled: int = 0
    padded: int = 0

    def score(self) -> tuple[Tensor, Tensor]:
        """log p of each token and the entropy of the distribution it comes from, (B, T) each, no gradient."""

        def read(logits: Tensor, tokens: Tensor) -> Tensor:
            total = _logsumexp(logits)
            return torch.cat([logits.gather(-1, tokens[:, None]) - total, _entropy(logits, total)], -1)

        return self._read(read, self.tokens).unbind(-1)

    def choices(self, ids: Tensor) -> Tensor:
        """log p of each of a few tokens, (k,) ids, at each place, no gradient. Returns (B, T, k)."""
        return self._read(lambda logits: logits[:, ids] - _logsumexp(logits))

    def draw(self, uniform: Tensor) -> Tensor:
        """One token of the distribution at each place, by inverting its cumulative sum at `uniform`, (B, T) numbers in [0, 1),
        float64. Returns (B, T) ids, 0 on padding."""
        return self._read(lambda logits, uniform: invert(logits.double().softmax(-1), uniform).squeeze(-1), uniform)

    def loss(
        self, objective: Callable[[SimpleNamespace], Tensor], weights: Tensor, known: dict[str, Tensor] | None = None,
        teacher: "View | None" = None, divergence: Callable[[Tensor, Tensor], Tensor] | None = None, top_k: int | None = None,
        expert: Tensor | None = None, entropy: bool = False,
    ) -> tuple[Tensor, Scores]:  # fmt: skip
        """L = Σ weights · objective(t) over response tokens, differentiable in hidden and head, at O(chunk · V) memory.

        objective: a function of each token by itself. It gets t with t.logp and t.D, (1, c) and live, t.teacher_logp, and each of
        `known` by name, (1, c) without gradient; it returns (1, c). weights and each of `known`: (B, T). teacher: the same
        responses in the teacher's view, without gradient. divergence: D as a function of (log_s, log_t), a sum over the last
        axis such as `losses.divergence` of a kind; None: D is 0. top_k: D over the student's top k tokens and a tail bucket
        (`losses.top_k_with_tail`); None: over all of V. expert: (B, T) ids, one token that a black box took at each place, in
        the teacher's place: D is −log p of it. entropy: whether to measure it. Returns L () and the pass's scores.

        The gradients of a chunk are taken while its logits are in the buffer, in the forward pass, so no product is done
        twice; backward only scales them. It can therefore run once.
        """
        kept, head = self.mask.bool(), self.head
        hidden, of_teacher = self.hidden[kept], teacher.hidden[kept] if teacher else None
        places = {"weights": weights, "tokens": self.tokens, "expert": expert, **(known or {})}
        places = {name: x[kept] for name, x in places.items() if x is not None}
        need = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
        with torch.no_grad():
            buffer, *other = _buffers(hidden, head, 2 if teacher else 1)
            d_hidden, d_head = (torch.zeros_like(hidden), torch.zeros_like(head)) if need else (None, None)
            total, parts = buffer.new_zeros(()), []
            for first in range(0, max(len(hidden), 1), len(buffer)):  # without tokens one chunk of none
                at = slice(first, first + len(buffer))
                taught = _project(of_teacher[at], teacher.head, other[0]) if teacher else None
                logits = _project(hidden[at], head, buffer)
                here = {name: x[at] for name, x in places.items()}
                value, scores = _chunk(objective, logits, taught, divergence, top_k, entropy, need, **here)
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
        kept = self.mask.bool()
        hidden = self.hidden[kept]
        (buffer,) = _buffers(hidden, self.head)
        chunks = zip(*(x.split(len(buffer)) for x in (hidden, *(x[kept] for x in places))))
        return self._spread(torch.cat([read(_project(h, self.head, buffer), *here) for h, *here in chunks]))

    def _spread(self, values: Tensor) -> Tensor:
        """(n, ...) of the response tokens as (B, T, ...), 0 on padding."""
        out = values.new_zeros(*self.mask.shape, *values.shape[1:])
        out[self.mask.bool()] = values
        return out


def invert(p: Tensor, uniform: Tensor) -> Tensor:
    """The token where the cumulative sum of p passes `uniform`. p: (n, V), float64, in which the sum over 150,000 tokens is
    good to 1e-11; uniform: (n,) in [0, 1). Returns (n, 1) ids, never one of probability 0."""
    cdf = p.cumsum(-1)
    return torch.searchsorted(cdf, uniform.unsqueeze(-1) * cdf[:, -1:], right=True).clamp(max=p.shape[-1] - 1)


# ---- Chunks ----------------------------------------------------------------------------------------------------


def tokens_per_chunk(vocabulary: int, itemsize: int, device: str, buffers: int = 1) -> int:
    """Tokens whose logits fill the buffers, one of the student and where there is a teacher one of the teacher."""
    return max(1, BUFFER_BYTES * (10 if device == "cuda" else 1) // (max(itemsize, 4) * vocabulary * buffers))


def _buffers(hidden: Tensor, head: Tensor, count: int = 1) -> list[Tensor]:
    n = tokens_per_chunk(len(head), head.element_size(), head.device.type, count)
    dtype = torch.promote_types(head.dtype, torch.float32)
    shape = max(1, min(n, len(hidden))), len(head)
    return [torch.empty(shape, dtype=dtype, device=head.device) for _ in range(count)]


def _project(hidden: Tensor, head: Tensor, buffer: Tensor) -> Tensor:
    """Logits (c, V) of a chunk, in the buffer, at least float32, so that what follows is: softmax over a large vocabulary
    loses too much in bfloat16. On a CPU the logits of a bfloat16 head are rounded, as in transformers and vLLM."""
    logits = buffer[: len(hidden)]
    if head.dtype == buffer.dtype:
        return torch.mm(hidden, head.T, out=logits)
    if head.is_cuda:  # the product in float32, unrounded, without a copy on the way
        return torch.mm(hidden, head.T, out_dtype=buffer.dtype, out=logits)
    return logits.copy_(hidden @ head.T)


def _blocks(logits: Tensor) -> tuple[Tensor, ...]:
    return logits.split(COLUMNS * (10 if logits.is_cuda else 1), -1)


def _logsumexp(logits: Tensor) -> Tensor:
    """(c, 1), without a second tensor of (c, V)."""
    parts = [block.logsumexp(-1, keepdim=True) for block in _blocks(logits)]
    return torch.cat(parts, -1).logsumexp(-1, keepdim=True)


def _entropy(logits: Tensor, total: Tensor) -> Tensor:
    """(c, 1), a block of columns at a time. total: (c, 1), the logits' logsumexp."""
    entropy = torch.zeros_like(total)
    for block in _blocks(logits):
        log_p = (block - total).clamp_(min=-1e4)  # p = 0 has no share: 0 · −inf
        entropy -= log_p.exp().mul_(log_p).sum(-1, keepdim=True)
    return entropy


# ---- The loss --------------------------------------------------------------------------------------------------


def _chunk(objective, logits, taught, divergence, top_k, entropy, need, *, weights, tokens, expert=None, **known):
    """Loss () and scores (c,) of one chunk. logits: (c, V), left holding dL / d logits if `need`; taught: the teacher's, which
    are lost. D is formed of a leaf: D itself over all of V, else log p of the top k and the tail, where k may be 0."""
    named = [ids.unsqueeze(-1) for ids in (expert, tokens) if ids is not None]  # (c, 1) each
    at_named = torch.cat([logits.gather(-1, ids) for ids in named], -1)  # (c, 1 or 2)
    teacher_logp = torch.zeros_like(at_named[:, :1]) if taught is None else taught.gather(-1, named[-1])
    compares = taught is not None and divergence is not None
    overlap, dense = None, compares and top_k is None
    if dense:
        total, total_t = _logsumexp(logits), _logsumexp(taught)  # (c, 1)
        H = _entropy(logits, total).squeeze(-1) if entropy else None
        leaf, slope = _compare(logits, total, taught, total_t, divergence)  # dD / d log s in logits, p in taught
    elif compares:
        top = logits.topk(top_k, dim=-1).indices  # (c, k), the largest first
        overlap = logits.new_full((len(logits),), torch.nan)
        here = slice(None, None, PLACES)
        overlap[here] = (top[here, :, None] == taught[here].topk(top_k, dim=-1).indices[:, None]).any(-1).float().mean(-1)
        total_t, _, log_t, _, _ = _split(taught, top, taught.amax(-1, keepdim=True))
        total, others, leaf, at_top, H = _split(logits, top, logits.gather(-1, top[:, :1]), entropy)
    else:
        total_t = 0.0 if taught is None else _logsumexp(taught)
        top = named[-1][:, :0]
        total, others, leaf, at_top, H = _split(logits, top, logits.amax(-1, keepdim=True), entropy)
    teacher_logp = teacher_logp - total_t
    with torch.enable_grad():
        leaf, logp = leaf.requires_grad_(), (at_named - total).T.requires_grad_()  # (1 or 2, c)
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
    by_logp, by_leaf = by_logp.to(logits.dtype).T, by_leaf.to(logits.dtype)  # (c, 1 or 2), and of the shape of leaf
    pull = by_logp.sum(-1, keepdim=True)
    if dense:
        by_D = by_leaf.unsqueeze(-1)
        logits.mul_(by_D).addcmul_(taught, pull + by_D * slope, value=-1)
    else:
        pull, tail = pull + by_leaf.sum(-1, keepdim=True), by_leaf[:, -1:]
        z = others + at_top.sum(-1, keepdim=True)
        share = torch.where(tail == 0, 0.0, tail / others)  # of the tail's own slope, p_j / p_tail
        logits.mul_(share - pull / z)
        logits.scatter_(-1, top, by_leaf[:, :-1] - at_top / z * pull)
    for ids, by in zip(named, by_logp.split(1, -1)):
        logits.scatter_add_(-1, ids, by)
    return value, scores


def _split(logits, top, largest, entropy=False) -> tuple[Tensor, ...]:
    """The top k and the tail: (logsumexp (c, 1), what the tail sums to (c, 1), log p of the buckets (c, k + 1), exp of the top k
    (c, k), entropy (c,) or None). largest: (c, 1). logits are left holding exp(logits - largest), 0 at the top k.

    With u = logits − largest and z = Σ e^u the entropy is log z − (1/z) Σ u e^u."""
    at_top = logits.gather(-1, top) - largest
    exp_top, others, weighted = at_top.exp(), torch.zeros_like(largest), torch.zeros_like(largest)
    for block in _blocks(logits.scatter_(-1, top, -torch.inf)):
        block.sub_(largest)
        u = block.clamp(min=-1e4) if entropy else None  # e^u = 0 has no share: 0 · −inf
        others += block.exp_().sum(-1, keepdim=True)
        if entropy:
            weighted += u.mul_(block).sum(-1, keepdim=True)
    z = others + exp_top.sum(-1, keepdim=True)
    log_z = z.log()
    weighted += (at_top.clamp(min=-1e4) * exp_top).sum(-1, keepdim=True)
    H = (log_z - weighted / z).squeeze(-1) if entropy else None
    return largest + log_z, others, torch.cat([at_top - log_z, others.log() - log_z], -1), exp_top, H


def _compare(logits, total, taught, total_t, divergence) -> tuple[Tensor, Tensor]:
    """D over the whole vocabulary, a block of columns at a time. logits: (c, V), left holding dD / d log s; total: (c, 1) their
    logsumexp; taught: the teacher's logits, left holding the student's probabilities. Returns D (c,) and Σ dD / d log s (c, 1)."""
    D, slope = logits.new_zeros(len(logits)), logits.new_zeros(len(logits), 1)
    for student, teacher in zip(_blocks(logits), _blocks(taught)):
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
    """A loss whose gradients in hidden states and head are known already: backward scales them."""

    @staticmethod
    def forward(ctx, value, hidden, head, gradients):
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, scale):
        if not ctx.gradients:
            raise RuntimeError("the gradients of this loss were taken once already; form the loss again")
        d_hidden, d_head = (gradient.mul_(scale) for gradient in ctx.gradients)
        ctx.gradients.clear()  # nobody else holds them, so that autograd takes them over without a copy
        return None, d_hidden, d_head, None
