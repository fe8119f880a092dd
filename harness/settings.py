"""From a command line to settings: one flag per field of a Config, presets below the flags, and what is refused.

A Config is a dataclass whose fields are made by `Group`s. A field's line holds its default, its help text, the values allowed
and the runs that read it, so nothing about a setting is defined elsewhere.
"""

import argparse
import dataclasses
import math
import operator
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args, get_origin

import feedback
from harness.command import Parser
from harness.runs import absolute, config_of
from neighbours import served

# These settings belong to a command, not to the run that it starts or resumes.
NOT_OF_THE_RUN = ("out", "resume", "overwrite", "track", "plan", "gpus", "gpu_memory")
LIMITS = {"above": (operator.gt, "above"), "least": (operator.ge, "at least"), "below": (operator.lt, "below"),
          "most": (operator.le, "at most")}  # fmt: skip


class Group:
    """A heading of --help; calling it makes a field. need, reads: which runs read the field, in words and as a function of the
    settings; other runs refuse the flag. limits: of a number, by the names in LIMITS."""

    def __init__(self, title: str, need: str = "", reads: Callable = lambda cfg: True):
        self.title, self.need, self.reads = title, need, reads

    def __call__(self, default, help: str, need: str = "", reads: Callable | None = None, **limits: float):
        told = dict(help=help, group=self.title, limits=limits, need=need or self.need, reads=reads or self.reads)
        return dataclasses.field(default=default, metadata=told)


def read_by(objective: Callable, name: str) -> bool:
    """Whether an objective, or a function that it calls by name, reads an attribute. An object of another kind might."""
    if not isinstance(objective, types.FunctionType):
        return True
    names = objective.__code__.co_names
    called = (objective.__globals__.get(other) for other in names)
    return name in names or any(isinstance(f, types.FunctionType) and read_by(f, name) for f in called)


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError
    return text.lower() in ("true", "1")


def flags(config: type, prog: str, description: str, values: dict) -> Parser:
    """A parser that returns only the flags given. values: what --help shows as a flag's default."""
    formatter = lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120)  # noqa: E731
    parser = Parser(prog, description, argument_default=argparse.SUPPRESS, formatter_class=formatter, usage=f"{prog} [flags]")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(config):
        name, kind, title, help = field.name, field.type, field.metadata["group"], field.metadata["help"]
        group = groups.setdefault(title, parser.add_argument_group(title))
        if kind is bool:
            how = dict(nargs="?", const=True, type=boolean, metavar="BOOL")
        elif get_origin(kind) is Literal:
            choices = [choice for choice in get_args(kind) if choice]
            how = dict(choices=get_args(kind), metavar="|".join(choices))
            if help.startswith("[optional]"):
                how |= dict(nargs="?", const=choices[0])
        else:
            how = dict(type=kind, metavar={int: "N", float: "X", str: "TEXT"}[kind])
        value = values.get(name, field.default)
        shown = "" if value == "" or value is False else f" [{value}]".replace("\n", "\\n")
        help = f"{help.removeprefix('[optional]')}{shown}".replace("%", "%%")
        if kind is bool and field.default:
            help += f"; --no_{name} turns it off"
            group.add_argument(f"--no_{name}", dest=name, action="store_const", const=False, help=argparse.SUPPRESS)
        group.add_argument(f"--{name}", help=help, **how)
    return parser


def parse(
    argv: list[str] | None, config: type, prog: str, description: str, preset: Callable[[dict], dict], method: str = "vpd"
):
    """An instance of `config`: the flags override `preset(flags)`, which overrides the defaults. method: used when no flag names
    one. `given` is set to the names of the flags, `preset` to the values below them: a resumed run's own settings, if there are
    any. Bad flags end the program with one line."""
    argv = sys.argv[1:] if argv is None else argv
    without_help = [word for word in argv if word not in ("-h", "--help")]
    given = vars(flags(config, prog, description, {}).parse_args(without_help))
    below = preset({"method": method} | given)
    parser = flags(config, prog, description, below)
    parser.parse_args(argv)  # --help ends the program here and shows the preset's values
    if given.get("resume") and given.get("out"):
        below = _resumed(Path(given["out"]), config, given, parser) or below
    cfg = config(**(below | given))
    cfg.given, cfg.preset = set(given), below
    return cfg


