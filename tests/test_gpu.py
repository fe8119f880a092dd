"""What only a GPU can show: `bash run.sh test-gpu`, a few minutes on one card, with random models. The measurements are printed as
one table at the end and written as JSON to the file that VPD_GPU_TABLE names. VPD_GPU_TEST_ON=cpu rehearses the same code
anywhere, at tiny sizes and without limits on memory. Tests with vLLM run where it is installed."""

import copy
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, Qwen3Config

import losses
from harness import plan
from model import checkpoint, head
from model.parallel import ALONE, World, whole
from model.policy import Policy, _empty, ema_update

pytestmark = pytest.mark.gpu
GPU = os.environ.get("VPD_GPU_TEST_ON", "cuda") == "cuda"
if GPU and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

ROOT, BF16 = Path(__file__).resolve().parents[1], torch.bfloat16
TOKENIZER = SimpleNamespace(eos_token_id=2, chat_template=None)
qwen3 = partial(Qwen3Config, tie_word_embeddings=True, bos_token_id=None, eos_token_id=2, pad_token_id=0)
TINY = qwen3(
    vocab_size=512, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    intermediate_size=256, initializer_range=0.1,
)  # fmt: skip
SMALL = LARGE = TINY
ROWS, PROMPT, CONTEXT, RESPONSE = 2, 16, 16, 32
HEAD_TOKENS, WHOLE_TOKENS, SQUARE, COPIED = 64, 16, 64, 1 << 10
if GPU:
    like = dict(vocab_size=151936, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
    SMALL = qwen3(**like, hidden_size=1024, intermediate_size=3072, architectures=["Qwen3ForCausalLM"])
    LARGE = qwen3(**like, hidden_size=2048, intermediate_size=6144)
    ROWS, PROMPT, CONTEXT, RESPONSE = 4, 512, 512, 1536  # 8,192 tokens of the student
    HEAD_TOKENS, WHOLE_TOKENS, SQUARE, COPIED = 8192, 2048, 8192, 1 << 30  # the plain formulas keep many whole logits


# ---- The table -------------------------------------------------------------------------------------------------


class Table(list):
    def row(self, check: str, value, unit: str = "", beside: str = "") -> None:
        """beside: what to compare the value with. The file is complete after every row."""
        self.append({"check": check, "value": value, "unit": unit, "beside": beside})
        Path(os.environ.get("VPD_GPU_TABLE", "gpu.json")).write_text(json.dumps(self, indent=1) + "\n")

    def __str__(self) -> str:
        shown = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)  # noqa: E731
        return "\n".join(f"{r['check']:50}{shown(r['value']):>14} {r['unit']:16}{r['beside']}".rstrip() for r in self)


@pytest.fixture(scope="module")
def world():
    """A group of one, as a run on one GPU makes it."""
    transformers.utils.logging.disable_progress_bar()
    os.environ |= ALONE
    yield World.start()
    if "vllm" not in sys.modules:  # its engine does not outlive the group
        dist.destroy_process_group()
    for name in ALONE:
        os.environ.pop(name, None)


@pytest.fixture(scope="module")
def table(world):
    rows, ask = Table(), ["nvidia-smi", "-i", "0", "--query-gpu=driver_version", "--format=csv,noheader"]
    rows.row("card", torch.cuda.get_device_name() if GPU else "a rehearsal")
    rows.row("driver", subprocess.run(ask, capture_output=True, text=True).stdout.strip() if GPU else "none")
    rows.row("torch", torch.__version__, beside=f"transformers {transformers.__version__}")
    a, b = (torch.randn(SQUARE, SQUARE, device=world.device, dtype=BF16) for _ in range(2))
    rows.ceiling = 2 * SQUARE**3 / best(lambda: a @ b, 10)
    rows.row("bfloat16 matrix product, the ceiling", rows.ceiling / 1e12, "TFLOP/s", f"{SQUARE}^3, best of 10")
    a, b = (torch.empty(COPIED, device=world.device) for _ in range(2))
    rows.row("copy, read and written", 2 * a.nbytes / best(lambda: a.copy_(b), 5) / 1e12, "TB/s")
    del a, b
    yield rows
    print(f"\n{rows}")


