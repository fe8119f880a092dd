"""What a task is: problems with prompts, and a verifier that turns a response into an outcome with a text.

Every task, toy or real, is one `Task`: splits of `Problem`s and a `verify` function. A training loop needs no more, so
bringing your own task means writing a file whose `load()` returns one (`--task own --data FILE.py`). These stand below:

    lcb           LiveCodeBench v6: programs run against tests; feedback is what went wrong
    sciknoweval   SciKnowEval L3, four domains: multiple choice, right or wrong and no text
    math          DAPO-Math-17k for training; MATH-500, AIME24, AIME25, AMC23 for evaluation
"""

import base64
import datetime
import importlib.util
import io
import itertools
import json
import pickle
import random
import re
import sys
import textwrap
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from pathlib import Path
from typing import Any

import hub
from sandbox import Result, Sandbox, loads

TASKS = {  # task -> its subsets, the first one being the default
    "toy": ("trace", "code", "choice", "trace-rare", "trace-often", "trace-cold", "code-judge"),
    "lcb": ("v6",),
    "sciknoweval": ("biology", "chemistry", "material", "physics", "all"),
    "math": ("dapo",),
    "own": ("",),
}
NO_TEXTS = ("environment", "solution_first", "both")  # the feedback sources that want a verifier's text on a failure


@dataclass(frozen=True)
class Problem:
    """One prompt x. `messages` are chat messages ({"role", "content"}), the last one from the user; `reference` is what
    a critique may see (never the student); `data` is whatever the task's own verifier needs; `part` names the benchmark
    or domain that gets a row of its own in the results."""

    id: str
    messages: list[dict[str, str]]
    reference: str = ""
    data: Any = None
    part: str = ""


@dataclass(frozen=True)
class Outcome:
    """The verifier's answer on one response: reward r in {0, 1}, a short verdict for the log, and the environment's
    text on a failure (what was wrong, in words the model can use); empty on a success. The verdict "internal" says that
    grading itself failed: such a row is no failure of the model and takes no part in training. `columns` are further
    0-1 results that evaluation reports beside the reward."""

    reward: int
    verdict: str
    feedback: str = ""
    columns: dict[str, int] = field(default_factory=dict)


@dataclass
class Task:
    """Problems and verifier. `verify(problems, responses)` grades one response per problem, in order. `close` releases
    what the verifier holds (worker processes). Without validation problems a run is watched on the test problems and
    chooses nothing by them. `lacks`: the feedback sources that the task has not; `notes`: lines for the
    start of a run."""

    name: str
    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]
    verify: Callable[[list[Problem], list[str]], list[Outcome]]
    close: Callable[[], None] = lambda: None
    lacks: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def splits(self) -> str:
        train, validation, test = map(len, (self.train, self.validation, self.test))
        return f"{self.name}: {train} train, {validation} validation, {test} test problems"


def load(
    task: str,
    subset: str = "",
    data: str = "",
    train_tests: str = "private",
    since: str = "2025-02-01",
    until: str = "2025-05-01",
) -> Task:
    """The task by name. data: where its source lies, the hub if empty; each loader below says what it takes. train_tests,
    since and until are lcb's: which tests give reward and feedback in training, and the window since <= contest_date <
    until. Raises ValueError with one line for an unknown name or subset, and for data that cannot be read."""
    if task not in TASKS:
        raise ValueError(f"task {task!r} has no loader: choose one of {', '.join(TASKS)}")
    subset = subset or TASKS[task][0]
    if subset not in TASKS[task]:
        raise ValueError(f"task {task} has no subset {subset!r}: choose one of {', '.join(TASKS[task])}")
    if data and not Path(data).exists():
        raise ValueError(f"--data {data} does not exist")
    if task == "toy":
        if data:
            raise ValueError("--data means nothing to the toy tasks, which make their problems")
        import toy  # the toy tasks import this file's types

        return toy.load(subset)
    if task == "lcb":
        return _lcb(data, train_tests, since, until)
    if task == "own":
        return _own(data)
    return _sciknoweval(subset, data) if task == "sciknoweval" else _math(data)


class BadTask(ValueError):
    """A task file's verifier does not do what a verifier does."""


