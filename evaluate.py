"""avg@k and pass@k on a task's problems, with bootstrap intervals, for any model folder or hub id; or grades of given responses.

    python evaluate.py --model tasks/toy_models/trace --task toy --split test --n 4 --out base.json
    python evaluate.py --run runs/my-run       the weights it started from and those it ended with, same settings
    python evaluate.py --responses answers.jsonl --task math --data math500.jsonl --out grades.jsonl

avg@n is the mean reward over problems and n samples of each; pass@k is the chance that at least one of k samples passes, by the
unbiased estimator from n samples. Intervals are 95% bootstrap intervals over problems: they cover the choice of problems for
one trained model; run several seeds to see the spread between runs.
"""

import gc
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import tasks
from feedback import student_prompt
from harness import machine, plan, runs
from harness.command import check_out, fail, run, write
from harness.settings import Group, check_flags, parse
from model.parallel import Shared, World
from model.policy import Policy
from rollout import StaleEngine, check_sampler, grading, open_sampler, seed_for

# ---- Settings ----------------------------------------------------------------------------------------------------

COMMAND = Group("What is evaluated")
PROBLEMS = Group("Problems", "--model and --responses, since a run has its own", lambda c: not c.run)
SAMPLES = Group("Samples", "--model and --run, since responses are graded as they are", lambda c: not c.responses)


@dataclass
class Config:
    """n of avg@n is the paper's (Sec. 5), temperature and top_p are SDPO's. PROTOCOLS holds what other tasks change."""

    model: str = COMMAND("", "folder or hub id of the model")
    run: str = COMMAND("", "run directory: its first and its last weights, with its own settings")
    responses: str = COMMAND("", 'JSONL of {"id", "response"}, graded without a model; needs --data')
    out: str = COMMAND("", "file for the rewards of each problem, or the grade of each response")
    unsafe_sandbox: bool = COMMAND(False, "run programs even if this machine lacks a layer of the sandbox")

    task: Literal[*tasks.TASKS] = PROBLEMS("toy", "the task, whose verifier grades")
    subset: str = PROBLEMS("", "subset of the task; default: its first")
    data: str = PROBLEMS("", "file of problems in the source's own schema, all of which are used")

    split: Literal["train", "validation", "test"] = SAMPLES("test", "problems of the task to use")
    n: int = SAMPLES(4, "samples per problem", above=0)
    seed: int = SAMPLES(0, "seed of the samples")
    temperature: float = SAMPLES(0.6, "sampling temperature; 0: the likeliest token", least=0)
    top_p: float = SAMPLES(0.95, "top_p of sampling", above=0, most=1)
    max_tokens: int = SAMPLES(8192, "tokens of a response; longer ones are cut and graded", above=0)
    sampler: Literal["", "vllm", "hf"] = SAMPLES("", "vLLM, or transformers; default: vllm on a GPU, hf on a CPU")
    engine_memory: float = SAMPLES(0.6, "share of the GPU's memory for vLLM", above=0, most=1)


PROTOCOLS = {
    "toy": dict(temperature=1.0, top_p=1.0, max_tokens=100),
    "sciknoweval": dict(n=16),
    "own": dict(max_tokens=1024),
    "reasoning_gym": dict(max_tokens=512),
}


