"""The evidence on the toy tasks: every run behind the tables of study/results/README.md, over seeds, on a CPU.

    bash run.sh study                    all runs that are not in runs/study yet, two at a time; then the tables
    bash run.sh study --only trace-cold  rows whose name starts like this
    bash run.sh study --tune             what was tried before: validation problems, seed 0, which is not reported
    bash run.sh study --tables           the tables again, from study/results/study.json

A run is `python vpd.py FLAGS --seed N --out DIR`, then `python evaluate.py --run DIR`; here many of them share a process,
which changes nothing but the time. A run that was stopped starts again, one that is finished stays.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from harness import command
from study.figures import load

HERE = Path(__file__).parents[1]
README = HERE / "README.md"
BEYOND = """Verdicts go by Welch's 95% interval over seeds, dozens of them, uncorrected: one in twenty may be chance. It says little where
some runs collapse and others do not; there see the exact rank test, and the seeds. Not testable here: every figure of real models
(Tables 1 to 3), mathematics (Fig. 4), memory, and the time that an E-step costs on a GPU. A verdict is about these tasks at these
settings."""
VERDICTS = ("yes", "no, the reverse", "not decided")
MARKS = ("<!-- written by study.py: begin -->", "<!-- written by study.py: end -->")
SUMMARY = ("<!-- written by study.py: summary -->", "<!-- written by study.py: end of summary -->")
INTRODUCTION = """# The study on the toy tasks

