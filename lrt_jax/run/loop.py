"""The training loop: :meth:`Trainer.train` is all of it; no maths."""

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
from lrt_jax.durability.checkpoint import Checkpoints
from lrt_jax.durability.interruption import Stopped, StopRequests
from lrt_jax.durability.watchdog import Watchdog
from lrt_jax.run.clock import Clock
from lrt_jax.run.metrics import Writer
from lrt_jax.run.profiling import Profiler
from lrt_jax.run.stages import Kind, Plan
from lrt_jax.run.startup import Startup
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config
from lrt_jax.setup.errors import UserError
from lrt_jax.training import guard
from lrt_jax.training.state import TrainState


class TrainingError(UserError):
    """Training cannot go on; one sentence says why."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the loop drives.

    Attributes:
      plan: which step has which schedule, and how many there are.
      mesh: where a batch goes.
      batches: this process's rows, without end.
      documents: tells what a batch of this process is made of.
      evaluate: scores parameters on so many held-out rows, all of them if None.
      few_shot: scores parameters after so many steps on few-shot tasks, if the config names some.
      checkpoints: where the state is kept.
      writer: where metrics go.
      constant: written with every step's metrics.
      peak_flops: of all devices together, per second.
      workdir: where the report of a bad step goes.
    """

    plan: Plan
    mesh: Mesh
    batches: grain.DatasetIterator
    documents: Callable[[Batch], Sequence[str]]
    evaluate: Callable[[Any, int | None], dict[str, float]]
    few_shot: Callable[[Any, int], dict[str, float]]
    checkpoints: Checkpoints
    writer: Writer
    constant: dict[str, float]
    peak_flops: float
    workdir: Path


@dataclasses.dataclass(frozen=True)
class Watchers:
    """What looks at a run while it goes on.

    Attributes:
      stop: whether a signal asked to stop.
      watchdog: ends the process where nothing moves.
      startup: times the way to the first step.
      profiler: traces some steps, if it is asked to.
    """

    stop: StopRequests
    watchdog: Watchdog
    startup: Startup
    profiler: Profiler


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """A step whose metrics are still on the device."""

    step: int
    metrics: dict[str, jax.Array]
    batch: Batch


