"""Where metrics go: metrics.jsonl, TensorBoard, and the terminal."""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import tqdm
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lrt_jax.durability import manifest
from lrt_jax.setup.errors import WorkdirError, writing

FILE = "metrics.jsonl"
# Where lines of it go whose steps were computed once more, since the process ended before their save.
SUPERSEDED = "metrics.superseded.jsonl"
# Without a terminal (a log file), a line at most every so many seconds.
SECONDS_BETWEEN_LINES = 10.0
# TensorBoard's file is flushed at most every so many seconds.
SECONDS_BETWEEN_FLUSHES = 10.0


class Writer:
    """Writes metrics of a run to its work dir, and its progress to the terminal."""

    def __init__(self, workdir: Path, first_step: int, steps: int):
        """Opens the files for appending; half a line that a killed process left is cut off.

        Metrics of later steps than ``first_step``, those done before, are computed again: they move to another file,
        and what TensorBoard has of them is hidden. ``steps`` is the run's length.

        Raises:
          WorkdirError: they cannot be written.
        """
        self._path = workdir / FILE
        with writing(workdir):
            _cut_half_a_line(self._path)
            _set_aside_after(first_step, self._path)
            self._jsonl = self._path.open("a")
            # Not SummaryWriter: its thread dies of a full disk, and then the process waits for it for ever.
            self._tensorboard = EventsWriter(str(workdir / "events"))
            self._tensorboard.write_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        self._flushed = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._last_line = 0.0
        self._bar = tqdm.tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not self._terminal,
            bar_format="{n_fmt}/{total_fmt} {bar} {postfix} [{elapsed} gone, {remaining} left]",
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends metrics, by the names of docs/OPERATIONS.md, for the state after ``step`` steps.

        NaN and infinity, which JSON does not have, become null in ``metrics.jsonl``.

        Raises:
          WorkdirError: the disk is full, or the work dir gone.
        """
        self.check()
        with writing(self._path):
            known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self._jsonl.write(json.dumps({"step": step, **known}, allow_nan=False) + "\n")
            self._jsonl.flush()
            for name, value in metrics.items():
                scalar = summary.scalar(name, value)
                self._tensorboard.write_event(Event(wall_time=time.time(), step=step, summary=scalar))
            if time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
                self._tensorboard.flush()
                self._flushed = time.monotonic()

    def check(self) -> None:
        """Checks that the work dir is still where it was: an open file outlives its name.

        Raises:
          WorkdirError: it was removed, renamed or replaced.
        """
        try:
            there = self._path.stat()
        except OSError as error:
            raise WorkdirError(
                f"{self._path} is gone ({error.strerror}): somebody removed or renamed the work dir; nothing more is "
                "written, put it back and run the same command"
            ) from None
        if not os.path.samestat(there, os.fstat(self._jsonl.fileno())):
            raise WorkdirError(
                f"{self._path} was replaced by another file while the run was on; nothing more is written"
            )

    def progress(self, step: int, loss: float, rates: tuple[float, float] | None) -> None:
        """Shows step, loss and, where they are known, tokens per second and seconds left."""
        speed = f"  {rates[0]:,.0f} tokens/s" if rates else ""
        self._bar.set_postfix_str(f"loss {loss:.3f}{speed}", refresh=False)
        self._bar.update(step - self._bar.n)
        now = time.monotonic()
        if not self._terminal and (now - self._last_line > SECONDS_BETWEEN_LINES or step == self._bar.total):
            self._last_line = now
            left = f"  {tqdm.tqdm.format_interval(rates[1])} left" if rates else ""
            self.line(f"step {step:,}/{self._bar.total:,}  loss {loss:.3f}{speed}{left}")

    def line(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        tqdm.tqdm.write(text, file=sys.stderr if self._terminal else sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Flushes and closes everything; what a full disk does not take was told by :meth:`write`."""
        self._bar.close()
        for file in (self._tensorboard, self._jsonl):
            with contextlib.suppress(OSError):
                file.close()


class Silent(Writer):
    """The writer of every process but the first: it writes and says nothing."""

    def __init__(self) -> None:
        """Opens nothing."""

    def _nothing(self, *given: Any, **named: Any) -> None:
        """Leaves it to the first process."""

    write = check = progress = line = close = _nothing


def _set_aside_after(step: int, path: Path) -> None:
    """Moves the lines of later steps, so that each step is there once; no line is lost whenever the process ends."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    later = [line for line in lines if _step_of(line) > step]
    if later:
        with path.with_name(SUPERSEDED).open("a", encoding="utf-8") as stream:
            stream.writelines(later)
        kept = "".join(line for line in lines if _step_of(line) <= step)
        manifest.write_whole(epath.Path(path), kept.encode())


def _step_of(line: str) -> int:
    """The step of a line; that of a line which is damaged is 0."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


def _cut_half_a_line(path: Path) -> None:
    if path.exists():
        with path.open("rb+") as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, end - (1 << 20)))
            tail = stream.read()
            if tail and not tail.endswith(b"\n"):
                stream.truncate(end - len(tail) + tail.rfind(b"\n") + 1)
