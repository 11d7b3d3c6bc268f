"""The charts of a report: of each a function of the runs, None where they have nothing to show."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lrt_jax.comparison.results import Answered
from lrt_jax.reporting import drawing
from lrt_jax.reporting.drawing import MUTED, Chart, Look
from lrt_jax.reporting.measured import Measured
from lrt_jax.reporting.runs import Run

AXES = {"steps": "by steps", "tokens": "by tokens", "time": "by time", "compute": "by effective compute"}
# Of training: each metric, its title, and the unit of its axis.
TRAINING = {
    "train/loss": ("Training loss", "loss, nats per token"),
    "train/grad_norm": ("Gradient norm", "global norm, before clipping"),
}
# Points that a chart's curves may have together, and one of them, at most.
POINTS, LONGEST = 16_000, 1_200
# Of more runs than these, only smoothed losses are shown.
PALE = 12
# gzip's bits per byte are drawn where they are at most so many times the largest of the runs'.
NEAR = 1.5
# A difference in bits per byte that is none, as a share: no axis makes it look large.
FLAT = 0.01

# The name of a chart's file, its title, and how to read it.
Said = tuple[str, str, str]
# By label, of runs whose checkpoints were read.
Measurements = dict[str, Measured]
# What each memory is, and the metric that has its bits per byte.
MEMORIES = {
    "none": "val/bpb_init",
    "8 tokens\nold": "val/bpb_memory/old",
    "another\nrow’s": "val/bpb_memory/shuffled",
    "its own": "val/bpb_sequential",
}
# Of each scalar and gate: its sign, and what it is.
SCALARS = {
    "alpha": ("α", "Scale of the residual stream; 1 at the start."),
    "beta": ("β", "Share of the token’s embedding x⁰; 0.1 at the start."),
    "gamma": ("γ", "Share of the memory in the residual stream; 0.1 at the start, 0 ignores it."),
}
GATES = {
    "g_loc": "Of the layer’s own keys and values.",
    "g_mem": "Of the memory’s keys and values; 0 ignores them.",
    "g_ve": "Of value embeddings.",
}


def looks(runs: Sequence[Run]) -> dict[str, Look]:
    """Of each series, in the order of the runs."""
    return drawing.looks(run.series for run in runs)


def _placed(runs: Sequence[Run], metric: str, axis: str) -> list[tuple[Run, np.ndarray, np.ndarray]]:
    """Places and values of a metric, of each run that has it on an axis."""
    found = []
    for run in runs:
        steps_N, y_N = run.values(metric)
        x_N = run.at(axis, steps_N) if len(y_N) else None
        if x_N is not None:
            found.append((run, x_N, y_N))
    return found


def curves(runs: Sequence[Run], axis: str, metric: str, title: str, unit: str) -> Chart | None:
    """A metric of training, as logged and smoothed."""
    found = _placed(runs, metric, axis)
    if not found:
        return None
    look, most, pale = looks(runs), min(LONGEST, POINTS // len(found)), len(found) <= PALE
    all_N = np.concatenate([y_N for *_, y_N in found])

    def draw(axes: Any) -> None:
        scale = drawing.progress(axes, axis, [x_N for _, x_N, _ in found])
        for run, x_N, y_N in found:
            line, marker = look[run.series], "o" if len(x_N) == 1 else None
            if pale:
                line.curve(axes, *drawing.thinned(x_N / scale, y_N, most), alpha=0.3, linewidth=0.7, marker=None)
            smooth = drawing.thinned(x_N / scale, drawing.smoothed(y_N)[0], most)
            line.curve(axes, *smooth, marker=marker, linewidth=1.6 if pale else 0.8)
        axes.set_ylabel(unit)
        if all_N.min() > 0:
            axes.set_yscale("log")
            drawing.round_ticks(axes.yaxis, all_N)

    widths = [drawing.smoothed(y_N)[1] for *_, y_N in found]
    over = f"{min(widths):,}" if min(widths) == max(widths) else f"{min(widths):,} to {max(widths):,}"
    about = f"{'Pale: as logged. Strong: running' if pale else 'Running'} mean over {over} reports."
    return Chart(_file(title, axis), title, about if max(widths) > 1 else "", draw, look)


def bits_per_byte(runs: Sequence[Run], measured: Measurements, axis: str) -> Chart | None:
    """Sequential and merged bits per byte of held-out text."""
    sequential, merged = (_placed(runs, name, axis) for name in ("val/bpb_sequential", "val/bpb"))
    if not sequential:
        return None
    look, most = looks(runs), max(float(y_N.max()) for *_, y_N in sequential)
    gzip = {round(one.gzip, 3) for one in measured.values() if one.gzip and one.gzip < NEAR * most}

    def draw(axes: Any) -> None:
        scale = drawing.progress(axes, axis, [x_N for _, x_N, _ in sequential])
        for run, x_N, y_N in sequential:
            look[run.series].curve(axes, x_N / scale, y_N)
        for run, x_N, y_N in merged:
            look[run.series].curve(axes, x_N / scale, y_N, linestyle="none", markerfacecolor="none", markersize=7)
        for bpb in gzip:
            axes.axhline(bpb, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
            at = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
            axes.text(0.99, bpb, f"gzip -9: {bpb:.3f}", color=MUTED, **at)
        axes.set_ylabel("bits per byte")

    about = "Dots: sequential. Rings: merged, which should lie around them. Lower is better."
    return Chart(_file("bpb", axis), "Bits per byte of held-out text", about, draw, look)


def _file(what: str, axis: str) -> str:
    return f"{what.lower()}-{AXES[axis]}".replace(" ", "-")


def forwards(runs: Sequence[Run]) -> Iterator[Chart]:
    """Of each run the losses of the forwards that its steps are made of, if of many kinds."""
    named = {run.label: _forwards(run) for run in runs}
    look = drawing.looks(name for names in named.values() for name in names.values())
    for number, run in enumerate(runs, 1):
        names = named[run.label]

        def draw(axes: Any, run: Run = run, names: dict[str, str] = names) -> None:
            drawing.progress(axes, "steps", [run.values(metric)[0] for metric in names])
            for metric, name in names.items():
                x_N, y_N = run.values(metric)
                look[name].curve(axes, *drawing.thinned(x_N, drawing.smoothed(y_N)[0], LONGEST), marker=None)
            axes.set_ylabel("loss, nats per token")

        if len(names) > 1:
            title = f"Loss of each forward{f' of {run.label}' if len(runs) > 1 else ''}"
            about = "Smoothed. The forward “init” has zero memory; the others read it."
            yield Chart(f"forwards-{number}", title, about, draw, {name: look[name] for name in names.values()})


def _forwards(run: Run) -> dict[str, str]:
    """Names of a run's forwards, by the metrics that have their losses; 2 before 10."""
    metrics = {metric for row in run.rows.values() for metric in row if metric.startswith("train/loss_")}
    in_order = sorted(metrics, key=lambda metric: (len(metric), metric))
    return {metric: metric.removeprefix("train/loss_").replace("_", " ") for metric in in_order}


