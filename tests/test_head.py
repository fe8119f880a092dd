"""The chunked head against the plain losses on whole logits: values, gradients, and that no (T, V) tensor exists."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from model import head

N, V, H, WIDE = 11, 37, 6, 5  # tokens, vocabulary, hidden sizes of student and teacher
KINDS = [(kind, top_k) for kind in (*losses.DIVERGENCES, "cross_entropy") for top_k in (1, 4, None)]


def inputs(dtype=torch.float64, scale=2.0, seed=0):
    """hidden (N, H), head (V, H), tokens (N,), weights (N,), advantages (N,), teacher (hidden, head)."""
    torch.manual_seed(seed)
    normal = lambda *shape: (scale * torch.randn(*shape, dtype=torch.float64) / 2).to(dtype)  # noqa: E731
    hidden, weight = normal(N, H).requires_grad_(), normal(V, H).requires_grad_()
    return hidden, weight, torch.randint(V, (N,)), torch.rand(N), normal(N), (normal(N, WIDE), normal(V, WIDE))


def objective(logp, d, A):
    """Nothing linear: a clipped ratio on log p, a product of both, and one place where D is not differentiated."""
    ratio = (logp - logp.detach() + 0.3 * A).exp()
    return -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A) + d * (1 + logp.exp()) + 0.5 * d.square()


DS = {kind: (lambda s, t, kind=kind: losses.divergence(s, t, kind)) for kind in losses.DIVERGENCES}
DS |= {"cross_entropy": lambda s, t: losses.cross_entropy(t, s), "": None}


def plain(hidden, weight, tokens, weights, A, teacher, kind, top_k):
    """The same loss by autograd through whole logits and the functions of losses.py."""
    logits = (hidden @ weight.T)[None]
    logp = losses.token_logp(logits, tokens[None])
    d = torch.zeros_like(logp)
    if teacher:
        taught = (teacher[0] @ teacher[1].T)[None]
        whole = logits.log_softmax(-1), taught.log_softmax(-1)
        d = DS[kind](*(whole if top_k is None else losses.top_k_with_tail(logits, taught, top_k)))
    return (weights * objective(logp, d, A[None]).squeeze(0)).sum(), logp[0], d[0]


def chunked(hidden, weight, tokens, weights, A, teacher=None, kind="", top_k=None, objective=objective, **more):
    """(loss, log p, D) of the head."""
    total, scores = head.loss(
        lambda t: objective(t.logp, t.D, t.A), weights, hidden, weight, tokens, {"A": A}, teacher, DS[kind], top_k, **more
    )
    return total, scores.logp, scores.D


@pytest.fixture(params=[1, 4, 1000], ids=lambda n: f"chunks of {n}")
def small(request, monkeypatch):
    """Chunks that do and do not divide the tokens, and blocks that do not divide the vocabulary."""
    monkeypatch.setattr(head, "tokens_per_chunk", lambda *_: request.param)
    monkeypatch.setattr(head, "COLUMNS", 10)


def close(actual, expected, tol=1e-10):
    torch.testing.assert_close(
        actual, expected.to(actual.dtype), rtol=0, atol=tol * float(expected.abs().max().clamp(min=1e-3))
    )


@pytest.mark.parametrize("kind, top_k", KINDS + [("", None)], ids=str)
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-11), (torch.float32, 1e-6)], ids=["float64", "float32"])
def test_loss_and_gradients_are_those_of_the_plain_losses(small, kind, top_k, dtype, tol):
    hidden, weight, tokens, weights, A, teacher = inputs(dtype, scale=1.0)
    teacher = teacher if kind else None
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]  # the same numbers, in float64
    taught = tuple(x.double() for x in teacher) if teacher else None
    expected = plain(*exact, tokens, weights.double(), A.double(), taught, kind, top_k)
    wanted = torch.autograd.grad(3.0 * expected[0], exact)
    found = chunked(hidden, weight, tokens, weights, A, teacher, kind, top_k)
    (3.0 * found[0]).backward()
    for one, other in zip(found, expected):
        close(one.detach(), other.detach(), 10 * tol)
    assert not found[1].requires_grad and not found[2].requires_grad
    close(hidden.grad, wanted[0], tol)
    close(weight.grad, wanted[1], tol)


def test_of_a_black_box_d_is_minus_log_p_of_the_token_it_took(small):
    hidden, weight, tokens, weights, A, _ = inputs()
    expert = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    expert[4] = tokens[4]  # both may be the same token
    log_p = (hidden @ weight.T).log_softmax(-1)
    logp, d = log_p[range(N), tokens], -log_p[range(N), expert]
    expected = (weights * objective(logp[None], d[None], A[None])[0]).sum()
    wanted = torch.autograd.grad(expected, (hidden, weight))
    found = chunked(hidden, weight, tokens, weights, A, expert=expert)
    found[0].backward()
    for one, other in zip((*found, hidden.grad, weight.grad), (expected, logp, d, *wanted)):
        close(one.detach(), other.detach())


@pytest.mark.parametrize("kind, top_k", [("cross_entropy", 4), ("js", None), ("", None)], ids=str)
def test_without_gradients_the_figures_are_the_same_and_no_buffer_for_them_is_made(kind, top_k, monkeypatch):
    hidden, weight, tokens, weights, A, teacher = inputs()
    teacher = teacher if kind else None
    expected = chunked(hidden, weight, tokens, weights, A, teacher, kind, top_k)
    zeros_like = torch.zeros_like
    monkeypatch.setattr(
        torch, "zeros_like", lambda x, **kwargs: zeros_like(x, **kwargs) if x.shape != weight.shape else 1 / 0
    )
    with torch.no_grad():
        found = chunked(hidden, weight, tokens, weights, A, teacher, kind, top_k)
    assert not found[0].requires_grad
    with pytest.raises(ZeroDivisionError):
        chunked(hidden, weight, tokens, weights, A, teacher, kind, top_k)
    for one, other in zip(found, expected):
        close(one, other.detach())


def test_a_drawn_token_is_where_the_cumulative_distribution_passes_the_number(small):
    hidden, weight = (
        torch.eye(3),
        torch.tensor([[0.2, 0.0, 0.7], [0.5, 0.0, 0.1], [0.3, 1.0, 0.2]]).clamp(min=1e-30).log(),
    )
    # Rows of `hidden` pick columns: (.2, .5, .3), (0, 0, 1), (.7, .1, .2).
    hidden = hidden[[0, 0, 0, 0, 0, 1, 1, 2, 2, 2]]
    uniform = torch.tensor([0.0, 0.199, 0.201, 0.699, 0.701, 1e-9, 0.999, 0.699, 0.701, 0.801], dtype=torch.float64)
    assert head.draw(hidden, weight, uniform).tolist() == [0, 0, 1, 1, 2, 2, 2, 0, 1, 2]


def test_score_is_log_softmax_and_entropy(small):
    hidden, weight, tokens, *_ = inputs(scale=6.0)
    logp, entropy = head.score(hidden, weight, tokens)
    log_p = (hidden @ weight.T).log_softmax(-1).detach()
    close(logp, log_p[range(N), tokens])
    close(entropy, -(log_p.exp() * log_p).sum(-1))


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"])
def test_choices_are_the_log_softmax_of_a_few_tokens_at_each_place(small, dtype, tol):
    hidden, weight, *_ = inputs(dtype, scale=3.0)
    ids = torch.tensor([36, 0, 11, 11])  # in any order, both ends and a token twice
    logp = head.choices(hidden, weight, ids)
    close(logp, (hidden.double() @ weight.double().T).log_softmax(-1)[:, ids].detach(), tol)
    assert logp.dtype == dtype and not logp.requires_grad
    assert head.choices(hidden[:0], weight, ids).shape == (0, 4)


def test_entropy_counts_a_token_of_probability_0_as_0():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [0.0], [-3e38]])
    logp, entropy = head.score(hidden * 100, weight, torch.tensor([0]))  # logits 0, 0, -inf
    assert logp.item() == pytest.approx(-torch.tensor(2.0).log().item())
    assert entropy.item() == pytest.approx(torch.tensor(2.0).log().item())


class Largest(TorchDispatchMode):
    """Numbers of elements of the largest tensors that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("kind, top_k", [("js", None), ("kl_student_teacher", 4), ("", None)], ids=str)
