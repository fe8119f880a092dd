"""SciKnowEval: which rows, how they are asked and split, and which answer counts. With VPD_SAMPLE_DATA naming a folder of
published data, the split is compared with SDPO's own."""

import os
import random
import re
from pathlib import Path

import datasets
import pytest
from test_tasks import refused, write

import tasks
from tasks import Outcome, Problem, sciknoweval
from tasks.sciknoweval import DOMAINS

SAMPLES = Path(os.environ.get("VPD_SAMPLE_DATA") or "nowhere") / "sciknoweval"
SIZES = {"biology": (450, 50), "chemistry": (1890, 210), "material": (841, 94), "physics": (720, 80)}


def choice_row(domain="Physics", number=0, answer="B", level="L3", kind="mcq-4-choices", count=4) -> dict:
    choices = {"text": [f"option {i}" for i in range(count)], "label": list("ABCDEF"[:count])}
    return {"question": f"Question {number}?", "choices": choices, "answerKey": answer, "type": kind, "domain": domain,
            "details": {"level": level, "task": "t"}, "prompt": {"default": "Given a question ..."}}  # fmt: skip


def questions(problems) -> dict[str, str]:
    return {p.id: p.messages[-1]["content"].split("\n")[0] for p in problems}


def test_it_takes_level_3_questions_with_4_or_2_choices_of_the_domain(tmp_path):
    kept = [choice_row(number=i, answer=" C ") for i in range(9)] + [choice_row(number=9, kind="mcq-2-choices", count=2)]
    others = [
        choice_row(number=90, level="L2"), choice_row(number=91, level="L4"), choice_row(number=92, kind="true_or_false"),
        choice_row(number=93, kind="mcq-5-choices", count=5), choice_row(number=94, domain="Biology"),
        choice_row(number=95, kind="open-ended-qa", count=0),
    ]  # fmt: skip
    data = write(tmp_path / "hub.jsonl", [*others[:3], *kept, *others[3:]])
    task = tasks.load("sciknoweval", "physics", data)
    assert task.name == "sciknoweval/physics" and task.validation == [] and "environment" in task.lacks
    assert task.notes[0] == "sciknoweval: 11 of 16 rows are L3 questions with 4 or 2 choices"
    # Numbered in the order of the source.
    assert questions(task.train + task.test) == {f"physics-{i}": f"Question {i}?" for i in range(10)}
    problems = {p.id: p for p in task.train + task.test}
    system, user = problems["physics-9"].messages
    assert user == {"role": "user", "content": "Question 9?\n\nA: option 0\nB: option 1\nPlease reason step by step."}
    assert system["role"] == "system" and "<answer>" in system["content"] and "<reasoning>" in system["content"]
    assert problems["physics-1"].reference == "C" and "\nD: option 3\nPlease" in problems["physics-1"].messages[1]["content"]
    read = tasks.read("sciknoweval", data)  # a file's rows are all test problems
    assert len(read.test) == 11 and read.train == []
    finished = write(tmp_path / "finished.jsonl", [{"idx": 1, "prompt": "Which?", "answer": "A"}])
    assert tasks.read("sciknoweval", finished).notes[0].startswith("sciknoweval: all 1 rows of ")


def test_split_is_that_of_datasets_with_seed_42_and_the_same_on_every_load(tmp_path):
    rows = [choice_row(domain.capitalize(), i) for domain in SIZES for i in range(sum(SIZES[domain]))]
    random.Random(0).shuffle(rows)  # domains mixed: the order within a domain counts
    data = write(tmp_path / "hub.jsonl", rows)
    task, again = (tasks.load("sciknoweval", subset, data) for subset in ("all", "material"))
    for split, problems in enumerate((task.train, task.test)):
        assert [sum(p.part == domain for p in problems) for domain in DOMAINS] == [SIZES[d][split] for d in DOMAINS]
    kept = [row["question"] for row in rows if row["domain"] == "Material"]
    split = datasets.Dataset.from_dict({"question": kept}).train_test_split(test_size=0.1, seed=42)
    for name in ("train", "test"):
        material = [p for p in getattr(task, name) if p.part == "material"]
        assert list(questions(material).values()) == split[name]["question"][:]
        assert getattr(again, name) == material
    assert not {p.id for p in task.train} & {p.id for p in task.test}


def test_what_is_missing_is_named(tmp_path):
    rows = [choice_row(number=i) for i in range(9)]
    cases = [("physics", rows, "9 L3 choice questions of physics"), ("geology", rows, "geology")]
    for column in ("question", "choices", "answerKey", "type", "domain", "details"):
        cases.append(("physics", [*rows[:3], {**rows[3], column: None}], f"row 4: column {column} is missing"))
    for subset, found, words in cases:
        with refused(words):
            tasks.load("sciknoweval", subset, write(tmp_path / "hub.jsonl", found))
    short = {**rows[0], "choices": {"label": ["A", "B"], "text": ["one"]}}
    for row, words in (({"idx": 1, "prompt": "P", "answer": 3}, "schema"), ({**rows[0], "answerKey": " "}, "answer"), (short, "zip")):
        with refused("row 1", words):
            tasks.read("sciknoweval", write(tmp_path / "x.jsonl", [row]))


