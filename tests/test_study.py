"""The study: rows that mean what they say, quantities and intervals by hand, verdicts, tables, and runs that are commands."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest
from scipy import stats

from study import study
from study.study import Claim
from test_command import full

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "study" / "results"


# ---- Rows, claims, what was tuned --------------------------------------------------------------------------


@pytest.mark.parametrize("name", study.ROWS)
def test_a_rows_flags_are_settings_that_work_together(name):
    module, cfg = study.configured(study.flags_of(name))
    module.check(cfg)
    subset, method = name.split(" ")[0].split("/")
    method = "sdpo" if name.endswith("vpd no E-step") else method  # which is SDPO's loop on VPD's settings
    assert (cfg.subset, cfg.method) == (subset.replace("trace-long", "trace"), method)


def test_a_variant_differs_from_its_method_in_what_its_name_says():
    changed = {
        "F=1": {"e_step_every"}, "F=10": {"e_step_every"}, "fixed prior": {"prior"}, "EMA teacher": {"teacher"},
        "live teacher": {"teacher"}, "all passed": {"passed_text"}, "e_groups all": {"e_groups"}, "no E-step": {"method"},
        "KL(student‖teacher)": {"divergence"}, "KL(teacher‖student)": {"divergence"}, "sibling": {"feedback"},
        "local term alone": {"future"}, "constant norm": {"distil_norm"}, "black box": {"expert"}, "sg pi": {"ovd_ratio"},
        "failures left out": {"ovd_failed"}, "sg pi, failures left out": {"ovd_ratio", "ovd_failed"},
        "sg pi, all rejected": {"ovd_ratio", "ovd_threshold"},
    }  # fmt: skip
    seen = 0
    for name in study.ROWS:
        base, _, change = name.partition(" ")
        if change and (base.startswith("trace/") or base in ("code/distil", "code-judge/ovd")):
            one, other = (study.settings_of(study.flags_of(n)) for n in (base, name))
            tuned = {"lr"} if name == "trace/distil local term alone" else set()
            assert {key for key in one if one[key] != other[key]} - {"out"} == changed[change] | tuned, name
            seen += 1
    assert seen == 21


def test_every_method_of_a_task_was_tried_with_as_many_settings_and_they_still_work():
    counts: dict[str, Counter] = {}
    for flags, entry in json.loads((RESULTS / "tuning.json").read_text()).items():
        module, cfg = study.configured(flags.split())
        module.check(cfg)
        assert entry["name"].split(" ")[0] == f"{cfg.subset}/{cfg.method}"
        counts.setdefault(cfg.subset, Counter())[entry["name"]] += 1
    assert {task: {*of.values()} for task, of in counts.items()} == {
        "code": {6}, "choice": {5}, "trace-often": {3}, "trace": {10}, "code-judge": {6}}  # fmt: skip


def test_claims_are_about_rows_that_are_run_and_quantities_that_have_a_name():
    assert [len(claims) for claims in study.CLAIMS.values()] == [42, 17, 15]
    for claim in sum(study.CLAIMS.values(), []):
        rows = {f"{claim.subset}/{name}" for name in (claim.above, claim.below) if name not in ("0", "base")}
        assert rows <= study.ROWS.keys() and claim.quantity in study.WHAT, claim


# ---- Quantities and intervals by hand ----------------------------------------------------------------------


def made(avg=0.5, margin=(), teacher=(0.25, 0.25, 0.5), evals=(0.1, 0.3, 0.2), **train):
    """A run of study.json."""
    nothing = {"reward": None, "entropy": None, "divergence": None, "response_length": [8.0, 9.0], "with_context": [1.0, 0.5]}
    return {
        "commit": "abc", "seconds": 36.0, "seconds_per_batch": 2.0, "before": {"avg": 0.1, "low": 0, "high": 1, "pass@4": 0.2},
        "after": {"avg": avg, "low": 0.0, "high": 1.0, "pass@4": 0.9}, "train": nothing | {"margin": margin} | train,
        "eval": {"step": list(range(0, 10 * len(evals), 10)), "avg": evals, "teacher": teacher},
    }  # fmt: skip


def rows_of(**averages):
    return {f"trace/{name}": {"label": name, "runs": {str(i): made(avg) for i, avg in enumerate(values, 1)}}
            for name, values in averages.items()}  # fmt: skip


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
    for teacher in ([None, None], [None, 0.5]):
        assert math.isnan(study.quantity("teacher change", made(0.6, teacher=teacher)))


def test_the_interval_over_seeds_is_student_s_t_and_that_of_a_difference_welchs():
    mean, deviation = 0.9 / 3, math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2)
    half = 4.302653 * deviation / math.sqrt(3)  # t of 2 degrees of freedom at 0.975
    assert study.interval([0.1, 0.2, 0.6]) == pytest.approx((mean, mean - half, mean + half), rel=1e-6)
    assert study.interval([0.4])[0] == 0.4 and math.isnan(study.interval([0.4])[1]) and math.isnan(study.interval([])[0])
    assert [study.with_interval(values) for values in ([], [0.4], [0.5, 0.5])] == ["", "0.400", "0.500 [0.500, 0.500]"]
    above, below = [0.5, 0.7], [0.1, 0.2, 0.6]
    var_a, var_b = 0.02 / 2, 0.07 / 3  # of the means: sample variances (0.2^2 / 2) and (0.04 + 0.01 + 0.09) / 2
    freedom = (var_a + var_b) ** 2 / (var_a**2 / 1 + var_b**2 / 2)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(var_a + var_b)
    assert study.interval(above, below) == pytest.approx((0.6 - 0.3, 0.3 - half, 0.3 + half), rel=1e-9)
    assert study.interval([0.5, 0.5], [0.0, 0.0]) == (0.5, 0.5, 0.5)


HIGH, LOW = [0.8, 0.82, 0.84], [0.2, 0.22, 0.24]


@pytest.mark.parametrize(
    "quantity, above, below, text, so",
    [("avg", HIGH, LOW, "0.820 against 0.220: +0.600 [", "yes"),
     ("avg", LOW, HIGH, "0.220 against 0.820: -0.600 [", "no, the opposite"),
     ("avg", [0.2, 0.5, 0.8], [0.3, 0.5, 0.7], "0.500 against 0.500: +0.000 [-0.613, +0.613]", "undecided"),
     ("avg", "base", [0.02, 0.03, 0.04], "0.030 [0.005, 0.055], base 0.100", "yes"),
     ("avg", "base", [0.3, 0.31, 0.32], "0.310 [0.285, 0.335], base 0.100", "no, the opposite"),
     ("late loss", HIGH, "0", "0.100 [0.100, 0.100]", "yes"),  # 0.3 to 0.2 in all
     ("late gain", HIGH, "0", "-0.100 [-0.100, -0.100]", "no, the opposite")],
)  # fmt: skip
def test_a_claim_holds_when_its_interval_lies_above_zero_or_below_the_base(quantity, above, below, text, so):
    rows = rows_of(**{name: values for name, values in (("vpd", above), ("grpo", below)) if isinstance(values, list)})
    claim = Claim("", quantity, "trace", above if above == "base" else "vpd", below if below == "0" else "grpo")
    found, verdict = study.verdict(claim, rows)
    assert verdict == so and found.startswith(text)


def test_verdicts_name_the_subsets_on_which_a_claim_holds_fails_or_is_open():
    rows = rows_of(vpd=HIGH, grpo=LOW, sdpo=[0.7, 0.9, 0.8], joint=[0.9, 0.92, 0.94])
    claims = [Claim("best", "avg", "trace", "vpd", name) for name in ("grpo", "sdpo", "joint")]
    claims += [Claim("best", "pass@4", "trace", "vpd", "grpo")]
    _, _, *lines = study.by_verdict([(claim, *study.verdict(claim, rows)) for claim in claims], "claim")
    assert lines == ["| best | trace | trace | trace, trace (pass@4) |", ""]


@pytest.mark.parametrize("rows", [rows_of(vpd=[0.8], grpo=[0.1, 0.2]), rows_of(vpd=[0.8, 0.9])])
def test_no_verdict_before_two_seeds(rows):
    assert study.verdict(Claim("", "avg", "trace", "vpd", "grpo"), rows) is None


# ---- Tables ------------------------------------------------------------------------------------------------


def test_the_report_goes_between_marks_and_names_seeds_hours_commits_and_commands(tmp_path, monkeypatch):
    rows = rows_of(vpd=HIGH, grpo=LOW)
    rows["trace/vpd"]["runs"]["1"]["eval"]["avg"] = [0.1, 0.5, 0.3]  # 0.2 below its best
    (tmp_path / "study.json").write_text(json.dumps({"hardware": "a machine", "rows": rows}))
    tried = {
        f"--task toy --subset trace --method vpd --lr {lr} --steps 20 --seed 0":
        {"name": "trace/vpd", "commit": "abc", "avg": {"0": 0.1, "20": avg}} for lr, avg in (("1e-3", 0.4), ("2e-3", 0.6))
    }  # fmt: skip
    (tmp_path / "tuning.json").write_text(json.dumps(tried | {"--lr 9": {"name": "trace/vpd"}}))  # one is still to be run
    readme, own = tmp_path / "MAIN.md", tmp_path / "README.md"
    readme.write_text("\n".join(["above", study.MARKS[0], "old", study.MARKS[1], "below", *study.SUMMARY, ""]))
    monkeypatch.setattr(study, "README", readme)
    for before in ("", "", "an introduction\n"):  # again gives the same, and what is above the marks stays
        own.write_text(before + own.read_text()) if own.exists() else None
        study.main(["--tables", "--results", str(tmp_path)])
        text, page = readme.read_text(), own.read_text()
        assert text.startswith("above\n") and "\nold\n" not in text and page.startswith(before + study.MARKS[0])
        below = text.partition(study.MARKS[1])[2]
        summed = ["| base model |  | 0.100 |  |  |", "| VPD | `vpd` | 0.820 [0.770, 0.870] |  |  |",
                  "| SDPO | `sdpo` |  |  |  |", "| GRPO | `grpo` | 0.220 [0.170, 0.270] |  |  |"]  # fmt: skip
        assert below.startswith("\nbelow\n") and text.endswith(f"\n{study.SUMMARY[1]}\n")
        assert [line for line in below.splitlines() if line.startswith("| ")][1:5] == summed
        for written in (text, page):
            assert "6 runs, 0.1 CPU hours; a machine; commit abc." in written  # 6 x 36 s
        assert "| VPD beats GRPO (Tables 1, 2) | trace |  |  |" in text
        assert "0.820 [" in page and "0.800 0.820 0.840" in page and f"vpd: {study.training('trace/vpd')}" in page
        assert "VPD beats GRPO (Tables 1, 2) | trace | 0.820 against 0.220: +0.600" in page
        assert "| trace/vpd | 1 | 0.10 0.50 0.30 | 0.25 0.25 0.50 |  | 8.00 to 9.00 | 1.00 to 0.50 |" in page
        assert "| trace/vpd | 2 |" not in page and "lr 1e-3: 0.40; **lr 2e-3: 0.60**" in page


def test_the_shipped_tables_are_those_of_the_shipped_numbers(tmp_path, monkeypatch):
    for path in (RESULTS / "study.json", RESULTS / "tuning.json", RESULTS / "README.md"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(study, "README", shutil.copy(ROOT / "README.md", tmp_path / "MAIN.md"))
    study.main(["--tables", "--results", str(tmp_path)])
    assert (tmp_path / "MAIN.md").read_text() == (ROOT / "README.md").read_text()
    assert (tmp_path / "README.md").read_text() == (RESULTS / "README.md").read_text()
    for name, row in json.loads((RESULTS / "study.json").read_text())["rows"].items():
        assert row["command"] == f"python vpd.py {' '.join(study.flags_of(name))} --seed N --out DIR"  # as it was run
        assert row["label"] == study.label_of(name)
    # a neighbour is now a program of its own
    assert study.training("code-judge/ovd sg pi, all rejected") == (
        "python -m neighbours.ovd --task toy --subset code-judge --ovd_ratio one --ovd_threshold 10 --seed N --out DIR")  # fmt: skip


# ---- Runs --------------------------------------------------------------------------------------------------

TINY = ["--task", "toy", "--subset", "choice", "--method", "vpd", "--steps", "2", "--eval_every", "1", "--prompts_per_batch", "2",
        "--minibatch_prompts", "2", "--e_minibatch_prompts", "2", "--group_size", "4", "--eval_samples", "1", "--teacher_probe", "2",
        "--seed", "3"]  # fmt: skip
LOG = [{"kind": "train", "step": 0, "seconds": {"rollout": 1.0, "sync": 0.5}, "reward": 0.123456},
       {"kind": "eval", "step": 1, "avg": 0.75}]  # fmt: skip


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Instead of training, a program that writes the run directory of TINY at once, or fails where the flags have -1."""
    _, cfg = study.configured(TINY)
    config = asdict(cfg) | {"teacher": cfg.reader(), "commit": "abcdefghij+ (changed)"}  # as a run records them
    script = tmp_path / "program.py"
    script.write_text(f"""
import json, pathlib, sys
if "-1" in sys.argv: sys.exit("first\\nvpd.py: error: --lr must be positive")
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
(out / "model").mkdir(parents=True, exist_ok=True)
(out / "config.json").write_text({json.dumps(config)!r})
(out / "log.jsonl").write_text({chr(10).join(map(json.dumps, LOG))!r})
""")
    monkeypatch.setattr(study, "program", lambda flags: [str(script), *flags])
    return config


