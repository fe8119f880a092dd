"""What surrounds the loop: run directories, models and tasks that cannot be trained, interruptions, updates that are not
finite, the best weights, and the probe of the teacher."""

import copy
import json
import os
import signal
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers, processors
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GenerationConfig, PhiConfig

import evaluate
import feedback
import rollout
import tasks
import vpd
from conftest import log_of
from harness import plan, runs, session
from harness.command import CannotWrite
from model import checkpoint
from model.policy import Policy
from tasks import Outcome
from test_settings import parsed

torch.set_num_threads(1)
CHOICE = Path(__file__).parents[1] / "tasks" / "toy_models" / "choice"
SMALL = ["--subset", "choice", "--prompts_per_batch", "4", "--minibatch_prompts", "4", "--group_size", "4",
         "--max_response_tokens", "30", "--eval_samples", "1", "--dtype", "float64"]  # fmt: skip


def run(out, *flags, steps=2):
    """A small run, without evaluation unless a flag asks for it: its batches' rows of log.jsonl."""
    more = [] if "--eval_every" in flags else ["--eval_every", "0"]
    more += [] if "--method" in flags and "vpd" not in flags else ["--e_minibatch_prompts", "4"]
    vpd.main([*SMALL, *more, "--steps", str(steps), "--out", str(out), *flags])
    return log_of(out)


def resume(out, *flags, steps):
    """Goes on with a run as if it had been asked for more steps."""
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"steps": steps}))
    vpd.main(["--resume", "--out", str(out), *flags])


def ended(status, capsys, out, *flags, **more) -> str:
    """What a run that ends with this exit status says on stderr, less the bar of progress."""
    with pytest.raises(SystemExit) as stop:
        run(out, *flags, **more)
    error = capsys.readouterr().err
    assert stop.value.code == status, error
    return error


def refused(capsys, out, *flags, **more) -> str:
    """The one line of a run that is refused before anything is written."""
    error = ended(2, capsys, out, *flags, **more)
    assert error.count("\n") == 1 and not out.exists(), error
    return error


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b) -> bool:
    a, b = weights(a), weights(b)
    return all(torch.equal(a[name].double(), b[name].double()) for name in a)


# ---- The run directory -------------------------------------------------------------------------------------------


