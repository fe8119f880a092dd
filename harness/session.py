"""What surrounds a training loop: opening a run, checkpoints, evaluation during training, signals, and the end. `launch` starts a
loop, which uses a `Run`; runs.py has the run directory.
"""

import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate
import feedback
import tasks
from harness import machine, plan, presets, runs
from harness.command import CannotWrite, Stopped, fail, unwritten, write
from harness.log import DIED, BatchLog, Tracker, terminal_line
from harness.settings import differing
from model import checkpoint
from model.parallel import Shared, World
from model.policy import Policy
from rollout import check_sampler, open_sampler, seed_for, weights_of


def git_commit() -> str:
    """The commit of this code, marked "+changes" if files differ from it; "unknown" outside a repository."""
    git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    with suppress(OSError):  # git is not installed
        return subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def check_needs(cfg) -> None:
    """Makes --model and --data absolute, since --resume and evaluation may start in another folder. Raises ValueError with one
    line if the model or a package is missing on this machine."""
    cfg.model, cfg.data = runs.absolute(cfg.model), runs.absolute(cfg.data)
    local = cfg.model and Path(cfg.model).is_dir()
    if not local and not torch.cuda.is_available() and not cfg.smoke and not cfg.gpu_memory:
        raise ValueError(f"--model {cfg.model} is no folder here, and training a model from the hub needs CUDA GPUs: name a folder "
                         "(such as tasks/toy_models/trace)" + ", try --smoke" * (cfg.task in presets.SMOKE_TASKS)
                         + ", or plan for other GPUs: --plan --gpus N --gpu_memory GB")  # fmt: skip
    if not cfg.gpu_memory:  # else a plan for another machine
        check_sampler(cfg.sampler)
    if cfg.track and importlib.util.find_spec(cfg.track) is None:
        raise ValueError(f"--track {cfg.track} needs its package: pip install {cfg.track}")


