"""The study: its rows, quantities and verdicts by hand, the tables, and runs as commands."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

import evaluate
import vpd
from study import study
from study.study import Claim, load

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "study" / "results"


# ---- Rows, claims, what was tuned --------------------------------------------------------------------------


def test_every_row_tries_sixteen_different_settings_that_are_valid():
    for row, of in study.TRIED.items():
        tried = [vpd.settings([*study.task_of(row), *flags.split()]) for flags in of]
        for cfg in tried:
            vpd.check(cfg)
            cfg.teacher = cfg.reader()
        assert len(set(map(repr, tried))) == len(of) == 16, row


def test_reported_rows_use_the_best_settings_and_are_valid():
    tuned = {row: {flags: {"101": {"avg": 0.5}, "102": {"avg": float(k == 3)}} for k, flags in enumerate(of)}
             for row, of in study.TRIED.items()}  # fmt: skip
    rows = study.reported(tuned)
    assert list(rows) == list(study.REPORTED)
    for row, flags in rows.items():
        cfg = vpd.settings(flags)
        vpd.check(cfg)
        assert row.replace("-120", "").startswith(f"{cfg.subset}/{cfg.method}")
        if row in study.TRIED:
            assert flags == study.task_of(row) + study.TRIED[row][3].split()
    with_e, without = (vpd.settings(rows[f"trace-dialect/{name}"]) for name in ("vpd F=5", "sdpo no E-step"))
    assert (with_e.lr, with_e.divergence, with_e.reader()) == (without.lr, without.divergence, without.reader())
    tuned["trace/vpd"]["--lr 9"] = {"101": {"avg": 9.0}, "102": {"avg": 9.0}}  # no longer listed
    assert study.reported(tuned) == rows
    del tuned["trace/vpd"][study.TRIED["trace/vpd"][5]]["102"]  # one run is missing
    assert not any(name in study.reported(tuned) for name in ("trace/vpd", "trace-dialect/vpd F=5"))


def test_claims_name_reported_rows_and_known_quantities():
    for claim in sum(study.CLAIMS.values(), []):
        assert {claim.above, claim.below} - {"0"} <= study.REPORTED.keys() and claim.quantity in study.QUANTITIES


# ---- Quantities and verdicts by hand -----------------------------------------------------------------------


def made(avg=0.5, margin=(), teacher=(0.25, 0.25, 0.5), evals=(0.1, 0.3, 0.2), **train):
    """A run of study.json."""
    return {
        "commit": "abc", "hardware": "a machine", "seconds": 36.0, "seconds_per_batch": 2.0, "before": {"avg": 0.1},
        "after": {"avg": avg}, "train": {"margin": margin} | train,
        "eval": {"step": list(range(0, 10 * len(evals), 10)), "avg": evals, "teacher": teacher},
    }  # fmt: skip


def rows_of(**averages):
    runs = {name: {str(i): made(avg) for i, avg in enumerate(values, 1)} for name, values in averages.items()}
    return {f"trace/{name}": {"label": study.LABELS[name], "command": f"python {name}", "runs": runs[name]} for name in runs}


def test_quantities_of_a_run():
    run = made(0.6, margin=[0.0, 0.1, None, 0.2, 0.3, 0.4, 1, 1, 1, 1, 6], teacher=[0.25, None, 0.5])
    first, last = (0.0 + 0.1 + 0.2 + 0.3 + 0.4) / 5, (1 + 1 + 1 + 1 + 6) / 5  # batches without a margin do not count
    expected = {"avg": 0.6, "margin rise": last - first, "margin fall": first - last, "teacher gain": 0.25}
    assert {name: study.quantity(name, run) for name in study.QUANTITIES} == pytest.approx(expected)
    assert np.isnan(study.quantity("margin rise", made(margin=[1.0] * 9)))  # first and last would overlap
    for teacher in ([None, None], [None, 0.5]):
        assert np.isnan(study.quantity("teacher gain", made(teacher=teacher)))
    ended = [((0.1, 0.5, 0.3), True), ((0.1, 0.5, 0.31), False), ((0.1, 0.15, 0.0), True), ((0.0, 0.0), False)]
    assert all(study.collapsed(made(evals=avg)) == fell for avg, fell in ended)


def test_claims_are_paired_by_seed_corrected_over_the_family_and_directed():
    vpd, grpo, sdpo, reshape = [0.5, 0.7, 0.6, np.nan], [0.4, 0.5, 0.6, 0.7], [0.9, 0.92, 0.88, 0.95], [0.1, 0.13, 0.1, 0.15]
    rows = rows_of(vpd=vpd, grpo=grpo, sdpo=sdpo, reshape=reshape)
    del rows["trace/grpo"]["runs"]["1"]  # with vpd's nan, seeds 2 and 3 are left
    pairs = (("vpd", "grpo"), ("sdpo", "reshape"), ("reshape", "sdpo"), ("grpo", "joint"))  # joint has no runs
    claims = [Claim(above, "avg", f"trace/{above}", f"trace/{below}") for above, below in pairs]
    small, large = stats.ttest_rel(sdpo, reshape).pvalue, stats.ttest_rel(vpd[1:3], grpo[1:3]).pvalue
    middle = stats.ttest_1samp(vpd[:3], 0).pvalue
    holm = [min(1, 2 * large), 5 * small, 5 * small, 3 * middle]  # of 5 claims; the second small p is not below the first
    found = study.judge([*claims, Claim("zero", "avg", "trace/vpd", "0")], rows)
    assert [says for says, *_ in found] == ["vpd", "sdpo", "reshape", "zero"]
    assert [float(text.split(", p ")[1]) for _, text, _ in found] == pytest.approx(holm, rel=1e-2)
    assert [verdict for *_, verdict in found] == ["undecided", "yes", "no, the opposite", "yes"]
    assert found[0][1].startswith("0.650 against 0.550: +0.100 [") and ", 2 pairs" in found[0][1]


# ---- Tables ------------------------------------------------------------------------------------------------


def test_the_report_by_hand(tmp_path, monkeypatch):
    """The test of the shipped tables sees the rest, and that all of it is between the marks."""
    rows = rows_of(vpd=[0.8, 0.82, 0.84], grpo=[0.2, 0.22, 0.25])
    rows["trace/vpd"]["runs"]["1"]["eval"]["avg"] = [0.1, 0.5, 0.3]
    run = {"commit": "def", "hardware": "another", "seconds": 36.0}
    tried = {"trace/vpd": {f"--lr {lr}": {"101": run | {"avg": avg}, "102": run | {"avg": avg}}
                           for lr, avg in (("1e-3", 0.4), ("2e-3", 0.6))}}  # fmt: skip
    (tmp_path / "study.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "tuning.json").write_text(json.dumps(tried))
    (tmp_path / "MAIN.md").write_text("\n".join(["above", *study.SUMMARY, "below", ""]))
    monkeypatch.setattr(study, "README", tmp_path / "MAIN.md")
    study.main(["--tables", "--results", str(tmp_path)])
    text, page = ((tmp_path / name).read_text() for name in ("MAIN.md", "README.md"))
    assert "| VPD | 0.820 [0.770, 0.870] |  |" in text and "| SDPO |  |  |" in text  # without runs
    assert page.startswith(study.MARKS[0]) and "10 runs, tuning included, two at a time; their durations add up to 0.1 h" in page
    assert "Hardware: a machine; another. Commits: abc; def." in page and "\npython vpd\n" in page
    assert "| VPD | 3 | 0.820 [0.770, 0.870] | 0.80 0.82 0.84 |  | 0.25 to 0.50 | 1 | 2.0 |" in page
    assert "<summary>trace/vpd: lr 2e-3: 0.60 0.60</summary>\n\n- lr 1e-3: 0.40 0.40\n\n</details>\n" in page
    assert "| VPD beats GRPO (Tables 1, 2) | 0.820 against 0.223: +0.597 [" in page


def test_the_shipped_tables_are_those_of_the_shipped_numbers(tmp_path, monkeypatch):
    for path in (RESULTS / "study.json", RESULTS / "tuning.json", RESULTS / "README.md", ROOT / "README.md"):
        (tmp_path / ("MAIN.md" if path.parent == ROOT else path.name)).write_text(path.read_text())
    monkeypatch.setattr(study, "README", tmp_path / "MAIN.md")
    study.main(["--tables", "--results", str(tmp_path)])
    assert (tmp_path / "MAIN.md").read_text() == (ROOT / "README.md").read_text()
    assert (tmp_path / "README.md").read_text() == (RESULTS / "README.md").read_text()
    now = study.reported(load(RESULTS / "tuning.json"))
    for name, row in load(RESULTS / "study.json")["rows"].items():
        assert row["command"] == f"python vpd.py {' '.join(now[name])} --seed N --out DIR"  # as it was run


# ---- Runs --------------------------------------------------------------------------------------------------

TINY = ["--task", "toy", "--subset", "choice", "--method", "vpd", "--steps", "2", "--eval_every", "1", "--prompts_per_batch", "2",
        "--minibatch_prompts", "2", "--e_minibatch_prompts", "2", "--group_size", "4", "--eval_samples", "1", "--teacher_probe", "2",
        "--seed", "3"]  # fmt: skip
LOG = [{"kind": "train", "step": 0, "seconds": {"rollout": 1.0, "sync": 0.5}, "reward": 0.123456, "margin": -12.3456},
       {"kind": "eval", "step": 1, "avg": 0.75}]  # fmt: skip


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Programs in place of training and evaluation. vpd.py writes the run directory of TINY at once and ends like a run without an
    update left to make, or fails if the flags have -1. Its pass rate is the seed. evaluate.py fails on the folder "full"."""
    cfg = vpd.settings(TINY)
    config = asdict(cfg) | {"teacher": cfg.reader(), "commit": "abcdefghij+ (changed)"}  # as a run records them
    (tmp_path / "evaluate.py").write_text("import sys; sys.exit('no space left' if sys.argv[2].endswith('full') else 0)")
    (tmp_path / "vpd.py").write_text(f"""
import json, pathlib, sys
if "-1" in sys.argv: sys.exit("first\\nvpd.py: error: --lr must be positive")
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(exist_ok="--overwrite" in sys.argv)
(out / "model").mkdir()
(out / "config.json").write_text({json.dumps(config)!r})
(out / "log.jsonl").write_text({chr(10).join(map(json.dumps, LOG))!r}.replace("0.75", sys.argv[sys.argv.index("--seed") + 1]))
(out / "evaluation.json").write_text("{{}}")
sys.exit(1)
""")
    monkeypatch.setattr(study, "HERE", tmp_path)
    return config


