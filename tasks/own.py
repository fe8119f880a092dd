"""Your own task: a Python file whose load() returns a Task. An error in the file or its verifier becomes one line that names
the file's line, and outcomes of other libraries' types become plain numbers and text."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

from tasks.base import BadTask, Outcome, Problem, Task, one_line, text_of

VERIFY_SECONDS = 600.0  # a verifier that takes longer counts as hanging


class Fault(BaseException):
    """A mistake of verify(). Not an Exception, so that the verifier does not catch it."""


def load(path: str) -> Task:
    """The Task that the file's load() returns. Raises BadTask with one line if there is none or it is malformed."""
    if not path.endswith(".py"):
        raise BadTask("--task own needs --data FILE.py, whose function load() returns a tasks.Task")
    name = re.sub(r"\W+", "_", Path(path).stem)
    spec = importlib.util.spec_from_file_location(f"own_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a verifier's worker processes look for its classes there
    with one_line_of(path, spec.origin):
        spec.loader.exec_module(module)
        task = module.load()
    splits = {name: getattr(task, name, ()) for name in ("train", "validation", "test")}
    listed = all(isinstance(s, (list, tuple)) and all(isinstance(p, Problem) for p in s) for s in splits.values())
    if not isinstance(task, Task) or not task.train or not listed:
        raise BadTask(f"{path}: load() must return a tasks.Task with training problems, not {task!r:.80}")
    for field, kinds in {"notes": (list, tuple), "lacks": (list, tuple), "close": Callable}.items():
        if not isinstance(value := getattr(task, field), kinds):
            raise BadTask(f"{path}: the task's {field} cannot be {value!r:.80}")
    task.notes = [*map(str, task.notes)]
    for split, problems in splits.items():
        setattr(task, split, [problem_of(problem, path) for problem in problems])
        for id, count in Counter(str(problem.id) for problem in problems).most_common(1):
            if count > 1:
                raise BadTask(f"{path}: {split} has problem {id!r} twice; ids must be unique within a split")
    task.name = text_of(task.name) if isinstance(task.name, str) and task.name.strip() else name
    task.verify, task.threads = checked(task.verify, path, spec.origin), 0  # the time limit needs the main thread
    task.close = reported(one_line_of(path, spec.origin, "close() raised ")(task.close))
    task.verify(task.train[:2], ["", ""][: len(task.train)])  # a broken verifier should fail before the run
    return task


def problem_of(problem: Problem, path: str) -> Problem:
    """The problem with texts that a tokenizer accepts. Raises BadTask for a malformed one."""
    try:
        messages = [{**message, "content": text_of(message["content"])} for message in problem.messages]
        if isinstance(problem.id, str | int) and messages[-1]["role"] == "user" and all("role" in message for message in messages):
            return replace(problem, messages=messages, reference=text_of(problem.reference))
    except (TypeError, AttributeError, LookupError):
        pass
    must = "the id must be text or a number, messages a list of {role, content}, the last a user's, the reference text"
    raise BadTask(f"{path}: problem {problem.id!r}: {must}")


@contextmanager
def one_line_of(path: str, origin: str, doing: str = "") -> Iterator[None]:
    """Turns whatever the file raises, sys.exit and os._exit included, into a BadTask that names the file's last line in the
    traceback: "FILE.py, line 7: ...". origin: the file's name in tracebacks."""
    leave, main = os._exit, os.getpid()
    try:
        with mock.patch.object(os, "_exit", lambda status: (sys.exit if os.getpid() == main else leave)(status)):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == origin]
        at = f"{path}, line {lines[-1]}" if lines else path
        raise BadTask(f"{at}: {error if isinstance(error, Fault) else doing + one_line(error)}") from error


def checked(verify: Callable, path: str, origin: str) -> Callable:
    """The verifier with plain outcomes. Raises BadTask with one line if it fails, hangs or returns anything else."""

    def checked(problems: list[Problem], responses: list[str]) -> list[Outcome]:
        with one_line_of(path, origin, "verify() raised "):
            with time_limit(VERIFY_SECONDS):
                outcomes = verify([*problems], [*responses])  # copies, which it may change
            given = f"{len(outcomes)} outcomes" if isinstance(outcomes, (list, tuple)) else f"{outcomes!r:.80}"
            if given != f"{len(responses)} outcomes":
                raise Fault(f"verify() must return a list with an Outcome for each of {len(responses)} responses, not {given}")
            return [plain(outcome) for outcome in outcomes]

    return checked


def reported(close: Callable[[], None]) -> Callable[[], None]:
    """A close() that prints its error, which must not cost what has been trained or measured."""

    def close_and_report() -> None:
        try:
            close()
        except BadTask as error:
            print(error, file=sys.stderr)

    return close_and_report


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises Fault in the main thread after this time, and again every second. Another process sends the signal: a thread does
    not run during a regular expression, and timers do not count sleep or are math-verify's. Other threads have no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        raise Fault(f"verify() did not return within {seconds:g} seconds")

    main, wait = os.getpid(), "select.select([0], [], [], wait)[0]"  # its input closes when this process ends
    kill = f"os.getppid() == {main} and os.kill({main}, {int(signal.SIGPROF)}); wait = 1"
    watch = [sys.executable, "-IS", "-c", f"import os, select; wait = {seconds}\nwhile not {wait}: {kill}"]
    before = signal.signal(signal.SIGPROF, stop)
    watcher = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)  # so that Ctrl-C does not reach it
    try:
        yield
    finally:
        watcher.kill()
        watcher.communicate()
        signal.signal(signal.SIGPROF, before)


def plain(outcome: Outcome) -> Outcome:
    """The outcome as Python numbers and text that a tokenizer accepts. Raises Fault if its meaning is unclear."""
    try:
        numbers = (outcome.reward, *outcome.columns.values())
        reward, *bits = [[bool(number == n) for n in (0, 1)].index(True) for number in numbers]
        feedback = "" if outcome.feedback is None else outcome.feedback
        verdict, feedback, *names = map(text_of, (outcome.verdict, feedback, *outcome.columns))
        return Outcome(reward, verdict, feedback, dict(zip(names, bits)))
    except Exception:  # arrays of several values, missing values and other types raise all kinds
        must = "a reward and columns of 0 or 1, and a verdict, feedback and names of columns that are text"
        raise Fault(f"verify() must return Outcomes with {must}, not {outcome!r:.120}") from None
