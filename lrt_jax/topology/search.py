"""The meshes and batch sizes worth trying on a topology, ranked on paper before anything is compiled."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from lrt_jax.model import costs
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config, Gather
from lrt_jax.setup.schema import ConfigError
from lrt_jax.topology import traffic
from lrt_jax.topology.chips import Chip

# Bytes of a parameter while training: itself, its gradient and two moments, float32.
STATE = 16
# Powers of two. More fsdp leaves columns of a few numbers; more tensor or sequence leaves the tensor units idle.
LARGEST = {"fsdp": 256, "tensor": 8, "sequence": 8}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config with its mesh and batch size, and what it could reach on paper."""

    config: Config
    sizes: dict[str, int]
    mfu_bound: float
    memory: float


def candidates(config: Config, chip: Chip, chips: int, slices: int) -> list[Candidate]:
    """Meshes and batch sizes by the least time per token on paper, without those that surely do not fit.

    The run's batch size is tried, its double, fourfold and half. ``chips`` are those of all slices.
    """
    found = []
    for sizes in _meshes(chips, slices):
        gathers: tuple[Gather, ...] = (config.mesh.gather,)
        if config.mesh.gather == "auto" and sizes["fsdp"] > 1 and meshes.gathers_once(config.mesh, sizes):
            gathers = ("step", "forward")
        for gather, factor in itertools.product(gathers, (0.5, 1.0, 2.0, 4.0)):
            rows = int(config.train.batch_size * factor)
            if not rows or rows % config.train.accumulation:
                continue
            train = dataclasses.replace(config.train, batch_size=rows)
            mesh = dataclasses.replace(config.mesh, **sizes, gather=gather)
            tried = dataclasses.replace(config, train=train, mesh=mesh)
            try:
                meshes.check(tried, sizes)
            except ConfigError:
                continue
            step = traffic.of_step(tried, sizes, tried.schedule.in_stages[-1].schedule)
            seconds = max(step.seconds(chip, chips // slices, sizes).values())
            memory = _memory(tried, sizes)
            if memory < chip.hbm:
                found.append(Candidate(tried, sizes, step.flops / chip.peak / seconds, memory))
    return sorted(found, key=lambda one: (-round(one.mfu_bound, 2), one.config.train.batch_size, one.memory))


def _meshes(chips: int, slices: int) -> Iterator[dict[str, int]]:
    """Powers of two, and what remains on data, whole in every slice."""
    powers = ([2**power for power in range(largest.bit_length())] for largest in LARGEST.values())
    for sizes in itertools.product(*powers):
        data, rest = divmod(chips, math.prod(sizes))
        if not rest and data and data % slices == 0:
            yield {"data": data, **dict(zip(LARGEST, sizes, strict=True)), "slices": slices}


def _memory(config: Config, sizes: dict[str, int]) -> float:
    """Bytes on a chip at least: state, and what remains between forward and backward pass."""
    model, train = config.model, config.train
    state = STATE * costs.count_parameters(model).total / (sizes["fsdp"] * sizes["tensor"])
    rows = train.batch_size / train.accumulation / (sizes["data"] * sizes["fsdp"])
    tokens = rows * model.sequence_length / sizes["sequence"]
    # Of each forward: a layer's input and source state, keys and values; once: looked-up embeddings.
    kept = model.layers * (2 * model.width + 2 * model.kv_heads * model.head_width / sizes["tensor"])
    looked_up = len(model.value_embedding_layers) * model.kv_heads * model.head_width / sizes["tensor"]
    computed = costs.learned_equivalent(model, config.schedule.in_stages[-1].schedule)
    return state + traffic.held_whole(config, sizes) + tokens * traffic.ACTIVATION * (computed * kept + 2 * looked_up)
