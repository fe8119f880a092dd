"""Variational Policy Distillation (VPD, arXiv 2605.15113v1): the EM loop, and the baselines that share it.

One network, two prompts: the student pi_theta(y|x), and the teacher q_phi(y|x,C), the same weights shown the feedback C.
Per rollout batch k = 0, 1, 2, ... (Algorithm 1, App. D.6; the banners below carry the same numbers):

    1. y ~ pi_theta(.|x), G rollouts for each of B prompts
    2. outcome r(x, y) in {0, 1} from the verifier, context C from a feedback source
    3. freeze log pi_theta(y|x)
    4. E-step, if k % F == 0: teach the teacher to tell success from failure
           r~ = beta (log q_phi(y|x,C) - log pi_theta(y|x))                                               (Eq. 7)
           L_E = - mean_{r=1} log sigmoid(r~ - delta) - mean_{r=0} log sigmoid(-(r~ - delta))              (Eq. 9)
    5. M-step: distil the teacher into the student on the same rollouts
           L_M = E_y sum_t KL(pi_theta(.|x,y_<t) || sg q_phi(.|x,C,y_<t))                                  (Eq. 10)
    6. push the weights to the sampler

Where we depart from the paper's text, or had to choose:

    1. Eq. 10 prints a sum over t; the loss is the mean over a row's tokens, as in the code its learning rates come from.
    2. delta moves by shift_rate (0.1) per E-step; Algorithm 1 as printed is --shift_rate 1.
    3. A success needs a context too. Where the paper is silent it borrows a failure's (feedback.py; --no_borrow).
    4. The E-step uses groups in which both outcomes have a context; --e_groups all is the paper's literal text.
    5. F counts rollout batches (App. D.6), not gradient updates (Sec. 4).
    6. The M-step's teacher is the network's live weights at each update; --teacher ema takes SDPO's moving average.
    7. VPD's M-step carries no importance weights (Sec. 3.4); SDPO's carries min(pi/pi_old, 2).
    8. An update in which no row takes part (no context, no advantage) is left out, momentum and weight decay included.
    9. Where vLLM samples, a token of the M-step weighs min(pi_old/pi_sampler, 2) for the gap between the two engines, as in
       SDPO's code; --mismatch_limit none turns it off.
   10. OVD: the threshold is 5; a demonstration is graded like a rollout and counts if it fails (--no_ovd_failed); a judge
       that gives a digit no more than half of its probability has named none, and the rollout stays.
"""

import copy
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import torch
from scipy import stats
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging as hf_logging

import checkpoint
import evaluate
import feedback
import losses
import plan
import tasks
import toy
from policy import Policy, World, ema_update
from reviews import Reviews
from rollout import StaleEngine, open_sampler, seed_for


class Method(NamedTuple):
    """What a method needs. teacher: whose weights read the context ("": nobody's); distils: the divergence to the teacher
    is a loss; reinforces: the clipped policy gradient on outcomes is a loss; replaces: the teacher writes whole responses
    instead of scoring the student's token by token."""

    teacher: str
    distils: bool
    reinforces: bool
    replaces: bool = False


METHODS = {
    "vpd": Method("live", distils=True, reinforces=False),
    "sdpo": Method("ema", distils=True, reinforces=False),
    "grpo": Method("", distils=False, reinforces=True),
    "joint": Method("ema", distils=True, reinforces=True),  # B.23
    "reshape": Method("ema", distils=False, reinforces=True),  # B.24
    "reweight": Method("ema", distils=False, reinforces=True),  # B.28
    "distil": Method("ema", distils=True, reinforces=False),  # DistIL (2606.05152)
    "ovd": Method("live", distils=False, reinforces=True, replaces=True),  # OVD (2601.21968), first version
}


WORDS = feedback.Templates()


