"""The loop: the pieces of a batch by hand, and whole small runs of every method."""

import copy
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import feedback
import losses
import rollout
from harness import settings
import tasks
import vpd
from neighbours.reviews import Reviews
from tasks import Outcome

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


# ---- Pieces of a batch -------------------------------------------------------------------------------------


def test_batches_visit_every_problem_once_an_epoch_and_drop_the_incomplete_last():
    drawn = list(vpd.batches(list(range(7)), 3, 4, seed=0))
    assert [len(b) for b in drawn] == [3, 3, 3, 3]
    for epoch in (drawn[:2], drawn[2:]):
        assert len(set(sum(epoch, []))) == 6
    assert drawn[:2] != drawn[2:]
    assert drawn == list(vpd.batches(list(range(7)), 3, 4, seed=0))
    assert drawn != list(vpd.batches(list(range(7)), 3, 4, seed=1))


def test_e_step_takes_groups_in_which_both_outcomes_have_a_context():
    r = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 0, 0])
    told = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    # Group 1 is mixed, row 2 has no context. Group 2 has successes only, group 3 failures only. Group 4 was sampled with
    # both outcomes, but its success has no context.
    groups, left = vpd.e_step_groups("mixed", r, told, 3)
    assert groups == [[0, 1]]
    assert left == 10
    groups, left = vpd.e_step_groups("all", r, told, 3)
    assert groups == [[0, 1], [3, 4, 5], [6, 7, 8], [10, 11]]
    assert left == 2


def test_margin_is_mean_of_successes_minus_mean_of_failures():
    figures = vpd.margin_figures(
        torch.tensor([0.5, -0.1, 0.1, -0.6]), torch.tensor([1.0, 0, 1, 0]), torch.tensor([4, 1, 1, 5])
    )
    assert figures["margin"] == pytest.approx((0.5 + 0.1) / 2 - (-0.1 - 0.6) / 2)
    # |r~| = .5 .1 .1 .6 against lengths 4 1 1 5: nearly proportional.
    assert figures["length_correlation"] > 0.99
    one_class = vpd.margin_figures(torch.tensor([0.5, 0.1]), torch.ones(2), torch.tensor([1, 2]))
    assert one_class["margin"] is None


def test_a_judges_figures_by_hand():
    """The AUC counts the pairs of a success and a failure, a tie for one half; a row that the grader failed on, or that
    has no score, is in no pair."""
    right, wrong, failed = Outcome(1, "passed"), Outcome(0, "wrong"), Outcome(0, "internal")
    outcomes = [right, right, right, wrong, wrong, failed, wrong, right]
    scores = [9.0, 4.5, 2.0, 4.5, 2.49, 0.0, None, None]
    figures = vpd.judge_figures(scores, outcomes, 4.5)
    # 9 beats both; 4.5 ties and beats; 2 loses to both
    assert figures["judge_auc"] == pytest.approx((1 + 1 + 0.5 + 1 + 0 + 0) / 6)
    assert figures["scores"] == [1, 0, 2, 0, 0, 2, 0, 0, 0, 1]  # a half rounds up
    assert figures["accepted"] == 5 / 8  # 9, twice exactly 4.5, and the two without a score
    assert vpd.judge_figures([3.0, 7.0], [right, right], 5.0)["judge_auc"] is None
    assert vpd.judge_figures([3.0, None, 7.0], [right, wrong, failed], 5.0)["judge_auc"] is None

    rng = np.random.default_rng(0)
    scores, rewards = rng.integers(0, 90, 200) / 10, rng.integers(0, 2, 200)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[rewards == 1] for b in scores[rewards == 0]]
    many = vpd.judge_figures(scores.tolist(), [right if r else wrong for r in rewards], 5.0)
    assert many["judge_auc"] == pytest.approx(np.mean(pairs))


# ---- Whole runs --------------------------------------------------------------------------------------------

SMALL = ["--subset", "choice", "--prompts_per_batch", "4", "--minibatch_prompts", "4", "--e_minibatch_prompts", "4",
         "--group_size", "4", "--max_response_tokens", "30", "--eval_samples", "1", "--dtype", "float64"]  # fmt: skip


def run(out, *flags, steps=2):
    vpd.main([*SMALL, "--steps", str(steps), "--out", str(out), *flags])
    return read_log(out)


def read_log(out):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", settings.METHODS)
def test_every_method_trains_and_writes_a_complete_run_directory(method, tmp_path, small_validation):
    rows = run(tmp_path / "run", "--method", method, "--eval_every", "2", "--lr", "0.001")
    assert [(row["kind"], row["step"]) for row in rows] == [("eval", 0), ("train", 0), ("train", 1), ("eval", 2)]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["method"] == method and config["seed"] == 0 and "commit" in config and "command" in config
    assert config["teacher"] == {"vpd": "live", "ovd": "live", "grpo": ""}.get(method, "ema")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 8 and {"prompt", "response", "reward", "context"} <= samples[0].keys()
    for row in (row for row in rows if row["kind"] == "train"):
        assert math.isfinite(row["m_loss"]) and row["m_grad_norm"] > 0
        assert set(row["seconds"]) >= {"rollout", "verify", "freeze", "m_step", "sync"}
        assert row["sampler_gap"] < 1e-5
        assert method != "grpo" or row["margin"] is None
        assert method == "vpd" or row["e_loss"] is None
        assert (row["divergence"] is not None) == (method in ("vpd", "sdpo", "joint", "distil"))
        assert row["divergence"] is None or row["divergence"] > 1e-6  # the teacher does see something else
    before, after = weights(ROOT / "tasks" / "toy_models" / "choice"), weights(tmp_path / "run" / "model")
    assert any((before[k].double() - after[k].double()).abs().max() > 1e-6 for k in before)
    assert (tmp_path / "run" / "best" / "config.json").exists()


def test_the_e_step_runs_on_every_f_th_batch_starting_with_the_first(tmp_path):
    rows = run(tmp_path / "run", "--e_step_every", "2", "--eval_every", "0", "--e_groups", "all", steps=4)
    assert [row["e_loss"] is not None for row in rows] == [True, False, True, False]
    assert ["e_step" in row["seconds"] for row in rows] == [True, False, True, False]


