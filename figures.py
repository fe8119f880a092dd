"""Learning curves and reward margin from run directories.

    python figures.py runs/toy-vpd-seed1 runs/toy-vpd-seed2 runs/toy-grpo-seed1 --out curves.png

Runs that differ only in their seed share a colour: the line is the mean over seeds, the band runs from the lowest to the
highest seed. Steps count rollout batches that were trained on before the measurement.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

# Okabe and Ito's palette and a line style each: told apart by colour-blind readers and in print.
STYLES = list(
    zip(
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
        ("-", "--", "-.", ":", "-", "--", "-."),
    )
)
PANELS = (  # title, kind of log row, key, whether to smooth over neighbouring steps
    ("pass rate on validation problems", "eval", "avg", False),
    ("reward of the rollouts", "train", "reward", True),
    ("reward margin of the teacher (Fig. 1)", "train", "margin", True),
)


def read(run: Path) -> tuple[dict, list[dict]]:
    """config.json and the rows of log.jsonl. Raises ValueError when the folder is no run directory."""
    try:
        config = json.loads((run / "config.json").read_text())
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{run} is no run directory: {error}") from None
    return config, rows


def label(config: dict, all_configs: list[dict]) -> str:
    """The method, and every other setting in which the runs of this figure differ (the seed aside)."""
    aside = {"seed", "out", "command", "commit", "method", "overwrite", "prompts_dropped"}
    same_method = [c for c in all_configs if c["method"] == config["method"]]
    differ = [k for k in config if k not in aside and len({json.dumps(c.get(k)) for c in same_method}) > 1]
    return " ".join([config["method"].upper(), *(f"{k}={config[k]}" for k in differ)])


def series(rows: list[dict], kind: str, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in rows if row["kind"] == kind and row.get(key) is not None}


def smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """Centred moving average; at the ends over what is there."""
    half = width // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def draw(runs: list[Path], out: Path) -> list[str]:
    """Draws the three panels to `out`; returns the labels with their number of seeds."""
    read_runs = [read(run) for run in runs]
    configs = [config for config, _ in read_runs]
    groups: dict[str, list[list[dict]]] = {}
    for config, rows in read_runs:
        groups.setdefault(label(config, configs), []).append(rows)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 3.8))
    names = [f"{name} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})" for name, seeds in groups.items()]
    for axis, (title, kind, key, smoothed) in zip(axes, PANELS):
        for (colour, dash), name, seeds in zip(STYLES * len(groups), names, groups.values()):
            found = [s for s in (series(rows, kind, key) for rows in seeds) if s]
            if not found:
                continue
            # Only steps that every seed has: a mean over a changing set of seeds would jump.
            steps = sorted(set.intersection(*(set(s) for s in found)))
            values = np.array([[s[step] for step in steps] for s in found])  # (seeds, steps)
            values = np.array([smooth(v) for v in values]) if smoothed else values
            axis.plot(steps, values.mean(0), dash, color=colour, label=name, linewidth=1.8)
            axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
        axis.set_title(title + (", mean of 5 batches" if smoothed else ""), fontsize=10)
        axis.set_xlabel("rollout batches")
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1)
    axes[1].set_ylim(0, 1)
    if axes[0].get_legend_handles_labels()[0]:  # runs without evaluations have no curve there
        axes[0].legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return names


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Learning curves and reward margin of runs.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    args = parser.parse_args(argv)
    try:
        names = draw(args.runs, args.out)
    except (ValueError, OSError) as error:
        print(f"figures.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.out}: {', '.join(names)}")


if __name__ == "__main__":
    main()