def test_no_tensor_as_large_as_the_logits_exists_forward_or_backward(kind, top_k, monkeypatch):
    hidden, weight, tokens, weights, A, teacher = inputs()
    monkeypatch.setattr(head, "tokens_per_chunk", lambda *_: 2)
    with Largest() as seen:
        (hidden.detach() @ weight.detach().T)
    assert seen.elements == N * V  # what the test would see
    with Largest() as seen:
        chunked(hidden, weight, tokens, weights, A, teacher if kind else None, kind, top_k)[0].backward()
        head.score(hidden, weight, tokens)
    assert seen.elements == V * H  # the head's own gradient; 2 V of logits are less


def test_a_second_backward_is_refused():
    hidden, weight, tokens, weights, A, _ = inputs()
    loss = chunked(hidden, weight, tokens, weights, A)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken once"):
        loss.backward()


def test_no_tokens_give_a_loss_of_0_and_gradients_of_0():
    _, weight, _, _, _, teacher = inputs()
    hidden = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
    empty, taught = torch.zeros(0), (teacher[0][:0], teacher[1])
    loss, logp, d = chunked(
        hidden, weight, torch.zeros(0, dtype=torch.long), empty, empty, taught, "js", 4
    )
    loss.backward()
    assert loss.item() == 0 and logp.shape == d.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros_like(weight)) and hidden.grad.shape == (0, H)


