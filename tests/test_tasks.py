"""The contract of tasks.py: what a task, a problem and an outcome are, and how a task is found by name; then the real
tasks, their loaders and verifiers. The toy's own rules are in test_toy.py.

With VPD_SAMPLE_DATA naming a folder of published data, more tests run: lcb_pool.jsonl with lcb_triples.jsonl (programs and
the official checker's verdicts) and sciknoweval/ (SDPO's splits).
"""

import base64
import dataclasses
import json
import os
import pickle
import random
import re
import subprocess
import sys
import textwrap
import time
import zlib
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tasks.py is one folder up; pytest may start anywhere
from harness import hub  # noqa: E402
import tasks  # noqa: E402
from tasks import livecodebench, sciknoweval, toy
from tasks.sandbox import Result, Sandbox  # noqa: E402
from tasks import Outcome, Problem, Task  # noqa: E402

torch.set_num_threads(1)

FIXTURES = Path(__file__).parent / "fixtures"
SAMPLES = Path(os.environ.get("VPD_SAMPLE_DATA") or "nowhere")
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="VPD_SAMPLE_DATA names no folder")


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
    assert set(tasks.TASKS["toy"]) == set(toy.EVERY)
    monkeypatch.setattr(toy, "load", lambda subset: f"loaded {subset}")  # the code task takes seconds to build
    assert [tasks.load("toy", subset) for subset in tasks.TASKS["toy"]] == [f"loaded {s}" for s in tasks.TASKS["toy"]]


@pytest.mark.parametrize(
    "names, choices", [(("poker",), tasks.TASKS), (("",), tasks.TASKS), (("toy", "chess"), tasks.TASKS["toy"])]
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


# ---- The real tasks: what their tests share ----------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def sandboxes():
    """The tasks built in this file share their sandboxes (one per list of settings), which note what they run; a program
    may take 2 s here. Closing a task closes nothing until the file is done."""
    found = {}

    class Noted(Sandbox):
        def run(self, source, stdin):
            ran.append(stdin)
            return super().run(source, stdin)

        def call(self, source, function, args):
            ran.append(args)
            return super().call(source, function, args)

        def close(self):
            closed.append(self)

    def build(**settings):
        if repr(settings) not in found:
            found[repr(settings)] = Noted(**settings)
        return found[repr(settings)]

    ran, closed = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "Sandbox", build)
        patch.setattr(tasks, "TIME_LIMIT", 2.0)
        yield SimpleNamespace(ran=ran, closed=closed, kind=Noted)
    for sandbox in found.values():
        Sandbox.close(sandbox)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def fixture_rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FIXTURES / name).read_text().splitlines()]


def one_line(refusal) -> str:
    """The message of a ValueError, which is one line."""
    message = str(refusal.value)
    assert message and "\n" not in message
    return message


def as_other_formats(rows: list[dict], folder: Path, name: str) -> dict[str, str]:
    """The rows as parquet, as an arrow file, as a folder that `datasets` has saved."""
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(folder / f"{name}.parquet"))
    table.save_to_disk(str(folder / "saved"))
    (arrow,) = (folder / "saved").glob("*.arrow")
    (folder / "cache").mkdir()
    (folder / "cache" / f"{name}.arrow").write_bytes(arrow.read_bytes())
    return {
        "parquet": str(folder / f"{name}.parquet"),
        "arrow": str(folder / "cache" / f"{name}.arrow"),
        "folder with an arrow file": str(folder / "cache"),
        "saved by datasets": str(folder / "saved"),
    }


def test_closing_a_task_closes_its_sandbox(sandboxes):
    tasks.read("lcb", str(FIXTURES / "lcb.jsonl")).close()
    assert len(sandboxes.closed) == 1


# ---- LiveCodeBench: loading ------------------------------------------------------------------------------------