@pytest.fixture(autouse=True)
def tidy():
    yield
    sys.last_exc = sys.last_value = sys.last_traceback = None  # a failed test's frames hold the GPU's memory
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def seconds(run) -> float:
    wait = torch.cuda.synchronize if GPU else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def best(run, times: int = 3) -> float:
    run()  # libraries load at first use
    return min(seconds(run) for _ in range(times))


def peak(run, base: int | None = None) -> float:
    """Peak GPU memory of `run`, in bytes above what was allocated before it, or above `base`."""
    if not GPU:
        run()
        return math.nan
    base = torch.cuda.memory_allocated() if base is None else base
    torch.cuda.reset_peak_memory_stats()
    run()
    return float(torch.cuda.max_memory_allocated() - base)


def difference(x: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((x.double() - wanted.double()).norm() / wanted.double().norm()).item()


@torch.no_grad()
def random_policy(config, world: World, tokenizer=TOKENIZER, **kwargs) -> Policy:
    """Random weights, made in the shards: making a large model on the CPU first takes minutes."""
    model = _empty(config, torch.float32)
    policy = Policy(model, tokenizer, micro_batch_tokens=1 << 20, world=world, compute=BF16, compiled=GPU, **kwargs)
    torch.manual_seed(0)
    for p in policy.model.parameters():
        p.to_local().normal_(0, config.initializer_range) if p.ndim > 1 else p.to_local().fill_(1)
    return policy


def draw(rows: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed)).tolist()


def of_kind(kind: str, top_k: int | None = None) -> dict:
    return {"divergence": partial(losses.divergence, kind=kind), "top_k": top_k}


def distil(policy: Policy, x, xC, y, optimizer, learning_rate: float = 1e-6) -> float:
    """One update towards the teacher, the same weights reading xC. Returns the gradient's norm."""
    with torch.no_grad():
        teacher = policy.view(xC, y)
    view = policy.view(x, y)
    weights = losses.sequence_weights(view.mask, len(y))
    loss, _ = view.loss(lambda t: t.D, weights, teacher=teacher, **of_kind("kl_student_teacher", 100))
    policy.backward(loss)
    return policy.step(optimizer, learning_rate, 1.0)


# ---- One step of each method: bfloat16 over float32 shards beside float32 on the CPU -----------------------------

LENGTHS = [(5, 9, 17), (12, 3, 8), (7, 20, 11), (9, 9, 24), (4, 15, 5), (11, 6, 14)]  # x, C, y of a group of six
x, C, y = ([draw(1, n, 512, 10 * i + j)[0] for i, n in enumerate(column)] for j, column in enumerate(zip(*LENGTHS)))
xC = [a + b for a, b in zip(x, C)]
REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0])


def sdpo(t):
    return losses.truncated_ratio(t.logp, t.old_logp, 2.0) * t.D


def grpo(t, A="A"):
    return losses.grpo_loss(t.logp, t.old_logp, vars(t)[A])


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.flatten().cpu() for t in tensors])


STEPS = {  # objective, the prompts it is differentiated under, and how student and teacher are compared
    "vpd, M-step": (lambda t: t.D, x, of_kind("kl_student_teacher", 20)),
    "vpd, E-step": (lambda t: t.c * t.logp, xC, None),
    "sdpo": (sdpo, x, of_kind("js", 100)),
    "grpo": (grpo, x, None),
    "joint": (lambda t: sdpo(t) + grpo(t), x, of_kind("kl_teacher_student")),
    "reshape": (partial(grpo, A="reshaped"), x, None),
    "reweight": (partial(grpo, A="reweighted"), x, None),
    "distil": (lambda t: t.D + grpo(t), x, {"divergence": lambda log_s, log_t: losses.cross_entropy(log_t, log_s)}),
}


