"""The contract of tasks/: what a task, a problem and an outcome are, how a task is found by name, how files are read, and what
a task file of one's own may do. The benchmarks have files of their own, and so has the toy."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

import tasks
from harness import hub
from tasks import Outcome, Problem, Task, own, tiny, toy
from tasks.sandbox import Sandbox


@contextmanager
def refused(*words):
    """A ValueError of one line that has these words."""
    with pytest.raises(ValueError) as refusal:
        yield
    message = str(refusal.value)
    assert message and "\n" not in message and all(word in message for word in words), message


@contextmanager
def one_sandbox(module):
    """The tasks of a module share one sandbox, which notes what it is asked and how much may come back; closing a task closes
    nothing before the end."""
    noted, built = SimpleNamespace(asked=[], most=[], closed=0), []

    class Noted(Sandbox):
        def call(self, source, function, args, max_output=None):
            noted.asked.append(args), noted.most.append(max_output)
            return super().call(source, function, args, max_output)

        def run(self, source, stdin, max_output=None):
            noted.asked.append(stdin), noted.most.append(max_output)
            return super().run(source, stdin, max_output)

        def close(self):
            noted.closed += 1

    def build(**settings):
        built[:] = built or [Noted(**settings)]
        return built[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Sandbox", build)
        yield noted
    Sandbox.close(built[0])


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- Walls -----------------------------------------------------------------------------------------------


def test_tasks_know_nothing_of_training():
    known = r"^ *(?:from|import) (?:vpd|losses|rollout|evaluate|model|neighbours|study|harness)\b.*"
    for file in Path(tasks.__file__).parent.glob("*.py"):
        assert {*re.findall(known, file.read_text(), re.MULTILINE)} <= {"from harness import hub"}, file.name


# ---- Loading by name -------------------------------------------------------------------------------------


def test_a_task_is_found_by_name_and_its_first_subset_is_the_default(monkeypatch):
    assert tasks.load("toy").name == "toy/trace" and tasks.load("toy", "choice").name == "toy/choice"
    assert set(tasks.TASKS["toy"]) == set(toy.EVERY)
    monkeypatch.setattr(toy, "load", lambda subset: f"loaded {subset}")  # the code task takes seconds to build
    assert [tasks.load("toy", subset) for subset in tasks.TASKS["toy"]] == [f"loaded {s}" for s in tasks.TASKS["toy"]]


LCB = str(tiny.FIXTURES / "lcb.jsonl")


@pytest.mark.parametrize("call, words", [
    (lambda: tasks.load("poker"), f"'poker' has no loader: choose one of {', '.join(tasks.TASKS)}"),
    (lambda: tasks.load("toy", "chess"), f"'chess': choose one of {', '.join(tasks.TASKS['toy'])}"),
    (lambda: tasks.load("math", data="no/such/place"), "--data no/such/place does not exist"),
    (lambda: tasks.load("toy", data=LCB), "toy"), (lambda: tasks.load("own", data=LCB), "FILE.py"),
    (lambda: tasks.read("toy", LCB), "lcb, sciknoweval or math"),
])  # fmt: skip
def test_an_unknown_task_or_subset_is_refused_in_one_line(call, words):
    with refused(words):
        call()


# ---- Reading files and the hub -----------------------------------------------------------------------------


def test_rows_are_the_same_from_every_file_format(tmp_path):
    expected = list(tasks.rows(tiny.FIXTURES / "lcb.jsonl"))
    table = datasets.Dataset.from_list(expected)
    table.save_to_disk(str(tmp_path / "saved"))
    for folder in ("lines", "arrow"):
        (tmp_path / folder).mkdir()
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    shutil.copy(arrow, tmp_path / "arrow" / "x.arrow")
    table.to_parquet(str(tmp_path / "x.parquet"))
    write(tmp_path / "lines" / "x.jsonl", expected)
    assert len(expected) == 5
    for place in ("x.parquet", "saved", "arrow", "arrow/x.arrow", "lines", "lines/x.jsonl"):
        assert list(tasks.rows(tmp_path / place)) == expected, place


ROW = b'{"problem": "?", "answer": 5}\n'


@pytest.mark.parametrize("name, content, words", [
    ("x.jsonl", ROW + b"\n{broken\n", "line 3"), ("x.jsonl", b"[1]\n", "line 1"), ("x.jsonl", b"[" * 200_000, "line 1"),
    ("x.jsonl", b"", "holds no row"), ("x.jsonl", ROW + b"\xff\xfe\x00", "line 2"),
    ("x.parquet", b"PAR1 but no", "cannot be read"), ("x.arrow", b"no arrow", "cannot be read"),
    ("absent.jsonl", None, "does not exist"), ("", None, "holds no .jsonl"), ("state.json", b"{", "cannot be read"),
])  # fmt: skip
def test_files_that_cannot_be_read_are_refused_in_one_line(name, content, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    path = str(tmp_path / name.removesuffix("state.json"))
    with refused(path, words):
        tasks.read("math", path)


def test_half_of_a_surrogate_pair_in_a_file_becomes_text(tmp_path, tokenizer):
    (tmp_path / "x.jsonl").write_text('{"a": "x\\ud800y"}\n{"a": "\\uDE00"}\n{"a": "\\ud83d\\ude00"}\n{"a": "\\\\ud800"}\n')
    texts = [row["a"] for row in tasks.rows(tmp_path / "x.jsonl")]
    assert texts == ["x?y", "?", "\U0001f600", "\\ud800"] and all(tokenizer(text).input_ids for text in texts[:2])
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")


@pytest.mark.parametrize("reason", ["", "no way to the hub"])
@pytest.mark.parametrize("task, repo, what", [
    ("lcb", "livecodebench/code_generation_lite", ("test6.jsonl", {"repo_type": "dataset"})),
    ("sciknoweval", "hicai-zju/SciKnowEval", ({"split": "test"},)),
])  # fmt: skip
def test_an_unreachable_hub_is_reported_in_one_line_and_the_cache_is_used(task, repo, what, reason, monkeypatch):
    """Without a reason the hub answers, and fails later. For its load, and only for it, the library is told that it is offline."""
    asked, flags = [], [(module, "HF_HUB_OFFLINE") for module in (huggingface_hub.constants, datasets.config)]
    answers = {(repo, what[0] if task == "lcb" else "README.md", "dataset"): reason}

    def fail(*given, **settings):
        asked.append((*given, settings, *(getattr(*flag) for flag in flags)))
        raise ConnectionError("no route\nto host")

    for flag in flags:
        monkeypatch.setattr(*flag, False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(hub, "unreachable", lambda *of: answers[of])
    with refused(f"{repo} cannot be fetched ({reason or 'ConnectionError: no route to host'}): give a local copy with --data"):
        tasks.load(task)
    assert asked == [(repo, *what, bool(reason), bool(reason))] and not any(getattr(*flag) for flag in flags)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: LCB)  # from the hub or from its cache
    if task == "lcb":
        (loaded := tasks.load("lcb")).close()
        assert len(loaded.test) == 4


# ---- A task file of one's own ------------------------------------------------------------------------------------

FILE = """\
import os, sys, time
import numpy, torch
from tasks import Outcome, Problem, Task
TRIED = []
def verify(problems, responses):
    TRIED.append(responses)
    if len(TRIED) == 1:  # load() tries it
        return [Outcome(0, "wrong") for _ in problems]
    BODY
