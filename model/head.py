"""The vocabulary head in chunks of tokens: from hidden states to losses without a tensor of (T, V), forward or backward.

A logits tensor is the largest thing in training: 8,192 tokens of Qwen3 are 5 GB in float32, and plain autograd keeps
several for student and teacher. Here a chunk of tokens is projected into a buffer, its loss and its gradient are taken on
the spot, and the buffer serves the next chunk. The formulas stay in losses.py and are differentiated by autograd, on the
few buckets of a chunk; only the step from log-probabilities to logits, the Jacobian of log softmax, is written out:

    L = f(log p),  g = dL / d log p   =>   dL / d logits_j = g_j − p_j Σ_k g_k

`losses.distillation_loss` and `losses.token_logp` on whole logits are the readable reference that tests compare with.
"""

from collections.abc import Callable, Sequence

import torch

import losses

BUFFER_BYTES = 80 << 20  # of one buffer of logits on a CPU; on CUDA ten times as much
COLUMNS = 4096  # of the vocabulary, compared at a time when all of it is


def tokens_per_chunk(vocabulary: int, width: int, top_k: int | None, itemsize: int, device: str) -> int:
    """Tokens whose logits, and the rows of the teacher's head at their top k, fill one buffer."""
    per_token = max(itemsize, 4) * vocabulary + itemsize * (top_k or 0) * width
    return max(1, BUFFER_BYTES * (10 if device == "cuda" else 1) // per_token)


def _project(hidden: torch.Tensor, head: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Logits (n, V) of a chunk, in the buffer, at least float32, so that what follows is: softmax over a large vocabulary
    loses too much in bfloat16. Of a bfloat16 head the logits themselves are rounded, as in transformers and vLLM."""
    logits = buffer[: len(hidden)]
    if head.dtype == buffer.dtype:
        return torch.mm(hidden, head.T, out=logits)
    return logits.copy_(hidden @ head.T)


def _logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """(n, 1), without a second tensor of (n, V)."""
    parts = [block.logsumexp(-1, keepdim=True) for block in logits.split(COLUMNS, -1)]
    return torch.cat(parts, -1).logsumexp(-1, keepdim=True)


def _exponentiate(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns logits (c, V) into z · p in place, where p sums to 1. Returns z and their logsumexp, both (c, 1)."""
    largest = logits.amax(-1, keepdim=True)
    z = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    return z, largest + z.log()


def _buffer(hidden: torch.Tensor, head: torch.Tensor, top_k: int | None = None) -> torch.Tensor:
    n = tokens_per_chunk(*head.shape, top_k, head.element_size(), head.device.type)
    dtype = torch.promote_types(head.dtype, torch.float32)
    return torch.empty(max(1, min(n, len(hidden))), len(head), dtype=dtype, device=head.device)


@torch.no_grad()
def score(hidden: torch.Tensor, head: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of each token and the entropy of the distribution it comes from, no gradient.

    hidden: (n, H); head: (V, H); tokens: (n,) ids. Returns two (n,).
    """
    buffer = _buffer(hidden, head)
    logp, entropy = buffer.new_zeros(len(hidden)), buffer.new_zeros(len(hidden))
    for first in range(0, len(hidden), len(buffer)):
        at = slice(first, first + len(buffer))
        log_p = _project(hidden[at], head, buffer)
        log_p -= _logsumexp(log_p)
        logp[at] = log_p.gather(-1, tokens[at, None]).squeeze(-1)
        for block in log_p.split(COLUMNS, -1):
            entropy[at] -= (block.exp() * block).nan_to_num(0.0).sum(-1)  # p = 0 has no share: 0 · −inf
    return logp, entropy


@torch.no_grad()
def choices(hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log p of each of a few tokens at each place. hidden: (n, H); head: (V, H); ids: (k,). Returns (n, k)."""
    buffer = _buffer(hidden, head)
    logp = buffer.new_zeros(len(hidden), len(ids))
    for first in range(0, len(hidden), len(buffer)):
        at = slice(first, first + len(buffer))
        logits = _project(hidden[at], head, buffer)
        logp[at] = logits[:, ids] - _logsumexp(logits)
    return logp


def loss(
    objective: Callable[..., torch.Tensor],
    weights: torch.Tensor,
    hidden: torch.Tensor,
    head: torch.Tensor,
    tokens: torch.Tensor,
    given: Sequence[torch.Tensor] = (),
    teacher: tuple[torch.Tensor, torch.Tensor] | None = None,
    kind: str = "kl_student_teacher",
    top_k: int | None = None,
    expert: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """L = Σ_i weights_i · objective(log p(y_i), D_i, *given_i), differentiable in hidden and head, at O(chunk · V) memory.

    objective: a function of each token by itself, (1, c) tensors in, (1, c) out; weights: (n,); hidden: (n, H) of the
    student; head: (V, H); tokens: (n,) ids; given: tensors of (n,) that the objective wants beside, no gradient;
    teacher: hidden states (n, H') and head (V, H') without gradient, or None, then D is 0; kind, top_k: of D as in
    `losses.distillation_loss`; expert: (n,) ids in the teacher's place, one token that it took at each, and D is −log p of
    that: of a black box there is no more. Returns L (), log p (n,) and D (n,), the last two detached.

    The gradients of a chunk are taken while its logits stand in the buffer, in the forward pass, so no product is done
    twice; backward only scales them. It can therefore run once.
    """
    n, need = len(hidden), torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    with torch.no_grad():
        buffer = _buffer(hidden, head, top_k if teacher else None)
        other = torch.empty_like(buffer) if teacher and top_k is None else None
        d_hidden, d_head = (torch.zeros_like(hidden), torch.zeros_like(head)) if need else (None, None)
        total, logp, apart = buffer.new_zeros(()), buffer.new_zeros(n), buffer.new_zeros(n)
        for first in range(0, n, len(buffer)):
            at = slice(first, first + len(buffer))
            taught = (teacher[0][at], teacher[1]) if teacher else None
            d_logits, value, logp[at], apart[at] = _chunk(
                objective, weights[at], hidden[at], head, tokens[at], [x[at] for x in given], taught, kind, top_k,
                None if expert is None else expert[at], need, buffer, other,
            )  # fmt: skip
            total += value
            if need:
                d_logits = d_logits.to(head.dtype)
                torch.mm(d_logits, head, out=d_hidden[at])
                d_head.addmm_(d_logits.T, hidden[at])
    return _Known.apply(total, hidden, head, [d_hidden, d_head]) if need else total, logp, apart


def invert(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token where the cumulative sum of p passes `uniform`. p: (n, V), float64, in which the sum over 150,000 tokens is
    good to 1e-11; uniform: (n,) in [0, 1). Returns (n, 1) ids, never one of probability 0."""
    cdf = p.cumsum(-1)
    return torch.searchsorted(cdf, uniform.unsqueeze(-1) * cdf[:, -1:], right=True).clamp(max=p.shape[-1] - 1)


@torch.no_grad()
def draw(hidden: torch.Tensor, head: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One token of the distribution at each place, by inverting its cumulative sum at `uniform`.

    hidden: (n, H); head: (V, H); uniform: (n,) in [0, 1), float64. Returns (n,) ids.
    """
    buffer = _buffer(hidden, head)
    tokens = torch.zeros(len(hidden), dtype=torch.long, device=head.device)
    for first in range(0, len(hidden), len(buffer)):
        at = slice(first, first + len(buffer))
        logits = _project(hidden[at], head, buffer)
        tokens[at] = invert(logits.double().softmax(-1), uniform[at]).squeeze(-1)
    return tokens


def _chunk(objective, weights, hidden, head, tokens, given, teacher, kind, top_k, expert, need, buffer, other):
    """(dL/dlogits (c, V) in the buffer, L, log p (c,), D (c,)) of one chunk."""
    given = [x.unsqueeze(0) for x in given]
    tokens = tokens.unsqueeze(-1)
    if teacher and top_k is not None:
        # One buffer for both: of the teacher's logits only the normaliser is kept, those at the student's top k are
        # formed again from k rows of the head.
        t_total = _exponentiate(_project(*teacher, buffer))[1]
    logits = _project(hidden, head, buffer)
    chosen = logits.gather(-1, tokens)  # (c, 1)
    at_top = apart = log_t = None
    if expert is not None:  # the one bucket that is known of the teacher's distribution
        top = expert.unsqueeze(-1)
        at_top = logits.gather(-1, top)
    elif teacher and top_k is not None:
        top = logits.topk(top_k, dim=-1).indices  # (c, k)
        at_top = logits.gather(-1, top)
        log_t = torch.einsum("ckh,ch->ck", teacher[1][top], teacher[0]).to(logits.dtype) - t_total
    if teacher and top_k is None:
        total = _logsumexp(logits)  # (c, 1)
        # Slopes stand in logits afterwards, p in other.
        apart, slope = _compare(logits, total, _project(*teacher, other), kind)
    else:
        z, total = _exponentiate(logits)  # z p now stands in logits
    with torch.enable_grad():
        logp = (chosen - total).squeeze(-1).unsqueeze(0).requires_grad_()  # (1, c)
        leaves = [logp]
        if at_top is not None:
            log_s = (at_top - total).requires_grad_()  # (c, k)
            leaves.append(log_s)
            apart = (
                -log_s.squeeze(-1)
                if expert is not None
                else losses.divergence(losses.with_tail(log_s), losses.with_tail(log_t), kind)
            ).unsqueeze(0)
        else:
            apart = torch.zeros_like(logp) if apart is None else apart.unsqueeze(0)
            leaves.append(apart.requires_grad_())
        value = (weights * objective(logp, apart, *given).squeeze(0)).sum()
        known = value.detach().to(logits.dtype), logp.detach().squeeze(0), apart.detach().squeeze(0)
        if not need:
            return None, *known
        by_logp, by_other = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    by_logp = by_logp.to(logits.dtype).T  # (c, 1)
    by_other = by_other.to(logits.dtype)
    if at_top is not None:  # by_other: dL / d log p at the top k
        logits.mul_(-(by_logp + by_other.sum(-1, keepdim=True)) / z)
        logits.scatter_add_(-1, top, by_other)
    elif teacher:  # by_other: dL / dD
        by_other, p = by_other.T, other[: len(logits)]
        logits.mul_(by_other).addcmul_(p, by_logp + by_other * slope, value=-1)
    else:
        logits.mul_(-by_logp / z)
    logits.scatter_add_(-1, tokens, by_logp)
    return logits, *known


def _compare(
    logits: torch.Tensor, total: torch.Tensor, logits_t: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """D over the whole vocabulary, a block of columns at a time. logits: (c, V), left holding dD / d log s; total: (c, 1) their
    logsumexp; logits_t: (c, V), left holding the student's probabilities. Returns D (c,) and Σ dD / d log s (c, 1)."""
    total_t = _logsumexp(logits_t)
    apart, slope = logits.new_zeros(len(logits)), logits.new_zeros(len(logits), 1)
    for mine, theirs in zip(logits.split(COLUMNS, -1), logits_t.split(COLUMNS, -1)):
        with torch.enable_grad():
            log_s = (mine - total).requires_grad_()
            part = losses.divergence(log_s, theirs - total_t, kind)
            (by_s,) = torch.autograd.grad(part.sum(), log_s)
        apart += part.detach()
        slope += by_s.sum(-1, keepdim=True)
        torch.exp(log_s.detach(), out=theirs)
        mine.copy_(by_s)
    return apart, slope


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
