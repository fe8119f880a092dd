"""avg@k and pass@k on a task's problems, with bootstrap intervals, for any model folder or hub id.

    python evaluate.py --model toy_models/trace --task toy --split test --n 4 --out base.json
    python evaluate.py --run runs/my-run       the weights it started from and those it ended with, same settings

avg@n is the mean reward over problems and n samples each; pass@k the chance that at least one of k samples passes, by the
unbiased estimator from n samples. Intervals are 95% bootstrap intervals over problems: they speak for new problems, not
for new training runs, whose spread only seeds show.
"""

import argparse
import json
import sys
from collections.abc import Callable
from math import comb
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from transformers.utils import logging as hf_logging

import tasks
from feedback import student_prompt
from policy import Policy
from rollout import HFSampler, seed_for


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, c of them correct, drawn without replacement, hold a correct one:
    1 − C(n−c, k) / C(n, k), the unbiased estimator of pass@k."""
    return 1.0 - comb(n - c, k) / comb(n, k)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean over problems; fixed seed, so that a table can be made again."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(np.mean(values)), float(np.mean(values))
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
    sampler: HFSampler,
    verify: Callable,
    problems: list[tasks.Problem],
    n: int,
    seed: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
) -> dict:
    """Samples n responses to each problem and grades them: `summarise`'s figures, the share of truncated responses, and
    under "rewards" the outcomes of each problem by id."""
    prompts = [student_prompt(policy.tokenizer, p.messages) for p in problems]
    rollouts = sampler.sample(prompts, n, seed, max_tokens, temperature, top_p)
    outcomes = verify([p for p in problems for _ in range(n)], [policy.decode(r.tokens) for r in rollouts])
    rewards = np.array([o.reward for o in outcomes]).reshape(len(problems), n)
    return {
        **summarise(rewards),
        "truncated": float(np.mean([r.finish == "length" for r in rollouts])),
        "rewards": {p.id: row.tolist() for p, row in zip(problems, rewards)},
    }


def line(result: dict) -> str:
    """One line of a table."""
    cells = [f"avg@{result['n']} {result['avg']:.3f} [{result['low']:.3f}, {result['high']:.3f}]"]
    cells += [
        f"{k} {v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for k, v in result.items() if k.startswith("pass@")
    ]
    return "  ".join(cells) + f"  truncated {result['truncated']:.3f}"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        print(f"evaluate.py: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="avg@n and pass@k of a model on a task.", allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder or hub id")
    source.add_argument("--run", type=Path, help="run directory: its first and its last weights, with its own settings")
    parser.add_argument("--task", choices=tasks.TASKS, default="toy")
    parser.add_argument("--subset", default="", help="of the task; its first by default")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    parser.add_argument("--n", type=int, default=4, help="samples per problem")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--greedy", action="store_true", help="temperature 0 and one sample")
    parser.add_argument("--temperature", type=float, help="default 1.0 for toy, else 0.6 (SDPO)")
    parser.add_argument("--top_p", type=float, help="default 1.0 for toy, else 0.95 (SDPO)")
    parser.add_argument("--max_tokens", type=int, help="default 100 for toy, else 8192")
    parser.add_argument(
        "--out", type=Path, help="JSON file with every problem's rewards; --run writes RUN/evaluation.json"
    )
    args = parser.parse_args(argv)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        models, out = {"model": args.model}, args.out
        toy = args.task == "toy"
        task_name, subset = args.task, args.subset
        temperature, top_p, limit = (1.0, 1.0, 100) if toy else (0.6, 0.95, 8192)
        if args.run:
            if not (args.run / "config.json").is_file() or not (args.run / "model").is_dir():
                raise ValueError(f"--run {args.run} is no finished run directory: config.json or model/ is missing")
            config = json.loads((args.run / "config.json").read_text())
            models, out = (
                {"before": config["model"], "after": str(args.run / "model")},
                out or args.run / "evaluation.json",
            )
            task_name, subset = config["task"], config["subset"]
            temperature, top_p, limit = config["eval_temperature"], config["eval_top_p"], config["max_response_tokens"]
        temperature = 0.0 if args.greedy else temperature if args.temperature is None else args.temperature
        top_p = top_p if args.top_p is None else args.top_p
        limit = limit if args.max_tokens is None else args.max_tokens
        n = 1 if args.greedy else args.n
        if n < 1 or limit < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ValueError("--n and --max_tokens must be at least 1, --temperature at least 0, --top_p in (0, 1]")
        if out and not out.parent.is_dir():
            raise ValueError(f"--out {out}: the folder {out.parent} does not exist")
        task = tasks.load(task_name, subset)
        if not torch.cuda.is_available():
            torch.set_num_threads(1)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        policies = {name: Policy.load(path, device=device) for name, path in models.items()}
    except ValueError as error:
        parser.error(str(error))
    problems, results = getattr(task, args.split), {}
    settings = {"task": task.name, "split": args.split, "seed": args.seed, "temperature": temperature,
                "top_p": top_p, "max_tokens": limit}  # fmt: skip
    print(
        f"{task.name}, {len(problems)} {args.split} problems, {n} samples each, temperature {temperature}, top_p {top_p}"
    )
    for name, policy in policies.items():
        seed = seed_for(args.seed, "evaluation")
        result = measure(policy, HFSampler(policy), task.verify, problems, n, seed, limit, temperature, top_p)
        results[name] = {"model": models[name], **settings, **result}
        print(f"  {name:8s}{models[name]:40s}{line(result)}")
    task.close()
    if out:
        out.write_text(json.dumps(results["model"] if args.model else results, indent=1) + "\n")


if __name__ == "__main__":
    main()
