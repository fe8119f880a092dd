"""Variational Policy Distillation (VPD, arXiv 2605.15113v1): the EM loop, and the baselines that share it.

One network reads two prompts: as the student pi_theta(y|x) it sees x only, as the teacher q_phi(y|x,C) it also sees the feedback C.
For each rollout batch k = 0, 1, 2, ... (Algorithm 1, App. D.6; the banners of `train` have the same numbers):

    1. y ~ pi_theta(.|x), G rollouts of each prompt
    2. outcome r(x, y) in {0, 1} from the verifier, context C from a feedback source
    3. freeze log pi_theta(y|x)
    4. E-step, if k % F == 0: teach the teacher to tell success from failure
           r~ = beta (log q_phi(y|x,C) - log pi_theta(y|x))                                               (Eq. 7)
           L_E = - mean_{r=1} log sigmoid(r~ - delta) - mean_{r=0} log sigmoid(-(r~ - delta))              (Eq. 9)
    5. M-step: distil the teacher into the student on the same rollouts
           L_M = E_y sum_t KL(pi_theta(.|x,y_<t) || sg q_phi(.|x,C,y_<t))                                  (Eq. 10)
    6. push the weights to the sampler

Only log q_phi carries a gradient in 4 (log pi_theta, delta, n+ and n- are constants), and only log pi_theta in 5 (the teacher
runs under no_grad; pi_old, the advantages and all token weights are constants). The functions of losses.py detach them too.

Where we depart from the paper's text, or had to choose:

    1. Eq. 10 prints a sum over t; the loss is the mean over a row's tokens, as in the code its learning rates come from.
    2. delta moves by shift_rate (0.1) per E-step update; Algorithm 1 as printed is --shift_rate 1.
    3. A success needs a context too. Where the paper is silent, it borrows that of a failure (feedback.py; --no_borrow).
    4. The E-step uses groups in which both outcomes have a context; --e_groups all follows the paper's text literally.
    5. F counts rollout batches (App. D.6), not gradient updates (Sec. 4).
    6. The M-step's teacher has the live weights at each update, or with --teacher ema a moving average of them. The E-step
       always trains the live weights.
    7. VPD's M-step has no importance weights (Sec. 3.4); SDPO's has min(pi/pi_old, 2).
    8. If no row of an update takes part (no context, no advantage), the optimizer does not step.
    9. When vLLM samples, tokens of the M-step are also weighted by min(pi_old/pi_sampler, 2), as in SDPO's code (--mismatch_limit).
   10. With --e_failures likelier (off by default) a failure with r~ <= 0 adds nothing to Eq. 9 but counts in n- and delta.
   11. The E-step and the M-step have an AdamW state each; with --e_optimizer shared they have one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

import evaluate
import feedback
import losses
from feedback import SOURCES, TEXTS, Templates
from harness import command, machine, presets, session
from harness.settings import Group, check, parse, read_by
from losses import DIVERGENCES
from model.policy import Policy, ema_update
from rollout import Rollout, grading, seed_for
from tasks import TASKS

# ---- What the M-step minimises, per token ----------------------------------------------------------------------
# t holds (1, n) tensors, one entry per token. logp = log pi_theta(y_t) and D = D(student, teacher) carry gradients; D is 0 in rows
# without a context. old_logp and teacher_logp are log pi_theta(y_t) and log q(y_t) at the weights that sampled the batch, and equal
# in rows without a context. A is the row's advantage. t.step is the batch's number k.


def vpd(t, cfg):  # Eq. 10
    return t.D


def sdpo(t, cfg):  # Eq. 2, with the token weight of SDPO's code
    return losses.truncated_ratio(t.logp, t.old_logp, cfg.ratio_limit) * t.D


def grpo(t, cfg):
    return losses.grpo_loss(t.logp, t.old_logp, t.A, cfg.clip_low, cfg.clip_high, cfg.dual_clip)


def joint(t, cfg):  # B.23
    return cfg.w_opd * sdpo(t, cfg) + cfg.w_rl * grpo(t, cfg)


def reshape(t, cfg):  # B.24, B.25
    t.A = losses.reshaped_advantages(t.A, t.teacher_logp, t.old_logp, cfg.w_rl, cfg.w_opd)
    return grpo(t, cfg)


def reweight(t, cfg):  # B.26 to B.28; lambda falls linearly to 0
    lam = cfg.reweight_lam * max(0.0, 1 - t.step / cfg.reweight_steps) if cfg.reweight_steps else 0.0
    t.A = losses.reweighted_advantages(t.A, t.teacher_logp, t.old_logp, lam, cfg.reweight_clip)
    return grpo(t, cfg)


@dataclass(frozen=True)
class Method:
    """What defines a method. objective: what the M-step minimises, one of the functions above; teacher: the default weights of the
    teacher ("": no teacher); rows: the rollouts that take part, those with a context, with a nonzero advantage, or with either;
    e_step: whether there is an E-step. The other flags say what the objective reads: distils, t.D; scores, t.teacher_logp;
    reinforces, t.A. Without its flag the value of an entry means nothing."""

    objective: Callable
    teacher: Literal["", "live", "ema"]
    rows: Literal["context", "advantage", "either"]
    e_step: bool = False
    distils: bool = False
    scores: bool = False
    reinforces: bool = False


METHODS = {
    "vpd": Method(vpd, "live", "context", e_step=True, distils=True),
    "sdpo": Method(sdpo, "ema", "context", distils=True),
    "grpo": Method(grpo, "", "advantage", reinforces=True),
    "joint": Method(joint, "ema", "either", distils=True, reinforces=True),
    "reshape": Method(reshape, "ema", "either", scores=True, reinforces=True),
    "reweight": Method(reweight, "ema", "advantage", scores=True, reinforces=True),
}

# ---- Settings ----------------------------------------------------------------------------------------------------

RUN, PLAN, WATCH = Group("Run"), Group("Plan"), Group("Evaluation on validation problems")
PROBE = Group(WATCH.title, "a method with a teacher, and --eval_every", lambda c: c.row().teacher and c.eval_every)
MODEL, ROLLOUTS, ADAMW = Group("Model"), Group("Rollouts"), Group("Optimizer (AdamW)")
RUN_LCB = Group(RUN.title, "--task lcb", lambda c: c.task == "lcb")
ROLLOUTS_VLLM = Group(ROLLOUTS.title, "--sampler vllm", lambda c: c.sampler != "hf")
FEEDBACK = Group("Feedback", "a method with a teacher", lambda c: c.row().teacher)
E_STEP = Group("E-step", "a method with an E-step", lambda c: c.row().e_step)
DISTIL = Group("Distillation", "a method that distils (its loss reads D)", lambda c: c.row().distils)
GRADIENT = Group("Policy gradient and hybrids", "a method with a policy gradient", lambda c: c.row().reinforces)


def shown_by(*sources: str) -> Group:
    """The group of settings that only these feedback sources read."""
    need = f"a teacher and --feedback {', '.join(sources)}"
    return Group(FEEDBACK.title, need, lambda c: c.row().teacher and c.feedback in sources)


def objective_reads(name: str) -> dict:
    return dict(need="methods whose objective reads it", reads=lambda c: read_by(c.row().objective, name))


SOLUTION, CRITIQUE = shown_by("sibling", "solution_first", "both"), shown_by("critique")
SERVED = Group(FEEDBACK.title, "a model behind a server", lambda c: c.critic_url)
TEXT, LENT = shown_by(*(s for s in SOURCES if s not in ("sibling", "critique"))), shown_by("both", *TEXTS)


@dataclass
class Config:
    """Every setting. The defaults are those of the paper's Table D.1 (lcb), PRESETS holds what other tasks change, and a flag
    overrides both. A run prints what differs from its preset and saves all settings in config.json."""

    task: Literal[*TASKS] = RUN("toy", "the task, which selects a preset; own: your file, --data FILE.py")
    subset: str = RUN("", "subset of toy, sciknoweval or reasoning_gym; default: the task's first")
    data: str = RUN("", "file or folder with the task's data; default: download from the hub")
    train_tests: Literal["private", "public"] = RUN_LCB("private", "tests that give the reward; private: half of them")
    since: str = RUN_LCB("2025-02-01", "first contest date of the problems")
    until: str = RUN_LCB("2025-05-01", "contest date before which the problems end")
    smoke: Literal["", "qwen3", "olmo3"] = RUN("", "[optional]train a tiny random model for two batches on bundled problems")
    method: Literal[*METHODS] = RUN("vpd", "training method; for DistIL and OVD run python -m neighbours.distil, .ovd")
    seed: int = RUN(0, "seed of the problem order, rollouts, contexts and evaluation")
    out: str = RUN("", "run directory; default: runs/TASK-METHOD-seedN-TIME")
    overwrite: bool = RUN(False, "delete the run directory if it exists")
    resume: bool = RUN(False, "continue from the last checkpoint in --out, or start if there is none")
    checkpoint_every: int = RUN(10, "rollout batches between checkpoints (the last two are kept); 0: only at the end", least=0)
    epochs: int = RUN(30, "passes over the training problems", least=0, need="--steps 0", reads=lambda c: not c.steps)
    steps: int = RUN(0, "number of rollout batches; 0: as many as --epochs gives", least=0)
    log_samples: int = RUN(8, "rollouts per batch written to samples.jsonl", least=0)
    track: Literal["", "tensorboard", "wandb"] = RUN("", "also send the log to this library, which must be installed")
    unsafe_sandbox: bool = RUN(False, "run programs even if this machine lacks a layer of the sandbox",
                                need="tasks that run programs", reads=machine.runs_programs)  # fmt: skip
    plan: bool = PLAN(False, "print what the run needs, check this machine, and exit")
    gpus: int = PLAN(0, "with --plan: number of GPUs; 0: those of this machine", least=0, need="--plan", reads=lambda c: c.plan)
    gpu_memory: float = PLAN(0.0, "with --plan: GB per GPU; 0: as in this machine", least=0, need="--plan", reads=lambda c: c.plan)

    eval_every: int = WATCH(10, "rollout batches between evaluations; 0: never", least=0)
    eval_samples: int = WATCH(evaluate.Config.n, "samples per problem (the n of avg@n)", above=0)
    eval_temperature: float = WATCH(evaluate.Config.temperature, "sampling temperature of evaluation", least=0)
    eval_top_p: float = WATCH(evaluate.Config.top_p, "top_p of evaluation", above=0, most=1)
    teacher_probe: int = PROBE(0, "watched problems whose base failures the teacher is measured on; 0: none", least=0)

    model: str = MODEL("Qwen/Qwen3-8B", "folder or hub id of the model")
    dtype: Literal["float32", "float64"] = MODEL("float32", "dtype of the weights")
    micro_batch_tokens: int = MODEL(20480, "padded tokens per forward pass; affects speed and memory only", above=0)

    prompts_per_batch: int = ROLLOUTS(32, "problems per rollout batch", above=0)
    group_size: int = ROLLOUTS(8, "G, the rollouts per prompt", above=0)
    max_prompt_tokens: int = ROLLOUTS(2048, "tokens of a prompt; problems with a longer one are dropped", above=0)
    max_response_tokens: int = ROLLOUTS(evaluate.Config.max_tokens, "tokens of a response; longer ones are cut and graded", above=0)
    temperature: float = ROLLOUTS(1.0, "temperature at which rollouts are sampled and scored", above=0)
    top_p: float = ROLLOUTS(1.0, "top_p of rollouts", above=0, most=1)
    sampler: Literal["", "vllm", "hf"] = ROLLOUTS("", "vLLM, or transformers; default: vllm on a GPU, hf on a CPU")
    engine_memory: float = ROLLOUTS_VLLM(0.0, "share of the GPU's memory for vLLM; 0: computed by the plan", least=0, most=1)

    lr: float = ADAMW(1e-6, "learning rate of the M-step", above=0)
    warmup_steps: int = ADAMW(0, "rollout batches over which the learning rates rise", least=0)
    schedule: Literal["constant", "linear"] = ADAMW("constant", "course of the learning rates; linear: they fall to 0")
    adam_beta1: float = ADAMW(0.9, "decay rate of AdamW's average of the gradient", least=0, below=1)
    adam_beta2: float = ADAMW(0.999, "decay rate of AdamW's average of the squared gradient", above=0, below=1)
    weight_decay: float = ADAMW(0.01, "decoupled weight decay", least=0)
    max_grad_norm: float = ADAMW(1.0, "norm to which gradients are clipped", above=0)
    minibatch_prompts: int = ADAMW(1, "prompts per M-step update; with 1, a batch of 32 prompts gives 32 updates", above=0)

    feedback: Literal[*SOURCES] = FEEDBACK("solution_first", "source of the feedback C that the teacher sees (feedback.py)")
    borrow: bool = LENT(True, "show the teacher of a success the text of a failing sibling")
    passed_text: str = shown_by(*TEXTS)("", "fixed text for successes, which gives the label away (ablation)")
    max_teacher_tokens: int = FEEDBACK(10240, "tokens of a teacher prompt; the context is cut to fit", above=0)
    max_critique_tokens: int = CRITIQUE(512, "tokens of a critique; longer ones are cut", above=0)
    critic_url: str = CRITIQUE("", "OpenAI-compatible server for critiques (key: OPENAI_API_KEY); default: the student writes them")
    critic_model: str = CRITIQUE("", "name of the critic's model on that server")
    server_timeout: float = SERVED(60.0, "seconds to wait for a server, in each of three attempts", above=0)
    solution_template: str = SOLUTION(Templates.solution, "section of the teacher's prompt that holds {solution}")
    feedback_template: str = TEXT(Templates.feedback, "section of the teacher's prompt that holds {feedback}")
    critique_template: str = CRITIQUE(Templates.critique, "section of the teacher's prompt that holds {critique}")
    closing_line: str = FEEDBACK(Templates.closing, "last line of the teacher's prompt")
    critique_request: str = CRITIQUE(Templates.request, "the critic's prompt, with {question}, {attempt} and {reference}")

    e_step_every: int = E_STEP(5, "F: every F-th rollout batch has an E-step", above=0)
    e_minibatch_prompts: int = E_STEP(32, "prompts per E-step update; the whole batch gives one update", above=0)
    e_lr: float = E_STEP(0.0, "learning rate of the E-step; 0: the value of --lr", least=0)
    e_optimizer: Literal["shared", "own"] = E_STEP("own", "AdamW state of the E-step: its own, or the M-step's (docs/paper.md)")
    e_groups: Literal["mixed", "all"] = E_STEP("mixed", "groups in the E-step; mixed: those in which both outcomes have a context")
    e_failures: Literal["all", "likelier"] = E_STEP("all", "failures in the E-step; likelier: only those with r~ > 0")
    beta: float = FEEDBACK(0.1, "beta of the implicit reward (Eq. 7)", above=0)
    shift_rate: float = E_STEP(0.1, "rate of delta's moving average", above=0, most=1)
    prior: Literal["dynamic", "fixed"] = E_STEP("dynamic", "prior of r~: the current student, or the initial weights (ablation)")

    divergence: Literal[*DIVERGENCES] = DISTIL("kl_student_teacher", "divergence D of the M-step (Eq. 10)")
    top_k: int = DISTIL(20, "K, the student's likeliest tokens that D compares one by one; 0: the whole vocabulary", least=0)
    teacher: Literal["", "live", "ema"] = FEEDBACK("", "the teacher's weights: live or a moving average; default: by the method")
    ema_rate: float = FEEDBACK(0.01, "per rollout batch: teacher <- (1 - rate) teacher + rate student", least=0, most=1,
                               need="an EMA teacher", reads=lambda c: c.reader() == "ema")  # fmt: skip
    ratio_limit: float = DISTIL(2.0, "limit of the token weight min(pi / pi_old, limit)", above=0, **objective_reads("ratio_limit"))
    mismatch_limit: str = ROLLOUTS_VLLM("2", "limit of the token weight min(pi_old / pi_sampler, limit); none: no weight")

    divide_by_std: bool = GRADIENT(False, "divide advantages by the standard deviation of their group")
    clip_low: float = GRADIENT(0.2, "lower clip of the ratio pi / pi_old: 1 - clip_low", above=0, most=1)
    clip_high: float = GRADIENT(0.28, "upper clip of the ratio pi / pi_old: 1 + clip_high", above=0)
    dual_clip: float = GRADIENT(3.0, "upper bound of a token's loss where A < 0, in units of |A|", above=1)
    w_opd: float = GRADIENT(1.0, "weight of the teacher's part in joint and reshape", least=0, **objective_reads("w_opd"))
    w_rl: float = GRADIENT(1.0, "weight of the policy gradient in joint and reshape", least=0, **objective_reads("w_rl"))
    reweight_lam: float = GRADIENT(0.5, "reweight's initial lambda", least=0, most=1, **objective_reads("reweight_lam"))
    reweight_steps: int = GRADIENT(50, "rollout batches until reweight's lambda is 0", least=0, **objective_reads("reweight_steps"))
    reweight_clip: float = GRADIENT(0.2, "eps_w, the clip of reweight's token weights", above=0, **objective_reads("reweight_clip"))

    def row(self) -> Method:
        return METHODS[self.method]

    def reader(self) -> str:
        """The teacher's weights: live, ema, or "" if there is no teacher."""
        return self.teacher or self.row().teacher

    def templates(self) -> Templates:
        texts = (self.solution_template, self.feedback_template, self.critique_template)
        return Templates(*texts, self.closing_line, self.critique_request)


