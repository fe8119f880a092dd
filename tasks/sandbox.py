"""Runs a program that a model wrote, in a process of its own, and hands back what it returned or printed.

    with Sandbox(time_limit=6.0) as sandbox:
        sandbox.call("def f(x):\n    return x + 1", "f", [41])         # Result(status="ok", value=42, ...)
        sandbox.run("print(int(input()) + 1)", "41\n")                 # Result(status="ok", value="42\n", ...)

    caller --socket--> worker (warm, one thread, bare Python) --fork--> child: one per call, answers through a pipe

A worker is a fresh interpreter, never a copy of the caller, whose secrets, torch and CUDA context are never forked. What
a test expects enters neither worker nor child: the child sends its result as JSON text and the caller compares. An object
with its own __eq__ earns nothing, nor does a forged answer.

Covered, each with its test in tests/test_sandbox.py (Linux):
- a fresh process and an empty working directory per call: what a program sets or writes there never reaches the next
- wall time: at `time_limit` the child and all that it started are killed, also a loop that swallows every exception
- memory, CPU time, open files, threads, the size of one file and of all that is written, the length of an answer
- every way to end without a value: exceptions, SystemExit, syntax errors, os._exit, signals, values JSON cannot hold
- `call`: standard input is empty, what is printed is thrown away. `run`: the program is __main__ with a real standard
  input and output, exits as Python would (threads joined, atexit run), and is judged by what it printed
- the environment is empty, string hashes are the same in every call
- a worker that dies or falls silent is replaced and the call made once more; where the disk or the process table was
  full, after a pause. If that does not help, the status is "internal"
- no process is left by close(), by the interpreter's exit, or when the caller or a worker is killed
- programs have no capabilities, even as root, and cannot read the caller's memory (as another user than root only where
  the kernel allows user namespaces or has landlock)
Covered where the kernel allows it, which `layers` tells (x86_64 and aarch64); `unsafe` says what is missing:
- seccomp: no new process, program, session or connection; no signal to anybody, by ioctl and fcntl neither; no ptrace,
  mount, io_uring, chmod, inotify; raising one's own limits seems to work and changes nothing. Threads work
- landlock: reading is confined to Python's own files and the system's libraries, writing to the working directory

Not covered:
- without seccomp a program can use the network, signal and trace other processes of its user, and kill its worker; what
  it starts is killed as long as the worker lives. Without landlock it can read, write and delete its user's files: the
  benchmark's answers, for root also the switches in /proc and /sys
- stat and access tell of any path whether it exists, its size and its times; landlock does not confine them
- what a worker once held and freed: a program that scans its own memory may find the input or output of an earlier call
- threads and written bytes are checked every 10 ms, so a program can exceed its limit by that much; on a tmpfs, writes
  through shared mappings are not counted; side channels; faults of the kernel
"""

import os

if __name__ == "__main__":
    # What modules want to do in a forked child (locks, seeds) costs 0.4 ms and is not needed with a single thread.
    os.register_at_fork = lambda **hooks: None

import atexit
import ctypes
import gc
import itertools
import json
import resource
import select
import signal
import struct
import sys
import time
from contextlib import AbstractContextManager, suppress
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

if __name__ != "__main__":  # the caller's only: every mapping and page of a worker is copied at each fork
    import queue
    import socket
    import subprocess
    import tempfile
    from concurrent.futures import ThreadPoolExecutor
    from decimal import Decimal

GRACE_SECONDS = 30.0  # a worker that is silent for time_limit + this counts as dead
RETRY_SECONDS = (0.0, 0.1, 1.0, 5.0)  # before each try of a call that the machine kept from starting
LOOK_SECONDS = 0.01  # between two looks at a program's threads and what it wrote
MAX_THREADS = 256  # of a program
MAX_WRITTEN = 256 << 20  # bytes that a program may write to files in all, beyond output_bytes
ERROR_CHARS = 500  # kept of an exception's text
ERROR_BYTES = 1 << 16  # of an exception as JSON, at most
FRAMES = 3  # of the program, kept of a traceback
INT_DIGITS = 50_000  # the longest integer a program may turn into text; Python's own limit is 4300
PROGRAM = "<program>"  # the source's file name in tracebacks
UNPREPARED = "internal", '"the child could not be prepared"'
# What a program finds imported with `preamble=True`: every public name of these modules, later ones winning.
PREAMBLE = """string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys
json builtins typing""".split()


class Result(NamedTuple):
    status: str  # "ok", "error", "timeout", "memory", "output limit", or "internal": the sandbox itself failed
    value: object = None  # if ok: the return value after its way through JSON, or the printed text
    error: str = ""  # one line, such as "ZeroDivisionError: division by zero (line 3)"; if ok: what a thread died of
    frames: tuple[str, ...] = ()  # the program's last lines on the way to the error, outermost first
    seconds: float = 0.0  # from fork to answer


