"""From a command to settings: a flag for each field of a Config, presets under the flags, and what is refused.

A Config is a dataclass whose fields are made by `Group`s: the default, what --help says, the values that are allowed, and who
reads the setting. All of it is one line beside the field, so nothing about a setting has to be looked up or added elsewhere.
"""

import argparse
import dataclasses
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args, get_origin

from harness.command import Parser

# Settings of a command rather than of the run that it starts or resumes.
NOT_OF_THE_RUN = ("out", "resume", "overwrite", "track", "plan", "gpus", "gpu_memory")


class Group:
    """A heading of --help, and the maker of its fields. need, reads: who reads the group's settings, in words and as a function
    of the settings; a flag that nobody reads is refused. A field may have its own."""

    def __init__(self, title: str, need: str = "", reads: Callable = lambda cfg: True):
        self.title, self.need, self.reads = title, need, reads

    def __call__(
        self, default, help: str, above=-math.inf, least=-math.inf, below=math.inf, most=math.inf, need="", reads=None
    ):
        told = dict(help=help, group=self.title, above=above, least=least, below=below, most=most)
        return dataclasses.field(
            default=default, metadata=told | {"need": need or self.need, "reads": reads or self.reads}
        )


def read_by(objective: Callable, name: str) -> bool:
    """Whether a function of this kind, or one that it calls by name, has `cfg.name`. What is no plain function may have."""
    if not isinstance(objective, types.FunctionType):
        return True
    names = objective.__code__.co_names
    called = (objective.__globals__.get(other) for other in names)
    return name in names or any(isinstance(f, types.FunctionType) and read_by(f, name) for f in called)


# ---- Flags -----------------------------------------------------------------------------------------------------


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1")


def flags(config: type, prog: str, description: str, values: dict) -> Parser:
    """A parser that returns only what was given. values: shown by --help as what holds without the flag."""
    formatter = lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120)  # noqa: E731
    parser = Parser(prog, description, argument_default=argparse.SUPPRESS, formatter_class=formatter, usage=f"{prog} [flags]")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(config):
        title, kind = field.metadata["group"], field.type
        group = groups.setdefault(title, parser.add_argument_group(title))
        value = values.get(field.name, field.default)
        shown = "" if value == "" or kind is bool and not value else f" [{value}]".replace("\n", "\\n")
        how = dict(help=f"{field.metadata['help']}{shown}".replace("%", "%%"))
        if kind is bool:
            how |= dict(nargs="?", const=True, type=_boolean, metavar="BOOL")
            how["help"] += f"; --no_{field.name} turns it off" if field.default else ""
        elif get_origin(kind) is Literal:
            choices = [choice for choice in get_args(kind) if choice]
            how |= dict(choices=get_args(kind), metavar="|".join(choices))
            if field.metadata["help"].startswith("[optional]"):
                how |= dict(nargs="?", const=choices[0], help=how["help"].removeprefix("[optional]"))
        else:
            how |= dict(type=kind, metavar={int: "N", float: "X", str: "TEXT"}[kind])
        group.add_argument(f"--{field.name}", **how)
        if kind is bool and field.default:
            group.add_argument(
                f"--no_{field.name}", dest=field.name, action="store_const", const=False, help=argparse.SUPPRESS
            )
    return parser


def parse(
    argv: list[str] | None, config: type, prog: str, description: str, preset: Callable[[dict], dict], method: str = ""
):
    """An instance of `config`: flags over `preset(flags)` over the defaults; method: the loop's, where it has but one. Its `given`
    names the flags of the command, its `preset` holds what they stand over. A run that is resumed has its own settings in the
    preset's place. Bad flags end the program with one line."""
    argv = sys.argv[1:] if argv is None else argv
    rest = [flag for flag in argv if flag not in ("-h", "--help")]  # the help shows the preset's values
    given = vars(flags(config, prog, description, {}).parse_args(rest))
    below = preset(given | ({"method": method} if method else {}))
    parser = flags(config, prog, description, below)
    if len(rest) < len(argv):
        parser.print_help()
        sys.exit(0)
    saved = _saved(Path(given["out"]), config, parser) if given.get("resume") and given.get("out") else None
    if saved is not None:
        changed = [f"--{name} {value} (was {saved[name]})" for name, value in given.items() if value != saved.get(name, value)]
        if changed:
            parser.error(f"--resume goes on with the run's own settings, and these differ: {', '.join(changed)}")
        below = saved
    cfg = config(**(below | given))
    cfg.given, cfg.preset = set(given), below
    return cfg


def _saved(out: Path, config: type, parser: Parser) -> dict | None:
    """The settings of the run in `out`; None where there is no run yet."""
    path = out / "config.json"
    if not path.exists():
        if (out / "checkpoints").exists():
            parser.error(f"{out} has checkpoints and no config.json: put it back, or give another --out")
        return None
    try:
        kept = json.loads(path.read_text())
        names = {field.name for field in dataclasses.fields(config)} - set(NOT_OF_THE_RUN)
        if missing := sorted(names - kept.keys()):
            parser.error(f"{path} lacks {missing[0]}: it is no run of this version, and cannot be resumed")
    except (ValueError, AttributeError, OSError):
        parser.error(f"{path} does not hold the settings of a run: --overwrite starts it again")
    return {name: kept[name] for name in names}


# ---- What is refused -------------------------------------------------------------------------------------------


def check_fields(cfg) -> None:
    """Raises ValueError with one line for a number out of its range, and for a flag that this run does not read."""
    for field in dataclasses.fields(cfg):
        value, allowed = getattr(cfg, field.name), field.metadata
        if field.type in (int, float):
            inside = allowed["above"] < value < allowed["below"] and allowed["least"] <= value <= allowed["most"]
            if not inside or math.isinf(value):
                words = {"above": "above", "least": "at least", "below": "below", "most": "at most"}
                need = " and ".join(f"{words[key]} {allowed[key]:g}" for key in words if not math.isinf(allowed[key]))
                raise ValueError(f"--{field.name} must be {need or 'a finite number'}, not {value}")
        if field.name in cfg.given and value != "" and not allowed["reads"](cfg):
            raise ValueError(f"--{field.name} is for {allowed['need']}: this run would ignore it, so leave it out")


def differing(cfg) -> dict:
    """The flags with which a run departs from its preset."""
    below = {field.name: cfg.preset.get(field.name, field.default) for field in dataclasses.fields(cfg)}
    names = [name for name in below if name in cfg.given - set(NOT_OF_THE_RUN)]
    return {name: getattr(cfg, name) for name in names if getattr(cfg, name) != below[name]}
