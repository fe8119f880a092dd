"""LiveCodeBench v6: programs run against tests; the feedback is what went wrong."""

import base64
import datetime
import io
import json
import pickle
import random
import re
import sys
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from operator import eq

import huggingface_hub

from harness import hub
from tasks.base import Outcome, Problem, Task, each, fetch, get, one_line, rows, text_of
from tasks.sandbox import Result, Sandbox, loads

LCB_FILE = ("livecodebench/code_generation_lite", "test6.jsonl")  # the v6 increment: 175 problems, 134 MB
TIME_LIMIT = 6.0  # seconds per test, the official checker's
FAILURE_LIMITS = 2  # time limits, after which a program that has failed is tested no further
FEEDBACK_CHARS = 2000
MAX_TESTS_BYTES = 1 << 30  # of one problem, decompressed
sys.set_int_max_str_digits(50_000)  # of an integer in arguments and results, as in the official checker
# Of several failures the first by this order is the verdict.
RANKS = {"internal": 0, "error": 1, "memory": 1, "output limit": 1, "time-out": 2, "wrong answer": 3}
STDIN_FORMAT = (
    "{question}\n\nWrite a Python 3 program that reads the input from standard input and prints the answer to standard "
    "output. Give the whole program in one ```python code block at the end of your answer."
)
FUNCTION_FORMAT = (
    "{question}\n\nSolve it by completing this Python 3 code, with the names as they are:\n\n```python\n{starter}\n```\n\n"
    "Give the whole code in one ```python code block at the end of your answer."
)


@dataclass(eq=False)
class Record:
    """One problem of LiveCodeBench. Its tests weigh megabytes, so they stay as they came until somebody grades."""

    id: str
    prompt: str
    function: str  # "" for a program that reads standard input
    public: str
    private: str
    train: tuple[int, ...] = ()  # of the private tests, those that give reward and feedback in training, by position
    bare: bool = False  # it has no private tests, so the public ones take their place


def bad(name: str, what: str, error: BaseException | None = None) -> ValueError:
    """What is wrong with a problem, in one line."""
    return ValueError(f"lcb problem {name}: {what}" + (f" ({one_line(error)})" if error else ""))


