"""The training loop: read top to bottom, no maths."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
from jax.sharding import Mesh

from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config
from lrt_jax.setup.errors import UserError
from lrt_jax.training.checkpoint import Checkpoints
from lrt_jax.training.metrics import Writer
from lrt_jax.training.state import TrainState
from lrt_jax.training.step import Step

Evaluate = Callable[[Any], dict[str, float]]


class TrainingError(UserError):
    """Training cannot go on; one sentence says why."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the run with one schedule.

    Attributes:
      end: the step after which the next stage takes over.
      step: the jitted training step.
      forwards_equivalent: the schedule's factor of effective compute.
      flops_per_step: of the whole batch, for MFU.
    """

    end: int
    step: Step
    forwards_equivalent: float
    flops_per_step: float


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the loop drives.

    Attributes:
      stages: the run's stages, in order; the last one's end is the run's length.
      batches: this process's rows, without end.
      mesh: where a batch goes.
      checkpoints: where the state is kept.
      writer: where metrics go.
      evaluate: scores parameters at intervals; the loop's caller scores the end.
      peak_flops: of all devices together, per second.
    """

    stages: tuple[Stage, ...]
    batches: grain.DatasetIterator
    mesh: Mesh
    checkpoints: Checkpoints
    writer: Writer
    evaluate: Evaluate
    peak_flops: float

    @property
    def steps(self) -> int:
        """The run's length."""
        return self.stages[-1].end

    def stage_of(self, step: int) -> Stage:
        """The stage that computes step ``step``, counted from 1."""
        return next(stage for stage in self.stages if step <= stage.end)

    def forwards_until(self, step: int) -> float:
        """Full-length forwards-equivalent per row, of all steps up to ``step``."""
        total, begin = 0.0, 0
        for stage in self.stages:
            total += (min(step, stage.end) - min(step, begin)) * stage.forwards_equivalent
            begin = stage.end
        return total


def train(config: Config, parts: Parts, state: TrainState) -> tuple[TrainState, bool]:
    """Trains from ``state`` to the end of the run, or to SIGINT or SIGTERM; either way the last state is saved.

    Returns:
      The last state, and whether the run is complete.

    Raises:
      TrainingError: the loss is not finite; nothing is saved then.
    """
    first = step = int(state.step)
    clock = _Clock(config, parts, first)
    previous: tuple[int, dict[str, jax.Array]] | None = None
    running: Stage | None = None
    with _stop_requested() as stopped:
        while step < parts.steps and not stopped():
            batch = meshes.global_batch(parts.mesh, next(parts.batches), config.train.batch_size)
            stage = parts.stage_of(step + 1)
            with contextlib.nullcontext() if stage is running else clock.paused():  # a stage's first step compiles it
                state, metrics = stage.step(state, *batch)
            running = stage
            step += 1
            # The step is dispatched; only now is the one before it fetched, so the device never waits for the host.
            if previous is not None:
                _report(config, parts, clock, *previous)
            previous = (step, metrics)
            if _due(config.train.save_every, step) and step < parts.steps:
                with clock.paused():
                    parts.checkpoints.save(state, parts.batches, config)
            if _due(config.train.eval_every, step) and step < parts.steps:
                with clock.paused():
                    parts.writer.write(step, parts.evaluate(state.params))
        if previous is not None:
            _report(config, parts, clock, *previous)
        if step > first:
            parts.checkpoints.save(state, parts.batches, config)
            parts.checkpoints.wait()
    return state, step == parts.steps


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _report(config: Config, parts: Parts, clock: "_Clock", step: int, metrics: dict[str, jax.Array]) -> None:
    """Fetches a step's metrics, checks them, and writes them where they are due."""
    values = {name: float(value) for name, value in metrics.items()}
    if not math.isfinite(values["train/loss"]):
        raise TrainingError(
            f"the loss is {values['train/loss']} at step {step}; nothing of it was saved: lower the learning rates "
            "(config.optimizer) or set config.optimizer.clip; the same command goes on from the last checkpoint"
        )
    if not (_due(config.train.log_every, step) or step == parts.steps):
        return
    tokens_per_second, seconds_left = clock.rates(step)
    tokens_per_step = config.train.batch_size * config.model.sequence_length
    flops_per_token = parts.stage_of(step).flops_per_step / tokens_per_step
    values |= {
        "perf/tokens_per_second": tokens_per_second,
        "perf/mfu": tokens_per_second * flops_per_token / parts.peak_flops,
        "compute/tokens": step * tokens_per_step,
        "compute/effective": parts.forwards_until(step) * tokens_per_step,
    }
    parts.writer.write(step, values)
    parts.writer.progress(step, values["train/loss"], tokens_per_second, seconds_left)


class _Clock:
    """Tokens per second between reports, without the time for compilation, saves and evaluations."""

    def __init__(self, config: Config, parts: Parts, step: int):
        self._tokens_per_step = config.train.batch_size * config.model.sequence_length
        self._steps = parts.steps
        self._step, self._time, self._paused = step, time.perf_counter(), 0.0
        self._first = step

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what happens within."""
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin

    def rates(self, step: int) -> tuple[float, float]:
        """Tokens per second since the last call, and the seconds that the rest of the run will take."""
        now = time.perf_counter()
        seconds_per_step = max(now - self._time - self._paused, 1e-9) / max(step - self._step, 1)
        self._step, self._time, self._paused = step, now, 0.0
        return self._tokens_per_step / seconds_per_step, seconds_per_step * (self._steps - step)


@contextlib.contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Within, the first SIGINT or SIGTERM asks to stop after the running step; a second one acts at once."""
    requested = False
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        del frame
        nonlocal requested
        requested = True
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
