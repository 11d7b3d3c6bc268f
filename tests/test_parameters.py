"""The table of parameters, and the form that several forwards share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrt_jax.model import weights
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model

MODELS = [
    {"memory": memory, "residual_injection": memory != "none", "value_embeddings": values, "layers": layers}
    for memory in ("shared", "layerwise", "none")
    for values in ("all", "alternate", "none")
    for layers in (1, 2)
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: "-".join(map(str, model.values())))
def test_parameters_by_layer_say_their_axes(tiny, random_params, model):
    config = tiny(**model)
    made = weights.by_layer(config, random_params(config))
    axes = weights.axes_by_layer(config)
    assert made.keys() == axes.keys()
    for name, arrays in made.items():
        for array in arrays if isinstance(arrays, tuple) else (arrays,):
            assert array.ndim == len(axes[name]), name


@pytest.mark.parametrize("values", ["all", "alternate", "none"])
@pytest.mark.parametrize("memory", ["shared", "none"])
def test_parameters_by_layer_are_the_same_model(tiny, random_params, random_batch, memory, values):
    config = tiny(memory=memory, residual_injection=memory != "none", value_embeddings=values)
    model = Model(Decoder(config), random_params(config))
    tokens_BxT, _ = random_batch(config)
    positions_1xT = jnp.arange(config.sequence_length)[None]
    memory_BxTxD = jax.random.normal(jax.random.key(1), (*tokens_BxT.shape, config.width))
    stacked, cut = (form(tokens_BxT, positions_1xT, memory_BxTxD)[0].hidden_BxPxD for form in (model, model.by_layer()))
    np.testing.assert_allclose(stacked, cut, rtol=1e-5, atol=1e-6)