@pytest.fixture(scope="module")
def tiny():
    """The model, and what is known of each token: made once, in float32. The ratios keep away from where they are
    clipped, since gradients differ on the two sides."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TINY, dtype=torch.float32)
    policy = Policy(copy.deepcopy(model), TOKENIZER)
    (now, _), (teacher, _), mask = policy.score(x, y), policy.score(xC, y), policy.mask(y)
    A = losses.group_advantages(REWARDS, 6)
    change = torch.tensor([-1.5, -0.5, -0.1, 0.0, 0.1, 0.5, 1.5])[torch.arange(now.numel()).view_as(now) % 7]
    implicit = losses.implicit_reward(teacher, now, mask, 0.1).requires_grad_()
    losses.bco_loss(implicit, REWARDS, losses.reward_shift(implicit, REWARDS)).backward()
    return model, {
        "old_logp": now + change, "A": A[:, None].expand_as(now),
        "c": len(y) * 0.1 * (implicit.grad[:, None] * mask.sum(-1, keepdim=True)).expand_as(now),
        "reshaped": losses.reshaped_advantages(A, teacher, now, 1.0, 1.0),
        "reweighted": losses.reweighted_advantages(A, teacher, now, 0.5, 0.2),
    }  # fmt: skip


def step_of(method: str, model, known: dict, **placed) -> tuple[float, float, torch.Tensor, torch.Tensor]:
    """(loss, norm, gradient, change of the weights) of one AdamW step over several micro-batches, the last one empty, as in a
    process with fewer rows than others."""
    policy = Policy(copy.deepcopy(model), TOKENIZER, micro_batch_tokens=90, **placed)
    objective, prompts, compared = STEPS[method]
    optimizer, total = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.0), 0.0
    before = flat(w for _, w in whole(policy.model))
    batches = policy.micro_batches(range(len(y)), [len(p) + len(r) for p, r in zip(xC, y)])
    assert len(batches) > 1
    for rows in [*batches, []]:
        responses = [y[i] for i in rows]
        with torch.no_grad():
            teacher = policy.view([xC[i] for i in rows], responses) if compared else None
        view = policy.view([prompts[i] for i in rows], responses)
        here = {name: value[rows, : view.mask.shape[1]].to(policy.device) for name, value in known.items()}
        weights = losses.sequence_weights(view.mask, len(y))
        loss, _ = view.loss(objective, weights, here, teacher, **(compared or {}))
        policy.backward(loss)
        total += loss.item()
    gradients = [p.grad for p in policy.model.parameters()]
    assert {g.dtype for g in gradients} == {torch.float32}
    gradient = flat(g.full_tensor() if placed else g for g in gradients)
    norm = policy.step(optimizer, 1e-6, math.inf)
    return total, norm, gradient, flat(w for _, w in whole(policy.model)) - before


@pytest.mark.parametrize("method", STEPS)
def test_a_step_in_bfloat16_over_shards_is_that_of_float32(method, world, table, tiny):
    loss, norm, gradient, change = step_of(method, *tiny, world=world, compute=BF16)
    wanted_loss, _, wanted, wanted_change = step_of(method, *tiny)
    # The first change by AdamW is lr times the gradient's sign: it is compared where the gradient is not nearly 0.
    clear = wanted.abs() > 0.3 * wanted.square().mean().sqrt()
    same_way = (change.sign() == wanted_change.sign())[clear].double().mean().item()
    off, cosine = difference(gradient, wanted), torch.cosine_similarity(gradient, wanted, dim=0).item()
    beside = f"loss {loss:.5f}, float32 {wanted_loss:.5f}; cosine {cosine:.5f}; {same_way:.2%} step the same way"
    table.row(f"{method}: gradient beside float32", off, "relative", beside)
    assert loss == pytest.approx(wanted_loss, rel=0.03, abs=2e-3)
    assert norm == pytest.approx(gradient.norm().item(), rel=1e-4)
    assert cosine > 0.99 and off < 0.15
    assert same_way > 0.98
    assert change[clear].abs().mean() == pytest.approx(1e-6, rel=0.02)  # too small for weights in bfloat16


def test_recomputation_leaves_the_gradient_as_it_is(world, table, tiny):
    steps = (step_of("joint", *tiny, world=world, compute=BF16, recompute=tokens) for tokens in (math.inf, 0))
    stored, again = (gradient for _, _, gradient, _ in steps)
    table.row("gradient with recomputation beside without", difference(again, stored), "relative")
    assert difference(again, stored) < 0.01


# ---- The head ----------------------------------------------------------------------------------------------------

HEADS = {"log-probabilities": None, "top 100, KL(student||teacher)": of_kind("kl_student_teacher", 100),
         "all of V, KL(teacher||student)": of_kind("kl_teacher_student"), "all of V, JS": of_kind("js")}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_the_head_beside_whole_logits_and_its_products(case, world, table, monkeypatch):
    compared, width, V = HEADS[case], LARGE.hidden_size, LARGE.vocab_size
    objective = (lambda t: t.D) if compared else (lambda t: -t.logp)
    torch.manual_seed(0)
    states = torch.randn(HEAD_TOKENS, width, device=world.device)
    teacher = (states + 0.5 * torch.randn_like(states)).to(BF16)
    states, tokens = states.to(BF16).requires_grad_(), torch.randint(V, (HEAD_TOKENS,), device=world.device)
    matrix = (torch.randn(V, width, device=world.device) * 1.5 * width**-0.5).to(BF16).requires_grad_()
    if not GPU:
        monkeypatch.setattr(head, "tokens_per_chunk", lambda *_: 5)

    def in_chunks(n: int):
        mask = torch.ones(1, n, device=world.device)
        view = lambda states, matrix: head.View(states[None, :n], tokens[None, :n], mask, matrix)  # noqa: E731
        how = {**compared, "teacher": view(teacher, matrix.detach())} if compared else {}
        total, _ = view(states, matrix).loss(objective, mask / n, **how)
        return total, *torch.autograd.grad(total, [states, matrix])

    def on_whole_logits(n: int):
        logits = product(states[:n], matrix)[None]
        if compared:
            kind, taught = compared["divergence"].keywords["kind"], product(teacher[:n], matrix)[None]
            per_token = losses.distillation_loss(logits, taught, kind, compared["top_k"])
        else:
            per_token = -losses.token_logp(logits, tokens[None, :n])
        total = losses.sequence_mean(per_token, torch.ones_like(per_token), 1)
        return total, *torch.autograd.grad(total, [states, matrix])

    def product(states, matrix):
        """A float32 product of bfloat16 factors, unrounded on CUDA, as in the head."""
        return states.float() @ matrix.float().T if GPU else (states @ matrix.T).float()

    @torch.no_grad()
    def products():
        logits = states @ matrix.T
        if compared:
            logits = teacher @ matrix.T
        return logits @ matrix, logits.T @ states

    found, wanted = in_chunks(WHOLE_TOKENS), on_whole_logits(WHOLE_TOKENS)
    off = [difference(a, b) for a, b in zip(found, wanted)]
    del found, wanted
    most, plain = peak(lambda: in_chunks(HEAD_TOKENS)), peak(lambda: on_whole_logits(WHOLE_TOKENS))
    most, plain = (size / (4 * n * V) for size, n in ((most, HEAD_TOKENS), (plain, WHOLE_TOKENS)))
    took, bare = 1e3 * best(lambda: in_chunks(HEAD_TOKENS)), 1e3 * best(products)
    table.row(f"head, {case}: d hidden", off[1], "relative", f"d head {off[2]:.2g}, value {off[0]:.2g}")
    table.row(f"  {HEAD_TOKENS} tokens", took, "ms", f"its products {bare:.2f} ms: {took / bare:.2f} times as long")
    table.row("  peak", most, "logits tensors", f"whole logits {plain:.1f}")
    assert off[0] < 1e-4 and max(off) < 0.01
    assert not most > 0.6


# ---- A training step ---------------------------------------------------------------------------------------------


def flops(config) -> tuple[float, float]:
    """Floating-point operations of `distil` on ROWS, and what recomputation of the layers adds. The student's forward and backward
    are three forward passes, the teacher's is one."""
    student, head = ROWS * plan.operations(config, PROMPT, RESPONSE), 2 * config.vocab_size * config.hidden_size * ROWS * RESPONSE
    return 3 * student + ROWS * plan.operations(config, PROMPT + CONTEXT, RESPONSE), student - head


