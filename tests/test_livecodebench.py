"""LiveCodeBench: its files, which tests train, verdicts, feedback, and the rules of the official checker. With VPD_SAMPLE_DATA
naming a folder of published data, programs of real models are graded too: lcb_pool.jsonl with lcb_triples.jsonl (programs
and the official checker's verdicts)."""

import base64
import json
import os
import pickle
import random
import re
import subprocess
import sys
import time
import zlib
from collections import OrderedDict
from pathlib import Path

import pytest
from test_tasks import one_sandbox, refused, write

import tasks
from tasks import Outcome, Problem, livecodebench, tiny
from tasks.sandbox import Result, Sandbox

FIXTURE = str(tiny.FIXTURES / "lcb.jsonl")
SAMPLES = Path(os.environ.get("VPD_SAMPLE_DATA") or "nowhere")


@pytest.fixture(scope="module", autouse=True)
def sandboxes():
    """A program may take 2 s here."""
    with one_sandbox(livecodebench) as noted, pytest.MonkeyPatch.context() as patch:
        patch.setattr(livecodebench, "TIME_LIMIT", 2.0)
        yield noted


# ---- Loading -------------------------------------------------------------------------------------------------------


def pack(value) -> str:
    """The private tests as LiveCodeBench stores them."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def as_tests(pairs, kind: str = "stdin") -> str:
    return json.dumps([{"input": given, "output": wanted, "testtype": kind} for given, wanted in pairs])


def lcb_row(name="p", private=(("1\n", "1\n"),), public=(("0\n", "0\n"),), function="", date="2025-03-01"):
    """private: pairs of input and output, or the text of the column."""
    kind = "functional" if function else "stdin"
    return {
        "question_content": "Q?", "question_id": name, "contest_date": f"{date}T00:00:00", "starter_code": "",
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
    return f"Here it is.\n```python\n{code}\n```"


def half(problem: Problem) -> tuple[int, ...]:
    return problem.data[0].train


def verify(task, problem: Problem, *codes: str) -> list[Outcome]:
    return task.verify([problem] * len(codes), [fence(code) for code in codes])


def grade(*given) -> list[tuple[int, dict]]:
    """Reward and columns of each program."""
    return [(outcome.reward, outcome.columns) for outcome in verify(*given)]


def test_the_problems_of_the_window_train_and_evaluate_and_are_counted():
    for since, until, ids in (  # the fixture's days: 2025-02-01, 03-10, 04-30, 02-20, 05-01
        ("2025-02-01", "2025-05-01", ["fx_sum", "fx_half", "fx_rows", "fx_pairs"]),
        ("2025-02-02", "2025-05-02", ["fx_half", "fx_rows", "fx_pairs", "fx_late"]),
        ("20250430", "20250501", ["fx_rows"]),  # compared as text it would come after every day of 2025
    ):
        task = tasks.load("lcb", data=FIXTURE, since=since, until=until)
        assert [p.id for p in task.train] == [p.id for p in task.test] == ids and task.validation == []
        assert f"lcb: {len(ids)} of 5 problems, 2025-" in task.notes[0] and len(task.notes) == 2
    assert task.name == "lcb/v6" and task.lacks == ("critique",) and task.notes[1].startswith("sandbox: process per test, ")
    assert len(tasks.load("lcb", data=FIXTURE).test) == 4  # by default the paper's window
    with refused("0 of 5 problems", "--since"):
        tasks.load("lcb", data=FIXTURE, since="2025-06-01", until="2025-07-01")
    for option in ({"since": "2025-2-1"}, {"until": "tomorrow"}, {"since": ""}):
        with refused(repr(*option.values())):
            tasks.load("lcb", data=FIXTURE, **option)


def test_prompts_for_a_program_and_for_a_function(load_lcb):
    odd = "\nPrint {question} and {starter} and {x}. "
    row = {**lcb_row(function="f"), "question_content": odd, "starter_code": "class Solution:\n    def f(self):\n\n"}
    program, function = [p.messages[0]["content"] for p in load_lcb({**lcb_row(), "question_content": odd}, row).train]
    assert program.startswith(f"{odd.strip()}\n\nWrite a Python 3 program that reads the input from standard input")
    assert function.startswith(f"{odd.strip()}\n\nSolve it by completing")
    assert "```python\nclass Solution:\n    def f(self):\n```" in function
    assert all("in one ```python code block at the end" in text for text in (program, function))


def test_private_tests_may_be_plain_or_packed_and_public_ones_stand_in_for_them(load_lcb, tmp_path):
    pairs = [("1 2\n", "3\n"), ("é\n", "ß\n")]
    forms = {"a": as_tests(pairs), "b": pairs, "c": "[]", "d": pack("[]"), "e": ""}
    rows = [lcb_row(name, private=tests) for name, tests in forms.items()]
    for task in (load_lcb(*rows), tasks.read("lcb", write(tmp_path / "x.jsonl", rows))):
        assert task.notes[1] == "lcb: 3 problems have no private tests; their public tests replace them"
        found = [[(test["input"], test["output"]) for test in livecodebench.tests_of(p.data[0], "all")] for p in task.test]
        assert found == [pairs, pairs] + [[("0\n", "0\n")]] * 3


def damaged(marker: Path) -> dict[str, str]:
    encode = lambda raw: base64.b64encode(raw).decode()  # noqa: E731
    good, touch = pickle.dumps(as_tests([("1\n", "1\n")])), f"open({str(marker)!r}, 'w').close()"
    calls = {"system": f"cposix\nsystem\n(Vtouch {marker}", "eval": f"cbuiltins\neval\n(V{touch}",
             "open": f"cbuiltins\nopen\n(V{marker}\nVw"}  # pickles that call these
    unlike = {"an object": "{}", "numbers": "[1, 2]", "no JSON": "[{'input'", "too deep": "[" * 200_000,
              "no output": '[{"input": "1"}]', "a list for a text": '[{"input": ["1"], "output": "1"}]',
              "a list": [{"input": "1\n", "output": "1\n"}], "a harmless class": OrderedDict(a=1)}
    return {
        "no base64": "!!! not base64 !!!", "no zlib": encode(b"bytes"), "zlib cut short": encode(zlib.compress(good)[:-8]),
        "zlib of cut pickle": encode(zlib.compress(good[:-9])), **{name: pack(value) for name, value in unlike.items()},
        **{name: encode(zlib.compress(f"{call}\ntR.".encode())) for name, call in calls.items()},
    }  # fmt: skip


@pytest.mark.parametrize("name", damaged(Path("marker")))
def test_damaged_private_tests_are_one_line_with_the_problem_and_nothing_runs(name, tmp_path, load_lcb):
    marker = tmp_path / "marker"
    with refused("row 1: lcb problem bad_17 cannot be graded ("):
        load_lcb(lcb_row("bad_17", private=damaged(marker)[name]))
    assert not marker.exists()
    if name in ("system", "eval", "open"):  # which Python's own pickle does run
        pickle.loads(zlib.decompress(base64.b64decode(damaged(marker)[name])))
        assert marker.exists()


def test_tests_that_unpack_to_more_than_the_limit_are_refused(monkeypatch, load_lcb):
    monkeypatch.setattr(livecodebench, "MAX_TESTS_BYTES", 1_000_000)
    assert load_lcb(lcb_row(private=[("1\n", "0" * 990_000)])).test
    bomb = lcb_row("bomb", private=[("1\n", "0" * 3_000_000)])
    with refused("lcb problem bomb ", "too long"):
        load_lcb(bomb)
    assert len(bomb["private_test_cases"]) < 10_000


NO_JSON = [("[1, 2\n3", "1"), ("1", "one"), ("1", "[" * 20_000 + "]" * 20_000), ("9" * 60_000, "1")]


@pytest.mark.parametrize("change", [
    {"metadata": "{"}, {"metadata": "[]"}, {"metadata": '{"func_name": 3}'}, {"question_content": ["Q"]}, {"starter_code": ["Q"]},
    {"public_test_cases": "!!! not JSON"}, {"public_test_cases": '[{"input": "1"}]'}, {"public_test_cases": ["1"]},
    {"public_test_cases": "[]", "private_test_cases": ""}, {"contest_date": None},
    *({column: None} for column in ("question_id", "question_content", "public_test_cases")),
    *({"public_test_cases": as_tests([("1", "1"), pair]), "metadata": '{"func_name": "f"}', "private_test_cases": ""}
      for pair in NO_JSON),
])  # fmt: skip
def test_a_damaged_row_is_one_line_with_the_problem(change, load_lcb, tmp_path):
    (column, value), *_ = change.items()
    rows, words = [lcb_row("first"), {**lcb_row(), **change}], "row 2: lcb problem p cannot be graded ("
    words = f"row 2: column {column} is missing" if value is None else words
    with refused(words):
        load_lcb(*rows, train_tests="public")
    if column != "contest_date":  # which only the window needs
        with refused(words):
            tasks.read("lcb", write(tmp_path / "a.jsonl", rows), official=True)


# ---- Which tests train ---------------------------------------------------------------------------------------------

DIGITS = [(f"{i}\n", f"{i * i + 100}\n") for i in range(8)]


def test_the_training_half_depends_only_on_the_problem(load_lcb):
    for count, size in ((1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (7, 3)):  # half rounded down, but at least one
        for problem in load_lcb(*(lcb_row(f"p{i}", private=DIGITS[:count]) for i in range(6))).train:
            assert len({*half(problem)}) == size and {*half(problem)} <= {*range(count)}
    rows = [lcb_row(f"p{i}", private=DIGITS) for i in range(12)]
    first = {p.id: half(p) for p in load_lcb(*rows).train}
    random.seed(5)
    again = load_lcb(*rows[5::-1])
    assert {p.id: half(p) for p in again.train} == {p.id: half(p) for p in again.test} == dict(list(first.items())[:6])
    assert len(set(first.values())) > 6  # 70 halves of eight; the first four tests are nobody's habit
    assert {i for chosen in first.values() for i in chosen} == set(range(8))
    # Runs of an earlier day must stay comparable: these are not to change.
    assert [half(p) for p in tasks.load("lcb", data=FIXTURE).train] == [(1, 2), (1, 2), (1,), (0, 2)]


def lookup(pairs) -> str:
    """A program that knows these answers and no others."""
    return f"print({dict((a.strip(), b.strip()) for a, b in pairs)}.get(input().strip(), 'no'))"


def test_training_evaluation_and_reading_have_tests_of_their_own(load_lcb, tmp_path):
    (trained,), (tested,) = (task := load_lcb(lcb_row(private=DIGITS))).train, task.test
    seen = [DIGITS[i] for i in half(trained)]
    programs = lookup(DIGITS), lookup(seen), lookup([pair for pair in DIGITS if pair not in seen])
    assert grade(task, trained, *programs) == [(1, {}), (1, {}), (0, {})]
    held_out = lambda reward, held: (reward, {"held_out": held})  # noqa: E731
    assert grade(task, tested, *programs) == [held_out(1, 1), held_out(0, 0), held_out(0, 1)]
    assert task.verify([tested], ["no program"])[0].columns == {"held_out": 0}
    task = load_lcb(lcb_row(private=[("3\n", "4\n")]))  # of a single test nothing is held out
    assert grade(task, task.test[0], "print(int(input()) + 1)") == [(1, {})]
    # --train_tests public: the public tests train, all private ones evaluate
    public, row = [("50\n", "fifty\n")], lcb_row(private=DIGITS, public=[("50\n", "fifty\n")], date="1999-01-01")
    (trained,), (tested,) = (task := load_lcb(row, train_tests="public", since="1999-01-01")).train, task.test
    assert grade(task, trained, lookup(public), lookup(DIGITS)) == [(1, {}), (0, {})]
    assert grade(task, tested, lookup(public), lookup(DIGITS)) == [held_out(0, 0), held_out(1, 1)]
    assert "Expected output:\nfifty" in verify(task, trained, lookup(DIGITS))[0].feedback
    # A file is graded by the private tests, or as the official checker does by all; it has no window.
    programs = lookup(DIGITS + public), lookup(DIGITS), lookup(DIGITS[1:] + public)
    for official, rewards in ((True, [1, 0, 0]), (False, [1, 1, 0])):
        task = tasks.read("lcb", write(tmp_path / "pool.jsonl", [row]), official)
        graded = grade(task, task.test[0], *programs)
        assert [reward for reward, _ in graded] == rewards and all(bool(columns) != official for _, columns in graded)
        assert task.train == []


def test_training_feedback_never_shows_a_held_out_test(load_lcb, sandboxes):
    pairs = [(f"question{i}\n", f"answer{i}\n") for i in range(8)]
    task = load_lcb(*(lcb_row(f"p{i}", private=pairs) for i in range(4)))
    for problem in task.train:
        sandboxes.asked.clear()
        (outcome,) = task.verify([problem], [fence("print('nothing')")])
        assert sandboxes.asked == [pairs[i][0] for i in half(problem)]
        shown = {int(i) for i in re.findall(r"(?:question|answer)(\d)", outcome.feedback)}
        assert len(shown) == 2 and shown < set(half(problem))


# ---- Verdicts --------------------------------------------------------------------------------------------------------

RIGHT, ENDLESS = "print(int(input()) ** 2 + 100)", "while True:\n    print('x' * 100_000)"
VERDICTS = {
    RIGHT: "passed",
    f"{RIGHT}\nraise SystemExit(3)": "passed",
    f"block = bytearray(1 << 26)\n{RIGHT}": "passed",
    f"block = bytearray(3 << 30)\n{RIGHT}": "memory",
    f"print(' ' * 64_000, end='')\n{RIGHT}": "passed",
    f"print(' ' * 70_000, end='')\n{RIGHT}": "output limit",
    f"import threading\nt = threading.Thread(target=lambda: [][7])\nt.start()\nt.join()\n{RIGHT}": "passed",
    "import threading\nthreading.Thread(target=lambda: [][7]).start()": "error",  # what it should have printed is missing
    "print(deque([isqrt(int(input()) ** 4) + 100])[0])": "passed",  # imports of the preamble
    "x = int(input())\nprint(x * x + 100 + (x == 5))": "wrong answer",
    "input()": "wrong answer",
    "import sys\nsys.stdout.buffer.write(bytes([255, 254, 0, 128]))": "wrong answer",
    "import random\nprint(*map(chr, random.choices(range(32, 0xD000), k=5000)))": "wrong answer",
    "print(1 / 0)": "error",
    "def f(:": "error",
    "raise ValueError(chr(0xD800))": "error",  # whose text must be one that a tokenizer takes
    "while True: pass": "time-out",
    ENDLESS: "output limit",
}


def test_verdicts_and_the_reward_that_only_all_tests_earn(load_lcb, sandboxes):
    task = load_lcb(lcb_row(private=DIGITS))
    for (code, verdict), outcome in zip(VERDICTS.items(), verify(task, task.test[0], *VERDICTS)):
        assert outcome.verdict == verdict, code
        assert outcome.reward == (verdict == "passed") != bool(outcome.feedback), code
        assert len(outcome.feedback.encode()) <= 6000 and (outcome.columns["held_out"] == outcome.reward or "x == 5" in code)
    sandboxes.asked.clear()
    for outcome in task.verify(task.train * 3, ["print(1)", "```python\nprint(1)", "`" * 5000]):
        assert outcome == Outcome(0, "no code", "Your answer contains no complete ```python code block.")
    assert sandboxes.asked == []  # nothing runs without a program


@pytest.mark.parametrize("code, train, test", [
    ("raise ValueError", 1, 2),  # an error ends its half
    ("print('wrong')", 3, 7),  # wrong answers do not: the shortest two are shown
    ("import time; time.sleep(0.4); print('wrong')", 2, 3),  # but for slow ones: 2 x 0.4 > 2 limits of 0.25 s
    (f"import time; time.sleep(0.4); {RIGHT}", 3, 7),  # a right program may take its time
])  # fmt: skip
def test_an_error_or_much_time_ends_a_half_of_the_tests(code, train, test, load_lcb, sandboxes, monkeypatch):
    if "sleep" in code:
        monkeypatch.setattr(livecodebench, "TIME_LIMIT", 0.25)
    task = load_lcb(lcb_row(private=DIGITS[:7]))
    for problems, count in ((task.train, train), (task.test, test)):
        sandboxes.asked.clear()
        assert task.verify(problems, [fence(code)])[0].reward == (RIGHT in code) and len(sandboxes.asked) == count


def test_limits_of_output_a_failed_grader_and_closing(load_lcb, sandboxes, monkeypatch):
    task = load_lcb(lcb_row(private=[("1", "é" * 10)]), lcb_row("f", private=[("1", '"é"')], function="f"))
    before, sandboxes.most[:] = sandboxes.closed, []
    task.verify(task.train, [fence("print()"), fence("def f(x): return 'é' * 20_000")])
    assert sorted(sandboxes.most) == [4 * 4 + 65536, 4 * 20 + 65536]  # four times what is expected and 64 KiB
    monkeypatch.setattr(Sandbox, "run", lambda *_, **__: Result("internal", error="the worker died twice"))
    assert verify(task, task.train[0], "print(0)") == [Outcome(0, "internal", "")]
    task.close()
    assert sandboxes.closed == before + 1


KINDS = {"i": "internal", "e": "error", "m": "memory", "o": "output limit", "t": "time-out", "w": "wrong answer", "p": "passed"}


@pytest.mark.parametrize("ran, verdict", [
    ("wwww wi", "i"),  # what the grader failed on is no failure of the program
    ("wwww wt", "t"), ("wt we", "e"), ("wt wm", "m"), ("wt wo", "o"), ("we wm", "e"), ("wm we", "m"), ("wppp wwww", "w"),
])  # fmt: skip
def test_of_several_failures_the_gravest_is_the_verdict_and_the_feedback(ran, verdict, monkeypatch, load_lcb):
    """Of two halves, since all but a wrong answer end theirs; of one rank the first."""
    task, left, given = load_lcb(lcb_row(private=DIGITS)), list(ran.replace(" ", "")), []

    def run_test(*args):
        given.append(args[-1]["input"])
        return KINDS[left.pop(0)], Result("error", "said", "")

    monkeypatch.setattr(livecodebench, "run_test", run_test)
    (outcome,) = task.verify(task.test, [fence("print(1)")])
    assert (outcome.reward, outcome.verdict, left) == (0, KINDS[verdict], []) and bool(outcome.feedback) == (verdict != "i")
    if verdict not in "iw":
        assert outcome.feedback.endswith(f"nput:\n{given[ran.replace(' ', '').index(verdict)].strip()}")


# ---- Feedback --------------------------------------------------------------------------------------------------------


WRONG = "Wrong answer.\nInput:\n{}\nYour output:\n{}\nExpected output:\n{}".format
long = lambda letter, length, kept=260: f"{letter * kept} ... ({length - kept} characters more)"  # noqa: E731
TOO_LONG = [("wrong answer", Result("ok", "x" * 7000), letter * 5000, letter * 6000) for letter in "123"]
CUT = [WRONG(long(letter, 5000), long("x", 7000), long(letter, 6000)) for letter in "12"]
FRAMES = ("line 2, in a: return b(x)", "line 6, in c: return [][x]")
FEEDBACK = [  # verdict, result, input and expected output of each failure, the gravest first -> the feedback
    ([("wrong answer", Result("ok", f"said {given}\n\n"), given + "\n", wanted + "\n") for given, wanted in (
        ("1 1 1 1", "4"), ("2", "2"), ("3 3", "a very long expected output"), ("4 4 4", "12"),
    )], f"{WRONG('2', 'said 2', '2')}\n\n{WRONG('4 4 4', 'said 4 4 4', '12')}"),  # the two shortest
    ([("wrong answer", Result("ok", [1, "\ud800"]), "7", "8")], WRONG("7", '[1, "\\ud800"]', "8")),
    ([("wrong answer", Result("ok", "\ud800"), "7", "8")], WRONG("7", "?", "8")),  # a tokenizer takes no half of a pair
    (TOO_LONG[:1], CUT[0]), (TOO_LONG, "\n\n".join(CUT)),
    ([("time-out", Result("timeout"), "1" * 5000, "2")],
     f"Your program did not finish within 2 seconds on this input:\n{long('1', 5000, 800)}"),
    ([("error", Result("error", None, "IndexError: list index out of range (line 6)", FRAMES), "7\n", "8\n")],
     "Your program stopped with an error:\nIndexError: list index out of range (line 6)\n" + "\n".join(FRAMES) + "\nInput:\n7"),
    ([("error", Result("error", None, "E: v", ("y" * 900,) * 3), "7", "8")],
     ("Your program stopped with an error:\nE: v" + f"\n{'y' * 900}" * 3)[:2000]),
    ([("memory", Result("memory", None, "MemoryError"), "7", "8")], "Your program ran out of memory:\nMemoryError\nInput:\n7"),
    ([("output limit", Result("output limit", None, "more"), "7", "8")], "Your program printed too much:\nmore\nInput:\n7"),
    ([("internal", Result("internal", None, "died"), "7", "8")], ""),
]  # fmt: skip


@pytest.mark.parametrize("failed, feedback", FEEDBACK)
def test_feedback_tells_what_went_wrong_in_at_most_2000_characters(failed, feedback):
    tests = [(verdict, result, {"input": given, "output": wanted}) for verdict, result, given, wanted in failed]
    assert livecodebench.failure_text(tests) == feedback


# ---- Rules -----------------------------------------------------------------------------------------------------------

SAME = [
    ("5\n", "5"), ("\n\n5\n\n", "5\n"), (" 5 \t\r\n6\r\n", "5\n6"), ("0.50", "0.5"), ("1e3", "1000"), ("1E+3 2.0", "1000 2"),
    ("-0", "0"), ("+7", "7"), ("007", "7"), ("1_000", "1000"), ("٣", "3"),  # what Decimal reads, as in the official checker
    ("1  2", "1 2"), ("inf", "Infinity"), ("nan", "nan"), ("", ""), ("", "\n \n"), ("x 0.5", "x 0.5"), ("0.5\nx", "0.50\nx"),
    ("1e999999999", "10e999999998"), ("1 " * 300_000, "1.0 " * 300_000),
]  # fmt: skip
OTHER = [
    ("nan", "NaN"), ("sNaN", "1"), ("sNaN 1", "sNaN 2"), ("0.1", "0.10000000000000001"), ("1." + "0" * 40 + "1", "1"),
    ("10000000000000000001", "10000000000000000000"), ("5", "6"), ("", "0"), ("0", ""), ("1 2", "1\n2"), ("1\n\n2", "1\n2"),
    ("1\n2\n3", "1\n2"), ("1\n2", "1\n2\n3"), ("1 2", "1 2 3"), ("1 2 3", "1 2"), ("YES", "Yes"), ("a  b", "a b"),
    ("x 0.50", "x 0.5"), ("1,000", "1000"), ("0x10", "16"), ("1/2", "0.5"), ("True", "1"), ("1e999999999", "1"),
    ("1e-999999999", "0"), ("1e99999999999999999999999", "1"), ("9" * 300_000, "8" * 300_000),
]  # fmt: skip


def test_outputs_are_equal_line_by_line_as_text_or_as_numbers_and_compared_fast():
    for pairs, same in ((SAME, True), (OTHER, False)):
        for printed, expected in pairs:
            start = time.process_time()
            assert livecodebench.same_output(printed, expected) is same, (printed[:50], expected[:50])
            assert time.process_time() - start < 3


LONG = "7" * 30_000  # an argument: beyond Python's own limit, within the official checker's
RESULTS = {  # what a function returns, and what is expected, by verdict
    "passed": [
        ("(1, 2)", "[1, 2]"), ("[[1, 2]]", "[[1, 2]]"), ("True", "1"), ("1", "true"), ("2.0", "2"), ("None", "null"),
        ("{'a': [1]}", '{"a": [1]}'), ("'''a\n   \nb'''", '"a\\n   \\nb"'), ("10 ** 49_999", "1" + "0" * 49_999),
        ("[x % 10**9, type(x).__name__, len(str(x))]", '[777777777, "int", 30000]'),
        ("functools.reduce(lambda v, _: [v], range(399), [])", "[" * 400 + "]" * 400),
    ],
    "wrong answer": [
        ("0.1 + 0.2", "0.3"), ("'1'", "1"), ("None", "0"), ("[]", "null"), ("print(1)", "1"), ("10 ** 5000 + 1", "1" + "0" * 5000),
        ("float('nan')", "NaN"), ("type('Yes', (list,), {'__eq__': lambda *_: True})([3])", "[1]"),
        ("functools.reduce(lambda v, _: [v], range(399), [])", "[" * 401 + "]" * 401),
    ],
    "error": [
        ("[(1, 2)]", "[[1, 2]]"), ("{1: 2}", '{"1": 2}'), ("input()", "1"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("verdict", RESULTS)
def test_results_of_functions(verdict, load_lcb):
    cases = RESULTS[verdict]
    task = load_lcb(*(lcb_row(f"{i}", private=[(LONG, wanted)], function="f") for i, (_, wanted) in enumerate(cases)))
    outcomes = task.verify(task.train, [fence(f"def f(x):\n    return {value}") for value, _ in cases])
    for (value, _), outcome in zip(cases, outcomes):
        assert (outcome.verdict, outcome.reward) == (verdict, int(verdict == "passed")), value


METHOD, BODY = "    def join(self, words: List[str], k: int) -> str:\n        ", "return '/'.join([*words, str(k)])"
OWNERS = {  # a program that has the function, or not where it is looked for -> what is wrong
    f"class Solution:\n{METHOD}{BODY}": "",
    f"def join(words, k):\n    {BODY}": "",
    f"class Solutions: pass\ndef join(words, k):\n    {BODY}": "",
    f"class Solution(object):\n    @staticmethod\n    def join(words, k):\n        {BODY}": "",
    f"class Solution: pass\ndef join(words, k):\n    {BODY}": "AttributeError: 'Solution' object has no attribute 'join'",
    f"class Answer:\n{METHOD}{BODY}": "NameError: name 'join' is not defined",
    "class Solution:\n    def join(self, words): return ''": "TypeError",
}


def test_functions_are_found_with_and_without_their_class(load_lcb):
    task = load_lcb(lcb_row(private=[('["a b", "c"]\n2', '"a b/c/2"')], function="join"))
    for (code, fault), outcome in zip(OWNERS.items(), verify(task, task.train[0], *OWNERS)):
        assert outcome.verdict == ("error" if fault else "passed") and fault in outcome.feedback, code


PROGRAMS = {  # the last complete block for Python -> responses
    "a\n": [
        *(f"```{mark}\na\n```" for mark in (
            "python", "", "py", "python3", "Python", "python title=x", " python", "{.python}", "py3", "python3.11", "pypy3",
            "Python 3", "sol", "text", "python_code", "c++",  # the official checker takes any mark
        )),
        "```python\na\n```\n```text\n3\n```", "```python\na\n```\n```python\nb", "```python\na\n```\n```python\n\n```",
        "the ```python block```\n```python\na\n```", "````python\na\n````", "~~~python\na\n~~~",
        "</think>```python\na\n```", "So: ```python\na\n```<|im_end|>", "```python\na\n```.",
    ],
    "b\n": [
        "```python\na\n```\nand\n```python\nb\n```", "```py3\na\n```\nand\n```\nb\n```", "```sol\na\n```\n```text\nb\n```",
        "```python\na\n```python\nb\n```", "```text\n3\n```python\nb\n```",  # the first was never finished
        "<think>\n```python\na\n```\n</think>\n```python\nb\n```",
    ],
    None: ["", "a", "```python\na", "```python\n```", "```python print(1)```"],
    "if a:\n\n    b\n": ["1. so:\n   ```python\n   if a:\n\n       b\n   ```"],
    "if a:\n\tb\n": ["- so:\n\t```python\n\tif a:\n\t\tb\n\t```"],
    "s = '''x\ny\n  \nz'''\n": ["  ```python\n  s = '''x\n y\n    \nz'''\n  ```"],  # lines lose the fence's two, at most
    "s = '''a\n \t \n  \n'''\n": ["```python\ns = '''a\n \t \n  \n'''\n```"],
    "a\r\nb\r\n": ["```python\r\na\r\nb\r\n```\r\n"],  # which Python reads as it is
    "s = '```'\nb\n": ["```python\ns = '```'\nb\n```"],
    "a\n```\nb\n": ["````python\na\n```\nb\n````"],
}  # fmt: skip


def test_program_is_the_last_complete_block_for_python():
    for code, responses in PROGRAMS.items():
        for response in responses:
            assert livecodebench.code_block(response) == code, response


CHECKER_FAULTS = {  # right programs that the official checker's mock of standard input fails
    *((name, "o1-preview") for name in "abc301_b abc310_d abc318_c abc325_f abc328_e abc342_d".split()),
    *((name, "o1-mini") for name in "abc303_d abc315_b abc338_d".split()),
}


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="VPD_SAMPLE_DATA names no folder")
def test_verdicts_on_802_real_programs_agree_with_the_official_checker(monkeypatch):
    monkeypatch.setattr(livecodebench, "TIME_LIMIT", 6.0)
    task = tasks.read("lcb", str(SAMPLES / "lcb_pool.jsonl"), official=True)
    problems = {p.id: p for p in task.test}
    triples, faults, other, slow = list(tasks.rows(SAMPLES / "lcb_triples.jsonl")), {}, [], []
    outcomes = task.verify([problems[t["question_id"]] for t in triples], [fence(t["code"]) for t in triples])
    for triple, outcome in zip(triples, outcomes):
        name = triple["question_id"], "-".join(triple["model"].split("-")[:2])
        if outcome.reward == triple["official_head_pass"]:
            continue
        if name in CHECKER_FAULTS:
            faults[name] = (triple, outcome)
        else:  # programs near the time limit may go either way
            (slow if triple["slow"] or outcome.verdict == "time-out" else other).append((name, outcome))
    agree = len(triples) - len(faults) - len(slow) - len(other)
    assert len(triples) == 802
    assert CHECKER_FAULTS - {("abc328_e", "o1-preview")} <= set(faults)  # that one takes 5.6 s of 6
    assert agree + len(slow) >= 791 and len(slow) <= 5 and len(other) <= 2, other
    for triple, outcome in faults.values():
        assert outcome.reward == 1  # we pass what the checker fails, and Python itself agrees:
        for test in livecodebench.tests_of(problems[triple["question_id"]].data[0], "official"):
            command = [sys.executable, "-I", "-c", triple["code"]]
            ran = subprocess.run(command, input=test["input"], capture_output=True, text=True, timeout=60, check=True)
            assert livecodebench.same_output(ran.stdout, test["output"])
