"""Presets of toy runs, runs on one GPU and smoke runs. The paper's presets are in vpd.py."""

from pathlib import Path

from tasks import toy

FIXTURES = Path(__file__).parents[1] / "tasks" / "fixtures"

# Ours, for models of 0.23M parameters on one CPU core: a run takes minutes.
TOY = dict(
    model="tasks/toy_models/trace", epochs=0, steps=30, eval_every=10, teacher_probe=32, prompts_per_batch=12,
    max_prompt_tokens=256, max_response_tokens=100, max_teacher_tokens=512, max_critique_tokens=16, adam_beta2=0.95,
    weight_decay=0.0, minibatch_prompts=12, lr=1e-3, feedback="environment", e_minibatch_prompts=12, e_lr=5e-4,
    shift_rate=0.5, divergence="js", top_k=0,
    ema_rate=0.05, eval_temperature=1.0, eval_top_p=1.0, solution_template=toy.TEMPLATES.solution,
    feedback_template=toy.TEMPLATES.feedback, critique_template=toy.TEMPLATES.critique, closing_line=toy.TEMPLATES.closing,
    critique_request=toy.TEMPLATES.request,
)  # fmt: skip
# Ours, by the memory plan: Qwen3-0.6B on a GPU of 24 GB, Qwen3-1.7B on one of 80 GB. Each batch makes one update.
ONE_GPU = dict(
    model="Qwen/Qwen3-0.6B", lr=5e-6, epochs=0, steps=100, prompts_per_batch=16, minibatch_prompts=16, e_minibatch_prompts=16,
    max_prompt_tokens=1024, max_response_tokens=1024, max_teacher_tokens=3072, micro_batch_tokens=8192, teacher_probe=32,
)  # fmt: skip
# From rlhf-book's SDPO (github.com/natolambert/rlhf-book, code/distillation), for the settings that both have.
REASONING_GYM = ONE_GPU | dict(
    model="Qwen/Qwen3-1.7B", lr=1e-6, steps=200, max_prompt_tokens=512, max_response_tokens=512, max_teacher_tokens=1024,
    feedback="sibling", eval_every=20,
)  # fmt: skip
# Chosen on validation problems: for trace (vpd: among settings with a live teacher) and code by study/results/tuning.json, for the
# others at an earlier commit, with equally many settings for each method. A variant of trace overrides trace's settings.
TOY_SUBSETS = {
    "code": {"model": "tasks/toy_models/code"},
    "choice": {"model": "tasks/toy_models/choice", "feedback": "sibling"},
    "trace-often": {"model": "tasks/toy_models/trace-often"},
    "code-judge": {"model": "tasks/toy_models/code-judge"},
    ("trace", "sdpo"): {"lr": 2e-3, "divergence": "kl_student_teacher", "ema_rate": 0.2},
    ("trace", "grpo"): {"lr": 3e-3, "divide_by_std": True},
    ("trace", "joint"): {"lr": 2e-3, "ema_rate": 0.2, "divide_by_std": True, "w_opd": 3.0},
    ("trace", "reshape"): {"lr": 2e-3, "ema_rate": 0.2},
    ("trace", "reweight"): {"lr": 2e-3, "divide_by_std": True, "reweight_lam": 0.25},
    ("code", "vpd"): {"divergence": "kl_student_teacher", "e_lr": 1e-3, "teacher": "ema", "ema_rate": 0.5},
    ("code", "sdpo"): {"lr": 2e-3, "divergence": "kl_student_teacher"},
    ("code", "grpo"): {"lr": 3.5e-3},
    ("code", "joint"): {"lr": 4e-3, "divergence": "kl_teacher_student", "w_opd": 0.3},
    ("code", "reshape"): {"lr": 2e-3, "divide_by_std": True, "w_opd": 0.3},
    ("code", "reweight"): {"lr": 4e-3, "ema_rate": 0.2, "reweight_lam": 1.0},
    ("trace", "distil"): {"lr": 2e-3},
    ("code", "distil"): {"lr": 2e-3},
    ("code", "ovd"): {"lr": 2e-3, "divide_by_std": True},
    ("code-judge", "grpo"): {"lr": 2e-3, "divide_by_std": False},
    ("trace-often", "sdpo"): {"lr": 2e-3},
    ("trace-often", "grpo"): {"lr": 1e-3},
    ("choice", "sdpo"): {"lr": 3e-3},
    ("choice", "grpo"): {"lr": 2e-3, "divide_by_std": True},
}
# What --smoke changes of a real task's preset: sizes, never the method.
SMOKE = dict(
    epochs=0, steps=2, warmup_steps=0, eval_every=2, eval_samples=2, prompts_per_batch=4, e_minibatch_prompts=4,
    minibatch_prompts=4, lr=1e-3, max_response_tokens=48, max_teacher_tokens=6000, max_critique_tokens=24, e_step_every=1,
)  # fmt: skip
SMOKE_TASKS = {
    "lcb": {"data": "lcb.jsonl", "minibatch_prompts": 2},
    "sciknoweval": {"data": "sciknoweval.jsonl", "subset": "all"},
    "math": {"data": ""},
    "reasoning_gym": {"data": "reasoning_gym.json"},
}


def of(tasks: dict[str, dict], given: dict) -> dict:
    """The preset of a command, by the flags given: that of its task (a row of `tasks`), subset and method."""
    task, method = given.get("task", "toy"), given.get("method", "vpd")
    found = dict(tasks[task])
    if task == "toy":
        subset = given.get("subset") or ("code-judge" if method == "ovd" else "trace")  # this model has learned to judge
        regime = subset.split("-")[0]
        for key in (regime, (regime, method), subset, (subset, method)):
            found |= TOY_SUBSETS.get(key, {})
        found["subset"] = subset
    elif given.get("smoke") and task in SMOKE_TASKS:
        found |= SMOKE | SMOKE_TASKS[task] | {"data": str(FIXTURES / SMOKE_TASKS[task]["data"])}
    return found
