"""DistIL (arXiv 2606.05152): distributional DAgger. The student imitates the teacher at the places that it visits itself, and each
of its tokens is charged with the disagreement that follows it. A loop of its own over the pieces of vpd.py.

    python -m neighbours.distil --task toy --out DIR        the flags of vpd.py, without --method, and those of `Config` below

    L = E_{y ~ pi} sum_t CE_t,  CE_t = H(sg T(.|s_t, C), pi(.|s_t))
    grad L = sum_t grad CE_t + sum_t grad log pi(y_t|s_t) sum_{i>t} CE_i          strictly later: i > t

With feedback on y itself, or a sibling as context, C depends on y, and the strict cost-to-go is an approximation that the paper
shares (tests/test_theory.py measures it).
"""

import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

import feedback
import losses
import vpd
from harness import command, presets, session
from harness.settings import Group, parse
from model.policy import Policy, ema_update
from neighbours.served import Served
from rollout import seed_for

DISTIL = Group("DistIL")
SERVED = dict(need="--expert served", reads=lambda c: c.expert == "served")
PRESETS = {  # DistIL's own settings: its top K, and its learning rate where SDPO's is 1e-5
    "lcb": vpd.PRESETS["lcb"] | {"top_k": 100},
    "sciknoweval": vpd.PRESETS["sciknoweval"] | {"lr": 5e-5},
    "math": vpd.PRESETS["math"] | {"top_k": 100},
}


def distil(t, cfg):
    """D is the cross-entropy to the teacher, A the charge for what follows."""
    return losses.truncated_ratio(t.logp, t.old_logp, cfg.ratio_limit) * t.D + vpd.grpo(t, cfg)


@dataclass
class Config(vpd.Config):
    method: Literal["distil"] = vpd.RUN("distil", "this loop's only one")
    divergence: str = vpd.DISTIL("cross_entropy", "DistIL has no other", need="vpd.py", reads=lambda c: False)
    divide_by_std: bool = vpd.GRADIENT(False, "no advantage here has a group's spread", need="vpd.py", reads=lambda c: False)
    distil_norm: Literal["length", "constant"] = DISTIL("length", "constant: the exact gradient where C does not depend on y")
    future: bool = DISTIL(True, "each token is charged with the cross-entropy of those after it (ablation: off)")
    expert: Literal["probabilities", "samples", "served"] = DISTIL("probabilities", "samples: the teacher as a black box")
    expert_url: str = DISTIL("", "an OpenAI-compatible server whose completions take the teacher's place", **SERVED)
    expert_model: str = DISTIL("", "the name it serves", **SERVED)
    expert_places: int = DISTIL(16, "tokens of a response at which it is asked, at random", above=0, **SERVED)

    def row(self) -> vpd.Method:
        return vpd.Method(distil, "ema", "context", distils=True, reinforces=True)

    def reader(self) -> str:
        return "" if self.expert == "served" else super().reader()


def check(cfg: Config) -> None:
    """Raises ValueError with one line for settings that cannot work together."""
    vpd.check(cfg)
    feedback.check_server("expert", cfg.expert_url, cfg.expert_model)
    if bool(cfg.expert_url) != (cfg.expert == "served"):
        raise ValueError("--expert served and --expert_url go together")
    if cfg.expert == "served" and cfg.teacher:
        raise ValueError(f"--teacher {cfg.teacher} means nothing to --expert served, which is the teacher")


def open_expert(cfg: Config, policy: Policy, task) -> Served | None:
    if cfg.expert_url:
        return Served("expert", cfg.expert_url, cfg.expert_model, cfg.server_timeout, policy.world, Counter())


