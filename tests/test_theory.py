"""The paper's theory, and the objective that each sampled loss really follows, by exact sums over every response.

Nothing is sampled: expectations run over all responses, groups or batches, in float64. Equation numbers are those of
the paper (arXiv 2605.15113v1); where its text has lost a formula, the test's docstring restores it.
"""

from itertools import product
from math import exp, log
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid, one_hot

import losses as L

f64 = torch.float64
BETAS = (0.1, 0.5, 1.0)


def tensor(*values):
    return torch.tensor(values, dtype=f64)


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def draws(*shape, seed):
    """Random distributions over the last axis, some flat and some nearly a point."""
    return (3 * normal(*shape, seed=seed)).softmax(-1)


def close(actual, expected, tol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=f64).expand_as(actual), rtol=tol, atol=tol)


def gradient(output, z):
    return torch.autograd.grad(output, z, retain_graph=True)[0]


def mean(p, x):
    return (p * x).sum(-1)


def KL(p, q):
    return L.kl(*torch.broadcast_tensors(p.log(), q.log()))


def J(pi, prior, reward, beta):
    """Eq. 1, A.1: E_π[r] − β KL(π‖prior)."""
    return mean(pi, reward) - beta * mean(pi, pi.log() - prior.log())


def tilt(prior, reward, beta):
    """A.5 and A.6, with the student as prior A.18: π*(y) = prior(y) exp(r(y)/β) / Z, and Z."""
    weight = prior * (reward / beta).exp()
    return weight / weight.sum(-1, keepdim=True), weight.sum(-1)


# ---- Appendices A and B.2, over a handful of responses ---------------------------------------------------

# The reference, some student and some teacher; which responses are right, and how often the reference is.
REF, PI, Q = tensor(0.1, 0.25, 0.3, 0.15, 0.2), tensor(0.3, 0.1, 0.2, 0.05, 0.35), tensor(0.2, 0.1, 0.1, 0.5, 0.1)
REWARD, P = tensor(1, 0, 0, 1, 0), 0.1 + 0.15


@pytest.mark.parametrize("beta", BETAS)
def test_the_tilted_reference_maximises_j_which_falls_below_beta_log_z_by_beta_times_the_kl_from_policy_to_it(beta):
    """A.6, A.9, A.10: J(π) = β log Z − β KL(π‖π*), Z = 1 − p + p exp(1/β) for a reference that is right with p."""
    (star, _), pi, ceiling = tilt(REF, REWARD, beta), draws(2000, 5, seed=1), beta * log(1 - P + P * exp(1 / beta))
    close(J(star, REF, REWARD, beta), ceiling)
    assert (J(pi, REF, REWARD, beta) < ceiling).all()
    close(J(pi, REF, REWARD, beta), ceiling - beta * KL(pi, star))
    assert (J(pi, REF, REWARD, beta) - ceiling + beta * KL(star, pi)).abs().max() > 0.1  # not the other KL


@pytest.mark.parametrize("beta", BETAS)
def test_log_z_is_the_elbo_plus_the_teachers_divergence_from_the_optimum(beta):
    """A.12, A.16, Eq. 4, Eq. 5: log Z = ELBO(q) + KL(q‖π*), ELBO(q) = log Z's Jensen bound = J_E(q)/β."""
    (star, Z), q = tilt(REF, REWARD, beta), draws(200, 5, seed=3)
    elbo = mean(q, (REF * (REWARD / beta).exp() / q).log())
    assert (elbo < mean(q, REF * (REWARD / beta).exp() / q).log()).all()  # Jensen; the right side is log Z
    close(elbo + KL(q, star), Z.log())
    close(beta * elbo, J(q, REF, REWARD, beta))


def test_the_global_divergence_splits_into_the_m_steps_and_a_rest_that_depends_on_the_student():
    """A.17: KL(π‖π*) = KL(π‖q) + E_π[log q/π*]. Appendix B.2 takes the last term for constant in π: it is not."""
    (star, _), pi = tilt(REF, REWARD, 0.5), draws(200, 5, seed=4)
    rest = mean(pi, (Q / star).log())
    close(KL(pi, star), KL(pi, Q) + rest)
    assert rest.max() - rest.min() > 0.5


