"""Two processes over gloo against one: the same weights, losses and token ids, however the rows are shared out; weights read
into shards; and how a job ends.

One pair of processes runs every case below in turn and checks what only the two of them can see (`check_...`). The tests compare
what the pair wrote with the same cases in this process, without a group.
"""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import FAMILIES, fewer_validation_problems, log_of  # first: it puts the sources on the path, for torchrun too

# isort: split
import losses
import rollout
import tasks
import vpd
from harness import command, plan
from model.parallel import World
from model.policy import Policy
from neighbours import distil, ovd
from tasks import tiny

ROOT = Path(__file__).parent.parent
SMALL = (
    "--subset choice --prompts_per_batch 5 --minibatch_prompts 5 --group_size 3 --max_response_tokens 20 --steps 3 "
    "--eval_every 0 --micro_batch_tokens 150 --checkpoint_every 0 --log_samples 15 --lr 0.001 "
)
E_STEP, DOUBLE = "--e_minibatch_prompts 5 --e_step_every 1", "--dtype float64"
CASES = {  # name: (model, program, flags, whether the rollouts are those of one process)
    "fixed prior float64": ("untied", vpd, f"{E_STEP} {DOUBLE} --prior fixed", True),
    "joint untied float64": ("untied", vpd, f"--method joint --minibatch_prompts 1 {DOUBLE}", True),
    "one update float32": ("tied", vpd, "--method joint --top_k 5 --divide_by_std False", True),  # a tail near 1e-7, far from 1e-9
    "distil untied float64": ("untied", distil, DOUBLE, True),
    "distil samples float64": ("tied", distil, f"--expert samples {DOUBLE}", True),
    "ovd untied float64": ("untied", ovd, f"--teacher ema {DOUBLE}", False),
    "sampled float64": ("tied", vpd, f"{E_STEP} {DOUBLE} --eval_every 3 --eval_samples 1 --checkpoint_every 2", False),
    "critiques float64": ("untied", vpd, f"{E_STEP} {DOUBLE} --feedback critique --max_critique_tokens 6", False),
}
LOSSES = ("reward", "margin", "e_loss", "shift", "m_loss", "m_grad_norm", "divergence", "entropy", "demonstration_ratio")