def test_a_run_is_the_training_command_and_an_evaluation_and_its_weights_go(tmp_path):
    assert study.perform(TINY, tmp_path / "run", test=True) == ""
    found = study.record(tmp_path / "run")
    assert len(found["train"]["reward"]) == 2 and found["eval"]["step"] == [0, 1, 2]
    assert found["before"].keys() == found["after"].keys() == {"avg", "low", "high"}
    assert "done: " in (tmp_path / "run.txt").read_text() and not (tmp_path / "run" / "model").exists()


def test_finished_runs_are_kept_stopped_ones_start_again_and_a_failure_is_named(quick, tmp_path):
    finished, stopped, changed, wrong = (tmp_path / name for name in ("finished", "stopped", "changed", "wrong"))
    for folder, seed in ((finished, 3), (stopped, 3), (changed, 4)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(quick | {"seed": seed, "mark": "old"}))
        if folder != stopped:
            (folder / "done.json").write_text('{"seconds": 1}')
    jobs = {finished: TINY, stopped: TINY, changed: TINY, wrong: [*TINY, "--lr", "-1"]}
    (failure,) = study.perform_all(jobs, at_once=2, test=False)
    assert failure == f"wrong: exit status 1: vpd.py: error: --lr must be positive (see {wrong}.txt)"
    assert not (wrong / "done.json").exists()
    config = lambda folder: json.loads((folder / "config.json").read_text())  # noqa: E731
    assert "mark" in config(finished)
    for folder in (stopped, changed):
        assert "mark" not in config(folder) and (folder / "done.json").exists() and not (folder / "model").exists()


