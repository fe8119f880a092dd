"""Two processes over gloo against one: the same weights, losses and token ids, whatever the processes' shares are.

One call of torchrun runs every case below, one after the other, and the tests compare what it wrote with the same cases in
this process, without a group.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rollout
import vpd
from model.parallel import World
from model.policy import Policy
from neighbours.reviews import Reviews

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent

FLAGS = ["--subset", "choice", "--prompts_per_batch", "5", "--minibatch_prompts", "5", "--e_minibatch_prompts", "5",
         "--group_size", "3", "--max_response_tokens", "20", "--steps", "5", "--eval_every", "0", "--e_step_every", "1",
         "--micro_batch_tokens", "150", "--checkpoint_every", "0", "--log_samples", "15", "--lr", "0.001",
         "--divide_by_std", "False"]  # fmt: skip
CASES = {  # name: (model, flags, are the rollouts those of one process?)
    "vpd tied float64": ("tied", ["--dtype", "float64"], True),
    "vpd untied float64": ("untied", ["--dtype", "float64"], True),
    "sdpo tied float64": ("tied", ["--dtype", "float64", "--method", "sdpo"], True),
    "sdpo top 5 float32": ("tied", ["--method", "sdpo", "--top_k", "5"], True),  # a tail near 1e-7 is no place for 1e-9
    "fixed prior float64": ("untied", ["--dtype", "float64", "--prior", "fixed"], True),
    "joint untied float64": ("untied", ["--dtype", "float64", "--method", "joint", "--minibatch_prompts", "1"], True),
    "distil untied float64": ("untied", ["--dtype", "float64", "--method", "distil"], True),
    "distil samples float64": ("tied", ["--dtype", "float64", "--method", "distil", "--expert", "samples"], True),
    "ovd untied float64": ("untied", ["--dtype", "float64", "--method", "ovd", "--teacher", "ema"], False),
    "vpd tied float32": ("tied", [], True),
    "vpd untied float32": ("untied", [], True),
    "grpo tied float32": ("tied", ["--method", "grpo"], True),
    "sampled float64": ("tied", ["--dtype", "float64", "--eval_every", "5", "--eval_samples", "1"], False),
    "critiques float64": (
        "untied",
        ["--dtype", "float64", "--feedback", "critique", "--max_critique_tokens", "6"],
        False,
    ),
}
LOSSES = (
    "reward",
    "margin",
    "e_loss",
    "shift",
    "m_loss",
    "m_grad_norm",
    "divergence",
    "entropy",
    "demonstration_ratio",
)

SCRIPT = """
import sys, json, torch
torch.set_num_threads(1)
folder = sys.argv[1]
sys.path[:0] = sys.argv[2:4]
import test_distributed
from tasks import tiny
test_distributed.run_all(folder)
test_distributed.write_facts(folder)
test_distributed.World.end()
"""


def play(out: Path, name: str, drawn: dict, replay: bool) -> None:
    """Runs one case into out/name. drawn: rollouts by seed, filled by one process and read by the others."""
    model, flags, fixed = CASES[name]
    sample = rollout.HFSampler.sample

    def known(self, prompts, n, seed, *rest):
        if replay and fixed:
            return drawn[seed]
        drawn[seed] = sample(self, prompts, n, seed, *rest)
        return drawn[seed]

    def stern(self, problems, texts, step):  # this network has not learnt to judge: every third row is rejected
        assert asked(self, problems, texts, step) == [None] * len(texts)
        return [float(i % 3) * 4 for i in range(len(texts))]

    rollout.HFSampler.sample = known
    asked, Reviews.scores = Reviews.scores, stern
    try:
        vpd.main(["--model", str(out / model), *FLAGS, *flags, "--out", str(out / name)])
    finally:
        rollout.HFSampler.sample, Reviews.scores = sample, asked


def run_all(folder: str) -> None:
    """In each of the two processes."""
    out = Path(folder)
    drawn = pickle.loads((out.parent / "drawn.pickle").read_bytes())
    empties, packed = [0], Policy.micro_batches

    def counting(self, rows, lengths):
        mine = packed(self, rows, lengths)
        empties[0] += mine.count([])
        return mine

    Policy.micro_batches = counting
    for name in CASES:
        play(out, name, drawn[name], replay=True)
    vpd.main(
        [
            "--model",
            str(out / "tied"),
            *FLAGS,
            "--dtype",
            "float64",
            "--out",
            str(out / "resumed"),
            "--checkpoint_every",
            "3",
        ]
    )
    vpd.main(["--task", "sciknoweval", "--smoke", "olmo3", "--eval_every", "0", "--out", str(out / "smoke")])
    (out / f"empties-{os.environ['RANK']}").write_text(str(empties[0]))


CHOSEN = [[5, 6, 7, 9], [8], [10, 11]]  # a pass for each, so that one process fills up with an empty one


def write_facts(folder: str) -> None:
    """bfloat16 compute and recomputation, as on GPUs: what the weights, a step and the saved model are in."""

    out, world = Path(folder), World.start()
    policy = Policy.load(str(out / "untied"), world=world, compute=torch.bfloat16, recompute=True)
    twin = policy.frozen_copy()
    before = policy.score([[5, 6, 7]], [[10, 11, 2]])[0]
    twin_says = policy.score([[5, 6, 7]], [[10, 11, 2]], model=twin)[0]
    shares = Policy.load(str(out / "untied"), torch.float64, world=world, micro_batch_tokens=1)
    chosen = shares.choose(CHOSEN, [19, 20, 2])
    view = policy.view([[5, 6, 7]] if world.rank == 0 else [[8, 9]], [[10, 11, 2]])
    hidden, weight = str(view.hidden.dtype), str(view.head.dtype)
    loss = view.loss(lambda logp, _: -logp, view.mask / 3)[0]
    policy.backward(loss)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-2)
    norm = policy.step(optimizer, 1e-2, 1.0)
    after = policy.score([[5, 6, 7]], [[10, 11, 2]])[0]
    policy.save(out / "bfloat16")
    local = next(policy.model.parameters())
    facts = {"hidden": hidden, "head": weight, "master": str(local.dtype), "rows": local.to_local().shape[0],
             "of": local.shape[0], "norm": norm, "rise": (after - before).sum().item(),
             "twin": (twin_says - before).abs().max().item(), "before": before.tolist(),
             "chosen": chosen.tolist()}  # fmt: skip
    (out / f"facts-{world.rank}.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_model):
    """(folder of one process, folder of two)."""
    base = tmp_path_factory.mktemp("runs")
    one, two = base / "one", base / "two"
    warm, tokenizer = Policy.load(str(ROOT / "tasks" / "toy_models" / "choice")).model, tiny.build_tokenizer()
    for out in (one, two):  # a model that has learnt something, so that outcomes are mixed
        warm.save_pretrained(out / "tied")
        tokenizer.save_pretrained(out / "tied")
        untied = type(warm)(type(warm.config)(**(warm.config.to_dict() | {"tie_word_embeddings": False})))
        untied.load_state_dict(warm.state_dict())
        untied.save_pretrained(out / "untied")
        tokenizer.save_pretrained(out / "untied")
    drawn = {name: {} for name in CASES}
    for name in CASES:
        play(one, name, drawn[name], replay=False)
    (base / "drawn.pickle").write_bytes(pickle.dumps(drawn))
    (base / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(base / "script.py"), str(two), str(ROOT / "tests"), str(ROOT)],
        capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return one, two


def train_rows(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def furthest(one, two):
    mine, theirs = (load_file(out / "model" / "model.safetensors") for out in (one, two))
    assert mine.keys() == theirs.keys()
    return max((mine[k] - theirs[k]).abs().max().item() for k in mine)


@pytest.mark.parametrize("name", CASES)
def test_weights_and_losses_of_five_steps_are_those_of_one_process(runs, name):
    one, two = (out / name for out in runs)
    rows = train_rows(one)
    assert len(rows) == 5 and sum(row["m_grad_norm"] is not None for row in rows) >= 4
    if name.startswith("ovd"):
        assert sum(row["demonstrations"] for row in rows) > 0
    if name.startswith(("vpd", "fixed", "critiques")):
        assert sum(row["e_loss"] is not None for row in rows) >= 2
    tolerance = 1e-5 if "float32" in name else 1e-9
    for mine, theirs in zip(train_rows(two), rows, strict=True):
        for key in LOSSES:
            expected = theirs.get(key)
            assert mine.get(key) == (
                None if expected is None else pytest.approx(expected, rel=tolerance, abs=tolerance)
            ), key
        assert mine["left_out"] == theirs["left_out"] and mine["verdicts"] == theirs["verdicts"]
    if "float64" in name:
        assert furthest(one, two) < 1e-9


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case[2]])
def test_sampled_end_to_end_the_token_ids_are_those_of_one_process(runs, name):
    one, two = ((out / name / "samples.jsonl").read_text().splitlines() for out in runs)
    assert len(one) == 5 * 15 and one == two


def test_processes_had_unequal_shares_and_filled_up_with_empty_ones(runs):
    counts = [int((runs[1] / f"empties-{rank}").read_text()) for rank in (0, 1)]
    assert sum(counts) > 10


def test_a_run_of_two_processes_goes_on_in_one(runs, tmp_path):
    """Saved by two at batch 3 and at the end; the last checkpoint is taken away, as if killed before it."""
    out = tmp_path / "resumed"
    shutil.copytree(runs[1] / "resumed", out)
    shutil.rmtree(out / "checkpoints" / "step-000005")
    vpd.main(["--out", str(out), "--resume"])
    assert furthest(out, runs[0] / "sampled float64") < 1e-9
    notes = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if '"resume"' in line]
    assert [(note["step"], note["processes"]) for note in notes] == [(3, 1)]


def test_compute_is_bfloat16_and_weights_gradients_and_optimizer_float32(runs):
    one, other = (json.loads((runs[1] / f"facts-{rank}.json").read_text()) for rank in (0, 1))
    for facts in (one, other):
        assert (facts["hidden"], facts["head"], facts["master"]) == (
            "torch.bfloat16",
            "torch.bfloat16",
            "torch.float32",
        )
        assert facts["twin"] == 0 and facts["rise"] > 0.05
    assert one["norm"] == other["norm"] > 0  # of the whole gradient
    assert one["rows"] + other["rows"] == one["of"] and abs(one["rows"] - other["rows"]) <= 1
    plain = Policy.load(str(runs[0] / "untied")).score([[5, 6, 7]], [[10, 11, 2]])[0]
    assert (torch.tensor(one["before"]) - plain).abs().max() < 0.1
    saved = load_file(runs[1] / "bfloat16" / "model.safetensors")
    assert {w.dtype for w in saved.values()} == {torch.bfloat16}
    assert json.loads((runs[1] / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"
    assert Policy.load(str(runs[1] / "bfloat16")).model.dtype == torch.float32


def test_two_processes_choose_between_tokens_as_one_does(runs):
    expected = Policy.load(str(runs[0] / "untied"), torch.float64).choose(CHOSEN, [19, 20, 2])
    for rank in (0, 1):
        chosen = json.loads((runs[1] / f"facts-{rank}.json").read_text())["chosen"]
        torch.testing.assert_close(torch.tensor(chosen, dtype=torch.float64), expected, rtol=0, atol=1e-12)


def test_a_smoke_run_of_a_real_task_on_olmo3_is_shared_out_too(runs):
    rows = train_rows(runs[1] / "smoke")
    assert [row["step"] for row in rows] == [0, 1] and Policy.load(str(runs[1] / "smoke" / "base")).vocabulary > 0


def test_one_process_writes_logs_and_says_anything(runs):
    rows = train_rows(runs[1] / "vpd tied float64")
    assert [row["step"] for row in rows] == list(range(5))
    assert json.loads((runs[1] / "vpd tied float64" / "config.json").read_text())["processes"] == 2
