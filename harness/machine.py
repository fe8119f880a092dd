"""Checks, before the first batch, what this machine lacks for a run. If failure is certain, the run is refused in one line; if
it is possible, a note is printed. Each says what to do.
"""

import os
import shutil
import subprocess
import sysconfig
from contextlib import suppress
from pathlib import Path

import torch

import tasks
from harness import hub
from harness.plan import Plan, size
from tasks.base import one_line

CGROUP = Path("/sys/fs/cgroup")
NCCL_SHM = 1e9  # assumed: below it NCCL may fail to map its buffers; docker gives 64 MB unless told otherwise


def check_driver(cfg) -> list[str]:
    """Notes. Raises ValueError where there are GPUs that torch cannot use."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1") or cfg.gpu_memory  # planned for other GPUs
    if hidden or torch.cuda.is_available() or not (count := gpus()):
        return []
    why = "it finds none"
    try:
        torch.cuda.init()
    except Exception as error:  # an older driver, a build without CUDA
        why = one_line(error)
    line = f"nvidia-smi lists {count} GPUs and torch {torch.__version__} can use none ({why}): update the driver, or install "
    line += "the pins of requirements.txt in a new environment; CUDA_VISIBLE_DEVICES= hides the GPUs and trains on the CPU"
    return judged((line, cfg.task != "toy" and not cfg.smoke))


def gpus() -> int:
    """How many nvidia-smi lists."""
    with suppress(OSError, subprocess.TimeoutExpired):
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
        return sum(line.startswith("GPU ") for line in told.splitlines())
    return 0


def check(cfg, plan: Plan) -> list[str]:
    """Notes on this machine. Raises ValueError with one line where the run is certain to fail."""
    if cfg.plan and cfg.gpu_memory:  # planned for another machine
        return []
    if cfg.plan:  # a run loads its problems itself
        tasks.load(cfg.task, cfg.subset, cfg.data, cfg.train_tests, cfg.since, cfg.until).close()
    return judged(*compiler(cfg), *disk(cfg, plan), *memory(cfg, plan), *shared_memory(plan), *sandbox(cfg))


def judged(*found: tuple[str, bool]) -> list[str]:
    """The lines that are notes. Raises ValueError with all of those that are certain to fail."""
    if refused := [line for line, certain in found if certain]:
        raise ValueError("; ".join(refused))
    return [line for line, _ in found]


# ---- Each yields (line, is it certain to fail?) ----------------------------------------------------------------------


def compiler(cfg):
    """On CUDA vLLM samples with Triton's kernels, whose launcher a C compiler makes against Python's headers."""
    if not torch.cuda.is_available() or cfg.sampler == "hf":
        return
    headers = [sysconfig.get_paths()["include"], *os.environ.get("CPATH", "").split(":")]
    lacks = [] if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") else ["a C compiler (gcc)"]
    if not any(Path(folder, "Python.h").is_file() for folder in headers):
        lacks.append(f"{headers[0]}/Python.h (python3-dev)")
    if lacks:
        yield f"vLLM compiles its kernels at the start and lacks {' and '.join(lacks)}: install it, or --sampler hf", True


def disk(cfg, plan: Plan):
    """Two checkpoints are kept and the third is written before one goes; so is a model beside the one that it replaces."""
    out = Path(cfg.out or "runs").resolve()
    saves = 1 if not cfg.checkpoint_every else min(3, -(-cfg.steps // cfg.checkpoint_every)) or 3
    takes = [(out, saves * plan.checkpoint + 2 * plan.model, f"checkpoints ({saves}) and models (2)")]
    if not cfg.smoke and not Path(cfg.model).is_dir() and hub.missing(cfg.model):
        if reason := hub.unreachable(cfg.model, "config.json"):
            yield f"the weights of {cfg.model} are not all in the hub's cache, and {reason}", True
        takes.append((Path(hub.library().constants.HF_HUB_CACHE), 2 * plan.parameters, "the model's download"))
    disks: dict[int, list] = {}
    for folder, need, what in takes:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        disks.setdefault(there.stat().st_dev, []).append((need, what, there))
    old = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) if cfg.out else 0  # goes on, or is deleted
    for needs, whats, places in (zip(*rows) for rows in disks.values()):
        free = shutil.disk_usage(places[0]).free + (old if places[0] == out else 0)
        if sum(needs) > free:
            what = f"{' and '.join(whats)} take {size(sum(needs))}"
            yield f"the disk of {places[0]} has {size(free)} left, and {what}: free some, or take a larger one", True


def memory(cfg, plan: Plan):
    """The first process gathers the whole network to save it; on a CPU everything is in host memory."""
    itemsize = getattr(torch, cfg.dtype).itemsize
    need = plan.parameters * itemsize + plan.model + (0 if plan.gpu else plan.processes * sum(plan.state.values()))
    total, free = host_memory()
    if need > free:
        line = f"the run takes {size(need)} of host memory, of which this machine has {size(total)}, {size(free)} free"
        yield f"{line}: take one with more, or end what else uses it", need > total


def host_memory() -> tuple[float, float]:
    """Bytes of this machine or container: all, and free."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError):
        return float("inf"), float("inf")
    with suppress(OSError, ValueError):  # no such file, or no limit
        most, taken = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        total, free = min(total, most), min(free, most - taken)
    return total, free


def shared_memory(plan: Plan):
    several = plan.gpu and plan.processes > 1 and Path("/dev/shm").is_dir()
    if several and (room := shutil.disk_usage("/dev/shm").total) < NCCL_SHM:
        yield f"/dev/shm has {size(room)}, where NCCL may want more: docker run --shm-size 8g, or --ipc=host", False


def runs_programs(cfg) -> bool:
    """Does grading run what a model has written? (Of an own task we do not know; reasoning-gym evaluates some answers.)"""
    return cfg.task in ("lcb", "own", "reasoning_gym") or cfg.task == "toy" and cfg.subset.startswith("code")


def sandbox(cfg):
    if runs_programs(cfg) and cfg.task != "own":
        from tasks.sandbox import Sandbox

        with Sandbox(workers=1) as box:
            unsafe = box.unsafe
        if unsafe:
            refused = not cfg.unsafe_sandbox
            yield unsafe + "; --unsafe_sandbox goes on all the same" * refused, refused