@pytest.mark.parametrize(
    "hybrid, plain",
    [
        (["joint", "--w_rl", "0"], ["sdpo"]),
        (["joint", "--w_opd", "0"], ["grpo"]),
        (["reshape", "--w_opd", "0"], ["grpo"]),
        (["reweight", "--reweight_lam", "0"], ["grpo"]),
        # The cross-entropy and KL(teacher‖student) differ by the teacher's entropy, which has no gradient.
        (["distil", "--no_future"], ["sdpo", "--divergence", "kl_teacher_student"]),
    ],
    ids=lambda method: " ".join(method),
)
def test_a_hybrid_without_one_of_its_parts_is_the_other_method(hybrid, plain, tmp_path):
    for name, method in (("hybrid", hybrid), ("plain", plain)):
        run(
            tmp_path / name,
            "--method",
            *method,
            *"--eval_every 0 --lr 0.001 --divide_by_std False".split(),
            "--teacher",
            *(["ema"] if method != ["grpo"] else [""]),
        )
    one, other = weights(tmp_path / "hybrid" / "model"), weights(tmp_path / "plain" / "model")
    assert max((one[k] - other[k]).abs().max().item() for k in one) < 1e-12


@pytest.mark.parametrize("norm", ["length", "constant"])
@pytest.mark.parametrize("expert", ["probabilities", "samples"])
def test_distil_s_loss_is_the_cross_entropy_and_the_charge_for_later_tokens(norm, expert, tmp_path, monkeypatch):
    """One batch, ratio 1: row loss = mean(CE_t - A_t / |y|), or (1/L) sum(CE_t - A_t), A_t = -(c_t - b_t)."""
    seen, advantages = [], losses.future_advantages
    monkeypatch.setattr(
        losses, "future_advantages", lambda *args: seen.append((args, advantages(*args))) or seen[-1][1]
    )
    flags = ("--method", "distil", "--distil_norm", norm, "--expert", expert, "--eval_every", "0", "--temperature", "2")
    (row,) = run(tmp_path / "run", *flags, steps=1)
    (((cost, mask, group_size, told), A),) = seen
    assert group_size == 4 and cost.shape == mask.shape == A.shape and len(told) == 16 and A.abs().max() > 0
    expected = 0.0
    for i in range(16):
        n = int(mask[i].sum())
        if told[i]:
            terms = [(cost[i, t] - A[i, t] / (n if norm == "length" else 1)).item() for t in range(n)]
            expected += sum(terms) / (n if norm == "length" else 30) / 16  # --max_response_tokens 30, 16 sequences
    assert row["m_loss"] == pytest.approx(expected, rel=1e-9)
    assert row["divergence"] == pytest.approx(
        np.mean([cost[i][mask[i] == 1].mean().item() for i in range(16) if told[i]])
    )


def test_delta_is_a_moving_average_that_starts_at_the_first_value(tmp_path, monkeypatch):
    values = iter((1.0, 3.0, -2.0))
    monkeypatch.setattr(losses, "reward_shift", lambda *args: torch.tensor(next(values)))
    flags = ("--e_step_every", "1", "--shift_rate", "0.25", "--eval_every", "0", "--e_groups", "all")
    rows = run(tmp_path / "run", *flags, steps=3)
    second = 0.75 * 1.0 + 0.25 * 3.0
    assert [row["shift"] for row in rows] == pytest.approx([1.0, second, 0.75 * second + 0.25 * -2.0])


def test_a_delta_that_is_not_finite_skips_its_update_and_is_not_kept(tmp_path, monkeypatch):
    values = iter((math.inf, 2.0))
    monkeypatch.setattr(losses, "reward_shift", lambda *args: torch.tensor(next(values)))
    flags = ("--e_step_every", "1", "--eval_every", "0", "--e_groups", "all")
    rows = run(tmp_path / "run", *flags, steps=2)
    assert [(row["shift"], row["updates_not_finite"]) for row in rows] == [(None, 1), (2.0, 0)]


def test_delta_starts_at_the_first_value_and_an_overflow_moves_nothing():
    assert vpd.moving_shift(None, 4.0, 0.25) == 4.0
    assert vpd.moving_shift(4.0, 8.0, 0.25) == 0.75 * 4 + 0.25 * 8
    assert vpd.moving_shift(4.0, float("inf"), 0.25) == vpd.moving_shift(4.0, float("nan"), 0.25) == 4.0


def test_the_gap_between_engines_weighs_the_students_tokens_and_says_what_demonstrations_are():
    """Two tokens of a rollout and padding; two of a demonstration and padding."""
    logp = torch.tensor([[0.5, 0.2, 0.9], [0.3, 0.6, 0.9]]).log()
    drawn = torch.tensor([[0.1, 0.4, 0.1], [0.9, 0.8, 0.1]]).log()
    sampled = torch.tensor([[True, True, False], [False, False, False]])
    shown = torch.tensor([[False, False, False], [True, True, False]])
    weight, figures = vpd.engine_gap(logp, drawn, sampled, shown, limit=2.0)
    assert torch.allclose(weight, torch.tensor([[2.0, 0.5, 1.0], [1.0, 1.0, 1.0]]))  # min(0.5 / 0.1, 2), 0.2 / 0.4
    assert figures["sampler_gap"] == pytest.approx((math.log(5) + math.log(2)) / 2)
    assert figures["mismatch_truncated"] == 0.5
    assert figures["demonstration_ratio"] == pytest.approx((0.3 / 0.9 + 0.6 / 0.8) / 2)
    assert figures["demonstration_lacked"] == 0.5  # 0.3 / 0.9 < 1/2 < 0.6 / 0.8
    plain, figures = vpd.engine_gap(logp, drawn, sampled, torch.zeros_like(shown), limit=None)
    assert torch.equal(plain, torch.ones(2, 3)) and figures["mismatch_truncated"] is None
    assert figures["sampler_gap"] > 0 and "demonstration_ratio" not in figures


def test_the_fixed_prior_is_the_initial_student(tmp_path):
    """On the first batch both priors are the same weights; after it only the dynamic one has moved."""
    flags = ("--e_step_every", "1", "--eval_every", "0", "--e_groups", "all")
    dynamic, fixed = (run(tmp_path / prior, "--prior", prior, *flags) for prior in ("dynamic", "fixed"))
    assert dynamic[0]["e_loss"] == pytest.approx(fixed[0]["e_loss"], rel=1e-12)
    assert dynamic[1]["margin"] == pytest.approx(fixed[1]["margin"], rel=1e-12)  # Fig. 1's margin is about the student
    assert dynamic[1]["e_loss"] != pytest.approx(fixed[1]["e_loss"], rel=1e-6)


