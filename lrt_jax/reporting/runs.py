"""A run as it lies in its work dir, read leniently: what cannot be read is a note, and never stops a report."""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from lrt_jax.comparison import results
from lrt_jax.comparison.results import Done, ResultError
from lrt_jax.durability import lock
from lrt_jax.durability.binding import CONFIG_FILE
from lrt_jax.few_shot.record import FOLDER as FEW_SHOT
from lrt_jax.model import costs
from lrt_jax.run.metrics import FILE as METRICS
from lrt_jax.setup.config import Config, ConfigError, from_json
from lrt_jax.setup.durations import train_steps
from lrt_jax.setup.errors import UserError, one_line

# A file of a work dir; a folder without any of them is none.
MARKS = (CONFIG_FILE, METRICS, "checkpoints")
# One of these is in the last row of a run that came to its end.
SCORES = ("val/bpb_sequential", "val/accuracy")
# A run of a sweep: variant, budget and seed (comparison.plan.Run.name).
OF_A_SWEEP = re.compile(r"(.+)_([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)_([0-9]+)")
# A run that has its lock's file and has written nothing for so many seconds was killed.
QUIET = 900.0
# A metric whose name ends with a number of so many digits is not one of ours.
DIGITS = 10

Rows = dict[int, dict[str, float]]


