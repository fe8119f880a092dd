"""avg@k and pass@k on a task's problems, with bootstrap intervals, for any model folder or hub id; or grades of ready-made
responses.

    python evaluate.py --model tasks/toy_models/trace --task toy --split test --n 4 --out base.json
    python evaluate.py --run runs/my-run       the weights it started from and those it ended with, same settings
    python evaluate.py --responses answers.jsonl --task math --data math500.jsonl --out grades.jsonl

avg@n is the mean reward over problems and n samples each; pass@k the chance that at least one of k samples passes, by the
unbiased estimator from n samples. Intervals are 95% bootstrap intervals over problems: they cover the choice of problems
for one trained model; run several seeds to see the spread between runs.
"""

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from math import comb, inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import tasks
from feedback import student_prompt
from harness import machine, plan, runs
from harness.command import Parser, check_out, fail, run, write
from model.parallel import Shared, World
from model.policy import Policy
from rollout import StaleEngine, check_sampler, grading, open_sampler, seed_for


class Protocol(NamedTuple):
    """How a task is evaluated: n of avg@n, and how its samples are drawn."""

    samples: int
    temperature: float
    top_p: float
    max_tokens: int


PROTOCOLS = {  # n is the paper's (Sec. 5), temperature and top_p are SDPO's
    "toy": Protocol(4, 1.0, 1.0, 100),
    "lcb": Protocol(4, 0.6, 0.95, 8192),
    "sciknoweval": Protocol(16, 0.6, 0.95, 8192),
    "math": Protocol(4, 0.6, 0.95, 8192),
    "own": Protocol(4, 0.6, 0.95, 1024),
    "reasoning_gym": Protocol(4, 0.6, 0.95, 512),
}

