"""Runs a model's program in a process of its own, ends it on time and hands back what one function returned.

    with Sandbox(time_limit=6.0) as sandbox:
        sandbox.call("def f(x):\n    return x + 1", "f", [41])        # Result(status="ok", value=42, ...)

    caller --socket--> worker (warm, one thread, bare Python) --fork--> child: one per call, answers through a pipe

Arguments and return values cross as JSON text; the child writes the value, the caller reads and compares it. What a
test expects never enters the child: an object with its own __eq__ earns nothing, a forged answer is only an answer.

Covered, each with its test in tests/test_sandbox.py (Linux):
- a fresh process and an empty working directory per call: what a program sets or writes there never reaches the next
- wall time: at `time_limit` the child and its process group are killed, also a loop that swallows every exception
- memory (RLIMIT_AS), and by `output_bytes` the length of the answer and the size of any one file
- every way to end without a value: exceptions, SystemExit, syntax errors, os._exit, signals, values JSON cannot hold
- standard input is empty, output is thrown away, the environment is empty, only the standard library is importable
- a worker that dies or falls silent is replaced and the call made once more; then the status is "internal"
- no process is left by close(), by the interpreter's exit, or when the caller or a worker is killed

Not covered; this stops accidents and lazy cheats and is no security boundary:
- system calls are not filtered. A program has its user's rights: it can read and write other files, use the network,
  signal and trace other processes of that user, the caller among them
- a process that the program forks outlives the call if it moves to a session of its own; the number of processes,
  threads and files is not limited
- not offered: programs that read input and print, third-party packages, integers of more than 4,300 digits
- string hashes differ from worker to worker, so a program that relies on the order of a set may be judged either way
"""

import atexit
import ctypes
import json
import os
import queue
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

GRACE_SECONDS = 30.0  # a worker that is silent for time_limit + this counts as dead
ERROR_CHARS = 500  # kept of an exception's text
PROGRAM = "<program>"  # the source's file name in tracebacks
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


@dataclass(frozen=True)
class Result:
    status: (
        str  # "ok" | "error" | "timeout" | "memory" | "output limit" | "internal": the sandbox failed, not the program
    )
    value: object = None  # if ok: the return value after its way through JSON
    error: str = ""  # unless ok: one line, such as "ZeroDivisionError: division by zero (line 3)"
    seconds: float = 0.0  # from fork to answer


class Sandbox:
    def __init__(
        self, workers: int | None = None, time_limit: float = 6.0, memory_mb: int = 512, output_bytes: int = 1_000_000
    ):
        limits = {"time_limit": time_limit, "memory_mb": memory_mb, "output_bytes": output_bytes}
        self._workers = [_Worker(limits) for _ in range(workers or min(len(os.sched_getaffinity(0)), 8))]
        self._free = queue.SimpleQueue()
        atexit.register(self.close)
        for worker in self._workers:
            worker.start()
            self._free.put(worker)

    def call(self, source: str, function: str, args: list) -> Result:
        """function(*args) of the program `source`, once a worker is free. Raises if args are not JSON, and after close()."""
        question = json.dumps([source, function, list(args)]).encode() + b"\n"
        worker = self._free.get()
        try:
            return worker.ask(question) or worker.ask(question) or Result("internal", error="the worker died twice")
        finally:
            self._free.put(worker)

    def run_many(self, fn, items) -> list:
        """[fn(item) for item in items], on one thread per worker; fn uses call()."""
        with ThreadPoolExecutor(len(self._workers)) as pool:
            return list(pool.map(fn, items))

    def close(self) -> None:
        for worker in self._workers:
            worker.closed = True
            worker.stop()
        atexit.unregister(self.close)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Worker:
    """The caller's end of a worker process. A question is a line and so is its answer: JSON text holds no line break."""

    def __init__(self, limits: dict):
        self.limits, self.closed = limits, False
        self.process = self.socket = self.scratch = None

    def start(self) -> None:
        self.scratch = tempfile.mkdtemp(prefix="sandbox-")
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(self.limits["time_limit"] + GRACE_SECONDS)
        self.answers = self.socket.makefile("rb")
        # -I -S: no site-packages, nothing from the user's settings. A shared libpython may need this one variable.
        command = [
            sys.executable,
            "-I",
            "-S",
            os.path.abspath(__file__),
            json.dumps({"scratch": self.scratch, **self.limits}),
        ]
        env = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
        with theirs:  # the worker's standard input; a session of its own keeps the terminal's Ctrl-C away
            self.process = subprocess.Popen(
                command, stdin=theirs, stdout=subprocess.DEVNULL, env=env, start_new_session=True
            )
        if self.closed:  # asked last, so that a close() on another thread misses no process
            self.stop()

    def ask(self, question: bytes) -> Result | None:
        """None if the process died; the next question then starts another."""
        if self.closed:
            raise RuntimeError("the sandbox is closed")
        if self.process is None:
            self.start()
        answer = b""
        try:
            with suppress(OSError):
                self.socket.sendall(question)
                answer = self.answers.readline()
        finally:
            if not answer.endswith(
                b"\n"
            ):  # dead, silent, or Ctrl-C here: a late answer must not meet the next question
                self.stop()
        return _result(answer) if answer.endswith(b"\n") else None

    def stop(self) -> None:
        process, sock, scratch, self.process = self.process, self.socket, self.scratch, None
        if process is None:
            return
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # end of input for the worker, and for a thread that waits in ask()
        try:
            process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        sock.close()
        _remove(scratch)


