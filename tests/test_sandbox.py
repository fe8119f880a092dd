"""One test or more for each line of sandbox.py's docstring; the programs are as hostile as the line says.

Time limits are 0.5 s where a test waits for one and 10 s elsewhere, so that a busy machine fails nothing else.
"""

import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from textwrap import dedent, indent

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # sandbox.py is one folder up; pytest may start anywhere
import sandbox as S  # noqa: E402

IDENTITY = "def f(x):\n    return x"


@pytest.fixture(scope="module")
def box():
    with S.Sandbox(workers=2, time_limit=10.0, memory_mb=256, output_bytes=100_000) as box:
        yield box


@pytest.fixture(scope="module")
def one():
    """One worker: every call meets the one that ran the call before."""
    with S.Sandbox(workers=1, time_limit=10.0) as one:
        yield one


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
    deadline = time.monotonic() + within
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(running, pids))


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 10.0
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline, f"{path.name} was never written"
        time.sleep(0.01)
    return path.read_text().strip()


# ---- Values ------------------------------------------------------------------------------------------------


VALUES = [None, True, False, 1, 0, -1, 1.0, 0.1, 10**30, "", "é\n\t\u2028\0\ud800 <b>", [], {}, [1, [True, {"a": None}]]]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_json_values_return_with_their_types(box, value):
    result = box.call(IDENTITY, "f", [value])
    assert (result.status, repr(result.value)) == ("ok", repr(value))  # repr: True is not 1, 1 is not 1.0
    assert result.error == "" and 0 < result.seconds < 10


def test_infinities_and_nan_return(box):
    low, high, nan = box.call(body("return x, y, y - y", "x, y"), "f", [-math.inf, math.inf]).value
    assert (low, high) == (-math.inf, math.inf) and math.isnan(nan)


def test_tuples_become_lists_and_keys_strings(box):
    assert box.call("def f():\n    return (1, (2,)), {3: 4}", "f", []).value == [[1, [2]], {"3": 4}]


@pytest.mark.parametrize("value, name", [("{1}", "set"), ("object()", "object"), ("b''", "bytes"), ("1j", "complex")])
def test_a_value_json_cannot_hold_is_a_type_error(box, value, name):
    result = box.call(body(f"return {value}"), "f", [])
    assert (result.status, result.error) == ("error", f"TypeError: Object of type {name} is not JSON serializable")


