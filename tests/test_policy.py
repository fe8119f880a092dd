"""policy.py: the shift, scoring under padding, micro-batches, updates, EMA, files on disk.

Expected values come from plain forward passes over one unpadded sequence (conftest.py) and from the formulas written out
here. Everything runs in float64 unless a test is about float32 itself.
"""

import copy
import json
import math
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

import losses
from model.parallel import World, whole
from model.policy import Policy, _fill, ema_update

EOS = 2
ALONE, TOGETHER = 1, 10**9  # micro_batch_tokens: every row by itself, all rows in one forward pass

# Eight rows, two groups of four. X: student prompts; XC: teacher prompts; Y: responses, the second one EOS alone.
_random = random.Random(0)
ids = lambda n: [_random.randrange(3, 40) for _ in range(n)]  # noqa: E731
X = [ids(n) for n in (3, 7, 1, 5, 4, 4, 2, 6)]
XC = [ids(n) + x for n, x in zip((4, 2, 9, 5, 3, 8, 6, 7), X)]
Y = [ids(n) + [EOS] for n in (4, 0, 6, 2, 9, 3, 5, 1)]
NO_TEXT = SimpleNamespace(eos_token_id=EOS, chat_template=None)  # replaces the tokenizer
CROSS_ENTROPY = lambda log_s, log_t: losses.cross_entropy(log_t, log_s)  # noqa: E731


@pytest.fixture
def policy(make_model):
    return Policy(make_model(), NO_TEXT)


def close(actual, expected, tol=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tol, atol=tol)


def put_gradient(model, scale):
    for k, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, (k + 1) * scale)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])  # a copy


# ---- Scoring -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [ALONE, 40, TOGETHER])
@pytest.mark.parametrize("family", ["qwen3-tied", "qwen3-untied", "olmo3"])
def test_place_t_belongs_to_response_token_t_in_any_batch(make_model, plain_logits, family, budget):
    policy = Policy(make_model(family), NO_TEXT, micro_batch_tokens=budget)
    view, (scored, entropy) = policy.view(X, Y), policy.score(X, Y)  # eight lengths
    mask = torch.tensor([[1] * len(y) + [0] * (10 - len(y)) for y in Y])  # 1 on EOS too
    assert torch.equal(view.mask, mask) and torch.equal(policy.mask(Y), mask)
    assert [row[: len(y)] for row, y in zip(view.tokens.tolist(), Y)] == Y
    for i, (x, y) in enumerate(zip(X, Y)):
        log_p = plain_logits(policy.model, x, y).log_softmax(-1).detach()
        close((view.hidden @ view.head.T)[i, : len(y)].log_softmax(-1).detach(), log_p)
        close(scored[i, : len(y)], log_p[range(len(y)), y])
        close(entropy[i, : len(y)], -(log_p.exp() * log_p).sum(-1))
        assert (scored[i, len(y) :] == 0).all() and (entropy[i, len(y) :] == 0).all()


@pytest.mark.parametrize("budget", [ALONE, 40, TOGETHER])
def test_compare_is_d_between_both_prompts_and_draw_is_from_the_teacher(make_model, plain_logits, budget):
    policy, rows, others = Policy(make_model("qwen3-tied"), NO_TEXT, micro_batch_tokens=budget), [6, 1, 3], [0, 2, 4, 5, 7]
    with_C, teacher = [x + [5, 7, 9][: i % 4] for i, x in enumerate(X)], make_model("olmo3")
    cost = policy.compare(X, with_C, Y, rows, teacher, divergence=CROSS_ENTROPY)
    expert, other = (policy.draw(with_C, Y, rows, teacher, range(seed, seed + len(Y))) for seed in (10, 50))
    drawn, scored = policy.compare(X, with_C, Y, rows, teacher, expert=expert), policy.score(with_C, Y, rows, teacher)[0]
    assert not torch.equal(expert, other)
    padded = lambda batch, *views: [torch.full((1, 1), max(v.padded for v in views) * (len(batch) > 1))]  # noqa: E731
    assert policy._passes(1, padded, [(X, None), (XC, teacher)], Y).max() <= budget  # the longer prompt counts
    assert all((x[others] == 0).all() for x in (cost, expert, drawn, scored))
    for i in rows:
        places = range(len(Y[i]))
        log_s = plain_logits(policy.model, X[i], Y[i]).log_softmax(-1).detach()
        log_t = plain_logits(teacher, with_C[i], Y[i]).log_softmax(-1).detach()
        numbers = torch.rand(len(Y[i]), generator=torch.Generator().manual_seed(10 + i), dtype=torch.float64)
        tokens = torch.searchsorted(log_t.exp().cumsum(-1), numbers[:, None], right=True)[:, 0]
        assert expert[i, : len(Y[i])].tolist() == tokens.tolist()
        expected = (cost, -(log_t.exp() * log_s).sum(-1)), (drawn, -log_s[places, tokens]), (scored, log_t[places, Y[i]])
        for found, values in expected:
            close(found[i, : len(Y[i])], values)
            assert (found[i, len(Y[i]) :] == 0).all()


