"""The paper's theory, and the gradient that each sampled loss follows in expectation, by exact sums over all responses.

Nothing is sampled: expectations run over all responses or groups, in float64. Equation numbers are those of the paper (arXiv
2605.15113v1).
"""

from itertools import product
from math import exp, log
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid, one_hot

import losses as L
from test_losses import f64, normal, tensor

BETAS = (0.1, 0.5, 1.0)


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
    """A.5 and A.6, or with the student as prior A.18: π*(y) = prior(y) exp(r(y)/β) / Z, and Z."""
    weight = prior * (reward / beta).exp()
    return weight / weight.sum(-1, keepdim=True), weight.sum(-1)


# ---- Appendices A and B.2, over a handful of responses ---------------------------------------------------

# The reference, a student and a teacher; which responses are right, and how often the reference is.
REF, PI, Q = tensor(0.1, 0.25, 0.3, 0.15, 0.2), tensor(0.3, 0.1, 0.2, 0.05, 0.35), tensor(0.2, 0.1, 0.1, 0.5, 0.1)
REWARD, P = tensor(1, 0, 0, 1, 0), 0.1 + 0.15


@pytest.mark.parametrize("beta", BETAS)
def test_j_and_the_elbo_fall_below_log_z_by_the_divergence_from_the_tilted_reference(beta):
    """A.6, A.9, A.10: J(π) = β log Z − β KL(π‖π*), Z = 1 − p + p exp(1/β) for a reference that is right with p.
    A.12, A.16, Eq. 4, Eq. 5: log Z = ELBO(q) + KL(q‖π*), ELBO(q) = J_E(q)/β.
    A.17: KL(π‖π*) = KL(π‖q) + E_π[log q/π*]. Appendix B.2 treats the last term as constant in π, which it is not."""
    (star, Z), pi, ceiling = tilt(REF, REWARD, beta), draws(2000, 5, seed=1), beta * log(1 - P + P * exp(1 / beta))
    close(J(star, REF, REWARD, beta), ceiling)
    close(J(pi, REF, REWARD, beta), ceiling - beta * KL(pi, star))
    assert (J(pi, REF, REWARD, beta) - ceiling + beta * KL(star, pi)).abs().max() > 0.1  # not the other KL
    elbo = mean(pi, (REF * (REWARD / beta).exp() / pi).log())
    close(elbo + KL(pi, star), Z.log())
    close(beta * elbo, J(pi, REF, REWARD, beta))
    rest = mean(pi, (Q / star).log())
    close(KL(pi, star), KL(pi, Q) + rest)
    assert rest.max() - rest.min() > 0.5


@pytest.mark.parametrize("beta", BETAS)
def test_the_dynamic_target_is_the_static_one_times_the_students_ratio(beta):
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


@pytest.mark.parametrize("shift", [-0.7, 0.0, 0.4])
def test_bco_loss_bounds_the_paired_loss_most_tightly_at_the_midpoint(shift):
    """Eq. 8: −log σ(w − l) ≤ −log σ(w − δ) − log σ(−(l − δ)), from σ(u + v) ≥ σ(u) σ(v). Eq. 9's δ narrows the gap."""
    outcome = tensor(1, 0)
    for pair in 2 * normal(20, 2, seed=7):
        bound = L.bco_loss(pair, outcome, shift)
        assert -logsigmoid(pair[0] - pair[1]) < L.bco_loss(pair, outcome, L.reward_shift(pair, outcome)) <= bound


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_exact_steps_with_the_dynamic_prior_always_raise_the_reward_but_j_only_once(beta):
    """Eq. 5 and 10 over all distributions, π_{k+1} = q = π*_dyn: E[r] and E[r] − β KL(·‖π_k) never fall, but J of Eq. 1
    does: π_k ∝ π_ref exp(k r/β), and J peaks at k = 1. A counterexample to Proposition 1."""
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
    close(values[-1], 1 + beta * log(P))  # successes only: E[r] = 1 and KL(π‖π_ref) = log 1/p
    assert (values[-1] < values[0]) == (beta == 1.0)  # J may end below its start