def planned(config) -> float:
    """Bytes that --plan counts for `distil` on ROWS, less the framework's, which the allocator does not see."""
    from vpd import Config

    cfg = Config(
        method="sdpo", teacher="live", top_k=100, max_prompt_tokens=PROMPT, max_response_tokens=RESPONSE,
        max_teacher_tokens=PROMPT + CONTEXT, micro_batch_tokens=ROWS * (PROMPT + RESPONSE),
    )  # fmt: skip
    found = plan.memory(config, cfg, 1, torch.cuda.mem_get_info()[1] if GPU else 80e9)
    return found.training - plan.FRAMEWORK - plan.ASLEEP


@pytest.mark.parametrize("recompute", [0, math.inf], ids=["recomputed", "stored"])
def test_speed_and_memory_of_a_training_step(recompute, world, table):
    policy = random_policy(LARGE, world, recompute=recompute)
    optimizer = torch.optim.AdamW(policy.model.parameters(), fused=GPU)
    a, b, c = (draw(ROWS, n, LARGE.vocab_size, i) for i, n in enumerate((PROMPT, CONTEXT, RESPONSE)))
    update = partial(distil, policy, a, [p + q for p, q in zip(a, b)], c, optimizer)
    norms = [update()]  # creates the optimizer's moments
    most = peak(lambda: norms.append(update()), base=0)
    took = statistics.median(seconds(update) for _ in range(5 if GPU else 2))
    own, again = flops(LARGE)
    table.row(f"step of 1.7B, {'all stored' if recompute else 'recomputed'}", took, "s",
              f"{ROWS} x ({PROMPT} + {RESPONSE}) tokens, teacher's context {CONTEXT}")  # fmt: skip
    table.row("  student's tokens", ROWS * (PROMPT + RESPONSE) / took, "a second")
    beside = "" if recompute else f"with what is done twice {(own + again) / took / table.ceiling:.1%}"
    table.row("  share of the ceiling", own / took / table.ceiling, "", beside)
    table.row("  peak", most / 1e9, "GB")
    assert all(map(math.isfinite, norms))
    if not recompute:
        counted = planned(LARGE)
        table.row("  planned", counted / 1e9, "GB")
        assert not GPU or most <= counted < 1.25 * most