@dataclass
class Config:
    """Every setting, with the value of the paper's Table D.1 (lcb) as its default. PRESETS holds what other tasks change;
    a flag on the command line overrides both. What was used is printed at the start and saved as config.json."""

    # ---- Run
    task: Literal["toy", "lcb", "sciknoweval", "math"] = "toy"
    subset: str = ""  # toy: trace, code or choice; sciknoweval: a domain or all; "" is the task's first
    data: str = ""  # file or folder of the task's source; "": the hub (tasks.py says what each takes)
    train_tests: Literal["private", "public"] = (
        "private"  # lcb: private is SDPO's seeded half, public the paper's words
    )
    since: str = "2025-02-01"  # lcb: since <= contest_date < until, 131 problems
    until: str = "2025-05-01"
    smoke: Literal["", "qwen3", "olmo3"] = (
        ""  # 2 batches of a tiny random model of this family on the project's fixtures
    )
    method: Literal["vpd", "sdpo", "grpo", "joint", "reshape", "reweight", "distil", "ovd"] = "vpd"
    seed: int = 0
    out: str = ""  # run directory; "" is runs/TASK-METHOD-seedN
    overwrite: bool = False  # delete the run directory if it exists
    resume: bool = False  # go on from the run directory's last checkpoint; starts the run if there is none
    checkpoint_every: int = 10  # rollout batches; the last two are kept. 0: when the run ends or is told to (SIGTERM)
    epochs: int = 30  # passes over the training problems, when steps is 0
    steps: int = 0  # rollout batches; 0: by epochs
    log_samples: int = 8  # rollouts written to samples.jsonl per batch
    # ---- Plan: what the run needs, printed before it starts
    plan: bool = False  # print it and end; needs the model's config alone
    gpus: int = 0  # to plan for; 0: those here
    gpu_memory: float = 0.0  # GB of each; 0: that of the GPUs here, a CPU where there is none
    # ---- Evaluation on validation problems
    eval_every: int = 10  # rollout batches; 0: never
    eval_samples: int = 4  # per problem: avg@4
    eval_temperature: float = 0.6  # SDPO's
    eval_top_p: float = 0.95  # SDPO's
    teacher_probe: int = 0  # base failures on which the teacher's pass rate is measured at every evaluation
    # ---- Model
    model: str = "Qwen/Qwen3-8B"  # folder or hub id
    dtype: Literal["float32", "float64"] = "float32"  # of the weights
    micro_batch_tokens: int = 20480  # padded tokens in one forward pass; changes speed and memory, never the update
    # ---- Rollouts
    prompts_per_batch: int = 32
    group_size: int = 8  # rollouts per prompt, G
    max_prompt_tokens: int = 2048  # longer problems are dropped and counted
    max_response_tokens: int = 8192
    temperature: float = 1.0
    top_p: float = 1.0
    sampler: Literal["", "vllm", "hf"] = ""  # "": vLLM on a GPU, transformers' generate on a CPU
    engine_memory: float = 0.0  # vLLM's share of the GPU's memory while it samples; 0: what the plan leaves it
    # ---- Optimizer (AdamW)
    lr: float = 1e-6
    warmup_steps: int = 0  # rollout batches
    schedule: Literal["constant", "linear"] = "constant"  # linear: falls to 0 over the run
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    minibatch_prompts: int = 1  # prompts per M-step update: 32 updates per batch
    # ---- Feedback
    feedback: Literal["environment", "sibling", "critique", "solution_first", "both"] = "solution_first"
    borrow: bool = True  # a success borrows a failing sibling's text
    passed_text: str = ""  # a success sees this text instead, which gives its label away (ablation)
    max_teacher_tokens: int = 10240  # of the teacher's prompt; beyond it the context is cut
    max_critique_tokens: int = 512
    critic_url: str = ""  # critiques from an OpenAI-compatible server (key: OPENAI_API_KEY); "": the student itself
    critic_model: str = ""
    server_timeout: float = 60.0  # seconds, of every server; two retries
    solution_template: str = WORDS.solution
    feedback_template: str = WORDS.feedback
    critique_template: str = WORDS.critique
    closing_line: str = WORDS.closing
    critique_request: str = WORDS.request
    judge_request: str = WORDS.judge
    # ---- E-step (vpd)
    e_step_every: int = 5  # F, in rollout batches
    e_minibatch_prompts: int = 32  # the whole batch: one update
    e_lr: float = 0.0  # 0: lr
    e_optimizer: Literal["shared", "own"] = "shared"  # AdamW state; the paper: one network, one optimizer
    e_groups: Literal["mixed", "all"] = "mixed"
    beta: float = 0.1
    shift_rate: float = 0.1  # the paper gives none
    prior: Literal["dynamic", "fixed"] = "dynamic"  # fixed: the initial weights (ablation)
    # ---- Distillation
    divergence: Literal["kl_student_teacher", "kl_teacher_student", "js"] = "kl_student_teacher"
    top_k: int = 20  # of the student, plus a tail bucket; 0: all of V
    teacher: Literal["", "live", "ema"] = ""  # "": the method's own, see METHODS
    ema_rate: float = 0.01  # teacher <- (1 - rate) teacher + rate student, per rollout batch
    ratio_limit: float = 2.0  # SDPO's truncated token weight
    mismatch_limit: str = "2"  # SDPO's weight min(pi_old / pi_sampler, limit) when vLLM samples; none: no weight
    # ---- DistIL: cross-entropy to the teacher, and each token charged with the cross-entropy of those after it
    distil_norm: Literal["length", "constant"] = "length"  # constant: exact where C does not depend on y
    future: bool = True  # --no_future: the local term alone (ablation)
    expert: Literal["probabilities", "samples", "served"] = "probabilities"  # samples: the teacher as a black box
    expert_url: str = ""  # served: an OpenAI-compatible server's completions take the teacher's place
    expert_model: str = ""
    expert_places: int = 16  # served: tokens of a response at which it is asked, at random
    # ---- OVD: what a judge rejects is replaced by a demonstration
    ovd_threshold: float = 5.0  # of the judge's score, 0 to 9; the paper's is not known to us
    ovd_ratio: Literal["teacher", "one"] = "teacher"  # pi_old of a demonstration: as the teacher sampled it, or sg pi
    ovd_failed: bool = True  # a demonstration that fails takes the place as well; --no_ovd_failed: the rollout stays
    judge_url: str = ""  # scores from an OpenAI-compatible server; "": the student itself, by its digits' probabilities
    judge_model: str = ""
    max_judge_tokens: int = 16  # of a served judge's reply
    # ---- Policy gradient and hybrids
    divide_by_std: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    w_opd: float = 1.0  # joint, reshape; the paper gives none
    w_rl: float = 1.0
    reweight_lam: float = 0.5  # RLSD's; falls linearly to 0 over reweight_steps
    reweight_steps: int = 50
    reweight_clip: float = 0.2  # RLSD's eps_w

    def templates(self):
        texts = (self.solution_template, self.feedback_template, self.critique_template)
        return type(WORDS)(*texts, self.closing_line, self.critique_request, self.judge_request)

    def reader(self) -> str:
        """Whose weights read the context: live, ema, or "" for nobody's here."""
        return "" if self.expert == "served" else self.teacher or METHODS[self.method].teacher


PRESETS = {
    "lcb": {},  # Table D.1
    "sciknoweval": dict(  # Table D.2; OLMo3-7B: --lr 5e-6
        model="Qwen/Qwen3-8B", lr=1e-5, epochs=0, steps=500, warmup_steps=10, minibatch_prompts=32, top_k=100,
        divergence="js", ema_rate=0.05, feedback="sibling", eval_every=25, eval_samples=16,
    ),
    "math": dict(  # Table D.4
        model="Qwen/Qwen3-8B", lr=5e-6, epochs=0, steps=200, warmup_steps=10, minibatch_prompts=32, top_k=0,
        divergence="kl_teacher_student", ema_rate=0.05, feedback="sibling", eval_every=20,
    ),
    "toy": dict(  # ours: a 0.23M-parameter model, one CPU core, minutes
        epochs=0, steps=30, eval_every=10, eval_temperature=1.0, eval_top_p=1.0, teacher_probe=32, prompts_per_batch=12,
        max_prompt_tokens=256, max_response_tokens=100, max_teacher_tokens=512, max_critique_tokens=16,
        adam_beta2=0.95, weight_decay=0.0, minibatch_prompts=12, lr=1e-3, feedback="environment",
        e_minibatch_prompts=12, e_lr=5e-4, e_optimizer="own", shift_rate=0.5,
        divergence="js", top_k=0, ema_rate=0.05,
        solution_template=toy.TEMPLATES.solution, feedback_template=toy.TEMPLATES.feedback,
        critique_template=toy.TEMPLATES.critique, closing_line=toy.TEMPLATES.closing, critique_request=toy.TEMPLATES.request,
        judge_request=toy.TEMPLATES.judge,
    ),
}  # fmt: skip
# Chosen on validation problems, seed 0, with as many settings for each method of a subset (results/README.md). trace-rare and
# trace-cold keep trace's settings, hybrids are tuned on code alone, and OVD and GRPO on code-judge, whose others are code's.
TOY_PRESETS = {
    "trace": {"model": "toy_models/trace"},
    "code": {"model": "toy_models/code"},
    "choice": {"model": "toy_models/choice", "feedback": "sibling"},
    "trace-rare": {"model": "toy_models/trace"},
    "trace-often": {"model": "toy_models/trace-often"},
    "trace-cold": {"model": "toy_models/trace-cold"},
    "code-judge": {"model": "toy_models/code-judge"},
    ("trace", "sdpo"): {"divergence": "kl_student_teacher"},
    ("trace", "grpo"): {"lr": 2e-3, "divide_by_std": True},
    ("code", "vpd"): {"lr": 6e-4, "e_lr": 1e-3, "e_step_every": 1},
    ("code", "sdpo"): {"lr": 2e-3},
    ("code", "grpo"): {"lr": 3e-3, "divide_by_std": True},
    ("code", "joint"): {"lr": 2e-3, "divide_by_std": True},
    ("code", "reshape"): {"lr": 2e-3, "divide_by_std": True, "w_opd": 0.1},
    ("code", "reweight"): {"lr": 2e-3, "divide_by_std": True},
    ("trace", "distil"): {"lr": 2e-3},
    ("code", "distil"): {"lr": 2e-3},
    ("code", "ovd"): {"lr": 2e-3, "divide_by_std": True},
    ("code-judge", "grpo"): {"lr": 2e-3, "divide_by_std": False},
    ("trace-often", "sdpo"): {"lr": 2e-3},
    ("trace-often", "grpo"): {"lr": 1e-3},
    ("choice", "sdpo"): {"lr": 3e-3},
    ("choice", "grpo"): {"lr": 2e-3, "divide_by_std": True},
}
# DistIL's own settings: its learning rate where SDPO's is 1e-5, and its top K.
METHOD_PRESETS = {
    ("lcb", "distil"): {"top_k": 100},
    ("sciknoweval", "distil"): {"lr": 5e-5},
    ("math", "distil"): {"top_k": 100},
}
# What --smoke changes of a real task's preset: sizes, never the method.
SMOKE = dict(
    epochs=0, steps=2, warmup_steps=0, eval_every=2, eval_samples=2, prompts_per_batch=4, e_minibatch_prompts=4, lr=1e-3,
    max_response_tokens=48, max_teacher_tokens=6000, max_critique_tokens=24, e_step_every=1,
)  # fmt: skip


