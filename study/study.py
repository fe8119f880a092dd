"""The evidence on the toy tasks: every run behind study/results/README.md, over several seeds, on a CPU.

    bash run.sh study                    makes the runs that are not in runs/study yet, two at a time, then the tables
    bash run.sh study --only trace-cold  only rows whose name starts like this
    bash run.sh study --tune             every setting in study/results/tuning.json (validation problems, seed 0)
    bash run.sh study --tables           only the tables, from study/results/study.json

A run is the training command that the tables print, then `python evaluate.py --run DIR`. A finished run is kept, one
that was stopped starts again.
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
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy import stats

from harness import command
from study.figures import load, read

HERE = Path(__file__).parents[1]
README = HERE / "README.md"
MARKS = ("<!-- written by study.py: begin -->", "<!-- written by study.py: end -->")
SUMMARY = ("<!-- written by study.py: summary -->", "<!-- written by study.py: end of summary -->")
VERDICTS = ("yes", "no, the opposite", "undecided")
LIMITS = """A verdict is Welch's 95% interval over seeds. There are dozens, without correction, so about one in twenty
is chance. The interval says little where some runs collapse and others do not: there, look at the exact rank test and
at each seed. Not tested here: real models (Tables 1 to 3), mathematics (Fig. 4), memory, and the time of an E-step on
a GPU. A verdict covers these tasks at these settings."""

# ---- Rows and claims -----------------------------------------------------------------------------------------

LABELS = {"vpd": "VPD", "sdpo": "SDPO", "grpo": "GRPO", "joint": "SDPO+RL joint", "reshape": "SDPO+RL reshape",
          "reweight": "SDPO+RL reweight", "distil": "DistIL", "ovd": "OVD"}  # fmt: skip
NEIGHBOURS = ("distil", "ovd")  # a loop of their own: `python -m neighbours.NAME`, the same flags without --method
# With one update per batch SDPO's token weights are 1, so SDPO's loop is VPD's without the E-step.
NO_E_STEP = "vpd no E-step --teacher live --divergence js --lr"
ROWS = {}  # SUBSET/METHOD CHANGE: the flags that differ from the preset. trace-long is trace for twice as many batches.
for subset, rows in {
    "code": f"vpd; sdpo; grpo; joint; reshape; reweight; distil; {NO_E_STEP} 6e-4; "
            "distil local term alone --no_future; distil constant norm --distil_norm constant",
    "trace": "vpd; sdpo; grpo; distil; vpd F=1 --e_step_every 1; vpd F=10 --e_step_every 10; vpd fixed prior --prior fixed; "
             "vpd EMA teacher --teacher ema; vpd all passed --passed_text passed; vpd e_groups all --e_groups all; "
             "vpd KL(student‖teacher) --divergence kl_student_teacher; "
             f"vpd KL(teacher‖student) --divergence kl_teacher_student; vpd sibling --feedback sibling; {NO_E_STEP} 1e-3; "
             "sdpo live teacher --teacher live; sdpo sibling --feedback sibling; distil local term alone --no_future --lr 4e-3; "
             "distil constant norm --distil_norm constant; distil black box --expert samples",
    "trace-cold": "vpd; sdpo; grpo",
    "trace-rare": f"vpd; sdpo; grpo; {NO_E_STEP} 1e-3",
    "trace-often": f"vpd; sdpo; grpo; {NO_E_STEP} 1e-3",
    "choice": "vpd; sdpo; grpo; vpd critique --feedback critique --lr 3e-4 --e_lr 2.5e-4 --e_step_every 1; "
              "sdpo critique --feedback critique --lr 1e-3 --divergence kl_student_teacher",
    "trace-long": "vpd --steps 60; sdpo --steps 60; grpo --steps 60",
    "code-judge": "vpd; sdpo; grpo; ovd; ovd sg pi --ovd_ratio one; ovd failures left out --no_ovd_failed; "
                  "ovd sg pi, failures left out --ovd_ratio one --no_ovd_failed; "
                  "ovd sg pi, all rejected --ovd_ratio one --ovd_threshold 10",
}.items():  # fmt: skip
    for name, dashes, flags in (row.partition(" --") for row in rows.split("; ")):
        ROWS[f"{subset}/{name}"] = f"{dashes}{flags}".split()

Claim = namedtuple("Claim", "says quantity subset above below")  # a line of claims.txt on one subset with one quantity
CLAIMS: dict[str, list[Claim]] = {}  # by heading; those of papers are in README.md as well
for line in (Path(__file__).parent / "claims.txt").read_text().splitlines():
    if line.startswith("## "):
        claims = CLAIMS.setdefault(line[3:], [])
    elif line and not line.startswith("# "):
        says, quantities, subsets, rows = line.split(" | ")
        claims += [Claim(says, q, s, *rows.split(" > ")) for q in quantities.split(", ") for s in subsets.split()]
WHAT = {"avg": "", "pass@4": "pass@4: ", "teacher change": "teacher on base failures, gain: ",
        "margin change": "margin, last five batches minus first five: ",
        "margin fall": "margin, first five batches minus last five: ",
        "late gain": "validation, gain in the second half: ", "late loss": "validation, loss in the second half: "}  # fmt: skip


def label_of(name: str) -> str:
    method, _, change = name.split("/")[1].partition(" ")
    return LABELS[method] + (f", {change}" if change else "")


def flags_of(name: str) -> list[str]:
    """Of a row's runs, seed and folder aside."""
    subset, variant = name.split("/")
    method, _, change = variant.partition(" ")
    method = "sdpo" if change == "no E-step" else method
    return ["--task", "toy", "--subset", subset.replace("-long", ""), "--method", method, *ROWS[name]]


