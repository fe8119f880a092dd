"""Curves of runs, the paper's figures on the toy tasks, and the paper's tables from evaluated runs.

    python figures.py runs/toy-vpd-seed1 runs/toy-vpd-seed2 runs/toy-grpo-seed1 --out curves.png
    python figures.py                            study/results/study.json -> study/results/margin.png, progress.png, cold.png, ...
    python figures.py --tables runs/*            our figure beside the paper's, for runs that evaluate.py has measured

Runs that differ only in their seed share a colour: the line is the mean over seeds, the band runs from the lowest to
the highest seed. Steps count rollout batches that were trained on before the measurement. What is in a table, and what
is not, is said in tables.py.
"""

import io
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from harness.command import CannotWrite, Parser, check_out, run, write

# Okabe and Ito's palette with a line style each: told apart by colour-blind readers and in print. A method looks the
# same in every figure; a curve that has no look of its own takes a spare one.
STYLES = {
    "vpd": ("#0072B2", "-"), "sdpo": ("#D55E00", "--"), "grpo": ("#009E73", "-."), "joint": ("#CC79A7", ":"),
    "reshape": ("#E69F00", "-"), "reweight": ("#56B4E9", "--"), "distil": ("#000000", "-."), "ovd": ("#999999", ":"),
    "vpd fixed prior": ("#882255", "--"),
}  # fmt: skip
SPARE = [(colour, dash) for dash in ((0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
         for colour in ("#000000", "#882255", "#E69F00", "#56B4E9", "#CC79A7")]  # fmt: skip
MEASURES = {  # title, kind of log row, whether to smooth over neighbouring batches
    "avg": ("pass rate on validation problems", "eval", False),
    "teacher": ("teacher's pass rate on fixed base failures", "eval", False),
    "reward": ("reward of the rollouts", "train", True),
    "margin": ("reward margin of the teacher", "train", True),
    "entropy": ("student's entropy, nats a token", "train", True),
    "divergence": ("each method's D(student, teacher)", "train", True),  # KL of one, JS of another
}
EVERY = ("vpd", "sdpo", "grpo", "joint", "reshape", "reweight", "distil", "ovd")
LATER = ("distil", "ovd")  # drawn where there are runs of them, and not missed elsewhere
FIGURES = {  # file: panels of (subset, measure, variants); "*" is every further row of the subset
    "margin": [("trace", "margin", ("vpd", "sdpo"))],  # Fig. 1
    "progress": [("code", "avg", EVERY), ("trace", "avg", ("vpd", "sdpo", "grpo", *LATER))],  # Fig. 2
    "cold": [("trace-cold", "avg", ("vpd", "sdpo", "grpo"))],  # Fig. 3
    "prior": [("trace", key, ("vpd", "vpd fixed prior")) for key in ("avg", "margin")],  # Fig. 5
    "long": [("trace-long", key, ("vpd", "sdpo", "grpo", "*"))
                 for key in ("avg", "teacher", "entropy", "divergence")],
}  # fmt: skip


def load(path: Path) -> dict:
    """Raises ValueError with one line for a file that cannot be read or holds no JSON object."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


# ---- Curves ------------------------------------------------------------------------------------------------


def series(rows: list[dict], kind: str, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in rows if row["kind"] == kind and row.get(key) is not None}


def smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """Centred moving average; at the ends over what is there."""
    half = width // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def plot(panels: list[tuple], logs: dict[str, list[list[dict]]], labels: dict[str, str], looks: dict[str, tuple], size):
    """panels: (what stands before the title, measure, names); logs: for each name the log rows of each seed. Returns
    the figure, what its legend says, and the curves that have no values."""
    down = len(panels) // 4 + 1
    figure, axes = plt.subplots(down, -(-len(panels) // down), figsize=size, layout="constrained", squeeze=False)
    lines, counts, empty = {}, {}, []
    for axis, (before, measure, names) in zip(axes.flat, panels):
        title, kind, smoothed = MEASURES[measure]
        for name in names:
            found = [s for s in (series(rows, kind, measure) for rows in logs[name]) if s]
            # Only steps that every seed has: a mean over a changing set of seeds would jump.
            steps = sorted(set.intersection(*map(set, found))) if found else []
            if not steps:
                empty.append(f"no {measure} of {name}")
                continue
            values = np.array([[s[step] for step in steps] for s in found], float)  # (seeds, steps)
            values = np.array([smooth(v) for v in values]) if smoothed else values
            colour, dash = looks[name]
            mark = None if smoothed else "o"  # evaluations are few
            (lines[labels[name]],) = axis.plot(
                steps, values.mean(0), linestyle=dash, color=colour, marker=mark, markersize=3.5
            )
            axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.14, linewidth=0)
            counts.setdefault(labels[name], []).append(len(found))
        axis.set_title(before + title, fontsize=10)
        axis.set_xlabel("rollout batches")
        axis.set_ylabel("mean of 5 batches" if smoothed else "")
        axis.grid(alpha=0.3)
        if measure in ("avg", "teacher", "reward"):
            axis.set_ylim(0, 1)
    legend = []
    for text, seeds in counts.items():
        seeds = list(dict.fromkeys(seeds))  # more than one number where panels differ
        legend.append(f"{text} ({' and '.join(map(str, seeds))} seed{'s' if seeds != [1] else ''})")
    if legend:
        figure.legend(lines.values(), legend, loc="outside lower center", ncols=min(3, len(legend)), handlelength=3.5)
    return figure, legend, empty


# ---- Runs --------------------------------------------------------------------------------------------------


def expect(run: Path, *names: str) -> None:
    """Raises ValueError with one line for a folder without these files of a run."""
    if not run.is_dir():
        raise ValueError(f"{run} is no run directory: {'it is a file' if run.exists() else 'there is no such folder'}")
    if missing := [name for name in names if not (run / name).is_file()]:
        how = f"; python evaluate.py --run {run} makes it" if missing == ["evaluation.json"] else ""
        raise ValueError(f"{run} is no run directory: it has no {' and no '.join(missing)}{how}")


def read(run: Path) -> tuple[dict, list[dict]]:
    """config.json and the rows of log.jsonl. Raises ValueError with one line when the folder is no run directory."""
    expect(run, "config.json", "log.jsonl")
    config, rows, path = load(run / "config.json"), [], run / "log.jsonl"
    if not isinstance(config.get("method"), str):
        raise ValueError(f"{run}/config.json is not the configuration of a run: it names no method")
    try:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            rows.append(json.loads(line))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is cut or no JSON ({error}): --resume of vpd.py mends a log") from None
    numeric = lambda value: value is None or isinstance(value, (int, float))  # noqa: E731
    for place, row in enumerate(rows, 1):
        if not isinstance(row, dict) or "kind" not in row or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}, line {place} is no row of a run's log: it has no kind or no step")
        if wrong := [key for key in MEASURES if not numeric(row.get(key))]:
            raise ValueError(f"{path}, line {place}: {wrong[0]} is no number")
    if not any(row["kind"] in ("train", "eval") for row in rows):
        raise ValueError(f"{path} has no batch and no evaluation yet: there is nothing to draw")
    return config, rows


def label(config: dict, all_configs: list[dict]) -> str:
    """The method, and every other setting in which the runs of this figure differ (the seed aside)."""
    aside = {"seed", "out", "command", "commit", "method", "overwrite", "prompts_dropped"}
    same_method = [c for c in all_configs if c["method"] == config["method"]]
    differ = [k for k in config if k not in aside and len({json.dumps(c.get(k)) for c in same_method}) > 1]
    return " ".join([config["method"].upper(), *(f"{k}={config[k]}" for k in differ)])


def draw(runs: list[Path], out: Path) -> list[str]:
    """Draws pass rate, reward and margin to `out`; returns the labels with their number of seeds."""
    read_runs = [read(run) for run in runs]
    configs = [config for config, _ in read_runs]
    logs: dict[str, list[list[dict]]] = {}
    for config, rows in read_runs:
        logs.setdefault(label(config, configs), []).append(rows)
    spare = iter(SPARE * len(logs))
    looks = {name: STYLES.get(name.lower()) or next(spare) for name in logs}
    panels = [("", measure, list(logs)) for measure in ("avg", "reward", "margin")]
    figure, legend, _ = plot(panels, logs, {name: name for name in logs}, looks, (13, 4.2))
    picture = io.BytesIO()
    figure.savefig(picture, format=out.suffix[1:], dpi=110)
    plt.close(figure)
    write(out, picture.getvalue())
    return legend


# ---- The paper's figures -----------------------------------------------------------------------------------


def study_logs(study: Path) -> tuple[dict[str, list[list[dict]]], dict[str, str]]:
    """For each row of a study the log rows of each seed, and its label. Raises ValueError with one line for what is no
    study."""
    logs, labels, rows = {}, {}, load(study).get("rows")
    if not isinstance(rows, dict):
        raise ValueError(f'{study} has no "rows"')
    for name, row in rows.items():
        try:
            labels[name], logs[name] = str(row["label"]), []
            for run in row["runs"].values():
                logs[name].append([])
                for key, (_, kind, _) in MEASURES.items():
                    values = run[kind].get(key) or []  # null: the method has none
                    steps = run[kind]["step"] if kind == "eval" and values else range(len(values))
                    for step, value in zip(steps, values, strict=True):
                        value = None if value is None else float(value)
                        logs[name][-1].append({"kind": kind, "step": step, key: value})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{study}: row {name!r} is not that of a study: {error!r}") from None
    return logs, labels


def draw_study(study: Path, out: Path) -> tuple[list[str], list[str]]:
    """Draws FIGURES to PNGs in the folder `out`, nothing if the study is faulty. Returns a line for each file, and a
    note for each row and figure that is left out."""
    logs, labels = study_logs(study)
    others = sorted({name.split("/", 1)[-1] for name in logs} - STYLES.keys())
    looks = STYLES | dict(zip(others, SPARE * len(others)))
    pictures, lines, notes = {}, [], []
    for file, panels in FIGURES.items():
        wanted, missing = [], []
        for subset, measure, variants in panels:
            names = [f"{subset}/{variant}" for variant in variants if variant != "*"]
            names += [name for name in logs if "*" in variants and name.startswith(subset + "/") and name not in names]
            wanted.append((f"{subset}: ", measure, [name for name in names if name in logs]))
            missing += [f"no row {n}" for n in names if n not in logs and not n.endswith(LATER)]
        by_name = {name: looks[name.split("/", 1)[-1]] for name in logs}
        figure, legend, empty = plot(wanted, logs, labels, by_name, (9, 6.8 if len(panels) > 2 else 4.2))
        notes += [f"{out / file}.png: {note}" for note in dict.fromkeys(missing + empty)]
        if legend:
            lines.append(f"{out / file}.png: {', '.join(legend)}")
            pictures[file] = io.BytesIO()
            figure.savefig(pictures[file], dpi=200)
        else:
            notes.append(f"{out / file}.png: not drawn, {study} has none of its rows")
        plt.close(figure)
    out.mkdir(parents=True, exist_ok=True)
    for file, picture in pictures.items():
        write(out / f"{file}.png", picture.getvalue())
    return lines, notes


def main(argv: list[str] | None = None) -> None:
    parser = Parser("figures.py", "Curves of runs, the paper's figures, or the paper's tables.")
    parser.add_argument("runs", nargs="*", type=Path, help="run directories; none: the paper's figures from --study")
    parser.add_argument("--out", type=Path, help="file of the curves (curves.png), or folder of the figures (results)")
    parser.add_argument("--study", type=Path, help="default study/results/study.json")
    parser.add_argument("--tables", action="store_true", help="print the paper's tables from evaluated runs")
    args = parser.parse_args(argv)
    if args.study and (args.runs or args.tables):
        parser.error("--study goes without runs and --tables")
    if args.tables and (not args.runs or args.out):
        parser.error("--tables needs runs, and prints: it goes without --out")
    try:
        if args.tables:
            from study import tables  # and with it torch, which figures do without

            for run in args.runs:
                expect(run, "config.json", "evaluation.json")
            read_runs = [(str(run), load(run / "config.json"), load(run / "evaluation.json")) for run in args.runs]
            found, notes = tables.collect(read_runs)
            lines = tables.lines(found)
        elif args.runs:
            out = args.out or Path("curves.png")
            if not out.suffix and not out.is_dir():
                out = out.with_name(f"{out.name}.png")  # as the library names it
            check_out(out)
            lines, notes = [f"{out}: {', '.join(draw(args.runs, out))}"], []
        else:
            if args.out and args.out.exists() and not args.out.is_dir():
                parser.error(f"--out {args.out} is a file: the figures of a study go to a folder")
            lines, notes = draw_study(args.study or Path("study/results/study.json"), args.out or Path("study/results"))
    except CannotWrite:
        raise
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for note in notes:
        print(f"figures.py: {note}", file=sys.stderr)
    if lines:
        print("\n".join(lines))


if __name__ == "__main__":
    run(main)
