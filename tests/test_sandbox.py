"""One test or more for each line of sandbox.py's docstring; the programs are as hostile as the line says.

Time limits are 0.5 s where a test waits for one and 10 s elsewhere, so that a busy machine fails nothing else. Programs
that attack are kept small (32 processes, signal 0), so that a sandbox that lets them through harms no machine.
"""

import math
import os
import queue
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from textwrap import dedent, indent
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # sandbox.py is one folder up; pytest may start anywhere
from tasks import sandbox as S  # noqa: E402

IDENTITY = "def f(x):\n    return x"
BARE = ("seccomp", "landlock")  # without them programs misbehave as any process can


@pytest.fixture(scope="module")
def box():
    with S.Sandbox(workers=2, time_limit=10.0, memory_mb=256, output_bytes=100_000) as box:
        yield box


@pytest.fixture(scope="module")
def one():
    """One worker: every call meets the one that ran the call before."""
    with S.Sandbox(workers=1, time_limit=10.0) as one:
        yield one


@pytest.fixture(scope="module")
def bare():
    with S.Sandbox(workers=1, time_limit=10.0, memory_mb=256, output_bytes=100_000, without=BARE) as bare:
        yield bare


@pytest.fixture(scope="module")
def layered(box):
    """The sandbox with all its layers; its claims hold where the kernel has them."""
    if "not available" in box.layers:
        pytest.skip(box.layers)
    return box


@pytest.fixture(scope="module")
def only_seccomp(layered):
    with S.Sandbox(workers=1, time_limit=10.0, without=("landlock",)) as only_seccomp:
        yield only_seccomp


@pytest.fixture(scope="module")
def only_landlock(layered):
    with S.Sandbox(workers=1, time_limit=10.0, without=("seccomp",)) as only_landlock:
        if int(re.search(r"version (\d+)", only_landlock.layers)[1]) < 6:
            pytest.skip("signals, TCP and abstract sockets are confined from version 6 on")
        yield only_landlock


@pytest.fixture(scope="module")
def judge():
    """As competition judges run programs."""
    with S.Sandbox(workers=2, time_limit=10.0, memory_mb=1024, preamble=True) as judge:
        yield judge


def body(lines: str, args: str = "") -> str:
    """The program `def f(args): lines`."""
    return f"import os, sys, time\n\ndef f({args}):\n" + indent(dedent(lines).strip(), "    ")


def works(box) -> bool:
    """The next call of every worker is right."""
    return all(box.call(IDENTITY, "f", [n]).value == n for n in range(len(box._workers)))


def pids(box) -> list[int]:
    return [worker.process.pid for worker in box._workers]


def running(pid: int) -> bool:
    """A zombie has ended: who is to reap it is not the sandbox's business."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def ends(pids, within: float = 5.0) -> bool:
    pids, deadline = list(pids), time.monotonic() + within
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(running, pids))


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 10.0
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline, f"{path.name} was never written"
        time.sleep(0.01)
    return path.read_text().strip()


def note(box, name: str = "note", count: int = 1) -> list[Path]:
    """The files `name` that programs wrote in their working directories, once there are `count`."""
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        found = [path for worker in box._workers for path in Path(worker.scratch).glob(f"*/{name}")]
        if len(found) >= count and all(path.read_text().endswith("\n") for path in found):
            return found
        time.sleep(0.01)
    raise AssertionError(f"{name} was never written")


def nested(depth: int) -> list:
    value = []
    for _ in range(depth):
        value = [value]
    return value


def in_thread(fn, *args) -> queue.Queue:
    """Where fn(*args) or its exception will come."""
    results = queue.Queue()

    def work():
        try:
            results.put(fn(*args))
        except RuntimeError as e:
            results.put(e)

    threading.Thread(target=work, daemon=True).start()
    return results


# ---- Values ------------------------------------------------------------------------------------------------


VALUES = [
    None,
    True,
    False,
    1,
    0,
    -1,
    1.0,
    0.1,
    10**30,
    "",
    "é\n\t\u2028\0\ud800 <b>",
    [],
    {},
    [1, [True, {"a": None}]],
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_json_values_return_with_their_types(box, value):
    result = box.call(IDENTITY, "f", [value])
    assert (result.status, repr(result.value)) == ("ok", repr(value))  # repr: True is not 1, 1 is not 1.0
    assert result.error == "" and 0 < result.seconds < 10


def test_infinities_and_nan_return(box):
    low, high, nan = box.call(body("return x, y, y - y", "x, y"), "f", [-math.inf, math.inf]).value
    assert (low, high) == (-math.inf, math.inf) and math.isnan(nan)


def test_a_tuple_becomes_a_list_and_keys_become_strings(box):
    assert box.call("def f():\n    return [1], {3: 4}", "f", []).value == [[1], {"3": 4}]


@pytest.mark.parametrize("value", ["[(1,)]", "(1, (2,))", "{'a': ()}", "[[[(1,)]]]", "[{'a': [(1,)]}]"])
def test_a_tuple_inside_the_result_is_an_error(box, value):
    """[(1, 2)] == [[1, 2]] is False in Python, which JSON cannot tell."""
    result = box.call(f"def f():\n    return {value}", "f", [])
    assert (result.status, result.error) == ("error", "TypeError: a tuple inside the result where a list is expected")


@pytest.mark.parametrize("value", ["10**4299", "10**4300", "-(10**5000)", "10**49_999"])
def test_integers_of_up_to_50000_digits_return(one, value):
    """Equal to the integer that was meant and to no neighbour."""
    x, other = one.call(f"def f():\n    return [{value}, {{'a': {value} + 1}}]", "f", []).value
    assert x == eval(value) and x != eval(value) + 1 and other == {"a": eval(value) + 1}
    zeros = int(re.search(r"\*\*(\d+)", value.replace("_", ""))[1])
    assert one.run(f"print({value})", "").value.strip("-\n") == "1" + "0" * zeros


def test_loads_reads_long_integers_and_nothing_that_is_no_json():
    assert S.loads(f"[1, {'9' * 6000}, -1{'0' * 5000}, 1.5]") == [1, 10**6000 - 1, -(10**5000), 1.5]
    for text in ("", "[", "nonsense", "9" * 5000 + "x"):
        with pytest.raises(ValueError):
            S.loads(text)


def test_numbers_of_numpy_count_as_pythons():
    pytest.importorskip("numpy")
    values = "[np.float32(1.5), np.int64(3), np.bool_(True), np.array(7)], {'a': np.float64(0.5)}"
    with S.Sandbox(workers=1, memory_mb=2048, packages=True, warm="import numpy") as box:
        result = box.call(f"import numpy as np\ndef f():\n    return {values}", "f", [])
        assert repr(result.value) == repr([[1.5, 3, True, 7], {"a": 0.5}])
        result = box.call("import numpy as np\ndef f():\n    return np.array([1, 2])", "f", [])
        assert result.error == "TypeError: Object of type ndarray is not JSON serializable"


@pytest.mark.parametrize("value, name", [("{1}", "set"), ("object()", "object"), ("b''", "bytes"), ("1j", "complex")])
def test_a_value_json_cannot_hold_is_a_type_error(box, value, name):
    result = box.call(body(f"return {value}"), "f", [])
    assert (result.status, result.error) == ("error", f"TypeError: Object of type {name} is not JSON serializable")


@pytest.mark.parametrize("lines, error", [
    ("x = []; x.append(x); return x", "ValueError: Circular"),
    ("x = []\nfor _ in range(9**5): x = [x]\nreturn x", "RecursionError"),
    ("return 10**50_000", "ValueError: Exceeds the limit (50000"),
    ("return [{'a': 10**50_000}]", "ValueError: Exceeds the limit (50000"),
])  # fmt: skip
def test_a_value_json_cannot_write_is_an_error(box, lines, error):
    result = box.call(body(lines), "f", [])
    assert result.status == "error" and result.error.startswith(error)


def test_an_object_equal_to_everything_earns_nothing(box):
    equal = "    def __eq__(self, other): return True\n    __hash__ = None\n"
    assert box.call(f"class C:\n{equal}def f():\n    return C()", "f", []).status == "error"
    for base, value in [("list", "[1]"), ("int", "7"), ("str", "'a'"), ("dict", "{'a': 1}")]:
        result = box.call(f"class C({base}):\n{equal}def f():\n    return C({value})", "f", [])
        assert (result.status, type(result.value), repr(result.value)) == ("ok", eval(base), value)
        assert result.value != 99


def test_a_long_question_and_a_long_answer_pass(box):
    assert box.call("def f(x):\n    return len(x)", "f", ["é" * 300_000]).value == 300_000  # 1.8 MB of JSON
    assert box.call("def f(n):\n    return 'x' * n", "f", [99_900]).value == "x" * 99_900


def test_arguments_that_are_not_json_are_the_callers_error(box):
    with pytest.raises(TypeError):
        box.call(IDENTITY, "f", [{1}])
    with pytest.raises(RecursionError):
        box.call(IDENTITY, "f", [nested(100_000)])
    assert works(box)


@pytest.mark.parametrize("name", ["box", "judge"])
def test_400_nested_brackets_pass_and_100000_are_an_error(name, request):
    box = request.getfixturevalue(name)
    assert box.call(IDENTITY, "f", [nested(400)]).value == nested(400)
    build = "def f(n):\n    x = []\n    for _ in range(n): x = [x]\n    return x"
    assert box.call(build, "f", [400]).value == nested(400)
    result = box.call(build, "f", [100_000])
    assert (result.status, result.value) == ("error", None)
    assert works(box)


METHODS = """
class Solution:
    def __init__(self):
        self.calls = 1

    def double(self, x, y=0):
        return [2 * x + y, self.calls]

    @staticmethod
    def plain(x):
        return x

