"""The figure from run logs: what is averaged, what is grouped, and the one-line errors."""

import json

import numpy as np
import pytest

import figures


def run(folder, method, seed, rewards, margins=None, **settings):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"method": method, "seed": seed, "out": str(folder), **settings}))
    rows = [{"kind": "eval", "step": 0, "avg": rewards[0]}]
    for step, reward in enumerate(rewards):
        rows.append({"kind": "train", "step": step, "reward": reward, "margin": margins[step] if margins else None})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


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


def test_the_band_is_lowest_to_highest_seed_and_the_line_their_mean(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.plt.Axes, "fill_between", lambda self, x, low, high, **_: drawn.append((x, low, high)))
    lines = []
    plot = figures.plt.Axes.plot
    monkeypatch.setattr(
        figures.plt.Axes, "plot", lambda self, x, y, *a, **k: lines.append(y) or plot(self, x, y, *a, **k)
    )
    runs = [run(tmp_path / "a", "vpd", 1, [0.2]), run(tmp_path / "b", "vpd", 2, [0.6])]
    figures.draw(runs, tmp_path / "out.png")
    assert lines[0] == pytest.approx([(0.2 + 0.6) / 2])
    assert drawn[0][1] == pytest.approx([0.2]) and drawn[0][2] == pytest.approx([0.6])


def test_smoothing_is_a_centred_mean_that_shrinks_at_the_ends():
    values = np.array([1.0, 2.0, 6.0, 3.0, 3.0, 9.0])
    expected = [
        (1 + 2 + 6) / 3,
        (1 + 2 + 6 + 3) / 4,
        15 / 5,
        (2 + 6 + 3 + 3 + 9) / 5,
        (6 + 3 + 3 + 9) / 4,
        (3 + 3 + 9) / 3,
    ]
    assert figures.smooth(values) == pytest.approx(expected)


def test_steps_without_a_value_are_left_out_and_not_drawn_as_zero():
    rows = [{"kind": "train", "step": 0, "margin": None}, {"kind": "train", "step": 1, "margin": 0.5}]
    assert figures.series(rows, "train", "margin") == {1: 0.5}


def test_a_folder_that_is_no_run_is_one_line_and_exit_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        figures.main([str(tmp_path), "--out", str(tmp_path / "x.png")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and str(tmp_path) in error