def _own(path: str) -> Task:
    """The Task that `load()` of a Python file returns. Raises ValueError with one line for a file without."""
    if not path.endswith(".py"):
        raise ValueError("--task own needs --data FILE.py, a file with a function load() that returns a tasks.Task")
    name = re.sub(r"\W+", "_", Path(path).stem)
    spec = importlib.util.spec_from_file_location(f"own_{name}", path)
    module = importlib.util.module_from_spec(spec)
    # Its classes have to be found by name in the worker processes of a verifier.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        task = module.load()
    except (Exception, SystemExit) as error:  # a file written as a script may leave by sys.exit
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(task, Task) or not task.train or not all(isinstance(p, Problem) for p in task.train):
        raise ValueError(f"{path}: load() must return a tasks.Task with training problems, and returned {task!r:.80}")
    for problem in (*task.train, *task.validation, *task.test):
        turns = problem.messages if isinstance(problem.messages, list) else []
        right = [isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in turns]
        if not right or not all(right):
            form = "a list of {role, content}, the last a user's"
            raise ValueError(f"{path}: problem {problem.id!r}: messages must be {form}")
    for split in (task.train, task.validation, task.test):
        again = [id for id, count in Counter(problem.id for problem in split).items() if count > 1]
        if again:
            raise ValueError(f"{path}: problem {again[0]!r} is there twice: a problem's id is its own within its split")
    task.name, task.verify = f"own/{name}", _checked(task.verify, path)
    task.verify(task.train[:2], ["", ""][: len(task.train)])  # what is wrong with it is best said before the run
    return task


def _checked(verify: Callable, path: str) -> Callable:
    """A task file's verifier that raises BadTask, with one line, where it fails or gives no outcomes."""

    def checked(problems: list[Problem], responses: list[str]) -> list[Outcome]:
        try:
            outcomes = verify(problems, responses)
        except Exception as error:
            mine = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
            at = f", line {mine[-1]}" if mine else ""
            raise BadTask(f"{path}{at}: verify() raised {type(error).__name__}: {error}") from error
        if not isinstance(outcomes, list) or len(outcomes) != len(responses):
            count = f"{len(outcomes)} outcomes" if isinstance(outcomes, list) else repr(outcomes)[:80]
            raise BadTask(
                f"{path}: verify() must return a list with an Outcome for each of {len(responses)} responses, not {count}"
            )
        for outcome in outcomes:
            if not isinstance(outcome, Outcome) or outcome.reward not in (0, 1):
                raise BadTask(f"{path}: verify() must return Outcomes with a reward of 0 or 1, not {outcome!r:.120}")
        return outcomes

    return checked


def read(task: str, path: str, official: bool = False) -> Task:
    """The problems of one file in the source's own schema, all of them as test problems, with the task's verifier.
    official: lcb is graded by public and private tests together, as its official checker does, else by the private ones.
    Raises ValueError with one line for a file that cannot be read and for tasks without files."""
    if task not in ("lcb", "sciknoweval", "math"):
        raise ValueError(f"task {task} has no files: choose lcb, sciknoweval or math")
    source = list(rows(path))
    if not source:  # a saved data set can be empty, a file cannot
        raise ValueError(f"{path} holds no row")
    note = f"all {len(source)} rows of {path}"
    if task == "lcb":
        use = "official" if official else "all"
        records = _each(source, path, lambda row, at: _record(row, at, use))
        note += ", public and private tests" if official else ", private tests"
        notes = [note]
        if lacking := sum(not _decoded(record, "private") for record in records):
            notes.append(f"lcb: {lacking} problems have no private tests; their public tests alone grade them")
        return _lcb_task([], [_lcb_problem(record, use) for record in records], notes)
    if task == "sciknoweval":
        if "choices" in source[0]:
            return _sciknoweval_task("file", [], *_choices(source, path))
        return _sciknoweval_task("file", [], _each(source, path, lambda row, at: _split_row(row, at, "")), [note])
    part = re.sub(r"\W+", "", Path(path).stem.lower())
    return _math_task([], _math_problems(source, path, part), [note])


# ---- Reading sources -----------------------------------------------------------------------------------------

SUFFIXES = (".jsonl", ".parquet", ".arrow")  # of a file that may lie in a folder given as --data


def rows(path: str | Path) -> Iterable[dict]:
    """The rows of a JSONL (one object per line, whatever its ending), parquet or arrow file, or of a folder: a data set
    saved or cached by `datasets`, or files of those kinds."""
    path = Path(path)
    if path.is_dir():
        import datasets

        if (path / "state.json").exists():
            return datasets.load_from_disk(str(path))
        files = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES)
        if not files:
            raise ValueError(f"{path} holds no .jsonl, .parquet or .arrow file")
        return (row for file in files for row in rows(file))
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if path.suffix in (".parquet", ".arrow"):
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said here, in one line
        read = datasets.Dataset.from_parquet if path.suffix == ".parquet" else datasets.Dataset.from_file
        try:
            return read(str(path))
        except Exception as error:  # the library's and pyarrow's errors share no base
            raise ValueError(f"{path} cannot be read: {_one_line(error)}") from None
    return _json_rows(path)