def test_tuning_runs_the_settings_that_are_in_its_file(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "README", tmp_path / "none.md")
    flags = "--task toy --subset code --method vpd --lr {} --seed 0"
    tried = {flags.format("1"): {"name": "code/vpd"}, flags.format("-1"): {"name": "code/vpd", "avg": {"1": 0.5}}}
    (tmp_path / "tuning.json").write_text(json.dumps(tried | {"--other": {"name": "trace/vpd"}}))
    with pytest.raises(SystemExit) as stop:  # since one of them fails
        study.main(["--tune", "--only", "code", "--results", str(tmp_path), "--folder", str(tmp_path / "runs")])
    tried[flags.format("1")] |= {"commit": "abcdefg+", "avg": {"1": 0.75}}
    assert stop.value.code == 1
    assert json.loads((tmp_path / "tuning.json").read_text()) == tried | {"--other": {"name": "trace/vpd"}}


def test_stopping_the_study_stops_its_processes(tmp_path):
    """When a study gets SIGTERM during two runs, it leaves neither processes nor half a table."""
    flags = ["--only", "trace/vpd", "trace/sdpo", "--folder", str(tmp_path / "runs"), "--results", str(tmp_path)]
    study_run = subprocess.Popen([sys.executable, "-m", "study.study", *flags], cwd=ROOT, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    logs = [tmp_path / "runs" / f"trace-{method}-seed1" / "log.jsonl" for method in ("vpd", "sdpo")]
    deadline = time.time() + 120
    while not all(log.exists() for log in logs) and time.time() < deadline and study_run.poll() is None:
        time.sleep(0.2)
    study_run.terminate()
    try:
        _, errors = study_run.communicate(timeout=30)
        with pytest.raises(ProcessLookupError):  # nobody is left in its session
            for _ in range(50):
                os.killpg(study_run.pid, 0)
                time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(study_run.pid, signal.SIGKILL)
    assert study_run.returncode == 130 and "study.py: stopped; finished runs are kept" in errors.splitlines()
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


# ---- Files and flags ---------------------------------------------------------------------------------------


def assert_refused(module, argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main([str(word) for word in argv])
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and words in error and error.count("\n") == 1 and out == ""
    assert error.startswith(f"{module.__name__.rpartition('.')[2]}.py: error: ")


@pytest.mark.parametrize(
    "argv, words",
    [("--only chess", "--only chess: no row starts like this"), ("--seeds 0", "--seeds"), ("--jobs 0", "--jobs"),
     ("--results no/such/folder", "--results"), ("--cores 2", "--cores"),
     ("--tune --only trace-cold", "no row starts like this"), ("--tune --tables", "--tune makes runs and --tables none"),
     (f"--folder {__file__}", __file__)],
)  # fmt: skip
def test_wrong_flags_are_one_line_exit_2_and_nothing_written(argv, words, tmp_path, capsys):
    assert_refused(study, ["--folder", tmp_path / "runs", *argv.split()], words, capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "name, text, words",
    [("study.json", "{", "study.json is no JSON object"), ("study.json", "[]", "study.json is no JSON object"),
     ("study.json", "{}", "is not that of a study: KeyError('rows')"), ("tuning.json", "[", "tuning.json is no JSON"),
     ("study.json", '{"rows": {"trace/vpd": {"label": "VPD", "runs": {"1": {}}}}}', "is not that of a study"),
     ("tuning.json", "{}", "study.json has no runs to make tables of")],
)  # fmt: skip
def test_a_study_that_cannot_be_read_is_one_line_before_anything_is_run_or_written(
    name, text, words, tmp_path, capsys, monkeypatch
):
    (tmp_path / "README.md").write_text("as it was")
    monkeypatch.setattr(study, "README", tmp_path / "README.md")
    (tmp_path / name).write_text(text)
    assert_refused(study, ["--tables", "--results", tmp_path], words, capsys)
    if "no runs" not in words:  # which runs would change
        assert_refused(study, ["--only", "trace/vpd", "--results", tmp_path, "--folder", tmp_path / "runs"], words, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["README.md", name])
    assert (tmp_path / "README.md").read_text() == "as it was"


def test_numbers_are_kept_to_what_they_are_good_for_and_a_series_is_a_line(tmp_path):
    assert [study.rounded(x) for x in (0.123456, -12.3456, 3, None, 1234.5)] == [0.1235, -12.3, 3, None, 1230.0]
    content = {"a": {"series": [0.5, None, 2], "name": "x [y, z]"}, "empty": []}
    study.write(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text()) == content
    assert '"series": [0.5,null,2]' in (tmp_path / "x.json").read_text() and len(list(tmp_path.iterdir())) == 1


def test_the_report_and_the_numbers_stay_whole_on_a_full_disk(tmp_path, monkeypatch):
    readme = tmp_path / "page.md"
    readme.write_text("old")
    monkeypatch.setattr(study, "texts", lambda *_: {readme: "new"})
    monkeypatch.setattr(study.Path, "write_bytes", full)
    for writes in (lambda: study.main(["--tables", "--results", str(tmp_path)]), lambda: study.write(readme, {"a": 1})):
        with pytest.raises(study.command.CannotWrite, match=f"^{readme}: No space left on device$"):
            writes()
    assert readme.read_text() == "old" and list(tmp_path.iterdir()) == [readme]