@pytest.mark.parametrize("lines, error", [
    ("x = []; x.append(x); return x", "ValueError: Circular"),
    ("x = []\nfor _ in range(9**5): x = [x]\nreturn x", "RecursionError"),
    ("return 10**5000", "ValueError: Exceeds the limit (4300"),
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
    assert works(box)


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
    ("def f():\n    exit()", "NameError: name 'exit' is not defined (line 2)"),
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


@pytest.mark.parametrize("lines, how", [
    ("os._exit(0)", "exit code 0"),
    ("os._exit(3)", "exit code 3"),
    ("os.kill(os.getpid(), 9)", "signal 9"),
    ("import ctypes; ctypes.string_at(0)", "signal 11"),
    ("os.closerange(3, 99); time.sleep(60)", "signal 9"),  # the sandbox's own: nobody is left to hear an answer
])  # fmt: skip
def test_a_process_that_ends_without_an_answer_is_an_error(box, lines, how):
    result = box.call(body(lines), "f", [])
    assert (result.status, result.error) == ("error", f"exited without a result ({how})")
    assert works(box)


def test_an_exception_that_cannot_be_printed_is_an_error(box):
    assert box.call("class E(Exception):\n    def __str__(self): raise self\ndef f():\n    raise E", "f", []).status == "error"


# ---- Time --------------------------------------------------------------------------------------------------


FOREVER = "while True: pass"
LOOPS = {
    "plain": body(FOREVER),
    "at import": FOREVER,
    "asleep": body("time.sleep(60)"),
    "swallows every exception": body("while True:\n    try:\n        while True: pass\n    except BaseException: pass"),
    "ignores every signal": body(f"import signal as s\nfor n in set(s.Signals) - {{9, 19}}: s.signal(n, s.SIG_IGN)\n{FOREVER}"),
    "stopped": body("os.kill(os.getpid(), 19)"),
    "one long operation": body("return 9**9**8"),
    "in the exception's text": body(f"class E(Exception):\n    def __str__(self):\n        {FOREVER}\nraise E"),
    "prints": body("while True: print('x' * 10000)"),
}


def test_every_loop_is_killed_at_the_limit_and_the_next_calls_work():
    with S.Sandbox(workers=5, time_limit=0.5) as box:
        results = dict(zip(LOOPS, box.run_many(lambda source: box.call(source, "f", []), LOOPS.values())))
        expected = dict.fromkeys(LOOPS, ("timeout", "no result within 0.5 s"))
        assert {name: (r.status, r.error) for name, r in results.items()} == expected
        assert all(0.5 <= r.seconds < 1.5 for r in results.values())
        assert works(box)


def test_the_process_group_ends_with_the_call(tmp_path):
    fork = """
        if os.fork() == 0:
            print(os.getpid(), file=open(path, "w"))
            time.sleep(60)
        while not os.path.exists(path) or not open(path).read().endswith("\\n"): pass
        time.sleep(last)
    """
    with S.Sandbox(workers=1, time_limit=1.0) as box:
        for name, last, status in [("answered", 0, "ok"), ("too late", 60, "timeout")]:
            assert box.call(body(fork, "path, last"), "f", [str(tmp_path / name), last]).status == status
            assert ends([int(wait_for(tmp_path / name))])


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


# ---- What a program sees and leaves behind -----------------------------------------------------------------


def test_nothing_set_by_one_call_is_seen_by_the_next(one):
    source = """
import builtins, json, os, sys

count = 0

def f():
    global count
    count += 1
    seen = [count, hasattr(builtins, "mark"), hasattr(sys, "mark"), "MARK" in os.environ]
    builtins.mark = sys.mark = json.dumps = json.loads = 1
    os.environ["MARK"] = "1"
    return seen
"""
    assert [one.call(source, "f", []).value for _ in range(3)] == [[1, False, False, False]] * 3


@pytest.mark.parametrize("leave", [
    "pass",
    "open('a', 'w').write('x')",
    "os.makedirs('a/b/c')",
    "os.makedirs('a/b/c'); os.symlink('/', 'a/b/link'); os.chmod('a/b', 0); os.chmod('a', 0); os.chmod('.', 0)",
    "os.rmdir(os.getcwd())",
    "[(os.mkdir('d'), os.chdir('d')) for _ in range(1050)]",  # deeper than Python's recursion limit
])  # fmt: skip
def test_the_working_directory_is_empty_in_every_call(one, leave):
    look = "seen = os.listdir(), os.getcwd()\n{}\nreturn seen"
    names, used = one.call(body(look.format(leave)), "f", []).value
    assert names == [] and used != os.getcwd()
    assert one.call(body(look.format("pass")), "f", []).value[0] == []
    assert leave == "pass" or not os.path.exists(used)


def test_input_is_empty_and_output_goes_nowhere(box, capfd):
    lines = """
        print("ok\\t1")
        sys.stderr.write("ok\\t2\\n")
        for fd in (0, 1, 2): os.write(fd, b"ok\\t3\\n")
        os.system("echo hello; echo hello >&2")
        return sys.stdin.read(), [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)]
    """
    assert box.call(body(lines), "f", []).value == ["", ["/dev/null"] * 3]
    assert box.call(body("return input()"), "f", []).error == "EOFError: EOF when reading a line (line 4)"
    assert capfd.readouterr() == ("", "")


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "tell-nobody")
    lines = "return dict(os.environ), [open(f'/proc/{pid}/environ').read() for pid in (os.getpid(), os.getppid())]"
    with S.Sandbox(workers=1) as box:
        environment, blocks = box.call(body(lines), "f", []).value
    assert environment == {} and "tell-nobody" not in "".join(blocks)


def test_only_the_standard_library_is_importable(box):
    lines = "import json, heapq, decimal\nreturn sys.path, [m for m in ('torch', 'numpy', 'site') if m in sys.modules]"
    path, loaded = box.call(body(lines), "f", []).value
    assert loaded == [] and not any("site-packages" in p or Path(p) == ROOT for p in path)
    for name in ("pytest", "torch", "losses"):
        assert box.call(f"import {name}", "f", []).error == f"ModuleNotFoundError: No module named '{name}' (line 1)"


def test_the_module_needs_no_torch():
    subprocess.run([sys.executable, "-c", "import sandbox, sys; assert 'torch' not in sys.modules"], cwd=ROOT, check=True)


# ---- Forged answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, status", [
    ("ok\t99\n", "ok"),
    ("ok\tnonsense\n", "error"),
    ("ok\t1\t2\n", "error"),
    ("ok\t" + "[" * 50_000 + "\n", "error"),
    ("ok\t" + "9" * 9_000 + "\n", "error"),
    ("nonsense\t1\n", "error"),
    ("\n", "error"),
    ("\xff\xff\n", "error"),
    ("error\t[1]\n", "error"),
    ("timeout\t0\n", "error"),
], ids=lambda text: repr(text[:12]))  # fmt: skip
def test_a_forged_answer_is_only_an_answer(box, text, status):
    forge = """
        for fd in range(3, 20):
            try: os.write(fd, text.encode("latin-1"))
            except OSError: pass
        return "honest"
    """
    result = box.call(body(forge, "text"), "f", [text])
    assert result.status == status and result.value in (None, 99)
    assert works(box)


# ---- Workers that die --------------------------------------------------------------------------------------


