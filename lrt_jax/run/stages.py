"""Which step of a run has which schedule: its stages, each with the compiled steps of its schedules."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import optax
from jax.sharding import Mesh

from lrt_jax.model import costs
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.parameters import table
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config
from lrt_jax.setup.schedule import ScheduleConfig
from lrt_jax.training import guard, step
from lrt_jax.training.step import Step


@dataclasses.dataclass(frozen=True)
class Kind:
    """A schedule that steps may have: the jitted step, and the FLOPs of its whole batch, for MFU.

    ``statistics`` are those of parameters and gradient of a batch, for the report of a bad step.
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
class Plan:
    """The run's stages, in order."""

    stages: tuple[Stage, ...]

    @property
    def steps(self) -> int:
        """The run's length."""
        return self.stages[-1].end

    @property
    def without_steps(self) -> list[int]:
        """Which stages have a share that comes to no step."""
        begins = (0, *(stage.end for stage in self.stages))
        return [index for index, stage in enumerate(self.stages) if stage.end == begins[index]]

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


def build(
    config: Config, decoder: Decoder, mesh: Mesh, transformation: optax.GradientTransformation, steps: int
) -> Plan:
    """The run's plan; each schedule has one training step, and all have one optimizer."""
    kinds = {schedule: _kind(config, decoder, mesh, transformation, schedule) for schedule in config.schedule.kinds}
    share, stages = 0.0, list[Stage]()
    for stage in config.schedule.in_stages:
        share += stage.share
        stages.append(
            Stage(
                end=steps if len(stages) == len(config.schedule.in_stages) - 1 else round(share * steps),
                kinds=tuple(kinds[drawn.schedule] for drawn in stage.mixture),
                draw=functools.partial(stage.draw, config.seed),
                forwards_equivalent=costs.stage_equivalent(config.model, stage),
            )
        )
    return Plan(tuple(stages))


def _kind(
    config: Config, decoder: Decoder, mesh: Mesh, transformation: optax.GradientTransformation, schedule: ScheduleConfig
) -> Kind:
    accumulation, once = config.train.accumulation, meshes.gathers_once(config.mesh, mesh.shape)
    judge = functools.partial(guard.judge, config=config.train)
    return Kind(
        step=step.build(decoder, schedule, transformation, accumulation, judge, gather_once=once),
        flops_per_step=costs.train_flops(config.model, schedule) * config.train.batch_size,
        statistics=guard.statistics(
            step.gradient_of(decoder, schedule, accumulation, gather_once=once),
            {name for name, parameter in table(config.model).items() if parameter.axes[0] == "layers"},
        ),
    )