def _json_rows(path: Path) -> Iterator[dict]:
    number, row = 0, None
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"{path}, line {number} is no JSON object")
                    yield row
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text: {_one_line(error)}") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is no JSON: {_one_line(error)}") from None
    if row is None:
        raise ValueError(f"{path} is empty: it holds no row")


def _each(source: Iterable[dict], where: str, make: Callable[[dict, str], Any]) -> list:
    """make(row, "FILE, row 3") for every row; whatever a row of another schema makes of it is one clear line."""
    made, at = [], where
    try:
        for number, row in enumerate(source, 1):
            at = f"{where}, row {number}"
            made.append(make(row, at))
    except (TypeError, AttributeError, KeyError, IndexError, RecursionError) as error:
        raise ValueError(f"{at} is not in the schema of the source ({_one_line(error)})") from error
    return made


def _fetch(name: str, get: Callable[[], Any], reason: str = "") -> Any:
    """get(), or one line that says what could not be fetched, and why: for `reason`, if it was known before."""
    try:
        return get()
    except Exception as error:  # network, hub, cache and parsing errors share no base
        raise ValueError(
            f"{name} cannot be fetched ({reason or _one_line(error)}): give a local copy with --data"
        ) from None


def _hub(repo: str, split: str) -> Iterable[dict]:
    import datasets
    import huggingface_hub

    reason = hub.unreachable(repo, "README.md", "dataset")
    places = (huggingface_hub.constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places if reason else ():
            # A library that knows that it is offline reads what is in its cache, or says at once that it is not there.
            place.HF_HUB_OFFLINE = True
        return _fetch(repo, lambda: datasets.load_dataset(repo, split=split), reason)
    finally:
        for place, was in zip(places, before):
            place.HF_HUB_OFFLINE = was


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _get(row: dict, where: str, *names: str) -> Any:
    """The first of the columns that is there. Raises ValueError when none is."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{where}: column {' or '.join(names)} is missing")


# ---- LiveCodeBench -------------------------------------------------------------------------------------------

LCB_FILE = ("livecodebench/code_generation_lite", "test6.jsonl")  # the v6 increment: 175 problems, 134 MB
TIME_LIMIT = 6.0  # seconds per test, the official checker's
FEEDBACK_CHARS = 2000
MAX_TESTS_BYTES = 1 << 30  # of one problem, decompressed
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
class _Record:
    """One problem of LiveCodeBench. Its tests weigh megabytes, so they stay as they came until somebody grades."""

    id: str
    question: str
    starter: str
    function: str  # "" for a program that reads standard input
    public: str
    private: str
    train: tuple[int, ...] = ()  # of the private tests, those that give reward and feedback in training, by position


class _StringUnpickler(pickle.Unpickler):
    """A pickle can call anything; this one may only hold plain values."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}")


def _unpacked(text: str) -> str:
    """The JSON in base64 of zlib of a pickled string."""
    unpacker = zlib.decompressobj()
    raw = unpacker.decompress(base64.b64decode(text, validate=True), MAX_TESTS_BYTES)
    if not unpacker.eof:
        raise ValueError("the compressed tests are cut short or too long")
    text = _StringUnpickler(io.BytesIO(raw)).load()
    if not isinstance(text, str):
        raise ValueError(f"the pickle holds {type(text).__name__}, not str")
    return text


@lru_cache(maxsize=128)  # both kinds for the problems of a batch
def _decoded(record: _Record, kind: str) -> list[dict]:
    """The "public" or "private" tests: JSON, as it is or packed. Raises ValueError naming the problem for others."""
    text = getattr(record, kind)
    try:
        try:
            tests = json.loads(text)
        except ValueError:
            tests = json.loads(_unpacked(text))
        if not isinstance(tests, list):
            raise ValueError(f"the tests are {type(tests).__name__}, not a list")
        if not all(isinstance(test[key], str) for test in tests for key in ("input", "output")):
            raise ValueError("a test's input or output is no text")
    except Exception as error:  # whatever a damaged blob makes of base64, zlib, pickle and json
        raise ValueError(f"lcb problem {record.id}: its tests cannot be decoded ({_one_line(error)})") from None
    return tests


def _tests(record: _Record, use: str) -> list[dict]:
    """The tests of a use (see `_lcb_problem`): public ones, private ones (the public ones of a record that has none), or
    both."""
    public = _decoded(record, "public") if use in ("public", "official") else []
    private = _decoded(record, "private") if use != "public" else []
    return public + private or _decoded(record, "public")


