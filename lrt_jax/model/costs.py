"""What a model costs: its parameters by role, and the FLOPs of a training step.

FLOPs are counted analytically (a compiled program counts a scanned body once) and exactly: two per
multiply-add of every matrix product, attention over the keys that causality and windows leave visible. Scanned layers
compute a little more where only some own value embeddings: the others' gates work on nothing.
"""

import dataclasses
from fractions import Fraction

from lrt_jax.model.parameters import table
from lrt_jax.setup.config import ModelConfig, ScheduleConfig

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


def forward_flops(config: ModelConfig, *, memory: bool) -> int:
    """FLOPs of one forward over all T positions of one row, the head included.

    The S subset forwards of interleaved training together cost one such forward with memory: they visit
    every position once, and its queries see what causality and windows leave, whatever S is.

    Args:
      config: the model.
      memory: whether memory is read; zero memory skips the projections.
    """
    products = 0
    for parameter in table(config).values():
        if parameter.group not in ("matrix", "head"):
            continue
        # Gates and projections of the memory: the gates always work, Uk and Uv only with memory.
        if "gate_inputs" not in parameter.axes and parameter.memory and not memory:
            continue
        products += parameter.size
    visible = sum(
        sum(min(position, window) + 1 for position in range(config.sequence_length)) for window in config.windows
    )
    attention = 2 * config.heads * config.head_width * visible
    return 2 * (config.sequence_length * products + attention)


def train_flops(config: ModelConfig, schedule: ScheduleConfig) -> int:
    """FLOPs of one training step per row of T tokens: every forward, and the backward pass through those that learn.

    Raises:
      ValueError: the schedule is staged; ask for each of its kinds.
    """
    # Uk m and Uv m at all T positions.
    projections = (
        2
        * config.sequence_length
        * sum(parameter.size for name, parameter in table(config).items() if name in ("memory_key", "memory_value"))
    )
    head = 2 * config.sequence_length * table(config)["head"].size
    total = Fraction(0)
    for one in schedule.description.passes(schedule):
        reads = one.reads_memory and config.recurrent
        if not one.learns:
            total += one.share * (forward_flops(config, memory=reads) - head)
            continue
        total += (1 + BACKWARD) * (one.share * forward_flops(config, memory=reads) + one.refreshes * projections)
        if reads and not one.learns_memory:  # the projections' backward pass has no product with the weights
            total -= one.share * projections
    return int(total)