@pytest.mark.parametrize("top_k", [4, None], ids=str)
def test_bfloat16_keeps_the_softmax_in_float32_and_the_gradients_in_its_own(top_k):
    """Logits are rounded to bfloat16 as in any bfloat16 model, what follows is not: against the same rounded logits."""
    hidden, weight, tokens, weights, A, teacher = inputs(torch.bfloat16)
    logits, taught = ((h @ w.T).float()[None] for h, w in ((hidden.detach(), weight.detach()), teacher))
    expected = losses.distillation_loss(logits, taught, "js", top_k)[0]
    loss, logp, d = chunked(hidden, weight, tokens, weights, A, teacher, "js", top_k)
    assert logp.dtype == d.dtype == torch.float32
    close(logp, losses.token_logp(logits, tokens[None])[0], 1e-6)
    close(d, expected, 1e-6)
    assert head.score(hidden, weight, tokens)[0].dtype == torch.float32
    loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    plain(*exact, tokens, weights, A, tuple(x.double() for x in teacher), "js", top_k)[0].backward()
    for mine, other in zip((hidden, weight), exact):
        assert mine.grad.dtype == torch.bfloat16
        assert (mine.grad.double() - other.grad).norm() < 0.05 * other.grad.norm()


def test_the_buffers_of_student_and_teacher_share_their_bytes():
    assert head.tokens_per_chunk(151_936, 4, "cpu") == (80 << 20) // (4 * 151_936)
    assert head.tokens_per_chunk(151_936, 2, "cuda", 2) == (800 << 20) // (4 * 151_936 * 2)
    assert head.tokens_per_chunk(10**9, 4, "cpu") == 1


@pytest.mark.parametrize("kind, top_k", [("js", 4), ("js", None), ("", None)], ids=str)
def test_a_pass_also_tells_the_teachers_log_p_and_the_entropy(small, kind, top_k):
    hidden, weight, tokens, weights, A, teacher = inputs(scale=1.0)
    log_t = (teacher[0] @ teacher[1].T).log_softmax(-1)
    known = dict(teacher=teacher, divergence=DS[kind], top_k=top_k, entropy=True)
    shown = lambda t: t.logp * t.teacher_logp  # noqa: E731
    total, scores = head.loss(shown, weights, hidden, weight, tokens, {}, **known)
    close(scores.teacher_logp, log_t[range(N), tokens])
    close(scores.entropy, head.score(hidden, weight, tokens)[1])
    close(total, (weights * scores.logp * scores.teacher_logp).sum())


def test_the_overlap_is_the_share_of_the_students_top_k_in_the_teachers(monkeypatch):
    monkeypatch.setattr(head, "PLACES", 3)
    monkeypatch.setattr(head, "tokens_per_chunk", lambda *_: 5)  # of 11 tokens
    hidden, weight, tokens, weights, A, teacher = inputs()
    ranks = [(h @ w.T).argsort(-1, descending=True)[:, :4].tolist() for h, w in ((hidden, weight), teacher)]
    _, scores = head.loss(lambda t: t.D, weights, hidden, weight, tokens, {}, teacher, DS["js"], 4)
    looked = [0, 3, 5, 8, 10]  # every third place of each chunk
    expected = [len({*ours} & {*theirs}) / 4 for ours, theirs in zip(*ranks)]
    assert scores.overlap[looked].tolist() == [expected[i] for i in looked] and 0 < sum(expected) < 11
    assert scores.overlap.isfinite().nonzero().flatten().tolist() == looked
    assert head.loss(lambda t: t.D, weights, hidden, weight, tokens, {}, teacher, DS["js"])[1].overlap is None


@pytest.mark.parametrize("kind", ["kl_teacher_student", "kl_student_teacher", "js", "cross_entropy"])
def test_a_tail_that_holds_next_to_nothing_is_exact_in_float32(kind):
    """The student's top 2 hold all but 1e-9, of the teacher's mass 30 % is elsewhere: 1 - sum p is far off in float32."""
    torch.manual_seed(3)
    hidden, weight = torch.eye(2)[:1].repeat(3, 1), torch.randn(50, 2)
    weight[:, 0] -= 22.0
    weight[:2, 0] = torch.tensor([1.0, 0.5])
    teacher = torch.eye(50)[:1].repeat(3, 1), torch.randn(50, 50)
    args = hidden.requires_grad_(), weight.requires_grad_(), torch.tensor([0, 1, 9]), torch.rand(3), torch.zeros(3)
    by_D = lambda logp, d, A: d  # noqa: E731
    chunked(*args, teacher, kind, 2, by_D)[0].backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits, taught = (exact[0] @ exact[1].T)[None], (teacher[0].double() @ teacher[1].double().T)[None]
    d = DS[kind](*losses.top_k_with_tail(logits, taught, 2))
    (args[3].double() * d[0]).sum().backward()
    close(hidden.grad, exact[0].grad, 1e-4)
    close(weight.grad, exact[1].grad, 1e-4)