# ---- Numbers -----------------------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, c of them correct, drawn without replacement, hold a correct one:
    1 − C(n−c, k) / C(n, k), the unbiased estimator of pass@k."""
    return 1.0 - comb(n - c, k) / comb(n, k)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean over problems; fixed seed, so that a table can be made again."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(np.mean(values)), float(np.mean(values))
    from scipy import stats  # most of a second, which training can do without

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
    """Samples n responses to each problem (`prompts`: token ids, by default the student's) and grades them: `summarise`'s
    figures; the share of truncated responses; how many the grader itself failed on (they count as failures); under
    "parts" a summary of each part of the benchmark and under "columns" of the verifier's further columns; under
    "rewards" the outcomes of each problem by id."""
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
    """One line of a table."""
    show = lambda name, value, v: f"{name} {value:.3f} [{v['low']:.3f}, {v['high']:.3f}]"  # noqa: E731
    cells = [show(f"avg@{result['n']}", result["avg"], result)]
    cells += [show(k, v["value"], v) for k, v in result.items() if k.startswith("pass@")]
    cells += [show(name, v["avg"], v) for name, v in result.get("columns", {}).items()]
    cells += [f"truncated {result['truncated']:.3f}"] if "truncated" in result else []
    return "  ".join(cells + ([f"grader failed on {result['internal']}"] if result.get("internal") else []))


def table(name: str, label: str, result: dict) -> list[str]:
    """The lines of one model: the whole benchmark, then its parts."""
    row = lambda first, second, figures: f"  {first:8s}{second:40s} {figures}"  # noqa: E731
    lines = [row(name, label, line(result))]
    for part, figures in result["parts"].items():
        lines.append(row("", f"  {part}, {figures['problems']} problems", line(figures)))
    if result["parts"] and result["task"].startswith("sciknoweval"):  # the paper's AVG: domains count alike
        mean = np.mean([figures["avg"] for figures in result["parts"].values()])
        lines.append(row("", "  mean of the domains", f"avg@{result['n']} {mean:.3f}"))
    return lines


def grade(task: tasks.Task, path: Path) -> tuple[list[str], list[dict]]:
    """Grades the rows {"id", "response"} of a JSONL file. Returns the lines to print, and {"id", "reward", "verdict",
    "feedback"} for each row. Raises ValueError with one line for rows that cannot be graded."""
    problems = {p.id: p for p in task.test}
    for name, count in Counter(p.id for p in task.test).items():
        if count > 1:
            raise ValueError(f"two problems of --data share the id {name!r}")
    rows, rewards = list(tasks.rows(path)), {}
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


def arguments(argv: list[str] | None) -> Namespace:
    """What was given; n, temperature, top_p and max_tokens are None where they are left to the task or the run."""
    parser = Parser("evaluate.py", "avg@n and pass@k of a model on a task, or grades of responses.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder or hub id")
    source.add_argument("--run", type=Path, help="run directory: its first and its last weights, with its own settings")
    source.add_argument("--responses", type=Path, help='JSONL of {"id", "response"}, graded without a model; needs --data')
    parser.add_argument("--task", choices=tasks.TASKS, help="default toy")
    parser.add_argument("--subset", default="", help="of the task; its first by default")
    parser.add_argument("--data", default="", help="problems in the source's own schema: a file, all of which is used")
    parser.add_argument("--split", choices=("train", "validation", "test"), help="default test")
    parser.add_argument("--n", type=int, help="samples per problem; default 16 for sciknoweval, else 4 (the paper's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--greedy", action="store_true", help="temperature 0 and one sample")
    parser.add_argument("--temperature", type=float, help="default 1.0 for toy, else 0.6 (SDPO)")
    parser.add_argument("--top_p", type=float, help="default 1.0 for toy, else 0.95 (SDPO)")
    parser.add_argument("--max_tokens", type=int, help="default 100 for toy, 1024 for own, 512 for reasoning_gym, else 8192")
    parser.add_argument("--sampler", choices=("", "vllm", "hf"), default="", help="default: vllm on a GPU, else hf")
    parser.add_argument("--engine_memory", type=float, default=0.6, help="vLLM's share of the GPU's memory")
    parser.add_argument("--unsafe_sandbox", action="store_true", help="run programs although a layer of the sandbox is missing")
    parser.add_argument("--out", type=Path, help="file for every problem's rewards, or every response's grade")
    args = parser.parse_args(argv)
    given = lambda *flags: [f"--{f}" for f in flags if getattr(args, f) is not parser.get_default(f)]  # noqa: E731
    if args.run and (unused := given("task", "subset", "data")):
        parser.error(f"--run goes without {' and '.join(unused)}: a run has its own")
    if args.responses and (unused := given("n", "greedy", "temperature", "top_p", "max_tokens", "split", "seed", "sampler")):
        parser.error(f"--responses goes without {' and '.join(unused)}: they are graded as they are")
    if args.responses and not args.data:
        parser.error("--responses needs --data, the problems they answer")
    if args.greedy and (args.n not in (None, 1) or args.temperature not in (None, 0)):
        parser.error("--greedy is one sample at temperature 0: it goes without another --n or --temperature")
    args.n, args.temperature = (1, 0.0) if args.greedy else (args.n, args.temperature)
    args.task, args.split = args.task or "toy", args.split or "test"
    return args


def prepare(args: Namespace) -> tuple[tasks.Task, dict[str, str]]:
    """The task, and the models by name; what `args` leaves open is set. Raises ValueError with one line."""
    config, protocol, models = {}, PROTOCOLS[args.task], {"model": args.model}
    if args.run:
        config = runs.settings_of(args.run)
        models = {"before": runs.first_weights(args.run, config), "after": str(args.run / "model")}
        protocol = [config[name] for name in ("eval_samples", "eval_temperature", "eval_top_p", "max_response_tokens")]
        args.task, args.out = config["task"], args.out or args.run / "evaluation.json"
        args.subset, args.unsafe_sandbox = config.get("subset", ""), args.unsafe_sandbox or config.get("unsafe_sandbox", False)
    for name, value in zip(("n", "temperature", "top_p", "max_tokens"), protocol):
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.n < 1 or args.max_tokens < 1 or not 0 <= args.temperature < inf:
        raise ValueError("--n and --max_tokens must be at least 1, and --temperature at least 0")
    if not 0 < args.top_p <= 1 or not 0 < args.engine_memory <= 1:
        raise ValueError("--top_p and --engine_memory must be in (0, 1]")
    check_sampler(args.sampler)
    if args.out:
        check_out(args.out)
        for what, path in (("the responses", args.responses), ("the problems", args.data)):
            if path and args.out.resolve() == Path(path).resolve():
                raise ValueError(f"--out {args.out} would replace {what}")
    whole = args.data and args.task not in ("own", "reasoning_gym")  # a file of problems; theirs are code, and settings
    if whole and (args.subset or args.split != "test"):
        raise ValueError("--data takes all rows of a file: it goes without --subset and --split")
    unsafe = machine.judged(*machine.sandbox(args))
    if whole:
        task = tasks.read(args.task, args.data, official=args.responses is not None)
    else:
        own = {key: config[key] for key in ("data", "train_tests", "since", "until") if key in config}
        task = tasks.load(args.task, args.subset, **({"data": args.data} | own))
    task.notes += unsafe + (runs.stopped(args.run, config, len(task.train)) if args.run else [])
    if not args.responses:
        if not getattr(task, args.split):
            raise ValueError(f"{task.name} has no {args.split} problems")
        for path in models.values():
            plan.read(path)
    return task, models


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    try:
        task, models = prepare(args)
        lines, graded = grade(task, args.responses) if args.responses else ([], [])
        world = World() if args.responses else World.start()
    except (ValueError, OSError) as error:
        fail(error, "evaluate.py")
    if args.responses:
        task.close()
        print("\n".join([*task.notes, *lines]))
        if args.out:
            write(args.out, "".join(json.dumps(row) + "\n" for row in graded))
            print(f"{args.out}: every response's grade")
        return
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    problems, results, sampler, verify = getattr(task, args.split), {}, None, Shared(world, task.verify, task.threads)
    settings = {"task": task.name, **{key: getattr(args, key) for key in ("split", "seed", "temperature", "top_p", "max_tokens")}}
    print("\n".join(task.notes + [f"{task.name}, {len(problems)} {args.split} problems, {args.n} samples each, temperature "
                                  f"{args.temperature}, top_p {args.top_p}"]))  # fmt: skip
    for name, path in models.items():
        if sampler is not None:  # one network at a time; the engine stays, since both are of one shape
            sampler.sleep()
            sampler.policy = policy = None
            torch.cuda.empty_cache()
        try:
            policy = Policy.load(path, torch.bfloat16 if torch.cuda.is_available() else torch.float32, world=world)
        except ValueError as error:
            fail(error, "evaluate.py")
        prompts = [student_prompt(policy.tokenizer, p.messages) for p in problems]
        longest = max(map(len, prompts)) + args.max_tokens
        sampler = sampler or open_sampler(args.sampler, policy, path, longest, args.engine_memory, prompts[: 2 * world.size])
        try:
            sampler.sync(policy)
        except StaleEngine as error:
            fail(error, "evaluate.py", status=1)
        drawn = args.n, seed_for(args.seed, "evaluation"), args.max_tokens, args.temperature, args.top_p
        results[name] = {"model": path, **settings, **measure(policy, sampler, verify, problems, *drawn, prompts)}
        print("\n".join(table(name, path, results[name])))
    task.close()
    if args.out and world.rank == 0:
        write(args.out, json.dumps(results if args.run else results["model"], indent=1) + "\n")
        print(f"{args.out}: these numbers, and every problem's rewards")


if __name__ == "__main__":
    run(main, tasks.BadTask)
