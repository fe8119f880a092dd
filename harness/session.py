"""What surrounds the loop of vpd.py: opening a run, its directory with the logs, the state on disk, evaluation by the way, the
end."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from model import checkpoint
import evaluate
import feedback
from harness import plan
import tasks
from tasks import tiny
from harness.command import CannotWrite, write
from model.parallel import World
from model.policy import Policy
from neighbours.reviews import Reviews, ServerSilent, reach
from rollout import StaleEngine, check_sampler, open_sampler, seed_for, weights_of
from harness.settings import METHODS, Config


def watch(task: tasks.Task) -> tuple[list, str]:
    """The problems that training is watched by, and the name of their split."""
    return (task.validation, "validation") if task.validation else (task.test, "test")


def open_directory(out: Path, overwrite: bool, record: dict) -> None:
    """Makes the run directory with its config.json; one that is there is deleted if `overwrite`, else left as it is."""
    if overwrite and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "config.json").exists():
        write(out / "config.json", json.dumps(record, indent=1) + "\n")


def git_commit() -> str:
    """The commit of this code, marked when the tree differs from it; "unknown" outside a repository."""
    here = Path(__file__).parents[1]
    run = lambda *args: subprocess.run(["git", *args], cwd=here, capture_output=True, text=True)  # noqa: E731
    try:
        head = run("rev-parse", "HEAD")
    except OSError:  # no git on this machine
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+changes" if run("status", "--porcelain", "-uno").stdout else "")


def open_run(cfg: Config, out: Path, world: World) -> tuple:
    """What the loop needs: policy, sampler, task, and the record that config.json holds. The run directory `out` is made when
    nothing else can be wrong with the settings. Raises ValueError, OSError or ImportError with one line."""
    method = METHODS[cfg.method]
    if out.exists() and not cfg.overwrite and not cfg.resume:
        raise ValueError(f"{out} exists: give another --out, --resume to go on with it, or --overwrite to delete it")
    if cfg.overwrite and out.exists() and not (out / "config.json").exists():
        raise ValueError(f"{out} is no run directory (no config.json): --overwrite will not delete it")
    if cfg.task != "toy" and not torch.cuda.is_available() and not cfg.smoke and not Path(cfg.model).is_dir():
        run = f"run `bash run.sh {cfg.task} --smoke` or `bash run.sh toy`"
        here = "name a small model's folder, --model tasks/toy_models/trace say" if cfg.task == "own" else run
        raise ValueError(f"--task {cfg.task} with {cfg.model} needs CUDA GPUs: on this machine {here}")
    check_sampler(cfg.sampler)

    task = tasks.load(cfg.task, cfg.subset, cfg.data, cfg.train_tests, cfg.since, cfg.until)
    task.verify = world.shared(task.verify)
    if method.teacher and cfg.feedback in task.lacks:
        has = ", ".join(source for source in feedback.SOURCES if source not in task.lacks)
        raise ValueError(f"--feedback {cfg.feedback}: {task.name} has {has}")

    with tempfile.TemporaryDirectory() as made:
        # A smoke run that goes on has its model there.
        making = cfg.smoke and not (cfg.resume and (out / "base" / "config.json").exists())
        made = world.first(lambda: made)  # one process makes the model, on this machine
        if making:
            world.first(lambda: tiny.smoke_model(cfg.task, cfg.smoke, Path(made)))
        path = made if making else cfg.model
        found = plan.show(cfg, method, path, world.size)
        policy = Policy.load(path, getattr(torch, cfg.dtype), micro_batch_tokens=cfg.micro_batch_tokens, world=world)
        world.wait()  # everybody has read it
    if cfg.top_k > policy.vocabulary:
        raise ValueError(f"--top_k {cfg.top_k} exceeds the vocabulary of {policy.vocabulary} tokens")

    tokens = lambda p: len(feedback.student_prompt(policy.tokenizer, p.messages))  # noqa: E731
    fits = [p for p in task.train if tokens(p) <= cfg.max_prompt_tokens]
    dropped, task.train = len(task.train) - len(fits), fits
    watched, _ = watch(task)
    if cfg.eval_every and not watched:
        raise ValueError(f"{task.name} has neither validation nor test problems to watch: --eval_every 0")
    # The longest sequence that is sampled, evaluation's included.
    sampled = [tokens(p) + cfg.max_response_tokens for p in watched] if cfg.eval_every else []
    found = replace(found, longest=max([found.longest, *sampled]))
    plan.refuse(found, cfg)
    if len(fits) < cfg.prompts_per_batch:
        left_out = f" ({dropped} more have prompts over --max_prompt_tokens {cfg.max_prompt_tokens})" if dropped else ""
        raise ValueError(
            f"{len(fits)} training problems do not fill a batch of --prompts_per_batch {cfg.prompts_per_batch}{left_out}"
        )
    positions = getattr(policy.model.config, "max_position_embeddings", None)
    if positions and found.longest > positions:
        task.notes.append(
            f"prompt and response may take {found.longest} tokens, and the model was made for {positions}"
        )
    if not task.test:
        task.notes.append(f"{task.name} has no test problems: evaluate.py will have nothing to measure after the run")
    if method.teacher and cfg.feedback == "critique" and not all(p.reference for p in fits):
        raise ValueError(f"--feedback critique needs a reference answer for every problem of {task.name}")
    if cfg.method == "ovd" and not cfg.judge_url:
        feedback.digit_tokens(policy.tokenizer)  # raises ValueError where a score cannot be read
        if cfg.task == "toy" and cfg.subset != "code-judge":
            task.notes.append(f"{task.name}: its model was never taught to judge; --subset code-judge has one that was")
    if why := world.first(lambda: reach(cfg)):
        raise ValueError(why)

    if making:  # the model was made on the spot; evaluation will want it again
        cfg.model = str(out / "base")
    record = {**asdict(cfg), "out": str(out), "teacher": cfg.reader(), "commit": git_commit(), "processes": world.size,
              "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
              "torch": torch.__version__, "command": " ".join(["python", *sys.argv]), "prompts_dropped": dropped}  # fmt: skip
    world.wait()  # everybody has looked
    world.first(lambda: open_directory(out, cfg.overwrite, record))
    if making:
        policy.save(cfg.model)
    return policy, open_sampler(cfg.sampler, policy, cfg.model, found.longest, found.share), task, record


# ---- Figures -------------------------------------------------------------------------------------------------


def mean(values) -> float | None:
    """The mean of a tensor's or list's finite values, or None if there are none."""
    values = torch.as_tensor(values, dtype=torch.float64)
    values = values[values.isfinite()]
    return values.mean().item() if values.numel() else None


def rollout_figures(rollouts: list, outcomes: list, C: list) -> dict:
    """What the log says of the student's rollouts."""
    kinds = Counter(c.kind for c in C if c)
    wins = Counter(c.kind for c, o in zip(C, outcomes) if c and o.reward)
    return {
        "reward": mean([o.reward for o in outcomes if o.verdict != "internal"]),
        "response_length": sum(len(rollout.tokens) for rollout in rollouts) / len(rollouts),
        "truncated": mean([float(rollout.finish == "length") for rollout in rollouts]),
        "with_context": mean([c is not None for c in C]),
        "verdicts": dict(Counter(o.verdict for o in outcomes).most_common()),
        "success_given_context": {kind: wins[kind] / count for kind, count in sorted(kinds.items())},
    }