def test_a_run_repeats_itself_and_another_seed_does_not(tmp_path):
    logs = [
        run(tmp_path / name, "--eval_every", "0", "--seed", seed) for name, seed in (("a", "0"), ("b", "0"), ("c", "1"))
    ]
    stripped = [
        [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in log] for log in logs
    ]
    assert stripped[0] == stripped[1]
    assert stripped[0] != stripped[2]


@pytest.mark.parametrize("method", ("vpd", "joint", "reweight"))
def test_the_micro_batch_changes_neither_losses_nor_weights(method, tmp_path):
    """--micro_batch_tokens 1 runs every row alone."""
    flags = ("--method", method, "--eval_every", "0", "--feedback", "environment", "--micro_batch_tokens")
    logs = [run(tmp_path / n, *flags, n) for n in ("1", "100000")]
    assert method != "vpd" or logs[0][0]["e_rows"] >= 8  # several rows in the E-step, so there is something to split
    for one, many in zip(*logs):
        for key in ("reward", "m_loss", "m_grad_norm", "margin", "e_loss", "shift", "divergence"):
            if one.get(key) is not None:
                assert one[key] == pytest.approx(many[key], rel=1e-8, abs=1e-12), key
    one, many = (weights(tmp_path / n / "model") for n in ("1", "100000"))
    assert max((one[k] - many[k]).abs().max().item() for k in one) < 1e-9


def test_several_updates_per_batch_meet_a_teacher_that_has_moved_on(tmp_path, monkeypatch):
    """--minibatch_prompts 1 makes an update per group. The live teacher of each is the network as the last one left it;
    no copy of the weights is ever scored."""
    view, seen = vpd.Policy.view, []

    def spy(self, prompts, responses, model=None):
        if not torch.is_grad_enabled():
            seen.append((model, sum(p.double().sum().item() for p in self.model.parameters())))
        return view(self, prompts, responses, model)

    monkeypatch.setattr(vpd.Policy, "view", spy)
    rows = run(tmp_path / "run", "--minibatch_prompts", "1", "--eval_every", "0", "--feedback", "environment", steps=1)
    updates = 4 - rows[0]["left_out"].get("m_step: whole update", 0)
    assert updates >= 2 and rows[0]["e_loss"] is not None
    # Two passes of the freeze at the weights that sampled, then one teacher pass per update, each at weights of its own.
    assert all(model is None for model, _ in seen) and len(seen) == 2 + updates
    assert seen[0][1] == seen[1][1] and len({weights for _, weights in seen[1:]}) == 1 + updates


@pytest.mark.parametrize("method, flags", [("vpd", ["--feedback", "environment"]), ("grpo", []), ("joint", [])])
def test_a_token_drawn_by_another_engine_weighs_pi_old_over_pi_sampler_at_most_the_limit(
    method, flags, tmp_path, monkeypatch
):
    """The sampler's log-probs are made log 1.5 lower, or log 4 lower, on every token: the weights are 1.5, and 2 instead of
    4, and so is the loss. The E-step is about whole sequences and has no such weight."""
    sample, factor = rollout.HFSampler.sample, [1.0]

    def other(self, *args):
        drawn = sample(self, *args)
        return [rollout.Rollout(r.tokens, [p - math.log(factor[0]) for p in r.logp], r.finish) for r in drawn]

    monkeypatch.setattr(rollout.HFSampler, "sample", other)
    monkeypatch.setattr(rollout.HFSampler, "other_engine", True)
    losses_, fixed = [], ("--method", method, "--eval_every", "0", "--max_grad_norm", "1e9", *flags)
    for factor[0], limit in ((1.0, "2"), (1.5, "2"), (4.0, "2"), (4.0, "none"), (4.0, "3")):
        out = tmp_path / f"{factor[0]} {limit}"
        losses_.append(run(out, *fixed, "--mismatch_limit", limit, steps=1)[0])
    norms = [row["m_grad_norm"] / losses_[0]["m_grad_norm"] for row in losses_]
    assert norms == pytest.approx([1, 1.5, 2, 1, 3], rel=1e-5)
    assert [row["mismatch_truncated"] for row in losses_] == [0, 0, 1, None, 1]
    gaps = [0, math.log(1.5), math.log(4), math.log(4), math.log(4)]
    assert [row["sampler_gap"] for row in losses_] == pytest.approx(gaps, abs=1e-5)
    assert len({row["e_loss"] for row in losses_}) == 1


def test_rows_left_out_are_counted_by_reason(tmp_path):
    rows = run(tmp_path / "run", "--method", "sdpo", "--feedback", "environment", "--no_borrow", "--eval_every", "0")
    for row in rows:
        successes = round(row["reward"] * 16)
        assert row["left_out"].get("m_step: no context", 0) == successes
        assert row["with_context"] == pytest.approx(1 - row["reward"])
        assert row["success_given_context"] == ({"environment": 0.0} if row["with_context"] else {})


