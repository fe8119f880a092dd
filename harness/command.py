"""How a command ends: wrong input gives one line on stderr and exit status 2, a run that cannot go on status 1, Ctrl-C status
130. Files are written whole or not at all.

Nothing heavy is imported here, so that figures can be drawn without torch.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class CannotWrite(OSError):
    """What cannot be written, and why: "FILE: no space left", say."""


class Stopped(RuntimeError):
    """A run cannot go on, for a reason that is the same in every process; its weights are saved."""


def write(path: Path, content: str | bytes) -> None:
    """Under another name first, so that a full disk leaves the earlier file as it was. Raises CannotWrite."""
    # A device, a pipe or a link is written itself: renaming would put a file in its place.
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
                part.unlink()  # there only where something went wrong


def check_out(out: Path) -> None:
    """Raises ValueError with one line where --out cannot be a file."""
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out {out}: {'it is a folder' if out.is_dir() else f'there is no folder {out.parent}'}")


def run(main: Callable[[], None], *refused: type[Exception]) -> None:
    """A command as a program: Ctrl-C is exit status 130 without a traceback, what `refused` names is bad input. One of several
    processes leaves at once, whatever happened: while the interpreter takes itself down, threads of torch's abort a finished
    process now and then, and vLLM waits for the process group, which the other processes may never leave."""
    at_once = lambda: int(os.environ.get("WORLD_SIZE", 1)) > 1 or "vllm" in sys.modules  # noqa: E731
    try:
        main()
        status = 0
    except KeyboardInterrupt:
        status = 130
    except SystemExit as error:
        status = say(error.code, status=1) if isinstance(error.code, str) else error.code or 0
    except CannotWrite as error:
        status = say(f"cannot write {error}", status=1)
    except refused as error:
        status = say(error)
    except BaseException:
        if not at_once():
            raise
        traceback.print_exc()
        status = 1
    if at_once():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # whoever read it may be gone, or it is closed
                stream.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def say(message: object, command: str = "", status: int = 2) -> int:
    """One line on what was wrong. Returns the exit status."""
    rank = os.environ.get("RANK", "0")
    process = f"process {rank}: " if rank != "0" else ""
    print(f"{command or Path(sys.argv[0]).name}: error: {process}{' '.join(str(message).split())}", file=sys.stderr)
    return status


def fail(message: object, command: str = "", status: int = 2) -> None:
    """One line on what was wrong, and the exit status."""
    sys.exit(say(message, command, status))


class Parser(argparse.ArgumentParser):
    """Flags by their whole names. `prog` is given, since a command also runs inside of another one, or of a test."""

    def __init__(self, prog: str, description: str, **how):
        super().__init__(prog, description=description, allow_abbrev=False, **how)

    def error(self, message: object) -> None:
        fail(message, self.prog.split()[-1])
