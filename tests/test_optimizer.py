import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lrt_jax.model.parameters import table
from lrt_jax.setup.config import OptimizerConfig
from lrt_jax.training.optimizer import build, rate_shape

RATES = {
    "embedding": "embedding_lr",
    "head": "head_lr",
    "alpha": "alpha_lr",
    "beta": "scalar_lr",
    "gamma": "scalar_lr",
}


def as_matrices(array, spec):
    """A stack of matrices, inputs × outputs: one per layer."""
    stack = array.shape[:1] if spec.axes[0] == "layers" else (1,)
    inputs = np.prod([array.shape[axis] for axis in spec.inputs], dtype=int)
    return np.asarray(array).reshape(*stack, inputs, -1)


def well_conditioned(spec, rng):
    """A gradient with singular values between 0.3 and 1, which Newton-Schulz can orthogonalize."""
    matrices = as_matrices(rng.normal(size=spec.shape), spec)
    u, s, vt = np.linalg.svd(matrices, full_matrices=False)
    return (u * rng.uniform(0.3, 1.0, s.shape)[:, None, :] @ vt).reshape(spec.shape).astype(np.float32)


def first_update(config, parameters, grads, params, steps=100):
    chain = build(config, parameters, steps)
    updates, _ = jax.jit(chain.update)(grads, chain.init(params), params)
    return {name: np.asarray(update) for name, update in updates.items()}


@pytest.mark.parametrize("memory", ["shared", "layerwise"])
def test_muon_orthogonalizes_matrices_and_adam_takes_the_rest(tiny, random_params, memory):
    model, config = tiny(memory=memory), OptimizerConfig()
    parameters, params = table(model), random_params(model)
    rng = np.random.default_rng(0)
    grads = {
        name: well_conditioned(spec, rng) if spec.group == "matrix" else rng.normal(size=spec.shape).astype(np.float32)
        for name, spec in parameters.items()
    }
    updates = first_update(config, parameters, grads, params)
    assert {spec.group for spec in parameters.values()} == {"matrix", *RATES}
    for name, spec in parameters.items():
        if spec.group == "matrix":
            update, grad = as_matrices(updates[name], spec), as_matrices(grads[name], spec)
            scale = config.muon_lr * np.sqrt(max(1.0, update.shape[2] / update.shape[1]))
            singular = np.linalg.svd(update, compute_uv=False) / scale
            assert singular.min() > 0.5 and singular.max() < 1.5, (name, singular)
            assert np.all(np.sum(update * grad, axis=(1, 2)) < 0), name
        else:
            # Adam's first update is the rate times the sign.
            expected = -getattr(config, RATES[spec.group]) * np.sign(grads[name])
            np.testing.assert_allclose(updates[name], expected, rtol=1e-4, err_msg=name)


def test_muon_is_that_of_optax_with_its_state(tiny, random_params):
    """Several steps, in which momentum and its bias corrections count; old checkpoints hold optax's state."""
    model = tiny(memory="shared")
    matrices = {name: spec for name, spec in table(model).items() if spec.group == "matrix"}
    config = OptimizerConfig(warmup=0.0, warmdown=0.0, weight_decay=0.0, momentum_warmup=3)
    ours = build(config, matrices, 10)

    def numbers(spec):
        outputs = tuple(range(spec.inputs[-1] + 1, len(spec.shape)))
        return optax.contrib.MuonDimensionNumbers(reduction_axis=spec.inputs, output_axis=outputs)

    beta = optax.schedules.linear_schedule(config.momentum_start, config.momentum, 3)
    names = ("ns_coeffs", "ns_steps", "eps", "mu_dtype", "nesterov", "adaptive", "preconditioning")
    theirs = optax.inject_hyperparams(optax.contrib.scale_by_muon, static_args=(*names, "weight_dimension_numbers"))(
        beta=beta, weight_dimension_numbers=lambda _: {name: numbers(spec) for name, spec in matrices.items()}
    )
    params = {name: array for name, array in random_params(model).items() if name in matrices}
    mine, reference = ours.init(params), theirs.init(params)
    update, update_theirs = jax.jit(ours.update), jax.jit(theirs.update)
    for seed in range(4):
        grads = {name: array for name, array in random_params(model, seed=seed).items() if name in matrices}
        updates, mine = update(grads, mine, params)
        expected, reference = update_theirs(grads, reference, params)
        for name, spec in matrices.items():
            _, inputs, outputs = spec.matrices
            scale = -config.muon_lr * max(1.0, outputs / inputs) ** 0.5
            np.testing.assert_allclose(updates[name], scale * expected[name], rtol=1e-5, atol=1e-8, err_msg=name)
    states = [
        state
        for state in jax.tree.leaves(mine, is_leaf=lambda leaf: isinstance(leaf, type(reference)))
        if isinstance(state, type(reference))
    ]
    assert len(states) == 1 and jax.tree.structure(states[0]) == jax.tree.structure(reference)
    jax.tree.map(np.testing.assert_allclose, states[0], reference)