class Broken:
    def __init__(self):
        raise ValueError("no")

    def double(self, x):
        return 2 * x
"""


@pytest.mark.parametrize("function, args, answer", [
    ("Solution.double", [3], [6, 1]),
    ("Solution.double", [3, 1], [7, 1]),
    ("Solution.plain", [3], 3),
    ("Solution.triple", [3], "AttributeError: 'Solution' object has no attribute 'triple'"),
    ("Nobody.double", [3], "NameError: name 'Nobody' is not defined"),
    ("Broken.double", [3], "ValueError: no (line 15)"),
    ("double", [3], "NameError: name 'double' is not defined"),
])  # fmt: skip
def test_a_method_is_called_on_a_new_object_of_its_class(box, function, args, answer):
    result = box.call(METHODS, function, args)
    assert (result.error if isinstance(answer, str) else result.value) == answer


def test_a_program_is_a_module_of_its_own(box):
    source = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class P:
    x: int

def f():
    return __name__, dataclasses.asdict(P(1))
"""
    assert box.call(source, "f", []).value == ["program", {"x": 1}]  # dataclasses look their module up


# ---- Ends without a value ------------------------------------------------------------------------------------


@pytest.mark.parametrize("source, error", [
    ("def f():\n    x = 1\n    return x / 0", "ZeroDivisionError: division by zero (line 3)"),
    ("def g():\n    raise KeyError('a')\ndef f():\n    g()", "KeyError: 'a' (line 2)"),
    ("def f():\n    import json\n    json.loads('[')", "JSONDecodeError: Expecting value: line 1 column 2 (char 1) (line 3)"),
    ("def f():\n    assert False", "AssertionError (line 2)"),
    ("def f():\n    raise ValueError('a\\n  b\\tc')", "ValueError: a b c (line 2)"),
    ("1 / 0", "ZeroDivisionError: division by zero (line 1)"),
    ("def f(:\n    pass", "SyntaxError: invalid syntax (line 1)"),
    ("def f():\npass", "IndentationError: expected an indented block after function definition on line 1 (line 2)"),
    ("def g():\n    pass", "NameError: name 'f' is not defined"),
    ("def f(x):\n    pass", "TypeError: f() missing 1 required positional argument: 'x'"),
    ("f = 3", "TypeError: 'int' object is not callable"),
    ("def f():\n    raise SystemExit(0)", "SystemExit: 0 (line 2)"),
    ("def f():\n    raise KeyboardInterrupt", "KeyboardInterrupt (line 2)"),
    ("def f():\n    raise GeneratorExit", "GeneratorExit (line 2)"),
    ("def f():\n    return f()", "RecursionError: maximum recursion depth exceeded (line 2)"),
])  # fmt: skip
def test_exceptions_end_as_one_line_with_the_programs_line(box, source, error):
    result = box.call(source, "f", [])
    assert (result.status, result.value, result.error) == ("error", None, error)


def test_a_long_message_is_cut(box):
    result = box.call("def f():\n    raise ValueError('x' * 10**6)", "f", [])
    assert (result.status, result.error) == ("error", f"ValueError: {'x' * S.ERROR_CHARS} (line 2)")


def test_a_long_name_of_an_exception_is_cut(box):
    result = box.call("def f():\n    raise type('X' * 90_000, (Exception,), {})", "f", [])
    assert result.status == "error" and len(result.error) < 2 * S.ERROR_CHARS


@pytest.mark.parametrize("lines, how", [
    ("os._exit(0)", "exit code 0"),
    ("os._exit(3)", "exit code 3"),
    ("os.kill(os.getpid(), 9)", "signal 9"),
    ("import ctypes; ctypes.string_at(0)", "signal 11"),
    ("os.closerange(3, 99); return 1", "exit code 1"),  # nobody is left to hear an answer
])  # fmt: skip
def test_a_process_that_ends_without_an_answer_is_an_error(box, bare, lines, how):
    for each in (bare,) if "kill" in lines else (bare, box):  # seccomp denies signals, also to oneself
        result = each.call(body(lines), "f", [])
        assert (result.status, result.error) == ("error", f"exited without a result ({how})")
        assert works(each)


def test_the_last_three_lines_of_the_program_on_the_way_to_the_error_are_told(box):
    source = """
import json

def third(text):
    return json.loads(text)  # json's own lines are not the program's

def second(text):
    return third(text)

def first(text):
    return (
        second(text) + 1)

def f(text):
    return first(text)
"""
    frames = ("line 12, in first: second(text) + 1)", "line 8, in second: return third(text)")
    frames += ("line 5, in third: return json.loads(text)  # json's own lines are not the program's",)
    assert box.call(source, "f", ["["]).frames == frames
    assert box.run(source + "\nf('[')", "").frames == frames
    assert box.call(source, "f", ["1"]).frames == ()
    assert box.call("def f():\n    1 / 0", "f", []).frames == ("line 2, in f: 1 / 0",)
    assert box.call(f"def f():\n    1 / 0  # {'x' * 9000}", "f", []).frames[0].startswith("line 2, in f: 1 / 0  # xxx")
    assert len(box.call(f"def f():\n    1 / 0  # {'x' * 9000}", "f", []).frames[0]) == S.ERROR_CHARS


def test_an_exception_that_cannot_be_printed_is_an_error(box):
    assert (
        box.call("class E(Exception):\n    def __str__(self): raise self\ndef f():\n    raise E", "f", []).status
        == "error"
    )


# ---- Time --------------------------------------------------------------------------------------------------


FOREVER = "while True: pass"
LOOPS = {
    "plain": body(FOREVER),
    "at import": FOREVER,
    "asleep": body("time.sleep(60)"),
    "swallows every exception": body("while True:\n    try:\n        while True: pass\n    except BaseException: pass"),
    "ignores every signal": body(
        f"import signal as s\nfor n in set(s.Signals) - {{9, 19}}: s.signal(n, s.SIG_IGN)\n{FOREVER}"
    ),
    "threads": body(
        f"import threading\ndef g():\n    {FOREVER}\nfor _ in range(4): threading.Thread(target=g).start()\ng()"
    ),
    "deaf to the sandbox": body(f"os.closerange(0, 99)\n{FOREVER}"),
    "one long operation": body("return 9**9**8"),
    "in the exception's text": body(f"class E(Exception):\n    def __str__(self):\n        {FOREVER}\nraise E"),
    "prints": body("while True: print('x' * 10000)"),
}


SCRIPTS = {
    "plain": FOREVER,
    "after the right output": f"print(42, flush=True)\n{FOREVER}",
    "swallows every exception": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "in a thread": "import threading\ndef f():\n    while True: pass\nthreading.Thread(target=f).start()",
    "at exit": "import atexit\ndef f():\n    while True: pass\natexit.register(f)",
    "when flushed": "import sys\nclass W:\n    def flush(self):\n        while True: pass\nsys.stdout = W()",
}


def test_every_loop_is_killed_at_the_limit_and_the_next_calls_work():
    with S.Sandbox(workers=5, time_limit=0.5) as box:
        results = box.run_many(lambda source: box.call(source, "f", []), LOOPS.values())
        results += box.run_many(lambda source: box.run(source, ""), SCRIPTS.values())
        told = {
            name: (r.status, r.value, r.error) for name, r in zip([*LOOPS, *(f"run {n}" for n in SCRIPTS)], results)
        }
        assert told == dict.fromkeys(told, ("timeout", None, "no result within 0.5 s"))
        assert all(0.5 <= r.seconds < 1.5 for r in results)
        assert works(box)


def test_a_stopped_process_is_killed_at_the_limit():
    with S.Sandbox(workers=1, time_limit=0.5, without=BARE) as box:
        assert box.call(body("os.kill(os.getpid(), 19)"), "f", []).status == "timeout"
        assert works(box)


