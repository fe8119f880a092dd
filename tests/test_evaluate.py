"""avg@k, pass@k and their intervals against arithmetic and enumeration; tables with the paper's figures; grades of
responses; the command line's one-line errors."""

import importlib.util
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from harness import settings
import tasks
from tasks import sciknoweval
from harness.command import CannotWrite
from model.policy import Policy
from rollout import HFSampler, Rollout
from tasks import Outcome, Problem, Task

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tasks" / "fixtures"


def test_pass_at_k_equals_the_average_over_all_subsets_of_size_k():
    rewards = [1, 0, 0, 1, 0]
    for k in range(1, 6):
        subsets = list(itertools.combinations(rewards, k))
        assert evaluate.pass_at_k(5, 2, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_pass_at_k_at_the_ends():
    assert evaluate.pass_at_k(4, 0, 4) == 0.0
    assert evaluate.pass_at_k(4, 4, 1) == 1.0
    assert evaluate.pass_at_k(4, 1, 1) == pytest.approx(1 / 4)
    assert evaluate.pass_at_k(4, 1, 4) == 1.0


def test_summary_of_two_problems_by_hand():
    result = evaluate.summarise(np.array([[1, 0, 0, 0], [1, 1, 1, 0]]))
    assert result["avg"] == pytest.approx((1 + 3) / 8)
    assert (result["problems"], result["n"]) == (2, 4)
    # Two of four samples: 1 - C(3,2)/C(4,2) = 1/2 with one right, 1 - C(1,2)/C(4,2) = 1 with three right.
    assert result["pass@2"]["value"] == pytest.approx((1 / 2 + 1) / 2)
    assert result["pass@4"]["value"] == 1.0
    assert "pass@3" not in result and "pass@8" not in result


def test_the_interval_holds_the_mean_and_narrows_with_more_problems():
    rng = np.random.default_rng(0)
    few, many = (rng.random((n, 4)) < 0.3 for n in (20, 2000))
    widths = []
    for rewards in (few, many):
        low, high = evaluate.interval(rewards.mean(1))
        assert low < rewards.mean() < high
        widths.append(high - low)
    # Standard error of the mean over 2000 problems of 4 samples: sqrt(.3 * .7 / 8000) = .0051; 95% is 3.92 of them wide.
    assert widths[1] == pytest.approx(3.92 * (0.3 * 0.7 / 8000) ** 0.5, rel=0.15)
    assert widths[0] > 5 * widths[1]


def test_the_interval_resamples_problems_and_not_samples():
    """Four equal samples of a problem are one piece of evidence: repeating them must not narrow the interval."""
    once = np.array([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    assert evaluate.interval(once) == evaluate.interval(np.repeat(once[:, None], 4, axis=1).mean(1))


def test_a_constant_result_has_an_interval_of_width_zero():
    assert evaluate.interval(np.ones(5)) == (1.0, 1.0)
    assert evaluate.interval(np.array([0.25])) == (0.25, 0.25)


def test_measure_pairs_responses_with_their_problems():
    policy = Policy.load("tasks/toy_models/choice")
    problems = [Problem(f"p{i}", [{"role": "user", "content": f"start {i}"}], data=i) for i in range(3)]
    seen = []

    def verify(asked, responses):
        seen.extend(p.data for p in asked)
        return [Outcome(int(p.data == 1), "") for p in asked]

    result = evaluate.measure(policy, HFSampler(policy), verify, problems, 2, 0, 4, 1.0, 1.0)
    assert seen == [0, 0, 1, 1, 2, 2]
    assert result["rewards"] == {"p0": [0, 0], "p1": [1, 1], "p2": [0, 0]}
    assert result["avg"] == pytest.approx(1 / 3)
    assert result["truncated"] == 1.0  # nobody finishes within four tokens


def test_command_line_writes_the_same_figures_twice(tmp_path, capsys):
    results = []
    for name in ("a.json", "b.json"):
        evaluate.main(["--model", "tasks/toy_models/choice", "--subset", "choice", "--n", "1", "--out", str(tmp_path / name)])
        results.append(json.loads((tmp_path / name).read_text()))
    assert results[0] == results[1]
    assert results[0]["problems"] == len(results[0]["rewards"]) == 64
    assert f"{results[0]['avg']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--model", "tasks/toy_models/choice", "--n", "0"], "--n"),
        (["--model", "tasks/toy_models/choice", "--top_p", "0"], "--top_p"),
        (["--model", "tasks/toy_models/choice", "--subset", "chess"], "chess"),
        (["--model", "tasks/toy_models/choice", "--out", "no/such/dir/x.json"], "no/such/dir"),
        (["--run", "no/such/run"], "no/such/run"),
        (["--model", "tasks/toy_models/choice", "--temperature", "nan"], "--temperature"),
        (["--model", "tasks/toy_models/choice", "--temperature", "inf"], "--temperature"),
        (["--model", "tasks/toy_models/choice", "--engine_memory", "5"], "--engine_memory must be in (0, 1], not 5"),
        pytest.param(
            ["--model", "tasks/toy_models/choice", "--sampler", "vllm"],
            "vllm is not installed",
            marks=pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="it is"),
        ),
        (["--model", "tasks/toy_models/choice", "--run", "x"], "not allowed with"),
        (["--modle", "x"], "--model"),
        (["--run", "x", "--task", "toy"], "--run goes without --task: a run has its own"),
        (["--run", "x", "--task", "lcb", "--subset", "v6"], "--run goes without --task and --subset"),
        (["--model", "tasks/toy_models/choice", "--greedy", "--n", "4"], "--greedy is one sample"),
        (["--model", "tasks/toy_models/choice", "--greedy", "--temperature", "1"], "--greedy is one sample"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in error and error.count("\n") == 1


# ---- measure: parts, columns, failures of the grader -----------------------------------------------------------


class Scripted:
    """A policy and its sampler in one: response j to problem i is the text "i j"."""

    tokenizer = None

    def __init__(self, truncated=()):
        self.truncated = truncated

    def sample(self, prompts, n, seed, max_tokens, temperature, top_p):
        self.asked = (prompts, n, seed, max_tokens, temperature, top_p)
        pairs = itertools.product(range(len(prompts)), range(n))
        return [Rollout([i, j], [0.0, 0.0], "length" if (i, j) in self.truncated else "stop") for i, j in pairs]

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def measured(monkeypatch, parts, outcomes, truncated=()):
    """measure on problems p0, p1, ... of these parts; outcomes[i][j] answers response j to problem i."""
    monkeypatch.setattr(evaluate, "student_prompt", lambda _, messages: [int(messages[0]["content"])])
    policy = Scripted(truncated)
    problems = [
        Problem(f"p{i}", [{"role": "user", "content": str(i)}], data=i, part=part) for i, part in enumerate(parts)
    ]

    def verify(asked, responses):
        found = []
        for problem, response in zip(asked, responses, strict=True):
            i, j = map(int, response.split())
            assert i == problem.data
            found.append(outcomes[i][j])
        return found

    result = evaluate.measure(policy, policy, verify, problems, len(outcomes[0]), 5, 70, 0.6, 0.95)
    assert policy.asked == ([[i] for i in range(len(parts))], len(outcomes[0]), 5, 70, 0.6, 0.95)
    return result


def test_measure_summarises_each_part_and_each_column_over_the_problems_that_have_it(monkeypatch):
    right, wrong = Outcome(1, "passed", "", {"held_out": 1}), Outcome(0, "wrong answer", "no", {"held_out": 1})
    both_wrong = Outcome(0, "error", "no", {"held_out": 0})
    outcomes = [[right, wrong], [Outcome(1, "passed"), Outcome(1, "passed")], [both_wrong, wrong]]
    result = measured(monkeypatch, ["a", "a", "b"], outcomes, truncated={(0, 1), (2, 0), (2, 1)})
    assert (result["avg"], result["problems"], result["n"]) == (3 / 6, 3, 2)
    assert {part: (s["avg"], s["problems"]) for part, s in result["parts"].items()} == {"a": (3 / 4, 2), "b": (0.0, 1)}
    assert result["parts"]["a"]["pass@2"]["value"] == 1.0 and result["pass@2"]["value"] == pytest.approx(2 / 3)
    assert list(result["columns"]) == ["held_out"]
    column = result["columns"]["held_out"]
    assert (column["avg"], column["problems"], column["n"]) == (3 / 4, 2, 2)  # p1 has nothing held out
    assert result["rewards"] == {"a/p0": [1, 0], "a/p1": [1, 1], "b/p2": [0, 0]}
    assert result["verdicts"] == {"passed": 3, "wrong answer": 2, "error": 1}
    assert result["truncated"] == 3 / 6 and result["internal"] == 0


def test_a_column_that_only_some_outcomes_of_a_problem_have_is_the_verifiers_fault(monkeypatch):
    for outcomes in (
        [Outcome(1, "a", "", {"x": 1}), Outcome(0, "b")],
        [Outcome(0, "b"), Outcome(1, "a", "", {"x": 1})],
    ):
        with pytest.raises(tasks.BadTask, match="problem p0: some of its outcomes have the column 'x'"):
            measured(monkeypatch, ["a"], [outcomes])


def test_measure_counts_where_the_grader_failed_and_has_no_parts_where_there_is_one(monkeypatch):
    outcomes = [[Outcome(1, "correct"), Outcome(0, "internal")], [Outcome(0, "internal"), Outcome(0, "wrong")]]
    result = measured(monkeypatch, ["math500", "math500"], outcomes)
    assert (result["internal"], result["avg"]) == (2, 1 / 4)
    assert result["parts"] == {} == result["columns"]
    assert result["rewards"] == {"p0": [1, 0], "p1": [0, 0]}
    assert evaluate.line(result).endswith("truncated 0.000  grader failed on 2")
    assert "grader" not in evaluate.line({**result, "internal": 0})


# ---- The paper's figures ---------------------------------------------------------------------------------------


def test_paper_averages_are_the_means_of_their_domains():
    """A figure typed wrongly would show; the paper's own averages are within a rounding of its columns."""
    known = json.loads((ROOT / "study" / "results" / "paper.json").read_text())["sciknoweval"]
    rows = [(model, method, f) for model, methods in known.items() for method, f in methods.items()]
    assert len(rows) == 31  # 12 + 9 + 7 + 3
    for model, method, figures in rows:
        domains = [figures[domain] for domain in ("biology", "chemistry", "material", "physics")]
        assert sum(domains) / 4 == pytest.approx(figures["average"], abs=0.02), (model, method)


def results(rewards, parts=None, task="sciknoweval/all"):
    summary = lambda rows: evaluate.summarise(np.array(rows))  # noqa: E731
    split = {part: summary(rows) for part, rows in (parts or {}).items()}
    return {**summary(rewards), "task": task, "truncated": 0.25, "internal": 0, "columns": {}, "parts": split}


def test_table_has_a_row_for_each_part_the_mean_of_the_domains_and_the_papers_figures_in_their_own_column():
    parts = {"biology": [[1, 1], [1, 1], [1, 1]], "physics": [[0, 0]]}
    result = results([[1, 1], [1, 1], [1, 1], [1, 1]], parts)
    paper = {"biology": 68.0, "physics": 80.55, "average": 77.15}
    lines = evaluate.table("after", "runs/x/model", result, paper)
    assert [" ".join(line.split()) for line in lines] == [
        "after runs/x/model avg@2 1.000 [1.000, 1.000] pass@2 1.000 [1.000, 1.000] truncated 0.250",
        "biology, 3 problems avg@2 1.000 [1.000, 1.000] pass@2 1.000 [1.000, 1.000] paper 0.6800",
        "physics, 1 problems avg@2 0.000 [0.000, 0.000] pass@2 0.000 [0.000, 0.000] paper 0.8055",
        "mean of the domains avg@2 0.500 paper 0.7715",  # domains count alike: (1 + 0) / 2
    ]
    whole = evaluate.table("model", "m", results([[1]]), {"": 49.62})
    assert [line.rsplit("  ", 1)[1] for line in whole] == ["paper 0.4962"]
    assert not any("paper" in line for line in evaluate.table("model", "m", result, {}))


def test_table_shows_columns_and_no_mean_of_domains_outside_sciknoweval():
    result = results([[1], [1]], {"math500": [[1]], "amc23": [[1]]}, task="math/dapo")
    lines = evaluate.table("model", "m", result, {"math500": 83.8})
    assert len(lines) == 3 and lines[1].endswith("paper 0.8380") and "paper" not in lines[0] + lines[2]
    held_out = {**results([[1]], task="lcb/v6"), "columns": {"held_out": evaluate.summarise(np.array([[0]]))}}
    assert "  held_out 0.000 [0.000, 0.000]  truncated" in evaluate.table("model", "m", held_out, {})[0]


# ---- The command line with a model ---------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    """command(*argv) runs main with neither model nor data; the calls stand in command.measured, .loaded, .read."""
    problem = Problem("p", [{"role": "user", "content": "?"}], part="part")
    calls = SimpleNamespace(measured=[], loaded=[], read=[], closed=[])

    def make(name):
        return Task(name, [problem], [], [problem], None, close=lambda: calls.closed.append(name), notes=["a note"])

    def load(task, subset="", **options):
        calls.loaded.append((task, subset, options))
        return make(f"{task}/{subset or tasks.TASKS[task][0]}")

    def read(task, path, official):
        calls.read.append((task, path, official))
        return make(f"{task}/{tasks.TASKS[task][0]}")

    def measure(policy, sampler, verify, problems, n, seed, max_tokens, temperature, top_p):
        calls.measured.append((policy, n, temperature, top_p, max_tokens))
        return {k: v for k, v in results([[1] * n]).items() if k != "task"} | {"rewards": {}, "verdicts": {}}

    monkeypatch.setattr(evaluate.tasks, "load", load)
    monkeypatch.setattr(evaluate.tasks, "read", read)
    monkeypatch.setattr(evaluate, "measure", measure)

    class Loaded(str):  # a policy is its path here
        tokenizer = None

    monkeypatch.setattr(evaluate.plan, "read", lambda path: None)
    monkeypatch.setattr(evaluate, "student_prompt", lambda *_: [])
    calls.synced = []
    opened = lambda which, policy, path, longest, share: SimpleNamespace(  # noqa: E731
        sync=calls.synced.append, sleep=lambda: calls.synced.append("asleep")
    )
    monkeypatch.setattr(evaluate, "open_sampler", opened)
    monkeypatch.setattr(evaluate.Policy, "load", lambda path, *_, **__: Loaded(path))
    calls.run = lambda *argv: evaluate.main([str(word) for word in argv])
    return calls


@pytest.mark.parametrize(
    "task, options, settings",
    [
        ("toy", [], (4, 1.0, 1.0, 100)),
        ("lcb", [], (4, 0.6, 0.95, 8192)),
        ("math", [], (4, 0.6, 0.95, 8192)),
        ("sciknoweval", [], (16, 0.6, 0.95, 8192)),
        ("sciknoweval", ["--n", 3], (3, 0.6, 0.95, 8192)),
        ("math", ["--greedy"], (1, 0.0, 0.95, 8192)),
        ("math", ["--greedy", "--n", 1, "--temperature", 0], (1, 0.0, 0.95, 8192)),
        ("lcb", ["--temperature", 0, "--top_p", 0.5, "--max_tokens", 7, "--n", 2], (2, 0.0, 0.5, 7)),
    ],
)
def test_defaults_of_sampling_are_the_papers_by_task(task, options, settings, command):
    command.run("--model", "m", "--task", task, *options)
    assert command.measured == [("m", *settings)]
    assert command.loaded == [(task, "", {})] and len(command.closed) == 1


def test_problems_come_from_a_file_where_one_is_given(command, capsys):
    command.run("--model", "m", "--task", "math", "--data", "some.jsonl")
    assert command.read == [("math", "some.jsonl", False)] and command.loaded == []
    assert capsys.readouterr().out.startswith("a note\n")


# A run of Table 2 with the paper's evaluation.
PHYSICS = vars(settings.parse(["--task", "sciknoweval", "--subset", "physics"])) | {"teacher": "live"}


@pytest.mark.parametrize(
    "setting", [{"e_step_every": 7}, {"e_groups": "all"}, {"until": "2025-04-01"}, {"eval_samples": 4}]
)
def test_the_papers_figure_does_not_stand_beside_other_settings(setting, command, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for changed, shown in (({}, True), (setting, False)):
        (tmp_path / "config.json").write_text(json.dumps(PHYSICS | changed))
        command.run("--run", tmp_path)
        assert capsys.readouterr().out.splitlines()[-1].endswith("  paper 0.8055") == shown


def test_run_is_evaluated_before_and_after_with_its_own_settings(command, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    other = {"eval_samples": 5, "eval_temperature": 0.3, "eval_top_p": 0.8, "max_response_tokens": 11}
    (tmp_path / "config.json").write_text(json.dumps(PHYSICS | other))
    command.run("--run", tmp_path)
    after = str(tmp_path / "model")
    assert command.measured == [("Qwen/Qwen3-8B", 5, 0.3, 0.8, 11), (after, 5, 0.3, 0.8, 11)]
    assert "paper 0." not in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps(PHYSICS))
    command.synced.clear(), command.loaded.clear()
    command.run("--run", tmp_path)
    assert command.synced == ["Qwen/Qwen3-8B", "asleep", after]  # one engine, given the one's weights, then the other's
    options = {"data": "", "train_tests": "private", "since": "2025-02-01", "until": "2025-05-01"}
    assert command.loaded == [("sciknoweval", "physics", options)]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].endswith("paper 0.5914") and printed[-1].endswith("paper 0.8055")  # Table 2: base, VPD
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert [(name, r["model"], r["task"]) for name, r in written.items()] == [
        ("before", "Qwen/Qwen3-8B", "sciknoweval/physics"), ("after", after, "sciknoweval/physics"),
    ]  # fmt: skip


RUN = {
    "task": "toy", "subset": "trace", "model": "m", "method": "vpd", "feedback": "environment", "e_step_every": 5,
    "prior": "dynamic", "eval_samples": 1, "eval_temperature": 1.0, "eval_top_p": 1.0, "max_response_tokens": 11,
}  # fmt: skip


@pytest.mark.parametrize(
    "text, words",
    [("{", "config.json is no JSON"), ("[]", "is not the configuration of a run"), ("{}", "task is None"),
     (json.dumps(RUN | {"eval_samples": "four"}), "eval_samples is 'four'"), (json.dumps(RUN | {"model": 5}), "model is 5")],
)  # fmt: skip
def test_a_configuration_that_is_none_is_one_line_that_names_the_file(text, words, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--run", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"{tmp_path}/config.json" in error and words in error and error.count("\n") == 1


def test_figures_that_cannot_be_written_are_one_line_and_printed(command, tmp_path, capsys, monkeypatch):
    problem = Problem("biology-0", [], "D")
    task = Task("t", [], [], [problem], sciknoweval.grade_choices, close=lambda: command.closed.append("t"))
    monkeypatch.setattr(evaluate.tasks, "read", lambda *_, **__: task)
    responses = ["--responses", write(tmp_path / "r.jsonl", [GOOD]), "--task", "sciknoweval", "--data", "x"]
    for argv, figures in (
        (["--model", "m"], "avg@4 1.000"),
        (responses, "mean reward of the answered problems 1.0000"),
    ):
        with pytest.raises(CannotWrite, match="^/dev/full: No space left on device$"):
            command.run(*argv, "--out", "/dev/full")
        assert figures in capsys.readouterr().out  # which is not lost
    assert len(command.closed) == 2


def test_first_weights_of_a_run_are_found_from_another_folder(tmp_path, monkeypatch):
    toy_model, run = {"model": "tasks/toy_models/trace"}, tmp_path / "moved"
    here = str(ROOT / "tasks" / "toy_models" / "trace")
    monkeypatch.chdir(ROOT)
    assert evaluate.first_weights(run, toy_model) == "tasks/toy_models/trace"  # found, and so called
    monkeypatch.chdir(tmp_path)
    assert evaluate.first_weights(run, toy_model) == here
    assert evaluate.first_weights(run, {"model": "Qwen/Qwen3-8B"}) == "Qwen/Qwen3-8B"
    (run / "base").mkdir(parents=True)
    assert evaluate.first_weights(run, toy_model | {"smoke": ""}) == here
    (tmp_path / "other" / "base").mkdir(parents=True)  # of another run that has the old name now
    smoke = {"model": "other/base", "smoke": "qwen3"}
    assert evaluate.first_weights(run, smoke) == str(run / "base")
    assert evaluate.first_weights(tmp_path / "bare", smoke) == "other/base"


def test_a_run_is_evaluated_from_the_weights_that_were_found(command, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(RUN | {"model": "tasks/toy_models/trace"}))
    monkeypatch.chdir(tmp_path)
    command.run("--run", tmp_path)
    assert [path for path, *_ in command.measured] == [str(ROOT / "tasks" / "toy_models" / "trace"), str(tmp_path / "model")]


def test_neither_responses_nor_problems_are_replaced(capsys):
    data, responses = str(FIXTURES / "math500.jsonl"), str(FIXTURES / "math_responses.jsonl")
    for out, words in ((data, "would replace the problems"), (responses, "would replace the responses")):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(["--responses", responses, "--task", "math", "--data", data, "--out", out])
        assert stop.value.code == 2 and words in capsys.readouterr().err


EPOCHS = {"steps": 0, "epochs": 3, "prompts_per_batch": 2, "prompts_dropped": 2}  # 7 problems: 3 times 2 batches


@pytest.mark.parametrize(
    "settings, batches, said",
    [({"steps": 4}, 3, "was stopped after 3 of 4 batches"), ({"steps": 4}, 0, "was stopped after 0 of 4 batches"),
     ({"steps": 4}, 4, None), (EPOCHS, 5, "was stopped after 5 of 6 batches"), (EPOCHS, 6, None),
     ({"steps": 4}, None, "has no log.jsonl: how many batches it was trained for is not known")],
)  # fmt: skip
def test_a_run_that_did_not_come_to_its_end_is_said_to_be_one(
    settings, batches, said, command, tmp_path, capsys, monkeypatch
):
    problems = [Problem(f"p{i}", [{"role": "user", "content": "?"}]) for i in range(7)]
    monkeypatch.setattr(evaluate.tasks, "load", lambda *_, **__: Task("toy/trace", problems, [], problems, None))
    (tmp_path / "model").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(RUN | settings))
    if batches is not None:
        rows = [{"kind": "eval", "step": 9}, *({"kind": "train", "step": step} for step in range(batches))]
        torn = '{"kind": "train", "step": 7, "rew'
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    command.run("--run", tmp_path)
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{tmp_path} ")]
    assert found == ([f"{tmp_path} {said}"] if said else [])


def test_model_of_the_paper_has_its_figure_beside_it_on_the_papers_own_problems(command, capsys):
    command.run("--model", "Qwen/Qwen3-8B", "--task", "lcb")
    assert capsys.readouterr().out.splitlines()[-1].endswith("  paper 0.2805")


@pytest.mark.parametrize("options", [["--data", "mine.jsonl"], ["--split", "train"]])
def test_papers_figure_does_not_stand_beside_other_problems(options, command, capsys):
    command.run("--model", "Qwen/Qwen3-8B", "--task", "lcb", *options)
    assert "paper" not in capsys.readouterr().out


# ---- Grades of responses that are there already ------------------------------------------------------------------


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def grades(task, data, responses, out):
    evaluate.main(["--responses", str(responses), "--task", task, "--data", str(data), "--out", str(out)])
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(list(row) == ["id", "reward", "verdict", "feedback"] for row in found)
    return found


def test_programs_are_graded_in_their_order_several_to_a_problem(tmp_path, capsys):
    rows = grades("lcb", FIXTURES / "lcb.jsonl", FIXTURES / "lcb_responses.jsonl", tmp_path / "grades.jsonl")
    assert [(row["id"], row["reward"], row["verdict"]) for row in rows] == [
        ("fx_sum", 1, "passed"), ("fx_half", 1, "passed"), ("fx_rows", 1, "passed"), ("fx_pairs", 1, "passed"),
        ("fx_sum", 0, "wrong answer"), ("fx_half", 0, "error"), ("fx_late", 0, "no code"),
    ]  # fmt: skip
    assert [bool(row["feedback"]) for row in rows] == [False] * 4 + [True] * 3
    assert "Input:\n3\n1 2 3\nYour output:\n3\nExpected output:\n6" in rows[4]["feedback"]  # a public test
    assert "ZeroDivisionError: division by zero (line 1)" in rows[5]["feedback"]
    *_, counts, mean = capsys.readouterr().out.splitlines()
    assert counts == ("7 responses to 5 problems, 0 problems without one: 4 passed, 1 wrong answer, 1 error, 1 no code")
    assert mean.startswith("mean reward of the answered problems 0.6000 [")  # (1/2 + 1/2 + 1 + 1 + 0) / 5


def test_letters_are_graded_in_their_order(tmp_path, capsys):
    rows = grades(
        "sciknoweval", FIXTURES / "sciknoweval.jsonl", FIXTURES / "sciknoweval_responses.jsonl", tmp_path / "g.jsonl"
    )
    assert [row["reward"] for row in rows] == [0, 0, 0, 1]  # biology-0 is D
    assert {(row["id"], row["feedback"]) for row in rows} == {("biology-0", "")}
    *_, counts, mean = capsys.readouterr().out.splitlines()
    assert counts == "4 responses to 1 problems, 47 problems without one: 3 wrong, 1 correct"
    assert mean == "mean reward of the answered problems 0.2500 [0.2500, 0.2500]"


def test_mathematics_is_graded_in_its_order_and_ids_may_be_numbers(tmp_path, capsys):
    names = ["test/algebra/fx1.json", "test/prealgebra/fx2.json", "test/algebra/fx3.json"]
    responses = [
        (names[2], r"\boxed{\left(0, 2\right]}"), (names[0], "10"), (names[1], r"\boxed{2} no, $\boxed{\frac{2}{12}}$"),
        (names[0], r"\boxed{10.0}"), (names[2], r"\boxed{(0,2)}"),
    ]  # fmt: skip
    path = write(tmp_path / "r.jsonl", [{"id": name, "response": text} for name, text in responses])
    rows = grades("math", FIXTURES / "math500.jsonl", path, tmp_path / "g.jsonl")
    assert [row["id"] for row in rows] == [name for name, _ in responses]
    assert [(row["reward"], row["verdict"]) for row in rows] == [
        (1, "correct"), (0, "no answer"), (1, "correct"), (1, "correct"), (0, "wrong"),
    ]  # fmt: skip
    mean = capsys.readouterr().out.splitlines()[-1]
    assert mean.startswith("mean reward of the answered problems 0.6667 [")  # (1/2 + 1/2 + 1) / 3
    path = write(tmp_path / "r.jsonl", [{"id": 61, "response": r"\boxed{125}"}])
    assert [(row["id"], row["reward"]) for row in grades("math", FIXTURES / "aime24.jsonl", path, tmp_path / "g")] == [
        (61, 1)
    ]


def test_grades_without_out_are_printed_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "r.jsonl", [{"id": "physics-0", "response": "?"}])
    evaluate.main(["--responses", str(path), "--task", "sciknoweval", "--data", str(FIXTURES / "sciknoweval.jsonl")])
    assert "1 no answer" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["r.jsonl"]