@pytest.mark.parametrize("beta", BETAS)
def test_the_dynamic_target_is_the_static_one_times_the_students_ratio_and_the_e_step_splits_both_ways(beta):
    """A.19  π*_dyn = π* · (π/π_ref) · Z/Z_dyn
    A.20  KL(q‖π*_dyn) = KL(q‖π*) − E_q[log π/π_ref] + log Z_dyn/Z
    A.21  KL(q‖π*_dyn) = KL(q‖π) − E_q[r]/β + log Z_dyn
    Eq. 7 r~ of π*_dyn = r − β log Z_dyn"""
    (star, Z), (dynamic, Z_dynamic), q = tilt(REF, REWARD, beta), tilt(PI, REWARD, beta), draws(200, 5, seed=5)
    close(dynamic, star * PI / REF * Z / Z_dynamic)
    close(KL(q, dynamic), KL(q, star) - mean(q, (PI / REF).log()) + (Z_dynamic / Z).log())
    close(KL(q, dynamic), KL(q, PI) - mean(q, REWARD) / beta + Z_dynamic.log())
    implicit = L.implicit_reward(dynamic.log().view(5, 1), PI.log().view(5, 1), torch.ones(5, 1), beta)
    close(implicit, REWARD - beta * Z_dynamic.log())


def test_the_dynamic_target_has_the_highest_reward_inside_the_trust_region_that_it_touches():
    """A.22: max E_q[r] subject to KL(q‖π) ≤ ε has the solution π*_dyn at the one ε = KL(π*_dyn‖π)."""
    (dynamic, _), q = tilt(PI, REWARD, 0.5), (PI.log() + normal(5000, 5, seed=6)).softmax(-1)
    inside = KL(q, PI) <= KL(dynamic, PI)
    assert inside.sum() > 500 and (mean(q, REWARD)[inside] < mean(dynamic, REWARD)).all()
    assert (mean(q, REWARD)[~inside] > mean(dynamic, REWARD)).any()  # the region is what stops them


@pytest.mark.parametrize("shift", [-0.7, 0.0, 0.4])
def test_bco_loss_bounds_the_paired_loss_from_above_and_the_midpoint_makes_the_bound_tightest(shift):
    """Eq. 8: −log σ(w − l) ≤ −log σ(w − δ) − log σ(−(l − δ)), from σ(u + v) ≥ σ(u) σ(v); Eq. 9's δ narrows the gap."""
    wins, losses, outcome = 2 * normal(6, seed=7), 2 * normal(4, seed=8), tensor(1, 0)
    paired = -logsigmoid(wins.unsqueeze(1) - losses).mean()
    assert L.bco_loss(torch.cat([wins, losses]), torch.arange(10) < 6, shift) > paired
    for pair in torch.cartesian_prod(wins, losses):
        u, v = pair[0] - shift, shift - pair[1]
        gap = (1 + ((-u).exp() + (-v).exp()) / (1 + (-u - v).exp())).log()
        close(L.bco_loss(pair, outcome, shift), gap - logsigmoid(u + v))
        assert L.bco_loss(pair, outcome, L.reward_shift(pair, outcome)) <= L.bco_loss(pair, outcome, shift)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_exact_steps_with_the_dynamic_prior_raise_the_reward_always_and_j_only_once(beta):
    """Eq. 5 and 10 over all distributions, π_{k+1} = q = π*_dyn: E[r] and E[r] − β KL(·‖π_k) never fall. J of Eq. 1
    does: π_k ∝ π_ref exp(k r/β), and J peaks at k = 1. First counterexample to Proposition 1."""
    pi, values = REF, [J(REF, REF, REWARD, beta)]
    for k in range(1, 40):
        new, Z = tilt(pi, REWARD, beta)
        assert mean(new, REWARD) >= mean(pi, REWARD) + (1e-6 if k < 8 else -1e-12)
        assert J(new, pi, REWARD, beta) >= J(pi, pi, REWARD, beta) + (1e-6 if k < 8 else -1e-12)
        close(J(new, pi, REWARD, beta), beta * Z.log())
        close(new, tilt(REF, k * REWARD, beta)[0])
        values.append(J(new, REF, REWARD, beta))
        pi = new
    close(values[1], beta * log(1 - P + P * exp(1 / beta)))
    assert values[1] > values[0] + 0.01 and all(values[k + 1] < values[k] - 1e-6 for k in range(1, 8))
    close(values[-1], 1 + beta * log(P))  # successes alone: E[r] = 1 and KL(π‖π_ref) = log 1/p
    assert (values[-1] < values[0]) == (beta == 1.0)  # may end below the start