def test_finished_splits_are_taken_as_they_are_and_the_commonest_letter_is_scored(tmp_path):
    rows = [{"idx": 7, "system": "S", "prompt": "P\n", "answer": "A\n"}, {"idx": 3, "prompt": "R", "answer": "B"}]
    (tmp_path / "biology").mkdir()
    train, _ = (write(tmp_path / "biology" / f"{split}.json", rows[:k]) for split, k in (("train", 2), ("test", 1)))
    task = tasks.load("sciknoweval", "biology", str(tmp_path))
    for made, part in ((task.train, "biology"), (tasks.read("sciknoweval", train).test, "")):
        assert made == [
            Problem("7", [{"role": "system", "content": "S"}, {"role": "user", "content": "P\n"}], "A", part=part),
            Problem("3", [{"role": "user", "content": "R"}], "B", part=part),
        ]
    assert task.test == task.train[:1]
    with refused("chemistry_train.jsonl"):
        tasks.load("sciknoweval", "all", str(tmp_path))
    for domain, letters in (("chemistry", "CABCC"), ("material", "DDD"), ("physics", "BD")):
        for split in ("train", "test"):
            write(tmp_path / f"{domain}_{split}.jsonl", [{"idx": i, "prompt": "?", "answer": x} for i, x in enumerate(letters)])
    assert tasks.load("sciknoweval", "all", str(tmp_path)).notes[-1] == (
        "a constant answer scores on the test problems: "
        "biology 1.000 (A), chemistry 0.600 (C), material 1.000 (D), physics 0.500 (B)"  # chemistry: 3 of 5
    )


ANSWERS = {
    "correct": [
        "<answer>B</answer>", "<answer>\nB\n</answer>", "<answer> \tB </answer>", "<answer>A</answer> no: <answer>B</answer>",
        "<reasoning>A</reasoning><answer>B</answer> so A", "<answer>A <answer>B</answer>",
        "<answer>B</answer> between <answer> tags, as asked", "<answer>B</answer> </answer> <answer><answer>",
    ],
    "wrong": [
        "<answer>B</answer><answer>A</answer>", "<answer>B</answer><answer></answer>", "<answer>B.</answer>",
        "<answer>b</answer>", "<answer>(B)</answer>", "<answer>B: option 1</answer>", "<answer>AB</answer>",
        "<answer>A</answer> <answer>B",
    ],
    "no answer": ["B", "<answer>B", "", "<Answer>B</Answer>", "</answer>B<answer>", "<answer>" * 20_000],
}  # fmt: skip


def test_answer_is_exactly_the_letter_in_the_last_answer_tag_that_closes():
    for verdict, responses in ANSWERS.items():
        for response in responses:
            (outcome,) = sciknoweval.grade_choices([Problem("p", [], "B")], [response])
            assert outcome == Outcome(int(verdict == "correct"), verdict), response


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="VPD_SAMPLE_DATA names no folder")
@pytest.mark.parametrize("domain", DOMAINS)
def test_split_equals_the_published_one(domain, tmp_path):
    """The hub's rows, put together again from the published splits."""
    published = {split: list(tasks.rows(SAMPLES / f"{domain}_{split}.jsonl")) for split in ("train", "test")}
    assert tuple(map(len, published.values())) == SIZES[domain]
    hub = []
    for row in sorted(published["train"] + published["test"], key=lambda row: row["idx"]):
        question, options = row["prompt"].removesuffix("\nPlease reason step by step.").rsplit("\n\nA: ", 1)
        labels, texts = zip(*(part.split(": ", 1) for part in re.split(r"\n(?=[B-H]: )", f"A: {options}")))
        asked = choice_row(domain.capitalize(), answer=row["answer"], kind=f"mcq-{2 if len(labels) == 2 else 4}-choices")
        hub.append(asked | {"question": question, "choices": {"text": list(texts), "label": list(labels)}})
    task = tasks.load("sciknoweval", domain, write(tmp_path / "hub.jsonl", hub))
    for split in ("train", "test"):
        ours = [(p.id, p.messages[-1]["content"], p.reference) for p in getattr(task, split)]
        assert ours == [(f"{domain}-{row['idx']}", row["prompt"], row["answer"]) for row in published[split]]
    assert tasks.load("sciknoweval", domain, str(SAMPLES)).notes[-1] == task.notes[-1]
    assert domain != "physics" or task.notes[-1].endswith(": physics 0.412 (B)")  # 33 of 80
