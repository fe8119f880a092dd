"""command.py: what was wrong is one line on stderr with the command's name, and exit status 2, for every command; files are
written whole; Ctrl-C is quiet."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from study import bench
from harness import command
import evaluate
from study import figures
from harness import settings
from study import study
from tasks import toy
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


# ---- Files -------------------------------------------------------------------------------------------------------


def full(self, content):
    """Path.write_bytes on a disk that takes two bytes more."""
    with self.open("wb") as file:
        file.write(content[:2])
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_earlier_file_whole_and_nothing_else(tmp_path, monkeypatch):
    old, new = tmp_path / "old.txt", tmp_path / "new.png"
    command.write(old, "as it was")
    monkeypatch.setattr(Path, "write_bytes", full)
    for path, content in ((old, "another"), (new, b"another")):
        with pytest.raises(command.CannotWrite) as error:
            command.write(path, content)
        assert str(error.value) == f"{path}: No space left on device"
    assert old.read_text() == "as it was" and list(tmp_path.iterdir()) == [old]


def test_text_and_bytes_replace_what_was_there(tmp_path):
    for content in ("é", b"\x00", "short"):
        command.write(tmp_path / "x", content)
        assert (tmp_path / "x").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_links_and_pipes_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    command.write(tmp_path / "link", "through it")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    command.write(tmp_path / "pipe", "down it")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "through it"
    assert (tmp_path / "pipe").is_fifo() and os.read(reader, 9) == b"down it"
    os.close(reader)


# ---- How a command ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, refused, status, said",
    [(KeyboardInterrupt(), (), 130, ""), (command.CannotWrite("x: no space"), (), 1, "c.py: error: cannot write x: no space\n"),
     (KeyError("a"), (KeyError,), 2, "c.py: error: 'a'\n")],
)  # fmt: skip
def test_what_ends_a_command_is_its_exit_status_and_at_most_a_line(error, refused, status, said, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/some/where/c.py"])
    with pytest.raises(SystemExit) as stop:
        command.run(main, *refused)
    assert stop.value.code == status and capsys.readouterr().err == said
    if refused:
        with pytest.raises(KeyError):
            command.run(main)


def test_ctrl_c_is_130_and_no_traceback():
    code = "import command, time; command.run(lambda: (print('running', flush=True), time.sleep(60)))"
    program = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout.readline() == "running\n"
    program.send_signal(signal.SIGINT)
    out, error = program.communicate(timeout=30)
    assert (program.returncode, out, error) == (130, "", "")
