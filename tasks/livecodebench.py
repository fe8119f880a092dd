"""LiveCodeBench v6: programs run against tests; the feedback says what went wrong."""

import base64
import datetime
import io
import json
import pickle
import random
import re
import time
import zlib
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache

from tasks.base import Outcome, Problem, Task, each, get, hub_rows, one_line, rows, text_of
from tasks.sandbox import Result, Sandbox

LCB_REPO = "livecodebench/code_generation_lite"
LCB_FILE = "test6.jsonl"  # the v6 increment: 175 problems, 134 MB
TIME_LIMIT = 6.0  # seconds per test, the official checker's
FAILURE_LIMITS = 2  # a failed program is not tested any further after this many time limits
FEEDBACK_CHARS = 2000
MAX_TESTS_BYTES = 1 << 30  # for one problem, decompressed
RANKS = {"internal": 0, "time-out": 2, "wrong answer": 3}  # the failure of lowest rank is the verdict; all others have rank 1
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
    """One problem of LiveCodeBench. Its tests take megabytes, so they are decoded only for grading."""

    id: str
    prompt: str
    function: str  # "" for a program that reads standard input
    public: str
    private: str
    train: tuple[int, ...] = ()  # indices of the private tests that give reward and feedback in training
    bare: bool = False  # has no private tests; the public ones replace them


