"""Equality 7: the same numbers from a scanned, unrolled, rematerialized or accumulated program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrt_jax.method import forwards, schedules
from lrt_jax.model import backend
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.model.parameters import table
from lrt_jax.setup.config import OptimizerConfig, ScheduleConfig
from lrt_jax.training import optimizer, state, step

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64: everything but the order of sums


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


SCHEDULES = {
    "interleaved": ScheduleConfig(subsets=2),
    "interleaved, refreshed": ScheduleConfig(subsets=2, kv_refresh=True, partition="random"),
    "multi_refinement": ScheduleConfig(name="multi_refinement", refinements=2, loss_weights=(0.1, 0.3, 0.6)),
    "chunked": ScheduleConfig(name="chunked", chunks=2),
}
MODEL = {"dtype": "float64", "memory": "layerwise", "value_embeddings": "alternate"}


@pytest.fixture(scope="module", params=SCHEDULES)
def unrolled(request, tiny, random_params, random_batch):
    """Loss and gradients of the unrolled program, with which others are compared."""
    with jax.enable_x64(True):
        config, schedule = tiny(**MODEL), SCHEDULES[request.param]
        params, batch = random_params(config), random_batch(config, rows=4)
        return config, schedule, params, batch, loss_and_gradients(config, schedule, params, batch)


def loss_and_gradients(config, schedule, params, batch):
    built = schedules.build(schedule, config.sequence_length)
    objective = jax.value_and_grad(lambda params, *batch: built(Model(Decoder(config), params), *batch).loss)
    return jax.jit(objective)(params, *batch)


@pytest.mark.parametrize(
    ("model", "unroll"),
    [
        ({"scan_layers": True}, False),
        ({"remat": True}, True),
        ({"scan_layers": True, "remat": True}, False),
        ({"scan_layers": True, "remat": True}, True),
    ],
    ids=["scan both", "remat", "scan both, remat", "scan layers, remat"],
)
def test_scanned_and_rematerialized_programs_compute_the_same(x64, tiny, unrolled, model, unroll):
    _, schedule, params, batch, expected = unrolled
    assert np.isfinite(expected[0]) and all(np.abs(grad).max() > 1e-6 for grad in expected[1].values())
    found = loss_and_gradients(tiny(**MODEL | model), dataclasses.replace(schedule, unroll=unroll), params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, expected)


@pytest.mark.parametrize("unrolled", ["interleaved, refreshed", "multi_refinement"], indirect=True)
def test_what_is_traced_for_a_gpu_computes_the_same(x64, unrolled):
    """Lookups, products and RoPE are written differently for a CPU."""

    class Gpu:
        platform, compute_capability = "gpu", "9.0"

    config, schedule, params, batch, expected = unrolled
    with backend.compiling_for(Gpu()):
        assert backend.attention_kind(config, config.sequence_length).kind == "blocked"
        found = loss_and_gradients(config, schedule, params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, expected)


@pytest.mark.parametrize("unrolled", ["interleaved"], indirect=True)
def test_logits_some_positions_at_a_time(x64, tiny, unrolled, monkeypatch):
    config, schedule, params, batch, expected = unrolled
    monkeypatch.setattr(forwards, "LOGITS", 5 * config.vocab_size)  # of 5 positions: the last part is not full
    rematerialized = tiny(**MODEL, remat=True)
    found = loss_and_gradients(rematerialized, schedule, params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, expected)
    built = schedules.build(schedule, config.sequence_length)
    objective = jax.grad(lambda params: built(Model(Decoder(rematerialized), params), *batch).loss)
    text, rows, words = str(jax.make_jaxpr(objective)(params)), len(batch[0]), config.vocab_size
    assert f"f64[1,5,{words}]" in text and f"f64[{rows},{config.sequence_length},{words}]" not in text


@pytest.mark.parametrize("unrolled", ["interleaved"], indirect=True)
def test_accumulated_gradients_are_those_of_the_whole_batch(x64, unrolled):
    config, schedule, params, batch, (loss, grads) = unrolled
    # ε of 1 keeps Adam's first update from hiding the gradient's scale.
    adamw = optimizer.build(OptimizerConfig(name="adamw", eps=1.0), table(config), steps=10)
    train = step.build(Decoder(config), dataclasses.replace(schedule, unroll=False), adamw, accumulation=4)
    arrays = jax.tree.map(jnp.array, params)
    fresh = jax.jit(adamw.init)(arrays)
    updates, _ = jax.jit(adamw.update)(grads, fresh, arrays)
    expected = {name: params[name] + np.asarray(update) for name, update in updates.items()}
    after, metrics = train(state.TrainState(jnp.zeros((), jnp.int32), arrays, fresh), *batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **EXACT), after.params, expected)
    np.testing.assert_allclose(metrics["train/loss"], loss, **EXACT)
    norm = np.sqrt(sum(np.sum(np.square(grad)) for grad in grads.values()))
    np.testing.assert_allclose(metrics["train/grad_norm"], norm, **EXACT)
    parts = [metrics[f"train/loss_{name}"] for name in schedules.forward_names(schedule)]
    np.testing.assert_allclose(np.average(parts, weights=schedule.loss_weights or None), loss, **EXACT)
    assert after.step == 1


@pytest.mark.parametrize("partition", ["strided", "contiguous", "random"])
def test_shared_projections_are_layerwise_ones_that_are_all_the_same(x64, tiny, random_params, random_batch, partition):
    """What holds the shared variant, KV refresh included, to the numbers of the layerwise one (test_parity)."""
    scanned = partition != "strided"
    shared, layerwise = (
        tiny(dtype="float64", memory=memory, layers=3, scan_layers=scanned) for memory in ("shared", "layerwise")
    )
    params, batch = random_params(shared), random_batch(shared)
    assert not np.allclose(params["memory_key"], params["memory_value"])
    copies = {name: np.stack([params[name]] * 3) for name in ("memory_key", "memory_value")}
    schedule = ScheduleConfig(subsets=2, partition=partition, kv_refresh=True, unroll=False)
    loss, grads = loss_and_gradients(shared, schedule, params, batch)
    expected, expected_grads = loss_and_gradients(layerwise, schedule, params | copies, batch)
    np.testing.assert_allclose(loss, expected, **EXACT)
    for name, grad in grads.items():
        reduced = expected_grads[name].sum(axis=0) if name in copies else expected_grads[name]
        np.testing.assert_allclose(grad, reduced, rtol=1e-10, atol=1e-12, err_msg=name)