# ---- In the caller -----------------------------------------------------------------------------------------


class Sandbox(AbstractContextManager):
    """workers: processes, one call each at a time (default: one per core, at most 16; of several processes that
    torchrun started on a machine, each takes its part). preamble: the names of PREAMBLE are there without import, and
    the recursion limit is 50,000, as competition judges have it. packages: installed packages can be imported, at their
    cost in each call. warm: the caller's own source that each worker runs once, so that calls find loaded what it imports
    and caches. without: layers to leave out, for tests; "landlock 4": its versions from 4 on."""

    def __init__(
        self, workers: int | None = None, time_limit: float = 6.0, memory_mb: int = 512, output_bytes: int = 1_000_000,
        preamble: bool = False, packages: bool = False, warm: str = "", without: tuple[str, ...] = (),
    ):  # fmt: skip
        folders = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
        rlimits = {"AS": memory_mb << 20, "CPU": int(time_limit) + 2, "FSIZE": output_bytes, "CORE": 0, "NOFILE": 64,
                   "STACK": 1 << 27, "NPROC": 4096}  # fmt: skip  # NPROC: all of the user's; where seccomp is missing
        settings = {"time_limit": time_limit, "output_bytes": output_bytes, "rlimits": rlimits, "preamble": preamble,
                    "packages": folders if packages else [], "warm": warm, "without": without}  # fmt: skip
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = workers or max(1, min(len(os.sched_getaffinity(0)), 16 * beside) // beside)
        self._output_bytes = output_bytes
        self._workers = [_Worker(settings) for _ in range(workers)]
        self._free = queue.SimpleQueue()
        atexit.register(self.close)
        for worker in self._workers:
            worker.start()
            self._free.put(worker)
        self._active = self._workers[0].hello() or {"seccomp": "unknown", "landlock": "unknown"}

    @property
    def layers(self) -> str:
        """What confines a program on this machine, in one line."""
        return ", ".join(["process per test", "rlimits", *(f"{name} {state}" for name, state in self._active.items())])

    @property
    def unsafe(self) -> str:
        """The protection that this machine lacks and what to do, in one line; "" if there is all. Training runs
        programs that nobody has read: it should not start without."""
        missing = " and ".join(name for name, state in self._active.items() if not state.startswith("on"))
        return missing and (
            f"{missing} not available: a program could read the tests' answers or harm other processes; use x86_64 or "
            "aarch64, Linux 5.13 or later with landlock in /sys/kernel/security/lsm (kernel parameter lsm=), and a "
            "container whose seccomp profile allows both"
        )

    def call(self, source: str, function: str, args: list, max_output: int | None = None) -> Result:
        """function(*args) of the program `source`, once a worker is free; "Class.method" is called on a Class(). A value
        of more than max_output bytes as JSON is an "output limit". Raises if args are not JSON, and after close()."""
        return self._ask("call", max_output, {"source": source, "function": function, "args": args})

    def run(self, source: str, stdin: str, max_output: int | None = None) -> Result:
        """The program `source` as a script that reads `stdin`; the value is what it printed, bytes that are no UTF-8
        replaced; more than max_output bytes is an "output limit". Leaving by SystemExit or os._exit is a way to end;
        only an exception or a signal is an error."""
        return self._ask("run", max_output, {"source": source, "stdin": stdin})

    def _ask(self, mode: str, max_output: int | None, question: dict) -> Result:
        bound = self._output_bytes if max_output is None else min(max_output, self._output_bytes)
        line = f"{mode} {bound} {json.dumps(question)}\n".encode()
        worker = self._free.get()
        try:
            for pause in RETRY_SECONDS:
                time.sleep(pause)
                result = worker.ask(line) or worker.ask(line)
                if result is None or result.status != "internal":
                    break
            return result or Result("internal", error="the worker died twice")  # perhaps the program's doing
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

    def __exit__(self, *_) -> None:
        self.close()


class _Worker:
    """The caller's end of a worker process. A question is a line, as JSON text holds no line break. An answer is a line
    and then the bytes that a script printed; the line tells how many."""

    def __init__(self, settings: dict):
        self.settings, self.closed = settings, False
        self.process = self.socket = self.scratch = None

    def start(self) -> None:
        self.scratch = tempfile.mkdtemp(prefix="sandbox-")
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(self.settings["time_limit"] + GRACE_SECONDS)
        self.answers, self.greeting = self.socket.makefile("rb"), None
        # -S -s -P: no site-packages, nothing of the user's, not the folder of this file. The environment holds a fixed
        # hash seed, one thread for numerical packages, and the one variable that a shared libpython may need.
        command = [sys.executable, "-S", "-s", "-P", os.path.abspath(__file__)]
        command.append(json.dumps({"scratch": self.scratch, **self.settings}))
        env = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
        env |= {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        options = {"stdin": theirs, "stdout": subprocess.DEVNULL, "env": env, "start_new_session": True}
        try:  # a session of its own keeps the terminal's Ctrl-C away
            with theirs:
                self.process = subprocess.Popen(command, **options)
        except OSError:  # the process table is full
            self.socket.close()
            _remove(self.scratch)
            raise
        if self.closed:  # asked last, so that a close() on another thread misses no process
            self.stop()

    def hello(self) -> dict | None:
        """The layers that a new worker reports before its first answer."""
        if self.process is None:
            self.start()
        if self.greeting is None:
            with suppress(OSError, ValueError):
                self.greeting = json.loads(self.answers.readline())
        return self.greeting

    def ask(self, question: bytes) -> Result | None:
        """None if the process died; the next question then starts another. "internal" if there is no process to ask."""
        if self.closed:
            raise RuntimeError("the sandbox is closed")
        greeting = result = None
        try:
            with suppress(OSError, ValueError):
                greeting = self.hello()
                if greeting is not None:
                    self.socket.sendall(question)
                    line = self.answers.readline()
                    *fields, count = line.split(b"\t")
                    printed = self.answers.read(int(count))
                    if line.endswith(b"\n") and len(printed) == int(count):
                        result = _result(*fields, printed)
        finally:  # dead, silent, or Ctrl-C here: a late answer must not meet the next question
            if result is None:
                self.stop()
        return result if greeting is not None else Result("internal", error="no worker could be started")

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


def loads(text: str) -> object:
    """json.loads, with integers too long for int() as Decimals, which compare equal to integers all the same."""
    try:
        return json.loads(text)
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 4000 else Decimal(digits))


def _result(status: bytes, seconds: bytes, payload: bytes, printed: bytes) -> Result:
    status, seconds = status.decode(), float(seconds)
    try:  # the payload comes from the child: anything may stand there
        payload = loads(payload.decode())
        if status == "ok":
            return Result(status, value=payload, seconds=seconds)
        value = printed.decode("utf-8", "replace") if status == "printed" else None
        error, frames = payload if isinstance(payload, list) and len(payload) == 2 else (payload or "", ())
        frames = tuple(str(line)[:ERROR_CHARS] for line in frames)[-FRAMES:]
    except (ValueError, TypeError, RecursionError) as e:
        status, value, error, frames = "error", None, f"the answer cannot be read: {e}", ()
    error = " ".join(str(error)[: ERROR_CHARS + 200].split())
    return Result("ok" if status == "printed" else status, value, error, frames, seconds)


def _remove(path: str) -> None:
    """Unlocks and flattens; shutil.rmtree gives up on locked directories and on nesting beyond the recursion limit."""
    with suppress(OSError):
        if os.path.islink(path) or not os.path.isdir(path):  # chmod and scandir would follow a link
            os.unlink(path)
            return
        os.chmod(path, 0o700)
        while entries := list(os.scandir(path)):
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry)
                    continue
                os.chmod(entry, 0o700)
                for inner in list(os.scandir(entry)):
                    if inner.is_dir(follow_symlinks=False):
                        os.chmod(inner, 0o700)  # a directory without write permission cannot be moved
                    os.rename(inner, f"{path}/{time.monotonic_ns()}")
                os.rmdir(entry)
        os.rmdir(path)


