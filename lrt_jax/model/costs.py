"""What a model costs: its parameters by role, and the FLOPs of a training step.

FLOPs are counted analytically (a compiled program counts a scanned body once) and exactly: two per
multiply-add of every matrix product, attention over the keys that causality and windows leave visible. Scanned layers
compute a little more where only some own value embeddings: the others' gates work on nothing.
"""

import dataclasses
from fractions import Fraction

from lrt_jax.model.parameters import table
from lrt_jax.setup.config import ModelConfig, ScheduleConfig
from lrt_jax.setup.schedule import STAGED, Pass, Stage

# A backward pass multiplies with the weights once, and with the activations once.
BACKWARD = 2


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Scalars in the model, by role.

    Attributes:
      token_embedding: E.
      head: Whead.
      value_embeddings: the tables VE, with their gates.
      backbone: everything else that the plain baseline has.
      memory: what recurrent memory adds: projections, γ and its two gates of three.
    """

    token_embedding: int
    head: int
    value_embeddings: int
    backbone: int
    memory: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        rows = {field.name.replace("_", " "): getattr(self, field.name) for field in dataclasses.fields(self)}
        lines = [f"  {name:<18}{count:>16,}  {count / self.total:8.3%}" for name, count in rows.items()]
        return "\n".join([*lines, f"  {'total':<18}{self.total:>16,}"])


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """The model's parameters by role, from the parameter table."""
    parameters = table(config)
    size = {name: parameter.size for name, parameter in parameters.items()}
    values = size.get("value_embedding", 0) + size.get("value_gate", 0)
    memory = sum(parameter.size for parameter in parameters.values() if parameter.memory)
    backbone = sum(size.values()) - size["embedding"] - size["head"] - values - memory
    return ParameterCounts(size["embedding"], size["head"], values, backbone, memory)


def forwards_equivalent(config: ModelConfig, schedule: ScheduleConfig) -> float:
    """Full-length forwards with their backward pass that a step costs, in the mean of the run: of effective compute.

    Layers count alike, lookups and the head not at all; a forward without a backward pass counts a third. Layers below
    those that read memory are computed once a step.
    """
    if schedule.name == STAGED:
        return sum(stage.share * stage_equivalent(config, stage) for stage in schedule.in_stages)
    below = _below(config, schedule)
    alone = [one for one in schedule.description.passes(schedule) if not one.learns]
    without = sum(one.share * Fraction(len(_layers_of(config, one, below)), config.layers) for one in alone)
    return learned_equivalent(config, schedule) + float(without / (1 + BACKWARD))


def learned_equivalent(config: ModelConfig, schedule: ScheduleConfig) -> float:
    """The part of :func:`forwards_equivalent` that has a backward pass, and keeps activations for it; not of stages."""
    below = _below(config, schedule)
    learning = [one for one in schedule.description.passes(schedule) if one.learns]
    layers = sum(one.share * len(_layers_of(config, one, below)) for one in learning)
    return float(Fraction(layers + below) / config.layers)


def stage_equivalent(config: ModelConfig, stage: Stage) -> float:
    """:func:`forwards_equivalent` of a step of one stage, in the mean."""
    return sum(drawn.probability * forwards_equivalent(config, drawn.schedule) for drawn in stage.mixture)


def _below(config: ModelConfig, schedule: ScheduleConfig) -> int:
    """How many layers a step computes once, whatever its forwards are."""
    return config.memory_range.start if config.recurrent and schedule.description.recurrent else 0


def _layers_of(config: ModelConfig, one: Pass, below: int) -> range:
    """The layers that a forward computes."""
    return range(below, config.source_index + 1 if one.states_only else config.layers)


def forward_flops(config: ModelConfig, *, memory: bool, layers: range | None = None, head: bool = True) -> int:
    """FLOPs of one forward over all T positions of one row.

    The S subset forwards of interleaved training together cost one such forward with memory: they visit
    every position once, and its queries see what causality and windows leave, whatever S is.

    Counted are ``layers`` (None: all), and the ``head`` where it ends with logits. Where no ``memory`` is read, it is
    zero memory, which skips the projections.
    """
    layers = range(config.layers) if layers is None else layers
    products = _projections(config, layers) if memory else 0
    for name, parameter in table(config).items():
        if parameter.group != "matrix" or name in PROJECTIONS:
            continue
        owners = config.value_embedding_layers if name == "value_gate" else range(config.layers)
        products += parameter.size // len(owners) * len([layer for layer in owners if layer in layers])
    products += table(config)["head"].size if head else 0
    visible = sum(
        sum(min(position, config.windows[layer]) + 1 for position in range(config.sequence_length)) for layer in layers
    )
    attention = 2 * config.heads * config.head_width * visible
    return 2 * (config.sequence_length * products + attention)


PROJECTIONS = ("memory_key", "memory_value")


def _projections(config: ModelConfig, layers: range) -> int:
    """Multiply-adds of Uk m and Uv m at one position: once a forward, or in each of these layers that reads memory."""
    size = sum(parameter.size for name, parameter in table(config).items() if name in PROJECTIONS)
    if config.shares_projections:
        return size
    return size // config.layers * len([layer for layer in config.memory_range if layer in layers])


def train_flops(config: ModelConfig, schedule: ScheduleConfig) -> int:
    """FLOPs of one training step per row of T tokens: every forward, and the backward pass through those that learn.

    Raises:
      ValueError: the schedule is staged; ask for each of its kinds.
    """
    passes = schedule.description.passes(schedule)
    below = _below(config, schedule)
    total = Fraction((1 + BACKWARD) * forward_flops(config, memory=False, layers=range(below), head=False))
    for one in passes:
        reads = one.reads_memory and config.recurrent
        layers = _layers_of(config, one, below)
        forward = one.share * forward_flops(config, memory=reads, layers=layers, head=one.learns)
        projections = 2 * config.sequence_length * _projections(config, layers)  # Uk m and Uv m at all T positions
        total += (1 + BACKWARD) * (forward + one.refreshes * projections) if one.learns else forward
        if one.learns and reads and not one.learns_memory:  # their backward pass has no product with the weights
            total -= one.share * projections
    return int(total)