# Settings of a command rather than of the run it starts or goes on with.
NOT_OF_THE_RUN = ("out", "resume", "overwrite", "plan", "gpus", "gpu_memory")


# ---- Settings ----------------------------------------------------------------------------------------------


def fail(message: str) -> None:
    """One line on what was wrong, exit status 2."""
    rank = os.environ.get("RANK", "0")
    print(
        f"vpd.py: error: {f'process {rank}: ' if rank != '0' else ''}{' '.join(str(message).split())}", file=sys.stderr
    )
    sys.exit(2)


class Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        fail(f"{message} (python vpd.py --help lists the settings)")


def parse(argv: list[str] | None = None) -> Config:
    """Flags over the preset of (task, subset, method) over the defaults of Config."""
    parser = Parser(Config, description="Variational Policy Distillation and its baselines.", allow_abbrev=False)
    chosen, _ = parser.parse_known_args(argv)
    preset = PRESETS[chosen.task] | METHOD_PRESETS.get((chosen.task, chosen.method), {})
    if chosen.task == "toy":
        subset = chosen.subset or tasks.TASKS["toy"][0]
        # The regimes of trace take its settings, and then their own.
        for key in (subset.split("-")[0], (subset.split("-")[0], chosen.method), subset, (subset, chosen.method)):
            preset |= TOY_PRESETS.get(key, {})
    elif chosen.smoke:
        preset |= SMOKE | {"data": str(toy.FIXTURES / {"math": ""}.get(chosen.task, f"{chosen.task}.jsonl")),
                           "minibatch_prompts": 2 if chosen.task == "lcb" else 4,
                           "subset": "all" if chosen.task == "sciknoweval" else ""}  # fmt: skip
    parser.set_defaults(**preset)

    def settle() -> Config:
        cfg, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
        if unknown:
            parser.error(f"unknown argument {unknown[0]}")
        cfg.out = cfg.out or f"runs/{cfg.task}-{cfg.method}-seed{cfg.seed}"
        cfg.data = str(Path(cfg.data).resolve()) if cfg.data else ""  # evaluation may start from another folder
        return cfg

    cfg = settle()
    saved = Path(cfg.out) / "config.json"
    if not cfg.resume or not saved.exists():
        return cfg
    # The run's own settings take the preset's place, so what differs from them now was asked for by a flag.
    try:
        kept = json.loads(saved.read_text())
    except ValueError:
        parser.error(f"{saved} is not JSON: --overwrite starts the run again")
    kept = {f.name: kept[f.name] for f in fields(Config) if f.name in kept and f.name not in NOT_OF_THE_RUN}
    parser.set_defaults(**kept)
    cfg = settle()
    changed = [
        f"--{name} {getattr(cfg, name)} (was {value})" for name, value in kept.items() if getattr(cfg, name) != value
    ]
    if changed:
        parser.error(f"--resume goes on with the settings of {saved}, and these differ: {', '.join(changed)}")
    return cfg


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def check(cfg: Config) -> None:
    """Raises ValueError with one line for settings that cannot work together."""
    shares = {"engine_memory", "shift_rate", "ema_rate", "top_p", "eval_top_p", "reweight_lam", "adam_beta1",
              "adam_beta2"}  # fmt: skip
    may_be_zero = {"steps", "epochs", "log_samples", "eval_every", "eval_temperature", "warmup_steps", "weight_decay",
                   "checkpoint_every", "engine_memory", "teacher_probe", "gpus", "gpu_memory", "e_lr", "top_k", "ema_rate", "w_opd", "w_rl", "ovd_threshold",
                   "reweight_lam", "reweight_steps", "adam_beta1"}  # fmt: skip
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if field.type not in (int, float) or field.name == "seed":
            continue
        if not (0 < value < math.inf or value == 0 and field.name in may_be_zero) or (
            field.name in shares and value > 1
        ):
            need = ("0 or " if field.name in may_be_zero else "") + (
                "in (0, 1]" if field.name in shares else "positive"
            )
            raise ValueError(f"--{field.name} must be {need}, not {value}")
    if cfg.steps == 0 and cfg.epochs == 0:
        raise ValueError("--steps and --epochs are both 0: there is nothing to do")
    for name in ("minibatch_prompts", "e_minibatch_prompts"):
        if cfg.prompts_per_batch % getattr(cfg, name):
            raise ValueError(
                f"--{name} {getattr(cfg, name)} does not divide --prompts_per_batch {cfg.prompts_per_batch}"
            )
    method = METHODS[cfg.method]
    if cfg.group_size < 2 and method.reinforces:
        raise ValueError(f"--method {cfg.method} compares rollouts of one prompt: --group_size 1 gives no advantage")
    if cfg.group_size < 2 and method.teacher and cfg.feedback == "sibling":
        raise ValueError("--feedback sibling needs a second rollout of the prompt: --group_size must be at least 2")
    never = cfg.group_size < 2 or (
        not cfg.borrow and not cfg.passed_text and cfg.feedback in ("environment", "critique")
    )
    if cfg.method == "vpd" and cfg.e_groups == "mixed" and never:
        raise ValueError(
            "no success would ever have a context, so the E-step would never run: drop --no_borrow, raise --group_size, "
            "or take --method sdpo --teacher live for the M-step alone"
        )
    if method.teacher and cfg.max_teacher_tokens <= cfg.max_prompt_tokens:
        raise ValueError("--max_teacher_tokens must exceed --max_prompt_tokens: the context needs room")
    if cfg.method == "vpd" and cfg.feedback == "both" and not cfg.borrow:
        raise ValueError(
            "--feedback both with --no_borrow gives failures a text and successes none: the label is given away"
        )
    for who in ("critic", "judge", "expert"):
        url, served = getattr(cfg, f"{who}_url"), getattr(cfg, f"{who}_model")
        if bool(url) != bool(served):
            raise ValueError(
                f"--{who}_url and --{who}_model go together: the server's base URL and the model it serves"
            )
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            raise ValueError(
                f"--{who}_url holds a secret, which would be saved with the run: put the key into OPENAI_API_KEY"
            )
    if cfg.critic_url and (cfg.feedback != "critique" or not method.teacher):
        raise ValueError("--critic_url needs --feedback critique and a method with a teacher")
    if cfg.judge_url and cfg.method != "ovd":
        raise ValueError(f"--judge_url is for --method ovd: {cfg.method} has no judge")
    if bool(cfg.expert_url) != (cfg.expert == "served"):
        raise ValueError("--expert served and --expert_url go together")
    if cfg.passed_text and (cfg.feedback not in ("environment", "critique") or not method.teacher):
        raise ValueError(
            "--passed_text takes the place of a borrowed text: with --feedback environment or critique, and a teacher"
        )
    if cfg.expert != "probabilities" and cfg.method != "distil":
        raise ValueError(
            f"--expert {cfg.expert} is for --method distil: {cfg.method} needs the teacher's probabilities or none"
        )
    if cfg.expert == "served" and cfg.teacher:
        raise ValueError(f"--teacher {cfg.teacher} means nothing to --expert served, which is the teacher")
    if cfg.resume and cfg.overwrite:
        raise ValueError("--resume goes on with a run directory and --overwrite deletes it: give one of them")
    if cfg.mismatch_limit != "none" and not _positive(cfg.mismatch_limit):
        raise ValueError(f"--mismatch_limit must be a positive number or none, not {cfg.mismatch_limit!r}")
    if cfg.smoke and cfg.task == "toy":
        raise ValueError("--smoke is for lcb, sciknoweval and math: the toy tasks run here as they are")
    if cfg.teacher and not method.teacher:
        raise ValueError(f"--teacher {cfg.teacher} means nothing to --method {cfg.method}, which has no teacher")
    if cfg.smoke and cfg.plan:
        raise ValueError("--plan is for the task's own model, which --smoke replaces by a tiny one")
    if (cfg.gpus or cfg.gpu_memory) and not cfg.plan:
        raise ValueError("--gpus and --gpu_memory are for --plan: a run takes the GPUs that torchrun gives it")
    cfg.templates()  # raises ValueError for a template without its hole


