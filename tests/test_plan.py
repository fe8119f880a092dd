"""The plan's numbers by hand, against tensors that exist, and against what the paper's models are known to need."""

import re
from dataclasses import replace
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Olmo3Config, Qwen3Config

import vpd
from harness import plan, presets
from harness.settings import parse
from model import head
from model.policy import Policy
from neighbours import distil, ovd

GB = 10**9
QWEN3_8B = dict(
    vocab_size=151936, hidden_size=4096, num_hidden_layers=36, head_dim=128, num_attention_heads=32,
    num_key_value_heads=8, intermediate_size=12288, tie_word_embeddings=False,
)  # fmt: skip
QWEN3_2B = dict(
    vocab_size=151936, hidden_size=2048, num_hidden_layers=28, head_dim=128, num_attention_heads=16,
    num_key_value_heads=8, intermediate_size=6144, tie_word_embeddings=True,
)  # fmt: skip
TINY = dict(
    vocab_size=100, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    intermediate_size=16, tie_word_embeddings=False,
)  # fmt: skip
# TINY's parameters: queries, keys, values, output, the norms of queries and keys, three matrices of the MLP, two norms.
LAYER = 8 * 8 + 4 * 8 + 4 * 8 + 8 * 8 + 4 + 4 + 3 * 16 * 8 + 8 + 8
ROOT_SIZE = 100 * 8 + 8 + 100 * 8
SIZES = "--max_prompt_tokens 10 --max_response_tokens 20 --max_teacher_tokens 30 --micro_batch_tokens 40"


def planned(shape, flags="", processes=1, gpu=0.0, program=vpd):
    method = "" if program is vpd else program.__name__.removeprefix("neighbours.")
    cfg = parse(flags.split(), program.Config, "", "", partial(presets.of, vpd.PRESETS | program.PRESETS), method)
    return plan.memory(Qwen3Config(**shape), cfg, processes, gpu), cfg


# ---- By hand -------------------------------------------------------------------------------------------------


def test_state_is_four_numbers_a_parameter_and_each_copy_and_optimizer_adds_its_own():
    whole = 2 * LAYER + ROOT_SIZE
    base, _ = planned(TINY, "--task lcb --e_optimizer shared")
    assert base.parameters == whole
    assert base.state == {"weights": 4 * whole, "AdamW's moments": 8 * whole, "gradients": 4 * whole}
    assert (base.host, base.model, base.checkpoint) == (4 * whole, 4 * whole, 12 * whole)
    assert planned(TINY, "--task lcb", gpu=GB)[0].host == (4 + 2) * whole  # gathered, and cast to be saved
    for flags, more, on_disk in [
        ("", {"AdamW's moments": 16 * whole}, 20),
        ("--e_optimizer shared --prior fixed", {"initial weights": 4 * whole}, 16),
        ("--method sdpo", {"EMA teacher": 4 * whole}, 16),
        ("--method sdpo --teacher live", {}, 12),
        ("--e_optimizer shared --teacher ema", {"EMA teacher": 4 * whole}, 16),
        ("--method grpo", {}, 12),
        ("--e_optimizer shared --dtype float64", {name: 2 * count for name, count in base.state.items()}, 24),
    ]:
        found, _ = planned(TINY, f"--task lcb {flags}")
        assert found.state == base.state | more and found.checkpoint == on_disk * whole, flags


def test_shards_are_cut_along_the_first_axis_and_rounded_up():
    """Three processes: 100 rows are 34, 16 are 6, 8 are 3, 4 are 2."""
    layer = 3 * 8 + 2 * 8 + 2 * 8 + 3 * 8 + 2 + 2 + 6 * 8 + 6 * 8 + 3 * 16 + 3 + 3
    shard = 2 * layer + 34 * 8 + 3 + 34 * 8
    found, _ = planned(TINY, "--task lcb", processes=3)
    assert found.state == {"weights": 4 * shard, "AdamW's moments": 16 * shard, "gradients": 4 * shard}
    assert found.host == 4 * found.parameters and found.checkpoint == 20 * found.parameters  # whole, not in shards


