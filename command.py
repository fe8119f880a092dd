"""How a command says what was wrong with what it was given: one line on stderr and exit status 2.

Nothing heavy is imported here: figures.py and study.py do without torch.
"""

import argparse
import os
import sys


def fail(message: object, command: str = "vpd.py") -> None:
    """One line on what was wrong, exit status 2."""
    rank = os.environ.get("RANK", "0")
    process = f"process {rank}: " if rank != "0" else ""
    print(f"{command}: error: {process}{' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Flags by their whole names. `prog` is given, since a command also runs inside of another one, or of a test."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: object) -> None:
        fail(message, self.prog)