def test_adamw_takes_matrices_too(tiny, random_params):
    model, config = tiny(), OptimizerConfig(name="adamw")
    grads = random_params(model, seed=1)
    updates = first_update(config, table(model), grads, random_params(model))
    np.testing.assert_allclose(updates["query"], -config.matrix_lr * np.sign(grads["query"]), rtol=1e-3)


def test_a_plain_model_needs_no_other_groups(tiny, random_params):
    model = tiny(memory="none", residual_injection=False, alpha=False, beta=False, value_embeddings="none")
    grads = random_params(model, seed=1)
    updates = first_update(OptimizerConfig(clip=1.0), table(model), grads, random_params(model))
    assert set(updates) == set(grads)
    assert all(np.isfinite(update).all() and update.any() for update in updates.values())


def test_weights_of_matrices_decay_and_no_others(tiny, random_params):
    model = tiny()
    params = random_params(model)
    config = OptimizerConfig(name="adamw", weight_decay=0.1, warmdown=0.0)
    chain = build(config, table(model), 10)
    update, opt_state = jax.jit(chain.update), chain.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for at in range(3):
        updates, opt_state = update(zeros, opt_state, params)
        decay = 0.1 * (1 - at / 10)
        for name, spec in table(model).items():
            expected = -config.matrix_lr * decay * params[name] * (spec.group == "matrix")
            np.testing.assert_allclose(updates[name], expected, rtol=1e-5, atol=1e-12, err_msg=f"{name} {at}")


def test_clipping_scales_all_gradients_together(tiny, random_params):
    model = tiny()
    parameters, params, grads = table(model), random_params(model), random_params(model, seed=1)
    norm = float(optax.tree.norm(grads))
    # A large ε makes Adam's update follow the gradient's scale.
    free = OptimizerConfig(name="adamw", eps=10.0)
    clipped = OptimizerConfig(name="adamw", eps=10.0, clip=norm / 8)
    expected = first_update(free, parameters, jax.tree.map(lambda grad: grad / 8, grads), params)
    found = first_update(clipped, parameters, grads, params)
    for name in parameters:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-9, err_msg=name)
    loose = first_update(OptimizerConfig(name="adamw", eps=10.0, clip=norm * 2), parameters, grads, params)
    unclipped = first_update(free, parameters, grads, params)
    for name in parameters:
        np.testing.assert_allclose(loose[name], unclipped[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"warmup": 0.1, "warmdown": 0.4, "final_lr": 0.1}, {0: 1 / 11, 5: 6 / 11, 10: 1, 60: 1, 80: 0.55, 100: 0.1}),
        ({"warmup": 0.0, "warmdown": 0.5, "final_lr": 0.0}, {0: 1, 50: 1, 75: 0.5, 99: 0.02, 100: 0}),
        ({"warmup": 0.0, "warmdown": 0.0}, {0: 1, 50: 1, 99: 1}),
        ({"warmup": 0.5, "warmdown": 0.5}, {0: 1 / 51, 50: 1, 75: 0.5}),
    ],
)
def test_rate_shape(fields, values):
    shape = rate_shape(OptimizerConfig(**fields), 100)
    np.testing.assert_allclose([shape(jnp.asarray(at)) for at in values], list(values.values()), rtol=1e-5, atol=1e-6)


def test_the_rate_falls_in_the_updates(tiny, random_params):
    model = tiny()
    params, grads = random_params(model), random_params(model, seed=1)
    config = OptimizerConfig(name="adamw", warmdown=1.0)
    chain = build(config, table(model), 4)
    update, opt_state = jax.jit(chain.update), chain.init(params)
    for at in range(4):
        updates, opt_state = update(grads, opt_state, params)
        expected = config.embedding_lr * (1 - at / 4)
        np.testing.assert_allclose(np.abs(updates["embedding"]), np.full((40, 16), expected), rtol=1e-3)
