"""losses.py against hand arithmetic, closed-form gradients and hostile inputs.

Distributions are typed as probabilities, so every expected value can be checked with a pencil. Everything is float64 unless a test
is about float32 itself. Logits are log-probabilities plus a constant, which softmax must ignore.
"""

import ast
import inspect
import itertools
import math
import re
from math import exp, log

import pytest
import torch

import losses as L

f64 = torch.float64
KINDS = L.DIVERGENCES


def tensor(*values):
    return torch.tensor(values, dtype=f64)


def logits(*probabilities, offset=3.0):
    """(1, 1, V) logits of one token whose softmax is the given distribution."""
    return (tensor(*probabilities).log() + offset).view(1, 1, -1)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def live(x):
    return x.detach().clone().requires_grad_()


def sigmoid(x):
    return 1 / (1 + exp(-x))


def close(actual, expected, tol=1e-12):
    """Equal shapes, and values equal up to tol; nan equals nothing."""
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tol, atol=tol)


def gradients(output, *inputs):
    return torch.autograd.grad(output.sum(), inputs, allow_unused=True)


def untouched(gradient):
    return gradient is None or bool((gradient == 0).all())


# The pair used most: asymmetric, and not a permutation of one another.
S, T, M = (0.7, 0.2, 0.1), (0.2, 0.3, 0.5), (0.45, 0.25, 0.3)  # M = ½ S + ½ T
KL_ST = 0.7 * log(0.7 / 0.2) + 0.2 * log(0.2 / 0.3) + 0.1 * log(0.1 / 0.5)
KL_TS = 0.2 * log(0.2 / 0.7) + 0.3 * log(0.3 / 0.2) + 0.5 * log(0.5 / 0.1)
KL_SM = 0.7 * log(0.7 / 0.45) + 0.2 * log(0.2 / 0.25) + 0.1 * log(0.1 / 0.3)
KL_TM = 0.2 * log(0.2 / 0.45) + 0.3 * log(0.3 / 0.25) + 0.5 * log(0.5 / 0.3)
BY_HAND = {"kl_student_teacher": KL_ST, "kl_teacher_student": KL_TS, "js": 0.5 * KL_SM + 0.5 * KL_TM}

# A pair for buckets: the student's two likeliest tokens are 1 and 3, the teacher's are 0 and 2.
S4, T4 = (0.15, 0.5, 0.05, 0.3), (0.4, 0.1, 0.35, 0.15)
S4_BUCKETS, T4_BUCKETS = (0.5, 0.3, 0.15 + 0.05), (0.1, 0.15, 0.4 + 0.35)


# ---- Distributions ---------------------------------------------------------------------------------------


def test_kl_is_the_expectation_under_its_first_argument_over_the_last_axis():
    log_p, log_q = tensor(S, T, T).log().view(3, 1, 3), tensor(T, S, T).log().view(3, 1, 3)
    close(L.kl(log_p, log_q), [[KL_ST], [KL_TS], [0.0]])
    assert abs(KL_ST - KL_TS) > 0.02  # or the line above could not tell the directions apart


@pytest.mark.parametrize("q0", [0.3, 0.0])
def test_a_symbol_with_p_0_adds_nothing_to_kl_and_its_gradient_is_finite(q0):
    log_p, log_q = live(tensor(0.0, 0.4, 0.6).log()), live(tensor(q0, 0.2, 0.5).log())
    value = L.kl(log_p, log_q)
    close(value, 0.4 * log(0.4 / 0.2) + 0.6 * log(0.6 / 0.5))
    d_p, d_q = gradients(value, log_p, log_q)
    close(d_p, [0.0, 0.4 * (log(0.4 / 0.2) + 1), 0.6 * (log(0.6 / 0.5) + 1)])
    close(d_q, [0.0, -0.4, -0.6])


