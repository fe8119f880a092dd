"""At least one test for each line of sandbox.py's docstring, with programs as hostile as the line says.

Time limits are 0.5 s where a test waits for one and 10 s elsewhere, so that a busy machine fails nothing else. Attacks are
small (32 processes, signal 0), so that they do no harm if the sandbox lets them through.
"""

import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import reduce
from pathlib import Path
from textwrap import dedent, indent
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the sources are one folder up; pytest may start anywhere
from tasks import sandbox as S  # noqa: E402

IDENTITY = "def f(x):\n    return x"
BARE = ("seccomp", "landlock")  # without them a program can do what any process can
SMALL = {"memory_mb": 256, "output_bytes": 100_000}
BOXES = {  # sandboxes for the whole module
    "box": {"workers": 2, **SMALL},
    "one": {},  # one worker, so it also ran the call before
    "judge": {"workers": 2, "memory_mb": 1024, "preamble": True},  # as competition judges run programs
    "short": {"workers": 5, "time_limit": 0.5, **SMALL},
    "bare": {"without": BARE, **SMALL}, "bare_short": {"without": BARE, "time_limit": 1.0},
    "layered": SMALL, "only_seccomp": {"without": ("landlock",)}, "no_seccomp": {"without": ("seccomp",)},
    "first_landlock": {"without": ("landlock 2",)},
}  # fmt: skip
LAYERED = ("layered", "only_seccomp", "first_landlock", "no_seccomp")  # skipped unless the kernel has all layers


def box_fixture(name: str):
    @pytest.fixture(scope="module", name=name)
    def fixture(request):
        if name in LAYERED and (unsafe := request.getfixturevalue("box").unsafe):
            pytest.skip(unsafe)
        with S.Sandbox(**{"workers": 1, "time_limit": 10.0, **BOXES[name]}) as box:
            assert works(box)  # every worker has started
            yield box

    return fixture


globals().update({f"{name}_": box_fixture(name) for name in BOXES})


def body(lines: str, args: str = "") -> str:
    """The program `def f(args): lines`."""
    return f"import os, sys, time\n\ndef f({args}):\n" + indent(dedent(lines).strip(), "    ")


def works(box) -> bool:
    """Does the next call of every worker return the right value?"""
    return all(box.call(IDENTITY, "f", [n]).value == n for n in range(len(box._workers)))


def pids(box) -> list[int]:
    return [worker.process.pid for worker in box._workers]


