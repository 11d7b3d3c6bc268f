"""A sweep as a picture: bits per byte by effective compute, with each variant's curve."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lrt_jax.comparison.plan import Sweep
from lrt_jax.comparison.results import Result, curve
from lrt_jax.setup.errors import UserError


def draw(sweep: Sweep, results: Sequence[Result], path: Path) -> None:
    """Writes the picture, in the format that the path's suffix names.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "plots need matplotlib: pip install 'lrt-jax[plots]'; the table and the JSON file are there"
        ) from None
    figure = Figure(figsize=(8, 5), layout="constrained")
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
