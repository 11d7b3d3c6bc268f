"""Batches of rows, and rows of held-out text."""

import gzip
import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rows
from rows import HELD_OUT, TEXTS, TOKENIZER, TRAINING, T, config_of, records_of

from lrt_jax.data.corpus import open_corpus
from lrt_jax.data.faults import DataError
from lrt_jax.data.pipeline import Batch, held_out_rows, training_batches
from lrt_jax.data.tokenizer import Tokenizer, train
from lrt_jax.setup.config import Config


@pytest.fixture
def folder(tmp_path) -> Path:
    return rows.write_documents(tmp_path / "data")


@pytest.fixture
def batches_of(tmp_path):
    """Makes iterators over batches, and closes them."""
    opened = []

    def make(config: Config, here=None):
        opened.append(training_batches(config, records_of(config, tmp_path / "run"), here))
        return opened[-1]

    yield make
    for iterator in opened:
        iterator.close()


def take(iterator, count: int) -> list[Batch]:
    return list(itertools.islice(iterator, count))


def rows_of(batches: list[Batch]) -> np.ndarray:
    """The rows of T + 1 tokens."""
    return np.concatenate([np.concatenate([b.tokens_BxT, b.targets_BxT[:, -1:]], axis=1) for b in batches])


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.tokens_BxT, b.tokens_BxT)
        np.testing.assert_array_equal(a.targets_BxT, b.targets_BxT)


def test_batches_have_shifted_targets(folder, batches_of):
    batch = next(batches_of(config_of(folder)))
    assert isinstance(batch, Batch)
    assert batch.tokens_BxT.shape == batch.targets_BxT.shape == (4, T)
    assert batch.tokens_BxT.dtype == batch.targets_BxT.dtype == np.int32
    np.testing.assert_array_equal(batch.tokens_BxT[:, 1:], batch.targets_BxT[:, :-1])


