"""What a machine lacks is reported before the first batch, in one line that says what to do."""

import re
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

import vpd
from harness import hub, machine, presets
from harness.plan import Plan
from tasks import sandbox
from test_settings import parsed

SMALL = "--steps 1 --prompts_per_batch 4 --minibatch_prompts 4 --e_minibatch_prompts 4".split()
QWEN = Plan(8_190_000_000, 8, 80e9, {"weights": 12e9}, {}, "", 0, {}, 0.6, 9e9, 1, 1, 262 * 10**9, 16 * 10**9, 98 * 10**9, 0)


def lines(check, *args) -> list[str]:
    return [f"{'refused' if certain else 'note'}: {line}" for line, certain in check(*args)]


# ---- GPUs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raised", [RuntimeError("The NVIDIA driver is too old"), AssertionError("not compiled with CUDA"), None])
def test_gpus_that_torch_cannot_use_are_refused_with_torchs_own_reason(raised, monkeypatch):
    def init():
        if raised:
            raise raised

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "gpus", lambda: 8)
    monkeypatch.setattr(torch.cuda, "init", init)
    why = f"{type(raised).__name__}: {raised}" if raised else "it finds none"
    words = f"nvidia-smi lists 8 GPUs, but torch {torch.__version__} can use none ({why})"
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        machine.check_driver(parsed(task="lcb"))
    (note,) = machine.check_driver(parsed())  # the toy needs no GPU
    assert words in note and machine.check_driver(parsed(task="lcb", smoke="qwen3")) == [note]


def test_a_machine_without_gpus_or_with_hidden_ones_is_left_alone(monkeypatch, tmp_path):
    lcb, smi = parsed("--plan", task="lcb"), tmp_path / "nvidia-smi"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    smi.write_text("#!/bin/sh\nprintf 'GPU 0: H100\\nGPU 1: H100\\n'\n")
    smi.chmod(0o755)
    assert machine.gpus() == 2
    assert machine.check_driver(replace(lcb, gpu_memory=80.0)) == []  # planned for another machine
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert machine.check_driver(lcb) == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    smi.write_text("#!/bin/sh\necho NVIDIA-SMI has failed; exit 9\n")
    assert machine.gpus() == 0 and machine.check_driver(lcb) == []
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    assert machine.gpus() == 0


def test_vllm_needs_a_compiler_and_headers_where_it_samples_on_cuda(monkeypatch, tmp_path):
    cfg, paths = parsed(task="lcb"), {"include": str(tmp_path)}
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda: paths)
    for name in ("CC", "CPATH"):
        monkeypatch.delenv(name, raising=False)
    assert lines(machine.compiler, cfg) == []  # no GPU: transformers samples
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (both,) = lines(machine.compiler, cfg)
    assert both.startswith("refused: ") and "a C compiler (gcc) and " in both and "Python.h (python3-dev) is missing" in both
    assert lines(machine.compiler, replace(cfg, sampler="hf")) == []
    monkeypatch.setenv("CC", "cc")
    assert "gcc" not in lines(machine.compiler, cfg)[0]
    monkeypatch.setenv("CPATH", str(tmp_path))
    paths["include"] = "/none"
    (tmp_path / "Python.h").touch()
    assert lines(machine.compiler, cfg) == []


@pytest.mark.parametrize("plan, room, said", [(QWEN, 64e6, 1), (QWEN, 2e9, 0), (replace(QWEN, processes=1), 64e6, 0)])
def test_little_shared_memory_is_a_note_for_several_gpus(plan, room, said, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(total=room))
    found = lines(machine.shared_memory, plan)
    assert len(found) == said and all(line.startswith("note: /dev/shm has 64.0 MB") for line in found)


# ---- Disk, host memory, the hub --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, need, what",
    [({}, 3 * 98e9 + 2 * 16e9, "checkpoints (3) and models (2)"), ({"steps": 20}, 2 * 98e9 + 32e9, "checkpoints (2)"),
     ({"steps": 21}, 3 * 98e9 + 32e9, "checkpoints (3)"), ({"checkpoint_every": 0}, 98e9 + 32e9, "checkpoints (1)")],
)  # fmt: skip
def test_a_disk_must_hold_three_checkpoints_and_two_models(flags, need, what, monkeypatch, tmp_path):
    cfg, free = parsed(task="own", model=tmp_path, out=tmp_path / "a" / "b", **flags), need
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert lines(machine.disk, cfg, QWEN) == []
    free = need - 1e9
    (line,) = lines(machine.disk, cfg, QWEN)
    assert line.startswith(f"refused: the disk of {tmp_path} has {free / 1e9:.1f} GB left, but {what}")
    assert f"take {need / 1e9:.1f} GB" in line
    (tmp_path / "a" / "b").mkdir(parents=True)
    with (tmp_path / "a" / "b" / "old").open("wb") as old:  # a run that goes on, or is to be overwritten, has its share
        old.truncate(10**9)
    assert lines(machine.disk, cfg, QWEN) == []


