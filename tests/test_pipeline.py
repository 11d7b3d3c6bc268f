import gzip
import itertools
import json
from collections import Counter
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lrt_jax.data.corpus import DataError, is_held_out, open_corpus
from lrt_jax.data.pipeline import Batch, held_out_rows, training_batches
from lrt_jax.data.tokenizer import Tokenizer, train
from lrt_jax.setup.config import Config, ConfigError, DataConfig, ModelConfig, TrainConfig

WORDS = ["alpha", "beta", "gamma\n", "delta", "été", "😀", "def f(x):\n", "    return x\n"]
TEXTS = [f"document {i}: " + " ".join(WORDS[(i * k) % 8] for k in range(1, 3 + i * 7 % 40)) for i in range(60)]
TOKENIZER = Tokenizer(train(TEXTS, 320))
SHARE = 0.2
TRAINING = [text for text in TEXTS if not is_held_out(text, SHARE)]
HELD_OUT = [text for text in TEXTS if is_held_out(text, SHARE)]
T = 24


@pytest.fixture
def folder(tmp_path) -> Path:
    """60 documents in 12 JSONL files."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(12):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[5 * i : 5 * i + 5]]
        (folder / f"{i:02}.jsonl").write_text("".join(lines))
    return folder


def config_of(folder: Path, seed=0, batch_size=4, **data) -> Config:
    model = ModelConfig(layers=1, width=8, heads=1, kv_heads=1, sequence_length=T, vocab_size=320)
    data = {"corpus": str(folder), "held_out": SHARE, "shuffle_window": 16, "shuffle_rows": 0, "prefetch": 2} | data
    return Config(model, TrainConfig(batch_size=batch_size, steps=1), DataConfig(**data), seed=seed)


def batches_of(config: Config, *processes: int):
    return training_batches(config, open_corpus(config.data), TOKENIZER, *processes)


def take(iterator, count: int) -> list[Batch]:
    return list(itertools.islice(iterator, count))


def stream_of(batches: list[Batch]) -> np.ndarray:
    """The tokens of consecutive rows, end to end."""
    rows = [np.concatenate([batch.tokens_BxT, batch.targets_BxT[:, -1:]], axis=1) for batch in batches]
    return np.concatenate(rows).reshape(-1)


def documents_of(stream: np.ndarray) -> list[str]:
    """The whole documents of a stream that begins with one; what follows the last BOS may be cut and is left out."""
    starts = np.flatnonzero(stream == TOKENIZER.bos_id)
    assert starts[0] == 0
    return [TOKENIZER.decode(stream[a:b]) for a, b in itertools.pairwise(starts)]


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.tokens_BxT, b.tokens_BxT)
        np.testing.assert_array_equal(a.targets_BxT, b.targets_BxT)


def test_batches_have_shifted_targets(folder):
    iterator = batches_of(config_of(folder))
    batch = next(iterator)
    assert isinstance(batch, Batch)
    assert batch.tokens_BxT.shape == batch.targets_BxT.shape == (4, T)
    assert batch.tokens_BxT.dtype == batch.targets_BxT.dtype == np.int32
    np.testing.assert_array_equal(batch.tokens_BxT[:, 1:], batch.targets_BxT[:, :-1])
    iterator.close()


@pytest.mark.parametrize("window", [1, 7, 1000])
def test_packing_loses_and_adds_nothing(folder, window):
    iterator = batches_of(config_of(folder, shuffle_window=window))
    found = documents_of(stream_of(take(iterator, 60)))
    iterator.close()
    assert len(found) > 2 * len(TRAINING)
    assert set(found) == set(TRAINING)  # each of them whole, and none held out
    epochs = len(found) // len(TRAINING)
    slack = 0 if window != 7 else 1  # a window that straddles two epochs mixes them
    counts = Counter(found[: epochs * len(TRAINING)])
    assert set(counts.values()) <= set(range(epochs - slack, epochs + slack + 1))


@pytest.mark.parametrize("window", [1, 1000])
def test_epochs_and_seeds_differ_and_repeat(folder, window):
    def epochs(seed):
        iterator = batches_of(config_of(folder, seed, shuffle_window=window))
        found = documents_of(stream_of(take(iterator, 60)))
        iterator.close()
        n = len(TRAINING)
        return found[:n], found[n : 2 * n]

    first, second = epochs(seed=3)
    assert first != second
    assert Counter(first) == Counter(second) == Counter(TRAINING)
    assert epochs(seed=3) == (first, second)
    assert epochs(seed=-4)[0] != first
    assert first != TRAINING


def test_rows_are_shuffled_within_their_window(folder):
    def rows(shuffle_rows):
        iterator = batches_of(config_of(folder, shuffle_rows=shuffle_rows))
        found = [row.tobytes() for batch in take(iterator, 20) for row in batch.tokens_BxT]
        iterator.close()
        return found

    ordered, shuffled = rows(0), rows(16)
    assert shuffled != ordered
    for begin in range(0, 80, 16):
        assert Counter(shuffled[begin : begin + 16]) == Counter(ordered[begin : begin + 16])


@pytest.mark.parametrize(("window", "rows"), [(1, 0), (16, 0), (16, 7), (1000, 0), (1000, 64)])
def test_state_restores_exactly_anywhere(folder, window, rows):
    config = config_of(folder, batch_size=2, shuffle_window=window, shuffle_rows=rows)
    iterator = batches_of(config)
    states, batches = [json.dumps(iterator.get_state())], []
    for _ in range(70):  # over two epochs and many windows
        batches.append(next(iterator))
        states.append(json.dumps(iterator.get_state()))
    iterator.close()
    assert max(map(len, states)) < 1000
    fresh = batches_of(config)
    for step in [*range(0, 60, 3), 59, 17]:
        fresh.set_state(json.loads(states[step]))
        assert_equal(take(fresh, 8), batches[step : step + 8])
    fresh.close()


def test_state_travels_through_orbax(folder, tmp_path):
    config = config_of(folder)
    iterator = batches_of(config)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        take(iterator, 9)
        manager.save(9, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = take(iterator, 6)
        fresh = batches_of(config)
        take(fresh, 2)
        manager.restore(9, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
        assert_equal(take(fresh, 6), expected)
    iterator.close()
    fresh.close()


def test_processes_share_the_batch_and_the_documents(folder):
    config = config_of(folder)
    found = []
    for process in range(2):
        iterator = batches_of(config, process, 2)
        batches = take(iterator, 60)
        iterator.close()
        assert batches[0].tokens_BxT.shape == (2, T)
        found.append(set(documents_of(stream_of(batches))))
    assert found[0].isdisjoint(found[1])
    assert found[0] | found[1] == set(TRAINING)


def test_a_corpus_smaller_than_a_batch_goes_round(tmp_path):
    (tmp_path / "a.txt").write_text("tiny")
    iterator = batches_of(config_of(tmp_path, held_out=1e-9, shuffle_window=2048))
    assert set(documents_of(stream_of(take(iterator, 3)))) == {"tiny"}
    iterator.close()


def test_the_standard_library_makes_batches():
    iterator = batches_of(config_of(Path("stdlib"), shuffle_window=8))
    assert "def " in TOKENIZER.decode(stream_of(take(iterator, 200)))
    iterator.close()


def test_what_cannot_be_shared_or_trained_on_is_said(folder):
    config = config_of(folder)
    with pytest.raises(ConfigError, match=r"config\.train\.batch_size is 4; .* number of processes, 3"):
        batches_of(config, 0, 3)
    with pytest.raises(ConfigError, match=r"has 12 shards .* 13 processes need one each"):
        batches_of(config_of(folder, batch_size=13), 12, 13)
    with pytest.raises(DataError, match=r"config\.data\.held_out = 0\.99999"):
        batches_of(config_of(folder, held_out=0.99999))


def test_an_error_in_the_reading_thread_reaches_the_caller(folder):
    (folder / "11.jsonl").write_text('{"text": "fine"}\n{"text": ')
    iterator = batches_of(config_of(folder, shuffle_window=1))
    with pytest.raises(DataError, match=r"11\.jsonl:2 is not valid JSON"):
        take(iterator, 1000)
    iterator.close()


def held_out_of(config: Config, rows: int):
    return held_out_rows(config, open_corpus(config.data), TOKENIZER, rows)


def test_held_out_rows_cover_the_held_out_text_once(folder):
    held = held_out_of(config_of(folder), 10_000)
    n = len(held.tokens_NxT)
    assert held.tokens_NxT.shape == held.targets_NxT.shape == (n, T)
    assert held.tokens_NxT.dtype == held.targets_NxT.dtype == np.int32
    stream = np.append(held.tokens_NxT.reshape(-1), held.targets_NxT[-1, -1])
    np.testing.assert_array_equal(held.targets_NxT.reshape(-1), stream[1:])
    found = documents_of(stream)
    assert len(found) > 1
    assert set(found) < set(HELD_OUT)
    whole = sum(len(TOKENIZER.encode(text)) + 1 for text in HELD_OUT)
    assert n == (whole - 1) // T  # nothing but the last, partial row is missing


def test_held_out_text_is_the_bytes_of_the_targets(folder):
    held = held_out_of(config_of(folder), 5)
    assert len(held.tokens_NxT) == 5
    assert held.bytes == len(held.text) == TOKENIZER.token_bytes[held.targets_NxT].sum()
    starts = np.flatnonzero(held.targets_NxT.reshape(-1) == TOKENIZER.bos_id)
    assert len(starts) > 0  # special tokens are among the targets and add no bytes
    assert held.bytes == len(TOKENIZER.decode(held.targets_NxT.reshape(-1)).encode())
    assert len(gzip.compress(held.text)) < held.bytes


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