def test_a_killed_idle_worker_is_replaced(box):
    before = pids(box)
    os.kill(before[0], signal.SIGKILL)
    assert ends(before[:1])
    assert works(box) and works(box) and before[0] not in pids(box) and len(set(pids(box))) == 2


ONCE = """
    if os.path.exists(path): return "again"
    print(os.getpid(), file=open(path, "w"), flush=True)
"""


def test_a_worker_killed_in_a_call_is_replaced_its_child_ends_and_the_call_is_repeated(tmp_path):
    source, path, results = body(ONCE + "    time.sleep(60)", "path"), tmp_path / "child", queue.Queue()
    with S.Sandbox(workers=1, time_limit=10.0) as box:
        thread = threading.Thread(target=lambda: results.put(box.call(source, "f", [str(path)])))
        thread.start()
        child, worker = int(wait_for(path)), pids(box)[0]
        os.kill(worker, signal.SIGKILL)
        assert (results.get(timeout=10).value, ends([child, worker])) == ("again", True)
        thread.join()


def test_a_worker_that_dies_twice_is_internal(box):
    result = box.call(body("os.kill(os.getppid(), 9)\nreturn 1"), "f", [])
    assert (result.status, result.error) == ("internal", "the worker died twice")
    assert works(box)


def test_a_silent_worker_is_replaced(tmp_path):
    source = body(ONCE + "    os.kill(os.getppid(), 19)\n    time.sleep(60)", "path")
    with S.Sandbox(workers=1, time_limit=10.0) as box:
        assert works(box)
        silent, patience = pids(box), box._workers[0].socket
        assert patience.gettimeout() == 10.0 + S.GRACE_SECONDS
        patience.settimeout(1.0)  # of this worker only
        assert box.call(source, "f", [str(tmp_path / "mark")]).value == "again"
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


SLEEP = body("print(os.getpid(), file=open(path, 'w'), flush=True)\ntime.sleep(60)", "path")


def test_close_ends_workers_and_calls_in_flight(tmp_path):
    box = S.Sandbox(workers=2, time_limit=60.0)
    failed, scratch = queue.Queue(), [Path(worker.scratch) for worker in box._workers]

    def call():
        try:
            failed.put(box.call(SLEEP, "f", [str(tmp_path / "child")]))
        except RuntimeError as e:
            failed.put(str(e))

    thread = threading.Thread(target=call)
    thread.start()
    everyone = [int(wait_for(tmp_path / "child")), *pids(box)]
    box.close()
    assert ends(everyone) and not any(path.exists() for path in scratch)
    assert failed.get(timeout=5) == "the sandbox is closed"
    thread.join()
    with pytest.raises(RuntimeError, match="closed"):
        box.call(IDENTITY, "f", [1])
    box.close()  # twice is no error


CALLER = f"""
import os, sys, threading, time, sandbox

box = sandbox.Sandbox(workers=2, time_limit=60.0)
threading.Thread(target=lambda: box.call({SLEEP!r}, "f", [sys.argv[1]]), daemon=True).start()
while not (os.path.exists(sys.argv[1]) and os.path.getsize(sys.argv[1])):
    time.sleep(0.01)
print(*(w.process.pid for w in box._workers), *(w.scratch for w in box._workers), flush=True)
"""


STOP_A_WORKER = "os.kill(box._workers[1].process.pid, 19)"  # it cannot end of itself: only atexit helps


@pytest.mark.parametrize("end", ["sys.exit(3)", STOP_A_WORKER, "os.kill(os.getpid(), 9)"])
def test_no_process_survives_the_caller(tmp_path, end):
    """A call is in flight on a second thread, and nobody closes the sandbox."""
    command = [sys.executable, "-c", CALLER + end, tmp_path / "child"]
    caller = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    *left, first, second = caller.stdout.split()
    assert ends([int(wait_for(tmp_path / "child")), *map(int, left)])
    assert not os.path.exists(first) and not os.path.exists(second)  # a worker's last act


# ---- Many at once ------------------------------------------------------------------------------------------


def test_run_many_keeps_the_order_and_raises(box):
    assert box.run_many(lambda n: box.call(IDENTITY, "f", [n]).value, range(40)) == list(range(40))
    with pytest.raises(ZeroDivisionError):
        box.run_many(lambda n: 1 / n, [1, 0])


def test_programs_run_at_the_same_time(box, tmp_path):
    """Each waits for the other."""
    meet = body("open(mine, 'w').close()\nwhile not os.path.exists(other): pass\nreturn 'met'", "mine, other")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert box.run_many(lambda pair: box.call(meet, "f", pair).value, [[a, b], [b, a]]) == ["met", "met"]


def test_more_threads_than_workers_all_get_their_own_answer(one):
    results = {}
    threads = [threading.Thread(target=lambda n=n: results.update({n: one.call(IDENTITY, "f", [n]).value})) for n in range(12)]
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
