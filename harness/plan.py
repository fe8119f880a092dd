"""What a run will need, computed from its settings and the model's config, without weights or a GPU.

A GPU's memory has two peaks. During training the sampling engine sleeps. During sampling there are no gradients, and the
engine's weights and key-value cache take what the trainer leaves. Tensors are counted one by one, as policy.py and head.py
hold them; the constants below are measured or assumed, as stated. GB is 10^9 bytes.
"""

from dataclasses import dataclass
from math import inf

import torch

from harness import hub
from model import head

FRAMEWORK = 4.0e9  # assumed: CUDA context, NCCL's buffers, fragmentation
ENGINE = 3.0e9  # assumed: CUDA graphs and activations of the engine when awake
ASLEEP = 1.5e9  # assumed: what a sleeping engine keeps, mostly its graphs
LARGEST_SHARE = 0.65  # of the GPU, for the engine: a larger cache brings no speed
PROBE = 32  # maximum tokens of each of a process's two probes after a push (rollout.VLLMSampler)
BF16, F32 = 2, 4  # bytes

# For the estimate of hours. Measured on one H100 (docs/gpus.md): operations per second of a bfloat16 product, bytes moved per
# second, and the share of the former that a training step reaches with (True) and without recomputed layers.
PRODUCT, MEMORY, REACHED = 792e12, 3.0e12, {True: 0.39, False: 0.44}
# Assumed: mean length of prompts and responses, as a share of their limits; seconds of overhead per step of the engine; seconds
# until the last programs are graded; parameters pushed per second; with several GPUs, the seconds that an update waits for the
# network, and the slowest GPU's time over the mean when each has at most two rows of an update.
FILLED, STEP, PROGRAMS, PUSHED, UPDATE, SLOWEST = 1 / 3, 1e-3, 10.0, 1.6e9, 0.15, 1.6
# Training and validation problems of the default subset.
PROBLEMS = {"lcb": (131, 131), "sciknoweval": (450, 50), "math": (17000, 600), "reasoning_gym": (2000, 100)}


@dataclass(frozen=True)
class Plan:
    """Bytes on one GPU, or in one process on a CPU, unless stated otherwise."""

    parameters: int
    processes: int
    gpu: float  # memory of a GPU; 0 for a CPU, where only state, host, model and checkpoint have a meaning
    state: dict[str, float]  # held throughout training
    moments: dict[str, dict[str, float]]  # added at each of training's three peaks, one at a time
    peak: str  # the largest of them
    training: float  # state and peak together
    sampling: dict[str, float]  # held while sampling, without the cache
    share: float  # the engine's share of the GPU while it samples
    cache: float  # the part of it for keys and values
    cache_token: int  # keys and values of one token
    longest: int  # tokens of the longest sequence sampled
    host: int  # in the process that gathers the weights to save them
    model: int  # on disk
    checkpoint: int  # on disk, with optimizer and copies
    stored: float  # the largest micro-batch, in tokens, whose activations fit without recomputing layers

    @property
    def sequences(self) -> float:
        """The number of longest sequences that the cache holds."""
        return max(0.0, self.cache) / (self.cache_token * self.longest)


def read(path: str):
    """The config of a model's folder or hub id. Raises ValueError with one line if it cannot be read."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        hub.look(path)
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # a damaged file raises errors of many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read a model's config from {path!r}: {reason}") from None


def skeleton(config) -> torch.nn.Module:
    """A model without weights whose decoder layers are `base_model.layers`."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ValueError(f"no causal language model for this config: {str(error).splitlines()[0]}") from None
    if not hasattr(model.base_model, "layers"):
        raise ValueError(f"{type(model).__name__} has no list of decoder layers by the name of `layers`")
    return model


def writes_responses(cfg) -> bool:
    """Whether the teacher writes whole responses instead of scoring the student's (OVD)."""
    return getattr(cfg.row(), "replaces", False)


def tokens(cfg) -> tuple[int, int, int]:
    """The maximum tokens of a student's row, of a teacher's row (0 without a teacher) and of a sampled sequence."""
    student = cfg.max_prompt_tokens + cfg.max_response_tokens
    reviewed = cfg.row().teacher and cfg.feedback == "critique" and not cfg.critic_url
    review = cfg.max_teacher_tokens + cfg.max_critique_tokens if reviewed else 0
    taught = cfg.max_teacher_tokens + cfg.max_response_tokens if cfg.reader() else 0
    writes = writes_responses(cfg) or cfg.teacher_probe and cfg.eval_every
    return student, taught, max(student, review, taught if writes else 0)