def test_exact_steps_with_the_fixed_prior_reach_the_ceiling_at_once_and_stay():
    """A.10, and Proposition 1 where it holds: descent on KL(q‖π*), then on KL(π‖q), from anywhere: J = β log Z."""

    def nearest(z, target):
        for _ in range(300):
            z = (z - 4 * gradient(KL(z.softmax(-1), target).sum(), z)).detach().requires_grad_()
        return z

    teacher, student = (normal(20, 5, seed=seed).requires_grad_() for seed in (2, 9))
    for _ in range(2):
        teacher = nearest(teacher, tilt(REF, REWARD, 0.5)[0])
        student = nearest(student, teacher.softmax(-1).detach())
        close(J(student.softmax(-1), REF, REWARD, 0.5), 0.5 * log(1 - P + P * exp(2)), tol=1e-9)


def test_j_falls_in_restricted_families_though_both_steps_are_globally_optimal():
    """Second counterexample to Proposition 1, from π_ref, where both priors agree. Only the first response is right.
    The teacher moves mass between the third and the first two, the student between the second and the others: the
    teacher raises the first and, tied to it, the second, and the student can follow in the second alone."""
    ref, reward, beta, grid = tensor(0.2, 0.3, 0.5), tensor(1, 0, 0), 0.5, torch.arange(1, 10_000, dtype=f64) / 10_000
    teachers = torch.stack([0.4 * grid, 0.6 * grid, 1 - grid], -1)
    students = torch.stack([2 / 7 * (1 - grid), grid, 5 / 7 * (1 - grid)], -1)
    star, _ = tilt(ref, reward, beta)
    q = teachers[KL(teachers, star).argmin()]  # the E-step's global minimum
    pi = students[KL(students, q).argmin()]  # the M-step's
    b, odds = 1 / (1 + exp(-0.4 / beta)), 3 / 7 * exp(5 / 7 * 0.4 / beta)  # the two minima in closed form
    close(q, [0.4 * b, 0.6 * b, 1 - b], tol=1e-4)
    close(pi, [2 / 7 / (1 + odds), odds / (1 + odds), 5 / 7 / (1 + odds)], tol=1e-4)
    assert KL(q, star) < KL(ref, star) - 0.07 and KL(pi, q) < KL(ref, q) - 0.03
    close(torch.stack([J(x, ref, reward, beta) for x in (ref, q, pi)]), [0.2, 0.2390, 0.1432], tol=1e-4)