ESCAPE = """
    def stay():
        open(f"{folder}/{os.getpid()}", "w").close()
        time.sleep(60)

    if os.fork() == 0:
        if how != "same group": os.setsid()
        if how == "daemon" and os.fork(): os._exit(0)
        stay()
    while not os.listdir(folder): time.sleep(0.01)
    time.sleep(last)
    return "escaped"
"""


@pytest.mark.parametrize("last, status", [(0, "ok"), (60, "timeout")])
@pytest.mark.parametrize("how", ["same group", "own session", "daemon"])
def test_what_a_program_starts_is_dead_after_the_call(how, last, status, tmp_path):
    """Where the kernel lets it start anything."""
    with S.Sandbox(workers=1, time_limit=1.0, without=BARE) as box:
        assert box.call(body(ESCAPE, "folder, how, last"), "f", [str(tmp_path), how, last]).status == status
        escaped = [int(path.name) for path in tmp_path.iterdir()]
        assert len(escaped) == 1 and not running(escaped[0])
        assert works(box)


def test_a_fork_bomb_is_dead_after_the_call(tmp_path):
    """32 processes, each in a session of its own."""
    bomb = """
        for _ in range(5):
            if os.fork() == 0: os.setsid()
        open(f"{folder}/{os.getpid()}", "w").close()
        time.sleep(60)
    """
    with S.Sandbox(workers=1, time_limit=1.0, without=BARE) as box:
        assert box.call(body(bomb, "folder"), "f", [str(tmp_path)]).status == "timeout"
        assert len(list(tmp_path.iterdir())) > 5 and not any(running(int(path.name)) for path in tmp_path.iterdir())
        assert works(box)


# ---- Memory and output -------------------------------------------------------------------------------------


GROW = "x = []\nwhile True: x.append(bytearray(10**6))"


@pytest.mark.parametrize("lines", ["return len([0] * 10**9)", "return len(bytearray(300 << 20))", GROW])
def test_a_memory_bomb_is_stopped(box, lines):
    result = box.call(body(lines), "f", [])
    assert (result.status, result.error) == ("memory", "MemoryError")
    assert works(box)


def test_memory_below_the_limit_is_granted(box):
    assert box.call("def f():\n    return len(bytearray(100 << 20))", "f", []).value == 100 << 20


def test_a_long_answer_is_cut_off(box):
    result = box.call("def f():\n    return 'x' * 10**7", "f", [])
    assert (result.status, result.value, result.error) == ("output limit", None, "more than 100000 bytes returned")
    assert works(box)


def test_a_large_file_is_cut_off(box):
    source = body("open('a', 'w').write('x' * n)\nreturn n", "n")
    result = box.call(source, "f", [200_000])
    assert result.status == "error" and result.error.startswith("OSError: [Errno 27] File too large")
    assert box.call(source, "f", [90_000]).value == 90_000
    result = box.run("with open('a', 'wb') as file:\n    for _ in range(100): file.write(bytes(10**6))", "")
    assert result.status == "error" and result.error.startswith("OSError: [Errno 27] File too large")
    assert works(box)


@pytest.mark.parametrize("source", [
    "while True: print('x' * 10_000)",
    "print('x' * 100_000)",  # one byte over, the line's end
    "import os\nwhile True: os.write(1, b'x' * 10_000)",
    "import atexit\natexit.register(lambda: print('x' * 10**6))",
    "import os\nprint('x' * 60_000, flush=True)\nprint('x' * 60_000, flush=True)\nos._exit(0)",
    "print('x' * 10**6, flush=True)\nraise ValueError",
])  # fmt: skip
def test_a_script_that_prints_too_much_is_cut_off(box, source):
    result = box.run(source, "")
    assert (result.status, result.value, result.error) == ("output limit", None, "more than 100000 bytes printed")
    assert works(box)


def test_output_up_to_the_limit_is_kept(box):
    assert box.run("print('x' * 99_999)", "").value == "x" * 99_999 + "\n"


def test_open_files_are_bounded(box):
    result = box.run("files = []\nfor _ in range(100): files.append(open('/dev/null'))", "")
    assert result.status == "error" and result.error.startswith("OSError: [Errno 24] Too many open files")
    assert works(box)


RAISE = """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
    resource.setrlimit(kind, (1 << 40, 1 << 40))
    resource.prlimit(0, kind, (1 << 40, 1 << 40))
"""


@pytest.mark.parametrize("lines, status, error", [
    ("x = bytearray(300 << 20)", "memory", "MemoryError"),
    ("files = [open('/dev/null') for _ in range(100)]", "error", "OSError: [Errno 24] Too many open files"),
    ("open('a', 'w').write('x' * 200_000)", "error", "OSError: [Errno 27] File too large"),
    ("print('fine')", "ok", ""),
])  # fmt: skip
def test_raising_its_own_limits_seems_to_work_and_changes_nothing(layered, lines, status, error):
    result = layered.run(RAISE + lines, "")
    assert result.status == status and result.error.startswith(error)


def test_the_workers_limits_cannot_be_lowered(layered):
    before = pids(layered)
    lower = "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))\nresource.prlimit(os.getppid(), kind, (0, 0))"
    for _ in before:
        assert layered.run(f"import os, resource\nkind = resource.RLIMIT_AS\n{lower}", "").status == "ok"
    assert works(layered) and pids(layered) == before


@pytest.mark.parametrize("swallow", ["", "\n    except BaseException: pass"], ids=["ends", "goes on"])
@pytest.mark.parametrize("size", [0, 1 << 15])
def test_a_thread_bomb_is_stopped(size, swallow):
    """By the memory that stacks take, or at the limit."""
    start = "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    source = f"import threading, time\nthreading.stack_size({size})\nwhile True:\n    {'try: ' * bool(swallow)}{start}{swallow}"
    with S.Sandbox(workers=1, time_limit=0.5, memory_mb=256) as box:
        for result in (box.run(source, ""), box.call(source, "f", [])):
            assert result.status in (("timeout", "error", "memory") if not swallow else ("timeout",))
            assert result.value is None and result.seconds < 1.5
            assert works(box)


RECURSION = "def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)"


def test_deep_recursion_is_an_error_and_with_the_preamble_goes_to_50000(box, judge):
    assert box.call(RECURSION, "f", [900]).value == 900
    assert box.call(RECURSION, "f", [1100]).error.startswith("RecursionError")
    assert judge.call(RECURSION, "f", [45_000]).value == 45_000
    assert judge.call(RECURSION, "f", [51_000]).error.startswith("RecursionError")
    for both in (box, judge):
        assert (
            both.run("import sys\nsys.setrecursionlimit(10**6)\n" + RECURSION + "\nprint(f(10**5))", "").value
            == "100000\n"
        )
        assert both.run("def f(): return f()\nf()", "").error.startswith("RecursionError")


def test_recursion_through_a_cache_goes_as_deep_with_the_preamble(judge):
    assert judge.call("@lru_cache(None)\n" + RECURSION, "f", [20_000]).value == 20_000


# ---- What a program sees and leaves behind -----------------------------------------------------------------


def test_nothing_set_by_one_call_is_seen_by_the_next(one):
    source = """
import builtins, json, os, sys

count = 0

def f():
    global count
    count += 1
    seen = [count, hasattr(builtins, "mark"), hasattr(sys, "mark"), "MARK" in os.environ]
    builtins.mark = sys.mark = json.loads = 1
    os.environ["MARK"] = "1"
    sys.stdin = sys.stdout = None
    sys.setrecursionlimit(100)
    return seen

if __name__ == "__main__":
    print(f())
"""
    for _ in range(3):
        assert one.call(source, "f", []).value == [1, False, False, False]
        assert one.run(source.replace("sys.stdin = sys.stdout = None", ""), "").value == "[1, False, False, False]\n"


@pytest.mark.parametrize("leave", [
    "pass",
    "open('a', 'w').write('x')",
    "os.makedirs('a/b/c')",
    "os.makedirs('a/b/c'); os.symlink('/', 'a/b/link')",
    "os.rmdir(os.getcwd())",
    "os.rename(os.getcwd(), '../moved')",
    "[(os.mkdir('d'), os.chdir('d')) for _ in range(1050)]",  # deeper than Python's recursion limit
])  # fmt: skip
def test_the_working_directory_is_empty_in_every_call(one, leave):
    look = "seen = os.listdir(), os.getcwd()\n{}\nreturn seen"
    names, used = one.call(body(look.format(leave)), "f", []).value
    assert names == [] and used != os.getcwd()
    assert one.call(body(look.format("pass")), "f", []).value[0] == []
    assert leave == "pass" or not os.path.exists(used)


def test_locked_directories_are_removed(bare):
    lock = """
        os.makedirs("a/b/c"); os.symlink("/", "a/b/link")
        for path in ("a/b", "a", "."): os.chmod(path, 0)
        return os.getcwd()
    """
    used = bare.call(body(lock), "f", []).value
    assert bare.call(body("return os.listdir()"), "f", []).value == [] and not os.path.exists(used)