def test_a_run_trains_evaluates_and_deletes_its_weights(tmp_path, monkeypatch):
    """The two commands run in this process, which has imported what they need."""

    def started(line, stdout, **_):
        with redirect_stdout(stdout):
            {"vpd.py": vpd, "evaluate.py": evaluate}[line[1]].main(line[2:])
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(study, "subprocess", SimpleNamespace(Popen=started, STDOUT=None))
    study.perform(TINY, tmp_path / "run", test=True)
    found = study.record(tmp_path / "run", test=True)
    assert len(found["train"]["reward"]) == 2 and found["eval"]["step"] == [0, 1, 2]
    assert found["before"].keys() == found["after"].keys() == {"avg", "low", "high"}
    assert "done: " in (tmp_path / "run.txt").read_text() and not (tmp_path / "run" / "model").exists()


def test_finished_runs_are_kept_interrupted_ones_start_again_and_failures_are_named(quick, tmp_path):
    finished, stopped, changed, wrong = (tmp_path / name for name in ("finished", "stopped", "changed", "wrong"))
    for folder, seed in ((finished, 3), (stopped, 3), (changed, 4)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(quick | {"seed": seed, "mark": "old"}))
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, LOG)))
        if folder != stopped:
            (folder / "done.json").write_text('{"seconds": 1, "hardware": "another machine"}')
    jobs, results = {out: (out.name, "--flags", "3", TINY) for out in (finished, stopped, changed)}, {}
    failed = study.perform_all(jobs | {wrong: ("wrong", "", "3", [*TINY, "--lr", "-1"])}, results, at_once=2, test=False)
    assert str(failed.pop(wrong)) == f"exit status 1: vpd.py: error: --lr must be positive (see {wrong}.txt)" and not failed
    assert not (wrong / "done.json").exists() and results.keys() == {"finished", "stopped", "changed"}
    assert "mark" in load(finished / "config.json")
    assert results["finished"]["--flags"]["3"] == {"commit": "abcdefg+", "avg": 0.75, "seconds": 1, "hardware": "another machine"}
    for folder in (stopped, changed):
        assert "mark" not in load(folder / "config.json")
        assert load(folder / "done.json")["hardware"] == study.hardware() and not (folder / "model").exists()
    with pytest.raises(RuntimeError, match="exit status 1: no space left"):  # an evaluation that fails is no result
        study.perform(TINY, tmp_path / "full", test=True)


