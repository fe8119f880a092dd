"""command.py: what was wrong is one line on stderr with the command's name, and exit status 2, for every command."""

import subprocess
import sys
from pathlib import Path

import pytest

import bench
import command
import evaluate
import figures
import settings
import study
import toy
import vpd

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("module", [bench, evaluate, figures, study, toy, vpd])
def test_every_command_refuses_an_unknown_flag_in_one_line_with_its_name(module, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--no_such_flag", "1"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"{module.__name__}.py: error: ")


def test_flags_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--onl", "steps"])
    assert "--onl" in capsys.readouterr().err


def test_a_message_of_several_lines_is_told_in_one_and_a_further_process_says_which_it_is(monkeypatch, capsys):
    assert settings.fail is command.fail
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as stop:
        command.fail(ValueError("a  b\nc"), "x.py")
    assert stop.value.code == 2 and capsys.readouterr().err == "x.py: error: process 3: a b c\n"


@pytest.mark.parametrize("name", ["command", "figures", "study"])
def test_what_draws_and_tabulates_needs_no_torch(name):
    code = f"import {name}, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
