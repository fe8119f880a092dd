"""The paper's tables: our numbers beside the paper's, in percent, from runs that `evaluate.py --run` has measured.

    python -m study.tables runs/*

A run is in a cell only if it was trained and evaluated with the settings of that cell: its task's preset, which has the
paper's settings, and what the row changes.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from harness.command import Parser, run
from harness.settings import NOT_OF_THE_RUN
from study.figures import load, read
from study.study import interval
from vpd import METHODS, PRESETS, Config

PAPER = load(Path(__file__).parent / "results" / "paper.json")  # task, model, row, part: percent
ALL = {
    "Base": "base", "GRPO": "grpo", "SDPO": "sdpo", "SDPO+RL (Adv Reshape)": "reshape",
    "SDPO+RL (Adv Reweight)": "reweight", "SDPO+RL (Joint Loss)": "joint", "VPD": "vpd",
}  # fmt: skip
TABLES = [  # title, task, models, rows: label and key in study/results/paper.json
    ("Table 1: LiveCodeBench v6, avg@4", "lcb", ["Qwen3-8B"], ALL),
    ("Table 2: SciKnowEval, feedback from siblings, avg@16", "sciknoweval",
     ["Qwen3-1.7B", "Qwen3-8B", "Olmo-3-7B-Instruct"], ALL),
    ("Table 3: SciKnowEval, feedback from self-critique, avg@16", "sciknoweval",
     ["Qwen3-1.7B", "Qwen3-8B"], {"SDPO": "sdpo+critique", "VPD": "vpd+critique"}),
    ("Table 4: SciKnowEval, an E-step on every F-th batch, avg@16", "sciknoweval",
     ["Qwen3-1.7B"], {"VPD (F5)": "vpd", "VPD (F1)": "vpd F=1", "VPD (F10)": "vpd F=10"}),
    ("Table 5: SciKnowEval, prior of the E-step, avg@16", "sciknoweval",
     ["Qwen3-1.7B"], {"Dynamic": "vpd", "Fixed": "vpd fixed prior"}),
    ("Table D.3: SciKnowEval, cold start, avg@16", "sciknoweval",
     ["Qwen3-4B-Base"], {"Base": "base", "GRPO": "grpo", "VPD": "vpd"}),
    ("Section 4.2: MATH-500, avg@4", "math", ["Qwen3-8B"], {"GRPO": "grpo"}),
]  # fmt: skip
DOMAINS = {"Bio.": "biology", "Chem.": "chemistry", "Mat.": "material", "Phys.": "physics"}
COLUMNS = {"lcb": {"v6": "v6"}, "sciknoweval": {**DOMAINS, "AVG": "average"}, "math": {"MATH-500": "math500"}}
CHANGED = {  # what a key changes of the preset; the other keys but base are methods
    "sdpo+critique": {"method": "sdpo", "feedback": "critique"}, "vpd+critique": {"feedback": "critique"},
    "vpd F=1": {"e_step_every": 1}, "vpd F=10": {"e_step_every": 10}, "vpd fixed prior": {"prior": "fixed"},
}  # fmt: skip
# Settings that change neither what a run trains on nor how; those of its evaluation are in evaluation.json.
FREE = {*NOT_OF_THE_RUN, "seed", "subset", "model", "checkpoint_every", "log_samples", "micro_batch_tokens", "sampler",
        "engine_memory", "server_timeout", "eval_every", "eval_samples", "eval_temperature", "eval_top_p", "teacher_probe"}  # fmt: skip
PROBLEMS = ("data", "since", "until", "train_tests", "smoke")  # the settings that matter to the weights before training


def match(config: dict, result: dict, when: str) -> tuple[tuple, list[str]]:
    """The row of a measurement of a run's weights, `when` "before" or "after" training: task, model, key in
    study/results/paper.json, and whether one model was trained on all domains. And what keeps it out of the row: the
    settings that differ from the nearest one's."""
    task, subset = result["task"].split("/")
    model = config["model"].rstrip("/").split("/")[-1].lower()
    if task not in PAPER:
        return (), [f"task={task}"]
    if not {"method", "feedback", "e_step_every", "prior"} <= config.keys():
        raise ValueError("config.json lacks a setting that tells the rows apart")
    preset, differ = asdict(Config()) | PRESETS[task] | {"task": task}, {}
    for key in ["base"] if when == "before" else [*list(ALL.values())[1:], *CHANGED]:
        wanted = preset | CHANGED.get(key, {} if key == "base" else {"method": key})
        wanted["teacher"] = METHODS[wanted["method"]].teacher
        if model.startswith("olmo"):
            wanted["lr"] = 5e-6  # Table D.2
        if key == "grpo":
            wanted.pop("feedback")  # it reads none
        names = sorted(PROBLEMS if key == "base" else wanted.keys() - FREE)
        differ[key] = [f"{name}={config[name]}" for name in names if config.get(name, wanted[name]) != wanted[name]]
    key = min(differ, key=lambda key: (f"method={config['method']}" in differ[key], len(differ[key])))
    asked = {"split": "test", "n": preset["eval_samples"], "temperature": preset["eval_temperature"],
             "top_p": preset["eval_top_p"], "max_tokens": preset["max_response_tokens"]}  # fmt: skip
    outside = differ[key] + [f"evaluated with {name}={result[name]}" for name in asked if result[name] != asked[name]]
    if key not in PAPER[task].get(model, {}):
        outside.append(f"the paper has no {key} of {model}")
    return (task, model, key, subset == "all"), outside


