"""The evidence on the toy tasks: every run behind the tables of results/README.md, over seeds, on a CPU.

    bash run.sh study                    all runs that are not in runs/study yet, two at a time; then the tables
    bash run.sh study --only trace-cold  rows whose name starts like this
    bash run.sh study --tune             what was tried before: validation problems, seed 0, which is not reported
    bash run.sh study --tables           the tables again, from results/study.json

A run is `python vpd.py FLAGS --seed N --out DIR`, then `python evaluate.py --run DIR`; here many of them share a process,
which changes nothing but the time. A run that was stopped starts again, one that is finished stays.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).parent


class Row(NamedTuple):
    """One line of a table: `label`, and the flags that its runs differ by from the preset of the subset and method."""

    label: str
    flags: str


LABELS = {"vpd": "VPD", "sdpo": "SDPO", "grpo": "GRPO", "joint": "SDPO+RL joint", "reshape": "SDPO+RL reshape",
          "reweight": "SDPO+RL reweight"}  # fmt: skip


def methods(subset: str, names: str, flags: str = "") -> dict[str, Row]:
    """A row for each of the space-separated methods on one subset."""
    start = subset.replace("trace-long", "trace")
    return {
        f"{subset}/{name}": Row(LABELS[name], f"--subset {start} --method {name} {flags}".strip())
        for name in names.split()
    }


def variants(subset: str, method: str, changes: dict[str, str]) -> dict[str, Row]:
    """A row for each change of one method's flags, called METHOD, CHANGE."""
    return {
        f"{subset}/{method} {name}": Row(f"{LABELS[method]}, {name}", f"--subset {subset} --method {method} {flags}")
        for name, flags in changes.items()
    }


# Names are SUBSET/METHOD CHANGE. trace-long is trace for twice as many batches.
ROWS = {
    **methods("code", "vpd sdpo grpo joint reshape reweight"),
    **methods("trace", "vpd sdpo grpo joint reshape reweight"),
    **methods("trace-cold", "vpd sdpo grpo"),
    **variants("trace", "vpd", {"F=1": "--e_step_every 1", "F=10": "--e_step_every 10", "fixed prior": "--prior fixed"}),
    **methods("trace-rare", "vpd sdpo grpo"),
    **methods("trace-often", "vpd sdpo grpo"),
    **methods("choice", "vpd sdpo grpo"),
    **variants("choice", "vpd", {"critique": "--feedback critique"}),
    **variants("choice", "sdpo", {"critique": "--feedback critique"}),
    **variants("trace", "vpd", {
        "EMA teacher": "--teacher ema",
        "all passed": "--passed_text passed",
        "e_groups all": "--e_groups all",
        "KL(student‖teacher)": "--divergence kl_student_teacher",
        "KL(teacher‖student)": "--divergence kl_teacher_student",
        "sibling": "--feedback sibling",
        "no E-step": "--e_step_every 1000",
    }),
    **variants("trace", "sdpo", {"live teacher": "--teacher live", "sibling": "--feedback sibling"}),
    **methods("trace-long", "vpd sdpo grpo", "--steps 60"),
    **{"trace-long/sdpo high rate": Row("SDPO, four times the rate", "--subset trace --method sdpo --steps 60 --lr 4e-3")},
}  # fmt: skip

