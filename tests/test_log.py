"""The log's figures by hand, each from numbers typed here."""

import math
from types import SimpleNamespace

import pytest
import torch

from feedback import Context
from harness.log import BatchLog, margin, mean, terminal_line
from model.head import Scores
from model.parallel import World
from rollout import Rollout
from tasks import Outcome

T = lambda rows: torch.tensor(rows, dtype=torch.float64)  # noqa: E731
MASK = torch.tensor([[1, 1], [1, 0], [1, 1]])
LOGP = T([[-1.0, -2.0], [-3.0, 0.0], [-1.0, -1.0]])


def batch(**more):
    """Three rollouts: a success of two tokens, a failure of one, and one that the grader failed on."""
    known = dict(
        mask=MASK, r=T([1, 0, 0]), has_C=torch.tensor([True, True, False]), graded=torch.tensor([True, True, False]),
        sampler_logp=LOGP + T([[-0.5, 0.3], [0.0, 9.0], [0.0, 0.0]]), old_logp=LOGP, contexts_cut=1,
        teacher_logp=LOGP + T([[1.0, 1.0], [-1.0, 9.0], [0.0, 0.0]]),
        C=[Context("sibling", "s"), Context("environment", feedback="f"), None],
        outcomes=[Outcome(1, "passed"), Outcome(0, "wrong"), Outcome(0, "internal")],
        rollouts=[Rollout([5, 6], [], "stop"), Rollout([7], [], "length"), Rollout([8, 9], [], "stop")],
    )  # fmt: skip
    return SimpleNamespace(**(known | more))


def test_a_mean_leaves_out_what_is_not_finite():
    assert mean([1.0, math.nan, 2.0, math.inf]) == 1.5 and mean([math.nan]) is None and mean([]) is None


def test_the_margin_is_the_mean_of_successes_less_that_of_failures():
    found = margin(T([0.5, -0.1, 0.1, -0.6]), T([1, 0, 1, 0]), torch.tensor([4, 1, 1, 5]))
    assert found["margin"] == pytest.approx((0.5 + 0.1) / 2 - (-0.1 - 0.6) / 2)
    assert found["length_correlation"] > 0.99  # |r~| = .5 .1 .1 .6 against 4 1 1 5: nearly proportional
    assert margin(T([0.5, 0.1]), T([1, 1]), torch.tensor([1, 2])) == {"margin": None, "length_correlation": None}
    three = [margin(T([0.5, 0.1, 0.2]), T([1, 0, 0]), torch.tensor([2, 2, last]))["length_correlation"] for last in (2, 3)]
    assert three[0] is None and three[1] == pytest.approx(-0.2773501)


def figures(log):
    return {name: value for name, value in log.figures.items() if value is not None}


def test_figures_of_the_weights_that_sampled_are_over_the_tokens_of_the_rows():
    entropy = T([[0.1, 0.2], [0.3, 9.0], [0.6, 0.3]])
    log = BatchLog(0, World(), beta=0.5, limit=1.5)
    log.frozen(batch(), entropy)
    expected = {
        "entropy": 1.5 / 5, "sampler_gap": 0.8 / 5,  # five tokens; of two of them |gap| is 0.5 and 0.3
        "mismatch_truncated": 1 / 5,  # exp(0.5) = 1.65 is over 1.5, exp(-0.3), exp(0) are not
        "margin": 0.5 * 2 - 0.5 * -1,  # rows 0 and 1 have a context; r~ = beta sum (log q - log pi)
    }  # fmt: skip
    assert figures(log) == pytest.approx(expected)
    # The same from the passes of an update, in which row 1 takes no part: no failure, no margin.
    log = BatchLog(0, World(), beta=0.5, limit=None)
    for rows in ([2], [0]):
        view = SimpleNamespace(filled=3, padded=4, mask=MASK[rows])
        overlap = T([[0.5, math.nan] if rows == [0] else [0.9, 0.9]])  # row 2 has no context
        scores = Scores(LOGP[rows], entropy[rows], T([[0.4, 0.8]]), batch().teacher_logp[rows], overlap)
        log.m_pass(rows, view, T(0.25), scores, batch().has_C, measures=True)
    assert log.m_loss() == 0.5 and log.sums == 0 and log.m_losses == [0.5]
    assert log.D_sum == pytest.approx(0.6 / 2)  # row 2 has no context; the mean is over the two rows that have one
    log.from_passes(batch(), torch.tensor([True, False, True]), has_teacher=True)
    assert figures(log) == pytest.approx({"entropy": 1.2 / 4, "sampler_gap": 0.8 / 4})
    log.seconds["rollout"] = 1.0
    assert log.row(batch(), 0.0, True)["overlap"] == 0.5 and BatchLog(0, World(), 0.5, None).overlaps == []