def by_position(runs: Sequence[Run]) -> Iterator[Chart]:
    """Sequential bits per byte, and the answers of state tracking, by position in the row, at the last evaluation.

    Answers of sweeps have a chart of their own (sweep_charts).
    """
    look = looks(runs)
    about = "Sequential, at the last evaluation. The more text the model has read, the lower it should be."
    said = ("bpb-by-position", "Bits per byte by position", about)
    yield from _by_position(runs, look, "val/bpb_sequential/", said, "bits per byte", 1)
    about = "Under true recurrence, at the last evaluation. Positions beyond the trained length count, too."
    said = ("answers-by-position", "Right answers by position", about)
    alone = [run for run in runs if not (run.of_a_sweep and isinstance(run.result, Answered))]
    yield from _by_position(alone, look, "val/accuracy/", said, "right answers, %", 100)


def _by_position(
    runs: Sequence[Run], look: dict[str, Look], prefix: str, said: Said, unit: str, factor: float
) -> Iterator[Chart]:
    """A metric for each interval of positions, ``A_to_B`` behind ``prefix``, of the runs that have some."""
    names = {name for run in runs for row in run.rows.values() for name in row}
    matches = [match for name in names if (match := re.fullmatch(rf"{prefix}(\d+)_to_(\d+)", name))]
    buckets = {(int(match[1]), int(match[2])): match[0] for match in matches}
    order = sorted(buckets)

    def draw(axes: Any) -> None:
        for run in runs:
            values = {place: factor * run.last(buckets[edges]) for place, edges in enumerate(order)}
            shown = {place: value for place, value in values.items() if not math.isnan(value)}
            look[run.series].curve(axes, list(shown), list(shown.values()))
        axes.set_xticks(range(len(order)), [f"{begin + 1:,}–{end:,}" for begin, end in order])
        axes.set(xlabel="position in the row, tokens", ylabel=unit)

    if order:
        yield Chart(*said, draw, look)


