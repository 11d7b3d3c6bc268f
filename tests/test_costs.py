import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lrt_jax.method import schedules
from lrt_jax.model import attention, costs
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.setup.config import ScheduleConfig
from lrt_jax.training.state import init_params

MODELS = {
    "shared": {},
    "layerwise": {"memory": "layerwise", "gate_width": 4},
    "residual only": {"memory": "none", "window_pattern": "L"},
    "plain": {"memory": "none", "residual_injection": False, "kv_heads": 4},
}


@pytest.mark.parametrize("model", [*MODELS.values(), {"value_embeddings": "alternate"}, {"value_embeddings": "none"}])
def test_counts_add_up_to_the_arrays_that_exist(tiny, model):
    config = tiny(**model)
    arrays = nn.unbox(jax.eval_shape(lambda key: init_params(Decoder(config), key), jax.random.key(0)))
    counts = costs.count_parameters(config)
    assert counts.total == sum(math.prod(array.shape) for array in arrays.values())
    assert min(counts.token_embedding, counts.head, counts.backbone) > 0
    assert counts.value_embeddings == sum(arrays[name].size for name in arrays if name.startswith("value_"))
    assert (counts.memory > 0) == config.recurrent
    assert f"{counts.total:,}" in str(counts)


def test_memory_is_what_the_model_has_over_the_plain_one(tiny):
    plain = costs.count_parameters(tiny(**MODELS["plain"] | {"kv_heads": 2}))
    recurrent = costs.count_parameters(tiny())
    assert recurrent.memory == recurrent.total - plain.total
    assert recurrent.backbone == plain.backbone


def product_flops(jaxpr) -> int:
    """FLOPs of the matrix products without batch axes: those with weights, not attention's."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            if not batch:
                left = equation.invars[0].aval.shape
                total += 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * product_flops(inner)
    return total


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_flops_of_a_forward_are_those_of_its_program(tiny, random_params, model, memory):
    config = tiny(**MODELS[model])
    length = config.sequence_length
    positions = jnp.arange(length)[None]

    def forward(params, memory_1xTxD):
        out, model = Model(Decoder(config), params)(positions, positions, memory_1xTxD)
        return model.logits(out.hidden_BxPxD)

    given = jnp.zeros((1, length, config.width)) if memory else None
    products = product_flops(jax.make_jaxpr(forward)(random_params(config), given).jaxpr)
    assert costs.forward_flops(config, memory=memory) == products + attention_flops(config)


def attention_flops(config) -> int:
    """Of the products with keys and values that causality and windows leave visible, one forward and one row."""
    positions = jnp.arange(config.sequence_length)[None]
    pairs = sum(int(np.sum(attention.visible(positions, positions, window))) for window in config.windows)
    return 4 * config.heads * config.head_width * pairs


SCHEDULES = {
    "plain": ScheduleConfig(name="plain"),
    "interleaved": ScheduleConfig(subsets=4),
    "refreshed": ScheduleConfig(subsets=2, kv_refresh=True),
    "multi_refinement": ScheduleConfig(name="multi_refinement", refinements=3),
    "detached": ScheduleConfig(name="multi_refinement", refinements=2, detach=True),
    "settled": ScheduleConfig(subsets=2, settle=2),
    "refined from settled": ScheduleConfig(name="multi_refinement", refinements=2, settle=1),
    "chunked": ScheduleConfig(name="chunked", chunks=2),
    "chunked, rolled": ScheduleConfig(name="chunked", chunks=2, unroll=False),
    "sequential": ScheduleConfig(name="sequential"),
}


@pytest.mark.parametrize(
    "model",
    [
        {"memory": "shared"},
        {"memory": "layerwise", "value_embeddings": "alternate", "layers": 3},
        # Layers count alike where their windows do.
        {"memory": "layerwise", "memory_layers": "2-3", "source_layer": "2", "layers": 4, "window_pattern": "L"},
    ],
    ids=["shared", "layerwise", "band"],
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_flops_of_a_step_are_those_of_its_program(tiny, random_params, random_batch, name, model):
    config, schedule = tiny(**model), SCHEDULES[name]
    if schedule.kv_refresh:
        config = dataclasses.replace(config, memory_layers="all")
    built = schedules.build(schedule, config.sequence_length)
    batch = random_batch(config, rows=1)

    def loss(params):
        return built(Model(Decoder(config), params), *batch).loss

    products = product_flops(jax.make_jaxpr(jax.grad(loss))(random_params(config)).jaxpr)
    attended = round(3 * costs.forwards_equivalent(config, schedule) * attention_flops(config))
    assert costs.train_flops(config, schedule) == products + attended


def test_a_staged_schedule_is_counted_by_stage(tiny):
    with pytest.raises(ValueError, match="no single schedule"):
        costs.train_flops(tiny(), ScheduleConfig(name="staged", stages="plain:1"))


def test_memory_costs_its_projections(tiny):
    plain = tiny(**MODELS["plain"])
    assert costs.forward_flops(tiny(), memory=False) < costs.forward_flops(tiny(), memory=True)
    assert costs.forward_flops(plain, memory=False) == costs.forward_flops(plain, memory=True)
