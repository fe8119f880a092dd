"""Curves of runs, and the paper's figures on the toy tasks.

    python -m study.figures runs/toy-vpd-seed1 runs/toy-vpd-seed2 runs/toy-grpo-seed1 --out curves.png
    python -m study.figures      study/results/study.json -> study/results/margin.png, progress.png, ...

Runs that differ only in their seed share a colour: the line is the mean over seeds, the band goes from the lowest
to the highest seed. The grey line is the pass rate of the base model. Steps count the rollout batches before a measurement.
"""

import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from harness.command import CannotWrite, Parser, check_out, run, write

# Okabe and Ito's palette with a line style each, for colour-blind readers and for print. A method looks the same in
# every figure; a curve without a look of its own takes a spare one.
STYLES = {
    "vpd": ("#0072B2", "-"), "sdpo": ("#D55E00", "--"), "grpo": ("#009E73", "-."), "joint": ("#CC79A7", ":"),
    "reshape": ("#E69F00", "-"), "reweight": ("#56B4E9", "--"), "distil": ("#000000", "-."), "ovd": ("#999999", ":"),
    "sdpo live": ("#882255", "--"), "vpd likelier": ("#332288", "-."),
}  # fmt: skip
SPARE = [(colour, dash) for dash in ((0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
         for colour in ("#000000", "#882255", "#E69F00", "#56B4E9", "#CC79A7")]  # fmt: skip
MEASURES = {  # key of a log row: title, kind of row, whether to smooth over neighbouring batches
    "avg": ("pass rate on validation problems", "eval", False),
    "teacher_avg": ("teacher's pass rate on fixed base failures", "eval", False),  # falls when reading collapses
    "reward": ("reward of the rollouts", "train", True),
    "margin": ("reward margin of the teacher", "train", True),
    "entropy": ("student's entropy, nats per token", "train", True),
    "divergence": ("each method's D(student, teacher)", "train", True),  # KL of one, JS of another
}
FIGURES = {  # file: panels of (subset, measure, variants)
    "margin": [("trace", "margin", ("vpd", "sdpo", "sdpo live"))],  # Fig. 1
    "progress": [(subset, "avg", ("vpd", "vpd likelier", "sdpo", "sdpo live", "grpo", "joint", "reshape", "reweight"))
                 for subset in ("trace", "code")],  # Fig. 2
    "long": [("trace-120", key, ("vpd likelier lr 1e-3", "vpd likelier", "vpd lr 1e-3", "vpd"))
             for key in ("avg", "teacher_avg", "entropy")],
    "dialect": [("trace-dialect", key, ("vpd likelier", "vpd F=1", "vpd F=5", "sdpo no E-step"))
                for key in ("avg", "teacher_avg", "margin")],
}  # fmt: skip


class Curve(NamedTuple):
    label: str
    look: tuple  # colour, line style
    base: str  # the model that the runs start from
    runs: list[dict[str, dict[int, float]]]  # {measure: {step: value}} of each seed


def load(path: Path, missing: dict | None = None):
    """The object of a JSON file, or `missing` where there is none; of a .jsonl file the objects of its lines. Raises
    ValueError with one line for what is none."""
    if missing is not None and not path.exists():
        return missing
    number, found, lines = 0, [], path.suffix == ".jsonl"
    try:
        text = path.read_text()
        for number, part in enumerate(text.splitlines() if lines else [text], 1):
            found.append(json.loads(part))
            if not isinstance(found[-1], dict):
                raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        where = f"{path}, line {number}" if lines and number else path
        cure = "; --resume of vpd.py mends a log that was cut" if lines else ""
        raise ValueError(f"{where} is no JSON object: {getattr(error, 'strerror', None) or error}{cure}") from None
    return found if lines else found[0]


def read(run: Path, *names: str) -> list:
    """These files of a run directory. Raises ValueError with one line for a folder without them."""
    if not run.is_dir():
        raise ValueError(f"{run} is no run directory: {'it is a file' if run.exists() else 'there is no such folder'}")
    if missing := [name for name in names if not (run / name).is_file()]:
        how = f"; python evaluate.py --run {run} makes it" if missing == ["evaluation.json"] else ""
        raise ValueError(f"{run} is no run directory: it has no {' and no '.join(missing)}{how}")
    return [load(run / name) for name in names]


# ---- Curves ------------------------------------------------------------------------------------------------


def smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """Centred moving average, at the ends over what is there."""
    half = width // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def plot(panels: list[tuple], curves: dict[str, Curve], size: tuple, dpi: int, kind: str = "png"):
    """panels: (what to put before the title, measure, names of curves). Returns the picture, what its legend says
    of each curve, and the curves that have no values."""
    down = len(panels) // 4 + 1
    figure, axes = plt.subplots(down, -(-len(panels) // down), figsize=size, layout="constrained", squeeze=False)
    shown, counts, empty, base_lines = {}, {}, [], []
    for axis, (before, measure, names) in zip(axes.flat, panels):
        title, _, smoothed = MEASURES[measure]
        bases: dict[str, list[float]] = {}
        for name in names:
            label, (colour, dash), base, runs = curves[name]
            found = [run[measure] for run in runs if run[measure]]
            # Only steps that every seed has: a mean over a changing set of seeds would jump.
            steps = sorted(set.intersection(*map(set, found))) if found else []
            if not steps:
                empty.append(f"no {measure} of {name}")
                continue
            values = np.array([[of_seed[step] for step in steps] for of_seed in found], float)  # (seeds, steps)
            values = np.array([smooth(v) for v in values]) if smoothed else values
            mark = None if smoothed else "o"  # evaluations are few
            (shown[label],) = axis.plot(steps, values.mean(0), color=colour, linestyle=dash, marker=mark, ms=3.5)
            axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.14, linewidth=0)
            counts.setdefault(label, {})[str(len(found))] = None  # more than one number where panels differ
            bases.setdefault(base, []).extend(of_seed[0] for of_seed in found if 0 in of_seed)
        if measure == "avg":
            base_lines += [axis.axhline(np.mean(of), color="#777777", linewidth=1) for of in bases.values() if of]
        axis.set_title(before + title, fontsize=10)
        axis.set_xlabel("rollout batches")
        axis.set_ylabel("mean of 5 batches" if smoothed else "")
        axis.grid(alpha=0.3)
        low, high = axis.get_ylim()  # with 0 on the axis noise does not look like a rise
        axis.set_ylim((0, 1) if measure in ("avg", "teacher_avg", "reward") else (min(0, low), max(0, 1.05 * high)))
    legend = [f"{label} ({' and '.join(seeds)} seed{'s' if [*seeds] != ['1'] else ''})" for label, seeds in counts.items()]
    if legend:
        lines, texts = [*shown.values(), *base_lines[:1]], [*legend, "base model"]
        figure.legend(lines, texts[: len(lines)], loc="outside lower center", ncols=min(3, len(lines)), handlelength=3.5)
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=dpi)
    plt.close(figure)
    return file.getvalue(), legend, empty


# ---- Runs --------------------------------------------------------------------------------------------------


def measured(run: Path) -> tuple[dict, dict[str, dict[int, float]]]:
    """config.json of a run, and {measure: {step: value}} of its log. Raises ValueError with one line where it is none."""
    config, rows = read(run, "config.json", "log.jsonl")
    if not isinstance(config.get("method"), str):
        raise ValueError(f"{run}/config.json is not the configuration of a run: it names no method")
    found: dict[str, dict[int, float]] = {measure: {} for measure in MEASURES}
    for number, row in enumerate(rows, 1):
        where = f"{run}/log.jsonl, line {number}"
        if "kind" not in row or not isinstance(row.get("step"), int):
            raise ValueError(f"{where} is no row of a run's log: it has no kind or no step")
        for measure, (_, kind, _) in MEASURES.items():
            if not isinstance(row.get(measure), (int, float, type(None))):
                raise ValueError(f"{where}: {measure} is no number")
            if row["kind"] == kind and row.get(measure) is not None:
                found[measure][row["step"]] = row[measure]
    if not any(found.values()):
        raise ValueError(f"{run}/log.jsonl has no batch and no evaluation yet: there is nothing to draw")
    return config, found


def label_of(config: dict, all_configs: list[dict]) -> str:
    """The method, and every other setting in which the runs of this figure differ (the seed aside)."""
    aside = {"seed", "out", "command", "commit", "method", "overwrite", "prompts_dropped"}
    same_method = [c for c in all_configs if c["method"] == config["method"]]
    differ = [k for k in config if k not in aside and len({json.dumps(c.get(k)) for c in same_method}) > 1]
    return " ".join([config["method"].upper(), *(f"{k}={config[k]}" for k in differ)])


def draw(folders: list[Path], out: Path) -> list[str]:
    """Draws pass rates, reward and margin to `out`; returns the labels with their number of seeds."""
    runs = [measured(folder) for folder in folders]
    curves, spare = {}, iter(SPARE * len(runs))
    for config, values in runs:
        name = label_of(config, [config for config, _ in runs])
        if name not in curves:
            curves[name] = Curve(name, STYLES.get(name.lower()) or next(spare), str(config.get("model")), [])
        curves[name].runs.append(values)
    there = [m for m in ("avg", "reward", "margin", "teacher_avg") if any(values[m] for _, values in runs)]
    panels, size = [("", measure, [*curves]) for measure in there], (13, 7.5 if len(there) > 3 else 4.2)
    picture, legend, _ = plot(panels, curves, size, 110, out.suffix[1:])
    write(out, picture)
    return legend


# ---- The paper's figures -----------------------------------------------------------------------------------


def study_curves(study: Path) -> dict[str, Curve]:
    """The rows of a study.json."""
    curves, rows = {}, load(study)["rows"]
    others = sorted({name.partition("/")[2] for name in rows} - STYLES.keys())
    looks = STYLES | dict(zip(others, SPARE * len(others)))
    for name, row in rows.items():
        subset, _, variant = name.partition("/")
        curves[name] = Curve(row["label"], looks[variant], subset, [])
        for run in row["runs"].values():
            series = {}
            for measure, (_, kind, _) in MEASURES.items():
                values = run[kind].get(measure.removesuffix("_avg")) or []  # null: the method has none
                steps = run[kind]["step"] if kind == "eval" else range(len(values))
                series[measure] = {step: value for step, value in zip(steps, values) if value is not None}
            curves[name].runs.append(series)
    return curves


def draw_study(study: Path, out: Path) -> tuple[list[str], list[str]]:
    """Draws FIGURES to PNGs in the folder `out`. Returns a line for each file, and a note for each row and figure that is
    left out."""
    curves, pictures, lines, notes = study_curves(study), {}, [], []
    for path, panels in ((out / f"{file}.png", panels) for file, panels in FIGURES.items()):
        wanted, missing = [], []
        for subset, measure, variants in panels:
            names = [f"{subset}/{variant}" for variant in variants]
            if any(name in curves for name in names):
                wanted.append((f"{subset}: ", measure, [name for name in names if name in curves]))
            missing += [f"no row {name}" for name in names if name not in curves]
        size = (13 if len(panels) > 2 else 9, 4.2)
        picture, legend, empty = plot(wanted, curves, size, 200) if wanted else (b"", [], [])
        if legend:
            pictures[path] = picture
            lines.append(f"{path}: {', '.join(legend)}")
        else:
            empty = [f"not drawn, {study} has none of its rows"]
        notes += [f"{path}: {note}" for note in dict.fromkeys(missing + empty)]
    out.mkdir(parents=True, exist_ok=True)
    for path, picture in pictures.items():
        write(path, picture)
    return lines, notes


def main(argv: list[str] | None = None) -> None:
    parser = Parser("figures.py", "Curves of runs, or the paper's figures on the toy tasks.")
    parser.add_argument("runs", nargs="*", type=Path, help="run directories; none: the paper's figures from --study")
    parser.add_argument("--out", type=Path, help="file of the curves, or folder of the figures")
    parser.add_argument("--study", type=Path, help="default study/results/study.json")
    args = parser.parse_args(argv)
    if args.study and args.runs:
        parser.error("--study goes without runs")
    try:
        if args.runs:
            out = args.out or Path("curves.png")
            if not out.suffix and not out.is_dir():
                out = out.with_name(f"{out.name}.png")  # as the library names it
            check_out(out)
            lines, notes = [f"{out}: {', '.join(draw(args.runs, out))}"], []
        elif args.out and args.out.exists() and not args.out.is_dir():
            parser.error(f"--out {args.out} is a file: the figures of a study go to a folder")
        else:
            lines, notes = draw_study(args.study or Path("study/results/study.json"), args.out or Path("study/results"))
    except CannotWrite:
        raise
    except (ValueError, OSError) as error:
        parser.error(error)
    for note in notes:
        print(f"figures.py: {note}", file=sys.stderr)
    print("\n".join(lines), end="\n" if lines else "")


if __name__ == "__main__":
    run(main)
