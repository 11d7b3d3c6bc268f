"""The equalities of the method (docs of record: "Equalities that must hold"), each able to fail.

Parameters are random throughout (conftest), so that no term is hidden by a neutral initial value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrt_jax.inference import decode
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.parameters import table
from lrt_jax.setup.config import MeshConfig, OptimizerConfig, ScheduleConfig
from lrt_jax.setup.mesh import make_mesh
from lrt_jax.training import optimizer, schedules, state, step

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64: everything but the order of sums
PLAIN = {"memory": "none", "residual_injection": False}

VARIANTS = {
    "shared": {},
    "layerwise, source 1, alternate": {"memory": "layerwise", "source_layer": "1", "value_embeddings": "alternate"},
    "residual only, full windows": {"memory": "none", "window_pattern": "L"},
    "shared without residual, one kv head": {"residual_injection": False, "kv_heads": 1, "value_embeddings": "none"},
    "layerwise, all heads, gate of 4, scanned": {
        "memory": "layerwise",
        "kv_heads": 4,
        "gate_width": 4,
        "alpha": False,
        "beta": False,
        "scan_layers": True,
    },
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def run(config, params, batch, **schedule):
    """The outcome of a schedule, by default interleaved."""
    built = schedules.build(ScheduleConfig(**schedule), config.sequence_length)
    return jax.jit(lambda params, *batch: built(Decoder(config), params, *batch))(params, *batch)


def sequential(config, params, batch, **options):
    return jax.jit(lambda params, *batch: decode.score(Decoder(config), params, *batch, **options))(params, *batch)


@pytest.mark.parametrize("kind", ["shared", "layerwise"])
def test_1_memory_switched_off_is_the_plain_baseline_to_the_bit(tiny, random_params, random_batch, kind):
    recurrent, plain = tiny(memory=kind), tiny(**PLAIN)
    shared = random_params(plain)
    off = {
        name: np.zeros_like(array) for name, array in random_params(recurrent).items() if table(recurrent)[name].memory
    }
    assert set(off) == {"gamma", "memory_key", "memory_value", "memory_gate"}
    tokens, _ = random_batch(plain)
    positions = jnp.arange(8)[None]
    memory = jnp.asarray(np.random.default_rng(3).normal(size=(2, 8, 16)), jnp.float32)

    # Not jitted, so that every operation runs alone: fusing could round α x + β x⁰ in another order.
    def outputs(config, params, memory):
        decoder = Decoder(config)
        out = decoder.apply({"params": params}, tokens, positions, memory)
        return out, decoder.apply({"params": params}, out.hidden_BxPxD, method=Decoder.logits)

    expected = outputs(plain, shared, None)
    for given in (None, memory):
        jax.tree.map(np.testing.assert_array_equal, outputs(recurrent, shared | off, given), expected)
    jax.tree.map(np.testing.assert_array_equal, outputs(plain, shared, memory), expected)
    # The comparison can fail: each memory parameter alone changes the output.
    on = random_params(recurrent)
    for name in ("gamma", "memory_value", "memory_gate"):
        changed = outputs(recurrent, shared | off | {name: on[name]}, memory)
        assert not np.array_equal(changed[1], expected[1]), name


def test_1_plain_model_has_no_memory_parameters(tiny):
    plain = table(tiny(**PLAIN))
    assert not any(spec.memory for spec in plain.values())
    assert not [name for name in plain if "memory" in name or name == "gamma"]
    assert set(table(tiny())) - set(plain) == {"gamma", "memory_key", "memory_value", "memory_gate"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_2_as_many_subsets_as_positions_is_sequential_decoding(x64, tiny, random_params, random_batch, variant):
    config = tiny(dtype="float64", **VARIANTS[variant])
    params, batch = random_params(config), random_batch(config)
    outcome = run(config, params, batch, subsets=config.sequence_length, unroll=False)
    expected = sequential(config, params, batch)
    np.testing.assert_allclose(outcome.merged_losses_BxT, expected, **EXACT)
    # Every position but the first differs from the initialization forward: memory matters.
    assert np.all(np.abs(expected - outcome.token_losses_FxBxT[0])[:, 1:] > 1e-6)


def test_2_fewer_subsets_are_exact_only_where_all_the_past_is_fresh(x64, tiny, random_params, random_batch):
    config = tiny(dtype="float64")
    params, batch = random_params(config), random_batch(config)
    merged = run(config, params, batch, subsets=2).merged_losses_BxT
    expected = sequential(config, params, batch)
    np.testing.assert_allclose(merged[:, :2], expected[:, :2], **EXACT)
    assert np.all(np.abs(merged - expected)[:, 2:] > 1e-9)


@pytest.mark.parametrize("variant", ["shared", "layerwise, source 1, alternate"])
def test_5_decoding_without_memory_is_the_initialization_forward(x64, tiny, random_params, random_batch, variant):
    config = tiny(dtype="float64", **VARIANTS[variant])
    params, batch = random_params(config), random_batch(config)
    without = sequential(config, params, batch, use_memory=False)
    np.testing.assert_allclose(without, run(config, params, batch, name="plain").token_losses_FxBxT[0], **EXACT)
    assert np.all(np.abs(without - sequential(config, params, batch))[:, 1:] > 1e-6)


def test_6_no_forward_sees_a_later_position(tiny, random_params):
    config = tiny(scan_layers=True)
    params = random_params(config)
    length = config.sequence_length
    # All tokens differ, so the gradient by a token's embeddings is the gradient by its position.
    tokens = np.random.default_rng(0).permutation(config.vocab_size)[None, :length].astype(np.int32)
    targets = np.zeros_like(tokens)
    names = ("embedding", "value_embedding")

    for schedule in (ScheduleConfig(subsets=2), ScheduleConfig(name="plain")):
        built = schedules.build(schedule, length)

        def losses(embeddings, built=built):
            outcome = built(Decoder(config), params | embeddings, tokens, targets)
            return outcome.token_losses_FxBxT[:, 0], outcome.masks_FxT

        jacobians, masks_FxT = jax.jit(jax.jacrev(losses, has_aux=True))({name: params[name] for name in names})
        vocabulary_axis = {"embedding": 2, "value_embedding": 3}
        for name in names:
            by_token = np.moveaxis(np.asarray(jacobians[name]), vocabulary_axis[name], 2)[:, :, tokens[0]]
            reach_FxTxT = np.abs(by_token).reshape(*by_token.shape[:3], -1).max(axis=-1)
            computed_FxTx1 = np.asarray(masks_FxT)[:, :, None]
            later_TxT = np.triu(np.ones((length, length), bool), 1)
            assert not reach_FxTxT[:, later_TxT].any(), (schedule.name, name)
            assert np.all((reach_FxTxT > 0) == (computed_FxTx1 & ~later_TxT[None])), (schedule.name, name)


@pytest.fixture(scope="module")
def reference(tiny, random_params, random_batch):
    """Loss and gradients of the unrolled program that test 7 compares others with."""
    with jax.enable_x64(True):
        config = tiny(dtype="float64", memory="layerwise", value_embeddings="alternate")
        params, batch = random_params(config), random_batch(config, rows=4)
        return config, params, batch, loss_and_gradients(config, params, batch, unroll=True)


def loss_and_gradients(config, params, batch, **schedule):
    built = schedules.build(ScheduleConfig(subsets=2, **schedule), config.sequence_length)
    objective = jax.value_and_grad(lambda params, *batch: built(Decoder(config), params, *batch).loss)
    return jax.jit(objective)(params, *batch)


@pytest.mark.parametrize(
    ("model", "unroll"),
    [
        ({}, False),
        ({"scan_layers": True}, False),
        ({"remat": True}, True),
        ({"scan_layers": True, "remat": True}, True),
    ],
    ids=["scan subsets", "scan layers", "scan subsets, remat", "scan both, remat"],
)
def test_7_scanned_and_rematerialized_programs_compute_the_same(x64, tiny, reference, model, unroll):
    _, params, batch, expected = reference
    assert np.isfinite(expected[0]) and all(np.abs(grad).max() > 1e-6 for grad in expected[1].values())
    changed = tiny(dtype="float64", memory="layerwise", value_embeddings="alternate", **model)
    found = loss_and_gradients(changed, params, batch, unroll=unroll)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, expected)


@pytest.mark.parametrize("accumulation", [4])
def test_7_accumulated_gradients_are_those_of_the_whole_batch(x64, reference, accumulation):
    config, params, batch, (loss, grads) = reference
    # ε of 1 keeps Adam's first update from hiding the gradient's scale.
    adamw = optimizer.build(OptimizerConfig(name="adamw", eps=1.0), table(config), steps=10)
    schedule = ScheduleConfig(subsets=2, unroll=False)
    train = step.build(
        Decoder(config),
        schedules.build(schedule, config.sequence_length),
        adamw,
        schedules.forward_names(schedule),
        accumulation,
    )
    arrays = jax.tree.map(jnp.array, params)
    updates, _ = adamw.update(grads, adamw.init(arrays), arrays)
    expected = {name: params[name] + np.asarray(update) for name, update in updates.items()}
    after, metrics = train(state.TrainState(jnp.zeros((), jnp.int32), arrays, adamw.init(arrays)), *batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **EXACT), after.params, expected)
    np.testing.assert_allclose(metrics["train/loss"], loss, **EXACT)
    norm = np.sqrt(sum(np.sum(np.square(grad)) for grad in grads.values()))
    np.testing.assert_allclose(metrics["train/grad_norm"], norm, **EXACT)
    parts = [metrics[f"train/loss_{name}"] for name in schedules.forward_names(schedule)]
    np.testing.assert_allclose(np.mean(parts), loss, **EXACT)
    assert after.step == 1


def test_loss_weights_choose_between_forwards(tiny, random_params, random_batch):
    config = tiny()
    params, batch = random_params(config), random_batch(config)
    outcome = run(config, params, batch, subsets=2, loss_weights=(0.0, 1.0, 3.0))
    losses = np.asarray(outcome.forward_losses_F)
    np.testing.assert_allclose(outcome.loss, (losses[1] + 3 * losses[2]) / 4, rtol=1e-6)
    computed = np.asarray(outcome.token_losses_FxBxT)
    np.testing.assert_allclose(
        losses, [computed[0].mean(), computed[1][:, ::2].mean(), computed[2][:, 1::2].mean()], rtol=1e-6
    )
    np.testing.assert_array_equal(outcome.merged_losses_BxT, computed[1] + computed[2])


def test_training_lowers_the_loss(tiny, random_batch):
    config = tiny(sequence_length=16, scan_layers=True)
    schedule = ScheduleConfig(subsets=2, unroll=False)
    muon = optimizer.build(OptimizerConfig(), table(config), steps=30)
    decoder = Decoder(config)
    train = step.build(decoder, schedules.build(schedule, 16), muon, schedules.forward_names(schedule))
    current = state.create(decoder, muon, make_mesh(MeshConfig()), seed=0)
    batch = random_batch(config, rows=4)
    losses = []
    for _ in range(30):
        current, metrics = train(current, *batch)
        losses.append({name: float(value) for name, value in metrics.items()})
    np.testing.assert_allclose(losses[0]["train/loss"], np.log(config.vocab_size), rtol=0.01)
    for name in ("train/loss", "train/loss_init", "train/loss_subset_0", "train/loss_subset_1"):
        assert losses[-1][name] < 0.7 * losses[0][name], name
    assert current.step == 30
