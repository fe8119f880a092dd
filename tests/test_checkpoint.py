"""A run that is stopped, killed or damaged goes on as if nothing had happened: checkpoints by themselves, then whole runs."""

import json
import multiprocessing
import os
import shutil
import signal
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

import vpd
from conftest import fewer_validation_problems
from harness import session
from harness.command import CannotWrite
from model import checkpoint
from model.parallel import World

ALONE = World()


# ---- A checkpoint by itself --------------------------------------------------------------------------------


def train(model, optimizer, steps, seed=0):
    """Steps on gradients made up by the seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def fresh(make_model):
    """fresh(): (model, AdamW), the same at every call."""

    def make():
        model = make_model(dtype=torch.float32)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    return make


@pytest.mark.parametrize("steps", [0, 3])
def test_weights_moments_and_numbers_come_back_exactly(fresh, make_model, tmp_path, steps):
    """With no step made yet, an optimizer has no state, and neither saving nor loading may make one up: AdamW's bias
    correction would then start at its second step."""
    (model, optimizer), teacher = fresh(), make_model("qwen3-untied", dtype=torch.float32)
    train(model, optimizer, steps)
    state = {"shift": -0.25, "best": 0.5, "bad_in_a_row": 2}
    checkpoint.save(tmp_path, 7, {"policy": model, "teacher": teacher}, {"shared": (model, optimizer)}, state, ALONE)
    (again, other_optimizer), other = fresh(), make_model("qwen3-untied", dtype=torch.float32)
    with torch.no_grad():
        for p in [*again.parameters(), *other.parameters()]:
            p.mul_(-2)
    kept = checkpoint.restore(tmp_path, {"policy": again, "teacher": other}, {"shared": (again, other_optimizer)}, ALONE)
    assert kept == {"step": 7, **state}
    assert torch.equal(flat(again), flat(model)) and torch.equal(flat(other), flat(teacher))
    assert bool(optimizer.state) == bool(other_optimizer.state) == (steps > 0)
    for each in ((model, optimizer), (again, other_optimizer)):
        train(*each, 3, seed=1)
    assert torch.equal(flat(again), flat(model))


def test_the_last_two_are_kept_and_what_a_cut_save_left_is_cleared(fresh, tmp_path):
    assert checkpoint.restore(tmp_path / "none", {}, {}, ALONE) is None
    (tmp_path / "part-000009").mkdir(parents=True)
    for step in (2, 4, 6, 10, 10):
        checkpoint.save(tmp_path, step, {"policy": fresh()[0]}, {}, {}, ALONE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000006", "step-000010"]


def test_a_place_where_no_checkpoint_can_be_made_is_named(fresh, tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CannotWrite, match=f"^{tmp_path}/checkpoints/step-000001: "):
        checkpoint.save(tmp_path / "checkpoints", 1, {"policy": fresh()[0]}, {}, {}, ALONE)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("a\nb")])
def test_what_comes_between_a_save_is_one_line_and_leaves_no_part(fresh, error, tmp_path, monkeypatch):
    """As torch wraps it: in an exception that is none of Exception's."""

    def broken(*_, checkpoint_id, **__):
        (checkpoint_id / "__0_0.distcp").write_text("half")
        raise CheckpointException("save", {0: (error, None)})

    monkeypatch.setattr(dcp, "save", broken)
    interrupted = isinstance(error, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt if interrupted else CannotWrite) as stop:
        checkpoint.save(tmp_path, 1, {"policy": fresh()[0]}, {}, {}, ALONE)
    assert interrupted or str(stop.value) == f"{tmp_path}/step-000001: {' '.join(str(error).split())}"
    assert not list(tmp_path.iterdir())


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


