"""The loops of vpd.py and DistIL, update by update, against a plain reference of Algorithm 1 (algorithm.py). The losses and their
gradients are checked by hand in test_losses.py.

The task, its grader and the sampler follow a script: groups with one or both outcomes, rows that the grader failed on, failures
without a text, rows of one token, cut rows, and a sampler whose log-probs are not the trainer's.
"""

import random
from types import SimpleNamespace

import algorithm
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import feedback
import vpd
from conftest import log_of
from harness import session
from model.policy import Policy
from neighbours import distil
from rollout import Rollout
from tasks import Outcome, Problem, Task

V, EOS, G = 40, 2, 4
# s: success, f: failure with a text, e: failure without one, x: the grader failed. Four letters are a group.
SCRIPT = [["sffs", "sxfe", "ffff", "ssfs"], ["fssf", "ssss", "fesf", "xfsf"], ["sfff", "ffxf", "ssff", "fsss"]]


def words(rng, least, most):
    return [rng.randrange(3, V) for _ in range(rng.randint(least, most))]


def text(ids):
    return " ".join(f"w{i}" for i in ids)


def tiny(seed=0):
    """Qwen3 with 2 layers, all in float64: its own RMSNorm computes in float32, so torch's replaces it. The dropout must have no
    effect, since the student that is scored is the one that sampled."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.3, attention_dropout=0.3,
        pad_token_id=0, eos_token_id=EOS, bos_token_id=None,
    )).double().eval()  # fmt: skip
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Qwen3RMSNorm":
                norm = torch.nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


# ---- The loop against the reference --------------------------------------------------------------------------


class Sampler:
    """Random responses, ended or cut at the limit, with log-probs that are far from the trainer's."""

    other_engine = True

    def __init__(self):
        self.drawn, self.model = [], None  # (prompts, seed, the model in charge) of each call
        self.calls = ""

    def sync(self, policy):
        self.model = policy.model
        self.calls += "sync "

    def sleep(self):
        self.calls += "sleep "

    def sample(self, prompts, n, seed, max_tokens, temperature, top_p, finished=None):
        self.drawn.append((prompts, seed, self.model))
        self.calls, self.how = self.calls + "sample ", (max_tokens, temperature, top_p)
        rng, drawn = random.Random(seed), []
        for i in range(len(prompts) * n):
            y = words(rng, 1, max_tokens) + [EOS]
            finish = "length" if len(y) > max_tokens else "stop"
            y = y[:max_tokens]
            drawn.append(Rollout(y, [-rng.randrange(128, 384) / 64 for _ in y], finish))  # exact in float32
        return drawn


def scripted(script, calls):
    """A task of four problems whose grader follows the script, call by call. Each failure has its own text."""
    problems = [Problem(str(i), [{"role": "user", "content": text(words(random.Random(i), 3, 6))}]) for i in range(4)]

    def verify(rows, responses):
        letters = "".join(script[len(calls)])[: len(rows)]
        told = [text(words(random.Random(100 * len(calls) + i), 4, 5)) for i in range(len(rows))]
        calls.append((letters, told))
        outcome = {"s": lambda _: Outcome(1, "right"), "f": lambda told: Outcome(0, "wrong", told),
                   "e": lambda _: Outcome(0, "wrong"), "x": lambda told: Outcome(0, "internal", told)}  # fmt: skip
        return [outcome[letter](text) for letter, text in zip(letters, told)]

    return Task("scripted", problems, [], [], verify)