PRESETS = {
    "lcb": {},  # Table D.1
    "sciknoweval": dict(  # Table D.2; OLMo3-7B: --lr 5e-6
        lr=1e-5, epochs=0, steps=500, warmup_steps=10, minibatch_prompts=32, top_k=100, divergence="js", ema_rate=0.05,
        feedback="sibling", eval_every=25, eval_samples=evaluate.PROTOCOLS["sciknoweval"]["n"],
    ),
    "math": dict(  # Table D.4
        lr=5e-6, epochs=0, steps=200, warmup_steps=10, minibatch_prompts=32, top_k=0, divergence="kl_teacher_student",
        ema_rate=0.05, feedback="sibling", eval_every=20,
    ),
    "own": presets.ONE_GPU,  # --data FILE.py
    "reasoning_gym": presets.REASONING_GYM,
    "toy": presets.TOY,
}  # fmt: skip


# ---- A batch -----------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """One rollout batch of B rows. Row i * G + j is rollout j of problem i; T is the length of the longest response."""

    step: int
    problems: list  # each row's problem
    x: list[list[int]]  # the student's prompt
    rollouts: list[Rollout]
    y: list[list[int]]  # response tokens
    texts: list[str]  # the responses as text
    mask: torch.Tensor  # (B, T), 1 on response tokens including EOS
    sampler_logp: torch.Tensor  # (B, T), log-probs that the sampler reported
    outcomes: list = field(default_factory=list)
    r: torch.Tensor | None = None  # (B,), rewards
    graded: torch.Tensor | None = None  # (B,), False where the grader failed
    C: list[feedback.Context | None] = field(default_factory=list)
    xC: list[list[int]] = field(default_factory=list)  # the teacher's prompt; x where there is no context
    has_C: torch.Tensor | None = None  # (B,)
    contexts_cut: int = 0  # rows whose context was cut to fit
    old_logp: torch.Tensor | None = None  # (B, T), log pi_theta(y_t) at the weights that sampled the batch, if frozen
    teacher_logp: torch.Tensor | None = None  # (B, T), log q(y_t) at that time; old_logp where there is no context

    def lengths(self) -> list[int]:
        """Tokens of each row through the network, in the longer of its two views."""
        return [max(len(x), len(xC)) + len(y) for x, xC, y in zip(self.x, self.xC, self.y)]

    def known(self, A: torch.Tensor) -> dict[str, torch.Tensor]:
        """The constants that an objective reads, (B, T) each. A: advantages, (B,) or (B, T)."""
        known = dict(sampler_logp=self.sampler_logp, A=A, has_C=self.has_C, old_logp=self.old_logp, teacher_logp=self.teacher_logp)
        wide = lambda x: x if x.ndim == 2 else x[:, None].expand_as(self.mask)  # noqa: E731
        return {name: wide(x) for name, x in known.items() if x is not None}

    def view(self, policy: Policy, prompts: list[list[int]], rows: list[int], model=None):
        """The rows under these prompts: self.x gives the student pi_theta(.|x), self.xC the teacher q(.|x,C)."""
        return policy.view([prompts[i] for i in rows], [self.y[i] for i in rows], model)


