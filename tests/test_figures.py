"""Figures and tables: what is averaged, what is grouped, which run is in which cell, and the one-line errors."""

import json
from dataclasses import asdict
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

import vpd
from harness import command
from neighbours import distil
from study import figures, tables
from test_command import full


def run(folder, method, seed, rewards, margins=None, teacher=None, **settings):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"method": method, "seed": seed, "out": str(folder), **settings}))
    rows = [{"kind": "eval", "step": 0, "avg": rewards[0], "teacher_avg": teacher}]
    for step, reward in enumerate(rewards):
        rows.append({"kind": "train", "step": step, "reward": reward, "margin": margins[step] if margins else None})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def study_run(avg, **train):
    """A run of study.json with two evaluations; `train`: lists by measure."""
    nothing = {key: None for key in ("reward", "margin", "entropy", "divergence")}
    return {"eval": {"step": [0, 10], "avg": avg, "teacher": None}, "train": nothing | train}


def study(tmp_path, rows):
    """study.json with rows {name: list of runs}."""
    path = tmp_path / "study.json"
    named = {name: {"label": name.split("/")[1].upper(), "runs": dict(enumerate(runs, 1))} for name, runs in rows.items()}
    path.write_text(json.dumps({"hardware": "none", "rows": named}))
    return path


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: {"lines": [(x, y, colour, dash)], "bands": [(low, high)], "titles": [...], "ylabels": [...], "limits":
    [(low, high)], "bases": [y]}; no PNG is made."""
    seen = {"lines": [], "bands": [], "titles": [], "ylabels": [], "limits": [], "bases": []}
    axes = figures.plt.Axes
    plot, level, limit = axes.plot, axes.axhline, axes.set_ylim

    def line(self, x, y, **k):
        seen["lines"].append((list(x), list(y), k["color"], k["linestyle"]))
        return plot(self, x, y, **k)

    monkeypatch.setattr(axes, "plot", line)
    monkeypatch.setattr(axes, "axhline", lambda self, y, **k: seen["bases"].append(y) or level(self, y, **k))
    monkeypatch.setattr(axes, "fill_between", lambda self, x, low, high, **_: seen["bands"].append((list(low), list(high))))
    monkeypatch.setattr(axes, "set_title", lambda self, text, **_: seen["titles"].append(text))
    monkeypatch.setattr(axes, "set_ylabel", lambda self, text, **_: seen["ylabels"].append(text))
    monkeypatch.setattr(axes, "set_ylim", lambda self, y, **k: (k or seen["limits"].append(y), limit(self, y, **k)))
    monkeypatch.setattr(figures.plt.Figure, "savefig", lambda self, file, **_: file.write(b"picture"))
    return seen


def assert_refused(argv, reason, capsys, main=figures.main):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and error.count("\n") == 1 and reason in error and out == ""


# ---- Curves of runs --------------------------------------------------------------------------------------------


def test_seeds_are_one_curve_and_settings_that_differ_are_named(tmp_path):
    runs = [
        run(tmp_path / "a", "vpd", 1, [0.1, 0.2], e_step_every=1),
        run(tmp_path / "b", "vpd", 2, [0.3, 0.4], e_step_every=1),
        run(tmp_path / "c", "vpd", 1, [0.3, 0.4], e_step_every=5),
        run(tmp_path / "d", "grpo", 1, [0.3, 0.4], e_step_every=1),
    ]
    names = figures.draw(runs, tmp_path / "out.png")
    assert names == ["VPD e_step_every=1 (2 seeds)", "VPD e_step_every=5 (1 seed)", "GRPO (1 seed)"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_band_is_lowest_to_highest_seed_and_the_line_their_mean(tmp_path, drawn):
    figures.draw([run(tmp_path / "a", "vpd", 1, [0.2]), run(tmp_path / "b", "vpd", 2, [0.6])], tmp_path / "out.png")
    assert drawn["lines"][0][1] == pytest.approx([(0.2 + 0.6) / 2]) and drawn["bands"][0] == ([0.2], [0.6])


def test_the_teachers_pass_rate_is_drawn_only_where_a_run_has_one(tmp_path, drawn):
    one, two = run(tmp_path / "a", "vpd", 1, [0.1], [0.5], teacher=0.25), run(tmp_path / "b", "grpo", 1, [0.1])
    figures.draw([one, two], tmp_path / "x.png")
    assert drawn["titles"] == [figures.MEASURES[m][0] for m in ("avg", "reward", "margin", "teacher_avg")]
    assert drawn["lines"][-1][:2] == ([0], [0.25]) and len(drawn["lines"]) == 2 + 2 + 1 + 1
    drawn["titles"].clear()
    figures.draw([two], tmp_path / "x.png")
    assert drawn["titles"] == [figures.MEASURES[m][0] for m in ("avg", "reward")]


def test_the_base_model_is_a_line_at_its_mean_pass_rate_one_for_each_model(tmp_path, drawn):
    starts = (("vpd", 1, 0.1, "a"), ("vpd", 2, 0.3, "a"), ("grpo", 1, 0.2, "a"), ("grpo", 1, 0.8, "b"))
    figures.draw([run(tmp_path / str(i), method, seed, [avg, 1.0], model=model)
                  for i, (method, seed, avg, model) in enumerate(starts)], tmp_path / "x.png")  # fmt: skip
    assert drawn["bases"] == pytest.approx([(0.1 + 0.3 + 0.2) / 3, 0.8])  # and none in the panel of rewards


@pytest.mark.parametrize("first, last", [(0.23, 0.31), (-0.2, -0.1), (-1, 2)])
def test_zero_is_on_the_margins_axis_so_that_noise_is_no_rise(first, last, tmp_path, drawn):
    figures.draw([run(tmp_path / "a", "vpd", 1, [0.1] * 10, [first] * 5 + [last] * 5)], tmp_path / "x.png")
    rates, reward, (low, high) = drawn["limits"]
    assert rates == reward == (0, 1) and low <= first < last <= high
    assert low == 0 if first > 0 else high == 0 if last < 0 else low < 0 < high


def test_smoothing_is_a_centred_mean_that_shrinks_at_the_ends():
    expected = [(1 + 2 + 6) / 3, (1 + 2 + 6 + 3) / 4, 15 / 5, (2 + 6 + 3 + 3 + 9) / 5, (6 + 3 + 3 + 9) / 4, (3 + 3 + 9) / 3]
    assert figures.smooth(np.array([1.0, 2.0, 6.0, 3.0, 3.0, 9.0])) == pytest.approx(expected)


def test_steps_without_a_value_are_left_out_and_not_drawn_as_zero():
    rows = [{"kind": "train", "step": 0, "margin": None}, {"kind": "train", "step": 1, "margin": 0.5}]
    assert figures.series(rows, "margin") == {1: 0.5}


@pytest.mark.parametrize(
    "name, reason",
    [("nowhere", "is no run directory: there is no such folder"), ("file", "is no run directory: it is a file"),
     ("folder", "is no run directory: it has no config.json and no log.jsonl"),
     ("half", "is no run directory: it has no log.jsonl")],
)  # fmt: skip
def test_what_a_folder_lacks_of_a_run_is_named_and_exit_2(name, reason, tmp_path, capsys):
    (tmp_path / "file").touch(), (tmp_path / "folder").mkdir(), (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text('{"method": "vpd"}')
    assert_refused([tmp_path / name, "--out", tmp_path / "x.png"], f"{tmp_path / name} {reason}", capsys)
    assert not (tmp_path / "x.png").exists()


VPD, ROW = '{"method": "vpd"}', '{"kind": "train", "step": 0, "reward": 0.5}'


@pytest.mark.parametrize(
    "config, log, reason",
    [("[]", ROW, "config.json is no JSON object"), ("{}", ROW, "config.json is not the configuration of a run"),
     ("{", ROW, "config.json is no JSON object"), (VPD, "", "log.jsonl has no batch"),
     (VPD, '{"kind": "resume", "step": 0}', "log.jsonl has no batch"),
     (VPD, f"{ROW}\n{ROW[:30]}", "log.jsonl, line 2 is no JSON object"), (VPD, "\0\xff", "log.jsonl is no JSON object"),
     (VPD, '{"step": 0}', "log.jsonl, line 1 is no row"), (VPD, "[]", "log.jsonl, line 1 is no JSON object"),
     (VPD, '{"kind": "train", "step": "one"}', "log.jsonl, line 1 is no row"),
     (VPD, ROW.replace("0.5", '"high"'), "log.jsonl, line 1: reward is no number")],
)  # fmt: skip
def test_run_whose_files_are_something_else_is_one_line_and_exit_2(config, log, reason, tmp_path, capsys):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "log.jsonl").write_text(log, encoding="latin-1")
    assert_refused([tmp_path, "--out", tmp_path / "x.png"], f"{tmp_path}/{reason}", capsys)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("out, reason", [("no/x.png", "there is no folder"), ("", "it is a folder"), ("x.foo", "foo")])
def test_a_picture_that_cannot_be_written_is_one_line_and_exit_2(out, reason, tmp_path, capsys):
    one = run(tmp_path / "a", "vpd", 1, [0.1])
    assert_refused([one, "--out", tmp_path / out], reason, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and not tmp_path.with_suffix(".png").exists()


def test_curves_and_figures_stay_whole_on_a_full_disk(tmp_path, monkeypatch):
    one = run(tmp_path / "a", "vpd", 1, [0.1])
    path = study(tmp_path, {"trace/vpd": [study_run([0.1, 0.2])]})
    (tmp_path / "x.png").write_bytes(b"old"), (tmp_path / "progress.png").write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", full)
    for argv, file in (([one, "--out", tmp_path / "x.png"], "x.png"),
                       (["--study", path, "--out", tmp_path], "progress.png")):  # fmt: skip
        with pytest.raises(command.CannotWrite, match=f"^{tmp_path / file}: No space left on device$"):
            figures.main([str(word) for word in argv])
        assert (tmp_path / file).read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "progress.png", "study.json", "x.png"]


def test_a_picture_without_an_ending_is_named_as_it_is_written(tmp_path, capsys):
    figures.main([str(run(tmp_path / "a", "vpd", 1, [0.1])), "--out", str(tmp_path / "curves")])
    assert capsys.readouterr().out.startswith(f"{tmp_path}/curves.png: ") and (tmp_path / "curves.png").exists()


def test_options_that_do_not_go_together_are_one_line_and_exit_2(tmp_path, capsys):
    path = study(tmp_path, {"trace/vpd": [study_run([0.1, 0.2])]})
    assert_refused(["--study", path, "--out", path], "go to a folder", capsys)
    assert_refused(["a", "--study", "b"], "--study goes without", capsys)
    assert_refused(["--nothing"], "--nothing", capsys)


# ---- The paper's figures ---------------------------------------------------------------------------------------


def test_every_figure_is_drawn_where_all_rows_are_there(tmp_path, monkeypatch, capsys):
    train = dict.fromkeys(("reward", "margin", "entropy", "divergence"), [0.1, 0.2, 0.3])
    run = study_run([0.1, 0.4], **train)
    run["eval"]["teacher"] = [0.3, 0.5]
    names = {f"{subset}/{v}" for panels in figures.FIGURES.values() for subset, _, variants in panels for v in variants}
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "study" / "results"
    results.mkdir(parents=True)
    study(results, {name: [run, run] for name in sorted(names - {"trace-long/*"})})
    figures.main([])  # no argument: study/results/study.json, into study/results
    out, error = capsys.readouterr()
    files = ["cold", "long", "margin", "prior", "progress"]
    assert sorted(path.stem for path in results.glob("*.png")) == files and error == ""
    assert all((results / f"{file}.png").read_bytes().startswith(b"\x89PNG") for file in files)
    assert "study/results/margin.png: VPD (2 seeds), SDPO (2 seeds)\n" in out


def test_study_curve_is_the_mean_over_seeds_and_its_band_their_extremes(tmp_path, drawn):
    path = study(tmp_path, {"trace-cold/vpd": [study_run([0.1, 0.3]), study_run([0.1, 0.4]), study_run([0.4, 0.8])]})
    lines, _ = figures.draw_study(path, tmp_path)
    assert lines == [f"{tmp_path}/cold.png: VPD (3 seeds)"] and drawn["bases"] == pytest.approx([(0.1 + 0.1 + 0.4) / 3])
    steps, mean, *_ = drawn["lines"][0]
    assert steps == [0, 10] and mean == pytest.approx([(0.1 + 0.1 + 0.4) / 3, (0.3 + 0.4 + 0.8) / 3])
    assert drawn["bands"] == [([0.1, 0.3], [0.4, 0.8])]


def test_margin_is_smoothed_for_each_seed_before_the_mean_and_says_so(tmp_path, drawn):
    """Batch 1 has no margin on the second seed, so it is left out of both."""
    runs = [study_run([0, 0], margin=[1, 9, 2, 6]), study_run([0, 0], margin=[3, None, 4, 5])]
    figures.draw_study(study(tmp_path, {"trace/vpd": runs}), tmp_path)
    steps, mean, *_ = drawn["lines"][0]  # three batches each, less than the width of 5: their mean everywhere
    assert steps == [0, 2, 3] and mean == pytest.approx([((1 + 2 + 6) / 3 + (3 + 4 + 5) / 3) / 2] * 3)
    assert drawn["bands"][0] == (pytest.approx([(1 + 2 + 6) / 3] * 3), pytest.approx([(3 + 4 + 5) / 3] * 3))
    labelled = dict(zip(drawn["titles"], drawn["ylabels"]))
    assert labelled["trace: reward margin of the teacher"] == "mean of 5 batches"
    assert labelled["trace: pass rate on validation problems"] == ""  # evaluations are not smoothed


def test_rows_and_values_that_are_not_there_are_named_and_what_is_there_is_drawn(tmp_path, drawn, capsys):
    run = study_run([0.1, 0.2], margin=[0.1], entropy=[0.1])
    path = study(tmp_path, {"trace/vpd": [run], "trace-long/grpo": [run], "trace-long/vpd": []})
    figures.main(["--study", str(path), "--out", str(tmp_path / "new" / "folder")])
    said = [line.removeprefix(f"figures.py: {tmp_path}/new/folder/") for line in capsys.readouterr().err.splitlines()]
    assert said[:1] == ["margin.png: no row trace/sdpo"]
    assert {"progress.png: no row code/vpd", "progress.png: no row trace/grpo", "long.png: no row trace-long/sdpo",
            "long.png: no avg of trace-long/vpd", "long.png: no divergence of trace-long/grpo",
            f"cold.png: not drawn, {path} has none of its rows"} <= set(said)  # fmt: skip
    assert "progress.png: no row trace/reweight" not in said  # the study has the hybrids only on code
    assert not any("distil" in line or "ovd" in line for line in said)  # later methods are not missed
    assert said.count("prior.png: no row trace/vpd fixed prior") == 1  # once, for two panels
    files = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert files == ["long.png", "margin.png", "prior.png", "progress.png"]


def test_legend_gives_both_numbers_of_seeds_where_panels_differ(tmp_path, drawn):
    run = study_run([0.1, 0.2])
    lines, _ = figures.draw_study(study(tmp_path, {"code/vpd": [run], "trace/vpd": [run] * 3}), tmp_path)
    assert f"{tmp_path}/progress.png: VPD (1 and 3 seeds)" in lines


def test_method_looks_the_same_in_every_figure_and_no_two_look_alike(tmp_path, drawn):
    seed = study_run([0.1, 0.2], margin=[0.5])
    rows = "code/grpo trace/vpd trace/sdpo trace/grpo trace-cold/grpo trace-long/grpo trace-long/new".split()
    figures.draw_study(study(tmp_path, {name: [seed] for name in rows}), tmp_path)
    one, two, three = (figures.STYLES[method] for method in ("vpd", "sdpo", "grpo"))
    margin, code, trace, cold, prior, long = [one, two], [three], [one, two, three], [three], [one] * 2, [three]
    expected = [*margin, *code, *trace, *cold, *prior, *long, figures.SPARE[0]]
    assert [(colour, dash) for _, _, colour, dash in drawn["lines"]] == expected
    every = [*figures.STYLES.values(), *figures.SPARE]
    assert len(set(every)) == len(every)
    drawn["lines"].clear()  # curves of runs as well
    figures.draw([run(tmp_path / "a", "sdpo", 1, [0.1]), run(tmp_path / "b", "vpd", 1, [0.1])], tmp_path / "x.png")
    assert [(colour, dash) for _, _, colour, dash in drawn["lines"]] == [two, one] * 2  # pass rate, reward; no margins


@pytest.mark.parametrize(
    "broken",
    [{"label": "VPD"}, {"runs": {}}, {"label": "VPD", "runs": []}, {"label": "VPD", "runs": {"1": {}}},
     {"label": "VPD", "runs": {"1": study_run([0.1])}},  # two steps
     {"label": "VPD", "runs": {"1": study_run([0.1, "high"])}},
     {"label": "VPD", "runs": {"1": study_run([0.1, 0.2], margin=3)}}],
)  # fmt: skip
def test_faulty_row_of_a_study_is_one_line_and_no_figure_is_written(broken, tmp_path, capsys):
    good = {"label": "SDPO", "runs": {"1": study_run([0.1, 0.2], margin=[1])}}
    (tmp_path / "study.json").write_text(json.dumps({"rows": {"trace/sdpo": good, "trace/broken": broken}}))
    assert_refused(["--study", tmp_path / "study.json", "--out", tmp_path / "out"], "trace/broken", capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"rows": []}'])
def test_file_that_is_no_study_is_one_line_and_exit_2(text, tmp_path, capsys):
    if text is not None:
        (tmp_path / "study.json").write_text(text)
    assert_refused(["--study", tmp_path / "study.json", "--out", tmp_path], "study.json", capsys)


# ---- The paper's tables ----------------------------------------------------------------------------------------


def evaluated(argv, after, before=0.3, parts=None, **differs):
    """(name, config.json, evaluation.json) of a run started with these flags; `differs`: changes of its evaluation."""
    flags = [flag for flag in argv.replace("--method distil", "").split()]
    cfg = (distil if "distil" in argv else vpd).settings(flags)
    config = asdict(cfg) | {"out": "x", "teacher": cfg.reader(), "commit": "c"}
    subset = cfg.subset or {"lcb": "v6", "sciknoweval": "biology", "math": "dapo", "toy": "trace"}[cfg.task]
    result = {"task": f"{cfg.task}/{subset}", "split": "test", "seed": 0, "temperature": cfg.eval_temperature,
              "top_p": cfg.eval_top_p, "max_tokens": cfg.max_response_tokens, "n": cfg.eval_samples}  # fmt: skip
    result |= differs | {"parts": {}}
    of = {part: {"avg": avg} for part, avg in (parts or {}).items()}
    return "run", config, {"before": result | {"avg": before}, "after": result | {"avg": after, "parts": of}}


SMALL = "--task sciknoweval --model Qwen/Qwen3-1.7B"
OLMO = "--task sciknoweval --model allenai/Olmo-3-7B-Instruct --subset physics"
PARTS = {"biology": 0.6, "chemistry": 0.7, "material": 0.5, "physics": 0.8}
TABLE_2 = "64.75 81.88 77.06 73.67 74.34"  # VPD of Qwen3-1.7B where nothing was measured


def rows(*runs):
    """The printed tables, {"title/model/row": its other cells, joined by one blank}, and the notes."""
    found, notes = tables.collect(list(runs))
    printed, table, model = {}, "", ""
    for line in tables.lines(found):
        if line.startswith(("Table", "Section")):
            table, model = line.split(":")[0], ""
        elif line.startswith("  ") and model:
            label, *cells = [cell for cell in line.split("  ") if cell]
            printed[f"{table}/{model}/{label}"] = " ".join(cell.strip() for cell in cells)
        elif not line.startswith(" "):
            model = line
    return printed, notes


@pytest.mark.parametrize(
    "runs, expected",
    [  # ours, then the paper's, typed from it; what was not measured is empty
        # the base is measured once: both runs start from it, evaluated with one seed
        (["--task lcb --seed 1"], {"1/Qwen3-8B/Base": "30.00 28.05", "1/Qwen3-8B/VPD": "50.00 49.62", "1/Qwen3-8B/GRPO": "45.61"}),
        (["--task lcb --method reweight --model a/folder/qwen3-8b/"], {"1/Qwen3-8B/SDPO+RL (Adv Reweight)": "50.00 44.85"}),
        (["--task lcb --method joint"], {"1/Qwen3-8B/SDPO+RL (Joint Loss)": "50.00 47.52", "1/Qwen3-8B/SDPO": "47.33"}),
        (["--task sciknoweval --subset chemistry --method sdpo"], {"2/Qwen3-8B/SDPO": "61.62 50.00 82.26 79.59 74.30 74.44"}),
        ([f"{SMALL} --subset physics --feedback critique --method sdpo"],
         {"3/Qwen3-1.7B/SDPO": "62.12 78.66 71.21 50.00 58.13 67.53", "2/Qwen3-1.7B/SDPO": "61.50 72.41 71.54 59.92 66.34"}),
        # GRPO reads no feedback, so that it is in Table 2 whatever the source is
        ([f"{SMALL} --subset physics --feedback critique --method grpo"],
         {"2/Qwen3-1.7B/GRPO": "61.25 75.65 74.93 50.00 67.42 69.81"}),
        ([f"{SMALL} --subset physics {flags}" for flags in ("--e_step_every 1", "--e_step_every 10", "--prior fixed")],
         {"2/Qwen3-1.7B/VPD": TABLE_2, "4/Qwen3-1.7B/VPD (F5)": TABLE_2, "5/Qwen3-1.7B/Dynamic": TABLE_2,
          "4/Qwen3-1.7B/VPD (F1)": "61.12 78.51 72.47 50.00 68.75 70.21",
          "4/Qwen3-1.7B/VPD (F10)": "59.50 79.50 71.61 50.00 66.48 69.27",
          "5/Qwen3-1.7B/Fixed": "55.87 76.34 72.81 50.00 66.33 67.84"}),
        (["--task sciknoweval --model Qwen/Qwen3-4B-Base --subset physics"],
         {"D.3/Qwen3-4B-Base/Base": "29.37 32.71 50.84 30.00 51.33 41.06",
          "D.3/Qwen3-4B-Base/GRPO": "58.63 77.98 81.12 80.23 74.49",
          "D.3/Qwen3-4B-Base/VPD": "48.50 70.45 64.03 50.00 72.81 63.95"}),
        ([f"{OLMO} --lr 5e-6"], {"2/Olmo-3-7B-Instruct/VPD": "55.62 80.33 76.06 50.00 71.17 70.80"}),
        # settings of the machine keep no run out
        (["--task lcb --micro_batch_tokens 99 --sampler hf --checkpoint_every 3 --eval_every 7 --seed 5 --engine_memory 0.3"],
         {"1/Qwen3-8B/VPD": "50.00 49.62"}),
    ],
)  # fmt: skip
def test_a_run_is_in_the_cell_of_its_settings_beside_the_papers_number(runs, expected):
    printed, notes = rows(*[evaluated(flags, 0.5) for flags in runs])
    assert notes == [] and {key: printed.get(f"Table {key}") for key in expected} == expected
    assert ("Table 3" in str(printed)) == any(key.startswith("3") for key in expected)


@pytest.mark.parametrize(
    "flags, reason",
    [(f"--task lcb {flags}", f"{flags.split()[0].removeprefix('--').removeprefix('no_')}=") for flags in (
        "--feedback environment", "--feedback sibling", "--lr 2e-6", "--steps 10", "--teacher ema", "--shift_rate 1",
        "--beta 0.2", "--group_size 4", "--no_borrow", "--top_k 0", "--divergence js", "--e_groups all",
        "--train_tests public", "--since 2025-01-01")]
    + [("--task lcb --e_step_every 10", "the paper has no vpd F=10 of qwen3-8b"),
       ("--task lcb --prior fixed", "the paper has no vpd fixed prior of qwen3-8b"),
       ("--task lcb --model Qwen/Qwen3-1.7B", "the paper has no vpd of qwen3-1.7b"),
       (f"{SMALL} --e_step_every 10 --prior fixed", "="), (f"{SMALL} --feedback critique --method reshape", "feedback=critique"),
       (OLMO, "lr=1e-05"), ("--task lcb --method distil", "method=distil"), ("--task math", "the paper has no vpd of qwen3-8b"),
       ("--task toy", "task=toy")],
)  # fmt: skip
def test_a_run_with_settings_of_no_cell_is_in_no_table_and_told_why(flags, reason):
    run = evaluated(flags, 0.9)
    found, notes = tables.collect([run])
    assert not any(key != "base" for _, _, key, _ in found)
    assert len(notes) == 2 and notes[0].startswith("run: in no table") and notes[1] == "1 of 1 runs in no table"
    assert reason in notes[0]


@pytest.mark.parametrize("differs", [{"n": 1}, {"temperature": 0.0}, {"top_p": 1.0}, {"split": "train"}, {"max_tokens": 9}])
def test_evaluation_with_other_settings_is_in_no_table(differs):
    found, notes = tables.collect([evaluated("--task lcb", 0.5, **differs)])
    (name,) = differs
    assert found == {} and f"evaluated with {name}=" in notes[0]


def test_what_training_changes_keeps_no_base_out_and_what_changes_the_problems_does():
    for flags, keys in (("--task lcb --e_groups all", {"base"}), ("--task lcb --until 2025-04-01", set()),
                        (f"{SMALL} --subset biology --feedback critique --lr 1", {"base"})):  # fmt: skip
        found, notes = tables.collect([evaluated(flags, 0.5)])
        assert {key for _, _, key, _ in found} == keys
        assert ("its base model is in one" in notes[0]) == bool(keys)


def test_percent_is_the_mean_with_half_the_t_interval_over_seeds():
    assert tables.percent([]) == "" and tables.percent([0.4962]) == "49.62"
    # t quantiles at 0.975 from a table: 12.706 for 1 degree of freedom, 4.303 for 2
    spread = sqrt((0.02**2 + 0.02**2) / 1)  # sample standard deviation of 0.48, 0.52
    assert tables.percent([0.48, 0.52]) == f"50.00 ± {100 * 12.706 * spread / sqrt(2):.2f} (2)" == "50.00 ± 25.41 (2)"
    spread = sqrt((0.02**2 + 0 + 0.02**2) / 2)
    three = f"50.00 ± {100 * 4.303 * spread / sqrt(3):.2f} (3)"
    assert tables.percent([0.48, 0.5, 0.52]) == three == "50.00 ± 4.97 (3)"
    assert tables.percent([0.5, 0.5]) == "50.00 ± 0.00 (2)"


def test_columns_are_under_each_other():
    lines = tables.lines(tables.collect([evaluated("--task lcb", 0.5)])[0])
    end = lines[1].index("paper") + len("paper")
    assert all(len(line) == end for line in lines[3:10]) and lines[9][:6] == "  VPD " and lines[9][end - 12 : end - 7] == "50.00"


def test_note_gives_the_first_three_reasons_and_the_number_of_the_others():
    _, notes = rows(evaluated("--task lcb --beta 0.2 --lr 2e-6", 0.5, n=1))
    assert notes[0] == "run: in no table: beta=0.2, lr=2e-06, evaluated with n=1"
    _, notes = rows(evaluated("--task lcb --beta 0.2 --lr 2e-6 --steps 10 --top_k 0", 0.5, n=1))
    assert notes == ["run: in no table: beta=0.2, lr=2e-06, steps=10 and 2 more", "1 of 1 runs in no table"]


def test_seeds_are_averaged_and_the_average_has_only_seeds_with_every_domain():
    printed, _ = rows(*[evaluated(f"--task lcb --seed {seed}", after) for seed, after in ((1, 0.48), (2, 0.52))])
    assert printed["Table 1/Qwen3-8B/VPD"] == "50.00 ± 25.41 (2) 49.62" and printed["Table 1/Qwen3-8B/Base"] == "30.00 28.05"
    runs, vpd = [evaluated(f"{SMALL} --subset {d} --seed 1", avg) for d, avg in PARTS.items()], "Table 2/Qwen3-1.7B/VPD"
    assert rows(*runs)[0][vpd].endswith(f"{100 * (0.6 + 0.7 + 0.5 + 0.8) / 4:.2f} 74.34")
    printed, _ = rows(*runs, evaluated(f"{SMALL} --subset physics --seed 2", 0.6))
    assert printed[vpd].endswith("70.00 ± 127.06 (2) 73.67 65.00 74.34")  # 12.706 x 0.1
    assert rows(*runs[1:])[0][vpd] == "64.75 70.00 81.88 50.00 77.06 80.00 73.67 74.34"


def test_one_model_for_all_domains_is_a_row_of_its_own_and_mathematics_has_a_table():
    printed, notes = rows(evaluated(f"{SMALL} --subset all", 0.99, parts=PARTS))
    assert notes == [] and printed["Table 2/Qwen3-1.7B/VPD"] == TABLE_2
    together = printed["Table 2/Qwen3-1.7B/VPD, one model for all domains"]
    assert together == "60.00 64.75 70.00 81.88 50.00 77.06 80.00 73.67 65.00 74.34"
    printed, notes = rows(evaluated("--task math --method grpo", 0.5, parts={"math500": 0.8, "aime24": 0.2}))
    assert notes == [] and printed == {"Section 4.2/Qwen3-8B/GRPO": "80.00 83.80"}


def test_seed_that_is_there_already_is_named_and_not_averaged():
    printed, notes = rows(evaluated("--task lcb --seed 1", 0.5), evaluated("--task lcb --seed 1", 0.7))
    assert printed["Table 1/Qwen3-8B/VPD"] == "50.00 49.62"
    assert "seed 1 of these settings is there already" in notes[0] and notes[1] == "1 of 2 runs in no table"


def write_run(folder, flags):
    _, config, evaluation = evaluated(flags, 0.5)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return str(folder)


def test_the_command_prints_tables_and_names_the_runs_that_are_in_none(tmp_path, capsys):
    lcb, toy = write_run(tmp_path / "a", "--task lcb"), write_run(tmp_path / "b", "--task toy")
    for runs in ([lcb, toy], [toy]):
        tables.main(runs)
        out, error = capsys.readouterr()
        assert error.splitlines() == [
            f"tables.py: {toy}: in no table: task=toy", f"tables.py: 1 of {len(runs)} runs in no table"]  # fmt: skip
        assert out.startswith("Table 1: LiveCodeBench v6, avg@4, percent\n") if lcb in runs else out == ""


@pytest.mark.parametrize(
    "name, text",
    [("evaluation.json", None), ("evaluation.json", "[]"), ("evaluation.json", "{}"), ("config.json", "{}"),
     ("config.json", '{"model": "Qwen/Qwen3-8B", "task": "lcb", "seed": 1}')],
)  # fmt: skip
def test_run_that_was_not_evaluated_or_is_none_is_one_line_and_exit_2(name, text, tmp_path, capsys):
    write_run(tmp_path, "--task lcb")
    (tmp_path / name).write_text(text) if text else (tmp_path / name).unlink()
    reason = f"{tmp_path} is no run directory: it has no evaluation.json; python evaluate.py --run {tmp_path} makes it"
    assert_refused([tmp_path], str(tmp_path) if text else reason, capsys, tables.main)
    assert_refused([], "runs", capsys, tables.main)