def memory(config, cfg, processes: int, gpu_bytes: float = 0) -> Plan:
    """The plan of a run. config: transformers' config; cfg: vpd.Config; processes: one per GPU; gpu_bytes: memory of a GPU, 0 for
    a CPU. Raises ValueError for a model that policy.py cannot train."""
    model, method = skeleton(config), cfg.row()
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.base_model.layers]
    whole = sum(p.numel() for p in model.parameters())  # a tied head counts once
    root_size, layer_size = whole - sum(layers), max(layers)
    # Tensors are sharded along the first axis, and the first process has the largest shards.
    shard = sum(-(-len(p) // processes) * (p.numel() // len(p)) for p in model.parameters())
    master = getattr(torch, cfg.dtype).itemsize
    compute = BF16 if gpu_bytes else master
    teacher, e_step = cfg.reader(), method.e_step
    optimizers = 2 if e_step and cfg.e_optimizer == "own" else 1
    copies = ["EMA teacher"] * (teacher == "ema") + ["initial weights"] * (e_step and cfg.prior == "fixed")
    kept = {"weights": shard * master, "AdamW's moments": 2 * optimizers * shard * master}
    kept |= dict.fromkeys(copies, shard * master)
    state = kept | {"gradients": shard * master}

    text = config.get_text_config()
    H, V, heads = text.hidden_size, text.vocab_size, text.num_attention_heads
    inner = getattr(text, "intermediate_size", None) or 4 * H
    d = getattr(text, "head_dim", None) or H // heads
    queries, keys = heads * d, (getattr(text, "num_key_value_heads", None) or heads) * d
    student, taught, longest = tokens(cfg)
    # A micro-batch fills micro_batch_tokens or is one longer row. Only the E-step has a backward pass over the teacher's rows.
    n = max(cfg.micro_batch_tokens, taught if e_step else student)
    activations = (  # per layer and token
        2 * (F32 + 2 * BF16) * H  # two norms: input in float32, normalised, output
        + (F32 + BF16) * (queries + keys)  # norms of queries and keys
        + BF16 * (queries + 2 * keys + queries)  # queries, keys and values as attention takes them, and its output
        + BF16 * 4 * inner  # MLP: gate, its activation, up, their product
    )
    recomputed = n * (
        activations
        + BF16 * 3 * (inner + H)  # gradients in flight: three of the MLP, three of states
        + F32 * 3 * H  # backward pass of a norm, in float32
        + (F32 + 2 * BF16) * queries  # backward pass of attention: queries in float32, keys and values for every head
    )
    compares = bool(teacher) and not writes_responses(cfg)  # the head reads the teacher's states too
    full = method.distils and not cfg.top_k  # all of V is compared, in six blocks of columns
    chunk = min(n, head.tokens_per_chunk(V, compute, "cuda", 1 + compares))
    # The student's last states: the last norm's input in float32 and normalised, the responses' states, those without padding,
    # their gradient. The teacher's: two of these.
    standing = {
        "layer inputs": n * BF16 * H * len(layers),
        "last states": n * (F32 + BF16 * (4 + 2 * compares)) * H,
        "root gathered": root_size * compute,
        "gradient of the head": V * H * compute,
    }
    if teacher == "ema" and compares:
        standing["EMA teacher, root gathered"] = root_size * compute
    # Student's and teacher's in float32, and one bfloat16 copy.
    logits = chunk * ((F32 * (1 + compares) + BF16) * V + F32 * 6 * full * head.COLUMNS)
    moments = {
        "the loss head": standing | {"logits in chunks": logits},
        "a layer's backward pass": standing | {
            "three layers gathered": 3 * layer_size * compute,  # this one, the next one, and a buffer
            "a layer's gradient before its reduction": layer_size * (compute + F32),
            "a layer recomputed": recomputed,
        },
        "the root's gradient": {
            "root gathered": root_size * compute,
            "its gradient before its reduction": root_size * (compute + F32),
        },
    }  # fmt: skip
    for parts in moments.values():
        parts["framework (assumed)"] = FRAMEWORK + ASLEEP
    peak = max(moments, key=lambda name: sum(moments[name].values()))
    training = sum(state.values()) + sum(moments[peak].values())

    # After a push, while the engine is awake, the trainer scores two probes, one layer at a time and without gradients.
    probes = 2 * (cfg.max_prompt_tokens + PROBE)
    passing = probes * (2 * F32 * H + BF16 * 4 * (H + inner)) + min(probes, 2 * PROBE) * 2 * F32 * V
    guard = root_size * compute + 2 * layer_size * compute + passing
    sampling = kept | {
        "forward pass that checks a push": guard,
        "engine's weights, bf16": BF16 * whole,
        "framework and engine (assumed)": FRAMEWORK + ENGINE,
    }
    # The engine gets what the trainer does not need at that time, less a twentieth for what is not counted.
    share = cfg.engine_memory or min(LARGEST_SHARE, 0.95 - (sum(kept.values()) + guard + FRAMEWORK) / (gpu_bytes or inf))
    return Plan(
        whole, processes, gpu_bytes, state, moments, peak, training, sampling, share,
        cache=share * gpu_bytes - BF16 * whole - ENGINE,
        cache_token=2 * BF16 * text.num_hidden_layers * keys, longest=longest,
        host=whole * (master + (compute if compute < master else 0)), model=whole * compute,
        checkpoint=whole * master * (1 + 2 * optimizers + len(copies)),
        stored=max(0.0, 0.9 * gpu_bytes - training) / (activations * len(layers)),
    )  # fmt: skip


def refuse(plan: Plan, cfg) -> None:
    """Raises ValueError with one line if training, or the cache for a single sequence, exceeds a GPU's memory."""
    if not plan.gpu:
        return
    state, room = sum(plan.state.values()), plan.gpu - sum(plan.sampling.values())
    here = f"on each GPU ({plan.processes} x {size(plan.gpu)})"
    helps = "try more GPUs" + ", --teacher live" * ("EMA teacher" in plan.state)
    helps += ", --e_optimizer shared" * (cfg.row().e_step and cfg.e_optimizer == "own")
    helps += ", --prior dynamic" * ("initial weights" in plan.state)
    if plan.training > plan.gpu:
        need = f"training needs {size(plan.training)} {here}: {size(state)} for weights, gradients and optimizer, and "
        need += f"{size(plan.training - state)} for {plan.peak}"
        helps += ", smaller --micro_batch_tokens, --max_teacher_tokens, --max_response_tokens" * (state < plan.gpu)
        raise ValueError(f"{need}; {helps}")
    if cfg.sampler == "hf":
        return
    if plan.sequences < 1:
        left = f"sampling leaves {size(max(0, plan.cache))} {here} for the key-value cache, but one sequence of {plan.longest} "
        left += f"tokens needs {size(plan.cache_token * plan.longest)}"
        helps += ", a larger --engine_memory, smaller --max_prompt_tokens, --max_response_tokens" * (room > 0)
        raise ValueError(f"{left}; {helps}")
    if plan.cache > room:
        most = f"at most {plan.share - (plan.cache - room) / plan.gpu:.2f}"
        raise ValueError(f"--engine_memory {plan.share:g} is more than the trainer leaves free {here}: {most}")


def operations(config, prompt: float, response: float) -> float:
    """Floating-point operations of one row's forward pass: two per weight and token in the layers, and in the head for the
    response only; attention's two products over the causal half."""
    layers, text = skeleton(config).base_model.layers, config.get_text_config()
    weights = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    square = 2 * text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    length = prompt + response
    return 2 * weights * length + square * len(layers) * length**2 + 2 * text.vocab_size * text.hidden_size * response


def seconds(plan: Plan, config, cfg) -> dict[str, float]:
    """Estimated seconds of a batch by phase, with its share of the evaluations, on GPUs as fast as an H100."""
    N, rows, R = plan.processes, cfg.prompts_per_batch * cfg.group_size, cfg.max_response_tokens
    x, xC, y = (FILLED * n for n in (cfg.max_prompt_tokens, cfg.max_teacher_tokens, R))
    updates, writes = cfg.prompts_per_batch // cfg.minibatch_prompts, writes_responses(cfg)
    each = rows / updates / N  # rows of an update on one GPU
    rate = N * PRODUCT * REACHED[min(cfg.micro_batch_tokens, each * (x + y)) > plan.stored]
    student, teacher = (rows * operations(config, prompt, y) / rate for prompt in (x, xC))

    def sample(count: float, prompt: float) -> float:
        """The engine reads the weights once per step. The longest row, or the size of the cache, sets the number of steps."""
        steps = max(R, count / N * y / max(1.0, min(128, plan.cache / plan.cache_token / (prompt + y))))
        cached = count / N * y * (prompt + y / 2) * plan.cache_token
        return (steps * BF16 * plan.parameters + cached) / MEMORY + steps * STEP

    grading, method = PROGRAMS * (cfg.task == "lcb"), cfg.row()
    due = method.e_step / cfg.e_step_every
    frozen = 1.0 if updates > 1 else due
    reads = bool(cfg.reader()) and not writes and (method.distils or method.scores and updates == 1)
    watched = PROBLEMS.get(cfg.task, (0, 0))[1] * cfg.eval_samples
    return {
        "rollouts": sample(rows, x) + writes * sample(rows, xC),
        "grading": grading,
        "freeze": frozen * student + (frozen if method.scores else due) * teacher,
        "E-step": due * 3 * teacher,
        "M-step": (3 * student + reads * teacher) * (SLOWEST if N > 1 and each <= 2 else 1) + updates * UPDATE * (N > 1),
        "sync": plan.parameters / PUSHED,
        "evaluation": (sample(watched, x) + grading) / cfg.eval_every if watched and cfg.eval_every else 0.0,
    }


def hours(plan: Plan, config, cfg) -> str:
    batch = seconds(plan, config, cfg)
    steps, each = cfg.steps or cfg.epochs * (PROBLEMS.get(cfg.task, (0, 0))[0] // cfg.prompts_per_batch), sum(batch.values())
    total = f"{steps * each / 3600:.2g} hours for {steps} batches" if steps else "a batch"
    parts = ", ".join(f"{name} {value:.3g}" for name, value in batch.items() if value)
    return f"estimate (not measured; GPUs as fast as an H100, rows {FILLED:.2f} of their limits): {total} of {each:.3g} s: {parts}"


def size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def show(cfg, path: str, processes: int) -> Plan:
    """Prints the plan for the GPUs that the settings name, or for those here. Raises ValueError if the run does not fit."""
    gpu = cfg.gpu_memory * 1e9 or (torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0)
    config = read(path)
    plan = memory(config, cfg, cfg.gpus or processes, gpu)
    estimate = [hours(plan, config, cfg)] if cfg.plan and gpu else []
    print("\n".join(lines(plan, cfg) + estimate), flush=True)
    refuse(plan, cfg)
    return plan


def lines(plan: Plan, cfg) -> list[str]:
    """The plan as text; three lines on a CPU."""
    B, G = cfg.prompts_per_batch, cfg.group_size
    updates = lambda prompts: f"{B // prompts} update{'s' * (B > prompts)} of {prompts * G} sequences"  # noqa: E731
    student, taught, _ = tokens(cfg)
    micro_batch = max(cfg.micro_batch_tokens, student, 0 if writes_responses(cfg) else taught)
    rows = f"{B * G} rollouts per batch; M-step: {updates(cfg.minibatch_prompts)}"
    most = f"maximum tokens: {student} per student row" + f", {taught} per teacher row" * bool(taught)
    most += f", {micro_batch} per micro-batch, {cfg.minibatch_prompts * G * student} per M-step update"
    if cfg.row().e_step:
        rows += f"; E-step, every {cfg.e_step_every} batches: {updates(cfg.e_minibatch_prompts)}"
        most += f", {cfg.e_minibatch_prompts * G * taught} per E-step update"
    end = f"host memory: {size(plan.host)} in the process that gathers the weights to save them; "
    end += f"disk: {size(plan.model)} per model, {size(plan.checkpoint)} per checkpoint"
    if not plan.gpu:
        state = f"{size(sum(plan.state.values()))} per process for weights, gradients and optimizer"
        return [rows, most, f"{plan.parameters:.3g} parameters on a CPU: {state}; {end}"]
    columns = plan.state | plan.moments[plan.peak], plan.sampling
    title = f"{plan.parameters:.3g} parameters; GB on each of {plan.processes} GPUs of {plan.gpu / 1e9:.1f}"
    table = [f"{title:54}{'training':>10}{'sampling':>10}"]
    for name in columns[0] | columns[1]:
        cells = [f"{column[name] / 1e9:10.2f}" if name in column else " " * 10 for column in columns]
        table.append(f"  {name:52}{''.join(cells)}".rstrip())
    table.append(f"  {'together':52}{plan.training / 1e9:10.2f}{sum(plan.sampling.values()) / 1e9:10.2f}")
    peak = f"training peaks in {plan.peak}; micro-batches of more than {plan.stored:.0f} tokens recompute layers"
    cache = f"the engine's share, {max(0, plan.share):.2f} of the GPU, leaves {size(max(0, plan.cache))} for keys and values: "
    cache += f"{plan.cache_token} bytes per token, {int(plan.sequences)} sequences of {plan.longest} tokens"
    return [rows, most, *table, peak, cache, end]