Written by `bash run.sh study`. Every run starts from a model in `tasks/toy_models/` and is evaluated with its last weights on 64
(code: 70) test problems, 4 samples each, at temperature 1. avg@4 has a 95% t interval over seeds; it says nothing about other
problems, models or tasks, and knows nothing of a pass rate's ends at 0 and 1. margin: mean of the first and of the last five
batches that have one (Fig. 1). teacher: pass rate of the teacher on fixed failures of the base model, before and after.
s/batch: seconds, two runs at a time on two busy cores. Settings are those of the presets in `settings.py`, which were chosen on
validation problems and seed 0 (last section: ten settings a method on trace, at 40 batches of an earlier commit; six on code,
five on choice, three on trace-often; none on trace-rare, trace-cold and the longer runs), and the flags of the row. DistIL's two
normalisers share its settings, and its local term alone had as many of its own. On code-judge GRPO and OVD with either pi_old
were tuned, six settings each (sg pi runs with those that were best for OVD; its own best was .02 better); VPD and SDPO have
code's. Other variants keep the settings that were chosen for the method itself, which is to its advantage.
"""


class Row(NamedTuple):
    """One line of a table: `label`, and the flags that its runs differ by from the preset of the subset and method."""

    label: str
    flags: str


LABELS = {"vpd": "VPD", "sdpo": "SDPO", "grpo": "GRPO", "joint": "SDPO+RL joint", "reshape": "SDPO+RL reshape",
          "reweight": "SDPO+RL reweight", "distil": "DistIL", "ovd": "OVD"}  # fmt: skip


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
    **methods("code", "vpd sdpo grpo joint reshape reweight distil"),
    **methods("trace", "vpd sdpo grpo distil"),
    **methods("trace-cold", "vpd sdpo grpo"),
    **variants("trace", "vpd", {"F=1": "--e_step_every 1", "F=10": "--e_step_every 10", "fixed prior": "--prior fixed"}),
    **methods("trace-rare", "vpd sdpo grpo"),
    **methods("trace-often", "vpd sdpo grpo"),
    **methods("choice", "vpd sdpo grpo"),
    **variants("choice", "vpd", {"critique": "--feedback critique --lr 3e-4 --e_lr 2.5e-4 --e_step_every 1"}),
    **variants("choice", "sdpo", {"critique": "--feedback critique --lr 1e-3 --divergence kl_student_teacher"}),
    **variants("trace", "vpd", {
        "EMA teacher": "--teacher ema",
        "all passed": "--passed_text passed",
        "e_groups all": "--e_groups all",
        "KL(student‖teacher)": "--divergence kl_student_teacher",
        "KL(teacher‖student)": "--divergence kl_teacher_student",
        "sibling": "--feedback sibling",
    }),
    # With one update per batch SDPO's token weights are 1, so this is VPD's loop without banner 4.
    **{f"{subset}/vpd no E-step": Row("VPD, no E-step", f"--subset {subset} --method sdpo --teacher live --divergence js --lr {lr}")
       for subset, lr in (("code", "6e-4"), ("trace", "1e-3"), ("trace-rare", "1e-3"), ("trace-often", "1e-3"))},
    **variants("trace", "sdpo", {"live teacher": "--teacher live", "sibling": "--feedback sibling"}),
    **methods("trace-long", "vpd sdpo grpo", "--steps 60"),
    **variants("code", "distil", {
        "local term alone": "--no_future",
        "constant norm": "--distil_norm constant",
    }),
    **variants("trace", "distil", {
        "local term alone": "--no_future --lr 4e-3",
        "constant norm": "--distil_norm constant",
        "black box": "--expert samples",
    }),
    **methods("code-judge", "vpd sdpo grpo ovd"),
    **variants("code-judge", "ovd", {
        "sg pi": "--ovd_ratio one",
        "failures left out": "--no_ovd_failed",
        "sg pi, failures left out": "--ovd_ratio one --no_ovd_failed",
        "sg pi, all rejected": "--ovd_ratio one --ovd_threshold 10",
    }),
}  # fmt: skip

# What was tried for each method, with the same number of settings for all methods of a subset. trace was tuned earlier, ten
# settings a method; those figures stand in study/results/tuning.json as well.
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
    **{f"{subset}/distil{name}": [f"--distil_norm {norm} --lr {lr}{flag}" for norm, rates in tried.items() for lr in rates.split()]
       for subset, tried in (
           ("code", {"length": "1e-3 2e-3 4e-3", "constant": "1e-3 2e-3 4e-3"}),
           ("trace", {"length": "3e-4 5e-4 1e-3 2e-3 4e-3", "constant": "3e-4 5e-4 1e-3 2e-3 4e-3"}))
       for name, flag in (("", ""), (" local term alone", " --no_future"))},
    **{f"code-judge/{name}": [*(f"--lr {lr} {STD}{flag}" for lr in ("1e-3", "2e-3", "3e-3", "4e-3")),
                              *(f"--lr {lr} {STD} False{flag}" for lr in ("2e-3", "4e-3"))]
       for name, flag in (("grpo", ""), ("ovd", ""), ("ovd sg pi", " --ovd_ratio one"))},
}  # fmt: skip


class Claim(NamedTuple):
    """`says`, and what would show it here: the mean of `quantity` over the seeds of row `above` exceeds that of row
    `below` ("": zero; "base": the weights that the runs start from)."""

    says: str
    quantity: str
    above: str
    below: str


CLAIMS = [
    *(Claim("VPD beats GRPO (Tables 1, 2)", "avg", f"{s}/vpd", f"{s}/grpo")
      for s in ("code", "trace", "trace-often", "choice")),
    *(Claim("VPD beats SDPO (Tables 1, 2)", "avg", f"{s}/vpd", f"{s}/sdpo")
      for s in ("code", "trace", "trace-rare", "trace-often", "choice")),
    *(Claim("SDPO beats GRPO where the environment gives text (Table 1)", "avg", f"{s}/sdpo", f"{s}/grpo")
      for s in ("code", "trace")),
    *(Claim(f"VPD beats the hybrid {hybrid} (Tables 1, 2)", "avg", "code/vpd", f"code/{hybrid}")
      for hybrid in ("joint", "reshape", "reweight")),
    Claim("VPD's reward margin rises (Fig. 1)", "margin change", "trace/vpd", ""),
    Claim("SDPO's reward margin falls (Fig. 1)", "margin fall", "trace/sdpo", ""),
    Claim("SDPO gets worse late in training (Fig. 2)", "late loss", "trace-long/sdpo", ""),
    Claim("VPD does not: it gains where SDPO gets worse (Fig. 2)", "late gain", "trace-long/vpd", "trace-long/sdpo"),
    *(Claim("VPD's teacher becomes a better reader than SDPO's", "teacher change", f"{s}/vpd", f"{s}/sdpo")
      for s in ("code", "trace", "trace-rare", "trace-often")),
    *(Claim("... and the E-step is why", "teacher change", f"{s}/vpd", f"{s}/vpd no E-step")
      for s in ("code", "trace", "trace-rare", "trace-often")),
    Claim("VPD beats SDPO, both with an EMA teacher", "avg", "trace/vpd EMA teacher", "trace/sdpo"),
    Claim("VPD beats SDPO, both live, both with KL(student‖teacher)", "avg", "trace/vpd KL(student‖teacher)",
          "trace/sdpo live teacher"),
    *(Claim("the E-step adds to the M-step with a live teacher", "avg", f"{s}/vpd", f"{s}/vpd no E-step")
      for s in ("code", "trace", "trace-rare", "trace-often")),
    Claim("with critiques VPD beats SDPO (Table 3)", "avg", "choice/vpd critique", "choice/sdpo critique"),
    Claim("critiques do as well as siblings (Table 3)", "avg", "choice/vpd critique", "choice/vpd"),
    Claim("VPD beats GRPO where the base almost never succeeds (Sec. 1)", "avg", "trace-rare/vpd", "trace-rare/grpo"),
    Claim("... and so does feedback without an E-step", "avg", "trace-rare/vpd no E-step", "trace-rare/grpo"),
    Claim("cold start: SDPO falls below the base (Table D.3)", "avg", "base", "trace-cold/sdpo"),
    Claim("cold start: VPD beats SDPO (Table D.3)", "avg", "trace-cold/vpd", "trace-cold/sdpo"),
    Claim("cold start: GRPO beats VPD (Table D.3)", "avg", "trace-cold/grpo", "trace-cold/vpd"),
    Claim("F = 5 beats F = 1 at F = 5's learning rates (Table 4)", "avg", "trace/vpd", "trace/vpd F=1"),
    Claim("F = 5 beats F = 10 (Table 4)", "avg", "trace/vpd", "trace/vpd F=10"),
    Claim("the dynamic prior beats the fixed one (Table 5)", "avg", "trace/vpd", "trace/vpd fixed prior"),
]  # fmt: skip
# Of DistIL's and OVD's papers.
NEIGHBOURS = [
    *(Claim(f"DistIL beats {LABELS[other]}", quantity, f"{s}/distil", f"{s}/{other}")
      for other in ("sdpo", "grpo") for quantity in ("avg", "pass@4") for s in ("code", "trace")),
    *(Claim("DistIL's charge for later tokens helps", quantity, f"{s}/distil", f"{s}/distil local term alone")
      for quantity in ("avg", "pass@4") for s in ("code", "trace")),
    *(Claim("OVD beats GRPO", quantity, "code-judge/ovd", "code-judge/grpo") for quantity in ("avg", "pass@4")),
    *(Claim("... with pi_old = sg pi on demonstrations", quantity, "code-judge/ovd sg pi", "code-judge/grpo")
      for quantity in ("avg", "pass@4")),
    Claim("OVD's judge helps: against rejecting all, both with sg pi", "avg", "code-judge/ovd sg pi",
          "code-judge/ovd sg pi, all rejected"),
]  # fmt: skip
# Where a paper is silent, or names the other choice.
CHOICES = [
    Claim('a success borrows a failure\'s text; the other: "all passed"', "avg", "trace/vpd", "trace/vpd all passed"),
    Claim("the same, the teacher's pass rate", "teacher change", "trace/vpd", "trace/vpd all passed"),
    Claim("E-steps on groups with both outcomes; the other: all", "avg", "trace/vpd", "trace/vpd e_groups all"),
    Claim("the M-step's teacher is live; the other: EMA", "avg", "trace/vpd", "trace/vpd EMA teacher"),
    Claim("SDPO's teacher is an EMA; the other: live", "avg", "trace/sdpo", "trace/sdpo live teacher"),
    Claim("JS; the other: KL(student‖teacher)", "avg", "trace/vpd", "trace/vpd KL(student‖teacher)"),
    Claim("JS; the other: KL(teacher‖student)", "avg", "trace/vpd", "trace/vpd KL(teacher‖student)"),
    Claim("the environment's text; the other: siblings", "avg", "trace/vpd", "trace/vpd sibling"),
    Claim("the same for SDPO", "avg", "trace/sdpo", "trace/sdpo sibling"),
    *(
        Claim("DistIL's length normaliser; the other: constant", "avg", f"{s}/distil", f"{s}/distil constant norm")
        for s in ("code", "trace")
    ),
    Claim("the expert's probabilities; the other: a token of its", "avg", "trace/distil", "trace/distil black box"),
    Claim(
        "OVD's pi_old of a demonstration is the teacher's; the other: sg pi",
        "avg",
        "code-judge/ovd",
        "code-judge/ovd sg pi",
    ),
    *(
        Claim(
            f"a demonstration that fails counts{more}; the other: the rollout stays",
            "avg",
            f"code-judge/ovd{row}",
            f"code-judge/ovd{row}{',' if row else ''} failures left out",
        )
        for more, row in (("", ""), (", with sg pi", " sg pi"))
    ),
]

SERIES = ("reward", "margin", "entropy", "divergence", "with_context", "response_length", "shift")


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
    start, argv, text = time.perf_counter(), sys.argv, out.with_name(f"{out.name}.txt")
    with (
        text.open("w") as printed,
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
            return f"{type(error).__name__}: {error} (see {text})"
        finally:
            sys.argv = argv
    # The weights are not needed again, and a study has hundreds of them.
    for part in ("model", "best", "checkpoints"):
        shutil.rmtree(out / part, ignore_errors=True)
    return ""


def finished(out: Path, flags: list[str]) -> bool:
    """Is the run there, with the settings that these flags mean now?"""
    from harness import settings

    if not (out / "done.json").exists():
        return False
    config, cfg = json.loads((out / "config.json").read_text()), settings.parse(flags)
    wanted = vars(cfg) | {"teacher": cfg.reader()}  # what the run directory records
    return all(config.get(key) == value for key, value in wanted.items() if key not in settings.NOT_OF_THE_RUN)


def perform_all(jobs: dict[Path, list[str]], processes: int, test: bool) -> list[str]:
    """Runs each folder's flags unless it is finished, `processes` at a time. Returns what went wrong."""
    todo = {out: flags for out, flags in jobs.items() if not finished(out, flags)}
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} done before", flush=True)
    failed, start = [], time.time()
    os.environ["OMP_NUM_THREADS"] = "1"

    def stop(*_):  # not by way of SIGINT, which a shell's background jobs ignore
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    try:
        pending = {pool.submit(perform, flags, out, test): out for out, flags in todo.items()}
        for count, future in enumerate(as_completed(pending), 1):
            try:
                error = future.result()
            except BrokenProcessPool as broken:  # out of memory, say
                error = str(broken)
            failed += [f"{pending[future].name}: {error}"] if error else []
            minutes = (time.time() - start) / 60
            print(f"{count}/{len(todo)} after {minutes:.1f} min: {pending[future].name} {error}", flush=True)
        pool.shutdown()
    except KeyboardInterrupt:
        for child in active_children():  # at once: what is unfinished starts again next time
            child.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        print("study.py: stopped; finished runs stay", file=sys.stderr)
        sys.exit(130)
    return failed


