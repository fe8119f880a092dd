"""Pieces of a batch by hand, and whole small runs. The loop's updates are in test_algorithm.py."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import losses
import vpd
from conftest import log_of
from harness import session
from test_session import CHOICE, run, weights


def test_batches_visit_every_problem_once_an_epoch_and_drop_the_incomplete_last():
    drawn, again, other = (list(session.batches(list(range(7)), 3, 4, seed)) for seed in (0, 0, 1))
    assert [len(batch) for batch in drawn] == [3] * 4 and drawn == again != other
    assert all(len(set(sum(epoch, []))) == 6 for epoch in (drawn[:2], drawn[2:])) and drawn[:2] != drawn[2:]


def test_e_step_takes_groups_in_which_both_outcomes_have_a_context():
    r = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 0, 0])
    has_C = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    # Group 1 is mixed, and row 2 has no context. Group 2 has successes only, group 3 failures only. Group 4 has both outcomes, but
    # its success has no context.
    batch, skipped = SimpleNamespace(r=r, has_C=has_C, y=[[0]] * 12), []
    found = {}
    for groups, size in (("mixed", 1), ("all", 1), ("all", 2), ("all", 4)):
        cfg = SimpleNamespace(e_groups=groups, e_minibatch_prompts=size, group_size=3)
        found[groups, size] = vpd.e_step_minibatches(cfg, batch, lambda reason, n: skipped.append(n))
    assert found["mixed", 1] == found["all", 1] == [[0, 1]]
    assert found["all", 2] == [[0, 1, 3, 4, 5]]  # the other two groups have failures only
    assert found["all", 4] == [[0, 1, 3, 4, 5, 6, 7, 8, 10, 11]]
    assert skipped == [10, 0, 2, 3 + 3 + 2, 2, 5, 2, 0]


def test_the_advantage_of_a_row_without_a_grade_is_exactly_0():
    r, graded = torch.tensor([1.0] + [0.0] * 5 + [1.0] * 10), torch.tensor([True] * 6 + [False] * 10)  # the second group has none
    A = vpd.advantages(SimpleNamespace(group_size=8, divide_by_std=False), SimpleNamespace(r=r, graded=graded))
    torch.testing.assert_close(A, torch.tensor([5 / 6] + [-1 / 6] * 5 + [0.0] * 10))
    assert not A[6:].any()


@pytest.mark.parametrize("method", vpd.METHODS)
def test_every_method_trains_and_writes_a_complete_run_directory(method, tmp_path, small_validation):
    out, distils = tmp_path / "run", method in ("vpd", "sdpo", "joint")
    trained = run(out, "--method", method, "--eval_every", "2", "--lr", "0.001")
    rows = [(row["kind"], row["step"]) for row in log_of(out, None)]
    assert rows == [("eval", 0), ("train", 0), ("train", 1), ("eval", 2)]
    config = json.loads((out / "config.json").read_text())
    assert config["method"] == method and config["seed"] == 0 and {"commit", "command"} <= config.keys()
    assert config["teacher"] == {"vpd": "live", "grpo": ""}.get(method, "ema")
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 8 and {"prompt", "response", "reward", "context"} <= samples[0].keys()
    for row in trained:
        assert math.isfinite(row["m_loss"]) and row["m_grad_norm"] > 0
        assert set(row["seconds"]) >= {"rollout", "verify", "freeze", "m_step", "sync"}
        assert row["sampler_gap"] < 1e-5 and row["mismatch_truncated"] is None  # transformers samples: no other engine
        assert (method != "grpo" or row["margin"] is None) and (method == "vpd" or row["e_loss"] is row["e_rows"] is None)
        assert row["divergence"] > 1e-6 if distils else row["divergence"] is None  # the teacher does see something else
    before, after = weights(CHOICE), weights(out / "model")
    assert any((before[k].double() - after[k].double()).abs().max() > 1e-6 for k in before)
    assert (out / "best" / "config.json").exists()


def test_a_delta_that_is_not_finite_skips_its_update_and_is_dropped(tmp_path, monkeypatch):
    values = iter((math.inf, 2.0))
    monkeypatch.setattr(losses, "reward_shift", lambda *args: torch.tensor(next(values)))
    rows = run(tmp_path / "run", "--e_step_every", "1", "--e_groups", "all")
    assert [(row["shift"], row["updates_not_finite"]) for row in rows] == [(None, 1), (2.0, 0)]


def test_a_run_repeats_itself_and_another_seed_draws_other_rollouts(tmp_path, monkeypatch):
    order, timed = session.batches, ("seconds", "tokens_per_second")
    monkeypatch.setattr(session, "batches", lambda problems, size, steps, seed: order(problems, size, steps, 0))
    logs = [run(tmp_path / out, "--seed", seed) for out, seed in (("a", "0"), ("b", "0"), ("c", "1"))]
    first, again, _ = [[{k: v for k, v in row.items() if k not in timed} for row in rows] for rows in logs]
    texts = [[json.loads(row)["response"] for row in (tmp_path / out / "samples.jsonl").open()] for out in "abc"]
    assert first == again and texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "task, source, family",
    [("lcb", "solution_first", "qwen3"), ("sciknoweval", "critique", "olmo3"), ("reasoning_gym", "solution_first", "qwen3")],
)
def test_a_smoke_run_of_a_real_task_takes_every_step(task, source, family, tmp_path):
    if task == "reasoning_gym":
        pytest.importorskip(task)
    out = tmp_path / "run"
    vpd.main(["--task", task, "--smoke", family, "--feedback", source, "--out", str(out)])
    trained, watched = log_of(out), log_of(out, "eval")
    assert len(trained) == 2 and all(math.isfinite(row["m_loss"]) for row in trained)
    assert any(row["e_loss"] is not None for row in trained)  # random weights are right now and then
    assert sum(trained[0]["verdicts"].values()) == 32
    # Without validation problems the test problems are watched, and no best weights are kept.
    split = "validation" if task == "reasoning_gym" else "test"
    assert [row["split"] for row in watched] == [split] * 2 and (out / "best").exists() == (split == "validation")
    assert set(watched[0]["columns"]) == ({"held_out"} if task == "lcb" else set())
    parts = {"biology", "chemistry", "material", "physics"} if task == "sciknoweval" else set()
    assert set(watched[0]["parts"]) == parts
