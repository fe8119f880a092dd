"""The benchmark measures what it says, at sizes that take a moment."""

import json
from pathlib import Path

import pytest
import torch

from harness import command
from model import head
from study import bench
from tasks.sandbox import Result

# ---- Training steps ------------------------------------------------------------------------------------------


def test_a_phase_is_the_median_of_its_steps(monkeypatch):
    def main(argv):
        folder = Path(argv[argv.index("--out") + 1])
        folder.mkdir()
        log = [json.dumps({"step": 0, "seconds": {"rollout": s, "sync": 1.0}}) for s in (9.0, 1.0, 2.0)]
        (folder / "log.jsonl").write_text("\n".join(log))

    monkeypatch.setattr(bench.vpd, "main", main)
    assert bench.steps([]) == [{"case": "rollout", "seconds": 2.0}, {"case": "sync", "seconds": 1.0},
                               {"case": "together", "seconds": 3.0}]  # fmt: skip


def test_a_step_has_all_of_vpds_phases():
    small = "--steps 1 --e_step_every 1 --prompts_per_batch 2 --minibatch_prompts 2 --e_minibatch_prompts 2"
    found = {row["case"]: row["seconds"] for row in bench.steps([*small.split(), "--group_size", "2", "--max_response_tokens", "70"])}
    assert {"rollout", "verify", "freeze", "e_step", "m_step", "sync"} < found.keys() and min(found.values()) >= 0


# ---- The loss head -------------------------------------------------------------------------------------------


def test_heads_are_measured_in_fresh_processes_beside_the_products(monkeypatch):
    """20 MB a logits tensor, all of it in one chunk: the products need it once, JS over all of V twice and more."""
    monkeypatch.setattr(bench, "CASES", ["the four products", "all of V, JS"])
    products, js = bench.heads(tokens=256, vocabulary=20000, width=32, top_k=5)
    assert products["case"] == "the four products" and products["times_the_products"] == 1
    assert 0.9 < products["logits_tensors"] < 1.9 and 2 < js["logits_tensors"] < 12
    assert js["times_the_products"] == js["cpu_seconds"] / products["cpu_seconds"] > 1


def test_the_products_are_those_of_the_loss_in_the_same_chunks(monkeypatch):
    """Of 25 tokens in chunks of 10, after a warm-up on 2."""
    seen = []
    for owner, name in ((torch, "mm"), (torch.Tensor, "addmm_")):

        def noted(*args, own=getattr(owner, name), **kwargs):
            seen.append(tuple(args[-2].shape if len(args) == 3 else args[0].shape))
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)
    monkeypatch.setattr(head, "BUFFER_BYTES", 4 * 70 * 2 * 10)  # 10 tokens a chunk
    shapes = []
    for case in ("the four products", "top-k, KL(student||teacher)"):
        seen.clear()
        bench.head_case(case, tokens=25, vocabulary=70, width=8, top_k=5)
        shapes.append(sorted(seen))
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 4 * (1 + 3) and shapes[0].count((10, 8)) == 2 * 2  # the logits of student and teacher


# ---- Graders, and the command --------------------------------------------------------------------------------


def test_graders_grade_rightly_and_a_wrong_grade_is_an_error(monkeypatch):
    rows = bench.grader(8)
    assert len(rows) == 5 and all(row["per_second"] > 1 for row in rows)
    monkeypatch.setattr(bench.Sandbox, "run", lambda *_: Result("ok", "2\n"))
    with pytest.raises(AssertionError, match="sandbox, a script: 1 of 2"):
        bench.grader(2)


def test_the_command_prints_a_line_a_case_and_writes_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.SECTIONS, "head", lambda: [{"case": "a", "cpu_seconds": 1.23456}])
    bench.main(["--only", "head", "--out", str(tmp_path / "numbers.json")])
    assert json.loads((tmp_path / "numbers.json").read_text()) == {"head": [{"case": "a", "cpu_seconds": 1.23456}]}
    with pytest.raises(command.CannotWrite, match="^/dev/full: No space left on device$"):
        bench.main(["--only", "head", "--out", "/dev/full"])
    assert capsys.readouterr().out.split() == ["head", "a", "cpu_seconds", "1.235"] * 2  # not lost on a full disk
    nowhere, folder = (["--only", "head", "--out", str(path)] for path in (tmp_path / "no" / "numbers.json", tmp_path))
    for bad in (["--only", "nothing"], nowhere, folder):
        with pytest.raises(SystemExit) as refusal:
            bench.main(bad)
        assert refusal.value.code == 2


@pytest.mark.slow
def test_the_loss_head_costs_little_beside_its_products_at_the_size_of_qwen3():
    """The memory is a matter of counting buffers; the time is set beside the products of the same run."""
    found = {row["case"]: row for row in bench.heads(**bench.HEAD)}
    top, whole = found["top-k, KL(student||teacher)"], found["all of V, JS"]
    assert top["logits_tensors"] <= 0.25 and whole["logits_tensors"] <= 0.35
    assert top["times_the_products"] <= 1.5 and whole["times_the_products"] <= 2.5
