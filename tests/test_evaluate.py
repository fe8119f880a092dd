"""avg@k, pass@k and their intervals against arithmetic and enumeration; the command line's one-line errors."""

import itertools
import json

import numpy as np
import pytest
import torch

import evaluate
from policy import Policy
from rollout import HFSampler
from tasks import Outcome, Problem

torch.set_num_threads(1)


def test_pass_at_k_equals_the_average_over_all_subsets_of_size_k():
    rewards = [1, 0, 0, 1, 0]
    for k in range(1, 6):
        subsets = list(itertools.combinations(rewards, k))
        assert evaluate.pass_at_k(5, 2, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_pass_at_k_at_the_ends():
    assert evaluate.pass_at_k(4, 0, 4) == 0.0
    assert evaluate.pass_at_k(4, 4, 1) == 1.0
    assert evaluate.pass_at_k(4, 1, 1) == pytest.approx(1 / 4)
    assert evaluate.pass_at_k(4, 1, 4) == 1.0


def test_summary_of_two_problems_by_hand():
    result = evaluate.summarise(np.array([[1, 0, 0, 0], [1, 1, 1, 0]]))
    assert result["avg"] == pytest.approx((1 + 3) / 8)
    assert (result["problems"], result["n"]) == (2, 4)
    # Two of four samples: 1 - C(3,2)/C(4,2) = 1/2 with one right, 1 - C(1,2)/C(4,2) = 1 with three right.
    assert result["pass@2"]["value"] == pytest.approx((1 / 2 + 1) / 2)
    assert result["pass@4"]["value"] == 1.0
    assert "pass@3" not in result and "pass@8" not in result


def test_the_interval_holds_the_mean_and_narrows_with_more_problems():
    rng = np.random.default_rng(0)
    few, many = (rng.random((n, 4)) < 0.3 for n in (20, 2000))
    widths = []
    for rewards in (few, many):
        low, high = evaluate.interval(rewards.mean(1))
        assert low < rewards.mean() < high
        widths.append(high - low)
    # Standard error of the mean over 2000 problems of 4 samples: sqrt(.3 * .7 / 8000) = .0051; 95% is 3.92 of them wide.
    assert widths[1] == pytest.approx(3.92 * (0.3 * 0.7 / 8000) ** 0.5, rel=0.15)
    assert widths[0] > 5 * widths[1]


def test_the_interval_resamples_problems_and_not_samples():
    """Four equal samples of a problem are one piece of evidence: repeating them must not narrow the interval."""
    once = np.array([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    assert evaluate.interval(once) == evaluate.interval(np.repeat(once[:, None], 4, axis=1).mean(1))


def test_a_constant_result_has_an_interval_of_width_zero():
    assert evaluate.interval(np.ones(5)) == (1.0, 1.0)
    assert evaluate.interval(np.array([0.25])) == (0.25, 0.25)


def test_measure_pairs_responses_with_their_problems():
    policy = Policy.load("toy_models/choice")
    problems = [Problem(f"p{i}", [{"role": "user", "content": f"start {i}"}], data=i) for i in range(3)]
    seen = []

    def verify(asked, responses):
        seen.extend(p.data for p in asked)
        return [Outcome(int(p.data == 1), "") for p in asked]

    result = evaluate.measure(policy, HFSampler(policy), verify, problems, 2, 0, 4, 1.0, 1.0)
    assert seen == [0, 0, 1, 1, 2, 2]
    assert result["rewards"] == {"p0": [0, 0], "p1": [1, 1], "p2": [0, 0]}
    assert result["avg"] == pytest.approx(1 / 3)
    assert result["truncated"] == 1.0  # nobody finishes within four tokens


def test_command_line_writes_the_same_figures_twice(tmp_path, capsys):
    results = []
    for name in ("a.json", "b.json"):
        evaluate.main(["--model", "toy_models/choice", "--subset", "choice", "--n", "1", "--out", str(tmp_path / name)])
        results.append(json.loads((tmp_path / name).read_text()))
    assert results[0] == results[1]
    assert results[0]["problems"] == len(results[0]["rewards"]) == 64
    assert f"{results[0]['avg']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--model", "toy_models/choice", "--n", "0"], "--n"),
        (["--model", "toy_models/choice", "--top_p", "0"], "--top_p"),
        (["--model", "toy_models/choice", "--subset", "chess"], "chess"),
        (["--model", "toy_models/choice", "--out", "no/such/dir/x.json"], "no/such/dir"),
        (["--run", "no/such/run"], "no/such/run"),
        (["--modle", "x"], "--model"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in error and error.count("\n") == 1