def test_an_existing_run_is_refused_and_overwrite_deletes_only_runs(tmp_path):
    out, none = tmp_path / "run", tmp_path / "none"
    run(out, steps=1)
    (out / "left").touch()
    run(out, "--overwrite", steps=1)
    assert not (out / "left").exists()
    none.mkdir()
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "notes").touch()
    for *flags, words in (
        (out, "--overwrite to delete it"), (none, "--overwrite", "only deletes run directories"),
        (out / "model", "--overwrite", "only deletes run directories"),  # a model's folder has a config.json too
        (out, "--overwrite", "--model", out / "model" / ".." / "model", "this run's own --model"),
        (out, "--overwrite", "--data", out / "log.jsonl", "this run's own --data"),
        (tmp_path, "--resume", "best holds more than a model"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            runs.check(parsed("--out", *map(str, flags)))
    with pytest.raises(CannotWrite, match="it is a folder that holds more than a model"):
        Policy.load(CHOICE).save(out)


def test_the_directory_of_a_run_in_progress_is_refused(tmp_path, monkeypatch, capsys):
    run(tmp_path / "run", steps=1)
    with runs.lock(tmp_path / "run"):
        for flag in ("--resume", "--overwrite"):
            assert "another run is still using" in ended(2, capsys, tmp_path / "run", flag, steps=1)
        with pytest.raises(ValueError, match="another run is still using"):  # one that was made since somebody looked
            runs.make(parsed(), tmp_path / "run", {})
    monkeypatch.setattr(runs.fcntl, "flock", Mock(side_effect=OSError(38, "Function not implemented")))
    runs.lock(tmp_path / "run").close()  # a file system without locks
    assert "run exists: give another --out" in ended(2, capsys, tmp_path / "run", "--plan", steps=1)  # a plan looks too


def test_a_model_is_saved_by_its_whole_path_and_the_run_goes_on_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(CHOICE.parent)
    run(tmp_path / "run", "--model", "choice", steps=1)
    config = (tmp_path / "run" / "config.json").read_text()
    assert json.loads(config)["model"] == str(CHOICE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "choice").mkdir()
    vpd.main(["--out", "run", "--resume"])
    assert (tmp_path / "run" / "config.json").read_text() == config  # as the run was started


# ---- What a task or a model brings -------------------------------------------------------------------------------

OWN = """
from tasks import Outcome, Problem, Task
def load():
    problems = [Problem(f"p{{i}}", [{{"role": "user", "content": f"{text}"}}], "r") for i in range(8)]
    verify = lambda problems, texts: [Outcome({reward}, "v", "no") for i, _ in enumerate(problems)]
    return Task("t", problems, [], problems[:2], verify)
"""


def own(path, text="start {i}", reward=0):
    """The flags of a small run of a task of one's own, on the toy model of choice."""
    path.write_text(OWN.format(text=text, reward=reward))
    return ["--task", "own", "--subset", "", "--data", str(path), "--model", str(CHOICE),
            "--max_prompt_tokens", "10", "--max_response_tokens", "8"]  # fmt: skip; prompts of 10 tokens are not dropped


LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + LOOP


@pytest.mark.parametrize(
    "roles, template, blanks, words",
    [(["system", "user"], NO_SYSTEM, False, r"cannot render problem p \(TemplateError: no system role\)"),
     (["user", "assistant"], LOOP, False, "problem p: its last message is not the user's"),
     (["user"], LOOP, True, "adds blanks where the texts of a prompt are joined"), (["user"], LOOP, False, None)],
)  # fmt: skip
def test_prompts_that_cannot_be_built_are_one_line(roles, template, blanks, words, byte_tokenizer):
    changed, messages = copy.deepcopy(byte_tokenizer), [{"role": role, "content": "a" * 40} for role in roles]
    changed.chat_template, changed._tokenizer.pre_tokenizer = template, pre_tokenizers.ByteLevel(add_prefix_space=blanks)
    asked = changed, [tasks.Problem("p", messages)], parsed("--max_teacher_tokens", "140")
    if words is None:
        assert feedback.check_prompts(*asked) == [len("<user\n" + "a" * 40 + ">\n")]
    else:
        with pytest.raises(ValueError, match=words):
            feedback.check_prompts(*asked)


@pytest.mark.parametrize("template", [None, LOOP, "<|pad|>" + LOOP])
def test_a_tokenizer_that_begins_with_bos_gets_it_once_in_every_prompt(template, tokenizer):
    messages, C, words = [{"role": "user", "content": "start 1"}], feedback.Context("", "1", "2", "3"), parsed().templates()
    asked = feedback.request_parts(words.request, messages, "a", reference="b")
    plain, with_bos = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    plain.bos_token = with_bos.bos_token = "<|pad|>"
    plain.chat_template = with_bos.chat_template = template
    bos = plain.bos_token_id
    with_bos._tokenizer.post_processor = processors.TemplateProcessing("<|pad|> $A", special_tokens=[("<|pad|>", bos)])
    prompts = lambda t: [feedback.student_prompt(t, messages),  # noqa: E731
                         feedback.teacher_prompt(t, messages, C, words, 10**6)[0],
                         feedback.encode(t, messages, asked, 10**6)[0]]  # fmt: skip
    for without, ids in zip(prompts(plain), prompts(with_bos)):
        assert ids == (without if without[0] == bos else [bos, *without]) and ids.count(bos) == 1


@pytest.mark.parametrize("config", [CohereConfig, Gemma2Config, PhiConfig])  # scaled, capped, with a bias
def test_a_head_that_is_no_plain_matrix_is_refused(config, tmp_path, tokenizer):
    network = AutoModelForCausalLM.from_config(config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    ))  # fmt: skip
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its head is not a plain matrix"):
        Policy.load(tmp_path)


def test_a_generation_config_that_cannot_be_written_does_not_cost_the_trained_model(tmp_path):
    Policy.load(CHOICE).save(tmp_path / "m")
    eos = GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, 5], "temperature": 0.6}))
    Policy.load(tmp_path / "m").save(tmp_path / "again")
    assert GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id == [eos, 5]


def test_special_tokens_inside_a_response_are_graded(tokenizer):
    policy, word, start = Policy.load(CHOICE), tokenizer("a").input_ids, tokenizer.convert_tokens_to_ids("<|im_start|>")
    response = [*word, start, *word]
    assert policy.decode([*response, policy.eos_ids[0]]) == policy.decode(response) == "a<|im_start|>a"


