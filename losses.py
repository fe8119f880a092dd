"""Every objective of VPD (arXiv 2605.15113v1) and its baselines as a pure function of tensors.

No function here knows of models, settings or files. To reuse one, copy it with the helpers that its docstring names and this
file's imports.

    B sequences, T response tokens, V vocabulary, K top-k
    log p, log q    log-probabilities, normalised over the last axis
    logp (B, T)     log p(y_t | prompt, y_<t): already shifted, so position t belongs to response token t
    mask (B, T)     1 on response tokens including EOS, 0 on padding

KL always names its arguments: kl(log_p, log_q) is KL(p‖q) = E_p[log p − log q]. Per-token results are (B, T),
unreduced and unmasked; `sequence_mean` reduces them. The teacher is detached wherever it is imitated; in the E-step,
where the teacher learns, the student is.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DIVERGENCES = ("kl_student_teacher", "kl_teacher_student", "js")


# ---- Distributions ---------------------------------------------------------------------------------------


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) = Σ p (log p − log q) over the last axis.

    log_p, log_q: (..., V) log-probabilities. Returns (...). Symbols with p = 0 contribute 0.
    """
    assert log_p.shape == log_q.shape, f"log_p {log_p.shape} and log_q {log_q.shape} differ"
    # 0 log 0 = 0. The difference is masked, not the product, so that the gradient is finite too.
    gap = torch.where(log_p == -math.inf, 0.0, log_p - log_q)
    return (log_p.exp() * gap).sum(-1)


def cross_entropy(log_t: Tensor, log_s: Tensor) -> Tensor:
    """H(T, S) = −Σ T log S over the last axis; the teacher T is detached. DistIL's local cost CE_t (2606.05152).

    log_t, log_s: (..., V or K+1) log-probabilities. Returns (...). Symbols with T = 0 contribute 0.
    """
    assert log_t.shape == log_s.shape, f"log_t {log_t.shape} and log_s {log_s.shape} differ"
    log_t = log_t.detach()
    return -(log_t.exp() * torch.where(log_t == -math.inf, 0.0, log_s)).sum(-1)


