"""The toy study: every run behind study/results/README.md, on a CPU.

    bash run.sh study --tune             the settings that each row tries, with two seeds each, on validation problems
    bash run.sh study                    the reported runs that runs/study lacks, two at a time, then the tables
    bash run.sh study --only trace/vpd   only rows whose name starts like this
    bash run.sh study --tables           only the tables, from study/results/

study/rows.txt lists the settings to try and the rows to report, study/claims.txt the claims about them. A run is the training
command that the tables print, then `python evaluate.py --run DIR`. Finished runs are kept; an interrupted run starts again.
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy import stats

from harness import command
from harness.runs import config_of
from study.figures import load, rows_of, series
from tasks.base import json_rows

HERE = Path(__file__).parents[1]
README = HERE / "README.md"
SUMMARY = ("<!-- written by study.py: summary -->", "<!-- written by study.py: end of summary -->")
MARKS = ("<!-- written by study.py: begin -->", "<!-- written by study.py: end -->")
TUNING_SEEDS = ("101", "102")  # never reported

# ---- Rows and claims, from text files in this folder -------------------------------------------------------------

LABELS = {"vpd": "VPD", "vpd likelier": "VPD, failures spared", "sdpo": "SDPO", "sdpo live": "SDPO, live teacher",
          "grpo": "GRPO", "joint": "SDPO+RL joint", "reshape": "SDPO+RL reshape", "reweight": "SDPO+RL reweight"}  # fmt: skip
Claim = namedtuple("Claim", "says quantity above below")  # above and below: rows; below may be 0
QUANTITIES = {"avg": "", "teacher gain": "teacher on base failures, gain: ", "margin rise": "margin, last five less first five: ",
              "margin fall": "margin, first five less last five: "}  # fmt: skip


def lines_of(name: str) -> dict[str, list[list[str]]]:
    """{heading: lines} of a text file in this folder, each line split at its bars."""
    found: dict[str, list[list[str]]] = {}
    for line in (Path(__file__).parent / name).read_text().splitlines():
        if line.startswith("## "):
            part = found.setdefault(line[3:], [])
        elif line and not line.startswith("# "):
            part.append(line.split(" | "))
    return found


TRIED: dict[str, list[str]] = {}  # row: the flags of each setting to try
for row, flags in lines_of("rows.txt")["tried"]:
    TRIED.setdefault(row, []).append(flags)
REPORTED = {row: (flags, int(seeds)) for row, flags, seeds in lines_of("rows.txt")["reported"]}
CLAIMS = {heading: [Claim(says, quantity, *rows.split(" > ")) for says, quantity, rows in lines]
          for heading, lines in lines_of("claims.txt").items()}  # fmt: skip


def task_of(row: str) -> list[str]:
    subset, variant = row.split("/")
    return ["--task", "toy", "--subset", subset.removesuffix("-120"), "--method", variant.split()[0]]


def mean_avg(runs: dict) -> float:
    """What ranks settings: the mean over a setting's tuning runs."""
    return float(np.mean([run["avg"] for run in runs.values()]))


def best(row: str, tuned: dict) -> str | None:
    """The flags of the row's setting with the best mean; None until all its settings have run with both tuning seeds."""
    runs = {flags: tuned.get(row, {}).get(flags, {}) for flags in TRIED.get(row, [])}
    if not runs or any(of.keys() != {*TUNING_SEEDS} for of in runs.values()):
        return None
    return max(runs, key=lambda flags: mean_avg(runs[flags]))


def reported(tuned: dict) -> dict[str, list[str]]:
    """The flags, without seed and folder, of each reported row whose tuning is complete: the best setting of the row that rows.txt
    names, with the changes given there. A row of a method without an E-step drops the E-step's flags."""
    found: dict[str, list[str]] = {}
    for row, (flags, _) in REPORTED.items():
        source, *changes = flags.split(" --")
        if setting := best(source, tuned):
            values = dict(flag.split() for flag in [*f" {setting}".split(" --")[1:], *changes])
            e_step = row.split("/")[1].startswith("vpd")
            kept = [f"--{name} {value}" for name, value in values.items() if e_step or not name.startswith("e_")]
            found[row] = task_of(row) + " ".join(kept).split()
    return found