def test_token_logp_normalises_and_picks_the_token_at_its_position():
    z = torch.cat([logits(*S), logits(*T, offset=-7.0)], dim=1)  # (1, 2, 3)
    close(L.token_logp(z, torch.tensor([[2, 1]])), [[log(0.1), log(0.3)]])


def test_top_k_takes_the_students_tokens_and_the_tail_is_all_other_mass():
    log_s, log_t = L.top_k_with_tail(logits(*S4), logits(*T4, offset=-1.0), 2)
    close(log_s.exp(), [[S4_BUCKETS]])
    close(log_t.exp(), [[T4_BUCKETS]])  # the teacher's own top 2 would be 0.4 and 0.35
    # Each position has its own top k: here the student likes token 0 first, then token 2.
    student = torch.cat([logits(0.6, 0.3, 0.1), logits(0.1, 0.2, 0.7)], dim=1)
    teacher = torch.cat([logits(0.5, 0.3, 0.2), logits(0.5, 0.3, 0.2)], dim=1)
    close(L.top_k_with_tail(student, teacher, 1)[1].exp(), [[[0.5, 0.5], [0.2, 0.8]]])


def test_the_tail_is_exact_however_small_and_log_0_if_it_is_empty():
    z = torch.tensor([[[50.0, -50.0, -50.0]]], requires_grad=True)  # float32, in which 1 - p is 0
    log_s, log_t = L.top_k_with_tail(z, z, 1)
    close(log_s, [[[0.0, -100 + log(2)]]], tol=1e-6)
    close(gradients(log_s[..., -1], z)[0], [[[-1.0, 0.5, 0.5]]], tol=1e-6)  # not 0
    whole, _ = L.top_k_with_tail(logits(*S4), logits(*T4), 4)
    assert whole[0, 0, -1] == -math.inf


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_loss_is_the_divergence_of_distributions_or_of_their_buckets(kind):
    log_s, log_t = tensor(*S).log().view(1, 1, 3), tensor(*T).log().view(1, 1, 3)
    close(L.divergence(log_s, log_t, kind), [[BY_HAND[kind]]])
    close(L.distillation_loss(logits(*S), logits(*T, offset=-2.0), kind), [[BY_HAND[kind]]])
    close(L.distillation_loss(logits(*S), logits(*T), kind, top_k=3), [[BY_HAND[kind]]])  # nothing in the tail
    s, t = S4_BUCKETS, T4_BUCKETS
    m = [(a + b) / 2 for a, b in zip(s, t)]
    st, ts, sm, tm = (sum(a * log(a / b) for a, b in zip(p, q)) for p, q in ((s, t), (t, s), (s, m), (t, m)))
    expected = {"kl_student_teacher": st, "kl_teacher_student": ts, "js": 0.5 * sm + 0.5 * tm}[kind]
    close(L.distillation_loss(logits(*S4), logits(*T4), kind, top_k=2), [[expected]])
    # Disjoint up to e^-60: JS reaches its bound ln 2, and both KLs are 60.
    close(L.distillation_loss(tensor([[60.0, 0.0]]), tensor([[0.0, 60.0]]), kind), [[log(2) if kind == "js" else 60.0]])


# ---- Weights and reductions ------------------------------------------------------------------------------


def test_truncated_ratio_is_the_ratio_up_to_its_limit():
    logp, old_logp = tensor([0.3, 0.9, 0.1, 0.2]).log(), tensor([0.2, 0.3, 0.4, 0.2]).log()
    close(L.truncated_ratio(logp, old_logp, 2.0), [[1.5, 2.0, 0.25, 1.0]])
    close(L.truncated_ratio(logp, old_logp, 4.0), [[1.5, 3.0, 0.25, 1.0]])


GARBAGE = pytest.mark.parametrize("garbage", [7.0, math.nan, math.inf, -math.inf])
MASK_DTYPES = pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, f64])
MASK = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0]])