def pack(value) -> str:
    """The private tests as LiveCodeBench stores them."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def as_tests(pairs, kind: str = "stdin") -> str:
    return json.dumps([{"input": given, "output": wanted, "testtype": kind} for given, wanted in pairs])


def lcb_row(name="p", private=(("1\n", "1\n"),), public=(("0\n", "0\n"),), function="", date="2025-03-01"):
    """private: pairs of input and output, or the text of the column."""
    kind = "functional" if function else "stdin"
    return {
        "question_title": "T", "question_content": "Q?", "platform": "atcoder", "question_id": name, "contest_id": "c",
        "contest_date": f"{date}T00:00:00", "starter_code": "", "difficulty": "easy",
        "public_test_cases": as_tests(public, kind),
        "private_test_cases": private if isinstance(private, str) else pack(as_tests(private, kind)),
        "metadata": json.dumps({"func_name": function} if function else {}),
    }  # fmt: skip


@pytest.fixture
def load_lcb(tmp_path):
    """load_lcb(*rows, **options): the task made of these rows."""

    def load(*rows, **options):
        return tasks.load("lcb", data=write(tmp_path / "test6.jsonl", rows), **options)

    return load


def fence(code: str) -> str:
    return f"Here it is.\n```python\n{textwrap.dedent(code)}\n```"


def half(problem: Problem) -> tuple[int, ...]:
    return problem.data[0].train


def private(problem: Problem) -> list[dict]:
    return livecodebench._tests(problem.data[0], "private")


def content(task: Task) -> list:
    """All of a task of LiveCodeBench that matters."""
    return [(p.id, p.messages, p.data[0].function, private(p), half(p), p.data[1]) for p in task.train + task.test]


def test_lcb_trains_and_evaluates_on_the_same_problems_of_the_window_and_counts_them():
    task = tasks.load("lcb", data=str(FIXTURES / "lcb.jsonl"))
    assert [p.id for p in task.train] == [p.id for p in task.test] == ["fx_sum", "fx_half", "fx_rows", "fx_pairs"]
    assert task.validation == [] and task.name == "lcb/v6"
    assert task.notes[0] == "lcb: 4 of 5 problems, 2025-02-01 <= contest_date < 2025-05-01"
    assert task.notes[-1].startswith("sandbox: process per test, rlimits") and len(task.notes) == 2
    assert task.lacks == ("critique",)


@pytest.mark.parametrize(
    "since, until, ids",
    [  # the fixture's days: 2025-02-01, 03-10, 04-30, 02-20, 05-01
        ("2025-02-01", "2025-02-02", ["fx_sum"]),
        ("2025-02-02", "2025-05-02", ["fx_half", "fx_rows", "fx_pairs", "fx_late"]),
        ("2025-04-30", "2025-05-01", ["fx_rows"]),
        ("2025-05-01", "2025-05-02", ["fx_late"]),
    ],
)
def test_lcb_window_includes_its_first_day_and_excludes_its_last(since, until, ids):
    task = tasks.load("lcb", data=str(FIXTURES / "lcb.jsonl"), since=since, until=until)
    assert [p.id for p in task.test] == ids
    assert task.notes[0] == f"lcb: {len(ids)} of 5 problems, {since} <= contest_date < {until}"


def test_lcb_empty_window_and_what_is_no_date_are_refused_in_one_line():
    data = str(FIXTURES / "lcb.jsonl")
    with pytest.raises(ValueError) as refusal:
        tasks.load("lcb", data=data, since="2025-06-01", until="2025-07-01")
    assert "0 of 5 problems" in one_line(refusal) and "--since" in one_line(refusal)
    for name in ("since", "until"):
        for day in ("2025-2-1", "tomorrow", ""):
            with pytest.raises(ValueError) as refusal:
                tasks.load("lcb", data=data, **{name: day})
            assert repr(day) in one_line(refusal)


def test_lcb_window_means_the_same_day_in_every_form_that_is_accepted():
    """Python also reads 20250501 as a date; compared as text it would stand behind every day of 2025."""
    try:
        task = tasks.load("lcb", data=str(FIXTURES / "lcb.jsonl"), until="20250501")
    except ValueError:
        return
    assert [p.id for p in task.test] == ["fx_sum", "fx_half", "fx_rows", "fx_pairs"]


def test_lcb_prompts_for_a_program_and_for_a_function():
    program, *_, function = tasks.load("lcb", data=str(FIXTURES / "lcb.jsonl")).train
    assert program.messages == [
        {
            "role": "user",
            "content": "You are given N and then N integers on one line. Print their sum.\n\nInput\n\nN\nA_1 ... A_N\n\n"
            "Sample Input\n\n3\n1 2 3\n\nSample Output\n\n6\n\nWrite a Python 3 program that reads the input from "
            "standard input and prints the answer to standard output. Give the whole program in one ```python code "
            "block at the end of your answer.",
        }
    ]
    assert function.messages == [
        {
            "role": "user",
            "content": "Given a list of words and an integer k, count the pairs of positions i < j with words[i] == "
            "words[j] and j - i <= k. Words may contain spaces.\n\nSolve it by completing this Python 3 code, with the "
            "names as they are:\n\n```python\nclass Solution:\n    def countPairs(self, words: List[str], k: int) -> "
            "int:\n```\n\nGive the whole code in one ```python code block at the end of your answer.",
        }
    ]


def test_lcb_braces_of_a_statement_stay_as_they_are(load_lcb):
    task = load_lcb({**lcb_row(), "question_content": "Print {question} and {starter} and {x}."})
    assert task.train[0].messages[0]["content"].startswith("Print {question} and {starter} and {x}.\n\nWrite a Python")


def test_lcb_private_tests_may_be_plain_or_compressed(load_lcb):
    pairs = [("1 2\n", "3\n"), ("é\n", "ß\n")]
    plain = load_lcb(lcb_row(private=as_tests(pairs)))
    packed = load_lcb(lcb_row(private=pairs))
    assert content(plain) == content(packed)
    assert [(t["input"], t["output"]) for t in private(plain.test[0])] == pairs


def test_lcb_without_private_tests_falls_back_on_the_public_ones_and_says_so(load_lcb):
    empty, absent, whole = (lcb_row(name, private=pack("[]")) for name in ("empty", "absent", "whole"))
    del absent["private_test_cases"]
    whole["private_test_cases"] = pack(as_tests([("5\n", "5\n")]))
    task = load_lcb(empty, absent, whole)
    assert "lcb: 2 problems have no private tests; their public tests stand in for them" in task.notes
    assert [[t["input"] for t in private(p)] for p in task.test] == [["0\n"], ["0\n"], ["5\n"]]


def hostile_blobs(marker: Path) -> dict[str, str]:
    class Calls:
        def __init__(self, function, *arguments):
            self.call = function, arguments

        def __reduce__(self):
            return self.call

    good = pickle.dumps(as_tests([("1\n", "1\n")]))
    whole = zlib.compress(good)
    encode = lambda raw: base64.b64encode(raw).decode()  # noqa: E731
    return {
        "no base64": "!!! not base64 !!!",
        "no zlib": encode(b"plain bytes"),
        "zlib cut short": encode(whole[: len(whole) - 8]),
        "zlib of cut pickle": encode(zlib.compress(good[:-9])),
        "os.system": pack(Calls(os.system, f"touch {marker}")),
        "eval": pack(Calls(eval, f"open({str(marker)!r}, 'w').close()")),
        "open": pack(Calls(open, str(marker), "w")),
        "a harmless class": pack(OrderedDict(a=1)),
        "a global of protocol 0": encode(zlib.compress(f"cposix\nsystem\n(Vtouch {marker}\ntR.".encode())),
        "a list": pack([{"input": "1\n", "output": "1\n"}]),
        "bytes": pack(b"[]"),
        "a string that is no JSON": pack("[{'input'"),
        "nested beyond reading": pack("[" * 200_000),
        "an empty object": pack("{}"),
        "a number": pack("7"),
        "a list of numbers": pack("[1, 2]"),
        "a test without output": pack('[{"input": "1"}]'),
        "a test whose input is a list": pack('[{"input": ["1"], "output": "1"}]'),
        "a test whose output is a number": pack('[{"input": "1", "output": 1}]'),
    }


HOSTILE = sorted(hostile_blobs(Path("marker")))


@pytest.mark.parametrize("name", HOSTILE)
def test_lcb_damaged_private_tests_are_one_line_with_the_problem_and_nothing_runs(name, tmp_path, load_lcb):
    marker = tmp_path / "marker"
    with pytest.raises(ValueError) as refusal:
        load_lcb(lcb_row("bad_17", private=hostile_blobs(marker)[name]))
    assert one_line(refusal).startswith("lcb problem bad_17: its tests cannot be decoded (")
    assert not marker.exists()


def test_the_marker_of_the_hostile_pickles_would_be_seen(tmp_path):
    """Python's own pickle does run them: the test above looks for the right thing."""
    for number, name in enumerate(("os.system", "eval", "open", "a global of protocol 0")):
        marker = tmp_path / str(number)
        pickle.loads(zlib.decompress(base64.b64decode(hostile_blobs(marker)[name])))
        assert marker.exists()


def test_lcb_tests_that_unpack_to_more_than_the_limit_are_refused(monkeypatch, load_lcb):
    bomb = pack(as_tests([("1\n", "0" * 3_000_000)]))
    assert len(bomb) < 10_000
    assert load_lcb(lcb_row(private=bomb)).test  # under the limit
    monkeypatch.setattr(tasks, "MAX_TESTS_BYTES", 1_000_000)
    with pytest.raises(ValueError) as refusal:
        load_lcb(lcb_row("bomb", private=bomb))
    assert one_line(refusal).startswith("lcb problem bomb: ") and "too long" in one_line(refusal)


@pytest.mark.parametrize("column", ["question_id", "question_content", "public_test_cases", "contest_date"])
def test_lcb_missing_column_is_named_with_its_row(column, load_lcb):
    row = lcb_row("second")
    del row[column]
    with pytest.raises(ValueError) as refusal:
        load_lcb(lcb_row("first"), row)
    assert "row 2" in one_line(refusal) and f"column {column} is missing" in one_line(refusal)


def test_lcb_problem_without_any_test_is_refused(load_lcb):
    with pytest.raises(ValueError) as refusal:
        load_lcb(lcb_row("none", private=pack("[]"), public=()))
    assert one_line(refusal) == "lcb problem none: it has no tests"
    with pytest.raises(ValueError) as refusal:
        load_lcb(lcb_row("none", public=()), train_tests="public")
    assert one_line(refusal) == "lcb problem none: it has no public tests"


def test_lcb_test_of_a_function_that_is_no_json_is_refused(load_lcb):
    for pair in (("[1, 2\n3", "1"), ("1", "one")):
        with pytest.raises(ValueError) as refusal:
            load_lcb(lcb_row("f", private=[("1", "1"), pair], function="f"))
        assert one_line(refusal).startswith("lcb problem f: a test of a function is no JSON (")


def test_lcb_test_of_a_function_nested_beyond_reading_is_refused(load_lcb):
    with pytest.raises(ValueError) as refusal:
        load_lcb(lcb_row("deep", private=[("1", "[" * 20_000 + "]" * 20_000)], function="f"))
    assert one_line(refusal).startswith("lcb problem deep: ")


