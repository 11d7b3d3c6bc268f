"""Attention in blocks against the dense reference, forward and backward."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lrt_jax.method import partitions, schedules
from lrt_jax.model import attention, backend, blocks
from lrt_jax.model.cudnn import attend_by_cudnn
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.model.parameters import table
from lrt_jax.model.splash import attend_by_splash
from lrt_jax.setup.config import ConfigError, ModelConfig, ScheduleConfig

T, C = 24, 4


def arrays(subsets: int, subset: int, heads: int, kv_heads: int):
    """Random queries of one subset, and keys of all in slot order, with their positions."""
    partition = partitions.strided(T, subsets)
    queries = jnp.asarray(partition.positions_SxP[subset])[None]
    keys = jnp.asarray(partition.positions_SxP.reshape(1, -1))
    random = np.random.default_rng(subset)
    q, weights = (random.normal(size=(2, queries.size, heads, C)) for _ in range(2))
    k, v = (random.normal(size=(2, kv_heads, T, C)) for _ in range(2))
    return (q, k, v), weights, queries, keys


@pytest.mark.parametrize(("block", "window"), [(4, 0), (4, 3), (4, T), (1, 5), (100, 12)])
@pytest.mark.parametrize(("subsets", "subset", "heads", "kv_heads"), [(1, 0, 2, 2), (2, 1, 4, 2), (4, 2, 2, 1)])
def test_blocks_leave_out_only_what_is_hidden(subsets, subset, heads, kv_heads, block, window, monkeypatch):
    # Tiles of some stretches, not of all keys that a block sees.
    monkeypatch.setattr(blocks, "TILE", 40)
    with jax.enable_x64(True):
        inputs, weights, queries, keys = arrays(subsets, subset, heads, kv_heads)

        def dense(*inputs):
            return jnp.sum(weights * attention.attend(*inputs, queries, keys, window))

        def in_blocks(farthest, pieces, q, *kv):
            options = {"subsets": subsets, "farthest": farthest, "block": block}
            in_pieces = (jnp.split(array, pieces, axis=2) for array in kv)
            return jnp.sum(weights * blocks.attend_in_blocks(q, *in_pieces, queries, keys, window, **options))

        expected = jax.jit(jax.value_and_grad(dense, (0, 1, 2)))(*inputs)
        # The window itself, or the widest of scanned layers; keys in one piece, or in one for each subset.
        for farthest, pieces in {(window, 1), (T, subsets)}:
            found = jax.jit(jax.value_and_grad(in_blocks, (2, 3, 4)), static_argnums=(0, 1))(farthest, pieces, *inputs)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), found, expected)


@pytest.mark.parametrize("width", [64, 512])
def test_the_largest_and_smallest_scores_that_qk_norm_leaves(width):
    """Queries and keys along ±one direction: scores are ±√C, and no softmax subtracts the largest."""
    partition = partitions.strided(T, 2)
    queries, keys = jnp.asarray(partition.positions_SxP[:1]), jnp.asarray(partition.positions_SxP.reshape(1, -1))
    random = np.random.default_rng(width)
    # The first query and its only key point apart: of all sums of exponentials, the smallest.
    signs = [np.concatenate([[first], random.choice([-1, 1], count - 1)]) for first, count in ((1, T // 2), (-1, T))]
    q = np.broadcast_to(signs[0][None, :, None, None], (1, T // 2, 1, width)).astype(np.float32)
    k = np.broadcast_to(signs[1][None, None, :, None], (1, 1, T, width)).astype(np.float32)
    v = random.normal(size=k.shape).astype(np.float32)

    def dense(q, k, v):
        return jnp.sum(v[:, 0, : T // 2, None] * attention.attend(q, k, v, queries, keys, T))

    def in_blocks(q, k, v):
        mixed = blocks.attend_in_blocks(q, [k], [v], queries, keys, T, subsets=2, farthest=T, block=4)
        return jnp.sum(v[:, 0, : T // 2, None] * mixed)

    expected, found = (jax.jit(jax.value_and_grad(of, (0, 1, 2)))(q, k, v) for of in (dense, in_blocks))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_keys_that_are_hidden_are_not_computed(monkeypatch):
    (q, k, v), _, queries, keys = arrays(1, 0, 2, 2)

    def shapes():
        def run(q, k, v):
            return blocks.attend_in_blocks(q, [k], [v], queries, keys, 6, subsets=1, farthest=6, block=6)

        found = [eqn.outvars[0].aval.shape for eqn in products(jax.make_jaxpr(run)(q, k, v).jaxpr)]
        return [shape for shape in found if shape[-1] != C]

    # Of 24 keys, each block of 6 queries meets its own 6 and, but for the first block, the 6 before.
    assert shapes() == [(2, 2, 6, 6)] + 3 * [(2, 2, 6, 12)]
    monkeypatch.setattr(blocks, "TILE", 36)
    assert shapes() == 7 * [(2, 2, 6, 6)]


def products(jaxpr):
    """Its matrix products, those of inner functions too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from products(inner)