def test_a_row_of_the_log_by_hand():
    log = BatchLog(7, World(), beta=0.1, limit=None)
    log.seconds = {"rollout": 2.0, "m_step": 0.5}
    log.skip("m_step: no context")
    log.skip("nothing", 0)
    log.passed(SimpleNamespace(filled=6, padded=8))
    for loss, norm in ((0.4, 1.0), (0.2, math.nan)):  # the second was left out
        log.e_update(loss, norm, T([5.0, -5.0, -5.0, 0.0]), T([1, 0, 1, 0]), T([[1.0], [0.0], [1.0], [0.0]]))
    log.m_losses, log.m_norms, log.D_sum, log.with_D = [0.5, math.nan], [2.0, math.nan], 0.25, True
    row = log.row(batch(), lr=0.01, distils=True)
    assert row["entropy"] is row["sampler_gap"] is row["mismatch_truncated"] is None  # no row took part
    assert row["reward"] == 1 / 2 and row["verdicts"] == {"passed": 1, "wrong": 1, "internal": 1}  # the grader's fault is none
    assert (row["response_length"], row["truncated"], row["with_context"]) == (5 / 3, 1 / 3, 2 / 3)
    assert row["success_given_context"] == {"environment": 0.0, "sibling": 1.0}
    # A success with u = 5 pulls by sigma(-5) = .007, a failure with u = -5 as little; a success with -5
    # pulls by .99, and the failure with 0 is spared. One that has died counts as such, even if its slope is 0.
    assert (row["e_loss"], row["e_grad_norm"], row["e_rows"], row["e_died"]) == (pytest.approx(0.3), 1.0, 8, 0.5)
    assert (row["m_loss"], row["m_grad_norm"], row["divergence"], row["updates_not_finite"]) == (0.5, 2.0, 0.25, 2)
    assert row["left_out"] == {"m_step: no context": 1, "e_step: failure spared": 2}
    assert row["padding"] == 1 / 4 and row["contexts_cut"] == 1
    assert row["tokens_per_second"] == 5 / 2.5 and (row["kind"], row["step"], row["lr"]) == ("train", 7, 0.01)
    assert log.updates() == 2 and log.row(batch(), 0.01, distils=False)["divergence"] is None
    log.with_D = False  # nothing was distilled: no number, not 0
    assert log.row(batch(C=[]), 0.01, distils=True)["divergence"] is None and log.row(batch(C=[]), 0, True)["with_context"] == 0


def test_the_terminal_has_a_dozen_short_figures_and_leaves_out_what_is_not_there():
    row = {"step": 12, "reward": 0.5, "margin": None, "m_grad_norm": 1.2e-3, "response_length": 1234.5678, "entropy": 0.0,
           "lr": 1.0, "seconds": {"a": 1.25, "b": 2.0}}  # fmt: skip
    line = "  12  reward 0.500  |g| 1.2e-03  entropy 0.000  length 1234.568{}  3.2 s"
    assert terminal_line(row | {"sampler_gap": 0.05}) == terminal_line(row) == line.format("")
    assert terminal_line(row | {"sampler_gap": 0.06}) == line.format("  gap 0.060")  # larger than bfloat16 explains