@pytest.mark.parametrize("public", ["!!! not JSON", '[{"input": "1"}]', "7", base64.b64encode(b"no zlib").decode()])
def test_lcb_damaged_public_tests_are_one_line_with_the_problem_where_they_are_used(public, load_lcb, tmp_path):
    row = {**lcb_row("bad_18"), "public_test_cases": public}
    for load in (
        lambda: load_lcb(row, train_tests="public"),
        lambda: tasks.read("lcb", write(tmp_path / "a.jsonl", [row]), official=True),
    ):
        with pytest.raises(ValueError) as refusal:
            load()
        assert "bad_18" in one_line(refusal)


@pytest.mark.parametrize("metadata", ["{", "null", "[]"])
def test_lcb_damaged_metadata_is_one_line_with_the_problem(metadata, load_lcb):
    with pytest.raises(ValueError) as refusal:
        load_lcb({**lcb_row("bad_19"), "metadata": metadata})
    assert "bad_19" in one_line(refusal)


def test_lines_that_are_no_rows_are_named(tmp_path):
    good = json.dumps(lcb_row())
    for text, words in (
        (good + "\n\n{broken\n", "line 3"),
        ("[1]\n", "line 1"),
        ("", "rows.jsonl"),
    ):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(ValueError) as refusal:
            tasks.load("lcb", data=str(tmp_path / "rows.jsonl"))
        assert str(tmp_path / "rows.jsonl") in one_line(refusal) and words in one_line(refusal)


def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but no more")
    (tmp_path / "x.arrow").write_bytes(b"no arrow")
    (tmp_path / "empty").mkdir()
    for name in ("x.parquet", "x.arrow", "empty", "absent.jsonl"):
        with pytest.raises(ValueError) as refusal:
            tasks.load("lcb", data=str(tmp_path / name))
        assert str(tmp_path / name) in one_line(refusal)


def test_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError) as refusal:
        tasks.load("lcb", data=str(tmp_path / "x.jsonl"))
    assert str(tmp_path / "x.jsonl") in one_line(refusal)


def test_lcb_is_the_same_from_every_file_format(tmp_path):
    (tmp_path / "plain").mkdir()
    rows = fixture_rows("lcb.jsonl")
    expected = content(tasks.load("lcb", data=write(tmp_path / "plain" / "test6.jsonl", rows)))
    assert len(expected) == 8
    places = {"folder with the jsonl": str(tmp_path / "plain"), **as_other_formats(rows, tmp_path, "test6")}
    for place, path in places.items():
        assert content(tasks.load("lcb", data=path)) == expected, place


def test_lcb_comes_from_the_hub_as_one_file(monkeypatch):
    asked = []

    def download(repo, file, **settings):
        asked.append((repo, file, settings))
        return str(FIXTURES / "lcb.jsonl")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "unreachable", lambda *_: "")
    assert len(tasks.load("lcb").test) == 4
    assert asked == [("livecodebench/code_generation_lite", "test6.jsonl", {"repo_type": "dataset"})]


