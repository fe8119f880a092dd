"""What surrounds the loop: the probe of the teacher, run directories, interruptions, updates that are not finite."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import checkpoint
import evaluate
import feedback
import losses
from harness import plan
import rollout
from harness import session
from harness import settings
import tasks
import vpd
from model.policy import Policy
from neighbours.reviews import Reviews
from tasks import Outcome
from test_vpd import read_log, run, weights

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


def probed(tmp_path, monkeypatch, *flags):
    """The teachers that the base failures were shown to, the prompts of each time, and the run's evaluations."""
    shown, measure = [], evaluate.measure

    def watched(policy, sampler, *args, prompts=None, **kwargs):
        if prompts:
            assert sampler.policy.model is policy.model  # the sampler draws from the teacher's weights
            first = next(policy.model.parameters()).detach().double().sum().item()
            shown.append((policy.model, first, prompts))
        result = measure(policy, sampler, *args, prompts=prompts, **kwargs)
        return result | ({"avg": 0.125 * len(shown)} if prompts else {})

    monkeypatch.setattr(evaluate, "measure", watched)
    rows = run(tmp_path / "run", "--eval_every", "1", "--teacher_probe", "3", *flags)
    return shown, [row for row in rows if row["kind"] == "eval"]


@pytest.mark.parametrize("method, teacher", [("vpd", "live"), ("sdpo", "ema")])
def test_the_teacher_is_tested_on_the_same_base_failures_at_every_evaluation(
    method, teacher, tmp_path, monkeypatch, small_validation
):
    shown, rows = probed(tmp_path, monkeypatch, "--method", method, "--lr", "0.01", "--ema_rate", "0.25")
    assert [row["teacher_avg"] for row in rows] == [0.125, 0.25, 0.375]
    assert shown[0][2] == shown[1][2] == shown[2][2]  # prompts: the contexts are those of the first weights
    kept = json.loads((tmp_path / "run" / "base_failures.json").read_text())
    assert 1 <= len(kept) <= 3 and len({row["id"] for row in kept}) == len(kept) == len(shown[0][2])
    assert all(row["context"]["solution"] for row in kept)
    # The weights move between evaluations, the moving average's less.
    assert shown[0][1] != shown[1][1] != shown[2][1]
    after = weights(tmp_path / "run" / "model")["model.embed_tokens.weight"].double().sum().item()
    assert (shown[2][1] == pytest.approx(after, rel=1e-12)) == (teacher == "live")


def test_only_a_method_with_a_teacher_is_probed(tmp_path, monkeypatch, small_validation):
    shown, rows = probed(tmp_path, monkeypatch, "--method", "grpo")
    assert not shown and all("teacher_avg" not in row for row in rows)


def test_base_failures_are_the_first_failure_with_a_context_of_each_problem(monkeypatch):
    cfg = settings.parse(
        ["--subset", "choice", "--group_size", "3", "--teacher_probe", "4", "--feedback", "environment"]
    )
    problems = [tasks.Problem(name, [{"role": "user", "content": name}], "") for name in "abcde"]
    right = {"a": (1, 1, 1), "b": (1, 0, 0), "c": (0, 0, 0), "d": (0, 1, 0), "e": (0, 0, 0)}
    text = {("b", 1): "b1", ("b", 2): "b2", ("c", 0): "c0", ("d", 0): "", ("d", 2): "d2"}

    class Sampler:
        def sample(self, prompts, n, seed, max_tokens, temperature, top_p):
            assert (len(prompts), n, temperature, top_p) == (4, 3, cfg.temperature, cfg.top_p)  # e is the fifth problem
            return [rollout.Rollout([i], [0.0], "stop") for i in range(len(prompts) * n)]

    def verify(rows, texts):
        places = [(p.id, i % 3) for i, p in enumerate(rows)]
        return [Outcome(right[p][j], "passed" if right[p][j] else "wrong", text.get((p, j), "")) for p, j in places]

    policy = type("Policy", (), {"tokenizer": None, "decode": lambda self, tokens: f"y{tokens[0]}"})()
    sampler = Sampler()
    monkeypatch.setattr(feedback, "student_prompt", lambda tokenizer, messages: [0])
    task = tasks.Task("toy/none", [], problems, [], verify)
    found = session.base_failures(cfg, policy, sampler, Reviews(cfg, policy, sampler), task)
    assert [(row["id"], row["context"]["feedback"]) for row in found] == [("b", "b1"), ("c", "c0"), ("d", "d2")]