# ---- Runs --------------------------------------------------------------------------------------------------------

STARTED: list[subprocess.Popen] = []  # killed when the study is stopped


def settings_of(flags: list[str]) -> dict:
    """What these flags mean now, as a run directory records it, except for the model's path."""
    import vpd  # and with it torch, which the tables do without
    from harness.settings import NOT_OF_THE_RUN

    cfg, aside = vpd.settings(flags), (*NOT_OF_THE_RUN, "model", "given", "preset")
    return {name: value for name, value in vars(cfg).items() if name not in aside} | {"teacher": cfg.reader()}


def perform(flags: list[str], out: Path, test: bool) -> None:
    """Trains and, with `test`, evaluates the first and the last weights; the output goes to a text file. Raises RuntimeError if a
    command fails. Training that ends early, because no update is left to make, has status 1 and saves its weights: a result."""
    start, text = time.perf_counter(), out.with_name(f"{out.name}.txt")
    commands = [["vpd.py", *flags, "--out", str(out), "--overwrite"], ["evaluate.py", "--run", str(out)]]
    with text.open("w") as printed:
        for program, *line in commands[: 1 + test]:
            child = subprocess.Popen([sys.executable, program, *line], cwd=HERE, stdout=printed, stderr=subprocess.STDOUT,
                                     env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
            STARTED.append(child)
            status = child.wait()
            ended_early = program == "vpd.py" and status == 1 and (out / "model").is_dir()
            if status and not ended_early:
                raise RuntimeError(f"exit status {status}: {['', *text.read_text().splitlines()][-1]} (see {text})")
    done = {"seconds": round(time.perf_counter() - start, 1), "hardware": hardware()}
    (out / "done.json").write_text(json.dumps(done) + "\n")
    for part in ("model", "best", "checkpoints"):  # not needed again, and a study has hundreds of them
        shutil.rmtree(out / part, ignore_errors=True)


def perform_all(jobs: dict[Path, tuple], results: dict, at_once: int, test: bool) -> dict[Path, Exception]:
    """jobs: {run directory: (row, part of the row, seed, flags)}. Makes each run, unless it has finished with what its flags mean
    now, and records it as results[row][part][seed]. Returns the errors of runs that failed."""
    todo = {out: flags for out, (*_, flags) in jobs.items() if not (out / "done.json").exists()
            or not settings_of(flags).items() <= load(out / "config.json").items()}  # fmt: skip
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished before", flush=True)
    failed, start = {}, time.time()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    with ThreadPoolExecutor(at_once) as pool:
        pending = {pool.submit(perform, flags, out, test): out for out, flags in todo.items()}
        try:
            for count, future in enumerate(as_completed(pending), 1):
                out = pending[future]
                if error := future.exception():
                    failed[out] = error
                print(f"{count}/{len(todo)} after {(time.time() - start) / 60:.1f} min: {out.name} {error or ''}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            while any(future.running() for future in pending):
                for child in STARTED:
                    child.kill()
                time.sleep(0.1)
            print("study.py: stopped; finished runs are kept", file=sys.stderr)
            sys.exit(130)
    for out, (row, part, seed, _) in jobs.items():
        if out not in failed:
            results.setdefault(row, {}).setdefault(part, {})[seed] = record(out, test)
    return failed


def rounded(value):
    """Pass rates to four decimals, other floats to three significant digits."""
    return value if not isinstance(value, float) else round(value, 4) if 0 <= value <= 1 else float(f"{value:.3g}")


def record(out: Path, test: bool) -> dict:
    """What tables and figures need of a finished run; of a tuning run, only its last validation pass rate."""
    log = list(json_rows(out / "log.jsonl"))
    commit, changed, _ = config_of(out, ["commit"])["commit"].partition("+")
    result = {"commit": commit[:7] + changed, **load(out / "done.json")}
    curves = {kind: {name: [*map(rounded, column)] for name, column in of.items()} for kind, of in series(log).items()}
    if not test:
        return result | {"avg": curves["eval"]["avg"][-1]}
    seconds = float(np.median([sum(row["seconds"].values()) for row in log if row["kind"] == "train"]))
    result["seconds_per_batch"] = round(seconds, 3)
    for name, found in load(out / "evaluation.json").items():
        kept = {key: rounded(found[key]) for key in ("avg", "low", "high")}
        result[name] = kept | {key: rounded(v["value"]) for key, v in found.items() if key.startswith("pass@")}
    return result | curves


def hardware() -> str:
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else []
    return f"{(names or [platform.machine()])[0]}, torch {version('torch')}"


def write(path: Path, content: dict) -> None:
    """JSON with one line per series; the file is replaced as a whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\n[^\[\]{}\"]*\]", lambda found: "".join(found[0].split()), text)
    command.write(path, text + "\n")


def path_of(folder: Path, *parts) -> Path:
    return folder / re.sub(r"[^\w.=-]+", "-", " ".join(map(str, parts)))


def tuning(names: list[str], tuned: dict, folder: Path) -> dict[Path, tuple]:
    """The jobs for what `tuned` lacks of these rows."""
    return {path_of(folder, "tune", name, flags, seed): (name, flags, seed, [*task_of(name), *flags.split(), "--seed", seed])
            for seed in TUNING_SEEDS for name in names for flags in TRIED[name]
            if seed not in tuned.get(name, {}).get(flags, {})}  # fmt: skip


def reporting(names: list[str], rows: dict[str, list[str]], known: dict, folder: Path) -> dict[Path, tuple]:
    """The jobs of these rows, seed by seed: a study that is stopped has fewer seeds of all rows. Rows of study.json (`known`) whose
    settings have changed since lose their runs."""
    for name in names:
        line = f"python vpd.py {' '.join(rows[name])} --seed N --out DIR"
        if known.get(name, {}).get("command") != line:
            known[name] = {"label": label_of(name), "command": line, "runs": {}}
    return {path_of(folder, name, f"seed{seed}"): (name, "runs", str(seed), [*rows[name], "--seed", str(seed)])
            for seed in range(1, 21) for name in names if seed <= REPORTED[name][1]}  # fmt: skip


# ---- Numbers -----------------------------------------------------------------------------------------------------


def ends(run: dict, name: str) -> tuple[float, float]:
    """Margin: mean over the first and over the last five batches that have one. Teacher: first and last pass rate. nan if the two
    would overlap."""
    kind, width = {"margin": ("train", 5), "teacher": ("eval", 1)}[name]
    found = [v for v in run[kind][name] if v is not None]
    enough = len(found) >= 2 * width
    return (float(np.mean(found[:width])), float(np.mean(found[-width:]))) if enough else (np.nan, np.nan)


def quantity(name: str, run: dict) -> float:
    """A number of one run, nan if it has none."""
    if name == "avg":
        return run["after"]["avg"]
    first, last = ends(run, name.split()[0])
    return first - last if name == "margin fall" else last - first


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and its 95% t interval over seeds, nan for fewer than two."""
    n = len(values)
    mean = float(np.mean(values)) if n else np.nan
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else np.nan
    return mean, mean - half, mean + half


def with_interval(values: list[float]) -> str:
    mean, low, high = interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]" if len(values) > 1 else "".join(f"{value:.3f}" for value in values)


def collapsed(run: dict) -> bool:
    """Whether the last validation pass rate is at least 0.2 below the run's best, or 0 after a start above 0."""
    avg = run["eval"]["avg"]
    return avg[-1] <= max(avg) - 0.2 or avg[-1] == 0 < avg[0]


def judge(claims: list[Claim], rows: dict) -> list[tuple[str, str, str]]:
    """(claim, its numbers, its verdict) for the claims of one family whose rows have at least two seeds. Rows are paired by seed,
    with the same problems. The verdict is that of a paired t test at 5%, after Holm's correction over the whole family, including
    claims that cannot be judged yet. The interval is not corrected."""
    found, p = [], []
    for claim in claims:
        runs = [rows.get(row, {"runs": {}})["runs"] for row in (claim.above, claim.below)]
        above, below = ({seed: quantity(claim.quantity, run) for seed, run in of_row.items()} for of_row in runs)
        below = dict.fromkeys(above, 0.0) if claim.below == "0" else below
        pairs = np.array([(above[seed], below[seed]) for seed in above if seed in below]).reshape(-1, 2)
        pairs = pairs[~np.isnan(pairs).any(1)]
        differences = pairs[:, 0] - pairs[:, 1]
        if len(pairs) < 2 or np.ptp(differences) == 0:
            continue
        mean, low, high = interval(differences)
        text = f"{pairs[:, 0].mean():.3f} against {pairs[:, 1].mean():.3f}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        found.append((claim.says, f"{QUANTITIES[claim.quantity]}{text}, {len(pairs)} pairs", mean))
        p.append(stats.ttest_1samp(differences, 0).pvalue)
    # Holm: the smallest p times the number of claims, the next times one less, ...
    order, corrected = np.argsort(p), np.array(p)
    corrected[order] = np.maximum.accumulate(corrected[order] * (len(claims) - np.arange(len(p)))).clip(max=1)
    verdict = lambda mean, p: "undecided" if p >= 0.05 else "yes" if mean > 0 else "no, the opposite"  # noqa: E731
    return [(says, f"{text}, p {p:.3g}", verdict(mean, p)) for (says, text, mean), p in zip(found, corrected)]


# ---- Tables ------------------------------------------------------------------------------------------------------


def label_of(row: str) -> str:
    variant = row.split("/")[1]
    name = max((name for name in LABELS if f"{variant} ".startswith(f"{name} ")), key=len)
    return ", ".join(filter(None, (LABELS[name], variant[len(name) :].strip())))


def markdown(*rows) -> list[str]:
    """A table in Markdown, its first row the head."""
    head, *lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [head, "|---" * len(rows[0]) + "|", *lines, ""]


def averages(row: dict) -> list[float]:
    return [run["after"]["avg"] for run in row["runs"].values()]


def table(rows: dict) -> list[str]:
    """The rows of one subset, and the command of each below them."""
    cells = [("", "seeds", "avg@4 [95% over seeds]", "each seed", "margin", "teacher", "collapsed", "s/batch")]
    base = next(iter(next(iter(rows.values()))["runs"].values()))["before"]["avg"]
    cells.append(("base model", "", f"{base:.3f}", *[""] * 5))
    for row in rows.values():
        runs, avg = list(row["runs"].values()), averages(row)
        there = [[pair for run in runs if not np.isnan(pair := ends(run, name)).any()] for name in ("margin", "teacher")]
        spans = ["{:.2f} to {:.2f}".format(*np.mean(of, 0)) if of else "" for of in there]
        seconds = np.median([run["seconds_per_batch"] for run in runs])
        each = " ".join(f"{value:.2f}" for value in avg)
        cells.append((row["label"], len(runs), with_interval(avg), each, *spans, sum(map(collapsed, runs)), f"{seconds:.1f}"))
    return [*markdown(*cells), "```", *(row["command"] for row in rows.values()), "```", ""]


def tried_list(tuned: dict) -> list[str]:
    """Every setting tried, the best as the heading of the others, with avg@4 on validation problems for both tuning seeds."""
    rates = lambda runs: " ".join(f"{run['avg']:.2f}" for run in runs.values())  # noqa: E731
    lines = []
    for row, settings in tuned.items():
        ranked = sorted(settings.items(), key=lambda item: -mean_avg(item[1]))
        each = [f"{flags.replace('--', '')}: {rates(runs)}" for flags, runs in ranked]
        lines += [f"<details><summary>{row}: {each[0]}</summary>", "", *(f"- {line}" for line in each[1:]), "", "</details>", ""]
    return lines


def summary(rows: dict) -> list[str]:
    """A small table of the tuned rows on both tasks; what has not been measured is empty."""
    subsets = ("trace", "code")
    of = lambda subset, method: rows.get(f"{subset}/{method}", {"runs": {}})  # noqa: E731
    base = [next((f"{run['before']['avg']:.3f}" for run in of(subset, "vpd")["runs"].values()), "") for subset in subsets]
    lines = [(label, *(with_interval(averages(of(subset, method))) for subset in subsets)) for method, label in LABELS.items()]
    return markdown(("", *(f"`{subset}`" for subset in subsets)), ("base model", *base), *lines)[:-1]


def replaced(text: str, marks: tuple[str, str], lines: list[str]) -> str:
    """The text with these lines between its two marks, if it has them."""
    before, mark, rest = text.partition(marks[0])
    return "\n".join([before + mark, *lines, marks[1]]) + rest.partition(marks[1])[2] if mark else text


def texts(results: Path, readme: Path) -> dict[Path, str]:
    """README.md and study/results/README.md with the tables of study.json and tuning.json between their marks; nothing if there are
    no runs."""
    rows, tuned = rows_of(results / "study.json", {"rows": {}}), load(results / "tuning.json", {})
    if not rows:
        return {}
    runs = [run for row in rows.values() for run in row["runs"].values()]
    runs += [run for settings in tuned.values() for of in settings.values() for run in of.values()]
    listed = lambda key: "; ".join(sorted({run[key] for run in runs}))  # noqa: E731
    hours = sum(run["seconds"] for run in runs) / 3600
    page = [f"{len(runs)} runs, tuning included, two at a time; their durations add up to {hours:.1f} hours.",
            f"Hardware: {listed('hardware')}. Commits: {listed('commit')}.", ""]  # fmt: skip
    for subset in dict.fromkeys(name.split("/")[0] for name in rows):
        page += [f"## {subset}", "", *table({name: row for name, row in rows.items() if name.split("/")[0] == subset})]
    for heading, claims in CLAIMS.items():
        page += [f"## {heading}", "", *markdown(("", "measured", "verdict"), *judge(claims, rows))]
    page += ["## What was tried", "", "Each row's best setting, and the others: avg@4 on validation problems with both seeds."]
    page += ["", *tried_list(tuned)[:-1]]
    own = results / "README.md"
    page = replaced(own.read_text() if own.exists() else "\n".join(MARKS), MARKS, page)
    return {readme: replaced(readme.read_text(), SUMMARY, summary(rows)), own: page}


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser("study.py", "The toy study.")
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose name starts with one of these")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="where the run directories go")
    parser.add_argument("--results", type=Path, default=Path("study/results"), help="folder of the tables and their numbers")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--tune", action="store_true", help="run the settings that rows.txt lists as tried")
    mode.add_argument("--tables", action="store_true", help="no runs, only the tables")
    args = parser.parse_args(argv)
    results, folder, failed = args.results, args.folder.resolve(), {}
    if args.jobs < 1 or not results.is_dir():
        parser.error("--jobs must be at least 1, and --results an existing folder")
    try:  # the existing files must be readable before hours are spent on more
        if not texts(results, README) and args.tables:
            parser.error(f"--tables: {results}/study.json has no runs to make tables of")
        tuned, known = load(results / "tuning.json", {}), rows_of(results / "study.json", {"rows": {}})
        rows = TRIED if args.tune else reported(tuned)
        names = [name for name in rows if name.startswith(tuple(args.only))]
        if not names and not args.tables:
            parser.error(f"--only {' '.join(args.only)}: no row starts like this; there are {', '.join(rows) or 'none tuned yet'}")
        if not args.tables:
            folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(error)
    if args.tune:
        failed = perform_all(tuning(names, tuned, folder), tuned, args.jobs, test=False)
        write(results / "tuning.json", {name: tuned[name] for name in TRIED if name in tuned})
    elif not args.tables:
        failed = perform_all(reporting(names, rows, known, folder), known, args.jobs, test=True)
        write(results / "study.json", {"rows": {name: known[name] for name in REPORTED if known.get(name, {}).get("runs")}})
    for path, text in texts(results, README).items():
        command.write(path, text)
    for out, error in failed.items():
        print(f"study.py: {out.name}: {error}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    command.run(main, ValueError)  # of a run directory that was damaged