@GARBAGE
@MASK_DTYPES
def test_sequence_mean_averages_each_row_and_an_empty_row_still_counts_in_n(mask_dtype, garbage):
    per_token, mask = live(tensor([1, garbage, 2], [4, 5, 7], [garbage] * 3)), MASK.to(mask_dtype)
    loss = L.sequence_mean(per_token, mask, 4)
    close(loss, ((1 + 2) / 2 + (4 + 5 + 7) / 3 + 0) / 4)
    shares = [[1 / (4 * 2), 0, 1 / (4 * 2)], [1 / (4 * 3)] * 3, [0, 0, 0]]  # 1 / (N · length of its row)
    close(gradients(loss, per_token)[0], shares)
    close(L.sequence_weights(mask, 4), shares)


def test_cross_entropy_by_hand_with_its_arguments_in_order():
    log_t, log_s = tensor(T, S).log(), live(tensor(S, S).log())
    loss = L.cross_entropy(log_t, log_s)
    close(loss, [-(t @ tensor(S)[0].log()) for t in tensor(T, S)])
    close(gradients(loss, log_s)[0], -tensor(T, S))
    # What T forbids costs nothing, even where S forbids it too.
    close(L.cross_entropy(tensor([1.0, 0.0]).log(), tensor([0.5, 0.0]).log()), [log(2)])


def test_cost_to_go_is_the_sum_of_strictly_later_costs():
    cost = tensor([1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, math.nan], [math.inf] * 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    close(L.cost_to_go(cost, mask), [[2 + 4 + 8, 4 + 8, 8, 0], [2 + 4, 4, 0, 0], [0, 0, 0, 0]])


# Three rows of 4, 2 and 1 tokens, whose costs to go are 14 12 8 0, then 16 0, then 0.
COST = tensor([1, 2, 4, 8], [5, 16, 0, 0], [32, 0, 0, 0])
COST_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
FUTURE = [
    [(16 + 0) / 2 - 14, (0 + 0) / 2 - 12, 0 - 8, 0 - 0],  # the second row is at its last token, the third has ended
    [(14 + 0) / 2 - 16, (12 + 0) / 2 - 0, 0, 0],  # a row that has ended counts as 0: 12 / 2, not 12 / 1
    [(14 + 16) / 2 - 0, 0, 0, 0],  # the cost of its only token, 32, is nowhere
]


@GARBAGE
@MASK_DTYPES
def test_future_advantages_are_the_others_mean_cost_to_go_minus_ones_own(mask_dtype, garbage):
    """The others are the counted rows. Padding and rows that are not counted may hold anything."""
    counted = {
        (1, 1, 1): FUTURE,
        (1, 0, 1): [[0 - 14, 0 - 12, 0 - 8, 0], [0, 0, 0, 0], [14 / 1 - 0, 0, 0, 0]],
        (0, 1, 1): [[0, 0, 0, 0], [0 / 1 - 16, 0, 0, 0], [16 / 1 - 0, 0, 0, 0]],
        (1, 0, 0): [[-14, -12, -8, 0], [0, 0, 0, 0], [0, 0, 0, 0]],  # the only one: no baseline
        (0, 0, 0): [[0.0] * 4] * 3,
    }
    for rows, expected in counted.items():
        rows = torch.tensor(rows)
        cost = COST.masked_fill((COST_MASK * rows[:, None]) == 0, garbage)
        close(L.future_advantages(cost, COST_MASK.to(mask_dtype), 3, rows.to(mask_dtype)), expected)


def test_future_advantages_do_not_mix_groups_and_one_row_has_no_baseline():
    cost, mask = torch.cat([COST, 100 * COST.flip(0)]), torch.cat([COST_MASK, COST_MASK.flip(0)])
    close(L.future_advantages(cost, mask, 3), torch.cat([tensor(*FUTURE), 100 * tensor(*FUTURE).flip(0)]))
    close(L.future_advantages(COST, COST_MASK, 1), [[-14, -12, -8, 0], [-16, 0, 0, 0], [0, 0, 0, 0]])


# ---- Policy gradient -------------------------------------------------------------------------------------


def test_group_advantages_subtract_the_mean_of_the_group():
    rewards = tensor(1, 0, 0, 0, 1, 1, 1, 1)
    expected = tensor(1 - 0.25, 0 - 0.25, 0 - 0.25, 0 - 0.25, 0, 0, 0, 0)
    close(L.group_advantages(rewards, 4), expected)
    assert (L.group_advantages(rewards, 1) == 0).all()
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / (4 - 1))
    close(L.group_advantages(rewards, 4, divide_by_std=True), expected / (std + 1e-6))


