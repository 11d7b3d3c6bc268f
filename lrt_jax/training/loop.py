"""The training loop: read top to bottom, no maths."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
from jax.sharding import Mesh

from lrt_jax.data.pipeline import Batch
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config
from lrt_jax.setup.errors import UserError
from lrt_jax.training import guard
from lrt_jax.training.checkpoint import Checkpoints
from lrt_jax.training.interruption import Stopped, StopRequests
from lrt_jax.training.metrics import Writer
from lrt_jax.training.profiling import Profiler
from lrt_jax.training.startup import Startup
from lrt_jax.training.state import TrainState
from lrt_jax.training.step import Step
from lrt_jax.training.watchdog import Watchdog

Evaluate = Callable[[Any], dict[str, float]]


class TrainingError(UserError):
    """Training cannot go on; one sentence says why."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A schedule that steps may have.

    Attributes:
      step: the jitted training step.
      flops_per_step: of the whole batch, for MFU.
      statistics: of parameters and gradient of a batch, for the report of a bad step.
    """

    step: Step
    flops_per_step: float
    statistics: Callable[..., dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the run, whose steps have one schedule, or draw one of several.

    Attributes:
      end: the step after which the next stage takes over.
      kinds: the schedules.
      draw: of a step, counted from 1: which of them it has.
      forwards_equivalent: the factor of effective compute, in the mean.
    """

    end: int
    kinds: tuple[Kind, ...]
    draw: Callable[[int], int]
    forwards_equivalent: float


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
      stop: whether a signal asked to stop.
      watchdog: ends the process where nothing moves.
      startup: times the way to the first step.
      profiler: traces some steps, if it is asked to.
      constant: written with every step's metrics.
      documents: tells what a batch of this process is made of.
      workdir: where the report of a bad step goes.
    """

    stages: tuple[Stage, ...]
    batches: grain.DatasetIterator
    mesh: Mesh
    checkpoints: Checkpoints
    writer: Writer
    evaluate: Evaluate
    peak_flops: float
    stop: StopRequests
    watchdog: Watchdog
    startup: Startup
    profiler: Profiler
    constant: dict[str, float]
    documents: Callable[[Batch], Sequence[str]]
    workdir: Path

    @property
    def steps(self) -> int:
        """The run's length."""
        return self.stages[-1].end

    def stage_of(self, step: int) -> Stage:
        """The stage that computes step ``step``, counted from 1."""
        return next(stage for stage in self.stages if step <= stage.end)

    def kind_of(self, step: int) -> Kind:
        """The schedule of step ``step``, counted from 1."""
        stage = self.stage_of(step)
        return stage.kinds[stage.draw(step)]

    def forwards_until(self, step: int) -> float:
        """Full-length forwards-equivalent per row, of all steps up to ``step``."""
        total, begin = 0.0, 0
        for stage in self.stages:
            total += (min(step, stage.end) - min(step, begin)) * stage.forwards_equivalent
            begin = stage.end
        return total


@dataclasses.dataclass(frozen=True)
class _Done:
    """A step that was dispatched, and whose metrics are still on the device."""

    step: int
    metrics: dict[str, jax.Array]
    batch: Batch


def train(config: Config, parts: Parts, state: TrainState) -> tuple[TrainState, bool]:
    """Trains from ``state`` to the end of the run, or to a signal; either way the last state is saved.

    Returns:
      The last state, and whether the run is complete.

    Raises:
      TrainingError: a step is bad (:mod:`lrt_jax.training.guard`), and ``config.train.on_bad_step`` does not let it
        pass; nothing is saved then.
      CheckpointError, WorkdirError: the work dir cannot be written.
    """
    first = step = int(state.step)
    if config.train.on_bad_step == "stop" and state.guard is not None:
        # A run that skipped its last step before must not be taken for one that has stopped.
        state = state.replace(guard=state.guard.replace(in_a_row=0 * state.guard.in_a_row))
    clock = _Clock(config, parts, first)
    previous: _Done | None = None
    compiled: list[Kind] = []
    watch = parts.watchdog
    with parts.stop.deferred(), watch.phase("a step", "config.train.step_timeout", config.train.step_timeout):
        while step < parts.steps and not parts.stop.agreed(parts.mesh):
            _say(parts, parts.profiler.before_step(state))
            local = next(parts.batches)
            kind = parts.kind_of(step + 1)
            rows = meshes.global_batch(parts.mesh, local, config.train.batch_size)
            if kind in compiled:
                with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                    state, metrics = kind.step(state, *rows)
            else:
                if previous is not None:  # its rate is that of steps before this one
                    _report(config, parts, clock, previous, state)
                    previous = None
                clock.leave_out_step(step + 1)
                with _apart("compilation", config, parts, clock):  # of every process: the slowest one is waited for
                    state, metrics = jax.block_until_ready(kind.step(state, *rows))
                compiled.append(kind)
            step += 1
            watch.beat()
            # The step is dispatched; only now is the one before it fetched, so the device never waits for the host.
            if previous is not None:
                _report(config, parts, clock, previous, state)
            previous = _Done(step, metrics, local)
            parts.checkpoints.check()
            if _due(config.train.save_every, step) and step < parts.steps:
                # Only what is known to be good is saved.
                _report(config, parts, clock, previous, state)
                previous = None
                _save(config, parts, clock, state)
            if _due(config.train.eval_every, step) and step < parts.steps:
                with _apart("an evaluation", config, parts, clock), contextlib.suppress(Stopped):
                    parts.writer.write(step, parts.evaluate(state.params))
        _say(parts, parts.profiler.end(state))
        if previous is not None:
            _report(config, parts, clock, previous, state)
        if step > first:
            _save(config, parts, clock, state)
            with _apart("a save", config, parts, clock):
                parts.checkpoints.wait()
    return state, step >= parts.steps