def roll_out(cfg: Config, run: session.Run, log, problems: list) -> Batch:
    """y ~ pi_theta(.|x): G rollouts of each problem. A rollout's grading may begin while others are still sampled."""
    policy, G, seed = run.policy, cfg.group_size, seed_for(cfg.seed, log.step, "rollouts")
    x = [feedback.student_prompt(policy.tokenizer, problem.messages) for problem in problems]
    problems = [problem for problem in problems for _ in range(G)]
    how = cfg.max_response_tokens, cfg.temperature, cfg.top_p
    rollouts = run.sampler.sample(x, G, seed, *how, grading(run.task.verify, problems, policy))
    y, x = [rollout.tokens for rollout in rollouts], [prompt for prompt in x for _ in range(G)]
    logp = [torch.tensor(rollout.logp, dtype=policy.score_dtype, device=policy.device) for rollout in rollouts]
    texts = [policy.decode(tokens) for tokens in y]
    log.lap("rollout")
    run.leave_if_told(log.step)
    return Batch(log.step, problems, x, rollouts, y, texts, policy.mask(y), pad_sequence(logp, batch_first=True), xC=list(x))


def grade(cfg: Config, run: session.Run, log, batch: Batch) -> None:
    """Outcomes r in {0, 1} and, if the method has a teacher, a context C (or None) and the teacher's prompt for each rollout."""
    policy, templates, limit = run.policy, cfg.templates(), cfg.max_teacher_tokens
    batch.outcomes = run.task.verify(batch.problems, batch.texts)
    batch.r = torch.tensor([o.reward for o in batch.outcomes], dtype=policy.score_dtype, device=policy.device)
    batch.graded = torch.tensor([o.verdict != "internal" for o in batch.outcomes], device=policy.device)
    log.skip("grader failed", int((~batch.graded).sum()))
    log.lap("verify")
    if cfg.reader():
        batch.C = feedback.batch_contexts(cfg, batch.problems, batch.texts, batch.outcomes, batch.step, run.critic)
    for i, C in enumerate(batch.C):
        if C is not None:
            batch.xC[i], cut = feedback.teacher_prompt(policy.tokenizer, batch.problems[i].messages, C, templates, limit)
            batch.contexts_cut += cut > 0
    batch.has_C = torch.tensor([C is not None for C in batch.C or [None] * len(batch.y)], device=policy.device)
    log.lap("feedback")
    run.leave_if_told(log.step)