def token_logp(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p(y_t | ·) = logits[y_t] − logsumexp(logits).

    logits: (B, T, V); tokens: (B, T) integer ids. Returns (B, T), in float32 for logits in half precision.
    """
    assert logits.shape[:-1] == tokens.shape, f"logits {logits.shape} do not fit tokens {tokens.shape}"
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits, dim=-1, dtype=dtype).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def top_k_with_tail(student_logits: Tensor, teacher_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities at the student's k likeliest tokens, and one bucket for all other tokens, for student and teacher.

    student_logits, teacher_logits: (B, T, V). Returns two (B, T, k+1), tail last. The teacher and the choice of tokens are
    detached. Half precision is computed and returned in float32. The idea is SDPO's (lasgroup/SDPO @0e6d510), whose code forms
    the tail as 1 − Σ_k p_k; here it is a logsumexp over the other tokens, which is exact however small their mass is.
    """
    assert student_logits.shape == teacher_logits.shape, f"student {student_logits.shape} and teacher {teacher_logits.shape} differ"
    assert 1 <= k <= student_logits.shape[-1], f"k = {k} is not in 1..{student_logits.shape[-1]}, the vocabulary"
    top = student_logits.detach().topk(k, dim=-1).indices  # (B, T, k)
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)

    def buckets(logits: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits, dim=-1, dtype=dtype)  # over all of V: true probabilities
        tail = log_p.scatter(-1, top, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([log_p.gather(-1, top), tail], dim=-1)  # (B, T, k+1)

    return buckets(student_logits), buckets(teacher_logits.detach())


def divergence(log_s: Tensor, log_t: Tensor, kind: str) -> Tensor:
    """D(S, T) between student S and teacher T, per token. Eq. 10 of the paper is kl_student_teacher. Needs `kl`.

    kl_student_teacher   KL(S‖T)                                (the paper's "reverse")
    kl_teacher_student   KL(T‖S)                                (the paper's "forward")
    js                   ½ KL(S‖M) + ½ KL(T‖M),  M = ½ S + ½ T

    log_s, log_t: (B, T, V or K+1) log-probabilities. Returns (B, T). log_t carries no gradient. A new kind is a branch here and a
    name in DIVERGENCES; it must be a sum over the last axis, since model/head.py computes it by blocks of columns. Raises
    ValueError for an unknown kind.
    """
    assert log_s.shape == log_t.shape, f"log_s {log_s.shape} and log_t {log_t.shape} differ"
    log_t = log_t.detach()
    if kind == "kl_student_teacher":
        return kl(log_s, log_t)
    if kind == "kl_teacher_student":
        return kl(log_t, log_s)
    if kind == "js":
        # log M − log S = log ½(1 + T/S), from u = log T − log S. The clamp keeps −inf (a forbidden token) from giving inf · 0 or
        # −inf + inf, and changes nothing else: exp(−1e4) is 0.
        u = log_t.clamp(min=-1e4) - log_s.clamp(min=-1e4)
        m_over_s = F.softplus(u, threshold=50) - math.log(2.0)
        return 0.5 * (log_t.exp() * (u - m_over_s) - log_s.exp() * m_over_s).sum(-1)
    raise ValueError(f"unknown divergence {kind!r}: choose one of kl_student_teacher, kl_teacher_student, js")


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, kind: str, top_k: int | None = None) -> Tensor:
    """The token-level loss of the M-step (Eq. 10) and of SDPO (Eq. 2): D(π(·|x,y_<t), sg q(·|x,C,y_<t)).

    student_logits, teacher_logits: (B, T, V); kind: see `divergence`; top_k: None compares whole vocabularies, a number the
    student's top_k tokens and the tail. Returns (B, T), at least float32, to be reduced by `sequence_mean`. Needs `divergence`,
    `kl`, `top_k_with_tail`. The loop computes the same in chunks of tokens (model/head.py).

    In expectation its gradient treats the probabilities of the prefixes y_<t as constants. The gradient of the sequence KL(π‖q)
    also has the score-function term E Σₜ ∇log π(yₜ) Σ_{i>t} KLᵢ (tests/test_theory.py).
    """
    if top_k is None:
        dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
        log_s, log_t = (torch.log_softmax(x, -1, dtype=dtype) for x in (student_logits, teacher_logits.detach()))
    else:
        log_s, log_t = top_k_with_tail(student_logits, teacher_logits, top_k)
    return divergence(log_s, log_t, kind)


# ---- Weights and reductions ------------------------------------------------------------------------------


def truncated_ratio(logp: Tensor, old_logp: Tensor, limit: float) -> Tensor:
    """Importance weight of a token, min(exp(log π − log π_old), limit), detached.

    logp, old_logp: (B, T). Returns (B, T). Source: lasgroup/SDPO @0e6d510 (limit 2).
    """
    assert logp.shape == old_logp.shape, f"logp {logp.shape} and old_logp {old_logp.shape} differ"
    return (logp.detach() - old_logp.detach()).exp().clamp(max=limit)


def sequence_weights(mask: Tensor, num_sequences: int) -> Tensor:
    """A token's share of `sequence_mean`: mask / (tokens of its row · N).

    mask: (B, T); num_sequences: N. Returns (B, T), float64 (float32 on devices without it).
    """
    mask = mask.to(torch.float32 if mask.device.type == "mps" else torch.float64)
    return mask / (mask.sum(-1, keepdim=True).clamp(min=1) * num_sequences)


