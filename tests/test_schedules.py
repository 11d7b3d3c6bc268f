"""Schedules as users configure them: weights, stages, what is counted and what is learned."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrt_jax.method import forwards, schedules
from lrt_jax.model import costs
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.memory import shift_right
from lrt_jax.model.model import Model
from lrt_jax.model.parameters import table
from lrt_jax.setup.config import Config, ConfigError, MeshConfig, OptimizerConfig, ScheduleConfig, TrainConfig, validate
from lrt_jax.setup.mesh import make_mesh
from lrt_jax.setup.schedule import SCHEDULES, Description, Pass
from lrt_jax.topology import programs, traffic
from lrt_jax.training import optimizer, state, step


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


ALL = {
    "plain": (ScheduleConfig(name="plain"), 1.0, ["init"]),
    "interleaved": (ScheduleConfig(subsets=4), 2.0, ["init", "subset_0", "subset_1", "subset_2", "subset_3"]),
    "multi_refinement": (
        ScheduleConfig(name="multi_refinement", refinements=3),
        4.0,
        ["init", "refinement_1", "refinement_2", "refinement_3"],
    ),
    "interleaved, settled": (ScheduleConfig(settle=2), 1 + 2 / 3, ["subset_0", "subset_1"]),
    "interleaved, twice": (
        ScheduleConfig(sweeps=2),
        3.0,
        ["init", "subset_0", "subset_1", "sweep_1_subset_0", "sweep_1_subset_1"],
    ),
    "multi_refinement, settled": (
        ScheduleConfig(name="multi_refinement", refinements=1, settle=1),
        1 + 1 / 3,
        ["refinement_1"],
    ),
    "chunked": (ScheduleConfig(name="chunked", chunks=2), 1.0, ["chunk_0", "chunk_1"]),
    "sequential": (ScheduleConfig(name="sequential"), 1.0, ["sequential"]),
}


@pytest.mark.parametrize("name", ALL)
def test_forwards_masks_and_compute_of_every_schedule(tiny, name):
    schedule, equivalent, names = ALL[name]
    config = tiny()
    assert schedules.forward_names(schedule) == names
    assert schedule.forwards == len(names)
    assert costs.forwards_equivalent(config, schedule) == pytest.approx(equivalent)
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in table(config).items()}
    built = schedules.build(schedule, 8)
    outcome = jax.eval_shape(built, Model(Decoder(config), params), tokens, tokens)
    assert outcome.token_losses_FxBxT.shape == (len(names), 2, 8)
    assert outcome.masks_FxT.shape == (len(names), 8)
    assert outcome.forward_losses_F.shape == (len(names),)
    assert outcome.sources_BxTxD.shape == (2, 8, 16)


def test_detached_forwards_learn_nothing_from_later_ones(tiny, random_params, random_batch):
    config = tiny(scan_layers=True)
    params, batch = random_params(config), random_batch(config)

    def gradient(**schedule):
        built = schedules.build(
            ScheduleConfig(name="multi_refinement", refinements=1, loss_weights=(0.0, 1.0), **schedule), 8
        )
        return jax.jit(jax.grad(lambda params: built(Model(Decoder(config), params), *batch).loss))(params)

    # Given the first forward's source states as constants, the second forward alone is what is differentiated.
    first = run(config, params, batch, name="plain").sources_BxTxD
    memory = jnp.pad(first[:, :-1], ((0, 0), (1, 0), (0, 0)))

    def second(params):
        out, model = Model(Decoder(config), params)(batch[0], jnp.arange(8)[None], memory)
        return jnp.mean(model.losses(out.hidden_BxPxD, batch[1]))

    expected = jax.jit(jax.grad(second))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient(detach=True), expected)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(*map(jax.tree.leaves, (gradient(), expected)), strict=True))


@pytest.mark.parametrize(
    ("schedule", "equivalent"),
    [
        ({"name": "plain"}, 1.0),
        ({}, 0.25 + 2 * 0.75),
        ({"name": "multi_refinement", "refinements": 1, "settle": 1}, 0.25 + 0.5 / 3 + 0.75),
        ({"settle": 2}, 0.25 + 0.5 / 3 + 0.75 / 3 + 0.75),
    ],
    ids=str,
)
def test_effective_compute_counts_layers(tiny, schedule, equivalent):
    """Below the band layers are computed once; without gradient a layer counts a third, up to the source layer."""
    config = tiny(layers=4, memory_layers="2-4", source_layer="3")
    assert costs.forwards_equivalent(config, ScheduleConfig(**schedule)) == pytest.approx(equivalent)


@pytest.mark.parametrize("scan", [False, True])
def test_settled_memory_is_that_of_forwards_without_gradient(tiny, random_params, random_batch, scan):
    """A settled schedule is a detached one whose earlier losses weigh nothing, at a third of the cost of each."""
    with jax.enable_x64(True):
        config = tiny(dtype="float64", scan_layers=scan, sequence_length=4)
        params, batch = random_params(config), random_batch(config)

        def of(name, **schedule):
            schedule = ScheduleConfig(name=name, unroll=not scan, **schedule)
            built = schedules.build(schedule, 4)
            return lambda params: built(Model(Decoder(config), params), *batch).loss

        last = {1: (0.0, 1.0), 3: (0.0, 0.0, 0.0, 1.0)}
        refined = {
            count: (
                of("multi_refinement", refinements=1, settle=count),
                of("multi_refinement", refinements=count, detach=True, loss_weights=last[count]),
            )
            for count in last
        }
        # From memory at its fixed point every forward computes what sequential decoding does, and so does any sweep.
        exact = [
            of("sequential"),
            of("multi_refinement", refinements=1, settle=4),
            of("interleaved", settle=4),
            of("interleaved", settle=1, sweeps=2, loss_weights=(0.0, 0.0, 1.0, 1.0)),
        ]
        pairs, values = jax.jit(
            lambda params: (
                jax.tree.map(lambda one: jax.value_and_grad(one)(params), refined),
                [one(params) for one in exact],
            )
        )(params)
        for found, expected in pairs.values():
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, expected)
        np.testing.assert_allclose(values, values[0], rtol=1e-12)


def test_an_interleaved_schedule_may_begin_without_gradient(tiny, random_params, random_batch):
    config = tiny(scan_layers=True)
    params, batch = random_params(config), random_batch(config)
    late, whole, light = (
        run(config, params, batch, **schedule) for schedule in ({"settle": 1}, {}, {"init_weight": 0.5})
    )
    np.testing.assert_allclose(late.forward_losses_F, whole.forward_losses_F[1:], rtol=1e-6)
    np.testing.assert_allclose(late.merged_losses_BxT, whole.merged_losses_BxT, rtol=1e-5)
    init, *subsets = np.asarray(whole.forward_losses_F)
    np.testing.assert_allclose(light.loss, (0.5 * init + sum(subsets)) / 2.5, rtol=1e-6)


@pytest.mark.parametrize(
    "schedule", [{"partition": "random"}, {"name": "multi_refinement", "refinements": 1}], ids=["subsets", "full"]
)
def test_noise_is_drawn_from_the_tokens(tiny, random_params, random_batch, schedule):
    config = tiny(scan_layers=True)
    params, (tokens, targets) = random_params(config), random_batch(config, rows=4)
    plain, jitter, prefix = (
        run(config, params, (tokens, targets), **schedule, **noisy)
        for noisy in ({}, {"jitter": 0.1}, {"plain_prefix": True})
    )
    assert 1e-5 < np.abs(plain.merged_losses_BxT - jitter.merged_losses_BxT)[:, 1:].max() < 0.5
    np.testing.assert_array_equal(plain.token_losses_FxBxT[0], jitter.token_losses_FxBxT[0])  # it reads no memory
    # The first row's first token has no memory, whatever is drawn.
    np.testing.assert_allclose(jitter.merged_losses_BxT[:, 0], plain.token_losses_FxBxT[0][:, 0], rtol=1e-6)
    # Rows in another order have the same noise each, as have rows that another process or microbatch holds.
    order = np.array([2, 0, 3, 1])
    again = run(config, params, (tokens[order], targets[order]), **schedule, jitter=0.1)
    np.testing.assert_allclose(again.merged_losses_BxT, jitter.merged_losses_BxT[order], rtol=1e-5)
    # Up to its prefix a row is computed as by the initialization forward, and not all prefixes are the same.
    same_BxT = np.isclose(prefix.merged_losses_BxT, prefix.token_losses_FxBxT[0], rtol=1e-5)
    lengths = same_BxT.argmin(axis=1)
    assert len(set(lengths.tolist())) > 1 and not same_BxT.all()


@pytest.mark.parametrize(
    ("schedule", "model", "message"),
    [
        ({"name": "chunked", "chunks": 3}, {}, "chunks is 3, which does not divide"),
        ({"kv_refresh": True}, {"memory": "none"}, "kv_refresh is True; it needs memory projections"),
        ({"name": "sequential"}, {"memory": "none", "residual_injection": False}, "trains with: plain"),
        ({"stages": "plain:1"}, {}, "name is 'interleaved'; schedule.stages, which is 'plain:1', needs 'staged'"),
        ({"name": "plain", "kv_refresh": True}, {}, "kv_refresh is True; it is for interleaved training only"),
        ({"name": "chunked", "partition": "random"}, {}, "partition is 'random'; it is for interleaved training only"),
        ({"detach": True}, {}, "detach is True; it is for multi_refinement training only"),
        ({"name": "plain", "settle": 1}, {}, "settle is 1; it is for interleaved and multi_refinement training only"),
        ({"name": "multi_refinement", "loss_weights": (1.0, 2.0)}, {}, "hold 3 numbers"),
        ({"kv_refresh": True}, {"memory_layers": "2-2"}, "kv_refresh is True; it needs memory in all layers"),
        ({}, {"memory_layers": "2-3"}, "memory_layers is '2-3'; it must be 'all' or a band 'a-b' of the layers 1 to 2"),
        (
            {},
            {"memory_layers": "2-2", "source_layer": "1"},
            "memory_layers is '2-2'; it begins above the source layer, 1",
        ),
    ],
)
def test_impossible_schedules_are_explained(tiny, schedule, model, message):
    train = TrainConfig(batch_size=2, steps=4)
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(Config(tiny(**model), train, schedule=ScheduleConfig(**schedule)))


def twice(model, tokens_BxT, targets_BxT):
    """A toy: a second full forward reads the source states of the first, and its loss counts as well."""
    (embedded,) = model.embed(tokens_BxT)
    first, model = forwards.initialization(model, embedded)
    again, model = forwards.full(model, embedded, shift_right(first.source_BxPxD))
    losses = [forwards.token_losses(model, one.hidden_BxPxD, targets_BxT) for one in (first, again)]
    masks_FxT = jnp.ones((2, tokens_BxT.shape[1]), bool)
    return schedules.outcome(jnp.stack(losses), masks_FxT, again.source_BxPxD)


def test_a_schedule_is_one_description_and_one_function(tiny, random_params, random_batch, monkeypatch):
    """Training, metrics, FLOPs, traffic, stages and validation know nothing else of it."""
    description = Description(lambda _: [Pass("first", reads_memory=False), Pass("again")])
    monkeypatch.setitem(SCHEDULES, "twice", description)
    monkeypatch.setitem(schedules.RUN, "twice", lambda config, length: twice)
    schedule, config = ScheduleConfig(name="twice"), tiny()
    run_config = validate(Config(config, TrainConfig(batch_size=2, steps=4), schedule=schedule))
    with pytest.raises(ConfigError, match="hold 2 numbers"):
        validate(dataclasses.replace(run_config, schedule=ScheduleConfig(name="twice", loss_weights=(1.0,))))
    with pytest.raises(ConfigError, match="trains with: plain"):
        plain = tiny(memory="none", residual_injection=False)
        validate(dataclasses.replace(run_config, model=plain))
    staged = ScheduleConfig(name="staged", stages="plain:0.5, mix(twice 0.5, plain 0.5):0.5")
    assert costs.forwards_equivalent(config, staged) == 0.5 + 0.5 * 1.5 and [kind.name for kind in staged.kinds] == [
        "plain",
        "twice",
    ]

    # It is multi-refinement with K = 1 by another name: the same losses, FLOPs, traffic and program to compile.
    known = ScheduleConfig(name="multi_refinement", refinements=1)
    assert costs.train_flops(config, schedule) == costs.train_flops(config, known)
    assert traffic.forwards_of(schedule) == [1.0, 1.0]
    ((label, function, arguments),) = programs.train_steps_of(run_config, make_mesh(MeshConfig()))
    assert label == "train step"
    _, metrics = jax.eval_shape(function, *arguments)
    assert {"train/loss_first", "train/loss_again"} < set(metrics)
    params, batch = random_params(config), random_batch(config)
    built = [schedules.build(one, 8) for one in (schedule, known)]
    found, expected = jax.jit(lambda params: [of(Model(Decoder(config), params), *batch).loss for of in built])(params)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_name_that_is_no_schedule_is_refused_everywhere(tiny):
    unknown = ScheduleConfig(name="thrice")
    for ask in (
        lambda: validate(Config(tiny(), TrainConfig(batch_size=2, steps=4), schedule=unknown)),
        lambda: costs.forwards_equivalent(tiny(), unknown),
        lambda: costs.train_flops(tiny(), unknown),
        lambda: traffic.forwards_of(unknown),
        lambda: schedules.build(unknown, 8),
    ):
        with pytest.raises(ConfigError, match=r"schedule\.name is 'thrice'; allowed are: plain, interleaved"):
            ask()


def test_every_number_and_own_field_of_a_description_is_a_field_of_the_config():
    fields = {field.name: field.default for field in dataclasses.fields(ScheduleConfig)}
    assert set(SCHEDULES) == set(schedules.RUN)
    for description in SCHEDULES.values():
        assert not description.number or fields[description.number] > 0
        assert fields.keys() >= set(description.own)


def run(config, params, batch, **schedule):
    """The outcome of a schedule, by default interleaved."""
    built = schedules.build(ScheduleConfig(**schedule), config.sequence_length)
    return jax.jit(lambda params, *batch: built(Model(Decoder(config), params), *batch))(params, *batch)


def test_training_lowers_the_loss(tiny, random_batch):
    config = tiny(sequence_length=16, scan_layers=True)
    schedule = ScheduleConfig(subsets=2, unroll=False)
    muon = optimizer.build(OptimizerConfig(), table(config), steps=30)
    decoder = Decoder(config)
    train = step.build(decoder, schedule, muon)
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
