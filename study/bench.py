"""How fast, and in how much memory: training steps on the toy task, the loss head beside the matrix products that it
cannot do without, the graders, and on a GPU a training step against the card's own matrix product and against plan.py.

    python bench.py [--only steps head grader gpu] [--out FILE]

Each measurement that asks for memory or sets up a device runs in a process of its own.
"""

import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from model import head
from harness import plan
import tasks
from tasks import livecodebench
import vpd
from harness.command import Parser, check_out, run, write
from model.policy import Policy, World
from tasks.sandbox import Sandbox
from harness.settings import METHODS, Config

HERE = Path(__file__).resolve().parents[1]
STEPS = dict(flags=["--steps", "3", "--e_step_every", "1"])
HEAD = dict(tokens=8 * 256, vocabulary=151936, width=256, top_k=20)  # the vocabulary of Qwen3
GRADER = dict(count=200)
GPU = dict(
    shape=dict(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=6144, tie_word_embeddings=True,
    ),
    rows=4, prompt=512, context=512, response=1536, top_k=100, square=8192,
)  # fmt: skip  # Qwen3-1.7B, 8,192 tokens of the student


def fresh(function: str, **settings):
    """What `function(**settings)` of this file returns in a new process."""
    code = f"from study import bench; import json, sys; print('\\n' + json.dumps(bench.{function}(**json.loads(sys.argv[1]))))"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(settings)], cwd=HERE, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


# ---- Training steps of the toy task --------------------------------------------------------------------------


def steps(flags: list[str]) -> list[dict]:
    """Median seconds of each phase of a step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        model = ["--model", str(HERE / "tasks" / "toy_models" / "trace")]
        with contextlib.redirect_stdout(io.StringIO()):
            vpd.main(["--task", "toy", "--eval_every", "0", "--out", str(out), *model, *flags])
        seconds = [json.loads(line)["seconds"] for line in (out / "log.jsonl").read_text().splitlines()]
    phases = {phase: statistics.median(step[phase] for step in seconds) for phase in seconds[0]}
    return [{"case": phase, "seconds": value} for phase, value in {**phases, "together": sum(phases.values())}.items()]


# ---- The loss head -------------------------------------------------------------------------------------------


def resident(which: str) -> int:
    """Bytes in memory, VmRSS now or VmHWM at most since this program started (getrusage counts its parent in)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def head_case(case: str, tokens: int, vocabulary: int, width: int, top_k: int) -> dict:
    """CPU seconds of forward and backward with the head's gradient, float32, one thread, and the peak memory above the
    inputs', in logits tensors: tokens x vocabulary numbers of 4 bytes."""

    def inputs(tokens, vocabulary):
        make = torch.Generator().manual_seed(0)
        drawn = [torch.randn(n, width, generator=make) for n in (tokens, vocabulary, tokens, vocabulary)]
        drawn[1].mul_(width**-0.5), drawn[3].mul_(width**-0.5)
        return *drawn, torch.randint(vocabulary, (tokens,), generator=make)

    def products(hidden, matrix, t_hidden, t_matrix, _):
        """The student's logits, the teacher's, d hidden and d head, in the head's own chunks."""
        chunk = head.tokens_per_chunk(len(matrix), width, top_k, 4, "cpu")
        buffer = torch.empty(min(chunk, len(hidden)), len(matrix))
        d_hidden, d_matrix = torch.zeros_like(hidden), torch.zeros_like(matrix)
        for first in range(0, len(hidden), len(buffer)):
            at = slice(first, first + len(buffer))
            logits = buffer[: len(hidden[at])]
            torch.mm(t_hidden[at], t_matrix.T, out=logits)
            torch.mm(hidden[at], matrix.T, out=logits)
            torch.mm(logits, matrix, out=d_hidden[at])
            d_matrix.addmm_(logits.T, hidden[at])

    def loss(hidden, matrix, t_hidden, t_matrix, ids):
        hidden.requires_grad_(), matrix.requires_grad_()
        weights, teacher = torch.full((len(ids),), 1 / len(ids)), (t_hidden, t_matrix)
        if case == "log-probs alone":
            total, *_ = head.loss(lambda logp, _: -logp, weights, hidden, matrix, ids)
        elif case == "top-k, KL(student||teacher)":
            total, *_ = head.loss(lambda _, d: d, weights, hidden, matrix, ids, teacher=teacher, top_k=top_k)
        else:
            total, *_ = head.loss(lambda _, d: d, weights, hidden, matrix, ids, teacher=teacher, kind="js")
        total.backward()

    torch.set_num_threads(1)
    run = products if case == "the four products" else loss
    run(*inputs(2, max(top_k, 64)))  # libraries load at first use
    given = inputs(tokens, vocabulary)
    base, wall, start = resident("VmRSS"), time.perf_counter(), time.process_time()
    run(*given)
    cpu, wall = time.process_time() - start, time.perf_counter() - wall
    above = (resident("VmHWM") - base) / (4 * tokens * vocabulary)
    return {"case": case, "cpu_seconds": cpu, "seconds": wall, "logits_tensors": above}


