"""The charts of a sweep: bits per byte at equal compute, or right answers by length."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lrt_jax.comparison.answers import edges
from lrt_jax.comparison.results import Answered, Result, curve
from lrt_jax.reporting import drawing
from lrt_jax.reporting.drawing import INK, Chart, Look


def equal_compute(results: Sequence[Result], look: dict[str, Look], name: str) -> Chart | None:
    """Bits per byte by effective compute, a curve per variant; ``name`` is its file's."""
    if not results:
        return None

    variants = dict.fromkeys(result.variant for result in results)

    def draw(axes: Any) -> None:
        axes.set_xscale("log")
        for variant in variants:
            points = [(one.effective_tokens, one.bpb) for one in results if one.variant == variant]
            color = look[variant].color if variant in look else INK
            axes.plot(*zip(*points, strict=True), "o", color=color, alpha=0.8)
            fitted = curve(points)
            if fitted is not None:
                x_N = np.geomspace(fitted.least, fitted.most, 60)
                axes.plot(x_N, [fitted.bpb(x) for x in x_N], color=color)
        drawing.round_ticks(axes.xaxis, np.array([one.effective_tokens for one in results]), 1e6)
        axes.set(xlabel="effective compute, million tokens", ylabel="sequential bits per byte")

    about = "A dot is a run, a curve a variant. At equal compute lower is better; at equal height, further left."
    shown = {variant: look[variant] for variant in variants if variant in look}
    return Chart(name, "Bits per byte at equal compute", about, draw, shown)


def answers_by_length(results: Sequence[Answered], name: str) -> Iterator[Chart]:
    """For each task right answers by position, a curve per variant: with its largest budget, the mean over seeds.

    A variant looks the same in all tasks. A chart's file is named ``name`` and the task.
    """
    look = drawing.looks(result.within_task for result in results)
    largest: dict[str, float] = {}
    for result in results:
        largest[result.variant] = max(result.budget, largest.get(result.variant, 0.0))
    for task in dict.fromkeys(result.task for result in results):
        found: dict[str, dict[tuple[int, int], list[float]]] = {}
        for result in results:
            if result.task == task and result.budget == largest[result.variant]:
                for interval, share in result.accuracy.items():
                    found.setdefault(result.within_task, {}).setdefault(edges(interval), []).append(100 * share)

        def draw(axes: Any, found: dict[str, dict[tuple[int, int], list[float]]] = found) -> None:
            for variant, shares in found.items():
                intervals = sorted(shares)
                means = [np.mean(shares[interval]) for interval in intervals]
                look[variant].curve(axes, [end for _, end in intervals], means)
            ends = sorted({end for shares in found.values() for _, end in shares})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ends, list(map(str, ends)))
            axes.set(xlabel="up to this position", ylabel="right answers, %", ylim=(-3, 103))

        about = "Under true recurrence, the mean over seeds. A dot is of the positions since the dot before it."
        shown = {variant: look[variant] for variant in found}
        yield Chart(f"{name}-{task}", f"Right answers by length: {task}", about, draw, shown)