def test_nothing_written_beside_the_working_directory_is_seen_by_the_next(one):
    one.run("open('../beside', 'w').write('x')", "")
    assert one.run("import os; print(os.path.exists('../beside'))", "").value == "False\n"


@pytest.mark.parametrize("inside", ["file", None])
def test_a_link_left_as_working_directory_is_not_followed(one, tmp_path, inside):
    tmp_path.chmod(0o750)
    if inside:
        (tmp_path / inside).write_text("kept")
    swap = "import os\nhere = os.getcwd()\nos.chdir('..')\nos.rmdir(here)\nos.symlink(input(), here)"
    assert one.run(swap, str(tmp_path)).status == "ok"
    assert works(one)
    assert tmp_path.stat().st_mode & 0o777 == 0o750
    assert not inside or (tmp_path / inside).read_text() == "kept"
    assert one.run("import os; print(os.getcwd())", "").value.startswith(one._workers[0].scratch)


def test_input_is_empty_and_output_goes_nowhere(box, capfd):
    lines = """
        print("ok\\t1")
        sys.stderr.write("ok\\t2\\n")
        for fd in (0, 1, 2): os.write(fd, b"ok\\t3\\n")
        try: os.system("echo hello; echo hello >&2")
        except OSError: pass
        return sys.stdin.read(), [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)]
    """
    assert box.call(body(lines), "f", []).value == ["", ["/dev/null"] * 3]
    assert box.call(body("return input()"), "f", []).error == "EOFError: EOF when reading a line (line 4)"
    assert capfd.readouterr() == ("", "")


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "tell-nobody")
    lines = "return [dict(os.environ), [open(f'/proc/{pid}/environ').read() for pid in (os.getpid(), os.getppid())]]"
    with S.Sandbox(workers=1, without=BARE) as box:
        environment, blocks = box.call(body(lines), "f", []).value
    assert environment == {} and "PYTHONHASHSEED" in blocks[0] and "tell-nobody" not in "".join(blocks)


def test_only_the_standard_library_is_importable(box):
    lines = (
        "import json, heapq, decimal\nreturn [sys.path, [m for m in ('torch', 'numpy', 'site') if m in sys.modules]]"
    )
    path, loaded = box.call(body(lines), "f", []).value
    assert loaded == [] and not any("site-packages" in p or Path(p) == ROOT for p in path)
    for name in ("pytest", "torch", "losses"):
        assert box.call(f"import {name}", "f", []).error == f"ModuleNotFoundError: No module named '{name}' (line 1)"


def test_packages_are_at_hand_where_they_are_asked_for():
    with S.Sandbox(workers=1, packages=True) as box:
        lines = "import pytest\nreturn [pytest.__name__, 'torch' in sys.modules]"
        assert box.call(body(lines), "f", []).value == ["pytest", False]
        assert box.call("import losses", "f", []).error == "ModuleNotFoundError: No module named 'losses' (line 1)"


def test_what_each_worker_runs_once_is_loaded_in_every_call():
    with S.Sandbox(workers=2, warm="import decimal, sys\nsys.cache = [1]") as box:
        source = "import sys\n\ndef f():\n    sys.cache.append(2)\n    return ['decimal' in sys.modules, sys.cache]"
        for _ in range(4):
            assert box.call(source, "f", []).value == [True, [1, 2]]
        assert box.run("print('sys' in globals())", "").value == "False\n"


def test_the_preamble_names_what_competition_programs_leave_unimported(box, judge):
    source = "def f(x: List[int]) -> Optional[int]:\n    heapify(x)\n    return [x[0], gcd(*x), Counter(x)[6], math.inf > pow(2, 3, 5)]"
    assert judge.call(source, "f", [[9, 6]]).value == [6, 3, 1, True]
    assert judge.run("print(max(accumulate(map(int, stdin.read().split()))))", "1 2 3").value == "6\n"
    assert box.call(source, "f", [[9, 6]]).error == "NameError: name 'List' is not defined (line 1)"


def test_the_module_needs_no_torch():
    subprocess.run(
        [sys.executable, "-c", "import tasks.sandbox, sys; assert 'torch' not in sys.modules"], cwd=ROOT, check=True
    )


# ---- Forged answers ----------------------------------------------------------------------------------------


FORGE = """
    for fd in range(3, 64):
        try: os.write(fd, text.encode("latin-1"))
        except OSError: pass
    return "honest"
"""


@pytest.mark.parametrize("text, status, value", [
    ("ok\t99\n", "ok", 99),
    ("ok\tnonsense\n", "error", None),
    ("ok\t1\t2\n", "error", None),
    ("ok\t" + "[" * 50_000 + "\n", "error", None),
    ("ok\t" + "9" * 9_000 + "\n", "ok", 10**9000 - 1),
    ("nonsense\t1\n", "error", None),
    ("\n", "error", None),
    ("\xff\xff\n", "error", None),
    ("error\t[1]\n", "error", None),
    ("error\t[[], 1]\n", "error", None),
    ("error\t[[], {}]\n", "error", None),
    ("error\t" + "[" * 970 + "]" * 970 + "\n", "error", None),
    ("timeout\t0\n", "error", None),
    ("output limit\t0\n", "error", None),
    ("internal\t0\n", "error", None),
], ids=lambda part: repr(part)[:16] if isinstance(part, str) else "")  # fmt: skip
def test_a_forged_answer_is_only_an_answer(box, text, status, value):
    result = box.call(body(FORGE, "text"), "f", [text])
    assert (result.status, result.value) == (status, value)
    assert works(box)


@pytest.mark.parametrize(
    "text", ["ok\t99\n", 'ok\t["error", ["frame"]]\n', "ok\t[1, 2]\n", "error\t0\n", "ok\t\t\n"], ids=repr
)
def test_a_script_is_judged_by_what_it_printed_whatever_it_reports(box, text):
    source = f"import os\ntext = {text!r}\nprint('wrong', flush=True)\n" + dedent(FORGE).replace('return "honest"', "")
    result = box.run(source, "")
    assert result.value in ("wrong\n", None) and result.status in ("ok", "error")
    assert works(box)


@pytest.mark.parametrize("lines", [
    "json.dumps = lambda *a, **k: '\"forged\"'",
    "json.JSONEncoder.default = json.JSONEncoder.encode = lambda *a: '\"forged\"'\njson.dumps = json.JSONEncoder().encode",
    "builtins.isinstance = lambda *a: False",
    "builtins.len = builtins.memoryview = builtins.str = lambda *a: 'forged'",
    "builtins.list = builtins.isinstance = builtins.getattr = None",
    "write = os.write\nos.write = lambda fd, data: write(fd, b'ok\\t\"forged\"\\n')",
    "sys.modules['__main__']._write = lambda fd, data: os.write(fd, b'ok\\t\"forged\"\\n')",
    "sys.modules['__main__']._dumps = lambda value: '\"forged\"'",
    "sys.stdout = sys.stdin = sys.stderr = object()",
    "sys.modules.clear()",
])  # fmt: skip
def test_overwriting_what_the_sandbox_uses_forges_an_answer_at_most(box, lines):
    result = box.call(body("import builtins, json\n" + lines + "\nreturn 'honest'"), "f", [])
    assert result.status in ("ok", "error") and result.value in ("honest", "forged", None)
    assert works(box)


@pytest.mark.parametrize("lines, text, status", [
    ("sys.stdout = type('W', (), {'write': lambda self, text: 0, 'flush': lambda self: 0})()", "", "ok"),
    ("sys.stdout = None", "", "ok"),
    ("builtins.print = lambda *a: os.write(1, b'forged')", "forged", "ok"),
    ("atexit._run_exitfuncs = lambda: os.write(1, b'forged')", "forgedhonest\n", "ok"),
    ("os.read = os._exit = lambda *a: None", "honest\n", "ok"),
    ("sys.modules['__main__'] = sys.modules['json'] = None", "honest\n", "ok"),
    pytest.param("sys.stdout = Unhashable()", "honest\n", "ok"),
])  # fmt: skip
def test_overwriting_what_a_script_ends_with_changes_its_own_output_at_most(box, lines, text, status):
    unhashable = (
        "class Unhashable(list):\n    def write(self, text, to=sys.stdout): to.write(text)\n    def flush(self): pass\n"
    )
    result = box.run(f"import atexit, builtins, os, sys\n{unhashable}{lines}\nprint('honest')", "")
    assert (result.status, result.value) == (status, text)
    assert works(box)


# ---- Scripts -----------------------------------------------------------------------------------------------


