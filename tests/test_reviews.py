"""What models say of rollouts, asked of a server that answers on this machine."""

import time

from reviews import ServedModel

# ---- A served model ----------------------------------------------------------------------------------------


def ask(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def test_a_served_model_answers_in_order_with_the_key_of_the_environment_and_seeds_per_row(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    server.answer = lambda body, _: server.reply_with(body["messages"][-1]["content"].upper())
    served = ServedModel(server.url, "judge", timeout=5)
    texts = [f"text {i}" for i in range(20)]
    assert served.reply(ask(*texts), seed=3, max_tokens=7, temperature=0.5) == [text.upper() for text in texts]
    assert not served.failures
    assert {path for path, _, _ in server.seen} == {"/v1/chat/completions"}
    assert {key for _, key, _ in server.seen} == {"Bearer secret-key"}
    body = server.seen[0][2]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("judge", 7, 0.5)
    seeds = {body["messages"][0]["content"]: body["seed"] for _, _, body in server.seen}
    assert len(set(seeds.values())) == 20
    server.seen.clear()
    served.reply(ask(*texts[:3]), seed=3, max_tokens=7)
    assert all(seeds[body["messages"][0]["content"]] == body["seed"] for _, _, body in server.seen)


def test_two_retries_and_then_an_empty_reply_that_is_counted(server):
    def answer(body, attempt):
        said = body["messages"][-1]["content"]
        broken = {"never": True, "third time": attempt < 3, "no protocol": True}.get(said, False)
        return (
            (200, "[]") if said == "no protocol" else (500, {"error": "busy"}) if broken else server.reply_with("fine")
        )

    server.answer = answer
    served = ServedModel(server.url, "judge", timeout=5)
    replies = served.reply(ask("good", "never", "third time", "no protocol"), seed=0, max_tokens=5)
    assert replies == ["fine", None, "fine", None]
    assert (server.attempts["never"], server.attempts["third time"]) == (3, 3)
    assert sum(served.failures.values()) == 2
    assert served.reply(ask("good"), seed=0, max_tokens=5) == ["fine"] and not served.failures


def test_a_server_that_does_not_answer_in_time_is_left_after_three_attempts(server):
    server.answer = lambda body, _: (time.sleep(1.0), server.reply_with("late"))[1]
    served = ServedModel(server.url, "judge", timeout=0.2)
    assert served.reply(ask("slow"), seed=0, max_tokens=5) == [None]
    assert "imeout" in next(iter(served.failures))
    assert server.attempts["slow"] == 3