def served_tokens(cfg: Config, policy: Policy, expert: Served, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """One token that the served expert takes after (x, C, y_<t), at `expert_places` random places of each row with a context.

    Returns ids (B, T), and weights (B, T): |y| / places answered at those, 0 elsewhere. A weighted sum over them expects the sum
    over all places, as long as no place fails. The expert reads text, in which special tokens that a context spells are special;
    it answers with one token of its own, of which ours is the first that spells its text: the same one if both share a tokenizer.
    """
    tokenizer, places = policy.tokenizer, []
    for i in batch.has_C.nonzero().flatten().tolist():
        rng, n = random.Random(seed_for(cfg.seed, batch.step, "places", i)), len(batch.y[i])
        places += [(i, t) for t in rng.sample(range(n), min(cfg.expert_places, n))]
    texts = {(i, t): tokenizer.decode(batch.xC[i] + batch.y[i][:t]) for i, t in places}
    texts = {place: text for place, text in texts.items() if not text.endswith("\ufffd")}  # that one is inside a character
    pieces = expert.next_piece(list(texts.values()), seed_for(cfg.seed, batch.step, "expert"))
    end = policy.eos_ids[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    tokens, weights = torch.zeros_like(batch.mask), torch.zeros_like(batch.sampler_logp)
    for place, piece in zip(texts, pieces):
        if piece is None or "\ufffd" in piece:  # no answer, or a part of a character
            continue
        ids = tokenizer(piece, add_special_tokens=False, split_special_tokens=True).input_ids if piece else [end]
        if ids:
            tokens[place], weights[place] = ids[0], 1.0
    expert.missing["expert: no token"] += len(places) - pieces.count(None) - int(weights.sum())
    return tokens, weights * (batch.mask.sum(1) / weights.sum(1).clamp(min=1)).unsqueeze(1)


def train(cfg: Config, run: session.Run) -> None:
    policy, sampler, G = run.policy, run.sampler, cfg.group_size
    teacher = policy.frozen_copy() if cfg.reader() == "ema" else None  # None: the live weights
    optimizer, limit, size = vpd.adamw(cfg, policy), run.mismatch_limit(), cfg.minibatch_prompts * G
    how = dict(divergence=lambda log_s, log_t: losses.cross_entropy(log_t, log_s), top_k=cfg.top_k or None)
    with run.started(teacher, {"shared": optimizer}):
        for step, problems in run.batches(vpd.batches):
            log, rate = run.batch(step), run.rate(step)

            # ---- Rollouts, outcomes, contexts, and what the student and the teacher make of them
            batch = vpd.roll_out(cfg, policy, sampler, problems, step, run.task.verify)
            log.lap("rollout")
            run.leave_if_told(step)
            vpd.grade(batch, run.task, policy)
            log.skip("grader failed", int((~batch.graded).sum()))
            log.lap("verify")
            vpd.give_contexts(cfg, batch, policy, run.critic)
            log.lap("feedback")
            rows_C = batch.has_C.nonzero().flatten().tolist()
            expert, D_weight = None, batch.has_C[:, None].expand_as(batch.mask)  # what D counts for at each place, (B, T)
            if cfg.expert == "served":
                expert, D_weight = served_tokens(cfg, policy, run.also, batch)
                log.left_out.update(run.also.missing)
                run.also.missing.clear()
                log.lap("expert")
            run.leave_if_told(step)
            sampler.sleep()
            log.frozen(batch, vpd.freeze(batch, policy, teacher, with_teacher=bool(cfg.reader())))
            log.lap("freeze")

            # ---- The charge for what follows: A_t = -(c_t - b_t), c_t = sum_{i>t} CE_i, b_t its mean over the group's other rows
            if cfg.expert == "samples":
                seeds = [seed_for(cfg.seed, step, "expert", i) for i in range(len(batch.y))]
                expert = policy.draw(batch.xC, batch.y, rows_C, teacher, seeds)
            takes_part = D_weight.any(1)
            log.skip("m_step: no expert's token" if cfg.expert == "served" else "m_step: no context", int((~takes_part).sum()))
            cost = D_weight * policy.compare(batch.x, batch.xC, batch.y, rows_C, teacher, expert=expert, **how)  # (B, T)
            A = cfg.future * losses.future_advantages(cost, batch.mask, G, takes_part)
            weights = batch.mask.double() / (size * cfg.max_response_tokens)
            if cfg.distil_norm == "length":
                A, weights = A / batch.mask.sum(1, keepdim=True), losses.sequence_weights(batch.mask, size)
            known = {"A": A, "D_weight": D_weight, "old_logp": batch.old_logp, "sampler_logp": batch.sampler_logp}

            def per_token(t):
                mismatch = 1.0 if limit is None else losses.truncated_ratio(t.old_logp, t.sampler_logp, limit)
                t.old_logp = t.logp.detach() if size == len(batch.y) else t.old_logp
                t.D = t.D * t.D_weight
                return distil(t, cfg) * mismatch

            # ---- Updates
            for first in range(0, len(batch.y), size):
                rows = [i for i in range(first, first + size) if takes_part[i]]
                if not rows:
                    log.skip("m_step: whole update")
                    continue
                for part in policy.micro_batches(rows, batch.lengths()):
                    with torch.no_grad():
                        q = batch.reader(policy, part, teacher) if expert is None else None
                    view = batch.student(policy, part)
                    t = slice(view.mask.shape[1])
                    here = {name: x[part, t] for name, x in known.items()}
                    taken = None if expert is None else expert[part, t]
                    loss, scores = view.loss(per_token, weights[part, t], here, q, expert=taken, **how)
                    policy.backward(loss)
                    log.m_pass(part, view, loss, scores, D_weight, measures=False)
                log.m_norms.append(run.update(optimizer, cfg.lr * rate, log.m_loss()))
            if teacher is not None:
                ema_update(teacher, policy.model, cfg.ema_rate)
            log.lap("m_step")
            sampler.sync(policy)
            log.lap("sync")
            run.end_of_batch(log, batch)


def settings(argv: list[str] | None = None) -> Config:
    preset = partial(presets.of, vpd.PRESETS | PRESETS)
    return parse(argv, Config, "python -m neighbours.distil", "DistIL, a neighbour of VPD.", preset, method="distil")


def main(argv: list[str] | None = None) -> None:
    session.launch(settings(argv), check, train, also=open_expert)


if __name__ == "__main__":
    command.run(main)
