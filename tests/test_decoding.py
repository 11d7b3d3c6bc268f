"""Decoding against the schedule's sequential oracle, and its equalities: batches, chunks, windows, both prefills."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrt_jax.inference import decode, prefill, scoring
from lrt_jax.inference.decode import PAD
from lrt_jax.inference.generate import Generation, Method
from lrt_jax.inference.sampling import DEFAULT, GREEDY
from lrt_jax.method import schedules
from lrt_jax.model import blocks, cache
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.setup.config import DecodeConfig
from lrt_jax.setup.errors import UserError

EXACT = DecodeConfig("fixed_point", tolerance=0.0, max_refinements=0)
MEMORIES = {
    "shared": {"memory": "shared"},
    "layerwise": {"memory": "layerwise"},
    "residual only": {"memory": "none"},
    "shared, no residual": {"residual_injection": False},
    "plain": {"memory": "none", "residual_injection": False},
}
# Switches that have nothing to do with memory take turns.
SWITCHES = (
    {"kv_heads": 4, "source_layer": "1"},
    {"scan_layers": True, "value_embeddings": "alternate"},
    {"kv_heads": 1, "value_embeddings": "none", "gate_width": 4},
)
PAIRS = (
    ("shared", "SL"),
    ("layerwise", "SSL"),
    ("plain", "SL"),
    ("shared, no residual", "SSL"),
    ("residual only", "SL"),
    ("shared", "L"),
)
COMBINATIONS = {
    f"{memory}, {windows}": {**MEMORIES[memory], "window_pattern": windows, **SWITCHES[index % 3]}
    for index, (memory, windows) in enumerate(PAIRS)
}
PROMPTS = (1, 5, 9, 3, 12, 8, 2, 7)  # tokens; the short window is 8, so rings turn over
NEW = 4
# In float64. In float32 memory carries what products round differently from token to token, to 1e-5 and beyond.
EQUAL = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def small(tiny, **changes):
    return tiny(**{"layers": 3, "sequence_length": 16} | changes)


def prompts_of(config, lengths=PROMPTS):
    random = np.random.default_rng(7)
    return [random.integers(0, config.vocab_size, length, dtype=np.int32) for length in lengths]


def oracle(config, params, rows):
    """Log-probabilities [B, T, V] of every next token: minus the losses of ``schedules.sequential`` for all targets."""
    tokens = np.zeros((len(rows), config.sequence_length), np.int32)
    for row, given in zip(tokens, rows, strict=True):
        row[: len(given)] = given

    def loss(target):
        targets = jnp.full(tokens.shape, target)
        return schedules.sequential(Model(Decoder(config), params), jnp.asarray(tokens), targets).token_losses_FxBxT[0]

    losses_VxBxT = jax.jit(jax.vmap(loss))(jnp.arange(config.vocab_size))
    return -np.moveaxis(np.asarray(losses_VxBxT), 0, -1)


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.usefixtures("x64")
def test_generated_logits_are_the_sequential_oracles(tiny, random_params, combination):
    config = small(tiny, dtype="float64", **COMBINATIONS[combination])
    params = random_params(config)
    model, prompts = Model(Decoder(config), params), prompts_of(config)

    def read(tokens_BxN):  # every token's logits, by either prefill, in one chunk and in several
        length = tokens_BxN.shape[1]
        subsets = 1 + list(COMBINATIONS).index(combination) % 3  # full forwards and sweeps take turns
        ways = [DecodeConfig(), *(dataclasses.replace(EXACT, chunk=chunk, subsets=subsets) for chunk in (512, 5))]
        done = [
            prefill.run(
                model.for_decoding(),
                decode.start(config, len(tokens_BxN), length),
                tokens_BxN,
                way,
                keep_hidden=True,
                from_start=True,
            )
            for way in ways
        ]
        return [model.logits(one.hidden_BxNxD) for one in done], done

    generation = Generation(model, prompts, NEW, Method(GREEDY))
    tokens_BxM = generation.advance()
    assert tokens_BxM.shape == (len(prompts), NEW) and (tokens_BxM >= 0).all()
    rows = [np.concatenate([prompt, new]) for prompt, new in zip(prompts, tokens_BxM, strict=True)]
    expected_BxTxV = oracle(config, params, rows)
    for row, (prompt, new) in enumerate(zip(prompts, tokens_BxM, strict=True)):
        places = np.arange(len(prompt) - 1, len(prompt) - 1 + NEW)
        assert (expected_BxTxV[row, places].argmax(axis=-1) == new).all()
        np.testing.assert_allclose(
            generation.log_probabilities[row], expected_BxTxV[row, places, new], err_msg=str(row), **EQUAL
        )
    padded = prefill.pad_left(rows, config.sequence_length)
    logits, done = jax.jit(read)(padded)
    for found_BxNxV in logits:
        found_BxNxV = np.asarray(jax.nn.log_softmax(found_BxNxV))
        for row, given in enumerate(rows):
            np.testing.assert_allclose(found_BxNxV[row, -len(given) :], expected_BxTxV[row, : len(given)], **EQUAL)
    for other in done[1:]:  # one state, however it came about
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **EQUAL),
            (other.state.cache, other.state.memory_BxD),
            (done[0].state.cache, done[0].state.memory_BxD),
        )


@pytest.fixture(scope="module")
def model(tiny, random_params):
    config = small(tiny)
    return Model(Decoder(config), random_params(config))


@pytest.mark.parametrize("method", [Method(GREEDY), Method(DEFAULT, dataclasses.replace(EXACT, tolerance=0.05))])
def test_eight_prompts_together_are_eight_single_runs(model, method):
    config = model.config
    prompts = prompts_of(config, (1, 12, 5, 12, 5, 1, 8, 5))  # each length is a program
    together = Generation(model, prompts, NEW, method, seeds=range(8))
    tokens_BxM = together.advance()
    for row, prompt in enumerate(prompts):
        alone = Generation(model, [prompt], NEW, method, seeds=[row])
        np.testing.assert_array_equal(alone.advance()[0], tokens_BxM[row], err_msg=str(row))
        np.testing.assert_allclose(alone.log_probabilities[0], together.log_probabilities[row], rtol=0, atol=1e-5)
        assert alone.prefilled.refinements_B[0] == together.prefilled.refinements_B[row]
    assert len({tuple(row) for row in tokens_BxM}) > 1


def test_greedy_twice_and_token_by_token_is_bitwise_the_same(model):
    config = model.config
    runs = []
    for pieces in ([NEW], [NEW], range(1, NEW + 1)):
        generation = Generation(model, prompts_of(config), NEW, Method(GREEDY))
        for count in pieces:
            tokens_BxM = generation.advance(count)
        assert not generation.going
        runs.append((tokens_BxM, generation.log_probabilities))
    for other in runs[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, runs[0])


def test_the_memory_matters_to_what_is_generated(model):
    config = model.config
    found = [Generation(model, prompts_of(config), NEW, Method(GREEDY, use_memory=flag)) for flag in (True, False)]
    on, off = (generation.advance() for generation in found)
    assert (on != off).any()
    np.testing.assert_allclose(  # a prompt's first token has no memory to lose
        found[0].log_probabilities[0, 0], found[1].log_probabilities[0, 0], atol=1e-6
    )


def test_a_stop_token_ends_its_row_alone(model):
    config = model.config
    prompts = prompts_of(config)
    tokens_BxM = Generation(model, prompts, NEW, Method(GREEDY)).advance()
    row = int(np.argmax([len(set(tokens[:2])) for tokens in tokens_BxM]))
    stop = int(tokens_BxM[row, 1])
    assert stop != tokens_BxM[row, 0]
    generation = Generation(model, prompts, NEW, Method(GREEDY, stop_tokens=(stop,)))
    stopped_BxM = generation.advance()
    for before, after in zip(tokens_BxM, stopped_BxM, strict=True):
        kept = np.cumsum(before == stop) == 0
        np.testing.assert_array_equal(after, np.where(kept, before, PAD))
    assert (stopped_BxM[row] == PAD).any() and (stopped_BxM != PAD).any()
    assert (generation.log_probabilities[stopped_BxM == PAD] == 0).all()


def test_short_layers_keep_half_the_context(tiny):
    config = small(tiny, window_pattern="SSL")
    sizes = [ring.k.shape[2] for ring in cache.empty_cache(config, 2, 16).kv]
    assert sizes == [8, 8, 16]
    assert [ring.k.shape[2] for ring in cache.empty_cache(config, 2, 4).kv] == [4, 4, 4]


def test_the_cache_is_the_same_in_one_write_or_many(tiny):
    config = small(tiny, window_pattern="SL", layers=2)
    rng = np.random.default_rng(0)
    shape = (2, config.kv_heads, 13, config.head_width)
    fresh = tuple(cache.KV(*rng.normal(size=(2, *shape)).astype(np.float32)) for _ in range(2))
    positions = np.stack([np.arange(13), np.maximum(np.arange(13) - 3, -1)])
    positions[1, :3] = cache.EMPTY  # a row that begins later
    whole = cache.write(cache.empty_cache(config, 2, 16), fresh, jnp.asarray(positions))
    parts = cache.empty_cache(config, 2, 16)
    for begin, end in ((0, 2), (2, 3), (3, 12), (12, 13)):
        piece = jax.tree.map(lambda x: x[:, :, begin:end], fresh)  # noqa: B023
        parts = cache.write(parts, piece, jnp.asarray(positions[:, begin:end]))
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    np.testing.assert_array_equal(whole.position_B, [13, 10])
    short, full = cache.by_layer(whole)
    for held, size in ((short, 8), (full, 16)):
        for row, count in enumerate((13, 10)):
            expected = set(range(max(0, count - size), count))
            places = np.asarray(held.positions_BxN[row])
            assert set(places[places != cache.EMPTY].tolist()) == expected
            for slot, place in enumerate(places):
                if place != cache.EMPTY:
                    column = place + 3 * row
                    np.testing.assert_array_equal(held.kv.k[row, :, slot], fresh[int(size == 16)].k[row, :, column])


def test_refinements_stop_at_the_tolerance_and_say_how_many(model):
    tokens, targets = (np.random.default_rng(3).integers(0, 40, (3, 16), dtype=np.int32) for _ in range(2))
    exact = jax.jit(lambda *batch: scoring.score(model, *batch))(tokens, targets)
    counts, errors = [], []
    for tolerance in (3.0, 0.3, 0.03, 0.0):
        how = DecodeConfig("fixed_point", tolerance=tolerance, max_refinements=0)
        found = jax.jit(lambda *batch: scoring.score(model, *batch, how))(tokens, targets)  # noqa: B023
        counts.append(int(found.refinements_B.max()))
        errors.append(float(jnp.abs(found.losses_BxT - exact.losses_BxT).max()))
        assert (found.residual_B <= tolerance).all() or counts[-1] == 15
        assert not found.fallbacks_B.any()
    assert counts == sorted(counts) and counts[0] < counts[-1] <= 15
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-3 and errors[-1] < 1e-5
    assert not exact.refinements_B.any()


@pytest.mark.parametrize("tolerance", [1e-4, np.nan])
def test_what_does_not_converge_is_computed_sequentially(model, tolerance):
    tokens = np.random.default_rng(4).integers(0, 40, (3, 16), dtype=np.int32)
    tokens[0, :14] = PAD  # two tokens: one refinement is exact
    strict = DecodeConfig("fixed_point", tolerance=tolerance, max_refinements=1, chunk=8)
    exact, found = (
        jax.jit(lambda *batch: scoring.score(model, *batch, how))(tokens, tokens)  # noqa: B023
        for how in (DecodeConfig(), strict)
    )
    np.testing.assert_array_equal(found.fallbacks_B[1:], [2, 2])
    np.testing.assert_allclose(found.losses_BxT, exact.losses_BxT, rtol=0, atol=1e-5)
    assert not exact.fallbacks_B.any()


def test_long_prompts_of_unequal_length_are_read_in_blocks_of_attention(tiny, random_params, monkeypatch):
    attend, attended = blocks.attend_in_blocks, []

    def noted(q_BxPxHxC, *rest, **options):
        attended.append(q_BxPxHxC.shape[1])
        return attend(q_BxPxHxC, *rest, **options)

    monkeypatch.setattr(blocks, "attend_in_blocks", noted)
    config = tiny(sequence_length=512, window_pattern="SL", attention="blocked")
    model = Model(Decoder(config), random_params(config))
    tokens_BxN = prefill.pad_left(prompts_of(config, (420, 131, 5)), 420)

    def read(tokens_BxN):  # without memory, so that one forward is exact
        ways = DecodeConfig(), EXACT, dataclasses.replace(EXACT, chunk=140)
        state = decode.start(config, 3, 420)
        run = lambda way: prefill.run(model, state, tokens_BxN, way, use_memory=False, from_start=True)  # noqa: E731
        return [(one.hidden_BxNxD, one.state.cache) for one in map(run, ways)]

    expected, *others = jax.jit(read)(tokens_BxN)
    assert set(attended) == {420, 140}
    for found in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), found, expected)


def test_a_plain_model_needs_no_refinement(tiny, random_params):
    config = small(tiny, memory="none", residual_injection=False)
    tokens = np.random.default_rng(4).integers(0, 40, (2, 16), dtype=np.int32)
    found = jax.jit(scoring.score, static_argnums=3)(
        Model(Decoder(config), random_params(config)), tokens, tokens, EXACT
    )
    assert not found.refinements_B.any() and not found.residual_B.any() and not found.fallbacks_B.any()


@pytest.mark.parametrize(
    ("lengths", "tokens", "message"),
    [
        ((3, 14), 4, "prompt 1 has 14 tokens, which with 4 new ones exceed the context of 16; ask for at most 2"),
        ((16,), 1, "the prompt has 16 tokens, .* shorten it$"),
        ((3, 0), 4, "prompt 1 has no tokens"),
        ((3,), 0, "0 new tokens are asked for"),
    ],
)
def test_what_does_not_fit_the_context_is_refused(model, lengths, tokens, message):
    config = model.config
    with pytest.raises(UserError, match=message):
        Generation(model, prompts_of(config, lengths), tokens)


def test_a_step_copies_and_transposes_no_cache(tiny, random_params):
    """Read in the compiled loop: moving whole rings would take longer than all the rest of a step (docs/LOG.md)."""
    rows, slots = 3, 512
    config = tiny(heads=2, kv_heads=1, sequence_length=slots, window_pattern="L")
    model = Model(Decoder(config), random_params(config)).for_decoding()
    state = decode.start(config, rows, slots)
    loop = jax.jit(prefill.sequential, donate_argnums=1).lower(model, state, np.zeros((rows, 8), np.int32))
    within, _ = loop.compile().as_text().split("\nENTRY")  # what is done once for all steps is in the last part
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", within)
    largest = max((math.prod(map(int, shape.split(","))) for shape in shapes), default=0)
    assert largest < state.cache.kv[0].k.size
    assert " dot(" in within
