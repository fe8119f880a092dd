"""The benchmark measures what it says, at sizes that take a moment."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config

from harness import command
from model import head
from study import bench
from tasks.sandbox import Result

# ---- Training steps ------------------------------------------------------------------------------------------


def test_the_passes_of_a_step_by_hand(monkeypatch):
    """Two rollouts of 3 (an end among them) and of 4 tokens, prompts of 3; only the first has a context: 7 with it."""
    monkeypatch.setattr(bench.tasks, "load", lambda *_: SimpleNamespace(
        train=[SimpleNamespace(id="p", messages=[])], close=lambda: None))  # fmt: skip
    monkeypatch.setattr(bench.feedback, "student_prompt", lambda *_: [0] * 3)
    monkeypatch.setattr(bench.feedback, "teacher_prompt", lambda *_: ([0] * 7, 0))
    samples = [{"id": "p", "response": "a b", "finish": "stop", "context": {"kind": "k"}},
               {"id": "p", "response": "a b c d", "finish": "length", "context": None}]  # fmt: skip
    cfg = SimpleNamespace(task="", subset="", templates=lambda: None, max_teacher_tokens=9)
    tokenizer = lambda text: SimpleNamespace(input_ids=text.split())  # noqa: E731
    assert bench.passes({"e_rows": 1}, samples, cfg, tokenizer) == {
        # both prompts, then the rows that go on: both have a second and a third token, one has a fourth
        "rollout": [(3 + 3, 2, False), (2, 2, False), (2, 2, False), (1, 1, False)],
        "freeze": [(3 + 3 + 3 + 4, 3 + 4, False), (7 + 3, 3, False)],
        "e_step": [(7 + 3, 3, True)],
        "m_step": [(7 + 3, 3, False), (3 + 3, 3, True)],
    }
    assert bench.passes({"e_rows": 0}, samples, cfg, tokenizer)["e_step"] == [(0, 0, True)]


def test_a_floor_is_the_products_of_its_passes():
    config = Qwen3Config(vocab_size=90, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                         head_dim=4, intermediate_size=24, tie_word_embeddings=True)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    weights = 3 * (16 * 8 + 2 * 16 * 4 + 8 * 16 + 3 * 16 * 24)  # queries, keys and values, output, MLP
    with FlopCounterMode(display=False) as counted:
        assert bench.floor(model, [(10, 4, False), (7, 5, True)]) > 0
    assert counted.get_total_flops() == 2 * (weights * (10 + 3 * 7) + 90 * 16 * (4 + 3 * 5))


def test_steps_are_medians_of_every_phase_beside_its_floor(monkeypatch):
    passes, tokens = bench.passes, []

    def noted(row, samples, *rest):
        found = passes(row, samples, *rest)
        tokens.append((found["freeze"][0][1], row["response_length"] * len(samples)))
        return found

    monkeypatch.setattr(bench, "passes", noted)
    small = "--steps 2 --e_step_every 1 --prompts_per_batch 2 --minibatch_prompts 2 --e_minibatch_prompts 2"
    rows = bench.steps([*small.split(), "--group_size", "2", "--max_response_tokens", "70"])
    assert len(tokens) == 2 and all(ours == pytest.approx(logged) for ours, logged in tokens)  # those of the run
    found = {row["case"]: row for row in rows}
    assert {name for name in found if "floor" in found[name]} == {"rollout", "freeze", "e_step", "m_step"}
    assert all(row["times_the_floor"] == row["seconds"] / row["floor"] for row in rows if "floor" in row)
    total = found.pop("together")["seconds"]
    assert {"verify", "sync"} < found.keys() and total == pytest.approx(sum(row["seconds"] for row in found.values()))


def test_a_phase_is_the_median_of_its_steps(monkeypatch):
    def main(argv):
        folder = Path(argv[argv.index("--out") + 1])
        shutil.copytree(bench.HERE / "tasks" / "toy_models" / "trace", folder / "model")
        log = [json.dumps({"step": 0, "seconds": {"rollout": s, "sync": 1.0}}) for s in (9.0, 1.0, 2.0)]
        (folder / "log.jsonl").write_text("\n".join(log)), (folder / "samples.jsonl").touch()

    monkeypatch.setattr(bench.vpd, "main", main)
    monkeypatch.setattr(bench, "passes", lambda *_: {})
    assert bench.steps([]) == [{"case": "rollout", "seconds": 2.0}, {"case": "sync", "seconds": 1.0},
                               {"case": "together", "seconds": 3.0}]  # fmt: skip


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
