"""How fast, and in how much memory: the phases of a training step on the toy task, the loss head beside the matrix products
that it cannot do without, and the graders.

    python -m study.bench [--only steps head grader] [--out FILE]

Measurements of steps and memory run in a process of their own.
"""

import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

import losses
import tasks
import vpd
from harness.command import Parser, check_out, run, write
from model import head
from tasks import livecodebench
from tasks.sandbox import Sandbox

HERE = Path(__file__).resolve().parents[1]
HEAD = dict(tokens=8 * 256, vocabulary=151936, width=256, top_k=20)  # the vocabulary of Qwen3


def fresh(function: str, **settings):
    """What `function(**settings)` of this file returns in a new process."""
    call = f"bench.{function}(**json.loads(sys.argv[1]))"
    code = f"from study import bench; import json, sys; print('\\n' + json.dumps({call}))"
    command = [sys.executable, "-c", code, json.dumps(settings)]
    done = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---- Training steps of the toy task --------------------------------------------------------------------------


def steps(flags: list[str]) -> list[dict]:
    """Median seconds of each phase of a step."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        vpd.main(["--task", "toy", "--eval_every", "0", *flags, "--out", f"{folder}/run"])
        log = [json.loads(line)["seconds"] for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]
    rows = [{"case": phase, "seconds": statistics.median(row[phase] for row in log)} for phase in log[0]]
    return [*rows, {"case": "together", "seconds": sum(row["seconds"] for row in rows)}]


# ---- The loss head -------------------------------------------------------------------------------------------


def resident(which: str) -> int:
    """Bytes in memory, VmRSS now or VmHWM at most since this program started (getrusage counts its parent in)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def products(hidden, matrix, t_hidden, t_matrix) -> None:
    """The student's logits, the teacher's, d hidden and d head, in the head's own chunks."""
    buffer = torch.empty(min(head.tokens_per_chunk(len(matrix), 4, "cpu", 2), len(hidden)), len(matrix))
    d_hidden, d_matrix = torch.zeros_like(hidden), torch.zeros_like(matrix)
    for first in range(0, len(hidden), len(buffer)):
        at = slice(first, first + len(buffer))
        logits = buffer[: len(hidden[at])]
        torch.mm(t_hidden[at], t_matrix.T, out=logits)
        torch.mm(hidden[at], matrix.T, out=logits)
        torch.mm(logits, matrix, out=d_hidden[at])
        d_matrix.addmm_(logits.T, hidden[at])


CASES = {  # of a loss: the divergence, and whether over the top k
    "the four products": None, "top-k, KL(student||teacher)": ("kl_student_teacher", True), "all of V, JS": ("js", False),
    "log-probs only": ("", False),
}  # fmt: skip


def head_case(case: str, tokens: int, vocabulary: int, width: int, top_k: int) -> dict:
    """CPU seconds of forward and backward with the head's gradient, float32, one thread, and the peak memory above the
    inputs', in logits tensors: tokens x vocabulary numbers of 4 bytes."""

    def drawn(tokens, vocabulary):
        make = torch.Generator().manual_seed(0)
        given = [torch.randn(n, width, generator=make) for n in (tokens, vocabulary, tokens, vocabulary)]
        given[1].mul_(width**-0.5), given[3].mul_(width**-0.5)
        return torch.randint(vocabulary, (tokens,), generator=make), *given

    def forward_and_backward(ids, hidden, matrix, *teacher):
        if not CASES[case]:
            return products(hidden, matrix, *teacher)
        (kind, over_top_k), weights = CASES[case], torch.full((len(ids),), 1 / len(ids))
        divergence = (None, teacher, partial(losses.divergence, kind=kind), top_k if over_top_k else None) if kind else ()
        objective = (lambda t: t.D) if kind else (lambda t: -t.logp)
        head.loss(objective, weights, hidden.requires_grad_(), matrix.requires_grad_(), ids, *divergence)[0].backward()

    torch.set_num_threads(1)
    forward_and_backward(*drawn(2, max(top_k, 64)))  # libraries load at first use
    given = drawn(tokens, vocabulary)
    base, wall, start = resident("VmRSS"), time.perf_counter(), time.process_time()
    forward_and_backward(*given)
    cpu, wall = time.process_time() - start, time.perf_counter() - wall
    above = (resident("VmHWM") - base) / (4 * tokens * vocabulary)
    return {"case": case, "cpu_seconds": cpu, "seconds": wall, "logits_tensors": above}


def heads(**sizes) -> list[dict]:
    found = [fresh("head_case", case=case, **sizes) for case in CASES]
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
    by_arithmetic = [tasks.Problem(f"{7 * i}/{2 * i}", [], r"\frac{7}{2}") for i in range(2, count + 2)]
    for case, source, file, problems, answer in (
        ("sciknoweval", "sciknoweval", "sciknoweval.jsonl", None, lambda p: f"<answer>{p.reference}</answer>"),
        ("math, the reference itself", "math", "math500.jsonl", None, lambda p: rf"So \boxed{{{p.reference}}}."),
        ("math, by math-verify", "math", "math500.jsonl", by_arithmetic, lambda p: rf"So \boxed{{{p.id}}}."),
    ):
        with contextlib.closing(tasks.read(source, str(fixtures / file))) as task:
            asked = problems or [task.test[i % len(task.test)] for i in range(count)]
            answers = [answer(problem) for problem in asked]
            timed(case, lambda: [outcome.reward for outcome in task.verify(asked, answers)])
    return rows


# ---- The table -----------------------------------------------------------------------------------------------

SECTIONS = {
    "steps": partial(fresh, "steps", flags=["--steps", "3", "--e_step_every", "1"]),
    "head": partial(heads, **HEAD),
    "grader": partial(grader, count=200),
}


def main(argv: list[str] | None = None) -> None:
    parser = Parser("bench.py", __doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, help="JSON of all numbers")
    args = parser.parse_args(argv)
    try:
        if args.out:
            check_out(args.out)
    except ValueError as error:
        parser.error(error)
    found = {}
    for section in args.only:
        found[section] = SECTIONS[section]()
        for row in found[section]:
            numbers = [f"{name} {value:.4g}" for name, value in row.items() if name != "case"]
            print(f"{section:8}{row['case']:30}{'  '.join(numbers)}", flush=True)
    if args.out:
        write(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