def test_exact_steps_with_the_fixed_prior_reach_the_ceiling_at_once_and_stay():
    """A.10, and the case in which Proposition 1 holds: descent on KL(q‖π*), then on KL(π‖q), from anywhere gives J = β log Z."""

    def nearest(z, target):
        for _ in range(300):
            z = (z - 4 * gradient(KL(z.softmax(-1), target).sum(), z)).detach().requires_grad_()
        return z

    teacher, student = (normal(20, 5, seed=seed).requires_grad_() for seed in (2, 9))
    for _ in range(2):
        teacher = nearest(teacher, tilt(REF, REWARD, 0.5)[0])
        student = nearest(student, teacher.softmax(-1).detach())
        close(J(student.softmax(-1), REF, REWARD, 0.5), 0.5 * log(1 - P + P * exp(2)), tol=1e-9)


def test_an_m_step_lowers_j_by_at_most_2_beta_times_the_teachers_log_error():
    """What remains of Proposition 1, by A.9 and A.17: if KL(π'‖q) ≤ KL(π‖q), then J(π') ≥ J(π) − 2β max|log q/π*|."""
    beta = 0.5
    ref, old, new, q = (draws(40_000, 3, seed=seed) for seed in (10, 11, 12, 13))
    reward = (normal(40_000, 3, seed=14) > 0).to(f64)
    error, lowered = (q / tilt(ref, reward, beta)[0]).log(), KL(new, q) <= KL(old, q)
    change = (J(new, ref, reward, beta) - J(old, ref, reward, beta))[lowered]
    largest = beta * error.abs().amax(-1)[lowered]
    assert len(change) > 10_000 and (change < 0).sum() > 1000
    assert (change >= -2 * largest).all() and (change < -largest).any()  # the factor 2 cannot be left out


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_descent_on_bco_loss_runs_past_the_e_steps_optimum(beta):
    """Eq. 9 at a fixed δ is a classifier's loss. Its infimum, log(1 + e^δ p^β), is at q(failure) = 0, not at π*_dyn."""
    shift, z, failure = 0.1, REF.log().requires_grad_(), []
    rows = torch.arange(5).repeat_interleave(torch.tensor([2, 5, 6, 3, 4]))  # 20 rows with the frequencies of REF

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
    assert J(q, REF, REWARD, beta) < beta * Z.log() - 1e-6  # too far by Eq. 5


# ---- What the sampled losses follow, over trees of token sequences ---------------------------------------


def tree(vocab, max_tokens, eos, rewards):
    """All responses: their tokens, the index of the prefix before each token, the mask, (N, T) each, and the rewards."""
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
SHORT = tree(3, 2, 2, [0] * 7)  # seven of one or two tokens
UNEQUAL = tree(3, 3, 2, [0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1])  # fifteen of one to three, eight without EOS


def average(per_token, mask, weights):
    """The expectation of `sequence_mean` over rows that occur with these probabilities."""
    return L.sequence_mean(weights.unsqueeze(1) * per_token, mask, 1)


def groups(pi, group_size):
    """All groups that can be drawn, one after the other: the rows, and the weight of each row in the expected mean."""
    drawn = torch.cartesian_prod(*[torch.arange(len(pi))] * group_size).view(-1, group_size)  # (N^G, G)
    return drawn.flatten(), pi[drawn].prod(1).repeat_interleave(group_size) / group_size


def test_the_m_step_follows_the_sequence_kl_without_its_score_function_term():
    """Eq. 10 has the value of KL(π‖q) over sequences, but not its gradient. It lacks the effect of a token on the divergences
    after it: E_π Σ_t ∇log π(y_t|y_<t) Σ_{i>t} KL_i."""
    x = UNEQUAL
    sequence_kl = L.kl(x.log_pi, x.log_q)
    per_token = L.distillation_loss(x.z[x.states], x.teacher[x.states], "kl_student_teacher") * x.mask
    m_step, cost = mean(x.pi, per_token.sum(1)), per_token.detach()
    close(m_step, sequence_kl.detach())
    later = cost.sum(1, keepdim=True) - cost.cumsum(1)
    missing = torch.einsum("n,nt,ntsv->sv", x.pi, later, x.score)
    close(gradient(m_step, x.z) + missing, gradient(sequence_kl, x.z))
    assert missing.norm() > 0.2 * gradient(sequence_kl, x.z).norm()


