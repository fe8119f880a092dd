"""Figures and tables: means, groups, which run enters which row, and one-line errors."""

import json
import re
from dataclasses import asdict

import pytest

import vpd
from harness.settings import NOT_OF_THE_RUN
from study import figures, tables
from test_study import assert_refused, made


def run(folder, method, seed, rewards, margins=None, teacher=None, **settings):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"method": method, "seed": seed, "out": str(folder), **settings}))
    rows = [{"kind": "eval", "step": 0, "avg": rewards[0], "teacher_avg": teacher}, {"kind": "resume", "avg": 1, "reward": 1}]
    for step, reward in enumerate(rewards):
        rows.append({"kind": "train", "step": step, "reward": reward, "margin": margins[step] if margins else None})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def study(tmp_path, rows):
    """study.json with rows {name: its runs}."""
    named = {name: {"label": name.split("/")[1].upper(), "runs": dict(enumerate(runs, 1))} for name, runs in rows.items()}
    (tmp_path / "study.json").write_text(json.dumps({"rows": named}))
    return tmp_path / "study.json"


@pytest.fixture
def draw(monkeypatch):
    """Runs the command and returns the panels of all its figures, {title: axis}; no PNG is made."""
    drawn = []

    def saved(figure, file, **_):
        drawn.extend(figure.axes)
        file.write(b"picture")

    def draw(*argv):
        drawn.clear()
        figures.main([str(word) for word in argv])
        return {axis.get_title(): axis for axis in drawn}

    monkeypatch.setattr(figures.Figure, "savefig", saved)
    return draw


GREY = "#777777"  # of the base models' lines


def curves(axis):
    """[(x, y)] of the curves."""
    lines = [line for line in axis.get_lines() if line.get_color() != GREY]
    return [([*map(float, line.get_xdata())], pytest.approx([*map(float, line.get_ydata())])) for line in lines]


def looks(axis):
    return [(line.get_color(), line.get_linestyle()) for line in axis.get_lines() if line.get_color() != GREY]


def base(axis):
    """The heights of the base models' lines."""
    return [line.get_ydata()[0] for line in axis.get_lines() if line.get_color() == GREY]


RATE, TEACHER, REWARD, MARGIN = (figures.MEASURES[name][0] for name in ("avg", "teacher", "reward", "margin"))

# ---- Curves of runs --------------------------------------------------------------------------------------------