def health(runs: Sequence[Run]) -> Iterator[Chart]:
    """How the recurrence does: over the run, where it was evaluated more than once, and at its end."""
    about = "Near 0 is healthy; above 1 % decoding is worse than training shows."
    yield from _developed(runs, "val/gap", ("gap", "Gap of sequential decoding", about), "gap, %")
    about = "By what factor one more forward changes memory less than the one before. Below 1 it settles."
    yield from _developed(runs, "val/contraction", ("contraction", "Contraction", about), "factor")
    after = {run.label: (run, found) for run in runs if (found := passes(run))}
    if not after:
        return
    look = looks(runs)

    def draw_after(axes: Any) -> None:
        for run, found in after.values():
            look[run.series].curve(axes, list(found), list(found.values()))
            middle = float(np.mean(list(found.values())))
            drawing.at_least(axes, (1 - FLAT) * middle, (1 + FLAT) * middle)
        axes.set_xticks(sorted({k for _, found in after.values() for k in found}))
        axes.set(xlabel="full forwards that memory went through", ylabel="bits per byte")

    about = "At the last evaluation. Flat is healthy: memory has settled."
    yield Chart("bpb-after-forwards", "Bits per byte after K forwards", about, draw_after, look)

    def draw_worth(axes: Any) -> None:
        for run, _ in after.values():
            values_N = [run.last(name) for name in MEMORIES.values()]
            look[run.series].curve(axes, range(len(MEMORIES)), values_N, linewidth=0.8)
            drawing.at_least(axes, (1 - FLAT) * values_N[-1], (1 + FLAT) * values_N[-1])
        axes.set_xticks(range(len(MEMORIES)), list(MEMORIES))
        axes.set(xlabel="the memory that is read", ylabel="bits per byte")

    about = "A model that uses its memory is worse with another one, and best with its own."
    yield Chart("bpb-by-memory", "What memory is worth", about, draw_worth, look)


def _developed(runs: Sequence[Run], metric: str, said: Said, unit: str) -> Iterator[Chart]:
    """A metric over the steps, of runs that have it more than once."""
    found = [(run, x_N, y_N) for run, x_N, y_N in _placed(runs, metric, "steps") if len(y_N) > 1]
    if not found:
        return
    look, percent = looks(runs), unit.endswith("%")

    def draw(axes: Any) -> None:
        drawing.progress(axes, "steps", [x_N for _, x_N, _ in found])
        for run, x_N, y_N in found:
            look[run.series].curve(axes, *drawing.thinned(x_N, (100 if percent else 1) * y_N, LONGEST))
        axes.axhline(0 if percent else 1, color=MUTED, linewidth=0.8)
        drawing.at_least(axes, *((-100 * FLAT, 100 * FLAT) if percent else (0, 1)))
        axes.set_ylabel(unit)

    yield Chart(*said, draw, look)


def passes(run: Run) -> dict[int, float]:
    """Bits per byte after 1, 2, … full forwards, at the last evaluation; older runs write the name with a slash."""
    return run.numbered("val/bpb_after_") or run.numbered("val/bpb_after/")


def layers(runs: Sequence[Run], measured: Measurements, look: dict[str, Look]) -> Iterator[Chart]:
    """α, β, γ and the gates by layer, of checkpoints; where these were not read, γ and g_mem as metrics have them."""
    for name, (sign, about) in SCALARS.items():
        found = {run.label: _scalar(run, measured, name) for run in runs}
        points = {label: (list(one), list(one.values()), None) for label, one in found.items() if one}
        yield from _by_layer((name, f"{sign} by layer", about), runs, points, look, sign)
    for name, about in GATES.items():
        spread, means = {}, {}
        for run in runs:
            gate = measured[run.label].gates.get(name) if run.label in measured else None
            if gate is not None:
                spread[run.label] = (gate.layers, gate.mean, (gate.low, gate.high))
            elif name == "g_mem" and (logged := run.numbered("memory/gate/")):
                means[run.label] = (list(logged), list(logged.values()), None)
        bars = "Dots: mean; bars: 10 to 90 % of positions." if spread else "Mean at the last evaluation."
        said = (name.replace("_", "-"), f"Gate {name} by layer", f"{about} 1 at the start. {bars}")
        yield from _by_layer(said, runs, spread | means, look, name)


def _scalar(run: Run, measured: Measurements, name: str) -> dict[int, float]:
    if run.label in measured and measured[run.label].scalars:
        return measured[run.label].scalars.get(name, {})
    return run.numbered("memory/gamma/") if name == "gamma" else {}


def _by_layer(
    said: Said, runs: Sequence[Run], points: dict[str, Any], look: dict[str, Look], sign: str
) -> Iterator[Chart]:
    """Dots by layer, those of several runs side by side."""
    series = {run.label: run.series for run in runs}

    def draw(axes: Any) -> None:
        for number, (label, (layers_N, mean_N, spread)) in enumerate(points.items()):
            line = look[series[label]]
            x_N = np.array(layers_N) + 0.5 * ((number + 0.5) / len(points) - 0.5)
            if spread is not None:
                axes.vlines(x_N, *spread, color=line.color, linewidth=2.4, alpha=0.35)
            line.curve(axes, x_N, mean_N, linestyle="none", markersize=4.5)
        axes.axhline(1.0 if sign in (*GATES, "α") else 0.0, color=MUTED, linewidth=0.8)
        shown = sorted({layer for layers_N, *_ in points.values() for layer in layers_N})
        axes.set_xticks(shown[:: max(1, len(shown) // 8)])
        axes.set_xlim(shown[0] - 0.6, shown[-1] + 0.6)
        if sign in GATES:
            axes.set_ylim(-0.06, 2.06)
        axes.set(xlabel="layer", ylabel=sign)

    if points:
        yield Chart(*said, draw, look)