def load():
    problems = [Problem(str(i), [{"role": "user", "content": f"{i}?"}], "REFERENCE") for i in range(3)]
    return Task("mine", problems, problems, problems, verify)
"""


@pytest.fixture
def load_own(tmp_path, monkeypatch):
    """load_own(body): the task of a file with this line in its verifier, loaded by a path relative to the folder."""

    def load(body: str = "pass", reference: str = "r", text: str = FILE):
        (tmp_path / "mine.py").write_text(text.replace("BODY", body).replace("REFERENCE", reference))
        return tasks.load("own", data="mine.py")

    monkeypatch.chdir(tmp_path)
    return load


def test_an_own_task_has_its_own_name_or_its_files_name_and_closes(load_own, capsys):
    assert load_own(text=FILE.replace('Task("mine"', 'Task("any name"')).name == "any name"
    task = load_own(text=FILE.replace('Task("mine"', 'Task(""'), reference="r\\udfff")
    assert task.name == "mine" and task.splits().endswith("3 train, 3 validation, 3 test problems")
    assert {p.reference for p in task.train} == {"r?"}
    load_own(text=FILE.replace(", verify)", ", verify, lambda: 1 / 0)")).close()  # costs no result
    assert re.fullmatch(r"mine.py, line 12: close\(\) raised ZeroDivisionError: .*\n", capsys.readouterr().err)


TEXT = "numpy.str_('a\\ud800b')"
NUMBERS = ("#", "bool(#)", "#.0", "numpy.int64(#)", "numpy.float32(#)", "numpy.bool_(#)", "numpy.array([#])", "torch.tensor(#.0)",
           "torch.tensor([#])")  # fmt: skip


@pytest.mark.parametrize("body, outcome", [
    *((f'return [Outcome({value}, "v", None, {{"c": {value}}})]'.replace("#", n), Outcome(int(n), "v", "", {"c": int(n)}))
      for value in NUMBERS for n in "01"),
    (f"return (Outcome(0, {TEXT}, {TEXT}, {{{TEXT}: 1}}),)", Outcome(0, "a?b", "a?b", {"a?b": 1})),
])  # fmt: skip
def test_outcomes_of_other_libraries_become_plain_numbers_and_text(body, outcome, load_own, tokenizer):
    task = load_own(body)
    (found,) = task.verify(task.test[:1], [""])
    assert found == outcome and type(found.reward) is int and type(found.feedback) is str
    assert json.dumps(found.columns) == json.dumps(outcome.columns) and tokenizer(f"{found.verdict}{found.feedback}").input_ids


@pytest.mark.parametrize(
    "body, line, words",
    [
        *((f"return [{value}]", "", "must return Outcomes with a reward and columns of 0 or 1, and a verdict") for value in (
            *(f'Outcome({number}, "v")' for number in (
                "0.5", "2", "None", "'1'", "float('nan')", "numpy.array([0, 1])", "torch.tensor([])", "torch.tensor(0.3)", "[1]")),
            'Outcome(1, "v", columns={"c": 0.5})', 'Outcome(1, "v", columns=[1])', 'Outcome(1, "v", columns={3: 1})',
            'Outcome(0, "v", b"text")', 'Outcome(0, "v", 0)', "Outcome(0, None)", "1",
        )),
        ("return None", "", "a list with an Outcome for each of 1 responses, not None"),
        ("return []", "", "for each of 1 responses, not 0 outcomes"),
        ("responses.clear(); return []", "", "for each of 1 responses, not 0 outcomes"),
        ("sys.exit(0)", ", line 9", "verify() raised SystemExit: 0"),
        ("sys.exit()", ", line 9", "verify() raised SystemExit"),
        ("os._exit(0)", ", line 9", "verify() raised SystemExit: 0"),
        ("raise type('Stop', (BaseException,), {})('two\\nlines')", ", line 9", "verify() raised Stop: two lines"),
        ("return [Outcome(1)]", ", line 9", "verify() raised TypeError"),
        ("raise type('Mute', (Exception,), {'__str__': None})", ", line 9", "raised Mute: <exception str() failed>"),
        ("return [problems[0].answer]", ", line 9", "has no attribute 'answer'"),
    ],
)  # fmt: skip
def test_a_failing_verifier_is_reported_in_one_line_with_its_line_number(body, line, words, load_own):
    task = load_own(body)
    with refused(f"mine.py{line}: verify() ", words), pytest.MonkeyPatch.context() as patch:
        patch.chdir("/")  # the file is known by the path that it had
        task.verify(task.test[:1], [""])


@pytest.mark.parametrize("load, words", [
    ("sys.exit(0)", "mine.py, line 2: SystemExit: 0"),
    ("raise GeneratorExit", "mine.py, line 2: GeneratorExit"),
    ("return 3", "must return a tasks.Task"),
    ("return Task('a', [Problem('p', [])], None, [], None)", "must return a tasks.Task"),
    ("return Task('a', [Problem('p', [{'role': x, 'content': ''} for x in ('user', '')])], [], [], None)", "the last a user's"),
    ("return Task('a', [Problem('p', [{'role': 'user', 'content': ''}], 3)], [], [], None)", "the reference text"),
    ("return Task('a', [Problem((1,), [{'role': 'user', 'content': ''}])], [], [], None)", "id must be text or a number"),
    ("return Task('a', [Problem(i, [{'role': 'user', 'content': ''}]) for i in (1, '1')], [], [], None)", "twice"),
    ("return Task('a', [Problem('p', [{'role': 'user', 'content': ''}])], [], [], None)", "'NoneType' object is not callable"),
    *((f"return Task('a', [Problem('p', [])], [], [], None, {field}=None)", f"task's {field} cannot be None")
      for field in ("notes", "lacks", "close")),
])  # fmt: skip
def test_a_malformed_task_file_is_refused_in_one_line(load, words, load_own):
    with refused(words):
        load_own(text=f"import sys; from tasks import Problem, Task\ndef load(): {load}\n")


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(60)",
        "while True: pass",
        "import re; re.match('(a*)*b', 'a' * 40)",
        "os.read(os.pipe()[0], 1)",
        "import signal; signal.alarm(0); time.sleep(60)",  # as math-verify ends its own limit
        "exec('try:\\n while True:\\n  try: time.sleep(60)\\n  except Exception: pass\\nexcept BaseException: time.sleep(60)')",
    ],
)
def test_a_hanging_verifier_is_reported_with_its_line_number(body, load_own, monkeypatch):
    task, start, popen, watchers = load_own(body), time.monotonic(), subprocess.Popen, []

    def start_watcher(*args, **how):
        watcher = popen(*args, **how)
        watchers.append((watcher, os.getsid(watcher.pid)))
        return watcher

    monkeypatch.setattr(own, "VERIFY_SECONDS", 0.3)
    monkeypatch.setattr(subprocess, "Popen", start_watcher)
    with refused("mine.py, line 9: verify() did not return within 0.3 seconds"):
        task.verify(task.test[:1], [""])
    assert time.monotonic() - start < 10
    assert signal.getsignal(signal.SIGPROF) == signal.SIG_DFL
    ((watcher, session),) = watchers
    assert watcher.returncode is not None and session != os.getsid(0)  # Ctrl-C does not reach it


def test_ctrl_c_reaches_a_verifier_and_nobody_waits_for_its_forks(load_own):
    task = load_own("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        task.verify(task.test[:1], [""])
    start = time.monotonic()
    load_own("os.fork() or (time.sleep(6), os._exit(0)); return [Outcome(1, 'v')]").verify(task.test[:1], [""])
    assert time.monotonic() - start < 5
