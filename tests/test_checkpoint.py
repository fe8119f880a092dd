"""A run that is stopped, killed or damaged resumes as if nothing had happened: checkpoints by themselves, then whole runs."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

import vpd
from conftest import fewer_validation_problems, log_of, tiny_network
from harness import session
from harness.command import CannotWrite
from model import checkpoint
from model.parallel import World

# ---- A checkpoint by itself --------------------------------------------------------------------------------


class Training:
    """A model, its AdamW and a teacher of another architecture, always the same, and steps on random gradients from a seed."""

    def __init__(self, scale: float = 1.0):
        self.model, self.teacher = (tiny_network(family, dtype=torch.float32) for family in ("qwen3-tied", "qwen3-untied"))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.what = {"policy": self.model, "teacher": self.teacher}, {"shared": (self.model, self.optimizer)}
        with torch.no_grad():
            for p in [*self.model.parameters(), *self.teacher.parameters()]:
                p.mul_(scale)

    def steps(self, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            for p in self.model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for model in self.what[0].values() for p in model.parameters()])

    def save(self, folder: Path, step: int, **state) -> None:
        checkpoint.save(folder, step, *self.what, state, World())

    def restore(self, folder: Path) -> dict | None:
        return checkpoint.restore(folder, *self.what, World())


@pytest.mark.parametrize("steps", [0, 3])
def test_weights_moments_and_numbers_come_back_exactly(tmp_path, steps):
    """Before its first step an optimizer has no state, and neither saving nor loading may create one: AdamW's bias correction
    would then start at its second step."""
    one, other, state = Training(), Training(scale=-2), {"shift": -0.25, "best": 0.5, "bad_in_a_row": 2}
    assert other.restore(tmp_path) is None
    one.steps(steps)
    one.save(tmp_path, 7, **state)
    assert other.restore(tmp_path) == {"step": 7, **state} and torch.equal(other.weights(), one.weights())
    assert bool(one.optimizer.state) == bool(other.optimizer.state) == (steps > 0)
    for each in (one, other):
        each.steps(3, seed=1)
    assert torch.equal(other.weights(), one.weights())


def test_the_last_two_are_kept_and_what_a_cut_save_left_is_cleared(tmp_path):
    (tmp_path / "part-000009").mkdir()
    for step in (2, 4, 6, 10, 10):
        Training().save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000006", "step-000010"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("a\nb"), None])
def test_a_save_that_fails_is_one_line_and_leaves_no_part(error, tmp_path, monkeypatch):
    """torch wraps the error in one that is no Exception. None: no folder can be made there."""

    def broken(*_, checkpoint_id, **__):
        (checkpoint_id / "__0_0.distcp").write_text("half")
        raise CheckpointException("save", {0: (error, None)})

    (tmp_path / "file").touch()
    folder, reason = (tmp_path, re.escape(" ".join(str(error).split()))) if error else (tmp_path / "file", ".*")
    interrupted = isinstance(error, KeyboardInterrupt)
    kind, line = (KeyboardInterrupt, "") if interrupted else (CannotWrite, f"{folder}/step-000001: {reason}")
    monkeypatch.setattr(dcp, "save", broken)
    with pytest.raises(kind, match=f"^{line}$"):
        Training().save(folder, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(*steps):
    """The exit status of a child that takes these steps. A fork has everything imported."""
    child = multiprocessing.get_context("fork").Process(target=lambda: [step() for step in steps])
    child.start()
    child.join()
    return child.exitcode


def die_at(moment):
    """Kills this process at the n-th call of those that a save is made of."""
    places = (dcp, "save"), (checkpoint, "_sum"), (shutil, "rmtree"), (os, "unlink"), (Path, "write_text"), (Path, "rename")
    calls = []
    for module, name in places:

        def dying(*args, plain=getattr(module, name), **kwargs):
            calls.append(1)
            return kill() if len(calls) == moment else plain(*args, **kwargs)

        setattr(module, name, dying)


def test_a_save_that_is_killed_at_any_moment_leaves_the_checkpoint_before_it(tmp_path):
    """The third save, which also removes the first checkpoint."""
    training, weights, seen = Training(), {}, []
    for step in (1, 2, 3):
        training.steps(1)
        weights[step] = training.weights()
        if step < 3:
            training.save(tmp_path / "before", step)
    while not seen or seen[-1][0]:
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(len(seen)))
        status = in_child(lambda: die_at(1 + len(seen)), lambda: training.save(folder, 3))
        again = Training()
        step = again.restore(folder)["step"]
        assert status in (0, -signal.SIGKILL) and torch.equal(again.weights(), weights[step])
        seen.append((status, step))
        training.save(folder, 4)
        assert sorted(path.name for path in folder.iterdir()) == [f"step-00000{step}", "step-000004"]
    steps = [step for _, step in seen]
    assert len(steps) > 10 and steps == sorted(steps) and {*steps} == {2, 3}


def flip_a_bit(folder):
    file = next(folder.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[2000] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "one bit": flip_a_bit,
    "a file is missing": lambda folder: next(folder.glob("*.distcp")).unlink(),
    "manifest is no JSON": lambda folder: (folder / "manifest.json").write_text("{"),
    "manifest is a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "manifest is empty": lambda folder: (folder / "manifest.json").write_text("{}"),
    "state": lambda folder: (folder / "state.json").write_text("{}"),
    "no file": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, capsys, damage):
    training, again = Training(), Training()
    for step in (1, 2):
        training.steps(1)
        training.save(tmp_path, step)
        first = training.weights() if step == 1 else first
    damage(tmp_path / "step-000002")
    assert again.restore(tmp_path) == {"step": 1} and torch.equal(again.weights(), first)
    error = capsys.readouterr().err
    assert "step-000002 is damaged" in error and error.count("\n") == 1
    damage(tmp_path / "step-000001")
    with pytest.raises(checkpoint.Damaged, match="every checkpoint .* is damaged: --overwrite"):
        again.restore(tmp_path)


def test_log_rows_after_the_checkpoint_and_a_torn_line_are_dropped(tmp_path):
    rows = [{"kind": kind, "step": step} for kind, step in zip(
        "eval train train eval resume train eval train".split(), (0, 0, 1, 2, 2, 2, 3, 3))]  # fmt: skip
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "train", "st')
    assert checkpoint.cut_log(log, 2) == 4
    assert log.read_text() == "".join(json.dumps(row) + "\n" for row in rows[:5])
    assert checkpoint.cut_log(log, 2) == checkpoint.cut_log(tmp_path / "none.jsonl", 2) == 0


# ---- Whole runs --------------------------------------------------------------------------------------------

SMALL = (
    "--subset choice --prompts_per_batch 4 --minibatch_prompts 2 --group_size 4 --max_response_tokens 30 --eval_samples 1 "
    "--dtype float64 --steps 5 --eval_every 2 --checkpoint_every 2 --feedback environment "
)
VPD, SDPO = "--e_minibatch_prompts 4 --e_step_every 2", "--method sdpo"


def same_run(one, other):
    """Checks that two runs are the same, except for times and notes of resuming."""
    logs = (log_of(out) + log_of(out, "eval") for out in (one, other))
    for mine, theirs in zip(*logs, strict=True):
        for key in theirs.keys() - {"seconds", "tokens_per_second"}:
            value = theirs[key]
            near = pytest.approx(value, rel=1e-9, abs=1e-9) if isinstance(value, float) else value
            assert mine[key] == near, key
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    mine, theirs = (load_file(out / "model" / "model.safetensors") for out in (one, other))
    assert max((mine[k] - theirs[k]).abs().max().item() for k in theirs) < 1e-9


@pytest.fixture(scope="module", autouse=True)
def few_problems():
    with pytest.MonkeyPatch.context() as patch:
        fewer_validation_problems(patch)
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """unbroken(flags): the directory of a run that nothing stopped, made once for each set of flags."""

    @cache
    def run(flags):
        out = tmp_path_factory.mktemp("unbroken") / "run"
        vpd.main([*(SMALL + flags).split(), "--out", str(out)])
        return out

    return run


@pytest.mark.parametrize("flags, when", [(VPD, 1), (VPD, 2), (SDPO, 4), (f"{VPD} --prior fixed --e_optimizer shared", 4)])
def test_a_resumed_run_is_the_unbroken_run(unbroken, tmp_path, flags, when):
    """Killed at the end of a batch, so nothing is tidied up. Optimizers, delta, moving average and the fixed prior all have to
    come back for the losses to be the same."""
    out, end = tmp_path / "run", session.Run.end_of_batch
    dying = lambda self, log, batch: kill() if log.step == when else end(self, log, batch)  # noqa: E731
    command = [*(SMALL + flags).split(), "--out", str(out)]
    assert in_child(lambda: setattr(session.Run, "end_of_batch", dying), lambda: vpd.main(command)) == -signal.SIGKILL
    vpd.main([*command, "--resume"])
    same_run(out, unbroken(flags))
    assert [row["step"] for row in log_of(out, "resume")] == ([] if when < 2 else [when - when % 2])


def test_a_finished_run_is_resumed_if_its_checkpoints_are_whole(unbroken, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(unbroken(VPD), out)
    vpd.main(["--out", str(out), "--resume"])  # nothing is left to do
    same_run(out, unbroken(VPD))
    for folder in (out / "checkpoints").glob("step-*"):
        flip_a_bit(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        vpd.main(["--out", str(out), "--resume"])
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and [("damaged" in line) for line in error] == [True] * 3 and "--overwrite" in error[-1]
