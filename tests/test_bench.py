"""The benchmark's numbers, at small sizes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config

from model import head
from study import bench

# ---- Training steps ------------------------------------------------------------------------------------------


def test_the_passes_of_a_step_by_hand():
    """Two rollouts of 3 and of 4 tokens, prompts of 3; only the first has a context: 7 with it."""
    tokens = lambda *lengths: [[0] * length for length in lengths]  # noqa: E731
    batch = SimpleNamespace(x=tokens(3, 3), y=tokens(3, 4), xC=tokens(7, 3), has_C=torch.tensor([True, False]))
    assert bench.passes(batch, e_rows=1) == {
        # both prompts, then the rows that go on: two for the second and the third token, one for the fourth
        "rollout": [(3 + 3, 2, False), (2, 2, False), (2, 2, False), (1, 1, False)],
        "freeze": [(3 + 3 + 3 + 4, 3 + 4, False), (7 + 3, 3, False)],
        "e_step": [(7 + 3, 3, True)],
        "m_step": [(7 + 3, 3, False), (3 + 3, 3, True)],
    }
    assert bench.passes(batch, e_rows=0)["e_step"] == [(0, 0, True)]


def test_a_floor_is_the_products_of_its_passes():
    config = Qwen3Config(vocab_size=90, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                         head_dim=4, intermediate_size=24, tie_word_embeddings=True)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    weights = 3 * (16 * 8 + 2 * 16 * 4 + 8 * 16 + 3 * 16 * 24)  # queries, keys and values, output, MLP
    with FlopCounterMode(display=False) as counted:
        assert bench.floor(model, [(10, 4, False), (7, 5, True)]) > 0
    assert counted.get_total_flops() == 2 * (weights * (10 + 3 * 7) + 90 * 16 * (4 + 3 * 5))


def test_every_phase_of_a_run_has_its_seconds_and_the_passes_have_floors():
    small = "--steps 2 --e_step_every 1 --prompts_per_batch 2 --minibatch_prompts 2 --e_minibatch_prompts 2"
    rows = bench.steps([*small.split(), "--group_size", "2", "--max_response_tokens", "70"])
    found = {row["case"]: row for row in rows}
    assert {name for name in found if found[name].get("floor", 0) > 0} == {"rollout", "freeze", "e_step", "m_step"}
    total = found.pop("together")["seconds"]
    assert {"verify", "sync"} < found.keys() and total == pytest.approx(sum(row["seconds"] for row in found.values()))


def test_a_phase_and_its_floor_are_the_medians_of_the_steps(monkeypatch):
    def main(argv):
        log = Path(argv[argv.index("--out") + 1]) / "log.jsonl"
        log.parent.mkdir()
        rows = [{"seconds": {"rollout": s, "sync": 1.0}, "e_rows": n} for s, n in ((9.0, 8), (1.0, None), (4.0, 6))]
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for batch in range(3):
            bench.vpd.roll_out(batch)  # as the loop does

    monkeypatch.setattr(bench.vpd, "main", main)
    monkeypatch.setattr(bench.vpd, "roll_out", lambda batch: batch)
    monkeypatch.setattr(bench, "passes", lambda batch, e_rows: {"rollout": 10 * batch + e_rows})
    monkeypatch.setattr(bench, "floor", lambda model, passes: {8: 2.0, 10: 0.5, 26: 0.25}[passes])
    assert bench.steps([]) == [{"case": "rollout", "seconds": 4.0, "floor": 0.5, "times_the_floor": 8.0},
                               {"case": "sync", "seconds": 1.0}, {"case": "together", "seconds": 5.0}]  # fmt: skip


# ---- The loss head -------------------------------------------------------------------------------------------


def test_heads_are_measured_in_fresh_processes_and_compared_with_the_products(monkeypatch):
    """A logits tensor has 20 MB and fits in one chunk: the products need it once, JS over all of V more than twice."""
    monkeypatch.setattr(bench, "CASES", ["the four products", "all of V, JS"])
    products, js = bench.heads(tokens=256, vocabulary=20000, width=32, top_k=5)
    assert products["case"] == "the four products" and products["times_the_products"] == 1
    assert 0.9 < products["logits_tensors"] < 1.9 and 2 < js["logits_tensors"] < 12
    assert js["times_the_products"] == js["cpu_seconds"] / products["cpu_seconds"] > 1


def test_the_products_are_those_of_the_loss_in_the_same_chunks(monkeypatch):
    """25 tokens in chunks of 10, after a warm-up on 2."""
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


# ---- The command ---------------------------------------------------------------------------------------------


def test_the_command_prints_a_line_per_case(capsys, monkeypatch):
    monkeypatch.setitem(bench.SECTIONS, "head", lambda: [{"case": "a", "cpu_seconds": 1.23456}])
    bench.main(["--only", "head"])
    assert capsys.readouterr().out.split() == ["head", "a", "cpu_seconds", "1.235"]


@pytest.mark.slow
def test_the_loss_head_costs_little_more_than_its_products_with_the_vocabulary_of_qwen3():
    """Memory depends only on the buffers; time is compared with the products of the same run."""
    found = {row["case"]: row for row in bench.heads(**bench.HEAD)}
    top, whole = found["top-k, KL(student||teacher)"], found["all of V, JS"]
    assert top["logits_tensors"] <= 0.25 and whole["logits_tensors"] <= 0.35
    assert top["times_the_products"] <= 1.5 and whole["times_the_products"] <= 2.5
