"""hub.py: one request tells whether there is a hub, and paths are not asked for at all."""

import functools
import logging
import socket
import time

import huggingface_hub
import pytest

import hub
import plan
from policy import Policy


@pytest.fixture
def hub_at(monkeypatch, tmp_path):
    """hub_at(port): the hub is on this machine, and the cache is empty. Returns the cache."""

    def at(port):
        url = f"http://127.0.0.1:{port}/x/resolve/main/config.json"
        monkeypatch.setattr(hub, "hf_hub_url", lambda *_, **__: url)
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    return at


@pytest.fixture
def closed():
    """A port that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_a_hub_out_of_reach_is_said_at_once_and_without_attempts(hub_at, closed, caplog):
    hub_at(closed)
    start = time.monotonic()
    for read in (plan.read, Policy.load):
        with pytest.raises(ValueError) as error:
            read("owner/model")
        said = str(error.value)
        assert "'owner/model': there is no folder of this name, and https://" in said and "cannot be reached (" in said
        assert "\n" not in said
    assert time.monotonic() - start < 10 and not caplog.records  # the library's own attempts take half a minute
    assert logging.getLogger("huggingface_hub").level == logging.ERROR


def test_whatever_a_hub_answers_is_for_the_library_to_say(hub_at, server):
    hub_at(server.url.split(":")[2].split("/")[0])
    assert hub.unreachable("owner/model", "config.json") == ""  # 501: this server knows no HEAD
    hub.look("owner/model")


def test_a_slow_hub_is_left_to_the_librarys_own_patience(hub_at, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and says nothing
        hub_at(silent.getsockname()[1])
        impatient = functools.partial(huggingface_hub.get_hf_file_metadata, timeout=0.2)
        monkeypatch.setattr(hub, "get_hf_file_metadata", impatient)
        assert hub.unreachable("owner/model", "config.json") == ""


def test_what_is_in_the_cache_needs_no_hub(hub_at, closed):
    cache = hub_at(closed)
    for kind in ("model", "dataset"):
        assert "cannot be reached" in hub.unreachable("owner/name", "config.json", kind)
        folder = cache / f"{kind}s--owner--name"
        for file, text in (("refs/main", "abc"), ("snapshots/abc/config.json", "{}")):
            (folder / file).parent.mkdir(parents=True)
            (folder / file).write_text(text)
        assert hub.unreachable("owner/name", "config.json", kind) == ""


def test_offline_by_request_is_named(hub_at, closed, monkeypatch):
    hub_at(closed)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()  # a client knows from its making whether it may ask
    assert hub.unreachable("owner/model", "config.json").endswith("(HF_HUB_OFFLINE is set)")
    huggingface_hub.close_session()


@pytest.mark.parametrize(
    "path, reason",
    [
        ("", "the name is empty"),
        ("./model", "there is no folder of this name"),
        ("../model", "there is no folder of this name"),
        ("/no/model", "there is no folder of this name"),
        ("~/model", "there is no folder of this name"),
        ("a/b/c", "there is no folder of this name, and an id on the hub is OWNER/NAME"),
        (__file__, "it is a file, and a model is a folder or an id on the hub"),
    ],
)
def test_what_can_be_no_id_is_not_asked_for(path, reason, monkeypatch):
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda _: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError) as error:
        hub.look(path)
    assert str(error.value) == reason


def test_a_folder_is_not_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda _: pytest.fail("the hub was asked"))
    hub.look(str(tmp_path))
