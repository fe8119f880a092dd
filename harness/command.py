"""How a command ends: one line on stderr, and exit status 2 for wrong input, 1 for a run that cannot go on or output that cannot
be written, 130 for Ctrl-C. Files are written whole or not at all. Nothing heavy is imported: figures are drawn without torch.
"""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class CannotWrite(OSError):
    """Its text names the file and the reason: "FILE: no space left"."""


class Stopped(RuntimeError):
    """A run cannot go on, and every process has found the same reason. Its weights are saved."""


def write(path: Path, content: str | bytes) -> None:
    """Writes a file under another name and renames it, so that a full disk leaves the old file as it was. Raises CannotWrite."""
    # Devices, pipes and links are written directly: renaming would replace them by a file.
    itself = os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path))
    part = path if itself else path.with_name(f"part-{path.name}")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    except OSError as error:
        raise CannotWrite(f"{path}: {error.strerror}") from None
    finally:
        if not itself:
            with suppress(OSError):
                part.unlink()  # it exists only after an error


def check_out(out: Path) -> None:
    """Raises ValueError with one line if --out cannot be a file."""
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out {out}: {'it is a folder' if out.is_dir() else f'there is no folder {out.parent}'}")


def run(main: Callable[[], None], *refused: type[Exception]) -> None:
    """Runs a command as a program. Ctrl-C is exit status 130 without a traceback, and exceptions in `refused` are bad input. One of
    several processes exits at once, without the interpreter's shutdown, in which torch's threads now and then abort a finished
    process, and vLLM waits for the process group, which the other processes may never leave."""
    at_once = lambda: int(os.environ.get("WORLD_SIZE", 1)) > 1 or "vllm" in sys.modules  # noqa: E731
    try:
        main()
        status = 0
    except KeyboardInterrupt:
        status = 130
    except SystemExit as error:
        status = say(error.code, status=1) if isinstance(error.code, str) else error.code or 0
    except BaseException as error:
        if isinstance(error, refused) or unwritten(error):
            status = say(error)
        elif at_once():
            traceback.print_exc()
            status = 1
        else:
            raise
    if at_once():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # its reader may have gone, or it may be closed
                stream.flush()
        os._exit(status)
    try:
        print(end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter reports it again
        status = status or say(error)
    if status:
        sys.exit(status)


def unwritten(error: object) -> str:
    """What could not be written and why, "" for any other error. `write` handles files, so the rest is standard output."""
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):
        return f"{error.filename or 'standard output'}: {error.strerror}"
    return str(error) if isinstance(error, CannotWrite) else ""


def say(message: object, command: str = "", status: int = 2) -> int:
    """Prints one line on what went wrong. Returns the exit status."""
    if what := unwritten(message):
        message, status = f"cannot write {what}", 1
    elif isinstance(message, OSError) and message.filename:
        message = f"{message.filename}: {message.strerror}"
    rank = os.environ.get("RANK", "0")
    process = f"process {rank}: " if rank != "0" else ""
    print(f"{command or Path(sys.argv[0]).name}: error: {process}{' '.join(str(message).split())}", file=sys.stderr)
    return status


def fail(message: object, command: str = "", status: int = 2) -> None:
    """Ends the program with one line on what went wrong."""
    sys.exit(say(message, command, status))


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags. `prog` is given because a command may run inside another program or a test."""

    def __init__(self, prog: str, description: str, **how):
        super().__init__(prog, description=description, allow_abbrev=False, **how)

    def error(self, message: object) -> None:
        fail(message, self.prog.split()[-1])
