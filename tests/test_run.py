"""run.sh: which commands a word starts, in which order. Python itself is replaced by a script that notes what it is asked."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def sh(tmp_path):
    """sh(words, **environment): exit status, the commands started, standard output, standard error."""
    (tmp_path / "bin").mkdir()
    python, told = tmp_path / "bin" / "python", tmp_path / "told"
    python.write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    python.chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".vpd-requirements")  # nothing is to be installed

    def run(words, **environment):
        environment = {"VIRTUAL_ENV": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""} | environment
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if name != "NPROC"}
        done = subprocess.run(
            ["bash", str(ROOT / "run.sh"), *words.split()],
            env=kept | {"PATH": path} | environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, told.read_text().splitlines() if told.exists() else [], done.stdout, done.stderr

    return run


@pytest.mark.parametrize("word", ["toy", "lcb", "sciknoweval", "math", "own"])
def test_a_task_is_trained_evaluated_and_drawn(sh, word):
    status, commands, _, error = sh(f"{word} --data mine --out here")
    assert (status, error) == (0, "")
    assert commands == [
        f"vpd.py --task {word} --data mine --out here",
        "evaluate.py --run here",
        "figures.py here --out here/curves.png",
    ]


def test_a_run_without_a_name_gets_one_of_its_word_and_time(sh):
    _, commands, _, _ = sh("own --data mine.py")
    assert commands[0].startswith("vpd.py --task own --out runs/own-20") and commands[0].endswith(" --data mine.py")
    assert commands[1] == f"evaluate.py --run {commands[0].split()[4]}"


@pytest.mark.parametrize("words", ["toy --smoke", "own --data x.py --smoke", "--smoke --steps 2"])
def test_a_smoke_run_of_what_runs_here_as_it_is_is_refused_before_it_is_announced(sh, words):
    status, commands, out, _ = sh(words)
    word = words.split()[0] if words[0] != "-" else "toy"
    assert (
        commands == [f"vpd.py --task {word} --smoke qwen3"] and out == ""
    )  # which refuses, in the words of settings.py


def test_a_smoke_run_goes_over_the_feedback_sources_and_families(sh):
    status, commands, out, _ = sh("math --smoke")
    assert status == 0 and len(out.splitlines()) == 3 and len(commands) == 9
    assert sum("--smoke olmo3 --feedback sibling" in command for command in commands) == 1


@pytest.mark.parametrize(
    "words, environment, reason",
    [("mine", {}, "unknown word 'mine': toy, lcb, sciknoweval, math, own, eval"), ("toy --resume", {}, "--resume needs --out"),
     ("toy", {"NPROC": "two"}, "NPROC is the number of processes, not 'two'")],
)  # fmt: skip
def test_what_it_cannot_do_is_one_line_and_exit_2(sh, words, environment, reason):
    status, commands, _, error = sh(words, **environment)
    assert (status, commands) == (2, []) and error.startswith("run.sh: error: ")
    assert reason in error and error.count("\n") == 1
