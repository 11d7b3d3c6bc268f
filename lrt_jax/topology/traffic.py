"""Bytes that one chip receives in a training step, by collective, counted on paper; and what they cost in time.

Counted for what the shardings of ``setup.mesh.RULES``, ``training.replicas`` and ``training.orthogonalization`` ask
for. Where forwards gather their weights themselves, a subset forward over a part of the positions still needs them all;
the compiler may do better (share a gather) or worse (its own reshardings).
"""

import dataclasses
import math
from collections.abc import Mapping

from lrt_jax.model import costs
from lrt_jax.model.parameters import table
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config, ModelConfig, ScheduleConfig
from lrt_jax.topology.chips import Chip
from lrt_jax.training.orthogonalization import Kind, Share, shares

ACTIVATION = 2  # bytes of bfloat16
GRADIENT = 4  # bytes of float32


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One kind of collective.

    Attributes:
      name: what is moved and why.
      axis: the mesh axis that it goes over.
      received: bytes that a chip receives in a step, over both networks.
      dcn: bytes of these that come over the data center network.
    """

    name: str
    axis: str
    received: float
    dcn: float = 0.0

    @property
    def ici(self) -> float:
        """Bytes over links between chips."""
        return self.received - self.dcn


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step of one chip on paper.

    Attributes:
      flops: of its share of the batch, as ``model.costs`` counts: without recomputation.
      recomputed: FLOPs more where layers are computed again in the backward pass.
      orthogonalized: FLOPs of Muon's iterations; at least so many where ``tensor`` or ``sequence`` is above 1.
      hbm: bytes that it reads and writes at least.
      transfers: what it receives.
    """

    flops: float
    recomputed: float
    orthogonalized: float
    hbm: float
    transfers: tuple[Transfer, ...]

    @property
    def intensity(self) -> float:
        """FLOPs per byte of memory traffic."""
        return self.flops / self.hbm

    def seconds(self, chip: Chip, chips_in_slice: int, sizes: Mapping[str, int]) -> dict[str, float]:
        """The least time that each resource needs: compute, memory, ICI (axis after axis) and DCN."""
        ici = 0.0
        for transfer in self.transfers:
            # One mesh axis that is the whole slice has all links; else it is taken to have one axis of the torus.
            whole = sizes[transfer.axis] >= chips_in_slice
            ici += transfer.ici / (chip.ici if whole else chip.ici_axis)
        return {
            "compute": (self.flops + self.recomputed + self.orthogonalized) / chip.peak,
            "memory": self.hbm / chip.hbm_bandwidth,
            "ICI": ici,
            "DCN": sum(transfer.dcn for transfer in self.transfers) / chip.dcn,
        }


def forwards_of(schedule: ScheduleConfig) -> list[float]:
    """The share of all positions that each forward of one step computes; half of it where no backward pass follows.

    As if each had all layers: what a band or the source layer leaves out is counted in FLOPs only.
    """
    return [float(one.share) * (1 if one.learns else 0.5) for one in schedule.description.passes(schedule)]


def weights_of(model: ModelConfig) -> int:
    """Parameters that forwards multiply with whole: all but tables, gates and scalars."""
    return sum(
        parameter.size
        for parameter in table(model).values()
        if parameter.group in ("matrix", "head") and "gate_inputs" not in parameter.axes
    )


def held_whole(config: Config, sizes: Mapping[str, int]) -> float:
    """Bytes on a chip that gathering once a step takes beyond its shards: weights, and their gradients until summed."""
    if sizes["fsdp"] == 1 or not meshes.gathers_once(config.mesh, sizes):
        return 0.0
    # A microbatch's gradients are whole, too, until they are added to those before.
    gradients = GRADIENT * (1 if config.train.accumulation == 1 else 2)
    return weights_of(config.model) * (ACTIVATION + gradients) * (1 - 1 / sizes["fsdp"])


def of_step(config: Config, sizes: Mapping[str, int], schedule: ScheduleConfig) -> Step:
    """One training step of a schedule that is not staged; ``sizes`` are those of the mesh axes, and ``slices``."""
    model, train = config.model, config.train
    ways = math.prod(sizes[axis] for axis in ("data", "fsdp", "tensor", "sequence"))
    forwards, passes = forwards_of(schedule), train.accumulation
    learning, all_forwards = schedule.forwards, len(forwards)
    learned = costs.learned_equivalent(model, schedule)
    tokens = train.batch_size * model.sequence_length / (sizes["data"] * sizes["fsdp"] * sizes["sequence"])
    gathered = weights_of(model) / sizes["tensor"]
    total = sum(parameter.size for parameter in table(model).values())
    if meshes.gathers_once(config.mesh, sizes):
        gathers, sums, gradient = 1, 1, GRADIENT
    else:
        # Gathered for the forward pass, and again where the backward pass computes anew and multiplies with them; the
        # partitioner sums the gradients of a product where it ends, in the dtype of activations.
        gathers, sums, gradient = passes * (all_forwards + learning), passes * learning, ACTIVATION
    summed, rest = sums * gathered * gradient, (total / sizes["tensor"] - gathered) * GRADIENT
    flops = costs.train_flops(model, schedule) * train.batch_size / ways
    muon = _muon(config, sizes)
    return Step(
        flops=flops,
        recomputed=flops / 3 if model.remat else 0.0,
        orthogonalized=sum(share.each * kind.flops for kind, share in muon.items()),
        hbm=_memory_traffic(config, gathered, total, sizes, tokens, learning * passes, learned),
        transfers=tuple(
            transfer
            for transfer in (
                _over("fsdp", "all-gather of weights", gathers * gathered * ACTIVATION, sizes),
                _over("fsdp", "reduce-scatter of gradients", summed, sizes),
                _over("fsdp", "all-to-all of looked-up embeddings", _looked_up(config, sizes, tokens, schedule), sizes),
                _over_data((summed + rest) / sizes["fsdp"], sizes),
                *_of_muon(muon),
                _over("tensor", "all-reduce of activations", _reduced(config, tokens, sum(forwards)), sizes),
                _over("sequence", "all-gather of keys and values", _keys_values(config, sizes, forwards), sizes),
            )
            if transfer.received
        ),
    )