# ---- From run directories to one small file ------------------------------------------------------------------


def rounded(value):
    """Three significant digits, a pass rate's four."""
    if not isinstance(value, float):
        return value
    return round(value, 4) if 0 <= value <= 1 else float(f"{value:.3g}")


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

    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else []
    return f"{(names or [platform.machine()])[0]}, one thread per run, torch {torch.__version__}"


def stored(path: Path, nothing: dict) -> dict:
    """The object in a JSON file, or `nothing` where there is no file. Raises ValueError with one line for what is none."""
    return load(path) if path.exists() else nothing


def collect(folder: Path, results: Path, seeds: range) -> dict:
    """study/results/study.json with the runs in `folder` in the place of older ones of the same name and seed."""
    path = results / "study.json"
    known = stored(path, {"rows": {}})
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
    """JSON with a line for each series, whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\n[^\[\]{}\"]*\]", lambda found: "".join(found[0].split()), text)
    command.write(path, text + "\n")


# ---- Tables --------------------------------------------------------------------------------------------------


def ends(values: list, width: int = 5) -> tuple[float, float]:
    """Mean of the first and of the last `width` entries that are there; nan where there are fewer than twice as many."""
    found = [v for v in values if v is not None]
    if len(found) < 2 * width:
        return np.nan, np.nan
    return float(np.mean(found[:width])), float(np.mean(found[-width:]))


def quantity(name: str, run: dict) -> float:
    """A number of one run, nan where it has none. Late means the second half of the batches."""
    if name == "margin change" or name == "margin fall":
        first, last = ends(run["train"]["margin"])
        return last - first if name == "margin change" else first - last
    if name == "teacher change":
        known = [v for v in run["eval"]["teacher"] if v is not None]
        return known[-1] - known[0] if len(known) > 1 else np.nan
    if name == "late gain" or name == "late loss":
        middle = run["eval"]["avg"][run["eval"]["step"].index(run["eval"]["step"][-1] // 2)]
        return (run["eval"]["avg"][-1] - middle) * (1 if name == "late gain" else -1)
    return run["after"][name]


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and its 95% t interval over seeds; the interval is nan for fewer than two."""
    values = np.array([v for v in values if not np.isnan(v)])
    if len(values) < 2:
        return float(values.mean()) if len(values) else np.nan, np.nan, np.nan
    found = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return float(values.mean()), float(found.low), float(found.high)


