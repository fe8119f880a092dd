"""A second implementation of Algorithm 1, its baselines, DistIL and OVD, written from the papers as a reference for the real loops.

float64, whole logits, torch's AdamW, one row at a time: no padding, no batches, nothing imported from the project. Equation
numbers are those of arXiv 2605.15113v1. Shapes: T response tokens of one row, V vocabulary, K top-k.

    state = new_state(model, s)
    figures = one_batch(state, rows, s, after_update=lambda kind, model: ...)     # kind is "e" or "m"

The attributes of s are the settings; s.teacher is "live" or "ema", s.mismatch_limit a number or None. A model is called like a
Hugging Face causal LM: model(input_ids=(1, L), use_cache=False).logits.
"""

import copy
import math
from dataclasses import dataclass

import torch


@dataclass
class Row:  # one rollout; the rows of a group are adjacent
    prompt: list  # x
    teacher_prompt: list | None  # x and C; None: no context
    response: list  # y
    reward: float  # r, 0.0 or 1.0
    sampler_logp: list  # (T,) the sampler's log-probs
    graded: bool = True
    shown: bool = False  # OVD: the response is a demonstration
    taken: list | None = None  # (T,) DistIL: the tokens that a black-box teacher drew

    @property
    def has_context(self):
        return self.graded and self.teacher_prompt is not None


@dataclass
class State:
    model: torch.nn.Module  # the one network, student and teacher
    teacher: torch.nn.Module | None  # its moving average, if s.teacher is ema
    initial: torch.nn.Module | None  # its initial weights, if s.prior is fixed
    optimizers: dict  # "m" and "e", the same object if it is shared
    delta: float | None = None  # BCO's shift
    step: int = 0  # index k of the next rollout batch


def new_state(model, s):
    ema = s.teacher == "ema" and s.method != "grpo"
    how = dict(betas=(s.adam_beta1, s.adam_beta2), weight_decay=s.weight_decay)
    m = torch.optim.AdamW(model.parameters(), **how)
    e = m if s.e_optimizer == "shared" else torch.optim.AdamW(model.parameters(), **how)
    initial = copy.deepcopy(model) if s.prior == "fixed" else None
    return State(model, copy.deepcopy(model) if ema else None, initial, {"m": m, "e": e})


def mean(values):
    return sum(values) / len(values) if values else None


# ---- Log-probs of a row


def logits(model, prompt, response):
    """(T, V): the logits that predict response token t, at positions len(prompt)-1 .. len(prompt)+T-2."""
    ids = torch.tensor([prompt + response])  # (1, L)
    out = model(input_ids=ids, use_cache=False).logits[0]  # (L, V)
    return out[len(prompt) - 1 : len(prompt) - 1 + len(response)]


def chosen_logp(row_logits, response):
    """(T,): log softmax(logits)[y_t]."""
    return row_logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)]


def logp(model, prompt, response):
    return chosen_logp(logits(model, prompt, response), response)  # (T,)


# ---- Divergences (Eq. 2, Eq. 10)


