"""The optimizer: an optax chain, partitioned by the groups of the parameter table."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from lrt_jax.model.parameters import Parameter
from lrt_jax.setup.config import OptimizerConfig
from lrt_jax.training.orthogonalization import orthogonalizer

Rate = Callable[[jax.Array], jax.Array]


def rate_shape(config: OptimizerConfig, steps: int) -> Rate:
    """The learning rate over the run as a share of its highest: warm-up, constant, linear warm-down."""
    warmup, warmdown = round(config.warmup * steps), round(config.warmdown * steps)
    phases = [
        # Step 0 already learns: the rise ends at 1 on the first step after the warm-up.
        optax.schedules.linear_schedule(1 / (warmup + 1), 1.0, warmup),
        optax.schedules.constant_schedule(1.0),
        optax.schedules.linear_schedule(1.0, config.final_lr, max(warmdown, 1)),
    ]
    return optax.schedules.join_schedules(phases, [warmup, max(steps - warmdown, warmup)])


def build(
    config: OptimizerConfig, table: Mapping[str, Parameter], steps: int, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Clipping, then Muon for matrices (or AdamW), AdamW for every other group; in a flat dict by the table's names.

    Args:
      config: rates and constants.
      table: the parameter table, whose groups decide who gets what.
      steps: length of the run, which the rate's shape and the decay of weights follow.
      mesh: that parameters and gradients are stored on, for Muon to share its work out on.
    """
    shape = rate_shape(config, steps)
    decay = optax.schedules.linear_schedule(config.weight_decay, 0.0, steps)

    def rate(highest: float) -> optax.GradientTransformation:
        return optax.scale_by_learning_rate(lambda step: highest * shape(step))

    def adamw(highest: float, b1: float = config.b1, weight_decay: Any = 0.0) -> optax.GradientTransformation:
        adam = optax.scale_by_adam(b1=b1, b2=config.b2, eps=config.eps)
        return optax.chain(adam, optax.add_decayed_weights(weight_decay), rate(highest))

    matrix = adamw(config.matrix_lr, weight_decay=decay)
    if config.name == "muon":
        matrix = optax.chain(_muon(config, table, mesh), optax.add_decayed_weights(decay), rate(config.muon_lr))
    groups = {
        "matrix": matrix,
        "embedding": adamw(config.embedding_lr),
        "head": adamw(config.head_lr),
        "alpha": adamw(config.alpha_lr),
        "beta": adamw(config.scalar_lr, config.beta_b1),
        "gamma": adamw(config.scalar_lr),
    }
    by_group = optax.partition(groups, {name: parameter.group for name, parameter in table.items()})
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(clip, by_group)


def _muon(config: OptimizerConfig, table: Mapping[str, Parameter], mesh: Mesh | None) -> optax.GradientTransformation:
    """Orthogonalized momentum, times √max(1, outputs / inputs): every axis but inputs and outputs is batch."""
    orthogonalize = orthogonalizer(table, mesh)

    def direction(momentum: Mapping[str, Any], params: Any) -> dict[str, Any]:
        del params
        # optax.partition hands over the whole tree, with the other groups' leaves masked out.
        matrices = {name: leaf for name, leaf in momentum.items() if not isinstance(leaf, optax.MaskedNode)}
        return {**momentum, **{name: leaf * _scale(table[name]) for name, leaf in orthogonalize(matrices).items()}}

    beta = optax.schedules.linear_schedule(config.momentum_start, config.momentum, max(config.momentum_warmup, 1))
    return optax.chain(optax.inject_hyperparams(_nesterov)(beta=beta), optax.stateless(direction))


def _scale(parameter: Parameter) -> float:
    _, inputs, outputs = parameter.matrices
    return math.sqrt(max(1.0, outputs / inputs))


def _nesterov(beta: jax.Array | float) -> optax.GradientTransformation:
    """The momentum of ``optax.contrib.scale_by_muon``, with its state, without the orthogonalization."""
    whole = optax.contrib.scale_by_muon(beta=beta)

    def update(updates: Any, state: optax.contrib.MuonState, params: Any = None) -> tuple[Any, Any]:
        del params
        mu = optax.tree.update_moment(updates, state.mu, beta, 1)
        count = optax.safe_increment(state.count)
        ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
        now = optax.tree.bias_correction(updates, beta, count)
        return jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now), state._replace(count=count, mu=mu)

    return optax.GradientTransformation(whole.init, update)