def test_task_is_closed_when_its_responses_are_graded(tmp_path, monkeypatch):
    closed = []
    task = Task("t", [], [], [Problem("p", [], "A")], sciknoweval.grade_choices, close=lambda: closed.append(True))
    monkeypatch.setattr(evaluate.tasks, "read", lambda name, path, official: task)
    path = write(tmp_path / "r.jsonl", [{"id": "p", "response": "<answer>A</answer>"}])
    evaluate.main(["--responses", str(path), "--task", "math", "--data", "x"])
    assert closed == [True]


@pytest.mark.filterwarnings("error")  # numpy's, of the mean of nothing
@pytest.mark.parametrize("problems, words", [([Problem("p", [], "A")], "holds no response"), ([], "holds no problem")])
def test_nothing_to_grade_is_one_line(problems, words, tmp_path, monkeypatch, capsys):
    task = Task("t", [], [], problems, sciknoweval.grade_choices)
    monkeypatch.setattr(evaluate.tasks, "read", lambda name, path, official: task)
    monkeypatch.setattr(evaluate.tasks, "rows", lambda path: [])  # a saved data set without rows
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--responses", str(tmp_path), "--task", "math", "--data", "x"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


GOOD = {"id": "biology-0", "response": "<answer>D</answer>"}
HUB = [json.loads(line) for line in (FIXTURES / "sciknoweval.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "responses, data, words",
    [
        ([GOOD, {"id": "biology-99", "response": "x"}], HUB, "row 2: no problem of --data has the id 'biology-99'"),
        ([GOOD, {"id": "biology-0"}], HUB, "row 2: a response is"),
        ([{"response": "x"}], HUB, "row 1: a response is"),
        ([{"id": "biology-0", "response": None}], HUB, "row 1: a response is"),
        ([{"id": "biology-0", "response": ["x"]}], HUB, "row 1: a response is"),
        ([GOOD], [{**HUB[0], "id": "biology-0"}, {**HUB[0], "id": "biology-0"}], "share the id 'biology-0'"),
        ([GOOD], [{**HUB[0], "answerKey": None}], "row 1: column answerKey is missing"),
        ([GOOD], None, "no-problems.jsonl does not exist"),
        (None, HUB, "no-responses.jsonl does not exist"),
        ([], HUB, "no-responses.jsonl"),
        ("[1]\n", HUB, "line 1"),
        ('{"id": \n', HUB, "line 1"),
    ],
)
def test_responses_that_cannot_be_graded_are_one_line_exit_2_and_nothing_written(
    responses, data, words, tmp_path, capsys
):
    path, problems, out = tmp_path / "no-responses.jsonl", tmp_path / "no-problems.jsonl", tmp_path / "out.jsonl"
    if isinstance(responses, str):
        path.write_text(responses)
    elif responses is not None:
        write(path, responses)
    if data is not None:
        write(problems, data)
    with pytest.raises(SystemExit) as stop:
        grades("sciknoweval", problems, path, out)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not out.exists() and printed.out == ""
    assert words in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--task", "math"], "--responses needs --data"),
        (["--task", "toy", "--data", "lcb.jsonl"], "task toy has no files"),
        (["--task", "math", "--data", "math500.jsonl", "--out", "no/such/dir/x.jsonl"], "no/such/dir"),
        (["--task", "math", "--data", "math500.jsonl", "--model", "m"], "--model"),
        (["--task", "math", "--data", "math500.jsonl", "--split", "test"], "--responses goes without --split"),
        (["--task", "math", "--data", "math500.jsonl", "--n", "4", "--greedy"], "goes without --n and --greedy"),
        (
            ["--task", "math", "--data", "math500.jsonl", "--temperature", "0", "--top_p", "1"],
            "--temperature and --top_p",
        ),
        (["--task", "math", "--data", "math500.jsonl", "--max_tokens", "9"], "--responses goes without --max_tokens"),
        (["--task", "chess", "--data", "math500.jsonl"], "chess"),
    ],
)
def test_responses_with_options_that_do_not_fit_are_one_line_and_exit_2(argv, words, capsys):
    argv = [str(FIXTURES / word) if word.endswith("0.jsonl") or word.startswith("lcb") else word for word in argv]
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--responses", str(FIXTURES / "math_responses.jsonl"), *argv])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and words in printed.err and printed.err.count("\n") == 1