def test_the_trainer_scores_at_the_temperature_of_the_rollouts(tmp_path, capsys):
    rows = run(tmp_path / "run", "--temperature", "2", "--top_p", "0.9", steps=1)
    assert "--top_p below 1: rollouts come from a truncated distribution" in capsys.readouterr().out
    assert rows[0]["sampler_gap"] > 1e-4
    rows = run(tmp_path / "whole", "--temperature", "2", steps=1)
    assert rows[0]["sampler_gap"] < 1e-6  # the library samples in float32


def test_a_sequence_that_is_too_long_is_refused_and_what_a_run_may_meet_is_noted(tmp_path, monkeypatch, capsys):
    """The longest sequence may be that of evaluation."""

    def changed(*args, load=tasks.load):
        task = load(*args)
        long = replace(task.validation[-1], messages=[{"role": "user", "content": "start 1 " * 300}])
        train = [replace(p, reference=p.reference * known) for p in task.train]
        return replace(task, train=train, validation=[*task.validation, long], test=[])

    def refuse(found, cfg):
        if found.longest > 2100:
            raise ValueError("too long a sequence")

    monkeypatch.setattr(tasks, "load", changed)
    monkeypatch.setattr(plan, "refuse", refuse)
    flags, known = ["--max_prompt_tokens", "2000", "--max_teacher_tokens", "3000"], False
    assert "too long a sequence" in refused(capsys, tmp_path / "run", "--eval_every", "1", *flags)
    assert "a reference answer for every problem of toy/choice" in refused(capsys, tmp_path / "run", "--feedback", "critique")
    known = True
    run(tmp_path / "run", *flags, steps=1)
    told = capsys.readouterr().out
    assert "prompt and response may take 2030 tokens, and the model supports 1024" in told
    assert "toy/choice has no test problems" in told


def test_a_run_says_how_much_it_does_when_it_ends_and_what_its_task_is_called(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*own(tmp_path / "own.py", reward="i % 2"), "--method", "grpo", "--eval_every", "3", "--epochs", "2"]
    vpd.main([*SMALL, *flags, "--steps", "0"])
    told = capsys.readouterr().out
    (out,) = (tmp_path / "runs").iterdir()
    assert out.name.startswith("t-grpo-seed0-") and json.loads((out / "config.json").read_text())["task_name"] == "t"
    assert f"{out.relative_to(tmp_path)}: grpo on t: 8 train" in told
    assert "\n4 batches, with an evaluation on 2 test problems every 3\n" in told and told.count("the run will end in about") == 1


def test_the_end_of_a_run_is_what_is_left_of_batches_and_evaluations(monkeypatch):
    task = tasks.Task("t", [], [], [], None)
    here = session.Run(parsed("--steps", "10", "--eval_every", "4"), None, None, task, Path(), {}, None, None, None)
    here.eval_seconds = 100.0
    monkeypatch.setattr(session.time, "time", lambda: 0.0)
    at = session.time.strftime("%a %H:%M", session.time.localtime(6 * 20 + 2 * 100))  # after batches 8 and 10
    assert here.outlook(20.0, 4) == f"a batch takes 20.0 s, an evaluation 100.0 s: the run will end in about 0:05:20 ({at})"
    here.steps = 10**12  # is not counted batch by batch
    assert "the run will end in about 347222222 days" in here.outlook(5.0, 4)


# ---- How a run ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, words", [(2, "no update was made"), (9, "three batches in a row made no update")])
def test_a_run_without_a_signal_ends_with_a_line_and_status_1(steps, words, tmp_path, capsys):
    flags = [*own(tmp_path / "own.py"), "--method", "grpo", "--eval_every", "50"]  # all wrong: no advantage
    error, done = ended(1, capsys, tmp_path / "run", *flags, steps=steps), min(steps, 3)
    steps_of = lambda kind: [row["step"] for row in log_of(tmp_path / "run", kind)]  # noqa: E731
    assert words in error and steps_of("train") == [*range(done)] and steps_of("eval") == [0, done]  # as it ended
    assert all("teacher_avg" not in row for row in log_of(tmp_path / "run", "eval"))  # there is no teacher to probe
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_a_run_does_not_go_on_with_other_problems_or_another_state(tmp_path, monkeypatch, capsys):
    flags = [*own(tmp_path / "own.py"), "--feedback", "environment", "--method", "sdpo"]
    run(tmp_path / "run", *flags, steps=1)
    own(tmp_path / "own.py", text="start {i + 1}")
    error = ended(2, capsys, tmp_path / "run", *flags, "--resume", steps=1)
    assert "the training problems have changed since the run began" in error
    monkeypatch.setattr(session.Run, "STATE", (*session.Run.STATE, "new"))
    error = ended(2, capsys, tmp_path / "run", *flags, "--resume", steps=1)
    assert "the checkpoint is from another version of this code: it lacks new" in error