def test_an_existing_run_is_refused_and_overwrite_replaces_only_runs(tmp_path, capsys):
    run(tmp_path / "run", "--eval_every", "0", steps=1)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", "--eval_every", "0", steps=1)
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err
    run(tmp_path / "run", "--eval_every", "0", "--overwrite", steps=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "mine", "--overwrite", steps=1)
    assert stop.value.code == 2 and (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--top_k", "100000"), "--top_k 100000 exceeds the vocabulary of"),
        (
            ("--max_prompt_tokens", "3"),
            "0 training problems do not fill a batch of --prompts_per_batch 4 (480 more have",
        ),
        (("--method", "ovd", "--subset", "trace", "--model", str(ROOT / "tasks" / "toy_models" / "trace")), "no token for 7"),
        (("--eval_every", "1", "--max_response_tokens", "90"), "one sequence of 9090 tokens is too long"),
    ],
)
def test_what_only_the_model_and_the_problems_tell_is_said_before_anything_is_written(
    flags, words, tmp_path, monkeypatch, capsys
):
    def no_digits(tokenizer):
        raise ValueError("no token for 7")

    def refuse(found, cfg):
        if found.longest > 1000:
            raise ValueError(f"one sequence of {found.longest} tokens is too long")

    prompt, load = feedback.student_prompt, tasks.load

    def with_a_long_one(*args, **kwargs):
        task = load(*args, **kwargs)
        task.validation[-1] = replace(task.validation[-1], messages=[{"role": "user", "content": "long"}])
        return task

    long = [{"role": "user", "content": "long"}]
    monkeypatch.setattr(feedback, "digit_tokens", no_digits)
    monkeypatch.setattr(plan, "refuse", refuse)
    monkeypatch.setattr(tasks, "load", with_a_long_one)
    monkeypatch.setattr(
        feedback, "student_prompt", lambda tokenizer, m: [0] * 9000 if m == long else prompt(tokenizer, m)
    )
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", "--eval_every", "0", *flags, steps=1)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error and not (tmp_path / "run").exists()


def test_what_a_run_may_meet_is_noted_before_it(tmp_path, capsys, monkeypatch):
    load = tasks.load

    def untested(*args, **kwargs):
        task = load(*args, **kwargs)
        task.test = []
        return task

    monkeypatch.setattr(tasks, "load", untested)
    run(tmp_path / "run", "--eval_every", "0", "--max_prompt_tokens", "2000", "--max_teacher_tokens", "3000", steps=1)
    told = capsys.readouterr().out
    assert "prompt and response may take 2030 tokens, and the model was made for 1024" in told
    assert "toy/choice has no test problems" in told


def test_a_log_that_lost_batches_is_said_when_the_run_goes_on(tmp_path, capsys):
    flags = ("--eval_every", "0", "--checkpoint_every", "1")
    run(tmp_path / "run", *flags, steps=2)
    (tmp_path / "run" / "log.jsonl").write_text("")
    capsys.readouterr()
    vpd.main(["--out", str(tmp_path / "run"), "--resume"])
    assert "log.jsonl tells of 0 of the 2 batches done" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["config", "probe"])
def test_a_disk_that_is_full_at_the_start_names_the_file_and_leaves_no_part(what, tmp_path, monkeypatch, capsys):
    write = Path.write_bytes

    def full(path, content):
        if path.name == {"config": "part-config.json", "probe": "part-base_failures.json"}[what]:
            write(path, b"")
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    flags = ("--eval_every", "1", "--teacher_probe", "2", "--max_teacher_tokens", "512")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", *flags, steps=1)
    error = capsys.readouterr().err
    named = {"config": "config.json", "probe": "base_failures.json"}[what]
    assert stop.value.code == 1 and error.count("\n") == 1
    assert f"{named}" in error and "No space left on device" in error
    assert not list((tmp_path / "run").glob("part-*")) and not (tmp_path / "run" / "base_failures.json").exists()


@pytest.mark.parametrize("what", ["log", "checkpoint", "model"])
def test_a_disk_that_is_full_is_one_line_and_nothing_half_written(what, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if what == "log":
        make = session.open_directory
        monkeypatch.setattr(
            session,
            "open_directory",
            lambda out, *args: (make(out, *args), (out / "log.jsonl").symlink_to("/dev/full")),
        )
    elif what == "checkpoint":
        monkeypatch.setattr(checkpoint.dcp, "save", full)
    else:
        monkeypatch.setattr(type(Policy.load(str(ROOT / "tasks" / "toy_models" / "choice")).model), "save_pretrained", full)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", "--eval_every", "0", steps=1)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and "No space left" in error
    assert (
        f"run/{'checkpoints/step-000001' if what == 'checkpoint' else 'log.jsonl' if what == 'log' else 'model'}: "
        in error
    )
    kept = "--resume goes on after 1 batches" if what == "model" else "it has no checkpoint yet: --resume starts again"
    assert kept in error and not list((tmp_path / "run").rglob("part-*"))


def test_ctrl_c_leaves_a_usable_directory(tmp_path, monkeypatch, capsys):
    sample, calls = rollout.HFSampler.sample, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(rollout.HFSampler, "sample", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", "--eval_every", "0", steps=5)
    assert stop.value.code == 130 and "it has no checkpoint yet: --resume starts again" in capsys.readouterr().err
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1
    Policy.load(str(tmp_path / "run" / "model"))


def test_five_updates_in_a_row_that_are_not_finite_end_the_run_with_the_weights_intact(tmp_path, monkeypatch, capsys):
    weights_of = losses.sequence_weights
    monkeypatch.setattr(losses, "sequence_weights", lambda *args: weights_of(*args) * float("nan"))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", "--method", "sdpo", "--eval_every", "0", steps=9)
    assert stop.value.code == 1 and "five updates" in capsys.readouterr().err
    rows = read_log(tmp_path / "run")
    assert [row["updates_not_finite"] for row in rows] == [1, 1, 1, 1]
    before, after = weights(ROOT / "tasks" / "toy_models" / "choice"), weights(tmp_path / "run" / "model")
    assert all(torch.equal(before[k].double(), after[k].double()) for k in before)