def freeze(batch: Batch, policy: Policy, teacher, with_teacher: bool) -> torch.Tensor:
    """Scores log pi_theta(y|x), and log q(y|x,C) if asked, at the weights that sampled the batch. Returns the student's entropy at
    each token, (B, T)."""
    batch.old_logp, entropy = policy.score(batch.x, batch.y)
    if with_teacher:
        logp, _ = policy.score(batch.xC, batch.y, batch.has_C.nonzero().flatten().tolist(), teacher)
        batch.teacher_logp = torch.where(batch.has_C[:, None], logp, batch.old_logp)
    return entropy


def e_step_minibatches(cfg: Config, batch: Batch, skip: Callable) -> list[list[int]]:
    """The rows of each E-step update; skip(reason, count) counts those left out. Only rows with a context take part. With
    --e_groups mixed both outcomes of a group must have one: a kind of context that goes with one outcome gives it away."""
    G, size = cfg.group_size, cfg.e_minibatch_prompts
    mixed = lambda rows: 0 < batch.r[rows].sum() < len(rows)  # noqa: E731
    groups = [[i for i in range(first, first + G) if batch.has_C[i]] for first in range(0, len(batch.y), G)]
    groups = [rows for rows in groups if rows and (cfg.e_groups == "all" or mixed(rows))]
    skip("e_step: no context, or one outcome only", len(batch.y) - sum(map(len, groups)))
    minibatches = [sum(groups[first : first + size], []) for first in range(0, len(groups), size)]
    skip("e_step: minibatch of one outcome", sum(len(rows) for rows in minibatches if not mixed(rows)))  # with --e_groups all
    return [rows for rows in minibatches if mixed(rows)]


