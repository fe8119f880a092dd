"""OVD (arXiv 2601.21968, first version): verbal distillation. A judge gives each rollout a digit, a demonstration by the teacher
replaces a rejected rollout, and GRPO trains on the mixed group. A loop of its own over the pieces of vpd.py.

    python -m neighbours.ovd --task toy --out DIR        takes the flags of vpd.py except --method, and those of `Config` below

The score S = E[digit] only decides which rollouts stay; no loss contains it. A demonstration is verified like a rollout and is
used even if it fails (--no_ovd_failed: the rollout stays). pi_old of its tokens is the teacher's probability, or with --ovd_ratio
one the student's own. If a judge's ten digits together have at most half of the probability, it gave no score: the rollout stays.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

import feedback
import losses
import vpd
from harness import command, presets, session
from harness.log import mean
from harness.settings import Group, parse
from model.policy import Policy, ema_update
from neighbours import served
from neighbours.served import Served, expected_digit
from rollout import seed_for, weights_of
from tasks import toy

OVD = Group("OVD")
SERVED = dict(need="--judge_url", reads=lambda c: c.judge_url)
SERVERS = dict(reads=lambda c: c.critic_url or c.judge_url)
REQUEST = (
    "{question}\n\nA proposed answer:\n\n{attempt}\n\nHow good is this answer? Reply with a single digit and nothing else, "
    "from 0 (certainly wrong) to 9 (certainly right)."
)
PRESETS = vpd.PRESETS | {"toy": vpd.PRESETS["toy"] | {"judge_request": toy.JUDGE_REQUEST}}


@dataclass(frozen=True)
class Method(vpd.Method):
    replaces: bool = True  # the teacher writes whole responses and scores none (read by the memory plan)


@dataclass
class Config(vpd.Config):
    method: Literal["ovd"] = vpd.RUN("ovd", "the only method of this command")
    ovd_threshold: float = OVD(5.0, "rollouts with a score below this are rejected", least=0, most=10)
    ovd_ratio: Literal["teacher", "one"] = OVD("teacher", "pi_old of a demonstration: that of the teacher, or sg pi (ratio one)")
    ovd_failed: bool = OVD(True, "use demonstrations that fail as well")
    judge_url: str = OVD("", "OpenAI-compatible server that scores rollouts; default: the student scores them")
    judge_model: str = OVD("", "name of the judge's model on that server", **SERVED)
    max_judge_tokens: int = OVD(16, "tokens of a served judge's reply", above=0, **SERVED)
    server_timeout: float = vpd.SERVED(60.0, "seconds to wait for a server, in each of three attempts", above=0, **SERVERS)
    judge_request: str = OVD(REQUEST, "the judge's prompt, with {question} and {attempt}")

    def row(self) -> Method:
        return Method(vpd.grpo, "live", "advantage", reinforces=True)


def check(cfg: Config) -> None:
    """Raises ValueError with one line for settings that cannot work together."""
    vpd.check(cfg)
    served.check("judge", cfg.judge_url, cfg.judge_model)
    feedback.check_template("judge", cfg.judge_request, ("question", "attempt"))


# ---- The judge -------------------------------------------------------------------------------------------------


class Judge:
    """Scores rollouts without knowing their outcomes: the student, by the probabilities of its digits, or a model on a server."""

    def __init__(self, cfg: Config, policy: Policy, task):
        self.cfg, self.policy, self.missing, self.server = cfg, policy, Counter(), None
        if cfg.judge_url:
            self.server = Served("judge", cfg.judge_url, cfg.judge_model, cfg.server_timeout, policy.world, self.missing)
            return
        self.digits = digit_tokens(policy.tokenizer)
        feedback.check_request(policy.tokenizer, "judge", cfg.judge_request, cfg.max_teacher_tokens)
        if cfg.task == "toy" and cfg.subset != "code-judge":
            task.notes.append(f"{task.name}: its model was not trained to judge; --subset code-judge has one that was")

    def scores(self, problems: list, texts: list[str], step: int) -> list[float | None]:
        """S of each rollout, 0 to 9, or None if the judge gave no digit, which `missing` counts."""
        cfg, tokenizer = self.cfg, self.policy.tokenizer
        parts = [feedback.request_parts(cfg.judge_request, p.messages, text) for p, text in zip(problems, texts)]
        if self.server:
            asked = ["".join(p) for p in parts]
            return self.server.score(asked, seed_for(cfg.seed, step, "scores"), cfg.max_judge_tokens)
        prompts = [feedback.encode(tokenizer, p.messages[-1:], q, cfg.max_teacher_tokens)[0] for p, q in zip(problems, parts)]
        scores = [expected_digit(row, least=0.5) for row in self.policy.choose(prompts, self.digits).exp().tolist()]
        self.missing["judge: no digit, kept"] += scores.count(None)
        return scores


def digit_tokens(tokenizer) -> list[int]:
    """The token ids of 0 to 9. Raises ValueError if the tokenizer does not have one token for each digit."""
    ids = [token for digit in range(10) for token in tokenizer(str(digit), add_special_tokens=False).input_ids]
    if len(ids) != 10 or len({*ids}) < 10:
        raise ValueError("the tokenizer does not have one token for each digit, so this network cannot judge: give --judge_url")
    return ids


def judge_figures(scores: list, outcomes: list, threshold: float) -> dict:
    """How many scores round to 0, 1, ... 9, the share of accepted rollouts, and the AUC: the probability that a success has a
    higher score than a failure, where a tie counts one half."""
    known = [(score, o.reward) for score, o in zip(scores, outcomes) if score is not None and o.verdict != "internal"]
    good, bad = (torch.tensor([score for score, reward in known if reward == which]) for which in (1, 0))
    counts = Counter(math.floor(score + 0.5) for score in scores if score is not None)
    gap = good[:, None] - bad  # (successes, failures)
    return {
        "scores": [counts[digit] for digit in range(10)],
        "accepted": mean([float(score is None or score >= threshold) for score in scores]),
        "judge_auc": mean((gap > 0).double() + 0.5 * (gap == 0)),
    }


# ---- Demonstrations --------------------------------------------------------------------------------------------


def demonstrate(cfg: Config, run: session.Run, teacher, batch, scores: list, log) -> dict:
    """Replaces each row of the batch that the judge rejects and that has a context by a response of the teacher to (x, C), verified
    like a rollout. Returns {row: (Rollout, Outcome)}; `batch.rollouts` and `batch.outcomes` remain the student's. Counts the
    rejected rows that stay, by reason."""
    rejected = [i for i, score in enumerate(scores) if score is not None and score < cfg.ovd_threshold]
    asked = [i for i in rejected if batch.has_C[i]]
    log.skip("rejected without a context, kept", len(rejected) - len(asked))
    prompts, seed = [batch.xC[i] for i in asked], seed_for(cfg.seed, batch.step, "demonstrations")
    with weights_of(teacher if asked else None, run.sampler, run.policy):
        drawn = run.sampler.sample(prompts, 1, seed, cfg.max_response_tokens, cfg.temperature, cfg.top_p)
    outcomes = run.task.verify([batch.problems[i] for i in asked], [run.policy.decode(d.tokens) for d in drawn])
    shown = {}
    for i, rollout, outcome in zip(asked, drawn, outcomes):
        if outcome.verdict == "internal":
            log.skip("demonstration without a grade, rollout kept")
        elif not outcome.reward and not cfg.ovd_failed:
            log.skip("demonstration failed, rollout kept")
        else:
            shown[i] = rollout, outcome
    rollouts = [shown[i][0] if i in shown else rollout for i, rollout in enumerate(batch.rollouts)]
    batch.y = [rollout.tokens for rollout in rollouts]
    batch.mask = run.policy.mask(batch.y)
    batch.sampler_logp = pad_sequence([batch.sampler_logp.new_tensor(rollout.logp) for rollout in rollouts], batch_first=True)
    for i, (_, outcome) in shown.items():
        batch.r[i] = outcome.reward
    return shown


# ---- The loop --------------------------------------------------------------------------------------------------


def train(cfg: Config, run: session.Run) -> None:
    policy, sampler, judge, G = run.policy, run.sampler, run.also, cfg.group_size
    teacher = policy.frozen_copy() if cfg.reader() == "ema" else None  # None: the live weights
    optimizer, limit, size = vpd.adamw(cfg, policy), run.mismatch_limit(), cfg.minibatch_prompts * G
    with run.started(teacher, {"shared": optimizer}):
        for step, problems in run.batches():
            log, rate = run.batch(step), run.rate(step)

            # ---- Rollouts, outcomes, contexts
            batch = vpd.roll_out(cfg, run, log, problems)
            vpd.grade(cfg, run, log, batch)

            # ---- Demonstrations replace the rollouts that the judge rejects
            scores = judge.scores(batch.problems, batch.texts, step)
            log.left_out.update(judge.missing)
            judge.missing.clear()
            shown = demonstrate(cfg, run, teacher, batch, scores, log)
            by_student = torch.tensor([i not in shown for i in range(len(batch.y))], device=policy.device)  # (B,)
            for i, score in enumerate(scores):
                rollout, outcome = shown.get(i, (None, None))
                log.samples[i] = {"score": score, "demonstration": rollout and policy.decode(rollout.tokens),
                                  "demonstration_reward": outcome and outcome.reward}  # fmt: skip
            log.note(**judge_figures(scores, batch.outcomes, cfg.ovd_threshold), demonstrations=mean(~by_student),
                     demonstration_reward=mean([outcome.reward for _, outcome in shown.values()]))  # fmt: skip
            log.lap("judge")
            run.leave_if_told(step)

            # ---- Freeze log pi, of the demonstrations as well
            sampler.sleep()
            entropy = vpd.freeze(batch, policy, None, with_teacher=False)
            log.measured(batch, by_student, batch.old_logp, entropy, None)
            demonstrated = batch.mask.bool() & ~by_student[:, None]  # (B, T)
            rho = (batch.old_logp - batch.sampler_logp)[demonstrated].exp()  # pi / q
            if shown:
                log.note(demonstration_ratio=mean(rho), demonstration_lacked=mean(rho < 0.5))
            log.lap("freeze")

            # ---- GRPO over the mixed group. pi_old is the student at the freeze; of a demonstration the teacher, or sg pi
            A = vpd.advantages(cfg, batch)  # (B,)
            takes_part = A != 0
            log.skip("m_step: no signal", int((~takes_part).sum()))
            batch.old_logp = batch.sampler_logp.where(demonstrated, batch.old_logp)
            on_policy = torch.where(by_student, size == len(batch.y), cfg.ovd_ratio == "one")  # (B,), pi_old = sg pi
            known = batch.known(A) | {"on_policy": on_policy[:, None].expand_as(batch.mask)}

            def per_token(t):
                mismatch = 1.0 if limit is None else losses.truncated_ratio(t.old_logp, t.sampler_logp, limit)
                t.old_logp = torch.where(t.on_policy, t.logp.detach(), t.old_logp)
                return vpd.grpo(t, cfg) * mismatch

            for rows in vpd.m_step_minibatches(takes_part, size, log.skip):
                for part in policy.micro_batches(rows, [len(x) + len(y) for x, y in zip(batch.x, batch.y)]):
                    view = batch.view(policy, batch.x, part)
                    here = {name: x[part, : view.mask.shape[1]] for name, x in known.items()}
                    loss, passed = view.loss(per_token, losses.sequence_weights(view.mask, size), here)
                    policy.backward(loss)
                    log.m_pass(part, view, loss, passed, batch.has_C, measures=False)
                log.m_norms.append(run.update(optimizer, cfg.lr * rate, log.m_loss()))
            if teacher is not None:
                ema_update(teacher, policy.model, cfg.ema_rate)
            log.lap("m_step")
            sampler.sync(policy)
            log.lap("sync")
            run.end_of_batch(log, batch)


def main(argv: list[str] | None = None) -> None:
    preset = partial(presets.of, PRESETS)
    cfg = parse(argv, Config, "python -m neighbours.ovd", "OVD, a neighbour of VPD.", preset, method="ovd")
    session.launch(cfg, check, train, also=Judge)


if __name__ == "__main__":
    command.run(main)