def kl(log_p, log_q):
    """KL(p||q) = sum_a p(a) (log p(a) - log q(a))."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def with_tail(log_p, top):
    """(T, K+1): log-probs at the tokens top (T, K), then the log-prob of all others together."""
    inside = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, top, True)  # (T, V)
    return torch.cat([log_p.gather(-1, top), log_p.masked_fill(inside, -math.inf).logsumexp(-1, keepdim=True)], -1)


def divergence(student_logits, teacher_logits, kind, top_k=0):
    """(T,): D(student, teacher) at every token. The teacher and the choice of the top K carry no gradient."""
    log_s, log_t = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)  # (T, V) each
    if 0 < top_k < log_s.shape[-1]:
        top = student_logits.detach().topk(top_k, -1).indices  # (T, K)
        log_s, log_t = with_tail(log_s, top), with_tail(log_t, top)  # (T, K+1) each
    if kind == "kl_student_teacher":
        return kl(log_s, log_t)
    if kind == "kl_teacher_student":
        return kl(log_t, log_s)
    if kind == "cross_entropy":  # DistIL's CE_t
        return -(log_t.exp() * log_s).sum(-1)
    assert kind == "js", kind
    log_m = torch.logaddexp(log_s, log_t) - math.log(2)  # M = (S + T) / 2
    return 0.5 * kl(log_s, log_m) + 0.5 * kl(log_t, log_m)


def row_divergence(state, row, student, s):
    """(T,): D of a row with a context. student: its logits (T, V)."""
    if row.taken is not None:
        return -chosen_logp(student, row.taken)
    with torch.no_grad():
        teacher = logits(teacher_of(state, s), row.teacher_prompt, row.response)  # (T, V)
    return divergence(student, teacher, s.divergence, s.top_k)


# ---- Advantages and what the M-step minimises


def advantages(rows, s):
    """One number per row: r minus the mean of its group. An ungraded row counts as the mean of the graded ones and has A = 0."""
    result = []
    for start in range(0, len(rows), s.group_size):
        group = rows[start : start + s.group_size]
        stand_in = mean([row.reward for row in group if row.graded]) or 0.0
        r = torch.tensor([row.reward if row.graded else stand_in for row in group], dtype=torch.float64)
        A = r - r.mean()
        if s.divide_by_std:
            A = A / (r.std() + 1e-6)
        result += [a if row.graded else 0.0 for a, row in zip(A.tolist(), group)]
    return result


@torch.no_grad()
def future_advantages(state, rows, s):
    """DistIL's A_t = -(c_t - b_t) of each row: c_t sums the costs after t, b_t is its mean over the group's other rows, where a row
    that has ended counts as 0. Rows without a context have A = 0 and are in no mean."""
    costs, A = {}, [0.0] * len(rows)
    for i, row in enumerate(rows):
        if row.has_context:
            costs[i] = row_divergence(state, row, logits(state.model, row.prompt, row.response), s).tolist()
    for i, own in costs.items():
        others = [costs[j] for j in costs if j // s.group_size == i // s.group_size and j != i]
        for_t = []
        for t in range(len(own)):
            baseline = sum(sum(cost[t + 1 :]) for cost in others) / max(1, len(others))
            for_t.append((baseline - sum(own[t + 1 :])) / (len(own) if s.distil_norm == "length" else 1))
        A[i] = torch.tensor(for_t, dtype=torch.float64) * s.future  # (T,)
    return A


def grpo(logp, old_logp, A, s):
    """(T,): -min(rho A, clip(rho) A), and for A < 0 at most dual_clip |A|. A: (T,)."""
    rho = (logp - old_logp).exp()
    loss = -torch.minimum(rho * A, rho.clamp(1 - s.clip_low, 1 + s.clip_high) * A)
    return torch.where(A < 0, torch.minimum(loss, s.dual_clip * A.abs()), loss)


def m_step_tokens(logp, D, old_logp, A, A_sdpo, step, s):
    """(T,): what the M-step minimises at every token of a row. logp, D (T,) carry gradients (D is 0 without a context); old_logp,
    A_sdpo (T,) are constants; A is a number (DistIL: (T,)); step is the batch's index."""
    ratio = (logp.detach() - old_logp).exp().clamp(max=s.ratio_limit)
    A = torch.zeros_like(old_logp) + A  # (T,)
    if s.method == "vpd":
        return D  # Eq. 10
    if s.method == "sdpo":
        return ratio * D  # Eq. 2
    if s.method in ("grpo", "ovd"):
        return grpo(logp, old_logp, A, s)
    if s.method == "distil":
        return ratio * D + grpo(logp, old_logp, A, s)
    if s.method == "joint":
        return s.w_opd * ratio * D + s.w_rl * grpo(logp, old_logp, A, s)  # Eq. B.23
    if s.method == "reshape":
        return grpo(logp, old_logp, s.w_rl * A + s.w_opd * A_sdpo, s)  # Eq. B.24, B.25
    assert s.method == "reweight", s.method
    lam = s.reweight_lam * max(0.0, 1 - step / s.reweight_steps) if s.reweight_steps else 0.0  # 0 steps: over at once
    w = (A.sign() * A_sdpo).exp().clamp(1 - s.reweight_clip, 1 + s.reweight_clip)  # Eq. B.26, B.27
    return grpo(logp, old_logp, A * ((1 - lam) + lam * w), s)  # Eq. B.28