def terminal_line(row: dict) -> str:
    """At most 12 figures of a step; every one is explained in the README."""
    show = {"reward": "reward", "margin": "margin", "divergence": "div", "e_loss": "E-loss", "shift": "delta",
            "m_loss": "M-loss", "m_grad_norm": "|g|", "entropy": "entropy", "response_length": "length",
            "with_context": "with C", "accepted": "accepted"}  # fmt: skip
    cells = [f"{name} {row[key]:.3f}" for key, name in show.items() if row.get(key) is not None]
    return f"{row['step']:4d}  " + "  ".join(cells) + f"  {sum(row['seconds'].values()):.1f} s"


class Clock:
    """Seconds per phase of one step."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


# ---- The run -------------------------------------------------------------------------------------------------


def base_failures(cfg, policy: Policy, sampler, reviews: Reviews, task: tasks.Task) -> list[dict]:
    """{"id", "context"} of one failure of the first weights for each of the first `teacher_probe` problems that training
    is watched by, where there is a failure with a context. What the teacher makes of them tells over the run whether it
    still reads."""
    problems, G = watch(task)[0][: cfg.teacher_probe], cfg.group_size
    prompts = [feedback.student_prompt(policy.tokenizer, p.messages) for p in problems]
    seed = seed_for(cfg.seed, "base failures")
    drawn = sampler.sample(prompts, G, seed, cfg.max_response_tokens, cfg.temperature, cfg.top_p)
    rows, texts = [p for p in problems for _ in range(G)], [policy.decode(roll.tokens) for roll in drawn]
    outcomes = task.verify(rows, texts)
    found = {}
    for problem, outcome, context in zip(rows, outcomes, reviews.contexts(rows, texts, outcomes, -1)):
        if outcome.reward == 0 and context:
            found.setdefault(problem.id, {"id": problem.id, "context": asdict(context)})
    return list(found.values())


class Session:
    """A run while the loop goes. cfg: settings.Config; record: what config.json holds; teacher: the copy that reads contexts,
    or None; optimizers: by name; stop_signals: how many signals to stop this process has had. `shift` is delta and `first_step`
    the batch to begin with: both come from the last checkpoint of a run that goes on.

    Used as a context: it closes the files, and saves the weights at the end and after an error.
    """

    def __init__(
        self, cfg, policy: Policy, sampler, reviews: Reviews, task: tasks.Task, out: Path, record: dict, teacher,
        optimizers: dict[str, torch.optim.Optimizer], stop_signals: Callable,
    ):  # fmt: skip
        self.cfg, self.policy, self.sampler, self.reviews, self.task = cfg, policy, sampler, reviews, task
        self.out, self.record, self.teacher, self.stop_signals = out, record, teacher, stop_signals
        self.steps = cfg.steps or cfg.epochs * (len(task.train) // cfg.prompts_per_batch)
        self.watched, self.split = watch(task)
        self.shift, self.bad_in_a_row, self.best = None, 0, -1.0
        self.first_step, self.saved, self.probe = 0, None, []
        self.models = {"policy": policy.model} | ({"teacher": teacher} if teacher is not None else {})
        self.optimizers = {name: (policy.model, optimizer) for name, optimizer in optimizers.items()}
        folder, first = out / "checkpoints", policy.world.rank == 0
        self.kept = checkpoint.restore(folder, self.models, self.optimizers, policy.world) if cfg.resume else None
        if self.kept:
            self.first_step, self.shift = self.kept["step"], self.kept["shift"]
            self.bad_in_a_row, self.best = self.kept["bad_in_a_row"], self.kept["best"]
        if cfg.resume and first:
            last = self.first_step if self.kept else -1
            dropped = sum(checkpoint.cut_log(out / name, last) for name in ("log.jsonl", "samples.jsonl"))
            print(f"going on after {self.first_step} batches; {dropped} later lines dropped from the logs")
            known = (out / "log.jsonl").read_text().count('"kind": "train"') if (out / "log.jsonl").exists() else 0
            if known < self.first_step:
                print(f"{out}/log.jsonl tells of {known} of the {self.first_step} batches done", file=sys.stderr)
        try:
            self.log, self.samples = (
                (out / name if first else Path(os.devnull)).open("a") for name in ("log.jsonl", "samples.jsonl")
            )
        except OSError as error:
            raise CannotWrite(f"{error.filename}: {error.strerror}") from error

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind, error, trace) -> None:
        # After an error the weights as they were, where nobody else is needed to gather them or everybody is here for the
        # same reason. Who was told to stop has saved them.
        together = isinstance(error, (FloatingPointError, StaleEngine, ServerSilent))
        alone = self.policy.world.size == 1 and isinstance(error, (Exception, KeyboardInterrupt))
        try:
            if error is None or together or alone and not isinstance(error, OSError):  # a disk that is full stays full
                self.policy.save(self.out / "model")
        finally:
            for each in (self.log, self.samples):
                with suppress(OSError):  # whatever could not be written has been told
                    each.close()
            self.task.close()

    def write(self, file, row: dict) -> None:
        finite = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v  # noqa: E731
        try:
            file.write(json.dumps({k: finite(v) for k, v in row.items()}) + "\n")  # JSON has no nan
            file.flush()
        except OSError as error:
            raise CannotWrite(f"{file.name}: {error.strerror}") from error

    # ---- Beginning and end of a batch ------------------------------------------------------------------------

    def begin(self) -> None:
        """Hands the weights to the sampler, and measures them before the first batch."""
        cfg, probe = self.cfg, self.out / "base_failures.json"
        self.sampler.sync(self.policy)
        if self.kept:
            now = {"commit": self.record["commit"], "processes": self.policy.world.size}
            self.write(self.log, {"kind": "resume", "step": self.first_step, **now})
            self.probe = json.loads(probe.read_text()) if probe.exists() else []
        elif cfg.eval_every:
            if cfg.teacher_probe and self.record["teacher"]:
                self.probe = base_failures(cfg, self.policy, self.sampler, self.reviews, self.task)
                self.policy.world.first(lambda: write(probe, json.dumps(self.probe, indent=1) + "\n"))
            self.validate(0)
        self.reviews.not_had()  # the first batch counts its own
        quiet = None if self.policy.world.rank == 0 else True
        self.bar = tqdm(total=self.steps, initial=self.first_step, disable=quiet, unit="batch", dynamic_ncols=True)

    def end_of_batch(self, row: dict, samples: list[dict]) -> None:
        """Writes the batch's row and samples; evaluates, saves the state and leaves where it is time for it."""
        cfg, done = self.cfg, row["step"] + 1
        self.write(self.log, row)
        for sample in samples:
            self.write(self.samples, sample)
        tqdm.write(terminal_line(row))
        self.bar.update()
        if cfg.eval_every and (done % cfg.eval_every == 0 or done == self.steps):
            self.validate(done)
        if done == self.steps or cfg.checkpoint_every and done % cfg.checkpoint_every == 0:
            self.save_state(done)
        self.leave_if_told(done)

    def save_state(self, step: int) -> None:
        self.saved, state = step, {"shift": self.shift, "bad_in_a_row": self.bad_in_a_row, "best": self.best}
        checkpoint.save(self.out / "checkpoints", step, self.models, self.optimizers, state, self.policy.world)

    def leave_if_told(self, step: int) -> None:
        """After a SIGTERM: saves the state after `step` batches, which are whole at every place this is called from."""
        if self.policy.world.most(self.stop_signals()):
            if self.saved != step:
                self.save_state(step)
            self.policy.save(self.out / "model")
            raise SystemExit(143)

    def update(self, optimizer: torch.optim.Optimizer, lr: float, loss: float) -> float:
        """One optimizer step; a loss or gradient that is not finite skips it, five in a row end the run. Returns the norm."""
        norm = self.policy.step(optimizer, lr, self.cfg.max_grad_norm, skip=not math.isfinite(loss))
        self.bad_in_a_row = 0 if math.isfinite(norm) else self.bad_in_a_row + 1
        if self.bad_in_a_row == 5:
            raise FloatingPointError("five updates in a row had a loss or gradient that is not finite")
        return norm

    # ---- Evaluation by the way ---------------------------------------------------------------------------------

    def measure(self, policy: Policy, problems: list, purpose: str, prompts: list | None = None) -> dict:
        cfg = self.cfg
        return evaluate.measure(
            policy, self.sampler, self.task.verify, problems, n=cfg.eval_samples, seed=seed_for(cfg.seed, purpose),
            max_tokens=cfg.max_response_tokens, temperature=cfg.eval_temperature, top_p=cfg.eval_top_p, prompts=prompts,
        )  # fmt: skip

    def validate(self, step: int) -> None:
        """Pass rate on the problems that training is watched by; the best weights on validation problems are kept."""
        start = time.perf_counter()
        result = self.measure(self.policy, self.watched, "validation")
        figures = {key: value for key, value in result.items() if key != "rewards"}
        if self.probe:
            figures["teacher_avg"] = self.teacher_pass_rate()
        seconds = {"eval": round(time.perf_counter() - start, 4)}
        self.write(self.log, {"kind": "eval", "step": step, "split": self.split, **figures, "seconds": seconds})
        told = f"  teacher on {len(self.probe)} base failures {figures['teacher_avg']:.3f}" if self.probe else ""
        tqdm.write(f"{self.split} after {step:4d} batches: {evaluate.line(result)}{told}")
        if self.task.validation and result["avg"] > self.best:  # nothing is chosen by test problems
            self.best = result["avg"]
            self.policy.save(self.out / "best")

    def teacher_pass_rate(self) -> float:
        """Pass rate of the teacher, as it now is, on the failures in `probe`."""
        cfg, problems = self.cfg, {p.id: p for p in self.watched}
        problems = [problems[row["id"]] for row in self.probe]
        prompts = [
            feedback.teacher_prompt(
                self.policy.tokenizer, problem.messages, feedback.Context(**row["context"]), cfg.templates(), cfg.max_teacher_tokens
            )[0]
            for problem, row in zip(problems, self.probe)
        ]  # fmt: skip
        with weights_of(self.teacher, self.sampler, self.policy) as reader:
            return self.measure(reader, problems, "probe", prompts)["avg"]
