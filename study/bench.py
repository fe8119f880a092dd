"""Time and memory of toy training steps and of the loss head, next to the matrix products that each of them needs.

    python -m study.bench [--only steps head]

Each measurement runs in a process of its own.
"""

import contextlib
import io
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import losses
import vpd
from harness.command import Parser, run
from model import head
from tasks.base import json_rows

HERE = Path(__file__).resolve().parents[1]
HEAD = dict(tokens=8 * 256, vocabulary=151936, width=256, top_k=20)  # the vocabulary of Qwen3


def fresh(function, **settings):
    """`function(**settings)` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, **settings).result()


# ---- Training steps of the toy task --------------------------------------------------------------------------


def steps(flags: list[str]) -> list[dict]:
    """Median seconds of each phase of a step, and of its floor: the matrix products that it needs at least."""
    model, batches, roll_out = HERE / "tasks" / "toy_models" / "trace", [], vpd.roll_out

    def noted(*args):
        batches.append(roll_out(*args))
        return batches[-1]

    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(vpd, "roll_out", noted):
            vpd.main(["--task", "toy", "--model", str(model), "--eval_every", "0", *flags, "--out", f"{folder}/run"])
        log = list(json_rows(Path(folder, "run", "log.jsonl")))
    from transformers import AutoModelForCausalLM  # takes seconds, which the processes of the head can do without

    network = AutoModelForCausalLM.from_pretrained(model)
    products = [passes(batch, row["e_rows"] or 0) for batch, row in zip(batches, log, strict=True)]
    rows = [{"case": phase, "seconds": statistics.median(row["seconds"][phase] for row in log)} for phase in log[0]["seconds"]]
    for row in rows:
        if row["case"] in products[0]:
            row["floor"] = statistics.median(floor(network, of_step[row["case"]]) for of_step in products)
            row["times_the_floor"] = row["seconds"] / row["floor"]
    return [*rows, {"case": "together", "seconds": sum(row["seconds"] for row in rows)}]


def passes(batch: vpd.Batch, e_rows: int) -> dict[str, list[tuple[int, int, bool]]]:
    """The passes that each phase of VPD's step needs at least: tokens through the layers, tokens through the head, and whether
    there is a backward pass. Padding is left out; every row counts its prompt. e_rows: how many rows the E-step used."""
    x, y = [len(prompt) for prompt in batch.x], [len(tokens) for tokens in batch.y]
    read = [i for i, has in enumerate(batch.has_C) if has]
    scored = sum(y[i] for i in read)
    student, teacher = sum(x[i] for i in read) + scored, sum(len(batch.xC[i]) for i in read) + scored
    alive = [sum(length > t for length in y) for t in range(max(y))]  # rows that draw a token t
    share = e_rows / max(1, len(read))
    return {
        "rollout": [(sum(x), alive[0], False), *((rows, rows, False) for rows in alive[1:])],
        "freeze": [(sum(x) + sum(y), sum(y), False), (teacher, scored, False)],
        "e_step": [(round(share * teacher), round(share * scored), True)],
        "m_step": [(teacher, scored, False), (student, scored, True)],
    }


def floor(model, of_phase: list[tuple[int, int, bool]]) -> float:
    """Seconds of these passes' products with the model's matrices; those within attention are left out."""
    body = [p.detach() for p in model.base_model.layers.parameters() if p.ndim == 2]
    output = [model.get_output_embeddings().weight.detach()]
    todo = [(tokens, matrix, backward) for layers, heads, backward in of_phase
            for tokens, matrices in ((layers, body), (heads, output)) for matrix in matrices]  # fmt: skip
    longest = max(tokens for tokens, *_ in todo)
    buffers = {(rows, width): [*(torch.randn(longest, n) for n in (width, rows, width)), torch.empty(rows, width)]
               for rows, width in {matrix.shape for _, matrix, _ in todo}}  # fmt: skip
    start = time.perf_counter()
    for tokens, matrix, backward in todo:
        given, made, d_given, d_matrix = buffers[matrix.shape]
        torch.mm(given[:tokens], matrix.T, out=made[:tokens])
        if backward:
            torch.mm(made[:tokens], matrix, out=d_given[:tokens])
            torch.mm(made[:tokens].T, given[:tokens], out=d_matrix)
    return time.perf_counter() - start


# ---- The loss head -------------------------------------------------------------------------------------------


def resident(which: str) -> int:
    """Bytes in memory: VmRSS now, VmHWM at the peak since this program started (getrusage would include its parent's)."""
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


CASES = {  # the divergence, and whether it is over the top k
    "the four products": None, "top-k, KL(student||teacher)": ("kl_student_teacher", True), "all of V, JS": ("js", False),
    "log-probs only": ("", False),
}  # fmt: skip


def head_case(case: str, tokens: int, vocabulary: int, width: int, top_k: int) -> dict:
    """CPU seconds of forward and backward with the head's gradient (float32, one thread), and the peak memory above that of the
    inputs, in logits tensors of tokens x vocabulary float32 numbers."""

    def drawn(tokens, vocabulary):
        make = torch.Generator().manual_seed(0)
        given = [torch.randn(n, width, generator=make) for n in (tokens, vocabulary, tokens, vocabulary)]
        given[1].mul_(width**-0.5), given[3].mul_(width**-0.5)
        return torch.randint(vocabulary, (tokens,), generator=make), *given

    def forward_and_backward(ids, hidden, matrix, *teacher):
        if not CASES[case]:
            return products(hidden, matrix, *teacher)
        (kind, over_top_k), mask = CASES[case], torch.ones(1, len(ids))
        view = lambda hidden, matrix: head.View(hidden[None], ids[None], mask, matrix)  # noqa: E731
        divergence = (view(*teacher), partial(losses.divergence, kind=kind), top_k if over_top_k else None) if kind else ()
        objective = (lambda t: t.D) if kind else (lambda t: -t.logp)
        student = view(hidden.requires_grad_(), matrix.requires_grad_())
        student.loss(objective, mask / len(ids), None, *divergence)[0].backward()

    torch.set_num_threads(1)
    forward_and_backward(*drawn(2, max(top_k, 64)))  # libraries load on first use
    given = drawn(tokens, vocabulary)
    base, start = resident("VmRSS"), time.process_time()
    forward_and_backward(*given)
    seconds = time.process_time() - start
    return {"case": case, "cpu_seconds": seconds, "logits_tensors": (resident("VmHWM") - base) / (4 * tokens * vocabulary)}


def heads(**sizes) -> list[dict]:
    found = [fresh(head_case, case=case, **sizes) for case in CASES]
    return [{**case, "times_the_products": case["cpu_seconds"] / found[0]["cpu_seconds"]} for case in found]


# ---- The table -----------------------------------------------------------------------------------------------

SECTIONS = {
    "steps": partial(fresh, steps, flags=["--steps", "3", "--e_step_every", "1"]),
    "head": partial(heads, **HEAD),
}


def main(argv: list[str] | None = None) -> None:
    parser = Parser("bench.py", __doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    for section in parser.parse_args(argv).only:
        for row in SECTIONS[section]():
            numbers = [f"{name} {value:.4g}" for name, value in row.items() if name != "case"]
            print(f"{section:8}{row['case']:30}{'  '.join(numbers)}", flush=True)


if __name__ == "__main__":
    run(main)
