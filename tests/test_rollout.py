"""rollout.py: rollouts come from the distribution they claim, have the log-probs that the trainer computes, and depend only on
weights, prompt, seed and row.

The models are tiny and random, with small vocabularies; expected distributions come from plain forward passes (conftest.py).
"""

import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import rollout
from conftest import FAMILIES
from model.policy import Policy
from rollout import HFSampler, seed_for

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
WITH_EOS = [[EOS, EOS, 4, 0, EOS, 6, EOS], [EOS], [0, 7]]  # 0 is the padding token
CASES = [(family, prompts, 1.0, 1.0) for family in FAMILIES for prompts in (PROMPTS, EVEN, WITH_EOS, [[5]])]
CASES += [("qwen3-tied", PROMPTS, *cut) for cut in ((0.7, 1.0), (1.0, 0.8), (1.5, 0.5))] + [("qwen3-untied", PROMPTS, 0, 0.5)]


@pytest.mark.parametrize("family, prompts, temperature, top_p", CASES)
def test_tokens_and_logp_are_of_the_distribution_after_temperature_and_top_p(
    make_policy, plain_logits, family, prompts, temperature, top_p
):
    """At temperature 0 tokens are the likeliest, and top_p is ignored."""
    policy, state = make_policy(family), torch.manual_seed(99).get_state()
    rollouts = HFSampler(policy).sample(prompts, **MIXED, temperature=temperature, top_p=top_p)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    for row, rollout in enumerate(rollouts):  # row i n + j answers prompt i
        logits = plain_logits(policy.model, prompts[row // 4], rollout.tokens).detach()
        log_p = nucleus(logits, temperature, top_p) if temperature else nucleus(logits, 1, 1)
        uniform = torch.rand(8, generator=torch.Generator().manual_seed(seed_for(3, row)), dtype=torch.float64)
        passed = log_p.exp().cumsum(-1) <= uniform[: len(log_p), None]
        assert rollout.tokens == (passed.sum(-1) if temperature else log_p.argmax(-1)).tolist()
        assert rollout.logp == pytest.approx(log_p[range(len(log_p)), rollout.tokens].tolist(), abs=1e-5)
    assert any(len({*r.tokens}) > 1 for r in rollouts)  # a random network with a tied head likes to repeat itself


# ---- Rows and seeds --------------------------------------------------------------------------------------------


def test_rows_do_not_depend_on_how_they_are_batched_nor_on_what_else_is_asked(make_policy):
    sampler, other = HFSampler(make_policy()), make_policy("qwen3-untied")
    rollouts = sampler.sample(PROMPTS, **MIXED)
    for budget in (1, 30, 50):  # one row at a time; rows of one prompt; rows of two prompts
        assert same(HFSampler(sampler.policy, max_batch_tokens=budget).sample(PROMPTS, **MIXED), rollouts, tol=1e-5)
    assert same(sampler.sample(PROMPTS[:2], **MIXED), rollouts[:8], tol=1e-5)
    assert sampler.sample([], **MIXED) == []
    sampler.sync(other)
    assert sampler.sample(PROMPTS, **MIXED) == HFSampler(other).sample(PROMPTS, **MIXED)


def test_rows_are_drawn_together_by_length_within_max_batch_tokens(make_policy, monkeypatch):
    draw, drawn = HFSampler._draw, []
    noted = lambda self, x, *how: drawn.append(sorted(map(len, x))) or draw(self, x, *how)  # noqa: E731
    monkeypatch.setattr(HFSampler, "_draw", noted)
    HFSampler(make_policy(), max_batch_tokens=40).sample(PROMPTS, **MIXED)
    assert drawn == [[9, 9], [9, 9], [5, 5, 5], [2, 2, 5], [2, 2]]  # and 8 tokens of response each
    HFSampler(make_policy(), max_batch_tokens=1).sample(PROMPTS, **MIXED)
    assert drawn[5:] == [[9]] * 4 + [[5]] * 4 + [[2]] * 4


@pytest.mark.parametrize("family", ["qwen3-tied", "olmo3"])
def test_a_prompt_is_read_once_for_all_of_its_rows(make_policy, monkeypatch, family):
    policy, read = make_policy(family), []
    forward = policy.model.forward
    noted = lambda *args, **how: read.append(tuple(how["input_ids"].shape)) or forward(*args, **how)  # noqa: E731
    monkeypatch.setattr(policy.model, "forward", noted)
    most = max(len(r.tokens) for r in HFSampler(policy).sample([*PROMPTS, PROMPTS[1]], **MIXED))
    assert read == [(3, 8)] + [(16, 1)] * most  # three are different, the longest has 9


def test_a_row_ends_with_its_first_eos_or_is_cut_at_max_tokens(make_policy):
    policy = make_policy()
    policy.eos_ids = [2, 5]  # Qwen3 has two
    rollouts = HFSampler(policy).sample(PROMPTS, n=20, seed=0, max_tokens=6)
    assert {r.finish for r in rollouts} == {"stop", "length"} and {r.tokens[-1] for r in rollouts} >= {2, 5}
    for r in rollouts:
        assert len(r.logp) == len(r.tokens) and not set(r.tokens[:-1]) & {2, 5}
        assert r.finish == "stop" if r.tokens[-1] in (2, 5) else r.finish == "length" and len(r.tokens) == 6
    assert any(r.finish == "stop" and len(r.tokens) == 6 for r in rollouts)  # EOS at the last place is no cut


def test_seed_for_is_a_known_63_bit_number_that_keeps_its_parts_apart():
    assert seed_for(0, 3, "rollouts", 5) == 3407721484654295799
    assert 2**62 < max(seed_for(0, row) for row in range(100)) < 2**63
    parts = [*itertools.product((0, 1, 11), (1, 10, 111), ("rollouts", "contexts", "order"), range(30))]
    parts += [(1, 23), (12, 3), (123,), (1, 2, 3), (3, 12), (23, 1)]
    assert len({seed_for(*p) for p in parts}) == len(parts)


@pytest.mark.parametrize("which, gpu, lacks", [("", True, True), ("", False, False), ("hf", True, False), ("vllm", False, True)])
def test_a_missing_vllm_is_refused_only_where_it_would_sample(which, gpu, lacks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(rollout.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="vllm is not installed") if lacks else nullcontext():
        rollout.check_sampler(which)