# ---- In the worker: `worker` is what it was told and what it holds -----------------------------------------


def _serve(worker: SimpleNamespace) -> None:
    os.environ.clear()
    sys.path += worker.packages
    worker.pid, worker.libc, worker.directory = os.getpid(), ctypes.CDLL(None, use_errno=True), None
    worker.libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what leaves the child's process group still comes to us
    place = os.stat(worker.scratch)
    on_disk = os.major(place.st_dev) != 0  # else perhaps a tmpfs, which has no storage to write to
    worker.counters = ["write_bytes"] if on_disk else ["write_bytes", "wchar"]
    if not {"seccomp", "landlock"} <= set(worker.without):  # without any layer programs misbehave as any process can
        _drop_privileges(worker.libc)
    worker.caller = os.dup(0)
    questions = open(worker.caller, "rb", closefd=False)  # noqa: SIM115
    exec(compile(worker.warm, "<warm>", "exec"), {})  # also: a process's first compilation makes all node types, 2 ms
    layers = _prepare_layers(worker)
    _prepare_program(worker)
    gc.freeze()  # children share these pages as long as no collection walks over them
    with suppress(EOFError, ConnectionError):  # the caller has closed or died
        _write(worker.caller, json.dumps(layers).encode() + b"\n")
        while question := questions.readline():
            try:
                if worker.directory is None:
                    worker.directory = f"{worker.scratch}/{time.monotonic_ns()}"
                    os.mkdir(worker.directory)
                    _look(worker)  # sets the time of the last reading, which a program could choose
                    clean = _look(worker)
                answer = _run(question, worker)
            except OSError as e:  # no process, descriptor or directory to be had, which is not the program's fault
                _write(worker.caller, f"internal\t0\t{json.dumps(str(e))}\t0\n".encode())
                break
            _write(worker.caller, answer)
            del answer  # the next program is not to find it
            # Only a directory that was left alone serves the next call: on a slow disk a new one costs more than the fork.
            if clean is None or _look(worker) != clean:
                for name in os.listdir(worker.scratch):  # a program can write beside its directory, too
                    _remove(f"{worker.scratch}/{name}")
                worker.directory = None
                if os.stat(worker.scratch).st_size >= place.st_size + 4096:
                    break  # ext4 never shrinks it, which the next program could see: another worker comes
    _remove(worker.scratch)


