"""The health of the recurrence, against the schedules that compute the same."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrt_jax.evaluation import health
from lrt_jax.method import schedules
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.setup.config import Config, EvalConfig, MeshConfig, ScheduleConfig, TrainConfig
from lrt_jax.setup.mesh import make_mesh

PASSES = 3


def measured(config, params, batch, counted):
    run = Config(config, TrainConfig(batch_size=2, steps=1), eval=EvalConfig(passes=PASSES))
    program = health.program(run, make_mesh(MeshConfig()))
    sums = program(Model(Decoder(config), params), *batch, counted)
    sums = {name: np.asarray(array, np.float64) for name, array in sums.items()}
    return health.metrics(sums, config.memory_range, float)


@pytest.mark.parametrize(
    "model", [{"scan_layers": True, "memory_layers": "2-2"}, {"memory": "layerwise"}, {"memory": "none"}], ids=str
)
def test_metrics_are_those_of_repeated_forwards(tiny, random_params, random_batch, model):
    config = tiny(**model)
    params, batch = random_params(config), random_batch(config, rows=4)
    counted = np.random.default_rng(0).random(batch[0].shape) < 0.7
    found = measured(config, params, batch, counted)

    model = Model(Decoder(config), params)

    read = jax.jit(lambda states: _outputs(model, batch, states))
    built = schedules.build(ScheduleConfig(name="multi_refinement", refinements=PASSES), config.sequence_length)
    outcome = jax.jit(lambda model: built(model, *batch))(model)
    for k in range(1, PASSES + 1):
        expected = np.sum(np.asarray(outcome.token_losses_FxBxT[k]) * counted)
        np.testing.assert_allclose(found[f"val/bpb_after_{k}"], expected, rtol=1e-5)

    states = [np.zeros_like(outcome.sources_BxTxD)]
    for _ in range(PASSES + 1):
        states.append(np.asarray(read(states[-1])[0]))
    last = states[-1]
    changes = [np.sqrt(np.sum(((b - a) * counted[..., None]) ** 2)) for a, b in itertools.pairwise(states)]
    np.testing.assert_allclose(found["val/contraction"], changes[-1] / changes[-2], rtol=1e-3)
    shuffled = np.roll(last, 1, axis=0)  # all rows count
    np.testing.assert_allclose(found["val/bpb_memory/shuffled"], np.sum(read(shuffled)[1] * counted), rtol=1e-5)
    # No memory is so old within so short a context: what is read is zero.
    assert config.sequence_length == health.OLD
    np.testing.assert_allclose(
        found["val/bpb_memory/old"], np.sum(np.asarray(outcome.token_losses_FxBxT[0]) * counted), rtol=1e-5
    )
    gates = [found[name] for name in sorted(found) if name.startswith("memory/gate/")]
    assert len(gates) == len(set(gates)) == (len(config.memory_range) if config.projects_memory else 0)
    assert all(0 < gate < 2 for gate in gates)
    gammas = [found[f"memory/gamma/{layer + 1}"] for layer in config.memory_range]
    np.testing.assert_allclose(gammas, params["gamma"][config.memory_range.start :], rtol=1e-5)


def _outputs(model, batch, states):
    memory = jnp.pad(states[:, :-1], ((0, 0), (1, 0), (0, 0)))
    out, _ = model(batch[0], np.arange(model.config.sequence_length)[None], memory)
    return out.source_BxPxD, model.losses(out.hidden_BxPxD, batch[1])


def test_nothing_is_measured_where_there_is_no_memory_or_no_pass(tiny):
    mesh = make_mesh(MeshConfig())
    plain = tiny(memory="none", residual_injection=False)
    schedule, train = ScheduleConfig(name="plain"), TrainConfig(batch_size=2, steps=1)
    assert health.program(Config(plain, train, schedule=schedule), mesh) is None
    assert health.program(Config(tiny(), train, eval=EvalConfig(passes=0)), mesh) is None
    assert list(health.lines({"val/bpb_init": 2.0})) == []


def test_decoding_that_is_worse_than_training_shows_is_said():
    assert health.warning({"val/bpb_sequential": 1.51, "val/bpb": 1.5}, 0.01) is None
    line = health.warning({"val/bpb_sequential": 1.53, "val/bpb": 1.5}, 0.01)
    assert "2.0% above val/bpb (merged)" in line and "allows 1.0%" in line and "\n" not in line


def test_the_table_shows_what_was_measured():
    scores = {"val/bpb_init": 2.0, "val/bpb_after_1": 1.5, "val/bpb_after_2": 1.25, "val/contraction": 0.125}
    scores |= {"val/bpb_memory/shuffled": 1.75, "val/bpb_memory/old": 1.875}
    scores |= {f"memory/{name}/{layer}": layer / 8 for name in ("gate", "gamma") for layer in (1, 2)}
    text = "\n".join(health.lines(scores))
    for number in ("2.0000   1.5000   1.2500", "1.7500", "1.8750", "0.125"):
        assert number in text
    assert text.count("0.125    0.250") == 2
