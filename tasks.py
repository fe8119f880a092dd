"""What a task is: problems with prompts, and a verifier that turns a response into an outcome with a text.

Every task, toy or real, is one `Task`: three splits of `Problem`s and a `verify` function. A training loop needs no more,
so bringing your own task means building one `Task` and giving it a name in `load`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TASKS = {  # task -> its subsets, the first one being the default
    "toy": ("trace", "code", "choice"),
}


@dataclass(frozen=True)
class Problem:
    """One prompt x. `messages` are chat messages ({"role", "content"}), the last one from the user; `reference` is what
    a critique may see (never the student); `data` is whatever the task's own verifier needs."""

    id: str
    messages: list[dict[str, str]]
    reference: str = ""
    data: Any = None


@dataclass(frozen=True)
class Outcome:
    """The verifier's answer on one response: reward r in {0, 1}, a short verdict for the log, and the environment's
    text on a failure (what was wrong, in words the model can use); empty on a success."""

    reward: int
    verdict: str
    feedback: str = ""


@dataclass
class Task:
    """Problems and verifier. `verify(problems, responses)` grades one response per problem, in order. `close` releases
    what the verifier holds (worker processes)."""

    name: str
    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]
    verify: Callable[[list[Problem], list[str]], list[Outcome]]
    close: Callable[[], None] = field(default=lambda: None)

    def splits(self) -> str:
        return (
            f"{self.name}: {len(self.train)} train, {len(self.validation)} validation, {len(self.test)} test problems"
        )


def load(task: str, subset: str = "") -> Task:
    """The task by name. Raises ValueError with one line when the name or the subset is unknown."""
    if task not in TASKS:
        raise ValueError(f"task {task!r} has no loader: choose one of {', '.join(TASKS)}")
    subset = subset or TASKS[task][0]
    if subset not in TASKS[task]:
        raise ValueError(f"task {task} has no subset {subset!r}: choose one of {', '.join(TASKS[task])}")
    import toy  # the toy tasks import this file's types

    return toy.load(subset)
