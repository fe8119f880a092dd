"""Mathematics: DAPO-Math-17k for training; MATH-500, AIME24, AIME25, AMC23 for evaluation."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tasks.answers import boxed, compare
from tasks.base import NO_TEXTS, SUFFIXES, Outcome, Problem, Task, each, get, hub_rows, rows
from tasks.sandbox import Sandbox

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
# A worker reads the algebra once, as a module. Its parser learns the grammar by reading: every call starts from there.
WARM = f"""{Path(__file__).with_name("algebra.py").read_text()}
import sys
sys.modules["algebra"] = type(sys)("algebra")
sys.modules["algebra"].equal = equal
for text in TYPICAL:
    equal(text, text)
"""


def load(data: str) -> Task:
    """data: a folder with dapo*.jsonl or dapo*.parquet in the source's schema, and one file for each evaluation set that
    is to be used, such as math500.jsonl."""

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
    """Unique prompts of the 1.79 million rows; those with conflicting answers and those of the evaluation sets dropped."""
    if hasattr(found, "with_format"):  # seconds for what takes a minute row by row
        columns = [name for name in ("prompt", "reward_model") if name in found.column_names]
        tables = found.with_format("arrow").iter(100_000)
        found = (row for table in tables for row in table.select(columns).to_pylist())
    answers: dict[str, set[str]] = {}

    def add(row: dict) -> bool:
        """Takes a row, and says whether it has the usual instruction."""
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
        f"answers and {len(kept) - len(train)} that stand in an evaluation set; {len(train)} left"
    ]
    if not all(usual):
        lack = "lack the source's usual instruction around the problem and were taken as they are"
        notes.append(f"dapo: {usual.count(False)} rows {lack}")
    return train, notes


def _pair(row: dict) -> tuple[str, str]:
    """(problem, answer) of a row of an evaluation set (problem or question; answer or a boxed solution) or of DAPO's schema,
    without the instruction around its problem."""
    if "reward_model" in row:
        text = get(row, "prompt")[0]["content"].removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER).strip()
        answer = get(get(row, "reward_model"), "ground_truth")
    else:
        text, answer = get(row, "problem", "question"), get(row, "answer", "solution")
    # A list or a dictionary is no answer, though its repr would be graded like one.
    if not isinstance(text, str) or isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise ValueError(f"the problem must be text and the answer text or a number, not {text!r:.60} and {answer!r:.60}")
    return text, str(answer).strip()


def _letters(problem: str) -> str:
    """A problem without spacing, case and markup, to find it again in another data set."""
    return re.sub(r"[^a-z0-9]+", "", problem.lower())


def _problem(name: str, text: str, answer: str, part: str) -> Problem:
    reference = answer if boxed(answer) is None else boxed(answer)
    return Problem(name, [{"role": "user", "content": MATH_FORMAT.replace("{problem}", text)}], reference, text, part)


def _problems(found: Iterable[dict], where: str, part: str) -> list[Problem]:
    """The problems of an evaluation set, named by their id or else by their position."""
    given = each(found, where, lambda row: ([row.get("id"), row.get("unique_id")], *_pair(row)))
    names = [next(name for name in (*ids, f"{part}-{i}") if name is not None) for i, (ids, *_) in enumerate(given)]
    return [_problem(str(name), *pair, part) for name, (_, *pair) in zip(names, given)]


def _task(train: list[Problem], notes: list[str], test: list[Problem]) -> Task:
    sandbox = Sandbox(time_limit=MATH_SECONDS, memory_mb=4096, packages=True, warm=WARM)
    given: dict[tuple[str, ...], list[str]] = defaultdict(list)  # the verdicts on a pair, the last of which holds

    def equal(*pair: str) -> str:
        """algebra.equal(gold, answer) as a verdict."""
        verdicts = given[pair]
        if verdicts and (verdicts[-1] != "time-out" or len(verdicts) > 2):  # a busy machine must not settle an answer for a run
            return verdicts[-1]
        result = sandbox.call("from algebra import equal", "equal", list(pair))
        if result.status == "ok":
            verdict = "correct" if result.value is True else "wrong"
        else:
            verdict = {"internal": "internal", "timeout": "time-out"}.get(result.status, "unreadable")
        if verdict != "internal":  # a failed grader is not remembered
            verdicts.append(verdict)
        return verdict

    def grade(pair: tuple[Problem, str]) -> Outcome:
        answer = boxed(pair[1])
        verdict = compare(pair[0].reference, answer, equal) if answer else "no answer"
        return Outcome(int(verdict == "correct"), verdict)

    def verify(problems: list[Problem], responses: list[str]) -> list[Outcome]:
        return sandbox.run_many(grade, list(zip(problems, responses, strict=True)))

    notes = [*notes, f"sandbox: {sandbox.layers}"]
    return Task("math/dapo", train, [], test, verify, sandbox.close, NO_TEXTS, notes)
