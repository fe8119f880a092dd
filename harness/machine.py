"""Checks before the first batch what this machine lacks for a run. If the run is certain to fail, it is refused in one line; if
it may fail, a note is printed. Each line says what to do.
"""

import os
import shutil
import subprocess
import sysconfig
from contextlib import suppress
from pathlib import Path

import torch

import feedback
import tasks
from harness import hub
from harness.plan import Plan, show, size
from tasks.base import one_line

CGROUP = Path("/sys/fs/cgroup")
NCCL_SHM = 1e9  # assumed: with less, NCCL may fail to map its buffers; docker's default is 64 MB


def check_driver(cfg) -> list[str]:
    """Notes. Raises ValueError if there are GPUs that torch cannot use."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1") or cfg.gpu_memory  # a plan for other GPUs
    if hidden or torch.cuda.is_available() or not (count := gpus()):
        return []
    why = "it finds none"
    try:
        torch.cuda.init()
    except Exception as error:  # an older driver, a build without CUDA
        why = one_line(error)
    line = f"nvidia-smi lists {count} GPUs, but torch {torch.__version__} can use none ({why}): update the driver, or install "
    line += "requirements.txt in a new environment; to train on the CPU, set CUDA_VISIBLE_DEVICES="
    return judged((line, cfg.task != "toy" and not cfg.smoke))


def gpus() -> int:
    """The number of GPUs that nvidia-smi lists."""
    with suppress(OSError, subprocess.TimeoutExpired):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
        return sum(line.startswith("GPU ") for line in listed.splitlines())
    return 0


def check(cfg, path: str, processes: int) -> tuple[Plan, list[str]]:
    """Prints the plan of a run of the model in `path`, and returns it with notes. Raises ValueError if it is certain to fail."""
    plan = show(cfg, path, processes)
    if cfg.plan and cfg.gpu_memory:  # for another machine
        return plan, []
    if cfg.plan:  # a run loads its problems itself
        load_task(cfg).close()
    return plan, judged(*compiler(cfg), *disk(cfg, plan), *memory(cfg, plan), *shared_memory(plan), *sandbox(cfg))


def load_task(cfg) -> tasks.Task:
    """The run's task. Raises ValueError with one line if it lacks the source of feedback."""
    task = tasks.load(cfg.task, cfg.subset, cfg.data, cfg.train_tests, cfg.since, cfg.until)
    if cfg.row().teacher and cfg.feedback in task.lacks:
        has = ", ".join(source for source in feedback.SOURCES if source not in task.lacks)
        raise ValueError(f"--feedback {cfg.feedback}: {task.name} only offers {has}")
    return task


def judged(*found: tuple[str, bool]) -> list[str]:
    """The notes among (line, is failure certain?). Raises ValueError with the lines of certain failures, if there are any."""
    if refused := [line for line, certain in found if certain]:
        raise ValueError("; ".join(refused))
    return [line for line, _ in found]


# ---- Each yields (line, is failure certain?) -------------------------------------------------------------------------


def compiler(cfg):
    """vLLM uses Triton's kernels on CUDA, and Triton compiles their launcher in C with Python's headers."""
    if not torch.cuda.is_available() or cfg.sampler == "hf":
        return
    headers = [sysconfig.get_paths()["include"], *os.environ.get("CPATH", "").split(":")]
    lacks = [] if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") else ["a C compiler (gcc)"]
    if not any(Path(folder, "Python.h").is_file() for folder in headers):
        lacks.append(f"{headers[0]}/Python.h (python3-dev)")
    if lacks:
        yield f"vLLM compiles kernels when it starts, and {' and '.join(lacks)} is missing: install it, or use --sampler hf", True


def disk(cfg, plan: Plan):
    """Two checkpoints are kept while a third is written; a model is written before the one that it replaces is deleted."""
    out = Path(cfg.out or "runs").resolve()
    saves = 1 if not cfg.checkpoint_every else min(3, -(-cfg.steps // cfg.checkpoint_every)) or 3
    takes = [(out, saves * plan.checkpoint + 2 * plan.model, f"checkpoints ({saves}) and models (2)")]
    if not cfg.smoke and not Path(cfg.model).is_dir() and hub.missing(cfg.model):
        if reason := hub.unreachable(cfg.model, "config.json"):
            yield f"weights of {cfg.model} have to be downloaded, and {reason}", True
        takes.append((Path(hub.library().constants.HF_HUB_CACHE), 2 * plan.parameters, "the model's download"))
    disks: dict[int, list] = {}
    for folder, need, what in takes:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        disks.setdefault(there.stat().st_dev, []).append((need, what, there))
    old = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) if cfg.out else 0  # continued or deleted
    for needs, whats, places in (zip(*rows) for rows in disks.values()):
        free = shutil.disk_usage(places[0]).free + (old if places[0] == out else 0)
        if sum(needs) > free:
            what = f"{' and '.join(whats)} take {size(sum(needs))}"
            yield f"the disk of {places[0]} has {size(free)} left, but {what}: free some space or use a larger disk", True


def memory(cfg, plan: Plan):
    """The first process gathers the whole network to save it. On a CPU, training takes host memory too."""
    itemsize = getattr(torch, cfg.dtype).itemsize
    need = plan.parameters * itemsize + plan.model + (0 if plan.gpu else plan.processes * sum(plan.state.values()))
    total, free = host_memory()
    if need > free:
        line = f"the run takes {size(need)} of host memory; this machine has {size(total)}, of which {size(free)} are free"
        yield f"{line}: use a larger machine, or end other programs", need > total


def host_memory() -> tuple[float, float]:
    """Total and free bytes of this machine or container."""
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
        yield f"/dev/shm has {size(room)}, and NCCL may need more: docker run --shm-size 8g, or --ipc=host", False


def runs_programs(cfg) -> bool:
    """Whether grading runs what a model has written. Some of reasoning-gym's scorers evaluate answers; an own task may."""
    return cfg.task in ("lcb", "own", "reasoning_gym") or cfg.task == "toy" and cfg.subset.startswith("code")


def sandbox(cfg):
    if runs_programs(cfg) and cfg.task != "own":
        from tasks.sandbox import Sandbox

        with Sandbox(workers=1) as box:
            unsafe = box.unsafe
        if unsafe:
            refused = not cfg.unsafe_sandbox
            yield unsafe + "; --unsafe_sandbox goes on anyway" * refused, refused
