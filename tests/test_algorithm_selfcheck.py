"""Checks of algorithm.py by itself: values typed by hand, torch.optim, closed forms, and what moves when."""
import copy
import math
import random

import pytest
import torch
from algorithm import (AdamW, Row, Settings, advantages, bco, clip, divergence, grpo, kl, learning_rate, logits, logp, m_step_tokens, new_state,
                       one_batch, with_tail)
from transformers import Qwen3Config, Qwen3ForCausalLM

V = 40
METHODS = ["vpd", "sdpo", "grpo", "joint", "reshape", "reweight"]


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def tiny(seed=0, spread=0.3):
    """Qwen3 with 2 layers in float64 throughout: its own RMSNorm computes in float32, so torch's takes its place."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
                                         initializer_range=spread)).double().eval()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Qwen3RMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


def batch(rewards, contexts=None, G=4, seed=1, ungraded=()):
    """Rows of groups of G with random tokens; contexts: which rows have one, default all."""
    rng = random.Random(seed)
    tokens = lambda a, b: [rng.randrange(V) for _ in range(rng.randint(a, b))]
    rows = []
    for i, r in enumerate(rewards):
        if i % G == 0:
            prompt = tokens(3, 6)
        response = tokens(2, 6)
        teacher_prompt = prompt + tokens(2, 5)
        has = contexts is None or contexts[i]
        rows.append(Row(prompt, teacher_prompt if has else None, response, float(r), [-rng.random() * 4 for _ in response], i not in ungraded))
    return rows


def settings(**changes):
    return Settings(**{**dict(group_size=4, minibatch_prompts=2, e_minibatch_prompts=2, lr=1e-3, e_step_every=1), **changes})


def trained(s, rows, batches=1, seed=0):
    """state, figures of the last batch, and [(kind, weights)] after every update."""
    state, trace = new_state(tiny(seed), s), []
    for _ in range(batches):
        figures = one_batch(state, rows, s, lambda kind, model: trace.append((kind, weights(model))))
    return state, figures, trace


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def torch_step(model, loss, s, optimizer=None, lr=None):
    """One update by torch.optim.AdamW and torch's own clipping."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), betas=(s.adam_beta1, s.adam_beta2), weight_decay=s.weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = s.lr if lr is None else lr
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm)
    optimizer.step()
    return optimizer


# ---- pieces

def test_rows_of_logits_are_those_that_predict_the_response():
    model = tiny()
    ids = torch.tensor([[5, 6, 7, 1, 2]])
    all_logp = model(input_ids=ids).logits[0].log_softmax(-1)
    assert torch.allclose(logp(model, [5, 6, 7], [1, 2]), torch.stack([all_logp[2, 1], all_logp[3, 2]]))
    assert logits(model, [5, 6, 7], [1, 2]).shape == (2, V)


def test_divergences_by_hand():
    s, t = torch.tensor([[0.8, 0.2]]), torch.tensor([[0.5, 0.5]])
    st = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    ts = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    js = 0.5 * (0.8 * math.log(0.8 / 0.65) + 0.2 * math.log(0.2 / 0.35)) + 0.5 * (0.5 * math.log(0.5 / 0.65) + 0.5 * math.log(0.5 / 0.35))
    for kind, value in [("kl_student_teacher", st), ("kl_teacher_student", ts), ("js", js)]:
        assert divergence(s.log() + 3.0, t.log() - 1.0, kind).item() == pytest.approx(value, abs=1e-14)     # logits up to a constant


def test_tail_is_what_the_top_k_leave_over():
    s, t = torch.tensor([[0.1, 0.6, 0.05, 0.25]]), torch.tensor([[0.4, 0.1, 0.3, 0.2]])
    expected = sum(p * math.log(p / q) for p, q in [(0.6, 0.1), (0.25, 0.2), (0.15, 0.7)])      # the STUDENT's top 2: tokens 1 and 3
    assert divergence(s.log(), t.log(), "kl_student_teacher", 2).item() == pytest.approx(expected, abs=1e-14)
    assert divergence(s.log(), t.log(), "js", 4).item() == pytest.approx(divergence(s.log(), t.log(), "js", 0).item(), abs=1e-14)
    assert with_tail(s.log(), torch.tensor([[1, 3]])).exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["kl_student_teacher", "kl_teacher_student", "js"])
def test_gradient_of_the_divergence_by_closed_form(kind):
    torch.manual_seed(0)
    x, y = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    divergence(x, y, kind).sum().backward()
    p, q = x.detach().softmax(-1), y.detach().softmax(-1)
    m = (p + q) / 2
    g = {"kl_student_teacher": (p / q).log(), "kl_teacher_student": -q / p, "js": 0.5 * (p / m).log()}[kind]     # d D / d p(a), up to a constant
    assert torch.allclose(x.grad, p * (g - (p * g).sum(-1, keepdim=True)), atol=1e-14)
    assert y.grad is None
    assert torch.autograd.gradcheck(lambda z: divergence(z, y.detach(), kind, 3), x)


