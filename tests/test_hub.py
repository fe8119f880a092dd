"""hub.py: one request tells whether the hub can be reached, and no request is made for paths."""

import functools
import json
import logging
import socket
import time
from pathlib import Path

import huggingface_hub
import pytest

from harness import hub, plan
from model.policy import Policy

CLOSED = 9  # a port that nobody listens at


@pytest.fixture
def hub_at(monkeypatch, tmp_path):
    """hub_at(port): the hub is on this machine, and the cache is empty. Returns the cache and the waits."""
    waits = []

    def at(port):
        # The name and kind of what is asked for stay in the address.
        url = lambda repo, file, repo_type: f"http://127.0.0.1:{port}/{repo_type}/{repo}/resolve/main/{file}"  # noqa: E731
        monkeypatch.setattr(huggingface_hub, "hf_hub_url", url)
        monkeypatch.setattr(hub.time, "sleep", waits.append)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache", waits

    return at


def test_a_hub_out_of_reach_is_said_at_once_and_without_attempts(hub_at, caplog):
    hub_at(CLOSED)
    start = time.monotonic()
    for read in (plan.read, Policy.load):
        with pytest.raises(ValueError) as error:
            read("owner/model")
        said = str(error.value)
        assert "'owner/model': no such folder, and https://" in said and "cannot be reached (" in said
        assert "\n" not in said
    assert time.monotonic() - start < 10 and not caplog.records  # the library's own attempts take half a minute
    assert logging.getLogger("huggingface_hub").level == logging.ERROR


def test_a_hub_that_answers_anything_or_is_slow_is_left_to_the_library(hub_at, server, monkeypatch):
    hub_at(server.url.split(":")[2].split("/")[0])
    hub.look("owner/model")  # 501: this server knows no HEAD
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and says nothing
        hub_at(silent.getsockname()[1])
        impatient = functools.partial(huggingface_hub.get_hf_file_metadata, timeout=0.2)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", impatient)
        assert hub.unreachable("owner/model", "config.json") == ""


def test_cached_files_need_no_hub_and_weights_are_missing_until_all_are_there(hub_at):
    cache, waits = hub_at(CLOSED)

    def keep(name, **files):
        folder = cache / f"models--owner--{name}"
        for file, text in files.items():
            path = folder / ("refs/main" if file == "refs" else f"snapshots/abc/{file.replace('__', '.')}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    keep("name", refs="abc", config__json="{}")
    hub.look("owner/name")
    assert waits == []
    (cache / "models--owner--old" / ".no_exist" / "abc").mkdir(parents=True)  # the library's note that there is no such file
    (cache / "models--owner--old" / ".no_exist" / "abc" / "model.safetensors.index.json").touch()
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    for name, files, missing in (
        ("single", {}, True), ("single", {"model__safetensors": ""}, False), ("old", {"pytorch_model__bin": ""}, True),
        ("cut", {"model__safetensors__index__json": index}, True), ("cut", {"one__safetensors": ""}, True),
        ("cut", {"two__safetensors": ""}, False),
    ):  # fmt: skip
        keep(name, refs="abc", **files)
        assert hub.missing(f"owner/{name}") == missing, (name, files)


def test_a_hub_is_asked_twice_and_offline_by_request_never(hub_at, monkeypatch):
    (_, waits), asked, errors = hub_at(CLOSED), [], []

    def ask(url):
        asked.append(url)
        if errors and (name := errors.pop(0)):
            raise type(name, (Exception,), {})("no\nway")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    for name in hub.NO_HUB:
        errors[:] = [name, name]
        assert hub.unreachable("owner/name", "a.json", "dataset").endswith(" cannot be reached (no way)")
    assert len(asked) == 2 * len(hub.NO_HUB) and asked[0].endswith("/dataset/owner/name/resolve/main/a.json")
    assert waits[0] == 1.0
    errors[:] = ["ConnectError", ""]
    assert hub.unreachable("owner/name", "a.json") == ""
    asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.unreachable("owner/model", "config.json").endswith(" cannot be reached (HF_HUB_OFFLINE is set)") and asked == []


def test_what_can_be_no_id_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda _: pytest.fail("the hub was asked"))
    hub.look(str(Path(__file__).parent))
    for path in ("", "./no-model", "../no-model", "/no/model", "~/model", "a/b/c"):
        with pytest.raises(ValueError, match="^no such folder, and an id on the hub has the form OWNER/NAME$"):
            hub.look(path)
    with pytest.raises(ValueError, match="^it is a file; a model is a folder or an id on the hub$"):
        hub.look(__file__)


def test_a_folder_that_holds_more_than_a_model_is_not_one_to_replace(tmp_path):
    for name, text, others in (("run", '{"task": "toy"}', True), ("torn", "{", True), ("list", "[]", True),
                               ("notes", None, True), ("model", '{"model_type": "qwen3"}', False)):  # fmt: skip
        (tmp_path / name).mkdir()
        assert not hub.holds_others(tmp_path / name)  # empty
        (tmp_path / name / ("notes" if text is None else "config.json")).write_text(text or "")
        assert hub.holds_others(tmp_path / name) == others, name
    (tmp_path / "model" / "thesis").mkdir()
    assert hub.holds_others(tmp_path / "model") and not hub.holds_others(tmp_path / "none")
