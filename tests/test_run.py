"""run.sh: which commands a word starts, in which order. Python itself is replaced by a script that notes what it is asked."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
echo "$@" >> {told}
case "$*" in
  *refused*) echo "vpd.py: error: no" >&2; exit 2 ;;
  *evaluate.py*|*study*|*--plan*) ;;
  *vpd.py*|*neighbours*) [ -z "$VPD_OUT_FILE" ] || echo runs/here > "$VPD_OUT_FILE" ;;
esac
case "$*" in *--slow*) trap 'echo "got" >> {told}; exit 143' TERM HUP; echo ready; for i in $(seq 50); do sleep 0.1; done ;; esac
"""


@pytest.fixture
def sh(tmp_path):
    """sh(words, **environment): exit status, the commands started, standard output, standard error."""
    (tmp_path / "bin").mkdir()
    told = tmp_path / "told"
    (tmp_path / "bin" / "python").write_text(PYTHON.replace("{told}", str(told)))
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU 0: H100\\nGPU 1: H100\\n'\n")
    for name in ("python", "nvidia-smi"):
        (tmp_path / "bin" / name).chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".vpd-requirements")  # nothing is to be installed

    def run(words, started=False, **environment):
        kept = {name: value for name, value in os.environ.items() if name not in ("NPROC", "CUDA_VISIBLE_DEVICES")}
        ours = {"VIRTUAL_ENV": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        process = subprocess.Popen(["bash", str(ROOT / "run.sh"), *words.split()], env=kept | ours | environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        if started:
            return process, told
        out, error = process.communicate(timeout=60)
        return process.returncode, told.read_text().splitlines() if told.exists() else [], out, error

    return run


AFTER = ["evaluate.py --run runs/here", "-m study.figures runs/here --out runs/here/curves.png"]
TORCHRUN = "-m torch.distributed.run --standalone --shutdown-timeout 1800 --nproc-per-node 2 -- "
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    "words, environment, commands",
    [("", HIDDEN, ["vpd.py --task toy", *AFTER]),
     ("math --data mine --out x", HIDDEN, ["vpd.py --task math --data mine --out x", *AFTER]),
     ("lcb --method distil", HIDDEN, ["-m neighbours.distil --task lcb --method distil", *AFTER]),
     ("toy --method=ovd", HIDDEN, ["-m neighbours.ovd --task toy --method=ovd", *AFTER]),
     ("lcb --help", HIDDEN, ["vpd.py --task lcb --help"]),
     ("check", HIDDEN, ["vpd.py --task lcb --plan"]),
     ("check math --gpus 8", HIDDEN, ["vpd.py --task math --plan --gpus 8"]),
     ("check --gpus 8", HIDDEN, ["vpd.py --task lcb --plan --gpus 8"]),
     ("eval --run x", HIDDEN, ["evaluate.py --run x"]),
     ("bench steps", HIDDEN, ["-m study.bench steps"]),
     ("test -x", HIDDEN, ["-m pytest -q -m not slow and not vllm and not gpu and not real tests -x"]),
     # Several processes: one checks first.
     ("lcb", {}, ["vpd.py --task lcb --plan --gpus 2", f"{TORCHRUN}vpd.py --task lcb", f"{TORCHRUN}{AFTER[0]}", AFTER[1]]),
     ("toy --smoke", {"CUDA_VISIBLE_DEVICES": "0,3"}, [f"{TORCHRUN}vpd.py --task toy --smoke", f"{TORCHRUN}{AFTER[0]}", AFTER[1]]),
     ("eval --run x", {"NPROC": "2"}, [f"{TORCHRUN}evaluate.py --run x"])],
)  # fmt: skip
def test_a_word_starts_its_commands(words, environment, commands, sh):
    status, started, _, error = sh(words, **environment)
    assert (status, error, started) == (0, "", commands)


@pytest.mark.parametrize(
    "words, environment, reason, started",
    [("mine", {}, "run.sh: error: unknown word 'mine'", 0), ("toy", {"NPROC": "two"}, "run.sh: error: NPROC is the number", 0),
     ("lcb --refused", HIDDEN, "vpd.py: error: no", 1), ("lcb --refused", {"NPROC": "2"}, "vpd.py: error: no", 1)],
)  # fmt: skip
def test_what_it_cannot_do_is_one_line_exit_2_and_leaves_nothing(words, environment, reason, started, sh, tmp_path):
    status, commands, _, error = sh(words, **environment, TMPDIR=str(tmp_path))
    assert status == 2 and error.startswith(reason) and error.count("\n") == 1 and len(commands) == started
    assert not list(tmp_path.glob("tmp.*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_run_whose_status_is_the_scripts(number, sh):
    process, told = sh("toy --slow", started=True, **HIDDEN)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=30) == 143
    assert told.read_text().splitlines() == ["vpd.py --task toy --slow", "got"]  # and nothing is evaluated
