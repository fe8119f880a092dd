"""The warm start of the toy models: supervised training on a task's own examples, from random weights.

    python -m study.warm_start --subset trace --out DIR
"""

import math
import random
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import feedback
from harness import hub
from harness.command import Parser, run
from model.policy import Policy
from tasks.tiny import build_tokenizer
from tasks.toy import EVERY, JUDGE_REQUEST, TEMPLATES


def build_policy(subset: str, seed: int = 0) -> Policy:
    """A Qwen3 of about 0.24M parameters with random weights and the toy tokenizer."""
    torch.manual_seed(seed)
    tokenizer, heads = build_tokenizer(), EVERY[subset]().heads
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=4, intermediate_size=192, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=64 // heads, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=0.05, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return Policy(Qwen3ForCausalLM(config), tokenizer, micro_batch_tokens=10**9)


def encode(tokenizer, example: dict) -> tuple[list[int], list[int]]:
    """Prompt and answer ids of a warm-up example, from the functions that training uses."""
    messages, attempt, context = example["messages"], example.get("attempt"), example.get("context")
    if attempt is not None:  # a critic, who sees the reference, or a judge
        request = TEMPLATES.request if "reference" in example else JUDGE_REQUEST
        parts = feedback.request_parts(request, messages, attempt, reference=example.get("reference", ""))
        prompt, _ = feedback.encode(tokenizer, messages[-1:], parts, 10**6)
    elif context is not None:
        prompt, _ = feedback.teacher_prompt(tokenizer, messages, context, TEMPLATES, 10**6)
    else:
        prompt = feedback.student_prompt(tokenizer, messages)
    return prompt, tokenizer(example["answer"]).input_ids + [tokenizer.eos_token_id]


def warm_start(subset: str, steps: int = 0, seed: int = 0) -> Policy:
    """Supervised training on the task's warm-up examples: Muon on the matrices, AdamW on the rest, cosine to 5%."""
    policy, task, rng = build_policy(subset, seed), EVERY[subset](), random.Random(seed)
    steps, model = steps or task.steps, policy.model
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks, pool, seen, start = [o.param_groups[0]["lr"] for o in optimizers], [], [], time.time()
    for step in range(1, steps + 1):
        if not pool:  # batches of similar length, in random order
            examples = [encode(policy.tokenizer, task.example(rng, step / steps)) for _ in range(8 * task.batch)]
            examples.sort(key=lambda e: len(e[0] + e[1]))
            pool = [examples[i : i + task.batch] for i in range(0, len(examples), task.batch)]
            rng.shuffle(pool)
        prompts, answers = zip(*pool.pop())
        view = policy.view(prompts, answers)
        loss = view.loss(lambda t: -t.logp, view.mask / view.mask.sum())[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = min(1.0, step / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()
        seen.append(loss.item())
        if step % 100 == 0 or step == steps:
            recent = sum(seen[-100:]) / len(seen[-100:])
            print(f"warm-up step {step}/{steps}  loss {recent:.4f}  {time.time() - start:.0f} s", flush=True)
    return policy


def main(argv: list[str] | None = None) -> None:
    parser = Parser("warm_start.py", "Warm-start a toy model.")
    parser.add_argument("--subset", choices=EVERY, default="trace")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=0, help="0: the subset's own number")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.steps < 0:
        parser.error(f"--steps must be 0 or positive, not {args.steps}")
    there = args.out.exists()
    try:  # before the minutes of training
        args.out.mkdir(parents=True, exist_ok=True)
        if hub.holds_others(args.out):
            parser.error(f"--out {args.out} holds more than a model and will not be replaced")
        if not there:
            args.out.rmdir()
    except OSError as error:
        parser.error(f"--out {args.out} cannot be the model's folder: {error.strerror}")
    torch.set_num_threads(1)
    warmed = warm_start(args.subset, args.steps, args.seed)
    warmed.save(args.out.resolve())  # `.` has no name
    size = sum(p.numel() for p in warmed.model.parameters())
    print(f"{args.subset}: {size:,} parameters in {args.out}")


if __name__ == "__main__":
    run(main)
