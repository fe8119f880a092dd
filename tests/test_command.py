"""command.py: every command's wrong input gives one line on stderr with the command's name, and exit status 2; files are
written whole; Ctrl-C is quiet."""

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import command

ROOT = Path(__file__).parents[1]
COMMANDS = {"evaluate": "evaluate.py", "study.bench": "bench.py", "study.figures": "figures.py", "study.study": "study.py",
            "study.tables": "tables.py", "study.warm_start": "warm_start.py"}  # fmt: skip


@pytest.mark.parametrize("module", [*COMMANDS, "vpd", "neighbours.distil", "neighbours.ovd"])
def test_every_command_refuses_an_unknown_flag_in_one_line_with_its_name(module, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vpd.py"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(module).main(["--hel"])  # an abbreviation is no flag
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"{COMMANDS.get(module, module if '.' in module else 'vpd.py')}: error: ")


def test_a_message_is_told_in_one_line_and_a_further_process_says_which_it_is(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as stop:
        command.fail(ValueError("a  b\nc"), "x.py")
    assert stop.value.code == 2 and capsys.readouterr().err == "x.py: error: process 3: a b c\n"


@pytest.mark.parametrize("names", ["harness.command, study.figures, study.study", "vpd"])
def test_what_draws_and_tabulates_needs_no_torch_and_the_settings_only_what_all_need(names):
    """--help has two seconds."""
    late = {"transformers", "huggingface_hub", "datasets", "scipy", "matplotlib", "openai", "torch.distributed.checkpoint"}
    late = late if names == "vpd" else {"torch", "transformers"}
    code = f"import {names}, sys; print({late} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


# ---- Files -------------------------------------------------------------------------------------------------------


def test_text_and_bytes_replace_what_was_there_whole_or_not_at_all(tmp_path, monkeypatch):
    old = tmp_path / "old"
    for content in ("é", b"\x00", "as it was"):
        command.write(old, content)
        assert old.read_bytes() == (content.encode() if isinstance(content, str) else content)

    def full(self, content):
        """On a disk that takes two bytes more."""
        with self.open("wb") as file:
            file.write(content[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for path, content in ((old, "another"), (tmp_path / "new.png", b"another")):
        with pytest.raises(command.CannotWrite) as error:
            command.write(path, content)
        assert str(error.value) == f"{path}: No space left on device"
    assert old.read_text() == "as it was" and list(tmp_path.iterdir()) == [old]


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
     (BrokenPipeError(32, "Broken pipe"), (), 1, "c.py: error: cannot write standard output: Broken pipe\n"),
     (KeyError("a"), (KeyError,), 2, "c.py: error: 'a'\n"), (SystemExit(143), (), 143, "")],
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


@pytest.mark.parametrize(
    "ends, status, out, said",
    [("1 / 0", 1, "", "ZeroDivisionError: "), ("sys.exit(7)", 7, "", ""), ("sys.exit('why')", 1, "", "why\n"),
     ("print('lost')", 0, "lost\n", "")],
)  # fmt: skip
def test_one_of_several_processes_leaves_at_once_with_its_status(ends, status, out, said):
    code = f"import atexit, sys; from harness import command; atexit.register(print, 'lingers'); command.run(lambda: {ends})"
    environment = os.environ | {"WORLD_SIZE": "2", "PYTHONUNBUFFERED": ""}
    reader, closed = os.pipe()
    os.close(reader)
    for stdout, told in ((subprocess.PIPE, out), (closed, None)):
        pipes = dict(stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, **pipes)
        assert (done.returncode, done.stdout) == (status, told)
        assert said in done.stderr and bool(said) == bool(done.stderr)
    os.close(closed)


@pytest.mark.parametrize("buffered", ["", "1"])
def test_output_on_a_full_disk_is_one_line_and_status_1(buffered):
    code = "from harness import command; command.run(lambda: print('lost'))"
    with open("/dev/full", "w") as full:
        pipes = dict(stdout=full, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": buffered})
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, **pipes)
    assert (done.returncode, done.stderr) == (1, "-c: error: cannot write standard output: No space left on device\n")