GRPO_BY_HAND = {  # ratio, A, loss, gradient in logp (−ρ A where nothing is clipped)
    "plain, inside the range": (1.1, 2.0, -1.1 * 2, -1.1 * 2),
    "plain, A < 0": (0.9, -2.0, 0.9 * 2, 0.9 * 2),
    "at ratio 1 the gradient is -A": (1.0, 2.0, -2.0, -2.0),
    "at ratio 1 the gradient is -A, A < 0": (1.0, -0.5, 0.5, 0.5),
    "upper clip: no reward for going further up": (1.5, 2.0, -1.28 * 2, 0.0),
    "below the range with A > 0 there is a way back": (0.5, 2.0, -0.5 * 2, -0.5 * 2),
    "lower clip: no reward for going further down": (0.5, -2.0, 0.8 * 2, 0.0),
    "above the range with A < 0 there is a way back": (1.5, -2.0, 1.5 * 2, 1.5 * 2),
    "A < 0 just below the dual clip": (2.9, -2.0, 2.9 * 2, 2.9 * 2),
    "dual clip: at most 3 |A|": (5.0, -2.0, 3 * 2, 0.0),
    "no dual clip for A > 0": (5.0, 2.0, -1.28 * 2, 0.0),
    "no advantage, no gradient": (1.1, 0.0, 0.0, 0.0),
}


@pytest.mark.parametrize("ratio, A, loss, gradient", GRPO_BY_HAND.values(), ids=GRPO_BY_HAND.keys())
def test_grpo_loss_and_gradient_by_hand(ratio, A, loss, gradient):
    old_logp = tensor([0.1]).log()  # (1, 1)
    logp = live(old_logp + log(ratio))
    value = L.grpo_loss(logp, old_logp, tensor(A))
    close(value, [[loss]])
    d_logp = gradients(value, logp)[0]
    close(d_logp, [[gradient]])
    if gradient == 0:
        assert (d_logp == 0).all()  # exactly


def test_grpo_loss_with_limits_other_than_the_defaults():
    old_logp = tensor([0.1, 0.1], [0.1, 0.1]).log()
    logp = old_logp + tensor([5.0, 1.35], [0.85, 5.0]).log()
    loss = L.grpo_loss(logp, old_logp, tensor(1.0, -1.0), clip_low=0.1, clip_high=0.4, dual_clip=2.0)
    close(loss, [[-1.4, -1.35], [0.9, 2.0]])


@pytest.mark.parametrize("function", [L.grpo_loss, L.reshaped_advantages, L.reweighted_advantages])
def test_an_advantage_is_one_per_sequence_or_one_per_token(function):
    first, second = normal(2, 2, seed=6) / 5, normal(2, 2, seed=7) / 5
    more = (0.5, 0.2) * (function is not L.grpo_loss)
    call = lambda A: function(first, second, A) if function is L.grpo_loss else function(A, first, second, *more)  # noqa: E731
    per_sequence, per_token = tensor(1.5, -0.5), tensor([1.5, -0.5], [-0.5, 1.5])
    close(call(per_sequence), call(per_sequence[:, None].expand(2, 2)))
    close(call(per_token), torch.stack([call(A)[:, t] for t, A in enumerate(per_token.T)], 1))  # neither transposed nor averaged