def test_an_m_step_lowers_j_by_at_most_twice_beta_times_the_teachers_largest_log_error():
    """What is left of Proposition 1 by A.9 and A.17: KL(π'‖q) ≤ KL(π‖q) gives J(π') ≥ J(π) − 2β max|log q/π*|."""
    beta = 0.5
    ref, old, new, q = (draws(40_000, 3, seed=seed) for seed in (10, 11, 12, 13))
    reward = (normal(40_000, 3, seed=14) > 0).to(f64)
    error, lowered = (q / tilt(ref, reward, beta)[0]).log(), KL(new, q) <= KL(old, q)
    change = (J(new, ref, reward, beta) - J(old, ref, reward, beta))[lowered]
    largest = beta * error.abs().amax(-1)[lowered]
    assert len(change) > 10_000 and (change < 0).sum() > 1000
    assert (change >= -2 * largest).all() and (change < -largest).any()  # the factor 2 cannot be left out


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_descent_on_bco_loss_runs_past_the_e_steps_optimum_to_a_teacher_that_never_fails(beta):
    """Eq. 9 at a fixed δ is a classifier's loss. Its infimum log(1 + e^δ p^β) is at q(failure) = 0, not at π*_dyn."""
    shift, z, failure = 0.1, REF.log().requires_grad_(), []
    rows = torch.arange(5).repeat_interleave(torch.tensor([2, 5, 6, 3, 4]))  # 20 rows hold each response as REF does

    def loss(log_q):
        implicit = L.implicit_reward(log_q[rows, None], REF.log()[rows, None], torch.ones(20, 1), beta)
        return L.bco_loss(implicit, REWARD[rows], shift)

    for _ in range(500):
        failure.append(mean(z.softmax(-1), 1 - REWARD).item())
        z = (z - 5 / beta * gradient(loss(z.log_softmax(-1)), z)).detach().requires_grad_()
    q, (star, Z), infimum = z.softmax(-1), tilt(REF, REWARD, beta), log(1 + exp(shift) * P**beta)
    assert infimum < loss(q.log()) < infimum + 0.01 and all(loss(x.log()) > infimum for x in draws(200, 5, seed=15))
    assert all(failure[n + 50] < failure[n] for n in range(0, 450, 50))
    assert failure[-1] < 1e-5 < 0.1 * mean(star, 1 - REWARD)
    assert J(q, REF, REWARD, beta) < beta * Z.log() - 1e-6  # too far by the measure of Eq. 5


# ---- What the sampled losses follow, over trees of token sequences ---------------------------------------


def tree(vocab, max_tokens, eos, rewards):
    """Every response: its tokens, the number of the prefix each stands on, the mask, (N, T) each, and its reward."""
    alive = [token for token in range(vocab) if token != eos]
    prefixes = [prefix for n in range(max_tokens) for prefix in product(alive, repeat=n)]
    rows = [(*p, token) for p in prefixes for token in range(vocab) if token == eos or len(p) == max_tokens - 1]
    mask = torch.arange(max_tokens) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    tokens, states = torch.zeros(2, *mask.shape, dtype=torch.int64)
    tokens[mask] = torch.tensor([token for row in rows for token in row])
    states[mask] = torch.tensor([prefixes.index(row[:t]) for row in rows for t in range(len(row))])
    z, teacher = normal(len(prefixes), vocab, seed=20).requires_grad_(), normal(len(prefixes), vocab, seed=21)
    logp, teacher_logp = (L.token_logp(logits[states], tokens) for logits in (z, teacher))
    log_pi, log_q = (logp * mask).sum(1), (teacher_logp * mask).sum(1)
    # d log π(y_t|y_<t) / dz = 1[s = s_t] (1[a = y_t] − π(a|s_t)), (N, T, S, V)
    here, gap = one_hot(states, len(z)) * mask.unsqueeze(-1), one_hot(tokens, vocab) - z.detach().softmax(-1)[states]
    score = torch.einsum("nts,ntv->ntsv", here.to(f64), gap)
    length, reward, pi = mask.sum(1), tensor(*rewards), log_pi.exp().detach()
    return SimpleNamespace(**locals())


EQUAL = tree(3, 2, None, [0, 1, 0, 0, 0, 1, 1, 0, 0])  # nine responses of two tokens
UNEQUAL = tree(3, 3, 2, [0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1])  # fifteen of one to three, eight without EOS


def average(per_token, mask, weights):
    """The expectation of `sequence_mean` over rows that occur with these probabilities."""
    return L.sequence_mean(weights.unsqueeze(1) * per_token, mask, 1)


