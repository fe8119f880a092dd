"""What a run directory tells afterwards: its settings, the weights that it started from, and how far it came."""

import hashlib
import json
from pathlib import Path


def fingerprint(model: str) -> str:
    """Of the weights' files in a folder, by their sizes and beginnings; "" for a hub id."""
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(1 << 20))
    return digest.hexdigest()[:16] if Path(model).is_dir() else ""


def settings_of(run: Path) -> dict:
    """The config.json of a run that came to weights. Raises ValueError with one line for what is none."""
    if not (run / "config.json").is_file() or not (run / "model").is_dir():
        raise ValueError(f"--run {run} is no finished run directory: config.json or model/ is missing")
    path = run / "config.json"
    needed = ("task", "model", "method", "eval_samples", "eval_temperature", "eval_top_p", "max_response_tokens")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if lacks := [name for name in needed if not isinstance(config, dict) or name not in config]:
        raise ValueError(f"{path} is not the configuration of a run: it lacks {lacks[0]}")
    return config


def first_weights(run: Path, config: dict) -> str:
    """The model that a run started from; of a run that was moved with its model, beside it. Raises ValueError for one that
    has been changed since."""
    model = config["model"]
    beside = [Path(model), run / Path(model).name, Path(__file__).parents[1] / "tasks" / "toy_models" / Path(model).name]
    found = next((str(folder) for folder in beside if folder.is_dir()), model)
    if config.get("model_files") and fingerprint(found) != config["model_files"]:
        raise ValueError(f"{found} no longer holds the weights that {run} started from: evaluate {run}/model by --model")
    return found


def stopped(run: Path, config: dict, problems: int) -> list[str]:
    """A line for a run that has not done all of its batches, or whose log does not tell. problems: those of training."""
    log = run / "log.jsonl"
    if not log.is_file():
        return [f"{run} has no log.jsonl: how many batches it was trained for is not known"]
    lines = log.read_text(errors="replace").splitlines()
    done = sum(line.startswith('{"kind": "train"') and line.endswith("}") for line in lines)  # a torn line is no batch
    per_epoch = (problems - config.get("prompts_dropped", 0)) // config.get("prompts_per_batch", 1)
    asked = config.get("steps") or config.get("epochs", 0) * per_epoch
    return [f"{run} was stopped after {done} of {asked} batches"] if done < asked else []
