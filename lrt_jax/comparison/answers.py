"""What the runs of a sweep over state tracking came to: right answers by length, for each task and variant."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lrt_jax.comparison.plan import Sweep
from lrt_jax.comparison.results import Answered


def table(sweep: Sweep, results: Sequence[Answered]) -> list[str]:
    """Markdown: for each variant what it costs, and the share of right answers by position, in %.

    A cell is the mean over seeds, and in brackets the least and the most, where these differ.
    """
    lines: list[str] = []
    for task in dict.fromkeys(result.task for result in results):
        of_task = [result for result in results if result.task == task]
        intervals = list(of_task[0].accuracy)
        names = [f"{int(begin) + 1} to {end}" for begin, end in (interval.split("_to_") for interval in intervals)]
        lines += [*([""] if lines else []), f"| {task} | cost | tokens | seeds | " + " | ".join(names) + " |"]
        lines += ["|---" * (len(names) + 4) + "|"]
        for variant in sweep.variants:
            mine = [result for result in of_task if result.variant == variant]
            if mine:
                cost = mine[0].effective_tokens / mine[0].tokens
                about = (
                    variant.removeprefix(f"{task} "),
                    f"{cost:.2f}",
                    f"{mine[0].tokens / 1e6:.4g} M",
                    str(len(mine)),
                )
                cells = (_cell(result.accuracy[interval] for result in mine) for interval in intervals)
                lines.append("| " + " | ".join([*about, *cells]) + " |")
    return lines


def _cell(shares: Iterable[float]) -> str:
    percent = np.round(100 * np.array(list(shares)), 1)
    spread = f" ({percent.min():.1f} to {percent.max():.1f})" if np.ptp(percent) else ""
    return f"{percent.mean():.1f}{spread}"


def summary(sweep: Sweep, results: Sequence[Answered]) -> dict[str, Any]:
    """Everything, for a file."""
    return {"baseline": sweep.baseline, "runs": [dataclasses.asdict(result) for result in results]}