@pytest.mark.parametrize("kind", L.DIVERGENCES)
@pytest.mark.parametrize("token_mean", [False, True])
def test_distillation_loss_follows_the_divergence_at_the_visited_prefixes_with_the_visits_frozen(kind, token_mean):
    """Eq. 10 and Eq. 2: Σ_s w(s) ∇D(π(·|s), q(·|s)), w(s) the sum over responses through s of π(y), or of π(y)/|y|."""
    x = UNEQUAL
    per_token = L.distillation_loss(x.z[x.states], x.teacher[x.states], kind)
    loss = average(per_token, x.mask, x.pi if token_mean else x.pi * x.length)
    share = (x.pi / x.length if token_mean else x.pi).unsqueeze(1) * x.mask
    visits = torch.stack([share[x.states == s].sum() for s in range(len(x.z))]).unsqueeze(1)
    S, T = x.z.detach().softmax(-1), x.teacher.softmax(-1)
    log_ratio, log_mixed = (S / T).log(), (S / (0.5 * S + 0.5 * T)).log()
    by_hand = {
        "kl_student_teacher": S * (log_ratio - mean(S, log_ratio).unsqueeze(1)),
        "kl_teacher_student": S - T,
        "js": 0.5 * S * (log_mixed - mean(S, log_mixed).unsqueeze(1)),
    }
    close(gradient(loss, x.z), visits * by_hand[kind])


def test_the_m_step_follows_the_gradient_of_the_sequence_kl_without_its_score_function_term():
    """Eq. 10 has the value of KL(π‖q) over sequences, not its gradient. What it lacks is a token's effect on the
    divergences met after it: E_π Σ_t ∇log π(y_t|y_<t) Σ_{i>t} KL_i."""
    x = UNEQUAL
    sequence_kl = L.kl(x.log_pi, x.log_q)
    per_token = L.distillation_loss(x.z[x.states], x.teacher[x.states], "kl_student_teacher") * x.mask
    m_step, cost = mean(x.pi, per_token.sum(1)), per_token.detach()
    close(m_step, sequence_kl.detach())
    later = cost.sum(1, keepdim=True) - cost.cumsum(1)
    missing = torch.einsum("n,nt,ntsv->sv", x.pi, later, x.score)
    close(gradient(m_step, x.z) + missing, gradient(sequence_kl, x.z))
    assert missing.norm() > 0.2 * gradient(sequence_kl, x.z).norm()


def grpo_gradient(logp, mask, reward, group_size, z):
    """The gradient of one group's GRPO loss, averaged over every group that can be drawn. logp: (N, T), live in z."""
    pi = (logp * mask).sum(1).exp().detach()
    groups = torch.cartesian_prod(*[torch.arange(len(logp))] * group_size)  # (N^G, G)
    weights, rows = pi[groups].prod(1).repeat_interleave(group_size), groups.flatten()
    per_token = L.grpo_loss(logp[rows], logp[rows].detach(), L.group_advantages(reward[rows], group_size))
    return gradient(average(per_token, mask[rows], weights / group_size), z)


@pytest.mark.parametrize("group_size", [2, 3])
def test_grpo_follows_g_minus_1_over_g_of_the_policy_gradient_at_equal_lengths_and_has_a_length_bias_else(group_size):
    """The row's own reward in its baseline costs 1/G. The token mean weighs an advantage by 1/|y|: what is followed is
    (1 − 1/G) E[(r − E r)/|y| ∇log π(y)], at unequal lengths no multiple of ∇E[r]."""
    for x in (EQUAL, UNEQUAL):
        followed = grpo_gradient(x.logp, x.mask, x.reward, group_size, x.z)
        exact = gradient(mean(x.log_pi.exp(), x.reward), x.z)
        weight = x.pi * (x.reward - mean(x.pi, x.reward)) / x.length
        close(followed, -(1 - 1 / group_size) * torch.einsum("n,ntsv->sv", weight, x.score))
        if x is EQUAL:
            close(followed, -(1 - 1 / group_size) * exact / 2)  # each row has 2 tokens
        else:
            assert torch.cosine_similarity(followed.flatten(), -exact.flatten(), dim=0) < 0.97


