"""What rollout.py promises: rollouts come from the distribution they claim, with the log-probs the trainer computes, and
depend on nothing but weights, prompt, seed and row.

Tiny random models with small vocabularies; expected distributions come from plain forward passes (conftest.py).
"""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from model.policy import Policy
from rollout import HFSampler, _Draw, seed_for

torch.set_num_threads(1)
EOS = 2
PROMPTS = [[7, 3, 9, 11, 4, 8, 5, 6, 10], [12, 3], [5, 5, 13, 4, 6]]  # not by length; longer than OLMo3's window
MIXED = dict(n=4, seed=3, max_tokens=8)


@pytest.fixture
def make_policy(make_model):
    """make_policy(family, vocabulary): a policy in float32 whose EOS, 2, comes up often enough to end half the rows."""

    def make(family="qwen3-tied", vocabulary=14):
        tokenizer = SimpleNamespace(eos_token_id=EOS, chat_template=None)
        return Policy(make_model(family, vocabulary, torch.float32), tokenizer)

    return make


def same(rollouts, others, tol=0.0):
    """The same tokens and endings, and log-probs up to tol."""
    assert len(rollouts) == len(others)
    gaps = [abs(a - b) for r, s in zip(rollouts, others) for a, b in zip(r.logp, s.logp)]
    return [(r.tokens, r.finish) for r in rollouts] == [(s.tokens, s.finish) for s in others] and max(gaps) <= tol


def nucleus(logits, temperature, top_p):
    """(T, V) log-probs by hand: softmax(logits / T), cut to the smallest set of likeliest tokens that holds top_p."""
    p = (logits.double() / temperature).softmax(-1)
    for row in p:
        before = 0.0
        for token in row.argsort(descending=True).tolist():
            kept, before = before < top_p, before + row[token].item()
            row[token] *= kept
    return (p / p.sum(-1, keepdim=True)).log()


# ---- The distribution ------------------------------------------------------------------------------------------


EVEN = [PROMPTS[0], PROMPTS[0][::-1]]  # no padding at all
WITH_EOS = [[EOS, EOS, 4, 0, EOS, 6, EOS], [EOS], [0, 7]]  # which also pads


@pytest.mark.parametrize(
    "family, prompts, pad",
    [(family, PROMPTS, 0) for family in ("qwen3-tied", "qwen3-untied", "olmo3")]
    + [("olmo3", EVEN, 0), ("olmo3", WITH_EOS, EOS), ("qwen3-tied", WITH_EOS, EOS), ("qwen3-tied", WITH_EOS, 0), ("qwen3-tied", [[5]], 0)],
)  # fmt: skip
def test_logp_is_the_trainers_score_for_prompts_of_any_length(make_policy, family, prompts, pad):
    policy = make_policy(family)
    policy.model.config.pad_token_id = policy.model.generation_config.pad_token_id = pad
    rollouts = HFSampler(policy).sample(prompts, **MIXED)
    scored, _ = policy.score([x for x in prompts for _ in range(4)], [r.tokens for r in rollouts])
    for rollout, expected in zip(rollouts, scored.tolist(), strict=True):
        assert rollout.logp == pytest.approx(expected[: len(rollout.tokens)], abs=1e-5)