FAST_IO = """
import io, os, sys

class FastIO(io.IOBase):
    newlines = 0
    def __init__(self, file):
        self._fd, self.buffer = file.fileno(), io.BytesIO()
        self.write = self.buffer.write if "w" in file.mode else None
    def readline(self):
        while self.newlines == 0:
            part = os.read(self._fd, max(os.fstat(self._fd).st_size, 8192))
            self.newlines = part.count(b"\\n") + (not part)
            at = self.buffer.tell()
            self.buffer.seek(0, 2), self.buffer.write(part), self.buffer.seek(at)
        self.newlines -= 1
        return self.buffer.readline()
    def flush(self):
        os.write(self._fd, self.buffer.getvalue())
        self.buffer.truncate(0), self.buffer.seek(0)

class Wrapper(io.IOBase):
    def __init__(self, file):
        self.buffer = FastIO(file)
        self.flush = self.buffer.flush
        self.write = lambda text: self.buffer.write(text.encode())
        self.readline = lambda: self.buffer.readline().decode()

sys.stdin, sys.stdout = Wrapper(sys.stdin), Wrapper(sys.stdout)
input = lambda: sys.stdin.readline().rstrip()
for _ in range(int(input())):
    print(sum(map(int, input().split())))
"""
NUMBERS = "3\n1 2\n3 4\n5 6\n"
PYTHON = {  # source, standard input
    "input": ("for _ in range(int(input())): print(sum(map(int, input().split())))", NUMBERS),
    "lines of stdin": ("import sys\nfor line in sys.stdin: print(line.split()[::-1])", NUMBERS),
    "readline, then read": ("from sys import stdin\nprint([stdin.readline(), stdin.read()])", NUMBERS),
    "input, then lines": ("import sys\nn = input()\nprint([n, *sys.stdin])", NUMBERS),
    "open(0)": ("n, *rest = open(0)\nprint(n, rest)", NUMBERS),
    "open(0).read": ("print(open(0).read().split())", NUMBERS),
    "stdin.buffer": ("import sys\nprint(sys.stdin.buffer.readline(), sys.stdin.buffer.read())", NUMBERS),
    "os.read": ("import os, io\nprint(io.BytesIO(os.read(0, os.fstat(0).st_size)).readlines())", NUMBERS),
    "/dev/stdin": ("print(open('/dev/stdin').read())", NUMBERS),
    "mmap": ("import mmap\nprint(mmap.mmap(0, 0, prot=mmap.PROT_READ)[:])", NUMBERS),
    "seek": ("import sys\nprint([sys.stdin.read(), sys.stdin.seek(0), sys.stdin.read()])", NUMBERS),
    "fileinput": ("import fileinput\nprint(list(fileinput.input()))", NUMBERS),
    "iter with a sentinel": ("print(list(iter(input, '5 6')))", NUMBERS),
    "line ends": ("import sys\nprint([input(), *sys.stdin])", "a\r\nb\rc\n\nd"),
    "unicode": ("print(input()[::-1], '\\u2028', ascii(input()))", "héß\U0001f600\n\u2028x\n"),
    "empty input": ("import sys\nprint([sys.stdin.read()])\ntry: input()\nexcept EOFError as e: print(e)", ""),
    "no last line end": ("print(input(), input())", "a\nb"),
    "fast input and output": (FAST_IO, NUMBERS),
    "buffer.write": ("import sys\nsys.stdout.buffer.write(b'a\\0b\\n')", ""),
    "invalid UTF-8": ("import sys\nsys.stdout.buffer.write(b'a\\xff\\xfe\\xc3(b\\xed\\xa0\\x80')", ""),
    "no line end": ("import sys\nsys.stdout.write('a')\nprint('b', end='')", ""),
    "text and buffer": ("import sys\nprint('a', flush=True)\nsys.stdout.buffer.write(b'b')\nsys.stdout.flush()\nprint('c')", ""),
    "os.write": ("import os\nos.write(1, b'a')\nprint('b')", ""),
    "stderr": ("import sys\nprint('a')\nprint('b', file=sys.stderr)", ""),
    "StringIO as stdout": ("import io, sys\nreal, sys.stdout = sys.stdout, io.StringIO()\nprint('a')\nreal.write(sys.stdout.getvalue() * 2)", ""),
    "closed stdout": ("import sys\nprint('a')\nsys.stdout.close()", ""),
    "line buffering": ("import os, sys\nsys.stdout.reconfigure(line_buffering=True)\nprint('a')\nos._exit(0)", ""),
    "globals": ("count = 0\ndef add():\n    global count\n    count += 1\nadd()\nadd()\nprint(count, 'add' in globals())", ""),
    "main block": ("def main():\n    print(input())\nif __name__ == '__main__':\n    main()", "a\n"),
    "__main__": ("import sys, pickle\nclass A: pass\nprint(__name__, pickle.loads(pickle.dumps(A())).__class__ is A, sys.modules['__main__'].A is A)", ""),
    "type hints": ("import typing, dataclasses\n@dataclasses.dataclass\nclass A:\n    a: 'B'\nclass B: pass\nprint(typing.get_type_hints(A))", ""),
    "arguments": ("import sys\nprint(len(sys.argv), sys.argv[1:], sys.stdin.isatty(), sys.stdout.isatty(), sys.stdin.fileno())", ""),
    "thread": ("import sys, threading\ndef main():\n    n = int(input())\n    def f(n): return n and 1 + f(n - 1)\n    print(f(n))\n"
               "sys.setrecursionlimit(1 << 25)\nthreading.stack_size(2**27)\nthreading.Thread(target=main).start()", "20000\n"),
    "joined thread": ("import threading\nt = threading.Thread(target=lambda: print(input()))\nt.start()\nt.join()\nprint('b')", "a\n"),
    "thread after the end": ("import threading, time\ndef f():\n    time.sleep(0.05)\n    print('b')\nthreading.Thread(target=f).start()\nprint('a')", ""),
    "daemon thread": ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nprint('a')", ""),
    "thread of a thread": ("import threading, time\ndef g():\n    time.sleep(0.05)\n    print('b')\ndef f():\n    time.sleep(0.05)\n"
                           "    threading.Thread(target=g).start()\nthreading.Thread(target=f).start()", ""),
    "open executor": ("from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(2)\nprint(list(pool.map(abs, [-1, 2])))", ""),
    "exception in a thread": ("import threading\nt = threading.Thread(target=lambda: 1 / 0)\nt.start()\nt.join()\nprint('a')", ""),
    "sys.exit(1)": ("import sys\nprint('a')\nsys.exit(1)\nprint('b')", ""),
    "sys.exit with a text": ("import sys\ndef f():\n    print('a')\n    sys.exit('b')\nf()", ""),
    "SystemExit": ("print('a')\nraise SystemExit", ""),
    "exit": ("print('a')\nexit()", ""),
    "quit": ("print('a')\nquit(1)", ""),
    "os._exit": ("import os\nprint('a', flush=True)\nos._exit(3)", ""),
    "os._exit without flush": ("import os\nprint('a')\nos._exit(0)", ""),
    "os._exit before printing": ("import os\nos._exit(0)\nprint('a')", ""),
    "atexit": ("import atexit\natexit.register(print, 'b')\n@atexit.register\ndef f(): print('a')\nprint('0')", ""),
    "atexit and sys.exit": ("import atexit, sys\natexit.register(print, 'b')\nsys.exit()", ""),
    "atexit writes the buffer": ("import atexit, io, os, sys\nout = sys.stdout = io.BytesIO()\n"
                                 "atexit.register(lambda: os.write(1, out.getvalue()))\nsys.stdout.write(b'a\\n')", ""),
    "exception at exit": ("import atexit\natexit.register(lambda: 1 / 0)\nprint('a')", ""),
    "second stream, never closed": ("import os\nout = os.fdopen(1, 'w')\nout.write('a\\n')", ""),
    "destructor at exit": ("class A:\n    def __del__(self): print('b')\na = A()\nprint('a')", ""),
    "generator left open": ("def f():\n    try: yield 1\n    finally: print('b')\ng = f()\nprint(next(g))", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def scripts():
    """A short limit: one of the programs waits for it in vain."""
    with S.Sandbox(workers=1, time_limit=1.5) as scripts:
        yield scripts


@pytest.mark.parametrize("name", PYTHON)
def test_a_script_prints_what_python_prints(scripts, tmp_path, name):
    source, text = PYTHON[name]
    path = tmp_path / "program.py"
    path.write_text(source)
    (tmp_path / "input").write_bytes(text.encode())
    with open(tmp_path / "input", "rb") as file:
        real = subprocess.run([sys.executable, "-I", "-X", "utf8", path], stdin=file, capture_output=True, timeout=30)
    result = scripts.run(source, text)
    assert (result.status, result.value) == ("ok", real.stdout.decode("utf-8", "replace"))


def test_output_is_decoded_with_replacement(box):
    assert box.run("import sys\nsys.stdout.buffer.write(b'a\\xff\\xfeb')", "").value == "a\ufffd\ufffdb"


def test_lone_surrogates_in_the_input_reach_the_program_as_bytes(box):
    assert box.run("import sys\nprint(sys.stdin.buffer.read())", "a\ud800\n").value == "b'a\\xed\\xa0\\x80\\n'\n"
    assert box.run("print(input())", "\ud800\n").status == "error"
    assert works(box)


@pytest.mark.parametrize("source, error, frames", [
    ("print(1)\nx = 1 / 0", "ZeroDivisionError: division by zero (line 2)", ("line 2, in <module>: x = 1 / 0",)),
    ("print(1", "SyntaxError: '(' was never closed (line 1)", ()),
    ("print(input())", "EOFError: EOF when reading a line (line 1)", ("line 1, in <module>: print(input())",)),
    ("def f(n):\n    return 1 // n + f(n - 1)\nprint(f(9))", "ZeroDivisionError: integer division or modulo by zero (line 2)",
     ("line 2, in f: return 1 // n + f(n - 1)",) * 3),
    ("print(1)\nraise KeyboardInterrupt", "KeyboardInterrupt (line 2)", ("line 2, in <module>: raise KeyboardInterrupt",)),
    ("print('\\ud800')", "UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800' in position 0: surrogates not "
     "allowed (line 1)", ("line 1, in <module>: print('\\ud800')",)),
    ("print(1)\nimport ctypes\nctypes.string_at(0)", "exited without a result (signal 11)", ()),
    ("x = bytearray(1 << 40)", "MemoryError", ()),
    pytest.param("print(1)\nclass E(Exception):\n    def __str__(self): raise self\nraise E", "E (line 4)", ("line 4, in <module>: raise E",)),
])  # fmt: skip
def test_only_an_exception_or_a_signal_makes_a_script_fail(box, source, error, frames):
    result = box.run(source, "")
    status = "memory" if error == "MemoryError" else "error"
    assert (result.status, result.value, result.error, result.frames) == (status, None, error, frames)


def test_an_exception_in_a_thread_is_told_beside_the_output(box):
    source = "import threading\ndef f():\n    return [][0]\nt = threading.Thread(target=f)\nt.start()\nt.join()\nprint('after')"
    result = box.run(source, "")
    assert (result.status, result.value, result.error) == (
        "ok",
        "after\n",
        "IndexError: list index out of range (line 3)",
    )
    assert result.frames == ("line 3, in f: return [][0]",)
    assert box.run("print('fine')", "")[:4] == ("ok", "fine\n", "", ())


def test_sys_exit_in_a_thread_is_no_error(box):
    assert box.run("import sys, threading\nthreading.Thread(target=sys.exit).start()", "").error == ""


def test_a_long_input_passes(box):
    text = "7 " * 2_000_000
    assert box.run("import sys\nprint(sum(map(int, sys.stdin.read().split())))", text).value == "14000000\n"


def test_a_script_reads_the_input_of_its_own_call_only(one):
    assert one.run("print(input())", "first\nsecond\n").value == "first\n"
    assert one.run("import sys\nprint([sys.stdin.read()])", "third").value == "['third']\n"
    assert one.run("import sys\nprint([sys.stdin.read()])", "").value == "['']\n"


# ---- The kernel's layers -----------------------------------------------------------------------------------


def test_layers_are_told_in_one_line(layered, only_seccomp, only_landlock, bare):
    first = "process per test, rlimits, "
    assert re.fullmatch(first + r"seccomp on, landlock on \(version \d+\)", layered.layers)
    assert only_seccomp.layers == first + "seccomp on, landlock not available"
    assert re.fullmatch(first + r"seccomp not available, landlock on \(version \d+\)", only_landlock.layers)
    assert bare.layers == first + "seccomp not available, landlock not available"
    for box in (layered, only_seccomp, only_landlock, bare):
        assert works(box) and box.run("print(input())", "a\n").value == "a\n"
        assert box.call("def f():\n    return 1 / 0", "f", []).error == "ZeroDivisionError: division by zero (line 2)"


READV = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
class Part(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
here = ctypes.create_string_buffer(8)
mine, its = Part(ctypes.addressof(here), 8), Part(id(os), 8)  # the worker has os at the same address
if libc.process_vm_readv(os.getppid(), ctypes.byref(mine), 1, ctypes.byref(its), 1, 0) < 0:
    raise OSError(ctypes.get_errno(), "process_vm_readv")
"""
TRACE = (
    READV.partition("class")[0]
    + "if libc.ptrace(16, os.getppid(), 0, 0) < 0: raise OSError(ctypes.get_errno(), 'ptrace')"
)
OWNER = """
import fcntl
r, w = os.pipe()
fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())
fcntl.fcntl(r, 10, 9)  # F_SETSIG
fcntl.fcntl(r, fcntl.F_SETFL, fcntl.fcntl(r, fcntl.F_GETFL) | os.O_ASYNC)
os.write(w, b"x")
time.sleep(0.1)
"""
ATTACKS = {  # each fails with EPERM; signal 0 and a bounded fork do no harm where one succeeds
    "fork": "os.fork()",
    "exec": "os.execv(sys.executable, [sys.executable, '-c', ''])",
    "posix_spawn": "os.posix_spawn(sys.executable, [sys.executable, '-c', ''], {})",
    "subprocess": "import subprocess; subprocess.run([sys.executable, '-c', ''])",
    "multiprocessing": "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
    "shell": "if os.system('true') != 0: raise PermissionError(1, 'system')",
    "setsid": "os.setsid()",
    "kill the worker": "os.kill(os.getppid(), 9)",
    "kill itself": "os.kill(os.getpid(), 9)",
    "signal everybody": "os.kill(-1, 0)",
    "signal the group": "os.killpg(0, 0)",
    "signal a thread": "import signal, threading; signal.pthread_kill(threading.get_ident(), 0)",
    "pidfd": "os.pidfd_open(os.getppid())",
    "TCP": "import socket; socket.create_connection(('127.0.0.1', port))",
    "TCP server": "import socket; socket.create_server(('127.0.0.1', 0))",
    "UDP": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX).connect('\\0' + name)",
    "process_vm_readv": READV,
    "ptrace": TRACE,
    "priority": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "affinity": "os.sched_setaffinity(os.getppid(), [0])",
    "unshare": TRACE.partition("if")[0]
    + "if libc.unshare(0x10000000) < 0: raise OSError(ctypes.get_errno(), 'unshare')",
    "set user": "os.setuid(65534)",
}


@pytest.fixture(scope="module")
def listener():
    """Port and abstract name of sockets that nobody may reach."""
    name = f"sandbox-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("\0" + name)
        unix.listen()
        yield tcp.getsockname()[1], name
        for server in (tcp, unix):
            server.setblocking(False)
            with pytest.raises(BlockingIOError):  # nobody did
                server.accept()


@pytest.mark.parametrize("attack", ATTACKS)
def test_seccomp_denies(layered, only_seccomp, listener, attack):
    for box in (layered, only_seccomp):
        before = pids(box)
        result = box.call(body(ATTACKS[attack] + "\nreturn 'escaped'", "port, name"), "f", [*listener])
        assert (result.status, result.value) == ("error", None)
        assert result.error.startswith("PermissionError: [Errno 1]")
        assert works(box) and pids(box) == before


@pytest.mark.parametrize("name", ["layered", pytest.param("only_seccomp")])
def test_no_signal_leaves_by_way_of_a_files_owner(name, request):
    box = request.getfixturevalue(name)
    before = pids(box)
    assert box.call(body(OWNER + "return 1"), "f", []).status in ("ok", "error")
    assert works(box) and pids(box) == before


@pytest.mark.parametrize(
    "attack", ["kill the worker", "TCP", "TCP server", "unix socket", "process_vm_readv", "ptrace"]
)
def test_landlock_denies_without_seccomp(only_landlock, listener, attack):
    before = pids(only_landlock)
    result = only_landlock.call(body(ATTACKS[attack] + "\nreturn 'escaped'", "port, name"), "f", [*listener])
    assert (result.status, result.value) == ("error", None)
    assert result.error.startswith(("PermissionError: [Errno 1]", "PermissionError: [Errno 13]"))
    assert works(only_landlock) and pids(only_landlock) == before


def test_threads_work_under_seccomp(layered):
    source = "from concurrent.futures import ThreadPoolExecutor\ndef f():\n    with ThreadPoolExecutor(4) as pool:\n"
    assert layered.call(source + "        return list(pool.map(abs, range(-9, 0)))", "f", []).value == list(
        range(9, 0, -1)
    )


CHANGES = {
    "write": "open(f'{folder}/file', 'w').write('x')",
    "append": "open(f'{folder}/file', 'a').write('x')",
    "create": "open(f'{folder}/new', 'w').close()",
    "delete": "os.unlink(f'{folder}/file')",
    "delete a directory": "os.rmdir(f'{folder}/empty')",
    "shutil.rmtree": "import shutil; shutil.rmtree(folder)",
    "make a directory": "os.mkdir(f'{folder}/new')",
    "rename": "os.rename(f'{folder}/file', f'{folder}/new')",
    "move here": "os.rename(f'{folder}/file', 'file')",
    "move there": "open('a', 'w').close(); os.rename('a', f'{folder}/file')",
    "link here": "os.link(f'{folder}/file', 'file'); open('file', 'w').close()",
    "link there": "open('a', 'w').close(); os.link('a', f'{folder}/new')",
    "through a link": "os.symlink(f'{folder}/file', 'link'); open('link', 'w').close()",
    "symlink": "os.symlink('/', f'{folder}/new')",
    "truncate": "os.truncate(f'{folder}/file', 0)",
    "pipe": "os.mkfifo(f'{folder}/new')",
    "mode": "os.chmod(f'{folder}/file', 0o777)",
    "owner": "os.chown(f'{folder}/file', os.getuid(), os.getgid())",
    "time": "os.utime(f'{folder}/file', (0, 0))",
    "attribute": "os.setxattr(f'{folder}/file', 'user.a', b'x')",
}
READS = {
    "file": "open(f'{folder}/file').read()",
    "directory": "os.listdir(folder)",
    "through a link": "os.symlink(f'{folder}/file', 'link'); open('link').read()",
    "by descriptor": "os.read(os.open(f'{folder}/file', os.O_RDONLY), 9)",
    "memory of the worker": "open(f'/proc/{os.getppid()}/mem', 'rb').read(0)",
    "memory map of the worker": "open(f'/proc/{os.getppid()}/maps').read()",
    "environment of the worker": "open(f'/proc/{os.getppid()}/environ').read()",
    "command line of the worker": "open(f'/proc/{os.getppid()}/cmdline').read()",
    "memory of the caller": "open(f'/proc/{caller}/mem', 'rb').read(0)",
    "environment of the caller": "open(f'/proc/{caller}/environ').read()",
    "command line of the caller": "open(f'/proc/{caller}/cmdline').read()",
    "files of the caller": "os.listdir(f'/proc/{caller}/fd')",
    "the caller's source": "open(source).read()",
    "users": "open('/etc/passwd').read()",
    "root": "os.listdir('/')",
    "home": "os.listdir(home)",
}


def tree(folder: Path) -> list:
    return [(str(p), (s := p.lstat()).st_mode, s.st_uid, s.st_mtime, p.read_text() if p.is_file() else "", os.listxattr(p))
            for p in sorted(folder.rglob("*"))]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_outside_the_working_directory_changes(layered, only_landlock, tmp_path, change):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    for box in (layered,) if change in ("mode", "owner", "time", "attribute") else (layered, only_landlock):
        result = box.call(body(CHANGES[change] + "\nreturn 'changed'", "folder"), "f", [str(tmp_path)])
        assert result.value is None and result.error.startswith(("PermissionError: [Errno 1", "OSError: [Errno 18]"))
        assert tree(tmp_path) == before
        assert works(box)


@pytest.mark.parametrize("read", READS)
def test_nothing_outside_is_read(layered, only_landlock, bare, tmp_path, read):
    """What is denied is there: without the layer the same lines run."""
    (tmp_path / "file").write_text("secret")
    arguments = [str(tmp_path), os.getpid(), __file__, str(Path.home())]
    source = body(READS[read] + "\nreturn 'read'", "folder, caller, source, home")
    for box in (layered, only_landlock):
        result = box.call(source, "f", arguments)
        assert result.value is None and result.error.startswith("PermissionError: [Errno 1")
        assert works(box)
    assert bare.call(source, "f", arguments).value == "read"


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes devices")
def test_no_device_can_be_made(layered):
    result = layered.call(body("os.mknod('device', 0o20600, os.makedev(1, 5))\nreturn 1"), "f", [])  # another /dev/zero
    assert (result.status, result.value) == ("error", None)


def test_the_working_directory_can_be_used(layered):
    lines = """
        import pathlib, shutil, sqlite3, tempfile
        os.makedirs("a/b")
        with open("a/b/c", "w") as file: file.write("text")
        os.rename("a/b/c", "a/d")
        shutil.copyfile("a/d", "e")
        with tempfile.TemporaryFile(dir=".") as file: file.write(b"x")
        sqlite3.connect("f").execute("create table t (x)")
        pathlib.Path("e").unlink()
        return sorted(str(path) for path in pathlib.Path().rglob("*")) + [open("a/d").read()]
    """
    assert layered.call(body(lines), "f", []).value == ["a", "a/b", "a/d", "f", "text"]


LOOK = """
import gc, re

def f(control):
    found, seen, frame = set(), set(), sys._getframe()
    todo = [*gc.get_objects(), dict(os.environ), sys.argv, sys.orig_argv]
    gc.unfreeze()
    todo += gc.get_objects()
    while frame:
        todo += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    while todo:
        item = todo.pop()
        if id(item) in seen or item is seen or item is found: continue
        seen.add(id(item))
        if isinstance(item, (bytes, bytearray)): item = item.decode("latin-1")
        if isinstance(item, str): found.update(re.findall("EXPECTED-[0-9]+-[a-z]+", item))
        else: todo += gc.get_referents(item)
    return sorted(found)
"""


def test_no_frame_and_no_object_of_the_child_holds_what_only_the_caller_knows(box, monkeypatch):
    """The caller's variable, environment and argument vector hold the expected output; the argument is found."""
    expected = f"EXPECTED-{os.getpid()}-secret"
    monkeypatch.setenv("EXPECTED", expected)
    monkeypatch.setattr(sys, "argv", [*sys.argv, expected])
    with S.Sandbox(workers=1) as fresh:
        for each in (box, fresh):
            result = each.call(f"import os, sys\n{LOOK}", "f", ["EXPECTED-0-control"])
            assert result.value == ["EXPECTED-0-control"] and result.value != expected


def test_no_object_of_an_earlier_call_is_left(one):
    """Freed memory may hold its bytes; no object does."""
    one.call(IDENTITY + "  # EXPECTED-1-source", "f", ["EXPECTED-2-argument"])
    one.run("print('EXPECTED-3-printed')", "EXPECTED-4-input")
    assert one.call(f"import os, sys\n{LOOK}", "f", ["EXPECTED-0-control"]).value == ["EXPECTED-0-control"]


def verdict(code: bytes, number: int, machine: int, args: tuple = ()) -> int:
    """A classic BPF machine, as far as the filter uses one."""
    data = struct.pack("<IIQ6Q", number, machine, 0, *args, *[0] * (6 - len(args)))
    a = x = at = 0
    while True:
        op, yes, no, k = struct.unpack_from("HBBI", code, 8 * at)
        at += 1
        if op == 0x06:
            return k
        if op in (0x15, 0x35, 0x45):
            at += yes if {0x15: a == k, 0x35: a >= k, 0x45: bool(a & k)}[op] else no
        elif op == 0x20:
            a = struct.unpack_from("<I", data, k)[0]
        elif op == 0x05:
            at += k
        elif op == 0x07:
            x = a
        else:
            a = {0x00: k, 0x54: a & k, 0x74: a >> min(k, 31), 0x7C: a >> min(x, 31)}[op]


ALLOW, PRETEND, DENY, UNKNOWN, KILL = 0x7FFF0000, 0x50000, 0x50001, 0x50026, 0x80000000
BY_HAND = {  # asm/unistd.h: read, write, openat, mmap, futex, exit_group; then what must be denied
    "x86_64": ([0, 1, 257, 9, 202, 231], {"fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "kill": 62, "tgkill": 234,
               "socket": 41, "connect": 42, "setsid": 112, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311,
               "pidfd_getfd": 438, "io_uring_setup": 425, "chmod": 90, "mount": 165, "bpf": 321, "unshare": 272}),
    "aarch64": ([63, 64, 56, 222, 98, 94], {"execve": 221, "execveat": 281, "kill": 129, "tgkill": 131, "socket": 198,
                "connect": 203, "setsid": 157, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271,
                "pidfd_getfd": 438, "io_uring_setup": 425, "fchmodat": 53, "mount": 40, "bpf": 280, "unshare": 97}),
}  # fmt: skip


@pytest.mark.parametrize("machine", BY_HAND)
def test_the_filter_decides_as_its_table_says(monkeypatch, machine):
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine))
    code, arch, column = S._seccomp_filter(), S.AUDIT_ARCH[machine], list(BY_HAND).index(machine)
    assert len(code) % 8 == 0 and len(code) // 8 < 4096
    table = {int(n) for row in S.DENIED.replace("\n", " ").split(",") if (n := row.split()[1 + column]) != "-"}
    special = {S.SETRLIMIT[column]: PRETEND, S.CLONE3[column]: UNKNOWN, S.CLONE[column]: DENY}
    for number in range(600):
        wanted = special.get(number, UNKNOWN if number >= S.FIRST_UNKNOWN else DENY if number in table else ALLOW)
        assert verdict(code, number, arch) == wanted, number
        assert verdict(code, number, arch ^ 1) == KILL
    allowed, denied = BY_HAND[machine]
    assert {verdict(code, number, arch) for number in allowed} == {ALLOW}
    assert {verdict(code, number, arch) for number in denied.values()} == {DENY}
    assert verdict(code, S.CLONE[column], arch, (0x3D0F00,)) == ALLOW  # a thread of glibc's
    assert verdict(code, S.CLONE[column], arch, (0x1200011,)) == DENY  # its fork
    assert verdict(code, S.PRLIMIT64[column], arch, (0, 7, 0)) == ALLOW  # reads
    assert {verdict(code, S.PRLIMIT64[column], arch, (0, 7, new)) for new in (8, 1 << 40)} == {PRETEND}
    assert verdict(code, 0x40000000 + 59, arch) == UNKNOWN


