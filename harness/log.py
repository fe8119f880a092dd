"""The log of a batch: averages the loop's numbers into a row of log.jsonl and a line of the terminal. docs/log.md explains them."""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import torch

import losses
from tasks.base import one_line

GAP = 0.05  # nats; a larger gap between trainer and sampler is shown in the terminal
DIED = 0.3  # share of an E-step's rows with almost no gradient, above which a run warns once


def mean(values) -> float | None:
    """The mean of the finite values of a list, a tensor or a number, or None if there are none."""
    values = torch.as_tensor(values, dtype=torch.float64)
    values = values[values.isfinite()]
    return values.mean().item() if values.numel() else None


def margin(r_tilde: torch.Tensor, r: torch.Tensor, lengths: torch.Tensor) -> dict:
    """Fig. 1's reward margin, mean r~ on successes minus mean r~ on failures, and whether |r~| merely tracks length. All (n,)."""
    gap = r_tilde[r == 1].mean() - r_tilde[r == 0].mean()  # nan where one outcome is missing
    correlation = torch.corrcoef(torch.stack([r_tilde.abs(), lengths]).double())[0, 1] if len(r) > 2 else []
    return {"margin": mean(gap), "length_correlation": mean(correlation)}


class BatchLog:
    """The numbers of one batch, over all processes of `world`. beta: of r~; limit: of pi_old / pi_sampler, if one applies."""

    def __init__(self, step: int, world, beta: float, limit: float | None):
        self.step, self.world, self.beta, self.limit = step, world, beta, limit
        self.seconds, self.last, self.left_out = {}, time.perf_counter(), Counter()
        self.figures = dict.fromkeys(("margin", "length_correlation", "shift", "entropy", "sampler_gap", "mismatch_truncated"))
        self.e_losses, self.e_norms, self.died, self.m_losses, self.m_norms = [], [], [], [], []
        self.samples: dict[int, dict] = {}  # more fields for a row of samples.jsonl
        self.packing, self.sums = torch.zeros(2, dtype=torch.long), 0
        self.D_sum, self.with_D, self.scores, self.overlaps = 0.0, False, [], []

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def skip(self, reason: str, count: int = 1) -> None:
        """Counts rows or updates left out, by reason."""
        self.left_out[reason] += count

    def note(self, **figures) -> None:
        self.figures |= figures

    def passed(self, view) -> None:
        """Counts the tokens of a training pass, with and without padding."""
        self.packing += torch.tensor([view.filled, view.padded])

    def measured(self, batch, rows: torch.Tensor, logp: torch.Tensor, entropy: torch.Tensor, teacher_logp) -> None:
        """The entropy, the gap between trainer and sampler, and with a teacher the margin over rows with a context, all at the
        weights that sampled the batch. rows: (B,), the rows to cover; the other tensors: (B, T)."""
        tokens = batch.mask.bool() & rows[:, None]
        gap = (logp - batch.sampler_logp)[tokens]
        truncated = None if self.limit is None else mean(gap.exp() >= self.limit)
        self.note(entropy=mean(entropy[tokens]), sampler_gap=mean(gap.abs()), mismatch_truncated=truncated)
        of = rows & batch.has_C
        if teacher_logp is not None and of.any():
            r_tilde = losses.implicit_reward(teacher_logp, logp, batch.mask, self.beta)  # Eq. 7
            self.note(**margin(r_tilde[of], batch.r[of], batch.mask.sum(1)[of]))

    def frozen(self, batch, entropy: torch.Tensor) -> None:
        self.measured(batch, torch.ones_like(batch.graded), batch.old_logp, entropy, batch.teacher_logp)

    def e_update(self, loss: float, norm: float, u: torch.Tensor, r: torch.Tensor, c: torch.Tensor) -> None:
        """u: (n,), r~ - delta; c: (n, T), the loss's slope in each token's log q. A row has died if its weight in the gradient,
        sigma(-u) for a success and sigma(u) for a failure, is below 0.01. A spared failure has a larger sigma(u) but c = 0."""
        died = torch.where(r == 1, torch.sigmoid(-u), torch.sigmoid(u)) < 0.01
        self.e_losses.append(loss)
        self.e_norms.append(norm)
        self.died.append(died)
        self.skip("e_step: failure spared", int((~died & (c == 0).all(1)).sum()))

    def m_pass(self, rows: list[int], view, loss: torch.Tensor, scores, has_C: torch.Tensor, measures: bool) -> None:
        """A pass over `rows`, a part of an update. has_C: (B,); measures: is it at the weights that sampled the batch?"""
        self.passed(view)
        here = has_C[rows, None]
        D = losses.sequence_mean(scores.D * here, view.mask, max(1, int(has_C.sum())))
        self.with_D = self.with_D or bool(has_C.any())
        if scores.overlap is not None:
            seen = scores.overlap[view.mask.bool() & here & scores.overlap.isfinite()]
            self.overlaps.append(torch.stack([seen.sum(), seen.new_tensor(len(seen))]).double())
        self.sums = self.sums + torch.stack([loss.detach(), D]).double()
        if measures:
            self.scores.append((rows, scores))

    def m_loss(self) -> float:
        """The loss of an update, summed over its passes and processes."""
        loss, D = self.world.sum(self.sums).tolist()
        self.sums = 0
        self.m_losses.append(loss)
        self.D_sum += D
        return loss

    def from_passes(self, batch, takes_part: torch.Tensor, has_teacher: bool) -> None:
        """Calls `measured` with the numbers of the update's own passes."""
        logp, entropy, teacher_logp = (torch.zeros_like(batch.sampler_logp) for _ in range(3))
        for rows, scores in self.scores:
            t = scores.logp.shape[1]
            for whole, part in ((logp, scores.logp), (entropy, scores.entropy), (teacher_logp, scores.teacher_logp)):
                whole[rows, :t] = part.to(whole.dtype)
        logp, entropy, teacher_logp = (self.world.sum(x) for x in (logp, entropy, teacher_logp))
        if takes_part.any():
            self.measured(batch, takes_part, logp, entropy, teacher_logp if has_teacher else None)

    def updates(self) -> int:
        """The number of updates that changed the weights."""
        return sum(math.isfinite(norm) for norm in self.e_norms + self.m_norms)

    def row(self, batch, lr: float, distils: bool) -> dict:
        """The batch's row in log.jsonl."""
        kinds = Counter(c.kind for c in batch.C if c)
        wins = Counter(c.kind for c, o in zip(batch.C, batch.outcomes) if c and o.reward)
        died = torch.cat(self.died) if self.died else []
        filled, padded = self.world.sum(self.packing).tolist()
        overlap, places = self.world.sum(sum((x.cpu() for x in self.overlaps), torch.zeros(2, dtype=torch.float64))).tolist()
        seconds = {phase: round(value, 4) for phase, value in self.seconds.items()}
        lengths = [len(rollout.tokens) for rollout in batch.rollouts]
        return {
            "kind": "train", "step": self.step,
            "reward": mean([o.reward for o in batch.outcomes if o.verdict != "internal"]),
            "response_length": sum(lengths) / len(lengths),
            "truncated": mean([float(rollout.finish == "length") for rollout in batch.rollouts]),
            "with_context": mean([c is not None for c in batch.C or [None]]),
            "verdicts": dict(Counter(o.verdict for o in batch.outcomes).most_common()),
            "success_given_context": {kind: wins[kind] / count for kind, count in sorted(kinds.items())},
            **self.figures,
            "e_loss": mean(self.e_losses), "e_grad_norm": mean(self.e_norms), "e_rows": len(died) or None, "e_died": mean(died),
            "m_loss": mean(self.m_losses), "m_grad_norm": mean(self.m_norms),
            "divergence": self.D_sum if distils and self.with_D else None, "overlap": overlap / places if places else None,
            "lr": lr, "contexts_cut": batch.contexts_cut,
            "left_out": {reason: count for reason, count in self.left_out.items() if count},
            "updates_not_finite": len(self.e_norms + self.m_norms) - self.updates(),
            "padding": 1 - filled / padded if padded else None, "seconds": seconds,
            "tokens_per_second": sum(lengths) / sum(seconds.values()),
        }  # fmt: skip