@pytest.mark.parametrize("budget", [ALONE, 20, TOGETHER])
def test_choose_is_log_p_of_each_token_after_each_prompt_at_temperature_1(make_model, plain_logits, budget):
    policy = Policy(make_model("olmo3"), NO_TEXT, micro_batch_tokens=budget, temperature=0.7)
    few = [39, 0, 7, EOS]
    found = policy.choose(XC, few)  # eight lengths, in no order
    for row, x in zip(found, XC, strict=True):
        close(row, plain_logits(policy.model, x, [0])[0].log_softmax(-1)[few].detach())
    assert not found.requires_grad and policy.choose([], few).shape == (0, 4)
    assert Policy(make_model(dtype=torch.bfloat16), NO_TEXT).score(X, Y)[0].dtype == torch.float32


@pytest.mark.parametrize("budget, count", [(1, 9), (15, 7), (40, 5), (10**9, 1)])
def test_micro_batches_cover_each_row_once_within_the_budget_by_length(policy, budget, count):
    lengths, rows = [50, 7, 30, 12, 12, 1, 29, 5, 16, 3], [9, 0, 1, 2, 4, 5, 6, 7, 8]  # row 3 is not asked for
    policy.micro_batch_tokens = budget
    parts = policy.micro_batches(iter(rows), lengths)
    flat = [i for part in parts for i in part]
    assert sorted(flat) == sorted(rows) and [lengths[i] for i in flat] == [1, 3, 5, 7, 12, 16, 29, 30, 50]
    assert all(len(part) == 1 or len(part) * lengths[part[-1]] <= budget for part in parts)
    assert len(parts) == count  # 15: 1 3 5 | 7 | 12 | 16 | 29 | 30 | 50; 40: 1 3 5 7 | 12 16 | 29 | 30 | 50


def test_a_large_micro_batch_has_at_most_a_tenth_of_padding(policy):
    policy.micro_batch_tokens, rng = 20_000, random.Random(1)
    lengths = [min(10_000, int(rng.lognormvariate(7.8, 0.7)) + 300) for _ in range(256)]
    padded = sum(len(part) * lengths[part[-1]] for part in policy.micro_batches(range(256), lengths))
    assert 1 - sum(lengths) / padded < 0.03
    assert len(policy.micro_batches(range(3), [9_000, 2_000, 7_000])) == 3  # 5,000 of 14,000 or 2,000 of 18,000 would be padding


@pytest.mark.parametrize("rank, expected", [(0, [[[0, 1, 2]], [[3]]]), (1, [[[3, 4]], [[]]])])
def test_processes_get_as_many_micro_batches_of_equal_size_as_they_can(policy, rank, expected):
    policy.world, policy.micro_batch_tokens = World(rank, 2), 40  # four rows in one process would leave one to the other
    assert [policy.micro_batches(rows, [10] * 5) for rows in (range(5), [3])] == expected


def test_no_dropout_is_left_in_training_mode():
    sizes = dict(vocab_size=40, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    model = OPTForCausalLM(OPTConfig(**sizes, dropout=0.5))  # its rate is a plain attribute
    model.model.decoder.project_in = torch.nn.Dropout()
    policy = Policy(model, NO_TEXT, recompute=0)
    assert torch.equal(*(policy.view(X, Y).hidden for _ in range(2)))


# ---- Teachers ------------------------------------------------------------------------------------------------


def test_ema_moves_tied_weights_once_by_its_rate_in_the_teachers_precision(make_model):
    teacher, student = make_model(dtype=torch.float32), make_model(dtype=torch.bfloat16).requires_grad_(False)
    for p in student.parameters():
        p.mul_(2)
    goal = weights(student)
    expected = 0.95 * weights(teacher) + 0.05 * goal.float()
    ema_update(teacher, student, 0.05)
    close(weights(teacher), expected, tol=1e-6)
    assert teacher.lm_head.weight is teacher.model.embed_tokens.weight and torch.equal(weights(student), goal)


# ---- One update ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [10.0, 1e-6])
def test_step_clips_to_the_limit_and_returns_the_norm_before(policy, scale):
    put_gradient(policy.model, scale)
    start, gradient = weights(policy.model), torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    first, *rest = policy.model.parameters()
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": rest}], lr=123.0)
    norm = gradient.square().sum().sqrt().item()
    assert policy.step(optimizer, learning_rate=0.5, max_grad_norm=2.0) == pytest.approx(norm)
    close(weights(policy.model), start - 0.5 * gradient * min(1.0, 2.0 / norm), tol=1e-8)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert all(p.grad is None for p in policy.model.parameters())


@pytest.mark.parametrize("value, skip", [(math.nan, False), (math.inf, False), (1.0, True)])
def test_a_skipped_step_leaves_weights_and_moments_and_clears_the_gradients(policy, value, skip):
    start, optimizer = weights(policy.model), torch.optim.AdamW(policy.model.parameters(), weight_decay=0.1)
    put_gradient(policy.model, 1.0)
    next(policy.model.parameters()).grad[0, 0] = value
    assert math.isnan(policy.step(optimizer, 1e-3, 1.0, skip=skip))
    assert torch.equal(weights(policy.model), start) and not optimizer.state
    assert all(p.grad is None for p in policy.model.parameters())


# ---- Files ---------------------------------------------------------------------------------------------------


def test_a_saved_folder_is_read_by_transformers_and_by_load(make_model, tokenizer, tmp_path):
    policy = Policy(make_model(vocabulary=len(tokenizer), dtype=torch.float32), tokenizer)
    policy.save(tmp_path)
    assert [name for name, _ in whole(policy.model)] == [name for name, _ in policy.model.named_parameters()]  # a tied head once
    again, chat = Policy.load(str(tmp_path)), [{"role": "user", "content": "zig 3\nwas wrong"}]
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path), again.model):
        assert torch.equal(model(torch.tensor([X[1]])).logits, policy.model(torch.tensor([X[1]])).logits)
    for reread in (AutoTokenizer.from_pretrained(tmp_path), again.tokenizer):
        text = reread.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert reread(text).input_ids == tokenizer(text).input_ids
    assert again.eos_ids == [tokenizer.eos_token_id] and again.vocabulary == len(tokenizer) and not again.model.training
    assert Policy.load(str(tmp_path), torch.float64).model.dtype == torch.float64


