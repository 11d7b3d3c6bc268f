"""What the runs of a sweep came to: means over seeds, and the compute that a variant saves at equal bits per byte.

A variant's bits per byte follow a smooth curve of effective compute; in logarithms of both a parabola, or a line
through two budgets. At a budget E a variant comes to the bits per byte for which the baseline's curve wants E′: it
saves 1 - E / E′ of the compute. Each seed is compared with the baseline's curve of the same seed, so that what a seed
does to both (the order of the data, mostly) drops out; intervals are Student's t over seeds, 95 %.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from lrt_jax.comparison.plan import Run
from lrt_jax.model import costs
from lrt_jax.setup import schema
from lrt_jax.setup.errors import UserError
from lrt_jax.setup.fields import Size, Task
from lrt_jax.setup.schema import Must, within

FILE = "result.json"  # in a run's folder, once it is done
ACCURACY = "val/accuracy/"
# The 97.5 % quantile of Student's t, by degrees of freedom from 1 on; then that of the normal distribution.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
NORMAL = 1.96
# Beyond the budgets that were run a curve is trusted so far, as a factor.
REACH = 4.0

# What a result's numbers may be, so that tables and charts can be made of them.
Amount = Annotated[float, within(1e-30, 1e30)]
Interval = Annotated[str, Must("be A_to_B", re.compile(r"[0-9]{1,9}_to_[0-9]{1,9}").fullmatch)]


class ResultError(UserError):
    """A result cannot be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """One run that is done, whatever it was about.

    Attributes:
      variant, budget, seed: as in the plan.
      tokens: that it was trained on.
      effective_tokens: the same times the schedule's forwards-equivalent.
      parameters: of the model.
      seconds: that it took, all sessions together.
    """

    variant: str
    budget: Amount
    seed: int
    tokens: Size
    effective_tokens: Amount
    parameters: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(Done):
    """One run on text.

    Attributes:
      bpb: sequential bits per byte of the held-out rows.
      bpb_merged: the same in parallel, by the last forward of each position.
      bpb_init: by the initialization forward.
    """

    bpb: Amount
    bpb_merged: Amount
    bpb_init: Amount


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered(Done):
    """One run of state tracking.

    Attributes:
      task: ``config.data.task``.
      accuracy: the share of right answers under true recurrence, by the interval of positions, ``0_to_32`` ….
    """

    task: Task
    accuracy: dict[Interval, float]

    @property
    def within_task(self) -> str:
        """The variant's name in its task's table: without the task before it."""
        return self.variant.removeprefix(f"{self.task} ")


def read(folder: Path) -> Done | None:
    """The result in a run's folder; None while it is not done.

    Raises:
      ResultError: it is damaged, or of another version.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_bytes())
        kind = Answered if isinstance(fields, dict) and "accuracy" in fields else Result
        return schema.build(kind, fields, "result")
    except (OSError, ValueError, RecursionError) as error:  # ConfigError is a ValueError
        raise ResultError(
            f"{path} is no result of this version ({error}); remove it, and the sweep scores its run again"
        ) from None


def write(folder: Path, result: Done) -> None:
    """Marks a run as done; atomic."""
    unfinished = folder / f"{FILE}.new"
    unfinished.write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    unfinished.replace(folder / FILE)


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
      value: the mean.
      half: of its 95 % interval; NaN with one seed.
      count: of seeds.
      at_least: whether some of the values are bounds from below, and so the mean.
    """

    value: float
    half: float
    count: int
    at_least: bool = False

    def text(self, digits: int, factor: float = 1.0, unit: str = "") -> str:
        """As a table shows it."""
        if not self.count:
            return ""
        if self.at_least:
            return f"≥ {factor * self.value:.{digits}f}{unit}"
        spread = "" if math.isnan(self.half) else f" ± {factor * self.half:.{digits}f}"
        return f"{factor * self.value:.{digits}f}{spread}{unit}"


def mean(values: Iterable[float]) -> Mean:
    """Of finite values; NaN of none."""
    found = np.array([value for value in values if math.isfinite(value)])
    if not len(found):
        return Mean(math.nan, math.nan, 0)
    if len(found) == 1:
        return Mean(float(found[0]), math.nan, 1)
    quantile = STUDENT[len(found) - 2] if len(found) <= len(STUDENT) + 1 else NORMAL
    return Mean(float(found.mean()), float(quantile * found.std(ddof=1) / math.sqrt(len(found))), len(found))


@dataclasses.dataclass(frozen=True)
class Curve:
    """Bits per byte by effective compute: a polynomial of the logarithms of both, falling where it is trusted."""

    coefficients: tuple[float, ...]
    least: float
    most: float

    def bpb(self, effective: float) -> float:
        """At so many effective tokens."""
        return math.exp(np.polyval(self.coefficients, math.log(effective)))

    def effective(self, bpb: float) -> float:
        """Where it comes to so many bits per byte; NaN where it does not within REACH."""
        grid = np.linspace(math.log(self.least / REACH), math.log(self.most * REACH), 2001)
        heights = np.polyval(self.coefficients, grid) - math.log(bpb)
        crossings = np.flatnonzero((heights[:-1] >= 0) & (heights[1:] < 0))
        if not len(crossings):
            return math.nan
        at = crossings[0]
        return math.exp(grid[at] + heights[at] / (heights[at] - heights[at + 1]) * (grid[at + 1] - grid[at]))