def _write(fd: int, data: bytes) -> None:
    data = memoryview(data)
    while data:
        data = data[os.write(fd, data) :]


def _look(worker: SimpleNamespace) -> list | None:
    """All that a program may have left at its directory and beside it."""
    with suppress(OSError):
        stats = [os.lstat(path) for path in (worker.directory, worker.scratch)]
        names = os.listdir(worker.directory), os.listdir(worker.scratch)
        return [*names, *((stat.st_ino, stat.st_size, stat.st_ctime_ns, stat.st_atime_ns) for stat in stats)]


def _prepare_program(worker: SimpleNamespace) -> None:
    """Everything a child can find ready: each page of memory that it does not have to write saves microseconds."""
    # Streams over the numbers 0 to 2, made while these are what a child has there: a file in memory, and pipes.
    # Their descriptors may stay: no child keeps one beyond 2 but its report's and its ruleset's.
    standing, pipe_end = os.dup(2), os.pipe()[1]
    for fd, target in enumerate((os.memfd_create("stdin"), pipe_end, pipe_end)):
        os.dup2(target, fd)
    sys.stdin, sys.stdout, sys.stderr = (open(fd, "w" if fd else "r", newline="\n", closefd=False) for fd in range(3))
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    os.dup2(standing, 2)  # where an error of the worker's own is seen
    sys.argv = [PROGRAM]
    sys.modules["builtins"].exit = sys.modules["builtins"].quit = sys.exit  # site's, which is not imported
    sys.set_int_max_str_digits(INT_DIGITS)
    names = {}
    if worker.preamble:
        import threading  # noqa: F401  # many programs import it

        for name in PREAMBLE:
            module = __import__(name)
            public = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
            names |= {n: getattr(module, n) for n in public}
        names |= {name: sys.modules[name] for name in PREAMBLE}
        sys.setrecursionlimit(50_000)
        sys.modules["random"].seed(0)  # nobody seeds again after a fork: every call draws the same numbers
    worker.script = ModuleType("__main__")
    worker.module = ModuleType("program")  # not __main__: its main block is silent
    for module in (worker.script, worker.module):
        vars(module).update(names)
        exec("", vars(module))  # adds __builtins__
    worker.script.__file__ = PROGRAM
    worker.given = len(vars(worker.script))


def _run(question: bytes, worker: SimpleNamespace) -> bytes:
    """One call: forks the child, waits for its report or its end, kills what is left of it, and makes the answer."""
    start = time.monotonic()
    mode, bound, question = question.split(b" ", 2)
    script, bound = mode == b"run", int(bound)
    report, report_end = os.pipe()
    output, output_end = os.pipe()
    os.set_blocking(output, False)
    child = os.fork()
    if child == 0:
        try:
            _child(question, report_end, output_end, worker)
        finally:
            os._exit(1)
    os.close(report_end)
    os.close(output_end)
    printed = bytearray()
    try:
        status, payload = _watch(child, report, output, printed, bound, worker)
        seconds = time.monotonic() - start
    finally:  # kill first, reap after: until then the number is the child's
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)  # it may not have reached setsid
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not worker.filter:
            _kill_orphans()
        _drain(output, printed, bound)  # what it wrote last may still stand in the pipe
        os.close(report)
        os.close(output)
    if status == "gone":
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        status, payload = "error", json.dumps(f"exited without a result ({how})")
        if script and code >= 0:
            status, payload = "ok", "null"  # os._exit: a script may end as it likes
    if status in ("ok", "error") and len(printed) > bound:
        status, payload = "output limit", json.dumps(f"more than {bound} bytes printed")
    if status == "ok" and not script and len(payload) > bound:
        status, payload = "output limit", json.dumps(f"more than {bound} bytes returned")
    if script and status == "ok":
        status = "printed"
    else:
        printed.clear()
    return f"{status}\t{seconds:.6f}\t{payload}\t{len(printed)}\n".encode() + printed


