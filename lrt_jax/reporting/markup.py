"""HTML, piece by piece: text that is escaped, numbers, tables."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lrt_jax.reporting.drawing import PALETTE, Look

# Characters of a row's name that stay on one line.
LONG = 30
# Stands where there is no number.
NONE = "–"

Escaped = str


def text(value: object) -> Escaped:
    """Anything as text of the page."""
    return html.escape(str(value))


def key(look: Look) -> Escaped:
    """A series' colour and dashes, beside its name."""
    return f'<i class="key {look.dash}" style="--c:var(--s{look.number % len(PALETTE)})"></i>'


def legend(looks: Mapping[str, Look]) -> Escaped:
    """What several series look like; nothing of one."""
    names = "".join(f"<li>{key(look)}{text(name)}</li>" for name, look in looks.items())
    return f'<ul class="legend">{names}</ul>' if len(looks) > 1 else ""


def numeral(value: float, form: str, unit: str = "") -> str:
    """A number in this format; NONE of NaN."""
    return NONE if math.isnan(value) else f"{value:{form}}{unit}"


def told(line: Sequence[Any]) -> bool:
    """Whether any run has this number."""
    return any(cell != NONE for cell in line[1:])


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], wide: int = 10**9) -> Escaped:
    """A table that scrolls in its own box.

    Args:
      head: titles; none: no line of them.
      rows: cells; the first names the row, and may be a pair: with what it means.
      wide: cells from this number on may be long, and wrap.
    """
    titles = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    lines = [f"<thead><tr>{titles}</tr></thead>"] if head else []
    for first, *others in rows:
        name, about = first if isinstance(first, tuple) else (first, "")
        kind = ' class="wide"' if len(name) > LONG else ""
        named = f'<th scope="row"{kind}>{text(name)}{f"<small>{text(about)}</small>" if about else ""}</th>'
        kinds = (' class="wide"' if number >= wide else "" for number in range(1, 1 + len(others)))
        cells = "".join(f"<td{kind}>{text(cell)}</td>" for kind, cell in zip(kinds, others, strict=True))
        lines.append(f"<tr>{named}{cells}</tr>")
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"