def tokenizer():
    vocabulary = {"<pad>": 0, "<unk>": 1, "<eos>": EOS} | {f"w{i}": i for i in range(3, V)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def config(method, of=vpd, **changes):
    base = dict(
        task="own", method=method, steps=3, prompts_per_batch=4, group_size=G, minibatch_prompts=4,
        e_minibatch_prompts=4, e_step_every=1, max_response_tokens=6, lr=0.01, top_k=0, feedback="environment",
        eval_every=0, checkpoint_every=0, ema_rate=0.2, solution_template="{solution}", feedback_template="{feedback}",
        closing_line="w5",
    )  # fmt: skip
    cfg = of.Config(**(base | changes))
    cfg.given, cfg.preset = set(), {}
    of.check(cfg)
    return cfg


def trained(cfg, out, train=vpd.train, script=SCRIPT, also=None, **how):
    """Runs a loop and returns what it did. after: the weights after each update; batches: (batch, numbers of E- and M-updates, row
    of the log); calls: letters and texts of the grader's calls; drawn: calls of a black-box teacher; the sampler."""
    calls, ended, after, drawn, sampler = [], [], [], [], Sampler()
    policy = Policy(tiny(), tokenizer(), micro_batch_tokens=40, temperature=cfg.temperature, **how)
    task, record = scripted(script, calls), {"teacher": cfg.reader(), "commit": ""}
    out.mkdir()
    run = session.Run(cfg, policy, sampler, task, out, record, None, feedback.Critic(cfg, policy), also)
    step, end, draw = policy.step, run.end_of_batch, policy.draw
    policy.step = lambda *args, **kwargs: (step(*args, **kwargs), after.append(weights(policy.model)))[0]
    policy.draw = lambda *args: drawn.append((args, draw(*args))) or drawn[-1][1]
    run.end_of_batch = lambda log, batch: (ended.append((batch, len(log.e_norms), len(log.m_norms))), end(log, batch))
    run.save_state = lambda step: None
    train(cfg, run)
    batches = [(*batch, row) for batch, row in zip(ended, log_of(out, None), strict=True)]
    return SimpleNamespace(after=after, batches=batches, calls=calls, drawn=drawn, sampler=sampler)


def reference(cfg, after):
    """The settings as the reference reads them, its state, and a function that compares its next update with the loop's."""
    s = SimpleNamespace(**vars(cfg))
    s.teacher, s.mismatch_limit = cfg.reader(), None if cfg.mismatch_limit == "none" else float(cfg.mismatch_limit)
    model = tiny()
    model.register_forward_hook(lambda module, args, out: setattr(out, "logits", out.logits / cfg.temperature))
    state, last, found = algorithm.new_state(model, s), weights(model), iter(after)

    def compare(kind, model):
        nonlocal last
        now = weights(model)
        off = (next(found) - now).abs().max() / (now - last).abs().max()
        assert off < 1e-9, f"{kind}-update of batch {state.step}: {off:.1e} of its size off"
        last = now

    return s, state, compare


def seen_by(i, letters, told, batch, cfg):
    """The texts of which the teacher may see one in row i. If there are none, the row has no context."""
    group = range(i // G * G, i // G * G + G)
    solutions = [text(t for t in batch.y[j] if t != EOS) for j in group if j != i and letters[j] == "s"]
    own = [told[i]] if letters[i] == "f" else []
    lent = [told[j] for j in group if letters[j] == "f"] if cfg.borrow else []
    lent = [cfg.passed_text] if cfg.passed_text else lent
    by_source = {"sibling": solutions, "solution_first": solutions or own, "environment": own or lent * (letters[i] == "s")}
    return [] if letters[i] == "x" else by_source[cfg.feedback]


def rows_of(batch, letters, told, cfg):
    """The reference's rows, made from the script; only the choice among several texts is the loop's."""
    ids, rows = lambda text: [int(word[1:]) for word in text.split()], []
    for i, letter in enumerate(letters):
        x = ids(batch.problems[i].messages[0]["content"])
        assert batch.x[i] == x
        room = cfg.max_teacher_tokens - len(x) - 1  # for a text between x and the closing line
        allowed = [x + ids(t)[:room] + [5] for t in seen_by(i, letters, told, batch, cfg)] if cfg.reader() else []
        assert batch.xC[i] in (allowed or [x])
        rollout = batch.rollouts[i]
        context = batch.xC[i] if allowed else None
        rows.append(algorithm.Row(x, context, rollout.tokens, float(letter == "s"), rollout.logp, letter != "x"))
    return rows


SEVERAL = dict(minibatch_prompts=1)  # M-updates in a batch
CASES = {
    "vpd": dict(max_prompt_tokens=6, max_teacher_tokens=8),
    "vpd, many updates": SEVERAL | dict(e_minibatch_prompts=2, shift_rate=0.3, e_lr=0.02, mismatch_limit="1.2"),
    "vpd, EMA": SEVERAL | dict(teacher="ema", e_minibatch_prompts=1, divergence="js", feedback="solution_first"),
    "vpd, EMA, one update": dict(teacher="ema", beta=8.0, e_groups="all", feedback="solution_first", shift_rate=1.0),
    "vpd, fixed prior": dict(prior="fixed", passed_text="w7 w8", beta=0.6, e_lr=0.003, adam_beta1=0.7),
    "vpd, failures spared": dict(e_failures="likelier", e_minibatch_prompts=2, shift_rate=0.5, e_optimizer="shared"),
    "vpd, schedule": dict(e_step_every=2, schedule="linear", warmup_steps=2, divergence="kl_teacher_student", top_k=3),
    "vpd, recomputed": dict(e_groups="all", e_minibatch_prompts=2, feedback="sibling", mismatch_limit="none"),
    "sdpo": dict(divergence="js", top_k=5, weight_decay=0.5, temperature=1.5, top_p=0.9),
    "sdpo, many updates": SEVERAL | dict(ratio_limit=1.05, top_k=2, feedback="sibling"),
    "sdpo, live": dict(minibatch_prompts=2, teacher="live", borrow=False, divergence="kl_teacher_student", max_grad_norm=0.05),
    "grpo": dict(divide_by_std=True, adam_beta2=0.9),
    "grpo, many updates": SEVERAL | dict(clip_low=0.04, clip_high=0.06, dual_clip=1.1, lr=0.02),
    "joint": dict(w_opd=0.6, w_rl=1.4, feedback="sibling"),
    "joint, many updates": SEVERAL | dict(w_opd=2.0, w_rl=0.5, ratio_limit=1.1, clip_low=0.05, mismatch_limit="none"),
    "reshape": dict(w_opd=0.3, w_rl=0.8, feedback="solution_first"),
    "reshape, many updates": SEVERAL | dict(w_opd=0.7, w_rl=1.3, clip_high=0.05, teacher="live", temperature=0.8),
    "reweight": dict(reweight_lam=0.9, reweight_steps=1, feedback="solution_first"),
    "reweight, lambda 0": SEVERAL | dict(reweight_steps=0),
    "reweight, many updates": SEVERAL | dict(reweight_clip=0.5, reweight_steps=4, dual_clip=1.2, ema_rate=0.5),
    "distil": dict(top_k=3),
    "distil, many updates": SEVERAL | dict(distil_norm="constant", ratio_limit=1.05, clip_high=0.1, mismatch_limit="1.2"),
    "distil, black box": dict(expert="samples", distil_norm="constant", feedback="sibling"),
    "distil, black box, two updates": dict(expert="samples", minibatch_prompts=2),
    "distil, no future": dict(future=False, temperature=1.5, warmup_steps=2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loop_makes_the_updates_of_the_reference(case, tmp_path):
    loop = distil if "distil" in case else vpd
    cfg = config(case.split(",")[0], loop, **CASES[case])
    done = trained(cfg, tmp_path / "run", loop.train, recompute=0 if "recomputed" in case else None)
    s, state, compare = reference(cfg, done.after)
    total = 0
    for (batch, e_updates, m_updates, row), (letters, told) in zip(done.batches, done.calls, strict=True):
        lr = algorithm.learning_rate(s.lr, state.step, s)
        rows = rows_of(batch, letters, told, cfg)
        assert batch.lengths() == [max(len(row.prompt), len(row.teacher_prompt or [])) + len(row.response) for row in rows]
        if "black box" in case:
            (*asked, model, seeds), ids = done.drawn[state.step]
            assert asked == [batch.xC, batch.y, [i for i, row in enumerate(rows) if row.has_context]]
            assert model not in (None, done.sampler.drawn[0][2])
            assert len({*seeds, *done.drawn[state.step - 1][0][4]}) == 2 * len(rows)  # others in each batch
            for one, taken in zip(rows, ids.tolist()):
                one.taken = taken[: len(one.response)]
        expected = algorithm.one_batch(state, rows, s, compare) | {"lr": lr}
        assert (e_updates, m_updates) == (expected.pop("e_updates"), expected.pop("m_updates"))
        long = [len(x) + len((C.solution or C.feedback).split()) >= cfg.max_teacher_tokens for x, C in zip(batch.x, batch.C) if C]
        assert row["contexts_cut"] == sum(long)
        left_out = row["left_out"]
        assert left_out.get("grader failed", 0) == letters.count("x")
        assert left_out.get("m_step: whole update", 0) == 4 // cfg.minibatch_prompts - m_updates
        assert sum(left_out.get(f"m_step: no {why}", 0) for why in ("signal", "context")) == 16 - expected.pop("m_rows")
        # The log has no delta if it did not move, and no margin if the teacher made no pass at the weights that sampled the batch.
        if not e_updates:
            expected["shift"] = None
        if cfg.minibatch_prompts < 4 and not e_updates and cfg.row().distils and loop is vpd:
            expected["margin"] = None
        for name, value in expected.items():
            assert row[name] == (None if value is None else pytest.approx(value, rel=1e-9, abs=1e-12)), name
        total += e_updates + m_updates
    assert total == len(done.after) and len(done.batches) == cfg.steps
    assert len({seed for _, seed, _ in done.sampler.drawn}) == cfg.steps
    assert done.sampler.calls == "sync " + "sample sleep sync " * cfg.steps
    assert done.sampler.how == (cfg.max_response_tokens, cfg.temperature, cfg.top_p)