@pytest.mark.parametrize("group_size", [2, 3])
def test_grpo_follows_g_minus_1_over_g_of_the_policy_gradient_at_equal_lengths(group_size):
    """The row's own reward in its baseline costs 1/G, and the mean over tokens weights an advantage by 1/|y|. The loss follows
    (1 − 1/G) E[(r − E r)/|y| ∇log π(y)], which at unequal lengths is no multiple of ∇E[r]."""
    for x in (EQUAL, UNEQUAL):
        rows, weights = groups(x.pi, group_size)
        per_token = L.grpo_loss(x.logp[rows], x.logp[rows].detach(), L.group_advantages(x.reward[rows], group_size))
        followed = gradient(average(per_token, x.mask[rows], weights), x.z)
        exact = gradient(mean(x.log_pi.exp(), x.reward), x.z)
        weight = x.pi * (x.reward - mean(x.pi, x.reward)) / x.length
        close(followed, -(1 - 1 / group_size) * torch.einsum("n,ntsv->sv", weight, x.score))
        if x is EQUAL:
            close(followed, -(1 - 1 / group_size) * exact / 2)  # each row has 2 tokens
        else:
            assert torch.cosine_similarity(followed.flatten(), -exact.flatten(), dim=0) < 0.97


# ---- DistIL (arXiv 2606.05152): a cross-entropy whose visits are not frozen ------------------------------
#
# L = E_{y~π} Σ_t CE_t,  CE_t = H(sg T(·|s_t, C), π(·|s_t)).  With advantages A_t = −(c_t − b_t), c_t = Σ_{i>t} CE_i,
#     distil_norm=constant   row loss = (1/L) Σ_t (CE_t + PG_t(A_t)), L a constant (here 1)
#     distil_norm=length     row loss = mean_t (CE_t + PG_t(A_t / |y|))
# A group of one has no baseline. That b_t divides by G − 1, that a row that has ended counts as 0 in it, and that i > t is strict
# does not change the expectations here; tests/test_losses.py checks it by value.


def disagreement(x, teacher):
    """CE_t at each token of each response, (N, T), with a gradient in z. teacher: logits, (N, T, V)."""
    return L.cross_entropy(teacher.log_softmax(-1), x.z[x.states].log_softmax(-1))


def exact_gradient(x, cost):
    """∇ Σ_y π(y) Σ_t CE_t(y), where both factors depend on z; the teacher and its context are constants."""
    return gradient(mean(x.log_pi.exp(), (cost * x.mask).sum(1)), x.z)


def followed(x, cost, advantages, rows, weights):
    """The gradient of row losses Σ_t (CE_t + PG_t(A_t)), ratio 1, averaged over rows that occur with these weights."""
    per_token = cost + L.grpo_loss(x.logp[rows], x.logp[rows].detach(), advantages)
    return gradient(average(per_token, x.mask[rows], weights * x.length[rows]), x.z)