def test_a_hub_out_of_reach_is_one_line_that_names_the_way_out(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(hub, "unreachable", lambda *_: "")  # it answers, and fails later
    for task, repo in (
        ("lcb", "livecodebench/code_generation_lite"),
        ("sciknoweval", "hicai-zju/SciKnowEval"),
        ("math", "HuggingFaceH4/MATH-500"),
    ):
        with pytest.raises(ValueError) as refusal:
            tasks.load(task)
        assert repo in one_line(refusal) and "--data" in one_line(refusal) and "no route to host" in one_line(refusal)


def test_where_there_is_no_hub_nothing_is_downloaded_and_the_cache_is_all_that_is_asked(monkeypatch):
    offline = []
    flags = lambda: (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)  # noqa: E731

    def load_dataset(*_, **__):
        offline.append(flags())
        raise ConnectionError("OfflineModeIsEnabled")

    monkeypatch.setattr(hub, "unreachable", lambda *asked: f"no way to {asked[0]}")
    monkeypatch.setattr(hub, "cached", lambda *_: False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked all the same"))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    for task, repo in (("lcb", "livecodebench/code_generation_lite"), ("sciknoweval", "hicai-zju/SciKnowEval")):
        with pytest.raises(ValueError, match=f"{repo}.* cannot be fetched \\(.*no way to {repo}\\): give a local copy"):
            tasks.load(task)
    assert offline == [(True, True)] and flags() == (False, False)  # for this one load alone


def test_lcb_in_the_cache_is_read_without_a_hub(monkeypatch):
    monkeypatch.setattr(hub, "cached", lambda *asked: asked == (*livecodebench.LCB_FILE, "dataset"))
    monkeypatch.setattr(hub, "unreachable", lambda *_: "no way")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(FIXTURES / "lcb.jsonl"))
    assert len(tasks.load("lcb").test) == 4


@pytest.mark.parametrize(
    "first, second, verdict",
    [
        ("wrong answer", "internal", "internal"),  # what the grader failed on is no failure of the program
        ("wrong answer", "time-out", "time-out"),
        ("time-out", "error", "error"),
        ("time-out", "memory", "memory"),
        ("time-out", "output limit", "output limit"),
        ("error", "memory", "error"),  # of one rank the first
        ("passed", "wrong answer", "wrong answer"),
    ],
)
def test_of_several_failures_the_gravest_is_the_verdict(first, second, verdict, monkeypatch):
    """Of two halves, since all but a wrong answer end theirs."""
    task = tasks.read("lcb", str(FIXTURES / "lcb.jsonl"))
    try:
        problem = next(p for p in task.test if len(livecodebench._tests(*p.data)) > 1)
        record, _ = problem.data
        assert 0 < len(record.train) < len(livecodebench._tests(*problem.data))  # a file's problems have halves as well
        own = [livecodebench._tests(*problem.data)[i] for i in record.train]
        failed = Result("error", None, "ValueError: no (line 1)")
        monkeypatch.setattr(tasks, "_run_test", lambda *args: (first if args[-1] in own else second, failed))
        (outcome,) = task.verify([problem], ["```python\nprint(1)\n```"])
    finally:
        task.close()
    assert (outcome.reward, outcome.verdict, bool(outcome.feedback)) == (0, verdict, verdict != "internal")
    assert outcome.columns == {"held_out": 0}


def test_a_file_of_problems_without_private_tests_says_what_grades_them(tmp_path):
    rows = [json.loads(line) for line in (FIXTURES / "lcb.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        row["private_test_cases"] = "[]"
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    note = "lcb: 2 problems have no private tests; their public tests alone grade them"
    for path, said in ((tmp_path / "problems.jsonl", [note]), (FIXTURES / "lcb.jsonl", [])):
        task = tasks.read("lcb", str(path), official=True)
        assert [line for line in task.notes if "no private tests" in line] == said
        task.close()


def test_what_files_and_folders_are_refused_before_anything_is_read():
    with pytest.raises(ValueError) as refusal:
        tasks.load("math", data="no/such/place")
    assert one_line(refusal) == "--data no/such/place does not exist"
    with pytest.raises(ValueError) as refusal:
        tasks.load("toy", data=str(FIXTURES))
    assert "toy" in one_line(refusal)
    with pytest.raises(ValueError) as refusal:
        tasks.read("toy", str(FIXTURES / "lcb.jsonl"))
    assert "lcb, sciknoweval or math" in one_line(refusal)


# ---- LiveCodeBench: which tests train ----------------------------------------------------------------------------

DIGITS = [(f"{i}\n", f"{i * i + 100}\n") for i in range(8)]


@pytest.mark.parametrize("count, size", [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (7, 3), (8, 4)])
def test_lcb_training_half_is_half_rounded_down_but_at_least_one(count, size, load_lcb):
    task = load_lcb(*(lcb_row(f"p{i}", private=DIGITS[:count]) for i in range(6)))
    for problem in task.train:
        assert len(half(problem)) == len(set(half(problem))) == size
        assert set(half(problem)) <= set(range(count))


def test_lcb_training_half_depends_on_the_problem_alone(load_lcb):
    rows = [lcb_row(f"p{i}", private=DIGITS) for i in range(12)]
    first = {p.id: half(p) for p in load_lcb(*rows).train}
    random.seed(5)
    again = load_lcb(*rows[5::-1])
    assert {p.id: half(p) for p in again.train} == {p.id: half(p) for p in again.test} == dict(list(first.items())[:6])
    assert len(set(first.values())) > 6  # 70 halves of eight; the first four tests are nobody's habit
    assert {i for chosen in first.values() for i in chosen} == set(range(8))
    # Runs of an earlier day must stay comparable: these are not to change.
    fixture = tasks.load("lcb", data=str(FIXTURES / "lcb.jsonl")).train
    assert [half(p) for p in fixture] == [(1, 2), (1, 2), (1,), (0, 2)]


def lookup(pairs) -> str:
    """A program that knows these answers and no others."""
    return fence(f"print({dict((a.strip(), b.strip()) for a, b in pairs)}.get(input().strip(), 'no'))")


def test_lcb_answers_of_the_training_half_pass_training_and_fail_evaluation(load_lcb):
    task = load_lcb(lcb_row(private=DIGITS))
    trained = half(task.train[0])
    seen = [DIGITS[i] for i in trained]
    unseen = [DIGITS[i] for i in range(8) if i not in trained]
    assert len(seen) == len(unseen) == 4
    everything, only_seen, only_unseen = lookup(DIGITS), lookup(seen), lookup(unseen)
    train = task.verify(task.train * 3, [everything, only_seen, only_unseen])
    assert [o.reward for o in train] == [1, 1, 0]
    assert all(o.columns == {} for o in train)
    test = task.verify(task.test * 4, [everything, only_seen, only_unseen, "no code"])
    assert [(o.reward, o.columns) for o in test] == [
        (1, {"held_out": 1}), (0, {"held_out": 0}), (0, {"held_out": 1}), (0, {"held_out": 0}),
    ]  # fmt: skip


def test_lcb_training_feedback_never_shows_a_held_out_test(load_lcb, sandboxes):
    pairs = [(f"question{i}\n", f"answer{i}\n") for i in range(8)]
    task = load_lcb(*(lcb_row(f"p{i}", private=pairs) for i in range(4)))
    for problem in task.train:
        sandboxes.ran.clear()
        (outcome,) = task.verify([problem], [fence("print('nothing')")])
        assert sandboxes.ran == [pairs[i][0] for i in half(problem)]
        shown = {int(i) for i in re.findall(r"(?:question|answer)(\d)", outcome.feedback)}
        assert len(shown) == 2 and shown < set(half(problem))


def test_lcb_a_single_test_trains_and_evaluates_and_nothing_is_held_out(load_lcb):
    task = load_lcb(lcb_row(private=[("3\n", "4\n")]))
    (outcome,) = task.verify(task.test, [fence("print(int(input()) + 1)")])
    assert (outcome.reward, outcome.columns) == (1, {})


def test_lcb_public_tests_train_and_all_private_ones_evaluate(load_lcb):
    task = load_lcb(lcb_row(private=DIGITS, public=[("50\n", "fifty\n"), ("60\n", "sixty\n")]), train_tests="public")
    only_public = lookup([("50", "fifty"), ("60", "sixty")])
    assert task.verify(task.train, [only_public]) == [Outcome(1, "passed")]
    (evaluated,) = task.verify(task.test, [only_public])
    assert (evaluated.reward, evaluated.columns) == (0, {"held_out": 0})
    (outcome,) = task.verify(task.train, [lookup(DIGITS)])
    assert outcome.reward == 0 and "Expected output:\nfifty" in outcome.feedback
    (evaluated,) = task.verify(task.test, [lookup(DIGITS)])
    assert (evaluated.reward, evaluated.columns) == (1, {"held_out": 1})


def test_lcb_read_grades_by_the_private_tests_or_as_the_official_checker_by_all(tmp_path):
    path = write(tmp_path / "pool.jsonl", [lcb_row("late", DIGITS[:2], [("x", "y")], date="1999-01-01")])
    programs = [lookup([*DIGITS[:2], ("x", "y")]), lookup(DIGITS[:2]), lookup([DIGITS[0], ("x", "y")])]
    for official, rewards in ((True, [1, 0, 0]), (False, [1, 1, 0])):
        task = tasks.read("lcb", path, official)
        assert [p.id for p in task.test] == ["late"] and task.train == []
        outcomes = task.verify(task.test * 3, programs)
        assert [o.reward for o in outcomes] == rewards
        assert [bool(o.columns) for o in outcomes] == [not official] * 3


# ---- LiveCodeBench: verdicts -----------------------------------------------------------------------------------

VERDICTS = {
    "right": ("print(int(input()) ** 2 + 100)", "passed"),
    "right, then SystemExit": ("print(int(input()) ** 2 + 100)\nraise SystemExit(3)", "passed"),
    "imports of the preamble": ("print(deque([isqrt(int(input()) ** 4) + 100])[0])", "passed"),
    "wrong once": ("x = int(input())\nprint(x * x + 100 + (x == 5))", "wrong answer"),
    "wrong always": ("print(0)", "wrong answer"),
    "nothing printed": ("input()", "wrong answer"),
    "no UTF-8": ("import sys\nsys.stdout.buffer.write(bytes([255, 254, 0, 128]))", "wrong answer"),
    "garbage": ("import random\nprint(*map(chr, random.choices(range(32, 0xD000), k=5000)))", "wrong answer"),
    "exception": ("print(1 / 0)", "error"),
    "syntax": ("def f(:", "error"),
    "64 MiB": ("block = bytearray(1 << 26)\nprint(int(input()) ** 2 + 100)", "passed"),
    "3 GiB": ("block = bytearray(3 << 30)\nprint(int(input()) ** 2 + 100)", "memory"),
    "3 MB of blanks": ("print(' ' * 3_000_000, int(input()) ** 2 + 100)", "passed"),
    "output": ("while True:\n    print('x' * 100_000)", "output limit"),
}


def test_lcb_verdicts_and_the_reward_that_only_all_tests_earn(load_lcb):
    task = load_lcb(lcb_row(private=DIGITS))
    outcomes = task.verify(task.test * len(VERDICTS), [fence(code) for code, _ in VERDICTS.values()])
    assert {name: o.verdict for name, o in zip(VERDICTS, outcomes)} == {name: v for name, (_, v) in VERDICTS.items()}
    for name, outcome in zip(VERDICTS, outcomes):
        assert outcome.reward == (outcome.verdict == "passed"), name
        assert bool(outcome.feedback) == (outcome.reward == 0), name
        assert len(outcome.feedback.encode()) and len(outcome.feedback) <= 2000 or outcome.reward, name
        assert outcome.columns["held_out"] == outcome.reward or name == "wrong once"


def test_lcb_response_without_a_program_is_graded_without_running_anything(load_lcb, sandboxes):
    task = load_lcb(lcb_row(private=DIGITS))
    sandboxes.ran.clear()
    responses = ["", "print(1)", "```python\nprint(1)", "```c++\nint main() {}\n```", "`" * 5000]
    for outcome in task.verify(task.train * 5, responses):
        assert outcome == Outcome(0, "no code", "Your answer contains no complete ```python code block.")
    assert sandboxes.ran == []


@pytest.mark.parametrize(
    "code, train, test",
    [
        ("while True:\n    pass", 1, 2),  # a time-out ends its half
        ("raise ValueError", 1, 2),  # and so does an error
        ("print('wrong')", 3, 7),  # wrong answers do not: the shortest two are shown
    ],
)
def test_lcb_time_out_and_error_end_the_half_that_they_stand_in(code, train, test, load_lcb, sandboxes):
    task = load_lcb(lcb_row(private=DIGITS[:7]))
    for problems, count in ((task.train, train), (task.test, test)):
        sandboxes.ran.clear()
        (outcome,) = task.verify(problems, [fence(code)])
        assert (outcome.reward, len(sandboxes.ran)) == (0, count)


def test_lcb_thread_that_died_is_the_error_where_its_output_is_missing(load_lcb):
    task = load_lcb(lcb_row(private=[("7\n", "8\n")]))
    code = "import threading\nt = threading.Thread(target=lambda: [][7])\nt.start()\nt.join()\n"
    missing, there = task.verify(task.train * 2, [fence(code), fence(code + "print(8)")])
    assert missing.verdict == "error" and "IndexError: list index out of range" in missing.feedback
    assert there == Outcome(1, "passed")


def test_lcb_failed_grader_is_internal_without_a_text(load_lcb, sandboxes, monkeypatch):
    task = load_lcb(lcb_row(private=DIGITS[:4]))
    monkeypatch.setattr(sandboxes.kind, "run", lambda *_: Result("internal", error="the worker died twice"))
    assert task.verify(task.train, [fence("print(0)")]) == [Outcome(0, "internal", "")]


# ---- LiveCodeBench: feedback -------------------------------------------------------------------------------------


def by_input(answers: dict[str, str], otherwise: str = "print('wrong')") -> str:
    """A program that runs a line of code for each input."""
    return fence(f"exec({answers!r}.get(input().strip(), {otherwise!r}))")


def test_lcb_feedback_prefers_errors_to_time_outs_to_wrong_answers(load_lcb):
    task = load_lcb(lcb_row(private=DIGITS[:6]))
    trained = half(task.train[0])
    names = [given.strip() for given, _ in DIGITS[:6]]
    first_half = [names[i] for i in trained]
    second_half = [name for name in names if name not in first_half]
    loop, fail = "while True: pass", "raise KeyError('lost')"
    cases = [
        (by_input({first_half[0]: loop, second_half[1]: fail}), "error", "KeyError: 'lost'", second_half[1]),
        (
            by_input({first_half[0]: "print('wrong')", second_half[2]: loop}),
            "time-out",
            "did not finish",
            second_half[2],
        ),
        (by_input({first_half[2]: fail}), "error", "KeyError: 'lost'", first_half[2]),
        (by_input({}), "wrong answer", "Wrong answer.", None),
    ]
    outcomes = task.verify(task.test * 4, [program for program, *_ in cases])
    for outcome, (_, verdict, words, given) in zip(outcomes, cases):
        assert outcome.verdict == verdict and words in outcome.feedback
        assert given is None or outcome.feedback.endswith(f"nput:\n{given}")


def test_lcb_feedback_on_wrong_answers_shows_the_two_shortest_with_what_was_expected(load_lcb, tmp_path):
    pairs = [("1 1 1 1\n", "4\n"), ("2\n", "2\n"), ("3 3\n", "a very long expected output\n"), ("4 4 4\n", "12\n")]
    task = tasks.read("lcb", write(tmp_path / "x.jsonl", [lcb_row(private=pairs, public=())]))
    (outcome,) = task.verify(task.test, [fence("print('said', input())\nprint()")])
    assert outcome.feedback == (
        "Wrong answer.\nInput:\n2\nYour output:\nsaid 2\nExpected output:\n2\n\n"
        "Wrong answer.\nInput:\n4 4 4\nYour output:\nsaid 4 4 4\nExpected output:\n12"
    )


def test_lcb_feedback_on_an_error_has_its_line_and_the_last_three_frames(load_lcb):
    task = load_lcb(lcb_row(private=[("7\n", "8\n")]))
    code = """\
        def a(x):
            return b(x)
        def b(x):
            return c(x)
        def c(x):
            return d(x)
        def d(x):
            return [][x]
        print(a(int(input())))"""
    (outcome,) = task.verify(task.train, [fence(code)])
    assert outcome.feedback == (
        "Your program stopped with an error:\nIndexError: list index out of range (line 8)\n"
        "line 4, in b: return c(x)\nline 6, in c: return d(x)\nline 8, in d: return [][x]\nInput:\n7"
    )


def test_lcb_feedback_on_time_memory_and_output(load_lcb):
    task = load_lcb(lcb_row(private=[("7\n", "8\n")]))
    codes = ["while True: pass", "bytearray(1 << 36)", VERDICTS["output"][0]]
    late, memory, output = (o.feedback for o in task.verify(task.train * 3, [fence(code) for code in codes]))
    assert late == "Your program did not finish within 2 seconds on this input:\n7"
    assert memory.startswith("Your program ran out of memory:\nMemoryError") and memory.endswith("\nInput:\n7")
    assert output.startswith("Your program printed too much:\n") and output.endswith("\nInput:\n7")


def test_lcb_feedback_is_cut_to_2000_characters_and_says_what_is_left_out(load_lcb):
    long = [("1" * 5000 + "\n", "2" * 6000 + "\n"), ("3" * 5000 + "\n", "4" * 6000 + "\n")]
    task = load_lcb(lcb_row(private=as_tests(long[:1])), lcb_row("two", private=long, public=long))
    wrong, late = task.verify([task.train[0]] * 2, [fence("print('x' * 7000)"), fence("while True: pass")])
    assert wrong.feedback == (
        f"Wrong answer.\nInput:\n{'1' * 260} ... (4740 characters more)\nYour output:\n{'x' * 260} ... (6740 characters "
        f"more)\nExpected output:\n{'2' * 260} ... (5740 characters more)"
    )
    assert late.feedback.endswith(f"on this input:\n{'1' * 800} ... (4200 characters more)")
    code = f"{'y' * 600} = 1\ndef f(x):\n    raise ValueError('v' * 9000 + 'é' * x) {'#' * 900}\nf(1)"
    two, error = task.verify([task.test[1]] * 2, [fence("print('x' * 7000)"), fence(code)])
    assert len(two.feedback) <= 2000 and two.feedback.endswith("characters more)") and len(error.feedback) <= 2000
    assert error.feedback.startswith("Your program stopped with an error:\nValueError: vvvvv")


def test_lcb_feedback_is_text_that_a_tokenizer_takes(load_lcb, tokenizer):
    """Half of a surrogate pair is a Python string but no text: a run would die of it when the feedback is encoded."""
    program = load_lcb(lcb_row(private=[("7\n", "8\n")]))
    function = load_lcb(lcb_row(private=[("7", "8")], function="f"))
    outcomes = program.verify(program.train, [fence("raise ValueError(chr(0xD800))")])
    outcomes += function.verify(
        function.train * 2, [fence("def f(x): return chr(0xD800)"), fence("def f(x): [][chr(0xDC00)]")]
    )
    for outcome in outcomes:
        assert outcome.feedback.encode() and tokenizer(outcome.feedback)["input_ids"]


# ---- LiveCodeBench: rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "printed, expected, same",
    [
        ("5", "5", True),
        ("5\n", "5", True),
        ("\n\n5\n\n", "5\n", True),
        (" 5 \t\r\n6\r\n", "5\n6", True),
        ("0.50", "0.5", True),
        ("1e3", "1000", True),
        ("1E+3 2.0", "1000 2", True),
        ("-0", "0", True),
        ("+7", "7", True),
        ("007", "7", True),
        ("1_000", "1000", True),  # what Decimal reads, as in the official checker
        ("1  2", "1 2", True),
        ("inf", "Infinity", True),
        ("nan", "nan", True),
        ("", "", True),
        ("", "\n \n", True),
        ("nan", "NaN", False),
        ("sNaN", "1", False),
        ("sNaN 1", "sNaN 2", False),
        ("0.1", "0.10000000000000001", False),
        ("10000000000000000001", "10000000000000000000", False),
        ("1." + "0" * 40 + "1", "1", False),
        ("5", "6", False),
        ("", "0", False),
        ("0", "", False),
        ("1 2", "1\n2", False),
        ("1\n\n2", "1\n2", False),
        ("1\n2\n3", "1\n2", False),
        ("1\n2", "1\n2\n3", False),
        ("1 2", "1 2 3", False),
        ("1 2 3", "1 2", False),
        ("YES", "Yes", False),
        ("a  b", "a b", False),
        ("x 0.50", "x 0.5", False),
        ("x 0.5", "x 0.5", True),
        ("0.5\nx", "0.50\nx", True),
        ("1,000", "1000", False),
        ("0x10", "16", False),
        ("1/2", "0.5", False),
        ("٣", "3", True),  # Decimal reads the digits of every script
        ("True", "1", False),
    ],
)
def test_lcb_outputs_are_equal_line_by_line_as_text_or_as_numbers(printed, expected, same):
    assert livecodebench.same_output(printed, expected) is same


@pytest.mark.parametrize(
    "printed, expected, same",
    [
        ("1e999999999", "1", False),
        ("1e999999999", "10e999999998", True),
        ("1e-999999999", "0", False),
        ("1e99999999999999999999999", "1", False),
        ("9" * 300_000, "8" * 300_000, False),
        ("1 " * 300_000, "1.0 " * 300_000, True),
    ],
)
def test_lcb_hostile_numbers_are_compared_fast(printed, expected, same):
    start = time.monotonic()
    assert livecodebench.same_output(printed, expected) is same
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    "body, expected, verdict",
    [
        ("return [1, 2]", "[1, 2]", "passed"),
        ("return (1, 2)", "[1, 2]", "passed"),
        ("return [(1, 2)]", "[[1, 2]]", "error"),
        ("return [[1, 2]]", "[[1, 2]]", "passed"),
        ("return True", "1", "passed"),
        ("return 1", "true", "passed"),
        ("return 2.0", "2", "passed"),
        ("return 0.1 + 0.2", "0.3", "wrong answer"),
        ("return '1'", "1", "wrong answer"),
        ("return None", "null", "passed"),
        ("return", "0", "wrong answer"),
        ("return []", "null", "wrong answer"),
        ("return {'a': [1]}", '{"a": [1]}', "passed"),
        ("return 10 ** 5000", "1" + "0" * 5000, "passed"),
        ("return {1, 2}", "[1, 2]", "error"),
        ("class Yes:\n        __eq__ = lambda *_: True\n    return Yes()", "1", "error"),
        ("class Yes(int):\n        __eq__ = lambda *_: True\n    return Yes(3)", "1", "wrong answer"),
        ("class Yes(list):\n        __eq__ = lambda *_: True\n    return Yes([3])", "[1]", "wrong answer"),
        ("return eval('[' * 90 + ']' * 90)", "[" * 90 + "]" * 90, "passed"),
        ("v = []\n    for _ in range(399): v = [v]\n    return v", "[" * 400 + "]" * 400, "passed"),
        ("v = []\n    for _ in range(399): v = [v]\n    return v", "[" * 401 + "]" * 401, "wrong answer"),
        ("v = []\n    v.append(v)\n    return v", "[]", "error"),
        ("print(1)", "1", "wrong answer"),
        ("return input()", "1", "error"),
    ],
)
def test_lcb_results_of_functions(body, expected, verdict, load_lcb):
    task = load_lcb(lcb_row(private=[("0", expected)], function="f"))
    (outcome,) = task.verify(task.train, [fence(f"def f(x):\n    {body}")])
    assert outcome.verdict == verdict
    assert outcome.reward == (verdict == "passed")


def test_lcb_a_result_nested_beyond_comparing_is_a_failure_like_any_other(load_lcb):
    task = load_lcb(lcb_row(private=[("0", "1")], function="f"))
    programs = [f"def f(x):\n    v = []\n    for _ in range({n}): v = [v]\n    return v" for n in (3000, 200_000)]
    for outcome in task.verify(task.train * 2, [fence(program) for program in programs]):
        assert outcome.reward == 0 and outcome.verdict in ("wrong answer", "error") and outcome.feedback


def test_lcb_functions_are_found_with_and_without_their_class(load_lcb):
    task = load_lcb(lcb_row(private=[('["a b", "c"]\n2', '"a b/c/2"')], function="join"))
    body = "return '/'.join([*words, str(k)])"
    cases = [
        (f"class Solution:\n    def join(self, words: List[str], k: int) -> str:\n        {body}", "passed"),
        (f"def join(words, k):\n    {body}", "passed"),
        (f"class Solutions:\n    pass\ndef join(words, k):\n    {body}", "passed"),
        (f"class Solution(object):\n    @staticmethod\n    def join(words, k):\n        {body}", "passed"),
        (f"class Solution:\n    def other(self, words, k):\n        {body}", "error"),
        (f"class Solution:\n    pass\ndef join(words, k):\n    {body}", "error"),
        (f"class Answer:\n    def join(self, words, k):\n        {body}", "error"),
        ("class Solution:\n    def join(self, words):\n        return ''", "error"),
    ]
    outcomes = task.verify(task.train * len(cases), [fence(code) for code, _ in cases])
    assert [o.verdict for o in outcomes] == [verdict for _, verdict in cases]
    assert "AttributeError: 'Solution' object has no attribute 'join'" in outcomes[4].feedback
    assert "NameError: name 'join' is not defined" in outcomes[6].feedback


@pytest.mark.parametrize(
    "response, code",
    [
        ("```python\na\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```py\na\n```\n", "a\n"),
        ("```python3\na\n```", "a\n"),
        ("```Python\na\n```", "a\n"),
        ("```python title=x\na\n```", "a\n"),
        ("``` python\na\n```", "a\n"),
        ("```python\na\n```\nand\n```python\nb\n```", "b\n"),
        ("```python\na\n```\n```text\n3\n```", "a\n"),
        ("```text\n3\n```", None),
        ("```python2\na\n```", None),
        ("```cpp\na\n```", None),
        ("```python\na", None),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("```python\na\n```python\nb\n```", "b\n"),  # the first was never finished
        ("```text\n3\n```python\nb\n```", "b\n"),
        ("1. so:\n   ```python\n   if a:\n       b\n   ```", "if a:\n    b\n"),
        ("```python\r\na\r\nb\r\n```\r\n", "a\r\nb\r\n"),
        ("```python\n```", None),
        ("```python\na\n```\n```python\n\n```", "a\n"),  # a block without a program is none
        ("```python\ns = '```'\nb\n```", "s = '```'\nb\n"),
        ("```python print(1)```", None),
        ("the ```python block```\n```python\na\n```", "a\n"),
        ("````python\na\n````", "a\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("````python\na\n```\nb\n````", "a\n```\nb\n"),
        ("```{.python}\na\n```", "a\n"),
        ("", None),
        ("a", None),
        ("<think>\n```python\nold\n```\n</think>\n```python\nnew\n```", "new\n"),
    ],
)
def test_lcb_program_is_the_last_complete_block_for_python(response, code):
    found = livecodebench.code_block(response)
    assert found is code is None or found.replace("\r\n", "\n") == code.replace("\r\n", "\n")


def test_lcb_program_with_line_ends_of_another_system_runs(load_lcb):
    task = load_lcb(lcb_row(private=[("7\n", "8\n")]))
    response = fence("x = int(input())\nif x:\n    print('''\n8''')").replace("\n", "\r\n")
    assert task.verify(task.train, [response]) == [Outcome(1, "passed")]


CHECKER_FAULTS = {  # right programs that the official checker's mock of standard input fails
    *((name, "o1-preview") for name in "abc301_b abc310_d abc318_c abc325_f abc328_e abc342_d".split()),
    *((name, "o1-mini") for name in "abc303_d abc315_b abc338_d".split()),
}


@pytest.mark.slow
@needs_samples
def test_lcb_verdicts_on_802_real_programs_agree_with_the_official_checker(monkeypatch, capsys):
    monkeypatch.setattr(tasks, "TIME_LIMIT", 6.0)
    task = tasks.read("lcb", str(SAMPLES / "lcb_pool.jsonl"), official=True)
    problems = {p.id: p for p in task.test}
    triples = [json.loads(line) for line in (SAMPLES / "lcb_triples.jsonl").read_text().splitlines()]
    assert len(triples) == 802
    start = time.monotonic()
    outcomes = task.verify(
        [problems[t["question_id"]] for t in triples], [f"```python\n{t['code']}\n```" for t in triples]
    )
    seconds = time.monotonic() - start
    faults, other, slow = {}, [], []
    for triple, outcome in zip(triples, outcomes):
        name = triple["question_id"], "-".join(triple["model"].split("-")[:2])
        if outcome.reward == triple["official_head_pass"]:
            continue
        if name in CHECKER_FAULTS:
            faults[name] = (triple, outcome)
        else:  # programs near the time limit may go either way
            (slow if triple["slow"] else other).append((name, outcome))
    agree = sum(o.reward == t["official_head_pass"] for t, o in zip(triples, outcomes))
    with capsys.disabled():
        print(
            f"\nagree {agree}, checker faults {len(faults)}, other {len(other)}, near the limit {len(slow)}, {seconds:.1f} s"
        )
    assert set(faults) == CHECKER_FAULTS and agree + len(slow) >= 791 and len(other) <= 2, other
    for triple, outcome in faults.values():
        assert outcome.reward == 1  # we pass what the checker fails, and Python itself agrees:
        for test in livecodebench._tests(problems[triple["question_id"]].data[0], "official"):
            command = [sys.executable, "-I", "-c", triple["code"]]
            ran = subprocess.run(command, input=test["input"], capture_output=True, text=True, timeout=60, check=True)
            assert livecodebench.same_output(ran.stdout, test["output"])


# ---- SciKnowEval -------------------------------------------------------------------------------------------------

DOMAINS = ("biology", "chemistry", "material", "physics")


def choice_row(domain="Physics", number=0, answer="B", level="L3", kind="mcq-4-choices", count=4) -> dict:
    return {
        "question": f"Question {number}?",
        "choices": {"text": [f"option {i}" for i in range(count)], "label": list("ABCDEF"[:count])},
        "answerKey": answer, "type": kind, "domain": domain, "details": {"level": level, "task": "t"},
    }  # fmt: skip


def test_sciknoweval_takes_level_3_questions_with_4_or_2_choices_of_the_domain(tmp_path):
    kept = [choice_row(number=i) for i in range(9)] + [choice_row(number=9, kind="mcq-2-choices", count=2)]
    others = [
        choice_row(number=90, level="L2"), choice_row(number=91, level="L4"), choice_row(number=92, kind="true_or_false"),
        choice_row(number=93, kind="mcq-5-choices", count=5), choice_row(number=94, domain="Biology"),
        choice_row(number=95, kind="open-ended-qa", count=0),
    ]  # fmt: skip
    task = tasks.load("sciknoweval", "physics", write(tmp_path / "hub.jsonl", [*others[:3], *kept, *others[3:]]))
    assert task.name == "sciknoweval/physics" and task.validation == []
    asked = {p.id: p.messages[-1]["content"].split("\n")[0] for p in task.train + task.test}
    assert asked == {f"physics-{i}": f"Question {i}?" for i in range(10)}  # numbered in the order of the source
    assert task.notes[0] == "sciknoweval: 11 of 16 rows are L3 questions with 4 or 2 choices"
    assert task.lacks == ("environment", "solution_first", "both")


def test_sciknoweval_prompt_is_the_question_the_options_and_a_request(tmp_path):
    rows = [choice_row(number=i, answer=" C ", count=2 if i == 0 else 4) for i in range(10)]
    task = tasks.load("sciknoweval", "physics", write(tmp_path / "hub.jsonl", rows))
    problems = {p.id: p for p in task.train + task.test}
    system, user = problems["physics-0"].messages
    assert user == {
        "role": "user",
        "content": "Question 0?\n\nA: option 0\nB: option 1\nPlease reason step by step.",
    }
    assert system["role"] == "system" and "<answer>" in system["content"] and "<reasoning>" in system["content"]
    assert problems["physics-1"].messages[1]["content"] == (
        "Question 1?\n\nA: option 0\nB: option 1\nC: option 2\nD: option 3\nPlease reason step by step."
    )
    assert problems["physics-0"].reference == "C"


def test_sciknoweval_split_is_that_of_datasets_with_seed_42_and_the_same_on_every_load(tmp_path):
    sizes = {"Biology": 500, "Chemistry": 2100, "Material": 935, "Physics": 800}
    rows = [choice_row(domain, i, answer="ABCD"[i % 4]) for domain, count in sizes.items() for i in range(count)]
    random.Random(0).shuffle(rows)  # domains mixed: the order within a domain counts
    data = write(tmp_path / "hub.jsonl", rows)
    task = tasks.load("sciknoweval", "all", data)
    for split, expected in ((task.train, (450, 1890, 841, 720)), (task.test, (50, 210, 94, 80))):
        assert [sum(p.part == domain for p in split) for domain in DOMAINS] == list(expected)
    kept = [row["question"] for row in rows if row["domain"] == "Material"]
    split = datasets.Dataset.from_dict({"question": kept}).train_test_split(test_size=0.1, seed=42)
    for name, problems in (("train", task.train), ("test", task.test)):
        asked = [p.messages[-1]["content"].split("\n")[0] for p in problems if p.part == "material"]
        assert asked == split[name]["question"][:]
    again = tasks.load("sciknoweval", "material", data)
    assert [p.id for p in again.test] == [p.id for p in task.test if p.part == "material"]
    assert [p.id for p in again.train] == [p.id for p in task.train if p.part == "material"]
    assert not {p.id for p in task.train} & {p.id for p in task.test}


def test_sciknoweval_domain_with_too_few_questions_is_refused(tmp_path):
    data = write(tmp_path / "hub.jsonl", [choice_row(number=i) for i in range(9)])
    with pytest.raises(ValueError) as refusal:
        tasks.load("sciknoweval", "physics", data)
    assert "9 L3 choice questions of physics" in one_line(refusal)
    with pytest.raises(ValueError) as refusal:
        tasks.load("sciknoweval", "geology", data)
    assert "geology" in one_line(refusal)


@pytest.mark.parametrize("column", ["question", "choices", "answerKey", "type", "domain", "details"])
def test_sciknoweval_missing_column_is_named_with_its_row(column, tmp_path):
    rows = [choice_row(number=i) for i in range(10)]
    del rows[3][column]
    with pytest.raises(ValueError) as refusal:
        tasks.load("sciknoweval", "physics", write(tmp_path / "hub.jsonl", rows))
    assert f"row 4: column {column} is missing" in one_line(refusal)


def test_sciknoweval_prints_what_the_commonest_letter_would_score(tmp_path):
    for domain, letters in (("biology", "CABCC"), ("material", "DDD"), ("physics", "BD")):
        for split, answers in (("train", "AB"), ("test", letters)):
            rows = [
                {"idx": i, "system": "S", "prompt": f"{domain} {i}?", "answer": letter}
                for i, letter in enumerate(answers)
            ]
            write(tmp_path / f"{domain}_{split}.jsonl", rows)
    note = lambda subset: tasks.load("sciknoweval", subset, str(tmp_path)).notes[-1]  # noqa: E731
    assert note("biology") == "a constant answer scores on the test problems: biology 0.600 (C)"  # 3 of 5
    assert note("physics") == "a constant answer scores on the test problems: physics 0.500 (B)"
    with pytest.raises(ValueError) as refusal:
        tasks.load("sciknoweval", "all", str(tmp_path))
    assert "chemistry_train.jsonl" in one_line(refusal)
    for split in ("train", "test"):
        write(tmp_path / f"chemistry_{split}.jsonl", [{"idx": 0, "prompt": "?", "answer": "A"}])
    assert note("all").endswith(": biology 0.600 (C), chemistry 1.000 (A), material 1.000 (D), physics 0.500 (B)")


def test_sciknoweval_finished_splits_are_taken_as_they_stand(tmp_path):
    rows = [{"idx": 7, "system": "S", "prompt": "P\n", "answer": "A\n"}, {"idx": 3, "prompt": "R", "answer": "B"}]
    (tmp_path / "biology").mkdir()
    write(tmp_path / "biology" / "train.json", rows)
    write(tmp_path / "biology" / "test.json", rows[:1])
    task = tasks.load("sciknoweval", "biology", str(tmp_path))
    assert task.train == [
        Problem("7", [{"role": "system", "content": "S"}, {"role": "user", "content": "P\n"}], "A", part="biology"),
        Problem("3", [{"role": "user", "content": "R"}], "B", part="biology"),
    ]
    assert task.test == task.train[:1]


@pytest.mark.parametrize(
    "response, verdict",
    [
        ("<answer>B</answer>", "correct"),
        ("<answer>\nB\n</answer>", "correct"),
        ("<answer> \tB </answer>", "correct"),
        ("<answer>A</answer> no: <answer>B</answer>", "correct"),
        ("<reasoning>A</reasoning><answer>B</answer> so A", "correct"),
        ("<answer>A <answer>B</answer>", "correct"),
        ("<answer>B</answer><answer>A</answer>", "wrong"),
        ("<answer>B</answer><answer></answer>", "wrong"),
        ("<answer>B.</answer>", "wrong"),
        ("<answer>b</answer>", "wrong"),
        ("<answer>(B)</answer>", "wrong"),
        ("<answer>B: option 1</answer>", "wrong"),
        ("<answer>AB</answer>", "wrong"),
        ("<answer>A</answer>", "wrong"),
        ("B", "no answer"),
        ("<answer>B", "no answer"),
        ("", "no answer"),
        ("<Answer>B</Answer>", "no answer"),
        ("<answer>" * 20_000, "no answer"),
    ],
)
def test_sciknoweval_answer_is_exactly_the_letter_in_the_last_answer_tag(response, verdict):
    (outcome,) = sciknoweval.grade_choices([Problem("p", [], "B")], [response])
    assert outcome == Outcome(int(verdict == "correct"), verdict)


def test_sciknoweval_read_takes_both_schemas(tmp_path):
    hub = tasks.read("sciknoweval", str(FIXTURES / "sciknoweval.jsonl"))
    assert len(hub.test) == 48 and hub.train == []
    assert [p.id for p in hub.test[:2]] == ["biology-0", "biology-1"]
    assert [o.reward for o in hub.verify(hub.test[:2], ["<answer>D</answer>"] * 2)] == [1, 0]
    rows = [{"idx": 7, "system": "S", "prompt": "P", "answer": "A"}]
    finished = tasks.read("sciknoweval", write(tmp_path / "test.jsonl", rows))
    assert [(p.id, p.messages[1]["content"], p.reference) for p in finished.test] == [("7", "P", "A")]


def test_sciknoweval_read_knows_the_hubs_schema_by_its_choices_although_it_has_a_prompt_column(tmp_path):
    rows = [{"prompt": {"default": "Given a question and four options, ..."}, **choice_row(number=i)} for i in range(2)]
    task = tasks.read("sciknoweval", write(tmp_path / "hub.jsonl", rows))
    assert [p.id for p in task.test] == ["physics-0", "physics-1"]


@needs_samples
@pytest.mark.parametrize("domain, sizes", [*zip(DOMAINS, [(450, 50), (1890, 210), (841, 94), (720, 80)])])
def test_sciknoweval_split_equals_the_published_one(domain, sizes, tmp_path):
    """The hub's rows, put together again from the published splits and mixed with rows that do not belong."""
    published = {
        split: list(tasks.rows(SAMPLES / "sciknoweval" / f"{domain}_{split}.jsonl")) for split in ("train", "test")
    }
    assert tuple(len(rows) for rows in published.values()) == sizes
    hub, noise = [], random.Random(1)
    for row in sorted(published["train"] + published["test"], key=lambda row: row["idx"]):
        question, options = row["prompt"].removesuffix("\nPlease reason step by step.").rsplit("\n\nA: ", 1)
        labels, texts = zip(*(part.split(": ", 1) for part in re.split(r"\n(?=[B-H]: )", f"A: {options}")))
        kind = "mcq-2-choices" if len(labels) == 2 else "mcq-4-choices"
        choices = {"text": list(texts), "label": list(labels)}
        hub.append(
            {"question": question, "choices": choices, "answerKey": row["answer"], "type": kind,
             "domain": domain.capitalize(), "details": {"level": "L3"}}
        )  # fmt: skip
        other = noise.choice(DOMAINS[: DOMAINS.index(domain)] + DOMAINS[DOMAINS.index(domain) + 1 :]).capitalize()
        hub += noise.choices(
            [
                choice_row(other, noise.random()), choice_row(domain, noise.random(), level="L2"),
                choice_row(domain.capitalize(), noise.random(), kind="true_or_false"),
            ],
            k=noise.randrange(3),
        )  # fmt: skip
    task = tasks.load("sciknoweval", domain, write(tmp_path / "hub.jsonl", hub))
    for split, problems in (("train", task.train), ("test", task.test)):
        ours = [(p.id, p.messages[-1]["content"], p.reference) for p in problems]
        assert ours == [(f"{domain}-{row['idx']}", row["prompt"], row["answer"]) for row in published[split]]
    finished = tasks.load("sciknoweval", domain, str(SAMPLES / "sciknoweval"))
    assert finished.notes[-1] == task.notes[-1]
    if domain == "physics":
        assert task.notes[-1] == "a constant answer scores on the test problems: physics 0.412 (B)"  # 33 of 80
