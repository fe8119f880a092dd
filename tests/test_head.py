"""The chunked head against the plain losses on whole logits: values, gradients, and that no (T, V) tensor exists."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from model import head

N, V, H, WIDE = 11, 37, 6, 5  # tokens, vocabulary, hidden sizes of student and teacher
KINDS = [(kind, top_k) for kind in (*losses.DIVERGENCES, "cross_entropy") for top_k in (1, 4, V, None)]
DS = {kind: (lambda s, t, kind=kind: losses.divergence(s, t, kind)) for kind in losses.DIVERGENCES}
DS |= {"cross_entropy": lambda s, t: losses.cross_entropy(t, s), "": None, "expert": None}
EXPERT = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))  # tokens of a black box


def inputs(dtype=torch.float64, scale=2.0):
    """hidden (N, H), head (V, H), tokens (N,), weights (N,), advantages (N,), teacher (hidden, head)."""
    torch.manual_seed(0)
    normal = lambda *shape: (scale * torch.randn(*shape, dtype=torch.float64) / 2).to(dtype)  # noqa: E731
    hidden, weight, tokens = normal(N, H).requires_grad_(), normal(V, H).requires_grad_(), torch.randint(V, (N,))
    tokens[4] = EXPERT[4]  # both may be the same token
    return hidden, weight, tokens, torch.rand(N), normal(N), (normal(N, WIDE), normal(V, WIDE))


def view(hidden, weight, tokens):
    """The head's view of one row of tokens without padding."""
    return head.View(hidden[None], tokens[None], torch.ones_like(tokens)[None], weight)


def objective(logp, d, A):
    """Nonlinear: a clipped ratio on log p, and products of D with p and with itself."""
    ratio = (logp - logp.detach() + 0.3 * A).exp()
    return -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A) + d * (1 + logp.exp()) + 0.5 * d.square()


def plain(hidden, weight, tokens, weights, A, teacher, kind, top_k):
    """The same loss by autograd through whole logits and the functions of losses.py: (loss, log p, D)."""
    logits = (hidden @ weight.T)[None]
    logp = losses.token_logp(logits, tokens[None])
    d = -losses.token_logp(logits, EXPERT[None]) if kind == "expert" else torch.zeros_like(logp)
    if DS[kind]:
        taught = (teacher[0] @ teacher[1].T)[None]
        whole = logits.log_softmax(-1), taught.log_softmax(-1)
        d = DS[kind](*(whole if top_k is None else losses.top_k_with_tail(logits, taught, top_k)))
    return (weights * objective(logp, d, A[None]).squeeze(0)).sum(), logp[0], d[0]


def chunked(hidden, weight, tokens, weights, A, teacher=None, kind="", top_k=None, objective=objective, entropy=False):
    """(loss, scores) of the head."""
    total, scores = view(hidden, weight, tokens).loss(
        lambda t: objective(t.logp, t.D, t.A), weights[None], {"A": A[None]}, teacher and view(*teacher, tokens),
        DS[kind], top_k, EXPERT[None] if kind == "expert" else None, entropy,
    )  # fmt: skip
    return total, head.Scores(*(None if x is None else x[0] for x in vars(scores).values()))


@pytest.fixture(params=[1, 4, 1000], ids=lambda n: f"chunks of {n}")
def small(request, monkeypatch):
    """Chunks that divide the tokens or not, and blocks that do not divide the vocabulary."""
    monkeypatch.setattr(head, "tokens_per_chunk", lambda *_: request.param)
    monkeypatch.setattr(head, "COLUMNS", 10)


def close(actual, expected, tol=1e-10):
    atol = tol * float(expected.detach().abs().max().clamp(min=1e-3))
    torch.testing.assert_close(actual.detach(), expected.detach().to(actual.dtype), rtol=0, atol=atol)


