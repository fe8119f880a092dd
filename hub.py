"""Whether a model can be had at all, asked once before the library asks.

A library that finds no hub tries for half a minute and tells of every attempt. Here one request tells whether there is a hub;
what it answers is left to the library, whose time limits and retries for real downloads stay as they are.
"""

import logging
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id

# By name: the hub's client has changed the package that these come from, and some leave them as they are.
NO_HUB = ("ConnectError", "ConnectTimeout", "ProxyError", "OfflineModeIsEnabled")


def look(path: str) -> None:
    """Raises ValueError with a reason for a model that is neither a folder nor in the cache, where the hub cannot be asked
    for it."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt; the outcome is enough
    if not path:
        raise ValueError("the name is empty")
    if Path(path).is_dir():
        return
    if Path(path).exists():
        raise ValueError("it is a file, and a model is a folder or an id on the hub")
    missing = "there is no folder of this name"
    if path.startswith(("/", "./", "../", "~")):
        raise ValueError(missing)
    try:
        validate_repo_id(path)
    except HFValidationError:
        raise ValueError(f"{missing}, and an id on the hub is OWNER/NAME") from None
    if reason := unreachable(path, "config.json"):
        raise ValueError(f"{missing}, and {reason}")


def unreachable(repo: str, file: str, kind: str = "model") -> str:
    """Why this file cannot be had, "" if it is in the cache or the hub answers, whatever it says."""
    if isinstance(try_to_load_from_cache(repo, file, repo_type=kind), str):
        return ""
    try:
        get_hf_file_metadata(hf_hub_url(repo, file, repo_type=kind))
    except Exception as error:  # the client's errors share no base with the library's own
        if type(error).__name__ in NO_HUB:
            why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else " ".join(str(error).split())
            return f"{constants.ENDPOINT} cannot be reached ({why})"
    return ""