def _result(answer: bytes) -> Result:
    status, seconds, payload = answer.decode().split("\t", 2)
    try:  # the payload comes from the child: anything may stand there
        payload = json.loads(payload)
    except (ValueError, RecursionError) as e:
        status, payload = "error", f"the answer cannot be read: {e}"
    if status == "ok":
        return Result(status, value=payload, seconds=float(seconds))
    return Result(status, error=" ".join(str(payload).split()), seconds=float(seconds))


def _remove(directory: str) -> None:
    """shutil.rmtree gives up on locked directories and on nesting beyond the recursion limit; this unlocks and flattens."""
    with suppress(OSError):
        os.chmod(directory, 0o700)
        while entries := list(os.scandir(directory)):
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry)
                    continue
                os.chmod(entry, 0o700)
                for inner in list(os.scandir(entry)):
                    if inner.is_dir(follow_symlinks=False):
                        os.chmod(inner, 0o700)  # a directory without write permission cannot be moved
                    os.rename(inner, f"{directory}/{time.monotonic_ns()}")
                os.rmdir(entry)
        os.rmdir(directory)


# ---- In the worker ---------------------------------------------------------------------------------------


def _serve(limits: SimpleNamespace) -> None:
    os.environ.clear()
    limits.worker, limits.prctl, limits.directory = os.getpid(), ctypes.CDLL(None).prctl, None
    caller = socket.socket(fileno=0)
    questions = caller.makefile("rb")
    with suppress(EOFError, ConnectionError):  # the caller has closed or died
        while question := questions.readline():
            limits.directory = limits.directory or tempfile.mkdtemp(dir=limits.scratch)
            caller.sendall(_run(question, caller, limits))
            if not _untouched(limits.directory):
                _remove(limits.directory)
                limits.directory = None
    _remove(limits.scratch)


def _untouched(directory: str) -> bool:
    """Then the next call can have it: on a slow disk a new directory costs more than the fork."""
    try:
        os.chmod(directory, 0o700)
        return not os.listdir(directory)
    except OSError:
        return False


def _run(question: bytes, caller: socket.socket, limits: SimpleNamespace) -> bytes:
    start = time.monotonic()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read_end)
            _child(question, write_end, limits)
        finally:
            os._exit(0)
    os.close(write_end)
    try:
        status, payload = _watch(read_end, caller, start + limits.time_limit, limits)
        seconds = time.monotonic() - start
    finally:  # kill first, reap after: until then the number is the child's
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)  # it may not have reached setsid
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(read_end)
    if status == "gone":
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        status, payload = "error", json.dumps(f"exited without a result ({how})")
    return f"{status}\t{seconds:.6f}\t{payload}\n".encode()


def _watch(pipe: int, caller: socket.socket, deadline: float, limits: SimpleNamespace) -> tuple[str, str]:
    """Status and JSON text as the child wrote them, or what became of it."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    poll.register(caller, select.POLLIN)
    answer = bytearray()
    while b"\n" not in answer:
        left = deadline - time.monotonic()
        ready = [fd for fd, _ in poll.poll(1000 * left)] if left > 0 else []
        if not ready:
            return "timeout", json.dumps(f"no result within {limits.time_limit} s")
        if caller.fileno() in ready:  # no second question comes before the answer: the caller has gone
            raise EOFError
        part = os.read(pipe, 65536)
        answer += part
        if len(answer) > limits.output_bytes:
            return "output limit", json.dumps(f"more than {limits.output_bytes} bytes returned")
        if not part:
            return "gone", ""
    status, _, payload = answer.decode("ascii", "replace").partition("\n")[0].partition("\t")
    return (status, payload) if status in ("ok", "error", "memory", "internal") else ("gone", "")


# ---- In the child ----------------------------------------------------------------------------------------


def _child(question: bytes, pipe: int, limits: SimpleNamespace) -> None:
    status = "internal"
    try:
        _confine(limits)
        source, function, args = json.loads(question)
        status = "error"
        module = sys.modules["program"] = ModuleType("program")  # not __main__: its main block stays silent
        exec(compile(source, PROGRAM, "exec", dont_inherit=True), vars(module))
        if function not in vars(module):
            raise NameError(f"name {function!r} is not defined")
        status, payload = "ok", json.dumps(vars(module)[function](*args))
    except MemoryError:
        status, payload = "memory", '"MemoryError"'
    except BaseException as e:
        payload = json.dumps(_describe(e))
    answer = f"{status}\t{payload}\n".encode()
    while answer:
        answer = answer[os.write(pipe, answer) :]


def _confine(limits: SimpleNamespace) -> None:
    os.setsid()
    limits.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != limits.worker:  # it died before the line above
        os._exit(1)
    os.chdir(limits.directory)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    most = {"AS": limits.memory_mb << 20, "CPU": int(limits.time_limit) + 2, "FSIZE": limits.output_bytes, "CORE": 0}
    for name, value in most.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _describe(error: BaseException) -> str:
    """Type: message (last line of the program on the way)"""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == PROGRAM else line
        trace = trace.tb_next
    message = str(error.msg if isinstance(error, SyntaxError) else error)[:ERROR_CHARS]
    text = f"{type(error).__name__}: {message}".removesuffix(": ")
    return text if line is None else f"{text} (line {line})"


if __name__ == "__main__":
    _serve(SimpleNamespace(**json.loads(sys.argv[1])))
