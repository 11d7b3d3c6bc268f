import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lrt_jax.model import attention, costs
from lrt_jax.model.decoder import Decoder
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
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += product_flops(inner)
    return total


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_flops_of_a_forward_are_those_of_its_program(tiny, random_params, model, memory):
    config = tiny(**MODELS[model])
    decoder, length = Decoder(config), config.sequence_length
    positions = jnp.arange(length)[None]

    def forward(params, memory_1xTxD):
        out = decoder.apply({"params": params}, positions, positions, memory_1xTxD)
        return decoder.apply({"params": params}, out.hidden_BxPxD, method=Decoder.logits)

    given = jnp.zeros((1, length, config.width)) if memory else None
    products = product_flops(jax.make_jaxpr(forward)(random_params(config), given).jaxpr)
    pairs = sum(int(np.sum(attention.visible(positions, positions, window))) for window in config.windows)
    assert costs.forward_flops(config, memory=memory) == products + 4 * config.heads * config.head_width * pairs


def test_flops_of_a_step(tiny):
    config, plain = tiny(), tiny(**MODELS["plain"])
    zero, full = (costs.forward_flops(config, memory=memory) for memory in (False, True))
    assert zero < full
    assert costs.train_flops(config, ScheduleConfig(name="plain")) == 3 * zero
    for subsets in (2, 4):
        assert costs.train_flops(config, ScheduleConfig(subsets=subsets)) == 3 * (zero + full)
    assert costs.forward_flops(plain, memory=False) == costs.forward_flops(plain, memory=True)