def test_tuning_and_reporting_add_to_their_files(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "README", tmp_path / "none.md")
    monkeypatch.setattr(study, "texts", lambda *_: {})
    monkeypatch.setattr(study, "TRIED", {"trace/vpd": ["--lr 1", "--lr -1"], "trace/sdpo": ["--lr 1"]})
    reported = {"trace/sdpo": ("trace/sdpo", 2), "trace/sdpo fails": ("trace/sdpo --lr -1", 1), "trace/vpd": ("trace/vpd", 1)}
    monkeypatch.setattr(study, "REPORTED", reported)
    old = {"trace/sdpo": {"--lr 1": {"101": {"avg": 0.5}, "102": {"avg": 0.25}}}}
    (tmp_path / "tuning.json").write_text(json.dumps(old))
    flags = ["--results", str(tmp_path), "--folder", str(tmp_path / "runs")]
    fails = lambda: pytest.raises(SystemExit, check=lambda stop: stop.code == 1)  # noqa: E731  since one of them does
    with fails():
        study.main(["--tune", *flags])
    tuned = load(tmp_path / "tuning.json")
    assert tuned["trace/sdpo"] == old["trace/sdpo"] and list(tuned) == ["trace/vpd", "trace/sdpo"]
    kept = {seed: (run["avg"], run["commit"]) for seed, run in tuned["trace/vpd"]["--lr 1"].items()}
    assert kept == {"101": (101, "abcdefg+"), "102": (102, "abcdefg+")}  # +: with changes
    assert study.best("trace/sdpo", tuned) == "--lr 1" and study.best("trace/vpd", tuned) is None  # --lr -1 has no result
    command = "python vpd.py --task toy --subset trace --method sdpo --lr 1 --seed N --out DIR"
    for before, kept in ((command, "old"), ("another command", None)):  # runs of other settings go
        (tmp_path / "study.json").write_text(json.dumps({"rows": {"trace/sdpo": {"command": before, "runs": {"9": "old"}}}}))
        with fails():
            study.main(flags)
        assert '"reward": [0.1235],\n' in (text := (tmp_path / "study.json").read_text()) and '"margin": [-12.3],\n' in text
        ((name, row),) = json.loads(text)["rows"].items()
        assert name == "trace/sdpo" and row["command"] == command and row["runs"].get("9") == kept
        assert [row["runs"][seed]["eval"]["avg"] for seed in "12"] == [[1], [2]]


