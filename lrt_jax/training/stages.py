"""The parts of a run, each with the compiled step of its schedule."""

import functools
from collections.abc import Iterator

import optax
from jax.sharding import Mesh

from lrt_jax.method import schedules
from lrt_jax.model import costs
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.parameters import table
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config
from lrt_jax.setup.schedule import ScheduleConfig
from lrt_jax.training import guard, step
from lrt_jax.training.loop import Kind, Stage


def build(
    config: Config, decoder: Decoder, mesh: Mesh, transformation: optax.GradientTransformation, steps: int
) -> Iterator[Stage]:
    """The run's stages; each schedule has one training step, and all have one optimizer."""
    kinds = {schedule: _kind(config, decoder, mesh, transformation, schedule) for schedule in config.schedule.kinds}
    share, stages = 0.0, config.schedule.in_stages
    for stage in stages:
        share += stage.share
        yield Stage(
            end=steps if stage is stages[-1] else round(share * steps),
            kinds=tuple(kinds[drawn.schedule] for drawn in stage.mixture),
            draw=functools.partial(stage.draw, config.seed),
            forwards_equivalent=costs.stage_equivalent(config.model, stage),
        )


def _kind(
    config: Config,
    decoder: Decoder,
    mesh: Mesh,
    transformation: optax.GradientTransformation,
    schedule: ScheduleConfig,
) -> Kind:
    built = schedules.build(schedule, config.model.sequence_length)
    names = schedules.forward_names(schedule)
    once = meshes.gathers_once(config.mesh, mesh.shape)
    return Kind(
        step=step.build(
            decoder,
            built,
            transformation,
            names,
            config.train.accumulation,
            functools.partial(guard.judge, config=config.train),
            gather_once=once,
        ),
        flops_per_step=costs.train_flops(config.model, schedule) * config.train.batch_size,
        statistics=guard.statistics(
            step.gradient_of(decoder, built, names, config.train.accumulation, gather_once=once),
            {name for name, parameter in table(config.model).items() if parameter.axes[0] == "layers"},
        ),
    )