@pytest.mark.parametrize(
    "schedule",
    [
        ScheduleConfig(subsets=2, unroll=False),
        ScheduleConfig(subsets=4),  # pieces that dense attention joins twice
        ScheduleConfig(name="multi_refinement", refinements=1, unroll=False),
        ScheduleConfig(name="chunked", chunks=2, unroll=False),
    ],
    ids=lambda schedule: f"{schedule.name} {schedule.subsets}",
)
def test_models_compute_the_same_with_either(tiny, random_params, random_batch, schedule, monkeypatch):
    scan_layers = schedule.name == "multi_refinement"  # where a layer's window is traced
    # Blocks of two positions, so that the tiny model has several.
    monkeypatch.setattr(blocks, "BLOCK", 2)

    def loss_and_gradients(kind):
        config = tiny(dtype="float64", attention=kind, scan_layers=scan_layers)
        batch, built = random_batch(config), schedules.build(schedule, config.sequence_length)
        return jax.jit(jax.value_and_grad(lambda params: built(Model(Decoder(config), params), *batch).loss))(
            random_params(config)
        )

    with jax.enable_x64(True):
        dense, blocked = loss_and_gradients("dense"), loss_and_gradients("blocked")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), dense, blocked)


@pytest.mark.parametrize(
    ("subsets", "subset", "window", "kv_heads"), [(1, 0, 128, 1), (2, 0, 256, 2), (2, 1, 64, 1), (4, 2, 512, 2)]
)
def test_splash_attention_equals_the_dense_reference(subsets, subset, window, kv_heads):
    """Interpreted: a CPU has no such kernel."""
    length, width = 256 if subsets == 1 else 128, 128
    partition = partitions.strided(subsets * length, subsets)
    queries, keys = partition.positions_SxP[subset][None], partition.positions_SxP.reshape(1, -1)
    random = np.random.default_rng(subset)
    q, weights = (jnp.asarray(random.normal(size=(1, length, 2, width)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(random.normal(size=(1, kv_heads, keys.size, width)), jnp.float32) for _ in range(2))

    def dense(q, k, v):
        return jnp.sum(weights * attention.attend(q, k, v, queries, keys, window))

    def by_kernel(q, k, v):
        options = {"subsets": subsets, "subset": subset, "mesh": None, "interpret": True}
        return jnp.sum(weights * attend_by_splash(q, k, v, window=window, **options))

    expected, found = (jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v) for loss in (dense, by_kernel))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * np.abs(b).max())


