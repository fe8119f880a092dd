"""Settings: presets (test_docs.py compares them with the paper's tables), what overrides what, and what is refused."""

import dataclasses
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest

import vpd
from harness import presets, settings
from neighbours import distil, ovd

ROOT = Path(__file__).parents[1]
LOOPS = {"distil": distil, "ovd": ovd}  # of the methods that are no row of METHODS


def parsed(*argv, loop=vpd, **flags):
    flags = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    preset = partial(presets.of, vpd.PRESETS | loop.PRESETS)
    return settings.parse([*argv, *flags], loop.Config, "p", "", preset, loop.Config().method)


# ---- Presets -----------------------------------------------------------------------------------------------------


def test_every_preset_passes_the_checks_of_every_method():
    refused = {}
    for task, method in product(vpd.PRESETS, [*vpd.METHODS, *LOOPS]):
        loop = LOOPS.get(method, vpd)
        try:
            loop.check(parsed(task=task, method=method, loop=loop))
        except ValueError as error:
            refused[task, method] = str(error)
    assert not refused


def test_a_flag_overrides_the_preset_and_the_preset_the_default():
    assert parsed(task="math").lr == 5e-6 and parsed(task="math", lr=0.5).lr == 0.5
    assert [parsed(task=task, loop=distil).lr for task in ("lcb", "sciknoweval", "math")] == [1e-6, 5e-5, 5e-6]
    assert parsed("--no_borrow").borrow is False and parsed().borrow is True
    assert [parsed(borrow=text).borrow for text in ("false", "0", "True", "1")] == [False, False, True, True]
    assert settings.differing(parsed("--no_borrow", lr=1e-3, seed=0, steps=9)) == {"steps": 9, "borrow": False}


def test_the_regimes_of_trace_take_its_settings_and_their_own_model():
    for method in ("vpd", "sdpo", "grpo"):
        trace = vars(parsed(method=method))
        for subset, model in (("dialect", "trace"), ("often", "trace-often")):
            other = vars(parsed(method=method, subset=f"trace-{subset}"))
            differ = {name for name in trace.keys() - {"given", "preset"} if trace[name] != other[name]}
            assert other["model"] == f"tasks/toy_models/{model}"
            assert differ <= {"subset", "model"} | ({"lr", "e_lr"} if subset == "often" else set())  # often has its own
    assert (parsed(loop=ovd).subset, parsed(loop=ovd).model) == ("code-judge", "tasks/toy_models/code-judge")
    assert parsed(loop=ovd, subset="trace").model == "tasks/toy_models/trace" and parsed().subset == "trace"


# ---- What is refused ---------------------------------------------------------------------------------------------