def sequence_mean(per_token: Tensor, mask: Tensor, num_sequences: int) -> Tensor:
    """The one reduction: L = (1/N) Σᵢ meanₜ(lossᵢₜ) over the row's masked tokens; an empty row counts 0.

    per_token, mask: (B, T). num_sequences: N, all sequences of the optimizer step (empty rows, all micro-batches and all
    ranks included), so that the results of micro-batches add up to the loss of the whole step. Returns (). Needs
    `sequence_weights`. Taking the mean of each row weights its tokens by 1/length, which biases a policy gradient.
    """
    assert per_token.ndim == 2 and per_token.shape == mask.shape, f"per_token {per_token.shape}, mask {mask.shape}: not (B, T)"
    kept = per_token.masked_fill(mask == 0, 0.0)  # padding may hold anything, inf and nan included
    return (kept * sequence_weights(mask, num_sequences).to(kept.dtype)).sum()


# ---- Policy gradient -------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, group_size: int, divide_by_std: bool = False) -> Tensor:
    """Aᵢ = rᵢ − mean(r of its group); with divide_by_std also / (std + 1e-6), the (n−1) standard deviation.

    rewards: (B,), the rows of a group adjacent. Returns (B,). lasgroup/SDPO @0e6d510 does not divide. A row's own reward is part
    of its baseline, so the expected gradient is (1 − 1/G) of the policy gradient. Raises ValueError if group_size does not
    divide B, or for the standard deviation of a group of one.
    """
    assert rewards.ndim == 1, f"rewards must be (B,), not {rewards.shape}"
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not divide into groups of {group_size}")
    groups = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, group_size)  # (B/G, G)
    advantages = groups - groups.mean(1, keepdim=True)
    if divide_by_std:
        if group_size < 2:
            raise ValueError("a group of 1 has no standard deviation")
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-6)
    return advantages.reshape(-1)


