"""Variational Policy Distillation (VPD, arXiv 2605.15113v1): the EM loop, and the baselines that share it.

One network, two prompts: the student pi_theta(y|x), and the teacher q_phi(y|x,C), the same weights shown the feedback C.
Per rollout batch k = 0, 1, 2, ... (Algorithm 1, App. D.6; the banners of `train` carry the same numbers):

    1. y ~ pi_theta(.|x), G rollouts for each of B prompts
    2. outcome r(x, y) in {0, 1} from the verifier, context C from a feedback source
    3. freeze log pi_theta(y|x)
    4. E-step, if k % F == 0: teach the teacher to tell success from failure
           r~ = beta (log q_phi(y|x,C) - log pi_theta(y|x))                                               (Eq. 7)
           L_E = - mean_{r=1} log sigmoid(r~ - delta) - mean_{r=0} log sigmoid(-(r~ - delta))              (Eq. 9)
    5. M-step: distil the teacher into the student on the same rollouts
           L_M = E_y sum_t KL(pi_theta(.|x,y_<t) || sg q_phi(.|x,C,y_<t))                                  (Eq. 10)
    6. push the weights to the sampler

What carries a gradient: in 4 only log q_phi (log pi_theta, delta, n+ and n- are numbers by then), in 5 only log pi_theta (the
teacher's view runs under no_grad; pi_old, advantages and every weight of a token are numbers). losses.py detaches once more.

Where we depart from the paper's text, or had to choose:

    1. Eq. 10 prints a sum over t; the loss is the mean over a row's tokens, as in the code its learning rates come from.
    2. delta moves by shift_rate (0.1) per E-step; Algorithm 1 as printed is --shift_rate 1.
    3. A success needs a context too. Where the paper is silent it borrows a failure's (feedback.py; --no_borrow).
    4. The E-step uses groups in which both outcomes have a context; --e_groups all is the paper's literal text.
    5. F counts rollout batches (App. D.6), not gradient updates (Sec. 4).
    6. The M-step's teacher is the network's live weights at each update; --teacher ema takes SDPO's moving average.
    7. VPD's M-step carries no importance weights (Sec. 3.4); SDPO's carries min(pi/pi_old, 2).
    8. An update in which no row takes part (no context, no advantage) is left out, momentum and weight decay included.
    9. Where vLLM samples, a token of the M-step also weighs min(pi_old/pi_sampler, 2), as in SDPO's code (--mismatch_limit).
   10. --e_failures likelier, off by default: a failure with r~ <= 0 adds nothing to Eq. 9; it counts in n- and delta.
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
# t holds what is known of a token, (1, n) tensors: logp = log pi_theta(y_t) and D = D(student, teacher) are live, D is 0 in rows
# without a context; old_logp and teacher_logp are log pi_theta(y_t) and log q(y_t) at the weights that sampled the batch, equal
# where there is no context; A is the row's advantage. t.step is the batch's number.


def vpd(t, cfg):  # Eq. 10
    return t.D


def sdpo(t, cfg):  # Eq. 2
    return losses.truncated_ratio(t.logp, t.old_logp, cfg.ratio_limit) * t.D


def grpo(t, cfg):
    return losses.grpo_loss(t.logp, t.old_logp, t.A, cfg.clip_low, cfg.clip_high, cfg.dual_clip)


def joint(t, cfg):  # B.23
    return cfg.w_opd * sdpo(t, cfg) + cfg.w_rl * grpo(t, cfg)


def reshape(t, cfg):  # B.24
    t.A = losses.reshaped_advantages(t.A, t.teacher_logp, t.old_logp, cfg.w_rl, cfg.w_opd)
    return grpo(t, cfg)


def reweight(t, cfg):  # B.26 to B.28; lambda falls linearly to 0
    lam = cfg.reweight_lam * max(0.0, 1 - t.step / cfg.reweight_steps) if cfg.reweight_steps else 0.0
    t.A = losses.reweighted_advantages(t.A, t.teacher_logp, t.old_logp, lam, cfg.reweight_clip)
    return grpo(t, cfg)


@dataclass(frozen=True)
class Method:
    """What a method is. objective: what the M-step minimises, one of the functions above; teacher: whose weights read the context
    by default ("": nobody's); rows: which rollouts take part, those with a context, with an advantage, or with either; e_step:
    whether the teacher is trained. What the objective reads: distils, t.D; scores, t.teacher_logp; reinforces, t.A: without its
    flag what t has by this name means nothing."""

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
    """Of settings that only these sources of C read."""
    need = f"a teacher and --feedback {', '.join(sources)}"
    return Group(FEEDBACK.title, need, lambda c: c.row().teacher and c.feedback in sources)


def objective_reads(name: str) -> dict:
    return dict(need="methods whose objective reads it", reads=lambda c: read_by(c.row().objective, name))


SOLUTION, CRITIQUE = shown_by("sibling", "solution_first", "both"), shown_by("critique")
SERVED = Group(FEEDBACK.title, "a model behind a server", lambda c: c.critic_url)
TEXT, LENT = shown_by(*(s for s in SOURCES if s not in ("sibling", "critique"))), shown_by("both", *TEXTS)


@dataclass
class Config:
    """Every setting, with the value of the paper's Table D.1 (lcb) as its default. PRESETS holds what other tasks change;
    a flag overrides both. What differs from the preset is printed at the start; all of it is saved as config.json."""

    task: Literal[*TASKS] = RUN("toy", "picks a preset; own: --data FILE.py")
    subset: str = RUN("", "of toy, sciknoweval or reasoning_gym; the task's first by default")
    data: str = RUN("", "file or folder of the task's source; the hub by default")
    train_tests: Literal["private", "public"] = RUN_LCB("private", "lcb: SDPO's seeded half, or the paper's words")
    since: str = RUN_LCB("2025-02-01", "lcb: problems from this contest date on")
    until: str = RUN_LCB("2025-05-01", "lcb: problems before this contest date")
    smoke: Literal["", "qwen3", "olmo3"] = RUN("", "[optional]2 batches of a tiny random model on the project's own records")
    method: Literal[*METHODS] = RUN("vpd", "a row of METHODS in vpd.py; DistIL and OVD are python -m neighbours.distil, .ovd")
    seed: int = RUN(0, "of the order of problems, rollouts, contexts and evaluation")
    out: str = RUN("", "run directory; by default runs/TASK-METHOD-seedN and the time")
    overwrite: bool = RUN(False, "delete the run directory if it exists")
    resume: bool = RUN(False, "go on from the last checkpoint in --out; starts the run if there is none")
    checkpoint_every: int = RUN(10, "rollout batches between checkpoints, of which two are kept; 0: only at the end", least=0)
    epochs: int = RUN(30, "passes over the training problems", least=0, need="--steps 0", reads=lambda c: not c.steps)
    steps: int = RUN(0, "rollout batches; 0: by --epochs", least=0)
    log_samples: int = RUN(8, "rollouts of each batch that go to samples.jsonl", least=0)
    track: Literal["", "tensorboard", "wandb"] = RUN("", "hand the log's numbers to this library too, where it is installed")
    unsafe_sandbox: bool = RUN(False, "run programs although this machine lacks a layer of the sandbox",
                                need="tasks that run programs", reads=machine.runs_programs)  # fmt: skip
    plan: bool = PLAN(False, "print what the run needs, check this machine, and end")
    gpus: int = PLAN(0, "with --plan: GPUs to plan for; 0: those here", least=0, need="--plan", reads=lambda c: c.plan)
    gpu_memory: float = PLAN(0.0, "with --plan: GB of each; 0: as here", least=0, need="--plan", reads=lambda c: c.plan)

    eval_every: int = WATCH(10, "rollout batches between evaluations; 0: never", least=0)
    eval_samples: int = WATCH(evaluate.Config.n, "n of avg@n: samples of each problem", above=0)
    eval_temperature: float = WATCH(evaluate.Config.temperature, "SDPO's 0.6 on the paper's tasks", least=0)
    eval_top_p: float = WATCH(evaluate.Config.top_p, "SDPO's 0.95 on the paper's tasks", above=0, most=1)
    teacher_probe: int = PROBE(0, "base failures on which the teacher's pass rate is measured at every evaluation", least=0)

    model: str = MODEL("Qwen/Qwen3-8B", "folder or hub id")
    dtype: Literal["float32", "float64"] = MODEL("float32", "of the weights")
    micro_batch_tokens: int = MODEL(20480, "padded tokens of a forward pass; changes speed and memory, no update", above=0)

    prompts_per_batch: int = ROLLOUTS(32, "B, problems in a rollout batch", above=0)
    group_size: int = ROLLOUTS(8, "G, rollouts per prompt", above=0)
    max_prompt_tokens: int = ROLLOUTS(2048, "longer problems are dropped and counted", above=0)
    max_response_tokens: int = ROLLOUTS(evaluate.Config.max_tokens, "a longer response is cut, and graded as it is", above=0)
    temperature: float = ROLLOUTS(1.0, "of rollouts, at which the trainer scores as well", above=0)
    top_p: float = ROLLOUTS(1.0, "of rollouts", above=0, most=1)
    sampler: Literal["", "vllm", "hf"] = ROLLOUTS("", "vLLM on a GPU and transformers on a CPU by default")
    engine_memory: float = ROLLOUTS_VLLM(0.0, "vLLM's share of the GPU while it samples; 0: by the plan", least=0, most=1)

    lr: float = ADAMW(1e-6, "learning rate of the M-step", above=0)
    warmup_steps: int = ADAMW(0, "rollout batches over which the learning rate rises", least=0)
    schedule: Literal["constant", "linear"] = ADAMW("constant", "linear: the learning rate falls to 0 over the run")
    adam_beta1: float = ADAMW(0.9, "AdamW's decay of the gradient's average", least=0, below=1)
    adam_beta2: float = ADAMW(0.999, "AdamW's decay of the squared gradient's average", above=0, below=1)
    weight_decay: float = ADAMW(0.01, "decoupled", least=0)
    max_grad_norm: float = ADAMW(1.0, "gradients are clipped to this norm", above=0)
    minibatch_prompts: int = ADAMW(1, "prompts per M-step update; at 1 a batch of 32 prompts makes 32 updates", above=0)

    feedback: Literal[*SOURCES] = FEEDBACK("solution_first", "where C comes from (feedback.py)")
    borrow: bool = LENT(True, "a success borrows a failing sibling's text")
    passed_text: str = shown_by(*TEXTS)("", "a success sees this text instead, which gives its label away (ablation)")
    max_teacher_tokens: int = FEEDBACK(10240, "of the teacher's prompt; beyond it the context is cut", above=0)
    max_critique_tokens: int = CRITIQUE(512, "of a critique", above=0)
    critic_url: str = CRITIQUE("", "critiques from an OpenAI-compatible server (key: OPENAI_API_KEY), not the student")
    critic_model: str = CRITIQUE("", "the name it serves")
    server_timeout: float = SERVED(60.0, "seconds to wait for a server, three times", above=0)
    solution_template: str = SOLUTION(Templates.solution, "section of the teacher's prompt, with {solution}")
    feedback_template: str = TEXT(Templates.feedback, "section of the teacher's prompt, with {feedback}")
    critique_template: str = CRITIQUE(Templates.critique, "section of the teacher's prompt, with {critique}")
    closing_line: str = FEEDBACK(Templates.closing, "end of the teacher's prompt")
    critique_request: str = CRITIQUE(Templates.request, "what a critic is asked: {question}, {attempt}, {reference}")

    e_step_every: int = E_STEP(5, "F: an E-step on every F-th rollout batch", above=0)
    e_minibatch_prompts: int = E_STEP(32, "prompts per E-step update; the whole batch makes one update", above=0)
    e_lr: float = E_STEP(0.0, "learning rate of the E-step; 0: --lr", least=0)
    e_optimizer: Literal["shared", "own"] = E_STEP("own", "whose AdamW state; shared: one for both steps (docs/paper.md)")
    e_groups: Literal["mixed", "all"] = E_STEP("mixed", "mixed: groups in which both outcomes have a context")
    e_failures: Literal["all", "likelier"] = E_STEP("all", "likelier: only failures with r~ > 0, likelier to teacher than prior")
    beta: float = FEEDBACK(0.1, "of the implicit reward, Eq. 7", above=0)
    shift_rate: float = E_STEP(0.1, "delta <- (1 - rate) delta + rate value; the paper gives none", above=0, most=1)
    prior: Literal["dynamic", "fixed"] = E_STEP("dynamic", "what r~ is measured from; fixed: the initial weights (ablation)")

    divergence: Literal[*DIVERGENCES] = DISTIL("kl_student_teacher", "D of the M-step, Eq. 10")
    top_k: int = DISTIL(20, "D over the student's top K tokens and a tail bucket; 0: all of V", least=0)
    teacher: Literal["", "live", "ema"] = FEEDBACK("", "whose weights read C; the method's own by default")
    ema_rate: float = FEEDBACK(0.01, "teacher <- (1 - rate) teacher + rate student, per rollout batch", least=0, most=1,
                               need="an EMA teacher", reads=lambda c: c.reader() == "ema")  # fmt: skip
    ratio_limit: float = DISTIL(2.0, "SDPO's token weight min(pi / pi_old, limit)", above=0, **objective_reads("ratio_limit"))
    mismatch_limit: str = ROLLOUTS_VLLM("2", "SDPO's token weight min(pi_old / pi_sampler, limit) when vLLM samples; none: off")

    divide_by_std: bool = GRADIENT(False, "advantages over their group's standard deviation; SDPO's code does not")
    clip_low: float = GRADIENT(0.2, "the ratio pi / pi_old is clipped to 1 - clip_low", above=0)
    clip_high: float = GRADIENT(0.28, "the ratio pi / pi_old is clipped to 1 + clip_high", above=0)
    dual_clip: float = GRADIENT(3.0, "where A < 0 the loss is at most this times |A|", above=0)
    w_opd: float = GRADIENT(1.0, "hybrids' weight of the teacher's part; the paper gives none", least=0, **objective_reads("w_opd"))
    w_rl: float = GRADIENT(1.0, "hybrids' weight of the policy gradient", least=0, **objective_reads("w_rl"))
    reweight_lam: float = GRADIENT(0.5, "reweight's lambda at first (RLSD's)", least=0, most=1, **objective_reads("reweight_lam"))
    reweight_steps: int = GRADIENT(50, "rollout batches until lambda is 0", least=0, **objective_reads("reweight_steps"))
    reweight_clip: float = GRADIENT(0.2, "reweight's eps_w (RLSD's)", above=0, **objective_reads("reweight_clip"))

    def row(self) -> Method:
        return METHODS[self.method]

    def reader(self) -> str:
        """Whose weights read the context: live, ema, or "" for nobody's."""
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
    """One rollout batch. Row i * G + j is rollout j of problem i; B rows, T tokens of the longest response."""

    step: int
    problems: list  # of each row
    x: list[list[int]]  # the student's prompt
    rollouts: list[Rollout]
    y: list[list[int]]  # response tokens
    texts: list[str]
    mask: torch.Tensor  # (B, T), 1 on response tokens including EOS
    sampler_logp: torch.Tensor  # (B, T), log-probs as the sampler's engine gave them
    outcomes: list = field(default_factory=list)
    r: torch.Tensor | None = None  # (B,), rewards
    graded: torch.Tensor | None = None  # (B,), False where grading itself failed
    C: list[feedback.Context | None] = field(default_factory=list)
    xC: list[list[int]] = field(default_factory=list)  # the teacher's prompt; x where there is no context
    has_C: torch.Tensor | None = None  # (B,)
    contexts_cut: int = 0
    old_logp: torch.Tensor | None = None  # (B, T), log pi_theta(y_t) at the weights that sampled the batch, if frozen
    teacher_logp: torch.Tensor | None = None  # (B, T), log q(y_t) at the same weights, old_logp where there is no context

    def lengths(self) -> list[int]:
        """Tokens of each row through the network, in the longer of its two views."""
        return [max(len(x), len(xC)) + len(y) for x, xC, y in zip(self.x, self.xC, self.y)]

    def known(self, A: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is known of each token before an update, (B, T) each. A: (B,), the rows' advantages."""
        known = dict(sampler_logp=self.sampler_logp, A=A, has_C=self.has_C, old_logp=self.old_logp, teacher_logp=self.teacher_logp)
        wide = lambda x: x if x.ndim == 2 else x[:, None].expand_as(self.mask)  # noqa: E731
        return {name: wide(x) for name, x in known.items() if x is not None}

    def student(self, policy: Policy, rows: list[int]):
        """The rows under the student's prompt, pi_theta(.|x)."""
        return policy.view([self.x[i] for i in rows], [self.y[i] for i in rows])

    def reader(self, policy: Policy, rows: list[int], teacher=None):
        """The rows under the teacher's prompt, q(.|x,C)."""
        return policy.view([self.xC[i] for i in rows], [self.y[i] for i in rows], teacher)


def roll_out(cfg: Config, policy: Policy, sampler, problems: list, step: int, verify: Callable | None = None) -> Batch:
    """y ~ pi_theta(.|x): G rollouts of each problem. verify: may begin to grade those that are there."""
    G, x = cfg.group_size, [feedback.student_prompt(policy.tokenizer, p.messages) for p in problems]
    seed = seed_for(cfg.seed, step, "rollouts")
    problems = [p for p in problems for _ in range(G)]
    how = cfg.max_response_tokens, cfg.temperature, cfg.top_p
    rollouts = sampler.sample(x, G, seed, *how, grading(verify, problems, policy))
    y, x = [rollout.tokens for rollout in rollouts], [prompt for prompt in x for _ in range(G)]
    logp = [torch.tensor(rollout.logp, dtype=policy.score_dtype, device=policy.device) for rollout in rollouts]
    texts = [policy.decode(tokens) for tokens in y]
    return Batch(step, problems, x, rollouts, y, texts, policy.mask(y), pad_sequence(logp, batch_first=True), xC=x)


def grade(batch: Batch, task, policy: Policy) -> None:
    """Outcomes r in {0, 1}."""
    batch.outcomes = task.verify(batch.problems, batch.texts)
    batch.r = torch.tensor([o.reward for o in batch.outcomes], dtype=policy.score_dtype, device=policy.device)
    batch.graded = torch.tensor([o.verdict != "internal" for o in batch.outcomes], device=policy.device)
    batch.has_C = torch.zeros_like(batch.graded)


def give_contexts(cfg: Config, batch: Batch, policy: Policy, critic: feedback.Critic) -> None:
    """A context C, or none, for each rollout, and the teacher's prompts."""
    batch.C = feedback.batch_contexts(cfg, batch.problems, batch.texts, batch.outcomes, batch.step, critic)
    batch.has_C = torch.tensor([c is not None for c in batch.C], device=policy.device)  # (B,)
    batch.xC = list(batch.x)
    for i, C in enumerate(batch.C):
        if C is not None:
            messages = batch.problems[i].messages
            batch.xC[i], cut = feedback.teacher_prompt(policy.tokenizer, messages, C, cfg.templates(), cfg.max_teacher_tokens)
            batch.contexts_cut += cut > 0


def freeze(batch: Batch, policy: Policy, teacher, with_teacher: bool) -> torch.Tensor:
    """log pi_theta(y|x), and log q(y|x,C) where somebody needs it, at the weights that sampled the batch. Returns the entropy of
    the student at each token, (B, T)."""
    batch.old_logp, entropy = policy.score(batch.x, batch.y)
    if with_teacher:
        logp, _ = policy.score(batch.xC, batch.y, batch.has_C.nonzero().flatten().tolist(), teacher)
        batch.teacher_logp = torch.where(batch.has_C[:, None], logp, batch.old_logp)
    return entropy


def e_step_minibatches(cfg: Config, batch: Batch, skip: Callable) -> list[list[int]]:
    """The rows of each E-step update; skip(reason, rows) counts those left out. Only rows with a context take part. --e_groups
    mixed further asks that both outcomes of a group have one: a kind of context that goes with one label gives it away."""
    mixed = lambda rows: 0 < batch.r[rows].sum() < len(rows)  # noqa: E731
    groups, minibatches = [], []
    for first in range(0, len(batch.y), cfg.group_size):
        rows = [i for i in range(first, first + cfg.group_size) if batch.has_C[i]]
        groups += [rows] if rows and (cfg.e_groups == "all" or mixed(rows)) else []
    skip("e_step: no context, or one outcome only", len(batch.y) - sum(map(len, groups)))
    for first in range(0, len(groups), cfg.e_minibatch_prompts):
        rows = sum(groups[first : first + cfg.e_minibatch_prompts], [])
        if mixed(rows):
            minibatches.append(rows)
        else:  # only with --e_groups all
            skip("e_step: minibatch of one outcome", len(rows))
    return minibatches


def advantages(cfg: Config, batch: Batch) -> torch.Tensor:
    """A of each row, (B,). Rows that the grader failed on have the mean of their group: no advantage, and no pull on that mean
    (with --divide_by_std the group's spread is smaller by them)."""
    groups, known = batch.r.view(-1, cfg.group_size), batch.graded.view(-1, cfg.group_size)
    means = (groups * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    r = torch.where(known, groups, means).reshape(-1)
    return losses.group_advantages(r, cfg.group_size, cfg.divide_by_std) * batch.graded


# ---- The loop ----------------------------------------------------------------------------------------------------


def adamw(cfg: Config, policy: Policy) -> torch.optim.AdamW:
    betas, fused = (cfg.adam_beta1, cfg.adam_beta2), policy.device.type == "cuda"  # fused: half the time, no copy of the state
    return torch.optim.AdamW(policy.model.parameters(), cfg.lr, betas, weight_decay=cfg.weight_decay, fused=fused)


def train(cfg: Config, run: session.Run) -> None:
    """Algorithm 1, and the baselines' loops, which differ from it by a row of METHODS."""
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
            batch = roll_out(cfg, policy, sampler, problems, step, run.task.verify)
            log.lap("rollout")
            run.leave_if_told(step)

            # ---- 2. Outcomes r in {0, 1}, and contexts C (or none)
            grade(batch, run.task, policy)
            log.skip("grader failed", int((~batch.graded).sum()))
            log.lap("verify")
            if cfg.reader():
                give_contexts(cfg, batch, policy, run.critic)
            log.lap("feedback")
            run.leave_if_told(step)

            # ---- 3. Freeze log pi_theta(y|x). Where one update follows at these weights, its own pass gives the same numbers
            sampler.sleep()
            e_due = method.e_step and step % cfg.e_step_every == 0
            frozen = e_due or size < len(batch.y)
            if frozen:
                log.frozen(batch, freeze(batch, policy, teacher, with_teacher=e_due or method.scores))
            log.lap("freeze")

            # ---- 4. E-step: refine the teacher (Eq. 9), every F-th batch
            if e_due:
                prior_logp = batch.old_logp if initial is None else policy.score(batch.x, batch.y, model=initial)[0]
                for n, rows in enumerate(e_step_minibatches(cfg, batch, log.skip)):
                    # First pass, no gradient: every r~ of the minibatch, hence delta before it is used. The first minibatch
                    # meets the weights of the freeze, whose pass serves when it read the live teacher.
                    serves = teacher is None and n == 0
                    q_logp = batch.teacher_logp if serves else policy.score(batch.xC, batch.y, rows)[0]
                    q_logp = q_logp[rows].requires_grad_()  # (n, T)
                    r_tilde = losses.implicit_reward(q_logp, prior_logp[rows], batch.mask[rows], cfg.beta)  # Eq. 7
                    delta = losses.moving_shift(run.shift, losses.reward_shift(r_tilde, batch.r[rows]).item(), cfg.shift_rate)
                    floor = 0.0 if cfg.e_failures == "likelier" else None
                    e_loss = losses.bco_loss(r_tilde, batch.r[rows], delta, floor=floor)  # Eq. 9
                    # dL_E / d log q(y_t|x,C,y_<t) = c, one number for all tokens of a row. With c fixed, the second pass sums
                    # c log q over any micro-batches, and has the gradient of Eq. 9 over the whole minibatch.
                    c = torch.zeros_like(batch.old_logp)  # (B, T)
                    (c[rows],) = torch.autograd.grad(e_loss, q_logp)
                    for part in policy.micro_batches(rows, batch.lengths()):
                        q = batch.reader(policy, part)
                        loss, _ = q.loss(lambda t: t.c * t.logp, q.mask, {"c": c[part, : q.mask.shape[1]]})
                        policy.backward(loss)
                        log.passed(q)
                    run.shift = delta if math.isfinite(delta) else None
                    norm = run.update(e_optimizer, (cfg.e_lr or cfg.lr) * rate, e_loss.item())
                    log.e_update(e_loss.item(), norm, r_tilde.detach() - delta, batch.r[rows], c[rows])
                log.note(shift=run.shift)
                log.lap("e_step")

            # ---- 5. M-step: distil the teacher into the student (Eq. 10); what is minimised is METHODS' objective
            A = advantages(cfg, batch) if method.reinforces else torch.zeros_like(batch.r)  # (B,)
            takes_part = {"context": batch.has_C, "advantage": A != 0, "either": batch.has_C | (A != 0)}[method.rows]
            log.skip("m_step: no signal" if method.reinforces else "m_step: no context", int((~takes_part).sum()))
            known = batch.known(A)
            reads = method.distils or method.scores and not frozen  # whether the update's passes need the teacher's view

            def per_token(t):
                """The objective at each token, weighed for the gap between trainer and sampler."""
                t.step, t.D = step, t.D * t.has_C
                if not frozen:  # this pass is at the weights that sampled the batch: the ratio is exactly 1
                    t.old_logp = t.logp.detach()
                    t.teacher_logp = torch.where(t.has_C, t.teacher_logp, t.old_logp)  # no context: A^SDPO = 0
                mismatch = 1.0 if limit is None else losses.truncated_ratio(t.old_logp, t.sampler_logp, limit)
                return method.objective(t, cfg) * mismatch

            for first in range(0, len(batch.y), size):
                rows = [i for i in range(first, first + size) if takes_part[i]]
                if not rows:
                    log.skip("m_step: whole update")
                    continue
                for part in policy.micro_batches(rows, batch.lengths()):
                    with torch.no_grad():  # sg q_phi
                        q = batch.reader(policy, part, teacher) if reads else None
                    view = batch.student(policy, part)
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
    """What a command's flags mean."""
    about = "Variational Policy Distillation and its baselines."
    return parse(argv, Config, "python vpd.py", about, partial(presets.of, PRESETS))


def main(argv: list[str] | None = None) -> None:
    session.launch(settings(argv), check, train)


if __name__ == "__main__":
    command.run(main)