class Trainer:
    """A run under way: its state, and the step that was dispatched last."""

    def __init__(self, config: Config, parts: Parts, watchers: Watchers, state: TrainState):
        """Begins with ``state``, that of a new run or of a checkpoint."""
        if config.train.on_bad_step == "stop" and state.guard is not None:
            # A run that skipped its last step before must not be taken for one that has stopped.
            state = state.replace(guard=state.guard.replace(in_a_row=0 * state.guard.in_a_row))
        self.state, self.step = state, int(state.step)
        self._config, self._parts, self._watchers = config, parts, watchers
        self._clock = Clock(self.step, lambda step: parts.plan.kind_of(step).flops_per_step)
        self._last: _Dispatched | None = None
        self._compiled: list[Kind] = []

    def train(self) -> bool:
        """Trains to the end of the run, or to a signal; either way the last state is saved.

        Returns:
          Whether the run is complete.

        Raises:
          TrainingError: a step is bad (:mod:`lrt_jax.training.guard`), and ``config.train.on_bad_step`` does not let it
            pass; nothing is saved then.
          CheckpointError, WorkdirError: the work dir cannot be written.
        """
        train, scored, parts, watchers = self._config.train, self._config.eval, self._parts, self._watchers
        limit = watchers.watchdog.phase("a step", "config.train.step_timeout", train.step_timeout)
        first = self.step
        with watchers.stop.deferred(), limit:
            while self.step < parts.plan.steps and not watchers.stop.agreed(parts.mesh):
                self._advance()
                parts.checkpoints.check()
                if self.step == parts.plan.steps:
                    break  # what the end brings is the same whatever is due
                if _due(train.save_every, self.step):
                    self._save()
                if _due(train.eval_every, self.step):
                    self._score("an evaluation", lambda params: parts.evaluate(params, scored.rows))
                if _due(scored.core_every, self.step):
                    self._score("few-shot tasks", lambda params: parts.few_shot(params, self.step))
            self._say(watchers.profiler.end(self.state))
            self._report()
            if self.step > first:
                self._save()
                with self._apart("a save"):
                    parts.checkpoints.wait()
        return self.step >= parts.plan.steps

    def _advance(self) -> None:
        """Dispatches a step; only then is the one before it fetched, so the device never waits for the host."""
        parts, step = self._parts, self.step + 1
        self._say(self._watchers.profiler.before_step(self.state))
        with self._clock.waiting():
            batch = next(parts.batches)
        kind = parts.plan.kind_of(step)
        rows = meshes.global_batch(parts.mesh, batch, self._config.train.batch_size)
        if kind in self._compiled:
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                self.state, metrics = kind.step(self.state, *rows)
        else:
            self._report()  # its rate is that of steps before this one
            self._clock.leave_out_step(step)
            with self._apart("compilation"):  # of every process: the slowest one is waited for
                self.state, metrics = jax.block_until_ready(kind.step(self.state, *rows))
            self._compiled.append(kind)
        self.step = step
        self._watchers.watchdog.beat()
        self._report()
        self._last = _Dispatched(step, metrics, batch)

    def _say(self, line: str) -> None:
        if line:
            self._parts.writer.line(line)

    @contextlib.contextmanager
    def _apart(self, name: str) -> Iterator[None]:
        """Within, something else than steps is done: it counts for no rate, and the watchdog is more patient."""
        limit = self._config.train.phase_timeout
        with self._clock.paused(), self._watchers.watchdog.phase(name, "config.train.phase_timeout", limit):
            yield

    def _score(self, name: str, evaluate: Callable[[Any], dict[str, float]]) -> None:
        """Scores the parameters; a signal ends that, and the run goes on to its save."""
        self._report()  # so that a bad step is noticed first, and the device has no step left to run meanwhile
        with self._apart(name), contextlib.suppress(Stopped):
            self._parts.writer.write(self.step, evaluate(self.state.params))

    def _save(self) -> None:
        """Begins a save, of good numbers only, and writes how long it kept training from going on."""
        self._report()  # only what is known to be good is saved
        begin, parts = time.perf_counter(), self._parts
        with self._apart("a save"):
            parts.writer.check()
            poisoned = guard.not_finite(self.state)
            if poisoned:
                raise TrainingError(
                    f"not all numbers of {', '.join(poisoned[:4])}{', …' if len(poisoned) > 4 else ''} are finite "
                    f"after step {self.step:,}; nothing of it was saved: lower the learning rates (config.optimizer)"
                )
            parts.checkpoints.save(self.state, parts.batches, self._config)
        parts.writer.write(self.step, {"perf/save_stall_seconds": time.perf_counter() - begin})

    def _report(self) -> None:
        """Fetches the last step's metrics, if that was not done, checks them, and writes them where they are due."""
        last, self._last = self._last, None
        if last is None:
            return
        train, writer, startup = self._config.train, self._parts.writer, self._watchers.startup
        values = {name: float(value) for name, value in last.metrics.items()}
        if "first step" not in startup.laps:
            startup.lap("first step")
            writer.line(str(startup))
            writer.write(last.step, {"perf/seconds_to_first_step": startup.seconds})
        in_a_row = values.pop("train/bad_in_a_row", 0)
        if in_a_row and (train.on_bad_step == "stop" or in_a_row >= train.bad_steps):
            self._end_at_bad_step(last, values)
        if in_a_row:
            writer.line(
                f"step {last.step:,} is bad (loss {values['train/loss']:.4g}, gradient norm "
                f"{values['train/grad_norm']:.4g}): its update was skipped, {values['train/bad_steps']:.0f} so far"
            )
        if in_a_row or _due(train.log_every, last.step) or last.step == self._parts.plan.steps:
            self._write(last.step, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        """Writes a step's metrics, and shows its progress."""
        config, plan, rates = self._config, self._parts.plan, self._clock.lap(step)
        tokens = config.train.batch_size * config.model.sequence_length
        values |= self._parts.constant | {
            "compute/tokens": step * tokens,
            "compute/effective": plan.forwards_until(step) * tokens,
        }
        speed = None
        if rates is not None:
            speed = (rates.steps_per_second * tokens, (plan.steps - step) / rates.steps_per_second)
            values["perf/tokens_per_second"] = speed[0]
            values["perf/input_wait"] = rates.waited
            values["perf/mfu"] = rates.flops_per_second / self._parts.peak_flops
        self._parts.writer.write(step, values)
        self._parts.writer.progress(step, values["train/loss"], speed)

    def _end_at_bad_step(self, last: _Dispatched, values: dict[str, float]) -> None:
        """Ends the run with a report. The state has the parameters that the step met."""
        train, parts = self._config.train, self._parts
        with self._apart("the report of a bad step"):
            rows = meshes.global_batch(parts.mesh, last.batch, train.batch_size)
            statistics = jax.device_get(parts.plan.kind_of(last.step).statistics(self.state.params, *rows))
        repeats = train.on_bad_step == "stop"
        report = list(guard.report(last.step, values, statistics, parts.documents(last.batch), repeats))
        for line in report:
            parts.writer.line(line)
        path = parts.workdir / f"bad_step_{last.step}.process_{jax.process_index()}.txt"
        with contextlib.suppress(OSError):
            path.write_text("\n".join(report) + "\n", encoding="utf-8", errors="replace")
        of_many = "" if repeats else f", the last of {train.bad_steps} skipped in a row"
        raise TrainingError(
            f"step {last.step:,} is bad{of_many}: the loss is {values['train/loss']:.4g}, the gradient norm "
            f"{values['train/grad_norm']:.4g}; nothing of it was saved, and {path} has a report: lower the "
            "learning rates (config.optimizer), set config.optimizer.clip, or config.train.on_bad_step = 'skip'; the "
            "same command goes on from the last checkpoint"
        )


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