def test_reshaped_advantages_add_the_teachers_log_ratio_to_the_sequences_advantage():
    teacher, student = tensor([0.6, 0.1], [0.5, 0.3]).log(), tensor([0.2, 0.4], [0.5, 0.1]).log()
    out = L.reshaped_advantages(tensor(2.0, -1.0), teacher, student, w_rl=0.5, w_opd=3.0)
    close(out, [[0.5 * 2 + 3 * log(3), 0.5 * 2 + 3 * log(0.25)], [0.5 * -1 + 3 * log(1), 0.5 * -1 + 3 * log(3)]])
    # For a row without a context its own log-probabilities are passed twice: the GRPO part remains.
    close(L.reshaped_advantages(tensor(2.0, -1.0), student, student, 0.5, 3.0), [[1.0, 1.0], [-0.5, -0.5]])


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_reweighted_advantages_weigh_by_the_ratio_and_on_failures_its_inverse(lam):
    ratio = tensor([1.1, 0.9, 3.0, 0.2, 1.0]).expand(2, 5)  # q/π of five tokens; clip 0.2 keeps w in [0.8, 1.2]
    student = tensor([0.2, 0.3, 0.1, 0.5, 0.4]).log().expand(2, 5)
    w = tensor([1.1, 0.9, 1.2, 0.8, 1.0], [1 / 1.1, 1 / 0.9, 0.8, 1.2, 1.0])
    A, teacher = tensor(2.0, -3.0), student + ratio.log()
    close(L.reweighted_advantages(A, teacher, student, lam=lam, clip=0.2), A[:, None] * ((1 - lam) + lam * w))
    close(L.reweighted_advantages(A, student + log(1.5), student, lam=1.0, clip=0.6)[0], [2 * 1.5] * 5)


# ---- E-step ----------------------------------------------------------------------------------------------


@GARBAGE
def test_implicit_reward_is_beta_times_the_sum_of_log_ratios_under_the_mask(garbage):
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    teacher = live(tensor([0.6, 0.1, 0.3], [0.5, 0.9, 0.9], [0.9] * 3).log().masked_fill(mask == 0, garbage))
    student = tensor([0.2, 0.4, 0.1], [0.1, 0.1, 0.1], [0.1] * 3).log()
    for frozen in (student, student.masked_fill(mask == 0, garbage), student.masked_fill(mask == 0, -garbage)):
        rewards = L.implicit_reward(teacher, frozen, mask, beta=0.1)
        close(rewards, [0.1 * (log(3) + log(0.25) + log(3)), 0.1 * log(5), 0])
        close(gradients(rewards, teacher)[0], 0.1 * mask.to(f64))


def test_reward_shift_is_the_midpoint_of_the_class_means_not_the_pooled_mean():
    close(L.reward_shift(tensor(1.0, -3.0, 3.0), tensor(1, 0, 1)), 0.5 * ((1 + 3) / 2 + (-3)))  # −0.5; the pooled mean is 1/3


def test_the_moving_shift_starts_at_the_first_value_and_an_overflow_moves_nothing():
    assert L.moving_shift(None, 4.0, 0.25) == 4.0
    assert L.moving_shift(4.0, 8.0, 0.25) == 0.75 * 4 + 0.25 * 8
    assert L.moving_shift(4.0, math.inf, 0.25) == L.moving_shift(4.0, math.nan, 0.25) == 4.0


