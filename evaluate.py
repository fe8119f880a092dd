"""avg@k and pass@k on a task's problems, with bootstrap intervals, for any model folder or hub id; or grades of responses
that are there already.

    python evaluate.py --model tasks/toy_models/trace --task toy --split test --n 4 --out base.json
    python evaluate.py --run runs/my-run       the weights it started from and those it ended with, same settings
    python evaluate.py --responses answers.jsonl --task math --data math500.jsonl --out grades.jsonl

avg@n is the mean reward over problems and n samples each; pass@k the chance that at least one of k samples passes, by the
unbiased estimator from n samples. Intervals are 95% bootstrap intervals over problems: they speak for new problems, not
for new training runs, whose spread only seeds show.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from math import comb, inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import tasks
from feedback import student_prompt
from harness import plan
from harness.command import CannotWrite, Parser, check_out, run, write
from model.parallel import World
from model.policy import Policy
from rollout import HFSampler, StaleEngine, VLLMSampler, check_sampler, open_sampler, seed_for


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
    "own": Protocol(4, 0.6, 0.95, 8192),
}


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
    for k in (2**i for i in range(1, n.bit_length()) if 2**i <= n):
        per_problem = np.array([pass_at_k(n, int(c), k) for c in rewards.sum(1)])
        low, high = interval(per_problem)
        result[f"pass@{k}"] = {"value": float(per_problem.mean()), "low": low, "high": high}
    return result


def measure(
    policy: Policy,
    sampler: HFSampler | VLLMSampler,
    verify: Callable,
    problems: list[tasks.Problem],
    n: int,
    seed: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    prompts: list[list[int]] | None = None,
) -> dict:
    """Samples n responses to each problem (`prompts`: token ids, by default the student's) and grades them: `summarise`'s
    figures; the share of truncated responses; how many the grader itself failed on (they count as failures); under
    "parts" a summary of each part of the benchmark and under "columns" of the verifier's further columns; under
    "rewards" the outcomes of each problem by id."""
    prompts = prompts or [student_prompt(policy.tokenizer, p.messages) for p in problems]
    rollouts = sampler.sample(prompts, n, seed, max_tokens, temperature, top_p)
    outcomes = verify([p for p in problems for _ in range(n)], [policy.decode(r.tokens) for r in rollouts])
    rewards = np.array([o.reward for o in outcomes]).reshape(len(problems), n)
    parts = dict.fromkeys(p.part for p in problems)
    columns = {}
    for name in dict.fromkeys(name for o in outcomes for name in o.columns):
        rows = []
        for i, problem in enumerate(problems):
            has = [name in o.columns for o in outcomes[i * n : (i + 1) * n]]
            if any(has) and not all(has):
                raise tasks.BadTask(
                    f"problem {problem.id}: some of its outcomes have the column {name!r}, and some have not"
                )
            rows += [i] if all(has) else []
        columns[name] = summarise(np.array([[outcomes[i * n + j].columns[name] for j in range(n)] for i in rows]))
    return {
        **summarise(rewards),
        "truncated": float(np.mean([r.finish == "length" for r in rollouts])),
        "internal": sum(o.verdict == "internal" for o in outcomes),
        "verdicts": dict(Counter(o.verdict for o in outcomes).most_common()),
        "parts": {part: summarise(rewards[[p.part == part for p in problems]]) for part in parts}
        if len(parts) > 1
        else {},
        "columns": columns,
        "rewards": {f"{p.part}/{p.id}" if len(parts) > 1 else p.id: row.tolist() for p, row in zip(problems, rewards)},
    }


def line(result: dict) -> str:
    """One line of a table."""
    cells = [f"avg@{result['n']} {result['avg']:.3f} [{result['low']:.3f}, {result['high']:.3f}]"]
    cells += [
        f"{k} {v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for k, v in result.items() if k.startswith("pass@")
    ]
    for name, column in result.get("columns", {}).items():
        cells.append(f"{name} {column['avg']:.3f} [{column['low']:.3f}, {column['high']:.3f}]")
    if "truncated" in result:
        cells.append(f"truncated {result['truncated']:.3f}")
    return "  ".join(cells) + (f"  grader failed on {result['internal']}" if result.get("internal") else "")


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


def fingerprint(model: str) -> str:
    """Of the weights' files in a folder, by their sizes and their ends; "" for a hub id."""
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16] if Path(model).is_dir() else ""


def settings_of(run: Path) -> dict:
    """The config.json of a run that came to weights. Raises ValueError with one line for what is none."""
    if not (run / "config.json").is_file() or not (run / "model").is_dir():
        raise ValueError(f"--run {run} is no finished run directory: config.json or model/ is missing")
    path, number = run / "config.json", (int, float)
    needed = {"task": str, "model": str, "method": str, "eval_samples": int, "eval_temperature": number, "eval_top_p": number,
              "max_response_tokens": int}  # fmt: skip
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not the configuration of a run")
    if wrong := [name for name, kind in needed.items() if not isinstance(config.get(name), kind)]:
        raise ValueError(f"{path} is not the configuration of a run: {wrong[0]} is {config.get(wrong[0])!r}")
    return config