def grpo_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float = 3.0
) -> Tensor:
    """Clipped policy gradient: −min(ρ A, clip(ρ, 1−clip_low, 1+clip_high) A), ρ = exp(log π − log π_old).

    Where A < 0 the loss is at most dual_clip · |A| (dual clip). No KL term. At ρ = 1 the gradient in logp is −A.

    logp, old_logp: (B, T); advantages: (B,) for a sequence or (B, T) for tokens (B.24, B.28), finite on padding too.
    Returns (B, T). Only logp carries a gradient. Source: lasgroup/SDPO @0e6d510 (0.2, 0.28, 3).
    """
    assert logp.ndim == 2 and logp.shape == old_logp.shape, f"logp {logp.shape}, old_logp {old_logp.shape}: not (B, T)"
    assert advantages.shape in (logp.shape, logp.shape[:1]), f"advantages {advantages.shape} do not fit logp {logp.shape}"
    A = advantages.detach() if advantages.ndim == 2 else advantages.detach().unsqueeze(-1)  # (B, T) or (B, 1)
    # exp(±20) is far outside every clip range. Without the bound, a ratio that overflows has the gradient 0 · inf = nan.
    rho = (logp - old_logp.detach()).clamp(-20.0, 20.0).exp()
    loss = -torch.minimum(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
    return torch.where(A < 0, torch.minimum(loss, dual_clip * A.abs()), loss)


def reshaped_advantages(advantages: Tensor, teacher_logp: Tensor, student_logp: Tensor, w_rl: float, w_opd: float) -> Tensor:
    """Aₜ = w_rl A + w_opd A^SDPOₜ,  A^SDPOₜ = sg(log q(yₜ|x,C,y_<t) − log π(yₜ|x,y_<t)).  (B.24)

    advantages: (B,) or (B, T); teacher_logp, student_logp: (B, T), both at the weights that sampled the rollouts. Returns
    (B, T), detached. For a row without a context pass its student_logp twice: then A^SDPO = 0 and Aₜ = w_rl A.
    """
    A = advantages if advantages.ndim == 2 else advantages.unsqueeze(-1)
    assert teacher_logp.shape == student_logp.shape, f"teacher {teacher_logp.shape} and student {student_logp.shape} differ"
    assert A.shape in (student_logp.shape, (len(student_logp), 1)), f"advantages {A.shape} do not fit logp {student_logp.shape}"
    return (w_rl * A + w_opd * (teacher_logp - student_logp)).detach()


def reweighted_advantages(advantages: Tensor, teacher_logp: Tensor, student_logp: Tensor, lam: float, clip: float) -> Tensor:
    """Aₜ = A · ((1−λ) + λ · clip(wₜ, 1−ε_w, 1+ε_w)),  wₜ = exp(sign(A) · A^SDPOₜ).  (B.26 to B.28)

    advantages: (B,) or (B, T); teacher_logp, student_logp: (B, T), as in `reshaped_advantages`; lam: λ in [0, 1]; clip: ε_w, 0.2
    in RLSD (2604.03128). Returns (B, T), detached. For a row without a context pass its student_logp twice: then wₜ = 1.
    """
    A = advantages if advantages.ndim == 2 else advantages.unsqueeze(-1)
    assert teacher_logp.shape == student_logp.shape, f"teacher {teacher_logp.shape} and student {student_logp.shape} differ"
    assert A.shape in (student_logp.shape, (len(student_logp), 1)), f"advantages {A.shape} do not fit logp {student_logp.shape}"
    w = (A.sign() * (teacher_logp - student_logp)).exp().clamp(1 - clip, 1 + clip)
    return (A * ((1 - lam) + lam * w)).detach()


def cost_to_go(cost: Tensor, mask: Tensor) -> Tensor:
    """cₜ = Σ_{i>t} costᵢ over the row's masked tokens, strictly later ones only, since a token's own cost has a gradient of its
    own. DistIL (2606.05152).

    cost, mask: (B, T). Returns (B, T), detached; 0 at a row's last token and on padding.
    """
    assert cost.shape == mask.shape, f"cost {cost.shape} and mask {mask.shape} differ"
    kept = cost.detach().masked_fill(mask == 0, 0.0)
    return F.pad(kept[:, 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))


def future_advantages(cost: Tensor, mask: Tensor, group_size: int, counted: Tensor | None = None) -> Tensor:
    """Aₜ = −(cₜ − bₜ),  cₜ = Σ_{i>t} costᵢ,  bₜ = mean of cₜ over the other rows of the group; a row that has ended counts as 0.

    cost, mask: (B, T), the rows of a group adjacent; counted: (B,), rows that have a cost (a context), default all: the
    others get A = 0 and enter no baseline. Returns (B, T), detached, 0 on padding. Needs `cost_to_go`. DistIL (2606.05152) passes
    it to `grpo_loss` as the advantage and adds the local term `cross_entropy`. bₜ leaves the expected gradient as it is if no
    other row's context is made from this row. Raises ValueError if group_size does not divide B.
    """
    if len(cost) % group_size:
        raise ValueError(f"{len(cost)} rows do not divide into groups of {group_size}")
    counted = torch.ones_like(cost[:, 0]) if counted is None else counted.to(cost.dtype)
    assert counted.shape == cost.shape[:1], f"counted {counted.shape} must be (B,) of cost {cost.shape}"
    kept = cost.masked_fill((counted == 0)[:, None], 0.0)  # rows that are not counted may hold anything, nan included
    c = cost_to_go(kept, mask).view(-1, group_size, cost.shape[1])  # (B/G, G, T)
    n = counted.view(-1, group_size, 1)
    b = (c.sum(1, keepdim=True) - c) / (n.sum(1, keepdim=True) - n).clamp(min=1)
    return ((b - c) * n).view_as(cost) * (mask != 0)


# ---- E-step ----------------------------------------------------------------------------------------------


def implicit_reward(teacher_logp: Tensor, student_logp: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r̃(x,y,C) = β (log q_φ(y|x,C) − log π_θ(y|x)), sequence log-probabilities: the SUM over tokens.  (Eq. 7)

    teacher_logp, student_logp, mask: (B, T). Returns (B,). The student is frozen: it is detached here.
    """
    shapes = teacher_logp.shape, student_logp.shape, mask.shape
    assert mask.ndim == 2 and len({*shapes}) == 1, f"teacher_logp, student_logp, mask {shapes}: not (B, T)"
    return beta * (teacher_logp - student_logp.detach()).masked_fill(mask == 0, 0.0).sum(-1)


def reward_shift(implicit_rewards: Tensor, rewards: Tensor) -> Tensor:
    """One batch's value for the shift δ: ½ (mean_{r=1} r̃ + mean_{r=0} r̃), detached.  (below Eq. 9)

    implicit_rewards: (B,); rewards: (B,) of 0 and 1. Returns (). δ is a moving average of these values (`moving_shift`). Raises
    ValueError if a class is empty.
    """
    assert implicit_rewards.shape == rewards.shape, f"implicit_rewards {implicit_rewards.shape} and rewards {rewards.shape} differ"
    assert ((rewards == 0) | (rewards == 1)).all(), "rewards must be 0 or 1"
    success, failure = implicit_rewards.detach()[rewards == 1], implicit_rewards.detach()[rewards == 0]
    if len(success) == 0 or len(failure) == 0:
        raise ValueError(f"the shift needs both outcomes: {len(success)} successes, {len(failure)} failures")
    return 0.5 * (success.mean() + failure.mean())


def moving_shift(last: float | None, value: float, rate: float) -> float:
    """δₙ = (1 − rate) δₙ₋₁ + rate · value, starting at the first value.  (below Eq. 9; the paper gives no rate)

    last: δ of the previous E-step, None at the first; value: `reward_shift` of this batch. A value that is not finite does not
    move δ, so that one overflow does not spoil all later E-steps.
    """
    if last is None:
        return value
    return (1 - rate) * last + rate * value if math.isfinite(value) else last


def bco_loss(
    implicit_rewards: Tensor, rewards: Tensor, shift: Tensor | float,
    num_pos: int | None = None, num_neg: int | None = None, floor: float | None = None,
) -> Tensor:  # fmt: skip
    """L_E = −(1/n₊) Σ_{r=1} log σ(r̃ − δ) − (1/n₋) Σ_{r=0} log σ(−(r̃ − δ)).  (Eq. 9)

    implicit_rewards: (B,), r̃ of `implicit_reward`; rewards: (B,) of 0 and 1; shift: δ of `moving_shift`, carries no gradient;
    num_pos, num_neg: n₊ and n₋ of the whole optimizer step if these rows are only a micro-batch of it (default: of these rows);
    floor: a failure with r̃ at or below it adds nothing (our departure; None: Eq. 9). Returns (). A class without rows adds
    nothing. This is a classifier's loss, not Eq. 5: over unrestricted q its infimum is at q(failure) = 0. The gradient in r̃ is
    −σ(−(r̃−δ))/n₊ on a success and +σ(r̃−δ)/n₋ on a failure.
    """
    assert implicit_rewards.shape == rewards.shape, f"implicit_rewards {implicit_rewards.shape} and rewards {rewards.shape} differ"
    assert ((rewards == 0) | (rewards == 1)).all(), "rewards must be 0 or 1"
    shift = shift.detach() if isinstance(shift, Tensor) else shift
    success = (rewards == 1).to(implicit_rewards.dtype)
    num_pos = max(int(success.sum()) if num_pos is None else num_pos, 1)
    num_neg = max(int((1 - success).sum()) if num_neg is None else num_neg, 1)
    failure = 1 - success if floor is None else (1 - success) * (implicit_rewards > floor)
    logit = implicit_rewards - shift
    return -(success * F.logsigmoid(logit)).sum() / num_pos - (failure * F.logsigmoid(-logit)).sum() / num_neg