@pytest.mark.parametrize("shift", [0.2, tensor(0.2)[0]])
@MASK_DTYPES
def test_bco_loss_averages_each_class_on_its_own(shift, mask_dtype):
    r_tilde, rewards = tensor(0.3, -0.7, 1.2), torch.tensor([1, 0, 1]).to(mask_dtype)
    success = -(log(sigmoid(0.3 - 0.2)) + log(sigmoid(1.2 - 0.2))) / 2
    failure = -log(sigmoid(-(-0.7 - 0.2))) / 1
    close(L.bco_loss(r_tilde, rewards, shift), success + failure)
    close(L.bco_loss(r_tilde, rewards, shift, num_pos=8, num_neg=5), success * 2 / 8 + failure / 5)
    close(L.bco_loss(r_tilde, rewards, shift, floor=-0.7), success)  # a failure at the floor adds nothing
    close(L.bco_loss(r_tilde, rewards, shift, floor=-0.8), success + failure)
    close(L.bco_loss(r_tilde[:1], rewards[:1], shift), -log(sigmoid(0.3 - 0.2)))  # a class without rows adds nothing
    close(L.bco_loss(r_tilde[1:2], rewards[1:2], shift), failure)


# ---- Every function ------------------------------------------------------------------------------

TOKENS = torch.tensor([[0, 4, 2], [3, 1, 1]])
OUTCOMES = tensor(1, 0, 0, 1)


def log_probs(*shape, seed):
    return normal(*shape, seed=seed).log_softmax(-1)


ARGUMENTS = {  # one well-formed call of each function
    "kl": lambda: (log_probs(2, 3, 5, seed=20), log_probs(2, 3, 5, seed=21)),
    "token_logp": lambda: (normal(2, 3, 5, seed=20), TOKENS.clone()),
    "cross_entropy": lambda: (log_probs(2, 3, 5, seed=20), log_probs(2, 3, 5, seed=21)),
    "cost_to_go": lambda: (normal(3, 3, seed=22), MASK.clone()),
    "future_advantages": lambda: (normal(3, 3, seed=22), MASK.clone(), 3, torch.tensor([1, 0, 1])),
    "sequence_weights": lambda: (torch.tensor([[1, 1, 0], [1, 0, 0]]), 4),
    "top_k_with_tail": lambda: (normal(2, 3, 5, seed=20), normal(2, 3, 5, seed=21), 2),
    "divergence": lambda: (log_probs(2, 3, 5, seed=20), log_probs(2, 3, 5, seed=21), "js"),
    "distillation_loss": lambda: (normal(2, 3, 5, seed=20), normal(2, 3, 5, seed=21), "js", 2),
    "truncated_ratio": lambda: (normal(2, 3, seed=22), normal(2, 3, seed=23), 2.0),
    "sequence_mean": lambda: (normal(3, 3, seed=22), MASK.clone(), 3),
    "group_advantages": lambda: (OUTCOMES.clone(), 2, True),
    "grpo_loss": lambda: (normal(2, 3, seed=22), normal(2, 3, seed=23), normal(2, seed=24)),
    "reshaped_advantages": lambda: (normal(2, seed=24), normal(2, 3, seed=22), normal(2, 3, seed=23), 1.0, 1.0),
    "reweighted_advantages": lambda: (normal(2, seed=24), normal(2, 3, seed=22), normal(2, 3, seed=23), 0.5, 0.2),
    "implicit_reward": lambda: (normal(3, 3, seed=22), normal(3, 3, seed=23), MASK.clone(), 0.1),
    "reward_shift": lambda: (normal(4, seed=24), OUTCOMES.clone()),
    "moving_shift": lambda: (0.3, 0.5, 0.1),
    "bco_loss": lambda: (normal(4, seed=24), OUTCOMES.clone(), tensor(0.1)[0]),
}
FUNCTIONS = [name for name, f in inspect.getmembers(L, inspect.isfunction) if f.__module__ == L.__name__]