def _resumed(out: Path, config: type, given: dict, parser: Parser) -> dict | None:
    """The settings of the run in `out`, which no flag may change; None if there is no run yet."""
    if not (out / "config.json").exists() and not (out / "checkpoints").exists():
        return None
    names = [field.name for field in dataclasses.fields(config) if field.name not in NOT_OF_THE_RUN]
    try:
        saved = config_of(out, names)
    except ValueError as error:
        parser.error(f"cannot resume {out}: {error}")
    kept = vars(parser.parse_args([f"--{name}={saved[name]}" for name in names]))  # the file may have been edited
    now = {name: absolute(value) if name in ("model", "data") else value for name, value in given.items() if name in names}
    if changed := [f"--{name} {value} (was {kept[name]})" for name, value in now.items() if value != kept[name]]:
        parser.error(f"--resume keeps the run's own settings, and these differ: {', '.join(changed)}")
    return kept


def check_flags(cfg) -> None:
    """Raises ValueError with one line for a number out of its range, and for a flag that this command would ignore."""
    for field in dataclasses.fields(cfg):
        value, limits = getattr(cfg, field.name), field.metadata["limits"]
        inside = all(LIMITS[name][0](value, limit) for name, limit in limits.items())
        if field.type in (int, float) and not (inside and math.isfinite(value)):
            need = " and ".join(f"{LIMITS[name][1]} {limit:g}" for name, limit in limits.items())
            raise ValueError(f"--{field.name} must be {'a finite number' if inside or not need else need}, not {value}")
        if field.name in cfg.given and value != "" and not field.metadata["reads"](cfg):
            no = "no_" * (value is False and field.default)
            raise ValueError(f"--{no}{field.name} is for {field.metadata['need']}: this run would ignore it")


def check(cfg) -> None:
    """Raises ValueError with one line for what `check_flags` refuses, and for settings that contradict each other."""
    check_flags(cfg)
    method = cfg.row()
    if cfg.steps == 0 and cfg.epochs == 0:
        raise ValueError("--steps and --epochs are both 0: there is nothing to do")
    for name in ("minibatch_prompts", "e_minibatch_prompts") if method.e_step else ("minibatch_prompts",):
        if cfg.prompts_per_batch % getattr(cfg, name):
            raise ValueError(f"--{name} {getattr(cfg, name)} does not divide --prompts_per_batch {cfg.prompts_per_batch}")
    if isinstance(method.objective, types.FunctionType):
        for name, flag in {"D": "distils", "teacher_logp": "scores", "A": "reinforces"}.items():
            if read_by(method.objective, name) and not getattr(method, flag):
                raise ValueError(f"the objective of --method {cfg.method} reads t.{name}: its row of METHODS needs {flag}=True")
    alone = cfg.group_size < 2
    if alone and method.reinforces:
        raise ValueError(f"--method {cfg.method} compares rollouts of one prompt: --group_size 1 gives no advantage")
    if alone and method.teacher and cfg.feedback == "sibling":
        raise ValueError("--feedback sibling needs a second rollout of the prompt: --group_size must be at least 2")
    unlent = not cfg.borrow and not cfg.passed_text and cfg.feedback in feedback.TEXTS
    if method.e_step and cfg.e_groups == "mixed" and (alone or unlent):
        raise ValueError("no success would ever have a context, so the E-step would never run: drop --no_borrow, raise "
                         "--group_size, or use --method sdpo --teacher live for the M-step only")  # fmt: skip
    if method.e_step and cfg.feedback == "both" and not cfg.borrow:
        raise ValueError("--feedback both with --no_borrow shows a text to failures only, which gives the label away")
    if method.teacher and cfg.max_teacher_tokens <= cfg.max_prompt_tokens:
        raise ValueError("--max_teacher_tokens must exceed --max_prompt_tokens: the context needs room")
    number = cfg.mismatch_limit.replace(".", "", 1)
    if cfg.mismatch_limit != "none" and not (number.isdecimal() and float(cfg.mismatch_limit) > 0):
        raise ValueError(f"--mismatch_limit must be a number above 0, or none, not {cfg.mismatch_limit}")
    served.check("critic", cfg.critic_url, cfg.critic_model)
    cfg.templates()  # raises ValueError if a template lacks its placeholder


def differing(cfg) -> dict:
    """The flags that change a value of the preset."""
    below = {field.name: cfg.preset.get(field.name, field.default) for field in dataclasses.fields(cfg)}
    given = {name: getattr(cfg, name) for name in below if name in cfg.given and name not in NOT_OF_THE_RUN}
    return {name: value for name, value in given.items() if value != below[name]}
