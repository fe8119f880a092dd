"""hub.py: one request tells whether there is a hub, and paths are not asked for at all."""

import functools
import logging
import socket
import time

import huggingface_hub
import pytest

from harness import hub
from harness import plan
from model.policy import Policy


waits = []


@pytest.fixture
def hub_at(monkeypatch, tmp_path):
    """hub_at(port): the hub is on this machine, and the cache is empty. Returns the cache."""
    waits.clear()

    def at(port):
        # The name and kind of what is asked for stay in the address.
        url = lambda repo, file, repo_type: f"http://127.0.0.1:{port}/{repo_type}/{repo}/resolve/main/{file}"  # noqa: E731
        monkeypatch.setattr(hub, "hf_hub_url", url)
        monkeypatch.setattr(hub.time, "sleep", waits.append)
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
        assert not hub.cached("owner/name", "config.json", kind)
        folder = cache / f"{kind}s--owner--name"
        for file in ("refs/main", "snapshots/abc/config.json", ".no_exist/abc/tokenizer.json"):
            (folder / file).parent.mkdir(parents=True)
            (folder / file).write_text("abc")
        assert hub.cached("owner/name", "config.json", kind)
        assert not hub.cached("owner/name", "tokenizer.json", kind)  # known not to be there
    hub.look("owner/name")
    assert waits == []


@pytest.mark.parametrize("name", hub.NO_HUB)
def test_every_sign_of_no_hub_is_asked_twice_and_then_said(name, monkeypatch):
    asked, waited = [], []
    monkeypatch.setattr(hub.time, "sleep", waited.append)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)

    def fail(url):
        asked.append(url)
        raise type(name, (Exception,), {})("no\nway")

    monkeypatch.setattr(hub, "get_hf_file_metadata", fail)
    assert hub.unreachable("owner/name", "a.json", "dataset").endswith(" cannot be reached (no way)")
    assert len(asked) == 2 and asked[0].endswith("/datasets/owner/name/resolve/main/a.json") and waited[0] == 1.0


def test_a_hub_that_answers_the_second_time_is_one(monkeypatch):
    answers = iter([type("ConnectError", (Exception,), {})("not yet"), None])

    def ask(_):
        if error := next(answers):
            raise error

    monkeypatch.setattr(hub.time, "sleep", lambda _: None)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_hf_file_metadata", ask)
    assert hub.unreachable("owner/name", "a.json") == ""


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