def _watch(child: int, report: int, output: int, printed: bytearray, bound: int, worker: SimpleNamespace) -> tuple[str, str]:
    """Status and JSON text as the child reported them, or what became of it; what it prints goes into `printed`."""
    poll = select.poll()
    for fd in (report, output, worker.caller):
        poll.register(fd, select.POLLIN)
    said, silent = bytearray(), False  # silent: it has closed its report; only its end is waited for
    now = time.monotonic()
    deadline, look = now + worker.time_limit, now + LOOK_SECONDS
    while b"\n" not in said and len(printed) <= bound:
        now = time.monotonic()
        if now >= deadline:
            return ("timeout", json.dumps(f"no result within {worker.time_limit} s")) if said else UNPREPARED
        if now >= look:
            look = now + LOOK_SECONDS
            if excess := _excess(child, worker):
                return excess
        wait = 1000 * (min(deadline, look) - now)  # milliseconds
        ready = [fd for fd, _ in poll.poll((min(wait, 5.0) if silent else wait) + 0.5)]
        if worker.caller in ready:  # no second question comes before the answer: the caller has gone
            raise EOFError
        if output in ready and not _drain(output, printed, bound):
            poll.unregister(output)
        if report in ready:
            part = os.read(report, 65536)
            said += part
            if len(said) > max(bound, ERROR_BYTES) + 16:  # beside the payload
                return "output limit", json.dumps(f"more than {bound} bytes returned")
            if not part:
                poll.unregister(report)
                silent = True
        if silent and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return ("gone", "") if said else UNPREPARED
    if not said.startswith(b"+"):  # it failed before the program began
        return UNPREPARED
    status, _, payload = said[1:].decode("ascii", "replace").partition("\n")[0].partition("\t")
    known = status in ("ok", "error", "memory") and "\t" not in payload
    return (status, payload) if known else ("error", '"the answer cannot be read"')


def _excess(child: int, worker: SimpleNamespace) -> tuple[str, str] | None:
    """What a program has too much of that no limit of the kernel's bounds."""
    most = MAX_WRITTEN + worker.output_bytes
    with suppress(OSError):
        if os.stat(f"/proc/{child}/task").st_nlink - 2 > MAX_THREADS:
            return "error", json.dumps(f"more than {MAX_THREADS} threads")
        with open(f"/proc/{child}/io") as file:
            counts = dict(line.split(": ") for line in file)
        if any(int(counts[name]) > most for name in worker.counters):
            return "output limit", json.dumps(f"more than {most} bytes written")


def _drain(output: int, printed: bytearray, bound: int) -> bool:
    """Moves what stands in the pipe; False at its end."""
    with suppress(BlockingIOError):
        while len(printed) <= bound:
            part = os.read(output, 65536)
            if not part:
                return False
            printed += part
    return True


def _kill_orphans() -> None:
    """Processes of a program that left its process group have come to this worker, their subreaper."""
    with suppress(FileNotFoundError):  # a kernel without this list
        while children := open(f"/proc/self/task/{os.getpid()}/children").read().split():  # noqa: SIM115
            for pid in map(int, children):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


# ---- In the child ------------------------------------------------------------------------------------------


def _child(question: bytes, report: int, output: int, worker: SimpleNamespace) -> None:
    status, payload = "internal", ""
    try:
        asked = json.loads(question)
        _confine(worker, report, output, asked.get("stdin"))
        os.write(report, b"+")  # from here on the program may write to this pipe as well
        status = "error"
        status, payload = "ok", (_script if "stdin" in asked else _function)(asked, worker)
    except MemoryError:
        status, payload = "memory", '"MemoryError"'
    except BaseException as e:
        payload = json.dumps(_describe(e, asked["source"] if status == "error" else ""))
    _write(report, f"{status}\t{payload}\n".encode())
    os._exit(0)


def _confine(worker: SimpleNamespace, report: int, output: int, stdin: str | None) -> None:
    os.setsid()
    worker.libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    worker.libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # the worker is to see what it writes
    if os.getppid() != worker.pid:  # it died before the line above
        os._exit(1)
    os.chdir(worker.directory)
    null = os.open(os.devnull, os.O_RDWR)
    source = null
    if stdin:  # a file in memory: seek, fstat and mmap work on it as on `python program.py < input`
        source = os.memfd_create("stdin")
        _write(source, stdin.encode("utf-8", "surrogatepass"))
        os.lseek(source, 0, os.SEEK_SET)
    for fd, target in enumerate((source, null if stdin is None else output, null)):
        os.dup2(target, fd)
    for low, high in itertools.pairwise(sorted({2, report, max(2, worker.ruleset), 1 << 16})):
        os.closerange(low + 1, high)
    atexit._clear()  # what the worker's modules registered is not the program's
    for name, value in worker.rlimits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        value = min(value, resource.getrlimit(kind)[1] % (1 << 64))  # -1 is no limit
        resource.setrlimit(kind, (value, value))
    _apply_layers(worker)