def test_there_is_no_filter_for_an_unknown_machine(monkeypatch):
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="riscv64"))
    assert S._seccomp_filter() is None


# ---- The same every time -----------------------------------------------------------------------------------


def test_hashes_sets_and_random_numbers_are_the_same_in_every_call_and_worker():
    source = "print(hash('abc'), {'a', 'bc', 'def', 'ghij'}, random.random(), random.sample(range(99), 3), sep='\\n')"
    texts = []
    for _ in range(2):
        with S.Sandbox(workers=2, preamble=True) as box:
            texts += [box.run(source, "").value for _ in range(4)]  # the workers take turns
            as_call = "def f():\n    return [hash('abc'), str({'a', 'bc', 'def', 'ghij'}), random.random()]"
            h, order, number = box.call(as_call, "f", []).value
            assert texts[0].split("\n")[:3] == [str(h), order, str(number)]
    assert len(set(texts)) == 1 and texts[0].count("\n") == 4


# ---- Workers that die --------------------------------------------------------------------------------------


def test_a_killed_idle_worker_is_replaced(box):
    before = pids(box)
    os.kill(before[0], signal.SIGKILL)
    assert ends(before[:1])
    assert works(box) and works(box) and before[0] not in pids(box) and len(set(pids(box))) == 2


NOTE = "with open('note', 'w') as file: print(os.getpid(), file=file)\n"
SLEEP = body(NOTE + "time.sleep(60)")


