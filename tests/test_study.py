"""The study: rows that mean what they say, quantities and intervals by hand, verdicts, tables, and a run beside its command."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from study import study
from harness import settings
from test_command import full

ROOT = Path(__file__).parent.parent


# ---- Rows and grids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", study.ROWS)
def test_a_rows_flags_are_settings_that_work_together(name):
    cfg = settings.parse([*study.flags_of(name), "--seed", "1"])
    settings.check(cfg)
    subset, method = name.split(" ")[0].split("/")
    if name.endswith("vpd no E-step"):  # which is SDPO's loop on VPD's settings
        method = "sdpo"
    assert (cfg.subset, cfg.method) == (subset.replace("trace-long", "trace"), method)


def test_a_variant_differs_from_its_method_in_what_its_name_says():
    changed = {
        "F=1": {"e_step_every"}, "F=10": {"e_step_every"}, "fixed prior": {"prior"}, "EMA teacher": {"teacher"},
        "live teacher": {"teacher"}, "all passed": {"passed_text"}, "e_groups all": {"e_groups"}, "no E-step": {"method", "teacher"},
        "KL(student‖teacher)": {"divergence"}, "KL(teacher‖student)": {"divergence"}, "sibling": {"feedback"},
        "local term alone": {"future"}, "constant norm": {"distil_norm"}, "black box": {"expert"}, "sg pi": {"ovd_ratio"},
        "failures left out": {"ovd_failed"}, "sg pi, failures left out": {"ovd_ratio", "ovd_failed"},
        "sg pi, all rejected": {"ovd_ratio", "ovd_threshold"},
    }  # fmt: skip
    seen = 0
    for name in study.ROWS:
        base, _, change = name.partition(" ")
        if change and (base.startswith("trace/") or base in ("code/distil", "code-judge/ovd")):
            one, other = (vars(settings.parse(study.flags_of(n))) for n in (base, name))
            tuned = {"lr"} if name == "trace/distil local term alone" else set()
            assert {key for key in one if one[key] != other[key]} - {"out"} == changed[change] | tuned, name
            seen += 1
    assert seen == 21


def test_every_method_of_a_task_was_tried_with_as_many_settings():
    tried = {name: len(set(flags)) for name, flags in study.GRID.items()}
    assert all(len(flags) == tried[name] for name, flags in study.GRID.items())  # none twice
    by_subset = {}
    for name, count in tried.items():
        by_subset.setdefault(name.split("/")[0], set()).add(count)
    assert by_subset == {"code": {6}, "choice": {5}, "trace-often": {3}, "trace": {10}, "code-judge": {6}}
    for name, tried in study.GRID.items():
        subset, method = name.split(" ")[0].split("/")
        for flags in tried:
            settings.check(settings.parse(["--subset", subset, "--method", method, *flags.split()]))


def test_claims_speak_of_rows_that_are_run():
    for claim in study.CLAIMS + study.CHOICES:
        assert {claim.above, claim.below} - {"", "base"} <= study.ROWS.keys()


# ---- Quantities and intervals by hand ----------------------------------------------------------------------


def made(avg, margin=(), teacher=(0.25, 0.5), evals=(0.1, 0.3, 0.2)):
    return {
        "commit": "abc", "seconds": 36.0, "seconds_per_batch": 2.0, "before": {"avg": 0.1, "low": 0, "high": 1, "pass@4": 0.2},
        "after": {"avg": avg, "low": 0.0, "high": 1.0, "pass@4": 0.9},
        "eval": {"step": list(range(0, 10 * len(evals), 10)), "avg": list(evals), "teacher": list(teacher)},
        "train": {"margin": list(margin)},
    }  # fmt: skip


def test_quantities_of_a_run():
    run = made(0.6, margin=[0.0, 0.1, None, 0.2, 0.3, 0.4, 1, 1, 1, 1, 6], teacher=[0.25, None, 0.5])
    first, last = (0.0 + 0.1 + 0.2 + 0.3 + 0.4) / 5, (1 + 1 + 1 + 1 + 6) / 5  # batches without a margin do not count
    assert study.quantity("margin change", run) == pytest.approx(last - first)
    assert study.quantity("margin fall", run) == pytest.approx(first - last)
    assert study.quantity("teacher change", run) == pytest.approx(0.5 - 0.25)
    assert study.quantity("late gain", run) == pytest.approx(0.2 - 0.3)  # 20 batches, the half is after 10
    assert study.quantity("late loss", run) == pytest.approx(0.3 - 0.2)
    assert study.quantity("avg", run) == 0.6 and study.quantity("pass@4", run) == 0.9
    assert math.isnan(study.quantity("margin change", made(0.6, margin=[1.0] * 9)))  # first and last would overlap
    assert math.isnan(study.quantity("teacher change", made(0.6, teacher=[None, None])))


def test_the_interval_over_seeds_is_student_s_t():
    values = [0.1, 0.2, 0.6]
    mean = 0.9 / 3
    deviation = math.sqrt(((0.1 - mean) ** 2 + (0.2 - mean) ** 2 + (0.6 - mean) ** 2) / 2)
    half = 4.302653 * deviation / math.sqrt(3)  # t of 2 degrees of freedom at 0.975
    assert study.interval(values) == pytest.approx((mean, mean - half, mean + half), rel=1e-6)
    assert study.interval([0.1, float("nan"), 0.2, 0.6]) == pytest.approx((mean, mean - half, mean + half), rel=1e-6)
    assert study.interval([0.4])[0] == 0.4 and math.isnan(study.interval([0.4])[1])


def test_the_difference_of_rows_has_welchs_interval():
    above, below = [0.5, 0.7], [0.1, 0.2, 0.6]
    var_a, var_b = 0.02 / 2, 0.07 / 3  # of the means: sample variances (0.2^2 / 2) and (0.04 + 0.01 + 0.09) / 2
    freedom = (var_a + var_b) ** 2 / (var_a**2 / 1 + var_b**2 / 2)
    from scipy import stats

    half = stats.t.ppf(0.975, freedom) * math.sqrt(var_a + var_b)
    assert study.difference(above, below) == pytest.approx((0.6 - 0.3, 0.3 - half, 0.3 + half), rel=1e-9)
    assert study.difference([0.5, 0.5], [0.0, 0.0]) == (0.5, 0.5, 0.5)


def rows_of(**averages):
    return {f"trace/{name}": {"label": name, "command": f"run {name}",
                              "runs": {str(i): made(avg) for i, avg in enumerate(values, 1)}}
            for name, values in averages.items()}  # fmt: skip


@pytest.mark.parametrize(
    "above, below, said",
    [
        ([0.8, 0.82, 0.84], [0.2, 0.22, 0.24], "yes"),
        ([0.2, 0.22, 0.24], [0.8, 0.82, 0.84], "no, the reverse"),
        ([0.2, 0.5, 0.8], [0.3, 0.5, 0.6], "not decided"),
    ],
)
def test_a_claim_holds_when_its_interval_lies_above_zero(above, below, said):
    rows = rows_of(vpd=above, grpo=below)
    text, verdict = study.verdict(study.Claim("", "avg", "trace/vpd", "trace/grpo"), rows)
    assert verdict == said
    assert text.startswith(
        f"{np.mean(above):.3f} against {np.mean(below):.3f}: {np.mean(above) - np.mean(below):+.3f} ["
    )


def test_a_claim_about_one_row_is_against_zero_or_the_base():
    rows = rows_of(sdpo=[0.02, 0.03, 0.04])  # base 0.1
    text, verdict = study.verdict(study.Claim("", "avg", "base", "trace/sdpo"), rows)
    assert verdict == "yes" and text.startswith("0.030 [") and text.endswith("base 0.100")
    assert (
        study.verdict(study.Claim("", "avg", "base", "trace/sdpo"), rows_of(sdpo=[0.3, 0.31, 0.32]))[1]
        == "no, the reverse"
    )
    assert study.verdict(study.Claim("", "teacher change", "trace/sdpo", ""), rows) is not None
    assert study.verdict(study.Claim("", "late loss", "trace/sdpo", ""), rows)[1] == "yes"  # 0.3 to 0.2 in all seeds
    assert study.verdict(study.Claim("", "late gain", "trace/sdpo", ""), rows)[1] == "no, the reverse"


def test_verdicts_name_the_subsets_on_which_a_claim_holds_fails_or_is_open():
    rows = rows_of(vpd=[0.8, 0.82, 0.84], grpo=[0.2, 0.22, 0.24], sdpo=[0.7, 0.9, 0.8], joint=[0.9, 0.92, 0.94])
    claims = [study.Claim("best", "avg", "trace/vpd", f"trace/{name}") for name in ("grpo", "sdpo", "joint")]
    claims += [
        study.Claim("best", "pass@4", "trace/vpd", "trace/grpo"),
        study.Claim("unseen", "avg", "a/vpd", "a/grpo"),
    ]
    _, _, *lines = study.verdicts_table(claims, rows, "claim")
    assert lines == ["| best | trace | trace | trace, trace (pass@4) |", ""]


def test_no_verdict_before_two_seeds():
    claim = study.Claim("", "avg", "trace/vpd", "trace/grpo")
    assert study.verdict(claim, rows_of(vpd=[0.8], grpo=[0.1, 0.2])) is None
    assert study.verdict(claim, rows_of(vpd=[0.8, 0.9])) is None


# ---- Tables ------------------------------------------------------------------------------------------------


def test_the_report_names_seeds_hours_commits_and_commands_and_leaves_the_rest_of_the_readme(tmp_path):
    rows = rows_of(vpd=[0.8, 0.82, 0.84], grpo=[0.2, 0.22, 0.24])
    (tmp_path / "study.json").write_text(json.dumps({"hardware": "a machine", "rows": rows}))
    tried = {
        f"--task toy --subset trace --method vpd --lr {lr} --steps 20 --seed 0":
        {"name": "trace/vpd", "commit": "abc", "avg": {"0": 0.1, "20": avg}} for lr, avg in (("1e-3", 0.4), ("2e-3", 0.6))
    }  # fmt: skip
    (tmp_path / "tuning.json").write_text(json.dumps(tried))
    readme = tmp_path / "MAIN.md"
    readme.write_text(
        f"above\n{study.MARKS[0]}\nold figures\n{study.MARKS[1]}\nbelow\n{study.SUMMARY[0]}\n{study.SUMMARY[1]}\n"
    )
    for _ in range(2):  # again gives the same
        study.report(tmp_path, readme)
        text, full = readme.read_text(), (tmp_path / "README.md").read_text()
        assert text.startswith("above\n") and "old figures" not in text
        below = text.partition(study.MARKS[1])[2]
        summed = [
            "| base model | | 0.100 |  |  |",
            "| VPD | `vpd` | 0.820 [0.770, 0.870] |  |  |",
            "| SDPO | `sdpo` |  |  |  |",
            "| GRPO | `grpo` | 0.220 [0.170, 0.270] |  |  |",
        ]
        assert below.startswith("\nbelow\n") and text.endswith(f"\n{study.SUMMARY[1]}\n")
        assert [line for line in below.splitlines() if line.startswith("| ")][1:5] == summed
        for page in (text, full):
            assert "6 runs, 0.1 CPU hours; a machine; commit abc." in page  # 6 x 36 s
        assert "| VPD beats GRPO (Tables 1, 2) | trace |  |  |" in text
        assert "0.820 [" in full and "0.800 0.820 0.840" in full and "vpd: run vpd" in full
        assert "VPD beats GRPO (Tables 1, 2) | trace | 0.820 against 0.220: +0.600" in full
        assert "lr 1e-3: 0.40; **lr 2e-3: 0.60**" in full


def test_the_shipped_tables_are_those_of_the_shipped_figures(tmp_path):
    known = json.loads((ROOT / "study" / "results" / "study.json").read_text())
    for name in ("study.json", "tuning.json"):
        shutil.copy(ROOT / "study" / "results" / name, tmp_path)
    readme = tmp_path / "MAIN.md"
    shutil.copy(ROOT / "README.md", readme)
    study.report(tmp_path, readme)
    assert readme.read_text() == (ROOT / "README.md").read_text()
    assert (tmp_path / "README.md").read_text() == (ROOT / "study" / "results" / "README.md").read_text()
    assert all(row["command"].split()[2:-4] == study.flags_of(name) for name, row in known["rows"].items())


# ---- A run -------------------------------------------------------------------------------------------------

TINY = ["--task", "toy", "--subset", "choice", "--method", "vpd", "--steps", "2", "--eval_every", "1", "--prompts_per_batch", "2",
        "--minibatch_prompts", "2", "--e_minibatch_prompts", "2", "--group_size", "4", "--eval_samples", "1", "--teacher_probe", "2",
        "--seed", "3"]  # fmt: skip


def test_a_run_of_the_study_is_the_run_of_its_command(tmp_path):
    """Several runs share a process there, so the second of two is compared."""
    for name in ("first", "second"):
        assert study.perform(TINY, tmp_path / name, test=True) == ""
    alone = tmp_path / "alone"
    for command in (["vpd.py", *TINY, "--out", str(alone)], ["evaluate.py", "--run", str(alone)]):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (alone / "done.json").write_text('{"seconds": 0}')
    ours, theirs = (study.record(folder) for folder in (tmp_path / "second", alone))
    for found in (ours, theirs):
        for timing in ("seconds", "seconds_per_batch"):
            del found[timing]
    assert ours == theirs and len(ours["train"]["reward"]) == 2 and "after" in ours
    assert not (tmp_path / "second" / "model").exists()  # hundreds of runs would fill the disk


def test_finished_runs_stay_stopped_ones_start_again_and_a_failure_is_told(tmp_path):
    finished, stopped, changed, wrong = (tmp_path / name for name in ("finished", "stopped", "changed", "wrong"))
    for folder, seed in ((finished, 3), (stopped, 3), (changed, 4)):
        folder.mkdir()
        as_run = vars(settings.parse(TINY)) | {"teacher": settings.parse(TINY).reader()}  # as a run records them
        (folder / "config.json").write_text(json.dumps(as_run | {"seed": seed, "mark": "old"}))
        if folder != stopped:
            (folder / "done.json").write_text('{"seconds": 1}')
    jobs = {finished: TINY, stopped: TINY, changed: TINY, wrong: [*TINY, "--lr", "-1"]}
    (failure,) = study.perform_all(jobs, processes=1, test=False)
    assert (
        failure.startswith("wrong: SystemExit: 2") and "--lr must be positive" in (tmp_path / "wrong.txt").read_text()
    )
    assert not (wrong / "done.json").exists()
    config = lambda folder: json.loads((folder / "config.json").read_text())  # noqa: E731
    assert "mark" in config(finished)
    for folder in (stopped, changed):
        assert "mark" not in config(folder) and config(folder)["seed"] == 3 and (folder / "done.json").exists()


@pytest.mark.parametrize(
    "argv, words",
    [(["--only", "chess"], "--only chess: no row starts like this"), (["--seeds", "0"], "--seeds"), (["--jobs", "0"], "--jobs"),
     (["--results", "no/such/folder"], "--results"), (["--cores", "2"], "--cores"),
     (["--tune", "--tables"], "--tune makes runs and --tables none")],
)  # fmt: skip
def test_wrong_flags_are_one_line_exit_2_and_nothing_written(argv, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        study.main([*argv, "--folder", str(tmp_path / "runs")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("study.py: error: ") and words in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "name, text, words",
    [("study.json", "{", "study.json is no JSON"), ("study.json", "[]", "study.json holds no JSON object"),
     ("study.json", "{}", "is not that of a study: KeyError('rows')"), ("tuning.json", "[", "tuning.json is no JSON"),
     ("study.json", '{"rows": {"trace/vpd": {"label": "VPD", "runs": {"1": {}}}}}', "is not that of a study"),
     ("tuning.json", "{}", "study.json has no runs to make tables of")],
)  # fmt: skip
def test_a_study_that_cannot_be_read_is_one_line_before_anything_is_run_or_written(
    name, text, words, tmp_path, capsys, monkeypatch
):
    readme = tmp_path / "README.md"
    readme.write_text("as it was")
    monkeypatch.setattr(study, "README", readme)
    (tmp_path / name).write_text(text)
    for argv in (["--tables"], ["--only", "trace/vpd"]):
        if argv != ["--tables"] and "no runs" in words:
            continue  # nothing yet, and this is to change it
        with pytest.raises(SystemExit) as stop:
            study.main([*argv, "--results", str(tmp_path), "--folder", str(tmp_path / "runs")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["README.md", name])
    assert readme.read_text() == "as it was"


def test_a_folder_for_runs_that_is_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "runs").touch()
    with pytest.raises(SystemExit) as stop:
        study.main(["--only", "trace/vpd", "--results", str(tmp_path), "--folder", str(tmp_path / "runs")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and str(tmp_path / "runs") in error and error.count("\n") == 1


def test_numbers_are_kept_to_what_they_are_good_for_and_a_series_is_a_line(tmp_path):
    assert [study.rounded(x) for x in (0.123456, -12.3456, 3, None, 1234.5)] == [0.1235, -12.3, 3, None, 1230.0]
    content = {"a": {"series": [0.5, None, 2], "name": "x [y, z]"}, "empty": []}
    study.write(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text()) == content
    assert '"series": [0.5,null,2]' in (tmp_path / "x.json").read_text() and len(list(tmp_path.iterdir())) == 1


def test_the_report_stays_whole_on_a_full_disk(tmp_path, monkeypatch):
    readme = tmp_path / "page.md"
    readme.write_text("old")
    monkeypatch.setattr(study, "texts", lambda *_: {readme: "new"})
    monkeypatch.setattr(study.Path, "write_bytes", full)
    for doing in (lambda: study.report(tmp_path, readme), lambda: study.write(readme, {"a": 1})):
        with pytest.raises(study.command.CannotWrite, match=f"^{readme}: No space left on device$"):
            doing()
    assert readme.read_text() == "old" and list(tmp_path.iterdir()) == [readme]


def test_stopping_the_study_stops_its_processes(tmp_path):
    """Of a study that is told to stop while two runs go on nothing is left, neither processes nor half a table."""
    flags = ["--only", "trace/vpd", "trace/sdpo", "--folder", str(tmp_path / "runs"), "--results", str(tmp_path)]
    study_run = subprocess.Popen([sys.executable, "study.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 text=True, start_new_session=True)  # fmt: skip
    logs = [tmp_path / "runs" / f"trace-{method}-seed1" / "log.jsonl" for method in ("vpd", "sdpo")]
    deadline = time.time() + 120
    while not all(log.exists() for log in logs) and time.time() < deadline:
        time.sleep(0.2)
    study_run.terminate()
    _, errors = study_run.communicate(timeout=30)
    assert study_run.returncode == 130 and "study.py: stopped; finished runs stay" in errors.splitlines()
    with pytest.raises(ProcessLookupError):  # nobody is left in its session
        for _ in range(50):
            os.killpg(study_run.pid, 0)
            time.sleep(0.1)
    assert not (tmp_path / "study.json").exists()


def test_collecting_keeps_the_rows_that_were_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "record", lambda out: {"from": out.name})
    monkeypatch.setattr(study, "hardware", lambda: "here")
    old = {"hardware": "there", "rows": {name: {"label": "x", "command": "y", "runs": {"1": "old", "2": "old"}}
                                         for name in ("trace/grpo", "trace/vpd")}}  # fmt: skip
    (tmp_path / "study.json").write_text(json.dumps(old))
    (tmp_path / "trace-vpd-seed2").mkdir()
    (tmp_path / "trace-vpd-seed2" / "done.json").write_text("{}")
    found = study.collect(tmp_path, tmp_path, range(1, 6))
    assert found == json.loads((tmp_path / "study.json").read_text()) and found["hardware"] == "here"
    assert found["rows"]["trace/grpo"]["runs"] == {"1": "old", "2": "old"}
    assert found["rows"]["trace/vpd"]["runs"] == {"1": "old", "2": {"from": "trace-vpd-seed2"}}
    assert list(found["rows"]) == ["trace/vpd", "trace/grpo"]  # in the study's order