def open_run(cfg, world: World, also: Callable) -> "Run":
    """A run ready for its loop; its directory is created after all other checks. also(cfg, policy, task) makes what else the loop
    needs, `Run.also`. Raises ValueError, OSError or ImportError with one line."""
    method = cfg.row()
    notes = world.first(lambda: runs.check(cfg) or machine.check_driver(cfg))
    check_needs(cfg)
    task = machine.load_task(cfg)
    task.verify = Shared(world, task.verify, task.threads)
    name = cfg.task if cfg.task != "own" else re.sub(r"\W+", "-", task.name)
    out = Path(world.first(lambda: cfg.out or f"runs/{name}-{cfg.method}-seed{cfg.seed}-{time.strftime('%Y%m%d-%H%M%S')}"))

    making = cfg.smoke and not (cfg.resume and (out / "base" / "config.json").exists())  # a resumed run has its model
    with tempfile.TemporaryDirectory() as made:
        path = world.first(lambda: made) if making else cfg.model  # one process makes it, on this machine
        if making:
            from tasks import tiny

            world.first(lambda: tiny.smoke_model(cfg.task, cfg.smoke, Path(path)))
        found, more = world.first(lambda: machine.check(cfg, path, world.size))
        policy = Policy.load(
            path, getattr(torch, cfg.dtype), world, micro_batch_tokens=cfg.micro_batch_tokens, temperature=cfg.temperature,
            # transformers' sampler would compile the layers again for each length of the cache.
            compiled=found.gpu > 0 and cfg.sampler != "hf", recompute=found.stored if found.gpu else None,
        )  # fmt: skip
        world.wait()  # until every process has read it

    lengths = feedback.check_prompts(policy.tokenizer, task.train, cfg)
    fits = [p for p, length in zip(task.train, lengths) if length <= cfg.max_prompt_tokens]
    dropped, task.train = len(task.train) - len(fits), fits
    over = f"{dropped} training prompts of more than {cfg.max_prompt_tokens} tokens dropped"
    watched = (task.validation or task.test) if cfg.eval_every else []
    prompts = [len(feedback.student_prompt(policy.tokenizer, p.messages)) for p in watched]
    found = replace(found, longest=max(found.longest, max(prompts, default=0) + cfg.max_response_tokens))  # evaluations too
    plan.refuse(found, cfg)
    positions = getattr(policy.model.config, "max_position_embeddings", None) or math.inf
    found_here = [  # (does it apply, is failure certain, line)
        (method.distils and cfg.top_k > policy.vocabulary, True,
         f"--top_k {cfg.top_k} exceeds the vocabulary of {policy.vocabulary} tokens"),
        (cfg.eval_every and not watched, True, f"{task.name} has no problems to evaluate on during training: use --eval_every 0"),
        (len(fits) < cfg.prompts_per_batch, True,
         f"{len(fits)} training problems do not fill a batch of --prompts_per_batch {cfg.prompts_per_batch}: {over}"),
        (method.teacher and cfg.feedback == "critique" and not all(p.reference for p in fits), True,
         f"--feedback critique needs a reference answer for every problem of {task.name}"),
        (found.longest > positions, False,
         f"prompt and response may take {found.longest} tokens, and the model supports {positions}"),
        (not task.test, False, f"{task.name} has no test problems, so evaluate.py will not be able to measure this run"),
        (cfg.top_p < 1, False, "--top_p below 1: rollouts come from a truncated distribution, but the trainer scores the full one"),
        (dropped, False, over),
        (making, False, "smoke run: the weights are random, so its numbers mean nothing"),
    ]  # fmt: skip
    task.notes += notes + more + machine.judged(*((line, certain) for applies, certain, line in found_here if applies))
    critic, others = feedback.Critic(cfg, policy), also(cfg, policy, task)

    if making:  # evaluation needs it later
        cfg.model = str(out.resolve() / "base")
    record = {**asdict(cfg), "out": str(out), "task_name": task.name, "teacher": cfg.reader(), "commit": git_commit(),
              "processes": world.size, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
              "torch": torch.__version__, "command": shlex.join(["python", *sys.argv]), "prompts_dropped": dropped,
              "model_files": "" if making else runs.fingerprint(path)}  # fmt: skip
    lock = runs.make(cfg, out, record) if world.rank == 0 else None
    world.wait()
    if making:
        policy.save(cfg.model)
    probes = [feedback.student_prompt(policy.tokenizer, p.messages) for p in fits[: 2 * world.size]]
    critic.sampler = open_sampler(cfg.sampler, policy, cfg.model, found.longest, found.share, probes)
    return Run(cfg, policy, critic.sampler, task, out, record, lock, critic, others)


