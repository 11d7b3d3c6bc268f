"""How charts are drawn: colours, axes, long curves made short; as SVG for the page, and as PNG."""

import dataclasses
import html
import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lrt_jax.setup.errors import UserError

# Colours of series in the order of their runs, after Okabe and Ito: told apart by the colour-blind, and on paper.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#c48a00", "#5e5ce6", "#2f9fd0", "#8c564b")
DASHES: tuple[Any, ...] = ("solid", "dashed", "dotted")
INK, MUTED, GRID = "#1c1d22", "#63656f", "#e3e4e9"  # as PALETTE, the page gives them other values in the dark
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may have dollar signs
    "axes.formatter.useoffset": False,
    "font.size": 10.5,
    "axes.titlesize": 11,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.markersize": 4,
    "lines.linewidth": 1.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.8,
    "grid.color": GRID,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
}
# What tells that a file is of a report.
MARK = "lrt_jax.report"
# A smoothed curve is a running mean over this share of its points.
SMOOTHING = 0.02
# Characters of a name in a PNG's legend; lines of it that the usual height has room for, and the inches of one more.
NAME, ROWS, LINE = 60, 6, 0.2
# Leading digits of the ticks of a logarithmic axis; the first of these rows that makes three ticks is taken.
HEADS = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 1.5, 2, 3, 4, 5, 7),
    tuple(n / 2 for n in range(2, 20)),
    tuple(n / 10 for n in range(10, 100)),
)


@dataclasses.dataclass(frozen=True)
class Look:
    """How a series, of this number, is drawn wherever it is."""

    number: int

    @property
    def color(self) -> str:
        """Of light pages."""
        return PALETTE[self.number % len(PALETTE)]

    @property
    def dash(self) -> Any:
        """Of lines: another one once all colours are taken."""
        return DASHES[self.number // len(PALETTE) % len(DASHES)]

    def curve(self, axes: Any, x_N: Any, y_N: Any, **options: Any) -> None:
        """A line with dots, or as the options say."""
        axes.plot(x_N, y_N, **{"marker": "o", "linestyle": self.dash, "color": self.color} | options)


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
      name: of its file.
      title: what it shows.
      about: how to read it, a sentence or two; may be empty.
      draw: puts it on matplotlib's axes.
      legend: of its file, by name; a page has one for all charts of a section.
    """

    name: str
    title: str
    about: str
    draw: Callable[[Any], None]
    legend: Mapping[str, Look] = dataclasses.field(default_factory=dict)


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Of each name, in their order."""
    return {name: Look(number) for number, name in enumerate(dict.fromkeys(names))}


def thinned(x_N: np.ndarray, y_N: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most ``most`` points of a curve: the least and the largest of each stretch, so that no spike is lost."""
    if len(x_N) <= most:
        return x_N, y_N
    parts = np.array_split(np.arange(len(x_N)), max(1, most // 2))
    kept = np.unique([part[pick(y_N[part])] for part in parts for pick in (np.argmin, np.argmax)])
    return x_N[kept], y_N[kept]


def smoothed(y_N: np.ndarray) -> tuple[np.ndarray, int]:
    """A running mean, and over how many points it is; near the ends, over those that there are."""
    width = max(1, round(SMOOTHING * len(y_N)))
    ones = np.ones(width)
    return np.convolve(y_N, ones, "same") / np.convolve(np.ones(len(y_N)), ones, "same"), width


def progress(axes: Any, axis: str, places: Sequence[np.ndarray]) -> float:
    """Labels the x axis of a run's progress (``charts.AXES``); returns what its numbers are to be divided by."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    largest = max(float(x_N.max()) for x_N in places)
    of_tokens = [(1e9, "billion "), (1e6, "million "), (0.0, "")]
    sizes = {"steps": [(0.0, "")], "time": [(3600.0, "hours"), (60.0, "minutes"), (0.0, "seconds")]}
    scale, unit = next(one for one in sizes.get(axis, of_tokens) if largest >= one[0])
    scale = scale or 1.0
    names = {"steps": "steps", "time": f"time in training steps, {unit}", "tokens": f"{unit}training tokens"}
    axes.set_xlabel(names.get(axis, f"effective compute, {unit}tokens"))
    if axis == "compute" and min(x_N.min() for x_N in places) > 0:
        axes.set_xscale("log")
        round_ticks(axes.xaxis, np.concatenate(places) / scale)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=axis == "steps"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    return scale


def round_ticks(axis: Any, values_N: np.ndarray, scale: float = 1.0) -> None:
    """A few round numbers on a logarithmic axis, divided by ``scale`` and written out."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = 0.97 * float(values_N.min()), 1.03 * float(values_N.max())
    decades = range(int(np.floor(np.log10(low))), min(308, int(np.ceil(np.log10(high)))) + 1)
    for heads in HEADS:
        ticks = [head * 10.0**decade for decade in decades for head in heads if low <= head * 10.0**decade <= high]
        if len(ticks) >= 3:
            break
    axis.set_major_locator(FixedLocator(ticks[:: max(1, len(ticks) // 5)]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:,.4g}"))


def at_least(axes: Any, low: float, high: float) -> None:
    """Widens the y axis to hold these, so that what is small looks small."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, low), max(top, high))


def _drawn(chart: Chart, size: tuple[float, float], title: str, legend: Mapping[str, Look], **options: Any) -> bytes:
    """The chart as a file's bytes.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise UserError("charts need matplotlib: pip install 'lrt-jax[plots]'") from None
    stream = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a run's name in a script that the font has not
        columns = 1 + (len(legend) > 4)
        more = max(0, -(-len(legend) // columns) - ROWS)
        figure = Figure(figsize=(size[0], size[1] + LINE * more), layout="constrained")
        axes = figure.add_subplot()
        chart.draw(axes)
        axes.set_title(title, loc="left")
        if legend:
            handles = [Line2D([], [], color=look.color, linestyle=look.dash, linewidth=2) for look in legend.values()]
            names = [" " + (name if len(name) <= NAME else f"…{name[-NAME:]}") for name in legend]
            figure.legend(handles, names, loc="outside lower left", ncols=columns)
        figure.savefig(stream, **options)
    return stream.getvalue()


def png(chart: Chart, by: str = MARK) -> bytes:
    """As a file of its own, with title and legend, that says by what it was written."""
    legend = chart.legend if len(chart.legend) > 1 else {}
    return _drawn(chart, (6.4, 4.2), chart.title, legend, format="png", dpi=150, metadata={"Software": by})


def svg(chart: Chart) -> str:
    """As an element of the page, which gives it fonts and colours; what it refers to within has no other's name."""
    text = _drawn(chart, (4.3, 3.0), "", {}, format="svg", transparent=True).decode()
    text = re.sub(r"(?s)^.*?<svg [^>]*(viewBox=\"[^\"]*\")[^>]*>\s*<metadata>.*?</metadata>", r"<svg \1>", text)
    text = re.sub(r"(?s)<style type=\"text/css\">.*?</style>|; font-family: [^;\"]*|font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\1{chart.name}-", text).replace("xlink:href", "href")
    names = {INK: "ink", MUTED: "muted", GRID: "grid"} | {color: f"s{number}" for number, color in enumerate(PALETTE)}
    for color, name in names.items():
        text = text.replace(color, f"var(--{name})")
    named = f'<svg role="img" aria-label="{html.escape(chart.title)}" '
    return re.sub(r"\n\s*", "\n", text).replace("<svg ", named, 1)
