"""Rates of steps, without the time for compilation, saves and evaluations."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of the steps between two reports.

    Attributes:
      steps_per_second: of those that count.
      flops_per_second: of all devices together.
      waited: the share of their time in which the loop waited for its next batch.
    """

    steps_per_second: float
    flops_per_second: float
    waited: float


class Clock:
    """Measures from one report to the next."""

    def __init__(self, step: int, flops_of: Callable[[int], float]):
        """Begins after step ``step``; ``flops_of`` says what a step costs, counted from 1."""
        self._flops_of = flops_of
        self._step, self._time, self._paused, self._waited = step, time.perf_counter(), 0.0, 0.0
        self._left_out: set[int] = set()

    def leave_out_step(self, step: int) -> None:
        """Leaves out a step, which runs as a part of its compilation."""
        self._left_out.add(step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what happens within."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what happens within as waiting for data."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - begin

    def lap(self, step: int) -> Rates | None:
        """Rates since the last lap, which ends here; None if every step since was left out."""
        now = time.perf_counter()
        seconds = max(now - self._time - self._paused, 1e-9)
        counted = [number for number in range(self._step + 1, step + 1) if number not in self._left_out]
        waited = min(self._waited / seconds, 1.0)
        self._step, self._time, self._paused, self._waited = step, now, 0.0, 0.0
        if not counted:
            return None
        return Rates(len(counted) / seconds, sum(map(self._flops_of, counted)) / seconds, waited)
