"""The paper's tables, our figures beside the paper's, in percent, from runs that `evaluate.py --run` has measured.

A run stands in a cell only if it was trained and evaluated with the settings of that cell: those of its task's preset
in settings.py, which are the paper's, and what the row changes. Started by `python figures.py --tables RUN RUN ...`.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from scipy import stats

from harness.settings import METHODS, NOT_OF_THE_RUN, PRESETS, Config

PAPER = json.loads((Path(__file__).parent / "results" / "paper.json").read_text())  # task, model, row, part: percent
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
]  # fmt: skip
DOMAINS = {"Bio.": "biology", "Chem.": "chemistry", "Mat.": "material", "Phys.": "physics"}
COLUMNS = {"lcb": {"v6": "v6"}, "sciknoweval": {**DOMAINS, "AVG": "average"}}
CHANGED = {  # what a key changes of the preset; the other keys but base are methods
    "sdpo+critique": {"method": "sdpo", "feedback": "critique"}, "vpd+critique": {"feedback": "critique"},
    "vpd F=1": {"e_step_every": 1}, "vpd F=10": {"e_step_every": 10}, "vpd fixed prior": {"prior": "fixed"},
}  # fmt: skip
# Settings that change neither what a run trains on nor how; those of its evaluation stand in evaluation.json.
FREE = {*NOT_OF_THE_RUN, "seed", "subset", "model", "checkpoint_every", "log_samples", "micro_batch_tokens", "sampler",
        "engine_memory", "server_timeout", "eval_every", "eval_samples", "eval_temperature", "eval_top_p", "teacher_probe"}  # fmt: skip
PROBLEMS = ("data", "since", "until", "train_tests", "smoke")  # the settings that matter to the weights before training


def match(config: dict, result: dict, when: str) -> tuple[tuple, list[str]]:
    """The row of a measurement of a run's weights, `when` "before" or "after" training: task, model, key in
    study/results/paper.json, and whether one model was trained on all domains. And what keeps it out of the row: the settings
    that differ from the nearest one's."""
    task, subset = result["task"].split("/")
    model = config["model"].rstrip("/").split("/")[-1].lower()
    if task not in PAPER:
        return (), [f"task={task}"]
    if not {"method", "feedback", "e_step_every", "prior"} <= config.keys():
        raise ValueError("config.json lacks a setting that tells the rows apart")
    preset = asdict(Config()) | PRESETS[task] | {"task": task}
    differ = {}
    for key in ["base"] if when == "before" else [*METHODS, *CHANGED]:
        wanted = preset | CHANGED.get(key, {} if key == "base" else {"method": key})
        wanted["teacher"] = METHODS[wanted["method"]].teacher
        if model.startswith("olmo"):
            wanted["lr"] = 5e-6  # Table D.2
        if key == "grpo":
            wanted.pop("feedback")  # it reads none
        names = PROBLEMS if key == "base" else wanted.keys() - FREE
        differ[key] = [
            f"{name}={config[name]}" for name in sorted(names) if config.get(name, wanted[name]) != wanted[name]
        ]
    key = min(differ, key=lambda key: len(differ[key]))
    asked = {"split": "test", "n": preset["eval_samples"], "temperature": preset["eval_temperature"],
             "top_p": preset["eval_top_p"], "max_tokens": preset["max_response_tokens"]}  # fmt: skip
    outside = differ[key] + [f"evaluated with {name}={result[name]}" for name in asked if result[name] != asked[name]]
    return (task, model, key, subset == "all"), outside


def beside(config: dict, result: dict, when: str) -> dict[str, float]:
    """The paper's avg@n in percent for a measurement as in `match`, by part of the benchmark, "" the whole of it; {} where the
    paper has none with these settings."""
    row, outside = match(config, result, when)
    if outside:
        return {}
    task, model, key, _ = row
    found, subset = PAPER[task].get(model, {}).get(key, {}), result["task"].split("/")[1]
    return {"": found[subset]} if subset in found else found


def collect(runs: list[tuple[str, dict, dict]]) -> tuple[dict, list[str]]:
    """runs: name, config.json and evaluation.json of each. Returns row -> column -> seed -> avg@n, and a note for each
    run that is in no table. Raises ValueError with one line for files that are something else."""
    found: dict[tuple, dict[str, dict[int, float]]] = {}
    notes, rows = [], {(t, m.lower(), k) for _, t, models, rows in TABLES for m in models for k in rows.values()}
    for run, config, evaluation in runs:
        outside = {}
        try:
            for when, result in (("before", evaluation["before"]), ("after", evaluation["after"])):
                row, outside[when] = match(config, result, when)
                if row and row[0] not in COLUMNS:
                    outside[when] = [f"task={row[0]}"]
                elif row and row[:3] not in rows:
                    outside[when].append(f"no table has {row[2]} of {row[1]}")
                subset = result["task"].split("/")[1]
                whole = {subset: result}  # one domain, or all of LiveCodeBench
                seed = config["seed"] if when == "after" else result["seed"]  # all runs start from the same weights
                for part, figures in {} if outside[when] else (result["parts"] if subset == "all" else whole).items():
                    seeds = found.setdefault(row, {}).setdefault(part, {})
                    if when == "after" and seed in seeds:
                        outside[when] = [f"seed {seed} of these settings is there already"]
                    seeds.setdefault(seed, float(figures["avg"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{run}: not a run and the evaluation of `evaluate.py --run`: {error!r}") from None
        if outside["after"]:
            more = f" and {len(outside['after']) - 3} more" if len(outside["after"]) > 3 else ""
            trained = "" if outside["before"] else ", after training (its base model is in one)"
            notes.append(f"{run}: in no table{trained}: {', '.join(outside['after'][:3])}{more}")
    if notes:
        notes.append(f"{len(notes)} of {len(runs)} runs in no table")
    for columns in found.values():
        domains = [columns.get(domain, {}) for domain in DOMAINS.values()]
        seeds = [seed for seed in domains[0] if all(seed in of_domain for of_domain in domains)]
        columns["average"] = {seed: float(np.mean([of_domain[seed] for of_domain in domains])) for seed in seeds}
    return found, notes


def percent(values: list[float]) -> str:
    """Nothing for no value; the mean in percent, from two seeds on ± half the 95% t interval over seeds (how many)."""
    if len(values) < 2:
        return "".join(f"{100 * value:.2f}" for value in values)
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{100 * np.mean(values):.2f} ± {100 * half:.2f} ({len(values)})"


def lines(found: dict) -> list[str]:
    """The tables in which something was measured, as aligned text."""
    printed = []
    for title, task, models, rows in TABLES:
        grid, measured = [["", *(text for column in COLUMNS[task] for text in (column, "paper"))]], False
        for model in models:
            grid.append([model, *[""] * 2 * len(COLUMNS[task])])
            for label, key in rows.items():
                for together in (False, True):
                    cells = found.get((task, model.lower(), key, together), {})
                    if together and not cells:
                        continue
                    measured |= bool(cells)
                    grid.append([f"  {label}{', one model for all domains' * together}"])
                    for column in COLUMNS[task].values():
                        paper = PAPER[task][model.lower()][key][column]
                        grid[-1] += [percent(list(cells.get(column, {}).values())), f"{paper:.2f}"]
        if measured:
            first, *others = [max(map(len, column)) for column in zip(*grid)]
            printed += ["", f"{title}, percent"]
            printed += ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]).rstrip() for row in grid]
    if printed:
        printed += ["", "Several seeds: mean ± half of the 95% t interval over seeds (number of seeds)."]
    return printed[1:]