def test_a_download_takes_its_place_and_needs_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg, down, asked = parsed(task="lcb", model="owner/name"), ["offline"], []
    monkeypatch.setattr(hub, "unreachable", lambda *args: asked.append(args) or down[0])
    monkeypatch.setattr(hub, "missing", lambda name: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=330e9))
    unreachable, both = lines(machine.disk, cfg, QWEN)  # 326 GB of the run and 16.4 GB of the model
    assert unreachable == "refused: weights of owner/name have to be downloaded, and offline"
    assert "and the model's download take 342.4 GB" in both
    down[0] = ""
    assert lines(machine.disk, cfg, QWEN) == [both]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/proc/other")  # on another disk
    assert lines(machine.disk, cfg, QWEN) == []
    monkeypatch.setattr(hub, "missing", lambda name: False)
    asked.clear()
    assert lines(machine.disk, cfg, QWEN) == [] == asked


@pytest.mark.parametrize("gpu, need", [(80e9, 8.19e9 * 4 + 16e9), (0, 8.19e9 * 4 + 16e9 + 8 * 12e9)])
def test_host_memory_that_is_not_there_is_refused_and_what_is_in_use_a_note(gpu, need, monkeypatch):
    memory, plan, cfg = [0.0, 0.0], replace(QWEN, gpu=gpu), parsed(task="lcb")
    monkeypatch.setattr(machine, "host_memory", lambda: memory)
    for total, free, start in ((need + 1, need, None), (need + 1, need - 1e9, "note: "), (need - 1, need - 1e9, "refused: ")):
        memory[:] = total, free
        found = lines(machine.memory, cfg, plan)
        assert (len(found) == 1 and found[0].startswith(start)) if start else found == []
        assert all(f"takes {need / 1e9:.1f} GB of host memory" in line for line in found)


def test_a_containers_memory_is_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    total, free = machine.host_memory()
    assert 1e8 < free <= total < 1e15
    for name, text in (("memory.max", "max\n"), ("memory.current", "30000000\n")):
        (tmp_path / name).write_text(text)
    assert machine.host_memory()[0] == total
    (tmp_path / "memory.max").write_text("50000000\n")
    assert machine.host_memory() == (50_000_000, 20_000_000)


# ---- The sandbox, and where all of this is asked ---------------------------------------------------------------------


def test_programs_are_not_run_without_a_layer_of_the_sandbox_unless_asked_for(monkeypatch):
    monkeypatch.setattr(sandbox.Sandbox, "unsafe", property(lambda self: "landlock not available: a program could"))
    for cfg in (parsed(task="lcb"), parsed(subset="code-judge")):
        (refused,) = lines(machine.sandbox, cfg)
        assert refused == "refused: landlock not available: a program could; --unsafe_sandbox goes on anyway"
        assert lines(machine.sandbox, replace(cfg, unsafe_sandbox=True)) == ["note: landlock not available: a program could"]
    assert lines(machine.sandbox, parsed()) == lines(machine.sandbox, parsed(task="math")) == []


def test_the_check_and_every_run_ask_and_say_it_in_one_line(monkeypatch, tmp_path, capsys):
    lacks, out = [("a disk is full", True), ("memory is short", True), ("little shm", False)], tmp_path / "run"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "gpus", lambda: 8)
    monkeypatch.setattr(machine, "memory", lambda *args: lacks)
    toy, run = ["--subset", "choice"], [*SMALL, "--eval_every", "0", "--out", str(out)]
    for flags, words in ((toy, "error: a disk is full; memory is short"), (["--task", "lcb"], "error: nvidia-smi lists 8 GPUs")):
        for argv in (["--plan"], run):
            with pytest.raises(SystemExit) as stop:
                vpd.main([*flags, *argv])
            error = capsys.readouterr().err
            assert stop.value.code == 2 and error.count("\n") == 1 and words in error and not out.exists()
    del lacks[:2]
    for argv in (["--plan"], run):
        vpd.main([*toy, *argv])
        told = capsys.readouterr().out
        assert "\nnvidia-smi lists 8 GPUs" in told and "\nlittle shm\n" in told


def test_the_check_reads_the_problems_unless_it_is_for_another_machine(monkeypatch):
    monkeypatch.setattr(machine, "show", lambda *given: QWEN)
    cfg = parsed("--plan", task="math", data="no/such/folder")
    with pytest.raises(ValueError, match="no/such/folder does not exist"):
        machine.check(cfg, "m", 1)
    science = dict(task="sciknoweval", subset="all", data=presets.FIXTURES / "sciknoweval.jsonl", feedback="environment")
    with pytest.raises(ValueError, match="sciknoweval/all only offers critique"):
        machine.check(parsed("--plan", **science), "m", 1)
    assert machine.check(replace(cfg, gpu_memory=80.0), "m", 1) == (QWEN, [])