def _say(parts: Parts, line: str) -> None:
    if line:
        parts.writer.line(line)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


@contextlib.contextmanager
def _apart(name: str, config: Config, parts: Parts, clock: "_Clock") -> Iterator[None]:
    """Within, something else than steps is done: it counts for no rate, and the watchdog is more patient."""
    limit = config.train.phase_timeout
    with clock.paused(), parts.watchdog.phase(name, "config.train.phase_timeout", limit):
        yield


def _save(config: Config, parts: Parts, clock: "_Clock", state: TrainState) -> None:
    """Begins a save, of good numbers only, and writes how long it kept training from going on."""
    begin = time.perf_counter()
    step = int(state.step)
    with _apart("a save", config, parts, clock):
        parts.writer.check()
        poisoned = guard.not_finite(state)
        if poisoned:
            raise TrainingError(
                f"not all numbers of {', '.join(poisoned[:4])}{', …' if len(poisoned) > 4 else ''} are finite after "
                f"step {step:,}; nothing of it was saved: lower the learning rates (config.optimizer)"
            )
        parts.checkpoints.save(state, parts.batches, config)
    parts.writer.write(step, {"perf/save_stall_seconds": time.perf_counter() - begin})


def _report(config: Config, parts: Parts, clock: "_Clock", done: _Done, state: TrainState) -> None:
    """Fetches a step's metrics, checks them, and writes them where they are due."""
    step = done.step
    values = {name: float(value) for name, value in done.metrics.items()}
    if "first step" not in parts.startup.laps:
        parts.startup.lap("first step")
        parts.writer.line(str(parts.startup))
        parts.writer.write(step, {"perf/seconds_to_first_step": parts.startup.seconds})
    in_a_row = values.pop("train/bad_in_a_row", 0)
    if in_a_row and (config.train.on_bad_step == "stop" or in_a_row >= config.train.bad_steps):
        _stop(config, parts, done, values, state)
    if in_a_row:
        parts.writer.line(
            f"step {step:,} is bad (loss {values['train/loss']:.4g}, gradient norm {values['train/grad_norm']:.4g}): "
            f"its update was skipped, {values['train/bad_steps']:.0f} so far"
        )
    if not (in_a_row or _due(config.train.log_every, step) or step == parts.steps):
        return
    rates = clock.rates(step)
    tokens_per_step = config.train.batch_size * config.model.sequence_length
    values |= parts.constant | {
        "compute/tokens": step * tokens_per_step,
        "compute/effective": parts.forwards_until(step) * tokens_per_step,
    }
    if rates is not None:
        values["perf/tokens_per_second"] = rates.tokens_per_second
        values["perf/mfu"] = rates.flops_per_second / parts.peak_flops
    parts.writer.write(step, values)
    speed = None if rates is None else (rates.tokens_per_second, rates.seconds_left)
    parts.writer.progress(step, values["train/loss"], speed)


def _stop(config: Config, parts: Parts, done: _Done, values: dict[str, float], state: TrainState) -> None:
    """Ends the run at a bad step with a report. ``state`` has the parameters that the step met."""
    with parts.watchdog.phase("the report of a bad step", "config.train.phase_timeout", config.train.phase_timeout):
        batch = meshes.global_batch(parts.mesh, done.batch, config.train.batch_size)
        statistics = jax.device_get(parts.kind_of(done.step).statistics(state.params, *batch))
    repeats = config.train.on_bad_step == "stop"
    report = list(guard.report(done.step, values, statistics, parts.documents(done.batch), repeats))
    for line in report:
        parts.writer.line(line)
    path = parts.workdir / f"bad_step_{done.step}.process_{jax.process_index()}.txt"
    with contextlib.suppress(OSError):
        path.write_text("\n".join(report) + "\n", encoding="utf-8", errors="replace")
    values = {name: values[f"train/{name}"] for name in ("loss", "grad_norm")}
    held = "" if repeats else f", the last of {config.train.bad_steps} skipped in a row"
    raise TrainingError(
        f"step {done.step:,} is bad{held}: the loss is {values['loss']:.4g}, the gradient norm "
        f"{values['grad_norm']:.4g}; nothing of it was saved, and {path} has a report: lower the "
        "learning rates (config.optimizer), set config.optimizer.clip, or config.train.on_bad_step = 'skip'; the same "
        "command goes on from the last checkpoint"
    )


@dataclasses.dataclass(frozen=True)
class _Rates:
    """Of the steps between two reports.

    Attributes:
      tokens_per_second: of all processes.
      flops_per_second: likewise.
      seconds_left: what the rest of the run takes at this rate.
    """

    tokens_per_second: float
    flops_per_second: float
    seconds_left: float


class _Clock:
    """Rates between reports, without the time for compilation, saves and evaluations."""

    def __init__(self, config: Config, parts: Parts, step: int):
        self._tokens_per_step = config.train.batch_size * config.model.sequence_length
        self._parts = parts
        self._step, self._time, self._paused = step, time.perf_counter(), 0.0
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

    def rates(self, step: int) -> _Rates | None:
        """Since the last call; None where no step but some that were left out has run since."""
        now = time.perf_counter()
        seconds = max(now - self._time - self._paused, 1e-9)
        counted = [number for number in range(self._step + 1, step + 1) if number not in self._left_out]
        self._step, self._time, self._paused = step, now, 0.0
        if not counted:
            return None
        flops = sum(self._parts.kind_of(number).flops_per_step for number in counted)
        left = seconds / len(counted) * (self._parts.steps - step)
        return _Rates(self._tokens_per_step * len(counted) / seconds, flops / seconds, left)