def curve(points: Sequence[tuple[float, float]]) -> Curve | None:
    """Through (effective tokens, bits per byte); None of fewer than two budgets."""
    budgets = {effective for effective, _ in points}
    if len(budgets) < 2:
        return None
    logarithms = np.log(np.array(points))
    coefficients = np.polyfit(logarithms[:, 0], logarithms[:, 1], min(2, len(budgets) - 1))
    return Curve(tuple(map(float, coefficients)), min(budgets), max(budgets))


def saved(baseline: str, results: Sequence[Result], variant: str, budget: float) -> Mean:
    """The share of the baseline's compute that a variant saves at a budget, where both have the same bits per byte.

    Where the baseline's curve does not come so low, the largest compute that it was given counts: the share is at least
    that.
    """
    shares, at_least = [], False
    for one in results:
        if (one.variant, one.budget) == (variant, budget):
            others = [r for r in results if (r.variant, r.seed) == (baseline, one.seed)]
            fitted = curve([(other.effective_tokens, other.bpb) for other in others])
            if fitted is not None:
                needed = fitted.effective(one.bpb)
                if math.isnan(needed) and one.bpb < fitted.bpb(fitted.most):
                    needed, at_least = fitted.most, True
                shares.append(1 - one.effective_tokens / needed)
    return dataclasses.replace(mean(shares), at_least=at_least)


HEAD = (
    "variant",
    "effective tokens",
    "tokens",
    "tokens per parameter",
    "sequential BPB",
    "sequential / merged",
    "saved",
)


def rows(variants: Sequence[str], results: Sequence[Result]) -> list[tuple[str, ...]]:
    """HEAD, then for each variant and budget its bits per byte, the gap of true recurrence, and the compute saved.

    The first variant is what others are compared with.
    """
    lines: list[tuple[str, ...]] = [HEAD]
    for variant in variants:
        for budget in sorted({result.budget for result in results if result.variant == variant}):
            mine = [result for result in results if (result.variant, result.budget) == (variant, budget)]
            gap = mean(100 * (result.bpb / result.bpb_merged - 1) for result in mine)
            share = saved(variants[0], results, variant, budget)
            cells = (
                variant,
                f"{mine[0].effective_tokens / 1e6:.4g} M",
                f"{mine[0].tokens / 1e6:.4g} M",
                f"{mine[0].tokens / mine[0].parameters:.1f}",
                mean(result.bpb for result in mine).text(4),
                f"{round(gap.value, 2) + 0.0:+.2f} %",  # no minus before 0
                "" if variant == variants[0] else share.text(1, 100, " %"),
            )
            lines.append(cells)
    return lines


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table, line by line; its first row is its head."""
    head, *lines = ("| " + " | ".join(row) + " |" for row in rows)
    return [head, "|---" * len(rows[0]) + "|", *lines]


def summary(variants: Sequence[str], results: Sequence[Done]) -> dict[str, Any]:
    """Everything, for a file; the first variant is what others are compared with."""
    texts = [result for result in results if isinstance(result, Result)]
    return {
        "baseline": variants[0],
        "runs": [dataclasses.asdict(result) for result in results],
        "saved": [
            {"variant": variant, "budget": budget, **dataclasses.asdict(saved(variants[0], texts, variant, budget))}
            for variant in variants[1:]
            for budget in sorted({result.budget for result in texts if result.variant == variant})
        ],
    }


def result_of(run: Run, scores: dict[str, float], seconds: float, parameters: int, steps: int) -> Done:
    """A run's result from its closing metrics.

    Raises:
      ConfigError: a score is not finite.
    """
    config = run.complete
    tokens = steps * config.train.batch_size * config.model.sequence_length
    about: dict[str, Any] = {
        "variant": run.variant,
        "budget": run.effective_tokens,
        "seed": run.seed,
        "tokens": tokens,
        "effective_tokens": tokens * costs.forwards_equivalent(config.model, config.schedule),
        "parameters": parameters,
        "seconds": seconds,
    }
    if config.data.task:
        accuracy = {name.removeprefix(ACCURACY): value for name, value in scores.items() if name.startswith(ACCURACY)}
        return schema.build(Answered, about | {"task": config.data.task, "accuracy": accuracy}, "result")
    names = {"bpb": "val/bpb_sequential", "bpb_merged": "val/bpb", "bpb_init": "val/bpb_init"}
    return schema.build(Result, about | {field: scores[name] for field, name in names.items()}, "result")