def pair(function: Callable, folder: Path) -> list[tuple[int, str]]:
    """The exit status and standard error of two processes of a group that run function(folder), as a program would. They are
    forked from this one, which has everything imported."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def process(rank: int) -> None:
        os.environ |= group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        sys.stderr = (folder / f"{rank}.txt").open("w")
        command.run(partial(function, folder))

    both = [multiprocessing.get_context("fork").Process(target=process, args=(rank,), daemon=True) for rank in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(600)
    return [(each.exitcode, (folder / f"{rank}.txt").read_text()) for rank, each in enumerate(both)]


def play(out: Path, name: str, drawn: dict) -> None:
    """Runs one case into out/name. drawn: rollouts by seed; where they are there and the case asks for it, they are used."""
    model, program, flags, fixed = CASES[name]
    sample, scores = rollout.HFSampler.sample, ovd.Judge.scores

    def known(self, prompts, n, seed, *rest):
        if not (fixed and seed in drawn):
            drawn[seed] = sample(self, prompts, n, seed, *rest)
        return drawn[seed]

    def stern(self, problems, texts, step):  # this network has not learned to judge: every third row is rejected
        assert scores(self, problems, texts, step) == [None] * len(texts)
        return [float(i % 3) * 4 for i in range(len(texts))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout.HFSampler, "sample", known)
        patch.setattr(ovd.Judge, "scores", stern)
        program.main([*(SMALL + flags).split(), "--model", str(out / model), "--out", str(out / name)])


def run_all(drawn: dict, out: Path) -> None:
    """In each of the two processes."""
    for name in CASES:
        play(out, name, drawn[name])
    vpd.main(["--task", "sciknoweval", "--smoke", "olmo3", "--eval_every", "0", "--out", str(out / "smoke")])
    world = World.start()
    check_compute_is_bfloat16_and_weights_gradients_and_optimizer_float32(out, world)
    check_every_pass_has_compiled_layers(out, world)
    for folder in sorted((out / "folders").iterdir()):
        check_shards_score_as_a_plainly_loaded_model_or_are_refused(folder, world)


def check_every_pass_has_compiled_layers(out: Path, world: World) -> None:
    """Passes over one row and several, with and without gradient, by student and moving average, with recomputation."""
    compile = torch.nn.Module.compile
    torch.nn.Module.compile = lambda layer, **how: compile(layer, backend="eager", **how)  # traces the graphs, compiles none
    policy = Policy.load(str(out / "untied"), world=world, recompute=True, compiled=True)
    twin = policy.frozen_copy()
    torch.nn.Module.compile = compile
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for rows in (2, 1):
            x, y = [[5, 6, 7]] * rows, [[10, 11, 2][:rows]] * rows
            assert torch.equal(policy.score(x, y)[0], policy.score(x, y, model=twin)[0])
            view = policy.view(x, y)
            policy.backward(view.loss(lambda t: -t.logp, view.mask / 3)[0])


def check_compute_is_bfloat16_and_weights_gradients_and_optimizer_float32(out: Path, world: World) -> None:
    """With recomputation, as on GPUs. Each process holds as many bytes as the plan says."""
    x, y, one = [[5, 6, 7]], [[10, 11, 2]], Policy.load(str(out / "untied"))
    policy = Policy.load(str(out / "untied"), world=world, compute=torch.bfloat16, recompute=True)
    twin, before = policy.frozen_copy(), policy.score(x, y)[0]
    assert torch.equal(policy.score(x, y, model=twin)[0], before)
    assert (before - one.score(x, y)[0]).abs().max() < 0.1
    view = policy.view(x, y) if world.rank == 0 else policy.view([], [])  # an empty micro-batch keeps the processes in step
    policy.backward(view.loss(lambda t: -t.logp, view.mask / 3)[0])
    shards = list(policy.model.parameters())
    assert view.hidden.dtype == view.head.dtype == torch.bfloat16 and {p.dtype for p in shards} == {torch.float32}
    rows = world.together({world.rank: len(shards[0].to_local())})
    assert sum(rows.values()) == len(shards[0]) and abs(rows[0] - rows[1]) <= 1
    size = lambda tensors: sum(t.to_local().nbytes for t in tensors if isinstance(t, DTensor))  # noqa: E731
    held = {"weights": size(shards), "gradients": size(p.grad for p in shards), "EMA teacher": size(twin.parameters())}
    optimizer = torch.optim.AdamW(shards, lr=1e-2)
    norms = world.together({world.rank: policy.step(optimizer, 1e-2, 1.0)})
    assert norms[0] == norms[1] > 0  # the norm of the whole gradient
    assert (policy.score(x, y)[0] - before).sum() > 0.05
    held["AdamW's moments"] = size(t for state in optimizer.state.values() for t in state.values())
    cfg = vpd.Config(task="lcb", method="sdpo")
    planned = plan.memory(AutoConfig.from_pretrained(out / "untied"), cfg, processes=2).state
    assert world.rank or held == pytest.approx(planned, rel=0.02)  # the first process has the larger shards
    policy.save(out / "bfloat16")
    assert {w.dtype for w in load_file(out / "bfloat16" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"
    assert Policy.load(str(out / "bfloat16")).model.dtype == torch.float32


def check_shards_score_as_a_plainly_loaded_model_or_are_refused(folder: Path, world: World) -> None:
    x, y = [[5, 6, 7, 9, 3, 8, 30, 2], [8]], [[10, 11, 2], list(range(3, 20))]
    if named := {"a file less": "No such file", "cut short": "incomplete"}.get(folder.name):
        with pytest.raises(ValueError, match="^cannot load a model and its tokenizer from [^\n]*$") as error:
            Policy.load(str(folder), torch.float64, world)
        assert named in str(error.value)
    else:
        policy = Policy.load(str(folder), torch.float64, world)
        plain = Policy(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), policy.tokenizer)
        assert (policy.score(x, y)[0] - plain.score(x, y)[0]).abs().max() < 1e-12
        assert (policy.choose(x, [19, 20, 2]) - plain.choose(x, [19, 20, 2])).abs().max() < 1e-12
        assert policy.model.generation_config.to_dict() == plain.model.generation_config.to_dict()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_model):
    """Models of each family, in one file and in several, and damaged ones."""
    out, tokenizer = tmp_path_factory.mktemp("models") / "folders", tiny.build_tokenizer()
    for name, size in product(FAMILIES, ("5GB", "20KB")):
        folder = out / f"{name} {size}"
        make_model(name, len(tokenizer), torch.bfloat16).save_pretrained(folder, max_shard_size=size)
        tokenizer.save_pretrained(folder)
    files = {}
    for name in ("a file less", "cut short", "stale beside"):
        shutil.copytree(out / "olmo3 20KB", out / name)
        files[name] = sorted((out / name).glob("*.safetensors"))
    assert len(files["cut short"]) > 2
    files["a file less"][1].unlink()
    files["cut short"][1].write_bytes(files["cut short"][1].read_bytes()[:-100])
    for file in files["stale beside"]:  # files of another save, which no index names
        others = {name: w * 2 for name, w in load_file(file).items()}
        for before in "a", "z":
            save_file(others, file.with_name(f"{before}-{file.name}"), metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory, folders):
    """The folder of one process and that of two."""
    one, two = tmp_path_factory.mktemp("one"), folders.parent
    warm, tokenizer = Policy.load(str(ROOT / "tasks" / "toy_models" / "choice")).model, tiny.build_tokenizer()
    untied = type(warm)(type(warm.config)(**(warm.config.to_dict() | {"tie_word_embeddings": False})))
    untied.load_state_dict(warm.state_dict())
    for out in (one, two):  # a model that has learned something, so that outcomes are mixed
        for name, model in (("tied", warm), ("untied", untied)):
            model.save_pretrained(out / name)
            tokenizer.save_pretrained(out / name)
    drawn = {name: {} for name in CASES}
    with pytest.MonkeyPatch.context() as patch:
        fewer_validation_problems(patch)
        for name in CASES:
            play(one, name, drawn[name])
        for status, error in pair(partial(run_all, drawn), two):
            assert status == 0, error[-4000:]
    return one, two


def furthest(one, two):
    mine, theirs = (load_file(out / "model" / "model.safetensors") for out in (one, two))
    assert mine.keys() == theirs.keys()
    return max((mine[k] - theirs[k]).abs().max().item() for k in mine)


@pytest.mark.parametrize("name", CASES)
def test_weights_and_losses_of_three_steps_are_those_of_one_process(runs, name):
    one, two = (out / name for out in runs)
    rows = log_of(one)
    assert len(rows) == 3 and sum(row["m_grad_norm"] is not None for row in rows) >= 2
    if name.startswith("ovd"):
        assert sum(row["demonstrations"] for row in rows) > 0
    if CASES[name][1] is vpd and "joint" not in CASES[name][2]:
        assert sum(row["e_loss"] is not None for row in rows) >= 2
    tolerance = 1e-5 if "float32" in name else 1e-9
    losses_of = lambda row: {key: row[key] for key in LOSSES if row.get(key) is not None}  # noqa: E731
    for mine, theirs in zip(log_of(two), rows, strict=True):
        assert losses_of(mine) == pytest.approx(losses_of(theirs), rel=tolerance, abs=tolerance)
        assert mine["left_out"] == theirs["left_out"] and mine["verdicts"] == theirs["verdicts"]
    if "float64" in name:
        assert furthest(one, two) < 1e-9
    if not CASES[name][3]:  # sampled end to end: the same token ids
        one, two = ((out / name / "samples.jsonl").read_text().splitlines() for out in runs)
        assert len(one) == 3 * 15 and one == two


def test_a_run_of_two_processes_goes_on_in_one(runs, tmp_path, small_validation):
    """Two processes saved at batch 2 and at the end; the last checkpoint is removed, as if the run had been killed before it."""
    out = tmp_path / "resumed"
    shutil.copytree(runs[1] / "sampled float64", out)
    shutil.rmtree(out / "checkpoints" / "step-000003")
    vpd.main(["--out", str(out), "--resume"])
    assert furthest(out, runs[0] / "sampled float64") < 1e-9
    assert [(note["step"], note["processes"]) for note in log_of(out, "resume")] == [(2, 1)]


def test_a_smoke_run_of_a_real_task_on_olmo3_runs_in_two_processes(runs):
    rows = log_of(runs[1] / "smoke")
    assert [row["step"] for row in rows] == [0, 1] and Policy.load(str(runs[1] / "smoke" / "base")).vocabulary > 0
    assert json.loads((runs[1] / "smoke" / "config.json").read_text())["processes"] == 2


# ---- Endings -------------------------------------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--shutdown-timeout", "1800", "--nproc-per-node", "2"]
PHASES = {  # what breaks, in which of two processes, and how; the process's exit status, and what it says
    "rollout": (rollout.HFSampler, "sample", 0, torch.OutOfMemoryError, 1, "OutOfMemoryError: broken in rollout"),
    "verify": (vpd, "grade", 1, tasks.BadTask, 2, "error: process 1: broken in verify"),
    "m_step": (losses, "sequence_weights", 0, RuntimeError, 1, "RuntimeError: broken in m_step"),
}
SHORT = f"{SMALL} {E_STEP} --steps 2".split()


def broken_run(folder: Path) -> None:
    where, name, rank, error, *_ = PHASES[folder.name]

    def broken(*_, **__):
        raise error(f"broken in {folder.name}")

    if os.environ["RANK"] == str(rank):
        setattr(where, name, broken)
    vpd.main([*SHORT, "--out", f"{folder}/run"])


@pytest.mark.parametrize("phase", PHASES)
def test_a_process_that_fails_ends_itself_and_the_one_that_waits_for_it(tmp_path, phase):
    (tmp_path / phase).mkdir()
    *_, rank, _, status, words = PHASES[phase]
    both = pair(broken_run, tmp_path / phase)
    assert both[rank][0] == status and both[1 - rank][0] == 1 and words in both[rank][1], both


def test_torchrun_ends_a_job_in_which_one_process_fails(tmp_path):
    (tmp_path / "m_step").mkdir()
    job = [*TORCHRUN, __file__, tmp_path / "m_step"]
    done = subprocess.run(job, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT)
    assert done.returncode == 1 and PHASES["m_step"][-1] in done.stderr, done.stderr[-4000:]


@pytest.mark.slow
def test_torchrun_ends_with_status_0_after_a_good_run_so_that_evaluation_follows(tmp_path):
    for i in range(10):
        run = [*TORCHRUN, "--", "vpd.py", *SHORT, "--out", str(tmp_path / str(i))]
        done = subprocess.run(run, capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert done.returncode == 0 and (tmp_path / str(i) / "model" / "config.json").exists(), done.stderr[-4000:]


if __name__ == "__main__":
    command.run(lambda: broken_run(Path(sys.argv[1])))
