"""The benchmark measures what it says, at sizes that take a moment."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from study import bench  # noqa: E402
from harness import command  # noqa: E402
from model import head  # noqa: E402
from tasks.sandbox import Result  # noqa: E402

TINY = dict(
    vocab_size=90, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    intermediate_size=24, tie_word_embeddings=True,
)  # fmt: skip
ROWS, PROMPT, CONTEXT, RESPONSE = 2, 3, 4, 5
SIZES = dict(rows=ROWS, prompt=PROMPT, context=CONTEXT, response=RESPONSE)


# ---- Floating-point operations -------------------------------------------------------------------------------


def test_flops_by_hand():
    weights = 3 * (16 * 8 + 2 * 16 * 4 + 8 * 16 + 3 * 16 * 24)  # queries, keys and values, output, MLP
    student, teacher = 2 * (3 + 5), 2 * (3 + 4 + 5)  # tokens
    square = 3 * 2 * 4 * 2 * 2 * (8**2 / 2), 3 * 2 * 4 * 2 * 2 * (12**2 / 2)  # layers, width, 2 products, 2 a number
    assert bench.flops(Qwen3Config(**TINY), **SIZES) == {
        "body": 6 * weights * student + 2 * weights * teacher,
        "attention": 2 * (3 * square[0] + square[1]),
        "head": (6 + 2) * 90 * 16 * 2 * 5,
        "again": 2 * weights * student + 2 * square[0],
    }


def test_flops_are_those_that_torch_counts():
    """Attention is counted over the whole square by torch, and over its causal half by us."""
    model = AutoModelForCausalLM.from_config(Qwen3Config(**TINY), attn_implementation="eager")
    ids = lambda length: torch.randint(90, (ROWS, length))  # noqa: E731
    with FlopCounterMode(display=False) as counted:
        with torch.no_grad():
            taught = model.model(ids(PROMPT + CONTEXT + RESPONSE)).last_hidden_state
        model.model(ids(PROMPT + RESPONSE)).last_hidden_state.sum().backward()
    ours = bench.flops(model.config, **SIZES)
    assert taught.shape[1] == 12 and counted.get_total_flops() == ours["body"] + 2 * ours["attention"]


# ---- The loss head -------------------------------------------------------------------------------------------


def test_heads_are_measured_in_fresh_processes_beside_the_products(monkeypatch):
    """20 MB a logits tensor, all of it in one chunk: the products need it once, JS over all of V twice and more."""
    monkeypatch.setattr(bench, "HEAD_CASES", ["the four products", "all of V, JS"])
    products, js = bench.heads(tokens=256, vocabulary=20000, width=32, top_k=5)
    assert products["case"] == "the four products" and products["times_the_products"] == 1
    assert 0.9 < products["logits_tensors"] < 1.9 and 2 < js["logits_tensors"] < 12
    assert js["times_the_products"] == js["cpu_seconds"] / products["cpu_seconds"] > 1


def test_the_products_are_those_of_the_loss_in_the_same_chunks(monkeypatch):
    """Of 25 tokens in chunks of 10, after a warm-up on 2."""
    seen = []
    for name in ("mm", "addmm_"):
        owner = torch if name == "mm" else torch.Tensor
        own = getattr(owner, name)

        def noted(*args, own=own, **kwargs):
            seen.append(args[-2].shape if len(args) == 3 else args[0].shape)
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)
    monkeypatch.setattr(head, "BUFFER_BYTES", 4 * (70 + 5 * 8) * 10)  # 10 tokens a chunk
    shapes = []
    for case in ("the four products", "top-k, KL(student||teacher)"):
        seen.clear()
        bench.head_case(case, tokens=25, vocabulary=70, width=8, top_k=5)
        shapes.append(sorted(map(tuple, seen)))
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 4 * (1 + 3) and shapes[0].count((10, 8)) == 2 * 2  # the logits of student and teacher


# ---- The other sections --------------------------------------------------------------------------------------


def test_steps_are_medians_of_every_phase():
    small = "--steps 2 --e_step_every 1 --prompts_per_batch 2 --minibatch_prompts 2 --e_minibatch_prompts 2"
    rows = bench.steps([*small.split(), "--group_size", "2", "--max_response_tokens", "6"])
    found = {row["case"]: row["seconds"] for row in rows}
    assert {"rollout", "verify", "freeze", "e_step", "m_step", "sync", "together"} <= found.keys()
    assert found["rollout"] > 0 and found.pop("together") == pytest.approx(sum(found.values()))


def test_a_phase_is_the_median_of_its_steps(monkeypatch):
    def main(argv):
        folder = Path(argv[argv.index("--out") + 1])
        folder.mkdir()
        log = [json.dumps({"seconds": {"rollout": seconds, "sync": 1.0}}) for seconds in (9.0, 1.0, 2.0)]
        (folder / "log.jsonl").write_text("\n".join(log))

    monkeypatch.setattr(bench.vpd, "main", main)
    assert bench.steps([]) == [{"case": "rollout", "seconds": 2.0}, {"case": "sync", "seconds": 1.0},
                               {"case": "together", "seconds": 3.0}]  # fmt: skip


def test_graders_grade_rightly_and_a_wrong_grade_is_an_error(monkeypatch):
    rows = bench.grader(8)
    assert len(rows) == 5 and all(row["per_second"] > 1 for row in rows)
    monkeypatch.setattr(bench.Sandbox, "run", lambda *_: Result("ok", "wrong"))
    with pytest.raises(AssertionError, match="sandbox, a script: 0 of 2"):
        bench.grader(2)


def test_the_rates_of_a_training_step_follow_from_its_time(monkeypatch):
    monkeypatch.setattr(bench, "seconds", lambda device, run: (run(), 0.5)[1])
    (row,) = bench.training_step("cpu", TINY, **SIZES, top_k=4, square=16)
    parts = bench.flops(Qwen3Config(**TINY), **SIZES)
    assert row["tokens_per_second"] == 2 * 8 / 0.5 and row["tflops_ceiling"] == 2 * 16**3 / 0.5 / 1e12
    own = parts["body"] + parts["attention"] + parts["head"]
    assert row["share_of_ceiling"] == pytest.approx(own / (2 * 16**3))
    assert row["share_with_recomputation"] == pytest.approx((own + parts["again"]) / (2 * 16**3))


def test_the_command_prints_a_line_a_case_and_writes_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.SECTIONS, "head", lambda: [{"case": "a", "cpu_seconds": 1.23456}])
    bench.main(["--only", "head", "--out", str(tmp_path / "figures.json")])
    assert capsys.readouterr().out.split() == ["head", "a", "cpu_seconds", "1.235"]
    assert json.loads((tmp_path / "figures.json").read_text()) == {"head": [{"case": "a", "cpu_seconds": 1.23456}]}
    with pytest.raises(command.CannotWrite, match="^/dev/full: No space left on device$"):
        bench.main(["--only", "head", "--out", "/dev/full"])
    assert capsys.readouterr().out.split() == ["head", "a", "cpu_seconds", "1.235"]  # which is not lost
    if not torch.cuda.is_available():
        bench.main(["--only", "gpu"])
        assert "no CUDA device" in capsys.readouterr().out
    nowhere, folder = (["--only", "head", "--out", str(path)] for path in (tmp_path / "no" / "figures.json", tmp_path))
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