def test_training_peaks_by_hand():
    found, _ = planned(TINY, f"--task lcb {SIZES} --top_k 5", gpu=80 * GB)
    n = 30 + 20  # one teacher's row is longer than the micro batch
    standing = {
        "layer inputs": n * 2 * 8 * 2,
        "last states": n * (4 + 2 * 6) * 8,
        "root gathered": 2 * ROOT_SIZE,
        "gradient of the head": 2 * 100 * 8,
        "framework (assumed)": 4e9 + 1.5e9,
    }
    norms, attention = 2 * 8 * (4 + 2 + 2), 12 * (4 + 2) + 16 * 2 + 8 * 2  # (2 + 1) * 4 wide, (2 + 2) * 4, 2 * 4
    mlp, underway = 4 * 16 * 2, 3 * 16 * 2 + 3 * 8 * 2 + 3 * 8 * 4 + 8 * (4 + 2 + 2)
    assert found.moments == {
        "the loss head": {**standing, "logits in chunks": n * (4 * 100 + 4 * 100 + 2 * 100)},  # student, teacher, one copy
        "a layer's backward pass": {
            **standing,
            "three layers gathered": 3 * 2 * LAYER,
            "a layer's gradient before its reduction": (2 + 4) * LAYER,
            "a layer recomputed": n * (norms + attention + mlp + underway),
        },
        "the root's gradient": {
            "root gathered": 2 * ROOT_SIZE,
            "its gradient before its reduction": (2 + 4) * ROOT_SIZE,
            "framework (assumed)": 5.5e9,
        },
    }
    assert found.training == sum(found.state.values()) + max(sum(parts.values()) for parts in found.moments.values())
    assert found.peak == "the loss head"
    assert found.stored == pytest.approx((0.9 * 80e9 - found.training) / (2 * (norms + attention + mlp)))


def test_sampling_keeps_weights_moments_and_copies_but_no_gradients():
    found, _ = planned(TINY, f"--task lcb {SIZES} --prior fixed --e_optimizer shared", gpu=80 * GB)
    whole, n = found.parameters, 2 * (10 + 32)  # two probes of 32 tokens after the longest prompt
    layer = n * (2 * 8 * 4 + 4 * 8 * 2 + 4 * 16 * 2)  # states in float32 and bfloat16, four of the MLP
    guard = 2 * ROOT_SIZE + 2 * 2 * LAYER + layer + 64 * 100 * 2 * 4  # and logits, at 64 places
    assert found.sampling == {
        "weights": 4 * whole,
        "AdamW's moments": 8 * whole,
        "initial weights": 4 * whole,
        "forward pass that checks a push": guard,
        "engine's weights, bf16": 2 * whole,
        "framework and engine (assumed)": 4e9 + 3e9,
    }
    assert found.cache_token == 2 * 2 * 2 * 1 * 4  # keys and values, bf16, layers, heads, width
    assert found.share == 0.65  # a tiny model leaves more than the engine may have
    assert found.cache == pytest.approx(0.65 * 80e9 - 2 * whole - 3e9)  # less its weights and graphs
    assert found.sequences == pytest.approx((0.65 * 80e9 - 2 * whole - 3e9) / (32 * (10 + 20)))
    small, _ = planned(TINY, f"--task lcb {SIZES} --prior fixed", gpu=10e9)
    assert small.share == pytest.approx(0.95 - (24 * whole + guard + 4e9) / 10e9)
    told, cfg = planned(TINY, f"--task lcb {SIZES} --engine_memory 0.9", gpu=10e9)
    assert told.share == 0.9
    with pytest.raises(ValueError, match="--engine_memory 0.9 is more .* at most 0.60"):
        plan.refuse(told, cfg)


@pytest.mark.parametrize("flags, rows, longest", [
        ("", 50, 30),  # the E-step's gradient runs through the teacher's rows: 30 + 20
        ("--method sdpo", 40, 30),  # elsewhere through the student's, and the micro batch is longer
        ("--method grpo --micro_batch_tokens 7", 30, 30),
        ("--micro_batch_tokens 4000", 4000, 30),
        ("--feedback critique --max_critique_tokens 9", 50, 30 + 9),  # the review reads the teacher's length
        ("--feedback critique --max_critique_tokens 9 --critic_url http://a/v1 --critic_model m", 50, 30),
        ("--teacher_probe 4", 50, 30 + 20),  # the teacher answers as well
        ("--teacher_probe 4 --eval_every 0", 50, 30)],
)  # fmt: skip
def test_a_micro_batch_is_full_or_one_longer_row(flags, rows, longest):
    found, _ = planned(TINY, f"--task lcb {SIZES} {flags}", gpu=80 * GB)
    assert found.moments["the loss head"]["layer inputs"] == rows * 2 * 8 * 2
    assert found.longest == longest