def difference(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Difference of means with Welch's 95% interval for unequal spread. Rows share the order of problems and the first
    rollouts of a seed, which is not made use of: after a few batches runs go apart."""
    if np.ptp(above) == 0 and np.ptp(below) == 0:  # no spread at all, nothing to estimate an interval from
        return (float(np.mean(above) - np.mean(below)),) * 3
    found = stats.ttest_ind(above, below, equal_var=False).confidence_interval(0.95)
    return float(np.mean(above) - np.mean(below)), float(found.low), float(found.high)


def runs_of(rows: dict, name: str) -> list[dict]:
    """The runs of a row, one a seed; none of a row that is not there."""
    return list(rows.get(name, {}).get("runs", {}).values())


def with_interval(mean: float, low: float, high: float) -> str:
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def verdict(claim: Claim, rows: dict) -> tuple[str, str] | None:
    """The figures and the verdict, or None while a row has fewer than two seeds."""
    other = claim.below if claim.above == "base" else claim.above
    values = {
        name: [quantity(claim.quantity, run) for run in runs_of(rows, name)]
        for name in {claim.above, claim.below} - {"base", ""}
    }
    values = {name: [v for v in found if not np.isnan(v)] for name, found in values.items()}
    if any(len(found) < 2 for found in values.values()):
        return None
    if claim.below == "" or claim.above == "base":
        base = runs_of(rows, other)[0]["before"]["avg"] if claim.above == "base" else 0.0
        mean, low, high = interval(values[other])
        text = with_interval(mean, low, high) + (f", base {base:.3f}" if claim.above == "base" else "")
        low, high = (base - high, base - low) if claim.above == "base" else (low, high)
    else:
        mean, low, high = difference(values[claim.above], values[claim.below])
        a, b = (float(np.mean(values[name])) for name in (claim.above, claim.below))
        rank = stats.mannwhitneyu(values[claim.above], values[claim.below], method="exact").pvalue
        text = f"{a:.3f} against {b:.3f}: {mean:+.3f} [{low:+.3f}, {high:+.3f}], rank test p {rank:.3f}"
    return text, VERDICTS[0] if low > 0 else VERDICTS[1] if high < 0 else VERDICTS[2]


def table(subset: str, rows: dict) -> list[str]:
    """The text table of a subset's rows, and under it the command of each."""
    mine = {name: row for name, row in rows.items() if name.split("/")[0] == subset}
    if not mine:
        return []
    head = f"{'':34s} {'seeds':>5s} {'avg@4 [95% over seeds]':24s} {'each seed':31s} {'pass@4':6s}  {'margin':12s}  {'teacher':12s} s/batch"
    base = next(iter(next(iter(mine.values()))["runs"].values()))["before"]
    lines = [head, f"{'base model':34s} {'':5s} {base['avg']:.3f} {'':18s} {'':31s} {base['pass@4']:.3f}"]
    arrow = lambda pair: "" if np.isnan(pair).any() else f"{pair[0]:.2f} to {pair[1]:.2f}"  # noqa: E731
    for row in mine.values():
        runs = list(row["runs"].values())
        mean, low, high = interval([run["after"]["avg"] for run in runs])
        over_seeds = with_interval(mean, low, high) if len(runs) > 1 else f"{mean:.3f}"
        each = " ".join(f"{run['after']['avg']:.3f}" for run in runs)
        margin = np.mean([ends(run["train"]["margin"]) for run in runs], 0)
        teacher = [(run["eval"]["teacher"][0], run["eval"]["teacher"][-1]) for run in runs]
        teacher = (np.nan, np.nan) if any(None in pair for pair in teacher) else np.mean(teacher, 0)
        pass_4 = np.mean([run["after"]["pass@4"] for run in runs])
        seconds = np.median([run["seconds_per_batch"] for run in runs])
        lines.append(
            f"{row['label']:34s} {len(runs):5d} {over_seeds:24s} {each:31s} {pass_4:.3f}  "
            f"{arrow(margin):12s}  {arrow(teacher):12s} {seconds:.2f}"
        )
    commands = [f"{row['label']}: {row['command']}" for row in mine.values()]
    return ["```", *lines, "```", "", "```", *commands, "```", ""]


def collapses(rows: dict) -> list[str]:
    """Runs whose last validation pass rate lies 0.2 or more below the best one of the run."""
    lines = ["| row | seed | validation | teacher | margin, last batch with one | response length | with context |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        for seed, run in row["runs"].items():
            avg, train = run["eval"]["avg"], run["train"]
            if avg[-1] > max(avg) - 0.2 and not (avg[-1] == 0 < avg[0]):
                continue
            to = lambda values: " ".join("" if v is None else f"{v:.2f}" for v in values)  # noqa: E731
            margins = [v for v in train["margin"] if v is not None]
            margin = f"{margins[-1]:.2f}, at most {max(margins):.2f}" if margins else ""
            spans = [f"{train[key][0]:.2f} to {train[key][-1]:.2f}" for key in ("response_length", "with_context")]
            lines.append(
                f"| {name} | {seed} | {to(avg)} | {to(run['eval']['teacher'])} | {margin} | {' | '.join(spans)} |"
            )
    return [*lines, ""]


def claims_table(claims: list[Claim], rows: dict, heading: str) -> list[str]:
    lines = [f"| {heading} | where | what was measured | so here |", "|---|---|---|---|"]
    names = {"avg": "", "margin change": "margin, last five batches minus first five", "late gain": "validation, second half",
             "late loss": "validation, second half, loss", "margin fall": "margin, first five batches minus last five",
             "teacher change": "teacher on base failures, gain", "pass@4": "pass@4"}  # fmt: skip
    for claim in claims:
        found = verdict(claim, rows)
        if found:
            text, so = found
            where = (claim.below if claim.above == "base" else claim.above).split("/")[0]
            what = f"{names[claim.quantity]}: " if names[claim.quantity] else ""
            lines.append(f"| {claim.says} | {where} | {what}{text} | {so} |")
    return [*lines, ""]


def verdicts_table(claims: list[Claim], rows: dict, heading: str) -> list[str]:
    """A line a claim: the subsets on which it holds, on which its reverse does, and on which neither is told."""
    said: dict[str, dict[str, list[str]]] = {}
    for claim in claims:
        if found := verdict(claim, rows):
            where = (claim.below if claim.above == "base" else claim.above).split("/")[0]
            what = " (pass@4)" if claim.quantity == "pass@4" else ""
            said.setdefault(claim.says, {}).setdefault(found[1], []).append(where + what)
    lines = [f"| {heading} | yes | no, the reverse | not decided |", "|---|---|---|---|"]
    for says, places in said.items():
        lines.append(f"| {says} | {' | '.join(', '.join(places.get(so, [])) for so in VERDICTS)} |")
    return [*lines, ""]


def tuning_list(known: dict) -> list[str]:
    """What was tried for each row: flags and avg@4 on validation problems after 10, 20, ... batches, the best in bold."""
    by_name: dict[str, list[str]] = {}
    last = lambda entry: entry["avg"][max(entry["avg"], key=int)]  # noqa: E731
    for flags, entry in known.items():
        best = last(entry) == max(last(e) for e in known.values() if e["name"] == entry["name"])
        kept = [part.strip() for part in (" " + flags).split(" --")[1:]]
        kept = [part for part in kept if part.split()[0] not in ("task", "subset", "method", "seed", "steps")]
        figures = " / ".join(f"{value:.2f}" for step, value in entry["avg"].items() if step != "0")
        text = f"{' '.join(kept)}: {figures}"
        by_name.setdefault(entry["name"], []).append(f"**{text}**" if best else text)
    lines = [
        "| row | avg@4 on validation problems, seed 0, after 10 / 20 / 30 batches (trace: 20 / 40), the best at the end in bold |",
        "|---|---|",
    ]
    return [*lines, *(f"| {name} | {'; '.join(tried)} |" for name, tried in by_name.items()), ""]


def summary(rows: dict) -> list[str]:
    """A small table of all methods on the two main tasks, and on OVD's. What is not measured is empty."""
    subsets = ("trace", "code", "code-judge")
    lines = [f"| | METHOD | {' | '.join(f'`{subset}`' for subset in subsets)} |", "|---|---|---|---|---|"]
    base = [runs_of(rows, f"{subset}/grpo") for subset in subsets]
    cells = [f"{runs[0]['before']['avg']:.3f}" if runs else "" for runs in base]
    lines.append(f"| base model | | {' | '.join(cells)} |")
    for method, label in LABELS.items():
        found = [runs_of(rows, f"{subset}/{method}") for subset in subsets]
        cells = [with_interval(*interval([run["after"]["avg"] for run in runs])) if runs else "" for runs in found]
        lines.append(f"| {label} | `{method}` | {' | '.join(cells)} |")
    return lines


def replaced(text: str, marks: tuple[str, str], lines: list[str]) -> str:
    """The text with these lines between its two marks, if it has them."""
    if marks[0] not in text:
        return text
    before, _, rest = text.partition(marks[0])
    return "\n".join([before + marks[0], *lines, marks[1]]) + rest.partition(marks[1])[2]


def report(results: Path, readme: Path) -> None:
    """Writes study/results/README.md, and what stands in the README between its marks, from study.json and tuning.json."""
    for path, text in texts(results, readme).items():
        command.write(path, text)


def texts(results: Path, readme: Path) -> dict[Path, str]:
    """What `report` writes, by file; nothing where there are no runs. Raises ValueError with one line for a study.json or
    tuning.json that is none."""
    known, tuned = stored(results / "study.json", {"rows": {}}), stored(results / "tuning.json", {})
    try:
        return _texts(known, tuned, results, readme)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{results}/study.json or tuning.json is not that of a study: {error!r}") from None


def _texts(known: dict, tuned: dict, results: Path, readme: Path) -> dict[Path, str]:
    rows = known["rows"]
    runs = [run for row in rows.values() for run in row["runs"].values()]
    if runs:
        commits = ", ".join(sorted({run["commit"] for run in runs}))
        origin = f"{len(runs)} runs, {sum(run['seconds'] for run in runs) / 3600:.1f} CPU hours; {known['hardware']}; commit {commits}."
        claims = claims_table(CLAIMS, rows, "the paper's claim") + claims_table(
            NEIGHBOURS, rows, "DistIL's or OVD's claim"
        )
        verdicts = verdicts_table(CLAIMS, rows, "the paper's claim") + verdicts_table(
            NEIGHBOURS, rows, "DistIL's or OVD's claim"
        )
        text = replaced(readme.read_text(), MARKS, [origin, "", *verdicts, BEYOND])
        lines = [INTRODUCTION, origin, ""]
        for subset in dict.fromkeys(name.split("/")[0] for name in rows):
            lines += [f"## {subset}", "", *table(subset, rows)]
        lines += ["## The paper's claims", "", *claims, BEYOND, "", "## Choices of ours", "",
                  *claims_table(CHOICES, rows, "the first is better than the other")]  # fmt: skip
        lines += [
            "## Runs that collapsed: 0.2 or more below their own best validation pass rate, or at 0",
            "",
            *collapses(rows),
        ]
        lines += ["## What was tried before", "", *tuning_list(tuned)]
        own = "\n".join(lines).rstrip() + "\n"
        return {readme: replaced(text, SUMMARY, summary(rows)), results / "README.md": own}
    return {}


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser("study.py", "The study on the toy tasks.")
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose name starts with one of these")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="of the run directories")
    parser.add_argument("--results", type=Path, default=Path("study/results"))
    parser.add_argument("--tune", action="store_true", help="the settings tried, seed 0, validation problems")
    parser.add_argument("--tables", action="store_true", help="no runs: the tables from study/results/study.json")
    args = parser.parse_args(argv)
    chosen = lambda name: any(name.startswith(start) for start in args.only)  # noqa: E731
    if not any(map(chosen, GRID if args.tune else ROWS)):
        parser.error(
            f"--only {' '.join(args.only)}: no row starts like this; there are {', '.join(GRID if args.tune else ROWS)}"
        )
    if args.tune and args.tables:
        parser.error("--tune makes runs and --tables none: give one of them")
    if args.seeds < 1 or args.jobs < 1 or not args.results.is_dir():
        parser.error("--seeds and --jobs must be at least 1, and --results a folder that is there")
    try:
        # What is there already has to be readable before hours are spent on more.
        if not texts(args.results, README) and args.tables:
            raise ValueError(f"--tables: {args.results}/study.json has no runs to make tables of")
        args.folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    folder, failed = args.folder.resolve(), []
    if args.tune:
        jobs, names = {}, {}
        for name, settings in GRID.items():
            for flags in settings if chosen(name) else ():
                subset, method = name.split(" ")[0].split("/")
                flags = f"--task toy --subset {subset} --method {method} {flags} --seed 0"
                out = folder / ("tune-" + folder_of(" ".join(flags.replace("--", "").split()[2:])))
                jobs[out], names[out] = flags.split(), name
        failed = perform_all(jobs, args.jobs, test=False)
        path = args.results / "tuning.json"
        known = stored(path, {})
        for out, flags in jobs.items():
            if (out / "done.json").exists():
                found = record(out)
                avg = dict(zip(map(str, found["eval"]["step"]), found["eval"]["avg"]))
                known[" ".join(flags)] = {"name": names[out], "commit": found["commit"], "avg": avg}
        write(path, known)
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
    report(args.results, README)
    for line in failed:
        print(f"study.py: {line}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    command.run(main)
