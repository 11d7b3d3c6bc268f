"""What the runs of a sweep over state tracking came to: right answers by length, for each task and variant."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lrt_jax.comparison.plan import Sweep
from lrt_jax.comparison.results import Answered


def table(sweep: Sweep, results: Sequence[Answered]) -> list[str]:
    """Markdown: for each variant and budget what it costs, and the share of right answers by position, in %.

    A cell is the mean over seeds, and in brackets the least and the most, where these differ.
    """
    lines: list[str] = []

    def in_order(row: tuple[str, float]) -> tuple[int, float]:
        return sweep.variants.index(row[0]), row[1]

    for task in dict.fromkeys(result.task for result in results):
        of_task = [result for result in results if result.task == task]
        intervals = sorted({interval for result in of_task for interval in result.accuracy}, key=edges)
        names = [f"{begin + 1} to {end}" for begin, end in map(edges, intervals)]
        lines += [*([""] if lines else []), f"| {task} | cost | tokens | seeds | " + " | ".join(names) + " |"]
        lines += ["|---" * (len(names) + 4) + "|"]
        for variant, budget in sorted({(one.variant, one.budget) for one in of_task}, key=in_order):
            mine = [one for one in of_task if (one.variant, one.budget) == (variant, budget)]
            cost, tokens = mine[0].effective_tokens / mine[0].tokens, f"{mine[0].tokens / 1e6:.4g} M"
            about = (variant.removeprefix(f"{task} "), f"{cost:.2f}", tokens, str(len(mine)))
            cells = (
                _cell(one.accuracy[interval] for one in mine if interval in one.accuracy) for interval in intervals
            )
            lines.append("| " + " | ".join([*about, *cells]) + " |")
    return lines


def edges(interval: str) -> tuple[int, int]:
    """Where an interval of positions begins and ends: of ``32_to_64`` 32 and 64."""
    begin, end = interval.split("_to_")
    return int(begin), int(end)


def _cell(shares: Iterable[float]) -> str:
    percent = np.round(100 * np.array(list(shares)), 1)
    if not len(percent):
        return ""
    spread = f" ({percent.min():.1f} to {percent.max():.1f})" if np.ptp(percent) else ""
    return f"{percent.mean():.1f}{spread}"


def summary(sweep: Sweep, results: Sequence[Answered]) -> dict[str, Any]:
    """Everything, for a file."""
    return {"baseline": sweep.baseline, "runs": [dataclasses.asdict(result) for result in results]}