def test_a_worker_killed_in_a_call_is_replaced_and_the_call_is_repeated():
    with S.Sandbox(workers=1, time_limit=10.0) as box:
        results = in_thread(box.call, body(NOTE + "time.sleep(0.5)\nreturn os.getpid()"), "f", [])
        first, worker = int(note(box)[0].read_text()), pids(box)[0]
        os.kill(worker, signal.SIGKILL)
        assert results.get(timeout=10).value != first and pids(box) != [worker] and ends([first, worker])


@pytest.mark.parametrize("disarm", [
    "pass",
    pytest.param("import ctypes; ctypes.CDLL(None).prctl(1, 0)"),
])  # fmt: skip
def test_the_child_of_a_killed_worker_ends(layered, disarm):
    with S.Sandbox(workers=1, time_limit=60.0) as box:
        in_thread(box.call, body(f"{disarm}\n{NOTE}time.sleep(60)"), "f", [])
        child = int(note(box)[0].read_text())
        os.kill(pids(box)[0], signal.SIGKILL)
        try:
            assert ends([child], within=2.0)
        finally:
            if running(child):
                os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("mode", ["call", "run"])
def test_a_worker_that_dies_twice_is_internal(bare, mode):
    kill = body("os.kill(os.getppid(), 9)\nreturn 1")
    result = bare.call(kill, "f", []) if mode == "call" else bare.run(kill + "\nf()", "")
    assert (result.status, result.value, result.error) == ("internal", None, "the worker died twice")
    assert works(bare)


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
        patience.settimeout(1.0)  # of this worker only
        assert box.call(body(lines, "path"), "f", [str(tmp_path / "mark")]).value == "again"
        assert ends([*silent, int(wait_for(tmp_path / "mark"))])


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