class StringUnpickler(pickle.Unpickler):
    """A pickle can call any function; this unpickler accepts only plain values."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}")


@lru_cache(maxsize=128)  # both kinds for the problems of a batch
def decoded(text: str) -> list[dict]:
    """The tests in a column: JSON, or base64 of zlib of a pickled JSON string. Damaged ones raise all kinds of exceptions."""
    try:
        tests = json.loads(text)
    except ValueError:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(base64.b64decode(text, validate=True), MAX_TESTS_BYTES)
        if not unpacker.eof:
            raise ValueError("the compressed tests are cut short or too long") from None
        tests = json.loads(StringUnpickler(io.BytesIO(raw)).load())
    if not isinstance(tests, list) or not all(isinstance(test[key], str) for test in tests for key in ("input", "output")):
        raise ValueError("the tests are not a list of input and output texts")
    return tests


def tests_of(record: Record, use: str) -> list[dict]:
    """The tests for a use: "train" (which grades by half of them) and "all" mean the private tests, or the public ones if there
    are none; "public" the public tests; "official" both, like the official checker."""
    public = decoded(record.public) if use == "official" else []
    private = decoded(record.private) if use != "public" else []
    return public + private or decoded(record.public)


def make_record(row: dict, use: str) -> Record:
    """The record of a row. Decodes its tests, to find a damaged one before training, and chooses the training half of the
    private ones, seeded by the problem's name. Raises ValueError with one line that names the problem."""
    name, question, public = (get(row, key) for key in ("question_id", "question_content", "public_test_cases"))
    starter, private = row.get("starter_code") or "", row.get("private_test_cases") or "[]"
    try:
        function = (json.loads(row.get("metadata") or "{}").get("func_name") or "").strip()
        prompt = (FUNCTION_FORMAT if function else STDIN_FORMAT).replace("{starter}", starter.rstrip())
        record = Record(str(name), prompt.replace("{question}", question.strip()), function, public, private)
        record.bare, tests = not decoded(private), tests_of(record, use)
        if not tests:
            raise ValueError("it has no tests")
        for test in tests if function else ():
            json.loads(test["output"])
            json.dumps(arguments(test["input"]))  # as the sandbox receives them
    except Exception as error:  # base64, zlib, pickle and json raise all kinds
        raise ValueError(f"lcb problem {name} cannot be graded ({one_line(error)})") from None
    if use in ("train", "all"):
        half = random.Random(f"0/{name}").sample(range(len(tests)), max(1, len(tests) // 2))
        record.train = tuple(sorted(half))
    return record


def load(data: str, train_tests: str, since: str, until: str) -> Task:
    """data: the JSONL file (test6.jsonl), or a folder with it or with a `datasets` cache."""
    try:
        since, until = (datetime.date.fromisoformat(day).isoformat() for day in (since, until))
    except ValueError as error:
        raise ValueError(f"--since and --until must be dates such as 2025-02-01 ({error})") from None
    use = "train" if train_tests == "private" else "public"

    def dated(row: dict) -> Record | None:
        return make_record(row, use) if since <= str(get(row, "contest_date"))[:10] < until else None

    found = each(rows(data) if data else hub_rows(LCB_REPO, file=LCB_FILE), data or LCB_FILE, dated)
    records = [record for record in found if record]
    note = f"lcb: {len(records)} of {len(found)} problems, {since} <= contest_date < {until}"
    if not records:
        raise ValueError(f"{note}: widen the window with --since and --until")
    return make_task(records, note, "all", use)


def read(path: str, official: bool) -> Task:
    """The problems of one file, as test problems. official: grade by public and private tests."""
    use = "official" if official else "all"
    records = each(rows(path), path, lambda row: make_record(row, use))
    graded_by = "public and private tests" if official else "private tests"
    return make_task(records, f"all {len(records)} rows of {path}, {graded_by}", use)


def make_task(records: list[Record], note: str, test_use: str, train_use: str = "") -> Task:
    """The task of these records. The same problems evaluate and, if train_use is given, train."""
    sandbox = Sandbox(time_limit=TIME_LIMIT, memory_mb=2048, output_bytes=32 << 20, preamble=True, packages=True)

    def verify(problems: list[Problem], responses: list[str]) -> list[Outcome]:
        return sandbox.run_many(lambda pair: grade(sandbox, *pair), list(zip(problems, responses, strict=True)))

    def problems(use: str) -> list[Problem]:
        return [Problem(r.id, [{"role": "user", "content": r.prompt}], data=(r, use)) for r in records if use]

    notes = [note, f"sandbox: {sandbox.layers}"]
    if bare := sum(record.bare for record in records):
        notes.insert(1, f"lcb: {bare} problems have no private tests; their public tests replace them")
    # A critique needs a reference answer, and there is none.
    return Task("lcb/v6", problems(train_use), [], problems(test_use), verify, sandbox.close, ("critique",), notes, threads=16)


def code_block(response: str) -> str | None:
    """The last complete, non-empty fenced block that is marked as Python or not marked; if there is none, the last with any
    mark, which the official checker accepts too; else None. Its lines lose the fence's indentation. An opening fence inside a
    block discards the unfinished block."""
    last: dict[bool, str] = {}  # by whether the block is marked as another language
    fence, mark, indent, lines = "", "", 0, []  # fence: the marks that opened the current block
    for line in response.split("\n"):
        text = line.strip() if fence else re.sub(r"^[^`]*(?=`{3,}py\w*$)", "", line.strip())  # it may open after </think>
        ticks = re.match(r"`{3,}|~{3,}|", text)[0]
        rest = text.removeprefix(ticks)
        if fence and ticks.startswith(fence) and not re.match(r"[\s\w{`~]", rest):  # text may follow: <|im_end|>
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
    """The official checker's rule: equally many lines, each equal when stripped or equal number by number (0.50 = 0.5,
    1e3 = 1000, no tolerance). A line with a word in it must be equal as text."""

    def same(line: str, wanted: str) -> bool:
        try:
            return line.strip() == wanted.strip() or [*map(Decimal, line.split())] == [*map(Decimal, wanted.split())]
        except InvalidOperation:
            return False

    lines, wanted = (text.strip().split("\n") for text in (printed, expected))
    return len(lines) == len(wanted) and all(map(same, lines, wanted))


def arguments(text: str) -> list:
    """One JSON value per line; values may contain spaces."""
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def run_test(sandbox: Sandbox, record: Record, source: str, test: dict) -> tuple[str, Result]:
    """Verdict and result of one test. A program that prints far too much is stopped, because reading it may take minutes."""
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
        right = result.value == json.loads(test["output"]) if record.function else same_output(result.value, test["output"])
    except RecursionError:  # the value is too deep to compare
        right = False
    if not right and result.error:  # a thread died before it printed
        return "error", result
    return "passed" if right else "wrong answer", result


def grade(sandbox: Sandbox, problem: Problem, response: str) -> Outcome:
    """Runs the tests of the problem's use, in order. A time-out or an error ends its half of the tests, and so does any failure
    once the tests have taken FAILURE_LIMITS time limits: the verdict is settled, and one rollout must not cost 20 limits."""
    record, use = problem.data
    tests = tests_of(record, use)
    held_out = [i for i in range(len(tests)) if i not in record.train]
    halves = [record.train] if use == "train" else [record.train, held_out]
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
        columns = dict.fromkeys(columns, int(len(failed) == before))  # the last half is the held-out one
    if not failed:
        return Outcome(1, "passed", columns=columns)
    failed.sort(key=lambda failure: RANKS.get(failure[0], 1))
    return Outcome(0, failed[0][0], failure_text(failed), columns)


def failure_text(failed: list[tuple[str, Result, dict]]) -> str:
    """The environment's feedback: the first failure, or the two shortest if all are wrong answers. Failures are sorted by rank."""
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
    """The beginning of a text or of a value's JSON, and the number of characters left out."""
    text = (value if isinstance(value, str) else json.dumps(value, default=str)).strip()
    return text if len(text) <= length else f"{text[:length]} ... ({len(text) - length} characters more)"
