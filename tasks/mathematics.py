"""Mathematics: DAPO-Math-17k for training; MATH-500, AIME24, AIME25, AMC23 for evaluation."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tasks.answers import boxed, compare
from tasks.base import NO_TEXTS, SUFFIXES, Outcome, Problem, Task, each, get, hub_rows, one_line, rows
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

    def source(stem: str, repo: str, split: str) -> tuple[str, Iterable[dict]]:
        if not data:
            return repo, hub_rows(repo, split)
        files = [f for f in sorted(Path(data).glob(f"{stem}.*")) if f.suffix in SUFFIXES]
        return (str(files[0]), rows(files[0])) if files else ("", [])

    tests = []
    for part, repo in MATH_SETS.items():
        where, found = source(part, repo, "test")
        tests += _problems(found, where, part)
    if not tests:
        raise ValueError(f"{data} holds none of {', '.join(f'{part}.jsonl' for part in MATH_SETS)}")
    where, found = source("dapo*", DAPO, "train")
    if not where:
        raise ValueError(f"{data} holds no dapo*.jsonl or dapo*.parquet to train on")
    try:
        train, notes = _dapo(found, {_letters(p.data["problem"]) for p in tests})
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f"{where} is not in the schema of {DAPO} ({one_line(error)})") from error
    return _task(train, tests, notes)


def read(source: list[dict], path: str, note: str) -> Task:
    """The problems of one file, as test problems."""
    part = re.sub(r"\W+", "", Path(path).stem.lower())
    return _task([], _problems(source, path, part), [note])


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
        _problem({"problem": problem, "answer": answer}, "dapo", "dapo", i)
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
            prompt, model = get(row, f"dapo, row {i}", "prompt"), get(row, f"dapo, row {i}", "reward_model")
            answer = get(model, f"dapo, row {i}, reward_model", "ground_truth")
            yield prompt[0]["content"], _answer(answer, f"dapo, row {i}")


def _answer(value: object, where: str) -> str:
    """As text. A list or a dictionary is no answer, though its repr would be graded like one."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: the answer must be text or a number, not {value!r:.80}")
    return str(value)


def _bare_problem(text: str) -> str:
    """A prompt of DAPO's without the instruction around it."""
    return text.removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER).strip()


def _letters(problem: str) -> str:
    """A problem without spacing, case and markup, to find it again in another data set."""
    return re.sub(r"[^a-z0-9]+", "", problem.lower())


def _problems(found: Iterable[dict], where: str, part: str) -> list[Problem]:
    numbers = itertools.count()  # name the rows that have no id
    return each(found, where, lambda row, at: _problem(row, at, part, next(numbers)))


def _problem(row: dict, where: str, part: str, number: int) -> Problem:
    """A row of an evaluation set (problem or question; answer or a boxed solution) or of DAPO's schema."""
    if "reward_model" in row:
        ((text, answer),) = _dapo_pairs([row])
        text = _bare_problem(text)
    else:
        text = get(row, where, "problem", "question")
        answer = _answer(get(row, where, "answer", "solution"), where)
    if not isinstance(text, str):
        raise ValueError(f"{where}: the problem is no text")
    name = next((str(row[key]) for key in ("id", "unique_id") if row.get(key) is not None), f"{part}-{number}")
    answer = answer if boxed(answer) is None else boxed(answer)
    messages = [{"role": "user", "content": MATH_FORMAT.replace("{problem}", text)}]
    return Problem(name, messages, answer, {"problem": text}, part)


def _task(train: list[Problem], test: list[Problem], notes: list[str]) -> Task:
    sandbox = Sandbox(time_limit=MATH_SECONDS, memory_mb=4096, packages=True, warm=WARM)
    notes.append(f"sandbox: {sandbox.layers}")
    known: dict[tuple[str, str], str] = {}
    late: Counter[tuple[str, str]] = Counter()

    def equal(gold: str, answer: str) -> str:
        if (gold, answer) in known:
            return known[gold, answer]
        result = sandbox.call("from algebra import equal", "equal", [gold, answer])
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
        verdict = compare(gold, answer, equal) if answer else "no answer"
        return Outcome(int(verdict == "correct"), verdict)

    def verify(problems: list[Problem], responses: list[str]) -> list[Outcome]:
        return sandbox.run_many(grade, list(zip(problems, responses, strict=True)))

    return Task("math/dapo", train, [], test, verify, sandbox.close, NO_TEXTS, notes)