def _over(axis: str, name: str, size: float, sizes: Mapping[str, int]) -> Transfer:
    """A collective in which each chip receives all but its own share of ``size`` bytes."""
    return Transfer(name, axis, size * (sizes[axis] - 1) / sizes[axis])


def _muon(config: Config, sizes: Mapping[str, int]) -> dict[Kind, Share]:
    """A chip's share of what Muon makes orthogonal.

    With ``tensor`` or ``sequence`` the partitioner decides, whose work is at least that of the other axes' chips.
    """
    if config.optimizer.name != "muon":
        return {}
    spec = table(config.model)
    names = [name for name, parameter in spec.items() if parameter.group == "matrix"]
    found = shares(spec, names, sizes["data"] // sizes["slices"], sizes["fsdp"])
    return {kind: share for kind, (_, share) in found.items()}


def _of_muon(muon: dict[Kind, Share]) -> tuple[Transfer, Transfer]:
    """Matrices come whole to where they are made orthogonal, and go back to where they are stored."""
    exchanged = gathered = 0.0
    for kind, share in muon.items():
        shard = share.each * math.prod(kind.shape) * GRADIENT
        exchanged += 2 * shard * (share.ways - 1) / share.ways
        gathered += shard * (share.parts - 1)
    return (
        Transfer("all-to-all of Muon's matrices", "fsdp", exchanged),
        Transfer("all-gather of Muon's matrices", "data", gathered),
    )


def _looked_up(config: Config, sizes: Mapping[str, int], tokens: float, schedule: ScheduleConfig) -> float:
    """x⁰ and value embeddings change from columns to rows, and their gradients back."""
    model = config.model
    values = len(model.value_embedding_layers) * model.kv_heads * model.head_width
    shares = [one.share for one in schedule.description.passes(schedule)]
    interleaved = max(shares) == 1 and min(shares) < 1
    # The partitioner is given both orders of positions; a device by itself reorders what it has.
    orders = 2 if interleaved and not meshes.gathers_once(config.mesh, sizes) else 1
    return 2 * orders * tokens * (model.width + values / sizes["tensor"]) * ACTIVATION


def _over_data(shard: float, sizes: Mapping[str, int]) -> Transfer:
    """All-reduce over copies of so many bytes of gradients, of embeddings too."""
    copies, slices = sizes["data"], sizes["slices"]
    received = 2 * shard * (copies - 1) / copies
    # Within a slice first, so that slices exchange one share of it each.
    within = copies // slices
    dcn = 2 * shard / within * (slices - 1) / slices
    return Transfer("all-reduce of gradients", "data", received, dcn)


def _reduced(config: Config, tokens: float, computed: float) -> float:
    """Two all-reduces per layer in the forward pass, two in the backward, and again what is computed anew."""
    model = config.model
    per_layer = 4 + (2 if model.remat else 0)
    return 2 * per_layer * model.layers * tokens * computed * model.width * ACTIVATION


def _keys_values(config: Config, sizes: Mapping[str, int], forwards: list[float]) -> float:
    """Keys and values of all positions to every share of the queries, and their gradients back."""
    model, train = config.model, config.train
    rows = train.batch_size / (sizes["data"] * sizes["fsdp"])
    size = 2 * rows * model.sequence_length * model.kv_heads / sizes["tensor"] * model.head_width * ACTIVATION
    return len(forwards) * model.layers * size * (3 if model.remat else 2)


def _memory_traffic(
    config: Config,
    gathered: float,
    total: float,
    sizes: Mapping[str, int],
    tokens: float,
    forwards: int,
    computed: float,
) -> float:
    """At least: the optimizer reads and writes its state once; forwards read weights three times and write gradients;
    each layer's input, keys, values and MLP are written once and read twice.
    """
    model = config.model
    state = total / (sizes["fsdp"] * sizes["tensor"]) * GRADIENT * 7  # p, g, m, v read; p, m, v written
    weights = forwards * gathered * (3 * ACTIVATION + GRADIENT)
    per_token = (4 * model.width + (2 * model.width + model.mlp_width) / sizes["tensor"]) * model.layers
    logits = 3 * model.vocab_size / sizes["tensor"] * GRADIENT
    return state + weights + tokens * computed * (3 * per_token * ACTIVATION + logits)