def terminal_line(row: dict) -> str:
    """At most 12 numbers of a batch, with three decimals, or two significant digits below 0.01."""
    short = lambda x: f"{x:.3f}" if x == 0 or abs(x) >= 0.01 else f"{x:.1e}"  # noqa: E731
    show = {"reward": "reward", "margin": "margin", "divergence": "D", "e_loss": "E-loss", "shift": "delta",
            "m_loss": "M-loss", "m_grad_norm": "|g|", "entropy": "entropy", "response_length": "length",
            "with_context": "with C", "accepted": "accepted"}  # fmt: skip
    show |= {"sampler_gap": "gap"} if (row.get("sampler_gap") or 0) > GAP else {}
    cells = [f"{name} {short(row[key])}" for key, name in show.items() if row.get(key) is not None]
    return f"{row['step']:4d}  " + "  ".join(cells) + f"  {sum(row['seconds'].values()):.1f} s"


class Tracker:
    """Hands rows of the log to tensorboard or wandb, or to nobody if kind is ""; the step is the number of batches done. A failure
    is reported in one line and ends the tracking, not the run."""

    def __init__(self, kind: str, out: Path, settings: dict, first_step: int):
        self.kind = kind
        self._try(lambda: self._open(out, settings, first_step))

    def _open(self, out: Path, settings: dict, first_step: int) -> None:
        if self.kind == "wandb":
            run = import_module("wandb").init(project="vpd", name=out.name, dir=out, config=settings)
            self.take, self.end = run.log, run.finish
        else:
            writer = import_module("torch.utils.tensorboard").SummaryWriter
            board = writer(str(out / "tensorboard"), purge_step=first_step + 1 if first_step else None)
            self.take = lambda figures, step: [board.add_scalar(name, value, step) for name, value in figures.items()]
            self.end = board.close

    def _try(self, act: Callable[[], object]) -> None:
        try:
            if self.kind:
                act()
        except (Exception, SystemExit) as error:
            print(f"--track {self.kind} failed ({one_line(error)}): the run continues without it", file=sys.stderr)
            self.kind = ""

    def write(self, row: dict) -> None:
        self._try(lambda: self.take(dict(numbers(row, row["kind"])), step=row["step"] + (row["kind"] == "train")))

    def close(self) -> None:
        self._try(lambda: self.end())


def numbers(row: dict, under: str) -> Iterator[tuple[str, float]]:
    """(name, value) of each number in a row, with names like train/reward and eval/pass@2/value."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{under}/{name}")
        elif isinstance(value, int | float) and name != "step":
            yield f"{under}/{name}", value