def program(flags: list[str]) -> list[str]:
    """The training command of these flags, without `python`."""
    at = flags.index("--method")
    if flags[at + 1] in NEIGHBOURS:
        return ["-m", f"neighbours.{flags[at + 1]}", *flags[:at], *flags[at + 2 :]]
    return ["vpd.py", *flags]


def training(name: str) -> str:
    return f"python {' '.join(program(flags_of(name)))} --seed N --out DIR"


def configured(flags: list[str]):
    """The loop's module that these flags are for, and its Config."""
    first, *rest = program(flags)
    module = import_module(rest.pop(0) if first == "-m" else "vpd")  # and with it torch, which the tables do without
    return module, module.settings(rest)


def settings_of(flags: list[str]) -> dict:
    """What these flags mean now, as a run directory records it, but for where the model is."""
    from harness.settings import NOT_OF_THE_RUN

    cfg, aside = configured(flags)[1], (*NOT_OF_THE_RUN, "model", "given", "preset")
    return {name: value for name, value in vars(cfg).items() if name not in aside} | {"teacher": cfg.reader()}


# ---- Runs ----------------------------------------------------------------------------------------------------

STARTED: list[subprocess.Popen] = []  # to be killed when the study is stopped
SERIES = ("reward", "margin", "entropy", "divergence", "with_context", "response_length", "shift")  # that are kept of a run


def folder_of(name: str) -> str:
    return re.sub("[/ ‖]", "-", name)


