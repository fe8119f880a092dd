"""The tasks by name. Every task, toy or real, is one `Task`: splits of `Problem`s and a `verify` function. A training loop
needs no more, so bringing your own task means writing a file whose `load()` returns one (`--task own --data FILE.py`).

    lcb           LiveCodeBench v6: programs run against tests; feedback is what went wrong
    sciknoweval   SciKnowEval L3, four domains: multiple choice, right or wrong and no text
    math          DAPO-Math-17k for training; MATH-500, AIME24, AIME25, AMC23 for evaluation
    toy           three tasks that a CPU can learn in minutes
"""

import importlib.util
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tasks.base import BadTask, Outcome, Problem, Task, each, rows

__all__ = ["BadTask", "Outcome", "Problem", "Task", "TASKS", "load", "read", "rows"]

TASKS = {  # task -> its subsets, the first one being the default
    "toy": ("trace", "code", "choice", "trace-rare", "trace-often", "trace-cold", "code-judge"),
    "lcb": ("v6",),
    "sciknoweval": ("biology", "chemistry", "material", "physics", "all"),
    "math": ("dapo",),
    "own": ("",),
}


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
        from tasks import toy

        return toy.load(subset)
    if task == "own":
        return _own(data)
    from tasks import livecodebench, mathematics, sciknoweval

    if task == "lcb":
        return livecodebench.load(data, train_tests, since, until)
    return sciknoweval.load(subset, data) if task == "sciknoweval" else mathematics.load(data)


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
    from tasks import livecodebench, mathematics, sciknoweval

    source = list(rows(path))
    if not source:  # a saved data set can be empty, a file cannot
        raise ValueError(f"{path} holds no row")
    note = f"all {len(source)} rows of {path}"
    if task == "lcb":
        return livecodebench.read(source, path, note, official)
    return (sciknoweval if task == "sciknoweval" else mathematics).read(source, path, note)