QUERIES = "model.layers.1.self_attn.q_proj.weight"


def rewritten(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def deeper(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))


DAMAGES = {  # how a saved model is damaged, and what the message names
    "no folder": (shutil.rmtree, ""),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], ""),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ""),
    "a tensor less": (lambda folder: rewritten(folder, lambda w: w.pop(QUERIES)), QUERIES),
    "a row less": (lambda folder: rewritten(folder, lambda w: w.update({QUERIES: w[QUERIES][:-1].clone()})), QUERIES),
    "a layer more": (deeper, "model.layers.2."),
    "not a number": (lambda folder: rewritten(folder, lambda w: w["model.norm.weight"].fill_(math.nan)), "not finite"),
}
for name in ("config.json", "model.safetensors", "tokenizer.json"):
    DAMAGES[f"half of {name}"] = (lambda folder, name=name: (folder / name).write_text("{"), "")


@pytest.mark.parametrize("damage, named", DAMAGES.values(), ids=DAMAGES)
def test_a_folder_without_a_whole_model_is_one_line_of_value_error(make_model, tokenizer, tmp_path, capfd, damage, named):
    """For weights that do not fit the config, transformers would draw random ones, and say so in a report that nobody reads."""
    folder = tmp_path / "model"
    Policy(make_model(vocabulary=len(tokenizer)), tokenizer).save(folder)
    damage(folder)
    with pytest.raises(ValueError, match=f"^cannot load a model and its tokenizer from '{folder}': [^\n]*$") as error:
        Policy.load(str(folder))
    assert named in str(error.value) and "Traceback" not in capfd.readouterr().err


def test_eos_ids_are_those_of_tokenizer_generation_config_and_chat_template(make_model, tokenizer):
    """A base model has its own end-of-text token, but prompted with the chat template it may end its turn with the template's."""
    model, base = make_model(vocabulary=len(tokenizer)), copy.deepcopy(tokenizer)
    base.eos_token = base.pad_token  # as Qwen3-4B-Base: <|endoftext|> ends, <|im_end|> closes a turn
    plain, turn_end = copy.deepcopy(base), base.convert_tokens_to_ids("<|im_end|>")
    plain.chat_template = None
    of = lambda id: SimpleNamespace(eos_token_id=id, chat_template=None)  # noqa: E731
    cases = [(5, of(2), {2, 5}), ([7, 5], of(5), {5, 7}), (None, of(2), {2}), (0, of(None), {0}),
             (base.eos_token_id, base, {base.eos_token_id, turn_end}), (None, plain, {base.eos_token_id})]  # fmt: skip
    for model.generation_config.eos_token_id, of_tokenizer, expected in cases:
        assert Policy(model, of_tokenizer).eos_ids == sorted(expected)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="end-of-sequence"):
        Policy(model, of(None))


def test_buffers_that_a_file_holds_are_read(tmp_path):
    def network(number: float) -> torch.nn.Module:
        net = torch.nn.Linear(2, 1)
        net.register_buffer("held", torch.full((3,), number))
        net.register_buffer("made", torch.full((3,), number), persistent=False)
        return net

    save_file(network(7.0).state_dict(), tmp_path / "model.safetensors")
    net = network(0.0)
    _fill(net, tmp_path)
    assert net.held.tolist() == [7, 7, 7] and net.made.tolist() == [0, 0, 0]