def test_seeds_share_a_curve_and_the_command_names_settings_that_differ(tmp_path, capsys):
    settings = (("vpd", 1, 1), ("vpd", 2, 1), ("vpd", 1, 5), ("grpo", 1, 1))
    runs = [run(tmp_path / str(i), method, seed, [0.3, 0.4], e_step_every=every, torch=str(i), model_files=str(i))
            for i, (method, seed, every) in enumerate(settings)]  # fmt: skip
    figures.main([*map(str, runs), "--out", str(tmp_path / "curves.png")])
    says = f"{tmp_path}/curves.png: VPD e_step_every=1 (2 seeds), VPD e_step_every=5 (1 seed), GRPO (1 seed)\n"
    assert capsys.readouterr() == (says, "") and (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_measure_is_drawn_where_a_run_has_values(tmp_path, draw):
    one, two = run(tmp_path / "a", "vpd", 1, [0.1, 0.2], [None, 0.5], 0.25), run(tmp_path / "b", "grpo", 1, [0.0])
    assert list(draw(two, "--out", tmp_path / "x.png")) == [RATE, REWARD]
    panels = draw(one, two, "--out", tmp_path / "x.png")
    assert list(panels) == [RATE, REWARD, MARGIN, TEACHER]
    assert curves(panels[MARGIN]) == [([1], [0.5])] and curves(panels[TEACHER]) == [([0], [0.25])]
    assert [curves(panels[title])[1] for title in (RATE, REWARD)] == [([0], [0.0])] * 2  # a rate of 0 is a value


def test_each_base_model_is_a_line_at_its_mean_pass_rate(tmp_path, draw):
    starts = (("vpd", 1, 0.1, "a"), ("vpd", 2, 0.3, "a"), ("grpo", 1, 0.2, "a"), ("grpo", 1, 0.8, "b"))
    runs = [run(tmp_path / str(i), method, seed, [avg, 1.0], model=model) for i, (method, seed, avg, model) in enumerate(starts)]
    panels = draw(*runs, "--out", tmp_path / "x.png")
    assert base(panels[RATE]) == pytest.approx([(0.1 + 0.3 + 0.2) / 3, 0.8]) and base(panels[REWARD]) == []


@pytest.mark.parametrize("start, last", [(0.23, 0.31), (-0.2, -0.1), (-1, 2)])
def test_the_margins_axis_includes_zero(start, last, tmp_path, draw):
    margins = [start] * 5 + [last] * 5
    panels = draw(run(tmp_path / "a", "vpd", 1, [0.1] * 10, margins), "--out", tmp_path / "x.png")
    low, high = panels[MARGIN].get_ylim()
    assert panels[RATE].get_ylim() == panels[REWARD].get_ylim() == (0, 1) and low <= start < last <= high
    assert low == 0 if start > 0 else high == 0 if last < 0 else low < 0 < high


VPD, ROW = '{"method": "vpd"}', '{"kind": "train", "step": 0, "reward": 0.5}'
NO_RUN = "/bad/config.json is not the configuration of a run: "


@pytest.mark.parametrize("config, log, reason", [
    (None, ROW, f"{NO_RUN}No such file"), ('["method"]', ROW, NO_RUN), ("{}", ROW, f"{NO_RUN}it lacks method"),
    (VPD.replace('"vpd"', "1"), ROW, f"{NO_RUN}its method is 1"), (VPD, None, "/log.jsonl: No such file"),
    (VPD, "", "/log.jsonl has no batch"), (VPD, '{"kind": "resume", "step": 0}', "/log.jsonl has no batch"),
    (VPD, f"{ROW}\n{ROW[:30]}", "/log.jsonl, line 2 is not a JSON object"), (VPD, "\0\xff", "/log.jsonl, line 1 is not a JSON"),
    (VPD, ROW.replace("0.5", '"high"'), "could not convert string to float: 'high'"),
])  # fmt: skip
def test_a_run_with_a_missing_or_wrong_file_is_refused_in_one_line(config, log, reason, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    for name, text in (("config.json", config), ("log.jsonl", log)):
        if text is not None:
            (tmp_path / "bad" / name).write_text(text, encoding="latin-1")
    assert_refused(figures, [tmp_path / "bad", "--out", tmp_path / "x.png"], reason, capsys)
    assert not (tmp_path / "x.png").exists()


def test_wrong_arguments_are_refused_in_one_line_and_nothing_is_written(tmp_path, capsys):
    run(tmp_path / "a", "vpd", 1, [0.1])
    study(tmp_path, {"trace/vpd": [made()]})
    (tmp_path / "list").write_text("[]")
    for argv, reason in (
        ("{0}/nowhere", "/nowhere/config.json"), ("{0}/study.json", "Not a directory"), ("{0}/a --out {0}", "it is a folder"),
        ("{0}/a --out {0}/no/x.png", "there is no folder"), ("{0}/a --out {0}/x.foo", "foo"), ("{0}/a --out {0}/x", "Format"),
        ("a --study b", "not both"), ("--study {0}/study.json --out {0}/study.json", "File exists"),
        ("--study {0}/none --out {0}/new", "none is not a JSON object"), ("--study {0}/list --out {0}/new", "it is a list"),
        ("--study {0}/a/log.jsonl --out {0}/new", "log.jsonl is not a JSON object"),
        ("--study {0}/a/config.json --out {0}/new", "config.json has no rows"),
    ):  # fmt: skip
        assert_refused(figures, argv.format(tmp_path).split(), reason, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "list", "study.json"]


# ---- The study's figures ---------------------------------------------------------------------------------------


def test_figures_are_drawn_from_the_rows_that_have_runs(tmp_path, monkeypatch, capsys, draw):
    series = [0.1, 0.2, 0.3]
    names = {f"{subset}/{v}" for panels in figures.FIGURES.values() for subset, _, variants in panels for v in variants}
    (results := tmp_path / "study" / "results").mkdir(parents=True)
    study(results, dict.fromkeys(names, [made(margin=series, entropy=series)] * 2))
    monkeypatch.chdir(tmp_path)
    draw()  # no argument: study/results/study.json, into study/results
    assert {path.stem for path in results.glob("*.png")} == {"dialect", "long", "margin", "progress"}
    assert "study/results/margin.png: VPD (2 seeds), SDPO (2 seeds), SDPO LIVE (2 seeds)\n" in capsys.readouterr().out
    path = study(tmp_path, {"trace/vpd": [made(margin=series, teacher=None)], "code/vpd": [made()] * 3, "trace-120/vpd": [made()]})
    draw("--study", path, "--out", tmp_path / "new" / "folder")
    said = capsys.readouterr().out.replace(f"{tmp_path}/new/folder/", "").splitlines()
    assert said == ["margin.png: VPD (1 seed)", "progress.png: VPD (1 and 3 seeds)",  # where panels differ
                    "long.png: VPD (1 seed)", "dialect.png: not drawn: none of its rows has runs"]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["long.png", "margin.png", "progress.png"]


def test_a_curve_is_the_mean_over_seeds_with_their_extremes_and_an_early_end_stays(tmp_path, draw):
    """Margins are smoothed per seed, by a centred mean that shrinks at the ends. The second seed, twice the first, lacks batch 1,
    and so does the curve."""
    runs = [made(evals=(0.1, 0.3, 0.5)), made(evals=(0.1, 0.2, 0.3)), made(evals=(0.4, 0.8))]
    runs[1]["eval"]["step"][2] = 17
    margins = [made(margin=[1, 0, 2, 6, 3, 3, 9]), made(margin=[2, None, 4, 12, 6, 6, 18])]
    panels = draw("--study", study(tmp_path, {"code/vpd": runs, "trace/vpd": margins}), "--out", tmp_path)
    rate, margin = panels[f"code: {RATE}"], panels[f"trace: {MARGIN}"]
    first = (0.1 + 0.1 + 0.4) / 3
    assert curves(rate) == [([0, 10, 20], [first, 1.3 / 3, (0.5 + 0.3 + 0.8) / 3])] and base(rate) == pytest.approx([first])
    band = {tuple(point) for point in rate.collections[0].get_paths()[0].vertices}
    assert band == {(0, 0.1), (0, 0.4), (10, 0.2), (10, 0.8), (20, 0.3), (20, 0.8)}
    smooth = [(1 + 2 + 6) / 3, (1 + 2 + 6 + 3) / 4, 15 / 5, (2 + 6 + 3 + 3 + 9) / 5, (6 + 3 + 3 + 9) / 4, (3 + 3 + 9) / 3]
    assert curves(margin) == [([0, 2, 3, 4, 5, 6], [1.5 * y for y in smooth])]
    assert {y for _, y in margin.collections[0].get_paths()[0].vertices} == {*smooth, *(2 * y for y in smooth)}
    assert (rate.get_ylabel(), margin.get_ylabel()) == ("", "mean of 5 batches")


def test_a_method_looks_the_same_in_every_figure_and_no_two_look_alike(tmp_path, draw):
    seed = made(margin=[0.5], teacher=None)
    rows = "code/grpo trace/vpd trace/sdpo trace/grpo trace/new".split()
    panels = draw("--study", study(tmp_path, {name: [seed] for name in rows}), "--out", tmp_path)
    one, two, three = (figures.STYLES[method] for method in ("vpd", "sdpo", "grpo"))
    assert [*map(looks, panels.values())] == [[one, two], [one, two, three], [three]]  # margin, progress on trace and on code
    every = [*figures.STYLES.values(), *figures.SPARE]
    assert len(set(every)) == len(every)
    panels = draw(run(tmp_path / "a", "sdpo", 1, [0.1]), run(tmp_path / "b", "vpd", 1, [0.1]), "--out", tmp_path / "x.png")
    assert [*map(looks, panels.values())] == [[two, one]] * 2  # pass rate, reward; no margins
    runs = [run(tmp_path / name, "vpd", 1, [0.1], lr=name) for name in "cd"]
    (first, second), _ = map(looks, draw(*runs, "--out", tmp_path / "x.png").values())
    assert first != second


# ---- The paper's tables ----------------------------------------------------------------------------------------


def evaluated(argv, after=0.5, before=0.3, parts=None, **differs):
    """config.json and evaluation.json of a run with these flags; `differs`: changes to the evaluation."""
    cfg = vpd.settings(argv.split())
    config = asdict(cfg) | {"out": "x", "teacher": cfg.reader(), "commit": "c"}
    subset = cfg.subset or {"lcb": "v6", "sciknoweval": "biology", "math": "dapo", "toy": "trace"}[cfg.task]
    result = {"task": f"{cfg.task}/{subset}", "split": "test", "seed": 0, "temperature": cfg.eval_temperature,
              "top_p": cfg.eval_top_p, "max_tokens": cfg.max_response_tokens, "n": cfg.eval_samples}  # fmt: skip
    result |= differs | {"parts": {}}
    of = {part: {"avg": avg} for part, avg in (parts or {}).items()}
    return config, {"before": result | {"avg": before}, "after": result | {"avg": after, "parts": of}}


SMALL = "--task sciknoweval --model Qwen/Qwen3-1.7B"
OLMO = "--task sciknoweval --model allenai/Olmo-3-7B-Instruct --subset physics"
PARTS = {"biology": 0.6, "chemistry": 0.7, "material": 0.5, "physics": 0.8}
TABLE_2 = "64.75 81.88 77.06 73.67 74.34"  # VPD of Qwen3-1.7B where nothing was measured


def rows(*runs):
    """The printed tables, {"number/row": its other cells, joined by one blank}, and the notes."""
    found, notes = tables.collect({f"run{i}": run for i, run in enumerate(runs)})
    printed, table = {}, ""
    for line in filter(None, tables.lines(found)):
        label, *cells = re.split(r" {2,}", line)
        table = label.split(":")[0].removeprefix("Table ") if not cells else table
        printed |= {f"{table}/{label}": " ".join(cells)} if label and cells else {}
    return printed, notes


DOMAINS = [(f"{SMALL} --subset {domain} --seed 1", avg) for domain, avg in PARTS.items()]
TOGETHER = "60.00 64.75 70.00 81.88 50.00 77.06 80.00 73.67 65.00 74.34"  # ours, then the paper's, of each domain and the mean


@pytest.mark.parametrize("runs, expected", [  # ours, then the paper's, typed from it; what was not measured is empty
    # the base is measured once: both runs start from it, evaluated with one seed
    ([("--task lcb --seed 1", 0.48), ("--task lcb --seed 2", 0.52)],
     {"1/Qwen3-8B Base": "30.00 28.05", "1/Qwen3-8B VPD": "50.00 ± 25.41 (2) 49.62", "1/Qwen3-8B GRPO": "45.61"}),
    ([f"{SMALL} --subset physics --feedback critique --method sdpo"],
     {"3/Qwen3-1.7B SDPO": "62.12 78.66 71.21 50.00 58.13 67.53", "2/Qwen3-1.7B SDPO": "61.50 72.41 71.54 59.92 66.34"}),
    # GRPO reads no feedback, so it is in Table 2 whatever the source
    ([f"{SMALL} --subset physics --feedback critique --method grpo"],
     {"2/Qwen3-1.7B GRPO": "61.25 75.65 74.93 50.00 67.42 69.81"}),
    ([f"{SMALL} --subset physics {flags}" for flags in ("--e_step_every 1", "--prior fixed")],
     {"2/Qwen3-1.7B VPD": TABLE_2, "4/Qwen3-1.7B VPD (F5)": TABLE_2, "5/Qwen3-1.7B Dynamic": TABLE_2,
      "4/Qwen3-1.7B VPD (F1)": "61.12 78.51 72.47 50.00 68.75 70.21",
      "5/Qwen3-1.7B Fixed": "55.87 76.34 72.81 50.00 66.33 67.84"}),
    (["--task sciknoweval --model Qwen/Qwen3-4B-Base --subset physics"],
     {"D.3/Qwen3-4B-Base Base": "29.37 32.71 50.84 30.00 51.33 41.06",
      "D.3/Qwen3-4B-Base VPD": "48.50 70.45 64.03 50.00 72.81 63.95"}),
    (DOMAINS, {"2/Qwen3-1.7B VPD": TOGETHER}),
    # the average has only seeds with every domain; 12.706 x 0.1
    ([*DOMAINS, (f"{SMALL} --subset physics --seed 2", 0.6)],
     {"2/Qwen3-1.7B VPD": TOGETHER.replace("80.00", "70.00 ± 127.06 (2)")}),
    # one model for all domains is a row of its own
    ([(f"{SMALL} --subset all", 0.99, 0.3, PARTS)],
     {"2/Qwen3-1.7B VPD": TABLE_2, "2/Qwen3-1.7B VPD, one model for all domains": TOGETHER}),
    ([("--task math --method grpo", 0.5, 0.3, {"math500": 0.8, "aime24": 0.2})], {"Section 4.2/Qwen3-8B GRPO": "80.00 83.80"}),
])  # fmt: skip
def test_a_run_enters_the_row_of_its_settings_next_to_the_papers_number(runs, expected):
    printed, notes = rows(*(evaluated(*[run] if isinstance(run, str) else run) for run in runs))
    assert notes == [] and {key: printed.get(key) for key in expected} == expected
    assert any(key.startswith("3/") for key in printed) == any(key.startswith("3/") for key in expected)


def test_every_row_of_the_paper_takes_a_run_with_its_flags():
    for row in (row for row in tables.ROWS if row.flags != "base"):
        found, notes = tables.collect({"run": evaluated(f"--task {row.task} --model a/folder/{row.model}/ {row.flags}")})
        assert {(of.model, of.flags) for of, _ in found} - {(row.model, "base")} == {(row.model, row.flags)} and notes == []
        assert len(row.paper) == len(row.columns)


def test_all_settings_count_except_those_of_the_machine_and_the_log():
    free = {"seed", "subset", "checkpoint_every", "log_samples", "micro_batch_tokens", "sampler", "engine_memory", "server_timeout",
            "eval_every", "eval_samples", "eval_temperature", "eval_top_p", "teacher_probe"}  # fmt: skip
    config, evaluation = evaluated("--task lcb")
    assert free | {"method", "teacher", "steps", "lr", "top_k"} < config.keys()
    for name in config.keys() - {"model", "commit", *NOT_OF_THE_RUN}:
        found, notes = tables.collect({"run": (config | {name: "another"}, evaluation)})
        assert notes == ([] if name in free else [f"run: not in the tables: {name}=another"])
        # the base's row ignores settings of training, not those of the problems
        assert bool(found) == (name not in ("data", "since", "until", "train_tests", "smoke"))


@pytest.mark.parametrize("flags, differs, reason", [
    ("--task lcb --model Qwen/Qwen3-1.7B", {}, "the paper has no lcb with qwen3-1.7b"), (OLMO, {}, "lr=1e-05"),
    (f"{SMALL} --feedback critique --method reshape", {}, "feedback=critique"),
    ("--task lcb --beta 0.2 --lr 2e-6 --steps 10", {}, "beta=0.2, lr=2e-06, steps=10"),
    ("--task lcb --beta 0.2 --lr 2e-6 --steps 10 --top_k 0", {}, "beta=0.2, lr=2e-06, steps=10 ..."),
    *[("--task lcb", {name: value}, f"evaluated with {name}={value}")
      for name, value in dict(n=1, temperature=0.0, top_p=1.0, split="train", max_tokens=9).items()],
])  # fmt: skip
def test_a_run_outside_the_tables_is_told_why(flags, differs, reason):
    found, (note,) = tables.collect({"run": evaluated(flags, **differs)})
    assert note == f"run: not in the tables: {reason}"
    assert all(row.flags == "base" for row, _ in found) and not (found and differs)


def write_run(folder, *run):
    folder.mkdir(exist_ok=True)
    for name, content in zip(("config.json", "evaluation.json"), evaluated(*run)):
        (folder / name).write_text(json.dumps(content))
    return str(folder)


def test_the_command_prints_tables_and_names_runs_outside_them(tmp_path, capsys):
    lcb, toy = write_run(tmp_path / "a", "--task lcb"), write_run(tmp_path / "b", "--task toy")
    notes = [f"tables.py: {toy}: not in the tables: the paper has no toy with trace"]
    tables.main([toy])
    assert capsys.readouterr() == ("", notes[0] + "\n")
    again = write_run(tmp_path / "c", "--task lcb", 0.7)  # a seed counts once
    notes += [f"tables.py: {again}: not in the tables: another run has these settings and seed 0"]
    tables.main([lcb, toy, again])
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert error.splitlines() == notes and lines[0] == "Table 1: LiveCodeBench v6, avg@4, percent"
    assert len({len(line) for line in lines[1:9]}) == 1  # columns are under each other
    assert lines[1].endswith("     v6  paper") and lines[8].endswith("  50.00  49.62")


@pytest.mark.parametrize("name, text", [
    ("evaluation.json", None), ("evaluation.json", "[]"), ("evaluation.json", '{"after": {}}'), ("config.json", "{}"),
    ("config.json", '{"model": "Qwen/Qwen3-8B", "task": "lcb", "seed": 1}'),
])  # fmt: skip
def test_a_folder_that_is_no_evaluated_run_is_refused_in_one_line(name, text, tmp_path, capsys):
    write_run(tmp_path, "--task lcb")
    (tmp_path / name).write_text(text) if text else (tmp_path / name).unlink()
    reason = f"{tmp_path} has no evaluation.json: run python evaluate.py --run {tmp_path}"
    assert_refused(tables, [tmp_path], str(tmp_path) if text else reason, capsys)
