"""The state of a run on disk: weights, optimizers, moving average, and a few numbers.

A checkpoint is a folder `step-N`, the state after N rollout batches. It is written under a temporary name and renamed when it is
complete, so a run that is killed at any moment leaves only whole checkpoints. torch.distributed.checkpoint writes the tensors
in shards, which another number of processes may read. `manifest.json` holds the size and CRC-32 of every file, so that damage
is found before anything is loaded. No generator's state is saved, because every random number is a function of seed, batch and
row (rollout.py).
"""

import json
import shutil
import sys
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from harness.command import CannotWrite, write
from model.parallel import World

warnings.filterwarnings("ignore", "torch.distributed is ")  # not available or initialized: one process has no group
KEPT = 2


class Damaged(ValueError):
    """No checkpoint is whole."""


Optimizers = dict[str, tuple[nn.Module, torch.optim.Optimizer]]


def save(folder: Path, step: int, models: dict[str, nn.Module], optimizers: Optimizers, state: dict, world: World) -> None:
    """Writes `folder/step-N` and removes all but the last two checkpoints. models and optimizers by name; state: what JSON can
    hold. Collective. Raises CannotWrite."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    final, part = folder / f"step-{step:06d}", folder / f"part-{step:06d}"
    # Before its first step an optimizer has no state, and asking for it would create one, which changes the run.
    stepped = [name for name, (_, optimizer) in optimizers.items() if optimizer.state]
    tensors = {f"model.{name}": model.state_dict() for name, model in models.items()}
    tensors |= {f"optimizer.{name}": get_optimizer_state_dict(*optimizers[name]) for name in stepped}

    def begin() -> None:
        for left in folder.glob("part-[0-9]*"):  # left by a save that was cut short
            shutil.rmtree(left)
        part.mkdir(parents=True)

    def finish() -> None:
        (part / "state.json").write_text(json.dumps({"step": step, "stepped": stepped, **state}))
        files = {name: _sum(part / name) for name in (".metadata", "state.json")}
        (part / "manifest.json").write_text(json.dumps(files | written))
        shutil.rmtree(final, ignore_errors=True)  # a damaged one: no run saves a step twice
        part.rename(final)
        for old in sorted(folder.glob("step-*"))[:-KEPT]:
            shutil.rmtree(old)  # if this is cut short, the manifest shows it

    try:
        world.first(begin)
        dcp.save(tensors, checkpoint_id=part)
        written = world.together({path.name: _sum(path) for path in part.glob(f"__{world.rank}_*")})
        world.first(finish)
    except BaseException as error:  # the library's own is no Exception
        first = cause(error)
        full = shutil.disk_usage(folder.parent).free < 1 << 20  # the library's errors do not say so
        shutil.rmtree(part, ignore_errors=True)
        if not isinstance(first, Exception):  # Ctrl-C
            raise first from None
        raise CannotWrite(f"{final}: {'no space left on the disk' if full else ' '.join(str(first).split())}") from error


def cause(error: BaseException) -> BaseException:
    """The first error that torch.distributed.checkpoint has wrapped in one of its own; any other error itself."""
    return next(iter(error.failures.values()))[0] if hasattr(error, "failures") else error


def last(out: Path) -> str:
    """What `--resume` would do with the run directory `out`, in words."""
    steps = [int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*")]
    return f"--resume goes on after {max(steps)} batches" if steps else "it has no checkpoint yet: --resume starts again"


def restore(folder: Path, models: dict[str, nn.Module], optimizers: Optimizers, world: World) -> dict | None:
    """Loads the newest whole checkpoint of `folder` into models and optimizers. Returns the state that `save` was given, with
    "step"; None if there is no checkpoint. Damaged ones are named on standard error and skipped. Raises Damaged if all are.
    Collective."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    checkpoint = world.first(lambda: next(filter(_is_whole, sorted(folder.glob("step-*"), reverse=True)), None))
    if checkpoint is None and not any(folder.glob("step-*")):
        return None
    if checkpoint is None:
        raise Damaged(f"every checkpoint in {folder} is damaged: --overwrite starts the run again")
    state = json.loads((checkpoint / "state.json").read_text())
    tensors = {f"model.{name}": model.state_dict() for name, model in models.items()}  # the weights themselves
    stepped = [name for name in state.pop("stepped") if name in optimizers]
    tensors |= {f"optimizer.{name}": get_optimizer_state_dict(*optimizers[name]) for name in stepped}
    dcp.load(tensors, checkpoint_id=checkpoint)
    for name in stepped:
        set_optimizer_state_dict(*optimizers[name], tensors[f"optimizer.{name}"])
    return state


def cut_log(path: Path, step: int) -> int:
    """Drops from a JSONL log what was written after the checkpoint of `step` batches: rows of later batches, and a torn line.
    The step of an evaluation or a resume counts the batches done, any other row's is its batch. Returns the number dropped."""
    if not path.exists():
        return 0
    kept, lines = [], path.read_text(errors="replace").splitlines()
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if row["step"] < step or row.get("kind") in ("eval", "resume") and row["step"] <= step:
                kept.append(line)
    write(path, "".join(line + "\n" for line in kept))
    return len(lines) - len(kept)


def _sum(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint's files are as they were written. A damaged one is named on standard error."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text())
        wrong = [name for name in {".metadata", "state.json"} | files.keys() if _sum(checkpoint / name) != files.get(name)]
        damage = f"{wrong[0]} is not what was written" if wrong else ""
    except (OSError, ValueError, AttributeError) as error:
        damage = f"{type(error).__name__}: {error}"
    if damage:
        print(f"checkpoint {checkpoint} is damaged and skipped: {damage}", file=sys.stderr)
    return not damage
