"""What surrounds a training loop: opening a run, checkpoints, evaluation during training, signals, the end.

`launch` takes settings and a loop, `train(cfg, run)`. `Run` is what the loop sees. The run directory: runs.py.
"""

import hashlib
import importlib.util
import json
import math
import os
import random
import re
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
from harness.command import CannotWrite, Stopped, fail, write
from harness.log import DIED, BatchLog, Tracker, terminal_line
from harness.settings import differing
from model import checkpoint
from model.parallel import Shared, World
from model.policy import Policy
from rollout import check_sampler, open_sampler, seed_for, weights_of


def git_commit() -> str:
    """The commit of this code, marked when the tree differs from it; "unknown" outside a repository."""
    git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    with suppress(OSError):  # no git on this machine
        return subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def check_model(cfg) -> None:
    """Raises ValueError with one line where the model is no folder and this machine cannot train one of the hub's."""
    here = Path(cfg.model), Path(__file__).parents[1] / cfg.model  # a toy run may be started from another folder
    if folder := next((path for path in here if cfg.model and path.is_dir()), None):
        cfg.model = str(folder.resolve())  # so may --resume and evaluation
    elif not torch.cuda.is_available() and not cfg.smoke:
        raise ValueError(f"--model {cfg.model} is no folder here, and to train a model of the hub needs CUDA GPUs: name a folder "
                         "(tasks/toy_models/trace, say), or try --smoke")  # fmt: skip


def open_run(cfg, world: World, also: Callable) -> "Run":
    """A run ready for its loop. The directory is made when nothing else can be wrong with the settings. also(cfg, policy, task):
    what else a loop needs, `Run.also`; it may raise ValueError. Raises ValueError, OSError or ImportError with one line."""
    method = cfg.row()
    notes = world.first(lambda: runs.check(cfg) or machine.check_driver(cfg))
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

    # A smoke run that is resumed has its model there.
    making = cfg.smoke and not (cfg.resume and (out / "base" / "config.json").exists())
    with tempfile.TemporaryDirectory() as made:
        path = world.first(lambda: made) if making else cfg.model  # one process makes the model, on this machine
        if making:
            from tasks import tiny

            world.first(lambda: tiny.smoke_model(cfg.task, cfg.smoke, Path(path)))
        found, more = world.first(lambda: machine.check(cfg, path, world.size))
        policy = Policy.load(
            path, getattr(torch, cfg.dtype), world, micro_batch_tokens=cfg.micro_batch_tokens, temperature=cfg.temperature,
            # transformers would compile the layers anew for each length of the cache.
            compiled=found.gpu > 0 and cfg.sampler != "hf", recompute=found.stored if found.gpu else None,
        )  # fmt: skip
        world.wait()  # everybody has read it

    lengths = feedback.check_prompts(policy.tokenizer, task.train, cfg)
    fits = [p for p, length in zip(task.train, lengths) if length <= cfg.max_prompt_tokens]
    dropped, task.train = len(task.train) - len(fits), fits
    over = f"{dropped} training prompts over {cfg.max_prompt_tokens} tokens dropped"
    watched = (task.validation or task.test) if cfg.eval_every else []
    # The longest sequence that is sampled, evaluation's included.
    prompts = [len(feedback.student_prompt(policy.tokenizer, p.messages)) for p in watched]
    found = replace(found, longest=max(found.longest, max(prompts, default=0) + cfg.max_response_tokens))
    plan.refuse(found, cfg)
    positions = getattr(policy.model.config, "max_position_embeddings", None) or math.inf
    told = [  # does it hold, is the run certain to fail, the line
        (method.distils and cfg.top_k > policy.vocabulary, True,
         f"--top_k {cfg.top_k} exceeds the vocabulary of {policy.vocabulary} tokens"),
        (cfg.eval_every and not watched, True, f"{task.name} has neither validation nor test problems to watch: --eval_every 0"),
        (len(fits) < cfg.prompts_per_batch, True,
         f"{len(fits)} problems do not fill a batch of --prompts_per_batch {cfg.prompts_per_batch}: {over}"),
        (method.teacher and cfg.feedback == "critique" and not all(p.reference for p in fits), True,
         f"--feedback critique needs a reference answer for every problem of {task.name}"),
        (found.longest > positions, False,
         f"prompt and response may take {found.longest} tokens; the model was made for {positions}"),
        (not task.test, False, f"{task.name} has no test problems: evaluate.py will have nothing to measure after the run"),
        (cfg.top_p < 1, False, "--top_p below 1: rollouts come from a cut distribution, and the trainer scores the whole one"),
        (dropped, False, over),
        (making, False, "smoke run: the weights are random, and no number it gives means anything"),
    ]  # fmt: skip
    task.notes += notes + more + machine.judged(*((line, certain) for holds, certain, line in told if holds))
    critic, others = feedback.Critic(cfg, policy), also(cfg, policy, task)

    if making:  # evaluation will want it again
        cfg.model = str(out.resolve() / "base")
    record = {**asdict(cfg), "out": str(out), "task_name": task.name, "teacher": cfg.reader(), "commit": git_commit(),
              "processes": world.size, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
              "torch": torch.__version__, "command": " ".join(["python", *sys.argv]), "prompts_dropped": dropped,
              "model_files": "" if making else runs.fingerprint(path)}  # fmt: skip
    lock = runs.make(cfg, out, record) if world.rank == 0 else None
    world.wait()
    if making:
        policy.save(cfg.model)
    probes = [feedback.student_prompt(policy.tokenizer, p.messages) for p in fits[: 2 * world.size]]
    critic.sampler = open_sampler(cfg.sampler, policy, cfg.model, found.longest, found.share, probes)
    return Run(cfg, policy, critic.sampler, task, out, record, lock, critic, others)


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
            for note in notes + machine.check(cfg, cfg.model, torch.cuda.device_count() or 1)[1]:
                print(note)
            return
        run = open_run(cfg, World.start(), also)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    out, world = run.out, run.policy.world
    if where := os.environ.get("VPD_OUT_FILE"):  # of a script that goes on with this run's directory
        Path(where).write_text(str(out))
    changed = " ".join(f"--{name} {value!r}" for name, value in differing(cfg).items())
    watched = f"{len(run.watched)} {run.split} problems are watched every {cfg.eval_every}"
    # Of several processes none can save by itself, so that Ctrl-C is taken there like SIGTERM: they stop together.
    signals = [signal.SIGTERM, signal.SIGHUP] + [signal.SIGINT] * (world.size > 1)
    signals = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, lambda *_: run.signals.append(1)) for number in signals}
    try:
        print(f"{out}: {cfg.method} on {run.task.splits()}\nbeside the preset: {changed or 'nothing'}")
        print("\n".join([f"{run.steps} batches" + f"; {watched}" * bool(cfg.eval_every), *run.task.notes]))
        train(cfg, run)
    except KeyboardInterrupt:
        run.end(f"stopped; the log and the weights so far are in {out}; {checkpoint.last(out)}", 130)
    except Stopped as error:
        run.end(f"{error}; the log and the last finite weights are in {out}", 1)
    except (checkpoint.Damaged, tasks.BadTask) as error:
        fail(error)
    except (CannotWrite, BrokenPipeError) as error:  # a pipe: of standard output, whose reader has gone
        fail(CannotWrite(f"{error}; {checkpoint.last(out)}"))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        run.close()
    best = f", {out}/best the best on validation problems" if (out / "best").exists() else ""
    print(f"done: {out}/model is the last model{best}")


