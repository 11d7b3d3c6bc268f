"""What cannot be read of a corpus: said in one sentence, or left out and counted."""

import gzip
import os
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from corpora import documents, skipping, write_parquet

from lrt_jax.data.corpus import open_corpus
from lrt_jax.data.faults import DataError
from lrt_jax.setup.config import ConfigError, DataConfig


def write_undecodable_parquet(path: Path, encode=lambda texts: texts) -> None:
    bad = pa.array([b"ok", b"a\xff", None, b"fine", b"\xc3"]).view(pa.string())  # pyarrow does not check
    pyarrow.parquet.write_table(pa.table({"text": encode(bad)}), path)


def write_two_columns_of_a_name(path: Path) -> None:
    pyarrow.parquet.write_table(pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"]), path)


def broken(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("write", "error", "says"),
    [
        (lambda folder: folder.rmdir(), ConfigError, r"corpus is '.*/data', where there is no file to read; it must"),
        (lambda folder: None, ConfigError, r"no file to read; in a folder, allowed are .*\.jsonl"),
        (broken("a.pdf", b"x"), ConfigError, r"no file to read; .*; not read are \.pdf 1"),
        (broken("a.txt", b""), DataError, r"which holds no text"),
        (broken("a.txt", b"good\n\xff"), DataError, r"/a\.txt has 0xff at byte offset 5, .* UTF-8"),
        (broken("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n'), DataError, r"/a\.jsonl:2 has no field 'text' .*: body$"),
        (broken("a.jsonl", b'["x"]'), DataError, r"/a\.jsonl:1 has no field 'text' .* found: list"),
        (broken("a.jsonl", b'{"text": "x"}\n\n{"text"'), DataError, r"/a\.jsonl:3 is not valid JSON"),
        (broken("a.jsonl", b'{"text": "\xff"}'), DataError, r"/a\.jsonl:1 is not valid JSON"),
        (broken("a.jsonl", b'{"text": 3}'), DataError, r"/a\.jsonl:1: 'text' is int; it must be a string"),
        (broken("a.jsonl", b'{"text": "ab\\ud83d"}'), DataError, r"/a\.jsonl:1: 'text' has half .* character 2"),
        (broken("a.parquet", b"no"), DataError, r"/a\.parquet is not a Parquet file"),
        (
            lambda folder: write_parquet(folder / "a.parquet", column="body"),
            DataError,
            r"/a\.parquet has no column 'text' \(config\.data\.text_field\); found: id, body",
        ),
        (
            lambda folder: write_parquet(folder / "a.parquet", [1, 2, 3, 4]),
            DataError,
            r"/a\.parquet, row group 0, row 0: 'text' is int",
        ),
        (
            lambda folder: write_undecodable_parquet(folder / "a.parquet"),
            DataError,
            r"/a\.parquet, row group 0, row 1: 'text' cannot be read \(.*0xff in position 1.*\); it must be UTF-8",
        ),
        (
            lambda folder: write_two_columns_of_a_name(folder / "a.parquet"),
            DataError,
            r"/a\.parquet has 2 columns 'text' \(config\.data\.text_field\); it must have one",
        ),
        (broken("a.txt.gz", b"no"), DataError, r"/a\.txt\.gz cannot be decompressed .* damaged"),
        (
            broken("a.txt.gz", gzip.compress(b"text" * 99)[:-9]),
            DataError,
            r"/a\.txt\.gz cannot be decompressed .* damaged",
        ),
        (broken("a.txt.zst", b"no"), DataError, r"/a\.txt\.zst cannot be decompressed .* damaged"),
        (
            broken("a.txt.zst", zstandard.compress(b"text" * 99)[:-3]),
            DataError,
            r"/a\.txt\.zst cannot be decompressed .* damaged",
        ),
    ],
)
def test_errors_name_the_field_the_place_and_what_is_allowed(tmp_path, write, error, says):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder)
    with pytest.raises(error, match=says) as raised:
        open_corpus(DataConfig(corpus=str(folder)))
    assert str(raised.value).startswith("config.data.corpus")


def test_a_number_of_any_length_is_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": ' + "9" * 5000 + ', "text": "x"}')
    assert documents(tmp_path) == ["x"]


def test_json_nested_without_end_is_a_bad_record(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:1 is not valid JSON"):
        documents(tmp_path / "a.jsonl")


def test_a_folder_that_cannot_be_listed_is_said(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match=r"cannot be listed \(Permission denied\)"):
        documents(tmp_path)


def test_a_pattern_must_match_and_have_no_double_star(tmp_path):
    with pytest.raises(ConfigError, match=r"a/\*\.txt', where there is no file to read"):
        open_corpus(DataConfig(corpus=f"{tmp_path}/a/*.txt"))
    with pytest.raises(ConfigError, match=r"instead of \*\* name the folder"):
        open_corpus(DataConfig(corpus=f"{tmp_path}/**/*.txt"))


@pytest.mark.parametrize(
    ("source", "package", "says"),
    [
        ("gs://bucket/a/*.txt", "gcsfs", r"gs:// is not installed \(.*gcsfs.*\); pip install 'lrt-jax\[gcs\]'"),
        ("s3://bucket/a", "s3fs", r"s3:// is not installed \(.*s3fs.*\); pip install 'lrt-jax\[s3\]'"),
        ("http://host/a.txt", "none", r"allowed are local paths, gs:// and s3://$"),
        ("file:///a.txt", "none", r"allowed are local paths, gs:// and s3://$"),
    ],
)
def test_places_that_cannot_be_read_here_are_refused_in_one_sentence(monkeypatch, source, package, says):
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    with pytest.raises(ConfigError, match=rf"config\.data\.corpus is '{re.escape(source)}'[;,] .*{says}"):
        open_corpus(DataConfig(corpus=source))


def truncated_parquet(folder: Path) -> None:
    write_parquet(folder / "a.parquet")
    (folder / "a.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-20])


def parquet_with_a_broken_page(folder: Path) -> None:
    path = folder / "a.parquet"
    table = pa.table({"text": ["x" * 50, "y" * 50]})
    pyarrow.parquet.write_table(table, path, row_group_size=1, compression="gzip", use_dictionary=False)
    begin = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[begin : begin + 20] = bytes(20)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("write", "kept", "says"),
    [
        (broken("a.jsonl", b'{"text": "x"}\n{"text": \n{"text": "z"}\n'), ["x", "z"], r"a\.jsonl:2 .*byte offset 23"),
        (broken("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n'), ["x"], r"a\.jsonl:2 .*byte offset 2\d: 'utf-8'"),
        (broken("a.txt", b"good\nbad\xff\nfine\n"), ["good\n", "fine\n"], r"a\.txt has 0xff at byte offset 8"),
        (broken("a.txt.gz", gzip.compress(b"text" * 99)[:-9]), [], r"a\.txt\.gz .*it ends at byte offset \d+, in the"),
        (broken("a.txt.zst", zstandard.compress(b"text" * 99)[:-3]), [], r"a\.txt\.zst .*it ends at byte offset \d+"),
        (
            broken("a.txt.gz", gzip.compress(b"text" * 99)[:10] + bytes([7] * 20)),
            [],
            r"a\.txt\.gz .*what begins at byte offset 0",
        ),
        (truncated_parquet, [], r"a\.parquet is not a Parquet file \(byte offset \d+, its end"),
        (parquet_with_a_broken_page, ["x" * 50], r"a\.parquet, row group 1 cannot be read \(byte offset \d+"),
        (lambda folder: write_two_columns_of_a_name(folder / "a.parquet"), [], r"a\.parquet has 2 columns 'text'"),
        (lambda folder: (folder / "a.txt").symlink_to("/proc/self/mem"), [], r"a\.txt cannot be read \(Input/output"),
    ],
)
def test_bad_records_stop_or_are_left_out(tmp_path, capsys, write, kept, says):
    (tmp_path / "b.txt").write_text("last\n")
    write(tmp_path)
    texts, left_out = skipping(tmp_path, document_bytes=6)
    assert texts == [*kept, "last\n"]
    assert len(left_out) == 1 and re.search(says, left_out[0])
    assert capsys.readouterr().err.count("left out: config.data.corpus: ") == 2  # once for each corpus opened
    with pytest.raises(DataError, match=says):
        documents(tmp_path, document_bytes=6)


@pytest.mark.parametrize("encode", [lambda texts: texts, lambda texts: texts.dictionary_encode()], ids=["", "dict"])
def test_of_a_row_group_only_the_broken_rows_are_left_out(tmp_path, encode):
    write_undecodable_parquet(tmp_path / "a.parquet", encode)
    texts, left_out = skipping(tmp_path)
    assert texts == ["ok", "fine"]
    assert [re.search(r"row group 0, row (\d): 'text' cannot", sentence)[1] for sentence in left_out] == ["1", "4"]