# ---- Copies, checkpoints, folders, ends ----------------------------------------------------------------------------


def test_a_moving_average_and_a_checkpoint_come_back_bit_by_bit(world, table, tmp_path):
    policy = random_policy(SMALL, world)
    optimizer = torch.optim.AdamW(policy.model.parameters(), fused=GPU)
    a, b, c = (draw(2, 64, SMALL.vocab_size, i) for i in range(3))
    update = partial(distil, policy, a, b, c, optimizer, learning_rate=1e-3)
    local = lambda tensors: [getattr(x, "_local_tensor", x).detach().clone() for x in tensors]  # noqa: E731
    update()
    average = policy.frozen_copy()
    old = local(average.parameters())
    assert all(map(torch.equal, old, local(policy.model.parameters())))
    update()
    took = seconds(lambda: ema_update(average, policy.model, 0.05))
    wanted = [0.95 * o + 0.05 * n for o, n in zip(old, local(policy.model.parameters()))]
    assert max(map(difference, local(average.parameters()), wanted)) < 1e-6
    assert not torch.equal(policy.score(a, c, model=average)[0], policy.score(a, c)[0])  # passes of its own
    del old, wanted

    models, optimizers = {"student": policy.model, "ema": average}, {"student": (policy.model, optimizer)}

    def state() -> list[torch.Tensor]:
        moments = [value for kept in optimizer.state.values() for value in kept.values()]
        return local([*policy.model.parameters(), *average.parameters(), *moments])

    saved, kept = state(), []
    wrote = seconds(lambda: checkpoint.save(tmp_path, 7, models, optimizers, {"delta": 0.5}, world))
    update(), ema_update(average, policy.model, 0.5)
    assert not any(map(torch.equal, state(), saved))
    read = seconds(lambda: kept.append(checkpoint.restore(tmp_path, models, optimizers, world)))
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    table.row("moving average of 0.6B", 1e3 * took, "ms")
    table.row("checkpoint of 0.6B written", wrote, "s", f"{size / 1e9:.1f} GB; read {read:.1f} s")
    assert kept == [{"step": 7, "delta": 0.5}]
    found = state()
    assert len(found) == len(saved) and all(map(torch.equal, found, saved))
    assert math.isfinite(update())  # it goes on