def first_weights(run: Path, config: dict) -> str:
    """The model that a run started from; of a run that was moved with its model, beside it. Raises ValueError for one that
    has been changed since."""
    model = config["model"]
    beside = [Path(model), run / Path(model).name, Path(__file__).parent / "tasks" / "toy_models" / Path(model).name]
    found = next((str(folder) for folder in beside if folder.is_dir()), model)
    if config.get("model_files") and fingerprint(found) != config["model_files"]:
        raise ValueError(f"{found} no longer holds the weights that {run} started from: evaluate {run}/model by --model")
    return found


def stopped(run: Path, config: dict, task: tasks.Task) -> list[str]:
    """A line for a run that has not done all of its batches, or whose log does not tell."""
    log = run / "log.jsonl"
    if not log.is_file():
        return [f"{run} has no log.jsonl: how many batches it was trained for is not known"]
    done = 0
    for line in log.read_text(errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):  # a torn line is no batch
            row = json.loads(line)
            done = max(done, row["step"] + 1 if row["kind"] == "train" else 0)
    problems = len(task.train) - config.get("prompts_dropped", 0)
    asked = config.get("steps") or config.get("epochs", 0) * (problems // config.get("prompts_per_batch", 1))
    return [f"{run} was stopped after {done} of {asked} batches"] if done < asked else []


def grade(task: tasks.Task, path: Path) -> tuple[list[str], list[dict]]:
    """Grades the rows {"id", "response"} of a JSONL file. Returns the lines to print, and {"id", "reward", "verdict",
    "feedback"} for each row. Raises ValueError with one line for rows that cannot be graded."""
    problems = {p.id: p for p in task.test}
    if len(problems) < len(task.test):
        twice = next(name for name, count in Counter(p.id for p in task.test).items() if count > 1)
        raise ValueError(f"two problems of --data share the id {twice!r}")
    rows = list(tasks.rows(path))
    if not rows or not problems:  # a saved data set can be empty, a file cannot
        raise ValueError(f"{path} holds no response" if problems else "--data holds no problem")
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("response"), str) or "id" not in row:
            raise ValueError(f'{path}, row {number}: a response is {{"id": ..., "response": text}}')
        if str(row["id"]) not in problems:
            raise ValueError(f"{path}, row {number}: no problem of --data has the id {row['id']!r}")
    outcomes = task.verify([problems[str(row["id"])] for row in rows], [row["response"] for row in rows])
    by_problem: dict[str, list[int]] = {}
    for row, outcome in zip(rows, outcomes):
        by_problem.setdefault(str(row["id"]), []).append(outcome.reward)
    keys = ("reward", "verdict", "feedback")
    graded = [{"id": row["id"], **{key: getattr(o, key) for key in keys}} for row, o in zip(rows, outcomes)]
    means = np.array([np.mean(rewards) for rewards in by_problem.values()])
    low, high = interval(means)
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in Counter(o.verdict for o in outcomes).most_common())
    return [
        f"{len(rows)} responses to {len(by_problem)} problems, {len(problems) - len(by_problem)} problems without one: {verdicts}",
        f"mean reward of the answered problems {means.mean():.4f} [{low:.4f}, {high:.4f}]",
    ], graded


