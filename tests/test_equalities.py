"""The equalities of the method (docs of record: "Equalities that must hold"), each able to fail.

Parameters are random throughout (conftest), so that no term is hidden by a neutral initial value.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrt_jax.inference import scoring
from lrt_jax.method import schedules
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.model.parameters import table
from lrt_jax.setup.config import ScheduleConfig

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64: everything but the order of sums
PLAIN = {"memory": "none", "residual_injection": False}

MEMORIES = {
    "shared": {"memory": "shared"},
    "layerwise": {"memory": "layerwise"},
    "residual only": {"memory": "none"},
}
WINDOWS = ("SL", "L")
KV_HEADS = (1, 4)  # of 4 query heads
SOURCES = ("1", "final")
SWITCHES = (  # that have nothing to do with memory
    {"scan_layers": True},
    {"scan_layers": True, "value_embeddings": "alternate", "beta": False},
    {"scan_layers": True, "alpha": False, "gate_width": 4},
    {"scan_layers": False, "value_embeddings": "none"},
)
# Of all 96 models six; test_spec.py has random ones, which may be anything.
CHOICES = [
    (memory, WINDOWS[(i + j // 2) % 2], KV_HEADS[(i // 2 + j // 2) % 2], SOURCES[(i + j) // 2 % 2], j)
    for (i, memory), j in itertools.product(enumerate(MEMORIES), range(len(SWITCHES)))
    if (i + j) % 2 == 0
]
COMBINATIONS = {
    f"{memory}, {windows}, {kv_heads} kv, source {source}": {
        **MEMORIES[memory],
        **{"window_pattern": windows, "kv_heads": kv_heads, "source_layer": source},
        **SWITCHES[switches],
    }
    for memory, windows, kv_heads, source, switches in CHOICES
}
COMBINATIONS["shared, upper layers"] = {"memory_layers": "2-3", "layers": 3, "scan_layers": True, "source_layer": "2"}
COMBINATIONS["layerwise, middle layer"] = {"memory": "layerwise", "memory_layers": "2-2", "layers": 3}
COMBINATIONS["shared, no residual"] = {"residual_injection": False, "kv_heads": 2, "scan_layers": True}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_every_choice_is_in_a_combination():
    every = [MEMORIES, WINDOWS, KV_HEADS, SOURCES, range(len(SWITCHES))]
    assert [set(chosen) for chosen in zip(*CHOICES, strict=True)] == [set(of) for of in every]
    # Each memory is in models with either window, and with one and several KV heads.
    assert len({choice[:2] for choice in CHOICES}) == len({(choice[0], choice[2]) for choice in CHOICES}) == 6
    assert len(COMBINATIONS) == len(CHOICES) + 3


def run(config, params, batch, **schedule):
    """The outcome of a schedule, by default interleaved."""
    built = schedules.build(ScheduleConfig(**schedule), config.sequence_length)
    return jax.jit(lambda params, *batch: built(Model(Decoder(config), params), *batch))(params, *batch)


def sequential(config, params, batch, **options):
    return jax.jit(lambda params, *batch: scoring.score(Model(Decoder(config), params), *batch, **options).losses_BxT)(
        params, *batch
    )


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_1_memory_switched_off_is_the_plain_baseline_to_the_bit(tiny, random_params, random_batch, combination):
    recurrent = tiny(**COMBINATIONS[combination])
    plain = tiny(**COMBINATIONS[combination] | PLAIN)
    shared = random_params(plain)
    off = {
        name: np.zeros_like(array) for name, array in random_params(recurrent).items() if table(recurrent)[name].memory
    }
    assert off and set(off) <= {"gamma", "memory_key", "memory_value", "memory_gate"}
    tokens, _ = random_batch(plain)
    positions = jnp.arange(8)[None]
    memory = jnp.asarray(np.random.default_rng(3).normal(size=(2, 8, 16)), jnp.float32)

    # Not jitted, so that every operation runs alone: fusing could round α x + β x⁰ in another order.
    def outputs(config, params, memory):
        out, model = Model(Decoder(config), params)(tokens, positions, memory)
        return out, model.logits(out.hidden_BxPxD)

    expected = outputs(plain, shared, None)
    for given in (None, memory):
        jax.tree.map(np.testing.assert_array_equal, outputs(recurrent, shared | off, given), expected)
    jax.tree.map(np.testing.assert_array_equal, outputs(plain, shared, memory), expected)
    # The comparison can fail: each memory parameter alone changes the output.
    on = random_params(recurrent)
    for name in off:
        changed = outputs(recurrent, shared | off | {name: on[name]}, memory)
        assert not np.array_equal(changed[1], expected[1]), name


@pytest.mark.parametrize("program", [{}, {"scan_layers": True}, {"scan_layers": True, "remat": True}], ids=str)
@pytest.mark.parametrize("source", [1, 2])
def test_a_source_state_is_what_a_model_of_so_many_layers_ends_with(tiny, random_params, random_batch, source, program):
    whole = tiny(layers=3, source_layer=str(source), window_pattern="L", **program)
    first = tiny(layers=source, window_pattern="L", **program)
    params = random_params(whole)
    cut = {
        name: params[name][:source] if spec.axes[0] == "layers" else params[name] for name, spec in table(whole).items()
    }
    tokens, _ = random_batch(whole)

    def out(config, params):
        return Model(Decoder(config), params)(tokens, jnp.arange(8)[None])[0]

    found, expected = out(whole, params), out(first, cut)
    np.testing.assert_allclose(found.source_BxPxD, expected.hidden_BxPxD, rtol=1e-5, atol=1e-5)
    assert np.abs(found.source_BxPxD - found.hidden_BxPxD).max() > 0.1


def test_1_plain_model_has_no_memory_parameters(tiny):
    plain = table(tiny(**PLAIN))
    assert not any(spec.memory for spec in plain.values())
    assert not [name for name in plain if "memory" in name or name == "gamma"]
    assert set(table(tiny())) - set(plain) == {"gamma", "memory_key", "memory_value", "memory_gate"}


@pytest.fixture(scope="module", params=COMBINATIONS, ids=str)
def computed(request, tiny, random_params, random_batch):
    """Every way to compute the same losses [B, T], of one combination, in one program."""
    config = tiny(dtype="float64", **COMBINATIONS[request.param])
    length = config.sequence_length
    schedule = {
        "interleaved": ScheduleConfig(subsets=length, unroll=False),
        "interleaved, random": ScheduleConfig(subsets=2, partition="random", unroll=False),
        "refined": ScheduleConfig(name="multi_refinement", refinements=length - 1, unroll=False),
        "chunked": ScheduleConfig(name="chunked", chunks=length, unroll=False),
        "one chunk": ScheduleConfig(name="chunked", chunks=1, unroll=False),
        "sequential": ScheduleConfig(name="sequential"),
        "plain": ScheduleConfig(name="plain"),
    }

    def everything(params, *batch):
        model = Model(Decoder(config), params)
        built = {name: schedules.build(one, length)(model, *batch) for name, one in schedule.items()}
        merged = {name: outcome.merged_losses_BxT for name, outcome in built.items()}
        decoded = {flag: scoring.score(model, *batch, use_memory=flag).losses_BxT for flag in (True, False)}
        return built, merged, decoded

    with jax.enable_x64(True):
        return jax.device_get(jax.jit(everything)(random_params(config), *random_batch(config)))


def test_2_as_many_subsets_as_positions_is_sequential_decoding(computed):
    outcomes, merged, decoded = computed
    np.testing.assert_allclose(merged["interleaved"], decoded[True], **EXACT)
    # Every position but the first differs from the initialization forward: memory matters.
    assert np.all(np.abs(decoded[True] - outcomes["interleaved"].token_losses_FxBxT[0])[:, 1:] > 1e-6)
    # With fewer subsets some past is not fresh, and the numbers differ.
    assert not np.allclose(merged["interleaved, random"], decoded[True], atol=1e-9)


def test_3_and_4_each_refinement_makes_one_more_position_exact(computed):
    outcomes, _, decoded = computed
    losses_FxBxT = outcomes["refined"].token_losses_FxBxT
    length = decoded[True].shape[1]
    np.testing.assert_allclose(losses_FxBxT[-1], decoded[True], **EXACT)
    for k in range(length):
        np.testing.assert_allclose(losses_FxBxT[k][:, : k + 1], decoded[True][:, : k + 1], **EXACT)
        assert np.all(np.abs(losses_FxBxT[k] - decoded[True])[:, k + 1 : k + 2] > 1e-10), k
    np.testing.assert_allclose(outcomes["refined"].sources_BxTxD, outcomes["interleaved"].sources_BxTxD, **EXACT)


def test_the_sequential_schedule_and_single_chunks_are_sequential_decoding(computed):
    outcomes, merged, decoded = computed
    for name in ("sequential", "chunked"):
        np.testing.assert_allclose(merged[name], decoded[True], **EXACT)
        np.testing.assert_allclose(outcomes[name].sources_BxTxD, outcomes["interleaved"].sources_BxTxD, **EXACT)


def test_5_decoding_without_memory_is_the_initialization_forward(computed):
    outcomes, _, decoded = computed
    for name in ("plain", "one chunk", "interleaved", "refined"):
        np.testing.assert_allclose(outcomes[name].token_losses_FxBxT[0], decoded[False], **EXACT)


def test_2_fewer_subsets_are_exact_only_where_all_the_past_is_fresh(x64, tiny, random_params, random_batch):
    config = tiny(dtype="float64")
    params, batch = random_params(config), random_batch(config)
    merged = run(config, params, batch, subsets=2).merged_losses_BxT
    expected = sequential(config, params, batch)
    np.testing.assert_allclose(merged[:, :2], expected[:, :2], **EXACT)
    assert np.all(np.abs(merged - expected)[:, 2:] > 1e-9)
