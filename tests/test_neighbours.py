"""OVD, against the reference of test_algorithm.py (which tests DistIL too), and served models, with a server on this machine."""

import json
import time
from collections import Counter
from types import SimpleNamespace

import algorithm
import pytest
import torch
from test_algorithm import SCRIPT, Sampler, config, reference, rows_of, trained, weights
from test_algorithm import text as words_of
from test_session import run

from harness.command import Stopped
from model.parallel import World
from neighbours import ovd
from neighbours import served as served_models
from neighbours.served import Served, find_digit
from tasks import Outcome, Problem

# ---- A served model -----------------------------------------------------------------------------------------


@pytest.fixture
def served(server):
    """served(who): a `Served` whose server has answered the first question."""

    def opened(who="judge", world=World()):
        answer = getattr(server, "answer", None)
        server.answer = lambda body, _: server.reply_with("a")
        one = Served(who, server.url, "m", 5, world, Counter())
        server.answer = answer
        server.seen.clear()
        return one

    return opened


def bodies(server):
    """The requests so far, by their questions."""
    return {body["messages"][-1]["content"]: body for _, _, body in server.seen}


def test_replies_come_in_order_each_with_its_own_seed_and_the_environments_key(served, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    server.answer = lambda body, _: server.reply_with(body["messages"][-1]["content"].upper())
    critic, texts = served("critic"), [f"text {i}" for i in range(20)]
    assert critic.reply(texts, 3, 7, 0.5, 0.9) == [text.upper() for text in texts] and not critic.missing
    assert {(path, key) for path, key, _ in server.seen} == {("/v1/chat/completions", "Bearer secret-key")}
    first = bodies(server)
    assert {(b["model"], b["max_tokens"], b["temperature"], b["top_p"]) for b in first.values()} == {("m", 7, 0.5, 0.9)}
    critic.reply(texts[::-1], 3, 7, 0.5, 0.9)
    seeds, again = ([b["seed"] for b in found.values()] for found in (first, bodies(server)))
    assert len(set(seeds)) == 20 and set(seeds) == set(again)
    assert bodies(server)["text 3"]["seed"] == first["text 16"]["seed"]
    assert 2**30 < max(seeds) < 2**31  # what servers take


@pytest.mark.parametrize("rank", [0, 1])
def test_no_answer_after_three_attempts_is_counted_and_reported_by_the_first_process(served, server, capsys, rank):
    def answer(body, attempt):
        said = body["messages"][-1]["content"]
        if said == "slow":
            time.sleep(1.0)
        fails = said == "never" or said == "third time" and attempt < 3
        fine = server.reply_with("" if said == "empty" else "fine")
        return (200, "[]") if said == "no protocol" else (500, "busy") if fails else fine

    server.answer = answer
    critic = served("critic", world=SimpleNamespace(rank=rank, first=lambda ask: ask()))
    replies = critic.reply(["good", "never", "third time", "no protocol", "empty"], 0, 5, 1.0, 1.0)
    assert replies == ["fine", None, "fine", None, None] and (server.attempts["never"], server.attempts["third time"]) == (3, 3)
    critic.client = critic.client.with_options(timeout=0.2)
    assert critic.reply(["slow"], 0, 5, 1.0, 1.0) == [None] and server.attempts["slow"] == 3
    assert critic.missing == {"critic: the server failed": 4}
    told = capsys.readouterr().err.splitlines()
    assert len(told) == (0 if rank else 4) and all(line.startswith("critic: ") and line.endswith(" (1 times)") for line in told)


def test_a_server_without_an_answer_for_three_batches_in_a_row_ends_the_run(served, server, monkeypatch):
    monkeypatch.setattr(served_models, "AT_ONCE", 1)
    server.answer = lambda body, _: server.reply_with("yes") if body["messages"][-1]["content"] == "9" else (400, "no")
    critic = served("critic")
    asks = lambda *texts: critic.reply(texts, 0, 5, 1.0, 1.0)  # noqa: E731
    for _ in range(2):
        assert asks(*"0123") == [None] * 4 and list(bodies(server)) == ["0"]  # the others were not asked
    assert asks(*"9012") == ["yes", None, None, None] and len(bodies(server)) == 4  # one answer is enough
    asks("0"), asks("0")
    assert [asks() for _ in range(4)] == [[]] * 4  # nobody asked
    asks("0"), asks("0")
    with pytest.raises(Stopped, match=f"the critic at {server.url} has not answered for 3 batches: BadRequestError"):
        asks("0")


def test_a_server_is_asked_before_the_run_and_named_if_it_does_not_answer(server, capsys):
    server.answer = lambda body, _: server.reply_with("")
    Served("judge", server.url, "m", 5, World(), Counter())  # an empty reply is an answer
    assert len(server.seen) == 1
    server.answer = lambda body, _: (404, "no such model")
    with pytest.raises(ValueError, match=f"--judge_url {server.url} with --judge_model m does not answer: .*404"):
        Served("judge", server.url, "m", 5, World(), Counter())
    assert not capsys.readouterr().err


@pytest.mark.parametrize("status, refused, told", [
    (400, ["logprobs"], "logprobs"), (403, ["chat_template_kwargs"], "thinking_off"),
    (422, ["logprobs", "chat_template_kwargs"], "logprobs, thinking_off"),
])  # fmt: skip
def test_options_that_a_server_refuses_in_the_first_question_are_left_out(server, capsys, status, refused, told):
    server.answer = lambda body, _: (status, "no") if set(refused) & set(body) else server.reply_with("6")
    judge = Served("judge", server.url, "m", 5, World(), Counter())
    assert judge.score(["a", "b", "c"], 3, 7) == [6.0] * 3 and not +judge.missing
    asked = [[name for name in ("logprobs", "chat_template_kwargs") if name in body] for _, _, body in server.seen]
    kept = [name for name in ("logprobs", "chat_template_kwargs") if name not in refused]
    assert asked[0] == ["logprobs", "chat_template_kwargs"] and asked[-4:] == [kept] * 4 and len(asked) <= 7
    assert server.seen[0][2]["chat_template_kwargs"] == {"enable_thinking": False}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{server.url} refuses {told}, which is left out: ") and str(status) in line


# ---- A served judge's score --------------------------------------------------------------------------------

# Probabilities at the tokens of a reply, and the expected digit by hand. Tokens that are not digits do not count.
TOLD = {
    "one token": ("7", [("7", 0.5, {"7": 0.5, "2": 0.25, "no": 0.25})], (0.5 * 7 + 0.25 * 2) / 0.75),
    "not the first": (
        "Score: 8.",
        [("Score", 0.9, {"1": 0.1}), (":", 1.0, {"2": 0.1}), (" ", 1.0, {}), ("8", 0.6, {"8": 0.6, "9": 0.4})],
        0.6 * 8 + 0.4 * 9,
    ),
    "with and without a space": ("3", [("3", 0.25, {" 3": 0.25, "3": 0.25, "5": 0.25})], (0.5 * 3 + 0.25 * 5) / 0.75),
    "a space in the token": ("S 6", [("S", 1.0, {}), (" 6", 0.5, {" 6": 0.5, "4": 0.5})], 0.5 * 6 + 0.5 * 4),
    "sampled but not likely": ("1", [("1", 0.2, {"9": 0.6})], (0.2 * 1 + 0.6 * 9) / 0.8),
    "several characters in a token": ("8/9", [("8/9", 0.5, {"8/9": 0.5, "3": 0.5})], 8.0),
    "the tokens of another text": ("8", [("No", 0.5, {"3": 0.5})], 8.0),  # the server removed a thought
    "the tokens of a thought": ("9", [("1", 0.5, {"1": 0.5, "9": 0.1}), (". so", 1.0, {}), ("9", 1.0, {"9": 1.0})], 9.0),
    "fewer tokens than the reply": ("is 8", [("is", 0.5, {"3": 0.5})], 8.0),
    "untold": ("There are 4 parts", (), 4.0), "nought": ("0", (), 0.0), "no digit": ("7.5", (), None), "none": ("nine", (), None),
}  # fmt: skip
CUT = {"Okay, there are 2 parts": None, " 7": 7.0}  # replies cut by the token limit: the first may be a thought


def test_a_served_score_is_the_expected_digit_or_the_digit_of_the_reply(served, server):
    said = {case: server.reply_with(text, told) for case, (text, told, _) in TOLD.items()}
    for text in CUT:
        said[text] = server.reply_with(text)
        said[text][1]["choices"][0]["finish_reason"] = "length"
    said |= {"down": (500, "busy"), "too long": (400, "no")}
    server.answer = lambda body, _: said[body["messages"][0]["content"]]
    judge, expected = served(), [score for *_, score in TOLD.values()]
    found = judge.score([*said], seed=3, max_tokens=7)
    for case, score, right in zip(said, found, [*expected, *CUT.values(), None, None], strict=True):
        assert score == (right if right is None else pytest.approx(right)), case
    assert judge.missing == {"judge: no digit, kept": 3, "judge: the server failed": 2}
    assert server.attempts["down"] == 3
    assert len({body["seed"] for body in bodies(server).values()}) == len(said)
    settings = dict(max_tokens=7, temperature=0, logprobs=True, top_logprobs=20)
    assert settings.items() <= bodies(server)["one token"].items()


REPLIES = {  # reply: its digit and what follows it
    "From 0 (certainly wrong) to 9 (certainly right): 6": "6",  # the request's own words
    "on a scale of 0-9: 6": "6", "0 – 9: 4": "4", "from 0 to 9, 0": "0", "0 to 90": "0 to 90",
    "9.0": "9.0", "9.05": None, "**6**": "6**", "10 then 3": "3", "42, 007, 5": "5", "0.5 or 7": "7",
    "<think>4\nor 5</think>\n2": "2", "opened by the prompt: 4</think> 2": "2", "1 <think>4": "1 <think>4", "": None,
    "٣ ９ ²": None,  # Unicode digits, some of which int() takes
}  # fmt: skip


def test_a_replys_digit_is_the_first_that_stands_alone_outside_of_thoughts():
    for reply, digit in REPLIES.items():
        place = find_digit(reply)
        assert (None if place is None else reply[place:]) == digit, reply


# ---- OVD's judge ---------------------------------------------------------------------------------------------

PROBLEMS = [Problem(str(i), [{"role": "user", "content": f"question {i}"}], reference="secret") for i in range(5)]
ATTEMPTS = ["one", "<think>hm</think>two", "three", "four", "five"]
REQUEST = "{question}|{attempt}|0 TO 9"


@pytest.fixture
def judge(byte_tokenizer):
    policy = SimpleNamespace(tokenizer=byte_tokenizer, world=World())
    return ovd.Judge(config("ovd", ovd, judge_request=REQUEST), policy, SimpleNamespace(name="t", notes=[]))


def test_the_students_score_comes_from_its_digits_if_they_are_likely_enough(judge):
    p = torch.zeros(5, 10, dtype=torch.float64)
    p[0, 7], p[0, 2] = 0.5, 0.25  # 2/3 and 1/3
    p[1, 9] = 0.4
    p[2, 0] = 0.9
    p[3] = 0.051  # 0.51 together
    p[4, 8] = 0.5
    asked, decode = [], judge.policy.tokenizer.decode
    judge.policy.choose = lambda prompts, ids: asked.extend([prompts, ids]) or p.log()
    expected = [pytest.approx(2 / 3 * 7 + 1 / 3 * 2), None, 0.0, pytest.approx(4.5), None]
    assert judge.scores(PROBLEMS, ATTEMPTS, 5) == expected
    assert judge.missing == {"judge: no digit, kept": 2}
    assert [decode(token) for token in asked[1]] == list("0123456789")
    assert all("secret" not in decode(prompt) for prompt in asked[0])
    assert "question 1|two|0 TO 9<" in decode(asked[0][1])  # without its thought


def test_a_served_judge_gets_the_same_request_and_another_seed_at_each_step(judge):
    calls = []
    judge.server = SimpleNamespace(score=lambda *how: calls.append(how) or [8.0, None, None, 0.0, 7.5])
    assert [judge.scores(PROBLEMS, ATTEMPTS, step) for step in (5, 6)] == [[8.0, None, None, 0.0, 7.5]] * 2
    (questions, seed, most), (_, other, _) = calls
    assert questions[:2] == ["question 0|one|0 TO 9", "question 1|two|0 TO 9"]
    assert most == judge.cfg.max_judge_tokens and seed != other


def test_the_network_cannot_judge_without_a_token_for_each_digit_or_room(byte_tokenizer):
    two = lambda text, **_: SimpleNamespace(input_ids=[17, 7] if text == "7" else [int(text)])  # noqa: E731
    unknown = lambda text, **_: SimpleNamespace(input_ids=[min(int(text), 8)])  # noqa: E731
    for broken in (two, unknown):  # a space before a digit; 8 and 9 are both unknown
        with pytest.raises(ValueError, match="does not have one token for each digit.*--judge_url"):
            ovd.digit_tokens(broken)
    policy, long = SimpleNamespace(tokenizer=byte_tokenizer), config("ovd", ovd, judge_request=REQUEST + "x" * 20_000)
    with pytest.raises(ValueError, match="--judge_request: without its texts"):
        ovd.Judge(long, policy, SimpleNamespace(name="t", notes=[]))


def test_a_judges_figures_by_hand():
    """The AUC is over pairs of a success and a failure; a tie counts one half. Rows without a grade or a score are in no pair."""
    right, wrong, failed = Outcome(1, "passed"), Outcome(0, "wrong"), Outcome(0, "internal")
    outcomes = [right, right, right, wrong, wrong, failed, wrong, right]
    figures = ovd.judge_figures([9.0, 4.5, 2.0, 4.5, 2.49, 0.0, None, None], outcomes, 4.5)
    assert figures["judge_auc"] == pytest.approx((1 + 1 + 0.5 + 1 + 0 + 0) / 6)  # 9 and 4.5 against 4.5 and 2.49
    assert figures["scores"] == [1, 0, 2, 0, 0, 2, 0, 0, 0, 1]  # a half rounds up
    assert figures["accepted"] == 5 / 8  # 9, twice exactly 4.5, and the two without a score
    for outcomes in ([right, right, right], [right, wrong, failed]):
        assert ovd.judge_figures([3.0, None, 7.0], outcomes, 5.0)["judge_auc"] is None


# ---- The loop, update by update ------------------------------------------------------------------------------


OVD_SCRIPT = [letters for batch in SCRIPT for letters in (batch, ["sfsxfssfsfsfsxsf"])]  # rollouts, demonstrations, ...
SCORES = [0.0, 5.0, 9.0, 4.99, 4.99, 4.0, None, 7.5, 1.0, 2.0, 8.0, 9.0, 2.0, 3.0, 0.0, 5.01]


@pytest.mark.parametrize(
    "flags",
    [dict(), dict(ovd_ratio="one", teacher="ema"), dict(minibatch_prompts=1, ovd_failed=False)]
    + [dict(minibatch_prompts=2, ovd_ratio="one", schedule="linear")],
    ids=str,
)
def test_ovds_updates_are_the_clipped_policy_gradient_over_the_mixed_groups(flags, tmp_path):
    cfg = config("ovd", ovd, log_samples=16, **flags)
    judge = SimpleNamespace(missing=Counter())
    judge.scores = lambda problems, texts, step: judge.missing.update(one=1) or list(SCORES)
    done = trained(cfg, tmp_path / "run", ovd.train, OVD_SCRIPT, judge)
    s, state, compare = reference(cfg, done.after)
    student = done.sampler.drawn[0][2]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    for k, (batch, _, updates, row) in enumerate(done.batches):
        (letters, told), (grades, _) = done.calls[2 * k : 2 * k + 2]
        own = SimpleNamespace(**vars(batch) | {"y": [rollout.tokens for rollout in batch.rollouts]})
        rows = rows_of(own, letters, told, cfg)
        rejected = [i for i, score in enumerate(SCORES) if score is not None and score < 5]
        asked = [i for i in rejected if rows[i].has_context]
        # The teacher draws them, from its prompts and with another seed; if it is a copy, the sampler has its weights.
        prompts, seed, model = done.sampler.drawn[2 * k + 1]
        assert prompts == [batch.xC[i] for i in asked] and (model is student) == (s.teacher == "live")
        again = Sampler()
        demonstrations = again.sample(prompts, 1, seed, cfg.max_response_tokens, 1, 1)
        shown = {}
        for i, demonstration, grade in zip(asked, demonstrations, grades, strict=True):
            if grade == "s" or grade == "f" and cfg.ovd_failed:
                shown[i], rows[i].shown = grade, True
                rows[i].response, rows[i].sampler_logp = demonstration.tokens, demonstration.logp
                rows[i].reward = float(grade == "s")
        with torch.no_grad():
            old = [algorithm.logp(state.model, row.prompt, row.response) for row in rows]
        off = [logp - torch.tensor(row.sampler_logp) for logp, row in zip(old, rows)]
        own, lent = (torch.cat([x for x, row in zip(off, rows) if row.shown == which]) for which in (False, True))
        assert row["sampler_gap"] == pytest.approx(own.abs().mean().item(), rel=1e-6)
        assert row["demonstration_lacked"] == pytest.approx((lent.exp() < 0.5).double().mean().item())
        losses, *_ = algorithm.m_step(state, rows, old, algorithm.advantages(rows, s), old, s, compare)
        assert updates == len(losses) and row["m_loss"] == pytest.approx(algorithm.mean(losses), rel=1e-9)
        # The log describes the student's rollouts, and the demonstrations separately.
        graded = [letter for letter in letters if letter != "x"]
        assert row["reward"] == graded.count("s") / len(graded) and row["demonstrations"] == len(shown) / 16
        assert row["demonstration_reward"] == algorithm.mean([float(grade == "s") for grade in shown.values()])
        counts = {"one": 1, "rejected without a context, kept": len(rejected) - len(asked),
                  "demonstration without a grade, rollout kept": grades.count("x"),
                  "demonstration failed, rollout kept": (len(asked) - len(shown) - grades.count("x"))}  # fmt: skip
        assert {reason: row["left_out"].get(reason, 0) for reason in counts} == counts and shown
        for i, sample in enumerate(samples[16 * k : 16 * k + 16]):
            text = words_of(t for t in rows[i].response if t != 2) if i in shown else None
            told = (SCORES[i], text, rows[i].reward if i in shown else None)
            assert (sample["score"], sample["demonstration"], sample["demonstration_reward"]) == told
        algorithm.end_of_batch(state, s)
    assert len({seed for _, seed, _ in done.sampler.drawn}) == 2 * 3
    if state.teacher is not None:
        assert (weights(model) - weights(state.teacher)).abs().max() < 1e-9


# ---- A whole run ---------------------------------------------------------------------------------------------


def test_a_served_critic_reaches_the_teacher_and_its_key_is_not_saved(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")

    def answer(body, _):
        text = body["messages"][0]["content"]
        fine = text == "1 +" or sum(map(ord, text)) % 2  # the question before the run, and some of its own
        return server.reply_with("look again") if fine else (400, "no")

    server.answer, out = answer, tmp_path / "run"
    flags = "--method sdpo --feedback critique --no_borrow --critic_model m --log_samples 16 --critic_url"
    (row,) = run(out, *flags.split(), server.url, steps=1)
    samples = [json.loads(line) for line in (out / "samples.jsonl").open()]
    seen = [sample["context"] and sample["context"]["critique"] for sample in samples if not sample["reward"]]
    assert set(seen) == {"look again", None} and row["left_out"]["critic: the server failed"] == seen.count(None)
    assert {key for _, key, _ in server.seen} == {"Bearer sk-very-secret"}
    for file in (p for p in out.rglob("*") if p.is_file()):
        assert b"sk-very-secret" not in file.read_bytes(), file