def test_a_saved_folder_loads_into_shards_as_from_pretrained(world, table, tmp_path, tokenizer):
    folder, loaded = str(tmp_path / "model"), []
    wrote = seconds(lambda: random_policy(SMALL, world, tokenizer).save(folder))
    took = seconds(lambda: loaded.append(Policy.load(folder, world=world, compute=BF16)))
    plainly = seconds(lambda: loaded.append(AutoModelForCausalLM.from_pretrained(folder, dtype=BF16).to(world.device)))
    ids = torch.arange(3, 67, device=world.device)[None]
    with torch.no_grad():
        off = difference(loaded[0].model(input_ids=ids).logits, loaded[1](input_ids=ids).logits)
    table.row("0.6B read into shards", took, "s", f"from_pretrained {plainly:.1f} s; made and written {wrote:.1f} s")
    table.row("  its logits beside from_pretrained's", off, "relative")
    assert loaded[0].dtype == torch.float32 and off < 0.01


def outside(*command: str, **how) -> subprocess.Popen:
    """A process with a group of its own."""
    return subprocess.Popen([sys.executable, "-W", "ignore", *command], cwd=ROOT, env=os.environ | ALONE, text=True, **how)


def test_a_finished_process_ends_with_status_0(table, tmp_path):
    command = ("vpd.py", "--subset", "choice", "--method", "sdpo", "--feedback", "environment", "--sampler", "hf", "--steps", "1",
               "--eval_every", "0")  # fmt: skip
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    three = [outside(*command, "--out", str(tmp_path / str(i)), **pipes) for i in range(3)]
    said = [process.communicate(timeout=200) for process in three]
    table.row("processes that end with status 0", sum(p.returncode == 0 for p in three), "of 3")
    for process, (out, err) in zip(three, said):
        assert process.returncode == 0 and "\ndone: " in out, err


# ---- With vLLM ---------------------------------------------------------------------------------------------------


with_vllm = pytest.mark.skipif(not GPU or find_spec("vllm") is None, reason="no vLLM on a GPU")


@with_vllm
def test_vllm_sleeps_takes_a_push_and_agrees(world, table, tmp_path):
    from rollout import VLLMSampler

    SMALL.save_pretrained(tmp_path)
    policy = random_policy(SMALL, world)
    sampler = VLLMSampler(policy, str(tmp_path), 1024, 0.4)
    free = lambda: torch.cuda.mem_get_info()[0] / 1e9  # noqa: E731
    prompts, asleep, rollouts = draw(16, 100, SMALL.vocab_size, 0), free(), []
    push = seconds(lambda: sampler.sync(policy))
    took = seconds(lambda: rollouts.extend(sampler.sample(prompts, 8, seed=0, max_tokens=256)))
    table.row("vLLM: push of 0.6B", push, "s", f"awake it takes {asleep - free():.1f} GB more")
    table.row("  tokens sampled", sum(len(r.tokens) for r in rollouts) / took, "a second", f"{len(rollouts)} rows")
    table.row("  gap", sampler.gap, "nats a token", f"limit {sampler.gap_limit}")
    sampler.sleep()
    table.row("  asleep, memory free", free(), "GB", f"before the first push {asleep:.2f}")
    assert free() > asleep - 2
    optimizer = torch.optim.AdamW(policy.model.parameters(), fused=GPU)
    distil(policy, prompts, prompts[::-1], [r.tokens[:64] for r in rollouts[::8]], optimizer, learning_rate=1e-3)
    sampler.sync(policy)  # raises where the engine went on with old weights
    table.row("  gap after a large step", sampler.gap, "nats a token")


@with_vllm
def test_vllm_carries_two_batches_of_a_run(table, tmp_path):
    command = ("vpd.py", "--task", "lcb", "--smoke", "qwen3", "--sampler", "vllm", "--out", str(tmp_path / "run"))
    run = outside(*command)
    table.row("vLLM: two batches of lcb --smoke", seconds(lambda: run.wait(timeout=300)), "s")
    assert run.returncode == 0
