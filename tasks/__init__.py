"""The tasks by name. Every task is one `Task`: splits of `Problem`s and a `verify` function. To bring your own, write a file
whose `load()` returns one (`--task own --data FILE.py`).

    lcb           LiveCodeBench v6: programs run against tests; feedback says what went wrong
    sciknoweval   SciKnowEval L3, four domains: multiple choice, without feedback text
    math          DAPO-Math-17k for training; MATH-500, AIME24, AIME25, AMC23 for evaluation
    reasoning_gym any generator of the library, which makes the problems and scores the answers
    toy           three tasks that a CPU can learn in minutes
"""

from importlib import import_module
from pathlib import Path

from tasks.base import BadTask, Outcome, Problem, Task, rows

__all__ = ["BadTask", "Outcome", "Problem", "Task", "TASKS", "load", "read", "rows"]

TASKS = {  # task -> its subsets; the first is the default
    "toy": ("trace", "code", "choice", "trace-often", "trace-dialect", "code-judge"),
    "lcb": ("v6",),
    "sciknoweval": ("biology", "chemistry", "material", "physics", "all"),
    "math": ("dapo",),
    "own": ("",),
    "reasoning_gym": ("spell_backward",),  # or any other generator of the library
}
MODULES = {"lcb": "livecodebench", "math": "mathematics"}  # the other modules have the task's name


def load(task: str, subset: str = "", data: str = "", train_tests: str = "private", since: str = "2025-02-01",
         until: str = "2025-05-01") -> Task:  # fmt: skip
    """Loads a task by name. data: the path of its source (see each loader), or "" for the hub. lcb reads train_tests and the
    window since <= contest_date < until. Raises ValueError with one line for an unknown name or unreadable data."""
    if task not in TASKS:
        raise ValueError(f"task {task!r} has no loader: choose one of {', '.join(TASKS)}")
    subset = subset or TASKS[task][0]
    if subset not in TASKS[task] and task != "reasoning_gym":
        raise ValueError(f"task {task} has no subset {subset!r}: choose one of {', '.join(TASKS[task])}")
    if data and not Path(data).exists():
        raise ValueError(f"--data {data} does not exist")
    if data and task == "toy":
        raise ValueError("--data does not apply to the toy tasks, which make their own problems")
    of = {"toy": (subset,), "lcb": (data, train_tests, since, until), "math": (data,), "own": (data,)}.get(task, (subset, data))
    return import_module(f"tasks.{MODULES.get(task, task)}").load(*of)


def read(task: str, path: str, official: bool = False) -> Task:
    """A task whose test problems are all rows of one file in the source's schema. official: grade lcb by public and private tests
    like its official checker, not by private ones. Raises ValueError with one line for an unreadable file or another task."""
    if task not in ("lcb", "sciknoweval", "math"):
        raise ValueError(f"task {task} has no files: choose lcb, sciknoweval or math")
    return import_module(f"tasks.{MODULES.get(task, task)}").read(path, *[official] * (task == "lcb"))
