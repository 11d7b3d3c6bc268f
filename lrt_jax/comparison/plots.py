"""A sweep as a picture: bits per byte by effective compute, with each variant's curve; or right answers by length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrt_jax.comparison.answers import edges
from lrt_jax.comparison.plan import Sweep
from lrt_jax.comparison.results import Answered, Result, curve
from lrt_jax.setup.errors import UserError

# Of series beyond the tenth, which have the first ones' colours; and inches of a column of the legend.
LINES = ("-", "--")
LEGEND = 2.6


def draw(sweep: Sweep, results: Sequence[Result], path: Path) -> None:
    """Writes the picture of bits per byte, in the format that the path's suffix names.

    Raises:
      UserError: matplotlib is not installed.
    """
    figure = _figure(8, 5)
    axes = figure.add_subplot(xscale="log", xlabel="effective tokens", ylabel="sequential bits per byte")
    for number, variant in enumerate(sweep.variants):
        points = [(result.effective_tokens, result.bpb) for result in results if result.variant == variant]
        if not points:
            continue
        color = f"C{number % 10}"
        effective_tokens, bpb = zip(*points, strict=True)
        axes.scatter(effective_tokens, bpb, color=color, s=14, label=variant)
        fitted = curve(points)
        if fitted is not None:
            effective = np.geomspace(fitted.least, fitted.most, 100)
            axes.plot(effective, [fitted.bpb(one) for one in effective], color=color, linewidth=1)
    axes.legend()
    figure.savefig(path)


def draw_answers(sweep: Sweep, results: Sequence[Answered], path: Path) -> None:
    """Writes the picture of right answers: a panel for each task, a line for each variant, its mean over seeds.

    Raises:
      UserError: matplotlib is not installed.
    """
    names = list(dict.fromkeys(result.task for result in results))
    figure = _figure(4.2 * len(names), 4.6)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    ends = sorted({edges(interval)[1] for result in results for interval in result.accuracy})
    short = {result.variant: result.variant.removeprefix(f"{result.task} ") for result in results}
    labels = list(dict.fromkeys(short[variant] for variant in sweep.variants if variant in short))
    lines = {}
    for axes, task in zip(panels, names, strict=True):
        for variant in dict.fromkeys(result.variant for result in results if result.task == task):
            number = labels.index(short[variant])
            found: dict[int, list[float]] = {}
            for result in results:
                if (result.task, result.variant) == (task, variant):
                    for interval, share in result.accuracy.items():
                        found.setdefault(edges(interval)[1], []).append(100 * share)
            means = [float(np.mean(found[end])) for end in sorted(found)]
            look = {
                "marker": "osD^vPX*<>"[number % 10],
                "color": f"C{number % 10}",
                "linestyle": LINES[number // 10 % 2],
            }
            lines[short[variant]] = axes.plot(sorted(found), means, linewidth=1.2, markersize=5, **look)[0]
        axes.set(title=task, xlabel="up to this position", ylim=(-3, 103))
        axes.set_xscale("log", base=2)
        axes.set_xticks(ends, list(map(str, ends)))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("right answers, %")
    columns = max(2, int(figure.get_figwidth() // LEGEND))
    shown = {label: lines[label] for label in labels}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path)


def _figure(width: float, height: float) -> Any:
    """An empty figure, in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "plots need matplotlib: pip install 'lrt-jax[plots]'; the table and the JSON file are there"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")