# What was tried for each method, with the same number of settings for all methods of a task. The three methods that trace
# was first made for were tuned at 40 batches with an earlier commit; those figures stand in results/tuning.json as well.
STD = "--divide_by_std"
KST, TKS, JS = (f"--divergence {kind}" for kind in ("kl_student_teacher", "kl_teacher_student", "js"))
GRID = {
    "code/vpd": [f"--lr {lr} --e_lr {e} --e_step_every {F} {kind}" for lr, e, F, kind in (
        ("3e-4", "1e-3", 1, TKS), ("6e-4", "1e-3", 1, TKS), ("3e-4", "2e-3", 1, TKS), ("6e-4", "1e-3", 1, JS),
        ("1e-3", "1e-3", 5, JS), ("6e-4", "2e-3", 5, TKS))],
    "code/sdpo": [f"--lr {lr} {kind}" for lr, kind in (
        ("1e-3", JS), ("2e-3", JS), ("2e-4", TKS), ("5e-4", TKS), ("1e-3", TKS), ("1e-3", KST))],
    "code/grpo": [*(f"--lr {lr} {STD}" for lr in ("1e-3", "2e-3", "3e-3", "4e-3")),
                  *(f"--lr {lr} {STD} False" for lr in ("2e-3", "4e-3"))],
    "code/joint": [f"{STD} --lr {lr} {rest}" for lr, rest in (
        ("1e-3", JS), ("2e-3", JS), ("1e-3", TKS), ("2e-3", TKS), ("2e-3", f"{JS} --w_rl 0.3"), ("1e-3", KST))],
    "code/reshape": [f"{STD} --lr {lr} --w_opd {w}" for lr, w in (
        ("5e-4", 1), ("1e-3", 1), ("2e-3", 1), ("1e-3", 0.1), ("2e-3", 0.1), ("2e-3", 0.01))],
    "code/reweight": [f"{STD} --lr {lr} {rest}" for lr, rest in (
        ("1e-3", ""), ("2e-3", ""), ("3e-3", ""), ("2e-3", "--reweight_lam 1"), ("2e-3", "--reweight_clip 1"),
        ("2e-3", "--reweight_lam 1 --reweight_clip 1"))],
    "trace/joint": [f"{STD} --lr {lr} {rest}" for lr, rest in (
        ("5e-4", KST), ("1e-3", KST), ("2e-3", KST), ("1e-3", f"{KST} --w_rl 0.1"), ("2e-3", f"{KST} --w_rl 0.1"),
        ("2e-3", f"{KST} --w_rl 0.01"), ("1e-3", JS), ("2e-3", JS), ("2e-3", f"{JS} --w_rl 0.1"),
        ("2e-3", f"{KST} --w_opd 0.1"))],
    "trace/reshape": [f"{STD} --lr {lr} --w_opd {w} {rest}" for lr, w, rest in (
        ("5e-4", 1, ""), ("1e-3", 1, ""), ("2e-3", 1, ""), ("5e-4", 0.1, ""), ("1e-3", 0.1, ""), ("2e-3", 0.1, ""),
        ("1e-3", 0.01, ""), ("2e-3", 0.01, ""), ("1e-3", 1, "--w_rl 0.1"), ("2e-3", 1, "--w_rl 0.1"))],
    "trace/reweight": [f"{STD} --lr {lr} --reweight_lam {lam} --reweight_clip {clip}" for lr, lam, clip in (
        ("1e-3", 0.5, 0.2), ("2e-3", 0.5, 0.2), ("3e-3", 0.5, 0.2), ("1e-3", 1, 0.2), ("2e-3", 1, 0.2),
        ("1e-3", 1, 1), ("2e-3", 1, 1), ("2e-3", 0.5, 1), ("3e-3", 1, 1), ("2e-3", 1, 5))],
    "choice/vpd": [f"--lr {lr} --e_lr {e} --e_step_every {F} {JS}" for lr, e, F in (
        ("3e-4", "5e-4", 5), ("1e-3", "5e-4", 5), ("1e-3", "1e-3", 5), ("3e-3", "5e-4", 5), ("3e-4", "2.5e-4", 1))],
    "choice/sdpo": [f"--lr {lr} {kind}" for lr, kind in (
        ("3e-4", JS), ("1e-3", JS), ("3e-3", JS), ("1e-3", KST), ("1e-3", TKS))],
    "choice/vpd critique": [f"--feedback critique --lr {lr} --e_lr {e} --e_step_every {F} {JS}" for lr, e, F in (
        ("3e-4", "5e-4", 5), ("1e-3", "5e-4", 5), ("1e-3", "1e-3", 5), ("3e-3", "5e-4", 5), ("3e-4", "2.5e-4", 1))],
    "choice/sdpo critique": [f"--feedback critique --lr {lr} {kind}" for lr, kind in (
        ("3e-4", JS), ("1e-3", JS), ("3e-3", JS), ("1e-3", KST), ("1e-3", TKS))],
    "choice/grpo": [*(f"--lr {lr} {STD}" for lr in ("5e-4", "1e-3", "2e-3")),
                    *(f"--lr {lr} {STD} False" for lr in ("1e-3", "2e-3"))],
    "trace-often/vpd": [f"--lr {lr} --e_lr {e}" for lr, e in (("1e-3", "5e-4"), ("5e-4", "2.5e-4"), ("2e-3", "5e-4"))],
    "trace-often/sdpo": [f"--lr {lr}" for lr in ("1e-3", "5e-4", "2e-3")],
    "trace-often/grpo": [f"--lr {lr}" for lr in ("2e-3", "1e-3", "5e-4")],
}  # fmt: skip
TUNING_STEPS = {"trace": 20}  # of the hybrids; the others' figures after 20 batches stand beside them

SERIES = ("reward", "margin", "entropy", "divergence", "with_context", "response_length", "e_loss", "shift")


# ---- One run -------------------------------------------------------------------------------------------------


def flags_of(name: str) -> list[str]:
    return ["--task", "toy", *ROWS[name].flags.split()]


def folder_of(name: str) -> str:
    return name.replace("/", "-").replace(" ", "-").replace("‖", "-")


