"""DistIL (arXiv 2606.05152): distributional DAgger. The student imitates the teacher at the prefixes that the student visits, and
each token is also charged with the disagreement that follows it. A loop of its own over the pieces of vpd.py.

    python -m neighbours.distil --task toy --out DIR        takes the flags of vpd.py except --method, and those of `Config` below

    L = E_{y ~ pi} sum_t CE_t,  CE_t = H(sg T(.|s_t, C), pi(.|s_t))
    grad L = E[sum_t grad CE_t + sum_t grad log pi(y_t|s_t) sum_{i>t} CE_i]          strictly later: i > t

If C depends on y (feedback on y itself, or a sibling as context), the strict cost-to-go is an approximation, also in the paper
(tests/test_theory.py measures it).
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

import losses
import vpd
from harness import command, presets, session
from harness.settings import Group, check, parse
from model.policy import ema_update
from rollout import seed_for

DISTIL = Group("DistIL")
PRESETS = {  # what DistIL changes: top K = 100, and the learning rate 5e-5 where SDPO's is 1e-5
    "lcb": vpd.PRESETS["lcb"] | {"top_k": 100},
    "sciknoweval": vpd.PRESETS["sciknoweval"] | {"lr": 5e-5},
    "math": vpd.PRESETS["math"] | {"top_k": 100},
}


def distil(t, cfg):
    """t.D is the cross-entropy to the teacher, t.A the negative cost of the tokens that follow."""
    return losses.truncated_ratio(t.logp, t.old_logp, cfg.ratio_limit) * t.D + vpd.grpo(t, cfg)


@dataclass
class Config(vpd.Config):
    method: Literal["distil"] = vpd.RUN("distil", "the only method of this command")
    divergence: str = vpd.DISTIL("cross_entropy", "the only divergence of DistIL", need="vpd.py", reads=lambda c: False)
    divide_by_std: bool = vpd.GRADIENT(False, "not used by DistIL", need="vpd.py", reads=lambda c: False)
    distil_norm: Literal["length", "constant"] = DISTIL("length", "normalisation of a row's loss (docs/neighbours.md)")
    future: bool = DISTIL(True, "charge each token with the cross-entropy of the tokens after it")
    expert: Literal["probabilities", "samples"] = DISTIL("probabilities", "samples: the teacher is a black box that is sampled")

    def row(self) -> vpd.Method:
        return vpd.Method(distil, "ema", "context", distils=True, reinforces=True)


def train(cfg: Config, run: session.Run) -> None:
    policy, sampler, G = run.policy, run.sampler, cfg.group_size
    teacher = policy.frozen_copy() if cfg.reader() == "ema" else None  # None: the live weights
    optimizer, limit, size = vpd.adamw(cfg, policy), run.mismatch_limit(), cfg.minibatch_prompts * G
    how = dict(divergence=lambda log_s, log_t: losses.cross_entropy(log_t, log_s), top_k=cfg.top_k or None)
    with run.started(teacher, {"shared": optimizer}):
        for step, problems in run.batches():
            log, rate = run.batch(step), run.rate(step)

            # ---- Rollouts, outcomes, contexts; the log-probs of student and teacher
            batch = vpd.roll_out(cfg, run, log, problems)
            vpd.grade(cfg, run, log, batch)
            sampler.sleep()
            log.frozen(batch, vpd.freeze(batch, policy, teacher, with_teacher=True))
            log.lap("freeze")

            # ---- Advantages A_t = -(c_t - b_t), where c_t = sum_{i>t} CE_i and b_t is its mean over the group's other rows
            rows_C, expert = batch.has_C.nonzero().flatten().tolist(), None
            log.skip("m_step: no context", len(batch.y) - len(rows_C))
            if cfg.expert == "samples":
                seeds = [seed_for(cfg.seed, step, "expert", i) for i in range(len(batch.y))]
                expert = policy.draw(batch.xC, batch.y, rows_C, teacher, seeds)
            cost = policy.compare(batch.x, batch.xC, batch.y, rows_C, teacher, expert=expert, **how)  # (B, T), 0 without a context
            A = cfg.future * losses.future_advantages(cost, batch.mask, G, batch.has_C)
            weights = batch.mask.double() / (size * cfg.max_response_tokens)
            if cfg.distil_norm == "length":
                A, weights = A / batch.mask.sum(1, keepdim=True), losses.sequence_weights(batch.mask, size)
            known = batch.known(A)

            def per_token(t):
                mismatch = 1.0 if limit is None else losses.truncated_ratio(t.old_logp, t.sampler_logp, limit)
                t.old_logp = t.logp.detach() if size == len(batch.y) else t.old_logp
                return distil(t, cfg) * mismatch

            # ---- Updates on rows with a context
            for rows in vpd.m_step_minibatches(batch.has_C, size, log.skip):
                for part in policy.micro_batches(rows, batch.lengths()):
                    with torch.no_grad():
                        q = batch.view(policy, batch.xC, part, teacher) if expert is None else None
                    view = batch.view(policy, batch.x, part)
                    t = slice(view.mask.shape[1])
                    here = {name: x[part, t] for name, x in known.items()}
                    taken = None if expert is None else expert[part, t]
                    loss, scores = view.loss(per_token, weights[part, t], here, q, expert=taken, **how)
                    policy.backward(loss)
                    log.m_pass(part, view, loss, scores, batch.has_C, measures=False)
                log.m_norms.append(run.update(optimizer, cfg.lr * rate, log.m_loss()))
            if teacher is not None:
                ema_update(teacher, policy.model, cfg.ema_rate)
            log.lap("m_step")
            sampler.sync(policy)
            log.lap("sync")
            run.end_of_batch(log, batch)


def main(argv: list[str] | None = None) -> None:
    preset = partial(presets.of, vpd.PRESETS | PRESETS)
    cfg = parse(argv, Config, "python -m neighbours.distil", "DistIL, a neighbour of VPD.", preset, method="distil")
    session.launch(cfg, check, train)


if __name__ == "__main__":
    command.run(main)
