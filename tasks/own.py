"""A task of one's own: a Python file whose load() returns a Task. Whatever is wrong with the file or its verifier is one
line that names the file's line, and what a verifier returns becomes plain numbers and text."""

import importlib.util
import re
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tasks.base import BadTask, Outcome, Problem, Task, one_line, text_of

VERIFY_SECONDS = 600.0  # after which a verifier counts as hanging


def load(path: str) -> Task:
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
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a file written as a script may leave by sys.exit
        raise ValueError(f"{where(path, spec.origin, error)}: {one_line(error)}") from error
    splits = {name: getattr(task, name, ()) for name in ("train", "validation", "test")}
    listed = all(isinstance(s, (list, tuple)) and all(isinstance(p, Problem) for p in s) for s in splits.values())
    if not isinstance(task, Task) or not task.train or not listed:
        raise ValueError(f"{path}: load() must return a tasks.Task with training problems, and returned {task!r:.80}")
    for split, problems in splits.items():
        setattr(task, split, [problem_of(problem, path) for problem in problems])
        again = [id for id, count in Counter(str(problem.id) for problem in problems).items() if count > 1]
        if again:
            raise ValueError(f"{path}: problem {again[0]!r} is there twice: a problem's id is its own within its split")
    task.name, task.verify = f"own/{name}", checked(task.verify, path, spec.origin)
    task.verify(task.train[:2], ["", ""][: len(task.train)])  # what is wrong with it is best said before the run
    return task


def problem_of(problem: Problem, path: str) -> Problem:
    """The problem with texts that a tokenizer takes. Raises ValueError where it has others."""
    turns = problem.messages if isinstance(problem.messages, list) else []
    right = [isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in turns]
    if not right or not all(right) or turns[-1]["role"] != "user":
        form = "a list of {role, content}, the last a user's"
        raise ValueError(f"{path}: problem {problem.id!r}: messages must be {form}")
    if not isinstance(problem.reference, str):
        raise ValueError(f"{path}: problem {problem.id!r}: its reference must be text, not {problem.reference!r:.80}")
    messages = [{**message, "content": text_of(message["content"])} for message in turns]
    return replace(problem, messages=messages, reference=text_of(problem.reference))


def where(path: str, origin: str, error: BaseException, start: int = 0) -> str:
    """FILE.py, line 7: the last of the file's own lines on the way to the error, or else the line `start`. origin: the
    file's name in tracebacks."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == origin]
    line = [start, *lines][-1]
    return f"{path}, line {line}" if line else path


class Hangs(BaseException):
    """The verifier takes too long. No Exception, so that the verifier itself does not catch it."""


def checked(verify: Callable, path: str, origin: str) -> Callable:
    """A task file's verifier that gives plain outcomes, or raises BadTask with one line where it fails, hangs or gives
    none."""
    codes = [getattr(f, "__code__", None) for f in (verify, getattr(verify, "func", None), type(verify).__call__)]
    start = next((code.co_firstlineno for code in codes if code and code.co_filename == origin), 0)

    def checked(problems: list[Problem], responses: list[str]) -> list[Outcome]:
        try:
            with time_limit(VERIFY_SECONDS):
                outcomes = verify(problems, responses)
        except KeyboardInterrupt:
            raise
        except Hangs as error:
            late = f"verify() did not return within {VERIFY_SECONDS:g} seconds"
            raise BadTask(f"{where(path, origin, error, start)}: {late}") from None
        except BaseException as error:  # sys.exit as well
            raise BadTask(f"{where(path, origin, error, start)}: verify() raised {one_line(error)}") from error
        try:
            if not isinstance(outcomes, (list, tuple)) or len(outcomes) != len(responses):
                count = f"{len(outcomes)} outcomes" if isinstance(outcomes, (list, tuple)) else f"{outcomes!r:.80}"
                raise ValueError(f"a list with an Outcome for each of {len(responses)} responses, not {count}")
            return [plain(outcome) for outcome in outcomes]
        except ValueError as error:
            raise BadTask(f"{where(path, origin, error, start)}: verify() must return {error}") from None

    return checked


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises Hangs in the main thread after so long, and again each second while somebody catches it. A thread interrupts
    what waits, and a timer what computes in C and lets no thread run. SIGALRM is left to math-verify. Only the main
    thread can be interrupted; in another one there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    done, main, end = threading.Event(), threading.get_ident(), time.monotonic() + seconds

    def stop(*_) -> None:
        if time.monotonic() >= end:  # the timer counts the seconds of all threads
            raise Hangs

    def watch() -> None:
        while not done.wait(max(1.0, end - time.monotonic())):
            signal.pthread_kill(main, signal.SIGPROF)

    before, watcher = signal.signal(signal.SIGPROF, stop), threading.Thread(target=watch, daemon=True)
    watcher.start()
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        done.set()
        watcher.join()
        signal.signal(signal.SIGPROF, before)


def plain(outcome: Outcome) -> Outcome:
    """The outcome in Python's own numbers and in text that a tokenizer takes, where it is clear what is meant. Raises
    ValueError where it is not."""

    def bit(value: object, what: str) -> int:
        try:
            return [bool(value == number) for number in (0, 1)].index(True)
        except Exception:  # whatever an array of several, or a missing value, makes of this
            raise ValueError(f"Outcomes with {what} of 0 or 1, not {outcome!r:.120}") from None

    if not isinstance(outcome, Outcome):
        raise ValueError(f"Outcomes, not {outcome!r:.120}")
    feedback, columns = "" if outcome.feedback is None else outcome.feedback, outcome.columns
    texts = (outcome.verdict, feedback, *columns) if isinstance(columns, dict) else (None,)
    if not all(isinstance(text, str) for text in texts):
        form = "a verdict and feedback that are text, and a dict of columns"
        raise ValueError(f"Outcomes with {form}, not {outcome!r:.120}")
    columns = {text_of(name): bit(value, f"a column {name!r}") for name, value in columns.items()}
    return Outcome(bit(outcome.reward, "a reward"), text_of(outcome.verdict), text_of(feedback), columns)
