"""The paper's tables: our numbers next to the paper's, in percent, from runs that `evaluate.py --run` has measured.

    python -m study.tables runs/*

study/paper.txt lists the paper's rows. A run enters a row only if it was trained and evaluated with that row's settings: the task's
preset, which has the paper's settings, and the row's flags.
"""

import sys
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.command import Parser, run
from harness.runs import config_of
from study.figures import load
from study.study import interval, lines_of, settings_of
from tasks.sciknoweval import DOMAINS

# Settings that change neither what a run trains on nor how. Those of the evaluation are checked in evaluation.json.
FREE = {"seed", "subset", "checkpoint_every", "log_samples", "micro_batch_tokens", "sampler", "engine_memory", "server_timeout",
        "eval_every", "eval_samples", "eval_temperature", "eval_top_p", "teacher_probe"}  # fmt: skip
PROBLEMS = ("data", "since", "until", "train_tests", "smoke")  # the settings that matter for the weights before training
NEEDED = ("model", "seed", "method", "feedback", "e_step_every", "prior")  # without them a run could enter the wrong row


class Row(NamedTuple):
    """A row of one of the paper's tables."""

    table: str
    task: str
    columns: tuple[str, ...]
    model: str
    label: str
    flags: str  # on top of the task's preset; base: the weights before training
    paper: tuple[str, ...]  # percent, in the order of the columns


ROWS = [Row(title, task, tuple(columns.split()), model, label, flags, tuple(numbers.split()))
        for heading, of_table in lines_of("paper.txt").items() for title, task, columns in [heading.split(" | ")]
        for model, label, flags, numbers in of_table]  # fmt: skip
settings = cache(lambda task, flags: settings_of(["--task", task, *flags.removeprefix("base").split()]))


def outside(row: Row, config: dict, result: dict) -> list[str]:
    """The reasons why a run with this config.json and this measurement does not enter a row."""
    wanted = settings(row.task, row.flags)
    unread = {"feedback"} if not wanted["teacher"] else set()  # no teacher, no feedback
    names = PROBLEMS if row.flags == "base" else sorted(wanted.keys() - FREE - unread)
    asked = {"split": "test", "n": wanted["eval_samples"], "temperature": wanted["eval_temperature"],
             "top_p": wanted["eval_top_p"], "max_tokens": wanted["max_response_tokens"]}  # fmt: skip
    differ = [f"{name}={config[name]}" for name in names if config.get(name, wanted[name]) != wanted[name]]
    return differ + [f"evaluated with {name}={result[name]}" for name in asked if result[name] != asked[name]]


def collect(runs: dict[str, tuple[dict, dict]]) -> tuple[dict, list[str]]:
    """runs: config.json and evaluation.json of each. Returns {(row, whether one model was trained on all domains): {column: {seed:
    avg@n}}}, and a note for each run whose last weights enter no row, with the differences from the nearest one. Raises ValueError
    with one line for other files."""
    found, notes = {}, []
    for name, (config, evaluation) in runs.items():
        try:
            model = config["model"].rstrip("/").split("/")[-1].lower()
            for when in ("before", "after"):
                result, reasons = evaluation[when], []  # for each row of this model
                task, subset = result["task"].split("/")
                seed = config["seed"] if when == "after" else result["seed"]  # all runs start from the same weights
                parts = {part: float(of["avg"]) for part, of in (result["parts"] or {subset: result}).items()}
                for row in ROWS:
                    if (row.task, row.model.lower(), row.flags == "base") != (task, model, when == "before"):
                        continue
                    reasons.append(outside(row, config, result))
                    for part, avg in parts.items() if not reasons[-1] else ():
                        seeds = found.setdefault((row, subset == "all"), {}).setdefault(part, {})
                        if seed not in seeds:
                            seeds[seed] = avg
                        elif when == "after":
                            reasons[-1] = [f"another run has these settings and seed {seed}"]
            other_method = f"method={config['method']}"
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{name} is not a run that `evaluate.py --run` has measured: {error!r}") from None
        nearest = min(reasons, key=lambda of: (other_method in of, len(of)), default=[f"the paper has no {task} with {model}"])
        if nearest:
            notes.append(f"{name}: not in the tables: {', '.join(nearest[:3])}{' ...' * (len(nearest) > 3)}")
    for columns in found.values():
        domains = [columns.get(domain, {}) for domain in DOMAINS]
        seeds = set.intersection(*map(set, domains))
        columns["average"] = {seed: float(np.mean([of_domain[seed] for of_domain in domains])) for seed in seeds}
    return found, notes


def percent(values: list[float]) -> str:
    """The mean in percent; with several seeds also half of the 95% t interval and their number. Empty without values."""
    mean, _, high = interval(values)
    several = f" ± {100 * (high - mean):.2f} ({len(values)})" if len(values) > 1 else ""
    return f"{100 * mean:.2f}{several}" if values else ""


def lines(found: dict) -> list[str]:
    """The tables with at least one measured row, as aligned text."""
    printed = []
    for title, rows in groupby(ROWS, key=lambda row: row.table):
        rows = [(row, together) for row in rows for together in (False, True)]
        if found.keys().isdisjoint(rows):
            continue
        columns = rows[0][0].columns
        grid = [["", *(text for column in columns for text in (column, "paper"))]]
        for row, together in rows:
            if (row, together) in found or not together:
                ours = [percent([*found.get((row, together), {}).get(column, {}).values()]) for column in columns]
                label = f"{row.model} {row.label}{', one model for all domains' * together}"
                grid.append([label, *sum(zip(ours, row.paper), ())])
        first, *others = [max(map(len, column)) for column in zip(*grid)]
        printed += [f"{title}, percent"]
        printed += ["  ".join([line[0].ljust(first), *map(str.rjust, line[1:], others)]).rstrip() for line in grid] + [""]
    return [*printed, "Several seeds: mean ± half of the 95% t interval over seeds (number of seeds)."] if printed else []


def main(argv: list[str] | None = None) -> None:
    parser = Parser("tables.py", "The paper's tables, with our numbers next to the paper's.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories that evaluate.py --run has measured")
    folders, runs = parser.parse_args(argv).runs, {}
    try:
        for folder in folders:
            runs[str(folder)] = config_of(folder, NEEDED), load(folder / "evaluation.json", {})
            if not runs[str(folder)][1]:
                raise ValueError(f"{folder} has no evaluation.json: run python evaluate.py --run {folder}")
        found, notes = collect(runs)
    except ValueError as error:
        parser.error(error)
    for note in notes:
        print(f"tables.py: {note}", file=sys.stderr)
    print("\n".join(lines(found)), end="\n" if found else "")


if __name__ == "__main__":
    run(main)