@pytest.mark.parametrize("subsets", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 5])
def test_what_cudnn_computes_of_each_piece_is_put_together_exactly(subsets, length):
    """Every subset, short and odd lengths, windows down to a query itself; keys in one piece and in S."""
    with jax.enable_x64(True):
        partition = partitions.strided(subsets * length, subsets)
        random = np.random.default_rng(length)
        q, weights = (random.normal(size=(subsets, 2, length, 4, C)) for _ in range(2))
        k, v = (random.normal(size=(2, 2, subsets * length, C)) for _ in range(2))
        keys = partition.positions_SxP.reshape(1, -1)
        cases = list(itertools.product(range(subsets), (0, 2, 7, 100)))

        def dense(q, k, v):
            each = (attention.attend(q[i], k, v, partition.positions_SxP[i][None], keys, window) for i, window in cases)
            return [jnp.sum(weights[i] * mixed) for (i, _), mixed in zip(cases, each, strict=True)]

        def by_piece(q, k, v):
            found = []
            for i, window in cases:
                kv = (jnp.split(array, subsets if window else 1, axis=2) for array in (k, v))
                options = {"window": window, "subsets": subsets, "subset": i, "interpret": True}
                found.append(jnp.sum(weights[i] * attend_by_cudnn(q[i], *map(tuple, kv), **options)))
            return found

        # A loss of which no two cases' gradients cancel.
        total = lambda of: lambda *inputs: sum((1 + n) * x for n, x in enumerate(of(*inputs)))  # noqa: E731
        both = jax.jit(
            lambda *inputs: [(of(*inputs), jax.grad(total(of), (0, 1, 2))(*inputs)) for of in (dense, by_piece)]
        )
        expected, found = both(q, k, v)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), found, expected)


def test_attention_in_parts_is_the_dense_one(monkeypatch):
    """Keys in any order, some slots empty; parts of three queries, the last one filled up."""
    with jax.enable_x64(True):
        inputs, weights, _, _ = arrays(1, 0, 4, 2)
        random = np.random.default_rng(0)
        queries = np.sort(random.permuted(np.tile(np.arange(T), (2, 1)), axis=1))
        keys = np.where(random.random((2, T)) < 0.2, attention.EMPTY, random.permuted(queries, axis=1)).astype(np.int32)

        def loss(of):
            return lambda *inputs: jnp.sum(weights * of(*inputs, jnp.asarray(queries), jnp.asarray(keys), 7))

        expected = jax.jit(jax.value_and_grad(loss(attention.attend), (0, 1, 2)))(*inputs)
        monkeypatch.setattr(attention, "MOST_SCORES", 5 * T)
        in_parts = jax.jit(jax.value_and_grad(loss(attention.attend_in_parts), (0, 1, 2)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), in_parts(*inputs), expected)
        largest = max(eqn.outvars[0].aval.size for eqn in products(jax.make_jaxpr(in_parts)(*inputs).jaxpr))
        assert largest <= 2 * 4 * 5 * T  # B, H


@pytest.mark.parametrize(("kind", "length", "subsets", "width"), [("splash", 384, 3, 256), ("cudnn", 12, 3, 8)])
def test_a_model_with_kernels_computes_the_same(random_params, kind, length, subsets, width):
    def loss_and_gradients(kind):
        config = ModelConfig(
            layers=2,
            width=width,
            heads=2,
            kv_heads=2,
            sequence_length=length,
            vocab_size=32,
            window_pattern="SL",
            attention=kind,
            scan_layers=True,  # where a layer's kernel is chosen at run time
            dtype="float32",
        )
        rows = jnp.asarray(np.random.default_rng(0).integers(0, 32, (1, length + 1)))
        built = schedules.build(ScheduleConfig(subsets=subsets), length)  # more than two pieces
        objective = jax.value_and_grad(
            lambda params: built(Model(Decoder(config), params), rows[:, :-1], rows[:, 1:]).loss
        )
        return jax.jit(objective)(random_params(config))

    dense, by_kernel = loss_and_gradients("dense"), loss_and_gradients(kind)
    for a, b in zip(jax.tree.leaves(by_kernel), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * np.abs(b).max())


class Device:
    """What is asked of a device that is not here."""

    def __init__(self, platform: str, compute_capability: str = ""):
        self.platform, self.compute_capability = platform, compute_capability


HOPPER = Device("gpu", "9.0")