def _function(asked: dict, worker: SimpleNamespace) -> str:
    module = sys.modules["program"] = worker.module
    exec(compile(asked["source"], PROGRAM, "exec", dont_inherit=True), vars(module))
    owner, _, name = asked["function"].rpartition(".")
    if (owner or name) not in vars(module):
        raise NameError(f"name {owner or name!r} is not defined")
    function = getattr(vars(module)[owner](), name) if owner else vars(module)[name]
    value = function(*asked["args"])
    return _dumps(list(value) if isinstance(value, tuple) else value)


def _dumps(value: object) -> str:
    """JSON text. What Python holds for different may not become the same: [(1, 2)] == [[1, 2]] and {1: 2} == {"1": 2}
    are False. A tuple at the top counts as a list."""
    stack, seen = [value], 0
    while stack and seen < 1_000_000:
        item, seen = stack.pop(), seen + 1
        if isinstance(item, tuple):
            raise TypeError("a tuple inside the result where a list is expected")
        if isinstance(item, dict) and not all(isinstance(key, str) for key in item):
            raise TypeError("a key that is no string in a dictionary of the result")
        if isinstance(item, (list, dict)) and len(stack) < 1_000_000:
            stack.extend(item if isinstance(item, list) else item.values())
    return json.dumps(value, default=_number)


def _number(value: object) -> object:
    """A number of numpy's counts as Python's."""
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        return value.item()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _script(asked: dict, worker: SimpleNamespace) -> str:
    """Runs to the end that Python itself would make: threads joined, exit functions called, output flushed."""
    module = sys.modules["__main__"] = worker.script
    died, collect, get_stats = [], gc.collect, gc.get_stats
    before = get_stats()[1:]
    if "threading" in asked["source"]:
        import threading

        threading.excepthook = lambda args: args.exc_type is SystemExit or died.append(args.exc_value)
    with suppress(SystemExit):
        exec(compile(asked["source"], PROGRAM, "exec", dont_inherit=True), vars(module))
    if threading := sys.modules.get("threading"):
        threading._shutdown()  # as Python does: tells executors to end, joins also what starts meanwhile
    atexit._run_exitfuncs()
    _flush()
    # As Python does; else the next collection would close a stream's file before it flushes the stream. Collecting the
    # oldest generation costs 0.14 ms, and few programs get anything there. (From Python 3.14 on 1 means something else.)
    old = get_stats()[1:] != before or sys.version_info >= (3, 14)
    collect(2 if old else 0)
    # What is alive is finalized: files are flushed, generators closed, cycles collected. Names from before the program
    # stay, for touching each would cost a page of memory.
    names = vars(module)
    for name in list(itertools.islice(reversed(names), max(0, len(names) - worker.given))):
        names[name] = None
    collect(2 if old else 1)
    _flush()
    return json.dumps(_describe(died[0], asked["source"]) if died else None)


def _flush() -> None:
    for stream in (getattr(sys, "stdout", None), sys.__stdout__):
        with suppress(AttributeError, ValueError):  # replaced by something else, or closed
            stream.flush()


def _describe(error: BaseException, source: str) -> tuple[str, list[str]]:
    """Type: message (last line of the program on the way), and those lines."""
    line, trace, frames, lines = getattr(error, "lineno", None), error.__traceback__, [], source.split("\n")
    while trace:
        code = trace.tb_frame.f_code
        if code.co_filename == PROGRAM:
            line = trace.tb_lineno
            text = lines[line - 1].strip() if 0 < line <= len(lines) else ""
            frames = [*frames[1 - FRAMES :], f"line {line}, in {code.co_name}: {text}"[:ERROR_CHARS]]
        trace = trace.tb_next
    try:
        message = str(error.msg if isinstance(error, SyntaxError) else error)[:ERROR_CHARS]
    except BaseException:
        message = ""
    text = f"{type(error).__name__[:100]}: {message}".removesuffix(": ")
    return (text if line is None else f"{text} (line {line})"), frames