def off(followed, exact):
    return ((followed - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("group_size", [2, 3])
def test_distil_with_the_constant_norm_follows_the_exact_gradient(group_size, baseline):
    """∇L = E[Σ_t ∇CE_t + Σ_t ∇log π(y_t|s_t) Σ_{i>t} CE_i]. b_t depends on the other rows only, and E[∇log π(y_t|s_t)] = 0.
    The local term by itself is off by 18 percent of the norm (equal lengths) and 32. If the teacher is the student, CE_t = H(T),
    the local term is 0 and each token is charged with the teacher's entropy after it: the student still moves, and if lengths
    differ it moves to shorter responses."""
    for x, local_off in ((EQUAL, 0.18), (UNEQUAL, 0.32)):
        rows, weights = groups(x.pi, group_size)
        for teacher in (x.teacher, x.z):
            cost = disagreement(x, teacher[x.states])
            A = L.future_advantages(cost[rows], x.mask[rows], group_size if baseline else 1)
            exact = exact_gradient(x, cost)
            close(followed(x, cost[rows], A, rows, weights), exact)
            local = followed(x, cost[rows], torch.zeros_like(A), rows, weights)
            assert off(local, exact) == pytest.approx(local_off if teacher is x.teacher else 1, abs=0.01)
    longer = gradient(mean(x.log_pi.exp(), x.length.to(f64)), x.z)
    assert torch.cosine_similarity(exact.flatten(), longer.flatten(), dim=0) > 0.99  # a step goes against both


@pytest.mark.parametrize("x, group_size", [(SHORT, 1), (SHORT, 2), (UNEQUAL, 1)])
def test_a_black_box_that_gives_one_token_per_position_keeps_the_gradient_exact(x, group_size):
    """−log π(a_t|s_t) with a_t ~ T(·|s_t) replaces CE_t in the local term and in the future costs. No cost is multiplied by
    another, so the expectations are those of CE. Every response occurs with every draw at its positions."""
    draws_of = [list(product(range(x.vocab), repeat=length)) for length in x.length.tolist()]
    row = torch.tensor([n for n, draws in enumerate(draws_of) for _ in draws])
    taken = torch.tensor([(*draw, *[0] * (x.tokens.shape[1] - len(draw))) for draws in draws_of for draw in draws])
    chance = L.token_logp(x.teacher[x.states[row]], taken).masked_fill(~x.mask[row], 0.0).sum(1).exp()
    rows, weights = groups(x.pi[row] * chance, group_size)
    told = SimpleNamespace(z=x.z, logp=x.logp[row], mask=x.mask[row], length=x.length[row])
    cost = -L.token_logp(x.z[x.states[row]], taken)[rows]
    A = L.future_advantages(cost, told.mask[rows], group_size)
    close(followed(told, cost, A, rows, weights), exact_gradient(x, disagreement(x, x.teacher[x.states])))


def test_the_length_norm_weighs_the_future_by_1_over_the_length():
    """mean_t (CE_t + PG_t(A_t/|y|)) divides the local term by |y| and the future by |y|². If every |y| is T it follows
    (local + future/T)/T, which is no multiple of ∇L. At unequal lengths 1/|y| is also a weight that depends on y."""
    x, cost = EQUAL, disagreement(EQUAL, EQUAL.teacher[EQUAL.states])
    local, exact = gradient(mean(x.pi, cost.sum(1)), x.z), exact_gradient(x, cost)
    for group_size in (1, 2):
        rows, weights = groups(x.pi, group_size)
        A = L.future_advantages(cost[rows], x.mask[rows], group_size) / x.length[rows].unsqueeze(1)
        close(followed(x, cost[rows], A, rows, weights / x.length[rows]), (local + (exact - local) / 2) / 2)


@pytest.mark.parametrize("told, share", [("failures", 0.071), ("both", 0.33)])
def test_feedback_on_the_response_itself_makes_past_disagreement_count(told, share):
    """C = C(y): if told of failures, T lowers the logits of a wrong y's own tokens by 2; if told of both outcomes, it also raises
    those of a right y. Then CE_i for i ≤ t also depends on y_t, through C, and the exact gradient charges a token with the whole
    Σ_i CE_i. The strict cost to go lacks E Σ_t ∇log π(y_t|s_t) Σ_{i≤t} CE_i: 7 percent (failures), 33 (both)."""
    x, rows = UNEQUAL, torch.arange(len(UNEQUAL.pi))
    sign = 2 * x.reward - 1 if told == "both" else x.reward - 1
    cost = disagreement(x, x.teacher[x.states] + 2 * sign.view(-1, 1, 1) * one_hot(x.tokens, 3))
    whole = (cost.detach() * x.mask).sum(1, keepdim=True).expand_as(cost)
    exact, strict = exact_gradient(x, cost), followed(x, cost, -L.cost_to_go(cost, x.mask), rows, x.pi)
    close(followed(x, cost, -whole, rows, x.pi), exact)
    assert off(strict, exact) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("only_successes, shares", [(False, (0.020, 0.144)), (True, (0.149, 0.841))])
def test_a_sibling_as_context_is_exact_if_its_distribution_is_frozen(only_successes, shares):
    """Each row of a pair is the other's context: T raises the logits along y' by 1. If only right siblings are shown, a row without
    one is not counted. Without a baseline the strict estimate is exact for contexts with a frozen distribution,
    ∇E_{y'~sg π} E_{y~π} Σ_t CE_t(y, y'), since y' is independent of y. Two things are wrong. First, the baseline of y' contains the
    cost of y, which depends on y' (2 percent; 15 for right siblings). Second, the whole gradient also has
    E[∇log π(y') Σ_t CE_t(y, y')], from y' as a context (14 percent; 84)."""
    x, N = UNEQUAL, len(UNEQUAL.pi)
    along = torch.stack([(one_hot(x.states[n], len(x.z)) * x.mask[n].unsqueeze(-1)).T @ one_hot(x.tokens[n], 3) for n in range(N)])
    cost = torch.stack([disagreement(x, (x.teacher + path)[x.states]) for path in along])  # (N of y', N of y, T)
    told = x.reward if only_successes else torch.ones(N, dtype=f64)
    total, pi = (cost * x.mask).sum(2) * told.unsqueeze(1), x.log_pi.exp()
    frozen, exact = (gradient((law.unsqueeze(1) * pi * total).sum(), x.z) for law in (x.pi, pi))

    rows, weights = groups(x.pi, 2)
    before = rows.view(-1, 2).flip(1).flatten()
    cost, counted = cost[before, rows], told[before]
    alone, others = (L.future_advantages(cost, x.mask[rows], n, counted) for n in (1, 2))
    without, with_baseline = (followed(x, cost, A, rows, weights * counted) for A in (alone, others))
    close(without, frozen)
    assert (off(with_baseline, frozen), off(frozen, exact)) == pytest.approx(shares, abs=0.005)


# ---- OVD (arXiv 2601.21968, first version): responses that the teacher wrote ------------------------------


def imitated(x, A, ratio, limits=(1.0, 1e9, 1e9)):
    """The gradient of OVD's objective (minus that of the loss Σ_t PG_t(A)) on demonstrations y ~ q. A: (N,). ratio: teacher or one,
    as in --ovd_ratio. limits: clips of the ratio, by default so wide that nothing is clipped."""
    before = x.teacher_logp if ratio == "teacher" else x.logp.detach()
    return -gradient(average(L.grpo_loss(x.logp, before, A, *limits), x.mask, x.log_q.exp() * x.length), x.z)


@pytest.mark.parametrize("x", [tree(5, 1, None, [1, 0, 0, 1, 0]), EQUAL, UNEQUAL], ids=["one token", "equal", "unequal"])
def test_demonstrations_give_a_gradient_with_the_teachers_prefixes_and_continuations(x):
    """E_q[Σ_t ρ_t A ∇log π(y_t|s_t)] = Σ_t E_{s_t~q} Σ_a π(a|s_t) ∇log π(a|s_t) Q(s_t, a), Q being the mean A if q continues: the
    student chooses a token, prefixes and continuations are the teacher's, and a constant in A adds nothing. With one token that is
    the policy gradient E_π[A ∇log π(y)]; with more, only the product of all ratios would give it. With ratio one it is imitation
    weighted by the advantage, E_q[A ∇log π(y)], to which a constant c adds c E_q[∇log π]."""
    A, q, z = x.reward - 0.4, x.log_q.exp(), x.z.detach()
    exact, by_hand = gradient(mean(x.log_pi.exp(), A), x.z), torch.zeros_like(z)
    for s in range(len(z)):
        here = ((x.states == s) & x.mask).any(1)  # responses that pass s, each of them once
        taken = (x.tokens * ((x.states == s) & x.mask)).sum(1)
        for a, p in enumerate(z[s].softmax(-1)):
            after = q * here * (taken == a)
            Q = mean(after, A) / after.sum()
            by_hand[s] += (q * here).sum() * p * Q * (one_hot(torch.tensor(a), x.vocab) - z[s].softmax(-1))
    close(imitated(x, A, "teacher"), by_hand)
    close(imitated(x, x.reward, "teacher"), by_hand)
    close(imitated(x, A, "one"), gradient(mean(q, A * x.log_pi), x.z))
    close(imitated(x, A * (x.log_pi.detach() - x.log_q).exp(), "one"), exact)
    assert (off(by_hand, exact) < 1e-12) == (x.vocab == 5) and off(imitated(x, A, "one"), exact) > 1
    assert off(imitated(x, A, "teacher", limits=()), by_hand) > 0.1  # the default limits matter
