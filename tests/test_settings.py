"""Settings: presets against the paper's tables, what overrides what, and what is refused."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from harness import settings
import vpd

ROOT = Path(__file__).parent.parent


def test_presets_are_the_papers_tables():
    """Tables D.1, D.2 and D.4, typed here a second time."""
    names = ("model", "lr", "prompts_per_batch", "group_size", "max_prompt_tokens", "max_response_tokens", "minibatch_prompts",
             "top_k", "divergence", "ema_rate", "e_step_every", "e_minibatch_prompts", "beta", "warmup_steps")  # fmt: skip
    table = {
        "lcb": ("Qwen/Qwen3-8B", 1e-6, 32, 8, 2048, 8192, 1, 20, "kl_student_teacher", 0.01, 5, 32, 0.1, 0),
        "sciknoweval": ("Qwen/Qwen3-8B", 1e-5, 32, 8, 2048, 8192, 32, 100, "js", 0.05, 5, 32, 0.1, 10),
        "math": ("Qwen/Qwen3-8B", 5e-6, 32, 8, 2048, 8192, 32, 0, "kl_teacher_student", 0.05, 5, 32, 0.1, 10),
    }
    for task, values in table.items():
        cfg = settings.parse(["--task", task])
        assert tuple(getattr(cfg, name) for name in names) == values, task
    for task in table:
        cfg = settings.parse(["--task", task])
        assert (cfg.adam_beta1, cfg.adam_beta2, cfg.weight_decay, cfg.max_grad_norm) == (0.9, 0.999, 0.01, 1.0)
        assert (cfg.temperature, cfg.top_p, cfg.eval_temperature, cfg.eval_top_p) == (1.0, 1.0, 0.6, 0.95)
        assert (cfg.schedule, cfg.max_teacher_tokens) == ("constant", 10240)
    lengths = [(settings.parse(["--task", t]).epochs, settings.parse(["--task", t]).steps) for t in table]
    assert lengths == [(30, 0), (0, 500), (0, 200)]
    distil = [settings.parse(["--task", t, "--method", "distil"]) for t in table]
    assert [(cfg.lr, cfg.top_k) for cfg in distil] == [(1e-6, 100), (5e-5, 100), (5e-6, 100)]
    feedbacks = [settings.parse(["--task", t]).feedback for t in table]
    assert feedbacks == ["solution_first", "sibling", "sibling"]


@pytest.mark.parametrize("task", settings.PRESETS)
def test_every_preset_passes_its_own_checks(task):
    for method in settings.METHODS:
        settings.check(settings.parse(["--task", task, "--method", method]))


def test_a_flag_overrides_the_preset_and_the_preset_the_default():
    assert settings.parse(["--task", "math"]).lr == 5e-6
    assert settings.parse(["--task", "math", "--lr", "0.5"]).lr == 0.5
    assert settings.parse(["--no_borrow"]).borrow is False and settings.parse([]).borrow is True


def test_the_regimes_of_trace_take_its_settings_and_their_own_model():
    for method in ("vpd", "sdpo", "grpo"):
        trace = vars(settings.parse(["--method", method]))
        for subset, model in (("rare", "trace"), ("often", "trace-often"), ("cold", "trace-cold")):
            other = vars(settings.parse(["--method", method, "--subset", f"trace-{subset}"]))
            differ = {name for name in trace if trace[name] != other[name]}
            assert other["model"] == f"tasks/toy_models/{model}"
            assert differ <= {"subset", "model"} | ({"lr", "e_lr"} if subset == "often" else set())  # often has its own


SERVED = ["--method", "distil", "--expert", "served", "--expert_url", "http://localhost:1", "--expert_model", "m"]
has_vllm = importlib.util.find_spec("vllm") is not None
IMPOSSIBLE = [
    (["--group_size", "1", "--method", "grpo"], "group_size"),
    (["--group_size", "1", "--feedback", "sibling"], "group_size"),
    (["--minibatch_prompts", "5"], "minibatch_prompts"),
    (["--e_minibatch_prompts", "7"], "e_minibatch_prompts"),
    (["--prompts_per_batch", "0"], "prompts_per_batch"),
    (["--lr", "-1"], "lr"),
    (["--lr", "nan"], "lr"),
    (["--ema_rate", "1.5"], "ema_rate"),
    (["--shift_rate", "0"], "shift_rate"),
    (["--temperature", "0"], "temperature"),
    (["--top_p", "0"], "top_p"),
    (["--steps", "0", "--epochs", "0"], "steps"),
    (["--method", "grpo", "--teacher", "ema"], "teacher"),
    (["--feedback_template", "no hole"], "feedback"),
    (["--feedback", "both", "--no_borrow"], "no_borrow"),
    (["--no_borrow"], "no_borrow"),
    (["--teacher_probe", "-1"], "--teacher_probe"),
    (["--expert", "samples"], "--method distil"),
    (["--passed_text", "well done", "--feedback", "sibling"], "--passed_text"),
    (["--passed_text", "well done", "--method", "grpo"], "--passed_text"),
    (["--max_teacher_tokens", "20"], "max_teacher_tokens"),
    (["--top_k", "100000"], "top_k"),
    (["--max_prompt_tokens", "3"], "prompts_per_batch"),
    (["--model", "no/such/folder"], "no/such/folder"),
    (["--subset", "chess"], "chess"),
    (["--task", "lcb"], "bash run.sh lcb --smoke"),
    (["--task", "math"], "bash run.sh toy"),
    (["--smoke", "qwen3"], "--smoke"),
    (["--adam_beta1", "1"], "--adam_beta1 must be below 1"),
    (["--adam_beta2", "1"], "--adam_beta2 must be below 1"),
    (["--task", "sciknoweval", "--smoke", "qwen3", "--feedback", "environment"], "sciknoweval/all has critique"),
    (["--task", "lcb", "--smoke", "qwen3", "--feedback", "critique"], "lcb/v6 has environment"),
    (["--task", "lcb", "--smoke", "qwen3", "--since", "2026-01-01", "--until", "2026-02-01"], "0 of 5 problems"),
    (["--task", "lcb", "--smoke", "qwen3", "--since", "May"], "--since"),
    (["--task", "math", "--smoke", "qwen3", "--data", "no/such/folder"], "no/such/folder"),
    (["--data", "tests"], "--data"),
    (["--critic_url", "http://localhost:1"], "--critic_model"),
    (["--critic_url", "http://localhost:1", "--critic_model", "m"], "--feedback critique"),
    (["--method", "ovd", "--group_size", "1"], "gives no advantage"),
    (["--method", "ovd", "--ovd_threshold", "-1"], "--ovd_threshold"),
    (["--method", "ovd", "--judge_url", "http://localhost:1"], "--judge_model"),
    (["--method", "ovd", "--judge_model", "m"], "--judge_url"),
    (["--method", "ovd", "--judge_request", "no hole"], "judge"),
    (["--method", "ovd", "--max_judge_tokens", "0"], "--max_judge_tokens"),
    (["--method", "ovd", "--expert", "samples"], "--method distil"),
    (["--method", "ovd", "--max_teacher_tokens", "20"], "max_teacher_tokens"),
    (["--method", "ovd", "--feedback", "critique", "--subset", "trace", "--max_critique_tokens", "0"], "critique"),
    (["--method", "grpo", "--judge_url", "http://localhost:1", "--judge_model", "m"], "--method ovd"),
    (["--method", "distil", "--expert", "served"], "--expert_url"),
    (["--method", "distil", "--expert_url", "http://localhost:1"], "--expert_model"),
    (["--method", "distil", "--expert_url", "http://localhost:1", "--expert_model", "m"], "--expert served"),
    ([*SERVED, "--method", "vpd"], "--method distil"),
    ([*SERVED, "--teacher", "ema"], "--teacher ema"),
    ([*SERVED, "--expert_places", "0"], "--expert_places"),
    (["--mismatch_limit", "-1"], "--mismatch_limit"),
    (["--mismatch_limit", "two"], "--mismatch_limit"),
    (["--engine_memory", "1.5"], "--engine_memory"),
    (["--checkpoint_every", "-1"], "--checkpoint_every"),
    pytest.param(["--sampler", "vllm"], "vllm is not installed", marks=pytest.mark.skipif(has_vllm, reason="it is")),
    (["--no_such_flag", "1"], "no_such_flag"),
    (["--method", "ppo"], "ppo"),
    (["--lr", "fast"], "lr"),
    (["--method", "ovd", "--judge_url", "localhost:8000/v1", "--judge_model", "m"], "http://"),
    (["--method", "ovd", "--ovd_threshold", "50"], "--ovd_threshold"),
]


@pytest.mark.parametrize("argv, words", IMPOSSIBLE, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_impossible_settings_are_one_line_exit_2_and_nothing_written(argv, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        vpd.main([*argv, "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "url",
    ["http://me:hunter2@host/v1", "http://hunter2@host/v1", "http://host/v1?key=hunter2", "http://host/v1#hunter2"],
)
@pytest.mark.parametrize("who", ["critic", "judge", "expert"])
def test_a_secret_in_a_url_is_refused_and_not_repeated(who, url, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        vpd.main([f"--{who}_url", url, f"--{who}_model", "m", "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and not (tmp_path / "run").exists()
    assert f"--{who}_url" in error and "OPENAI_API_KEY" in error and "hunter2" not in error


def test_a_server_that_is_not_there_is_one_line_exit_2_and_nothing_written(tmp_path, capsys):
    flags = ["--method", "ovd", "--judge_url", "http://127.0.0.1:9/v1", "--judge_model", "m", "--server_timeout", "1"]
    with pytest.raises(SystemExit) as stop:
        vpd.main([*flags, "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert error.count("\n") == 1 and "--judge_url http://127.0.0.1:9/v1 with --judge_model m does not answer" in error


def test_ovd_takes_the_toy_model_that_judges_and_any_that_is_asked_for():
    assert settings.parse(["--method", "ovd"]).model == "tasks/toy_models/code-judge"
    assert settings.parse(["--method", "ovd"]).subset == "code-judge"
    assert settings.parse(["--method", "ovd", "--subset", "trace"]).model == "tasks/toy_models/trace"
    assert settings.parse([]).subset == "trace"


def test_a_network_whose_tokenizer_has_no_digits_cannot_judge(tmp_path, capsys):
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, "<unk>")),
        unk_token="<unk>",
        eos_token="<eos>",
    )
    shutil.copytree(ROOT / "tasks" / "toy_models" / "choice", tmp_path / "mute", ignore=lambda *_: ["chat_template.jinja"])
    words.save_pretrained(tmp_path / "mute")
    flags = ["--subset", "choice", "--model", str(tmp_path / "mute"), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        vpd.main([*flags, "--method", "ovd"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and not (tmp_path / "run").exists()
    assert "each digit" in error and "--judge_url" in error


def test_help_lists_the_settings(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "vpd.py"), "--help"], cwd=tmp_path, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0 and "--e_step_every" in done.stdout


@pytest.mark.parametrize(
    "config, words",
    [(None, "has checkpoints and no config.json"), ("{}", "does not hold the settings"), ("3", "does not hold the settings"),
     ('{"task": "toy"}', "does not hold the settings"), ("{", "is not JSON")],
)  # fmt: skip
def test_a_run_that_lost_its_settings_does_not_go_on_with_others(config, words, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(SystemExit) as stop:
        settings.parse(["--method", "grpo", "--out", str(tmp_path), "--resume"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error


def test_toy_models_are_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings.parse([]).model == str(ROOT / "tasks" / "toy_models" / "trace")
    (tmp_path / "toy_models" / "trace").mkdir(parents=True)
    assert settings.parse([]).model == "tasks/toy_models/trace"


def test_help_says_what_each_setting_is_and_the_presets_value(capsys):
    with pytest.raises(SystemExit) as stop:
        settings.parse(["--task", "sciknoweval", "--method", "distil", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "of the M-step; e_lr is the E-step's (default: 5e-05)" in told  # DistIL's on sciknoweval
    bare = [action.dest for action in settings.flags()._actions if not re.search("[a-z]", action.help)]
    assert bare == []
    assert "turns --borrow off --" in told  # its default is said beside --borrow alone