def test_grpo_by_hand():
    s = Settings()
    rho = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.1, 1.5, 5.0])
    A = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0])
    expected = torch.tensor([-1.0, -2.0, -2.56, 1.6, 2.2, 3.0, 6.0])
    assert torch.allclose(grpo(rho.log(), torch.zeros(7), A, s), expected)


def test_advantages():
    s = settings()
    assert advantages(batch([1, 0, 0, 0]), s) == [0.75, -0.25, -0.25, -0.25]
    assert advantages(batch([1, 0, 0, 0], ungraded=[3]), s) == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0])
    assert advantages(batch([1, 0, 0, 0], ungraded=[0, 1, 2, 3]), s) == [0, 0, 0, 0]
    assert advantages(batch([1, 0, 0, 0]), settings(divide_by_std=True)) == pytest.approx([a / (0.5 + 1e-6) for a in [0.75, -0.25, -0.25, -0.25]])


def test_hybrid_tokens_by_hand():
    old, now = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0 + math.log(1.1), -2.0 + math.log(3)])
    D, A_sdpo = torch.tensor([0.3, 0.4]), torch.tensor([0.1, -0.5])
    token = lambda method, A, step=0: m_step_tokens(now, D, old, A, A_sdpo, step, Settings(method=method, w_rl=2.0, w_opd=0.5)).tolist()
    assert token("vpd", 1.0) == [0.3, 0.4]
    assert token("sdpo", 1.0) == pytest.approx([1.1 * 0.3, 2 * 0.4])
    assert token("grpo", 1.0) == pytest.approx([-1.1, -1.28])
    assert token("joint", 1.0) == pytest.approx([0.5 * 0.33 - 2.2, 0.5 * 0.8 - 2.56])
    assert token("reshape", 0.1) == pytest.approx([-1.1 * 0.25, -0.0 + 3 * 0.05])                # A_t = 0.2 + 0.05 and 0.2 - 0.25
    for step, lam in [(0, 0.5), (25, 0.25), (60, 0.0)]:
        w = [math.exp(-0.1), 1.2]                                                                # sign(A) = -1; the second is clipped at 1.2
        A = [-0.5 * (1 - lam + lam * x) for x in w]
        assert token("reweight", -0.5, step) == pytest.approx([-1.1 * A[0], 3 * -A[1]])


def test_adamw_and_clipping_are_torchs():
    s = settings(weight_decay=0.1, adam_beta2=0.95)
    torch.manual_seed(0)
    mine = [torch.randn(3, 2), torch.randn(4)]
    theirs = [torch.nn.Parameter(p.clone()) for p in mine]
    optimizer, reference = AdamW(), torch.optim.AdamW(theirs, betas=(0.9, 0.95), weight_decay=0.1)
    for k in range(6):
        grads = [torch.randn(3, 2) * 3, torch.randn(4) if k % 3 else None]
        for p, g in zip(theirs, grads):
            p.grad = None if g is None else g.clone()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.param_groups[0]["lr"] = 0.01 * (k + 1)
        reference.step()
        optimizer.step(mine, clip(grads, 1.0), 0.01 * (k + 1), s)
        assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(mine, theirs))


def test_learning_rate():
    assert [learning_rate(1.0, k, settings(warmup_steps=4)) for k in (0, 3, 9)] == [0.25, 1.0, 1.0]
    assert [learning_rate(2.0, k, settings(schedule="linear", steps=10)) for k in (0, 5)] == [2.0, 1.0]


# ---- the steps

def test_e_step_is_the_hand_derived_gradient_and_torchs_update():
    s = settings(method="vpd", minibatch_prompts=2)
    rows = batch([1, 0, 0, 1, 1, 1, 1, 1])                      # the second group has one outcome only: no E-step for it
    _, figures, trace = trained(s, rows)
    model = tiny()
    r = torch.tensor([row.reward for row in rows[:4]])
    log_q = torch.stack([logp(model, row.teacher_prompt, row.response).sum() for row in rows[:4]])
    log_pi = torch.stack([logp(model, row.prompt, row.response).sum() for row in rows[:4]]).detach()
    r_tilde = 0.1 * (log_q - log_pi).detach()
    delta = (r_tilde[r == 1].mean() + r_tilde[r == 0].mean()) / 2
    c = torch.where(r == 1, -0.1 * torch.sigmoid(-(r_tilde - delta)) / 2, 0.1 * torch.sigmoid(r_tilde - delta) / 2)
    torch_step(model, (c * log_q).sum(), s)
    assert trace[0][0] == "e" and torch.allclose(trace[0][1], weights(model), atol=1e-10)
    assert figures["shift"] == pytest.approx(delta.item()) and figures["e_loss"] == pytest.approx(bco(r_tilde, r, delta).item())
    assert [kind for kind, _ in trace] == ["e", "m"]