@pytest.mark.parametrize(
    ("device", "model", "why"),
    [
        (Device("tpu"), {"attention": "cudnn", "dtype": "bfloat16"}, "it runs on a GPU, and the device is a TPU"),
        (HOPPER, {"attention": "splash"}, "it runs on a TPU, and the device is a GPU"),
        (Device("gpu", "7.5"), {"attention": "cudnn"}, "needs bfloat16, and config.model.dtype is float32"),
        (HOPPER, {"attention": "cudnn"}, "of multiples of 8 up to 256, and this model's is 4"),
        (Device("gpu", "7.5"), {"attention": "cudnn", "dtype": "bfloat16"}, "8.0, and this one's is 7.5"),
        (Device("gpu", "gfx90a"), {"attention": "cudnn"}, "cuDNN is for NVIDIA GPUs"),
    ],
)
def test_a_kernel_that_is_not_for_the_machine_is_refused(tiny, device, model, why):
    with backend.compiling_for(device), pytest.raises(ConfigError, match=re.escape(why)):
        backend.attention_kind(tiny(**{"dtype": "auto"} | model), 8)


@pytest.mark.parametrize(
    ("device", "model", "subsets", "kind", "why"),
    [
        (HOPPER, {}, 2, "cudnn", ""),
        (Device("gpu", "8.0"), {"width": 1024, "heads": 4}, 2, "blocked", "up to 128, and this model's is 256"),
        (HOPPER, {"width": 1024, "heads": 4}, 2, "cudnn", ""),
        (HOPPER, {"dtype": "float32"}, 2, "blocked", "needs bfloat16, and config.model.dtype is float32"),
        (Device("gpu", "7.5"), {}, 2, "blocked", "needs bfloat16, and config.model.dtype is float32"),
        (Device("gpu", "gfx942"), {}, 2, "blocked", "cuDNN is for NVIDIA GPUs"),
        (HOPPER, {}, 16, "blocked", "16 subsets would be 16 calls of cuDNN each; auto makes up to 8"),
        (HOPPER, {"attention": "cudnn"}, 16, "cudnn", ""),
        (HOPPER, {"attention": "dense"}, 2, "dense", "config.model.attention is 'dense'"),
        (HOPPER, {}, None, "dense", "cudnn is for strided subsets of positions, and these are in another order"),
        (Device("tpu"), {}, 2, "dense", "no block of splash attention divides 64 positions; the smallest is 128"),
    ],
)
def test_what_auto_chooses_and_why_not_the_kernel(tiny, device, model, subsets, kind, why):
    config = tiny(**{"width": 64, "dtype": "auto", "sequence_length": 64 * (subsets or 1)} | model)
    with backend.compiling_for(device):
        found = backend.attention_kind(config, 64, subsets=subsets)
        scanned = backend.attention_kind(config, 64, subsets=subsets, traced=True)
    assert found.kind == kind and found.why.endswith(why) and bool(found.why) == bool(why)
    if kind == "cudnn":
        assert scanned.kind == "blocked" and scanned.why.endswith("set config.schedule.unroll = True")


def test_what_the_backward_pass_keeps_has_no_copy_of_the_buffer_for_each_subset():
    """Tiles keep the pieces themselves; others join them, and must do that again. Nothing is compiled."""

    def kept(kind: str, subsets: int) -> int:
        config = ModelConfig(2, 256, 2, 2, 1024, 64, attention=kind, dtype="bfloat16")
        built = schedules.build(ScheduleConfig(subsets=subsets), config.sequence_length)
        params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in table(config).items()}
        tokens = jax.ShapeDtypeStruct((2, config.sequence_length), jnp.int32)

        def backward(params, *batch):
            return jax.vjp(lambda params: built(Model(Decoder(config), params), *batch).loss, params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(backward, params, tokens, tokens))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    # Whatever the attention, the weights of each forward are counted again. Two pieces are kept joined.
    growth, least = (kept(name, 8) - kept(name, 4) for name in ("splash", "blocked"))
    copy = 2 * 2 * 1024 * 256 * 2  # keys and values of a layer, in bytes
    assert growth < least + copy
