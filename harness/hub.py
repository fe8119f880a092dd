"""Checks with one or two requests that the hub can be reached, before the library starts a download: without a connection the
library retries for half a minute and reports every attempt.
"""

import json
import logging
import time
from pathlib import Path

# By name, since versions of the hub's client raise the errors of different packages.
NO_HUB = ("ConnectError", "ConnectTimeout", "ProxyError")


def library():
    """The hub's client. Importing it takes a third of a second, so only models and data from the hub do."""
    import huggingface_hub

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every attempt
    return huggingface_hub


def look(path: str) -> None:
    """Raises ValueError with a reason if a model is neither a folder nor in the cache, and the hub cannot be reached."""
    if path and Path(path).is_dir():
        return
    if path and Path(path).exists():
        raise ValueError("it is a file; a model is a folder or an id on the hub")
    none = "no such folder"
    try:
        library().utils.validate_repo_id(path)
    except ValueError:
        raise ValueError(f"{none}, and an id on the hub has the form OWNER/NAME") from None
    if not cached(path, "config.json") and (reason := unreachable(path, "config.json")):
        raise ValueError(f"{none}, and {reason}")


def cached(model: str, file: str) -> str:
    """The file's path in the library's cache, "" if it is not there (the library also records files known not to exist)."""
    found = library().try_to_load_from_cache(model, file)
    return found if isinstance(found, str) else ""


def missing(model: str) -> bool:
    """Whether weights of this model still have to be downloaded from the hub."""
    index = cached(model, "model.safetensors.index.json")
    files = {*json.loads(Path(index).read_text())["weight_map"].values()} if index else {"model.safetensors"}
    return not all(cached(model, file) for file in files)


def unreachable(repo: str, file: str, kind: str = "model") -> str:
    """Why the hub cannot be reached; "" if it gives any answer about this file."""
    hf = library()
    why = "HF_HUB_OFFLINE is set" if hf.constants.is_offline_mode() else ""
    for wait in () if why else (1.0, 0.0):
        try:
            hf.get_hf_file_metadata(hf.hf_hub_url(repo, file, repo_type=kind))
            return ""
        except Exception as error:  # the errors have no common base
            if type(error).__name__ not in NO_HUB:
                return ""
            why = " ".join(str(error).split())
        time.sleep(wait)  # a name server may fail when many processes start at once
    return f"{hf.constants.ENDPOINT} cannot be reached ({why})"


def folder(model: str) -> Path:
    """The folder of a model: itself, or the library's download from the hub."""
    if Path(model).is_dir():
        return Path(model)
    return Path(library().snapshot_download(model, allow_patterns=["*.json", "*.safetensors"]))


def holds_others(folder: Path) -> bool:
    """Whether a folder holds anything but a model, so that no model may be saved in its place. A run has a config.json too."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    try:
        is_model = "model_type" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        is_model = False
    return not is_model or any(path.is_dir() for path in folder.iterdir())