def at(vector):
    model = tiny()
    torch.nn.utils.vector_to_parameters(vector.clone(), model.parameters())
    return model


@pytest.mark.parametrize("method", METHODS)
def test_one_m_update_a_batch_by_hand(method):
    """The gradient of the second batch's M-step, where student and EMA teacher differ, against row losses written out: at ratio 1 all are simple."""
    s = settings(method=method, teacher="ema", e_step_every=2, divergence="js", top_k=5, mismatch_limit=2.0, w_opd=0.7, w_rl=1.3)
    rows = batch([1, 0, 0, 1, 1, 1, 1, 1], contexts=[1, 0, 1, 1, 1, 1, 0, 1])
    one, two = trained(s, rows, batches=1), trained(s, rows, batches=2)                        # vpd: E and M, then M
    student_model, teacher_model = at(one[2][-1][1]), at(0.95 * weights(tiny()) + 0.05 * one[2][-1][1])
    loss, lam = 0, 0.5 * (1 - 1 / 50)
    for row, A in zip(rows, advantages(rows, s)):
        student = logits(student_model, row.prompt, row.response)
        now = student.log_softmax(-1).gather(-1, torch.tensor(row.response)[:, None])[:, 0]
        D = A_sdpo = torch.zeros(len(row.response))
        if row.teacher_prompt:
            D = divergence(student, logits(teacher_model, row.teacher_prompt, row.response), "js", 5)
            A_sdpo = (logp(teacher_model, row.teacher_prompt, row.response) - now).detach()
        w = torch.exp((1 if A > 0 else -1) * A_sdpo).clamp(0.8, 1.2)
        tokens = {"vpd": D, "sdpo": D, "grpo": -A * now, "joint": 0.7 * D - 1.3 * A * now, "reshape": -(1.3 * A + 0.7 * A_sdpo) * now,
                  "reweight": -A * (1 - lam + lam * w) * now}[method]
        mismatch = torch.exp(now.detach() - torch.tensor(row.sampler_logp)).clamp(max=2.0)
        loss = loss + (mismatch * tokens).mean() / 8                                            # all 8 rows in the divisor
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student_model.parameters()))])
    gradient = gradient * min(1.0, s.max_grad_norm / (gradient.norm().item() + 1e-6))
    m = [torch.cat([x.flatten() for x in state.optimizers["m"].m.values()]) for state, _, _ in (one, two)]
    assert torch.allclose((m[1] - 0.9 * m[0]) / 0.1, gradient, atol=1e-12)                      # what the second batch put into the first moment


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("teacher", ["live", "ema"])
def test_every_method_runs_with_many_updates(method, teacher):
    s = settings(method=method, teacher=teacher, minibatch_prompts=1, e_minibatch_prompts=1, e_step_every=2, e_optimizer="own")
    rows = batch([1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0], contexts=[1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    state, figures, trace = trained(s, rows, batches=2)
    assert [kind for kind, _ in trace] == (["e", "e"] if method == "vpd" else []) + ["m"] * 4        # the third group takes no part
    assert figures["m_updates"] == 2 and (figures["margin"] is None) == (method == "grpo")
    assert all(math.isfinite(v) for v in figures.values() if v is not None)
    if teacher == "ema" and method != "grpo":
        assert not torch.equal(weights(state.teacher), weights(state.model))


def test_an_update_without_rows_moves_nothing():
    for method, rows in [("vpd", batch([1, 0, 1, 0], contexts=[0] * 4)), ("grpo", batch([1] * 4)), ("joint", batch([0] * 4, ungraded=range(4)))]:
        state, figures, trace = trained(settings(method=method), rows)
        assert not trace and torch.equal(weights(state.model), weights(tiny())) and figures["m_loss"] is None and state.delta is None


def test_moving_average_of_the_teacher_and_of_the_shift():
    s = settings(method="vpd", teacher="ema", e_minibatch_prompts=1, ema_rate=0.3)
    rows = batch([1, 0, 0, 1, 0, 1, 1, 0])
    state, figures, trace = trained(s, rows)
    assert [kind for kind, _ in trace] == ["e", "e", "m"]
    assert torch.allclose(weights(state.teacher), 0.7 * weights(tiny()) + 0.3 * trace[-1][1], atol=1e-15)
    values = []
    for part, vector in [(rows[:4], weights(tiny())), (rows[4:], trace[0][1])]:       # the second value: at the weights after the first update
        model = tiny()
        torch.nn.utils.vector_to_parameters(vector, model.parameters())
        x = {0.0: [], 1.0: []}
        for row in part:
            x[row.reward].append(0.1 * (logp(model, row.teacher_prompt, row.response) - logp(tiny(), row.prompt, row.response)).sum().item())
        values.append((sum(x[1.0]) / len(x[1.0]) + sum(x[0.0]) / len(x[0.0])) / 2)
    assert figures["shift"] == pytest.approx(0.9 * values[0] + 0.1 * values[1], abs=1e-12)


def test_groups_of_the_e_step():
    rows = batch([1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1], contexts=[1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])     # group 1: only successes have a context
    assert trained(settings(e_minibatch_prompts=1), rows)[1]["e_updates"] == 1
    assert trained(settings(e_minibatch_prompts=1, e_groups="all"), rows)[1]["e_updates"] == 1             # one-class minibatches are skipped
    assert trained(settings(e_minibatch_prompts=3, e_groups="all"), rows)[1]["e_updates"] == 1
    one = trained(settings(e_minibatch_prompts=3, e_groups="all"), rows)[1]["e_loss"]
    assert one != trained(settings(e_minibatch_prompts=3), rows)[1]["e_loss"]
    assert trained(settings(e_step_every=5), rows, batches=5)[2][0][0] == "e"
    assert [k for k, _ in trained(settings(e_step_every=3, minibatch_prompts=3), rows, batches=4)[2]] == ["e", "m", "m", "m", "e", "m"]


def test_fixed_and_dynamic_prior_differ_from_the_second_batch_on():
    rows = batch([1, 0, 0, 1])
    once = [trained(settings(prior=p), rows)[2][0][1] for p in ("dynamic", "fixed")]
    twice = [trained(settings(prior=p), rows, batches=2)[2][2][1] for p in ("dynamic", "fixed")]
    assert torch.equal(*once) and not torch.allclose(*twice)


def test_an_ungraded_row_is_no_failure():
    rows = batch([1, 0, 1, 0], ungraded=[3])
    dropped = copy.deepcopy(rows)
    dropped[3].reward, dropped[3].teacher_prompt = 1.0, None
    a, b = trained(settings(), rows), trained(settings(), dropped)
    assert torch.equal(a[2][-1][1], b[2][-1][1]) and a[1] == b[1]


def test_old_logp_is_the_frozen_one_when_updates_are_several():
    """The second update of a batch sees a ratio; with one update a batch there is none, not even after other updates."""
    rows = batch([1, 0, 0, 1, 1, 0, 0, 1])
    two = trained(settings(method="grpo", minibatch_prompts=1, lr=0.02), rows)[1]["m_loss"]
    one = trained(settings(method="grpo", minibatch_prompts=2, lr=0.02), rows)[1]["m_loss"]
    assert one == pytest.approx(0, abs=1e-15) and abs(two) > 1e-6                        # at ratio 1 the loss is minus the mean advantage, 0


def test_kl_names_its_arguments():
    p, q = torch.tensor([0.8, 0.2]).log(), torch.tensor([0.5, 0.5]).log()
    assert kl(p, q) != kl(q, p) and kl(p, p) == 0


def test_padding_and_batching_change_nothing_but_rounding():
    """What the comparison with the real loop rests on: a row within a padded batch gives the row's own logits."""
    model, rows = tiny(), batch([1, 0, 0, 1])
    sequences = [row.prompt + row.response for row in rows]
    longest = max(map(len, sequences))
    ids = torch.tensor([x + [0] * (longest - len(x)) for x in sequences])
    mask = torch.tensor([[1] * len(x) + [0] * (longest - len(x)) for x in sequences])
    out = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for row, o in zip(rows, out):
        n, T = len(row.prompt), len(row.response)
        assert torch.allclose(o[n - 1:n - 1 + T], logits(model, row.prompt, row.response), atol=1e-12)


def test_the_e_step_has_its_own_learning_rate_and_optimizer():
    rows = batch([1, 0, 0, 1])
    step = [(trained(settings(e_lr=e_lr, weight_decay=0.0), rows)[2][0][1] - weights(tiny())).abs().max().item() for e_lr in (0.0, 2e-3)]
    assert step == pytest.approx([1e-3, 2e-3], rel=1e-3)                        # AdamW's first step is lr times a sign
    state, _, trace = trained(settings(e_optimizer="own", weight_decay=0.0), rows)
    assert (trace[1][1] - trace[0][1]).abs().max().item() == pytest.approx(1e-3, rel=1e-3)       # the M-step's first, of its own state
    assert {kind: optimizer.t[0] for kind, optimizer in state.optimizers.items()} == {"e": 1, "m": 1}
    assert trained(settings(), rows)[0].optimizers["m"].t[0] == 2