# ---- Layers of the kernel ----------------------------------------------------------------------------------

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
CLONE_NEWUSER, CLONE_THREAD = 0x10000000, 0x10000  # linux/sched.h
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
ALLOW, PRETEND, DENY, UNKNOWN, KILL = 0x7FFF0000, 0x50000, 0x50001, 0x50026, 0x80000000  # errno 0, EPERM, ENOSYS
# The calls that fail with EPERM: their numbers on x86_64 and aarch64 (asm/unistd.h), - where there is none.
DENIED = """
fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, setsid 112 157, setpgid 109 154, kill 62 129, tkill 200 130,
tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, pidfd_send_signal 424 424, ptrace 101 117,
process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440, kcmp 312 272, pidfd_open 434 434,
pidfd_getfd 438 438, move_pages 279 239, migrate_pages 256 238, perf_event_open 298 241, socket 41 198, connect 42 203,
bind 49 200, listen 50 201, accept 43 202, accept4 288 242, io_uring_setup 425 425, io_uring_enter 426 426,
io_uring_register 427 427, bpf 321 280, userfaultfd 323 282, unshare 272 97, setns 308 268, mount 165 40, umount2 166 39,
pivot_root 155 41, chroot 161 51, move_mount 429 429, open_tree 428 428, fsopen 430 430, fsconfig 431 431, fsmount 432 432,
fspick 433 433, mount_setattr 442 442, chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, lchown 94 -, fchown 93 55,
fchownat 260 54, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15,
fremovexattr 199 16, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, quotactl 179 60, open_by_handle_at 304 265,
name_to_handle_at 303 264, mknod 133 -, mknodat 259 33, shmget 29 194, shmat 30 196, semget 64 190, msgget 68 186,
mq_open 240 180, keyctl 250 219, add_key 248 217, request_key 249 218, memfd_create 319 279, memfd_secret 447 447,
sendmsg 46 211, sendmmsg 307 269, fallocate 285 47, truncate 76 45, sync 162 81, syncfs 306 267, quotactl_fd 443 443,
ioprio_set 251 30, inotify_init 253 -, inotify_init1 294 26, inotify_add_watch 254 27, process_mrelease 448 448,
setfsuid 122 151, setfsgid 123 152, setuid 105 146, setgid 106 144, setreuid 113 145, setregid 114 143, setresuid 117 147,
setresgid 119 149, setgroups 116 159, capset 126 91, personality 135 92, setpriority 141 140, sched_setscheduler 144 119,
sched_setparam 142 118, sched_setattr 314 274, sched_setaffinity 203 122, init_module 175 105, finit_module 313 273,
delete_module 176 106, kexec_load 246 104, kexec_file_load 320 294, reboot 169 142, swapon 167 224, swapoff 168 225,
acct 163 89, settimeofday 164 170, clock_settime 227 112, clock_adjtime 305 266, adjtimex 159 171, sethostname 170 161,
setdomainname 171 162, syslog 103 116, fanotify_init 300 262, iopl 172 -, ioperm 173 -, modify_ldt 154 -, vhangup 153 58
"""
CLONE, CLONE3, SETRLIMIT, PRLIMIT64 = (56, 220), (435, 435), (160, 164), (302, 261)
FIRST_UNKNOWN = 452  # younger calls do not exist as far as a program is told; libraries then take the older ones
# Calls that one argument decides: numbers, offset of the argument, values, what they get, what all others get. fcntl
# and ioctl keep what programs need; the rest lets a file signal any process or block who opens it, sets flags and versions
# that outlive the program, and freezes file systems.
CHOSEN = (
    # fcntl (linux/fcntl.h): F_DUPFD to F_SETLKW, locks of open files, F_DUPFD_CLOEXEC, sizes of pipes
    ((72, 25), 24, (*range(8), 36, 37, 38, 1030, 1031, 1032), ALLOW, DENY),
    # ioctl (asm/ioctls.h, linux/fs.h): TCGETS, TCGETS2 (isatty), TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, FICLONE
    ((16, 29), 24, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x40049409), ALLOW, DENY),
    ((157, 167), 16, (PR_SET_PDEATHSIG, PR_SET_DUMPABLE), DENY, ALLOW),  # prctl
)