# ---- The run -----------------------------------------------------------------------------------------------------


def batches(problems: list, size: int, steps: int, seed: int) -> Iterator[list]:
    """`steps` batches of `size` problems: reshuffled every epoch, the incomplete last batch dropped."""
    per_epoch, order = len(problems) // size, []
    for step in range(steps):
        if step % per_epoch == 0:
            order = random.Random(seed_for(seed, step // per_epoch, "order")).sample(problems, len(problems))
        start = step % per_epoch * size
        yield order[start : start + size]


class Run:
    """A run while its loop goes. cfg: the settings; record: what config.json holds; lock: the file that locks the directory, in
    the first process; critic: feedback.Critic. `shift` is delta; it and the rest of STATE come from the last checkpoint of a run
    that is resumed."""

    STATE = ("shift", "bad_in_a_row", "idle", "made", "best", "problems")

    def __init__(self, cfg, policy: Policy, sampler, task: tasks.Task, out: Path, record: dict, lock, critic, also):
        self.cfg, self.policy, self.sampler, self.task = cfg, policy, sampler, task
        self.out, self.record, self.lock, self.critic, self.also, self.signals = out, record, lock, critic, also, []
        self.steps = cfg.steps or cfg.epochs * (len(task.train) // cfg.prompts_per_batch)
        self.watched, self.split = task.validation or task.test, "validation" if task.validation else "test"
        problems = json.dumps([(p.id, p.messages, p.reference) for p in task.train])  # not to be resumed on others
        self.problems = hashlib.sha256(problems.encode("utf-8", "replace")).hexdigest()[:16]
        self.shift, self.bad_in_a_row, self.idle, self.made, self.best = None, 0, 0, 0, -1.0
        self.first_step, self.saved, self.probe, self.eval_seconds, self.warned = 0, None, {}, 0.0, False
        self.tracker = None

    def end(self, line: str, status: int) -> None:
        """Ends the program; the line is on standard error, of one of several processes."""
        if self.policy.world.rank == 0:
            print(line, file=sys.stderr)
        sys.exit(status)

    def close(self) -> None:
        for each in (self.tracker, self.lock, self.task):
            if each is not None:
                each.close()

    @contextmanager
    def started(self, teacher, optimizers: dict[str, torch.optim.Optimizer]) -> Iterator[None]:
        """Restores a run that is resumed, hands the weights to the sampler and measures them; at the end, and after an error, saves
        the weights. teacher: the copy that reads contexts, or None; optimizers: by name, one may be there under two."""
        cfg, world, probe = self.cfg, self.policy.world, self.out / "base_failures.json"
        self.teacher = teacher
        self.models = {"policy": self.policy.model} | ({"teacher": teacher} if teacher is not None else {})
        last = {optimizer: name for name, optimizer in reversed(optimizers.items())}
        self.optimizers = {name: (self.policy.model, o) for name, o in optimizers.items() if last[o] == name}
        goes_on = cfg.resume and self._restore()
        self.tracker = Tracker(cfg.track if world.rank == 0 else "", self.out, self.record, self.first_step)
        try:
            self.sampler.sync(self.policy)
            if goes_on:
                now = {"commit": self.record["commit"], "processes": world.size}
                self._write("log.jsonl", {"kind": "resume", "step": self.first_step, **now})
                failures = json.loads(probe.read_text()) if probe.exists() else []
                self.probe = {failure["id"]: feedback.Context(**failure["context"]) for failure in failures}
            elif cfg.eval_every:
                if cfg.teacher_probe and self.record["teacher"]:
                    self.probe = self._base_failures()
                    failures = [{"id": id, "context": asdict(context)} for id, context in self.probe.items()]
                    world.first(lambda: write(probe, json.dumps(failures, indent=1) + "\n"))
                    if not self.probe:
                        tqdm.write("--teacher_probe measures nothing: no failure of the first weights has a context")
                self.validate(0)
            self.critic.missing.clear()  # the first batch counts its own
            quiet = None if world.rank == 0 else True
            self.bar = tqdm(total=self.steps, initial=self.first_step, disable=quiet, unit="batch", dynamic_ncols=True)
            yield
            if not self.made:
                raise Stopped("no update was made: no rollout had a signal (left_out in log.jsonl says why)")
        except (Exception, KeyboardInterrupt) as error:
            # The weights as they were, where nobody else is needed to gather them or everybody is here for the same reason.
            # Who was stopped by a signal has saved them; a disk that is full stays full.
            if isinstance(error, Stopped) or world.size == 1 and not isinstance(error, OSError):
                self.policy.save(self.out / "model")
            raise
        self.policy.save(self.out / "model")

    def _restore(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        kept = checkpoint.restore(self.out / "checkpoints", self.models, self.optimizers, self.policy.world)
        if kept:
            if kept.get("problems") != self.problems:
                raise checkpoint.Damaged("the training problems are not those that the run began with: start a new run")
            self.first_step = self.saved = kept["step"]
            vars(self).update({name: kept[name] for name in self.STATE})
        logs, last = [self.out / "log.jsonl", self.out / "samples.jsonl"], self.first_step if kept else -1
        dropped = self.policy.world.first(lambda: sum(checkpoint.cut_log(log, last) for log in logs))
        print(f"going on after {self.first_step} batches; {dropped} later lines dropped from the logs")
        return kept is not None

    def _write(self, name: str, *rows: dict) -> None:
        """Appends to log.jsonl or samples.jsonl, in one of several processes."""
        if self.policy.world.rank:
            return
        finite = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v  # noqa: E731
        try:
            with (self.out / name).open("a") as file:
                for row in rows:
                    file.write(json.dumps({k: finite(v) for k, v in row.items()}) + "\n")  # JSON has no nan
        except OSError as error:
            raise CannotWrite(f"{self.out / name}: {error.strerror}") from error
        for row in rows if name == "log.jsonl" else ():
            self.tracker.write(row)

    # ---- A batch -----------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[int, list]]:
        """(step, problems) of every batch that is still to be done."""
        order = batches(self.task.train, self.cfg.prompts_per_batch, self.steps, self.cfg.seed)
        return islice(enumerate(order), self.first_step, None)

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
            tqdm.write(f"{row['e_died']:.2f} of the E-step's rows no longer pull: smaller --beta, or see e_died in docs/log.md")
        self.bar.update()
        self.made += log.updates()
        self.idle = 0 if log.e_norms or log.m_norms else self.idle + 1
        if log.step == self.first_step and done < self.steps:
            tqdm.write(self.outlook(sum(row["seconds"].values()), done))
        if cfg.eval_every and (done % cfg.eval_every == 0 or done == self.steps or self.idle == 3):
            self.validate(done)
        if done == self.steps or cfg.checkpoint_every and done % cfg.checkpoint_every == 0:
            self.save_state(done)
        if self.idle == 3:
            raise Stopped(f"three batches in a row made no update: {row['left_out']}")
        self.leave_if_told(done)

    def outlook(self, batch_seconds: float, done: int) -> str:
        """When the run will end, by its first batch and evaluation."""
        every = self.cfg.eval_every
        evaluations = -(-self.steps // every) - done // every if every else 0  # the last batch's is not at a multiple
        left = batch_seconds * (self.steps - done) + self.eval_seconds * evaluations
        end = time.strftime("%a %H:%M", time.localtime(time.time() + left))
        times = f"a batch takes {batch_seconds:.1f} s" + f", an evaluation {self.eval_seconds:.1f} s" * (self.eval_seconds > 0)
        return f"{times}: the run will end in about {timedelta(seconds=round(left))}, {end}"

    def save_state(self, step: int) -> None:
        self.saved = step
        state = {name: getattr(self, name) for name in self.STATE}
        checkpoint.save(self.out / "checkpoints", step, self.models, self.optimizers, state, self.policy.world)

    def leave_if_told(self, step: int) -> None:
        """After a signal to stop: saves the state after `step` batches, which are whole at every place this is called from."""
        if self.policy.world.most(len(self.signals)):
            if self.saved != step:
                self.save_state(step)
            self.policy.save(self.out / "model")
            self.end(f"stopped by a signal; checkpoint saved in {self.out}/checkpoints; resume with --resume", 143)

    # ---- Evaluation by the way ---------------------------------------------------------------------------------

    def measure(self, policy: Policy, problems: list, purpose: str, prompts: list | None = None) -> dict:
        cfg = self.cfg
        return evaluate.measure(
            policy, self.sampler, self.task.verify, problems, n=cfg.eval_samples, seed=seed_for(cfg.seed, purpose),
            max_tokens=cfg.max_response_tokens, temperature=cfg.eval_temperature, top_p=cfg.eval_top_p, prompts=prompts,
        )  # fmt: skip

    def validate(self, step: int) -> None:
        """Pass rate on the problems that training is watched by; the best weights on validation problems are kept."""
        start, cfg = time.perf_counter(), self.cfg
        result = self.measure(self.policy, self.watched, "validation")
        rewards = result.pop("rewards").values()
        row = {"kind": "eval", "step": step, "split": self.split, **result}
        line = f"{self.split} after {step:4d} batches: {evaluate.line(result)}"
        if self.probe:
            row["teacher_avg"] = teacher = self.teacher_pass_rate()
            line += f"  teacher on {len(self.probe)} base failures {teacher:.3f}"
        if self.probe and not step:  # a teacher that cannot read has nothing to teach
            by_id = dict(zip([p.id for p in self.watched], rewards))
            student = sum(sum(by_id[id]) for id in self.probe) / (len(self.probe) * cfg.eval_samples)
            if teacher <= student:
                line += (f"\nwith the feedback the teacher passes no more of them than the student without it ({student:.3f}): see "
                         "teacher_avg in docs/log.md")  # fmt: skip
        self.eval_seconds = round(time.perf_counter() - start, 4)
        self._write("log.jsonl", row | {"seconds": {"eval": self.eval_seconds}})
        tqdm.write(line)
        if self.task.validation and result["avg"] > self.best:  # nothing is chosen by test problems
            self.best = result["avg"]
            self.policy.save(self.out / "best")

    def _base_failures(self) -> dict[str, feedback.Context]:
        """The context of one failure of the first weights, by the problem's id, for each of the first `teacher_probe` problems that
        training is watched by. What the teacher makes of them tells whether it still reads."""
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
        """Pass rate of the teacher, as it now is, with the contexts in `probe`."""
        problems = [p for p in self.watched[: self.cfg.teacher_probe] if p.id in self.probe]
        words, limit, tokenizer = self.cfg.templates(), self.cfg.max_teacher_tokens, self.policy.tokenizer
        prompt = lambda p: feedback.teacher_prompt(tokenizer, p.messages, self.probe[p.id], words, limit)[0]  # noqa: E731
        with weights_of(self.teacher, self.sampler, self.policy) as reader:
            return self.measure(reader, problems, "probe", [prompt(p) for p in problems])["avg"]
