"""Reports in a work dir, and two of them compared item by item."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from lrt_jax.durability import manifest
from lrt_jax.few_shot import record
from lrt_jax.few_shot.core import Choice, Report
from lrt_jax.few_shot.statistics import Comparison, compare
from lrt_jax.few_shot.tasks import FewShotError
from lrt_jax.setup.errors import writing

JSON, TABLE = "results.json", "table.md"


def folder_of(workdir: Path, step: int, choice: Choice) -> Path:
    """Where a checkpoint's scores are."""
    return workdir / record.FOLDER / f"step_{step}-{choice.name}"


def write(folder: Path, report: Report) -> None:
    """Puts a report beside the items that it sums up; one that was there before is replaced.

    Raises:
      WorkdirError: it cannot be written.
    """
    files = {JSON: json.dumps(_finite(report.to_json()), indent=2, allow_nan=False), TABLE: "\n".join(report.table())}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            manifest.write_whole(epath.Path(folder / name), (text + "\n").encode())


def _finite(value: Any) -> Any:
    """NaN, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def against(report: Report, other: Path, mine: Path) -> Iterator[str]:
    """A report compared with the scores of another run, or of another way of scoring, as Markdown.

    Args:
      report: the first.
      other: a work dir, of which the newest scores are taken, or one of the folders in its ``few_shot``.
      mine: the folder of ``report``, which is not compared with itself.

    Raises:
      FewShotError: there are no scores of the same items.
    """
    folders = [folder for folder in _folders(other) if folder.resolve() != mine.resolve()]
    found: dict[str, tuple[Path, Comparison]] = {}
    both: list[tuple[bool, bool]] = []
    for task, items in report.items.items():
        for folder in folders:
            theirs = _same_items(folder, report, task.label)
            pairs = [(one.correct, theirs[one.item]) for one in items if one.item in theirs]
            if pairs:
                found[task.label] = (folder, compare(pairs))
                both += pairs
                break
    if not found:
        raise FewShotError(
            f"--against is {str(other)!r}, which has no scores of the same items; score that run first, by the same "
            "command with its --workdir"
        )
    yield "| task | items both have | right here only | right there only | difference | p (McNemar) | there |"
    yield "|---|---|---|---|---|---|---|"
    for label, (folder, one) in found.items():
        yield f"| {label} | {_row(one)} | {folder.name} |"
    yield f"| all items | {_row(compare(both))} | |"
    if left := [task.label for task in report.items if task.label not in found]:
        yield f"\nNot compared, since {other} has no scores of the same items: {', '.join(left)}."


def _row(one: Comparison) -> str:
    return f"{one.items:,} | {one.only_first:,} | {one.only_second:,} | {one.difference:+.4f} | {one.p_value:.3g}"


def _folders(other: Path) -> list[Path]:
    """Those with scores, the newest first."""
    inside = other / record.FOLDER
    folders = [path for path in inside.iterdir() if path.is_dir()] if inside.is_dir() else [other]
    return sorted(folders, key=lambda path: path.stat().st_mtime if path.exists() else 0, reverse=True)


def _same_items(folder: Path, report: Report, label: str) -> dict[int, bool]:
    """Which items were right, of those that were asked as in ``report``: of the same file, with the same shots."""
    (task,) = [task for task in report.items if task.label == label]
    for path in sorted(folder.glob(f"{label}-*.jsonl")):
        try:
            header = record.header_of(path)
            same = (header["data"], header["settings"]["items"]) == (report.files[task], report.how["items"])
        except (ValueError, KeyError, TypeError):
            continue
        if same:
            return {number: one.correct for number, one in record.read(path).items()}
    return {}
