import dataclasses
import gzip
import hashlib
import itertools
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lrt_jax.data.corpus import is_held_out, open_corpus
from lrt_jax.data.faults import DataError
from lrt_jax.data.pipeline import Batch, held_out_rows, training_batches
from lrt_jax.data.records import Records, prepare
from lrt_jax.data.tokenizer import Tokenizer, train
from lrt_jax.setup.config import Config, DataConfig, ModelConfig, TrainConfig

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
    data = {"corpus": str(folder), "held_out": SHARE, "prefetch": 2} | data
    return Config(model, TrainConfig(batch_size=batch_size, steps=1), DataConfig(**data), seed=seed)


def records_of(config: Config, workdir: Path) -> Records:
    return prepare(config, open_corpus(config.data), TOKENIZER, workdir)


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


def test_records_are_the_training_documents_in_order_and_go_round(folder, tmp_path):
    records = records_of(config_of(folder), tmp_path / "run")
    expected = np.concatenate([np.append(TOKENIZER.bos_id, TOKENIZER.encode(text)) for text in TRAINING])
    assert records.tokens == len(expected) and len(records) == -(-len(expected) // T)
    for row in (0, 1, len(records) - 2, len(records) - 1):
        wanted = expected[(row * T + np.arange(T + 1)) % len(expected)]
        assert records[row].dtype == np.int32
        np.testing.assert_array_equal(records[row], wanted)


def test_records_are_written_once_and_named_by_what_makes_them(folder, tmp_path):
    config, workdir = config_of(folder), tmp_path / "run"
    before = records_of(config, workdir)
    data = (folder / "00.jsonl").read_bytes()
    (folder / "00.jsonl").write_text(json.dumps({"text": "something else"}).ljust(len(data)))  # not read again
    again = records_of(config, workdir)
    (folder / "00.jsonl").write_bytes(data)
    assert again.name == before.name and again.tokens == before.tokens
    (folder / "12.jsonl").write_text(json.dumps({"text": "more"}))
    assert records_of(config, workdir).name != before.name
    assert records_of(config_of(folder, held_out=0.3), workdir).name != before.name


def test_a_file_that_changes_under_its_name_is_told(folder, tmp_path):
    config, workdir = config_of(folder), tmp_path / "run"
    name = records_of(config, workdir).name
    file, other = folder / "03.jsonl", folder / "07.jsonl"
    data = file.read_bytes()
    file.write_bytes(data + b"\n")
    says = (
        rf"03\.jsonl has {len(data) + 1:,} bytes, but had {len(data):,} when its tokens were made; put .*tokens/{name}"
    )
    with pytest.raises(DataError, match=says):
        records_of(config, workdir)
    other.write_bytes(other.read_bytes() + b"\n")
    with pytest.raises(DataError, match=r"03\.jsonl has .* \(1 more have changed too\)"):
        records_of(config, workdir)
    (workdir / "tokens" / name / "sources.json").unlink()  # as in work dirs of before there was one
    assert records_of(config, workdir).name == name
    assert not (workdir / "tokens" / name / "sources.json").exists()


@pytest.mark.parametrize(("file", "mend"), [("index.json", "remove .*tokens/"), ("sources.json", r"remove that file")])
def test_damaged_notes_about_the_tokens_are_named(folder, tmp_path, file, mend):
    config, workdir = config_of(folder), tmp_path / "run"
    path = workdir / "tokens" / records_of(config, workdir).name / file
    data = path.read_bytes()
    for damaged in (data[:-9], b"", bytes(20), b"[1]"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"^{path} is damaged \(.+\); .*{mend}"):
            records_of(config, workdir)
        assert path.read_bytes() == damaged
    path.write_bytes(data)
    records_of(config, workdir)
    path.with_name("sources.json").write_bytes(b"")
    path.with_name("index.json").unlink()  # the tokens are not known to be complete
    with pytest.raises(DataError, match=r"sources\.json is damaged .*; remove .*/tokens/\w+, and the same command"):
        records_of(config, workdir)


def test_a_file_that_is_mended_before_the_tokens_are_complete_is_read_again(folder, tmp_path):
    file, whole = folder / "03.jsonl", (folder / "03.jsonl").read_text()
    file.write_text(whole + '{"text": \n')
    (folder / "11.jsonl").write_text('{"text": ')
    skip, stop = (config_of(folder, on_bad_record=policy) for policy in ("skip", "stop"))
    files = tmp_path / "run" / "tokens" / records_of(skip, tmp_path / "run").name
    (files / "index.json").unlink()  # it ended in the middle of 11.jsonl
    (files / "00011.bin").unlink()
    file.write_text(whole)
    (folder / "11.jsonl").write_text(json.dumps({"text": "mended"}))
    mended, fresh = records_of(stop, tmp_path / "run"), records_of(stop, tmp_path / "fresh")
    assert mended.tokens == fresh.tokens
    np.testing.assert_array_equal(
        [mended[row] for row in range(len(mended))], [fresh[row] for row in range(len(fresh))]
    )
    assert mended.left_out == 0


def test_unfinished_records_are_completed(folder, tmp_path):
    config = config_of(folder)
    whole, cut = (records_of(config, tmp_path / name) for name in ("whole", "cut"))
    rows = [whole[row] for row in range(len(whole))]
    files = tmp_path / "cut" / "tokens" / cut.name
    (files / "index.json").unlink()  # written last
    (files / "00003.bin").rename(files / "00003.bin.tmp")
    again = records_of(config, tmp_path / "cut")
    np.testing.assert_array_equal([again[row] for row in range(len(again))], rows)
    assert not list(files.glob("*.tmp"))


def test_large_vocabularies_and_every_unicode_survive(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(TOKENIZER, "vocab_size", 2**16 + 1)
    records = records_of(config_of(folder), tmp_path / "run")
    index = json.loads((tmp_path / "run" / "tokens" / records.name / "index.json").read_text())
    assert index["dtype"] == "uint32"
    texts = ["a \u2581 b", "", "\u2581", "c"]
    assert [TOKENIZER.decode(ids) for ids in TOKENIZER.encode_all(texts)] == texts


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
    monkeypatch.setitem(globals(), "TOKENIZER", Tokenizer(train(TEXTS[:30], 320)))
    with pytest.raises(DataError, match=r"^the tokenizer is another than when this run began .* same tokenizer\.model"):
        batches_of(config_of(folder)).set_state(state)


def test_a_corpus_smaller_than_a_row_goes_round(tmp_path, batches_of):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("tiny")
    tiny = np.append(TOKENIZER.bos_id, TOKENIZER.encode("tiny"))
    iterator = batches_of(config_of(tmp_path / "data", held_out=1e-9))
    for row in rows_of(take(iterator, 3)):
        np.testing.assert_array_equal(row, np.resize(tiny, T + 1))


def test_the_standard_library_makes_records(tmp_path):
    config = config_of(Path("stdlib"))
    corpus = open_corpus(config.data)
    some = dataclasses.replace(corpus, shards=corpus.shards[:300])  # in 256 files, some of two shards
    records = prepare(config, some, TOKENIZER, tmp_path)
    assert "def " in TOKENIZER.decode(np.concatenate([records[row] for row in range(200)]))


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


def test_left_out_records_are_counted_once_and_for_good(folder, tmp_path):
    with (folder / "03.jsonl").open("a") as stream:
        stream.write('{"text": \n{"txt": "x"}\n')
    (folder / "z.parquet").write_bytes(b"none")
    config = config_of(folder, on_bad_record="skip")
    corpus = open_corpus(config.data)
    for shard in corpus.shards:  # as the tokenizer reads them before
        shard.documents()
    records = prepare(config, corpus, TOKENIZER, tmp_path / "run")
    assert (
        records.left_out == 3 and prepare(config, open_corpus(config.data), TOKENIZER, tmp_path / "run").left_out == 3
    )
    listed = sorted((tmp_path / "run" / "tokens" / records.name).glob("*.left_out"))
    assert [len(path.read_text().splitlines()) for path in listed] == [2, 1]
    (folder / "z.parquet").unlink()
    stop = config_of(folder)
    with pytest.raises(DataError, match=r"03\.jsonl:6 is not valid JSON"):
        prepare(stop, open_corpus(stop.data), TOKENIZER, tmp_path / "other")


def test_tokens_that_are_cut_off_or_gone_are_told(folder, tmp_path):
    config = config_of(folder)
    records = records_of(config, tmp_path / "run")
    file = tmp_path / "run" / "tokens" / records.name / "00003.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"00003\.bin has .* bytes instead of .*; remove its folder"):
        records_of(config, tmp_path / "run")
    file.unlink()
    with pytest.raises(DataError, match=r"00003\.bin misses"):
        records_of(config, tmp_path / "run")
    file.write_bytes(whole)
    later = records_of(config, tmp_path / "run")
    file.unlink()
    with pytest.raises(DataError, match=r"00003\.bin cannot be read"):
        [later[row] for row in range(len(later))]
    file.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"00003\.bin has .* bytes instead of"):
        [later[row] for row in range(len(later))]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux lists a process's descriptors there")
def test_reading_rows_holds_no_file_open(folder, tmp_path):
    records = records_of(config_of(folder), tmp_path / "run")
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert len([records[row] for row in range(len(records))]) > 12
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_documents_are_encoded_a_few_at_a_time(folder, tmp_path, monkeypatch):
    whole = records_of(config_of(folder), tmp_path / "whole")
    monkeypatch.setattr("lrt_jax.data.records.ENCODED_AT_ONCE", 100)
    seen: list[int] = []
    encode = TOKENIZER.encode_all
    monkeypatch.setattr(TOKENIZER, "encode_all", lambda texts: seen.append(sum(map(len, texts))) or encode(texts))
    few = records_of(config_of(folder), tmp_path / "few")
    assert len(seen) > 12 and max(seen) < 100 + max(map(len, TEXTS))
    np.testing.assert_array_equal([few[row] for row in range(len(few))], [whole[row] for row in range(len(whole))])


def test_names_that_are_not_utf8_make_records(tmp_path):
    for name in (b"caf\xe9.jsonl", b"line\n.jsonl"):
        (tmp_path / os.fsdecode(name)).write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS[:30]) + "{\n")
    config = config_of(tmp_path, on_bad_record="skip")
    corpus = open_corpus(config.data)
    records = prepare(config, corpus, TOKENIZER, tmp_path / "run")
    assert records.left_out == 2 and held_out_rows(config, corpus, TOKENIZER, 4).bytes > 0
    assert prepare(config, open_corpus(config.data), TOKENIZER, tmp_path / "run").left_out == 2
