"""The corpus as tokens: written once, told where they or their files changed."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rows
from rows import TEXTS, TOKENIZER, TRAINING, T, config_of, records_of

from lrt_jax.data.corpus import open_corpus
from lrt_jax.data.faults import DataError
from lrt_jax.data.pipeline import held_out_rows
from lrt_jax.data.records import _name, prepare
from lrt_jax.setup.config import DataConfig


@pytest.fixture
def folder(tmp_path) -> Path:
    return rows.write_documents(tmp_path / "data")


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


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "f6aa3b5dffecdd60"),
        ({"held_out": 0.3}, "7d70136fb7a837fa"),
        ({"document_bytes": 7}, "875ac406e9b87ee3"),
        ({"text_field": "body"}, "519ef8df51469d0f"),
        ({"format": "text"}, "f13c92eec6ce28e5"),
        # Of these the name has the names of files and the model that they lead to; the others change no token.
        ({"corpus": "x", "tokenizer": "y", "tokenizer_bytes": 3}, "f6aa3b5dffecdd60"),
        ({"prefetch": 2, "on_bad_record": "skip"}, "f6aa3b5dffecdd60"),
    ],
)
def test_records_have_the_names_that_released_code_gave_them(fields, name):
    """So that runs of old work dirs go on with the tokens that they have, and no others are taken for them."""
    assert name_of(DataConfig(**fields)) == name


def test_a_new_field_changes_the_records_names_only_where_it_is_set():
    @dataclasses.dataclass(frozen=True)
    class Newer(DataConfig):
        lowercase: bool = False

    assert name_of(Newer()) == "f6aa3b5dffecdd60" and name_of(Newer(format="text")) == "f13c92eec6ce28e5"
    assert len({name_of(Newer(format=kind, lowercase=set)) for kind in ("auto", "text") for set in (False, True)}) == 4


def name_of(config: DataConfig) -> str:
    corpus = SimpleNamespace(shards=[SimpleNamespace(name="a.txt"), SimpleNamespace(name="b.txt")])
    return _name(config, corpus, SimpleNamespace(model=b"a tokenizer"))


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


def test_the_standard_library_makes_records(tmp_path):
    config = config_of(Path("stdlib"))
    corpus = open_corpus(config.data)
    some = dataclasses.replace(corpus, shards=corpus.shards[:300])  # in 256 files, some of two shards
    records = prepare(config, some, TOKENIZER, tmp_path)
    assert "def " in TOKENIZER.decode(np.concatenate([records[row] for row in range(200)]))


def test_left_out_records_are_counted_once_and_for_good(folder, tmp_path):
    with (folder / "03.jsonl").open("a") as stream:
        stream.write('{"text": \n{"txt": "x"}\n')
    (folder / "z.parquet").write_bytes(b"none")
    config = config_of(folder, on_bad_record="skip")
    corpus = open_corpus(config.data)
    for shard in corpus.shards:  # as the tokenizer reads them before
        list(shard.texts())
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
    with pytest.raises(DataError, match=r"00003\.bin is missing"):
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
    assert records.left_out == 2 and held_out_rows(config, corpus, TOKENIZER, 4).text
    assert prepare(config, open_corpus(config.data), TOKENIZER, tmp_path / "run").left_out == 2