def test_stopping_the_study_stops_its_processes(tmp_path):
    """When a study gets SIGTERM during two runs (of a program that sleeps), it leaves neither processes nor half a table."""
    flags = ["--tune", "--only", "trace/vpd", "--folder", str(tmp_path / "runs"), "--results", str(tmp_path)]
    (tmp_path / "vpd.py").write_text("import sys, time; open(sys.argv[sys.argv.index('--out') + 1], 'w'); time.sleep(600)")
    code = f"import pathlib; from study import study; study.HERE = pathlib.Path({str(tmp_path)!r}); study.main({flags})"
    study_run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                 start_new_session=True)  # fmt: skip
    deadline = time.time() + 60
    while len([*tmp_path.glob("runs/*[0-9]")]) < 2 and time.time() < deadline and study_run.poll() is None:
        time.sleep(0.05)
    study_run.terminate()
    try:
        _, errors = study_run.communicate(timeout=30)
        with pytest.raises(ProcessLookupError):  # its session is empty
            for _ in range(50):
                os.killpg(study_run.pid, 0)
                time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(study_run.pid, signal.SIGKILL)
    assert study_run.returncode == 130 and "study.py: stopped; finished runs are kept" in errors.splitlines()
    assert not (tmp_path / "tuning.json").exists()


# ---- Files and flags ---------------------------------------------------------------------------------------


def assert_refused(module, argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main([str(word) for word in argv])
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and words in error and error.count("\n") == 1 and out == ""
    assert error.startswith(f"{module.__name__.rpartition('.')[2]}.py: error: ")


@pytest.mark.parametrize("argv, name, text, words", [
    *[(argv, "", "", words) for argv, words in (
        ("--only chess", "--only chess: no row starts like this"), ("--jobs 0", "--jobs"), ("--cores 2", "--cores"),
        ("--results no/such/folder", "--results"), ("--tune --only trace-dialect", "no row starts like this"),
        ("--tune --tables", "--tables: not allowed with argument --tune"), (f"--folder {__file__}", __file__))],
    ("--tables", "tuning.json", "{}", "study.json has no runs to make tables of"),
    *[(mode, name, text, f"{name} {words}") for mode in ("--tables", "--tune") for name, text, words in (
        ("study.json", "{", "is not a JSON object"), ("study.json", "[]", "is not a JSON object: it is a list"),
        ("study.json", "{}", "has no rows"), ("tuning.json", "[", "is not a JSON object"))],
])  # fmt: skip
def test_wrong_flags_and_files_are_one_line_and_nothing_written(argv, name, text, words, tmp_path, capsys, monkeypatch):
    (tmp_path / "README.md").write_text("as it was")
    monkeypatch.setattr(study, "README", tmp_path / "README.md")
    if name:
        (tmp_path / name).write_text(text)
        argv += f" --results {tmp_path}"
    assert_refused(study, ["--folder", tmp_path / "runs", *argv.split()], words, capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", name or "README.md"}
    assert (tmp_path / "README.md").read_text() == "as it was"