def test_a_save_that_is_killed_at_any_moment_leaves_the_checkpoint_before_it(fresh, tmp_path):
    """The third, which also removes the first."""
    model, optimizer = fresh()
    save = lambda folder, step: checkpoint.save(folder, step, {"policy": model}, {"one": (model, optimizer)}, {}, ALONE)  # noqa: E731
    weights, seen = {}, []
    for step in (1, 2, 3):
        train(model, optimizer, 1)
        weights[step] = flat(model)
        if step < 3:
            save(tmp_path / "before", step)
    while not seen or seen[-1][0]:
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(len(seen)))
        status = in_child(lambda: die_at(1 + len(seen)), lambda: save(folder, 3))
        again, other = fresh()
        step = checkpoint.restore(folder, {"policy": again}, {"one": (again, other)}, ALONE)["step"]
        assert status in (0, -signal.SIGKILL) and torch.equal(flat(again), weights[step])
        seen.append((status, step))
        save(folder, 4)
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


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(fresh, tmp_path, capsys, damage):
    model, optimizer = fresh()
    for step in (1, 2):
        train(model, optimizer, 1)
        checkpoint.save(tmp_path, step, {"policy": model}, {"shared": (model, optimizer)}, {}, ALONE)
        first = flat(model) if step == 1 else first
    DAMAGES[damage](tmp_path / "step-000002")
    again, other = fresh()
    restore = partial(checkpoint.restore, tmp_path, {"policy": again}, {"shared": (again, other)}, ALONE)
    assert restore() == {"step": 1} and torch.equal(flat(again), first)
    error = capsys.readouterr().err
    assert "step-000002 is damaged" in error and error.count("\n") == 1
    DAMAGES[damage](tmp_path / "step-000001")
    with pytest.raises(checkpoint.Damaged, match="every checkpoint .* is damaged: --overwrite"):
        restore()


def test_log_rows_after_the_checkpoint_and_a_torn_line_are_dropped(tmp_path):
    rows = [{"kind": kind, "step": step} for kind, step in zip(
        "eval train train eval resume train eval train".split(), (0, 0, 1, 2, 2, 2, 3, 3))]  # fmt: skip
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "train", "st')
    assert checkpoint.cut_log(log, 2) == 4
    assert log.read_text() == "".join(json.dumps(row) + "\n" for row in rows[:5])
    assert checkpoint.cut_log(log, 2) == checkpoint.cut_log(tmp_path / "none.jsonl", 2) == 0


# ---- Whole runs --------------------------------------------------------------------------------------------

SMALL = ["--subset", "choice", "--prompts_per_batch", "4", "--minibatch_prompts", "2",
         "--group_size", "4", "--max_response_tokens", "30", "--eval_samples", "1", "--dtype", "float64", "--steps", "5",
         "--eval_every", "2", "--checkpoint_every", "2", "--feedback", "environment"]  # fmt: skip


def small(*flags):
    """The flags of a small run."""
    return [*SMALL, *([] if "sdpo" in flags else ["--e_minibatch_prompts", "4", "--e_step_every", "2"]), *flags]


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same_run(one, other):
    """Apart from times and notes of resuming."""
    logs = ([row for row in log_of(out) if row["kind"] != "resume"] for out in (one, other))
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
    """unbroken(*flags): the directory of a run that nothing stopped, made once per flags."""

    @cache
    def run(*flags):
        out = tmp_path_factory.mktemp("unbroken") / "run"
        vpd.main([*small(*flags), "--out", str(out)])
        return out

    return run


@pytest.mark.parametrize(
    "flags, when",
    [((), 1), ((), 2), (("--method", "sdpo"), 4), (("--prior", "fixed", "--e_optimizer", "shared"), 4)],
    ids=str,
)
def test_a_resumed_run_is_the_unbroken_run(unbroken, tmp_path, flags, when):
    """Stopped at the end of a batch, as by a kill: nothing is tidied up. Optimizers, delta, moving average and the fixed prior
    all have to come back for the losses to be the same."""
    out, end = tmp_path / "run", session.Run.end_of_batch
    dying = lambda self, log, batch: kill() if log.step == when else end(self, log, batch)  # noqa: E731
    command = [*small(*flags), "--out", str(out)]
    assert in_child(lambda: setattr(session.Run, "end_of_batch", dying), lambda: vpd.main(command)) == -signal.SIGKILL
    vpd.main([*command, "--resume"])
    same_run(out, unbroken(*flags))
    assert [row["step"] for row in log_of(out) if row["kind"] == "resume"] == ([] if when < 2 else [when - when % 2])


def test_a_finished_run_is_resumed_if_its_checkpoints_are_whole(unbroken, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(unbroken(), out)
    vpd.main(["--out", str(out), "--resume"])  # nothing is left to do
    same_run(out, unbroken())
    for folder in (out / "checkpoints").glob("step-*"):
        flip_a_bit(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        vpd.main(["--out", str(out), "--resume"])
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and [("damaged" in line) for line in error] == [True] * 3 and "--overwrite" in error[-1]