def main(argv: list[str] | None = None) -> None:
    parser = Parser("evaluate.py", "avg@n and pass@k of a model on a task, or grades of responses.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder or hub id")
    source.add_argument("--run", type=Path, help="run directory: its first and its last weights, with its own settings")
    source.add_argument(
        "--responses", type=Path, help='JSONL of {"id", "response"}, graded without a model; needs --data'
    )
    parser.add_argument("--task", choices=tasks.TASKS, help="default toy")
    parser.add_argument("--subset", default="", help="of the task; its first by default")
    parser.add_argument("--data", default="", help="problems in the source's own schema: a file, all of which is used")
    parser.add_argument("--split", choices=("train", "validation", "test"), help="default test")
    parser.add_argument("--n", type=int, help="samples per problem; default 16 for sciknoweval, else 4 (the paper's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--greedy", action="store_true", help="temperature 0 and one sample")
    parser.add_argument("--temperature", type=float, help="default 1.0 for toy, else 0.6 (SDPO)")
    parser.add_argument("--top_p", type=float, help="default 1.0 for toy, else 0.95 (SDPO)")
    parser.add_argument("--max_tokens", type=int, help="default 100 for toy, else 8192")
    parser.add_argument("--sampler", choices=("", "vllm", "hf"), default="", help="default: vllm on a GPU, else hf")
    parser.add_argument("--engine_memory", type=float, default=0.6, help="vLLM's share of the GPU's memory")
    parser.add_argument("--out", type=Path, help="file for every problem's rewards, or every response's grade")
    args = parser.parse_args(argv)
    given = lambda *flags: [f"--{f}" for f in flags if getattr(args, f) is not parser.get_default(f)]  # noqa: E731
    if args.run and (unused := given("task", "subset")):
        parser.error(f"--run goes without {' and '.join(unused)}: a run has its own")
    if args.responses and (unused := given("n", "greedy", "temperature", "top_p", "max_tokens", "split")):
        parser.error(f"--responses goes without {' and '.join(unused)}: they are graded as they are")
    if args.greedy and (args.n not in (None, 1) or args.temperature not in (None, 0)):
        parser.error("--greedy is one sample at temperature 0: it goes without another --n or --temperature")
    args.task, args.split = args.task or "toy", args.split or "test"
    try:
        # Of a run its own settings, else the task's protocol; flags go over both.
        config = settings_of(args.run) if args.run else {}
        own = [config.get(name) for name in ("eval_samples", "eval_temperature", "eval_top_p", "max_response_tokens")]
        protocol = Protocol(*own) if args.run else PROTOCOLS[args.task]
        first = first_weights(args.run, config) if args.run else args.model
        models = {"before": first, "after": str(args.run / "model")} if args.run else {"model": first}
        out = args.out or (args.run / "evaluation.json" if args.run else None)
        flags = (args.n, args.temperature, args.top_p, args.max_tokens)
        n, temperature, top_p, limit = (own if flag is None else flag for flag, own in zip(flags, protocol))
        n, temperature = (1, 0.0) if args.greedy else (n, temperature)
        if n < 1 or limit < 1 or not 0 <= temperature < inf or not 0 < top_p <= 1:
            raise ValueError("--n and --max_tokens must be at least 1, --temperature at least 0, --top_p in (0, 1]")
        if not 0 < args.engine_memory <= 1:
            raise ValueError(f"--engine_memory must be in (0, 1], not {args.engine_memory}")
        check_sampler(args.sampler)
        if out:
            check_out(out)
        for what, path in (("the responses", args.responses), ("the problems", args.data)):
            if out and path and out.resolve() == Path(path).resolve():
                raise ValueError(f"--out {out} would replace {what}")
        whole = args.data and args.task != "own"  # a file of problems; an own task's is code
        if whole and (args.run or args.subset or args.split != "test"):
            raise ValueError("--data takes all rows of a file: it goes without --run, --subset and --split")
        if args.responses and not args.data:
            raise ValueError("--responses needs --data, the problems they answer")
        if args.run:
            keys = ("subset", "data", "train_tests", "since", "until")
            task = tasks.load(config["task"], **{key: config[key] for key in keys if key in config})
        elif whole:
            task = tasks.read(args.task, args.data, official=args.responses is not None)
        else:
            task = tasks.load(args.task, args.subset, **({"data": args.data} if args.data else {}))
        if args.responses:
            lines, graded = grade(task, args.responses)
            print("\n".join([*task.notes, *lines]))
            task.close()
            if out:
                write(out, "".join(json.dumps(row) + "\n" for row in graded))
            return
        if not torch.cuda.is_available():
            torch.set_num_threads(1)
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        for path in models.values():
            plan.read(path)
        world = World.start()
        task.verify = world.shared(task.verify)
    except CannotWrite:
        raise
    except (ValueError, OSError) as error:
        parser.error(str(error))
    problems, results = getattr(task, args.split), {}
    if not problems:
        parser.error(f"{task.name} has no {args.split} problems")
    settings = {"task": task.name, "split": args.split, "seed": args.seed, "temperature": temperature,
                "top_p": top_p, "max_tokens": limit}  # fmt: skip
    for note in [*task.notes, *(stopped(args.run, config, task) if args.run else [])]:
        print(note)
    print(
        f"{task.name}, {len(problems)} {args.split} problems, {n} samples each, temperature {temperature}, top_p {top_p}"
    )
    sampler = None
    for name, path in models.items():
        if sampler is not None:  # one network at a time; the engine stays, since both are of one shape
            sampler.sleep()
            sampler.policy = policy = None
            torch.cuda.empty_cache()
        try:
            policy = Policy.load(path, torch.bfloat16 if torch.cuda.is_available() else torch.float32, world=world)
        except ValueError as error:
            parser.error(str(error))
        if sampler is None:
            longest = max(len(student_prompt(policy.tokenizer, p.messages)) for p in problems) + limit
            sampler = open_sampler(args.sampler, policy, path, longest, args.engine_memory)
        try:
            sampler.sync(policy)
        except StaleEngine as error:
            print(f"evaluate.py: {error}", file=sys.stderr)
            sys.exit(1)
        seed = seed_for(args.seed, "evaluation")
        result = measure(policy, sampler, task.verify, problems, n, seed, limit, temperature, top_p)
        results[name] = {"model": models[name], **settings, **result}
        print("\n".join(table(name, models[name], results[name])))
    task.close()
    if out and world.rank == 0:
        write(out, json.dumps(results["model"] if args.model else results, indent=1) + "\n")


if __name__ == "__main__":
    run(main, tasks.BadTask)