HEAD_CASES = ["the four products", "top-k, KL(student||teacher)", "all of V, JS", "log-probs alone"]


def heads(**sizes) -> list[dict]:
    found = [fresh("head_case", case=case, **sizes) for case in HEAD_CASES]
    return [{**case, "times_the_products": case["cpu_seconds"] / found[0]["cpu_seconds"]} for case in found]


# ---- Graders -------------------------------------------------------------------------------------------------


def grader(count: int) -> list[dict]:
    """Answers graded per second of wall clock, on all workers."""
    rows, fixtures = [], HERE / "tasks" / "fixtures"

    def timed(case, grade):
        start = time.perf_counter()
        right = sum(grade())
        seconds = time.perf_counter() - start
        assert right == count, f"{case}: {right} of {count} came out as they should"
        rows.append({"case": case, "per_second": count / seconds})

    with Sandbox(time_limit=livecodebench.TIME_LIMIT, memory_mb=2048, preamble=True, packages=True) as box:  # as for lcb
        call = lambda i: box.call("def f(x):\n    return x + 1", "f", [i]).value == i + 1  # noqa: E731
        script = lambda i: box.run("print(int(input()) + 1)", f"{i}\n").value == f"{i + 1}\n"  # noqa: E731
        box.run_many(call, range(20))  # workers start at their own pace
        timed("sandbox, a function called", lambda: box.run_many(call, range(count)))
        timed("sandbox, a script", lambda: box.run_many(script, range(count)))
    choice = tasks.read("sciknoweval", str(fixtures / "sciknoweval.jsonl"))
    maths = tasks.read("math", str(fixtures / "math500.jsonl"))
    try:
        problems = [choice.test[i % len(choice.test)] for i in range(count)]
        answers = [f"<answer>{problem.reference}</answer>" for problem in problems]
        timed("sciknoweval", lambda: [o.reward for o in choice.verify(problems, answers)])
        problems = [maths.test[i % len(maths.test)] for i in range(count)]
        answers = [rf"So \boxed{{{problem.reference}}}." for problem in problems]
        timed("math, the reference itself", lambda: [o.reward for o in maths.verify(problems, answers)])
        problems = [tasks.Problem("p", [], r"\frac{7}{2}")] * count
        answers = [rf"So \boxed{{{7 * i}/{2 * i}}}." for i in range(2, count + 2)]  # equal by arithmetic alone
        timed("math, by math-verify", lambda: [o.reward for o in maths.verify(problems, answers)])
    finally:
        choice.close(), maths.close()
    return rows


# ---- A training step on a GPU --------------------------------------------------------------------------------