class ReportError(UserError):
    """There is nothing to report on, or no place to write to."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
      folder: its work dir.
      label: its name on the page, which no other run has.
      series: what its colour stands for: its variant in a sweep, else its label.
      of_a_sweep: whether it is in a sweep's folder.
      rows: metrics by step, ascending; finite numbers only.
      fields: the config's fields by dotted name, as the file has them.
      config: the same, if this version of the code can read it.
      result: of a sweep's run that is done.
      few_shot: reports of few-shot tasks, by how they were scored.
      state: finished, in progress, or where it stopped.
      updated: when it last wrote metrics, seconds since 1970; 0: never.
      notes: what is odd about it, a sentence each.
    """

    folder: Path
    label: str
    series: str
    of_a_sweep: bool
    rows: Rows
    fields: dict[str, Any]
    config: Config | None
    result: Done | None
    few_shot: dict[str, dict[str, Any]]
    state: str
    updated: float
    notes: tuple[str, ...]

    def values(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric, [N] each."""
        found = [(step, row[name]) for step, row in self.rows.items() if name in row]
        steps_N, values_N = np.array(found, np.float64).reshape(-1, 2).T
        return steps_N, values_N

    def last(self, name: str) -> float:
        """A metric's last value; NaN of none."""
        values_N = self.values(name)[1]
        return float(values_N[-1]) if len(values_N) else math.nan

    def numbered(self, prefix: str) -> dict[int, float]:
        """The last values of metrics that are called ``prefix`` and a number."""
        names = {name for row in self.rows.values() for name in row if name.startswith(prefix)}
        ends = {name: name.removeprefix(prefix) for name in names}
        numbered = {name: end for name, end in ends.items() if end.isdecimal() and len(end) < DIGITS}
        return {int(end): self.last(name) for name, end in sorted(numbered.items(), key=_natural)}

    def at(self, axis: str, steps_N: np.ndarray) -> np.ndarray | None:
        """Where steps are on an axis: ``steps``, ``tokens``, ``compute`` or ``time``; None where it is not known.

        Time is that of training alone, in seconds: the tokens of each stretch over its rate, so neither compilation,
        saves and evaluations count, nor what lay between sessions. A stretch without a rate has the next one's.
        """
        if axis == "steps":
            return steps_N
        known_M, amounts_M = self.values("compute/effective" if axis == "compute" else "compute/tokens")
        if axis == "time":
            rated_R, rates_R = self.values("perf/tokens_per_second")
            rated_R, rates_R = rated_R[rates_R > 0], rates_R[rates_R > 0]
            if not len(rated_R):
                return None
            rates_M = rates_R[np.minimum(np.searchsorted(rated_R, known_M), len(rates_R) - 1)]
            amounts_M = np.cumsum(np.diff(amounts_M, prepend=0.0) / rates_M)
        if not len(known_M):
            return None
        return np.interp(steps_N, np.concatenate([[0.0], known_M]), np.concatenate([[0.0], amounts_M]))


def _natural(pair: tuple[str, str]) -> tuple[int, str]:
    return len(pair[1]), pair[1]


def read(folder: Path, label: str, of_a_sweep: bool) -> Run:
    """The run in a work dir, under this name."""
    notes: list[str] = []
    rows, updated = _rows(folder / METRICS, notes)
    fields, config = _config(folder / CONFIG_FILE, notes)
    result, match = _result(folder, notes), OF_A_SWEEP.fullmatch(folder.name)
    variant = result.variant if result else match[1] if match else label
    return Run(
        folder=folder,
        label=label,
        series=one_line(variant) if of_a_sweep else label,
        of_a_sweep=of_a_sweep,
        rows=rows,
        fields=fields,
        config=config,
        result=result,
        few_shot=_few_shot(folder, notes),
        state=_state(folder, rows, config, updated),
        updated=updated,
        notes=tuple(notes),
    )


def _rows(path: Path, notes: list[str]) -> tuple[Rows, float]:
    """Metrics by step, and when they were last written; where a run went back to an earlier step, what it did then."""
    try:
        lines, updated = path.read_text(encoding="utf-8", errors="replace").split("\n"), path.stat().st_mtime
    except OSError as error:
        notes.append(f"It has no {METRICS} that can be read ({error.strerror}): nothing is known of its training.")
        return {}, 0.0
    rows: Rows = {}
    newest, counts = -1, collections.Counter[str]()
    for number, line in enumerate(lines, 1):
        row = _parsed(line)
        if row is None:
            counts["torn"] += bool(line.strip()) and number < len(lines)  # the last one is being written
            continue
        step = row.pop("step")
        later = [other for other in rows if other >= step] if newest > step else []
        for other in later:
            del rows[other]
        newest = step
        numbers = {name: float(value) for name, value in row.items() if _is_number(value)}
        counts["again"] += len(later)
        counts["not finite"] += len(numbers) < len(row)
        rows[step] = rows.pop(step, {}) | numbers
    said = {
        "torn": f"Lines of {METRICS} that cannot be read, and are left out",
        "again": "Steps that were computed again after a resume, of which the later numbers are shown",
        "not finite": "Rows with what is no finite number (null after a bad step), which charts leave out",
    }
    notes.extend(f"{sentence}: {counts[kind]:,}." for kind, sentence in said.items() if counts[kind])
    if not rows:
        notes.append("It has written no metrics yet.")
    return rows, updated


def _is_number(value: Any) -> bool:
    with contextlib.suppress(OverflowError):  # a whole number past the largest float
        return type(value) in (int, float) and math.isfinite(value)
    return False


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of metrics; None where it is damaged."""
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line)
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**63:
            return row
    return None


def _config(path: Path, notes: list[str]) -> tuple[dict[str, Any], Config | None]:
    try:
        text = path.read_bytes().decode()
        raw = json.loads(text)
        fields = flatten_dict(raw, sep=".") if isinstance(raw, dict) else {}
    except OSError as error:
        notes.append(f"It has no {CONFIG_FILE} that can be read ({error.strerror}).")
        return {}, None
    except (ValueError, RecursionError) as error:
        notes.append(f"Its {CONFIG_FILE} is not JSON ({error}), so that its config is not shown.")
        return {}, None
    try:
        return fields, from_json(text)
    except ConfigError as error:
        notes.append(f"Its {CONFIG_FILE} is not one that this version reads ({error}).")
        return fields, None


def _result(folder: Path, notes: list[str]) -> Done | None:
    try:
        return results.read(folder)
    except ResultError as error:
        notes.append(f"{error}.")
    return None


def _few_shot(folder: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    """The newest report of each way of scoring: ``step_N-prefill``."""
    found = {}
    for path in sorted(folder.glob(f"{FEW_SHOT}/step_*/report-*.json"), key=_modified):
        try:
            report = json.loads(path.read_text())
            tasks = {}
            for task in report["tasks"]:
                low, high = map(float, task["interval"])
                tasks[task["task"]] = (float(task["accuracy"]), (low, high), float(task["chance"]))
            mean, name = report["mean"]["value"], str(report["mean"]["name"])
            found[path.parent.name] = {"tasks": tasks, "mean": math.nan if mean is None else float(mean), "name": name}
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            notes.append(f"{path.relative_to(folder)} is no report of few-shot tasks, and is left out.")
    return found


def _modified(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _state(folder: Path, rows: Rows, config: Config | None, updated: float) -> str:
    step = max(rows, default=0)
    end = None if config is None else _length(config)
    if end is not None and step >= end and not rows[step].keys().isdisjoint(SCORES):
        return f"finished, {step:,} steps"
    of = f"step {step:,}" if end is None else f"step {step:,} of {end:,}"
    if (folder / lock.FILE).exists() and time.time() - updated < QUIET:
        return f"in progress, at {of}"
    return f"ended at {of}, its length is not known" if end is None else f"stopped at {of}"


@functools.lru_cache
def _length(config: Config) -> int:
    return train_steps(config.train, config.model.sequence_length, costs.count_parameters(config.model).total)
