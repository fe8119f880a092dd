"""What surrounds a training loop: opening a run, its directory, checkpoints, evaluation by the way, signals, the end.

`launch` takes settings and a loop, `train(cfg, run)`. `Run` is what the loop sees.
"""

import fcntl
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate
import feedback
import tasks
from harness import machine, plan, presets, runs
from harness.command import CannotWrite, Stopped, fail, write
from harness.log import DIED, BatchLog, Tracker, terminal_line
from harness.settings import differing
from model import checkpoint
from model.parallel import Shared, World
from model.policy import Policy
from rollout import check_sampler, open_sampler, seed_for, weights_of


def watch(task: tasks.Task) -> tuple[list, str]:
    """The problems that training is watched by, and the name of their split."""
    return (task.validation, "validation") if task.validation else (task.test, "test")


# ---- The run directory -------------------------------------------------------------------------------------------


def check_directory(cfg) -> None:
    """Raises ValueError with one line where --out cannot be this run's directory."""
    if cfg.resume and not cfg.out:
        raise ValueError("--resume needs --out, the run directory to go on with")
    if cfg.resume and cfg.overwrite:
        raise ValueError("--resume goes on with a run directory and --overwrite deletes it: give one of them")
    out = Path(cfg.out)
    if not cfg.out or not out.exists() or cfg.resume:
        return
    if not cfg.overwrite:
        raise ValueError(f"{out} exists: give another --out, --resume to go on with it, or --overwrite to delete it")
    try:
        record = json.loads((out / "config.json").read_text())
        ours = {"task", "method", "seed", "command"} <= record.keys()
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise ValueError(f"{out} is no run directory (its config.json is not a run's): --overwrite will not delete it")
    for flag in ("model", "data"):
        path = Path(getattr(cfg, flag) or "/").resolve()
        if path.exists() and path.is_relative_to(out.resolve()):
            raise ValueError(f"--overwrite would delete {path}, this run's own --{flag}")


def open_directory(cfg, out: Path, record: dict):
    """Makes the run directory with its config.json; one that is there is deleted if --overwrite. Returns the file that locks it
    for this run. Raises ValueError where another run holds it."""
    if cfg.overwrite and out.exists():
        _lock(out).close()
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=cfg.resume)
    except FileExistsError:
        raise ValueError(f"{out} was made by another run a moment ago: give another --out") from None
    lock = _lock(out)
    if not (out / "config.json").exists():
        write(out / "config.json", json.dumps(record, indent=1) + "\n")
    return lock


