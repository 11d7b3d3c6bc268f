"""Rows of several benchmarks as one JSON file and one page of tables, written again and again as rows come."""

import json
from pathlib import Path
from typing import Any


def write(out: Path, files: dict[str, Path], said: dict[str, str], about: dict[str, Any]) -> None:
    """Writes ``results.json`` and ``table.md`` into a folder, of what there is so far.

    Args:
      out: the folder.
      files: by the names of sections, where each leaves its rows.
      said: how sections ended, as far as they have begun.
      about: the machine and the code.
    """
    found: dict[str, Any] = {"about": about, "sections": {}}
    lines = [f"{about['device']}, jax {about['jax']}, commit {about['commit']}, {about['date']}"]
    for name, file in files.items():
        content = {"rows": []} | _content(file)
        found["sections"][name] = content | {"outcome": said.get(name, "not reached")}
        lines += ["", f"**{name}**: {said.get(name, 'not reached')}", "", *table(content["rows"])]
    for file_name, text in (("results.json", json.dumps(found, indent=2)), ("table.md", "\n".join(lines))):
        new = out / f"{file_name}.new"
        new.write_text(text + "\n")
        new.replace(out / file_name)


def _content(path: Path) -> dict[str, Any]:
    """What a section has written; nothing where it is not there, or is being written."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as a markdown table; what is the same as the default of every row is left out."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if any(row.get(name) for row in rows)]
    if not names:
        return []

    def cell(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(cell, value))
        if isinstance(value, float):
            return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
        return f"{value:,}" if isinstance(value, int) else str(value or "")

    head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return head + ["| " + " | ".join(cell(row.get(name)) for name in names) + " |" for row in rows]
