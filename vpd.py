"""Variational Policy Distillation (VPD, arXiv 2605.15113v1): the EM loop, and the baselines that share it.

One network, two prompts: the student pi_theta(y|x), and the teacher q_phi(y|x,C), the same weights shown the feedback C.
Per rollout batch k = 0, 1, 2, ... (Algorithm 1, App. D.6; the banners below carry the same numbers):

    1. y ~ pi_theta(.|x), G rollouts for each of B prompts
    2. outcome r(x, y) in {0, 1} from the verifier, context C from a feedback source
    3. freeze log pi_theta(y|x)
    4. E-step, if k % F == 0: teach the teacher to tell success from failure
           r~ = beta (log q_phi(y|x,C) - log pi_theta(y|x))                                               (Eq. 7)
           L_E = - mean_{r=1} log sigmoid(r~ - delta) - mean_{r=0} log sigmoid(-(r~ - delta))              (Eq. 9)
    5. M-step: distil the teacher into the student on the same rollouts
           L_M = E_y sum_t KL(pi_theta(.|x,y_<t) || sg q_phi(.|x,C,y_<t))                                  (Eq. 10)
    6. push the weights to the sampler

What carries a gradient: in 4 log q_phi alone (log pi_theta, delta, n+ and n- are numbers by then), in 5 log pi_theta alone (the
teacher's view runs under no_grad; pi_old, advantages and every weight of a token are numbers). losses.py detaches once more.

Where we depart from the paper's text, or had to choose:

    1. Eq. 10 prints a sum over t; the loss is the mean over a row's tokens, as in the code its learning rates come from.
    2. delta moves by shift_rate (0.1) per E-step; Algorithm 1 as printed is --shift_rate 1.
    3. A success needs a context too. Where the paper is silent it borrows a failure's (feedback.py; --no_borrow).
    4. The E-step uses groups in which both outcomes have a context; --e_groups all is the paper's literal text.
    5. F counts rollout batches (App. D.6), not gradient updates (Sec. 4).
    6. The M-step's teacher is the network's live weights at each update; --teacher ema takes SDPO's moving average.
    7. VPD's M-step carries no importance weights (Sec. 3.4); SDPO's carries min(pi/pi_old, 2).
    8. An update in which no row takes part (no context, no advantage) is left out, momentum and weight decay included.
    9. Where vLLM samples, a token of the M-step weighs min(pi_old/pi_sampler, 2) for the gap between the two engines, as in
       SDPO's code; --mismatch_limit none turns it off.
   10. OVD: the threshold is 5; a demonstration is graded like a rollout and counts if it fails (--no_ovd_failed); a judge
       that gives a digit no more than half of its probability has named none, and the rollout stays.
"""

import math
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import torch
from scipy import stats
from transformers.utils import logging as hf_logging

from model import checkpoint
import feedback
import losses
from harness import plan
import tasks
from harness.command import CannotWrite, fail, run
from model.parallel import World
from model.policy import Policy, ema_update
from neighbours.reviews import Reviews, ServerSilent
from rollout import StaleEngine, seed_for, weights_of
from harness.session import Clock, Session, mean, open_run, rollout_figures
from harness.settings import METHODS, Config, check, parse

# ---- Pieces of a batch ---------------------------------------------------------------------------------------