@pytest.mark.parametrize("temperature, top_p", [(0.7, 1.0), (1.0, 0.8), (0.7, 0.8), (1.5, 0.5)])
def test_logp_is_that_of_the_distribution_after_temperature_and_top_p(make_policy, plain_logits, temperature, top_p):
    policy = make_policy()
    rollouts = HFSampler(policy).sample(PROMPTS, **MIXED, temperature=temperature, top_p=top_p)
    for row, rollout in enumerate(rollouts):
        log_p = nucleus(plain_logits(policy.model, PROMPTS[row // 4], rollout.tokens).detach(), temperature, top_p)
        expected = log_p[range(len(rollout.tokens)), rollout.tokens]
        assert rollout.logp == pytest.approx(expected.tolist(), abs=1e-5)  # -inf outside the nucleus would fail


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (1.4, 0.9)])
def test_frequencies_of_two_tokens_fit_the_distribution(make_policy, plain_logits, temperature, top_p):
    policy, prompt, n = make_policy(vocabulary=6), [3, 5, 4], 4000
    rollouts = HFSampler(policy).sample([prompt], n, 11, 2, temperature, top_p)
    drawn = [tuple(r.tokens) for r in rollouts]
    first = nucleus(plain_logits(policy.model, prompt, [0]).detach(), temperature, top_p)[0].exp()
    expected = {(EOS,): n * first[EOS].item()}
    for a in set(range(6)) - {EOS}:
        second = nucleus(plain_logits(policy.model, prompt, [a, 0]).detach(), temperature, top_p)[1].exp()
        expected |= {(a, b): n * (first[a] * second[b]).item() for b in range(6)}
    assert sum(expected.values()) == pytest.approx(n)
    possible = {pair: count for pair, count in expected.items() if count > 0}
    assert set(drawn) <= set(possible) and min(possible.values()) > 5 and len(possible) > 8
    chi2, df = sum((drawn.count(pair) - e) ** 2 / e for pair, e in possible.items()), len(possible) - 1
    # Mean df, variance 2 df: four standard deviations, passed by a right sampler with about 999 seeds in 1000.
    assert chi2 < df + 4 * math.sqrt(2 * df)


def test_temperature_0_takes_the_likeliest_token(make_policy, plain_logits):
    policy = make_policy("qwen3-untied")  # a random network with a tied head only repeats itself
    rollouts = HFSampler(policy).sample(PROMPTS, **MIXED, temperature=0)
    for row, rollout in enumerate(rollouts):
        assert rollout.tokens == plain_logits(policy.model, PROMPTS[row // 4], rollout.tokens).argmax(-1).tolist()
    assert any(len(set(r.tokens)) > 1 for r in rollouts)


@pytest.mark.parametrize("last_uniform", [0.0, 1 - 2**-53])
def test_a_token_of_probability_0_is_never_drawn(last_uniform):
    scores = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    scores[:, ::2], scores[:, -3:], scores[:, 0] = -math.inf, -math.inf, -math.inf  # the ends and every other token
    draw = _Draw(list(range(500)), max_tokens=1, greedy=False)
    draw.uniform[:] = last_uniform  # the ends of what torch.rand can give
    token = draw(torch.zeros(500, 1, dtype=torch.long), scores).argmax(-1)
    assert (token == (1 if last_uniform == 0 else 35)).all()  # the first and the last possible token
    log_p = torch.log_softmax(scores, -1)[range(500), token]
    assert torch.equal(draw.logp[0], log_p) and torch.isfinite(log_p).all()


# Settings that a model's generation_config.json may carry. generate() fills with them what a passed config leaves open.
DEFAULTS = [
    ("repetition_penalty", 1.7), ("top_k", 1), ("top_p", 0.1), ("temperature", 0.1), ("do_sample", True),
    ("min_new_tokens", 6), ("min_length", 20), ("max_length", 3), ("no_repeat_ngram_size", 1), ("suppress_tokens", [5]),
    ("forced_eos_token_id", 2), ("num_beams", 2), ("num_return_sequences", 2), ("return_dict_in_generate", True),
]  # fmt: skip


@pytest.mark.parametrize("name, value", DEFAULTS, ids=[name for name, _ in DEFAULTS])
def test_sampling_defaults_in_the_models_generation_config_change_nothing(make_policy, name, value):
    policy = make_policy()
    plain = HFSampler(policy).sample(PROMPTS, **MIXED)
    setattr(policy.model.generation_config, name, value)
    before = copy.deepcopy(policy.model.generation_config)
    assert HFSampler(policy).sample(PROMPTS, **MIXED) == plain
    assert policy.model.generation_config == before  # it is saved with the model, so it must survive


# ---- Rows and seeds --------------------------------------------------------------------------------------------


def test_rows_do_not_depend_on_how_they_were_batched(make_policy):
    policy = make_policy()
    together = HFSampler(policy, max_batch_tokens=10**9).sample(PROMPTS, **MIXED)
    for budget in (1, 30, 50):  # one row at a time; rows of one prompt; rows of two prompts
        assert same(HFSampler(policy, max_batch_tokens=budget).sample(PROMPTS, **MIXED), together, tol=1e-5)


def test_a_batch_stays_within_max_batch_tokens(make_policy, monkeypatch):
    policy, shapes = make_policy(), []
    generate = policy.model.generate
    monkeypatch.setattr(policy.model, "generate", lambda ids, **kw: shapes.append(ids.shape) or generate(ids, **kw))
    HFSampler(policy, max_batch_tokens=40).sample(PROMPTS, **MIXED)
    assert sum(rows for rows, _ in shapes) == 12 and all(rows * (width + 8) <= 40 for rows, width in shapes)
    assert sorted(shapes)[-1] == (3, 5) and len(shapes) == 5  # by length: 2 + 2, 3, 1 of them with 2 shorter, the last 2


@pytest.mark.parametrize("family", ["qwen3-tied", "olmo3"])
def test_a_prompt_is_read_once_for_all_of_its_rows(make_policy, monkeypatch, family):
    policy, read = make_policy(family), []
    forward = policy.model.forward
    noted = lambda *args, **how: read.append(tuple(how["input_ids"].shape)) or forward(*args, **how)  # noqa: E731
    monkeypatch.setattr(policy.model, "forward", noted)
    HFSampler(policy).sample([*PROMPTS, PROMPTS[1]], **MIXED)
    assert read[0] == (3, 8) and set(read[1:]) == {(16, 1)} and len(read) <= 1 + 8  # three are different, the longest has 9


def test_the_seed_alone_decides_and_the_global_generator_is_left_alone(make_policy):
    sampler = HFSampler(make_policy())
    first, state = sampler.sample(PROMPTS, **MIXED), torch.manual_seed(99).get_state()
    assert sampler.sample(PROMPTS, **MIXED) == first and torch.equal(torch.get_rng_state(), state)
    assert not same(sampler.sample(PROMPTS, n=4, seed=4, max_tokens=8), first, tol=math.inf)
    assert len({tuple(r.tokens) for r in first[:4]}) == 4  # the rows of one prompt are draws of their own


def test_row_i_n_plus_j_answers_prompt_i_and_more_rows_or_prompts_change_none(make_policy):
    sampler = HFSampler(make_policy())
    rollouts = sampler.sample(PROMPTS, **MIXED)
    alone = [sampler._generate([PROMPTS[row // 4]], [seed_for(3, row)], 8, 1.0, 1.0)[0] for row in range(12)]
    assert same(rollouts, alone, tol=1e-5)
    assert same(sampler.sample(PROMPTS[:2], **MIXED), rollouts[:8], tol=1e-5)
    assert sampler.sample([], **MIXED) == []


def test_a_row_ends_with_its_first_eos_or_is_cut_at_max_tokens(make_policy):
    policy = make_policy()
    policy.eos_ids = [2, 5]  # Qwen3 has two
    rollouts = HFSampler(policy).sample(PROMPTS, n=20, seed=0, max_tokens=6)
    assert {r.finish for r in rollouts} == {"stop", "length"} and {r.tokens[-1] for r in rollouts} >= {2, 5}
    for r in rollouts:
        assert len(r.logp) == len(r.tokens) and not set(r.tokens[:-1]) & {2, 5}
        assert r.finish == "stop" if r.tokens[-1] in (2, 5) else r.finish == "length" and len(r.tokens) == 6
    assert any(r.finish == "stop" and len(r.tokens) == 6 for r in rollouts)  # EOS at the last place is no cut


def test_the_sampler_sees_the_policys_weights_as_they_are_now(make_policy):
    policy, other = make_policy(), make_policy("qwen3-untied")
    sampler = HFSampler(policy)
    before = sampler.sample(PROMPTS, **MIXED)
    with torch.no_grad():
        policy.model.model.embed_tokens.weight.mul_(-1)
    assert not same(sampler.sample(PROMPTS, **MIXED), before, tol=math.inf)
    sampler.sync(other)
    assert sampler.sample(PROMPTS, **MIXED) == HFSampler(other).sample(PROMPTS, **MIXED)


# ---- Seeds -----------------------------------------------------------------------------------------------------


def test_seed_for_is_a_known_63_bit_number():
    assert seed_for(0, 3, "rollouts", 5) == 3407721484654295799
    assert 2**62 < max(seed_for(0, row) for row in range(100)) < 2**63


def test_seed_for_differs_by_every_part_and_keeps_the_parts_apart():
    parts = [*itertools.product((0, 1, 11), (1, 10, 111), ("rollouts", "contexts", "order"), range(30))]
    parts += [(1, 23), (12, 3), (123,), (1, 2, 3), (3, 12), (23, 1)]
    assert len({seed_for(*p) for p in parts}) == len(parts)