# ---- One update


def learning_rate(base, step, s):
    """The rate in rollout batch `step`, counted from 0. Both steps have the same factor."""
    warm = min(1.0, (step + 1) / s.warmup_steps) if s.warmup_steps else 1.0
    return base * warm * (1 - step / s.steps if s.schedule == "linear" else 1.0)


def update(state, kind, loss, s, after_update):
    """One optimizer update of the one network. kind: "e" or "m"."""
    optimizer, lr = state.optimizers[kind], s.e_lr if kind == "e" and s.e_lr else s.lr
    optimizer.param_groups[0]["lr"] = learning_rate(lr, state.step, s)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), s.max_grad_norm)
    optimizer.step()
    after_update(kind, state.model)


# ---- E-step: refine the teacher


def bco(r_tilde, rewards, delta, failures):
    """Eq. 9: each class is averaged by itself. r_tilde, rewards: (rows,). failures "likelier": a failure adds nothing if the
    teacher does not find it likelier than the student did."""
    log_sigmoid, failed = torch.nn.functional.logsigmoid, r_tilde[rewards == 0]
    of_failures = -log_sigmoid(-(failed - delta))
    if failures == "likelier":
        of_failures = torch.stack([loss if r > 0 else 0 * loss for loss, r in zip(of_failures, failed)])
    return -log_sigmoid(r_tilde[rewards == 1] - delta).mean() + of_failures.mean()


def e_step(state, rows, old_logp, s, after_update):
    """One update for every e_minibatch_prompts groups that take part. Returns the losses, and for each row whether the
    derivative of its log sigmoid is below 0.01."""
    groups, losses, died = [], [], []
    for start in range(0, len(rows), s.group_size):
        taught = [i for i in range(start, start + s.group_size) if rows[i].has_context]
        outcomes = {rows[i].reward for i in taught}
        if len(outcomes) == 2 or (s.e_groups == "all" and outcomes):
            groups.append(taught)
    for start in range(0, len(groups), s.e_minibatch_prompts):
        chosen = [i for group in groups[start : start + s.e_minibatch_prompts] for i in group]
        rewards = torch.tensor([rows[i].reward for i in chosen], dtype=torch.float64)
        if len(set(rewards.tolist())) < 2:
            continue
        r_tilde = []
        for i in chosen:
            row, prior = rows[i], old_logp[i]  # pi_theta(y|x), frozen
            if s.prior == "fixed":
                with torch.no_grad():
                    prior = logp(state.initial, row.prompt, row.response)
            log_q = logp(state.model, row.teacher_prompt, row.response)  # (T,)
            r_tilde.append(s.beta * (log_q.sum() - prior.sum()))  # Eq. 7
        r_tilde = torch.stack(r_tilde)
        value = 0.5 * (r_tilde[rewards == 1].mean() + r_tilde[rewards == 0].mean()).item()
        state.delta = value if state.delta is None else (1 - s.shift_rate) * state.delta + s.shift_rate * value
        loss = bco(r_tilde, rewards, state.delta, s.e_failures)  # Eq. 9
        update(state, "e", loss, s, after_update)
        losses.append(loss.item())
        u = r_tilde.detach() - state.delta
        died += (torch.sigmoid(torch.where(rewards == 1, -u, u)) < 0.01).tolist()
    return losses, died


# ---- M-step: distil into the student, or a baseline's objective