def _lock(out: Path):
    file = (out / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{out} belongs to a run that is still going on") from None
    return file


def git_commit() -> str:
    """The commit of this code, marked when the tree differs from it; "unknown" outside a repository."""
    git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    with suppress(OSError):  # no git on this machine
        return subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def fingerprint(problems: list) -> str:
    """Of problems, so that a run is not resumed on others."""
    text = json.dumps([(p.id, p.messages, p.reference) for p in problems])
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


# ---- Opening -----------------------------------------------------------------------------------------------------


def check_model(cfg) -> None:
    """Raises ValueError with one line where the model is no folder and this machine cannot train one of the hub's."""
    ours = Path(__file__).parents[1] / cfg.model
    if cfg.task == "toy" and ours.is_dir() and not Path(cfg.model).is_dir():  # started from another folder
        cfg.model = str(ours)
    if Path(cfg.model).is_dir():
        cfg.model = str(Path(cfg.model).resolve())  # --resume and evaluation may start from another folder
    elif not torch.cuda.is_available() and not cfg.smoke:
        raise ValueError(
            f"--model {cfg.model} is no folder here, and to train a model of the hub needs CUDA GPUs: name a folder "
            "(tasks/toy_models/trace, say), or try --smoke"
        )


def open_run(cfg, world: World, also: Callable = lambda *_: None) -> "Run":
    """A run ready for its loop. The directory is made when nothing else can be wrong with the settings. also(cfg, policy, task):
    what else a loop needs, `Run.also`; it may raise ValueError. Raises ValueError, OSError or ImportError with one line."""
    method = cfg.row()
    notes = world.first(lambda: check_directory(cfg) or machine.check_driver(cfg))
    if cfg.track and importlib.util.find_spec(cfg.track) is None:
        raise ValueError(f"--track {cfg.track} needs its package: pip install {cfg.track}")
    check_model(cfg)
    check_sampler(cfg.sampler)
    task = tasks.load(cfg.task, cfg.subset, cfg.data, cfg.train_tests, cfg.since, cfg.until)
    cfg.data = str(Path(cfg.data).resolve()) if cfg.data else ""
    task.verify = Shared(world, task.verify, task.threads)
    if method.teacher and cfg.feedback in task.lacks:
        has = ", ".join(source for source in feedback.SOURCES if source not in task.lacks)
        raise ValueError(f"--feedback {cfg.feedback}: {task.name} has {has}")
    name = cfg.task if cfg.task != "own" else re.sub(r"\W+", "-", task.name)
    out = Path(world.first(lambda: cfg.out or f"runs/{name}-{cfg.method}-seed{cfg.seed}-{time.strftime('%Y%m%d-%H%M%S')}"))

    with tempfile.TemporaryDirectory() as made:
        # A smoke run that is resumed has its model there.
        making = cfg.smoke and not (cfg.resume and (out / "base" / "config.json").exists())
        made = world.first(lambda: made)  # one process makes the model, on this machine
        if making:
            from tasks import tiny

            world.first(lambda: tiny.smoke_model(cfg.task, cfg.smoke, Path(made)))
        path = made if making else cfg.model
        found = plan.show(cfg, method, path, world.size)
        task.notes += notes + world.first(lambda: machine.check(cfg, found))
        policy = Policy.load(
            path, getattr(torch, cfg.dtype), world, micro_batch_tokens=cfg.micro_batch_tokens, temperature=cfg.temperature,
            # transformers would compile the layers anew for each length of the cache.
            compiled=found.gpu > 0 and cfg.sampler != "hf", recompute=found.stored if found.gpu else None,
        )  # fmt: skip
        world.wait()  # everybody has read it
    if method.distils and cfg.top_k > policy.vocabulary:
        raise ValueError(f"--top_k {cfg.top_k} exceeds the vocabulary of {policy.vocabulary} tokens")

    lengths = feedback.check_prompts(policy.tokenizer, task.train, cfg)
    fits = [p for p, length in zip(task.train, lengths) if length <= cfg.max_prompt_tokens]
    dropped, task.train = len(task.train) - len(fits), fits
    watched, _ = watch(task)
    if cfg.eval_every and not watched:
        raise ValueError(f"{task.name} has neither validation nor test problems to watch: --eval_every 0")
    # The longest sequence that is sampled, evaluation's included.
    tokens = lambda p: len(feedback.student_prompt(policy.tokenizer, p.messages)) + cfg.max_response_tokens  # noqa: E731
    found = replace(found, longest=max([found.longest, *(map(tokens, watched) if cfg.eval_every else [])]))
    plan.refuse(found, cfg)
    if len(fits) < cfg.prompts_per_batch:
        left_out = f" ({dropped} more have prompts over --max_prompt_tokens {cfg.max_prompt_tokens})" if dropped else ""
        raise ValueError(
            f"{len(fits)} training problems do not fill a batch of --prompts_per_batch {cfg.prompts_per_batch}{left_out}"
        )
    positions = getattr(policy.model.config, "max_position_embeddings", None)
    if positions and found.longest > positions:
        task.notes.append(f"prompt and response may take {found.longest} tokens; the model was made for {positions}")
    if not task.test:
        task.notes.append(f"{task.name} has no test problems: evaluate.py will have nothing to measure after the run")
    if cfg.top_p < 1:
        task.notes.append("--top_p below 1: rollouts come from a cut distribution, and the trainer scores the whole one")
    if method.teacher and cfg.feedback == "critique" and not all(p.reference for p in fits):
        raise ValueError(f"--feedback critique needs a reference answer for every problem of {task.name}")
    critic, others = feedback.Critic(cfg, policy), also(cfg, policy, task)
    task.notes += [f"{dropped} training prompts over {cfg.max_prompt_tokens} tokens dropped"] if dropped else []

    if making:  # the model was made on the spot; evaluation will want it again
        cfg.model = str(out.resolve() / "base")
        task.notes.append("smoke run: the weights are random, and no number it gives means anything")
    record = {**asdict(cfg), "out": str(out), "task_name": task.name, "teacher": cfg.reader(), "commit": git_commit(),
              "processes": world.size, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
              "torch": torch.__version__, "command": " ".join(["python", *sys.argv]), "prompts_dropped": dropped,
              "model_files": runs.fingerprint(path)}  # fmt: skip
    world.wait()  # everybody has looked
    lock = open_directory(cfg, out, record) if world.rank == 0 else None
    world.wait()
    if making:
        policy.save(cfg.model)
    probes = [feedback.student_prompt(policy.tokenizer, p.messages) for p in fits[: 2 * world.size]]
    sampler = open_sampler(cfg.sampler, policy, cfg.model, found.longest, found.share, probes)
    critic.sampler = sampler
    return Run(cfg, policy, sampler, task, out, record, lock, critic, others)


def launch(cfg, check: Callable, train: Callable, also: Callable = lambda *_: None) -> None:
    """A run from its settings to its end. check(cfg) raises ValueError for settings that cannot work together; train(cfg, run)
    is the loop; also: see `open_run`."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # threads that fight for a busy core cost more than they bring
    try:
        check(cfg)
        if cfg.smoke and cfg.task not in presets.SMOKE_TASKS:
            raise ValueError(f"--smoke is for {', '.join(presets.SMOKE_TASKS)}: --task {cfg.task} runs here as it is")
        if cfg.smoke and cfg.plan:
            raise ValueError("--plan is for the task's own model, which --smoke replaces by a tiny one")
        if cfg.plan:
            notes = machine.check_driver(cfg)
            found = plan.show(cfg, cfg.row(), cfg.model, torch.cuda.device_count() or 1)
            for note in [*notes, *machine.check(cfg, found)]:
                print(note)
            return
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        run = open_run(cfg, World.start(), also)
    except CannotWrite as error:
        fail(f"cannot write {error}", status=1)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    out, first = run.out, run.policy.world.rank == 0
    if where := os.environ.get("VPD_OUT_FILE"):  # of a script that goes on with this run's directory
        Path(where).write_text(str(out))
    changed = " ".join(f"--{name} {value!r}" for name, value in differing(cfg).items())
    print(f"{out}: {cfg.method} on {run.task.splits()}\nbeside the preset: {changed or 'nothing'}\n{run.size()}")
    for note in run.task.notes:
        print(note)
    # Of several processes none can save by itself, so that Ctrl-C is taken there like SIGTERM: they stop together.
    signals = [signal.SIGTERM, signal.SIGHUP] + [signal.SIGINT] * (run.policy.world.size > 1)
    signals = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, lambda *_: run.signals.append(1)) for number in signals}
    try:
        train(cfg, run)
    except SystemExit as stop:
        if stop.code == 143 and first:
            print(f"stopped by a signal; checkpoint saved in {out}/checkpoints; resume with --resume", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        if first:
            print(f"stopped; the log and the weights so far are in {out}; {checkpoint.last(out)}", file=sys.stderr)
        sys.exit(130)
    except (checkpoint.Damaged, tasks.BadTask) as error:
        fail(error)
    except CannotWrite as error:
        fail(f"cannot write {error}; {checkpoint.last(out)}", status=1)
    except Stopped as error:
        if first:
            print(f"{error}; the log and the last finite weights are in {out}", file=sys.stderr)
        sys.exit(1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    best = f", {out}/best the best on validation problems" if (out / "best").exists() else ""
    print(f"done: {out}/model is the last model{best}")


# ---- The run -----------------------------------------------------------------------------------------------------


class Run:
    """A run while its loop goes. cfg: the settings; record: what config.json holds; critic: feedback.Critic. `shift` is delta; it and the batch to begin
    with come from the last checkpoint of a run that is resumed."""

    def __init__(self, cfg, policy: Policy, sampler, task: tasks.Task, out: Path, record: dict, lock, critic, also):
        self.cfg, self.policy, self.sampler, self.task = cfg, policy, sampler, task
        self.out, self.record, self.lock, self.critic, self.also, self.signals = out, record, lock, critic, also, []
        self.steps = cfg.steps or cfg.epochs * (len(task.train) // cfg.prompts_per_batch)
        self.watched, self.split = watch(task)
        self.problems = fingerprint(task.train)
        self.shift, self.bad_in_a_row, self.idle, self.made, self.best = None, 0, 0, 0, -1.0
        self.first_step, self.saved, self.probe, self.eval_seconds, self.warned = 0, None, [], 0.0, False

    def size(self) -> str:
        """How many updates the run makes at most, in one line."""
        cfg, B = self.cfg, self.cfg.prompts_per_batch
        line = f"{self.steps} batches make up to {self.steps * (B // cfg.minibatch_prompts)} updates of the student"
        if cfg.row().e_step:
            line += f" and {-(-self.steps // cfg.e_step_every) * (B // cfg.e_minibatch_prompts)} of the teacher"
        watched = f"; {len(self.watched)} {self.split} problems are watched every {cfg.eval_every} batches"
        return line + watched * bool(cfg.eval_every)

    def outlook(self, batch_seconds: float, done: int) -> str:
        """When the run will end, by its first batch and evaluation."""
        evaluations = sum(map(self.watches, range(done + 1, self.steps + 1)))
        left = batch_seconds * (self.steps - done) + self.eval_seconds * evaluations
        times = f"a batch takes {batch_seconds:.1f} s" + f", an evaluation {self.eval_seconds:.1f} s" * (self.eval_seconds > 0)
        end = time.strftime("%a %H:%M", time.localtime(time.time() + left))
        return f"{times}: the run will end in about {timedelta(seconds=round(left))}, {end}"

    def watches(self, done: int) -> bool:
        """Whether an evaluation follows so many batches."""
        return bool(self.cfg.eval_every) and (done % self.cfg.eval_every == 0 or done == self.steps)

    @contextmanager
    def started(self, teacher, optimizers: dict[str, torch.optim.Optimizer]) -> Iterator[None]:
        """Restores a run that is resumed, opens the logs, hands the weights to the sampler and measures them; at the end, and after
        an error, saves the weights and closes the files. teacher: the copy that reads contexts, or None; optimizers: by name, one
        may be there under two."""
        self.teacher = teacher
        self.models = {"policy": self.policy.model} | ({"teacher": teacher} if teacher is not None else {})
        shared = len({id(optimizer) for optimizer in optimizers.values()}) == 1
        names = list(optimizers)[:1] if shared else list(optimizers)
        self.optimizers = {name: (self.policy.model, optimizers[name]) for name in names}
        self.log, self.samples, self.tracker = None, None, None
        try:
            restored = self._restore() if self.cfg.resume else None
            first = self.policy.world.rank == 0
            try:
                self.log, self.samples = (
                    (self.out / name if first else Path(os.devnull)).open("a") for name in ("log.jsonl", "samples.jsonl")
                )
            except OSError as error:
                raise CannotWrite(f"{error.filename}: {error.strerror}") from error
            self.tracker = Tracker(self.cfg.track if first else "", self.out, self.record, self.first_step)
            self._begin(restored)
            yield
            if not self.made:
                raise Stopped("no update was made: no rollout had a signal (left_out in log.jsonl says why)")
        except (Exception, KeyboardInterrupt) as error:
            # The weights as they were, where nobody else is needed to gather them or everybody is here for the same reason.
            # Who was stopped by a signal has saved them; a disk that is full stays full.
            alone = self.policy.world.size == 1 and not isinstance(error, OSError)
            if self.log and (isinstance(error, Stopped) or alone):
                self.policy.save(self.out / "model")
            raise
        else:
            self.policy.save(self.out / "model")
        finally:
            for each in (self.tracker, self.log, self.samples, self.lock):
                with suppress(OSError, AttributeError):  # whatever could not be written has been told
                    each.close()
            self.task.close()

    def _restore(self) -> dict | None:
        out, world = self.out, self.policy.world
        kept = checkpoint.restore(out / "checkpoints", self.models, self.optimizers, world)
        if kept:
            if kept.get("problems") != self.problems:
                raise checkpoint.Damaged("the training problems are not those that the run began with: start a new run")
            self.first_step, self.shift, self.best = kept["step"], kept["shift"], kept["best"]
            self.bad_in_a_row, self.idle, self.made = kept["bad_in_a_row"], kept["idle"], kept["made"]
        if world.rank == 0:
            last = self.first_step if kept else -1
            dropped = sum(checkpoint.cut_log(out / name, last) for name in ("log.jsonl", "samples.jsonl"))
            print(f"going on after {self.first_step} batches; {dropped} later lines dropped from the logs")
        return kept

    def _begin(self, restored: dict | None) -> None:
        cfg, probe = self.cfg, self.out / "base_failures.json"
        self.sampler.sync(self.policy)
        if restored:
            now = {"commit": self.record["commit"], "processes": self.policy.world.size}
            self._write(self.log, {"kind": "resume", "step": self.first_step, **now})
            self.probe = json.loads(probe.read_text()) if probe.exists() else []
        elif cfg.eval_every:
            if cfg.teacher_probe and self.record["teacher"]:
                self.probe = self._base_failures()
                self.policy.world.first(lambda: write(probe, json.dumps(self.probe, indent=1) + "\n"))
                if not self.probe:
                    tqdm.write("--teacher_probe measures nothing: no failure of the first weights has a context")
            self.validate(0)
        self.critic.missing.clear()  # the first batch counts its own
        quiet = None if self.policy.world.rank == 0 else True
        self.bar = tqdm(total=self.steps, initial=self.first_step, disable=quiet, unit="batch", dynamic_ncols=True)

    def _write(self, file, row: dict) -> None:
        finite = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v  # noqa: E731
        try:
            file.write(json.dumps({k: finite(v) for k, v in row.items()}) + "\n")  # JSON has no nan
            file.flush()
        except OSError as error:
            raise CannotWrite(f"{file.name}: {error.strerror}") from error
        if file is self.log:
            self.tracker.write(row)

    # ---- A batch -----------------------------------------------------------------------------------------------

    def batches(self, draw: Callable) -> Iterator[tuple[int, list]]:
        """(step, problems) of every batch that is still to be done, of draw(problems, size, steps, seed)."""
        order = draw(self.task.train, self.cfg.prompts_per_batch, self.steps, self.cfg.seed)
        return ((step, problems) for step, problems in enumerate(order) if step >= self.first_step)

    def rate(self, step: int) -> float:
        """What the learning rates are multiplied with at a batch."""
        warmup = min(1.0, (step + 1) / self.cfg.warmup_steps) if self.cfg.warmup_steps else 1.0
        return warmup * (1 - step / self.steps if self.cfg.schedule == "linear" else 1.0)

    def mismatch_limit(self) -> float | None:
        """The limit of min(pi_old / pi_sampler, limit), None where no other engine samples or nobody wants it."""
        return float(self.cfg.mismatch_limit) if self.sampler.other_engine and self.cfg.mismatch_limit != "none" else None

    def batch(self, step: int) -> BatchLog:
        return BatchLog(step, self.policy.world, self.cfg.beta, self.mismatch_limit())

    def update(self, optimizer: torch.optim.Optimizer, lr: float, loss: float) -> float:
        """One optimizer step; a loss or gradient that is not finite skips it, five in a row end the run. Returns the norm."""
        norm = self.policy.step(optimizer, lr, self.cfg.max_grad_norm, skip=not math.isfinite(loss))
        self.bad_in_a_row = 0 if math.isfinite(norm) else self.bad_in_a_row + 1
        if self.bad_in_a_row == 5:
            raise Stopped("five updates in a row had a loss or gradient that is not finite")
        return norm

    def end_of_batch(self, log: BatchLog, batch) -> None:
        """Writes the batch's row and samples; evaluates, saves the state and leaves where it is time for it."""
        cfg, done = self.cfg, log.step + 1
        log.left_out.update(self.critic.missing)
        self.critic.missing.clear()
        row = log.row(batch, cfg.lr * self.rate(log.step), cfg.row().distils)
        self._write(self.log, row)
        for i in range(min(cfg.log_samples, len(batch.y))):
            context = asdict(batch.C[i]) if batch.C and batch.C[i] else None
            prompt = self.policy.tokenizer.decode(batch.x[i])
            sample = {"step": log.step, "id": batch.problems[i].id, "prompt": prompt, "response": batch.texts[i],
                      "finish": batch.rollouts[i].finish, **asdict(batch.outcomes[i]), "context": context}  # fmt: skip
            self._write(self.samples, sample | log.samples.get(i, {}))
        tqdm.write(terminal_line(row))
        if (row["e_died"] or 0) > DIED and not self.warned:
            self.warned = True
            tqdm.write(f"{row['e_died']:.2f} of the E-step's rows no longer pull: smaller --beta, or see e_died in docs/log.md")
        self.bar.update()
        self.made += log.updates()
        self.idle = 0 if log.e_norms or log.m_norms else self.idle + 1
        if log.step == self.first_step and done < self.steps:
            tqdm.write(self.outlook(sum(row["seconds"].values()), done))
        if self.watches(done) or self.idle == 3 and cfg.eval_every:
            self.validate(done)
        if done == self.steps or cfg.checkpoint_every and done % cfg.checkpoint_every == 0:
            self.save_state(done)
        if self.idle == 3:
            raise Stopped(f"three batches in a row made no update: {row['left_out']}")
        self.leave_if_told(done)

    def save_state(self, step: int) -> None:
        self.saved = step
        state = {name: getattr(self, name) for name in ("shift", "bad_in_a_row", "idle", "made", "best", "problems")}
        checkpoint.save(self.out / "checkpoints", step, self.models, self.optimizers, state, self.policy.world)

    def leave_if_told(self, step: int) -> None:
        """After a signal to stop: saves the state after `step` batches, which are whole at every place this is called from."""
        if self.policy.world.most(len(self.signals)):
            if self.saved != step:
                self.save_state(step)
            self.policy.save(self.out / "model")
            raise SystemExit(143)

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
        self.eval_seconds = round(time.perf_counter() - start, 4)
        seconds = {"eval": self.eval_seconds}
        self._write(self.log, {"kind": "eval", "step": step, "split": self.split, **figures, "seconds": seconds})
        teacher = f"  teacher on {len(self.probe)} base failures {figures['teacher_avg']:.3f}" if self.probe else ""
        tqdm.write(f"{self.split} after {step:4d} batches: {evaluate.line(result)}{teacher}")
        if self.probe and not step:  # a teacher that cannot read has nothing to teach
            rewards = {p.id: rewards for p, rewards in zip(self.watched, result["rewards"].values())}
            student = sum(sum(rewards[row["id"]]) for row in self.probe) / (len(self.probe) * self.cfg.eval_samples)
            if figures["teacher_avg"] <= student:
                tqdm.write(f"with the feedback the teacher passes no more of them than the student without it ({student:.3f}): see "
                           "teacher_avg in docs/log.md")  # fmt: skip
        if self.task.validation and result["avg"] > self.best:  # nothing is chosen by test problems
            self.best = result["avg"]
            self.policy.save(self.out / "best")

    def _base_failures(self) -> list[dict]:
        """{"id", "context"} of one failure of the first weights for each of the first `teacher_probe` problems that training is
        watched by, where there is a failure with a context. What the teacher makes of them tells whether it still reads."""
        cfg, policy = self.cfg, self.policy
        problems, G = self.watched[: cfg.teacher_probe], cfg.group_size
        prompts = [feedback.student_prompt(policy.tokenizer, p.messages) for p in problems]
        seed = seed_for(cfg.seed, "base failures")
        rollouts = self.sampler.sample(prompts, G, seed, cfg.max_response_tokens, cfg.temperature, cfg.top_p)
        rows, texts = [p for p in problems for _ in range(G)], [policy.decode(rollout.tokens) for rollout in rollouts]
        outcomes = self.task.verify(rows, texts)
        contexts = feedback.batch_contexts(cfg, rows, texts, outcomes, -1, self.critic)
        failures = {}
        for problem, outcome, context in zip(rows, outcomes, contexts):
            if outcome.reward == 0 and context:
                failures.setdefault(problem.id, {"id": problem.id, "context": asdict(context)})
        return list(failures.values())

    def teacher_pass_rate(self) -> float:
        """Pass rate of the teacher, as it now is, on the failures in `probe`."""
        cfg, by_id = self.cfg, {p.id: p for p in self.watched}
        problems = [by_id[row["id"]] for row in self.probe]
        contexts, words = [feedback.Context(**row["context"]) for row in self.probe], cfg.templates()
        prompts = [feedback.teacher_prompt(self.policy.tokenizer, problem.messages, C, words, cfg.max_teacher_tokens)[0]
                   for problem, C in zip(problems, contexts)]  # fmt: skip
        with weights_of(self.teacher, self.sampler, self.policy) as reader:
            return self.measure(reader, problems, "probe", prompts)["avg"]