def perform(flags: list[str], out: Path, test: bool) -> str:
    """Trains, and with `test` evaluates the first and the last weights; the output goes to a text file. Returns the
    error, or ""."""
    start, text = time.perf_counter(), out.with_name(f"{out.name}.txt")
    commands = [[*program(flags), "--out", str(out), "--overwrite"], ["evaluate.py", "--run", str(out)]]
    with text.open("w") as printed:
        for line in commands[: 1 + test]:
            child = subprocess.Popen([sys.executable, *line], cwd=HERE, stdout=printed, stderr=subprocess.STDOUT,
                                     env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
            STARTED.append(child)
            if status := child.wait():
                last = ["", *text.read_text().splitlines()][-1]
                return f"exit status {status}: {last} (see {text})"
    (out / "done.json").write_text(json.dumps({"seconds": round(time.perf_counter() - start, 1)}) + "\n")
    # The weights are not needed again, and a study has hundreds of them.
    for part in ("model", "best", "checkpoints"):
        shutil.rmtree(out / part, ignore_errors=True)
    return ""


def perform_all(jobs: dict[Path, list[str]], at_once: int, test: bool) -> list[str]:
    """Makes the run of each folder's flags, unless it is finished with the settings that they mean now. Returns what went
    wrong."""
    todo = {out: flags for out, flags in jobs.items() if not (out / "done.json").exists()
            or not settings_of(flags).items() <= load(out / "config.json").items()}  # fmt: skip
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished before", flush=True)
    failed, start = [], time.time()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    with ThreadPoolExecutor(at_once) as pool:
        pending = {pool.submit(perform, flags, out, test): out.name for out, flags in todo.items()}
        try:
            for count, future in enumerate(as_completed(pending), 1):
                name, error = pending[future], str(future.exception() or future.result())
                failed += [f"{name}: {error}"] if error else []
                print(f"{count}/{len(todo)} after {(time.time() - start) / 60:.1f} min: {name} {error}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            while any(future.running() for future in pending):
                for child in STARTED:
                    child.kill()
                time.sleep(0.1)
            print("study.py: stopped; finished runs are kept", file=sys.stderr)
            sys.exit(130)
    return failed


def rounded(value):
    """Three significant digits, a pass rate's four."""
    if not isinstance(value, float):
        return value
    return round(value, 4) if 0 <= value <= 1 else float(f"{value:.3g}")


def record(out: Path) -> dict:
    """What tables and figures need of a finished run."""
    config, rows, done = read(out, "config.json", "log.jsonl", "done.json")
    train, evals = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    commit, changed, _ = config["commit"].partition("+")
    seconds = float(np.median([sum(row["seconds"].values()) for row in train]))
    result = {"commit": commit[:7] + changed, **done, "seconds_per_batch": round(seconds, 3)}
    for name, found in load(out / "evaluation.json", {}).items():
        kept = {key: rounded(found[key]) for key in ("avg", "low", "high")}
        result[name] = kept | {key: rounded(v["value"]) for key, v in found.items() if key.startswith("pass@")}
    result["eval"] = {"step": [row["step"] for row in evals], "avg": [rounded(row["avg"]) for row in evals],
                      "teacher": [rounded(row.get("teacher_avg")) for row in evals]}  # fmt: skip
    result["train"] = {key: [rounded(row.get(key)) for row in train] for key in SERIES}
    return result


def hardware() -> str:
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else []
    return f"{(names or [platform.machine()])[0]}, one thread per run, torch {version('torch')}"


def collect(folder: Path, results: Path, seeds: range) -> dict:
    """study.json with the runs in `folder` in the place of older ones of the same name and seed."""
    known = load(results / "study.json", {"rows": {}})
    for name in ROWS:
        runs = known["rows"].get(name, {}).get("runs", {})
        for seed in seeds:
            out = folder / f"{folder_of(name)}-seed{seed}"
            if (out / "done.json").exists():
                runs[str(seed)] = record(out)
                known["hardware"] = hardware()
        if runs:
            known["rows"][name] = {"label": label_of(name), "command": training(name), "runs": runs}
    known["rows"] = {name: known["rows"][name] for name in ROWS if name in known["rows"]}  # in the order above
    write(results / "study.json", known)
    return known


def write(path: Path, content: dict) -> None:
    """JSON with a line for each series, whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\n[^\[\]{}\"]*\]", lambda found: "".join(found[0].split()), text)
    command.write(path, text + "\n")


# ---- Numbers -------------------------------------------------------------------------------------------------


def ends(values: list, width: int = 5) -> tuple[float, float]:
    """Mean of the first and of the last `width` entries that are there; nan for fewer than twice as many."""
    found = [v for v in values if v is not None]
    enough = len(found) >= 2 * width
    return (float(np.mean(found[:width])), float(np.mean(found[-width:]))) if enough else (np.nan, np.nan)


def quantity(name: str, run: dict) -> float:
    """A number of one run, nan where it has none. Late means the second half of the batches."""
    if name in ("avg", "pass@4"):
        return run["after"][name]
    steps, avg = run["eval"]["step"], run["eval"]["avg"]
    if name.startswith("late"):
        first, last = avg[steps.index(steps[-1] // 2)], avg[-1]
    else:
        first, last = ends(run["train"]["margin"]) if name.startswith("margin") else ends(run["eval"]["teacher"], 1)
    return first - last if name in ("margin fall", "late loss") else last - first


def interval(values: list[float], less: list[float] = ()) -> tuple[float, float, float]:
    """Mean and its 95% t interval over seeds, nan for fewer than two; with `less`, the difference of means and Welch's
    interval, for unequal spread. Rows share the order of problems and the first rollouts of a seed; that is not used,
    since runs go apart after a few batches."""
    samples = [of for of in (values, less) if of]
    if not samples or min(map(len, samples)) < 2:
        return values[0] if values else np.nan, np.nan, np.nan
    mean = float(np.mean(values) - (np.mean(less) if less else 0))
    squares = [np.var(of, ddof=1) / len(of) for of in samples]  # of the means' standard errors
    if not any(squares):
        return mean, mean, mean
    freedom = sum(squares) ** 2 / sum(square**2 / (len(of) - 1) for square, of in zip(squares, samples))
    half = float(stats.t.ppf(0.975, freedom) * np.sqrt(sum(squares)))
    return mean, mean - half, mean + half


def with_interval(values: list[float]) -> str:
    mean, low, high = interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]" if len(values) > 1 else "".join(f"{value:.3f}" for value in values)


def runs_of(rows: dict, name: str) -> list[dict]:
    """The runs of a row, one for each seed; none of a row that is not there."""
    return list(rows.get(name, {}).get("runs", {}).values())


def verdict(claim: Claim, rows: dict) -> tuple[str, str] | None:
    """The numbers and the verdict, or None while a row has fewer than two seeds."""
    runs = [runs_of(rows, f"{claim.subset}/{name}") for name in claim[3:] if name not in ("base", "0")]
    values = [[v for run in of if not np.isnan(v := quantity(claim.quantity, run))] for of in runs]
    if min(map(len, values)) < 2:
        return None
    (mean, low, high), text = interval(*values), with_interval(values[0])
    if len(values) == 2:
        rank = stats.mannwhitneyu(*values, method="exact").pvalue
        text = " against ".join(f"{np.mean(of):.3f}" for of in values)
        text = f"{text}: {mean:+.3f} [{low:+.3f}, {high:+.3f}], rank test p {rank:.3f}"
    elif claim.above == "base":
        base = runs[0][0]["before"]["avg"]
        text, low, high = f"{text}, base {base:.3f}", base - high, base - low
    return text, VERDICTS[0 if low > 0 else 1 if high < 0 else 2]


# ---- Tables --------------------------------------------------------------------------------------------------


def table(subset: str, rows: dict) -> list[str]:
    """The text table of a subset's rows, and under it the command of each."""
    rows = {name: row for name, row in rows.items() if name.split("/")[0] == subset}
    base = runs_of(rows, next(iter(rows)))[0]["before"]
    cells = [("", "seeds", "avg@4 [95% over seeds]", "each seed", "pass@4 ", "margin", "teacher", "s/batch"),
             ("base model", "", f"{base['avg']:.3f}", "", f"{base['pass@4']:.3f}", "", "", "")]  # fmt: skip
    for name, row in rows.items():
        runs = runs_of(rows, name)
        avg = [run["after"]["avg"] for run in runs]
        pass_4 = np.mean([run["after"]["pass@4"] for run in runs])
        pairs = [[ends(run["train"]["margin"]), ends(run["eval"]["teacher"], 1)] for run in runs]
        spans = ["" if np.isnan(a) else f"{a:.2f} to {b:.2f}" for a, b in np.mean(pairs, 0)]
        seconds = np.median([run["seconds_per_batch"] for run in runs])
        each = " ".join(f"{value:.3f}" for value in avg)
        cells.append((row["label"], len(runs), with_interval(avg), each, f"{pass_4:.3f}", *spans, f"{seconds:.2f}"))
    lines = ["{:34s} {:>5} {:24s} {:31s} {:6s} {:12s}  {:12s} {}".format(*line).rstrip() for line in cells]
    commands = [f"{row['label']}: {training(name)}" for name, row in rows.items()]
    return ["```", *lines, "```", "", "```", *commands, "```", ""]


def markdown(*rows) -> list[str]:
    """A table in Markdown, its first row the head."""
    head, *lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [head, "|---" * len(rows[0]) + "|", *lines, ""]


def collapses(rows: dict) -> list[str]:
    """Runs whose last validation pass rate is 0.2 or more below the run's best one, or 0."""
    found, numbers = [], lambda values: " ".join("" if v is None else f"{v:.2f}" for v in values)
    for name, seed, run in ((name, seed, run) for name, row in rows.items() for seed, run in row["runs"].items()):
        avg, train = run["eval"]["avg"], run["train"]
        if avg[-1] <= max(avg) - 0.2 or avg[-1] == 0 < avg[0]:
            margins = [v for v in train["margin"] if v is not None]
            margin = f"{margins[-1]:.2f}, at most {max(margins):.2f}" if margins else ""
            spans = [f"{train[key][0]:.2f} to {train[key][-1]:.2f}" for key in ("response_length", "with_context")]
            found.append((name, seed, numbers(avg), numbers(run["eval"]["teacher"]), margin, *spans))
    return markdown(("row", "seed", "validation", "teacher", "last margin", "response length", "with context"), *found)


def by_verdict(judged: list, heading: str) -> list[str]:
    """judged: (claim, numbers, verdict). A line for each claim: the subsets on which it holds, its opposite does, and
    neither is clear."""
    places: dict[str, dict[str, list[str]]] = {}
    for claim, _, so in judged:
        of_claim = places.setdefault(claim.says, {so: [] for so in VERDICTS})
        of_claim[so].append(claim.subset + " (pass@4)" * (claim.quantity == "pass@4"))
    return markdown((heading, *VERDICTS), *((says, *map(", ".join, of.values())) for says, of in places.items()))


def tuning_list(known: dict) -> list[str]:
    """What was tried for each row: its flags and avg@4 after 10, 20, ... batches, the best in bold."""
    tried: dict[str, list[tuple[float, str]]] = {}
    for flags, entry in known.items():
        if avg := entry.get("avg"):  # else it is still to be run
            kept = re.sub(r"--(task|subset|method|seed|steps) \S+", "", flags).replace("--", "").split()
            curve = " / ".join(f"{value:.2f}" for step, value in avg.items() if step != "0")
            tried.setdefault(entry["name"], []).append((avg[max(avg, key=int)], f"{' '.join(kept)}: {curve}"))
    head = "avg@4 on validation problems, seed 0, after 10 / 20 / 30 batches (trace: 20 / 40), the best in bold"
    bold = {name: [f"**{text}**" if last == max(of)[0] else text for last, text in of] for name, of in tried.items()}
    return markdown(("row", head), *((name, "; ".join(of)) for name, of in bold.items()))


def summary(rows: dict) -> list[str]:
    """A small table of all methods on the two main tasks, and on OVD's. What is not measured is empty."""
    subsets = ("trace", "code", "code-judge")
    avg = lambda when, name: [run[when]["avg"] for run in runs_of(rows, name)]  # noqa: E731
    base = [with_interval(avg("before", f"{subset}/grpo")[:1]) for subset in subsets]
    lines = [(label, f"`{method}`", *(with_interval(avg("after", f"{subset}/{method}")) for subset in subsets))
             for method, label in LABELS.items()]  # fmt: skip
    return markdown(("", "METHOD", *(f"`{s}`" for s in subsets)), ("base model", "", *base), *lines)[:-1]


def replaced(text: str, marks: tuple[str, str], lines: list[str]) -> str:
    """The text with these lines between its two marks, if it has them."""
    before, mark, rest = text.partition(marks[0])
    return "\n".join([before + mark, *lines, marks[1]]) + rest.partition(marks[1])[2] if mark else text


def texts(results: Path, readme: Path) -> dict[Path, str]:
    """README.md and study/results/README.md with what study.json and tuning.json say between their marks; nothing where
    there are no runs. Raises ValueError with one line for a study.json or tuning.json that is none."""
    known, tuned = load(results / "study.json", {"rows": {}}), load(results / "tuning.json", {})
    try:
        rows = known["rows"]
        if not (runs := [run for name in rows for run in runs_of(rows, name)]):
            return {}
        commits = ", ".join(sorted({run["commit"] for run in runs}))
        hours = sum(run["seconds"] for run in runs) / 3600
        origin = f"{len(runs)} runs, {hours:.1f} CPU hours; {known['hardware']}; commit {commits}."
        page, short = [origin, ""], []
        for subset in dict.fromkeys(name.split("/")[0] for name in rows):
            page += [f"## {subset}", "", *table(subset, rows)]
        page += ["## Claims", "", LIMITS, ""]
        for heading, claims in CLAIMS.items():
            judged = [(claim, *found) for claim in claims if (found := verdict(claim, rows))]
            lines = [(claim.says, claim.subset, WHAT[claim.quantity] + text, so) for claim, text, so in judged]
            page += markdown((heading, "where", "measured", "verdict"), *lines)
            short += by_verdict(judged, heading) if heading.endswith("claim") else []
        page += ["## Runs that collapsed: 0.2 or more below their own best validation pass rate, or at 0", ""]
        page += [*collapses(rows), "## What was tried before", "", *tuning_list(tuned)[:-1]]
        text, own = readme.read_text(), results / "README.md"
        text = replaced(replaced(text, MARKS, [origin, "", *short, LIMITS]), SUMMARY, summary(rows))
        return {readme: text, own: replaced(own.read_text() if own.exists() else "\n".join(MARKS), MARKS, page)}
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{results}/study.json or tuning.json is not that of a study: {error!r}") from None


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser("study.py", "The study on the toy tasks.")
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose name starts with one of these")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="of the run directories")
    parser.add_argument("--results", type=Path, default=Path("study/results"), help="of the tables and their numbers")
    parser.add_argument("--tune", action="store_true", help="runs the settings in RESULTS/tuning.json")
    parser.add_argument("--tables", action="store_true", help="no runs, only the tables from RESULTS/study.json")
    args = parser.parse_args(argv)
    results, folder, seeds, failed = args.results, args.folder.resolve(), range(1, args.seeds + 1), []
    if args.tune and args.tables:
        parser.error("--tune makes runs and --tables none: give one of them")
    if args.seeds < 1 or args.jobs < 1 or not results.is_dir():
        parser.error("--seeds and --jobs must be at least 1, and --results a folder that is there")
    try:
        # What is there already has to be readable before hours are spent on more.
        if not texts(results, README) and args.tables:
            parser.error(f"--tables: {results}/study.json has no runs to make tables of")
        tuned = load(results / "tuning.json", {})
        all_names = list(dict.fromkeys(entry["name"] for entry in tuned.values()) if args.tune else ROWS)
        names = [name for name in all_names if name.startswith(tuple(args.only))]
        if not names:
            parser.error(f"--only {' '.join(args.only)}: no row starts like this; there are {', '.join(all_names)}")
        if not args.tables:
            folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(error)
    if args.tune:
        folders = {flags: folder / folder_of("tune " + re.sub("--(task|subset|method)? ?", "", flags))
                   for flags, entry in tuned.items() if entry["name"] in names}  # fmt: skip
        failed = perform_all({out: flags.split() for flags, out in folders.items()}, args.jobs, test=False)
        for flags, out in folders.items():
            if (out / "done.json").exists():
                found = record(out)
                avg = dict(zip(map(str, found["eval"]["step"]), found["eval"]["avg"]))
                tuned[flags] |= {"commit": found["commit"], "avg": avg}
        write(results / "tuning.json", tuned)
    elif not args.tables:  # seed by seed, so that a study that is stopped has all rows with fewer seeds
        jobs = {folder / f"{folder_of(name)}-seed{seed}": [*flags_of(name), "--seed", str(seed)]
                for seed in seeds for name in names}  # fmt: skip
        failed = perform_all(jobs, args.jobs, test=True)
        collect(folder, results, seeds)
    for path, text in texts(results, README).items():
        command.write(path, text)
    for line in failed:
        print(f"study.py: {line}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    command.run(main, ValueError)  # of a run directory that was damaged