def m_step(state, rows, old_logp, A, A_sdpo, s, after_update):
    """One update for every minibatch_prompts prompts. Returns the losses, the mean divergence of every distilled row, and the
    rows that took part."""
    size, losses, divergences, taken = s.minibatch_prompts * s.group_size, [], [], []
    for start in range(0, len(rows), size):
        row_losses = []
        for i in range(start, min(start + size, len(rows))):
            row = rows[i]
            by_teacher = row.has_context and s.method in ("vpd", "sdpo", "joint", "reshape", "distil")
            by_reward = s.method in ("grpo", "reweight", "joint", "reshape", "ovd") and A[i] != 0
            if not (by_teacher or by_reward):
                continue
            taken.append(i)
            student = logits(state.model, row.prompt, row.response)  # (T, V)
            now = chosen_logp(student, row.response)  # (T,)
            D = torch.zeros_like(now)  # (T,), without a context
            if row.has_context and s.method in ("vpd", "sdpo", "joint", "distil"):
                D = row_divergence(state, row, student, s)
                divergences.append(D.mean().item())
            old = now.detach() if len(rows) <= size else old_logp[i]  # with one update pi_old is the current student
            sampler = torch.tensor(row.sampler_logp, dtype=torch.float64)
            if row.shown:  # the teacher's probability, or ratio 1
                old = sampler if s.ovd_ratio == "teacher" else now.detach()
            tokens = m_step_tokens(now, D, old, A[i], A_sdpo[i], state.step, s)  # (T,)
            if s.mismatch_limit is not None and not row.shown:
                tokens = (old_logp[i] - sampler).exp().clamp(max=s.mismatch_limit) * tokens
            constant = s.method == "distil" and s.distil_norm == "constant"
            row_losses.append(tokens.sum() / s.max_response_tokens if constant else tokens.mean())
        if row_losses:
            loss = sum(row_losses) / size  # the divisor counts rows that were left out
            update(state, "m", loss, s, after_update)
            losses.append(loss.item())
    return losses, divergences, taken


def teacher_of(state, s):
    """The weights of the M-step's teacher: the moving average, or the network as it is now."""
    return state.teacher if s.teacher == "ema" else state.model


# ---- Algorithm 1


@torch.no_grad()
def end_of_batch(state, s):
    """teacher <- (1 - tau) teacher + tau student, and the next batch."""
    for mine, theirs in zip(state.teacher.parameters(), state.model.parameters()) if state.teacher else ():
        mine.copy_((1 - s.ema_rate) * mine + s.ema_rate * theirs)
    state.step += 1


def one_batch(state, rows, s, after_update=lambda kind, model: None):
    """Steps 3 to 5 on one rollout batch, in place. Returns the numbers of the log."""
    # 3. Freeze log pi_theta(y|x), and the M-step teacher's log q(y|x,C)
    A_sdpo, old_logp, r_tilde, gaps = [], [], {1.0: [], 0.0: []}, []
    for row in rows:
        with torch.no_grad():
            old_logp.append(logp(state.model, row.prompt, row.response))  # (T,)
            A_sdpo.append(torch.zeros_like(old_logp[-1]))  # (T,), B.3
            if row.has_context and s.method != "grpo":
                A_sdpo[-1] = logp(teacher_of(state, s), row.teacher_prompt, row.response) - old_logp[-1]
        # 4. E-step, on every F-th batch
    e_due = s.method == "vpd" and state.step % s.e_step_every == 0
    e_losses, died = e_step(state, rows, old_logp, s, after_update) if e_due else ([], [])
    # 5. M-step, then the moving average
    A = future_advantages(state, rows, s) if s.method == "distil" else advantages(rows, s)
    m_losses, divergences, taken = m_step(state, rows, old_logp, A, A_sdpo, s, after_update)
    # The log. Without a freeze it describes the rows that took part.
    frozen = e_due or s.method == "distil" or len(rows) > s.minibatch_prompts * s.group_size
    for i in range(len(rows)) if frozen else taken:
        gaps += (old_logp[i] - torch.tensor(rows[i].sampler_logp)).abs().tolist()
        if rows[i].has_context and s.method != "grpo":
            r_tilde[rows[i].reward].append(s.beta * A_sdpo[i].sum().item())  # Eq. 7
    margin = mean(r_tilde[1.0]) - mean(r_tilde[0.0]) if all(r_tilde.values()) else None  # Fig. 1
    end_of_batch(state, s)
    return {"margin": margin, "shift": state.delta, "e_loss": mean(e_losses), "m_loss": mean(m_losses),
            "divergence": mean(divergences), "e_updates": len(e_losses), "m_updates": len(m_losses),
            "e_rows": len(died) or None, "e_died": mean(died), "m_rows": len(taken), "sampler_gap": mean(gaps)}  # fmt: skip