def entropy_of(log_p):
    return -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("kind, top_k", KINDS + [("", None), ("expert", None)], ids=str)
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-11), (torch.float32, 1e-6)], ids=["float64", "float32"])
def test_loss_gradients_and_scores_are_those_of_the_plain_losses(small, kind, top_k, dtype, tol):
    hidden, weight, tokens, weights, A, teacher = inputs(dtype, scale=1.0)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]  # the same numbers, in float64
    taught = tuple(x.double() for x in teacher)
    loss, logp, d = plain(*exact, tokens, weights.double(), A.double(), taught, kind, top_k)
    wanted = torch.autograd.grad(3.0 * loss, exact)
    found, scores = chunked(hidden, weight, tokens, weights, A, None if kind == "expert" else teacher, kind, top_k, entropy=True)
    (3.0 * found).backward()
    with torch.no_grad():
        again, unmeasured = chunked(hidden, weight, tokens, weights, A, None if kind == "expert" else teacher, kind, top_k)
    assert torch.equal(again, found) and torch.equal(unmeasured.D, scores.D) and not again.requires_grad
    teacher_logp = (taught[0] @ taught[1].T).log_softmax(-1)[range(N), tokens] * (kind != "expert")
    entropy = entropy_of((exact[0] @ exact[1].T).log_softmax(-1))
    close(found, loss, 10 * tol)
    for name, expected in dict(logp=logp, D=d, teacher_logp=teacher_logp, entropy=entropy).items():
        close(getattr(scores, name), expected, 10 * tol)
        assert not getattr(scores, name).requires_grad
    close(hidden.grad, wanted[0], tol)
    close(weight.grad, wanted[1], tol)


@pytest.mark.parametrize("uniform, token", [(0.0, 1), (1 - 2**-53, 35)])  # the ends of what torch.rand can give
def test_a_token_of_probability_0_is_never_drawn(uniform, token):
    p = torch.rand(500, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.01  # the sum is not 1
    p[:, ::2], p[:, -3:] = 0, 0  # both ends and every other token
    assert (head.invert(p, torch.full((500,), uniform, dtype=torch.float64)) == token).all()


def test_scores_and_choices_are_the_log_softmax_on_response_tokens_and_0_on_padding(small):
    hidden, weight, tokens, *_ = inputs(scale=6.0)
    mask, ids = torch.ones(1, N, dtype=torch.long), torch.tensor([36, 0, 11, 11])  # in any order, both ends, a token twice
    mask[0, 9:] = 0
    padded = head.View(hidden[None], tokens[None], mask, weight)
    log_p, (logp, entropy), choices = (hidden @ weight.T).log_softmax(-1)[None], padded.score(), padded.choices(ids)
    close(logp, log_p[:, range(N), tokens] * mask)
    close(entropy, entropy_of(log_p) * mask)
    close(choices, log_p[..., ids] * mask[..., None])
    assert not logp.requires_grad and not choices.requires_grad
    none = head.View(hidden[None][:0], tokens[None][:0], mask[:0], weight)
    assert none.score()[0].shape == (0, N) and none.choices(ids).shape == (0, N, 4)


def test_entropy_counts_a_token_of_probability_0_as_0():
    hidden, weight = torch.tensor([[100.0]]), torch.tensor([[0.0], [0.0], [-3e38]])  # logits 0, 0, -inf
    logp, entropy = view(hidden, weight, torch.tensor([0])).score()
    assert -logp.item() == entropy.item() == pytest.approx(torch.tensor(2.0).log().item())


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation makes, except views."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, given = function(*args, **(kwargs or {})), [x.data_ptr() for x in args if isinstance(x, torch.Tensor)]
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.data_ptr() not in given:
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
        chunked(hidden, weight, tokens, weights, A, teacher, kind, top_k)[0].backward()
        view(hidden, weight, tokens).score()
    assert seen.elements == V * H  # the head's own gradient; 2 V of logits are less
    with torch.no_grad(), Largest() as seen:
        chunked(hidden, weight, tokens, weights, A, teacher, kind, top_k)
    assert seen.elements == 2 * V


def test_a_second_backward_is_refused():
    loss, _ = chunked(*inputs())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken once"):
        loss.backward()


@pytest.mark.parametrize("top_k", [4, None])
def test_no_tokens_give_a_loss_of_0_and_gradients_of_0(top_k):
    hidden, weight, tokens, weights, A, teacher = inputs()
    hidden, empty = hidden[:0].detach().requires_grad_(), weights[:0]
    loss, scores = chunked(hidden, weight, tokens[:0], empty, empty, (teacher[0][:0], teacher[1]), "js", top_k)
    loss.backward()
    assert loss.item() == 0 and scores.logp.shape == scores.D.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros_like(weight)) and hidden.grad.shape == (0, H)