def test_critiques_come_from_the_model_itself_and_reach_the_teacher(tmp_path):
    run(tmp_path / "run", "--feedback", "critique", "--eval_every", "0")
    contexts = [json.loads(line)["context"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    texts = [c["critique"] for c in contexts if c]
    assert texts and all(c["kind"] == "critique" for c in contexts if c)
    assert any("is wrong" in text for text in texts)  # what the warm-up taught it to write


def test_ema_teacher_moves_once_per_batch_towards_the_student(tmp_path, monkeypatch):
    calls = []
    update = vpd.ema_update
    monkeypatch.setattr(vpd, "ema_update", lambda t, s, rate: (calls.append((t, s, rate)), update(t, s, rate)))
    run(tmp_path / "run", "--method", "sdpo", "--minibatch_prompts", "1", "--eval_every", "0", "--ema_rate", "0.25")
    assert len(calls) == 2 and all(rate == 0.25 and t is not s for t, s, rate in calls)


def test_the_learning_rate_warms_up_and_falls_linearly_by_rollout_batch(tmp_path):
    flags = ("--eval_every", "0", "--schedule", "linear", "--warmup_steps", "2", "--lr", "0.001", "--method", "grpo")
    rows = run(tmp_path / "run", *flags, steps=4)
    assert [row["lr"] for row in rows] == pytest.approx([0.001 * w for w in (0.5 * 4 / 4, 3 / 4, 2 / 4, 1 / 4)])


def test_a_reward_that_is_not_0_or_1_is_refused(tmp_path, monkeypatch, capsys):
    load = tasks.load

    def generous(*args):
        task = load(*args)
        task.verify = lambda problems, responses: [Outcome(2, "great") for _ in problems]
        return task

    monkeypatch.setattr(tasks, "load", generous)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", "--eval_every", "0", steps=1)
    assert stop.value.code == 2 and "neither 0 nor 1" in capsys.readouterr().err


# ---- OVD: what the judge rejects gives way to a demonstration ------------------------------------------------

OVD = (
    "--method",
    "ovd",
    "--eval_every",
    "0",
    "--log_samples",
    "16",
    "--lr",
    "0.001",
    "--divide_by_std",
    "False",
    "--seed",
    "4",
)
# Of four groups of four: rejected, at the threshold, accepted, without a score, and just below it.
SCORES = [0.0, 5.0, 9.0, None, 4.99, 4.99, 5.0, 7.5, 1.0, 2.0, 8.0, 9.0, None, 3.0, 0.0, 5.01]
REJECTED = {0, 4, 5, 8, 9, 13, 14}


def grad_of(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)


def recorded(monkeypatch, verdicts=lambda outcomes, call: outcomes):
    """What a run does, to be filled by one. drawn: (prompts, seed, limits, model, its first weights, rollouts) of each call
    of the sampler; synced: the models it was given; outcomes: of each call of the verifier, of which verdicts(outcomes,
    call) makes others; updates: (a copy of the network, its gradients) before each one; viewed: every prompt that goes
    through the network but to sample."""
    seen = SimpleNamespace(drawn=[], synced=[], outcomes=[], updates=[], viewed=set())
    sample, sync = rollout.HFSampler.sample, rollout.HFSampler.sync
    view, step, load = vpd.Policy.view, vpd.Policy.step, tasks.load

    def sampling(self, prompts, n, seed, *rest):
        model, rollouts = self.policy.model, sample(self, prompts, n, seed, *rest)
        first = next(model.parameters()).detach().clone()
        seen.drawn.append(
            SimpleNamespace(prompts=prompts, seed=seed, limits=rest, model=model, weights=first, rollouts=rollouts)
        )
        return rollouts

    def viewing(self, prompts, *args):
        seen.viewed |= {tuple(prompt) for prompt in prompts}
        return view(self, prompts, *args)

    def stepping(self, *args, **kwargs):
        seen.updates.append((copy.deepcopy(self.model), [p.grad.clone() for p in self.model.parameters()]))
        return step(self, *args, **kwargs)

    def loading(*args):
        task = load(*args)
        honest = task.verify

        def verify(problems, texts):
            seen.outcomes.append(verdicts(honest(problems, texts), len(seen.outcomes)))
            return seen.outcomes[-1]

        task.verify = verify
        return task

    def syncing(self, policy):
        seen.synced.append(policy.model)
        sync(self, policy)

    monkeypatch.setattr(rollout.HFSampler, "sample", sampling)
    monkeypatch.setattr(rollout.HFSampler, "sync", syncing)
    monkeypatch.setattr(vpd.Policy, "view", viewing)
    monkeypatch.setattr(vpd.Policy, "step", stepping)
    monkeypatch.setattr(tasks, "load", loading)
    return seen


def judged(out, monkeypatch, *flags, scores=SCORES, steps=1, **kwargs):
    """What a run of OVD did whose judge gives `scores`: the sampler draws a batch's rollouts, then its demonstrations."""
    seen = recorded(monkeypatch, **kwargs)
    monkeypatch.setattr(Reviews, "scores", lambda self, problems, texts, step: list(scores))
    seen.rows = run(out, *OVD, *flags, steps=steps)
    seen.samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return seen


def mixed(seen):
    """Of a first batch: prompts, responses and rewards with the demonstrations in place, and the rows that hold one."""
    rollouts, shown = seen.drawn[0].rollouts, seen.drawn[1].rollouts
    asked = [i for i in range(16) if i in REJECTED and seen.samples[i]["context"]]
    assert len(asked) == len(shown) >= 3
    y, r = list(rollouts), [o.reward for o in seen.outcomes[0]]
    for i, demonstration, outcome in zip(asked, shown, seen.outcomes[1], strict=True):
        y[i], r[i] = demonstration, outcome.reward
    return [seen.drawn[0].prompts[i // 4] for i in range(16)], y, r, asked


def said(plain_logits, model, x, y):
    """log p of y's tokens, (T,), live."""
    return plain_logits(model, x, y.tokens).log_softmax(-1).gather(1, torch.tensor(y.tokens)[:, None])[:, 0]


@pytest.mark.parametrize("divergence", ["js", "kl_student_teacher"])
def test_vpds_two_updates_descend_eq_9_at_the_first_weights_and_then_eq_10_at_those_between(
    divergence, tmp_path, monkeypatch, plain_logits
):
    """The gradients that reach the optimizer, sign and all, against autograd through the formulas."""
    seen, told, contexts = recorded(monkeypatch), [], Reviews.contexts

    def telling(self, problems, *args):
        found = contexts(self, problems, *args)
        told.append([
            c and feedback.teacher_prompt(self.policy.tokenizer, p.messages, c, self.templates, 10**6)[0]
            for p, c in zip(problems, found)
        ])  # fmt: skip
        return found

    monkeypatch.setattr(Reviews, "contexts", telling)
    flags = ("--temperature", "1.5", "--dtype", "float64", "--eval_every", "0", "--e_lr", "0.01", "--seed", "2")
    (row,) = run(tmp_path / "run", *flags, "--divergence", divergence, steps=1)
    (first, e_grads), (between, m_grads) = seen.updates
    x, y = [prompt for prompt in seen.drawn[0].prompts for _ in range(4)], seen.drawn[0].rollouts
    (xC,), r = told, [o.reward for o in seen.outcomes[0]]
    groups = [[i for i in range(g, g + 4) if xC[i]] for g in range(0, 16, 4)]
    rows = [i for group in groups if {r[i] for i in group} == {0, 1} for i in group]
    assert len(rows) >= 4 and any(xC[i] is None for i in range(16))

    def reward(i):  # Eq. 7
        student = said(plain_logits, first, x[i], y[i]).sum().detach()
        return 0.1 * (said(plain_logits, first, xC[i], y[i]).sum() - student)

    good, bad = (torch.stack([reward(i) for i in rows if r[i] == which]) for which in (1, 0))
    delta = 0.5 * (good.mean() + bad.mean()).detach()
    e_loss = (1 + (delta - good).exp()).log().mean() + (1 + (bad - delta).exp()).log().mean()  # Eq. 9
    assert row["shift"] == pytest.approx(delta.item()) and row["e_loss"] == pytest.approx(e_loss.item())
    for mine, theirs in zip(grad_of(e_loss, first), e_grads, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-6, atol=1e-10)

    m_loss = 0.0
    for i in (i for i in range(16) if xC[i]):
        s = plain_logits(between, x[i], y[i].tokens).softmax(-1)
        t = plain_logits(between, xC[i], y[i].tokens).softmax(-1).detach()
        m = 0.5 * (s + t)
        js = 0.5 * (s * (s / m).log()).sum(-1) + 0.5 * (t * (t / m).log()).sum(-1)
        m_loss = m_loss + (js if divergence == "js" else (s * (s / t).log()).sum(-1)).mean() / 16  # Eq. 10
    assert row["m_loss"] == pytest.approx(m_loss.item(), rel=1e-6)
    for mine, theirs in zip(grad_of(m_loss, between), m_grads, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("minibatch", [4, 1])
@pytest.mark.parametrize("ratio", ["teacher", "one"])
def test_ovd_s_loss_and_gradient_are_the_clipped_policy_gradient_over_the_mixed_group(
    ratio, minibatch, tmp_path, monkeypatch, plain_logits
):
    """Per token -min(rho A, clip(rho, .8, 1.28) A), at most 3 |A| where A < 0. A: outcome less the mixed group's mean. rho:
    pi / q for a token that the teacher drew, or 1; 1 for the student's own in the first update, pi / pi_old later."""
    flags = ("--ovd_ratio", ratio, "--minibatch_prompts", str(minibatch), "--lr", "0.01", "--temperature", "1.5")
    seen = judged(tmp_path / "run", monkeypatch, *flags)
    x, y, r, shown = mixed(seen)
    A = [r[i] - sum(r[i // 4 * 4 : i // 4 * 4 + 4]) / 4 for i in range(16)]
    own = [o.reward for o in seen.outcomes[0]]
    assert any(A[i] != own[i] - sum(own[i // 4 * 4 : i // 4 * 4 + 4]) / 4 for i in range(16) if i not in shown)
    with torch.no_grad():
        old = [said(plain_logits, seen.updates[0][0], x[i], y[i]) for i in range(16)]

    lengths = [sum(len(row.tokens) for row in rows) / 16 for rows in (seen.drawn[0].rollouts, y)]
    assert seen.rows[0]["response_length"] == lengths[0] != lengths[1]

    updates = [range(first, first + 4 * minibatch) for first in range(0, 16, 4 * minibatch)]
    updates = [rows for rows in updates if any(A[i] for i in rows)]
    assert len(updates) == len(seen.updates) >= (2 if minibatch == 1 else 1)
    values = []
    for k, (rows, (model, grads)) in enumerate(zip(updates, seen.updates)):
        loss = 0.0
        for i in rows:
            logp = said(plain_logits, model, x[i], y[i])
            before = logp.detach() if k == 0 else old[i]
            if i in shown:
                before = torch.tensor(y[i].logp) if ratio == "teacher" else logp.detach()
            rho = (logp - before).exp()
            token = -torch.minimum(rho * A[i], rho.clamp(0.8, 1.28) * A[i])
            token = token.clamp(max=3 * abs(A[i])) if A[i] < 0 else token
            loss = loss + token.mean() / len(rows)
        values.append(loss.item())
        for mine, theirs in zip(grads, grad_of(loss, model), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    assert seen.rows[0]["m_loss"] == pytest.approx(np.mean(values), rel=1e-7)


def test_ovd_s_log_is_about_the_students_own_rollouts_and_says_what_the_demonstrations_are(
    tmp_path, monkeypatch, plain_logits
):
    seen = judged(tmp_path / "run", monkeypatch)
    (row,), (x, y, r, shown), rollouts = seen.rows, mixed(seen), seen.drawn[0].rollouts
    own = [o.reward for o in seen.outcomes[0]]
    assert row["reward"] == sum(own) / 16 != sum(r) / 16
    assert row["verdicts"] == Counter(o.verdict for o in seen.outcomes[0])
    assert row["response_length"] == sum(len(roll.tokens) for roll in rollouts) / 16
    model = seen.updates[0][0]
    kept = [plain_logits(model, x[i], y[i].tokens).detach().log_softmax(-1) for i in range(16) if i not in shown]
    assert row["entropy"] == pytest.approx(torch.cat([-(p.exp() * p).sum(-1) for p in kept]).mean().item())
    assert row["sampler_gap"] < 1e-5 and row["mismatch_truncated"] is None

    gaps = [said(plain_logits, model, x[i], y[i]).detach() - torch.tensor(y[i].logp) for i in shown]
    assert row["demonstration_ratio"] == pytest.approx(torch.cat(gaps).exp().mean().item(), rel=1e-6)
    assert abs(row["demonstration_ratio"] - 1) > 0.01  # they are not the student's
    assert row["demonstrations"] == len(shown) / 16
    assert row["demonstration_reward"] == sum(o.reward for o in seen.outcomes[1]) / len(shown)
    known = [(score, reward) for score, reward in zip(SCORES, own) if score is not None]
    pairs = [(a > b) + 0.5 * (a == b) for a, right in known for b, other in known if right and not other]
    assert row["judge_auc"] == pytest.approx(np.mean(pairs))
    # 0 twice; 1; 2; 3; 4.99 twice, 5 twice and 5.01 are 5; 7.5 and 8 are 8; 9 twice
    assert row["scores"] == [2, 1, 1, 1, 0, 5, 0, 0, 2, 2] and row["accepted"] == 9 / 16
    assert row["divergence"] is None and row["margin"] is None
    decode = vpd.Policy.load(str(ROOT / "tasks" / "toy_models" / "choice")).decode
    for i, sample in enumerate(seen.samples):
        assert sample["score"] == SCORES[i] and sample["response"] == decode(rollouts[i].tokens)
        assert sample["reward"] == own[i]
        assert sample["demonstration"] == (decode(y[i].tokens) if i in shown else None)


def test_a_rejected_row_without_a_context_is_kept_and_so_is_one_without_a_score(tmp_path, monkeypatch):
    """--no_borrow leaves successes without a context, and every score is too low but two."""
    scores = [0.0] * 14 + [None, 5.0]
    flags = ("--feedback", "environment", "--no_borrow")
    seen = judged(tmp_path / "run", monkeypatch, *flags, scores=scores)
    replaced = [i for i, sample in enumerate(seen.samples) if sample["demonstration"] is not None]
    told = [i for i, sample in enumerate(seen.samples) if sample["context"]]
    assert told == [i for i in range(16) if not seen.samples[i]["reward"]]
    assert replaced == [i for i in told if i < 14] and 0 < len(replaced) < 14
    assert seen.rows[0]["left_out"]["rejected without a context, kept"] == 14 - len(replaced)


@pytest.mark.parametrize("why", ["failed", "grader"])
def test_a_demonstration_that_may_not_take_the_place_leaves_the_rollout(why, tmp_path, monkeypatch):
    """--no_ovd_failed is about one that fails; one that the grader failed on has no outcome at all."""
    spoilt = {"failed": Outcome(0, "wrong"), "grader": Outcome(0, "internal")}[why]

    def verdicts(outcomes, call):  # of the first batch's demonstrations, the second and third
        right = Outcome(1, "right")
        return [right, spoilt, spoilt] + [right] * (len(outcomes) - 3) if call == 1 else outcomes

    flags = ["--no_ovd_failed"] if why == "failed" else []
    seen = judged(tmp_path / "run", monkeypatch, *flags, verdicts=verdicts)
    asked = mixed(seen)[3]
    assert [seen.samples[i]["demonstration"] is None for i in asked] == [False, True, True] + [False] * (len(asked) - 3)
    (row,) = seen.rows
    reason = {"failed": "demonstration failed, rollout kept", "grader": "demonstration without a grade, rollout kept"}
    assert [row["left_out"].get(which, 0) for which in reason.values()] == [2 * (why == which) for which in reason]
    assert row["demonstrations"] == (len(asked) - 2) / 16 and row["demonstration_reward"] == 1
    rewards = [o.reward for o in seen.outcomes[0]]
    for i in set(asked) - set(asked[1:3]):
        rewards[i] = 1
    still = sum(len(set(rewards[first : first + 4])) == 1 for first in range(0, 16, 4))
    assert row["left_out"].get("m_step: no signal", 0) == 4 * still  # the two kept their own outcomes


def test_a_demonstration_that_fails_takes_the_place_by_default(tmp_path, monkeypatch):
    seen = judged(
        tmp_path / "run",
        monkeypatch,
        verdicts=lambda out, call: [Outcome(0, "wrong") for _ in out] if call == 1 else out,
    )
    (row,), asked = seen.rows, mixed(seen)[3]
    assert row["demonstrations"] == len(asked) / 16 and row["demonstration_reward"] == 0
    assert "demonstration failed, rollout kept" not in row["left_out"]


@pytest.mark.parametrize("flags", [["--ovd_threshold", "0"], ["--ovd_threshold", "9"]], ids=" ".join)
def test_ovd_without_rejections_is_grpo_bit_for_bit(flags, tmp_path, monkeypatch):
    """At threshold 0 nothing is rejected; and choice's model, which has not learnt to judge, names no digit."""
    fixed = ("--eval_every", "0", "--lr", "0.001", "--divide_by_std", "False", "--minibatch_prompts", "2")
    if flags[1] == "0":
        monkeypatch.setattr(Reviews, "scores", lambda self, problems, *_: [0.0] * len(problems))
    rows = run(tmp_path / "ovd", "--method", "ovd", *flags, *fixed)
    plain = run(tmp_path / "grpo", "--method", "grpo", *fixed)
    one, other = weights(tmp_path / "ovd" / "model"), weights(tmp_path / "grpo" / "model")
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert [row["m_loss"] for row in rows] == [row["m_loss"] for row in plain]
    for row in rows:
        assert row["accepted"] == 1 and row["demonstrations"] == 0 and row["demonstration_reward"] is None
        assert row["left_out"].get("judge: no digit, kept", 0) == (16 if flags[1] == "9" else 0)
        assert "demonstration_ratio" not in row or row["demonstration_ratio"] is None


@pytest.mark.parametrize("teacher", ["live", "ema"])
def test_demonstrations_are_drawn_by_the_teacher_which_scores_no_token(teacher, tmp_path, monkeypatch):
    """Its prompt holds the context and its weights are its own; then the sampler has the student's back. No teacher's prompt
    goes through the network but to sample."""
    flags = (
        "--teacher",
        teacher,
        "--ema_rate",
        "0.25",
        "--feedback",
        "environment",
        "--temperature",
        "1.5",
        "--top_p",
        "0.9",
    )
    seen = judged(tmp_path / "run", monkeypatch, *flags, steps=2)
    cfg = settings.parse([*SMALL, *OVD, *flags])
    policy, task = vpd.Policy.load(str(ROOT / "tasks" / "toy_models" / "choice")), tasks.load("toy", "choice")
    by_id = {p.id: p for p in task.train}
    told = []
    for step, (own, shown) in enumerate((seen.drawn[:2], seen.drawn[2:])):
        samples = seen.samples[16 * step : 16 * step + 16]
        asked = [samples[i] for i in sorted(REJECTED) if samples[i]["context"]]
        expected = [
            feedback.teacher_prompt(
                policy.tokenizer, by_id[s["id"]].messages, feedback.Context(**s["context"]), cfg.templates(), 512
            )[0]
            for s in asked
        ]
        assert shown.prompts == expected and len(own.prompts) == 4
        assert shown.limits == own.limits == (30, 1.5, 0.9)
        told += expected
        assert (shown.model is own.model) == (teacher == "live") and own.model is seen.drawn[0].model
    assert len({call.seed for call in seen.drawn}) == 4
    # At the start, before and after the demonstrations, and when a batch is done.
    student, other = seen.drawn[0].model, seen.drawn[1].model
    pushed = [student, *[other, student, student] * 2] if teacher == "ema" else [student] * 3
    assert [id(model) for model in seen.synced] == [id(model) for model in pushed]
    assert told and not seen.viewed & {tuple(prompt) for prompt in told}
    first, second = seen.drawn[0].weights, seen.drawn[2].weights
    assert (second - first).abs().max() > 1e-5
    torch.testing.assert_close(seen.drawn[1].weights, first)
    torch.testing.assert_close(seen.drawn[3].weights, 0.75 * first + 0.25 * second if teacher == "ema" else second)


def test_the_gap_between_two_engines_weighs_the_students_tokens_and_no_demonstration_s(
    tmp_path, monkeypatch, plain_logits
):
    """The sampler's log-probs are log 1.5 too low throughout: a token of the student's weighs 1.5, one of a demonstration
    its ratio to what the engine said, and no more."""
    sample = rollout.HFSampler.sample

    def other(self, *args):
        return [rollout.Rollout(r.tokens, [p - math.log(1.5) for p in r.logp], r.finish) for r in sample(self, *args)]

    monkeypatch.setattr(rollout.HFSampler, "sample", other)
    monkeypatch.setattr(rollout.HFSampler, "other_engine", True)
    seen = judged(tmp_path / "run", monkeypatch, "--ovd_ratio", "one")
    x, y, r, shown = mixed(seen)
    A = [r[i] - sum(r[i // 4 * 4 : i // 4 * 4 + 4]) / 4 for i in range(16)]
    # At ratio 1 a token's loss is -A, and so is its row's.
    assert seen.rows[0]["m_loss"] == pytest.approx(
        sum(-A[i] * (1 if i in shown else 1.5) for i in range(16)) / 16, rel=1e-5
    )
    assert seen.rows[0]["sampler_gap"] == pytest.approx(math.log(1.5), abs=1e-5)
    assert seen.rows[0]["mismatch_truncated"] == 0


def test_ovd_on_a_model_that_judges(tmp_path):
    """The whole method, nothing replaced by a stand-in: its judge knows right from wrong, and its teacher does better."""
    flags = "--subset code-judge --method ovd --prompts_per_batch 6 --e_minibatch_prompts 6 --minibatch_prompts 6 --eval_every 0"
    vpd.main([*flags.split(), "--steps", "1", "--log_samples", "48", "--out", str(tmp_path / "run")])
    (row,) = read_log(tmp_path / "run")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert row["judge_auc"] > 0.7 and 0.1 < row["accepted"] < 0.9
    assert len(samples) == sum(row["scores"]) + row["left_out"].get("judge: no digit, kept", 0) == 48
    for sample in samples:
        rejected = sample["score"] is not None and sample["score"] < 5
        assert (sample["demonstration"] is not None) == (rejected and sample["context"] is not None)
    kept = sum(s["score"] is not None and s["score"] < 5 and s["context"] is None for s in samples)
    assert row["left_out"].get("rejected without a context, kept", 0) == kept
    assert row["seconds"]["judge"] > 0 and row["demonstration_reward"] > 0


# ---- DistIL with a served expert -----------------------------------------------------------------------------


def completion(text):
    choice = {"index": 0, "text": text, "finish_reason": "length" if text else "stop", "logprobs": None}
    return 200, {"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}


def served(server):
    return [
        "--method",
        "distil",
        "--expert",
        "served",
        "--expert_url",
        server.url,
        "--expert_model",
        "big",
        "--eval_every",
        "0",
    ]


def test_distil_s_loss_with_a_served_expert_is_made_of_the_tokens_it_gave(server, tmp_path, monkeypatch, plain_logits):
    """At m places of a row an expert's token a: cost_t = -log pi(a | x, y_<t) |y| / m there, 0 elsewhere; row loss =
    mean(cost_t - A_t / |y|), A_t = -(c_t - b_t), c_t the costs after t, whose gradient is cost's and -A_t grad log pi(y_t).
    The teacher's prompts go to the server alone, and no copy of the weights is made."""
    word = lambda text: ("7", "zig", "")[len(text) % 3]  # noqa: E731
    server.answer = lambda body, _: completion(word(body["prompt"]))
    seen, calls, ask = recorded(monkeypatch), [], Reviews.expert_tokens
    monkeypatch.setattr(
        Reviews, "expert_tokens", lambda self, *args: calls.append((args, ask(self, *args))) or calls[-1][1]
    )
    monkeypatch.setattr(vpd.Policy, "frozen_copy", lambda self: pytest.fail("a copy of the weights"))
    # Responses that differ within a group: where they do not, the advantages of a token cancel.
    flags = ("--expert_places", "3", "--temperature", "2", "--seed", "4")
    (row,) = run(tmp_path / "run", *served(server), *flags, steps=1)
    (((prompts, y, told, _), (taken, share)),) = calls
    tokenizer = vpd.Policy.load(str(ROOT / "tasks" / "toy_models" / "choice")).tokenizer
    spelled = {"7": tokenizer("7").input_ids[0], "zig": tokenizer("zig").input_ids[0], "": tokenizer.eos_token_id}
    assert {path for path, _, _ in server.seen} == {"/v1/completions"}
    # One more, before the run began.
    assert len(server.seen) == 1 + sum(min(3, len(y[i])) for i in told) and len(told) >= 4
    for i in range(16):
        places = share[i].nonzero().flatten().tolist()
        assert len(places) == (min(3, len(y[i])) if i in told else 0)
        for t in places:
            assert share[i, t] == pytest.approx(len(y[i]) / len(places))
            assert taken[i, t] == spelled[word(tokenizer.decode(prompts[i] + y[i][:t]))]
    assert not seen.viewed & {tuple(prompts[i]) for i in told}

    ((model, grads),), x, loss, costs = seen.updates, seen.drawn[0].prompts, 0.0, {}
    log_p = {i: plain_logits(model, x[i // 4], y[i]).log_softmax(-1) for i in told}
    for i in told:
        costs[i] = -log_p[i].gather(1, taken[i, : len(y[i])][:, None])[:, 0] * share[i, : len(y[i])]
    later = {i: [costs[i][t + 1 :].sum().item() for t in range(len(y[i]))] + [0.0] * 30 for i in told}
    for i in told:
        others = [j for j in told if j // 4 == i // 4 and j != i]
        logp = log_p[i].gather(1, torch.tensor(y[i])[:, None])[:, 0]
        for t in range(len(y[i])):
            A = sum(later[j][t] for j in others) / max(1, len(others)) - later[i][t]
            charge = A / len(y[i]) * (logp[t] - logp[t].detach()).exp()
            loss = loss + (costs[i][t] - charge) / len(y[i]) / 16
    assert row["m_loss"] == pytest.approx(loss.item(), rel=1e-6)
    for mine, theirs in zip(grads, grad_of(loss, model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)
    assert row["divergence"] == pytest.approx(np.mean([costs[i].mean().item() for i in told]), rel=1e-6)
    assert row["margin"] is None and json.loads((tmp_path / "run" / "config.json").read_text())["teacher"] == ""


def test_where_the_expert_s_server_goes_down_no_row_takes_part_and_after_three_batches_the_run_ends(
    server, tmp_path, capfd
):
    there = completion("7")
    server.answer = lambda body, _: there if body["prompt"] == "1 +" else (400, {"error": {"message": "no"}})
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", *served(server), "--expert_places", "2", steps=9)
    assert stop.value.code == 1
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert row["left_out"]["expert: the server failed"] == 2 * round(16 * row["with_context"]) > 0
        assert row["left_out"]["m_step: no expert's token"] == 16
        assert row["m_loss"] is None and row["divergence"] is None and row["left_out"]["m_step: whole update"] == 1
    before, after = weights(ROOT / "tasks" / "toy_models" / "choice"), weights(tmp_path / "run" / "model")
    assert all(torch.equal(before[k].double(), after[k].double()) for k in before)
    error = capfd.readouterr().err
    assert "expert: BadRequestError" in error and f"the expert at {server.url} has not answered for 3 batches" in error


def test_a_row_that_the_expert_said_nothing_of_stands_in_no_mean_and_no_baseline(server, tmp_path, monkeypatch):
    """The server answers prompts of even length alone, and is asked once a row."""
    server.answer = lambda body, _: (
        (400, {}) if len(body["prompt"]) % 2 and body["prompt"] != "1 +" else completion("7")
    )
    calls, advantages = [], losses.future_advantages
    monkeypatch.setattr(losses, "future_advantages", lambda *args: calls.append(args) or advantages(*args))
    (row,) = run(tmp_path / "run", *served(server), "--expert_places", "1", steps=1)
    ((cost, mask, _, heard),) = calls
    told = round(row["with_context"] * 16)
    assert 0 < heard.sum() < told and row["left_out"]["m_step: no expert's token"] == 16 - heard.sum()
    expected = [cost[i][mask[i] == 1].mean().item() for i in range(16) if heard[i]]
    assert row["divergence"] == pytest.approx(np.mean(expected), rel=1e-6)


# ---- The real tasks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, source, family", [("lcb", "solution_first", "qwen3"), ("sciknoweval", "critique", "olmo3")]
)
def test_a_smoke_run_of_a_real_task_walks_every_step(task, source, family, tmp_path):
    out = tmp_path / "run"
    vpd.main(["--task", task, "--smoke", family, "--feedback", source, "--out", str(out)])
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    watched = [row for row in rows if row["kind"] == "eval"]
    assert len(trained) == 2 and all(math.isfinite(row["m_loss"]) for row in trained)
    assert any(row["e_loss"] is not None for row in trained)  # random weights are right now and then
    assert sum(trained[0]["verdicts"].values()) == 32
    # Without validation problems the test problems are watched, and no weights are kept for doing well on them.
    assert [row["split"] for row in watched] == ["test", "test"] and not (out / "best").exists()
    if task == "lcb":
        assert set(watched[0]["columns"]) == {"held_out"}
    else:
        assert set(watched[0]["parts"]) == {"biology", "chemistry", "material", "physics"}


CHOICE = ("--subset", "choice", "--feedback", "critique", "--eval_every", "0", "--steps", "1", "--temperature", "1.5")


def test_a_served_critic_writes_what_the_teacher_reads_and_the_key_stays_out_of_the_run(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    server.answer = lambda body, _: server.reply_with("look at the second digit")
    out = tmp_path / "run"
    vpd.main([*CHOICE, "--critic_url", server.url, "--critic_model", "judge", "--out", str(out)])
    contexts = [json.loads(line)["context"] for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {c["critique"] for c in contexts if c} == {"look at the second digit"}
    assert {key for _, key, _ in server.seen} == {"Bearer sk-very-secret"}
    request = server.seen[1][2]["messages"][0]["content"]  # after the one before the run
    assert "attempt" in request and "answer" in request
    for file in (p for p in out.rglob("*") if p.is_file()):
        assert b"sk-very-secret" not in file.read_bytes(), file


def test_rows_whose_critique_failed_are_counted_and_left_without_context(server, tmp_path, capfd):
    here = server.reply_with("yes")
    server.answer = lambda body, _: here if body["messages"][0]["content"] == "1 +" else (400, {"error": "no"})
    out = tmp_path / "run"
    vpd.main([*CHOICE, "--critic_url", server.url, "--critic_model", "judge", "--out", str(out)])
    (row,) = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    failures = round((1 - row["reward"]) * 96)
    assert row["left_out"]["critic: the server failed"] == failures > 0
    assert row["with_context"] == 0 and row["m_loss"] is None
    assert "critic: BadRequestError" in capfd.readouterr().err


@pytest.mark.parametrize("method", ["vpd", "grpo"])
def test_rows_that_the_grader_failed_on_take_no_part(method, tmp_path, monkeypatch):
    """Group 0's first row is an internal failure beside a success and a failure; it has neither context nor advantage,
    and the log says so."""
    task = tasks.load("toy", "trace")

    def verify(problems, responses):
        outcomes = honest(problems, responses)
        return [Outcome(0, "internal"), Outcome(1, "right"), Outcome(0, "wrong", "line 1 is wrong"), *outcomes[3:]]

    honest, task.verify = task.verify, verify
    monkeypatch.setattr(tasks, "load", lambda *_: task)
    out = tmp_path / "run"
    vpd.main(["--method", method, "--steps", "1", "--eval_every", "0", "--log_samples", "96", "--out", str(out)])
    (row,) = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert row["left_out"]["grader failed"] == row["verdicts"]["internal"] == 1
    assert samples[0]["verdict"] == "internal" and samples[0]["context"] is None
    rewards = [[s["reward"] for s in samples[first : first + 8]] for first in range(0, 96, 8)]
    if method == "grpo":  # every row of a mixed group has an advantage, but for this one
        assert row["left_out"]["m_step: no signal"] == 96 - (8 * sum(0 < sum(group) < 8 for group in rewards) - 1)
    else:
        assert row["with_context"] == sum(s["context"] is not None for s in samples) / 96