# ---- No process is left ------------------------------------------------------------------------------------


def test_close_ends_workers_and_calls_in_flight():
    box = S.Sandbox(workers=2, time_limit=60.0)
    scratch = [Path(worker.scratch) for worker in box._workers]
    failed = in_thread(box.call, SLEEP, "f", [])
    everyone = [int(note(box)[0].read_text()), *pids(box)]
    box.close()
    assert ends(everyone) and not any(path.exists() for path in scratch)
    assert str(failed.get(timeout=5)) == "the sandbox is closed"
    for ask in (lambda: box.call(IDENTITY, "f", [1]), lambda: box.run("", "")):
        with pytest.raises(RuntimeError, match="closed"):
            ask()
    box.close()  # twice is no error


CALLER = f"""
import glob, os, sys, threading, time, sandbox

box = sandbox.Sandbox(workers=2, time_limit=60.0)
threading.Thread(target=lambda: box.call({SLEEP!r}, "f", []), daemon=True).start()
notes = []
while not (notes and os.path.getsize(notes[0])):
    time.sleep(0.01)
    notes = [path for worker in box._workers for path in glob.glob(worker.scratch + "/*/note")]
print(open(notes[0]).read(), *(w.process.pid for w in box._workers), *(w.scratch for w in box._workers), flush=True)
"""


STOP_A_WORKER = "os.kill(box._workers[1].process.pid, 19)"  # it cannot end of itself: only atexit helps


@pytest.mark.parametrize("end", ["sys.exit(3)", STOP_A_WORKER, "os.kill(os.getpid(), 9)"])
def test_no_process_survives_the_caller(end):
    """A call is in flight on a second thread, and nobody closes the sandbox."""
    caller = subprocess.run([sys.executable, "-c", CALLER + end], cwd=ROOT, capture_output=True, text=True, timeout=30)
    *left, first, second = caller.stdout.split()
    assert len(left) == 3 and ends(map(int, left))
    deadline = time.monotonic() + 5.0
    while any(map(os.path.exists, (first, second))) and time.monotonic() < deadline:  # a worker's last act
        time.sleep(0.01)
    assert not os.path.exists(first) and not os.path.exists(second)


# ---- Many at once ------------------------------------------------------------------------------------------


def test_run_many_keeps_the_order_and_raises(box):
    assert box.run_many(lambda n: box.call(IDENTITY, "f", [n]).value, range(40)) == list(range(40))
    with pytest.raises(ZeroDivisionError):
        box.run_many(lambda n: 1 / n, [1, 0])


def test_programs_run_at_the_same_time(box):
    """Both have started before either may end."""
    meet = body(NOTE + "while not os.path.exists('go'): time.sleep(0.01)\nreturn 'met'")
    results = [in_thread(box.call, meet, "f", []) for _ in range(2)]
    for path in note(box, count=2):
        path.with_name("go").touch()
    assert [result.get(timeout=10).value for result in results] == ["met", "met"]


def test_more_threads_than_workers_all_get_their_own_answer(one):
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: one.call(IDENTITY, "f", [n]).value})) for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: n for n in range(12)}


def test_a_call_costs_milliseconds(one):
    """Processor time of the worker and its children, which a busy machine does not stretch as it does the clock's."""

    def spent() -> float:
        fields = Path(f"/proc/{pids(one)[0]}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    assert works(one)
    before = spent()
    assert all(one.call(IDENTITY, "f", [n]).status == "ok" for n in range(50))
    assert spent() - before < 50 * 0.020  # about 50 * 0.002


# ---- Slow --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["call", "run"])
def test_5120_tests_take_at_most_8_seconds_on_2_workers(mode):
    """256 programs with 20 tests each; the best of three, since others use the machine too."""
    programs = [
        f"def f(x):\n    return x + {n}" if mode == "call" else f"print(int(input()) + {n})" for n in range(256)
    ]
    seconds = []
    with S.Sandbox(workers=2) as box:

        def grade(n):
            if mode == "call":
                return all(box.call(programs[n], "f", [x]).value == x + n for x in range(20))
            return all(box.run(programs[n], f"{x}\n").value == f"{x + n}\n" for x in range(20))

        for _ in range(3):
            start = time.monotonic()
            assert all(box.run_many(grade, range(256)))
            seconds.append(time.monotonic() - start)
    print(mode, *(f"{s:.1f} s" for s in seconds))
    assert min(seconds) <= 8.0, seconds