LCB, SCIENCE = "--task lcb --smoke qwen3", "--task sciknoweval --smoke qwen3"
SAVED = "holds a secret, which would be saved with the run: put the key into OPENAI_API_KEY"
IMPOSSIBLE = [  # the loop, the flags, and a word of the line
    (vpd, "--group_size 1 --method grpo", "--group_size 1 gives no advantage"),
    (vpd, "--group_size 1 --feedback sibling", "group_size"), (vpd, "--subset code --no_borrow", "no_borrow"),
    (vpd, "--prompts_per_batch 0", "--prompts_per_batch must be above 0, not 0"), (vpd, "--lr -1", "--lr must be above 0"),
    (vpd, "--ema_rate 1.5 --method sdpo", "--ema_rate must be at least 0 and at most 1"),
    (vpd, "--adam_beta1 1", "--adam_beta1 must be at least 0 and below 1"), (vpd, "--adam_beta2 1", "below 1"),
    (vpd, "--subset code --feedback_template nohole", "the feedback template must contain {feedback} exactly once"),
    (vpd, "--feedback both --no_borrow", "no_borrow"), (vpd, "--epochs 2", "--epochs is for --steps 0"),
    (vpd, "--sampler hf --engine_memory 0.5", "--engine_memory is for --sampler vllm"), (vpd, "--smoke", "--smoke is for lcb"),
    (vpd, f"{LCB} --model m", "leave out --model"),
    (vpd, "--resume", "--resume needs --out"), (vpd, "--resume --overwrite --out no/such/run", "give only one of them"),
    (vpd, "--critic_url http://localhost:1 --feedback critique", "--critic_model"),
    (ovd, "--group_size 1", "gives no advantage"), (ovd, "--judge_request nohole", "judge"),
    (ovd, "--judge_url http://localhost:1", "--judge_model"),
    (ovd, "--judge_url localhost:8000/v1 --judge_model m", "http://"),
    *[(loop, f"{also} --{who}_url http://{secret} --{who}_model m", f"--{who}_url {SAVED}")
      for loop, who, also in ((vpd, "critic", "--feedback critique"), (ovd, "judge", ""))
      for secret in ("me:hunter2@host/v1", "hunter2@host/v1", "host/v1?key=hunter2", "host/v1#hunter2")],
    (vpd, "--method grpo --ema_rate 0.5", "--ema_rate is for an EMA teacher"),
    (vpd, "--method sdpo --teacher live --ema_rate 0.5", "--ema_rate is for an EMA teacher"),
    # What the model, the problems, a server or the machine tell.
    (ovd, "--judge_url http://127.0.0.1:9/v1 --judge_model m --server_timeout 1",
     "--judge_url http://127.0.0.1:9/v1 with --judge_model m does not answer"),
    (vpd, "--model=", "--model is no folder here"), (vpd, "--model no/such/folder", "--model no/such/folder is no folder here"),
    (vpd, "--model Qwen/Qwen3-8 --task lcb", "is no folder here"),
    (vpd, "--top_k 100000", "--top_k 100000 exceeds the vocabulary of"),
    (vpd, "--max_prompt_tokens 3", "do not fill a batch of --prompts_per_batch 12: 480 training prompts of more than 3"),
    (vpd, "--subset chess", "chess"), (vpd, "--task math", "tasks/toy_models/trace"),
    (vpd, "--task math --smoke qwen3 --data no/such/folder", "no/such/folder"),
    (vpd, f"{SCIENCE} --feedback environment", "sciknoweval/all only offers critique"), (vpd, f"{LCB} --since May", "--since"),
    (vpd, f"{LCB} --feedback critique", "lcb/v6 only offers environment"),
    (vpd, f"{LCB} --since 2026-01-01 --until 2026-02-01", "0 of 5 problems"),
    *[(vpd, flags, words) for name, flags, words in [("vllm", "--sampler vllm", "vllm is not installed"),
      ("wandb", "--track wandb", "pip install wandb")] if importlib.util.find_spec(name) is None],
]  # fmt: skip
NAMED = {  # flags of which the line names the first
    vpd: "--lr nan, --lr fast, --beta inf, --shift_rate 0, --temperature 0, --top_p 0, --engine_memory 1.5, --checkpoint_every -1, "
         "--teacher_probe -1, --steps 0 --epochs 0, --minibatch_prompts 5, --e_minibatch_prompts 7, --max_teacher_tokens 20, "
         "--mismatch_limit -1, --mismatch_limit two, --clip_low 2 --method grpo, --passed_text well --feedback sibling, "
         "--teacher_probe 4 --eval_every 0, --no_such_flag 1, --method ppo, --data tests",
    ovd: "--ovd_threshold -1, --ovd_threshold 50, --max_teacher_tokens 20",
}  # fmt: skip
IMPOSSIBLE += [(loop, flags, flags.split()[0].strip("-")) for loop, rows in NAMED.items() for flags in rows.split(", ")]


