"""What models say of rollouts, asked of a server that answers on this machine."""

import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import feedback
from harness.settings import Config
from model.parallel import World
from neighbours.reviews import FIRST, Reviews, ServedModel, ServerSilent, reach, read_score
from tasks import Outcome, Problem

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


# ---- A served judge's score --------------------------------------------------------------------------------

# Probabilities at the tokens of a reply, and the expected digit by hand. The likely tokens that are no digits do not count.
TOLD = {
    "one token": ("7", [("7", 0.5, {"7": 0.5, "2": 0.25, "no": 0.25})], (0.5 * 7 + 0.25 * 2) / 0.75),
    "not the first": (
        "Score: 8.",
        [("Score", 0.9, {"1": 0.1}), (":", 1.0, {"2": 0.1}), (" ", 1.0, {}), ("8", 0.6, {"8": 0.6, "9": 0.4}), (".", 1.0, {})],
        0.6 * 8 + 0.4 * 9,
    ),
    "with and without a space": ("3", [("3", 0.25, {" 3": 0.25, "3": 0.25, "5": 0.25})], (0.5 * 3 + 0.25 * 5) / 0.75),
    "a space in the token": ("S 6", [("S", 1.0, {}), (" 6", 0.5, {" 6": 0.5, "4": 0.5})], 0.5 * 6 + 0.5 * 4),
    "sampled but not likely": ("1", [("1", 0.2, {"9": 0.6})], (0.2 * 1 + 0.6 * 9) / 0.8),
    "after a thought": (
        "<think>4</think>2",
        [("<think>", 1.0, {}), ("4", 1.0, {"4": 1.0}), ("</think>", 1.0, {}), ("2", 0.5, {"2": 0.5, "3": 0.5})],
        2.5,
    ),
    "zero": ("0", [("0", 1.0, {"0": 1.0})], 0.0),
    "several characters in a token": ("8/9", [("8/9", 0.5, {"8/9": 0.5, "3": 0.5})], 8.0),
    "the tokens of another text": ("8", [("No", 0.5, {"3": 0.5})], 8.0),  # a thought that the server took out
    "the tokens of a thought": ("9", [("1", 0.5, {"1": 0.5, "9": 0.1}), (". so", 1.0, {}), ("9", 1.0, {"9": 1.0})], 9.0),
    "fewer tokens than the reply": ("is 8", [("is", 0.5, {"3": 0.5})], 8.0),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_a_score_is_the_expected_digit_at_the_replys_digit_or_that_digit(server, case):
    text, told, score = TOLD[case]
    server.answer = lambda body, _: server.reply_with(text, told)
    served = ServedModel(server.url, "judge", timeout=5)
    ((found,),) = served.score(ask("a"), seed=3, max_tokens=7)
    assert found == pytest.approx(score) and not served.failures
    ((path, _, body),) = server.seen
    assert path == "/v1/chat/completions" and (body["max_tokens"], body["temperature"]) == (7, 0)
    assert body["logprobs"] is True and body["top_logprobs"] == 20


def test_scores_are_in_order_and_a_reply_without_a_digit_is_no_failure(server):
    server.answer = lambda body, _: (
        (500, "busy") if body["messages"][0]["content"] == "down" else server.reply_with(body["messages"][0]["content"])
    )
    served = ServedModel(server.url, "judge", timeout=5)
    replies = served.score(ask("It is a 4.", "nine", "down", "7.5", "0"), seed=3, max_tokens=7)
    assert replies == [(4.0,), (None,), None, (None,), (0.0,)]
    assert list(served.failures.values()) == [1] and "InternalServerError" in next(iter(served.failures))
    assert not served.without and server.attempts["down"] == 3
    assert len({body["seed"] for _, _, body in server.seen}) == 5


@pytest.mark.parametrize("status", [400, 403, 422])
@pytest.mark.parametrize("refused", [["logprobs"], ["chat_template_kwargs"], ["logprobs", "chat_template_kwargs"]])
def test_what_a_server_refuses_is_left_out_and_never_asked_for_again(server, capsys, status, refused):
    server.answer = lambda body, _: (status, "no") if set(refused) & set(body) else server.reply_with("6")
    served = ServedModel(server.url, "judge", timeout=5, at_once=1)
    assert served.score(ask("a", "b", "c"), seed=3, max_tokens=7) == [(6.0,)] * 3 and not served.failures
    asked = [[name for name in ("logprobs", "chat_template_kwargs") if name in body] for _, _, body in server.seen]
    kept = [name for name in ("logprobs", "chat_template_kwargs") if name not in refused]
    assert asked[0] == ["logprobs", "chat_template_kwargs"] and asked[-3:] == [kept] * 3 and len(asked) <= 6
    assert server.seen[0][2]["chat_template_kwargs"] == {"enable_thinking": False}
    assert all(body["seed"] == server.seen[0][2]["seed"] for _, _, body in server.seen[:-2])
    assert served.score(ask("d"), seed=4, max_tokens=7) == [(6.0,)] and not set(refused) & set(server.seen[-1][2])
    (line,) = capsys.readouterr().err.splitlines()  # said once
    assert server.url in line and str(status) in line


def test_a_cut_reply_has_no_score_unless_it_is_a_digit_alone():
    def choice(text, finish):
        return SimpleNamespace(message=SimpleNamespace(content=text), finish_reason=finish, logprobs=None)

    assert read_score(choice("Okay, there are 2 parts", "length")) is None  # a thought that the prompt has opened
    assert read_score(choice("Okay, there are 2 parts", "stop")) == 2
    assert read_score(choice(" 7", "length")) == 7


def test_what_is_refused_for_another_reason_is_a_failure_and_log_probabilities_stay(server):
    told = [("6", 0.5, {"6": 0.5, "4": 0.5})]
    server.answer = lambda body, _: (
        (400, "too long") if body["messages"][0]["content"] == "long" else server.reply_with("6", told)
    )
    served = ServedModel(server.url, "judge", timeout=5, at_once=1)
    assert served.score(ask("long", "a"), seed=3, max_tokens=7) == [None, (pytest.approx(5.0),)]
    assert sum(served.failures.values()) == 1 and not served.without
    assert served.score(ask("b"), seed=3, max_tokens=7) == [(pytest.approx(5.0),)] and not served.failures


# ---- A served expert's next token --------------------------------------------------------------------------


def test_the_next_piece_of_each_text_is_drawn_at_temperature_1_and_empty_where_the_model_ends(server):
    said = {"ends": ("", "stop"), "nothing": ("", "length"), "goes on": (" then", "length"), "done": (".", "stop")}
    server.answer = lambda body, _: server.complete_with(*said[body["prompt"]])
    served = ServedModel(server.url, "expert", timeout=5)
    assert served.next_piece(list(said), seed=3) == ["", None, " then", "."]
    assert list(served.failures.items()) == [("ValueError: a token without a text", 1)]
    assert {path for path, _, _ in server.seen} == {"/v1/completions"}
    asked = dict(model="expert", max_tokens=1, temperature=1.0, top_p=1.0)
    assert all({name: body[name] for name in asked} == asked for _, _, body in server.seen)
    assert len({body["seed"] for _, _, body in server.seen}) == 4
    assert max(body["seed"] for _, _, body in server.seen) < 2**31  # what servers take
    seeds = {body["prompt"]: body["seed"] for _, _, body in server.seen}
    served.next_piece(list(said), seed=3)
    assert all(seeds[body["prompt"]] == body["seed"] for _, _, body in server.seen)


def test_the_expert_is_asked_for_its_plain_distribution_or_as_the_server_will_have_it(server):
    server.answer = lambda body, _: server.complete_with("a", "length")
    served = ServedModel(server.url, "expert", timeout=5, at_once=1)
    served.next_piece(["x"], seed=3)
    plain = {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "add_special_tokens": False}
    assert plain.items() <= server.seen[0][2].items()
    server.answer = lambda body, _: (400, "top_k?") if "top_k" in body else server.complete_with("a", "length")
    assert served.next_piece(["x", "y"], seed=3) == ["a", "a"] and served.without == {"plain"}
    assert [bool(plain.keys() & body.keys()) for _, _, body in server.seen[1:]] == [True, False, False]


# ---- The reviews of a run ----------------------------------------------------------------------------------


@pytest.fixture
def make_reviews(byte_tokenizer):
    """make_reviews(sampler, settings): of a policy of bytes, that never computes."""
    policy = SimpleNamespace(tokenizer=byte_tokenizer, world=World(), device=torch.device("cpu"), eos_ids=[3, 9])
    return lambda sampler=None, **settings: Reviews(Config(**settings), policy, sampler)


PROBLEMS = [Problem(str(i), [{"role": "user", "content": f"question {i}"}], reference="secret") for i in range(5)]
ATTEMPTS = ["one", "<think>hm</think>two", "three", "four", "five"]


def test_a_row_that_the_grader_failed_on_has_no_context_and_lends_no_text(make_reviews):
    reviews = make_reviews(feedback="environment", group_size=2)
    passed, failed = Outcome(1, "passed"), Outcome(0, "wrong", "off by one")
    broken = Outcome(0, "internal", "the grader broke")
    for other, seen in ((failed, ["off by one"] * 2), (broken, [None, None])):
        found = reviews.contexts(PROBLEMS[:2], ATTEMPTS[:2], [passed, other], step=0)
        assert [context and context.feedback for context in found] == seen


def test_the_students_own_score_comes_from_its_digits_where_it_would_rather_say_one(make_reviews):
    p = torch.zeros(5, 10, dtype=torch.float64)
    p[0, 7], p[0, 2] = 0.5, 0.25  # 2/3 and 1/3
    p[1, 9] = 0.4
    p[2, 0] = 0.9
    p[3] = 0.051  # 0.51 together
    p[4, 8] = 0.5 - 1e-9
    asked = []
    sampler = SimpleNamespace(choose=lambda prompts, ids: asked.extend([prompts, ids]) or p.log())
    reviews = make_reviews(sampler, method="ovd", max_teacher_tokens=330)
    scores = reviews.scores(PROBLEMS, ATTEMPTS, step=5)
    assert scores == [pytest.approx(2 / 3 * 7 + 1 / 3 * 2), None, 0.0, pytest.approx(4.5), None]
    assert reviews.not_had() == {"judge: no digit, kept": 2}
    tokenizer = reviews.policy.tokenizer
    assert [tokenizer.decode(token) for token in asked[1]] == list("0123456789")
    assert asked[0] == [
        feedback.judge_prompt(tokenizer, problem.messages, attempt, feedback.Templates(), 330)[0]
        for problem, attempt in zip(PROBLEMS, ATTEMPTS)
    ]
    assert not any("secret" in tokenizer.decode(prompt) for prompt in asked[0])


def test_a_served_judges_score_is_none_where_it_failed_or_named_no_digit_and_both_are_counted(
    make_reviews, server, capsys
):
    replies = {"one": (200, "8"), "two": (400, "no"), "three": (200, "good"), "four": (200, "0"), "five": (200, "7.5")}

    def answer(body, _):
        status, text = next(v for k, v in replies.items() if f"\n{k}\n" in body["messages"][0]["content"])
        return server.reply_with(text) if status == 200 else (status, {"error": {"message": text}})

    server.answer = answer
    reviews = make_reviews(method="ovd", judge_url=server.url, judge_model="m", max_judge_tokens=5)
    assert reviews.scores(PROBLEMS, ATTEMPTS, step=5) == [8.0, None, None, 0.0, None]
    bodies = {body["messages"][0]["content"]: body for _, _, body in server.seen}
    assert set(bodies) == {
        feedback.JUDGE_REQUEST.replace("{question}", f"question {i}").replace("{attempt}", text)
        for i, text in enumerate(("one", "two", "three", "four", "five"))
    }
    assert {(body["model"], body["max_tokens"]) for body in bodies.values()} == {("m", 5)}
    assert reviews.not_had() == {"judge: no digit, kept": 2, "judge: the server failed": 1}
    assert capsys.readouterr().err.startswith("judge: BadRequestError: ")
    seeds = {text: body["seed"] for text, body in bodies.items()}
    server.seen.clear()
    reviews.scores(PROBLEMS, ATTEMPTS, step=6)  # another step, other draws
    assert not set(seeds.values()) & {body["seed"] for _, _, body in server.seen}


def test_what_could_not_be_had_is_counted_until_it_is_asked_for_and_the_reasons_are_told_at_once(make_reviews, capsys):
    reviews = make_reviews()
    failed = SimpleNamespace(failures=Counter({"Timeout: slow": 2, "ValueError: an empty reply": 1}))
    for _ in range(2):
        assert reviews._ask(failed, "critic", lambda: ["answer"]) == ["answer"]
        said = capsys.readouterr().err.splitlines()
        assert said == ["critic: Timeout: slow (2 times)", "critic: ValueError: an empty reply (1 times)"]
    reviews.missing["expert: no token"] += 1
    assert reviews.not_had() == {"critic: the server failed": 2 * (2 + 1), "expert: no token": 1}
    assert reviews.not_had() == {} and not capsys.readouterr().err


def test_a_server_without_an_answer_for_three_batches_in_a_row_ends_the_run(make_reviews):
    reviews = make_reviews()
    down = SimpleNamespace(url="http://here", failures=Counter({"Timeout: slow": 2}))
    silent = lambda who="critic": reviews._ask(down, who, lambda: [None, None])  # noqa: E731
    silent(), silent()
    reviews._ask(down, "critic", lambda: [None, "answer"])  # one answer is enough
    silent(), silent("judge"), silent()
    with pytest.raises(ServerSilent, match="the critic at http://here has not answered for 3 batches: Timeout: slow"):
        silent()
    silent("judge")
    for _ in range(3):  # nobody asked
        reviews._ask(SimpleNamespace(url="", failures=Counter()), "expert", list)


def test_where_the_first_questions_have_no_answer_the_others_are_not_asked(server):
    server.answer = lambda body, _: (404, "no such model")
    served = ServedModel(server.url, "critic", timeout=5, at_once=4)
    assert served.reply(ask(*map(str, range(100))), seed=0, max_tokens=5) == [None] * 100
    assert FIRST <= len(server.seen) < FIRST + 4 and served.failures.total() == 100
    server.answer = lambda body, _: (404, "no") if body["messages"][0]["content"] != "0" else server.reply_with("yes")
    assert served.reply(ask(*map(str, range(50))), seed=0, max_tokens=5) == ["yes"] + [None] * 49
    assert served.failures.total() == 49 and not any("not asked" in why for why in served.failures)


@pytest.mark.parametrize(
    "who, path", [("critic", "chat/completions"), ("judge", "chat/completions"), ("expert", "completions")]
)
def test_a_server_is_reached_before_the_run_begins_and_one_that_is_not_there_is_named(server, who, path):
    server.answer = lambda body, _: server.complete_with(" 1", "length") if "prompt" in body else server.reply_with("")
    cfg = Config(**{f"{who}_url": server.url, f"{who}_model": "m"})
    assert reach(cfg) == "" and [seen for seen, _, _ in server.seen] == [f"/v1/{path}"]  # an empty reply is an answer
    server.answer = lambda body, _: (404, "no such model")
    why = reach(cfg)
    assert f"--{who}_url {server.url} with --{who}_model m does not answer" in why and "404" in why
    assert reach(Config()) == ""


def test_every_process_counts_what_the_one_that_asked_was_told_and_the_first_says_it(make_reviews, capsys):
    reviews = make_reviews()
    told = ["answer", None], {"Timeout: slow": 1}
    reviews.policy = SimpleNamespace(world=SimpleNamespace(rank=1, first=lambda _: told))  # the second of two
    assert reviews._ask(SimpleNamespace(failures={}), "judge", lambda: 1 / 0) == ["answer", None]
    assert reviews.not_had() == {"judge: the server failed": 1} and not capsys.readouterr().err


# ---- The served expert -------------------------------------------------------------------------------------


@pytest.fixture
def expert(make_reviews, server):
    """expert(prompts, responses, rows, step, places, seed): reviews, and ids and weights of texts, by server.answer."""

    def take(prompts, responses, rows, step=0, places=100, seed=0):
        reviews = make_reviews(expert_url=server.url, expert_model="m", expert_places=places, seed=seed)
        x, y = ([reviews.policy.tokenizer(text).input_ids for text in texts] for texts in (prompts, responses))
        taken, weight = reviews.expert_tokens(x, y, rows, step)
        assert taken.shape == weight.shape == (len(y), max(map(len, y))) and taken.dtype == torch.long
        return reviews, taken, weight

    return take


X = ["<|im_start|>user\nadd 1<|im_end|>\n", "two: ", "é three: "]
Y = ["abcdefgh", "never asked", "xyz<|im_end|>"]


def test_the_expert_reads_prompt_and_response_up_to_a_place_and_ours_is_its_answers_first_token(expert, server):
    server.answer = lambda body, _: server.complete_with(body["prompt"][-1].upper() + "zz")
    reviews, taken, weight = expert(X, Y, rows=[2, 0], places=3)
    decode = reviews.policy.tokenizer.decode
    lengths, asked = {0: 8, 2: 4}, []
    for i, n in lengths.items():
        places = weight[i].nonzero().flatten().tolist()
        assert len(places) == 3 and max(places) < n
        assert weight[i, places].tolist() == [pytest.approx(n / 3)] * 3  # the sum is that over all places, expected
        for t in places:
            asked.append(X[i] + Y[i][:t])
            assert decode(taken[i, t]) == asked[-1][-1].upper()
    assert sorted(body["prompt"] for _, _, body in server.seen) == sorted(asked)
    assert len({body["seed"] for _, _, body in server.seen}) == 6
    assert (weight[1] == 0).all() and (taken[weight == 0] == 0).all()
    assert reviews.not_had() == {}


def test_all_places_of_a_response_shorter_than_asked_for_weigh_1(expert, server):
    server.answer = lambda body, _: server.complete_with("q")
    _, _, weight = expert(X, Y, rows=[0, 2], places=8)
    assert weight[:, :8].tolist() == [[1.0] * 8, [0.0] * 8, [1.0] * 4 + [0.0] * 4] and len(server.seen) == 8 + 4


def test_places_are_random_and_a_function_of_seed_step_and_row(expert, server):
    server.answer = lambda body, _: server.complete_with(chr(97 + body["seed"] % 26))
    take = lambda **settings: expert(["p"] * 2, ["abcdefgh"] * 2, places=2, **settings)[1:]  # noqa: E731
    both = take(rows=[0, 1])
    assert all(map(torch.equal, take(rows=[0, 1]), both))
    assert torch.equal(take(rows=[1])[1][1], both[1][1])  # the other rows have no say in a row's places
    others = [take(rows=[0, 1], step=step)[1] for step in range(1, 20)]
    assert len({tuple(weight[0].tolist()) for weight in others}) > 5
    assert sum(not torch.equal(weight[0], weight[1]) for weight in others) > 10
    assert (sum(others).sum(0) > 0).all() and not torch.equal(take(rows=[0, 1], seed=1)[1], both[1])
    server.seen.clear()
    take(rows=[0, 1], step=0), take(rows=[0, 1], step=1)
    assert len({body["seed"] for _, _, body in server.seen}) == 2 * 2 * 2  # draws of their own at another step


def test_a_place_without_an_experts_token_has_no_loss_and_the_others_stand_for_it(expert, server, capsys):
    said = {
        ">": server.complete_with("", "stop"),  # it ends there
        ">a": (400, {"error": {"message": "no"}}),
        ">aé": server.complete_with("<|im_end|>"),  # text that spells a special token
        ">aéb": server.complete_with("\ufffd"),  # a part of a character
        ">aébc": server.complete_with("", "length"),  # a token that is no text
    }
    server.answer = lambda body, _: said[body["prompt"]]
    reviews, taken, weight = expert([">"], ["aébcd"], rows=[0])  # six tokens: é is two, and no text ends inside
    eos, less = reviews.policy.tokenizer.eos_token_id, reviews.policy.tokenizer("<").input_ids[0]
    assert taken.tolist() == [[eos, 0, 0, less, 0, 0]]
    assert weight.tolist() == [[6 / 2, 0, 0, 6 / 2, 0, 0]]
    assert reviews.not_had() == {"expert: no token": 2, "expert: the server failed": 2}
    assert len(capsys.readouterr().err.splitlines()) == 2
    said = dict.fromkeys(said, (400, "no"))
    assert not expert([">"], ["aébcd"], rows=[0])[2].any()


def test_a_tokenizer_without_an_end_of_text_ends_with_an_eos_of_the_policy(make_reviews, server):
    server.answer = lambda body, _: server.complete_with("", "stop")
    reviews = make_reviews(expert_url=server.url, expert_model="m")
    reviews.policy.tokenizer = SimpleNamespace(eos_token_id=None, decode=lambda ids: "p")
    assert reviews.expert_tokens([[1]], [[5, 6]], [0], 0)[0].tolist() == [[3, 3]]