def perform(flags: list[str], out: Path, test: bool) -> str:
    """Trains, and with `test` evaluates the first and last weights; what they print goes to a text file. Returns the error,
    or "". One process can do many one after the other."""
    import torch

    import evaluate
    import vpd

    torch.set_num_threads(1)
    os.chdir(HERE)  # model folders are named from here
    start, argv = time.perf_counter(), sys.argv
    with (
        out.with_suffix(".txt").open("w") as printed,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        try:
            args = [*flags, "--out", str(out), "--overwrite"]
            sys.argv = ["vpd.py", *args]  # the command that the run directory records
            vpd.main(args)
            if test:
                evaluate.main(["--run", str(out)])
            (out / "done.json").write_text(json.dumps({"seconds": round(time.perf_counter() - start, 1)}) + "\n")
        except (Exception, SystemExit) as error:
            return f"{type(error).__name__}: {error} (see {out.with_suffix('.txt')})"
        finally:
            sys.argv = argv
    # The weights are not needed again, and a study has hundreds of them.
    for part in ("model", "best", "checkpoints"):
        shutil.rmtree(out / part, ignore_errors=True)
    return ""


def perform_all(jobs: dict[Path, list[str]], processes: int, test: bool) -> list[str]:
    """Runs each folder's flags unless it is done, `processes` at a time. Returns what went wrong."""
    todo = {out: flags for out, flags in jobs.items() if not (out / "done.json").exists()}
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} done before", flush=True)
    failed, start = [], time.time()
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(perform, flags, out, test): out for out, flags in todo.items()}
        for count, future in enumerate(as_completed(pending), 1):
            error = future.result()
            failed += [f"{pending[future].name}: {error}"] if error else []
            minutes = (time.time() - start) / 60
            print(f"{count}/{len(todo)} after {minutes:.1f} min: {pending[future].name} {error}", flush=True)
    return failed


# ---- From run directories to one small file ------------------------------------------------------------------


def rounded(value):
    return round(value, 4) if isinstance(value, float) else value


def record(out: Path) -> dict:
    """What the tables and figures want of a finished run."""
    read = lambda name: json.loads((out / name).read_text())  # noqa: E731
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    train, evals = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    commit, changed, _ = read("config.json")["commit"].partition("+")
    result = {"commit": commit[:7] + changed, **read("done.json")}
    result["seconds_per_batch"] = round(float(np.median([sum(row["seconds"].values()) for row in train])), 3)
    if (out / "evaluation.json").exists():
        for name, found in read("evaluation.json").items():
            kept = {key: rounded(found[key]) for key in ("avg", "low", "high")}
            result[name] = kept | {key: rounded(v["value"]) for key, v in found.items() if key.startswith("pass@")}
    result["eval"] = {"step": [row["step"] for row in evals], "avg": [rounded(row["avg"]) for row in evals],
                      "teacher": [rounded(row.get("teacher_avg")) for row in evals]}  # fmt: skip
    result["train"] = {key: [rounded(row.get(key)) for row in train] for key in SERIES}
    return result


def hardware() -> str:
    import torch

    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, one thread per run, torch {torch.__version__}"


def collect(folder: Path, results: Path, seeds: range) -> dict:
    """results/study.json with the runs in `folder` in the place of older ones of the same name and seed."""
    path = results / "study.json"
    known = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    for name, row in ROWS.items():
        runs = known["rows"].get(name, {}).get("runs", {})
        for seed in seeds:
            out = folder / f"{folder_of(name)}-seed{seed}"
            if (out / "done.json").exists():
                runs[str(seed)] = record(out)
                known["hardware"] = hardware()
        if runs:
            command = f"python vpd.py {' '.join(flags_of(name))} --seed N --out DIR"
            known["rows"][name] = {"label": row.label, "command": command, "runs": runs}
    known["rows"] = {name: known["rows"][name] for name in ROWS if name in known["rows"]}  # in the order above
    write(path, known)
    return known


def write(path: Path, content: dict) -> None:
    """JSON with a line for each run and series, whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    part = path.with_name("part-" + path.name)
    part.write_text(text + "\n")
    part.rename(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The study on the toy tasks.", allow_abbrev=False)
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose name starts with one of these")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="of the run directories")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--tune", action="store_true", help="the settings tried, seed 0, validation problems")
    parser.add_argument("--tables", action="store_true", help="no runs: the tables from results/study.json")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    folder, failed = args.folder.resolve(), []
    chosen = lambda name: any(name.startswith(start) for start in args.only)  # noqa: E731
    if args.tune:
        jobs = {}
        for name, settings in GRID.items():
            for flags in settings if chosen(name) else ():
                subset, method = name.split(" ")[0].split("/")
                steps = f" --steps {TUNING_STEPS[subset]}" if subset in TUNING_STEPS else ""
                flags = f"--task toy --subset {subset} --method {method} {flags}{steps} --seed 0"
                jobs[folder / ("tune-" + folder_of(" ".join(flags.replace("--", "").split()[2:])))] = flags.split()
        failed = perform_all(jobs, args.jobs, test=False)
        tried = {}
        for out, flags in jobs.items():
            if (out / "done.json").exists():
                found = record(out)
                tried[" ".join(flags)] = dict(zip(map(str, found["eval"]["step"]), found["eval"]["avg"]))
        path = args.results / "tuning.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        write(path, known | tried)
    elif not args.tables:
        # Seed by seed, so that a study that is stopped has all rows with fewer seeds.
        jobs = {
            folder / f"{folder_of(name)}-seed{seed}": [*flags_of(name), "--seed", str(seed)]
            for seed in range(1, args.seeds + 1)
            for name in ROWS
            if chosen(name)
        }
        failed = perform_all(jobs, args.jobs, test=True)
        collect(folder, args.results, range(1, args.seeds + 1))
    for line in failed:
        print(f"study.py: {line}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