@pytest.mark.parametrize("flags, buffers, blocks", [
        ("--top_k 20", 2, 0),  # of student and teacher
        ("--top_k 0", 2, 6),  # and six blocks of columns, where all of V is compared
        ("--method grpo", 1, 0),  # no teacher in the loss
        ("--method reshape", 2, 0),  # the teacher's log-probs of the tokens
        ("--top_k 0 --method joint", 2, 6)],
)  # fmt: skip
def test_logits_in_chunks(flags, buffers, blocks):
    found, _ = planned(QWEN3_8B, f"--task lcb {flags}", gpu=80 * GB)
    tokens = head.tokens_per_chunk(151936, 2, "cuda", buffers)
    size = tokens * ((4 * buffers + 2) * 151936 + 4 * blocks * head.COLUMNS)
    assert found.moments["the loss head"]["logits in chunks"] == size
    ema = "EMA teacher, root gathered" in found.moments["the loss head"]
    assert ema == ("reshape" in flags or "joint" in flags)


# ---- Against tensors that exist ------------------------------------------------------------------------------


def test_what_a_layer_keeps_for_its_backward_pass_is_what_autograd_keeps():
    n, shape = 512, TINY | dict(hidden_size=512, num_attention_heads=16, num_key_value_heads=4, head_dim=64,
                                intermediate_size=1536)  # fmt: skip
    model = AutoModelForCausalLM.from_config(Qwen3Config(**shape)).bfloat16()
    states = torch.randn(1, n, 512, dtype=torch.bfloat16, requires_grad=True)
    angles, kept = model.model.rotary_emb(states, torch.arange(n)[None]), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.model.layers[0](states, position_embeddings=angles, attention_mask=None)
    for tensor in (*model.parameters(), *angles):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    found, _ = planned(shape, f"--task lcb --max_prompt_tokens 1 --max_response_tokens 2 --max_teacher_tokens 3 "
                              f"--micro_batch_tokens {n}", gpu=80 * GB)  # fmt: skip
    underway = n * (2 * (3 * 1536 + 3 * 512) + 4 * 3 * 512 + (4 + 2 + 2) * 16 * 64)
    ours = found.moments["a layer's backward pass"]["a layer recomputed"] - underway
    assert out.requires_grad and ours == pytest.approx(sum(kept.values()), rel=0.02)