def m_step_minibatches(takes_part: torch.Tensor, size: int, skip: Callable) -> list[list[int]]:
    """The rows of each M-step update: of every `size` rows those that take part. An update without any is skipped."""
    minibatches = [[i for i in range(first, first + size) if takes_part[i]] for first in range(0, len(takes_part), size)]
    skip("m_step: whole update", sum(not rows for rows in minibatches))
    return [rows for rows in minibatches if rows]


def advantages(cfg: Config, batch: Batch) -> torch.Tensor:
    """A of each row, (B,). A row that the grader failed on gets the mean reward of its group, so its advantage is 0 and the mean
    does not move (but with --divide_by_std the group's standard deviation is smaller)."""
    groups, known = batch.r.view(-1, cfg.group_size), batch.graded.view(-1, cfg.group_size)
    means = (groups * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    r = torch.where(known, groups, means).reshape(-1)
    return losses.group_advantages(r, cfg.group_size, cfg.divide_by_std) * batch.graded


# ---- The loop ----------------------------------------------------------------------------------------------------


def adamw(cfg: Config, policy: Policy) -> torch.optim.AdamW:
    betas, fused = (cfg.adam_beta1, cfg.adam_beta2), policy.device.type == "cuda"  # fused: half the time, no copy of the state
    return torch.optim.AdamW(policy.model.parameters(), cfg.lr, betas, weight_decay=cfg.weight_decay, fused=fused)


def train(cfg: Config, run: session.Run) -> None:
    """Algorithm 1. The baselines run the same loop with another row of METHODS."""
    method, policy, sampler = cfg.row(), run.policy, run.sampler
    teacher = policy.frozen_copy() if cfg.reader() == "ema" else None  # None: the live weights
    initial = policy.frozen_copy() if method.e_step and cfg.prior == "fixed" else None
    optimizer = adamw(cfg, policy)
    e_optimizer = adamw(cfg, policy) if method.e_step and cfg.e_optimizer == "own" else optimizer
    D = partial(losses.divergence, kind=cfg.divergence) if method.distils else None
    limit, size = run.mismatch_limit(), cfg.minibatch_prompts * cfg.group_size  # size: rows of an M-step update
    with run.started(teacher, {"shared": optimizer, "e_step": e_optimizer}):
        for step, problems in run.batches():
            log, rate = run.batch(step), run.rate(step)

            # ---- 1. Rollouts y ~ pi_theta(.|x)
            batch = roll_out(cfg, run, log, problems)

            # ---- 2. Outcomes r in {0, 1}, and contexts C (or none)
            grade(cfg, run, log, batch)

            # ---- 3. Freeze log pi_theta(y|x). If a single update follows at these weights, its own pass gives the same numbers
            sampler.sleep()
            e_due = method.e_step and step % cfg.e_step_every == 0
            frozen = e_due or size < len(batch.y)
            if frozen:
                log.frozen(batch, freeze(batch, policy, teacher, with_teacher=e_due or method.scores))
            log.lap("freeze")

            # ---- 4. E-step: refine the teacher (Eq. 9), every F-th batch
            if e_due:
                prior_logp = batch.old_logp if initial is None else policy.score(batch.x, batch.y, model=initial)[0]
                for update, rows in enumerate(e_step_minibatches(cfg, batch, log.skip)):
                    # First pass, no gradient: r~ of the whole minibatch, from which delta is updated before it is used. For the
                    # first minibatch the weights are those of the freeze, which has log q already if the teacher is live.
                    frozen_q = teacher is None and update == 0
                    q_logp = batch.teacher_logp if frozen_q else policy.score(batch.xC, batch.y, rows)[0]
                    q_logp = q_logp[rows].requires_grad_()  # (rows, T)
                    r_tilde = losses.implicit_reward(q_logp, prior_logp[rows], batch.mask[rows], cfg.beta)  # Eq. 7
                    delta = losses.moving_shift(run.shift, losses.reward_shift(r_tilde, batch.r[rows]).item(), cfg.shift_rate)
                    floor = 0.0 if cfg.e_failures == "likelier" else None
                    e_loss = losses.bco_loss(r_tilde, batch.r[rows], delta, floor=floor)  # Eq. 9
                    # c = dL_E / d log q(y_t|x,C,y_<t), the same for all tokens of a row. With c as a constant, the second pass
                    # minimises the sum of c log q, in any micro-batches: its gradient is that of Eq. 9 over the whole minibatch.
                    c = torch.zeros_like(batch.old_logp)  # (B, T)
                    (c[rows],) = torch.autograd.grad(e_loss, q_logp)
                    for part in policy.micro_batches(rows, batch.lengths()):
                        q = batch.view(policy, batch.xC, part)
                        loss, _ = q.loss(lambda t: t.c * t.logp, q.mask, {"c": c[part, : q.mask.shape[1]]})
                        policy.backward(loss)
                        log.passed(q)
                    run.shift = delta if math.isfinite(delta) else None
                    norm = run.update(e_optimizer, (cfg.e_lr or cfg.lr) * rate, e_loss.item())
                    log.e_update(e_loss.item(), norm, r_tilde.detach() - delta, batch.r[rows], c[rows])
                log.note(shift=run.shift)
                log.lap("e_step")

            # ---- 5. M-step: distil the teacher into the student (Eq. 10), or minimise a baseline's objective
            A = advantages(cfg, batch) if method.reinforces else torch.zeros_like(batch.r)  # (B,)
            takes_part = {"context": batch.has_C, "advantage": A != 0, "either": batch.has_C | (A != 0)}[method.rows]
            log.skip("m_step: no signal" if method.reinforces else "m_step: no context", int((~takes_part).sum()))
            known = batch.known(A)
            reads = method.distils or method.scores and not frozen  # whether the updates need the teacher's view

            def per_token(t):
                """The objective at each token, times the weight for the mismatch between trainer and sampler."""
                t.step, t.D = step, t.D * t.has_C
                if not frozen:  # this pass has the weights that sampled the batch, so the ratio is exactly 1
                    t.old_logp = t.logp.detach()
                    t.teacher_logp = torch.where(t.has_C, t.teacher_logp, t.old_logp)  # without a context A^SDPO = 0
                mismatch = 1.0 if limit is None else losses.truncated_ratio(t.old_logp, t.sampler_logp, limit)
                return method.objective(t, cfg) * mismatch

            for rows in m_step_minibatches(takes_part, size, log.skip):
                for part in policy.micro_batches(rows, batch.lengths()):
                    with torch.no_grad():  # sg q_phi
                        q = batch.view(policy, batch.xC, part, teacher) if reads else None
                    view = batch.view(policy, batch.x, part)
                    here = {name: v[part, : view.mask.shape[1]] for name, v in known.items()}
                    weights = losses.sequence_weights(view.mask, size)
                    loss, scores = view.loss(per_token, weights, here, q, D, cfg.top_k or None, entropy=not frozen)
                    policy.backward(loss)
                    log.m_pass(part, view, loss, scores, batch.has_C, measures=not frozen)
                log.m_norms.append(run.update(optimizer, cfg.lr * rate, log.m_loss()))
            if not frozen:
                log.from_passes(batch, takes_part, has_teacher=reads)
            if teacher is not None:
                ema_update(teacher, policy.model, cfg.ema_rate)  # once per rollout batch
            log.lap("m_step")

            # ---- 6. Push the weights to the sampler
            sampler.sync(policy)
            log.lap("sync")
            run.end_of_batch(log, batch)


# ---- The command -------------------------------------------------------------------------------------------------


def settings(argv: list[str] | None = None) -> Config:
    """The settings that a command's flags give."""
    about = "Variational Policy Distillation and its baselines."
    return parse(argv, Config, "python vpd.py", about, partial(presets.of, PRESETS))


def main(argv: list[str] | None = None) -> None:
    session.launch(settings(argv), check, train)


if __name__ == "__main__":
    command.run(main)