def flops(config, rows: int, prompt: int, context: int, response: int) -> dict[str, float]:
    """Floating-point operations of an M-step's gradient: student forward and backward (3 times a forward pass), teacher
    forward; 2 per weight and token in the decoder layers, and in the head for response tokens alone; attention's two
    products over the causal half. again: what recomputation adds, no part of the model's own."""
    layers, _ = plan.shapes(config)
    weights = sum(shape.numel() for layer in layers for shape in layer if len(shape) == 2)
    student, teacher = prompt + response, prompt + context + response
    square = 2 * config.num_attention_heads * config.head_dim * len(layers)  # times length^2 of a row
    body, attention = 2 * weights * rows, square * rows
    return {
        "body": body * (3 * student + teacher),
        "attention": attention * (3 * student**2 + teacher**2),
        "head": 2 * config.vocab_size * config.hidden_size * rows * response * (3 + 1),
        "again": body * student + attention * student**2,
    }


def ceiling(device: str, square: int) -> float:
    """Operations per second of a bfloat16 matrix product, the best of 10."""
    a, b = (torch.randn(square, square, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * square**3 / min(seconds(device, lambda: a @ b) for _ in range(10))


def seconds(device: str, run) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def training_step(device: str, shape: dict, rows: int, prompt: int, context: int, response: int, top_k: int,
                  square: int) -> list[dict]:  # fmt: skip
    """One update of a network with random weights: the teacher's pass, the student's, loss, backward, AdamW."""
    config, make = Qwen3Config(**shape), torch.manual_seed(0)
    most = ceiling(device, square)
    cfg = Config(
        method="sdpo", teacher="live", max_prompt_tokens=prompt, max_response_tokens=response, top_k=top_k,
        max_teacher_tokens=prompt + context, micro_batch_tokens=rows * (prompt + response),
    )  # fmt: skip
    world = World.start()
    tokenizer = SimpleNamespace(eos_token_id=2, chat_template=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    policy = Policy(model, tokenizer, micro_batch_tokens=cfg.micro_batch_tokens, world=world)
    optimizer = torch.optim.AdamW(policy.model.parameters())
    draw = lambda length: torch.randint(3, config.vocab_size, (rows, length), generator=make).tolist()  # noqa: E731
    x, c, y = draw(prompt), draw(context), draw(response)

    def update():
        with torch.no_grad():
            q = policy.view([a + b for a, b in zip(x, c)], y)
        view = policy.view(x, y)
        weights = view.mask / view.mask.sum()
        loss, _, _ = view.loss(lambda _, d: d, weights, teacher=q, kind=cfg.divergence, top_k=top_k)
        policy.backward(loss)
        policy.step(optimizer, 1e-6, 1.0)

    update()  # moments come into being, libraries load
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = statistics.median(seconds(device, update) for _ in range(3))
    parts = flops(config, rows, prompt, context, response)
    own = sum(parts.values()) - parts["again"]
    row = {"case": "update", "seconds": took, "tokens_per_second": rows * (prompt + response) / took,
           "tflops_ceiling": most / 1e12, "share_of_ceiling": own / took / most,
           "share_with_recomputation": sum(parts.values()) / took / most}  # fmt: skip
    if device == "cuda":
        planned = plan.memory(config, cfg, METHODS["sdpo"], 1, torch.cuda.mem_get_info()[1])
        row |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9,
                "planned_gb": (planned.training - plan.FRAMEWORK - plan.ASLEEP) / 1e9}  # fmt: skip
    return [row]


# ---- The table -----------------------------------------------------------------------------------------------


SECTIONS = {
    "steps": lambda: fresh("steps", **STEPS),
    "head": lambda: heads(**HEAD),
    "grader": lambda: grader(**GRADER),
    "gpu": lambda: fresh("training_step", device="cuda", **GPU),
}


def main(argv: list[str] | None = None) -> None:
    parser = Parser("bench.py", __doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    args = parser.parse_args(argv)
    if args.out:
        try:
            check_out(args.out)
        except ValueError as error:
            parser.error(error)
    found = {}
    for section in args.only:
        if section == "gpu" and not torch.cuda.is_available():
            print(f"{section:8}no CUDA device here")
            continue
        found[section] = SECTIONS[section]()
        for row in found[section]:
            figures = [f"{name} {value:.4g}" for name, value in row.items() if name != "case"]
            print(f"{section:8}{row['case']:30}{'  '.join(figures)}", flush=True)
    if args.out:
        write(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