def launch(cfg, check: Callable, train: Callable, also: Callable = lambda *_: None) -> None:
    """Runs the loop train(cfg, run). check(cfg) raises ValueError for settings that contradict each other; also: see `open_run`."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # on busy cores, more threads make a small model slower
    try:
        check(cfg)
        if cfg.smoke and cfg.task not in presets.SMOKE_TASKS:
            raise ValueError(f"--smoke is for {', '.join(presets.SMOKE_TASKS)}: run --task {cfg.task} without it")
        if cfg.smoke and "model" in cfg.given and not cfg.resume:
            raise ValueError("--smoke makes a tiny model of its own: leave out --model")
        if cfg.smoke and cfg.plan:
            raise ValueError("--plan is for the task's own model, which --smoke replaces with a tiny one")
        if cfg.plan:
            notes = runs.check(cfg) or machine.check_driver(cfg)
            check_needs(cfg)
            for note in notes + machine.check(cfg, cfg.model, torch.cuda.device_count() or 1)[1]:
                print(note)
            return
        run = open_run(cfg, World.start(), also)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    out, world = run.out, run.policy.world
    if where := os.environ.get("VPD_OUT_FILE"):  # for a script that uses the run directory afterwards
        Path(where).write_text(str(out))
    changed = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in differing(cfg).items())
    watched = f", with an evaluation on {len(run.watched)} {run.split} problems every {cfg.eval_every}" * bool(cfg.eval_every)
    # With several processes no one can save alone, so Ctrl-C is handled like SIGTERM: they stop together.
    signals = [signal.SIGTERM, signal.SIGHUP] + [signal.SIGINT] * (world.size > 1)
    signals = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, lambda *_: run.signals.append(1)) for number in signals}
    try:
        print(f"{out}: {cfg.method} on {run.task.splits()}" + f"\nchanges to the preset: {changed}" * bool(changed))
        print("\n".join([f"{run.steps} batches{watched}", *run.task.notes]))
        train(cfg, run)
    except KeyboardInterrupt:
        run.end(f"interrupted; the log and the weights so far are in {out}; {checkpoint.last(out)}", 130)
    except Stopped as error:
        run.end(f"{error}; the log and the last finite weights are in {out}", 1)
    except (checkpoint.Damaged, tasks.BadTask) as error:
        fail(error)
    except OSError as error:
        if what := unwritten(error):
            fail(CannotWrite(f"{what}; {checkpoint.last(out)}"))
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for each in (run.tracker, run.lock, run.task):
            if each is not None:
                each.close()
    best = f", {out}/best the best ones on validation problems" if (out / "best").exists() else ""
    print(f"done: {out}/model holds the last weights{best}")


# ---- The run -----------------------------------------------------------------------------------------------------


def batches(problems: list, size: int, steps: int, seed: int) -> Iterator[list]:
    """`steps` batches of `size` problems, reshuffled every epoch; an incomplete last batch is dropped."""
    per_epoch, order = len(problems) // size, []
    for step in range(steps):
        if step % per_epoch == 0:
            order = random.Random(seed_for(seed, step // per_epoch, "order")).sample(problems, len(problems))
        start = step % per_epoch * size
        yield order[start : start + size]


class Run:
    """A run during its loop. record: the contents of config.json; lock: in the first process, the file that locks the directory;
    critic: feedback.Critic. `shift` is delta. When a run is resumed, the attributes in STATE come from its last checkpoint."""

    STATE = ("shift", "bad_in_a_row", "idle", "made", "best", "problems", "probe", "eval_seconds")

    def __init__(self, cfg, policy: Policy, sampler, task: tasks.Task, out: Path, record: dict, lock, critic, also):
        self.cfg, self.policy, self.sampler, self.task = cfg, policy, sampler, task
        self.out, self.record, self.lock, self.critic, self.also, self.signals = out, record, lock, critic, also, []
        self.steps = cfg.steps or cfg.epochs * (len(task.train) // cfg.prompts_per_batch)
        self.watched, self.split = task.validation or task.test, "validation" if task.validation else "test"
        problems = json.dumps([(p.id, p.messages, p.reference) for p in task.train])  # for --resume
        self.problems = hashlib.sha256(problems.encode("utf-8", "replace")).hexdigest()[:16]
        self.shift, self.bad_in_a_row, self.idle, self.made, self.best = None, 0, 0, 0, -1.0
        self.first_step, self.saved, self.tracker, self.probe, self.eval_seconds, self.warned = 0, None, None, {}, 0.0, False

    def end(self, line: str, status: int) -> None:
        """Ends the program with a line on standard error, printed by the first process."""
        if self.policy.world.rank == 0:
            print(line, file=sys.stderr)
        sys.exit(status)

    @contextmanager
    def started(self, teacher, optimizers: dict[str, torch.optim.Optimizer]) -> Iterator[None]:
        """Restores a resumed run, pushes the weights to the sampler and evaluates them; saves them at the end and after an error.
        teacher: the copy that reads contexts, or None; optimizers: by name; one may have two names."""
        cfg, world = self.cfg, self.policy.world
        self.teacher = teacher
        self.models = {"policy": self.policy.model} | ({"teacher": teacher} if teacher is not None else {})
        last = {optimizer: name for name, optimizer in reversed(optimizers.items())}
        self.optimizers = {name: (self.policy.model, o) for name, o in optimizers.items() if last[o] == name}
        resumes = cfg.resume and self._restore()
        self.tracker = Tracker(cfg.track if world.rank == 0 else "", self.out, self.record, self.first_step)
        try:
            self.sampler.sync(self.policy)
            if resumes:
                now = {"commit": self.record["commit"], "processes": world.size}
                self._write("log.jsonl", {"kind": "resume", "step": self.first_step, **now})
            elif cfg.eval_every:
                if cfg.teacher_probe and self.record["teacher"]:
                    self.probe = {id: asdict(context) for id, context in self._base_failures().items()}
                    failures = [{"id": id, "context": context} for id, context in self.probe.items()]  # for the reader
                    world.first(lambda: write(self.out / "base_failures.json", json.dumps(failures, indent=1) + "\n"))
                    if not self.probe:
                        tqdm.write("--teacher_probe has nothing to measure: no failure of the first weights has a context")
                self.validate(0)
            self.critic.missing.clear()  # a batch logs its own only
            quiet = None if world.rank == 0 else True
            with tqdm(total=self.steps, initial=self.first_step, disable=quiet, unit="batch", dynamic_ncols=True) as self.bar:
                yield
            if not self.made:
                raise Stopped("no update was made: no rollout had a signal (left_out in log.jsonl says why)")
        except (Exception, KeyboardInterrupt) as error:
            # Several processes can gather the weights only if all of them are here, as they are after Stopped. After an OSError
            # the disk may be full. A run stopped by a signal has already saved them.
            if isinstance(error, Stopped) or world.size == 1 and not isinstance(error, OSError):
                self.policy.save(self.out / "model")
            raise
        self.policy.save(self.out / "model")

    def _restore(self) -> bool:
        """Loads the last checkpoint and cuts the logs. Returns whether there is one."""
        kept = checkpoint.restore(self.out / "checkpoints", self.models, self.optimizers, self.policy.world)
        if kept:
            if lacks := [name for name in self.STATE if name not in kept]:
                raise checkpoint.Damaged(f"the checkpoint is from another version of this code: it lacks {lacks[0]}")
            if kept["problems"] != self.problems:
                raise checkpoint.Damaged("the training problems have changed since the run began: start a new run")
            self.first_step = self.saved = kept["step"]
            vars(self).update({name: kept[name] for name in self.STATE})
        logs, last = [self.out / "log.jsonl", self.out / "samples.jsonl"], self.first_step if kept else -1
        dropped = self.policy.world.first(lambda: sum(checkpoint.cut_log(log, last) for log in logs))
        print(f"resuming after {self.first_step} batches; {dropped} later lines removed from the logs")
        return kept is not None

    def _write(self, name: str, *rows: dict) -> None:
        """Appends rows to log.jsonl or samples.jsonl, in the first process."""
        if self.policy.world.rank or not rows:
            return
        finite = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v  # noqa: E731  # nan is not JSON
        try:
            with (self.out / name).open("a") as file:
                file.writelines(json.dumps({k: finite(v) for k, v in row.items()}) + "\n" for row in rows)
        except OSError as error:
            raise CannotWrite(f"{self.out / name}: {error.strerror}") from error
        for row in rows if name == "log.jsonl" else ():
            self.tracker.write(row)

    # ---- A batch -----------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[int, list]]:
        """(step, problems) of each remaining batch."""
        order = batches(self.task.train, self.cfg.prompts_per_batch, self.steps, self.cfg.seed)
        return islice(enumerate(order), self.first_step, None)

    def rate(self, step: int) -> float:
        """The factor of the learning rates at a batch."""
        warmup = min(1.0, (step + 1) / self.cfg.warmup_steps) if self.cfg.warmup_steps else 1.0
        return warmup * (1 - step / self.steps if self.cfg.schedule == "linear" else 1.0)

    def mismatch_limit(self) -> float | None:
        """The limit of min(pi_old / pi_sampler, limit); None if the trainer itself samples or --mismatch_limit is none."""
        return float(self.cfg.mismatch_limit) if self.sampler.other_engine and self.cfg.mismatch_limit != "none" else None

    def batch(self, step: int) -> BatchLog:
        return BatchLog(step, self.policy.world, self.cfg.beta, self.mismatch_limit())

    def update(self, optimizer: torch.optim.Optimizer, lr: float, loss: float) -> float:
        """One optimizer step, skipped if loss or gradient is not finite; five such in a row end the run. Returns the norm."""
        norm = self.policy.step(optimizer, lr, self.cfg.max_grad_norm, skip=not math.isfinite(loss))
        self.bad_in_a_row = 0 if math.isfinite(norm) else self.bad_in_a_row + 1
        if self.bad_in_a_row == 5:
            raise Stopped("five updates in a row had a loss or gradient that is not finite")
        return norm

    def end_of_batch(self, log: BatchLog, batch) -> None:
        """Writes the batch's row and samples. Evaluates, saves the state and stops when it is time to."""
        cfg, done = self.cfg, log.step + 1
        log.left_out.update(self.critic.missing)
        self.critic.missing.clear()
        row = log.row(batch, cfg.lr * self.rate(log.step), cfg.row().distils)
        self._write("log.jsonl", row)
        samples = []
        for i in range(min(cfg.log_samples, len(batch.y))):
            context = asdict(batch.C[i]) if batch.C and batch.C[i] else None
            prompt = self.policy.tokenizer.decode(batch.x[i])
            sample = {"step": log.step, "id": batch.problems[i].id, "prompt": prompt, "response": batch.texts[i],
                      "finish": batch.rollouts[i].finish, **asdict(batch.outcomes[i]), "context": context}  # fmt: skip
            samples.append(sample | log.samples.get(i, {}))
        self._write("samples.jsonl", *samples)
        tqdm.write(terminal_line(row))
        if (row["e_died"] or 0) > DIED and not self.warned:
            self.warned = True
            tqdm.write(f"{row['e_died']:.2f} of the E-step's rows have almost no gradient: see e_died in docs/log.md")
        self.bar.update()
        self.made += log.updates()
        self.idle = 0 if log.m_norms else self.idle + 1
        if log.step == self.first_step and done < self.steps:
            tqdm.write(self.outlook(sum(row["seconds"].values()), done))
        if self.evaluations_after(done) < self.evaluations_after(done - 1) or cfg.eval_every and self.idle == 3:
            self.validate(done)
        if done == self.steps or cfg.checkpoint_every and done % cfg.checkpoint_every == 0:
            self.save_state(done)
        if self.idle == 3:
            raise Stopped(f"three batches in a row made no update: {row['left_out']}")
        self.leave_if_told(done)

    def evaluations_after(self, done: int) -> int:
        """Evaluations that follow `done` batches: one after every --eval_every batches, and one after the last."""
        every = self.cfg.eval_every
        return -(-self.steps // every) - done // every if every and done < self.steps else 0

    def outlook(self, batch_seconds: float, done: int) -> str:
        """When the run will end, estimated from its first batch and evaluation."""
        left = batch_seconds * (self.steps - done) + self.eval_seconds * self.evaluations_after(done)
        end = time.strftime("%a %H:%M", time.localtime(time.time() + left))
        times = f"a batch takes {batch_seconds:.1f} s" + f", an evaluation {self.eval_seconds:.1f} s" * (self.eval_seconds > 0)
        return f"{times}: the run will end in about {timedelta(seconds=round(left))} ({end})"

    def save_state(self, step: int) -> None:
        self.saved = step
        state = {name: getattr(self, name) for name in self.STATE}
        checkpoint.save(self.out / "checkpoints", step, self.models, self.optimizers, state, self.policy.world)

    def leave_if_told(self, step: int) -> None:
        """Ends the run if a signal asks for it. Saves the state after `step` batches, so no update of the next may have begun."""
        if self.policy.world.most(len(self.signals)):
            if self.saved != step:
                self.save_state(step)
            self.policy.save(self.out / "model")
            self.end(f"stopped by a signal; checkpoint saved in {self.out}/checkpoints; resume with --resume", 143)

    # ---- Evaluation during training ----------------------------------------------------------------------------

    def measure(self, policy: Policy, problems: list, purpose: str, prompts: list | None = None) -> dict:
        cfg = self.cfg
        return evaluate.measure(
            policy, self.sampler, self.task.verify, problems, n=cfg.eval_samples, seed=seed_for(cfg.seed, purpose),
            max_tokens=cfg.max_response_tokens, temperature=cfg.eval_temperature, top_p=cfg.eval_top_p, prompts=prompts,
        )  # fmt: skip

    def validate(self, step: int) -> None:
        """Logs the pass rate on validation problems and saves the best weights; on test problems, only logs it."""
        start, cfg = time.perf_counter(), self.cfg
        result = self.measure(self.policy, self.watched, "validation")
        rewards = result.pop("rewards").values()
        row = {"kind": "eval", "step": step, "split": self.split, **result}
        line = f"{self.split} after {step:4d} batches: {evaluate.line(result)}"
        if self.probe:
            row["teacher_avg"] = teacher = self.teacher_pass_rate()
            line += f"  teacher on {len(self.probe)} base failures {teacher:.3f}"
        if self.probe and not step:
            by_id = dict(zip([p.id for p in self.watched], rewards))
            student = sum(sum(by_id[id]) for id in self.probe) / (len(self.probe) * cfg.eval_samples)
            if teacher <= student:
                line += f"\neven with the feedback the teacher passes no more of these than the student ({student:.3f})"
                line += ": see teacher_avg in docs/log.md"
        self.eval_seconds = round(time.perf_counter() - start, 4)
        self._write("log.jsonl", row | {"seconds": {"eval": self.eval_seconds}})
        tqdm.write(line)
        if self.task.validation and result["avg"] > self.best:  # test problems select nothing
            self.best = result["avg"]
            self.policy.save(self.out / "best")

    def _base_failures(self) -> dict[str, feedback.Context]:
        """By problem id, the context of one failure of the first weights, for those of the first `teacher_probe` watched problems
        that have one. The teacher's pass rate with these contexts shows whether it still reads them."""
        cfg, policy, problems = self.cfg, self.policy, self.watched[: self.cfg.teacher_probe]
        prompts = [feedback.student_prompt(policy.tokenizer, p.messages) for p in problems]
        how = seed_for(cfg.seed, "base failures"), cfg.max_response_tokens, cfg.temperature, cfg.top_p
        texts = [policy.decode(rollout.tokens) for rollout in self.sampler.sample(prompts, cfg.group_size, *how)]
        rows = [p for p in problems for _ in range(cfg.group_size)]
        outcomes = self.task.verify(rows, texts)
        failures = {}
        for problem, outcome, context in zip(rows, outcomes, feedback.batch_contexts(cfg, rows, texts, outcomes, -1, self.critic)):
            if outcome.reward == 0 and context:
                failures.setdefault(problem.id, context)
        return failures

    def teacher_pass_rate(self) -> float:
        """The current teacher's pass rate with the contexts in `probe`."""
        problems = [p for p in self.watched[: self.cfg.teacher_probe] if p.id in self.probe]
        words, limit, tokenizer = self.cfg.templates(), self.cfg.max_teacher_tokens, self.policy.tokenizer
        contexts = [feedback.Context(**self.probe[p.id]) for p in problems]
        prompts = [feedback.teacher_prompt(tokenizer, p.messages, C, words, limit)[0] for p, C in zip(problems, contexts)]
        with weights_of(self.teacher, self.sampler, self.policy) as reader:
            return self.measure(reader, problems, "probe", prompts)["avg"]