def batches(problems: list, size: int, steps: int, seed: int):
    """`steps` batches of `size` problems: reshuffled every epoch, the incomplete last batch dropped."""
    per_epoch, order = len(problems) // size, []
    for step in range(steps):
        if step % per_epoch == 0:
            order = random.Random(seed_for(seed, step // per_epoch, "order")).sample(problems, len(problems))
        start = step % per_epoch * size
        yield order[start : start + size]


def demonstrations(
    cfg: Config,
    policy: Policy,
    sampler,
    teacher,
    task: tasks.Task,
    problems: list,
    xC: list,
    scores: list,
    has_C,
    step: int,
) -> tuple[dict, Counter]:
    """OVD: {row: (Rollout, Outcome)}, one response of the teacher to (x, C), verified like a rollout, for each row that the
    judge rejects and that has a context; and the rejected rows whose own rollout stays, counted by reason."""
    rejected = [i for i, score in enumerate(scores) if score is not None and score < cfg.ovd_threshold]
    asked = [i for i in rejected if has_C[i]]
    kept = Counter({"rejected without a context, kept": len(rejected) - len(asked)})
    seed = seed_for(cfg.seed, step, "demonstrations")
    with weights_of(teacher if asked else None, sampler, policy):
        drawn = sampler.sample([xC[i] for i in asked], 1, seed, cfg.max_response_tokens, cfg.temperature, cfg.top_p)
    outcomes = task.verify([problems[i] for i in asked], [policy.decode(rollout.tokens) for rollout in drawn])
    shown = {}
    for i, rollout, outcome in zip(asked, drawn, outcomes):
        if outcome.verdict == "internal":
            kept["demonstration without a grade, rollout kept"] += 1
        elif not outcome.reward and not cfg.ovd_failed:
            kept["demonstration failed, rollout kept"] += 1
        else:
            shown[i] = rollout, outcome
    return shown, kept


def judge_figures(scores: list, outcomes: list, threshold: float) -> dict:
    """OVD's judge over a batch: how many scores round to 0, 1, ... 9, the share accepted, and the AUC: the chance that a success
    has a higher score than a failure, ties counting one half."""
    known = [(score, o.reward) for score, o in zip(scores, outcomes) if score is not None and o.verdict != "internal"]
    good, bad = ([score for score, reward in known if reward == which] for which in (1, 0))
    counts = Counter(math.floor(score + 0.5) for score in scores if score is not None)
    return {
        "scores": [counts[digit] for digit in range(10)],
        "accepted": mean([float(score is None or score >= threshold) for score in scores]),
        "judge_auc": stats.mannwhitneyu(good, bad).statistic / (len(good) * len(bad)) if good and bad else None,
    }


def e_step_groups(which: str, r: torch.Tensor, has_C: torch.Tensor, group_size: int) -> tuple[list[list[int]], int]:
    """The rows of each group that take part in the E-step, and the number of rows left out. Only rows with a context
    do. "mixed" further asks that both outcomes have one: a kind of context that goes with one label gives it away."""
    groups = []
    for first in range(0, len(r), group_size):
        rows = [i for i in range(first, first + group_size) if has_C[i]]
        if rows and (which == "all" or 0 < sum(r[rows].tolist()) < len(rows)):
            groups.append(rows)
    return groups, len(r) - sum(map(len, groups))


def fill_ungraded(r: torch.Tensor, graded: torch.Tensor, group_size: int) -> torch.Tensor:
    """r with the rows that the grader failed on at their group's mean: advantage 0, and no pull on the others."""
    groups, known = r.view(-1, group_size), graded.view(-1, group_size)
    means = (groups * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    return torch.where(known, groups, means).reshape(-1)


def engine_gap(
    logp: torch.Tensor, drawn_logp: torch.Tensor, sampled: torch.Tensor, demonstrated: torch.Tensor, limit: float | None
) -> tuple[torch.Tensor, dict]:
    """What a token of the M-step weighs, (B, T), min(pi_old / pi_sampler, limit) for the gap between trainer and sampler (1
    where `limit` is None), and figures of it; of demonstrations' tokens, which weigh 1, what the student makes of them."""
    weight, rho = torch.ones_like(logp), (logp - drawn_logp)[demonstrated].exp()  # pi / q
    if limit is not None:
        weight[sampled] = losses.truncated_ratio(logp, drawn_logp, limit)[sampled]
    figures = {
        "sampler_gap": mean((logp - drawn_logp)[sampled].abs()),
        "mismatch_truncated": None if limit is None else mean(weight[sampled] == limit),
    }
    if demonstrated.any():
        figures |= {"demonstration_ratio": mean(rho), "demonstration_lacked": mean(rho < 0.5)}
    return weight, figures


def moving_shift(last: float | None, value: float, rate: float) -> float:
    """delta after an E-step whose batch gives `value`: the first one, then a moving average. One overflow must not poison every
    later E-step, so a value that is not finite moves nothing."""
    if last is None:
        return value
    return (1 - rate) * last + rate * value if math.isfinite(value) else last


def margin_figures(implicit: torch.Tensor, r: torch.Tensor, lengths: torch.Tensor) -> dict:
    """Fig. 1's reward margin, mean r~ on successes minus mean r~ on failures, and whether |r~| merely tracks length."""
    both = 0 < r.sum() < len(r)
    varied = len(r) > 2 and implicit.abs().std() > 0 and lengths.double().std() > 0
    correlation = torch.corrcoef(torch.stack([implicit.abs().double(), lengths.double()]))[0, 1] if varied else None
    return {
        "margin": (implicit[r == 1].mean() - implicit[r == 0].mean()).item() if both else None,
        "length_correlation": correlation.item() if varied else None,
    }


# ---- The loop ------------------------------------------------------------------------------------------------


def train(
    cfg: Config, policy: Policy, sampler, task: tasks.Task, out: Path, record: dict, stop_signals: Callable = lambda: 0
) -> None:
    """Runs the EM loop and writes the run directory, whose config.json is `record`. stop_signals: how many signals to stop
    this process has had."""
    method, templates, G, world = METHODS[cfg.method], cfg.templates(), cfg.group_size, policy.world
    tokenizer, reviews = policy.tokenizer, Reviews(cfg, policy, sampler)
    teacher = policy.frozen_copy() if record["teacher"] == "ema" else None  # None: the live weights
    reference = policy.frozen_copy() if cfg.method == "vpd" and cfg.prior == "fixed" else None
    D = dict(kind="cross_entropy" if cfg.method == "distil" else cfg.divergence, top_k=cfg.top_k or None)
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    adamw = lambda: torch.optim.AdamW(policy.model.parameters(), cfg.lr, betas, weight_decay=cfg.weight_decay)  # noqa: E731
    optimizers = {"shared": adamw()}
    if cfg.method == "vpd" and cfg.e_optimizer == "own":
        optimizers["e_step"] = adamw()
    optimizer, e_optimizer = optimizers["shared"], optimizers.get("e_step", optimizers["shared"])
    session = Session(cfg, policy, sampler, reviews, task, out, record, teacher, optimizers, stop_signals)
    with session:
        session.begin()
        for step, problems in enumerate(batches(task.train, cfg.prompts_per_batch, session.steps, cfg.seed)):
            if step < session.first_step:
                continue
            clock, skipped = Clock(), Counter()
            figures = dict.fromkeys(
                ("margin", "length_correlation", "e_loss", "e_grad_norm", "shift", "e_rows", "e_died")
            )
            e_losses, e_norms, m_losses, m_norms, d_mean = [], [], [], [], 0.0
            packing = torch.zeros(2, dtype=torch.long)
            warmup = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
            rate = warmup * (1 - step / session.steps if cfg.schedule == "linear" else 1.0)

            # ---- 1. Rollouts y ~ pi_theta(.|x); row i * G + j is rollout j of problem i
            x = [feedback.student_prompt(tokenizer, p.messages) for p in problems]
            rollouts = sampler.sample(
                x, G, seed_for(cfg.seed, step, "rollouts"), cfg.max_response_tokens, cfg.temperature, cfg.top_p
            )
            y, texts = [r.tokens for r in rollouts], [policy.decode(r.tokens) for r in rollouts]
            rows = range(len(y))
            x, row_problems = [x[i // G] for i in rows], [problems[i // G] for i in rows]
            clock.lap("rollout")
            session.leave_if_told(step)

            # ---- 2. Outcomes r in {0, 1} and contexts C (or none) per rollout
            outcomes = task.verify(row_problems, texts)
            if any(o.reward not in (0, 1) for o in outcomes):
                fail(f"the verifier of {task.name} gave a reward that is neither 0 nor 1")
            clock.lap("verify")
            r = torch.tensor([float(o.reward) for o in outcomes], device=policy.device)  # (B,)
            graded = torch.tensor([o.verdict != "internal" for o in outcomes], device=policy.device)
            skipped["grader failed"] += int((~graded).sum())
            C, xC, cut = [None] * len(y), list(x), 0
            if method.teacher:
                C = reviews.contexts(row_problems, texts, outcomes, step)
                for i in rows:
                    if C[i] is not None:
                        xC[i], tokens_cut = feedback.teacher_prompt(
                            tokenizer, row_problems[i].messages, C[i], templates, cfg.max_teacher_tokens
                        )
                        cut += tokens_cut > 0
            has_C = torch.tensor([c is not None for c in C], device=policy.device)  # (B,) rows with a context
            rows_C = has_C.nonzero().flatten().tolist()
            clock.lap("feedback")

            # OVD: what the judge rejects gives way to a demonstration by the teacher, which is verified as well
            own, shown = torch.ones_like(has_C), {}  # (B,) rows that the student wrote; the others' (Rollout, Outcome)
            if method.replaces:
                scores = reviews.scores(row_problems, texts, step)
                shown, kept = demonstrations(cfg, policy, sampler, teacher, task, row_problems, xC, scores, has_C, step)
                skipped.update(kept)
                for i, (demonstration, outcome) in shown.items():
                    y[i], r[i], own[i] = demonstration.tokens, outcome.reward, False
                figures |= judge_figures(scores, outcomes, cfg.ovd_threshold)
                figures["demonstrations"] = mean(~own)
                figures["demonstration_reward"] = mean([outcome.reward for _, outcome in shown.values()])
                clock.lap("judge")
            # DistIL: tokens of a black box; for all methods what D counts for at each place, (B, T).
            mask, expert, d_weight = policy.mask(y), None, has_C[:, None]
            if cfg.expert == "served":
                expert, d_weight = reviews.expert_tokens(xC, y, rows_C, step)
                clock.lap("expert")
            d_weight = d_weight.expand_as(mask)
            # What goes through the network: the teacher's prompts as well, where it scores the student's rollouts.
            scores_rollouts = bool(record["teacher"]) and not method.replaces
            longer = xC if scores_rollouts else x
            lengths = [len(longer[i]) + len(y[i]) for i in rows]

            # ---- 3. Freeze log pi_theta(y|x); the teacher's log-probs at the same weights give the reward margin
            session.leave_if_told(step)
            sampler.sleep()
            old_logp, entropy = policy.score(x, y)  # (B, T)
            drawn_logp = torch.zeros_like(old_logp)  # log-probs as the sampler's engine gave them
            for i in rows:
                drawn_logp[i, : len(y[i])] = torch.tensor(shown[i][0].logp if i in shown else rollouts[i].logp)
            sampled = mask.bool() & own[:, None]  # (B, T) the student's tokens
            limit = float(cfg.mismatch_limit) if sampler.other_engine and cfg.mismatch_limit != "none" else None
            mismatch, said = engine_gap(old_logp, drawn_logp, sampled, mask.bool() & ~sampled, limit)  # (B, T)
            figures |= said | {"entropy": mean(entropy[sampled])}
            if cfg.ovd_ratio == "teacher":
                old_logp[~own] = drawn_logp[~own]  # whose tokens the teacher drew
            if scores_rollouts:
                teacher_logp, _ = policy.score(xC, y, rows_C, teacher)
                teacher_logp = torch.where(has_C[:, None], teacher_logp, old_logp)  # no context: A^SDPO = 0
                r_tilde = losses.implicit_reward(teacher_logp, old_logp, mask, cfg.beta)  # Eq. 7
                figures |= margin_figures(r_tilde[has_C], r[has_C], mask.sum(1)[has_C])
            clock.lap("freeze")

            # ---- 4. E-step: refine the teacher on this batch (Eq. 9), every F-th batch
            if cfg.method == "vpd" and step % cfg.e_step_every == 0:
                groups, out_of_e = e_step_groups(cfg.e_groups, r, has_C, G)
                skipped["e_step: no context, or one outcome only"] += out_of_e
                prior_logp = old_logp if reference is None else policy.score(x, y, model=reference)[0]
                slopes = []
                for first in range(0, len(groups), cfg.e_minibatch_prompts):
                    minibatch = [i for group in groups[first : first + cfg.e_minibatch_prompts] for i in group]
                    if not 0 < r[minibatch].sum() < len(minibatch):  # only with --e_groups all
                        skipped["e_step: minibatch of one outcome"] += len(minibatch)
                        continue
                    # First pass, no gradient: every r~ of the minibatch, hence delta before it is used. The first
                    # minibatch meets the weights of the freeze, whose pass serves when it read the live teacher.
                    q_logp = teacher_logp if teacher is None and first == 0 else policy.score(xC, y, minibatch)[0]
                    q_logp = q_logp[minibatch].requires_grad_()  # (n, T)
                    r_tilde = losses.implicit_reward(q_logp, prior_logp[minibatch], mask[minibatch], cfg.beta)  # Eq. 7
                    value = losses.reward_shift(r_tilde, r[minibatch]).item()
                    delta = moving_shift(session.shift, value, cfg.shift_rate)
                    e_loss = losses.bco_loss(r_tilde, r[minibatch], delta)  # Eq. 9
                    session.shift = delta if math.isfinite(delta) else None
                    # c = dL_E / d log q(y_t|x,C,y_<t), the same for every token of a row: with it fixed, the second pass
                    # sums c log q, in any micro-batches.
                    c = torch.zeros_like(old_logp)  # (B, T)
                    (c[minibatch],) = torch.autograd.grad(e_loss, q_logp)
                    for part in policy.micro_batches(minibatch, lengths):
                        view = policy.view([xC[i] for i in part], [y[i] for i in part])
                        given = c[part, : view.mask.shape[1]]
                        policy.backward(view.loss(lambda log_q, _, c: c * log_q, view.mask, [given])[0])
                        packing += torch.tensor([view.filled, view.padded])
                    e_norms.append(session.update(e_optimizer, (cfg.e_lr or cfg.lr) * rate, e_loss.item()))
                    e_losses.append(e_loss.item())
                    u = r_tilde.detach() - delta
                    slopes.append(torch.sigmoid(u) * torch.sigmoid(-u))
                died = torch.cat(slopes) < 0.01 if slopes else []
                figures |= {"e_loss": mean(e_losses), "e_grad_norm": mean(e_norms), "shift": session.shift,
                            "e_rows": len(died), "e_died": mean(died)}  # fmt: skip
                clock.lap("e_step")

            # ---- 5. M-step: distil the teacher into the student (Eq. 10); the baselines' losses stand here too
            A = torch.zeros_like(r)  # (B,)
            if method.reinforces:
                A = losses.group_advantages(fill_ungraded(r, graded, G), G, cfg.divide_by_std) * graded
            active = (A != 0) | (has_C if method.distils or cfg.method == "reshape" else False)
            if cfg.method == "reshape":
                A = losses.reshaped_advantages(A, teacher_logp, old_logp, cfg.w_rl, cfg.w_opd)  # (B, T), B.24
            if cfg.method == "reweight":
                lam = cfg.reweight_lam * max(0.0, 1 - step / cfg.reweight_steps) if cfg.reweight_steps else 0.0
                A = losses.reweighted_advantages(A, teacher_logp, old_logp, lam, cfg.reweight_clip)  # (B, T), B.28
            if cfg.method == "distil":
                if cfg.expert == "samples":
                    expert = policy.draw(xC, y, rows_C, teacher, [seed_for(cfg.seed, step, "expert", i) for i in rows])
                active = d_weight.any(1)
                cost = d_weight * policy.compare(x, xC, y, rows_C, teacher, **D, expert=expert)  # (B, T)
                A = cfg.future * losses.future_advantages(cost, mask, G, active)  # (B, T)
                A = A / mask.sum(1, keepdim=True) if cfg.distil_norm == "length" else A
            heard_rows = int(d_weight.any(1).sum())  # rows with a distance
            why = "no expert's token" if cfg.expert == "served" else "no signal" if method.reinforces else "no context"
            skipped[f"m_step: {why}"] += int((~active).sum())
            size = cfg.minibatch_prompts * G
            # pi_old is the student as it now is: exactly, where one update follows a batch, and for OVD's sg pi.
            old_is_now = own if size == len(y) else torch.zeros_like(own)
            old_is_now = old_is_now | ~own if cfg.ovd_ratio == "one" else old_is_now  # (B,)

            def per_token(logp, d, pi_old, old_is_now, A, d_weight, mismatch):
                """The M-step's loss of a chunk of tokens, (1, n) all of them. d is D(student, teacher), `losses.divergence`,
                which head.py forms with logp from one set of logits."""
                pi_old = torch.where(old_is_now, logp.detach(), pi_old)
                loss = torch.zeros_like(logp)
                if method.distils:  # Eq. 10, Eq. 2
                    ratio = 1.0 if cfg.method == "vpd" else losses.truncated_ratio(logp, pi_old, cfg.ratio_limit)
                    loss = loss + (cfg.w_opd if cfg.method == "joint" else 1.0) * ratio * d * d_weight
                if method.reinforces or cfg.method == "distil":
                    pg = losses.grpo_loss(logp, pi_old, A, cfg.clip_low, cfg.clip_high, cfg.dual_clip)
                    loss = loss + (cfg.w_rl if cfg.method == "joint" else 1.0) * pg
                return loss * mismatch

            A, old_is_now = (v if v.ndim == 2 else v[:, None].expand_as(mask) for v in (A, old_is_now))  # (B, T)
            for first in range(0, len(y), size):
                minibatch = [i for i in range(first, first + size) if active[i]]
                if not minibatch:
                    skipped["m_step: whole update"] += 1
                    continue
                total = torch.zeros(2, dtype=torch.float64, device=policy.device)
                for part in policy.micro_batches(minibatch, lengths):
                    q = None
                    if method.distils and expert is None:
                        with torch.no_grad():  # sg q_phi
                            q = policy.view([xC[i] for i in part], [y[i] for i in part], teacher)
                    view = policy.view([x[i] for i in part], [y[i] for i in part])
                    t = view.mask.shape[1]
                    weights = losses.sequence_weights(view.mask, size)
                    if cfg.method == "distil" and cfg.distil_norm == "constant":
                        weights = view.mask.double() / (size * cfg.max_response_tokens)
                    taken = None if expert is None else expert[part, :t]
                    given = [v[part, :t] for v in (old_logp, old_is_now, A, d_weight, mismatch)]
                    loss, _, d = view.loss(per_token, weights, given, q, **D, expert=taken)
                    policy.backward(loss)
                    d_here = losses.sequence_mean(d * d_weight[part, :t], view.mask, max(1, heard_rows))
                    total += torch.stack([loss.detach(), d_here]).double()
                    packing += torch.tensor([view.filled, view.padded])
                loss, d = policy.world.sum(total).tolist()
                m_norms.append(session.update(optimizer, cfg.lr * rate, loss))
                m_losses.append(loss)
                d_mean += d
            if teacher is not None:
                # Once per rollout batch: teacher <- (1 - rate) teacher + rate student.
                ema_update(teacher, policy.model, cfg.ema_rate)
            clock.lap("m_step")

            # ---- 6. Push the weights to the sampler
            sampler.sync(policy)
            clock.lap("sync")

            skipped.update(reviews.not_had())
            filled, padded = world.sum(packing).tolist()
            seconds = {phase: round(value, 4) for phase, value in clock.seconds.items()}
            row = {
                "kind": "train", "step": step, **rollout_figures(rollouts, outcomes, C), **figures,
                "m_loss": mean(m_losses), "m_grad_norm": mean(m_norms),
                "divergence": d_mean if method.distils and heard_rows else None, "lr": cfg.lr * rate, "contexts_cut": cut,
                "left_out": {why: count for why, count in skipped.items() if count},
                "updates_not_finite": sum(not math.isfinite(norm) for norm in e_norms + m_norms),
                "padding": 1 - filled / padded if padded else None, "seconds": seconds,
                "tokens_per_second": sum(len(rollout.tokens) for rollout in rollouts) / sum(seconds.values()),
            }  # fmt: skip
            samples = [
                {"step": step, "id": row_problems[i].id, "prompt": tokenizer.decode(x[i]), "response": texts[i],
                 "finish": rollouts[i].finish, **asdict(outcomes[i]), "context": asdict(C[i]) if C[i] else None,
                 **({"score": scores[i], "demonstration": policy.decode(y[i]) if i in shown else None,
                     "demonstration_reward": shown[i][1].reward if i in shown else None} if method.replaces else {})}
                for i in list(rows)[: cfg.log_samples]
            ]  # fmt: skip
            session.end_of_batch(row, samples)


# ---- The command ---------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    cfg = parse(argv)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # threads that fight for a busy core cost more than they bring
    out = Path(cfg.out)
    try:
        check(cfg)
        if cfg.plan:
            plan.show(cfg, METHODS[cfg.method], cfg.model, torch.cuda.device_count() or 1)
            return
        policy, sampler, task, record = open_run(cfg, out, World.start())
    except CannotWrite as error:
        fail(f"cannot write {error}", status=1)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    print(" ".join(f"{f.name}={record[f.name]!r}" for f in fields(cfg)))
    for note in task.notes:
        print(note)
    print(f"{task.splits()}; {record['prompts_dropped']} training prompts over {cfg.max_prompt_tokens} tokens dropped")
    received = []
    # Of several processes none can save alone, so that Ctrl-C is taken there like SIGTERM: they stop together.
    signals = [signal.SIGTERM] + [signal.SIGINT] * (policy.world.size > 1)
    before = {number: signal.signal(number, lambda *_: received.append(1)) for number in signals}
    try:
        train(cfg, policy, sampler, task, out, record, stop_signals=lambda: len(received))
    except SystemExit as stop:
        if stop.code == 143 and policy.world.rank == 0:
            print(f"told to stop: the state is in {out}/checkpoints; --resume goes on from it", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        if policy.world.rank == 0:
            print(f"stopped; the log and the weights so far are in {out}; {checkpoint.last(out)}", file=sys.stderr)
        sys.exit(130)
    except (checkpoint.Damaged, tasks.BadTask) as error:
        fail(error)
    except CannotWrite as error:
        fail(f"cannot write {error}; {checkpoint.last(out)}", status=1)
    except (FloatingPointError, StaleEngine, ServerSilent) as error:
        if policy.world.rank == 0:
            print(f"vpd.py: {error}; the log and the last finite weights are in {out}", file=sys.stderr)
        sys.exit(1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    best = f", {out}/best the best on validation problems" if (out / "best").exists() else ""
    print(f"done: {out}/model is the last model{best}")


if __name__ == "__main__":
    run(main)
    World.end()