# ---- Numbers -----------------------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k samples, drawn without replacement from n of which c are correct, hold a correct one:
    1 − C(n−c, k) / C(n, k), the unbiased estimator of pass@k."""
    return 1.0 - comb(n - c, k) / comb(n, k)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean over problems, with a fixed seed, so that tables are reproducible."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(np.mean(values)), float(np.mean(values))
    from scipy import stats  # imported here, since it takes most of a second and --help needs no interval

    found = stats.bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def summarise(rewards: np.ndarray) -> dict:
    """rewards: (problems, n) of 0 and 1. Returns avg with low and high, and pass@k for k = 2, 4, ... up to n."""
    problems, n = rewards.shape
    low, high = interval(rewards.mean(1))
    result = {"avg": float(rewards.mean()), "low": low, "high": high, "problems": problems, "n": n}
    for k in (2**i for i in range(1, n.bit_length())):
        per_problem = np.array([pass_at_k(n, int(c), k) for c in rewards.sum(1)])
        low, high = interval(per_problem)
        result[f"pass@{k}"] = {"value": float(per_problem.mean()), "low": low, "high": high}
    return result


def measure(policy: Policy, sampler, verify: Callable, problems: list[tasks.Problem], n: int, seed: int, max_tokens: int,
            temperature: float, top_p: float, prompts: list[list[int]] | None = None) -> dict:  # fmt: skip
    """Samples n responses to each problem (`prompts`: token ids, by default the student's) and grades them. Returns `summarise`'s
    numbers; the share of truncated responses; how many the grader itself failed on (they count as failures); a summary of each
    of the benchmark's "parts" and of the verifier's further "columns"; and each problem's "rewards" by id."""
    prompts = prompts or [student_prompt(policy.tokenizer, p.messages) for p in problems]
    rows = [p for p in problems for _ in range(n)]
    rollouts = sampler.sample(prompts, n, seed, max_tokens, temperature, top_p, grading(verify, rows, policy))
    outcomes = verify(rows, [policy.decode(r.tokens) for r in rollouts])
    rewards = np.array([o.reward for o in outcomes]).reshape(len(problems), n)
    columns: dict[str, list] = {}
    for i, problem in enumerate(problems):
        own = [o.columns for o in outcomes[i * n : (i + 1) * n]]
        if any(row.keys() != own[0].keys() for row in own):
            raise tasks.BadTask(f"problem {problem.id}: its outcomes differ in their columns")
        for name in own[0]:
            columns.setdefault(name, []).append([row[name] for row in own])
    parts = list(dict.fromkeys(p.part for p in problems))
    parts = parts if len(parts) > 1 else []
    return {
        **summarise(rewards),
        "truncated": float(np.mean([r.finish == "length" for r in rollouts])),
        "internal": sum(o.verdict == "internal" for o in outcomes),
        "verdicts": dict(Counter(o.verdict for o in outcomes).most_common()),
        "parts": {part: summarise(rewards[[p.part == part for p in problems]]) for part in parts},
        "columns": {name: summarise(np.array(rows)) for name, rows in columns.items()},
        "rewards": {f"{p.part}/{p.id}" if parts else p.id: row.tolist() for p, row in zip(problems, rewards)},
    }


# ---- Lines -------------------------------------------------------------------------------------------------------


def line(result: dict) -> str:
    """The numbers of one row of a table."""
    show = lambda name, value, v: f"{name} {value:.3f} [{v['low']:.3f}, {v['high']:.3f}]"  # noqa: E731
    cells = [show(f"avg@{result['n']}", result["avg"], result)]
    cells += [show(k, v["value"], v) for k, v in result.items() if k.startswith("pass@")]
    cells += [show(name, v["avg"], v) for name, v in result.get("columns", {}).items()]
    cells += [f"truncated {result['truncated']:.3f}"] if "truncated" in result else []
    return "  ".join(cells + ([f"grader failed on {result['internal']}"] if result.get("internal") else []))


def table(name: str, label: str, result: dict) -> list[str]:
    """The lines of one model: the whole benchmark, then its parts."""
    rows = [(name, label, line(result))]
    rows += [("", f"  {part}, {summary['problems']} problems", line(summary)) for part, summary in result["parts"].items()]
    if result["parts"] and result["task"].startswith("sciknoweval"):  # the paper's AVG: each domain counts equally
        mean = np.mean([summary["avg"] for summary in result["parts"].values()])
        rows.append(("", "  mean of the domains", f"avg@{result['n']} {mean:.3f}"))
    return [f"  {first:8s}{second:40s} {numbers}" for first, second, numbers in rows]


def grade(task: tasks.Task, path: Path) -> tuple[list[str], list[dict]]:
    """Grades the rows {"id", "response"} of a JSONL file. Returns the lines to print, and {"id", "reward", "verdict",
    "feedback"} for each row. Raises ValueError with one line for rows that cannot be graded."""
    problems, rows, rewards = {p.id: p for p in task.test}, list(tasks.rows(path)), {}
    if len(problems) < len(task.test):
        (name, _), *_ = Counter(p.id for p in task.test).most_common()
        raise ValueError(f"two problems of --data share the id {name!r}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("response"), str) or "id" not in row:
            raise ValueError(f'{path}, row {number}: a response is {{"id": ..., "response": text}}')
        if str(row["id"]) not in problems:
            raise ValueError(f"{path}, row {number}: no problem of --data has the id {row['id']!r}")
    if not rows:
        raise ValueError(f"{path} holds no response")
    outcomes = task.verify([problems[str(row["id"])] for row in rows], [row["response"] for row in rows])
    for row, o in zip(rows, outcomes):
        rewards.setdefault(str(row["id"]), []).append(o.reward)
    means = np.array([np.mean(of_problem) for of_problem in rewards.values()])
    low, high = interval(means)
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in Counter(o.verdict for o in outcomes).most_common())
    return [
        f"{len(rows)} responses to {len(rewards)} problems, {len(problems) - len(rewards)} problems without one: {verdicts}",
        f"mean reward of the answered problems {means.mean():.4f} [{low:.4f}, {high:.4f}]",
    ], [{"id": row["id"], "reward": o.reward, "verdict": o.verdict, "feedback": o.feedback} for row, o in zip(rows, outcomes)]


# ---- The command -------------------------------------------------------------------------------------------------


def settings(argv: list[str] | None = None) -> tuple[Config, dict]:
    """What a command's flags mean, and what the config.json of --run holds. Raises ValueError if --run is no run directory."""
    config = {}

    def below(given: dict) -> dict:
        """The settings that flags override: those of the run, or of the task's protocol."""
        if "run" not in given:
            return PROTOCOLS.get(given.get("task", "toy"), {})
        config.update(runs.settings_of(Path(given["run"])))
        return {name: config[name] for name in ("task", "subset", "unsafe_sandbox") if name in config} | dict(
            n=config["eval_samples"], temperature=config["eval_temperature"], top_p=config["eval_top_p"],
            max_tokens=config["max_response_tokens"], out=str(Path(given["run"]) / "evaluation.json"))  # fmt: skip

    return parse(argv, Config, "evaluate.py", "avg@n and pass@k of a model on a task, or grades of responses.", below), config


def prepare(cfg: Config, config: dict) -> tuple[tasks.Task, dict[str, str]]:
    """The task, and the models by name. config: of the run. Raises ValueError with one line for what cannot be evaluated."""
    check_flags(cfg)
    if sum(map(bool, (cfg.model, cfg.run, cfg.responses))) != 1:
        raise ValueError("give one of --model, --run and --responses")
    if cfg.responses and not cfg.data:
        raise ValueError("--responses needs --data, the problems they answer")
    if cfg.out:
        check_out(Path(cfg.out))
        if Path(cfg.out).resolve() in [Path(file).resolve() for file in (cfg.responses, cfg.data) if file]:
            raise ValueError(f"--out {cfg.out} would replace a file that is read")
    of_problems = cfg.data and cfg.task not in ("own", "reasoning_gym")  # whose --data is code, and settings
    if of_problems and (cfg.subset or cfg.split != "test"):
        raise ValueError("--data takes all rows of a file: leave out --subset and --split")
    unsafe = machine.judged(*machine.sandbox(cfg))
    models, source, folder = {"model": cfg.model}, {"data": cfg.data}, Path(cfg.run)
    if cfg.run:
        models = {"before": runs.first_weights(folder, config), "after": str(folder / "model")}
        source = {key: config[key] for key in ("data", "train_tests", "since", "until") if key in config}
    if of_problems:
        task = tasks.read(cfg.task, cfg.data, official=bool(cfg.responses))
    else:
        task = tasks.load(cfg.task, cfg.subset, **source)
    task.notes += unsafe + (runs.stopped(folder, config, len(task.train)) if cfg.run else [])
    if not cfg.responses:
        check_sampler(cfg.sampler)
        if not getattr(task, cfg.split):
            raise ValueError(f"{task.name} has no {cfg.split} problems")
        for path in models.values():
            plan.read(path)
    return task, models


def main(argv: list[str] | None = None) -> None:
    try:
        cfg, config = settings(argv)
        if cfg.responses and os.environ.get("RANK", "0") != "0":
            return  # the first process grades them all
        task, models = prepare(cfg, config)
        if cfg.responses:
            lines, graded = grade(task, Path(cfg.responses))
        else:
            world = World.start()
    except (ValueError, OSError) as error:
        fail(error, "evaluate.py")
    if cfg.responses:
        task.close()
        print("\n".join([*task.notes, *lines]))
        if cfg.out:
            write(Path(cfg.out), "".join(json.dumps(row) + "\n" for row in graded))
            print(f"{cfg.out}: the grade of each response")
        return
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    problems, results, sampler, verify = getattr(task, cfg.split), {}, None, Shared(world, task.verify, task.threads)
    kept = {"task": task.name, **{name: getattr(cfg, name) for name in ("split", "seed", "temperature", "top_p", "max_tokens")}}
    how = f"{cfg.n} samples each, temperature {cfg.temperature}, top_p {cfg.top_p}"
    print("\n".join([*task.notes, f"{task.name}, {len(problems)} {cfg.split} problems, {how}"]))
    for name, path in models.items():
        if sampler is not None:  # one network at a time; the engine stays, since both networks have the same shape
            sampler.sleep()
            sampler.policy = policy = None
            gc.collect()  # a sharded network is in a cycle with a method of its own
            torch.cuda.empty_cache()
        try:
            policy = Policy.load(path, torch.bfloat16 if torch.cuda.is_available() else torch.float32, world=world)
            prompts = [student_prompt(policy.tokenizer, p.messages) for p in problems]
            longest = max(map(len, prompts)) + cfg.max_tokens
            sampler = sampler or open_sampler(cfg.sampler, policy, path, longest, cfg.engine_memory, prompts[: 2 * world.size])
            sampler.sync(policy)
        except (ValueError, StaleEngine) as error:
            fail(error, "evaluate.py", status=1 if isinstance(error, StaleEngine) else 2)
        drawn = cfg.n, seed_for(cfg.seed, "evaluation"), cfg.max_tokens, cfg.temperature, cfg.top_p
        results[name] = {"model": path, **kept, **measure(policy, sampler, verify, problems, *drawn, prompts)}
        print("\n".join(table(name, path, results[name])))
    task.close()
    if cfg.out and world.rank == 0:
        write(Path(cfg.out), json.dumps(results if cfg.run else results["model"], indent=1) + "\n")
        print(f"{cfg.out}: these numbers, and each problem's rewards")


if __name__ == "__main__":
    run(main, tasks.BadTask)