@pytest.mark.parametrize("top_k", [4, None], ids=str)
def test_bfloat16_keeps_the_softmax_in_float32_and_the_gradients_in_its_own(top_k):
    """Logits are rounded to bfloat16, as in any bfloat16 model, and what follows is not: compared with the same rounded logits."""
    hidden, weight, tokens, weights, A, teacher = inputs(torch.bfloat16)
    logits, taught = ((h @ w.T).float()[None] for h, w in ((hidden.detach(), weight.detach()), teacher))
    loss, scores = chunked(hidden, weight, tokens, weights, A, teacher, "js", top_k)
    assert scores.logp.dtype == scores.D.dtype == view(hidden, weight, tokens).score()[0].dtype == torch.float32
    close(scores.logp, losses.token_logp(logits, tokens[None])[0], 1e-6)
    close(scores.D, losses.distillation_loss(logits, taught, "js", top_k)[0], 1e-6)
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


def test_the_overlap_is_the_share_of_the_students_top_k_in_the_teachers(monkeypatch):
    monkeypatch.setattr(head, "PLACES", 3)
    monkeypatch.setattr(head, "tokens_per_chunk", lambda *_: 5)  # of 11 tokens
    hidden, weight, tokens, weights, A, teacher = inputs()
    ranks = [(h @ w.T).argsort(-1, descending=True)[:, :4].tolist() for h, w in ((hidden, weight), teacher)]
    overlap = chunked(hidden, weight, tokens, weights, A, teacher, "js", 4)[1].overlap
    looked = [0, 3, 5, 8, 10]  # every third place of each chunk
    expected = [len({*ours} & {*theirs}) / 4 for ours, theirs in zip(*ranks)]
    assert overlap[looked].tolist() == [expected[i] for i in looked] and 0 < sum(expected) < 11
    assert overlap.isfinite().nonzero().flatten().tolist() == looked
    assert chunked(hidden, weight, tokens, weights, A, teacher, "js")[1].overlap is None


@pytest.mark.parametrize("kind, depth", [*((kind, 22) for kind, k in KINDS if k == 4), ("kl_student_teacher", 200), ("js", 200)])
def test_a_tail_that_holds_next_to_nothing_is_exact_in_float32(kind, depth):
    """The student's top 2 hold all but 1e-9, and 30% of the teacher's mass is elsewhere, so that 1 - sum p is far off in float32.
    At a depth of 200 the tail is empty."""
    torch.manual_seed(3)
    hidden, weight = torch.eye(2)[:1].repeat(3, 1).requires_grad_(), torch.randn(50, 2)
    weight[:, 0] -= depth
    weight[:2, 0] = torch.tensor([1.0, 0.5])
    teacher, weights = (torch.eye(50)[:1].repeat(3, 1), torch.randn(50, 50) + 200), torch.rand(3)  # exp(200) overflows
    given = hidden, weight.requires_grad_(), torch.tensor([0, 1, 9]), weights, torch.zeros(3)
    chunked(*given, teacher, kind, 2, lambda logp, d, A: d)[0].backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits, taught = (exact[0] @ exact[1].T)[None], (teacher[0].double() @ teacher[1].double().T)[None]
    d = DS[kind](*losses.top_k_with_tail(logits, taught, 2))
    (weights.double() * d[0]).sum().backward()
    close(hidden.grad, exact[0].grad, 1e-4)
    close(weight.grad, exact[1].grad, 1e-4)