def _record(row: dict, where: str, use: str) -> _Record:
    """Decodes the tests of `use` (see `_lcb_problem`) once, so that a damaged one is found before training, and chooses
    the half that trains, seeded by the problem's name, where private ones alone are used."""
    name = str(_get(row, where, "question_id"))
    try:
        function = json.loads(row.get("metadata") or "{}").get("func_name") or ""
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"lcb problem {name}: its metadata cannot be read ({_one_line(error)})") from None
    question, starter = _get(row, where, "question_content"), row.get("starter_code") or ""
    public, private = _get(row, where, "public_test_cases"), row.get("private_test_cases") or "[]"
    if not all(isinstance(text, str) for text in (question, starter, function, public, private)):
        raise ValueError(f"lcb problem {name}: every column of the source is text")
    record = _Record(name, question, starter, function, public, private)
    tests = _tests(record, use)
    if not tests:
        raise ValueError(f"lcb problem {name}: it has no {'public tests' if use == 'public' else 'tests'}")
    try:
        for test in tests if function else ():
            loads(test["output"])
            _arguments(test["input"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"lcb problem {name}: a test of a function is no JSON ({_one_line(error)})") from None
    if use in ("train", "all"):
        half = random.Random(f"0/{name}").sample(range(len(tests)), max(1, len(tests) // 2))
        record.train = tuple(sorted(half))
    return record


def _lcb_problem(record: _Record, use: str) -> Problem:
    """use: the tests that grade it. "train" is the half, "all" the private tests, "public" the public ones, "official"
    public and private ones together, as the official checker has it."""
    template = FUNCTION_FORMAT if record.function else STDIN_FORMAT
    text = template.replace("{starter}", record.starter.rstrip()).replace("{question}", record.question.strip())
    return Problem(record.id, [{"role": "user", "content": text}], data=(record, use))


def _lcb(data: str, train_tests: str, since: str, until: str) -> Task:
    """data: the JSONL file (test6.jsonl), or a folder with it or with a `datasets` cache."""
    try:
        since, until = (datetime.date.fromisoformat(day).isoformat() for day in (since, until))
    except ValueError as error:
        raise ValueError(f"--since and --until are dates such as 2025-02-01 ({error})") from None
    if data:
        source = rows(data)
    else:
        from huggingface_hub import hf_hub_download

        def download() -> Iterable[dict]:
            if not hub.cached(*LCB_FILE, "dataset") and (reason := hub.unreachable(*LCB_FILE, "dataset")):
                raise ConnectionError(reason)
            return rows(hf_hub_download(*LCB_FILE, repo_type="dataset"))

        source = _fetch("/".join(LCB_FILE), download)
    use = "train" if train_tests == "private" else "public"
    dates, lacking = [], 0

    def record(row: dict, at: str) -> _Record | None:
        nonlocal lacking
        dates.append(str(_get(row, at, "contest_date"))[:10])
        if not since <= dates[-1] < until:
            return None
        made = _record(row, at, use)
        lacking += not _decoded(made, "private")
        return made

    records = [r for r in _each(source, data or LCB_FILE[1], record) if r]
    notes = [f"lcb: {len(records)} of {len(dates)} problems, {since} <= contest_date < {until}"]
    if not records:
        raise ValueError(f"{notes[0]}: widen the window with --since and --until")
    if lacking:
        notes.append(f"lcb: {lacking} problems have no private tests; their public tests stand in for them")
    train, test = ([_lcb_problem(r, u) for r in records] for u in (use, "all"))
    return _lcb_task(train, test, notes)


def _lcb_task(train: list[Problem], test: list[Problem], notes: list[str]) -> Task:
    sandbox = Sandbox(time_limit=TIME_LIMIT, memory_mb=2048, output_bytes=32 << 20, preamble=True, packages=True)

    def verify(problems: list[Problem], responses: list[str]) -> list[Outcome]:
        pairs = list(zip(problems, responses, strict=True))
        return sandbox.run_many(lambda pair: _grade_program(sandbox, *pair), pairs)

    notes.append(f"sandbox: {sandbox.layers}")
    return Task("lcb/v6", train, [], test, verify, sandbox.close, lacks=("critique",), notes=notes)  # no reference


def code_block(response: str) -> str | None:
    """The last complete fenced block that holds something and names Python or no language; None if there is none. A new
    opening fence inside a block means that the one before was never finished."""
    last, fence, language, lines = None, "", "", []  # fence: what opened the block that we are in
    for line in response.split("\n"):
        text = line.strip()
        ticks = re.match(r"`{3,}|~{3,}|", text)[0]
        rest = text.removeprefix(ticks)
        if fence and ticks.startswith(fence) and not rest:
            if re.match(r"(pypy3?|python3?(\.\d+)?|py)(?!\w)|$", language) and any(map(str.strip, lines)):
                last = textwrap.dedent("\n".join(lines)) + "\n"
            fence = ""
        elif ticks and ticks[0] not in rest and not (fence and (not rest or ticks[0] != fence[0])):
            fence, language, lines = ticks, rest.strip(" {.").lower(), []
        else:
            lines.append(line)
    return last


def same_output(printed: str, expected: str) -> bool:
    """The official checker's rule: as many lines, each equal when stripped, or equal number by number (0.50 = 0.5,
    1e3 = 1000, no tolerance); one word in a line and its text must be equal."""
    lines, wanted = (text.strip().split("\n") for text in (printed, expected))
    return len(lines) == len(wanted) and all(map(_same_line, lines, wanted))


def _same_line(line: str, wanted: str) -> bool:
    if line.strip() == wanted.strip():
        return True
    words, wanted_words = line.split(), wanted.split()
    try:
        return len(words) == len(wanted_words) and all(Decimal(a) == Decimal(b) for a, b in zip(words, wanted_words))
    except InvalidOperation:
        return False


def _arguments(text: str) -> list:
    """One JSON value per line; values hold spaces."""
    return [loads(line) for line in text.split("\n") if line.strip()]


def _run_test(sandbox: Sandbox, record: _Record, source: str, test: dict) -> tuple[str, Result]:
    """Verdict and result of one test."""
    if record.function:
        args = _arguments(test["input"])
        owner = "Solution." if re.search(r"^class Solution\b", source, re.MULTILINE) else ""
        result = sandbox.call(source, owner + record.function, args)
    else:
        result = sandbox.run(source, test["input"])
    if result.status != "ok":
        return result.status.replace("timeout", "time-out"), result
    try:
        right = result.value == loads(test["output"]) if record.function else same_output(result.value, test["output"])
    except RecursionError:  # a value nested deeper than Python compares
        right = False
    if not right and result.error:  # a thread died, and what it should have printed is missing
        return "error", result
    return "passed" if right else "wrong answer", result


def _grade_program(sandbox: Sandbox, problem: Problem, response: str) -> Outcome:
    """All tests of the problem's use, in order. A time-out or an error ends the half that it stands in: the verdict and
    its text are settled, and one rollout must not cost 20 times the limit."""
    record, use = problem.data
    tests = _tests(record, use)
    held_out = [i for i in range(len(tests)) if i not in record.train]
    halves = {"train": [record.train], "all": [record.train, held_out]}.get(use, [range(len(tests))])
    columns = {"held_out": 0} if use == "all" and held_out else {}
    source = code_block(response)
    if source is None:
        return Outcome(0, "no code", "Your answer contains no complete ```python code block.", columns)
    failed = []
    for half in halves:
        before = len(failed)
        for i in half:
            verdict, result = _run_test(sandbox, record, source, tests[i])
            if verdict != "passed":
                failed.append((verdict, result, tests[i]))
            if verdict not in ("passed", "wrong answer"):
                break
        columns = dict.fromkeys(columns, int(len(failed) == before))  # in the end, of the held-out half
    if not failed:
        return Outcome(1, "passed", columns=columns)
    worst = min(RANKS[verdict] for verdict, *_ in failed)
    told = [item for item in failed if RANKS[item[0]] == worst]
    return Outcome(0, told[0][0], _failure_text(told), columns)


def _failure_text(failed: list[tuple[str, Result, dict]]) -> str:
    """What an environment's feedback says: the first error or time-out, or the two shortest wrong answers."""
    verdict, result, test = failed[0]
    if verdict == "internal":
        return ""
    if verdict == "time-out":
        text = f"Your program did not finish within {TIME_LIMIT:g} seconds on this input:\n{_cut(test['input'], 800)}"
    elif verdict == "wrong answer":
        shortest = sorted(failed, key=lambda item: len(item[2]["input"]) + len(item[2]["output"]))[:2]
        text = "\n\n".join(
            f"Wrong answer.\nInput:\n{_cut(t['input'])}\nYour output:\n{_cut(r.value)}\n"
            f"Expected output:\n{_cut(t['output'])}"
            for _, r, t in shortest
        )
    else:
        what = {"memory": "ran out of memory", "output limit": "printed too much"}.get(verdict, "stopped with an error")
        text = "\n".join([f"Your program {what}:", result.error, *result.frames, f"Input:\n{_cut(test['input'], 600)}"])
    return text[:FEEDBACK_CHARS].encode("utf-8", "replace").decode()  # a lone surrogate is no text for a tokenizer


def _cut(value: object, length: int = 260) -> str:
    text = (value if isinstance(value, str) else json.dumps(value, default=str)).strip()
    return text if len(text) <= length else f"{text[:length]} ... ({len(text) - length} characters more)"


# ---- SciKnowEval ---------------------------------------------------------------------------------------------

CHOICE_TYPES = ("mcq-4-choices", "mcq-2-choices")
CHOICE_SYSTEM = (
    "You answer multiple-choice questions. Write in this form:\n<reasoning>\nyour reasoning\n</reasoning>\n<answer>\n"
    "the letter of the right option\n</answer>\n\nBetween the answer tags stands one letter and nothing else, never the "
    "text of the option."
)


def _sciknoweval(subset: str, data: str) -> Task:
    """Level L3, questions with 4 or 2 choices, split 90/10 with seed 42 as SDPO does: 450/50, 1890/210, 841/94, 720/80.
    data: a file in the hub's schema; or a folder of finished splits with columns idx, system, prompt, answer, named
    biology_train.jsonl or biology/train.json and so on."""
    domains = TASKS["sciknoweval"][:4] if subset == "all" else (subset,)
    train, test = [], []
    if data and Path(data).is_dir():
        for domain in domains:
            for split, problems in (("train", train), ("test", test)):
                names = (f"{domain}{sep}{split}.{end}" for sep in "_/" for end in ("jsonl", "json"))
                files = [Path(data, name) for name in names if Path(data, name).is_file()]
                if not files:
                    raise ValueError(f"{data} holds neither {domain}_{split}.jsonl nor {domain}/{split}.json")
                problems += _each(rows(files[0]), str(files[0]), lambda row, at: _split_row(row, at, domain))  # noqa: B023
        return _sciknoweval_task(subset, train, test, [])
    found, notes = _choices(rows(data) if data else _hub("hicai-zju/SciKnowEval", "test"), data or "SciKnowEval")
    import datasets

    for domain in domains:
        kept = [problem for problem in found if problem.part == domain]
        if len(kept) < 10:
            raise ValueError(f"{data or 'the hub'} holds {len(kept)} L3 choice questions of {domain}: too few to split")
        split = datasets.Dataset.from_dict({"i": range(len(kept))}).train_test_split(test_size=0.1, seed=42)
        train += [kept[i] for i in split["train"]["i"]]
        test += [kept[i] for i in split["test"]["i"]]
    return _sciknoweval_task(subset, train, test, notes)


def _choices(found: Iterable[dict], where: str) -> tuple[list[Problem], list[str]]:
    """The hub's rows that belong to the benchmark of the paper, numbered within their domain, and a note on the others."""
    counts: Counter[str] = Counter()

    def problem(row: dict, at: str) -> Problem | None:
        domain = _get(row, at, "domain").lower()
        if _get(_get(row, at, "details"), at, "level") != "L3" or _get(row, at, "type") not in CHOICE_TYPES:
            return None
        choices = _get(row, at, "choices")
        options = "\n".join(f"{label}: {text}" for label, text in zip(choices["label"], choices["text"], strict=True))
        text = f"{_get(row, at, 'question')}\n\n{options}\nPlease reason step by step."
        messages = [{"role": "system", "content": CHOICE_SYSTEM}, {"role": "user", "content": text}]
        name = f"{domain}-{counts[domain]}" if row.get("id") is None else str(row["id"])
        counts[domain] += 1
        return Problem(name, messages, _get(row, at, "answerKey").strip(), part=domain)

    made = _each(found, where, problem)
    problems = [p for p in made if p]
    return problems, [f"sciknoweval: {len(problems)} of {len(made)} rows are L3 questions with 4 or 2 choices"]


def _split_row(row: dict, where: str, domain: str) -> Problem:
    """A row of SDPO's finished splits, prompts as they stand there."""
    messages = [{"role": "user", "content": _get(row, where, "prompt")}]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return Problem(str(_get(row, where, "idx", "id")), messages, _get(row, where, "answer").strip(), part=domain)


def _sciknoweval_task(subset: str, train: list[Problem], test: list[Problem], notes: list[str]) -> Task:
    letters: dict[str, Counter[str]] = {}
    for problem in test:
        letters.setdefault(problem.part or subset, Counter())[problem.reference] += 1
    commonest = ((part, counts.most_common(1)[0], counts.total()) for part, counts in letters.items())
    shares = ", ".join(f"{part} {count / total:.3f} ({letter})" for part, (letter, count), total in commonest)
    notes = [*notes, f"a constant answer scores on the test problems: {shares}"]
    return Task(f"sciknoweval/{subset}", train, [], test, grade_choices, lacks=NO_TEXTS, notes=notes)


def grade_choices(problems: list[Problem], responses: list[str]) -> list[Outcome]:
    """Exact match of the letter in the last <answer> tag; the verifier has no words on a failure."""
    outcomes = []
    for problem, response in zip(problems, responses, strict=True):
        answer, closed, _ = response.rpartition("<answer>")[2].partition("</answer>")
        tagged = "<answer>" in response and bool(closed)
        right = tagged and answer.strip() == problem.reference
        outcomes.append(Outcome(int(right), "correct" if right else "wrong" if tagged else "no answer"))
    return outcomes


# ---- Mathematics ---------------------------------------------------------------------------------------------

DAPO = "BytedTsinghua-SIA/DAPO-Math-17k"
DAPO_BEFORE = (  # what the source puts around every problem; ours asks for a box instead
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'
MATH_SETS = {
    "math500": "HuggingFaceH4/MATH-500",
    "aime24": "math-ai/aime24",
    "aime25": "math-ai/aime25",
    "amc23": "math-ai/amc23",
}
MATH_FORMAT = "{problem}\n\nReason step by step and put the final answer in \\boxed{}."
MATH_SECONDS = 2.5  # for one comparison, its process included
MAX_ANSWER_CHARS = 200
COMPARE = """
import logging
from math_verify import LatexExtractionConfig, parse, verify

logging.disable(logging.WARNING)  # that time-outs are off is meant

def equal(gold, answer):
    def read(text):  # a bare answer is not found as LaTeX; in a box it is. No time-outs: they need signals
        return parse("\\\\boxed{" + text + "}", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)
    return bool(verify(read(gold), read(answer), timeout_seconds=None))
"""


def _math(data: str) -> Task:
    """data: a folder with dapo*.jsonl or dapo*.parquet in the source's schema, and one file for each evaluation set that
    is to be used, such as math500.jsonl."""

    def source(stem: str, repo: str, split: str) -> tuple[str, Iterable[dict]]:
        if not data:
            return repo, _hub(repo, split)
        files = [f for f in sorted(Path(data).glob(f"{stem}.*")) if f.suffix in SUFFIXES]
        return (str(files[0]), rows(files[0])) if files else ("", [])

    tests = []
    for part, repo in MATH_SETS.items():
        where, found = source(part, repo, "test")
        tests += _math_problems(found, where, part)
    if not tests:
        raise ValueError(f"{data} holds none of {', '.join(f'{part}.jsonl' for part in MATH_SETS)}")
    where, found = source("dapo*", DAPO, "train")
    if not where:
        raise ValueError(f"{data} holds no dapo*.jsonl or dapo*.parquet to train on")
    try:
        train, notes = _dapo(found, {_letters(p.data["problem"]) for p in tests})
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f"{where} is not in the schema of {DAPO} ({_one_line(error)})") from error
    return _math_task(train, tests, notes)


def _dapo(rows: Iterable[dict], evaluated: set[str]) -> tuple[list[Problem], list[str]]:
    """Unique prompts of the 1.79 million rows; those with conflicting answers and those of the evaluation sets dropped."""
    answers: dict[str, set[str]] = {}
    total = bare = 0
    for total, (text, answer) in enumerate(_dapo_pairs(rows), 1):
        problem = _bare_problem(text)
        bare += not (text.startswith(DAPO_BEFORE) and text.endswith(DAPO_AFTER))
        answers.setdefault(problem, set()).add(answer.strip())
    kept = {problem: found for problem, found in answers.items() if len(found) == 1}
    overlap = {problem for problem in kept if _letters(problem) in evaluated}
    train = [
        _math_problem({"problem": problem, "answer": answer}, "dapo", "dapo", i)
        for i, (problem, (answer,)) in enumerate(kept.items())
        if problem not in overlap
    ]
    notes = [
        f"dapo: {total} rows, {len(answers)} unique problems; dropped {len(answers) - len(kept)} with conflicting answers "
        f"and {len(overlap)} that stand in an evaluation set; {len(train)} left"
    ]
    if bare:
        notes.append(
            f"dapo: {bare} rows lack the source's usual instruction around the problem and were taken as they are"
        )
    return train, notes


def _dapo_pairs(rows: Iterable[dict]) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of every row, in the arrow columns where there are any: two seconds for what takes minutes row
    by row."""
    if hasattr(rows, "with_format"):
        import pyarrow.compute as pc

        for table in rows.with_format("arrow").iter(100_000):
            prompt = pc.struct_field(pc.list_element(table["prompt"], 0), "content")
            yield from zip(prompt.to_pylist(), pc.struct_field(table["reward_model"], "ground_truth").to_pylist())
    else:
        for i, row in enumerate(rows, 1):
            prompt, model = _get(row, f"dapo, row {i}", "prompt"), _get(row, f"dapo, row {i}", "reward_model")
            yield prompt[0]["content"], str(_get(model, f"dapo, row {i}, reward_model", "ground_truth"))


def _bare_problem(text: str) -> str:
    """A prompt of DAPO's without the instruction around it."""
    return text.removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER).strip()


def _letters(problem: str) -> str:
    """A problem without spacing, case and markup, to find it again in another data set."""
    return re.sub(r"[^a-z0-9]+", "", problem.lower())


def _math_problems(found: Iterable[dict], where: str, part: str) -> list[Problem]:
    numbers = itertools.count()  # name the rows that have no id
    return _each(found, where, lambda row, at: _math_problem(row, at, part, next(numbers)))


def _math_problem(row: dict, where: str, part: str, number: int) -> Problem:
    """A row of an evaluation set (problem or question; answer or a boxed solution) or of DAPO's schema."""
    if "reward_model" in row:
        ((text, answer),) = _dapo_pairs([row])
        text = _bare_problem(text)
    else:
        text, answer = _get(row, where, "problem", "question"), str(_get(row, where, "answer", "solution"))
    if not isinstance(text, str):
        raise ValueError(f"{where}: the problem is no text")
    name = next((str(row[key]) for key in ("id", "unique_id") if row.get(key) is not None), f"{part}-{number}")
    answer = answer if boxed(answer) is None else boxed(answer)
    messages = [{"role": "user", "content": MATH_FORMAT.replace("{problem}", text)}]
    return Problem(name, messages, answer, {"problem": text}, part)


def _math_task(train: list[Problem], test: list[Problem], notes: list[str]) -> Task:
    warm = COMPARE + "equal('(1, 2]', '\\\\frac{1}{2} + \\\\sqrt{x}')"
    sandbox = Sandbox(time_limit=MATH_SECONDS, memory_mb=4096, packages=True, warm=warm)
    notes.append(f"sandbox: {sandbox.layers}")
    known: dict[tuple[str, str], str] = {}
    late: Counter[tuple[str, str]] = Counter()

    def equal(gold: str, answer: str) -> str:
        if (gold, answer) in known:
            return known[gold, answer]
        result = sandbox.call(COMPARE, "equal", [gold, answer])
        if result.status == "ok":
            verdict = "correct" if result.value is True else "wrong"
        else:
            verdict = {"internal": "internal", "timeout": "time-out"}.get(result.status, "unreadable")
        late[gold, answer] += verdict == "time-out"
        # A failed grader is not to be remembered, nor must a busy machine settle an answer for a whole run.
        if verdict != "internal" and (verdict != "time-out" or late[gold, answer] > 2):
            known[gold, answer] = verdict
        return verdict

    def grade(pair: tuple[Problem, str]) -> Outcome:
        gold, answer = pair[0].reference, boxed(pair[1])
        verdict = compare(gold, answer) or equal(gold, answer) if answer else "no answer"
        return Outcome(int(verdict == "correct"), verdict)

    def verify(problems: list[Problem], responses: list[str]) -> list[Outcome]:
        return sandbox.run_many(grade, list(zip(problems, responses, strict=True)))

    return Task("math/dapo", train, [], test, verify, sandbox.close, NO_TEXTS, notes)


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{} whose braces balance; None if there is none. One pass, whatever the text."""
    opened, last = [], None  # (where its content begins, whether it is a box)
    for brace in re.finditer(r"(\\boxed\s*)?\{|\\.|\}", text, re.DOTALL):
        if brace[0].endswith("{") and not brace[0].startswith("\\{"):
            opened.append((brace.end(), brace[1] is not None))
        elif brace[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box and (last is None or start > last[0]):
                last = start, brace.start()
    return None if last is None else text[slice(*last)].strip()


def compare(gold: str, answer: str) -> str | None:
    """The verdict where text or plain numbers settle it, without algebra; None where they do not."""
    if len(answer) > MAX_ANSWER_CHARS and gold != answer:
        return "too long"
    left, right = _tidy(gold), _tidy(answer)
    if left == right:
        return "correct"
    if re.search(r"\d\s+\d+(?!\d|\s*/)", right):  # "1 2" is not 12, whatever a parser makes of it
        return "wrong"
    bases = [re.fullmatch(r"(\w+?)_\{?(\w+)\}?", text) for text in (left, right)]
    if all(bases):  # numerals of some base: the parser does not read the base
        return "correct" if bases[0].groups() == bases[1].groups() else "wrong"
    if all(re.fullmatch(r"[+-]?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?", text, re.ASCII) for text in (left, right)):
        values = [Decimal(text.replace(",", "")) for text in (left, right)]
        if values[0] == values[1]:
            return "correct"
        if all(value == value.to_integral_value() for value in values):
            return "wrong"
    return None


def _tidy(text: str) -> str:
    """An answer without dollar signs, blanks that mean nothing, thin spaces between digits, and a full stop at its end."""
    text = text.strip().strip("$").replace("{.}", ".").replace("°", "^\\circ")
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"(?<=\d)(\\[,;! ]|~| )(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(\\\\|[.,;\s])+$", "", text)
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text)
