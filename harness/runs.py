"""The run directory: creating and locking it for one run, and reading it afterwards."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from harness import hub
from harness.command import write
from tasks.base import one_line

# The types of the values in config.json that its readers depend on.
KINDS = dict.fromkeys(("task", "subset", "data", "train_tests", "since", "until", "model", "method", "commit"), str)
KINDS |= dict.fromkeys(("eval_samples", "max_response_tokens", "steps", "epochs", "prompts_per_batch", "prompts_dropped"), int)
KINDS |= dict.fromkeys(("eval_temperature", "eval_top_p"), int | float)


def config_of(out: Path, needed: Iterable[str]) -> dict:
    """The contents of a run's config.json. Raises ValueError if it lacks one of `needed` or a value has a wrong type."""
    path = out / "config.json"
    try:
        config = json.loads(path.read_text())
        wrong = [f"it lacks {name}" for name in needed if name not in config]
        kept = [(name, kind, config[name]) for name, kind in KINDS.items() if name in config]
        wrong += [f"its {name} is {value!r}" for name, kind, value in kept if not isinstance(value, kind)]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        wrong = [getattr(error, "strerror", None) or one_line(error)]
    if wrong:
        raise ValueError(f"{path} is not the configuration of a run: {wrong[0]}")
    return config


def absolute(path: str) -> str:
    """The absolute path of what exists in the current folder or in this repository; any other text, such as a hub id, itself."""
    found = [place for place in (Path(path), Path(__file__).parents[1] / path) if path and place.exists()]
    return str(found[0].resolve()) if found else path


def check(cfg) -> None:
    """Raises ValueError with one line if --out cannot be this run's directory."""
    if cfg.resume and not cfg.out:
        raise ValueError("--resume needs --out, the directory of the run to continue")
    if cfg.resume and cfg.overwrite:
        raise ValueError("--resume continues a run and --overwrite deletes it: give only one of them")
    out = Path(cfg.out)
    if not cfg.out or not out.exists():
        return
    if cfg.resume:
        for folder in (out / "model", out / "best"):
            if hub.holds_others(folder):
                raise ValueError(f"{folder} holds more than a model: give another --out")
        return
    if not cfg.overwrite:
        raise ValueError(f"{out} exists: give another --out, --resume to continue it, or --overwrite to delete it")
    try:
        config_of(out, ("task", "method", "seed", "command"))
    except ValueError as error:
        raise ValueError(f"--overwrite only deletes run directories: {error}") from None
    for flag in ("model", "data"):
        path = Path(getattr(cfg, flag) or "/").resolve()
        if path.exists() and path.is_relative_to(out.resolve()):
            raise ValueError(f"--overwrite would delete {path}, this run's own --{flag}")


def make(cfg, out: Path, record: dict):
    """Creates the run directory with its config.json; --overwrite deletes an old one. Returns the file that locks it for this
    run. Raises ValueError if another run holds the lock."""
    if cfg.overwrite and out.exists():
        lock(out).close()
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)  # another run may have created and locked it since `check`
    held = lock(out)
    if not (out / "config.json").exists():
        write(out / "config.json", json.dumps(record, indent=1) + "\n")
    return held


def lock(out: Path):
    file = (out / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is still using {out}") from None
    except OSError:
        pass  # a file system without locks
    return file


def fingerprint(model: str) -> str:
    """A hash of the sizes and first MiB of the weights' files in a folder; "" for a hub id."""
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(1 << 20))
    return digest.hexdigest()[:16] if Path(model).is_dir() else ""


def settings_of(run: Path) -> dict:
    """The config.json of a run that has saved weights. Raises ValueError with one line if there is none."""
    if not (run / "config.json").is_file() or not (run / "model").is_dir():
        raise ValueError(f"--run {run} is not the directory of a finished run: config.json or model/ is missing")
    needed = ("task", "model", "method", "eval_samples", "eval_temperature", "eval_top_p", "max_response_tokens")
    return config_of(run, needed)


def first_weights(run: Path, config: dict) -> str:
    """The model that a run started from, also if both were moved. Raises ValueError if the model has changed since."""
    model = config["model"]
    beside = [Path(model), run / Path(model).name, Path(__file__).parents[1] / "tasks" / "toy_models" / Path(model).name]
    found = next((str(folder) for folder in beside if folder.is_dir()), model)
    if config.get("model_files") and fingerprint(found) != config["model_files"]:
        raise ValueError(f"{found} no longer holds the weights that {run} started from: evaluate {run}/model with --model")
    return found


def stopped(run: Path, config: dict, problems: int) -> list[str]:
    """A line if the run did not do all of its batches, or has no log. problems: the number of training problems."""
    log = run / "log.jsonl"
    if not log.is_file():
        return [f"{run} has no log.jsonl: how many batches it was trained for is not known"]
    lines = log.read_text(errors="replace").splitlines()
    done = sum(line.startswith('{"kind": "train"') and line.endswith("}") for line in lines)  # a torn line does not count
    per_epoch = (problems - config.get("prompts_dropped", 0)) // config.get("prompts_per_batch", 1)
    asked = config.get("steps") or config.get("epochs", 0) * per_epoch
    return [f"{run} was stopped after {done} of {asked} batches"] if done < asked else []