def collect(runs: list[tuple[str, dict, dict]]) -> tuple[dict, list[str]]:
    """runs: name, config.json and evaluation.json of each. Returns row -> column -> seed -> avg@n, and a note for each
    run that is in no table. Raises ValueError with one line for files that are something else."""
    found, notes = {}, []
    for run, config, evaluation in runs:
        outside = {}
        try:
            for when in ("before", "after"):
                result = evaluation[when]
                row, outside[when] = match(config, result, when)
                if outside[when]:
                    continue
                seed = config["seed"] if when == "after" else result["seed"]  # all runs start from the same weights
                for part, numbers in (result["parts"] or {result["task"].split("/")[1]: result}).items():
                    seeds = found.setdefault(row, {}).setdefault(part, {})
                    if when == "after" and seed in seeds:
                        outside[when] = [f"seed {seed} of these settings is there already"]
                    seeds.setdefault(seed, float(numbers["avg"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{run}: not a run and the evaluation of `evaluate.py --run`: {error!r}") from None
        if reasons := outside["after"]:
            more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
            trained = "" if outside["before"] else ", after training (its base model is in one)"
            notes.append(f"{run}: in no table{trained}: {', '.join(reasons[:3])}{more}")
    if notes:
        notes.append(f"{len(notes)} of {len(runs)} runs in no table")
    for columns in found.values():
        domains = [columns.get(domain, {}) for domain in DOMAINS.values()]
        seeds = set.intersection(*map(set, domains))
        columns["average"] = {seed: float(np.mean([of_domain[seed] for of_domain in domains])) for seed in seeds}
    return found, notes


def percent(values: list[float]) -> str:
    """Nothing for no value; the mean in percent, from two seeds on ± half the 95% t interval over seeds (how many)."""
    mean, _, high = interval(values)
    several = f" ± {100 * (high - mean):.2f} ({len(values)})" if len(values) > 1 else ""
    return f"{100 * mean:.2f}{several}" if values else ""


def lines(found: dict) -> list[str]:
    """The tables in which something was measured, as aligned text."""
    printed = []
    for title, task, models, rows in TABLES:
        columns = COLUMNS[task]
        wanted = [(task, model.lower(), key, together) for model in models for key in rows.values() for together in (0, 1)]
        if not any(found.get(row) for row in wanted):
            continue
        grid = [["", *(text for column in columns for text in (column, "paper"))]]
        for model in models:
            grid.append([model, *[""] * 2 * len(columns)])
            for label, key in rows.items():
                paper = PAPER[task][model.lower()][key]
                for together in (False, True):
                    cells = found.get((task, model.lower(), key, together), {})
                    pairs = [(percent(list(cells.get(c, {}).values())), f"{paper[c]:.2f}") for c in columns.values()]
                    if cells or not together:
                        grid.append([f"  {label}{', one model for all domains' * together}", *sum(pairs, ())])
        first, *others = [max(map(len, column)) for column in zip(*grid)]
        printed += ["", f"{title}, percent"]
        printed += ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]).rstrip() for row in grid]
    if printed:
        printed += ["", "Several seeds: mean ± half of the 95% t interval over seeds (number of seeds)."]
    return printed[1:]


def main(argv: list[str] | None = None) -> None:
    parser = Parser("tables.py", "The paper's tables, our numbers beside the paper's, from evaluated runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories that evaluate.py --run has measured")
    try:
        runs = parser.parse_args(argv).runs
        found, notes = collect([(str(run), *read(run, "config.json", "evaluation.json")) for run in runs])
    except ValueError as error:
        parser.error(error)
    for note in notes:
        print(f"tables.py: {note}", file=sys.stderr)
    print("\n".join(lines(found)), end="\n" if found else "")


if __name__ == "__main__":
    run(main)