# ---- Pieces of a batch ---------------------------------------------------------------------------------------


def batches(problems: list, size: int, steps: int, seed: int):
    """`steps` batches of `size` problems: reshuffled every epoch, the incomplete last batch dropped."""
    per_epoch, order = len(problems) // size, []
    for step in range(steps):
        if step % per_epoch == 0:
            order = random.Random(seed_for(seed, step // per_epoch, "order")).sample(problems, len(problems))
        start = step % per_epoch * size
        yield order[start : start + size]


def watch(task: tasks.Task) -> tuple[list, str]:
    """The problems that training is watched by, and the name of their split."""
    return (task.validation, "validation") if task.validation else (task.test, "test")


def mean(values) -> float | None:
    """The mean of a tensor's or list's finite values, or None if there are none."""
    values = torch.as_tensor(values, dtype=torch.float64)
    values = values[values.isfinite()]
    return values.mean().item() if values.numel() else None


@contextmanager
def weights_of(model, sampler, policy: Policy):
    """The policy with another model's weights, in the sampler as well, which gets its own back. None: the policy itself."""
    if model is None:
        yield policy
        return
    reader = copy.copy(policy)
    reader.model = model
    sampler.sleep()
    sampler.sync(reader)
    yield reader
    sampler.sleep()
    sampler.sync(policy)


def demonstrations(
    cfg: Config, policy: Policy, sampler, task: tasks.Task, problems: list, xC: list, rows: list[int], step: int
) -> dict:
    """{row: (Rollout, Outcome)}: one response of the teacher, which the sampler holds, to each of `rows`, where the grader did
    not fail on it."""
    seed = seed_for(cfg.seed, step, "demonstrations")
    drawn = sampler.sample([xC[i] for i in rows], 1, seed, cfg.max_response_tokens, cfg.temperature, cfg.top_p)
    outcomes = task.verify([problems[i] for i in rows], [policy.decode(rollout.tokens) for rollout in drawn])
    return {
        i: (rollout, outcome)
        for i, rollout, outcome in zip(rows, drawn, outcomes)
        if outcome.verdict != "internal" and (outcome.reward or cfg.ovd_failed)
    }


def judge_figures(scores: list, outcomes: list, threshold: float) -> dict:
    """OVD's judge over a batch: how many scores round to 0, 1, ... 9, the share accepted, and the AUC: the chance that a success
    has a higher score than a failure, ties counting one half."""
    known = [(score, o.reward) for score, o in zip(scores, outcomes) if score is not None and o.verdict != "internal"]
    good, bad = ([score for score, reward in known if reward == which] for which in (1, 0))
    counts = Counter(math.floor(score + 0.5) for score in scores if score is not None)
    return {
        "scores": [counts[digit] for digit in range(10)],
        "accepted": mean([float(score is None or score >= threshold) for score in scores]),
        "judge_auc": stats.mannwhitneyu(good, bad).statistic / (len(good) * len(bad)) if good and bad else None,
    }


def base_failures(cfg: Config, policy: Policy, sampler, reviews: Reviews, task: tasks.Task) -> list[dict]:
    """{"id", "context"} of one failure of the first weights for each of the first `teacher_probe` problems that training
    is watched by, where there is a failure with a context. What the teacher makes of them tells over the run whether it
    still reads."""
    problems, G = watch(task)[0][: cfg.teacher_probe], cfg.group_size
    prompts = [feedback.student_prompt(policy.tokenizer, p.messages) for p in problems]
    drawn = sampler.sample(
        prompts, G, seed_for(cfg.seed, "base failures"), cfg.max_response_tokens, cfg.temperature, cfg.top_p
    )
    rows, texts = [p for p in problems for _ in range(G)], [policy.decode(roll.tokens) for roll in drawn]
    outcomes = task.verify(rows, texts)
    C = reviews.contexts(rows, texts, outcomes, -1)
    found = {}
    for problem, outcome, context in zip(rows, outcomes, C):
        if outcome.reward == 0 and context:
            found.setdefault(problem.id, {"id": problem.id, "context": asdict(context)})
    return list(found.values())


def e_step_groups(which: str, r: torch.Tensor, told: torch.Tensor, group_size: int) -> tuple[list[list[int]], int]:
    """The rows of each group that take part in the E-step, and the number of rows left out. Only rows with a context
    do. "mixed" further asks that both outcomes have one: a kind of context that goes with one label gives it away."""
    groups = []
    for first in range(0, len(r), group_size):
        rows = [i for i in range(first, first + group_size) if told[i]]
        if rows and (which == "all" or 0 < sum(r[rows].tolist()) < len(rows)):
            groups.append(rows)
    return groups, len(r) - sum(map(len, groups))


def fill_ungraded(r: torch.Tensor, graded: torch.Tensor, group_size: int) -> torch.Tensor:
    """r with the rows that the grader failed on at their group's mean: advantage 0, and no pull on the others."""
    groups, known = r.view(-1, group_size), graded.view(-1, group_size)
    means = (groups * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    return torch.where(known, groups, means).reshape(-1)


def margin_figures(implicit: torch.Tensor, r: torch.Tensor, lengths: torch.Tensor) -> dict:
    """Fig. 1's reward margin, mean r~ on successes minus mean r~ on failures, and whether |r~| merely tracks length."""
    both = 0 < r.sum() < len(r)
    varied = len(r) > 2 and implicit.abs().std() > 0 and lengths.double().std() > 0
    correlation = torch.corrcoef(torch.stack([implicit.abs().double(), lengths.double()]))[0, 1] if varied else None
    return {
        "margin": (implicit[r == 1].mean() - implicit[r == 0].mean()).item() if both else None,
        "length_correlation": correlation.item() if varied else None,
    }


def terminal_line(row: dict, seconds: float) -> str:
    """At most 12 figures of a step; every one is explained in the README."""
    show = {"reward": "reward", "margin": "margin", "divergence": "div", "e_loss": "E-loss", "shift": "delta",
            "m_loss": "M-loss", "m_grad_norm": "|g|", "entropy": "entropy", "response_length": "length",
            "with_context": "told"}  # fmt: skip
    cells = [f"{name} {row[key]:.3f}" for key, name in show.items() if row.get(key) is not None]
    return f"{row['step']:4d}  " + "  ".join(cells) + f"  {seconds:.1f} s"


class Clock:
    """Seconds per phase of one step."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


# ---- The loop ------------------------------------------------------------------------------------------------


def train(
    cfg: Config, policy: Policy, sampler, task: tasks.Task, out: Path, record: dict, stop_signals: Callable = lambda: 0
) -> None:
    """Runs the EM loop and writes the run directory, whose config.json is `record`. stop_signals: how many signals to stop
    this process has had."""
    method, templates, G, world = METHODS[cfg.method], cfg.templates(), cfg.group_size, policy.world
    tokenizer, reviews = policy.tokenizer, Reviews(cfg, policy, sampler)
    watched, split = watch(task)
    steps = cfg.steps or cfg.epochs * (len(task.train) // cfg.prompts_per_batch)
    teacher = policy.frozen_copy() if record["teacher"] == "ema" else None  # None: the live weights
    distil = dict(kind="cross_entropy" if cfg.method == "distil" else cfg.divergence, top_k=cfg.top_k or None)
    reference = policy.frozen_copy() if cfg.method == "vpd" and cfg.prior == "fixed" else None

    def adamw():
        betas = (cfg.adam_beta1, cfg.adam_beta2)
        return torch.optim.AdamW(policy.model.parameters(), lr=cfg.lr, betas=betas, weight_decay=cfg.weight_decay)

    optimizer = adamw()
    e_optimizer = adamw() if cfg.e_optimizer == "own" and cfg.method == "vpd" else optimizer
    shift, bad_in_a_row, best, first_step, saved, probe = None, 0, -1.0, 0, None, []
    models = {"policy": policy.model} | ({"teacher": teacher} if teacher is not None else {})
    optimizers = {"shared": (policy.model, optimizer)}
    if e_optimizer is not optimizer:
        optimizers["e_step"] = (policy.model, e_optimizer)
    kept = checkpoint.restore(out / "checkpoints", models, optimizers, world) if cfg.resume else None
    if kept:
        first_step, shift, bad_in_a_row, best = (kept[name] for name in ("step", "shift", "bad_in_a_row", "best"))
    if cfg.resume and world.rank == 0:
        dropped = sum(
            checkpoint.cut_log(out / name, first_step if kept else -1) for name in ("log.jsonl", "samples.jsonl")
        )
        print(f"going on after {first_step} batches; {dropped} later lines dropped from the logs")

    def save_state(step: int) -> None:
        nonlocal saved
        saved, state = step, {"shift": shift, "bad_in_a_row": bad_in_a_row, "best": best}
        checkpoint.save(out / "checkpoints", step, models, optimizers, state, world)

    def leave_if_told(step: int) -> None:
        """After a SIGTERM: saves the state after `step` batches, which are whole at every place this is called from."""
        if world.most(stop_signals()):
            if saved != step:
                save_state(step)
            policy.save(out / "model")
            raise SystemExit(143)

    mine = lambda name: out / name if world.rank == 0 else Path(os.devnull)  # noqa: E731
    log, samples = mine("log.jsonl").open("a"), mine("samples.jsonl").open("a")

    def write(file, row: dict) -> None:
        row = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }  # JSON has no nan
        file.write(json.dumps(row) + "\n")
        file.flush()

    def teacher_pass_rate() -> float:
        """Pass rate of the teacher, as it now is, on the failures in `probe`."""
        problems = {p.id: p for p in watched}
        problems = [problems[row["id"]] for row in probe]
        contexts = [feedback.Context(**row["context"]) for row in probe]
        prompts = [
            feedback.teacher_prompt(tokenizer, p.messages, c, templates, cfg.max_teacher_tokens)[0]
            for p, c in zip(problems, contexts)
        ]
        with weights_of(teacher, sampler, policy) as reader:
            return evaluate.measure(
                reader, sampler, task.verify, problems, n=cfg.eval_samples, seed=seed_for(cfg.seed, "probe"),
                max_tokens=cfg.max_response_tokens, temperature=cfg.eval_temperature, top_p=cfg.eval_top_p, prompts=prompts,
            )["avg"]  # fmt: skip

    def validate(step: int) -> None:
        nonlocal best
        start = time.perf_counter()
        result = evaluate.measure(
            policy, sampler, task.verify, watched, n=cfg.eval_samples, seed=seed_for(cfg.seed, "validation"),
            max_tokens=cfg.max_response_tokens, temperature=cfg.eval_temperature, top_p=cfg.eval_top_p,
        )  # fmt: skip
        figures = {key: value for key, value in result.items() if key != "rewards"}
        if probe:
            figures["teacher_avg"] = teacher_pass_rate()
        seconds = round(time.perf_counter() - start, 4)
        write(log, {"kind": "eval", "step": step, "split": split, **figures, "seconds": {"eval": seconds}})
        told = f"  teacher on {len(probe)} base failures {figures['teacher_avg']:.3f}" if probe else ""
        tqdm.write(f"{split} after {step:4d} batches: {evaluate.line(result)}{told}")
        if task.validation and result["avg"] > best:  # nothing is chosen by test problems
            best = result["avg"]
            policy.save(out / "best")

    def update(optim: torch.optim.Optimizer, lr: float, loss: float) -> float:
        """One optimizer step; a loss or gradient that is not finite skips it, five in a row end the run."""
        nonlocal bad_in_a_row
        norm = policy.step(optim, lr, cfg.max_grad_norm, skip=not math.isfinite(loss))
        bad_in_a_row = 0 if math.isfinite(norm) else bad_in_a_row + 1
        if bad_in_a_row == 5:
            raise FloatingPointError("five updates in a row had a loss or gradient that is not finite")
        return norm

    try:
        sampler.sync(policy)
        if kept:
            write(log, {"kind": "resume", "step": first_step, "commit": record["commit"], "processes": world.size})
            if (out / "base_failures.json").exists():
                probe += json.loads((out / "base_failures.json").read_text())
        elif cfg.eval_every:
            if cfg.teacher_probe and record["teacher"]:
                probe += base_failures(cfg, policy, sampler, reviews, task)
                world.first(lambda: (out / "base_failures.json").write_text(json.dumps(probe, indent=1) + "\n"))
            validate(0)
        bar = tqdm(
            total=steps, initial=first_step, disable=True if world.rank else None, unit="batch", dynamic_ncols=True
        )
        for step, problems in enumerate(batches(task.train, cfg.prompts_per_batch, steps, cfg.seed)):
            if step < first_step:
                continue
            clock, skipped = Clock(), Counter()
            figures = dict.fromkeys(
                ("margin", "length_correlation", "e_loss", "e_grad_norm", "shift", "e_rows", "e_died")
            )
            e_losses, e_norms, m_losses, m_norms, apart = [], [], [], [], 0.0
            packing = torch.zeros(2, dtype=torch.long)
            warmup = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
            rate = warmup * (1 - step / steps if cfg.schedule == "linear" else 1.0)

            # ---- 1. Rollouts y ~ pi_theta(.|x); row i * G + j is rollout j of problem i
            x = [feedback.student_prompt(tokenizer, p.messages) for p in problems]
            rollouts = sampler.sample(
                x, G, seed_for(cfg.seed, step, "rollouts"), cfg.max_response_tokens, cfg.temperature, cfg.top_p
            )
            y, texts = [r.tokens for r in rollouts], [policy.decode(r.tokens) for r in rollouts]
            rows = range(len(y))
            x, row_problems = [x[i // G] for i in rows], [problems[i // G] for i in rows]
            clock.lap("rollout")
            leave_if_told(step)

            # ---- 2. Outcomes r in {0, 1} and contexts C (or none) per rollout
            outcomes = task.verify(row_problems, texts)
            if any(o.reward not in (0, 1) for o in outcomes):
                fail(f"the verifier of {task.name} gave a reward that is neither 0 nor 1")
            clock.lap("verify")
            r = torch.tensor([float(o.reward) for o in outcomes], device=policy.device)  # (B,)
            graded = torch.tensor([o.verdict != "internal" for o in outcomes], device=policy.device)
            skipped["grader failed"] += int((~graded).sum())
            C, xC, cut = [None] * len(y), list(x), 0
            if method.teacher:
                C = reviews.contexts(row_problems, texts, outcomes, step)
                for i in rows:
                    if C[i] is not None:
                        xC[i], tokens_cut = feedback.teacher_prompt(
                            tokenizer, row_problems[i].messages, C[i], templates, cfg.max_teacher_tokens
                        )
                        cut += tokens_cut > 0
            told = torch.tensor([c is not None for c in C], device=policy.device)  # (B,) rows with a context
            taught = told.nonzero().flatten().tolist()
            clock.lap("feedback")

            # OVD: what the judge rejects gives way to a demonstration by the teacher, which is verified as well
            own, shown = torch.ones_like(told), {}  # (B,) rows that the student wrote; the others' (Rollout, Outcome)
            if method.replaces:
                scores = reviews.scores(row_problems, texts, step)
                rejected = [i for i in rows if scores[i] is not None and scores[i] < cfg.ovd_threshold]
                skipped["rejected without a context, kept"] += len(rejected) - int(told[rejected].sum())
                with weights_of(teacher, sampler, policy):
                    asked = [i for i in rejected if told[i]]
                    shown = demonstrations(cfg, policy, sampler, task, row_problems, xC, asked, step)
                skipped["demonstration failed, rollout kept"] += len(asked) - len(shown)
                for i, (demonstration, outcome) in shown.items():
                    y[i], r[i], own[i] = demonstration.tokens, outcome.reward, False
                figures |= judge_figures(scores, outcomes, cfg.ovd_threshold)
                figures["demonstrations"] = mean(~own)
                figures["demonstration_reward"] = mean([outcome.reward for _, outcome in shown.values()])
                clock.lap("judge")
            # What goes through the network: teacher's prompts as well, but for a teacher that scores nothing.
            mask, longer = policy.mask(y), x if method.replaces else xC  # (B, T)
            lengths = [len(longer[i]) + len(y[i]) for i in rows]

            # ---- 3. Freeze log pi_theta(y|x); the teacher's log-probs at the same weights give the reward margin
            leave_if_told(step)
            sampler.sleep()
            old_logp, entropy = policy.score(x, y)  # (B, T)
            drawn_logp = torch.zeros_like(old_logp)  # log-probs as the sampler's engine gave them
            for i in rows:
                drawn_logp[i, : len(y[i])] = torch.tensor(shown[i][0].logp if i in shown else rollouts[i].logp)
            sampled = mask.bool() & own[:, None]  # (B, T) the student's tokens
            gap = (old_logp - drawn_logp)[sampled].abs()
            mismatch, at_limit = torch.ones_like(old_logp), None  # (B, T)
            if cfg.mismatch_limit != "none" and sampler.other_engine:
                mismatch = losses.truncated_ratio(old_logp, drawn_logp, float(cfg.mismatch_limit))
                at_limit = mean(mismatch[sampled] == float(cfg.mismatch_limit))
            if shown:  # whose tokens the teacher drew
                rho = (old_logp - drawn_logp)[mask.bool() & ~own[:, None]].exp()  # pi / q
                figures |= {"demonstration_ratio": mean(rho), "demonstration_lacked": mean(rho < 0.5)}
                mismatch[~own] = 1.0
                if cfg.ovd_ratio == "teacher":
                    old_logp[~own] = drawn_logp[~own]
            if record["teacher"] and not method.replaces:
                teacher_logp, _ = policy.score(xC, y, taught, teacher)
                teacher_logp = torch.where(told[:, None], teacher_logp, old_logp)  # no context: A^SDPO = 0
                implicit = losses.implicit_reward(teacher_logp, old_logp, mask, cfg.beta)  # Eq. 7
                figures |= margin_figures(implicit[told], r[told], mask.sum(1)[told])
            clock.lap("freeze")

            # ---- 4. E-step: refine the teacher on this batch (Eq. 9), every F-th batch
            if cfg.method == "vpd" and step % cfg.e_step_every == 0:
                groups, out_of_e = e_step_groups(cfg.e_groups, r, told, G)
                skipped["e_step: no context, or one outcome only"] += out_of_e
                prior_logp = old_logp if reference is None else policy.score(x, y, model=reference)[0]
                weights = []
                for first in range(0, len(groups), cfg.e_minibatch_prompts):
                    minibatch = [i for group in groups[first : first + cfg.e_minibatch_prompts] for i in group]
                    if not 0 < r[minibatch].sum() < len(minibatch):  # only with --e_groups all
                        skipped["e_step: minibatch of one outcome"] += len(minibatch)
                        continue
                    # First pass, no gradient: every r~ of the minibatch, hence delta before it is used. The first
                    # minibatch meets the weights of the freeze, whose pass serves when it read the live teacher.
                    fresh = teacher_logp if teacher is None and first == 0 else policy.score(xC, y, minibatch)[0]
                    q_logp = fresh[minibatch].requires_grad_()  # (n, T)
                    implicit = losses.implicit_reward(q_logp, prior_logp[minibatch], mask[minibatch], cfg.beta)
                    value = losses.reward_shift(implicit, r[minibatch]).item()
                    if math.isfinite(value):  # one overflow must not poison every later E-step
                        shift = value if shift is None else (1 - cfg.shift_rate) * shift + cfg.shift_rate * value
                    delta = value if shift is None else shift
                    e_loss = losses.bco_loss(implicit, r[minibatch], delta)  # Eq. 9
                    # c = dL_E / d log q(y_t|x,C,y_<t), the same for every token of a row: with it fixed, the second pass
                    # sums c log q, in any micro-batches.
                    c = torch.zeros_like(fresh)  # (B, T)
                    (c[minibatch],) = torch.autograd.grad(e_loss, q_logp)
                    for part in policy.micro_batches(minibatch, lengths):
                        view = policy.view([xC[i] for i in part], [y[i] for i in part])
                        given = c[part, : view.mask.shape[1]]
                        policy.backward(view.loss(lambda log_q, _, c: c * log_q, view.mask, [given])[0])
                        packing += torch.tensor([view.filled, view.padded])
                    e_norms.append(update(e_optimizer, (cfg.e_lr or cfg.lr) * rate, e_loss.item()))
                    e_losses.append(e_loss.item())
                    implicit = implicit.detach()
                    weights.append(torch.sigmoid(implicit - delta) * torch.sigmoid(delta - implicit))
                died = torch.cat(weights) < 0.01 if weights else []
                figures |= {"e_loss": mean(e_losses), "e_grad_norm": mean(e_norms), "shift": shift,
                            "e_rows": len(died), "e_died": mean(died)}  # fmt: skip
                clock.lap("e_step")

            # ---- 5. M-step: distil the teacher into the student (Eq. 10); the baselines' losses stand here too
            A = torch.zeros_like(r)  # (B,)
            if method.reinforces:
                A = losses.group_advantages(fill_ungraded(r, graded, G), G, cfg.divide_by_std) * graded
            active = (A != 0) | (told if method.distils or cfg.method == "reshape" else False)
            if cfg.method == "reshape":
                A = losses.reshaped_advantages(A, teacher_logp, old_logp, cfg.w_rl, cfg.w_opd)  # (B, T), B.24
            if cfg.method == "reweight":
                lam = cfg.reweight_lam * max(0.0, 1 - step / cfg.reweight_steps) if cfg.reweight_steps else 0.0
                A = losses.reweighted_advantages(A, teacher_logp, old_logp, lam, cfg.reweight_clip)  # (B, T), B.28
            # Tokens of a black box, and what D counts for at each place, (B, T).
            expert, share = None, told[:, None].expand_as(mask)
            if cfg.method == "distil":
                if cfg.expert == "samples":
                    expert = policy.draw(xC, y, taught, teacher, [seed_for(cfg.seed, step, "expert", i) for i in rows])
                if cfg.expert == "served":
                    expert, share = reviews.expert_tokens(xC, y, taught, step)
                    clock.lap("expert")
                active = share.any(1)
                cost = share * policy.compare(x, xC, y, taught, teacher, **distil, expert=expert)  # (B, T)
                A = cfg.future * losses.future_advantages(cost, mask, G, active)  # (B, T)
                A = A / mask.sum(1, keepdim=True) if cfg.distil_norm == "length" else A
            heard = int(share.any(1).sum())  # rows with a distance
            skipped["m_step: no context" if not method.reinforces else "m_step: no signal"] += int((~active).sum())
            size = cfg.minibatch_prompts * G
            # pi_old is the student as it now is: exactly, where one update follows a batch, and for OVD's sg pi.
            now = own if size == len(y) else torch.zeros_like(own)
            now = now | ~own if cfg.ovd_ratio == "one" else now  # (B,)

            def per_token(logp, d, before, now, A, share, mismatch):
                """The M-step's loss of a chunk of tokens: (1, n) all of them."""
                before = torch.where(now, logp.detach(), before)
                loss = torch.zeros_like(logp)
                if method.distils:  # Eq. 10, Eq. 2
                    ratio = 1.0 if cfg.method == "vpd" else losses.truncated_ratio(logp, before, cfg.ratio_limit)
                    loss = loss + (cfg.w_opd if cfg.method == "joint" else 1.0) * ratio * d * share
                if method.reinforces or cfg.method == "distil":
                    pg = losses.grpo_loss(logp, before, A, cfg.clip_low, cfg.clip_high, cfg.dual_clip)
                    loss = loss + (cfg.w_rl if cfg.method == "joint" else 1.0) * pg
                return loss * mismatch

            A, now = (v if v.ndim == 2 else v[:, None].expand_as(mask) for v in (A, now))  # (B, T)
            for first in range(0, len(y), size):
                minibatch = [i for i in range(first, first + size) if active[i]]
                if not minibatch:
                    skipped["m_step: whole update"] += 1
                    continue
                total = torch.zeros(2, dtype=torch.float64, device=policy.device)
                for part in policy.micro_batches(minibatch, lengths):
                    q = None
                    if method.distils and expert is None:
                        with torch.no_grad():  # sg q_phi
                            q = policy.view([xC[i] for i in part], [y[i] for i in part], teacher)
                    view = policy.view([x[i] for i in part], [y[i] for i in part])
                    t = view.mask.shape[1]
                    weights = losses.sequence_weights(view.mask, size)
                    if cfg.method == "distil" and cfg.distil_norm == "constant":
                        weights = view.mask.double() / (size * cfg.max_response_tokens)
                    taken = None if expert is None else expert[part, :t]
                    given = [v[part, :t] for v in (old_logp, now, A, share, mismatch)]
                    loss, _, d = view.loss(per_token, weights, given, q, **distil, expert=taken)
                    policy.backward(loss)
                    apart_here = losses.sequence_mean(d * share[part, :t], view.mask, max(1, heard))
                    total += torch.stack([loss.detach(), apart_here]).double()
                    packing += torch.tensor([view.filled, view.padded])
                loss, d = policy.world.sum(total).tolist()
                m_norms.append(update(optimizer, cfg.lr * rate, loss))
                m_losses.append(loss)
                apart += d
            if teacher is not None:
                ema_update(teacher, policy.model, cfg.ema_rate)  # once per rollout batch
            clock.lap("m_step")

            # ---- 6. Push the weights to the sampler
            sampler.sync(policy)
            clock.lap("sync")

            n_tokens = sum(len(roll.tokens) for roll in rollouts)
            skipped.update(reviews.not_had())
            filled, padded = world.sum(packing).tolist()
            kinds = Counter(c.kind for c in C if c)
            wins = Counter(c.kind for c, o in zip(C, outcomes) if c and o.reward)
            row = {
                "kind": "train", "step": step, "reward": mean([o.reward for o in outcomes if o.verdict != "internal"]), **figures,
                "m_loss": mean(m_losses), "m_grad_norm": mean(m_norms),
                "divergence": apart if method.distils and heard else None,
                "entropy": mean(entropy[sampled]), "response_length": n_tokens / len(y),
                "truncated": mean([float(roll.finish == "length") for roll in rollouts]),
                "with_context": mean(told), "contexts_cut": cut,
                "verdicts": dict(Counter(o.verdict for o in outcomes).most_common()),
                "success_given_context": {kind: wins[kind] / count for kind, count in sorted(kinds.items())},
                "left_out": {why: count for why, count in skipped.items() if count},
                "updates_not_finite": sum(not math.isfinite(norm) for norm in e_norms + m_norms),
                "sampler_gap": mean(gap), "lr": cfg.lr * rate,
                "mismatch_truncated": at_limit,
                "padding": 1 - filled / padded if padded else None,
                "seconds": {k: round(v, 4) for k, v in clock.seconds.items()},
                "tokens_per_second": n_tokens / sum(clock.seconds.values()),
            }  # fmt: skip
            write(log, row)
            for i in list(rows)[: cfg.log_samples]:
                write(samples, {"step": step, "id": row_problems[i].id, "prompt": tokenizer.decode(x[i]),
                                "response": texts[i], "finish": rollouts[i].finish, **asdict(outcomes[i]),
                                "context": asdict(C[i]) if C[i] else None}
                      | ({"score": scores[i], "demonstration": policy.decode(y[i]) if i in shown else None} if method.replaces else {}))  # fmt: skip
            tqdm.write(terminal_line(row, sum(clock.seconds.values())))
            bar.update()
            if cfg.eval_every and ((step + 1) % cfg.eval_every == 0 or step + 1 == steps):
                validate(step + 1)
            if step + 1 == steps or cfg.checkpoint_every and (step + 1) % cfg.checkpoint_every == 0:
                save_state(step + 1)
            leave_if_told(step + 1)
        policy.save(out / "model")
    except (Exception, KeyboardInterrupt) as error:
        # The weights as they were, where nobody else is needed to gather them or everybody is here for the same reason.
        if world.size == 1 or isinstance(error, (FloatingPointError, StaleEngine)):
            policy.save(out / "model")
        raise
    finally:
        log.close()
        samples.close()
        task.close()


def planned(cfg: Config, path: str, processes: int) -> plan.Plan:
    """Prints what the run needs. Raises ValueError where it does not fit the GPUs."""
    gpu = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0
    gpu = cfg.gpu_memory * 1e9 or gpu
    if cfg.plan and not gpu and cfg.task != "toy":
        raise ValueError("there is no GPU here to plan for: say --gpus N --gpu_memory GB")
    found = plan.memory(plan.read(path), cfg, METHODS[cfg.method], cfg.gpus or processes, gpu)
    print("\n".join(plan.lines(found, cfg, METHODS[cfg.method])), flush=True)
    plan.refuse(found, cfg)
    return found


def settled(cfg: Config, policy: Policy, task: tasks.Task, found: plan.Plan) -> plan.Plan:
    """The plan with the longest sequence that is sampled, evaluation's included. Raises ValueError where that has no room."""
    questions = (
        [feedback.student_prompt(policy.tokenizer, p.messages) for p in watch(task)[0]] if cfg.eval_every else []
    )
    longest = max([found.longest, *(len(question) + cfg.max_response_tokens for question in questions)])
    found = replace(found, longest=longest)
    plan.refuse(found, cfg)
    return found


def open_directory(out: Path, overwrite: bool, record: dict) -> None:
    """Makes the run directory with its config.json; one that is there is deleted if `overwrite`, else left as it is."""
    if overwrite and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "config.json").exists():
        (out / "part-config.json").write_text(json.dumps(record, indent=1) + "\n")
        (out / "part-config.json").rename(out / "config.json")  # whole, whenever the run is killed


def git_commit() -> str:
    """The commit of this code, marked when the tree differs from it; "unknown" outside a repository."""
    here = Path(__file__).parent
    run = lambda *args: subprocess.run(["git", *args], cwd=here, capture_output=True, text=True)  # noqa: E731
    try:
        head = run("rev-parse", "HEAD")
    except OSError:  # no git on this machine
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+changes" if run("status", "--porcelain", "-uno").stdout else "")


def main(argv: list[str] | None = None) -> None:
    cfg = parse(argv)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # threads that fight for a busy core cost more than they bring
    out, resuming = Path(cfg.out), cfg.resume
    if cfg.plan:
        try:
            check(cfg)
            planned(cfg, cfg.model, torch.cuda.device_count() or 1)
            return
        except (ValueError, OSError) as error:
            fail(error)
    try:
        world = World.start()
        check(cfg)
        if out.exists() and not cfg.overwrite and not resuming:
            raise ValueError(
                f"{out} exists: give another --out, --resume to go on with it, or --overwrite to delete it"
            )
        if cfg.overwrite and out.exists() and not (out / "config.json").exists():
            raise ValueError(f"{out} is no run directory (no config.json): --overwrite will not delete it")
        if cfg.task != "toy" and not torch.cuda.is_available() and not cfg.smoke and not Path(cfg.model).is_dir():
            raise ValueError(
                f"--task {cfg.task} with {cfg.model} needs CUDA GPUs, and there is none: on this machine run "
                f"`bash run.sh {cfg.task} --smoke` or `bash run.sh toy`"
            )
        if cfg.sampler == "vllm" and importlib.util.find_spec("vllm") is None:
            raise ValueError("--sampler vllm: vllm is not installed; run.sh installs it where there is an NVIDIA GPU")
        task = tasks.load(cfg.task, cfg.subset, cfg.data, cfg.train_tests, cfg.since, cfg.until)
        task.verify = world.shared(task.verify)
        if METHODS[cfg.method].teacher and task.sources and cfg.feedback not in task.sources:
            raise ValueError(f"--feedback {cfg.feedback}: {task.name} has {', '.join(task.sources)}")
        dtype = getattr(torch, cfg.dtype)
        with tempfile.TemporaryDirectory() as made:
            # A smoke run that goes on has its model there.
            making = cfg.smoke and not (resuming and (out / "base" / "config.json").exists())
            made = world.first(lambda: made)  # one process makes the model, on this machine
            if making:
                world.first(lambda: toy.smoke_model(cfg.task, cfg.smoke, Path(made)))
            path = made if making else cfg.model
            found = planned(cfg, path, world.size)
            policy = Policy.load(path, dtype, micro_batch_tokens=cfg.micro_batch_tokens, world=world)
            world.wait()  # everybody has read it
        if cfg.top_k > policy.vocabulary:
            raise ValueError(f"--top_k {cfg.top_k} exceeds the vocabulary of {policy.vocabulary} tokens")
        fits = [
            p for p in task.train if len(feedback.student_prompt(policy.tokenizer, p.messages)) <= cfg.max_prompt_tokens
        ]
        dropped, task.train = len(task.train) - len(fits), fits
        found = settled(cfg, policy, task, found)
        if METHODS[cfg.method].teacher and cfg.feedback == "critique" and not all(p.reference for p in fits):
            raise ValueError(f"--feedback critique needs a reference answer for every problem of {task.name}")
        if cfg.method == "ovd" and not cfg.judge_url:
            feedback.digit_tokens(policy.tokenizer)  # raises ValueError where a score cannot be read
        if len(fits) < cfg.prompts_per_batch:
            raise ValueError(
                f"{len(fits)} training problems do not fill a batch of --prompts_per_batch {cfg.prompts_per_batch}"
            )
        if making:  # the model was made on the spot; evaluation will want it again
            cfg.model = str(out / "base")
        record = {**asdict(cfg), "out": str(out), "teacher": cfg.reader(), "commit": git_commit(), "processes": world.size,
                  "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                  "torch": torch.__version__, "command": " ".join(["python", *sys.argv]), "prompts_dropped": dropped}  # fmt: skip
        world.wait()  # everybody has looked
        world.first(lambda: open_directory(out, cfg.overwrite, record))
        if making:
            policy.save(cfg.model)
        sampler = open_sampler(cfg.sampler, policy, cfg.model, found.longest, found.share)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    print(" ".join(f"{f.name}={record[f.name]!r}" for f in fields(cfg)))
    for note in task.notes:
        print(note)
    print(f"{task.splits()}; {dropped} training prompts over {cfg.max_prompt_tokens} tokens dropped")
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    try:
        train(cfg, policy, sampler, task, out, record, stop_signals=lambda: len(received))
    except SystemExit as stop:
        if stop.code == 143 and world.rank == 0:
            print(f"told to stop: the state is in {out}/checkpoints; --resume goes on from it", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        if world.rank == 0:
            print(f"stopped; the log and the weights so far are in {out}", file=sys.stderr)
        sys.exit(130)
    except checkpoint.Damaged as error:
        fail(error)
    except (FloatingPointError, StaleEngine) as error:
        if world.rank == 0:
            print(f"vpd.py: {error}; the log and the last finite weights are in {out}", file=sys.stderr)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)
    best = f", {out}/best the best on validation problems" if (out / "best").exists() else ""
    print(f"done: {out}/model is the last model{best}")


if __name__ == "__main__":
    main()
    World.end()