def test_every_epoch_has_every_row_once_in_another_order(folder, tmp_path, batches_of):
    records = records_of(config_of(folder), tmp_path / "run")
    n = len(records)
    everything = Counter(records[row].tobytes() for row in range(n))

    def epochs(seed):
        rows = [row.tobytes() for row in rows_of(take(batches_of(config_of(folder, seed)), n // 2 + 1))]
        return rows[:n], rows[n : 2 * n]

    first, second = epochs(seed=3)
    assert Counter(first) == Counter(second) == everything
    assert first != second and first != list(everything)
    assert epochs(seed=3) == (first, second)
    assert epochs(seed=-4)[0] != first


def test_the_global_stream_is_the_same_whoever_reads_it(folder, batches_of):
    config = config_of(folder)
    whole = take(batches_of(config), 40)
    for shares in ([(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)], [(0, 2), (1, 3)], [(0, 1, 2), (2, 3)]):
        for here in shares:
            iterator = batches_of(config, here)
            for expected, found in zip(whole, take(iterator, 40), strict=True):
                np.testing.assert_array_equal(found.tokens_BxT, expected.tokens_BxT[list(here)])
                np.testing.assert_array_equal(found.targets_BxT, expected.targets_BxT[list(here)])


def test_state_is_a_global_index_and_restores_exactly_anywhere(folder, batches_of):
    config = config_of(folder, batch_size=2)
    iterator = batches_of(config)
    states, batches = [json.dumps(iterator.get_state())], []
    for _ in range(70):  # over several epochs
        batches.append(next(iterator))
        states.append(json.dumps(iterator.get_state()))
    assert [json.loads(state)["next_row"] for state in states] == list(range(0, 142, 2))
    fresh, half = batches_of(config), batches_of(config, (1,))
    for step in [*range(0, 60, 7), 59, 17]:
        fresh.set_state(json.loads(states[step]))
        assert_equal(take(fresh, 8), batches[step : step + 8])
        half.set_state(json.loads(states[step]))  # saved where all rows were, restored where one is
        np.testing.assert_array_equal(next(half).tokens_BxT, batches[step].tokens_BxT[1:])


def test_a_place_in_other_data_is_refused(folder, batches_of):
    state = batches_of(config_of(folder)).get_state()
    (folder / "12.jsonl").write_text(json.dumps({"text": "more"}))
    with pytest.raises(DataError, match=r"config\.data\.corpus has other files than when this run began"):
        batches_of(config_of(folder)).set_state(state)
    del state["tokenizer"]  # as in checkpoints of before it was kept: either may be at fault
    with pytest.raises(DataError, match=r"corpus has other files, or the work dir another tokenizer, than when"):
        batches_of(config_of(folder)).set_state(state)


def test_a_place_in_tokens_of_another_tokenizer_is_told_as_such(folder, tmp_path, monkeypatch, batches_of):
    iterator = batches_of(config_of(folder))
    next(iterator)
    state = iterator.get_state()
    assert state["tokenizer"] == hashlib.sha256(TOKENIZER.model).hexdigest()
    older = {name: value for name, value in state.items() if name != "tokenizer"}
    again = batches_of(config_of(folder))
    again.set_state(older)
    assert_equal(take(again, 3), take(iterator, 3))
    monkeypatch.setattr(rows, "TOKENIZER", Tokenizer(train(TEXTS[:30], 320)))
    with pytest.raises(DataError, match=r"^the tokenizer is another than when this run began .* same tokenizer\.model"):
        batches_of(config_of(folder)).set_state(state)


def test_a_corpus_smaller_than_a_row_goes_round(tmp_path, batches_of):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("tiny")
    tiny = np.append(TOKENIZER.bos_id, TOKENIZER.encode("tiny"))
    iterator = batches_of(config_of(tmp_path / "data", held_out=1e-9))
    for row in rows_of(take(iterator, 3)):
        np.testing.assert_array_equal(row, np.resize(tiny, T + 1))


def test_what_cannot_be_trained_on_is_said(folder, tmp_path):
    with pytest.raises(DataError, match=r"config\.data\.held_out = 0\.99999"):
        records_of(config_of(folder, held_out=0.99999), tmp_path / "run")
    (folder / "11.jsonl").write_text('{"text": "fine"}\n{"text": ')
    with pytest.raises(DataError, match=r"11\.jsonl:2 is not valid JSON"):
        records_of(config_of(folder), tmp_path / "run")


def held_out_of(config: Config, rows: int):
    return held_out_rows(config, open_corpus(config.data), TOKENIZER, rows)


def test_held_out_rows_cover_the_held_out_text_once(folder):
    held = held_out_of(config_of(folder), 10_000)
    n = len(held.tokens_NxT)
    assert held.tokens_NxT.shape == held.targets_NxT.shape == (n, T)
    assert held.tokens_NxT.dtype == held.targets_NxT.dtype == np.int32
    stream = np.append(held.tokens_NxT.reshape(-1), held.targets_NxT[-1, -1])
    np.testing.assert_array_equal(held.targets_NxT.reshape(-1), stream[1:])
    starts = np.flatnonzero(stream == TOKENIZER.bos_id)
    assert starts[0] == 0  # what follows the last BOS may be cut and is left out
    found = [TOKENIZER.decode(stream[a:b]) for a, b in itertools.pairwise(starts)]
    assert len(found) > 1
    assert set(found) < set(HELD_OUT)
    whole = sum(len(TOKENIZER.encode(text)) + 1 for text in HELD_OUT)
    assert n == (whole - 1) // T  # nothing but the last, partial row is missing


def test_held_out_text_is_the_bytes_of_the_targets(folder):
    held = held_out_of(config_of(folder), 5)
    assert len(held.tokens_NxT) == 5
    assert len(held.text) == TOKENIZER.token_bytes[held.targets_NxT].sum()
    starts = np.flatnonzero(held.targets_NxT.reshape(-1) == TOKENIZER.bos_id)
    assert len(starts) > 0  # special tokens are among the targets and add no bytes
    assert len(held.text) == len(TOKENIZER.decode(held.targets_NxT.reshape(-1)).encode())
    assert len(gzip.compress(held.text)) < len(held.text)


def test_held_out_rows_do_not_depend_on_seed_or_much_on_other_files(folder):
    config = config_of(folder)
    before = held_out_of(config, 6)
    other = held_out_of(config_of(folder, seed=9), 6)
    np.testing.assert_array_equal(before.tokens_NxT, other.tokens_NxT)
    np.testing.assert_array_equal(before.tokens_NxT, held_out_of(config, 12).tokens_NxT[:6])
    training = next(text for text in TRAINING)
    (folder / "00a.jsonl").write_text(json.dumps({"text": training}))
    np.testing.assert_array_equal(before.tokens_NxT, held_out_of(config, 6).tokens_NxT)


def test_too_little_held_out_text_is_said(folder):
    with pytest.raises(DataError, match=r"have 0 tokens; one row of evaluation needs 25: raise config\.data\.held_out"):
        held_out_of(config_of(folder, held_out=1e-9), 4)