LIVE = {  # places of the arguments that get a gradient
    "kl": (0, 1), "token_logp": (0,), "cross_entropy": (1,), "top_k_with_tail": (0,), "divergence": (0,), "distillation_loss": (0,),
    "sequence_mean": (0,), "grpo_loss": (0,), "implicit_reward": (0,), "bco_loss": (0,), "group_advantages": (0,),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_gradient_goes_to_the_student_and_to_no_teacher_advantage_or_shift(name):
    for kind in KINDS:
        arguments = [kind if isinstance(x, str) else x for x in ARGUMENTS[name]()]
        places = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.dtype == f64]
        for i in places:
            arguments[i].requires_grad_()
        found = getattr(L, name)(*arguments)
        outputs = [x for x in (found if isinstance(found, tuple) else [found]) if getattr(x, "requires_grad", False)]
        reached = gradients(sum(x.square().sum() for x in outputs), *(arguments[i] for i in places)) if outputs else ()
        assert tuple(i for i, gradient in zip(places, reached) if not untouched(gradient)) == LIVE.get(name, ())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_changes_no_input_and_needs_the_helpers_it_names(name):
    """The names come from the module, so a new function fails here until it has a line in ARGUMENTS."""
    named = re.findall("`(.*?)`", (re.findall(r"Needs\s(.*?)\.", getattr(L, name).__doc__, re.DOTALL) or [""])[0])
    copied = [inspect.getsource(getattr(L, helper)) for helper in (*named, name)]
    used = {node.id for text in copied for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert used & (set(vars(L)) - {"torch", "math", "F", "Tensor"}) - {name} == set(named)  # in branches not taken, too
    arguments = ARGUMENTS[name]()
    getattr(L, name)(*arguments)
    for one, other in zip(arguments, ARGUMENTS[name](), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


# Two rows of five tokens in float32; the second row swaps student and teacher. They have equal and opposite choices, ties, and a
# uniform student. Token log-ratios reach ±100.
ONE = [[50.0, -50, -50], [50, -50, 0], [-50, 50, 50], [50, 50, 50], [-50, -50, 50]]
OTHER = [[-50.0, 50, -50], [50, -50, 0], [50, -50, -50], [-50, 50, 50], [50, 50, -50]]
FAR_STUDENT, FAR_TEACHER = torch.tensor([ONE, OTHER]), torch.tensor([OTHER, ONE])
FAR_TOKENS = torch.tensor([[0, 0, 0, 0, 2], [0, 0, 0, 0, 2]])
FAR_MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
UP, DOWN = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


def picked(z):
    return L.token_logp(z, FAR_TOKENS)


def far_reward(z, t):
    return L.implicit_reward(picked(z), picked(t), FAR_MASK, beta=0.7)


DIFFERENTIABLE = {  # functions of the student's logits z and the frozen teacher's t, both (2, 5, 3)
    "kl, first argument": lambda z, t: L.kl(z.log_softmax(-1), t.log_softmax(-1)),
    "kl, second argument": lambda z, t: L.kl(t.log_softmax(-1), z.log_softmax(-1)),
    "cross_entropy": lambda z, t: L.cross_entropy(t.log_softmax(-1), z.log_softmax(-1)),
    "token_logp": lambda z, t: picked(z),
    "sequence_mean": lambda z, t: L.sequence_mean(picked(z), FAR_MASK, 3),
    "grpo_loss, up": lambda z, t: L.grpo_loss(picked(z), picked(t), UP - DOWN),
    "grpo_loss, down": lambda z, t: L.grpo_loss(picked(z), picked(t), DOWN - UP),
    "implicit_reward": far_reward,
    "bco_loss, right": lambda z, t: L.bco_loss(far_reward(z, t), UP, 0.1),
    "bco_loss, wrong": lambda z, t: L.bco_loss(far_reward(z, t), DOWN, 0.1),
}
for kind, k in itertools.product(KINDS, (None, 1, 2, 3)):
    DIFFERENTIABLE[f"distillation_loss {kind} top_k={k}"] = lambda z, t, kind=kind, k=k: L.distillation_loss(z, t, kind, k)


@pytest.mark.parametrize("function", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE.keys())
def test_gradients_agree_with_finite_differences_and_are_finite_at_large_logits(function):
    t = normal(2, 5, 3, seed=21)
    assert torch.autograd.gradcheck(lambda z: function(z, t), live(normal(2, 5, 3, seed=20)))
    z = live(FAR_STUDENT)
    value = function(z, FAR_TEACHER)
    assert value.dtype == torch.float32 and value.isfinite().all() and gradients(value, z)[0].isfinite().all()


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("sequence_weights", "moving_shift")])
def test_a_tensor_that_would_broadcast_is_refused_by_its_shape(name):
    """Each tensor in turn is cut to its first row. Without an assertion the call would silently return a wrong number."""
    for place, argument in enumerate(ARGUMENTS[name]()):
        if isinstance(argument, torch.Tensor) and argument.ndim:
            arguments = list(ARGUMENTS[name]())
            arguments[place] = argument[:1]
            with pytest.raises((AssertionError, ValueError), match=r"\[1\b|^1 "):
                getattr(L, name)(*arguments)