def test_length_bias_can_lower_the_probability_of_a_right_answer_because_it_is_long():
    """GRPO by value: one choice between a short right, a long right and a long wrong answer of 1, 3 and 3 tokens."""
    z = tensor(0.6, 0.2, 0.2).log().requires_grad_()
    choice, certain, mask = z.log_softmax(-1), torch.zeros(3), torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 1]])
    followed = grpo_gradient(torch.stack([choice, certain, certain], 1), mask, tensor(1, 1, 0), 2, z)
    close(gradient(choice[:2].exp().sum(), z), [0.6 * (1 - 0.8), 0.2 * (1 - 0.8), 0.2 * (0 - 0.8)])  # E[r] = 0.8
    bias = 0.6 * 0.2 / 1 + 0.2 * 0.2 / 3 - 0.2 * 0.8 / 3  # E[(r − E r)/|y|] = 0.08, which is 0 at equal lengths
    ascent = [0.6 * (0.2 / 1 - bias), 0.2 * (0.2 / 3 - bias), 0.2 * (-0.8 / 3 - bias)]
    close(followed, [-step / 2 for step in ascent])
    assert ascent[1] < -0.002  # E[r] rises with this logit, and the update lowers it


def test_reshape_and_joint_follow_one_gradient_at_equal_lengths_and_two_at_unequal_ones():
    """B.23 and B.24 at ratio 1 with KL(π‖q) over all tokens: E_a[(log q − log π) ∇log π] = −∇KL(π‖q) at each prefix."""
    for x in (EQUAL, UNEQUAL):
        A = x.reward - mean(x.pi, x.reward)
        reshape = L.grpo_loss(x.logp, x.logp, L.reshaped_advantages(A, x.teacher_logp, x.logp, w_rl=0.7, w_opd=0.4))
        distilled = L.distillation_loss(x.z[x.states], x.teacher[x.states], "kl_student_teacher")
        joint = 0.7 * L.grpo_loss(x.logp, x.logp, A) + 0.4 * distilled
        gap = gradient(average(reshape - joint, x.mask, x.pi), x.z).abs().max()
        assert gap < 1e-12 if x is EQUAL else gap > 0.02


@pytest.mark.parametrize("one_class_too", [False, True])
def test_bco_loss_at_a_fixed_shift_follows_the_enumerated_classifiers_loss_with_class_weights(one_class_too):
    """Eq. 9 over every batch of 3: Σ_y c ∇log q(y), c = −β π(y)/p σ(δ − r~) on successes, β π(y)/(1 − p) σ(r~ − δ) on
    failures, exact over batches of both. Counting the others, a class loses those without it, (1 − p)³ or p³."""
    x, beta, shift, total, weight = EQUAL, 0.5, 0.2, 0.0, 0.0
    implicit = L.implicit_reward(x.logp, x.teacher_logp, x.mask, beta)  # here z is the E-step's teacher: it is live
    sampler, p = x.log_q.exp(), mean(x.log_q.exp(), x.reward)
    for rows in torch.cartesian_prod(*[torch.arange(9)] * 3):
        if one_class_too or 0 < x.reward[rows].sum() < 3:
            total = total + sampler[rows].prod() * L.bco_loss(implicit[rows], x.reward[rows], shift)
            weight += sampler[rows].prod()
    success, failure = (1 - (1 - p) ** 3, 1 - p**3) if one_class_too else (1.0, 1.0)
    sigma = torch.sigmoid(implicit.detach() - shift)
    c = beta * sampler * torch.where(x.reward == 1, -success / p * (1 - sigma), failure / (1 - p) * sigma)
    close(gradient(total / weight, x.z), torch.einsum("n,ntsv->sv", c, x.score))


@pytest.mark.parametrize("kind", L.DIVERGENCES)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_divergence_with_a_tail_is_a_lower_bound_that_is_met_when_the_tokens_outside_are_proportional(kind, k):
    """Eq. 2 and 10 with top_k, by the data processing inequality: pooled tokens lose what their ratios differ in."""
    student, teacher = normal(1, 500, 6, seed=30), normal(1, 500, 6, seed=31)
    assert (L.distillation_loss(student, teacher, kind, k) < L.distillation_loss(student, teacher, kind)).all()
    top = student.topk(k).indices
    teacher = (student - 0.7).scatter(-1, top, teacher.gather(-1, top))
    close(L.distillation_loss(student, teacher, kind, k), L.distillation_loss(student, teacher, kind))
