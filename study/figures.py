"""Curves of runs, and the paper's figures on the toy tasks.

    python -m study.figures runs/toy-vpd-seed1 runs/toy-vpd-seed2 runs/toy-grpo-seed1 --out curves.png
    python -m study.figures      study/results/study.json -> study/results/margin.png, progress.png, ...

Runs that differ only in their seed share a colour: the line is the mean over seeds, and the band spans the lowest to the highest
seed, at steps where every seed has a value. The grey line is the pass rate of the base model. Steps count rollout batches.
"""

import io
import json
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from harness.command import Parser, check_out, run, write
from harness.runs import config_of
from tasks.base import json_rows

# Okabe and Ito's palette with a line style each, for colour-blind readers and for print. A method looks the same in every figure;
# other curves take a spare look.
STYLES = {
    "vpd": ("#0072B2", "-"), "sdpo": ("#D55E00", "--"), "grpo": ("#009E73", "-."), "joint": ("#CC79A7", ":"),
    "reshape": ("#E69F00", "-"), "reweight": ("#56B4E9", "--"), "distil": ("#000000", "-."), "ovd": ("#999999", ":"),
    "sdpo live": ("#882255", "--"), "vpd likelier": ("#332288", "-."),
}  # fmt: skip
SPARE = [(colour, dash) for dash in ((0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
         for colour in ("#000000", "#882255", "#E69F00", "#56B4E9", "#CC79A7")]  # fmt: skip
SERIES = {  # what study.json keeps of a log, {kind of row: {name: key in the row}}
    "eval": {"step": "step", "avg": "avg", "teacher": "teacher_avg"},
    "train": {key: key for key in ("reward", "margin", "entropy", "divergence", "with_context", "response_length", "shift")},
}
MEASURES = {  # series: title, kind of row; those of training are smoothed over neighbouring batches
    "avg": ("pass rate on validation problems", "eval"),
    "teacher": ("teacher's pass rate on fixed base failures", "eval"),  # falls when reading collapses
    "reward": ("reward of the rollouts", "train"),
    "margin": ("reward margin of the teacher", "train"),
    "entropy": ("student's entropy, nats per token", "train"),
    "divergence": ("each method's D(student, teacher)", "train"),  # KL of one, JS of another
}
ASIDE = set("seed method out resume overwrite track command commit device torch processes task_name model_files prompts_dropped"
            .split())  # in a config.json, but no part of a label  # fmt: skip
FIGURES = {  # file: panels of (subset, measure, variants)
    "margin": [("trace", "margin", ("vpd", "sdpo", "sdpo live"))],  # Fig. 1
    "progress": [(subset, "avg", ("vpd", "vpd likelier", "sdpo", "sdpo live", "grpo", "joint", "reshape", "reweight"))
                 for subset in ("trace", "code")],  # Fig. 2
    "long": [("trace-120", key, ("vpd likelier lr 1e-3", "vpd likelier", "vpd lr 1e-3", "vpd"))
             for key in ("avg", "teacher", "entropy")],
    "dialect": [("trace-dialect", key, ("vpd likelier", "vpd F=1", "vpd F=2", "vpd F=5", "sdpo no E-step"))
                for key in ("avg", "teacher", "margin")],
}  # fmt: skip


# ---- What is drawn -----------------------------------------------------------------------------------------


def load(path: Path, missing: dict | None = None) -> dict:
    """The object in a JSON file, or `missing` if there is no file. Raises ValueError with one line for anything else."""
    if missing is not None and not path.exists():
        return missing
    try:
        if isinstance(found := json.loads(path.read_text()), dict):
            return found
        reason = f"it is a {type(found).__name__}"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
    raise ValueError(f"{path} is not a JSON object: {reason}")


def rows_of(path: Path, missing: dict | None = None) -> dict:
    """The rows of a study.json."""
    rows = load(path, missing).get("rows")
    if not isinstance(rows, dict):
        raise ValueError(f"{path} has no rows: it is not a study.json")
    return rows


def series(rows: list[dict]) -> dict[str, dict[str, list]]:
    """The rows of a log.jsonl in the form of study.json: {"eval": {"step": [...], "avg": [...]}, "train": {"reward": [...]}}, None
    where a row has no value. Batches are numbered from 0, and each has a row."""
    return {kind: {name: [row.get(key) for row in rows if row.get("kind") == kind] for name, key in keys.items()}
            for kind, keys in SERIES.items()}  # fmt: skip


def values(run: dict, measure: str) -> dict[int, float]:
    """{step: value} of a run in the form of `series`, without steps that have no value."""
    kind = MEASURES[measure][1]
    found = run[kind].get(measure) or []  # null: the method has none
    steps = run[kind]["step"] if kind == "eval" else range(len(found))
    return {step: value for step, value in zip(steps, found) if value is not None}


def label_of(config: dict, all_configs: list[dict]) -> str:
    """The method, and every other setting in which this figure's runs of the method differ, except for the seed."""
    same_method = [c for c in all_configs if c["method"] == config["method"]]
    differ = [k for k in config if k not in ASIDE and len({json.dumps(c.get(k)) for c in same_method}) > 1]
    return " ".join([config["method"].upper(), *(f"{k}={config[k]}" for k in differ)])


# Curves: {(base model, variant): (label, runs in the form of `series`, one for each seed)}. A variant looks the same whatever its
# base model.


def of_runs(folders: list[Path]) -> dict:
    """The curves of run directories. Raises ValueError with one line for a folder that is not a run."""
    curves, configs = {}, [config_of(folder, ("method",)) for folder in folders]
    for folder, config in zip(folders, configs):
        run, label = series([*json_rows(folder / "log.jsonl")]), label_of(config, configs)
        if not any(values(run, measure) for measure in MEASURES):
            raise ValueError(f"{folder}/log.jsonl has no batch and no evaluation yet: there is nothing to draw")
        curves.setdefault((str(config.get("model")), label), (label, []))[1].append(run)
    return curves


def of_study(path: Path) -> dict:
    """The curves of a study.json's rows."""
    curves = {}
    for name, row in rows_of(path).items():
        evals = [run["eval"] for run in row["runs"].values()]
        end = max(of_run["step"][-1] for of_run in evals)
        for of_run in evals:  # a run that ended early, because no update was left to make, stays where it ended
            if of_run["step"][-1] < end:
                of_run.update({key: [*of_run[key], end if key == "step" else of_run[key][-1]] for key in of_run})
        subset, _, variant = name.partition("/")
        curves[subset, variant] = row["label"], [*row["runs"].values()]
    return curves


# ---- Drawing -----------------------------------------------------------------------------------------------


def smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """Centred moving average, over fewer values at the ends."""
    half = width // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def draw(panels: list[tuple[str, str, dict]], looks: dict[str, tuple], **how) -> tuple[bytes, list[str]]:
    """panels: (start of the title, measure, curves); panels without a value are left out. looks: colour and line style of each
    variant. how: format and resolution. Returns the picture (empty if there is no curve) and its legend."""
    width = 13 if len(panels) > 2 else 9  # inches
    panels = [panel for panel in panels if any(values(run, panel[1]) for _, runs in panel[2].values() for run in runs)]
    down = len(panels) // 4 + 1
    figure = Figure((width, 7.5 if down > 1 else 4.2), layout="constrained")
    axes = figure.subplots(down, max(1, -(-len(panels) // down)), squeeze=False)
    shown, counts, base_lines = {}, {}, []
    for axis, (before, measure, curves) in zip(axes.flat, panels):
        title, kind = MEASURES[measure]
        bases: dict[str, list[float]] = {}
        for (base, variant), (label, runs) in curves.items():
            found = [of_seed for run in runs if (of_seed := values(run, measure))]
            # A mean over a changing set of seeds would jump.
            steps = sorted(set.intersection(*map(set, found))) if found else []
            if not steps:
                continue
            lines = np.array([[of_seed[step] for step in steps] for of_seed in found], float)  # (seeds, steps)
            lines = np.array([smooth(line) for line in lines]) if kind == "train" else lines
            (colour, dash), mark = looks[variant], "o" if kind == "eval" else None  # evaluations are few
            (shown[label],) = axis.plot(steps, lines.mean(0), color=colour, linestyle=dash, marker=mark, ms=3.5)
            axis.fill_between(steps, lines.min(0), lines.max(0), color=colour, alpha=0.14, linewidth=0)
            counts.setdefault(label, {})[str(len(found))] = None  # more than one number where panels differ
            bases.setdefault(base, []).extend(of_seed[0] for of_seed in found if 0 in of_seed)
        if measure == "avg":
            base_lines += [axis.axhline(np.mean(of), color="#777777", linewidth=1) for of in bases.values() if of]
        axis.set_title(before + title, fontsize=10)
        axis.set_xlabel("rollout batches")
        axis.set_ylabel("mean of 5 batches" if kind == "train" else "")
        axis.grid(alpha=0.3)
        low, high = axis.get_ylim()  # with 0 on the axis noise does not look like a rise
        axis.set_ylim((0, 1) if measure in ("avg", "teacher", "reward") else (min(0, low), max(0, 1.05 * high)))
    legend = [f"{label} ({' and '.join(seeds)} seed{'s' if [*seeds] != ['1'] else ''})" for label, seeds in counts.items()]
    picture = io.BytesIO()
    if legend:
        lines, texts = [*shown.values(), *base_lines[:1]], [*legend, "base model"]
        size = "medium" if width > 9 else "small"
        figure.legend(lines, texts[: len(lines)], loc="outside lower center", ncols=3, handlelength=3.5, fontsize=size)
        figure.savefig(picture, **how)
    return picture.getvalue(), legend


def main(argv: list[str] | None = None) -> None:
    parser = Parser("figures.py", "Curves of runs, or the paper's figures on the toy tasks.")
    parser.add_argument("runs", nargs="*", type=Path, help="run directories (none: the paper's figures, from --study)")
    parser.add_argument("--out", type=Path, help="file for the curves, or folder for the figures")
    parser.add_argument("--study", type=Path, help="default study/results/study.json")
    args = parser.parse_args(argv)
    if args.study and args.runs:
        parser.error("give --study or runs, not both")
    try:
        if args.runs:
            out, curves = args.out or Path("curves.png"), of_runs(args.runs)
            check_out(out)
            figures = {out: [("", measure, curves) for measure in ("avg", "reward", "margin", "teacher")]}
        else:
            out, curves = args.out or Path("study/results"), of_study(args.study or Path("study/results/study.json"))
            out.mkdir(parents=True, exist_ok=True)
            chosen = lambda subset, variants: {key: curves[key] for v in variants if (key := (subset, v)) in curves}  # noqa: E731
            figures = {out / f"{file}.png": [(f"{subset}: ", measure, chosen(subset, of)) for subset, measure, of in panels]
                       for file, panels in FIGURES.items()}  # fmt: skip
        spare = cycle(SPARE)
        looks = {variant: STYLES.get(variant.lower()) or next(spare) for variant in sorted({variant for _, variant in curves})}
        dpi = 110 if args.runs else 200
        pictures = {path: draw(panels, looks, format=path.suffix[1:], dpi=dpi) for path, panels in figures.items()}
    except (ValueError, OSError) as error:
        parser.error(error)
    for path, (picture, legend) in pictures.items():
        if picture:
            write(path, picture)
        print(f"{path}: {', '.join(legend) or 'not drawn: none of its rows has runs'}")


if __name__ == "__main__":
    run(main)