def _drop_privileges(libc: ctypes.CDLL) -> None:
    """For good, in the worker and so in every child. A process in a user namespace of its own can trace nobody outside,
    a root without capabilities nobody who has some, and a child not its worker, if that is not dumpable."""
    libc.unshare(CLONE_NEWUSER)  # not every kernel allows it
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def _seccomp_filter() -> bytes | None:
    """A classic BPF program (linux/filter.h) for this machine, None where its numbers are not known."""
    machine = os.uname().machine
    if machine not in AUDIT_ARCH:
        return None
    column = list(AUDIT_ARCH).index(machine)
    load, ret, equal, at_least, any_bit = 0x20, 0x06, 0x15, 0x35, 0x45  # (code, jump if true, jump if false, value)
    # Loads a word of struct seccomp_data: 0 the call, 4 the machine, 16 + 8 i argument i, low half first.
    program = [
        (load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[machine]), (ret, 0, 0, KILL),  # a call in another machine's numbering
        (load, 0, 0, 0),
        (equal, 0, 4, CLONE[column]), (load, 0, 0, 16), (any_bit, 0, 1, CLONE_THREAD), (ret, 0, 0, ALLOW), (ret, 0, 0, DENY),
        # A pointer to new limits, low and high half; without one prlimit64 only reads.
        (equal, 0, 6, PRLIMIT64[column]), (load, 0, 0, 32), (equal, 0, 2, 0), (load, 0, 0, 36), (equal, 1, 0, 0),
        (ret, 0, 0, PRETEND), (ret, 0, 0, ALLOW),
    ]  # fmt: skip
    for call, offset, values, verdict, otherwise in CHOSEN:
        tests = [(equal, len(values) - i, 0, value) for i, value in enumerate(values)]
        program += [(equal, 0, len(values) + 3, call[column]), (load, 0, 0, offset), *tests]
        program += [(ret, 0, 0, otherwise), (ret, 0, 0, verdict)]
    denied = [int(number) for row in DENIED.split(",") if (number := row.split()[1 + column]) != "-"]
    program += [(equal, 0, 1, SETRLIMIT[column]), (ret, 0, 0, PRETEND)]
    program += [(equal, 1, 0, CLONE3[column]), (at_least, 0, 1, FIRST_UNKNOWN), (ret, 0, 0, UNKNOWN)]
    program += [(equal, len(denied) - i, 0, number) for i, number in enumerate(denied)]
    program += [(ret, 0, 0, ALLOW), (ret, 0, 0, DENY)]
    return b"".join(struct.pack("HBBI", *step) for step in program)


def _landlock_ruleset(worker: SimpleNamespace) -> tuple[int, int]:
    """A ruleset's descriptor and the kernel's version of landlock; -1 and 0 where there is none (linux/landlock.h)."""
    syscall = worker.libc.syscall
    below = [int(name[9:] or 1) for name in worker.without if name.startswith("landlock")]
    version = min([syscall(444, None, ctypes.c_size_t(0), 1), *(first - 1 for first in below)])
    if version < 1:
        return -1, 0
    execute, write, read, read_dir, device = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 15
    files = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1  # every right that this version knows
    network, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)  # TCP; abstract sockets, signals
    attributes = struct.pack("QQQ", files, network, scopes)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = syscall(444, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return -1, 0
    system = "/usr/lib /usr/lib64 /lib /lib64 /etc/ld.so.cache /usr/share/zoneinfo /etc/localtime /dev/urandom /dev/zero"
    python = [*sys.path, os.path.join(sys.prefix, "lib"), os.path.join(sys.base_prefix, "lib")]
    rules = dict.fromkeys([*system.split(), *python], execute | read | read_dir)
    for path, rights in (rules | {os.devnull: read | write, worker.scratch: files & ~device}).items():
        if os.path.exists(path):
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            if not os.path.isdir(path):
                rights &= execute | write | read
            failed = syscall(445, ruleset, 1, struct.pack("=Qi", rights, handle), 0)
            os.close(handle)
            if failed:
                return -1, 0
    return ruleset, version


def _prepare_layers(worker: SimpleNamespace) -> dict[str, str]:
    """Builds what every child takes on, tries it in a child, and says what holds."""
    code = "seccomp" not in worker.without and _seccomp_filter()
    worker.filter = code and ctypes.create_string_buffer(code, len(code))
    worker.program = code and struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(worker.filter))  # sock_fprog
    worker.ruleset, version = _landlock_ruleset(worker)
    trial = os.fork()
    if trial == 0:
        try:
            os._exit(_apply_layers(worker))
        finally:
            os._exit(3)
    failed = os.waitstatus_to_exitcode(os.waitpid(trial, 0)[1])
    worker.ruleset = -1 if failed & 1 else worker.ruleset
    worker.filter = None if failed & 2 else worker.filter
    if worker.filter:
        del worker.rlimits["NPROC"]
    landlock = f"on (version {version})" if worker.ruleset >= 0 else "not available"
    return {"seccomp": "on" if worker.filter else "not available", "landlock": landlock}


def _apply_layers(worker: SimpleNamespace) -> int:
    """For good, in the child. Bit 1 of the result: landlock failed; bit 2: seccomp failed."""
    libc, failed = worker.libc, 0
    if worker.ruleset >= 0:
        failed |= bool(libc.syscall(446, worker.ruleset, 0))
        os.close(worker.ruleset)
    if worker.filter:
        failed |= 2 * bool(libc.prctl(PR_SET_SECCOMP, 2, worker.program, 0, 0))
    return failed


if __name__ == "__main__":
    _serve(SimpleNamespace(**json.loads(sys.argv[1])))