def interrupting(monkeypatch, interrupt, where=(rollout.HFSampler, "sample")):
    """Calls interrupt() while the second batch is sampled, or in another function."""
    function, calls = getattr(*where), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            interrupt()
        return function(*args)

    monkeypatch.setattr(*where, interrupted)


@pytest.mark.parametrize("number, where", [(signal.SIGTERM, (rollout.HFSampler, "sample")),
                                           (signal.SIGHUP, (feedback, "batch_contexts"))])  # fmt: skip
def test_a_signal_saves_the_state_and_the_run_that_goes_on_is_the_same(number, where, tmp_path, monkeypatch, capsys):
    run(tmp_path / "whole", steps=3)
    interrupting(monkeypatch, lambda: os.kill(os.getpid(), number), where)
    handler = signal.getsignal(number)
    assert "resume with --resume" in ended(143, capsys, tmp_path / "run", steps=3)
    assert signal.getsignal(number) == handler and len(log_of(tmp_path / "run")) == 1  # the batch is drawn again
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()
    run(tmp_path / "run", "--resume", steps=3)
    assert len(log_of(tmp_path / "run")) == 3 and same(tmp_path / "run" / "model", tmp_path / "whole" / "model")


def test_a_run_under_nohup_goes_on(tmp_path, monkeypatch):
    interrupting(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert len(run(tmp_path / "run", steps=2)) == 2
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_leaves_a_usable_directory(tmp_path, monkeypatch, capsys):
    interrupting(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    error = ended(130, capsys, tmp_path / "run", steps=5)
    assert "it has no checkpoint yet: --resume starts again" in error and len(log_of(tmp_path / "run")) == 1
    Policy.load(str(tmp_path / "run" / "model"))


@pytest.mark.parametrize("bad, lasts", [((0, 1, 2, 3, 4), 4), ((0, 1, 3, 4, 5), 7)])
def test_five_bad_updates_in_a_row_end_a_run_and_five_in_all_do_not(bad, lasts, tmp_path, monkeypatch, capsys):
    update, calls = session.Run.update, []

    def spoiled(self, optimizer, lr, loss):
        calls.append(1)
        return update(self, optimizer, lr, float("nan") if len(calls) - 1 in bad else loss)

    monkeypatch.setattr(session.Run, "update", spoiled)
    flags = ["--method", "sdpo", "--feedback", "solution_first"]  # an update for every batch
    if lasts < 7:
        assert "five updates in a row" in ended(1, capsys, tmp_path / "run", *flags, steps=7)
        assert same(CHOICE, tmp_path / "run" / "model")
    else:
        run(tmp_path / "run", *flags, steps=7)
    rows = log_of(tmp_path / "run")
    assert [row["updates_not_finite"] for row in rows] == [int(i in bad) for i in range(lasts)]


def test_the_best_score_and_the_counts_outlive_an_interruption(tmp_path, monkeypatch, small_validation):
    scores, measure = iter([0.5, 0.9, 0.9, 0.8]), evaluate.measure
    monkeypatch.setattr(evaluate, "measure", lambda *a, **k: measure(*a, **k) | {"avg": next(scores)})
    saved, save = [], Policy.save
    monkeypatch.setattr(Policy, "save", lambda self, folder: (saved.append(Path(folder).name), save(self, folder)))
    run(tmp_path / "run", "--eval_every", "1", "--teacher_probe", "0", steps=1)
    assert saved == ["best", "best", "model"]

    counts, restored, restore, batches = {"bad_in_a_row": 4, "idle": 2, "made": 7}, [], checkpoint.restore, session.Run.batches

    def resumed(self):
        restored.extend([self, {name: getattr(self, name) for name in counts}])
        self.critic.missing["a critique"] = 1
        return batches(self)

    monkeypatch.setattr(checkpoint, "restore", lambda *args: restore(*args) | counts)
    monkeypatch.setattr(session.Run, "batches", resumed)
    resume(tmp_path / "run", steps=3)  # 0.9 and 0.8 are no better
    assert saved[3:] == ["model"]
    assert restored[1] == counts and (restored[0].made, restored[0].idle) == (9, 0)
    assert [row["left_out"].get("a critique") for row in log_of(tmp_path / "run")] == [None, 1, None]


@pytest.mark.parametrize("what, said", [
    ("config.json", "run/config.json: No space left on device"), ("model", "No space left on device; --resume goes on after 1 "),
    ("log.jsonl", "run/log.jsonl: No space left on device; it has no checkpoint yet: --resume starts again"),
    ("pipe", "cannot write standard output: Broken pipe; it has no checkpoint yet: --resume starts again"),
])  # fmt: skip
def test_what_cannot_be_written_is_one_line_and_nothing_half_written(what, said, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(32, "Broken pipe") if what == "pipe" else OSError(28, "No space left on device")

    write, make = Path.write_bytes, runs.make
    half = lambda path, text: (write(path, b""), full()) if path.name == "part-config.json" else write(path, text)  # noqa: E731
    link = lambda cfg, out, record: (make(cfg, out, record), (out / what).symlink_to("/dev/full"))[0]  # noqa: E731
    network = type(Policy.load(CHOICE).model)
    monkeypatch.setattr(*{
        "config.json": (Path, "write_bytes", half), "model": (network, "save_pretrained", full),
        "log.jsonl": (runs, "make", link), "pipe": (session, "terminal_line", full),
    }[what])  # fmt: skip
    *_, last = ended(1, capsys, tmp_path / "run", steps=1).splitlines()
    assert said in last and not list((tmp_path / "run").rglob("part-*"))


# ---- Trackers ----------------------------------------------------------------------------------------------------


def test_tensorboard_holds_the_numbers_of_the_log_also_of_a_run_that_was_resumed(tmp_path, small_validation):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    track = ["--track", "tensorboard"]
    run(tmp_path / "run", *track, "--eval_every", "2", "--teacher_probe", "0", steps=2)
    resume(tmp_path / "run", *track, steps=3)
    board = reading.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    told = lambda name: [(e.step, pytest.approx(e.value)) for e in board.Scalars(name)]  # noqa: E731
    assert told("train/reward") == [(row["step"] + 1, row["reward"]) for row in log_of(tmp_path / "run")]
    watched = log_of(tmp_path / "run", "eval")
    assert told("eval/avg") == [(row["step"], row["avg"]) for row in watched] and len(watched) == 3


@pytest.mark.parametrize("fails", [0, 2, None])
def test_a_tracker_that_fails_says_so_once_and_the_run_goes_on(fails, tmp_path, monkeypatch, capsys):
    given, wandb = [], ModuleType("wandb")

    def log(figures, step):
        if len(given) == fails:
            raise RuntimeError("the network\nis gone")
        given.append((step, figures))

    wandb.init = lambda **how: SimpleNamespace(log=log, finish=lambda: given.append("end")) if fails != 0 else log({}, 0)
    wandb.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert len(run(tmp_path / "run", "--track", "wandb", steps=4)) == 4
    lines = [line for line in capsys.readouterr().err.splitlines() if "--track" in line]
    if fails is None:
        assert given.pop() == "end" and not lines
    else:
        assert len(lines) == 1 and "wandb failed (RuntimeError: the network is gone)" in lines[0]
    assert [step for step, _ in given] == [1, 2, 3, 4][:fails]
    assert all("train/seconds/rollout" in figures and "train/step" not in figures for _, figures in given)


# ---- The probe of the teacher ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, teacher", [("vpd", "live"), ("sdpo", "ema")])
def test_the_teacher_is_tested_on_the_same_failures_at_every_evaluation(method, teacher, tmp_path, monkeypatch, small_validation):
    shown, measure, out = [], evaluate.measure, tmp_path / "run"

    def watched(policy, sampler, *args, prompts=None, **kwargs):
        if prompts:
            assert sampler.policy.model is policy.model  # the sampler draws from the teacher's weights
            texts = [policy.tokenizer.decode(prompt) for prompt in prompts]
            shown.append((next(policy.model.parameters()).detach().double().sum().item(), texts))
        result = measure(policy, sampler, *args, prompts=prompts, **kwargs)
        return result | ({"avg": 0.125 * len(shown)} if prompts else {})

    monkeypatch.setattr(evaluate, "measure", watched)
    slow = ["--ema_rate", "0.25"] * (teacher == "ema")
    run(out, "--eval_every", "1", "--method", method, "--lr", "0.01", "--teacher_probe", "3", *slow)
    assert [row["teacher_avg"] for row in log_of(out, "eval")] == [0.125, 0.25, 0.375]
    (first, prompts), (second, again), (third, once_more) = shown
    assert prompts == again == once_more  # the contexts are those of the first weights
    kept = json.loads((out / "base_failures.json").read_text())
    assert 1 <= len(kept) <= 3 and len({row["id"] for row in kept}) == len(kept) == len(prompts)
    assert all(row["context"]["solution"] in text for row, text in zip(kept, prompts)) and kept[0] != kept[-1]
    assert first != second != third  # the weights move between evaluations, the moving average's less
    after = weights(out / "model")["model.embed_tokens.weight"].double().sum().item()
    assert (third == pytest.approx(after, rel=1e-12)) == (teacher == "live")


@pytest.mark.parametrize("teacher, warned", [(0.5, True), (0.75, False)])
def test_a_teacher_that_reads_no_better_than_the_student_is_told_once(
    teacher, warned, tmp_path, monkeypatch, small_validation, capsys
):
    measure, failures = evaluate.measure, lambda: json.loads((tmp_path / "run" / "base_failures.json").read_text())

    def measured(policy, sampler, verify, problems, **how):
        found = measure(policy, sampler, verify, problems, **how)
        if how["prompts"]:
            return found | {"avg": teacher}
        return found | {"rewards": {p.id: [int(p.id == failures()[0]["id"])] for p in problems}}  # 1 of the 2, 1 of 4 in all

    monkeypatch.setattr(evaluate, "measure", measured)
    run(tmp_path / "run", "--eval_every", "1", "--teacher_probe", "2", "--group_size", "8", steps=1)
    told = capsys.readouterr().out
    assert len(failures()) == 2
    assert ("passes no more of these than the student (0.500)" in told) == warned == told.count("see teacher_avg in")


def test_rows_of_the_e_step_that_no_longer_pull_are_told_once(tmp_path, capsys):
    rows = run(tmp_path / "run", "--beta", "1000", "--e_step_every", "1", "--lr", "0.01", "--seed", "1", steps=4)
    late = [f"{row['e_died']:.2f}" for row in rows if (row["e_died"] or 0) > 0.3]
    told = [line for line in capsys.readouterr().out.splitlines() if "almost no gradient" in line]
    assert len(late) > 1 and len(told) == 1 and told[0].startswith(f"{late[0]} of the E-step's rows have almost no gradient")


def test_base_failures_are_the_first_failure_with_a_context_of_each_problem(monkeypatch):
    cfg = parsed("--subset", "choice", "--group_size", "3", "--teacher_probe", "4", "--feedback", "solution_first")
    problems = [tasks.Problem(name, [{"role": "user", "content": name}], "") for name in "abcde"]
    right = {"a": (1, 1, 1), "b": (1, 0, 0), "c": (0, 0, 0), "d": (0, 1, 0)}
    text = {("c", 1): "c1", ("c", 2): "c2"}  # b and d have a success to show

    def sample(prompts, n, seed, max_tokens, temperature, top_p):
        assert (len(prompts), n, temperature, top_p) == (4, 3, cfg.temperature, cfg.top_p)  # e is the fifth problem
        return [rollout.Rollout([i], [0.0], "stop") for i in range(len(prompts) * n)]

    def verify(rows, texts):
        places = [(p.id, i % 3) for i, p in enumerate(rows)]
        return [Outcome(right[p][j], "passed" if right[p][j] else "wrong", text.get((p, j), "")) for p, j in places]

    policy = SimpleNamespace(tokenizer=None, decode=lambda tokens: f"y{tokens[0]}")
    monkeypatch.setattr(feedback, "student_prompt", lambda tokenizer, messages: [0])
    task, critic = tasks.Task("toy/none", [], problems, [], verify), feedback.Critic(cfg, policy)
    found = session.Run(cfg, policy, SimpleNamespace(sample=sample), task, Path(), {}, None, critic, None)._base_failures()
    texts = [(id, context.solution, context.feedback) for id, context in found.items()]
    assert texts == [("b", "y3", ""), ("c", "", "c1"), ("d", "y10", "")]
