"""avg@k, pass@k and their intervals against arithmetic and enumeration; grades of responses; one-line errors."""

import importlib.util
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import tasks
from harness import runs
from harness.command import CannotWrite
from rollout import Rollout
from tasks import Outcome, Problem, Task, sandbox, sciknoweval
from test_settings import parsed

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
FIXTURES, CHOICE = ROOT / "tasks" / "fixtures", str(ROOT / "tasks" / "toy_models" / "choice")


def refused(capsys, *argv) -> str:
    """The one line that refuses a command."""
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(word) for word in argv])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.err.count("\n") == 1 and printed.out == ""
    return printed.err


# ---- Numbers -----------------------------------------------------------------------------------------------------


def test_pass_at_k_equals_the_average_over_all_subsets_of_size_k():
    rewards = [1, 0, 0, 1, 0]
    for k in range(1, 6):
        subsets = list(itertools.combinations(rewards, k))
        assert evaluate.pass_at_k(5, 2, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    assert (evaluate.pass_at_k(4, 0, 4), evaluate.pass_at_k(4, 4, 1), evaluate.pass_at_k(4, 1, 4)) == (0.0, 1.0, 1.0)


def test_summary_of_two_problems_by_hand():
    result = evaluate.summarise(np.array([[1, 0, 0, 0], [1, 1, 1, 0]]))
    assert result["avg"] == pytest.approx((1 + 3) / 8) and (result["problems"], result["n"]) == (2, 4)
    # Two of four samples: 1 - C(3,2)/C(4,2) = 1/2 with one right, 1 - C(1,2)/C(4,2) = 1 with three right.
    assert result["pass@2"]["value"] == pytest.approx((1 / 2 + 1) / 2) and result["pass@4"]["value"] == 1.0
    assert "pass@3" not in result and "pass@8" not in result


def test_the_interval_is_over_problems_and_not_samples():
    """16 equal samples of a problem are one piece of evidence. Half of 40 problems are solved, so the interval is 3.92 *
    sqrt(1/4 / 40) = .31 wide; over 640 independent samples it would be a quarter of that."""
    result = evaluate.summarise(np.repeat([[1], [0]] * 20, 16, axis=1))
    for figures in (result, result["pass@8"]):
        assert figures["high"] - figures["low"] == pytest.approx(3.92 * (0.25 / 40) ** 0.5, rel=0.1)
        assert figures["high"] + figures["low"] == pytest.approx(1, abs=0.03)
    assert evaluate.interval(np.ones(5)) == (1.0, 1.0) and evaluate.interval(np.array([0.25])) == (0.25, 0.25)


# ---- measure: parts, columns, failures of the grader -----------------------------------------------------------


def measured(monkeypatch, parts, outcomes, truncated=()):
    """Measures problems p0, p1, ... of these parts. Response j to problem i is the text "i j", and its outcome outcomes[i][j]."""
    monkeypatch.setattr(evaluate, "student_prompt", lambda _, messages: [int(messages[0]["content"])])
    problems = [Problem(f"p{i}", [{"role": "user", "content": str(i)}], data=i, part=part) for i, part in enumerate(parts)]
    how = (len(outcomes[0]), 5, 70, 0.6, 0.95)

    def sample(prompts, n, *rest):
        assert (prompts, (n, *rest)) == ([[i] for i in range(len(parts))], (*how, None))
        pairs = itertools.product(range(len(prompts)), range(n))
        return [Rollout([i, j], [0.0, 0.0], "length" if (i, j) in truncated else "stop") for i, j in pairs]

    def verify(asked, responses):
        places = [(p.data, *map(int, response.split())) for p, response in zip(asked, responses, strict=True)]
        assert all(asked == i for asked, i, _ in places)
        return [outcomes[i][j] for _, i, j in places]

    policy = SimpleNamespace(tokenizer=None, decode=lambda tokens: " ".join(map(str, tokens)))
    return evaluate.measure(policy, SimpleNamespace(sample=sample), verify, problems, *how)


def test_measure_summarises_each_part_and_each_column_over_the_problems_that_have_it(monkeypatch):
    right, wrong = Outcome(1, "passed", "", {"held_out": 1}), Outcome(0, "wrong answer", "no", {"held_out": 1})
    both_wrong, broken = Outcome(0, "error", "no", {"held_out": 0}), Outcome(0, "internal", "", {"held_out": 1})
    outcomes = [[right, wrong], [Outcome(1, "passed"), Outcome(1, "passed")], [both_wrong, broken]]
    result = measured(monkeypatch, ["a", "a", "b"], outcomes, truncated={(0, 1), (2, 0), (2, 1)})
    assert (result["avg"], result["problems"], result["n"]) == (3 / 6, 3, 2)
    assert {part: (s["avg"], s["problems"]) for part, s in result["parts"].items()} == {"a": (3 / 4, 2), "b": (0.0, 1)}
    assert result["parts"]["a"]["pass@2"]["value"] == 1.0 and result["pass@2"]["value"] == pytest.approx(2 / 3)
    (name, column), = result["columns"].items()
    assert (name, column["avg"], column["problems"], column["n"]) == ("held_out", 3 / 4, 2, 2)  # p1 has nothing held out
    assert result["rewards"] == {"a/p0": [1, 0], "a/p1": [1, 1], "b/p2": [0, 0]}
    assert result["verdicts"] == {"passed": 3, "wrong answer": 1, "error": 1, "internal": 1}
    assert result["truncated"] == 3 / 6 and result["internal"] == 1  # which counts as a failure
    assert evaluate.line(result).endswith("truncated 0.500  grader failed on 1")
    assert "grader" not in evaluate.line({**result, "internal": 0})
    one = measured(monkeypatch, ["a", "a"], [[Outcome(1, "passed")], [Outcome(0, "wrong")]])  # one part is none
    assert one["parts"] == {} == one["columns"] and one["rewards"] == {"p0": [1], "p1": [0]}


def test_a_column_that_only_some_outcomes_of_a_problem_have_is_the_verifiers_fault(monkeypatch):
    outcomes = [Outcome(1, "a", "", {"x": 1}), Outcome(0, "b")]
    for both in (outcomes, outcomes[::-1]):
        with pytest.raises(tasks.BadTask, match="problem p0: its outcomes differ in their columns"):
            measured(monkeypatch, ["a"], [both])


def test_table_has_a_row_for_each_part_and_the_mean_of_the_domains():
    summary = lambda *rows: evaluate.summarise(np.array(rows))  # noqa: E731
    parts = {"biology": summary([1, 1], [1, 1], [1, 1]), "physics": summary([0, 0])}
    result = {**summary([1, 1], [1, 1]), "truncated": 0.25, "internal": 0, "columns": {"held_out": summary([0])}, "parts": parts}
    expected = [
        "after runs/x/model avg@2 1.000 [1.000, 1.000] pass@2 1.000 [1.000, 1.000] held_out 0.000 [0.000, 0.000] truncated 0.250",
        "biology, 3 problems avg@2 1.000 [1.000, 1.000] pass@2 1.000 [1.000, 1.000]",
        "physics, 1 problems avg@2 0.000 [0.000, 0.000] pass@2 0.000 [0.000, 0.000]",
        "mean of the domains avg@2 0.500",  # domains count alike: (1 + 0) / 2
    ]
    for task, rows in (("sciknoweval/all", 4), ("math/dapo", 3)):
        lines = evaluate.table("after", "runs/x/model", result | {"task": task})
        assert [" ".join(line.split()) for line in lines] == expected[:rows]


# ---- The command line with a model -------------------------------------------------------------------------------


def test_command_line_writes_the_same_figures_twice_and_others_for_another_seed(tmp_path, capsys):
    written = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        evaluate.main(["--model", CHOICE, "--subset", "choice", "--n", "1", "--seed", seed, "--out", str(tmp_path / name)])
        written.append(json.loads((tmp_path / name).read_text()))
    assert written[0] == written[1] and written[1]["rewards"] != written[2]["rewards"]
    assert written[0]["problems"] == len(written[0]["rewards"]) == 64 and written[2]["seed"] == 1
    assert f"{written[2]['avg']:.3f}" in capsys.readouterr().out


MODEL = f"--model {CHOICE}"
ANSWERS = f"--responses {FIXTURES}/math_responses.jsonl"
GRADED = f"{ANSWERS} --task math --data {FIXTURES}/math500.jsonl"
REFUSED = [
    ("--model no/such/folder", "no/such/folder"), ("--modle x", "--modle"), ("--task toy", "give one of --model, --run"),
    (f"{MODEL} --run x", "--run x"), (f"{GRADED} --model m", "give one of --model, --run and --responses"),
    *[(f"{MODEL} --{name} {value}", f"--{name} must be ") for name, value in (
        ("n", 0), ("max_tokens", 0), ("temperature", "nan"), ("temperature", "inf"), ("temperature", -1), ("top_p", 0),
        ("top_p", 1.1), ("engine_memory", 0), ("engine_memory", 5))],
    (f"{MODEL} --subset chess", "chess"), (f"{MODEL} --out no/such/dir/x.json", "no/such/dir"),
    (f"{MODEL} --task math --data x.jsonl --split train", "leave out --subset and --split"),
    (f"{MODEL} --task math --data x.jsonl --subset dapo", "leave out --subset and --split"),
    ("--run no/such/run", "no/such/run"), (ANSWERS, "--responses needs --data"), (f"{ANSWERS} --task chess --data x", "chess"),
    (f"{ANSWERS} --data {FIXTURES}/lcb.jsonl", "task toy has no files"), (f"{GRADED} --out no/such/dir/x.jsonl", "no/such/dir"),
    *[(f"{GRADED} {flag}", f"{flag.split()[0]} is for --model and --run") for flag in (
        "--split test", "--n 4", "--seed 3", "--sampler hf", "--temperature 0", "--top_p 1", "--max_tokens 9")],
    (f"{GRADED} --out {FIXTURES}/math500.jsonl", "would replace a file that is read"),
    (f"{GRADED} --out {FIXTURES}/math_responses.jsonl", "would replace a file that is read"),
    *[(f"{MODEL} --sampler vllm", "vllm is not installed")] * (importlib.util.find_spec("vllm") is None),
]  # fmt: skip


@pytest.mark.parametrize("argv, words", REFUSED)
def test_options_that_cannot_be_are_one_line_and_exit_2(argv, words, capsys):
    assert words in refused(capsys, *argv.split())


@pytest.fixture
def command(monkeypatch):
    """command.run(*argv) runs main without model or data; `did` lists what it did, in order."""
    problem, did = Problem("p", [{"role": "user", "content": "?"}], part="part"), []

    def make(by):
        def task(name, where, **options):  # where: a subset to load, or a file to read
            did.append((by, name, where, options))
            subset = by == "load" and where or tasks.TASKS[name][0]
            return Task(f"{name}/{subset}", [], [], [problem], None, lambda: did.append("closed"), notes=["a note"])

        return task

    def measure(policy, sampler, verify, problems, n, seed, max_tokens, temperature, top_p, prompts):
        did.append((policy.path, n, temperature, top_p, max_tokens))
        return {**evaluate.summarise(np.ones((1, n))), "columns": {}, "parts": {}, "rewards": {}}

    sampler = SimpleNamespace(sync=lambda policy: did.append(f"sync {policy.path}"), sleep=lambda: did.append("sleep"))
    for owner, name, instead in (
        (tasks, "load", make("load")), (tasks, "read", make("read")), (evaluate, "measure", measure),
        (evaluate.plan, "read", lambda path: None), (evaluate, "student_prompt", lambda *_: []),
        (evaluate, "open_sampler", lambda *_: sampler),
        (evaluate.Policy, "load", lambda path, *_, **__: SimpleNamespace(path=path, tokenizer=None)),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, instead)
    return SimpleNamespace(run=lambda *argv: evaluate.main([str(word) for word in argv]), did=did)


@pytest.mark.parametrize(
    "task, options, settings",
    [("toy", "", (4, 1.0, 1.0, 100)), ("lcb", "", (4, 0.6, 0.95, 8192)), ("math", "", (4, 0.6, 0.95, 8192)),
     ("sciknoweval", "", (16, 0.6, 0.95, 8192)), ("sciknoweval", "--n 3", (3, 0.6, 0.95, 8192)),
     ("own", "", (4, 0.6, 0.95, 1024)), ("reasoning_gym", "--unsafe_sandbox", (4, 0.6, 0.95, 512)),
     ("lcb", "--temperature 0 --top_p 0.5 --max_tokens 7 --n 2", (2, 0.0, 0.5, 7))],
)  # fmt: skip
def test_defaults_of_sampling_are_the_papers_by_task(task, options, settings, command, capsys):
    command.run("--model", "m", "--task", task, *options.split())
    assert command.did == [("load", task, "", {"data": ""}), "sync m", ("m", *settings), "closed"]
    assert "a note\n" in capsys.readouterr().out


def test_a_file_of_problems_is_read_whole_and_code_or_settings_are_loaded(command):
    command.run("--model", "m", "--task", "math", "--data", "some.jsonl")
    command.run("--model", "m", "--task", "own", "--data", "sums.py")
    found = [done for done in command.did if done[0] in ("read", "load")]
    assert found == [("read", "math", "some.jsonl", {"official": False}), ("load", "own", "", {"data": "sums.py"})]


def test_programs_are_run_without_a_layer_of_the_sandbox_only_if_asked_for(command, monkeypatch, capsys, run_folder):
    monkeypatch.setattr(sandbox.Sandbox, "unsafe", property(lambda self: "landlock not available"))
    assert "landlock not available; --unsafe_sandbox goes on" in refused(capsys, "--model", "m", "--task", "lcb")
    command.run("--model", "m", "--task", "lcb", "--unsafe_sandbox")
    command.run("--model", "m", "--task", "math")
    command.run("--run", run_folder(task="lcb", subset="", unsafe_sandbox=True))  # trained so, evaluated so
    assert capsys.readouterr().out.count("landlock not available\n") == 2
    assert "--unsafe_sandbox" in refused(capsys, "--run", run_folder(task="lcb", subset=""))


# ---- A run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    """run_folder(log, **settings): a run directory, by default of toy/trace."""

    def make(log=None, **settings):
        (tmp_path / "run" / "model").mkdir(parents=True, exist_ok=True)
        config = asdict(parsed()) | {"model": "m", "teacher": "live", "eval_samples": 1} | settings
        (tmp_path / "run" / "config.json").write_text(json.dumps(config))
        if log is not None:
            (tmp_path / "run" / "log.jsonl").write_text(log)
        return tmp_path / "run"

    return make


def test_run_is_evaluated_before_and_after_with_its_own_settings(command, run_folder, capsys):
    own = {"eval_samples": 5, "eval_temperature": 0.3, "eval_top_p": 0.8, "max_response_tokens": 11}
    before = "Qwen/Qwen3-8B"
    run = run_folder(task="sciknoweval", subset="physics", model=before, **own)
    after, drawn = str(run / "model"), (5, 0.3, 0.8, 11)
    for flag in ("--task", "--subset", "--data"):
        assert f"{flag} is for --model and --responses, since a run has its own" in refused(capsys, "--run", run, flag, "lcb")
    command.run("--run", run)
    options = {"data": "", "train_tests": "private", "since": "2025-02-01", "until": "2025-05-01"}
    assert command.did == [  # one engine, given the one's weights, then the other's
        ("load", "sciknoweval", "physics", options), f"sync {before}", (before, *drawn), "sleep", f"sync {after}",
        (after, *drawn), "closed",
    ]  # fmt: skip
    written = json.loads((run / "evaluation.json").read_text())
    assert [(name, r["model"], r["task"]) for name, r in written.items()] == [
        ("before", before, "sciknoweval/physics"), ("after", after, "sciknoweval/physics"),
    ]  # fmt: skip
    assert f"{run} has no log.jsonl" in capsys.readouterr().out
    (run / "config.json").write_text('{"task": "toy", "model": "m"}')
    assert f"{run}/config.json is not the configuration of a run: it lacks method" in refused(capsys, "--run", run)


def test_first_weights_of_a_run_are_found_from_another_folder(tmp_path, monkeypatch):
    toy_model, run = {"model": "tasks/toy_models/trace"}, tmp_path / "moved"
    monkeypatch.chdir(ROOT)
    assert runs.first_weights(run, toy_model) == "tasks/toy_models/trace"  # found under this name
    monkeypatch.chdir(tmp_path)
    assert runs.first_weights(run, toy_model) == str(ROOT / "tasks" / "toy_models" / "trace")
    assert runs.first_weights(run, {"model": "Qwen/Qwen3-8B"}) == "Qwen/Qwen3-8B"
    (run / "base").mkdir(parents=True)
    (tmp_path / "other" / "base").mkdir(parents=True)  # of another run that has the old name now
    assert runs.first_weights(tmp_path / "bare", {"model": "other/base"}) == "other/base"
    assert runs.first_weights(run, {"model": "gone/base"}) == str(run / "base")


def test_first_weights_that_were_overwritten_are_refused(run_folder, tmp_path, capsys):
    first = tmp_path / "first"
    first.mkdir()
    (first / "model.safetensors").write_bytes(b"a" * 10)
    run = run_folder(model=str(first), model_files=runs.fingerprint(first))
    assert runs.first_weights(run, json.loads((run / "config.json").read_text())) == str(first)
    for content in (b"a" * 11, b"b" * 10):
        (first / "model.safetensors").write_bytes(content)
        assert f"{first} no longer holds the weights that {run} started from" in refused(capsys, "--run", run)


EPOCHS = {"steps": 0, "epochs": 3, "prompts_per_batch": 2, "prompts_dropped": 2}  # 7 problems: 3 times 2 batches


@pytest.mark.parametrize(
    "settings, batches, said",
    [({"steps": 4}, 3, "was stopped after 3 of 4 batches"), ({"steps": 4}, 0, "was stopped after 0 of 4 batches"),
     ({"steps": 4}, 4, None), (EPOCHS, 5, "was stopped after 5 of 6 batches"), (EPOCHS, 6, None),
     ({"steps": 4}, None, "has no log.jsonl: how many batches it was trained for is not known")],
)  # fmt: skip
def test_a_run_that_was_stopped_early_is_noted(settings, batches, said, run_folder):
    rows = "".join(json.dumps({"kind": "train", "step": step}) + "\n" for step in range(batches or 0))
    torn = '{"kind": "eval", "step": 9}\n{"kind": "train", "step": 7, "rew'
    run = run_folder(None if batches is None else rows + torn, **settings)
    assert runs.stopped(run, runs.settings_of(run), 7) == ([f"{run} {said}"] if said else [])


def test_figures_that_cannot_be_written_are_one_line_and_printed(command, tmp_path, capsys, monkeypatch):
    task = Task("t", [], [], [Problem("biology-0", [], "D")], sciknoweval.grade_choices, lambda: command.did.append("closed"))
    monkeypatch.setattr(tasks, "read", lambda *_, **__: task)
    responses = ["--responses", write(tmp_path / "r.jsonl", [GOOD]), "--task", "sciknoweval", "--data", "x"]
    for argv, figures in ((["--model", "m"], "avg@4 1.000"), (responses, "mean reward of the answered problems 1.0000")):
        command.run(*argv)
        with pytest.raises(CannotWrite, match="^/dev/full: No space left on device$"):
            command.run(*argv, "--out", "/dev/full")
        assert capsys.readouterr().out.count(figures) == 2  # which is not lost
    assert command.did.count("closed") == 4


# ---- Grades of given responses -----------------------------------------------------------------------------------


def write(path, rows):
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "task, data, responses, ids, expected, said",
    [("lcb", "lcb", "lcb_responses", "fx_sum fx_half fx_rows fx_pairs fx_sum fx_half fx_late".split(),
      ["passed"] * 4 + ["wrong answer", "error", "no code"],  # mean: (1/2 + 1/2 + 1 + 1 + 0) / 5
      ("7 responses to 5 problems, 0 problems without one: 4 passed, 1 wrong answer, 1 error, 1 no code", "0.6000 [")),
     ("sciknoweval", "sciknoweval", "sciknoweval_responses", ["biology-0"] * 4, ["wrong"] * 3 + ["correct"],  # it is D
      ("4 responses to 1 problems, 47 problems without one: 3 wrong, 1 correct", "0.2500 [0.2500, 0.2500]")),
     ("math", "aime24", [{"id": 61, "response": r"\boxed{125}"}], [61], ["correct"],
      ("1 responses to 1 problems", "1.0000 [1.0000, 1.0000]"))],
)  # fmt: skip
def test_responses_are_graded_in_order_by_the_first_process(task, data, responses, ids, expected, said, tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", responses) if isinstance(responses, list) else FIXTURES / f"{responses}.jsonl"
    argv = ["--responses", path, "--task", task, "--data", FIXTURES / f"{data}.jsonl", "--out", tmp_path / "grades"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "1")
        evaluate.main([str(word) for word in argv])
    assert capsys.readouterr().out == "" and not argv[-1].exists()
    evaluate.main([str(word) for word in argv])
    rows = [json.loads(line) for line in (tmp_path / "grades").read_text().splitlines()]
    assert all(list(row) == ["id", "reward", "verdict", "feedback"] for row in rows)
    assert [(row["id"], row["verdict"]) for row in rows] == list(zip(ids, expected))
    assert [row["reward"] for row in rows] == [int(verdict in ("passed", "correct")) for verdict in expected]
    if task == "lcb":
        assert [bool(row["feedback"]) for row in rows] == [False] * 4 + [True] * 3
        assert "Input:\n3\n1 2 3\nYour output:\n3\nExpected output:\n6" in rows[4]["feedback"]  # a public test
        assert "ZeroDivisionError: division by zero (line 1)" in rows[5]["feedback"]
    *_, counts, mean, file = capsys.readouterr().out.splitlines()
    assert file.startswith(f"{argv[-1]}: ")
    assert counts.startswith(said[0]) and mean.startswith(f"mean reward of the answered problems {said[1]}")


GOOD = {"id": "biology-0", "response": "<answer>D</answer>"}
HUB = [json.loads(line) for line in (FIXTURES / "sciknoweval.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "responses, data, words",
    [([GOOD, {"id": "biology-99", "response": "x"}], HUB, "row 2: no problem of --data has the id 'biology-99'"),
     ([GOOD, {"id": "biology-0"}], HUB, "row 2: a response is"), ([{"response": "x"}], HUB, "row 1: a response is"),
     ([{"id": "biology-0", "response": None}], HUB, "row 1: a response is"),
     ([{"id": "biology-0", "response": ["x"]}], HUB, "row 1: a response is"),
     ([GOOD], [{**HUB[0], "id": "biology-0"}, {**HUB[0], "id": "biology-0"}], "share the id 'biology-0'"),
     ([GOOD], None, "no-problems.jsonl does not exist"), (None, HUB, "no-responses.jsonl does not exist"),
     ([], HUB, "no-responses.jsonl holds no response"), ('{"id": \n', HUB, "line 1")],
)  # fmt: skip
def test_responses_that_cannot_be_graded_are_one_line_and_nothing_is_written(responses, data, words, tmp_path, capsys):
    path, problems, out = tmp_path / "no-responses.jsonl", tmp_path / "no-problems.jsonl", tmp_path / "out.jsonl"
    for file, rows in ((path, responses), (problems, data)):
        if rows is not None:
            write(file, rows)
    error = refused(capsys, "--responses", path, "--task", "sciknoweval", "--data", problems, "--out", out)
    assert words in error and not out.exists()
