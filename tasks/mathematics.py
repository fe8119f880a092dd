"""Mathematics: DAPO-Math-17k for training; MATH-500, AIME24, AIME25, AMC23 for evaluation."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tasks.answers import boxed, compare
from tasks.base import NO_TEXTS, SUFFIXES, Outcome, Problem, Task, each, get, hub_rows, rows
from tasks.sandbox import Sandbox

DAPO = "BytedTsinghua-SIA/DAPO-Math-17k"
DAPO_BEFORE = (  # the source's instruction around every problem; ours asks for a box instead
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
MATH_SECONDS = 2.5  # for one comparison, including its process
# Each worker loads the algebra once. Reading typical answers warms up the parser, and every call starts from that state.
WARM = f"""{Path(__file__).with_name("algebra.py").read_text()}
import sys
sys.modules["algebra"] = type(sys)("algebra")
sys.modules["algebra"].equal = equal
for text in TYPICAL:
    equal(text, text)
"""


def load(data: str) -> Task:
    """data: a folder with dapo*.jsonl or dapo*.parquet and a file for each evaluation set to use, such as math500.jsonl."""

    def sources(stem: str, repo: str, split: str) -> list[tuple[Iterable[dict], str]]:
        if not data:
            return [(hub_rows(repo, split), repo)]
        return [(rows(file), str(file)) for file in sorted(Path(data).glob(f"{stem}.*")) if file.suffix in SUFFIXES][:1]

    tests = []
    for part, repo in MATH_SETS.items():
        for source in sources(part, repo, "test"):
            tests += _problems(*source, part)
    if not tests:
        raise ValueError(f"{data} holds none of {', '.join(f'{part}.jsonl' for part in MATH_SETS)}")
    if not (dapo := sources("dapo*", DAPO, "train")):
        raise ValueError(f"{data} holds no dapo*.jsonl or dapo*.parquet to train on")
    return _task(*_dapo(*dapo[0], {_letters(problem.data) for problem in tests}), tests)


def read(path: str) -> Task:
    """The problems of one file, as test problems."""
    problems = _problems(rows(path), path, re.sub(r"\W+", "", Path(path).stem.lower()))
    return _task([], [f"all {len(problems)} rows of {path}"], problems)


def _dapo(found: Iterable[dict], where: str, evaluated: set[str]) -> tuple[list[Problem], list[str]]:
    """The unique problems of the 1.79 million rows, except those with conflicting answers and those in an evaluation set."""
    if hasattr(found, "with_format"):  # takes seconds; row by row takes a minute
        columns = [name for name in ("prompt", "reward_model") if name in found.column_names]
        tables = found.with_format("arrow").iter(100_000)
        found = (row for table in tables for row in table.select(columns).to_pylist())
    answers: dict[str, set[str]] = {}

    def add(row: dict) -> bool:
        """Adds a row. Returns whether it has the usual instruction."""
        problem, answer = _pair(row)
        answers.setdefault(problem, set()).add(answer)
        text = row["prompt"][0]["content"]
        return text.startswith(DAPO_BEFORE) and text.endswith(DAPO_AFTER)

    usual = each(found, where, add)
    kept = [(problem, *given) for problem, given in answers.items() if len(given) == 1]
    numbered = [_problem(f"dapo-{i}", *pair, "dapo") for i, pair in enumerate(kept)]
    train = [problem for problem in numbered if _letters(problem.data) not in evaluated]
    notes = [
        f"dapo: {len(usual)} rows, {len(answers)} unique problems; dropped {len(answers) - len(kept)} with conflicting "
        f"answers and {len(kept) - len(train)} that are in an evaluation set; {len(train)} left"
    ]
    if not all(usual):
        notes.append(f"dapo: {usual.count(False)} rows lack the source's usual instruction and are used as they are")
    return train, notes


def _pair(row: dict) -> tuple[str, str]:
    """(problem, answer) of a row of an evaluation set, or of DAPO without its instruction."""
    if "reward_model" in row:
        text = get(row, "prompt")[0]["content"].removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER).strip()
        answer = get(get(row, "reward_model"), "ground_truth")
    else:
        text, answer = get(row, "problem", "question"), get(row, "answer", "solution")
    # The repr of a list or a dictionary would be graded like an answer.
    if not isinstance(text, str) or isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise ValueError(f"the problem must be text and the answer text or a number, not {text!r:.60} and {answer!r:.60}")
    return text, str(answer).strip()


def _letters(problem: str) -> str:
    """A problem without spacing, case and markup, to find it in another data set."""
    return re.sub(r"[^a-z0-9]+", "", problem.lower())


def _problem(name: str, text: str, answer: str, part: str) -> Problem:
    reference = answer if boxed(answer) is None else boxed(answer)
    return Problem(name, [{"role": "user", "content": MATH_FORMAT.replace("{problem}", text)}], reference, text, part)


def _problems(found: Iterable[dict], where: str, part: str) -> list[Problem]:
    """The problems of an evaluation set, named by their id or their position."""
    given = each(found, where, lambda row: ([row.get("id"), row.get("unique_id")], *_pair(row)))
    names = [next(name for name in (*ids, f"{part}-{i}") if name is not None) for i, (ids, *_) in enumerate(given)]
    return [_problem(str(name), *pair, part) for name, (_, *pair) in zip(names, given)]


def _task(train: list[Problem], notes: list[str], test: list[Problem]) -> Task:
    sandbox = Sandbox(time_limit=MATH_SECONDS, memory_mb=4096, packages=True, warm=WARM)
    given: dict[tuple[str, ...], list[str]] = defaultdict(list)  # the verdicts on a pair; the last one counts

    def equal(*pair: str) -> str:
        """The verdict of algebra.equal(gold, answer)."""
        verdicts = given[pair]
        if verdicts and (verdicts[-1] != "time-out" or len(verdicts) > 2):  # a busy machine may have caused one time-out
            return verdicts[-1]
        result = sandbox.call("from algebra import equal", "equal", list(pair))
        if result.status == "ok":
            verdict = "correct" if result.value is True else "wrong"
        else:
            verdict = {"internal": "internal", "timeout": "time-out"}.get(result.status, "unreadable")
        if verdict != "internal":  # try again next time
            verdicts.append(verdict)
        return verdict

    def grade(pair: tuple[Problem, str]) -> Outcome:
        answer = boxed(pair[1])
        verdict = compare(pair[0].reference, answer, equal) if answer else "no answer"
        return Outcome(int(verdict == "correct"), verdict)

    def verify(problems: list[Problem], responses: list[str]) -> list[Outcome]:
        return sandbox.run_many(grade, list(zip(problems, responses, strict=True)))

    return Task("math/dapo", train, [], test, verify, sandbox.close, NO_TEXTS, [*notes, f"sandbox: {sandbox.layers}"])