@pytest.mark.parametrize("loop, flags, words", IMPOSSIBLE, ids=lambda x: x if isinstance(x, str) else "")
def test_impossible_settings_are_one_line_exit_2_and_nothing_written(loop, flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01, raising=False)
    flags = "--subset choice " * ("--task" not in flags and "--subset" not in flags and loop is vpd) + flags
    flags += f" --out {tmp_path}/run" * ("--resume" not in flags)
    with pytest.raises(SystemExit) as stop:
        loop.main(flags.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and not (tmp_path / "run").exists()
    assert words in error and "hunter2" not in error


def test_a_row_of_methods_without_a_flag_that_its_objective_needs_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(vpd.METHODS, "grpo", vpd.Method(vpd.joint, "ema", "either", reinforces=True))
    with pytest.raises(SystemExit) as stop:
        vpd.main(["--method", "grpo"])
    assert stop.value.code == 2 and "reads t.D: its row of METHODS needs distils=True" in capsys.readouterr().err


# ---- A flag that nobody reads --------------------------------------------------------------------------------------

UNREAD = {  # flags by who reads them, typed out: a new field has to be thought of here
    "nobody": "max_critique_tokens critic_url critic_model critique_request critique_template train_tests since until gpus "
              "gpu_memory server_timeout epochs unsafe_sandbox",  # in a plain run on toy/trace
    "teacher": "teacher_probe feedback borrow passed_text max_teacher_tokens beta teacher solution_template feedback_template "
               "closing_line",
    "solution": "solution_template", "ema": "ema_rate", "distils": "divergence top_k", "ratio": "ratio_limit",
    "e_step": "e_step_every e_minibatch_prompts e_lr e_optimizer e_groups e_failures shift_rate prior",
    "gradient": "divide_by_std clip_low clip_high dual_clip", "hybrid": "w_opd w_rl",
    "reweight": "reweight_lam reweight_steps reweight_clip", "its own": "divergence divide_by_std",
    "served judge": "judge_model max_judge_tokens",
}  # fmt: skip
REFUSED = {
    "vpd": ["solution", "ema", "ratio", "gradient", "hybrid", "reweight"],
    "sdpo": ["solution", "e_step", "gradient", "hybrid", "reweight"],
    "grpo": ["teacher", "ema", "e_step", "distils", "ratio", "hybrid", "reweight"],
    "joint": ["solution", "e_step", "reweight"],
    "reshape": ["solution", "e_step", "distils", "ratio", "reweight"],
    "reweight": ["solution", "e_step", "distils", "ratio", "hybrid"],
    "distil": ["solution", "its own", "e_step", "hybrid", "reweight"],
    "ovd": ["solution", "ema", "e_step", "distils", "ratio", "hybrid", "reweight", "served judge"],
}  # fmt: skip


def refusal_of(cfg) -> str:
    try:
        settings.check(cfg)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("method", REFUSED)
def test_every_flag_changes_the_run_or_is_refused(method):
    loop, refused = LOOPS.get(method, vpd), set()
    for field in dataclasses.fields(loop.Config):
        cfg = parsed(loop=loop, method=method, subset="trace")
        cfg.given = {field.name}
        if field.default == "":  # as a value it is the default, which is never refused
            setattr(cfg, field.name, "x")
        if refusal := refusal_of(cfg):
            assert f"--{field.name} is for " in refusal and refusal.endswith(": this run would ignore it")
            refused.add(field.name)
    assert refused == {name for key in ["nobody", *REFUSED[method]] for name in UNREAD[key].split()}


def test_a_flag_is_read_where_other_settings_make_it_so():
    for flags in ("--feedback critique --max_critique_tokens 9", "--method sdpo --ema_rate 0.5", "--teacher ema --ema_rate 0.5",
                  "--plan --gpus 2", "--task lcb --since 2025-01-01", "--critic_url "):  # fmt: skip
        assert refusal_of(parsed(*flags.split(" "))) == "", flags


# ---- --help and --resume -----------------------------------------------------------------------------------------


def test_help_is_quick_lists_every_flag_once_by_heading_and_shows_preset_values():
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-m", "neighbours.distil", "--task", "sciknoweval", "--help"], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"COLUMNS": "120"})  # fmt: skip
    assert done.returncode == 0 and resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 3
    named, told = re.findall(r"^  --(\w+)", done.stdout, re.MULTILINE), " ".join(done.stdout.split())
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(distil.Config))
    heads = re.findall(r"^(\S.*):$", done.stdout, re.MULTILINE)
    assert len(heads) == len(set(heads)) > 8 and {"E-step", "DistIL"} <= {*heads}
    assert "learning rate of the M-step [5e-05]" in told and "[True]; --no_borrow turns it off" in told


@pytest.mark.parametrize(
    "config, flags, words",
    [(None, "", "config.json is not the configuration of a run: No such file"), ("3", "", "TypeError"),
     ("{", "", "JSONDecodeError"), ('{"task": "toy"}', "", "a run: it lacks "), ("[]", "", "a run: it lacks task"),
     ({"model": 3}, "", "its model is 3"), ({"steps": "two"}, "", "its steps is 'two'"),
     ({"eval_top_p": None}, "", "its eval_top_p is None"), ({"lr": "two"}, "", "argument --lr: invalid float value: 'two'"),
     ({"method": "distil"}, "", "argument --method: invalid choice: 'distil'"),
     ({}, "--lr 0.25 --seed 1", "these differ: --lr 0.25 (was 0.5), --seed 1 (was 0)"),
     ({}, "--lr 0.5 --track wandb --overwrite", None),
     ({"model": f"{ROOT}/tests", "data": f"{ROOT}/README.md"}, "--model tests --data README.md", None)],
)  # fmt: skip
def test_a_run_goes_on_with_its_own_settings_and_no_others(config, flags, words, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    if isinstance(config, dict):  # changes of a run's own
        config = json.dumps(dataclasses.asdict(parsed(task="math", lr=0.5)) | {"commit": "unknown"} | config)
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    argv = ["--out", str(tmp_path), "--resume", *flags.split()]
    if words is None:
        cfg = parsed(*argv)
        assert (cfg.task, cfg.lr, cfg.top_k, cfg.resume) == ("math", 0.5, 0, True)
        return
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error
