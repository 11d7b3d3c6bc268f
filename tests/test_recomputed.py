"""Layers that are scanned and computed again: the gradients of plain scans, added up in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params

from lrt_jax.method import schedules
from lrt_jax.model import recomputed
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.setup.config import ScheduleConfig

LAYERS, WIDTH = 3, 4


def layer(known, shared, x, arrays):
    (offset, index), ((matrix, pieces), bias) = known, arrays
    x = x + jnp.tanh(x @ matrix + shared * bias + offset * index + sum(pieces))
    return x, {"cubed": x**3}


def by_autodiff(source, known, shared, x, read, own):
    """What ``recomputed.scan`` computes, differentiated by JAX."""

    def step(carry, each):
        x, kept, index = carry
        by_layer, *arrays = each
        x, computed = layer((known[0], by_layer), shared, x, tuple(arrays))
        return (x, jnp.where(index == source, x, kept), index + 1), computed

    (x, kept, _), computed = lax.scan(step, (x, jnp.zeros_like(x), 0), (known[1], read, own))
    return x, kept, computed, read


@pytest.mark.parametrize("source", range(LAYERS))
def test_two_forwards_in_turn_have_the_gradients_of_plain_scans(source):
    rng = np.random.default_rng(source)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    shared, x, bias, targets = (
        draw(1, 1, WIDTH),
        draw(2, 5, WIDTH),
        draw(LAYERS, 1, 1, WIDTH),
        draw(LAYERS, 2, 5, WIDTH),
    )
    read = (draw(LAYERS, WIDTH, WIDTH), (draw(LAYERS, 1, 1, WIDTH), draw(LAYERS, 2, 1, WIDTH)))
    known = (draw(1, 1, WIDTH), jnp.arange(LAYERS))

    def loss(scan, shared, x, read, bias):
        x, kept, computed, read = scan(source, known, shared, x, read, bias)
        # The second forward reads what the first handed on, and what it computed at one of its layers.
        matrix, (first, second) = read
        again, kept_again, others, _ = scan(
            source, known, 2 * shared, x + kept, (matrix, (first, second)), computed["cubed"][:, :1, :1]
        )
        return jnp.sum(again * x) + jnp.sum(kept_again) + jnp.sum(others["cubed"] * targets) + jnp.sum(bias * first)

    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda leaf: leaf.astype("float64"), (shared, x, read, bias))
        gradients = [
            jax.jit(jax.grad(functools.partial(loss, scan), argnums=(0, 1, 2, 3)))(*arguments)
            for scan in (functools.partial(recomputed.scan, layer), by_autodiff)
        ]
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradients[0]))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7), *gradients)


def count(names, jaxpr, shapes):
    """How many of these primitives make arrays of these shapes, outside of loops."""
    found = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in names:
            found += equation.outvars[0].aval.shape in shapes
        elif equation.primitive.name not in ("scan", "while"):
            for inner in jaxprs_in_params(equation.params):
                found += count(names, getattr(inner, "jaxpr", inner), shapes)
    return found


def gradient_of(config, schedule, params, batch):
    built = schedules.build(schedule, config.sequence_length)
    return jax.make_jaxpr(jax.grad(lambda params: built(Model(Decoder(config), params), *batch).loss))(params).jaxpr


SUMS = ("add", "add_any")


@pytest.mark.parametrize(
    "schedule",
    [ScheduleConfig(subsets=4), ScheduleConfig(name="multi_refinement", refinements=2)],
    ids=["interleaved", "multi_refinement"],
)
def test_no_forward_has_stacks_of_gradients_of_its_own(tiny, random_params, random_batch, schedule):
    config = tiny(layers=3, remat=True, scan_layers=True)
    params, batch = random_params(config), random_batch(config)
    length = config.sequence_length // (schedule.subsets if schedule.name == "interleaved" else 1)
    stacks = {params[name].shape for name in ("mlp_in", "mlp_out", "query", "key", "output", "alpha", "memory_gate")}
    pieces = {(config.layers, len(batch[0]), config.kv_heads, length, config.head_width)}

    def counted(remat):
        program = gradient_of(tiny(layers=3, remat=remat, scan_layers=True), schedule, params, batch)
        return count(SUMS, program, stacks), count(SUMS, program, pieces)

    by_autodiff, in_place = counted(remat=False), counted(remat=True)
    assert by_autodiff[0] > 10 and in_place == (0, 0)
    assert by_autodiff[1] > 10 or schedule.name == "multi_refinement"


@pytest.mark.parametrize(("remat", "expected"), [(True, 4), (False, 0)])
def test_unrolled_layers_sum_up_gradients_forward_by_forward(tiny, random_params, random_batch, remat, expected):
    config = tiny(layers=3, remat=remat)
    params, batch = random_params(config), random_batch(config)
    program = gradient_of(config, ScheduleConfig(subsets=4), params, batch)
    # What comes from later forwards, for all forwards but the last.
    assert count(("optimization_barrier",), program, {params["mlp_in"].shape[1:]}) == expected * config.layers