def test_a_backward_pass_takes_no_more_than_planned():
    """In bfloat16 with recomputation, as on a GPU. The plan may exceed the need by up to 60 percent."""
    shape = TINY | dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
                        intermediate_size=768, num_hidden_layers=4)  # fmt: skip
    network = AutoModelForCausalLM.from_config(Qwen3Config(**shape), dtype=torch.bfloat16)
    policy = Policy(network, SimpleNamespace(eos_token_id=2, chat_template=None), recompute=0)

    def backward(length):
        view = policy.view([[5] * 24] * 2, [[7] * length] * 2)
        policy.backward(view.loss(lambda t: -t.logp, view.mask.float())[0])

    backward(8)  # gradients come into being
    with torch.profiler.profile(profile_memory=True) as profile:
        backward(400)
    changes = (event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    found, _ = planned(shape, "--task lcb --method grpo --max_prompt_tokens 24 --max_response_tokens 400 "
                              "--micro_batch_tokens 848", gpu=80 * GB)  # fmt: skip
    parts = found.moments["a layer's backward pass"]
    ours = sum(parts[name] for name in ("layer inputs", "last states", "a layer recomputed"))
    assert 1 < ours / max(accumulate(changes)) < 1.6


# ---- The paper's models --------------------------------------------------------------------------------------


def test_the_papers_largest_model_fits_its_gpus():
    found, cfg = planned(QWEN3_8B, "--task lcb", 8, 80e9)
    assert found.parameters == pytest.approx(8.19e9, rel=1e-3)
    plan.refuse(found, cfg)
    assert 45e9 < found.training < 55e9 and 15 < found.sequences < 40
    assert found.sampling["engine's weights, bf16"] == 2 * found.parameters  # every GPU has an engine of its own


def test_plans_of_ovd_whose_teacher_only_writes_and_of_distil():
    """OVD's loss is GRPO's, without the teacher's logits; its demonstrations follow the teacher's prompt, so the sequences
    sampled are longer."""
    on_one = lambda flags, program=vpd: planned(QWEN3_2B, f"--task sciknoweval {flags}", 1, 80e9, program)  # noqa: E731
    (sdpo, _), (grpo, _), (of_ovd, _) = on_one("--method sdpo"), on_one("--method grpo"), on_one("", ovd)
    assert of_ovd.state == grpo.state and of_ovd.moments == grpo.moments and of_ovd.checkpoint == grpo.checkpoint
    assert (grpo.longest, of_ovd.longest) == (2048 + 8192, 10240 + 8192)
    assert on_one("--teacher ema", ovd)[0].state == sdpo.state

    own, cfg = on_one("", distil)
    assert own.state == sdpo.state and plan.tokens(cfg) == (2048 + 8192, 10240 + 8192, 2048 + 8192)


def test_a_refusal_names_what_would_help():
    def says(flags, gpu, **changed):
        found, cfg = planned(QWEN3_2B, f"--task lcb {flags}", 1, gpu)
        with pytest.raises(ValueError) as refusal:
            plan.refuse(replace(found, **changed), cfg)
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    tight = says("--e_optimizer shared", 35e9)  # the state fits, a micro batch does not
    assert tight.startswith("training needs") and "--micro_batch_tokens" in tight and "--teacher" not in tight
    assert "--micro_batch_tokens" not in says("", 20e9)  # no micro batch is small enough
    assert "--teacher live" in says("--method sdpo", 35e9) and "--prior dynamic" in says("--prior fixed", 35e9)
    full = says("", 80e9, cache_token=10**7)  # 100 GB a sequence
    assert full.startswith("sampling leaves") and "but one sequence of 10240 tokens needs 102.4 GB" in full
    assert "a larger --engine_memory" in full and "--max_response_tokens" in full


# ---- Hours ---------------------------------------------------------------------------------------------------


def test_the_estimate_of_hours_has_the_measured_step_adds_up_and_scales(monkeypatch):
    made = {shape["num_hidden_layers"]: plan.skeleton(Qwen3Config(**shape)) for shape in (QWEN3_8B, QWEN3_2B)}  # once each
    monkeypatch.setattr(plan, "skeleton", lambda config: made[config.num_hidden_layers])

    def of(shape, flags, processes=8, **changed):
        found, cfg = planned(shape, f"--task {flags}", processes, 80e9)
        about = replace(found, **changed), Qwen3Config(**shape), cfg
        batch = plan.seconds(*about)
        hours, steps, whole = re.search(r": ([\d.]+) hours for (\d+) batches of ([\d.]+) s: ", line := plan.hours(*about)).groups()
        assert line.startswith("estimate (not measured") and float(whole) == pytest.approx(sum(batch.values()), rel=0.01)
        assert sum(float(part.split()[-1]) for part in line.split(" s: ")[1].split(", ")) == pytest.approx(float(whole), rel=0.01)
        assert float(hours) == pytest.approx(int(steps) * sum(batch.values()) / 3600, rel=0.05)
        return batch | {"steps": int(steps)}

    lcb, math = of(QWEN3_8B, "lcb"), of(QWEN3_8B, "math")
    assert lcb["steps"] == 30 * (131 // 32) and math["steps"] == 200 and lcb["grading"] > 0 == math["grading"]
    half = of(QWEN3_8B, "math", 4)
    for name, fixed in (("E-step", 0), ("freeze", 0), ("M-step", plan.UPDATE)):  # twice the GPUs, half the time
        assert half[name] - fixed == pytest.approx(2 * (math[name] - fixed)) and math[name] > fixed
    assert math["rollouts"] < half["rollouts"] < 2 * math["rollouts"]  # the longest row takes as long
    assert math["E-step"] == pytest.approx(2 * of(QWEN3_8B, "math --e_step_every 10")["E-step"])
    assert math["evaluation"] == pytest.approx(2 * of(QWEN3_8B, "math --eval_every 40")["evaluation"])
    one_update = of(QWEN3_8B, "lcb --minibatch_prompts 32")  # the student is scored beforehand for the E-step only
    assert 0 < one_update["freeze"] < 0.6 * lcb["freeze"]
    # 32 updates with a row for each GPU wait for the slowest.
    assert lcb["M-step"] - 32 * plan.UPDATE > 1.2 * (one_update["M-step"] - plan.UPDATE)
    assert of(QWEN3_8B, "math --method sdpo")["E-step"] == 0 < of(QWEN3_8B, "math --method grpo")["M-step"] < math["M-step"]

    monkeypatch.setattr(plan, "FILLED", 1)  # the step of docs/gpus.md, with layers run again and without
    step = ("lcb --method sdpo --teacher live --prompts_per_batch 1 --group_size 4 --max_prompt_tokens 512 "
            "--max_response_tokens 1536 --max_teacher_tokens 1024 --micro_batch_tokens 8192 --steps 1")  # fmt: skip
    assert of(QWEN3_2B, step, 1, stored=0)["M-step"] == pytest.approx(0.3929, rel=0.02)
    assert of(QWEN3_2B, step, 1)["M-step"] == pytest.approx(0.354, rel=0.02)


# ---- As a user meets it --------------------------------------------------------------------------------------


def run(capsys, argv):
    try:
        vpd.main(argv.split())
        status = 0
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    return status, said.out.splitlines(), said.err.splitlines()


def config_in(folder, config):
    """A folder that holds a config and nothing else."""
    config.architectures = None
    config.save_pretrained(folder)
    return folder


def test_plan_needs_only_a_config_refuses_after_its_table_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = config_in("model", Qwen3Config(**QWEN3_8B))
    status, out, err = run(capsys, f"--task lcb --plan --model {model} --gpus 1 --gpu_memory 80")
    assert status == 2 and any("together" in line for line in out)
    assert len(err) == 1 and "error: training needs 223.6 GB on each GPU (1 x 80.0 GB): " in err[0]
    assert err[0].endswith("; try more GPUs, --e_optimizer shared")
    status, out, err = run(capsys, f"--task lcb --plan --model {model} --data no/such/file --gpus 8 --gpu_memory 80")
    assert (status, err) == (0, []) and [p.name for p in tmp_path.iterdir()] == ["model"]
    assert out[0] == ("256 rollouts per batch; M-step: 32 updates of 8 sequences; "
                      "E-step, every 5 batches: 1 update of 256 sequences")  # fmt: skip
    assert out[1] == ("maximum tokens: 10240 per student row, 18432 per teacher row, 20480 per micro-batch, "
                      f"{8 * 10240} per M-step update, {256 * 18432} per E-step update")  # fmt: skip
    assert out[2].split() == "8.19e+09 parameters; GB on each of 8 GPUs of 80.0 training sampling".split()
    assert out[3].split() == ["weights", "4.10", "4.10"] and out[4].split() == ["AdamW's", "moments", "16.38", "16.38"]
    *cells, together = [[float(line[at : at + 10].strip() or 0) for at in (54, 64)] for line in out if line.startswith("  ")]
    assert together == pytest.approx([sum(column) for column in zip(*cells)], abs=0.1) and together[0] > 50
    assert out[-2].startswith("host memory: 49.1 GB in the process ") and "; disk: 16.4 GB per model, " in out[-2]
    assert out[-1].startswith("estimate (not measured")


def test_plan_of_other_families(tmp_path, capsys):
    family = Olmo3Config(vocab_size=300, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
                         intermediate_size=64, pad_token_id=0)  # fmt: skip
    status, out, _ = run(capsys, f"--task math --plan --model {config_in(tmp_path / 'olmo', family)} --gpus 2 --gpu_memory 24")
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(family).parameters())
    assert status == 0 and out[2].startswith(f"{count:.3g} parameters")
    status, _, err = run(capsys, f"--task lcb --plan --model {config_in(tmp_path / 'gpt', GPT2Config())} --gpus 1 --gpu_memory 80")
    assert status == 2 and len(err) == 1 and "no list of decoder layers" in err[0]


SCIENCE = f"--task sciknoweval --subset all --data {presets.FIXTURES}/sciknoweval.jsonl"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without GPUs")
def test_on_a_cpu_a_local_model_has_a_plan_of_three_lines_and_others_are_refused(capsys, monkeypatch, tmp_path):
    for argv, reason in (
        ("--task lcb --plan", "plan for other GPUs: --plan --gpus N --gpu_memory GB"),
        ("--task lcb --plan --model no/such/model --gpus 1 --gpu_memory 80", "cannot read a model's config from"),
        ("--task lcb --plan --smoke qwen3", "--plan is for the task's own model"),
    ):
        status, out, err = run(capsys, argv)
        assert status == 2 and out == [] and len(err) == 1 and reason in err[0]
    monkeypatch.chdir(tmp_path)
    for argv in ("--task toy --plan", f"{SCIENCE} --model tasks/toy_models/trace --plan"):
        status, out, _ = run(capsys, argv)
        assert status == 0 and len(out) == 3 and "parameters on a CPU" in out[2], argv
