"""Reports in a work dir, and two of them compared item by item."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from lrt_jax.durability import manifest
from lrt_jax.few_shot import record
from lrt_jax.few_shot.core import Choice
from lrt_jax.few_shot.report import Report
from lrt_jax.few_shot.statistics import Comparison, compare
from lrt_jax.few_shot.tasks import FewShotError, Task
from lrt_jax.setup.errors import writing


def folder_of(workdir: Path, step: int, choice: Choice) -> Path:
    """Where a checkpoint's scores are."""
    memory = "" if choice.use_memory else "-nomemory"
    return workdir / record.FOLDER / f"step_{step}-{choice.decode.prefill}{memory}"


def write(folder: Path, report: Report) -> Path:
    """Puts a report beside the items that it sums up, and returns its table's file.

    It replaces one of the same tasks, asked and scored the same way.

    Raises:
      WorkdirError: it cannot be written.
    """
    asked = [report.how, [score.task for score in report.scores], report.missing]
    name = f"report-{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]}"
    files = {
        ".json": json.dumps(_finite(report.to_json()), indent=2, allow_nan=False),
        ".md": "\n".join(report.table()),
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in files.items():
            manifest.write_whole(epath.Path(folder / (name + suffix)), (text + "\n").encode())
    return folder / f"{name}.md"


def _finite(value: Any) -> Any:
    """NaN, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def require_scores(other: Path) -> None:
    """Checks that a work dir, or a folder in its ``few_shot``, has scores to compare with.

    Raises:
      FewShotError: it has none.
    """
    if not any(path for folder in _folders(other) for path in folder.glob("*.jsonl")):
        raise FewShotError(
            f"--against is {str(other)!r}, which has no scores; it must be a work dir that was scored with --core, or "
            f"a folder in its {record.FOLDER}"
        )


def against(report: Report, other: Path, mine: Path) -> Iterator[str]:
    """A report compared with the scores of another run, or of another way of scoring, as Markdown.

    Args:
      report: the first.
      other: a work dir, or one of the folders in its ``few_shot``. Of a work dir the folder with most of the same items
        is taken, and of two alike the newest.
      mine: the folder of ``report``, which is not compared with itself.

    Raises:
      FewShotError: there are no scores of the same items.
    """
    scored = {}
    for folder in _folders(other):
        if folder.resolve() != mine.resolve():
            scored[folder] = {task: _pairs(folder, report, task) for task in report.items}
    best = max(scored, key=lambda folder: sum(map(len, scored[folder].values())), default=other)
    found = {task: compare(pairs) for task, pairs in scored.get(best, {}).items() if pairs}
    if not found:
        raise FewShotError(
            f"--against is {str(other)!r}, which has no scores of the same items but those of this evaluation; score "
            "that run first, by the same command with its --workdir"
        )
    yield f"Compared with {best}:\n"
    yield "| task | items both have | right here only | right there only | difference | p (McNemar) |"
    yield "|---|---|---|---|---|---|"
    for task, one in found.items():
        yield f"| {task.label} | {_row(one)} |"
    yield f"| all items | {_row(compare([pair for pairs in scored[best].values() for pair in pairs]))} |"
    if left := [task.label for task in report.items if task not in found]:
        yield f"\nNot compared, since it has no scores of the same items: {', '.join(left)}."


def _row(one: Comparison) -> str:
    return f"{one.items:,} | {one.only_first:,} | {one.only_second:,} | {one.difference:+.4f} | {one.p_value:.3g}"


def _folders(other: Path) -> list[Path]:
    """Those that may have scores, the newest first."""
    inside = other / record.FOLDER
    folders = inside.iterdir() if inside.is_dir() else [other]
    return sorted((path for path in folders if path.is_dir()), key=lambda path: -path.stat().st_mtime)


def _pairs(folder: Path, report: Report, task: Task) -> list[tuple[bool, bool]]:
    """Of each item that both have, asked the same way: whether the report is right, and whether the folder is."""
    files = sorted(folder.glob(f"{task.label}-*.jsonl"), key=lambda path: -path.stat().st_mtime)
    for path in files:
        try:
            header = record.header_of(path)
            asked = (header["task"]["shots"], header["data"], header["settings"]["items"])
        except (ValueError, KeyError, TypeError, OSError):
            continue
        if asked == (task.shots, report.files[task], report.how["items"]):
            theirs = record.read(path)
            pairs = [(one.correct, theirs[one.item].correct) for one in report.items[task] if one.item in theirs]
            if pairs:
                return pairs
    return []