X, X1, V3 = torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(2, 3, 4)
IMPOSSIBLE = [
    (lambda: L.divergence(V3, V3, "kl"), "unknown divergence"),
    (lambda: L.top_k_with_tail(V3, V3, 0), "k = 0"),
    (lambda: L.top_k_with_tail(V3, V3, 5), "k = 5"),
    (lambda: L.group_advantages(X, 3), "rewards must be"),
    (lambda: L.group_advantages(torch.zeros(7), 4), "7 rewards do not divide into groups of 4"),
    (lambda: L.group_advantages(torch.zeros(3), 1, divide_by_std=True), "standard deviation"),
    (lambda: L.grpo_loss(X, X, torch.zeros(2, 1)), "advantages"),
    (lambda: L.reshaped_advantages(X1, X, X, 1.0, 1.0), "advantages"),
    (lambda: L.reweighted_advantages(X1, X, X, 0.5, 0.2), "advantages"),
    (lambda: L.future_advantages(COST, COST_MASK, 2), "3 rows do not divide into groups of 2"),
    (lambda: L.reward_shift(tensor(0.3, 0.4), tensor(1, 1)), "2 successes, 0 failures"),
    (lambda: L.reward_shift(tensor(0.3, 0.4), tensor(0, 0)), "0 successes, 2 failures"),
    (lambda: L.reward_shift(tensor(0.3, 0.4), tensor(0, 0.5)), "rewards must be 0 or 1"),
    (lambda: L.bco_loss(tensor(0.3, 0.4), tensor(0, 0.5), 0.0), "rewards must be 0 or 1"),
]


@pytest.mark.parametrize("call, message", IMPOSSIBLE)
def test_impossible_arguments_are_refused(call, message):
    with pytest.raises((AssertionError, ValueError), match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_taken_in_float32(dtype):
    """Half precision would lose a small tail, and the difference between two nearly equal networks."""
    torch.manual_seed(0)
    student = (8 * torch.randn(2, 3, 500)).to(dtype)
    teacher = (student.float() + 0.1 * torch.randn(2, 3, 500)).to(dtype)
    tokens = torch.randint(500, (2, 3))
    assert torch.equal(L.token_logp(student, tokens), L.token_logp(student.float(), tokens))
    for top_k, kind in itertools.product((20, None), L.DIVERGENCES):
        found = L.distillation_loss(student, teacher, kind, top_k)
        assert found.dtype == torch.float32 and (found > 0).all()
        assert torch.equal(found, L.distillation_loss(student.float(), teacher.float(), kind, top_k))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_forbidden_to_both_adds_nothing_and_its_gradient_is_finite(kind):
    z = live(logits(0.3, 0.7, 0.0))
    loss = L.distillation_loss(z, logits(0.6, 0.4, 0.0), kind)
    close(loss, L.distillation_loss(logits(0.3, 0.7), logits(0.6, 0.4), kind))
    assert gradients(loss, z)[0].isfinite().all()
