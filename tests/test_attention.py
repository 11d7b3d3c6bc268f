"""Attention in blocks against the dense reference, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrt_jax.model import attention
from lrt_jax.model.decoder import Decoder
from lrt_jax.setup.config import ScheduleConfig
from lrt_jax.training import partitions, schedules

T, C = 24, 4


def arrays(subsets: int, subset: int, heads: int, kv_heads: int):
    """Random queries of one subset, and keys of all in slot order, with their positions."""
    partition = partitions.strided(T, subsets)
    queries = jnp.asarray(partition.positions_SxP[subset])[None]
    keys = jnp.asarray(partition.positions_SxP.reshape(1, -1))
    random = np.random.default_rng(subset)
    q, k, v, weights = (
        random.normal(size=(2, length, count, C))
        for length, count in ((queries.size, heads), (T, kv_heads), (T, kv_heads), (queries.size, heads))
    )
    return (q, k, v), weights, queries, keys


@pytest.mark.parametrize(("block", "window"), [(4, 0), (4, 3), (4, T), (1, 5), (100, 12)])
@pytest.mark.parametrize(("subsets", "subset", "heads", "kv_heads"), [(1, 0, 2, 2), (2, 1, 4, 2), (4, 2, 2, 1)])
def test_blocks_leave_out_only_what_is_hidden(subsets, subset, heads, kv_heads, block, window):
    with jax.enable_x64(True):
        inputs, weights, queries, keys = arrays(subsets, subset, heads, kv_heads)

        def dense(*inputs):
            return jnp.sum(weights * attention.attend(*inputs, queries, keys, window))

        def blocks(farthest, *inputs):
            options = {"subsets": subsets, "farthest": farthest, "block": block}
            return jnp.sum(weights * attention.attend_in_blocks(*inputs, queries, keys, window, **options))

        expected = jax.jit(jax.value_and_grad(dense, (0, 1, 2)))(*inputs)
        for farthest in {window, T}:  # the window itself, or the widest of scanned layers
            found = jax.jit(jax.value_and_grad(blocks, (1, 2, 3)), static_argnums=0)(farthest, *inputs)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), found, expected)


def test_blocks_that_are_hidden_are_not_computed():
    inputs, _, queries, keys = arrays(1, 0, 2, 2)

    def pairs(**options):
        jaxpr = jax.make_jaxpr(
            lambda *inputs: attention.attend_in_blocks(*inputs, queries, keys, 6, subsets=1, **options)
        )(*inputs)
        shapes = [str(line) for line in str(jaxpr).splitlines() if "exp " in line]
        assert shapes
        return jaxpr, len(shapes)

    jaxpr, count = pairs(farthest=6, block=6)
    assert count == 4
    # Of each block of 6 queries no more than 12 of the 24 keys.
    assert "f32[2,2,6,24]" not in str(jaxpr) and "f32[2,2,6,12]" in str(jaxpr)


@pytest.mark.parametrize(
    "schedule",
    [
        ScheduleConfig(name="plain"),
        ScheduleConfig(subsets=2, unroll=False),
        ScheduleConfig(name="multi_refinement", refinements=1, unroll=False),
        ScheduleConfig(name="chunked", chunks=2, unroll=False),
    ],
    ids=lambda schedule: schedule.name,
)
def test_models_compute_the_same_with_either(tiny, random_params, random_batch, schedule, monkeypatch):
    scan_layers = schedule.name == "multi_refinement"  # where a layer's window is traced
    # Blocks of two positions, so that the tiny model has several.
    monkeypatch.setattr(attention, "BLOCK", 2)

    def loss_and_gradients(kind):
        config = tiny(dtype="float64", attention=kind, scan_layers=scan_layers)
        batch, built = random_batch(config), schedules.build(schedule, config.sequence_length)
        return jax.jit(jax.value_and_grad(lambda params: built(Decoder(config), params, *batch).loss))(
            random_params(config)
        )

    with jax.enable_x64(True):
        dense, blocked = loss_and_gradients("dense"), loss_and_gradients("blocked")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), dense, blocked)