class StringUnpickler(pickle.Unpickler):
    """A pickle can call anything; this one may only hold plain values."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}")


def unpacked(text: str) -> str:
    """The JSON in base64 of zlib of a pickled string."""
    unpacker = zlib.decompressobj()
    raw = unpacker.decompress(base64.b64decode(text, validate=True), MAX_TESTS_BYTES)
    if not unpacker.eof:
        raise ValueError("the compressed tests are cut short or too long")
    text = StringUnpickler(io.BytesIO(raw)).load()
    if not isinstance(text, str):
        raise ValueError(f"the pickle holds {type(text).__name__}, not str")
    return text


@lru_cache(maxsize=128)  # both kinds for the problems of a batch
def decoded(record: Record, kind: str) -> list[dict]:
    """The "public" or "private" tests: JSON, as it is or packed. Raises ValueError naming the problem for others."""
    text = getattr(record, kind)
    try:
        try:
            tests = json.loads(text)
        except ValueError:
            tests = json.loads(unpacked(text))
        if not isinstance(tests, list):
            raise ValueError(f"the tests are {type(tests).__name__}, not a list")
        if not all(isinstance(test[key], str) for test in tests for key in ("input", "output")):
            raise ValueError("a test's input or output is no text")
    except Exception as error:  # whatever a damaged blob makes of base64, zlib, pickle and json
        raise bad(record.id, "its tests cannot be decoded", error) from None
    return tests


def tests_of(record: Record, use: str) -> list[dict]:
    """The tests that grade in a use. "train" and "all" are the private ones (the public ones of a record that has none), of
    which "train" takes half; "public" the public ones; "official" both together, as the official checker has it."""
    public = decoded(record, "public") if use == "official" else []
    private = decoded(record, "private") if use != "public" else []
    return public + private or decoded(record, "public")


def make_record(row: dict, where: str, use: str) -> Record:
    """Decodes the tests of a use once, so that a damaged one is found before training, and chooses the half that trains,
    seeded by the problem's name, where only private ones are used."""
    name = str(get(row, where, "question_id"))
    try:
        function = json.loads(row.get("metadata") or "{}").get("func_name") or ""
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise bad(name, "its metadata cannot be read", error) from None
    question, starter = get(row, where, "question_content"), row.get("starter_code") or ""
    public, private = get(row, where, "public_test_cases"), row.get("private_test_cases") or "[]"
    if not all(isinstance(text, str) for text in (question, starter, function, public, private)):
        raise bad(name, "every column of the source is text")
    prompt = (FUNCTION_FORMAT if function else STDIN_FORMAT).replace("{starter}", starter.rstrip())
    record = Record(name, prompt.replace("{question}", question.strip()), function, public, private)
    record.bare, tests = not decoded(record, "private"), tests_of(record, use)
    if not tests:
        raise bad(name, f"it has no {'public tests' if use == 'public' else 'tests'}")
    try:
        for test in tests if function else ():
            loads(test["output"])
            json.dumps(arguments(test["input"]))  # as the sandbox is given them
    except (ValueError, TypeError, RecursionError) as error:
        raise bad(name, "a test of a function is no JSON", error) from None
    if use in ("train", "all"):
        half = random.Random(f"0/{name}").sample(range(len(tests)), max(1, len(tests) // 2))
        record.train = tuple(sorted(half))
    return record


def load(data: str, train_tests: str, since: str, until: str) -> Task:
    """data: the JSONL file (test6.jsonl), or a folder with it or with a `datasets` cache."""
    try:
        since, until = (datetime.date.fromisoformat(day).isoformat() for day in (since, until))
    except ValueError as error:
        raise ValueError(f"--since and --until are dates such as 2025-02-01 ({error})") from None

    def download() -> Iterable[dict]:
        if not hub.cached(*LCB_FILE, "dataset") and (reason := hub.unreachable(*LCB_FILE, "dataset")):
            raise ConnectionError(reason)
        return rows(huggingface_hub.hf_hub_download(*LCB_FILE, repo_type="dataset"))

    source = rows(data) if data else fetch("/".join(LCB_FILE), download)
    use, dates = "train" if train_tests == "private" else "public", []

    def dated(row: dict, at: str) -> Record | None:
        dates.append(str(get(row, at, "contest_date"))[:10])
        return make_record(row, at, use) if since <= dates[-1] < until else None

    records = [record for record in each(source, data or LCB_FILE[1], dated) if record]
    note = f"lcb: {len(records)} of {len(dates)} problems, {since} <= contest_date < {until}"
    if not records:
        raise ValueError(f"{note}: widen the window with --since and --until")
    return make_task(records, note, "all", use)


def read(source: list[dict], path: str, note: str, official: bool) -> Task:
    """The problems of one file, as test problems. official: public and private tests together grade them."""
    use = "official" if official else "all"
    records = each(source, path, lambda row, at: make_record(row, at, use))
    return make_task(records, note + (", public and private tests" if official else ", private tests"), use)


def make_task(records: list[Record], note: str, test_use: str, train_use: str = "") -> Task:
    """The task of these records: the same problems train, if train_use is given, and evaluate."""
    sandbox = Sandbox(time_limit=TIME_LIMIT, memory_mb=2048, output_bytes=32 << 20, preamble=True, packages=True)

    def verify(problems: list[Problem], responses: list[str]) -> list[Outcome]:
        pairs = list(zip(problems, responses, strict=True))
        return sandbox.run_many(lambda pair: grade(sandbox, *pair), pairs)

    def problems(use: str) -> list[Problem]:
        return [Problem(r.id, [{"role": "user", "content": r.prompt}], data=(r, use)) for r in records if use]

    notes = [note, f"sandbox: {sandbox.layers}"]
    if bare := sum(record.bare for record in records):
        notes.insert(1, f"lcb: {bare} problems have no private tests; their public tests stand in for them")
    # There is no reference to write a critique with.
    return Task("lcb/v6", problems(train_use), [], problems(test_use), verify, sandbox.close, ("critique",), notes, threads=16)


def code_block(response: str) -> str | None:
    """The last complete fenced block that holds something and is marked as Python or not at all; if there is none, the
    last of any mark, as the official checker has it, and else None. Its lines lose the indentation of the fence. A new
    opening fence inside a block means that the one before was never finished."""
    last: dict[bool, str] = {}  # by whether the block is marked as another language's
    fence, mark, indent, lines = "", "", 0, []  # fence: what opened the block that we are in
    for line in response.split("\n"):
        text = line.strip()
        ticks = re.match(r"`{3,}|~{3,}|", text)[0]
        rest = text.removeprefix(ticks)
        if fence and ticks.startswith(fence) and not rest:
            if any(map(str.strip, lines)):
                last[not re.match(r"(py|pypy|python)[\d.]*(?!\w)|$", mark)] = "\n".join(lines) + "\n"
            fence = ""
        elif ticks and ticks[0] not in rest and not (fence and (not rest or ticks[0] != fence[0])):
            fence, mark, lines = ticks, rest.strip(" {.").lower(), []
            indent = len(line) - len(line.lstrip())
        else:
            lines.append(line[:indent].lstrip(" \t") + line[indent:])
    return last.get(False, last.get(True))


def same_output(printed: str, expected: str) -> bool:
    """The official checker's rule: as many lines, each equal when stripped, or equal number by number (0.50 = 0.5,
    1e3 = 1000, no tolerance); one word in a line and its text must be equal."""

    def same(line: str, wanted: str) -> bool:
        a, b = line.split(), wanted.split()
        try:
            return line.strip() == wanted.strip() or (len(a) == len(b) and all(map(eq, map(Decimal, a), map(Decimal, b))))
        except InvalidOperation:
            return False

    lines, wanted = (text.strip().split("\n") for text in (printed, expected))
    return len(lines) == len(wanted) and all(map(same, lines, wanted))


def arguments(text: str) -> list:
    """One JSON value per line; values hold spaces."""
    return [loads(line) for line in text.split("\n") if line.strip()]


def run_test(sandbox: Sandbox, record: Record, source: str, test: dict) -> tuple[str, Result]:
    """Verdict and result of one test. A program that prints far more than what is expected is stopped: reading 32 MB of
    garbage in each of 20 tests would take minutes."""
    most = 4 * len(test["output"].encode("utf-8", "replace")) + (64 << 10)
    if record.function:
        args = arguments(test["input"])
        owner = "Solution." if re.search(r"^class Solution\b", source, re.MULTILINE) else ""
        result = sandbox.call(source, owner + record.function, args, max_output=most)
    else:
        result = sandbox.run(source, test["input"], max_output=most)
    if result.status != "ok":
        return result.status.replace("timeout", "time-out"), result
    try:
        right = result.value == loads(test["output"]) if record.function else same_output(result.value, test["output"])
    except RecursionError:  # a value nested deeper than Python compares
        right = False
    if not right and result.error:  # a thread died, and what it should have printed is missing
        return "error", result
    return "passed" if right else "wrong answer", result


def grade(sandbox: Sandbox, problem: Problem, response: str) -> Outcome:
    """All tests of the problem's use, in order. A time-out or an error ends the half that it is in, and so does any
    failure once the tests have taken FAILURE_LIMITS time limits: the verdict is settled, and one rollout must not cost 20
    times the limit. Tests that pass all run, since only all of them earn the reward."""
    record, use = problem.data
    tests = tests_of(record, use)
    held_out = [i for i in range(len(tests)) if i not in record.train]
    halves = {"train": [record.train], "all": [record.train, held_out]}.get(use, [range(len(tests))])
    columns = {"held_out": 0} if use == "all" and held_out else {}
    source = code_block(response)
    if source is None:
        return Outcome(0, "no code", "Your answer contains no complete ```python code block.", columns)
    failed, start = [], time.monotonic()
    for half in halves:
        before = len(failed)
        for i in half:
            verdict, result = run_test(sandbox, record, source, tests[i])
            if verdict != "passed":
                failed.append((verdict, result, tests[i]))
            late = time.monotonic() - start > FAILURE_LIMITS * TIME_LIMIT
            if len(failed) > before and (late or verdict not in ("passed", "wrong answer")):
                break
        columns = dict.fromkeys(columns, int(len(failed) == before))  # in the end, of the held-out half
    if not failed:
        return Outcome(1, "passed", columns=columns)
    worst = min(RANKS[verdict] for verdict, *_ in failed)
    told = [item for item in failed if RANKS[item[0]] == worst]
    return Outcome(0, told[0][0], failure_text(told), columns)


def failure_text(failed: list[tuple[str, Result, dict]]) -> str:
    """What an environment's feedback says: the first error or time-out, or the two shortest wrong answers."""
    verdict, result, test = failed[0]
    if verdict == "internal":
        return ""
    if verdict == "time-out":
        text = f"Your program did not finish within {TIME_LIMIT:g} seconds on this input:\n{cut(test['input'], 800)}"
    elif verdict == "wrong answer":
        shortest = sorted(failed, key=lambda item: len(item[2]["input"]) + len(item[2]["output"]))[:2]
        form = "Wrong answer.\nInput:\n{}\nYour output:\n{}\nExpected output:\n{}"
        text = "\n\n".join(form.format(cut(t["input"]), cut(r.value), cut(t["output"])) for _, r, t in shortest)
    else:
        what = {"memory": "ran out of memory", "output limit": "printed too much"}.get(verdict, "stopped with an error")
        text = "\n".join([f"Your program {what}:", result.error, *result.frames, f"Input:\n{cut(test['input'], 600)}"])
    return text_of(text[:FEEDBACK_CHARS])


def cut(value: object, length: int = 260) -> str:
    """The beginning of a text, or of a value's JSON, and how much more there is."""
    text = (value if isinstance(value, str) else json.dumps(value, default=str)).strip()
    return text if len(text) <= length else f"{text[:length]} ... ({len(text) - length} characters more)"
