"""Checks that a model or data set can be downloaded, before the library tries.

A library that finds no hub retries for half a minute and reports every attempt. Here one request, and a second one a second
later, tells whether the hub can be reached; the download itself is the library's, with its own time limits and retries.
"""

import json
import logging
import time
from pathlib import Path

# By name: the hub's client has changed the package that these come from, and some leave them as they are.
NO_HUB = ("ConnectError", "ConnectTimeout", "ProxyError")


def library():
    """The hub's client, which only a model or data of the hub needs: it takes a third of a second."""
    import huggingface_hub

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt; the outcome is enough
    return huggingface_hub


def look(path: str) -> None:
    """Raises ValueError with a reason for a model that is neither a folder nor in the cache, where the hub cannot be asked
    for it."""
    if path and Path(path).is_dir():
        return
    if path and Path(path).exists():
        raise ValueError("it is a file, and a model is a folder or an id on the hub")
    none = "there is no folder of this name"
    try:
        library().utils.validate_repo_id(path)
    except ValueError:
        raise ValueError(f"{none}, and an id on the hub is OWNER/NAME") from None
    if not cached(path, "config.json") and (reason := unreachable(path, "config.json")):
        raise ValueError(f"{none}, and {reason}")


def cached(model: str, file: str) -> str:
    """Where the file is in the library's cache, which also notes the files that a repository has not; "" where it is not."""
    found = library().try_to_load_from_cache(model, file)
    return found if isinstance(found, str) else ""


def missing(model: str) -> bool:
    """Are weights of this model of the hub still to be downloaded?"""
    index = cached(model, "model.safetensors.index.json")
    files = {*json.loads(Path(index).read_text())["weight_map"].values()} if index else {"model.safetensors"}
    return not all(cached(model, file) for file in files)


def unreachable(repo: str, file: str, kind: str = "model") -> str:
    """Why the hub cannot be asked for this file, "" if it answers, whatever it says. Asks a second time after a second, since
    a name server may stumble when many processes start at once."""
    hf = library()
    why = "HF_HUB_OFFLINE is set" if hf.constants.is_offline_mode() else ""
    for wait in () if why else (1.0, 0.0):
        try:
            hf.get_hf_file_metadata(hf.hf_hub_url(repo, file, repo_type=kind))
            return ""
        except Exception as error:  # the client's errors share no base with the library's own
            if type(error).__name__ not in NO_HUB:
                return ""
            why = " ".join(str(error).split())
        time.sleep(wait)
    return f"{hf.constants.ENDPOINT} cannot be reached ({why})"


def folder(model: str) -> Path:
    """The folder of a model: itself, or where the library keeps what it has downloaded of the hub's."""
    if Path(model).is_dir():
        return Path(model)
    return Path(library().snapshot_download(model, allow_patterns=["*.json", "*.safetensors"]))


def holds_model(folder: Path) -> bool:
    """Whether a folder is a model's and nothing else's, so that another may replace it: a run's has a config.json as well."""
    try:
        named = "model_type" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False
    return named and not any(path.is_dir() for path in folder.iterdir())


def holds_others(folder: Path) -> bool:
    """Whether a folder holds other things than a model, so that none may be saved in its place."""
    return folder.is_dir() and any(folder.iterdir()) and not holds_model(folder)
