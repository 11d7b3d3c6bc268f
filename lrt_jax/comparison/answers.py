"""What the runs of a sweep over state tracking came to: right answers by length, for each task and variant."""

from collections.abc import Sequence

import numpy as np

from lrt_jax.comparison.results import Answered


def tables(variants: Sequence[str], results: Sequence[Answered]) -> list[list[list[str]]]:
    """Of each task a head, then for each variant and budget what it costs, and right answers by position, in %.

    A cell is the mean over seeds, and in brackets the least and the most, where these differ.
    """
    tasks = dict.fromkeys(result.task for result in results)
    return [_rows(variants, task, [result for result in results if result.task == task]) for task in tasks]


def _rows(variants: Sequence[str], task: str, results: Sequence[Answered]) -> list[list[str]]:
    intervals = sorted({interval for result in results for interval in result.accuracy}, key=edges)
    names = [f"{begin + 1} to {end}" for begin, end in map(edges, intervals)]
    lines = [[task, "cost", "tokens", "seeds", *names]]
    for variant in variants:
        for budget in sorted({result.budget for result in results if result.variant == variant}):
            mine = [result for result in results if (result.variant, result.budget) == (variant, budget)]
            cost, tokens = mine[0].effective_tokens / mine[0].tokens, mine[0].tokens / 1e6
            about = (mine[0].within_task, f"{cost:.2f}", f"{tokens:.4g} M", str(len(mine)))
            shares = ([one.accuracy[interval] for one in mine if interval in one.accuracy] for interval in intervals)
            lines.append([*about, *map(_cell, shares)])
    return lines


def edges(interval: str) -> tuple[int, int]:
    """Where an interval of positions begins and ends: of ``32_to_64`` 32 and 64."""
    begin, end = interval.split("_to_")
    return int(begin), int(end)


def _cell(shares: Sequence[float]) -> str:
    if not shares:
        return ""
    mean, least, most = (f"{100 * share:.1f}" for share in (np.mean(shares), min(shares), max(shares)))
    return mean if least == most else f"{mean} ({least} to {most})"
