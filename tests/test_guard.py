"""Bad steps are told from good ones on the device, and their updates held back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrt_jax.setup.config import TrainConfig
from lrt_jax.training import guard

NAN, INF = float("nan"), float("inf")


def judged(values, **fields) -> tuple[list[bool], guard.Running]:
    """The verdicts on (loss, gradient norm) one after the other, as one compiled program."""
    config = TrainConfig(batch_size=1, steps=1, **fields)

    def one(running, value):
        ok, running = guard.judge(running, value[0], value[1], config)
        return running, ok

    running, verdicts = jax.jit(lambda values: jax.lax.scan(one, guard.fresh(), values))(jnp.array(values, jnp.float32))
    return verdicts.tolist(), running


@pytest.mark.parametrize("bad", [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (-INF, 1.0)])
def test_what_is_not_finite_is_bad(bad):
    verdicts, running = judged([(2.0, 1.0), bad, (2.0, 1.0)], on_bad_step="skip")
    assert verdicts == [True, False, True]
    assert (int(running.good), int(running.bad), int(running.in_a_row)) == (2, 1, 0)
    assert np.isfinite(running.loss) and np.isfinite(running.grad_norm)


def test_after_a_bad_step_all_are_held_back_until_the_run_has_stopped():
    verdicts, running = judged([(2.0, 1.0), (NAN, 1.0), (2.0, 1.0), (2.0, 1.0)], on_bad_step="stop")
    assert verdicts == [True, False, False, False]
    assert int(running.in_a_row) == 3


@pytest.mark.parametrize("bad", [(7.0, 1.0), (2.0, 3.5)])
def test_a_spike_is_told_by_the_running_mean_once_there_is_one(bad):
    steady = [(2.0, 1.0)] * guard.WARMUP
    verdicts, running = judged([bad, *steady, bad, (2.0, 1.0)], on_bad_step="skip", spike_factor=3.0)
    assert verdicts == [True] * (guard.WARMUP + 1) + [False, True]
    assert int(running.bad) == 1
    assert all(judged([*steady, bad], on_bad_step="skip")[0])  # not asked for
    assert all(judged([*steady, (5.9, 2.9)], on_bad_step="skip", spike_factor=3.0)[0])


def test_a_mean_that_drifts_is_followed():
    falling = [(10.0 * 0.98**i, 5.0 * 0.98**i) for i in range(200)]
    assert all(judged(falling, on_bad_step="skip", spike_factor=2.0)[0])


def test_updates_are_chosen_whole():
    old, new = (
        {"a": jnp.zeros(3), "b": jnp.zeros((), jnp.int32)},
        {"a": jnp.ones(3) * NAN, "b": jnp.ones((), jnp.int32)},
    )
    kept = guard.choose(jnp.array(False), new, old)
    assert kept["a"].tolist() == [0, 0, 0] and int(kept["b"]) == 0
    assert int(guard.choose(jnp.array(True), new, old)["b"]) == 1


def test_poisoned_arrays_are_named():
    tree = {"fine": jnp.ones(3), "steps": jnp.ones(2, jnp.int32), "mu": {"query": jnp.array([1.0, INF])}}
    assert guard.not_finite(tree) == ["['mu']['query']"]
    assert guard.not_finite({"fine": jnp.ones(3)}) == []


def test_a_report_names_layers_and_tells_whether_it_repeats():
    def gradient(params, tokens_BxT, targets_BxT):
        grads = {"stack": params["stack"].at[1].set(NAN), "single": params["single"]}
        return {"train/loss": jnp.float32(2.0)}, grads

    params = {"stack": jnp.ones((3, 4)), "single": jnp.full(4, -2.0)}
    statistics = jax.device_get(guard.statistics(gradient, {"stack"})(params, jnp.zeros(1), jnp.zeros(1)))
    lines = list(guard.report(7, {"train/loss": 2.0}, statistics, ["row 0: 'text'"], repeats=True))
    assert lines[0] == "step 7 is bad: train/loss 2" and lines[1] == "computed again: the same"
    table = {line.split()[0]: line.split()[1:] for line in lines[3:7]}
    assert table == {"single": ["2", "4", "0"], "stack[0]": ["1", "2", "0"], "stack[1]": ["1", "nan", "4"]} | {
        "stack[2]": ["1", "2", "0"]
    }
    assert lines[-1] == "row 0: 'text'"
    differs = list(guard.report(7, {"train/loss": NAN}, statistics, [], repeats=True))[1]
    assert "computed again: train/loss 2; the device or its memory may be at fault" in differs
