"""The code that trains computes what the method says: ``method.spec``, at its plainest, on random models."""

import dataclasses

import jax
import numpy as np
import pytest

from lrt_jax.method import schedules, spec
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.setup.config import ScheduleConfig

SCHEDULES = {
    "plain": {"name": "plain"},
    "interleaved": {"subsets": 2},
    "four subsets, weighted": {"subsets": 4, "loss_weights": (0.5, 1.0, 2.0, 0.0, 1.0)},
    "contiguous": {"subsets": 2, "partition": "contiguous"},
    "random, init counts half": {"subsets": 2, "partition": "random", "init_weight": 0.5},
    "refreshed": {"subsets": 4, "kv_refresh": True},
    "refreshed, random": {"subsets": 2, "kv_refresh": True, "partition": "random"},
    "two sweeps": {"subsets": 2, "sweeps": 2},
    "settled": {"subsets": 2, "settle": 2},
    "multi-refinement": {"name": "multi_refinement", "refinements": 2},
    "weighted": {"name": "multi_refinement", "refinements": 2, "loss_weights": (0.1, 0.3, 0.6)},
    "detached": {"name": "multi_refinement", "refinements": 2, "detach": True},
    "settled, refined": {"name": "multi_refinement", "refinements": 1, "settle": 1},
    "settled thrice": {"name": "multi_refinement", "refinements": 1, "settle": 3},
    "chunked": {"name": "chunked", "chunks": 4},
    "sequential": {"name": "sequential"},
}


def drawn(number, schedule):
    """Fields of a random model that the schedule can train."""
    random = np.random.default_rng([22, number])
    layers = int(random.integers(1, 4))
    source = int(random.integers(1, layers + 1))
    begin = 1 if schedule.get("kv_refresh") else int(random.integers(1, source + 1))
    choices = {
        "layers": [layers],
        "heads": [4],
        "kv_heads": [1, 2, 4],
        "window_pattern": ["L", "SL", "SSSL"],
        "alpha": [True, False],
        "beta": [True, False],
        "value_embeddings": ["all", "alternate", "none"],
        "gate_width": [0, 4],
        "memory": ["shared", "layerwise"] + ["none"] * (not schedule.get("kv_refresh")),
        "source_layer": [str(source)],
        "memory_layers": ["all" if begin == 1 else f"{begin}-{int(random.integers(source, layers + 1))}"],
        "softcap": [15.0, 0.3],
        "attention": ["auto", "dense"],
        "scan_layers": [True, False],
        "remat": [True, False],
    }
    fields = {name: values[random.integers(len(values))] for name, values in choices.items()}
    return fields | {"residual_injection": fields["memory"] == "none" or bool(random.integers(2))}


@pytest.mark.parametrize(("number", "name"), list(enumerate(SCHEDULES)))
def test_what_trains_is_what_the_method_says(tiny, random_params, random_batch, number, name):
    schedule, unroll = ScheduleConfig(**SCHEDULES[name]), bool(number % 2)
    # Of spec.run every operation of every position is compiled by itself: two positions to a piece are enough.
    length = 8 if 4 in (schedule.subsets, schedule.chunks) else 4
    config = tiny(dtype="float64", sequence_length=length, **drawn(number, SCHEDULES[name]))
    built = schedules.build(dataclasses.replace(schedule, unroll=unroll), config.sequence_length)

    def trained(params, *batch):
        outcome = built(Model(Decoder(config), params), *batch)
        return outcome.loss, (outcome.merged_losses_BxT, outcome.sources_BxTxD)

    def said(params, *batch):
        loss, *rest = spec.run(config, schedule, params, *batch)
        return loss, tuple(rest)

    with jax.enable_x64(True):
        given = random_params(config), *random_batch(config)
        found = jax.jit(jax.value_and_grad(trained, has_aux=True))(*given)
        with jax.numpy_rank_promotion("allow"):
            expected = jax.value_and_grad(said, has_aux=True)(*given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), found, expected)
