"""reasoning-gym's generators as a task: splits, scores, feedback, and what is refused."""

import json
import re
import sys

import pytest
from test_tasks import refused

import tasks
from tasks import reasoning_gym


def load(tmp_path, subset, **settings):
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    return tasks.load("reasoning_gym", subset, str(tmp_path / "settings.json"))


def test_without_the_library_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with refused("pip install reasoning-gym=="):
        tasks.load("reasoning_gym")


def test_splits_share_no_question_and_are_the_same_in_every_process(tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    made = []
    for seed in "12":  # the pairs of isomorphic_strings depend on the order of a set
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        task = load(tmp_path, "isomorphic_strings", size=12, max_string_length=4)
        made.append([[p.messages[-1]["content"] for p in split] for split in (task.train, task.validation, task.test)])
        task.close()
    assert made[0] == made[1] and task.name == "reasoning_gym/isomorphic_strings"
    coins = load(tmp_path, "coin_flip", size=300, min_trials=3, max_trials=4)  # has few questions
    splits = [{p.messages[-1]["content"] for p in split} for split in (coins.train, coins.validation, coins.test)]
    coins.close()
    count = sum(map(len, splits))
    assert len(set.union(*splits)) == count < 500 and f"{500 - count} problems that repeat another one" in coins.notes[0]
    assert count == len(coins.train + coins.validation + coins.test)  # nor within a split


def test_the_library_scores_the_last_answer_and_the_text_never_tells_the_right_one(tmp_path):
    pytest.importorskip("reasoning_gym")
    task = load(tmp_path, "spell_backward", size=1, min_word_len=6)
    right = task.train[0].reference
    near = right[:-1] + ("x" if right[-1] != "x" else "y")
    said = {f"<answer>{near}</answer> no: <answer>\n{right.upper()}</answer>": (1, "correct"), right: (0, "no answer"),
            f"<answer>{right}</answer><answer>{near}</answer>": (0, "wrong"), "<answer></answer>": (0, "no answer")}  # fmt: skip
    outcomes = task.verify(task.train * 4, [*said])
    assert [(o.reward, o.verdict) for o in outcomes] == [*said.values()]
    assert re.search(rf"{near}\nIts score is 0\.[0-8]\d, where 1", outcomes[2].feedback) and not outcomes[0].feedback
    assert all(right not in o.feedback for o in outcomes) and "<answer>" in task.train[0].messages[0]["content"]
    task.close()


def test_an_answer_that_is_a_program_or_stops_the_scorer_is_a_failure(tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(reasoning_gym, "SCORE_SECONDS", 1.0)
    task = load(tmp_path, "puzzle24", size=1)  # the library evaluates its answers as Python
    mark = tmp_path / "mark"
    answers = ["(lambda: [1 for _ in iter(int, 1)])()", f"open({str(mark)!r}, 'w')", "1/0",
               "setattr(__import__('__main__'), '_dumps', lambda value: '1.0')"]  # fmt: skip
    outcomes = task.verify(task.train * 4, [f"<answer>{answer}</answer>" for answer in answers])
    assert [o.reward for o in outcomes] == [0, 0, 0, 0] and not mark.exists()
    assert outcomes[3].feedback == "The checker could not read it."  # it was not asked
    task.close()
    slow = "1" + "0" * 9 + "**" + "9" * 9
    task = load(tmp_path, "simple_integration", size=1)
    (late,) = task.verify(task.train, [f"<answer>{slow}*x</answer>"])
    assert late.verdict == "time-out" and "could not read it" in late.feedback
    task.close()


@pytest.mark.parametrize("subset, text, words", [
    ("spel_backward", "{}", ": spell_backward"), ("gcd", "[3]", "is not a JSON object"), ("gcd", "{", "is not a JSON object"),
    ("gcd", '{"size": "many"}', "is not a JSON object"), ("gcd", '{"min_value": 9, "max_value": 3}', "AssertionError"),
    ("gcd", '{"min_size": 3}', "unexpected keyword argument 'min_size'"),
])  # fmt: skip
def test_unknown_generators_and_bad_settings_are_refused_in_one_line(subset, text, words, tmp_path):
    pytest.importorskip("reasoning_gym")
    (tmp_path / "settings.json").write_text(text)
    with refused(words):
        tasks.load("reasoning_gym", subset, str(tmp_path / "settings.json"))