def comes(condition, within: float = 5.0) -> bool:
    deadline = time.monotonic() + within
    while not (come := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(come)


def running(pid: int) -> bool:
    """A zombie counts as ended, whoever has to reap it."""
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def ends(pids, within: float = 5.0) -> bool:
    return comes(lambda: not any(map(running, pids)), within)


NOTE = "with open('note', 'w') as file: print(os.getpid(), file=file)\n"
SLEEP = body(NOTE + "time.sleep(60)")


def notes(box, count: int = 1) -> list[Path]:
    """The files `note` that programs wrote in their working directories; waits until there are `count`."""
    found = lambda: [path for worker in box._workers for path in Path(worker.scratch).glob("*/note")]  # noqa: E731
    assert comes(lambda: len(found()) >= count and all(path.read_text().endswith("\n") for path in found()), 10.0)
    return found()


def ask(box, source: str, given=None, bound: int | None = None) -> S.Result:
    """given: the input of a script, the arguments of f, or (name of a function, arguments); by default f() if the program
    defines f, otherwise a script without input."""
    if given is None:
        given = [] if re.search("^(def f|f =)", source, re.M) else ""
    if isinstance(given, str):
        return box.run(source, given, bound)
    name, args = given if isinstance(given, tuple) else ("f", given)
    return box.call(source, name, args, bound)


def in_thread(fn, *args) -> Future:
    return ThreadPoolExecutor(1).submit(fn, *args)


# ---- What a program returns, prints or raises ----------------------------------------------------------------

nested = lambda depth: reduce(lambda inner, _: [inner], range(depth), [])  # noqa: E731
VALUES = [None, True, False, 1, 0, -1, 1.0, 0.1, 10**30, "", "é\n\t\u2028\0\ud800 <b>", [], {}, [1, [True, {"a": None}]]]
ODD = "error: TypeError: a tuple inside the result, or a key that is no string in a dictionary of it"
NOT_JSON = "error: TypeError: Object of type {} is not JSON serializable"
EQUAL = "    def __eq__(self, other): return True\n    __hash__ = None\ndef f():\n    return C"
METHODS = """class Solution:
    calls = 1
    def double(self, x, y=0): return [2 * x + y, self.calls, __name__]
    @staticmethod
    def plain(x): return x
class Broken:
    def __init__(self): raise ValueError("no")"""
LONG = {bound: f"output limit: more than {bound} bytes of output" for bound in (SMALL["output_bytes"], 10)}
LIMIT = SMALL["output_bytes"]
DEEP = "def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)"
NAMES = "def f(x: List[int]):\n    heapify(x)\n    return [x[0], gcd(*x), Counter(x)[6], math.inf > pow(2, 3, 5)]"
READ = "import sys\nprint([sys.stdin.buffer.read()])"
TIMERS = """import ctypes
made, timer = 0, ctypes.c_void_p()
while made < 1000 and ctypes.CDLL(None).timer_create(0, None, ctypes.byref(timer)) == 0: made += 1
print(made)"""
PROGRAMS = {  # sandboxes, program, what `ask` is given, the value or "status: error" ("...": any ending), and max_output
    "JSON values return with their types, a tuple at the top as a list": [
        *(("box", IDENTITY, [value], value) for value in VALUES), ("box judge", IDENTITY, [nested(400)], nested(400)),
        ("box", body("return x, y, y - y", "x, y"), [-math.inf, math.inf], [-math.inf, math.inf, math.nan]),
    ],
    "a value that JSON would change is an error": [  # [(1, 2)] == [[1, 2]] is False
        ("box judge", f"def f():\n    return {value}", None, error) for values, error in (
            (("[(1,)]", "(1, (2,))", "{'a': ()}", "[{'a': [(1,)]}]"), ODD),
            (("{1: 2}", "[{None: 1}]", "{'a': {True: 1}}", "({1.5: 1},)"), ODD),
            (("{1}",), NOT_JSON.format("set")), (("b''",), NOT_JSON.format("bytes")),
            (("(x := []) or x.append(x) or x",), "error: ValueError: Circular..."),
            (("[{'a': 10**50_000}]",), "error: ValueError: Exceeds the limit (50000..."),
            (("__import__('functools').reduce(lambda x, _: [x], range(10**5), [])",), "error: RecursionError..."),
        ) for value in values
    ],
    "integers of up to 50,000 digits return": [
        *(("one", f"def f():\n    return [{n}, {{'a': {n} + 1}}]", None, [eval(n), {"a": eval(n) + 1}])
          for n in ("10**4300", "-10**5000", "10**49_999")),
        ("one", "print(10**49_999)", None, f"1{'0' * 49_999}\n"),
    ],
    "an object that is equal to everything earns nothing": [
        ("box", f"class C:\n{EQUAL}()", None, NOT_JSON.format("C")),
        *(("box", f"class C({type(value).__name__}):\n{EQUAL}({value!r})", None, value) for value in ([1], 7, "a", {"a": 1})),
    ],
    "a method is called on a new object of its class": [
        ("box", METHODS, (name, [3]), wanted) for name, wanted in (
            ("Solution.double", [6, 1, "program"]), ("Solution.plain", 3), ("Broken.double", "error: ValueError: no (line 7)"),
            ("Solution.triple", "error: AttributeError: 'Solution' object has no attribute 'triple'"),
            ("Nobody.double", "error: NameError: name 'Nobody' is not defined"),
            ("print", "error: NameError: name 'print' is not defined"),
        )
    ],
    "every other end is one line of error": [  # which max_output does not cut
        ("box", source, None, wanted, 10) for source, wanted in (
            ("def g():\n    raise KeyError('a')\ndef f():\n    g()", "error: KeyError: 'a' (line 2)"),
            ("def f():\n    assert False", "error: AssertionError (line 2)"),
            ("def f():\n    raise ValueError('a\\n  b\\tc\\0d')", "error: ValueError: a b c d (line 2)"),
            ("def f():\n    raise ValueError('\\ud800')", "error: ValueError: \\ud800 (line 2)"),
            ("def f(:\n    pass", "error: SyntaxError: invalid syntax (line 1)"),
            ("def f():\n    raise SystemExit(0)", "error: SystemExit: 0 (line 2)"),
            ("class E(Exception):\n    def __str__(self): raise self\ndef f():\n    raise E", "error: E (line 4)"),
            ("def f():\n    raise ValueError('x' * 10**6)", f"error: ValueError: {'x' * S.ERROR_CHARS} (line 2)"),
            ("def f():\n    raise type('X' * 90_000, (Exception,), {})", f"error: {'X' * 100} (line 2)"),
            ("import os\ndef f(): os._exit(0)", "error: exited without a result (exit code 0)"),
            ("import os\ndef f(): os.closerange(0, 99)", "error: exited without a result (exit code 0)"),
            ("import os\nprint('a', flush=True)\nos.closerange(3, 99)\n1 / 0", "error: exited without a result (signal..."),
            ("def f():\n    x = []\n    while True: x.append(bytearray(10**6))", "memory: MemoryError"),
            ("print(1)\nx = 1 / 0", "error: ZeroDivisionError: division by zero (line 2)"),
            ("print(1)\nraise KeyboardInterrupt", "error: KeyboardInterrupt (line 2)"),
            ("print('\\ud800')", "error: UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800' in position 0..."),
            ("print(1)\nimport ctypes\nctypes.string_at(0)", "error: exited without a result (signal 11)"),
        )
    ],
    "too much output is its own status": [("box", source, None, LONG[min(bound, LIMIT)], bound) for source, bound in (
        ("while True: print('x' * 10_000)", LIMIT), (f"print('x' * {LIMIT})", LIMIT), ("print('é' * 5)", 10),  # the line's end
        ("print('x' * 10**6, flush=True)\nraise ValueError", LIMIT),
        ("import atexit\natexit.register(lambda: print('x' * 10**6))", LIMIT),
        ("import os\nprint('x' * 60_000, flush=True)\nprint('x' * 60_000, flush=True)\nos._exit(0)", LIMIT),
        ("def f():\n    return 'x' * 10**7", LIMIT), ("def f():\n    return 'x' * 9", 10),  # eleven with its quotes
        ("print('x' * 200_000)", 10**9),  # output_bytes is lower
    )],
    "output of just max_output bytes is kept": [
        ("box", "def f(x):\n    return len(x)", ["é" * 300_000], 300_000),  # arguments have no limit
        *(("box", "def f(n):\n    return 'x' * n", [n - 2], "x" * (n - 2), n) for n in (LIMIT, 10)),
        *(("box", f"print('x' * {n - 1})", "", "x" * (n - 1) + "\n", n) for n in (LIMIT, 10)),
    ],
    "deep recursion is an error, with the preamble above 50,000": [
        ("box", DEEP, [900], 900), ("box", DEEP, [1100], "error: RecursionError..."), ("judge", DEEP, [45_000], 45_000),
        ("judge", DEEP, [51_000], "error: RecursionError..."), ("judge", f"@functools.cache\n{DEEP}", [24_900], 24_900),
        ("judge", "def f(): return f()\nf()", "", "error: RecursionError..."),
        ("box", f"import sys\nsys.setrecursionlimit(10**6)\n{DEEP}\nprint(f(10**5))", "", "100000\n"),
    ],
    "a function reads nothing and prints to nowhere": [("box", body("""
        for fd in (0, 1, 2): os.write(fd, b"ok\\t1\\n")
        return sys.stdin.read(), [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)]
    """), None, ["", ["/dev/null"] * 3])],
    "only the standard library can be imported, and the preamble's names need no import": [
        ("box", body("return [path for path in sys.path if 'site-packages' in path or path.endswith('tasks')]"), None, []),
        ("box", "import pytest\ndef f(): pass", None, "error: ModuleNotFoundError: No module named 'pytest' (line 1)"),
        ("judge", NAMES, [[9, 6]], [6, 3, 1, True]),
        ("box", NAMES, [[9, 6]], "error: NameError: name 'List' is not defined (line 1)"),
        ("judge", "print(max(accumulate(map(int, stdin.read().split()))))", "1 2 3", "6\n"),
        ("judge", "stdout.write('a\\n')\nprint('b')\nstdout.write(stdin.readline())", "c\n", "a\nb\nc\n"),
        ("box", body("import heapq\nreturn [m for m in ('torch', 'numpy', 'site') if m in sys.modules]"), None, []),
    ],
    "a script reads the input of its own call only": [
        ("one", "print(input())", "first\nsecond\n", "first\n"),
        ("one", READ, "third", "[b'third']\n"), ("one", READ, "", "[b'']\n"),
        ("one", READ, "a\ud800\n", "[b'a\\xed\\xa0\\x80\\n']\n"),  # a lone surrogate as its bytes
        ("one", "print(input())", "\ud800\n", "error: UnicodeDecodeError..."),
        ("one", "print(sum(map(int, open(0).read().split())))", "7 " * 2_000_000, "14000000\n"),
    ],
    "timers and CPU time are limited, and no handler of core dumps starts": [
        ("box", TIMERS, "", "256\n"),
        ("box", "import resource as r\nprint(r.getrlimit(r.RLIMIT_CORE), r.getrlimit(r.RLIMIT_CPU))", "", "(1, 1) (12, 12)\n"),
    ],
    "no capability is left": [("layered only_seccomp no_seccomp", body("""
        import ctypes, struct
        sets = (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capget(struct.pack("Ii", 0x20080522, 0), sets) == 0
        return list(sets)
    """), None, [0] * 6)],
    "the working directory is usable": [("layered", body("""
        import pathlib, sqlite3, tempfile
        os.makedirs("a/b")
        with open("a/b/c", "w") as file: file.write("text")
        os.rename("a/b/c", "a/d")
        with tempfile.TemporaryFile(dir=".") as file: file.write(b"x")
        sqlite3.connect("f").execute("create table t (x)")
        return sorted(str(path) for path in pathlib.Path().rglob("*")) + [open("a/d").read(), open("/dev/zero").read(1)]
    """), None, ["a", "a/b", "a/d", "f", "text", "\0"])],
}  # fmt: skip


@pytest.mark.parametrize("claim", PROGRAMS)
def test_programs(request, claim):
    for names, source, given, wanted, *bound in PROGRAMS[claim]:
        for name in names.split():
            box = request.getfixturevalue(name)
            result = ask(box, source, given, *bound)
            told = result.value if result.status == "ok" else f"{result.status}: {result.error}"
            if isinstance(wanted, str) and wanted.endswith("..."):
                told = told[: len(wanted) - 3] + "..."
            assert repr(told) == repr(wanted), source  # repr: True is not 1, 1 is not 1.0
            assert 0 < result.seconds < 10 and (result.status == "ok") == (result.error == "") and works(box)


def test_arguments_that_are_not_json_raise(box):
    for argument, error in [({1}, TypeError), (nested(10**5), RecursionError)]:
        with pytest.raises(error):
            box.call(IDENTITY, "f", [argument])
    assert works(box)


def test_numbers_of_numpy_count_as_pythons():
    pytest.importorskip("numpy")
    values = "[np.float32(1.5), np.int64(3), np.bool_(True), np.array(7)], {'a': np.float64(0.5)}"
    warm = "import atexit, numpy, sys\nsys.cache = [1]\natexit.register(print, 'of the worker, not of a program')"
    with S.Sandbox(workers=1, memory_mb=2048, packages=True, warm=warm) as box:
        result = box.call(f"import numpy as np\ndef f():\n    return {values}", "f", [])
        assert repr(result.value) == repr([[1.5, 3, True, 7], {"a": 0.5}])
        result = box.call("import numpy as np\ndef f():\n    return np.array([1, 2])", "f", [])
        assert result.error == "TypeError: Object of type ndarray is not JSON serializable"
        for _ in range(2):  # every call finds what `warm` loaded, and packages, but nothing of another call
            source = body("import pytest\nsys.cache.append(2)\nreturn ['numpy' in sys.modules, 'torch' in sys.modules], sys.cache")
            assert box.call(source, "f", []).value == [[True, False], [1, 2]]
        assert box.run("print('sys' in globals())", "").value == "False\n"


def test_frames_are_the_last_three_lines_of_the_program_in_the_traceback(box):
    source = """import json
def third(text): return json.loads(text)  # json's own lines are not the program's
def second(text): return third(text)
def first(text):
    return (
        second(text) + 1)
def f(text): return first(text)"""
    frames = ("line 6, in first: second(text) + 1)", "line 3, in second: def second(text): return third(text)",
              "line 2, in third: def third(text): return json.loads(text)  # json's own lines are not the program's")  # fmt: skip
    assert box.call(source, "f", ["["]).frames == box.run(source + "\nf('[')", "").frames == frames
    assert box.call(source, "f", ["1"]).frames == ()
    long = f"line 2, in f: 1 / 0  # {'x' * 200_000}"
    assert box.call(f"def f():\n    {long[14:]}", "f", []).frames == (long[: S.ERROR_CHARS],)


# ---- Time --------------------------------------------------------------------------------------------------

FOREVER = "while True: pass"
SWALLOW = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
DEAF = "import signal as s\nfor n in set(s.Signals) - {9, 19}: s.signal(n, s.SIG_IGN)\n" + FOREVER
LOOPS = [
    body(f"os.closerange(0, 99)\n{FOREVER}"), FOREVER + "\ndef f(): pass", body("time.sleep(60)"), body("while True: print()"),
    body("return 9**9**8"), body(SWALLOW), body(DEAF),
    body(f"import threading\ndef g():\n    {FOREVER}\nfor _ in range(4): threading.Thread(target=g).start()\ng()"),
    body(f"class E(Exception):\n    def __str__(self):\n        {FOREVER}\nraise E"),
    f"print(42, flush=True)\n{FOREVER}",  # scripts, this one after the right output
    f"import threading\ndef g():\n    {FOREVER}\nthreading.Thread(target=g).start()",
    f"import atexit\n@atexit.register\ndef g():\n    {FOREVER}",
    f"import sys\nclass W:\n    def flush(self):\n        {FOREVER}\nsys.stdout = W()",
    f"class A:\n    def __del__(self):\n        {FOREVER}\na = A()\na.a = a",
]  # fmt: skip


def test_every_loop_is_killed_at_the_limit_and_the_next_calls_work(short):
    for source, result in zip(LOOPS, short.run_many(lambda source: ask(short, source), LOOPS)):
        assert result[:3] == ("timeout", None, "no result within 0.5 s") and 0.5 <= result.seconds < 1.5, source
    assert works(short)


ESCAPE = """
    def stay():
        open(f"{folder}/{os.getpid()}", "w").close()
        time.sleep(60)
    if how == "stop": os.kill(os.getpid(), 19)
    for _ in range(5 * (how == "bomb")):  # 32 processes, each in a session of its own
        if os.fork() == 0: os.setsid()
    if how == "bomb": stay()
    if os.fork() == 0:
        if how != "same group": os.setsid()
        if how == "daemon" and os.fork(): os._exit(0)
        stay()
    while not os.listdir(folder): time.sleep(0.01)
    time.sleep(last)
    return "escaped"
"""


@pytest.mark.parametrize("how, last, status, count", [
    ("stop", 0, "timeout", range(1)), ("bomb", 0, "timeout", range(6, 33)), ("own session", 60, "timeout", range(1, 2)),
    *((how, 0, "ok", range(1, 2)) for how in ("same group", "own session", "daemon")),
])  # fmt: skip
def test_processes_that_a_program_starts_are_dead_after_the_call(bare_short, how, last, status, count, tmp_path):
    assert bare_short.call(body(ESCAPE, "folder, how, last"), "f", [str(tmp_path), how, last]).status == status
    escaped = [int(path.name) for path in tmp_path.iterdir()]
    assert len(escaped) in count and not any(map(running, escaped)) and works(bare_short)


# ---- Output, files, threads --------------------------------------------------------------------------------

LIMITS = [
    ("files = [open('/dev/null') for _ in range(100)]", "error", "OSError: [Errno 24] Too many open files"),
    ("open('a', 'w').write('x' * 200_000)", "error", "OSError: [Errno 27] File too large"),
    ("x = bytearray(300 << 20)", "memory", "MemoryError"), ("open('a', 'w').write('x' * 90_000)", "ok", ""),
]  # fmt: skip
RAISE = """import os, resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
    resource.setrlimit(kind, (1 << 40, 1 << 40))
    resource.prlimit(0, kind, (1 << 40, 1 << 40))
for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU): resource.prlimit(os.getppid(), kind, (0, 0))  # the worker's
"""


@pytest.mark.parametrize("lines, status, error", LIMITS)
def test_limits_hold_and_raising_them_seems_to_work_and_changes_nothing(layered, bare, lines, status, error):
    before, box = pids(layered), layered
    for result in (box.run(lines, ""), box.run(RAISE + lines, ""), box.run(RAISE + lines, ""), bare.run(lines, "")):
        assert result.status == status and result.error.startswith(error)
    assert works(box) and ("'a'" in lines or pids(box) == before)  # a worker whose directory was touched is replaced


START = """import threading, time
threading.stack_size({})
start = lambda: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
"""


def test_a_thread_bomb_is_stopped_and_200_threads_are_granted(short, judge):
    """The first two by the memory of their stacks or the time limit, the others by their number."""
    bombs = [START + "while True:\n    start()", START + "while True:\n    try: start()\n    except BaseException: pass"]
    assert short.run(bombs[0].format(0), "").status in ("timeout", "error", "memory")
    assert short.run(bombs[1].format(0), "").status == "timeout" and works(short)
    for source in (bombs[1].format(1 << 15), START.format(1 << 15) + "for _ in range(300): start()\ntime.sleep(9)"):
        for result in (judge.run(source, ""), judge.call(source, "f", [])):
            assert result[:3] == ("error", None, "more than 256 threads") and result.seconds < 5.0
    source = START.format(1 << 16) + "for _ in range(200): start()\ntime.sleep(0.05)\nprint(threading.active_count())"
    assert works(judge) and judge.run(source, "").value == "201\n"


FILL = [  # the last three make ever more files
    "with open(str(n), 'wb') as file: file.write(bytes(16 << 20))",
    "with open('a', 'wb+') as file:\n    file.truncate(16 << 20)\n    mmap.mmap(file.fileno(), 0).write(bytes(16 << 20))\n"
    "os.unlink('a')",
    "for i in range(10**5): os.close(os.open(f'{n}-{i}', os.O_CREAT))",
    "for i in range(10**5):\n    os.mkdir(str(i))\n    if i % 100 == 0: os.chdir(str(i))",
    "os.mkdir('../d', 0o300)\nfor i in range(10**6): os.symlink('/', f'../d/{i}')",  # unreadable
]


def test_the_disk_is_not_filled_and_invalid_utf8_costs_the_caller_little(layered, monkeypatch):
    """50 times 16 MiB, of which 272 MiB are granted, or 5 million files, of which 1000 are."""
    for lines in FILL:
        monkeypatch.setattr(S.tempfile, "tempdir", "/dev/shm" if lines == FILL[0] else None)  # where only system calls count
        with S.Sandbox(workers=1, time_limit=60.0, output_bytes=16 << 20) as box:
            if lines == FILL[1] and not os.major(os.stat(box._workers[0].scratch).st_dev):
                continue  # on a tmpfs, writes through shared mappings do not count
            much = f"{272 << 20} bytes written" if lines in FILL[:2] else "1000 files, or a directory that cannot be read"
            result = box.run("import mmap, os\nfor n in range(50):\n" + indent(lines, "    "), "")
            assert result[:3] == ("output limit", None, f"more than {much}") and result.seconds < 30
            assert box.run("import os\nprint(os.listdir(), os.listdir('..'))", "").value == "[] ['work']\n"
            before, source = time.process_time(), "import os\nfor _ in range(16): os.write(1, b'\\xff' * (1 << 20))"
            assert box.run(source, "", max_output=1 << 16).status == "output limit"
            assert box.run(source, "").value == "\ufffd" * (16 << 20)
            assert time.process_time() - before < 1.0  # takes 0.15


# ---- What a program sees and leaves behind -----------------------------------------------------------------


def test_nothing_set_by_one_call_is_seen_by_the_next(one):
    source = """import builtins, json, os, sys
def f():
    seen = [hasattr(builtins, "mark"), hasattr(sys, "mark"), "MARK" in os.environ, "mark" in globals()]
    globals()["mark"] = builtins.mark = sys.mark = json.loads = sys.stdin = 1
    os.environ["MARK"] = "1"
    sys.setrecursionlimit(100)
    return seen
if __name__ == "__main__": print(f())"""
    for _ in range(3):
        assert one.call(source, "f", []).value == [False] * 4 and one.run(source, "").value == f"{[False] * 4}\n"


SEEN = """
    both = [os.stat(path) for path in (".", "..")]
    times = [[stat.st_atime_ns, stat.st_mtime_ns, stat.st_ctime_ns] for stat in both]
    return [os.listdir(), len(os.listdir("..")), [[stat.st_size, stat.st_nlink] for stat in both]], times, os.getcwd()
"""


@pytest.mark.parametrize("leave", [
    "pass", "open('a', 'w').write('x')", "open('a', 'w').close(); os.unlink('a')", "open('../beside', 'w').write('x')",
    "open('../beside', 'w').close(); os.unlink('../beside')",
    "os.makedirs('a/b/c'); os.symlink('/', 'a/b/link')", "os.rmdir(os.getcwd())", "os.rename(os.getcwd(), '../moved')",
    "[(os.mkdir('d'), os.chdir('d')) for _ in range(950)]",
    "[open(f'../{n:0200}', 'w').close() for n in range(300)]",  # the folder grows
    "os.listdir(), os.listdir('..')", "os.chmod('.', 0o751)", "os.setxattr('.', 'user.a', b'x')",
])  # fmt: skip
def test_the_working_directory_shows_nothing_of_the_call_before(one, no_seccomp, leave):
    one = no_seccomp if "chmod" in leave or "xattr" in leave else one
    before, _, _ = one.call(body(SEEN), "f", []).value
    strict = not os.statvfs(one._workers[0].scratch).f_flag & (os.ST_NOATIME | os.ST_RELATIME)  # each reading sets the time
    lines = f"used = os.getcwd()\ntime.sleep(0.02)\nstart = time.time_ns()\ntime.sleep(0.02)\n{leave}\ntime.sleep(0.02)"
    used, start, end = one.call(body(lines + "\nreturn used, start, time.time_ns()"), "f", []).value
    after, times, now = one.call(body(SEEN), "f", []).value
    assert before == after and before[:2] == [[], 1] and not any(start < at < end - 10**7 for at in sum(times, []))
    assert (now == used) == (leave == "pass" or "listdir" in leave and not strict) == os.path.exists(used)


def test_locked_directories_and_links_are_removed_without_following_links(bare, one, tmp_path):
    lock = "os.makedirs('a/b/c'); os.symlink('/', 'a/b/link')\nfor path in ('a/b', 'a', '.'): os.chmod(path, 0)"
    assert works(bare)
    used = f"{bare._workers[0].scratch}/work"
    assert os.path.exists(used) and ask(bare, body(lock)).status in ("ok", "output limit")  # if the files are counted just then
    assert ask(bare, body("return os.listdir()")).value == [] and not os.path.exists(used)
    swap = "import os\nhere = os.getcwd()\nos.chdir('..')\nos.rmdir(here)\nos.symlink(input(), here)"
    tmp_path.chmod(0o750)
    for kept in ([], ["file"]):  # a link to an empty folder, then to one with a file
        for name in kept:
            (tmp_path / name).touch()
        assert one.run(swap, str(tmp_path)).status == "ok" and works(one)
        assert tmp_path.stat().st_mode & 0o777 == 0o750 and os.listdir(tmp_path) == kept
        assert one.run("import os; print(os.getcwd())", "").value.startswith(one._workers[0].scratch)
    (link := tmp_path.with_name("link")).symlink_to(tmp_path)
    tmp_path.chmod(0o550)
    S._remove(str(link))
    assert not os.path.lexists(link) and tmp_path.stat().st_mode & 0o777 == 0o550 and os.listdir(tmp_path) == ["file"]


# ---- Forged answers ----------------------------------------------------------------------------------------

FORGE = """
    report, output = (fd for fd in range(3, 64) if os.path.exists(f"/proc/self/fd/{fd}"))  # pipes
    os.write(output, text.encode("latin-1"))
    os.write(report, line.encode("latin-1"))
    time.sleep(60)
"""


@pytest.mark.parametrize("line, text, wanted", [
    ("ok\0\n", "99", 99), ("ok\0a\0b\n", "9" * 9000, 10**9000 - 1),
    *(("ok\0\n", text, "the answer cannot be read: ") for text in ("nonsense", "1 2", "[" * 50_000, "\xff", "9" * 60_000)),
    *((line, "1", "the answer cannot be read") for line in ("ok\n", "\n", "timeout\0\n", "internal\0\n", "sok\0\n", "\xff\0\n")),
    ("error\0\xff\0b\0c\0d\0e\n", "1", "\ufffd"), ("x" * 70_000, "1", "exited without a result (signal 9)"),
])  # fmt: skip
def test_a_forged_answer_is_only_an_answer(box, line, text, wanted):
    result = box.call(body(FORGE, "line, text"), "f", [line, text])
    assert result.value == wanted if result.status == "ok" else result.error.startswith(wanted) and len(result.frames) <= S.FRAMES
    result = box.run(f"import os, time\nline, text = {line!r}, {text!r}\nprint('wrong', flush=True)\n" + dedent(FORGE), "")
    assert result.status in ("ok", "error") and (result.value or "wrong").startswith("wrong")  # judged by what it printed
    assert works(box)


@pytest.mark.parametrize("lines, printed", [
    ("json.JSONEncoder.encode = lambda *a: '\"forged\"'\njson.dumps = json.JSONEncoder().encode", None),
    ("sys.stdout = None", ""), ("sys.modules.clear()", None),
    ("builtins.len = builtins.memoryview = builtins.str = lambda *a: 'forged'", None),
    ("write = os.write\nos.write = lambda fd, data: write(fd, b'ok\\t\"forged\"\\n')", None),
    ("sys.modules['__main__']._write = lambda fd, data: os.write(fd, b'\"forged\"')", None),
    ("sys.stdout = type('W', (), {'write': lambda self, text: 0, 'flush': lambda self: 0})()", ""),
    ("builtins.print = lambda *a: os.write(1, b'forged')", "forged"), ("gc.collect = os.read = os._exit = None", "honest\n"),
    ("atexit._run_exitfuncs = lambda: os.write(1, b'forged')", "forgedhonest\n"),
    ("class U(list):\n    def write(self, text, to=sys.stdout): to.write(text)\n    def flush(self): pass\nsys.stdout = U()",
     "honest\n"),
])  # fmt: skip
def test_overwriting_what_the_sandbox_uses_changes_only_ones_own_answer(box, lines, printed):
    lines = f"import atexit, builtins, gc, json, os, sys\n{lines}\n"
    result = box.call(body(lines + "return 'honest'"), "f", [])
    assert result.status in ("ok", "error") and result.value in ("honest", "forged", None)
    result = box.run(lines + "print('honest')", "")
    assert (result.status, result.value) == ("ok", printed) or printed is None and result.value in ("honest\n", "", None)
    assert works(box)


# ---- Scripts -----------------------------------------------------------------------------------------------

NUMBERS = "3\n1 2\n"
CYCLE = "class A:\n    def __init__(self): self.me = self\n    def __del__(self): print('b')\n"
PYTHON = [  # source, standard input
    ("import sys\nprint(sys.stdin.buffer.readline(), sys.stdin.buffer.read())", NUMBERS),
    ("print(open('/dev/stdin').read())", NUMBERS),
    ("import mmap, os\nprint(mmap.mmap(0, 0, prot=mmap.PROT_READ)[:], os.read(0, os.fstat(0).st_size))", NUMBERS),
    ("import sys\nprint([input(), *sys.stdin])", "a\r\nb\rc\n\nd"),
    ("print(input()[::-1], '\\u2028', ascii(input()))", "héß\U0001f600\n\u2028x\n"),
    ("import sys\nsys.stdout.buffer.write(b'a\\0b\\xff\\xfe\\xc3(b\\xed\\xa0\\x80\\n')", ""),  # no UTF-8
    ("import os, sys\nprint('\\udc80', file=sys.stderr)\nprint('a')\nos.closerange(3, 99)\nprint(__builtins__.len('b'))", ""),
    ("import os, time\nos.closerange(3, 99)\nprint('a', flush=True)\ntime.sleep(0.05)\nprint('b')", ""),
    ("import sys, pickle\nclass A: pass\nif __name__ == '__main__':\n"
     "    print(pickle.loads(pickle.dumps(A())).__class__ is A, sys.modules['__main__'].A is A, 'A' in globals())", ""),
    ("import sys\nprint(len(sys.argv), sys.argv[1:], sys.stdin.isatty(), sys.stdout.isatty(), sys.stdin.fileno())", ""),
    ("import sys, threading\ndef main():\n    n = int(input())\n    def f(n): return n and 1 + f(n - 1)\n    print(f(n))\n"
     "sys.setrecursionlimit(1 << 25)\nthreading.stack_size(2**27)\nthreading.Thread(target=main).start()", "20000\n"),
    ("import threading, time\ndef g():\n    time.sleep(0.05)\n    print('b')\ndef f():\n    time.sleep(0.05)\n"
     "    threading.Thread(target=g).start()\nthreading.Thread(target=f).start()\nprint('a')", ""),
    ("import sys\nprint('a')\nsys.exit(1)\nprint('b')", ""), ("print('a')\nexit()", ""),
    ("import os\nprint('a', flush=True)\nos._exit(3)", ""), ("import atexit\natexit.register(lambda: 1 / 0)\nprint('a')", ""),
    ("import atexit, sys\natexit.register(print, 'b')\n@atexit.register\ndef f(): print('a')\nprint('0')\nsys.exit()", ""),
    ("import os\nout = os.fdopen(1, 'w')\nout.write('a\\n')", ""),  # a second stream, never closed
    (CYCLE + "a = A()\nprint('a')", ""),
    (CYCLE + "A()\nprint('a')", ""), (CYCLE + "import gc\na = [A(), A()]\ngc.collect()\ngc.disable()\nprint('a')", ""),
    (CYCLE + "a, b = A(), [[n] for n in range(10**5)]\nprint('a')", ""),  # in an old generation
    ("import os\nclass A: pass\na = A()\na.a, a.out = a, os.fdopen(1, 'w')\na.out.write('a\\n')", ""),
    ("def f():\n    try: yield 1\n    finally: print('b')\ng = f()\nprint(next(g))", ""),  # a generator left open
    ("import os\nprint('a', flush=True)\nprint('lost')\nos.close(1)", ""), ("with open(1, 'w') as out: out.write('a\\n')", ""),
    ("import sys\nprint('a')\nsys.stdout.close()", ""), ("import sys\nprint('a')\ndel sys.stdout", ""),
    ("import asyncio\nasync def f(n):\n    await asyncio.sleep(0.01)\n    return await asyncio.to_thread(lambda: n)\n"
     "async def main(): print(await asyncio.gather(*map(f, range(3))))\nasyncio.run(main())", ""),
    ("from concurrent.futures import ThreadPoolExecutor as Pool\nprint(list(Pool(3).map(len, ['a', 'bc'])))", ""),
]  # fmt: skip


@pytest.mark.parametrize("source, text", PYTHON)
def test_a_script_prints_what_python_prints(one, tmp_path, source, text):
    path = tmp_path / "program.py"
    path.write_text(source)
    (tmp_path / "input").write_bytes(text.encode())
    with open(tmp_path / "input", "rb") as file:
        real = subprocess.run([sys.executable, "-I", "-X", "utf8", path], stdin=file, capture_output=True, timeout=30)
    result = one.run(source, text)
    assert (result.status, result.value) == ("ok", real.stdout.decode("utf-8", "replace")) and result.seconds < 5.0


def test_an_exception_in_a_thread_is_reported_with_the_output(box):
    source = "import threading\ndef f():\n    return [][0]\nt = threading.Thread(target=f)\nt.start()\nt.join()\nprint('after')"
    told = ("ok", "after\n", "IndexError: list index out of range (line 3)", ("line 3, in f: return [][0]",))
    assert box.run(source, "")[:4] == told
    assert box.run("print('fine')", "")[:4] == ("ok", "fine\n", "", ())
    assert box.run("import sys, threading\nthreading.Thread(target=sys.exit).start()", "").error == ""


# ---- The kernel's layers -----------------------------------------------------------------------------------


def test_layers_and_what_is_missing_are_one_line_each(layered, only_seccomp, first_landlock, no_seccomp, bare):
    no, on, version = "not available", "on", r"on \(version \d+\)"
    for box, seccomp, landlock, missing in [
        (layered, on, version, ""), (first_landlock, on, r"on \(version 1\)", ""), (only_seccomp, on, no, "landlock"),
        (no_seccomp, no, version, "seccomp"), (bare, no, no, "seccomp and landlock"),
    ]:  # fmt: skip
        assert re.fullmatch(f"process per test, rlimits, seccomp {seccomp}, landlock {landlock}", box.layers)
        assert re.fullmatch(f"{missing} not available: a program could .*" if missing else "", box.unsafe) and works(box)


LIBC = """
import ctypes, fcntl, shutil, signal, socket, struct, subprocess, threading
libc = ctypes.CDLL(None, use_errno=True)
def system(name, *args):
    if getattr(libc, name)(*args) < 0: raise OSError(ctypes.get_errno(), name)
pid, pair, here = os.getppid(), lambda: socket.socketpair()[0].detach(), lambda: os.open('.', os.O_RDONLY)
"""
READV = """
class Part(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
page = ctypes.create_string_buffer(8)
mine, its = Part(ctypes.addressof(page), 8), Part(id(os), 8)  # the worker has os at the same address
system("process_vm_readv", pid, ctypes.byref(mine), 1, ctypes.byref(its), 1, 0)
"""
SCOPED = ["os.kill(pid, 9)", "socket.create_connection(('127.0.0.1', port))", "socket.create_server(('127.0.0.1', 0))",
          "socket.socket(socket.AF_UNIX).connect('\\0' + name)", READV, "system('ptrace', 16, pid, 0, 0)"]  # fmt: skip
ATTACKS = SCOPED + [  # each fails with EPERM; signal 0 and a bounded fork do no harm where one succeeds
    "os.fork()", "os.execv(sys.executable, [sys.executable, '-c', ''])", "subprocess.run([sys.executable, '-c', ''])",
    "os.setsid()", "os.setuid(65534)",
    "if os.system('true') != 0: raise PermissionError(1, 'system')", "signal.pthread_kill(threading.get_ident(), 0)",
    "os.kill(-1, 0)", "os.memfd_create('a')",
    "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, pid)", "fcntl.fcntl(os.pipe()[0], 15, struct.pack('ii', 1, pid))",  # F_SETOWN_EX
    "fcntl.fcntl(os.open(os.__file__, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)",
    "fcntl.fcntl(here(), fcntl.F_NOTIFY, fcntl.DN_ACCESS)", "fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)",  # F_SETPIPE_SZ
    "fcntl.ioctl(pair(), 0x8901, struct.pack('i', pid))",  # FIOSETOWN
    "fcntl.ioctl(pair(), 0x5452, struct.pack('i', 1))", "fcntl.ioctl(0, 0x5412, b'x')",  # FIOASYNC, TIOCSTI
    "fcntl.ioctl(here(), 0x40087602, bytes(8))", "fcntl.ioctl(here(), 0x40086602, bytes(8))",  # FS_IOC_SETVERSION, SETFLAGS
    "system('prctl', 4, 0, 0, 0, 0)", "system('prctl', 1, 0, 0, 0, 0)",  # not dumpable, no death signal
    "system('inotify_init')", "system('inotify_add_watch', 0, b'/', 1)", "system('unshare', 0x10000000)",
    "os.posix_fallocate(os.open('a', os.O_CREAT | os.O_RDWR), 0, 9)", "os.sched_setaffinity(pid, [0])",
    "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', '/nowhere')", "socket.socketpair(socket.AF_INET)",
    "socket.send_fds(socket.socketpair()[0], [b'x'], [0])", "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "os.setpriority(os.PRIO_PROCESS, pid, 19)",  # the rest destroys what other processes of the user share
    *(f"system({call!r}, 99, 0, 0, 0)" for call in "shmctl semctl msgctl semop semtimedop msgsnd msgrcv".split()),
]  # fmt: skip
CHANGES = [  # landlock denies all but the last four, seccomp those
    "open(f'{folder}/file', 'w').write('x')", "open(f'{folder}/file', 'a').write('x')", "open(f'{folder}/new', 'w').close()",
    "os.unlink(f'{folder}/file')", "os.rmdir(f'{folder}/empty')", "shutil.rmtree(folder)", "os.mkdir(f'{folder}/new')",
    "os.rename(f'{folder}/file', f'{folder}/new')", "os.rename(f'{folder}/file', 'file')", "os.mkfifo(f'{folder}/new')",
    "open('a', 'w').close(); os.rename('a', f'{folder}/file')", "open('a', 'w').close(); os.link('a', f'{folder}/new')",
    "os.link(f'{folder}/file', 'file'); open('file', 'w').close()", "os.symlink('/', f'{folder}/new')",
    "os.symlink(f'{folder}/file', 'link'); open('link', 'w').close()", "os.truncate(f'{folder}/file', 0)",
    "os.mknod('device', 0o20600, os.makedev(1, 5))",  # another /dev/zero, in the working directory
    "os.chmod(f'{folder}/file', 0o777)", "os.chown(f'{folder}/file', os.getuid(), os.getgid())",
    "os.utime(f'{folder}/file', (0, 0))", "os.setxattr(f'{folder}/file', 'user.a', b'x')",
]  # fmt: skip
MEMORY = [  # denied even without landlock
    *(f"open(f'/proc/{{{who}}}/{file}', 'rb').read(0)" for file in ("mem", "maps", "environ", "auxv") for who in ("pid", "caller")),
    "open(f'/proc/{caller}/task/{caller}/mem', 'rb').read(0)", "[os.stat(f'/proc/{caller}/fd/{fd}') for fd in (0, 1, 2)]",
]  # fmt: skip
READS = MEMORY + [
    "open(f'{folder}/file').read()", "os.listdir(folder)", "os.symlink(f'{folder}/file', 'link'); open('link').read()",
    "os.read(os.open(f'{folder}/file', os.O_RDONLY), 9)", "open(f'/proc/{pid}/cmdline').read()", "os.listdir('/')",
    "open(f'/proc/{caller}/cmdline').read()", "os.listdir(f'/proc/{caller}/fd')", "open(source).read()",
    "open('/etc/passwd').read()", "os.listdir(home)",
]  # fmt: skip
EITHER = ("PermissionError: [Errno 1]", "PermissionError: [Errno 13]", "OSError: [Errno 18]")  # seccomp or landlock


@pytest.fixture(scope="module")
def listener():
    """Port and abstract name of sockets that no program may reach."""
    name = f"sandbox-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("\0" + name)
        unix.listen()
        yield tcp.getsockname()[1], name
        for server in (tcp, unix):
            server.setblocking(False)
            with pytest.raises(BlockingIOError):  # none did
                server.accept()


def tree(folder: Path) -> list:
    return [(str(p), (s := p.lstat()).st_mode, s.st_uid, s.st_mtime, p.read_text() if p.is_file() else "", os.listxattr(p))
            for p in sorted(folder.rglob("*"))]  # fmt: skip


@pytest.mark.parametrize("lines", ATTACKS + CHANGES + READS)
def test_the_layers_deny(layered, only_seccomp, first_landlock, no_seccomp, bare, listener, tmp_path, lines):
    """Each layer also denies its part if the other is missing. What cannot be read exists: without layers it is read."""
    (tmp_path / "file").write_text("kept")
    (tmp_path / "empty").mkdir()
    scopes = int(re.search(r"version (\d+)", no_seccomp.layers)[1]) >= 6  # landlock confines signals and sockets
    boxes = [layered] + [only_seccomp] * (lines in ATTACKS + MEMORY) + [first_landlock] * (lines in CHANGES + READS)
    boxes += [no_seccomp] * (lines in CHANGES[:-4] + READS or scopes and lines in SCOPED)
    source = body(LIBC + lines + "\nreturn 'escaped'", "folder, caller, source, home, port, name")
    arguments, before = [str(tmp_path), os.getpid(), __file__, str(Path.home()), *listener], tree(tmp_path)
    for box in boxes:
        workers, result = pids(box), box.call(source, "f", arguments)
        denied = EITHER[:1] if lines in ATTACKS and box is not no_seccomp else EITHER
        assert result[:2] == ("error", None) and result.error.startswith(denied)
        touched = re.search(r"open\('a|, 'link'", lines)  # the working directory, after which the worker is replaced
        assert works(box) and (touched or pids(box) == workers) and tree(tmp_path) == before
    if lines in READS:
        assert bare.call(source, "f", arguments).value == "escaped"


AS_A_USER = """
import json, os, sys, tempfile
sys.path.insert(0, sys.argv[1])
import sandbox
locked = tempfile.mkdtemp()
os.makedirs(locked + "/a/b/c")
for path in ("/a/b", "/a", ""): os.chmod(locked + path, 0)
sandbox._remove(locked)
assert not os.path.exists(locked)
memory, attacks = json.load(sys.stdin)
for without in (), ("landlock 2",), ("landlock",):
    with sandbox.Sandbox(workers=1, without=without) as box:
        before = box._workers[0].process.pid
        if "landlock" in without and os.system("unshare -U true") != 0:
            memory = []  # without user namespaces only landlock protects memory, and `unsafe` says so
        for source in (*memory, *attacks):
            result = box.call(source, "f", [os.getpid()])
            assert result.error.startswith("PermissionError: [Errno 1"), (without, source, result)
        assert box.call("def f(x): return x", "f", [3]).value == 3 and box._workers[0].process.pid == before
        assert bool(box.unsafe) == ("landlock" in without)
print("held")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="every test runs as a user")
def test_users_other_than_root_cannot_reach_memory_or_processes(layered):
    attacks = [SCOPED[0], READV, *(lines for lines in ATTACKS if "F_SETOWN, " in lines or "0x8901" in lines)]
    programs = [[body(LIBC + lines + "\nreturn 'out'", "caller") for lines in some] for some in (MEMORY, attacks)]
    user = {"user": 65533, "group": 65533, "extra_groups": [], "env": {}, "cwd": "/", "text": True, "capture_output": True}
    for python in (sys.executable, "/usr/bin/python3"):
        with suppress(OSError):  # only root may run it
            if subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], **user).returncode == 0:
                command = [python, "-Bc", AS_A_USER, str(ROOT / "tasks")]
                ran = subprocess.run(command, input=json.dumps(programs), timeout=60, **user)
                assert ran.stdout == "held\n", ran.stderr
                return
    pytest.skip("no Python here that a user may run")


LOOK = """import gc, os, re, sys
def f(control):
    found, seen, frame = set(), set(), sys._getframe()
    todo = [*gc.get_objects(), dict(os.environ), sys.argv, sys.orig_argv, gc.unfreeze(), *gc.get_objects()]
    while frame:
        todo += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    while todo:
        item = todo.pop()
        if id(item) in seen or item is seen or item is found: continue
        seen.add(id(item))
        if isinstance(item, (bytes, bytearray)): item = item.decode("latin-1")
        if isinstance(item, int): item = str(item)
        if isinstance(item, str): found.update(re.findall("EXPECTED-[0-9]+-[a-z]+|^7654[3]$", item))
        else: todo += gc.get_referents(item)
    return sorted(found)
"""


def test_nothing_holds_what_only_the_caller_or_an_earlier_call_knows(box, one, monkeypatch):
    """The caller's variable, environment and argument vector hold the expected output; only the call's own argument is found.
    Neither is max_output, which would reveal the length of the expected output."""
    expected = f"EXPECTED-{os.getpid()}-secret"
    monkeypatch.setenv("EXPECTED", expected)
    monkeypatch.setattr(sys, "argv", [*sys.argv, expected])
    one.call(IDENTITY + "  # EXPECTED-1-source", "f", ["EXPECTED-2-argument"])
    one.run("print('EXPECTED-3-printed')", "EXPECTED-4-input")
    with S.Sandbox(workers=1, without=BARE) as fresh:
        for each in (box, fresh, one):
            assert each.call(LOOK, "f", ["EXPECTED-0-control"], 76_543).value == ["EXPECTED-0-control"]
        lines = "return [dict(os.environ), [open(f'/proc/{pid}/environ').read() for pid in (os.getpid(), os.getppid())]]"
        environment, blocks = fresh.call(body(lines), "f", []).value
    assert environment == {} and "PYTHONHASHSEED" in blocks[0] and expected not in "".join(blocks)


def verdict(code: bytes, number: int, machine: int, args: tuple = ()) -> int:
    """Runs the part of classic BPF that the filter uses."""
    data = struct.pack("<IIQ6Q", number, machine, 0, *args, *[0] * (6 - len(args)))
    a = at = 0
    while True:
        op, yes, no, k = struct.unpack_from("HBBI", code, 8 * at)
        at += 1
        if op == 0x06:
            return k
        if op == 0x20:
            a = struct.unpack_from("<I", data, k)[0]
        else:
            at += yes if {0x15: a == k, 0x35: a >= k}[op] else no


ALLOW, PRETEND, DENY, UNKNOWN, KILL = 0x7FFF0000, 0x50000, 0x50001, 0x50026, 0x80000000
# By hand, from asm/unistd.h. Allowed: read, write, openat, mmap, futex, exit_group. Denied: execve, execveat, kill, tgkill,
# socket, connect, setsid, ptrace, process_vm_readv, process_vm_writev, setrlimit, fchmodat, mount, bpf, unshare, inotify_init1,
# fallocate, memfd_create, sendmsg, ioprio_set, shmctl, msgctl, io_setup, and fork, vfork, chmod. Then the calls of CHOSEN.
BY_HAND = {
    "x86_64": ([0, 1, 257, 9, 202, 231], [59, 322, 62, 234, 41, 42, 112, 101, 310, 311, 160, 268, 165, 321, 272, 294, 285, 319,
                46, 251, 31, 71, 206, 57, 58, 90], [56, 72, 16, 157, 302, 53, 44]),
    "aarch64": ([63, 64, 56, 222, 98, 94], [221, 281, 129, 131, 198, 203, 157, 117, 270, 271, 164, 53, 40, 280, 97, 26, 47, 279,
                211, 30, 195, 187, 0], [220, 25, 29, 167, 261, 199, 206]),
}  # fmt: skip
CHOSEN = [  # clone, fcntl, ioctl, prctl, prlimit64, socketpair, sendto: the argument that decides, allowed values, else
    (0, (0x3D0F00, 0x7D0F00), DENY), (1, (*range(8), 36, 37, 38, 1030, 1032), DENY),
    (1, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x40049409), DENY), (0, (2, 3, 15, 16), DENY),
    (2, (0,), PRETEND), (0, (1,), DENY), (4, (0,), DENY),
]  # fmt: skip
FLAGS = [0x1200011, 0x5402, 0x5410, 0x5412, 0x5452, 0x8901, 0x8902, 0xC0045877, 1 << 31]  # among others fork's, FIOSETOWN, FITHAW


@pytest.mark.parametrize("machine", BY_HAND)
def test_the_filter_decides_as_its_table_says(monkeypatch, machine):
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine))
    code, arch, column = S._seccomp_filter(), S.AUDIT_ARCH[machine], list(BY_HAND).index(machine)
    assert len(code) % 8 == 0 and len(code) // 8 < 4096
    table = {int(n) for row in S.DENIED.replace("\n", " ").split(",") if (n := row.split()[1 + column]) != "-"}
    allowed, denied, chosen = BY_HAND[machine]
    for number in {*range(600), 0x40000000 + 59} - {*chosen}:
        wanted = UNKNOWN if number >= 424 else DENY if number in table else ALLOW
        assert verdict(code, number, arch) == wanted and verdict(code, number, arch ^ 1) == KILL, number
    for numbers, wanted in (allowed, ALLOW), (denied, DENY):
        assert {verdict(code, number, arch) for number in numbers} == {wanted}
    for number, (argument, values, otherwise) in zip(chosen, CHOSEN, strict=True):
        for value in (*range(1100), *values, *FLAGS, *(value + (1 << 32) for value in values)):
            wanted = ALLOW if value in values else otherwise
            assert verdict(code, number, arch, (0,) * argument + (value,)) == wanted, (number, value)
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="riscv64"))
    assert S._seccomp_filter() == b""


def test_hashes_sets_and_random_numbers_are_the_same_in_every_call_and_worker(judge):
    drawn = "str([hash('abc'), {'a', 'bc', 'def', 'ghij'}, random.random(), random.sample(range(99), 3)])"
    with S.Sandbox(workers=1, preamble=True) as other:
        texts = [box.run(f"print({drawn}, end='')", "").value for box in (judge, judge, other, other)]  # workers take turns
        texts.append(other.call(f"def f():\n    return {drawn}", "f", []).value)
    assert len(set(texts)) == 1 and len(texts[0]) > 60


# ---- Workers that die, and machines that are full ----------------------------------------------------------


@pytest.mark.parametrize("disarm", ["pass", "import ctypes; ctypes.CDLL(None).prctl(1, 0)"])
def test_a_killed_worker_is_replaced_its_child_ends_and_its_call_is_repeated(layered, disarm):
    with S.Sandbox(workers=1, time_limit=10.0) as box:
        idle = pids(box)
        os.kill(idle[0], signal.SIGKILL)
        assert ends(idle) and works(box) and works(box) and pids(box) != idle
        result = in_thread(box.call, body(f"{disarm}\n{NOTE}time.sleep(3)\nreturn os.getpid()"), "f", [])
        child, worker = int(notes(box)[0].read_text()), pids(box)[0]
        os.kill(worker, signal.SIGKILL)
        assert ends([child, worker], within=2.0) and result.result(timeout=20).value != child and pids(box) != [worker]


def test_a_worker_that_dies_at_each_try_is_internal(bare, monkeypatch):
    monkeypatch.setattr(S, "RETRY_SECONDS", (0.0, 0.01))
    kill = body("os.kill(os.getppid(), 9)\nreturn 1")
    for result in (bare.call(kill, "f", []), bare.run(kill + "\nf()", "")):
        assert result[:3] == ("internal", None, "the worker died or could not be started") and works(bare)


def test_a_silent_worker_is_replaced(tmp_path):
    lines = """
        if os.path.exists(path): return "again"
        print(os.getpid(), file=open(path, "w"), flush=True)
        os.kill(os.getppid(), 19)
        time.sleep(60)
    """
    with S.Sandbox(workers=1, time_limit=10.0, without=BARE) as box:
        assert works(box)
        silent, patience = pids(box), box._workers[0].socket
        assert patience.gettimeout() == 10.0 + S.GRACE_SECONDS
        patience.settimeout(1.0)  # for this worker only
        assert box.call(body(lines, "path"), "f", [str(tmp_path / "mark")]).value == "again"
        assert ends([*silent, int((tmp_path / "mark").read_text())])


def test_a_call_is_repeated_when_descriptors_disk_or_processes_run_out(monkeypatch):
    popen, refused = subprocess.Popen, []

    def full(*args, **options):
        refused.append(1)
        return open("/nowhere") if len(refused) < 3 else popen(*args, **options)

    with S.Sandbox(workers=1, time_limit=10.0) as box:
        resource.prlimit(pids(box)[0], resource.RLIMIT_NOFILE, (5, 5))
        assert works(box) and works(box)
        shutil.rmtree(box._workers[0].scratch)
        assert works(box) and works(box)
        monkeypatch.setattr(subprocess, "Popen", full)
        os.kill(pids(box)[0], signal.SIGKILL)
        assert ends(pids(box)) and works(box) and len(refused) == 3
        monkeypatch.setattr(S, "RETRY_SECONDS", (0.0, 0.01))
        monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: open("/nowhere"))
        box._workers[0].stop()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            assert box.run("", "")[:3] == ("internal", None, "the worker died or could not be started")
        with pytest.raises(OSError, match="could not start a worker"):
            S.Sandbox(workers=1)
        assert len(os.listdir("/proc/self/fd")) <= before + 2 and not os.path.exists(box._workers[0].scratch)


def test_an_interrupted_call_leaves_no_answer_for_the_next(box):
    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            box.call(body("time.sleep(0.3)\nreturn 'late'"), "f", [])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    time.sleep(0.4)  # by now the answer would have come
    assert works(box) and works(box)
    assert all(os.getsid(pid) == pid for pid in pids(box))  # a terminal's Ctrl-C does not reach a worker


def test_close_ends_workers_and_calls_in_flight():
    S.Sandbox(workers=2).close()  # one has not started
    box = S.Sandbox(workers=2, time_limit=60.0)
    assert works(box)
    scratch = [Path(worker.scratch) for worker in box._workers]
    failed = in_thread(box.call, SLEEP, "f", [])
    everyone = [int(notes(box)[0].read_text()), *pids(box)]
    box.close()
    assert ends(everyone) and not any(path.exists() for path in scratch)
    assert str(failed.exception(timeout=5)) == "the sandbox is closed"
    with pytest.raises(RuntimeError, match="closed"):
        box.run("", "")
    box.close()  # twice is no error


CALLER = f"""
import glob, os, sys, threading, time
from tasks import sandbox

box = sandbox.Sandbox(workers=2, time_limit=60.0)
box.run("", "")  # on the second worker
threading.Thread(target=lambda: box.call({SLEEP!r}, "f", []), daemon=True).start()
notes = []
while not (notes and os.path.getsize(notes[0])):
    time.sleep(0.01)
    notes = [path for worker in box._workers for path in glob.glob(worker.scratch + "/*/note")]
print(open(notes[0]).read(), *(w.process.pid for w in box._workers), *(w.scratch for w in box._workers), flush=True)
"""


@pytest.mark.parametrize("end", ["sys.exit(3)", "os.kill(box._workers[1].process.pid, 19)", "os.kill(os.getpid(), 9)"])
def test_no_process_survives_the_caller(end):
    """A second thread is in a call, and nobody closes the sandbox. The second way stops a worker, which only atexit can end."""
    caller = subprocess.run([sys.executable, "-c", CALLER + end], cwd=ROOT, capture_output=True, text=True, timeout=30)
    *left, first, second = caller.stdout.split()
    assert len(left) == 3 and ends(list(map(int, left)))
    assert comes(lambda: not any(map(os.path.exists, (first, second))))  # a worker's last act


# ---- Many at once ------------------------------------------------------------------------------------------


def test_run_many_keeps_the_order_and_raises_and_every_thread_gets_its_own_answer(box):
    assert box.run_many(lambda n: box.call(IDENTITY, "f", [n]).value, range(40)) == list(range(40))
    with pytest.raises(ZeroDivisionError):
        box.run_many(lambda n: 1 / n, [1, 0])
    meet = body(NOTE + "while not os.path.exists('go'): time.sleep(0.01)\nreturn 'met'")
    results = [in_thread(box.call, meet, "f", []) for _ in range(2)]
    for path in notes(box, count=2):  # both start before either may end
        path.with_name("go").touch()
    assert [result.result(timeout=10).value for result in results] == ["met", "met"]


@pytest.mark.slow
def test_5120_tests_take_seconds_on_2_workers():
    """256 programs with 20 tests each, called and run; the best of five, since the machine may be busy."""
    call = lambda box, n, x: box.call(f"def f(x):\n    return x + {n}", "f", [x]).value == x + n  # noqa: E731
    run = lambda box, n, x: box.run(f"print(int(input()) + {n})", f"{x}\n").value == f"{x + n}\n"  # noqa: E731
    with S.Sandbox(workers=2) as box:
        for right in (call, run):
            seconds = []
            for _ in range(5):
                start = time.monotonic()
                assert all(box.run_many(lambda n: all(right(box, n, x) for x in range(20)), range(256)))
                seconds.append(time.monotonic() - start)
            assert min(seconds) <= 12.0, seconds  # 6.5 to 8.5 on two idle cores


def test_counting_files_leaves_the_time_of_reading_as_it_was(tmp_path):
    """Otherwise, on a file system where every reading sets it, workers would be replaced after each call."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.utime(tmp_path, ns=(1, os.stat(tmp_path).st_mtime_ns))  # older than the last change: the next reading would set it
    assert sorted(S._entries(str(tmp_path))) == [("file", False), ("folder", True)] and os.stat(tmp_path).st_atime_ns == 1
