"""The contract of tasks.py: what a task, a problem and an outcome are, and how a task is found by name.

Everything here holds for any task; the toy's own rules are in test_toy.py.
"""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tasks.py is one folder up; pytest may start anywhere
import tasks  # noqa: E402
import toy  # noqa: E402
from tasks import Outcome, Problem, Task  # noqa: E402

torch.set_num_threads(1)


# ---- Types -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, field", [(Problem("p", []), "reference"), (Outcome(1, "passed"), "reward")])
def test_a_problem_and_an_outcome_cannot_be_changed(value, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, 0)


def test_what_may_be_left_out():
    problem, outcome = Problem("p", [{"role": "user", "content": "2+3?"}]), Outcome(1, "passed")
    assert (problem.reference, problem.data, outcome.feedback) == ("", None, "")


def test_a_task_of_ones_own_needs_three_splits_and_a_verifier():
    problems = [Problem(str(i), [{"role": "user", "content": f"{i}+1?"}], reference=str(i + 1)) for i in range(6)]

    def verify(problems, responses):
        return [
            Outcome(1, "passed") if r == p.reference else Outcome(0, "wrong", f"not {r}")
            for p, r in zip(problems, responses)
        ]

    task = Task("sums", problems[:3], problems[3:4], problems[4:], verify)
    assert task.splits() == "sums: 3 train, 1 validation, 2 test problems"
    assert task.verify(task.test, ["5", "5"]) == [Outcome(1, "passed"), Outcome(0, "wrong", "not 5")]
    task.close()  # nothing to release, and still there to call


# ---- Loading by name -------------------------------------------------------------------------------------


def test_a_task_is_found_by_name_and_its_first_subset_is_the_default():
    assert tasks.load("toy").name == tasks.load("toy", "trace").name == "toy/trace"
    assert tasks.load("toy", "choice").name == "toy/choice"


def test_every_subset_in_the_list_has_a_loader(monkeypatch):
    assert set(tasks.TASKS["toy"]) == set(toy.SUBSETS)
    monkeypatch.setattr(toy, "load", lambda subset: f"loaded {subset}")  # the code task takes seconds to build
    assert [tasks.load("toy", subset) for subset in tasks.TASKS["toy"]] == [f"loaded {s}" for s in tasks.TASKS["toy"]]


@pytest.mark.parametrize(
    "names, choices", [(("poker",), tasks.TASKS), (("",), tasks.TASKS), (("toy", "chess"), ("trace", "code", "choice"))]
)
def test_an_unknown_name_is_refused_in_one_line_that_lists_the_choices(names, choices):
    with pytest.raises(ValueError) as refusal:
        tasks.load(*names)
    message = str(refusal.value)
    assert repr(names[-1]) in message and "\n" not in message
    assert message.endswith("choose one of " + ", ".join(choices))


# ---- What a loaded task keeps to -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["trace", "choice"])
def task(request):
    task = tasks.load("toy", request.param)
    yield task
    task.close()


def test_prompts_are_chat_messages_that_end_with_the_user(task):
    for problem in task.train + task.validation + task.test:
        assert problem.messages[-1]["role"] == "user"
        assert all(set(message) == {"role", "content"} and message["content"] for message in problem.messages)


def test_ids_are_unique_over_all_splits(task):
    ids = [problem.id for problem in task.train + task.validation + task.test]
    assert len(set(ids)) == len(ids)


def test_verify_grades_in_order_with_a_text_on_failures_only(task):
    right = [p.reference if task.name == "toy/trace" else f"<answer>{p.reference}</answer>" for p in task.test[:8]]
    responses = [answer if i % 2 else "no idea" for i, answer in enumerate(right)]
    outcomes = task.verify(task.test[:8], responses)
    assert [outcome.reward for outcome in outcomes] == [0, 1] * 4
    assert all(bool(o.feedback) == (o.reward == 0) and o.verdict for o in outcomes)


def test_nothing_to_verify_gives_nothing(task):
    assert task.verify([], []) == []
