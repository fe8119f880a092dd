"""Every setting with its default, the paper's tables as presets, and what is refused.

`Config` has the values of Table D.1 (lcb); PRESETS, TOY_PRESETS and METHOD_PRESETS hold what other tasks and methods change;
`parse` puts the flags of a command over them; `check` refuses what cannot work together. Nothing is set anywhere else.
"""

import argparse
import inspect
import json
import math
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from transformers import HfArgumentParser

import tasks
from tasks import tiny, toy
from harness.command import fail
from feedback import SOURCES, TEXTS, Templates
from losses import DIVERGENCES


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


WORDS = Templates()


@dataclass
class Config:
    """Every setting, with the value of the paper's Table D.1 (lcb) as its default. PRESETS holds what other tasks change;
    a flag on the command line overrides both. What was used is printed at the start and saved as config.json."""

    # ---- Run
    task: Literal["toy", "lcb", "sciknoweval", "math", "own"] = "toy"  # picks a preset; own: --data FILE.py
    subset: str = ""  # of toy or sciknoweval (tasks.py lists them); "" is the task's first
    data: str = ""  # file or folder of the task's source; "": the hub (tasks.py says what each takes)
    train_tests: Literal["private", "public"] = "private"  # lcb: SDPO's seeded half, or the paper's words
    since: str = "2025-02-01"  # lcb: since <= contest_date < until
    until: str = "2025-05-01"  # lcb: the end of the window, itself outside
    smoke: Literal["", "qwen3", "olmo3"] = ""  # 2 batches of a tiny random model on the project's records
    method: Literal[*METHODS] = "vpd"  # METHODS says what each needs
    seed: int = 0  # of the order of problems, rollouts, contexts and evaluation
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
    eval_samples: int = 4  # n of avg@n: samples of each problem
    eval_temperature: float = 0.6  # lcb, sciknoweval, math: SDPO's 0.6
    eval_top_p: float = 0.95  # lcb, sciknoweval, math: SDPO's 0.95
    teacher_probe: int = 0  # base failures on which the teacher's pass rate is measured at every evaluation
    # ---- Model
    model: str = "Qwen/Qwen3-8B"  # folder or hub id
    dtype: Literal["float32", "float64"] = "float32"  # of the weights
    micro_batch_tokens: int = 20480  # padded tokens in one forward pass; changes speed and memory, never the update
    # ---- Rollouts
    prompts_per_batch: int = 32  # B, problems in a rollout batch
    group_size: int = 8  # rollouts per prompt, G
    max_prompt_tokens: int = 2048  # longer problems are dropped and counted
    max_response_tokens: int = 8192  # then a response is cut and graded as it is
    temperature: float = 1.0  # of rollouts
    top_p: float = 1.0  # of rollouts
    sampler: Literal["", "vllm", "hf"] = ""  # "": vLLM on a GPU, transformers' generate on a CPU
    engine_memory: float = 0.0  # vLLM's share of the GPU's memory while it samples; 0: what the plan leaves it
    # ---- Optimizer (AdamW)
    lr: float = 1e-6  # of the M-step; e_lr is the E-step's
    warmup_steps: int = 0  # rollout batches
    schedule: Literal["constant", "linear"] = "constant"  # linear: falls to 0 over the run
    adam_beta1: float = 0.9  # decay of the gradient's average
    adam_beta2: float = 0.999  # and of its square's
    weight_decay: float = 0.01  # decoupled
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    minibatch_prompts: int = 1  # prompts per M-step update; lcb: 1, so 32 updates per batch
    # ---- Feedback
    feedback: Literal[*SOURCES] = "solution_first"  # where C comes from (feedback.py)
    borrow: bool = True  # a success borrows a failing sibling's text
    passed_text: str = ""  # a success sees this text instead, which gives its label away (ablation)
    max_teacher_tokens: int = 10240  # of the teacher's prompt; beyond it the context is cut
    max_critique_tokens: int = 512  # of a review
    critic_url: str = ""  # critiques from an OpenAI-compatible server (key: OPENAI_API_KEY); "": the student itself
    critic_model: str = ""  # the name it serves
    server_timeout: float = 60.0  # seconds, of every server; two retries
    solution_template: str = WORDS.solution  # section of the teacher's prompt, with the hole {solution}
    feedback_template: str = WORDS.feedback  # the same, {feedback}
    critique_template: str = WORDS.critique  # the same, {critique}
    closing_line: str = WORDS.closing  # of the teacher's prompt
    critique_request: str = WORDS.request  # what a critic is asked: {question}, {attempt}, {reference}
    judge_request: str = WORDS.judge  # what a judge is asked: {question}, {attempt}
    # ---- E-step (vpd)
    e_step_every: int = 5  # F: an E-step on every F-th rollout batch
    e_minibatch_prompts: int = 32  # prompts per E-step update; the whole batch: one update
    e_lr: float = 0.0  # the E-step's learning rate; 0: lr
    e_optimizer: Literal["shared", "own"] = "shared"  # whose AdamW state; the paper: one network, one optimizer
    e_groups: Literal["mixed", "all"] = "mixed"  # mixed: groups in which both outcomes have a context
    beta: float = 0.1  # of the implicit reward, Eq. 7
    shift_rate: float = 0.1  # delta <- (1 - rate) delta + rate value; the paper gives none
    prior: Literal["dynamic", "fixed"] = "dynamic"  # what r~ is measured from; fixed: the initial weights (ablation)
    # ---- Distillation
    divergence: Literal[*DIVERGENCES] = "kl_student_teacher"  # of the M-step, Eq. 10
    top_k: int = 20  # of the student, plus a tail bucket; 0: all of V
    teacher: Literal["", "live", "ema"] = ""  # whose weights read C; "": the method's own, see METHODS
    ema_rate: float = 0.01  # teacher <- (1 - rate) teacher + rate student, per rollout batch
    ratio_limit: float = 2.0  # SDPO's truncated token weight
    mismatch_limit: str = "2"  # SDPO's weight min(pi_old / pi_sampler, limit) when vLLM samples; none: no weight
    # ---- DistIL: cross-entropy to the teacher, and each token charged with the cross-entropy of those after it
    distil_norm: Literal["length", "constant"] = "length"  # constant: exact where C does not depend on y
    future: bool = True  # --no_future: the local term alone (ablation)
    expert: Literal["probabilities", "samples", "served"] = "probabilities"  # samples: the teacher as a black box
    expert_url: str = ""  # served: an OpenAI-compatible server whose completions take the teacher's place
    expert_model: str = ""  # the name it serves
    expert_places: int = 16  # served: tokens of a response at which it is asked, at random
    # ---- OVD: what a judge rejects is replaced by a demonstration
    ovd_threshold: float = 5.0  # of the judge's score, 0 to 9; the paper's is not known to us
    ovd_ratio: Literal["teacher", "one"] = "teacher"  # pi_old of a demonstration: as the teacher sampled it, or sg pi
    ovd_failed: bool = True  # a demonstration that fails takes the place as well; --no_ovd_failed: the rollout stays
    judge_url: str = ""  # scores from an OpenAI-compatible server; "": the student itself, by its digits' probabilities
    judge_model: str = ""  # the name it serves
    max_judge_tokens: int = 16  # of a served judge's reply
    # ---- Policy gradient and hybrids
    divide_by_std: bool = False  # advantages over their group's standard deviation; SDPO's code does not
    clip_low: float = 0.2  # the ratio pi / pi_old is clipped to 1 - clip_low
    clip_high: float = 0.28  # and 1 + clip_high
    dual_clip: float = 3.0  # where A < 0 the loss is at most this times |A|
    w_opd: float = 1.0  # joint, reshape: weight of the teacher's part; the paper gives none
    w_rl: float = 1.0  # the same, of the policy gradient
    reweight_lam: float = 0.5  # reweight: lambda, RLSD's; falls linearly to 0 over reweight_steps
    reweight_steps: int = 50  # rollout batches
    reweight_clip: float = 0.2  # reweight: eps_w, RLSD's

    def templates(self) -> Templates:
        texts = (self.solution_template, self.feedback_template, self.critique_template)
        return Templates(*texts, self.closing_line, self.critique_request, self.judge_request)

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
    "own": {},  # Table D.1's; --data FILE.py
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
# Chosen on validation problems, seed 0, with as many settings for each method of a subset (study/results/README.md). trace-rare and
# trace-cold keep trace's settings, hybrids are tuned on code alone, and OVD and GRPO on code-judge, whose others are code's.
TOY_PRESETS = {
    "trace": {"model": "tasks/toy_models/trace"},
    "code": {"model": "tasks/toy_models/code"},
    "choice": {"model": "tasks/toy_models/choice", "feedback": "sibling"},
    "trace-rare": {"model": "tasks/toy_models/trace"},
    "trace-often": {"model": "tasks/toy_models/trace-often"},
    "trace-cold": {"model": "tasks/toy_models/trace-cold"},
    "code-judge": {"model": "tasks/toy_models/code-judge"},
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


# ---- From a command to settings ------------------------------------------------------------------------------


class Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        fail(f"{message} (python vpd.py --help lists the settings)")


def flags() -> Parser:
    """A flag for each setting. Its help is what stands beside it in Config."""
    parser = Parser(Config, description="Variational Policy Distillation and its baselines.", allow_abbrev=False)
    said = dict(re.findall(r"^ {4}(\w+): .*?  # (.+)$", inspect.getsource(Config), flags=re.MULTILINE))
    for action in parser._actions:
        off = action.option_strings[0].startswith("--no_")
        told = action.help or said.get(action.dest, "").replace("%", "%%")
        action.help = f"turns --{action.dest} off" if off else told
        action.default = argparse.SUPPRESS if off else action.default  # on is said beside the flag itself
    return parser


def parse(argv: list[str] | None = None) -> Config:
    """Flags over the preset of (task, subset, method) over the defaults of Config."""
    parser, given = flags(), sys.argv[1:] if argv is None else argv
    # The help waits for the preset, whose values it shows.
    chosen, _ = parser.parse_known_args([flag for flag in given if flag not in ("-h", "--help")])
    preset = PRESETS[chosen.task] | METHOD_PRESETS.get((chosen.task, chosen.method), {})
    if chosen.task == "toy":
        # Of the toy models one has learned to judge.
        subset = chosen.subset or ("code-judge" if chosen.method == "ovd" else tasks.TASKS["toy"][0])
        # The regimes of trace take its settings, and then their own.
        for key in (subset.split("-")[0], (subset.split("-")[0], chosen.method), subset, (subset, chosen.method)):
            preset |= TOY_PRESETS.get(key, {})
        preset |= {"subset": subset}
    elif chosen.smoke and chosen.task != "own":
        preset |= SMOKE | {"data": str(tiny.FIXTURES / {"math": ""}.get(chosen.task, f"{chosen.task}.jsonl")),
                           "minibatch_prompts": 2 if chosen.task == "lcb" else 4,
                           "subset": "all" if chosen.task == "sciknoweval" else ""}  # fmt: skip
    parser.set_defaults(**preset)

    def settle() -> Config:
        cfg, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
        if unknown:
            parser.error(f"unknown argument {unknown[0]}")
        if cfg.task == "toy" and not Path(cfg.model).is_dir() and (Path(__file__).parents[1] / cfg.model).is_dir():
            cfg.model = str(Path(__file__).parents[1] / cfg.model)  # started from another folder
        cfg.out = cfg.out or f"runs/{cfg.task}-{cfg.method}-seed{cfg.seed}"
        cfg.data = str(Path(cfg.data).resolve()) if cfg.data else ""  # evaluation may start from another folder
        return cfg

    cfg = settle()
    saved = Path(cfg.out) / "config.json"
    if not cfg.resume or not (saved.exists() or (Path(cfg.out) / "checkpoints").exists()):
        return cfg
    # The run's own settings take the preset's place, so what differs from them now was asked for by a flag.
    try:
        kept = json.loads(saved.read_text())
    except OSError:
        parser.error(
            f"{cfg.out} has checkpoints and no config.json that can be read: put it back, or give another --out"
        )
    except ValueError:
        parser.error(f"{saved} is not JSON: --overwrite starts the run again")
    if not isinstance(kept, dict) or not {"task", "subset", "method", "model", "seed"} <= kept.keys():
        parser.error(f"{saved} does not hold the settings of a run: --overwrite starts it again")
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
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(cfg, name) == 1:
            raise ValueError(f"--{name} must be below 1: at 1 the average never takes anything in")
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
    never = cfg.group_size < 2 or (not cfg.borrow and not cfg.passed_text and cfg.feedback in TEXTS)
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
        if url and parts.scheme not in ("http", "https"):
            raise ValueError(f"--{who}_url must begin with http:// or https://, not {url!r}")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                f"--{who}_url holds a secret, which would be saved with the run: put the key into OPENAI_API_KEY"
            )
    if cfg.critic_url and (cfg.feedback != "critique" or not method.teacher):
        raise ValueError("--critic_url needs --feedback critique and a method with a teacher")
    if cfg.judge_url and cfg.method != "ovd":
        raise ValueError(f"--judge_url is for --method ovd: {cfg.method} has no judge")
    if cfg.ovd_threshold > 10:
        raise ValueError(f"--ovd_threshold must be at most 10, which rejects every score, not {cfg.ovd_threshold}")
    if bool(cfg.expert_url) != (cfg.expert == "served"):
        raise ValueError("--expert served and --expert_url go together")
    if cfg.passed_text and (cfg.feedback not in TEXTS or not method.teacher):
        raise ValueError(
            f"--passed_text takes the place of a borrowed text: with --feedback {' or '.join(TEXTS)}, and a teacher"
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
    if cfg.smoke and cfg.task in ("toy", "own"):
        raise ValueError(f"--smoke is for lcb, sciknoweval and math: --task {cfg.task} runs here as it is")
    if cfg.teacher and not method.teacher:
        raise ValueError(f"--teacher {cfg.teacher} means nothing to --method {cfg.method}, which has no teacher")
    if cfg.smoke and cfg.plan:
        raise ValueError("--plan is for the task's own model, which --smoke replaces by a tiny one")
    if (cfg.gpus or cfg.gpu_memory) and not cfg.plan:
        raise ValueError("--gpus and --gpu_memory are for --plan: a run takes the GPUs that torchrun gives it")
    cfg.templates()  # raises ValueError for a template without its hole
