import gzip
import json
import os
import pickle
import re
import sys
import sysconfig
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from lrt_jax.data.corpus import is_held_out, open_corpus, training_documents
from lrt_jax.data.faults import DataError
from lrt_jax.setup.config import ConfigError, DataConfig

TEXTS = ["first document", "zweites Dokument: ä\r\n", "third\u2028with a separator", "😀 last"]


def documents(source, **fields) -> list[str]:
    corpus = open_corpus(DataConfig(corpus=str(source), **fields))
    return [text for shard in corpus.shards for text in shard.documents()]


def write_jsonl(path: Path, texts=TEXTS, field="text") -> bytes:
    data = "\n".join(json.dumps({"id": i, field: text}) for i, text in enumerate(texts)).encode() + b"\n\n"
    path.write_bytes(data)
    return data


def write_parquet(path: Path, texts=TEXTS, column="text", rows=2) -> None:
    pyarrow.parquet.write_table(pa.table({"id": range(len(texts)), column: texts}), path, row_group_size=rows)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".PY"])
@pytest.mark.parametrize("compress", [None, gzip.compress, zstandard.compress], ids=["plain", "gz", "zst"])
def test_text_keeps_its_bytes(tmp_path, suffix, compress):
    data = "a\r\nb\rc\n\tä\u2028x".encode()
    path = tmp_path / f"file{suffix}{ {None: '', gzip.compress: '.gz', zstandard.compress: '.zst'}[compress] }"
    path.write_bytes(compress(data) if compress else data)
    assert documents(path) == [data.decode()]


def test_several_zstd_frames_are_all_read(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
    assert documents(tmp_path) == ["one two"]


def test_zstd_with_a_long_window_and_frames_to_skip_is_read(tmp_path):
    options = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=options).compressobj()
    skipped = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"abcd"  # as pzstd writes
    (tmp_path / "a.txt.zst").write_bytes(skipped + compressor.compress(b"one") + compressor.flush() + skipped)
    assert documents(tmp_path) == ["one"]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.txt.zst", bytes.fromhex("28b52ffd00b8"), r"than 2 GiB; compress it again with --long=31"),
        ("a.txt.zst", bytes.fromhex("28b52ffd2107030300") + b"abcd", r"it was compressed with a dictionary"),
        ("a.txt.gz", b"\x1f\x8b\x09\0" + bytes(20), r"unknown compression method\): it may be intact, but"),
        ("a.txt.gz", b"plain text", r"b'plai' begins nothing of gzip\); it is damaged, or has another format than"),
        ("a.txt.zst", gzip.compress(b"x", mtime=0), r"begins nothing of Zstandard\); it is damaged, or has another"),
    ],
)
def test_what_a_decoder_refuses_is_not_called_damaged(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"{name} cannot be decompressed .*{says}") as raised:
        documents(tmp_path)
    assert "it is damaged" not in str(raised.value).replace("it is damaged, or has another format", "")


def test_of_a_large_file_little_is_held(tmp_path):
    texts = [f"{i * i} " * 40 for i in range(40_000)]  # 14 MB
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "a.txt").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    rows = pa.table({"text": texts})
    pyarrow.parquet.write_table(rows, tmp_path / "c.parquet", use_dictionary=False)
    for name, count in (("a.txt", 960), ("b.jsonl.gz", len(texts)), ("c.parquet", len(texts))):
        corpus = open_corpus(DataConfig(corpus=str(tmp_path / name)))
        tracemalloc.start()
        held = pa.total_allocated_bytes()
        found = 0
        for found, _ in enumerate((text for shard in corpus.shards for text in shard.texts()), 1):
            assert found % 1000 or pa.total_allocated_bytes() - held < 4e6
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found >= count and peak < 4e6


@pytest.mark.parametrize("compress", [None, gzip.compress, zstandard.compress], ids=["plain", "gz", "zst"])
def test_jsonl_has_a_document_per_line(tmp_path, compress):
    path = tmp_path / "a.jsonl"
    data = write_jsonl(path, [*TEXTS, "", None], field="body")
    if compress:
        path = tmp_path / ("b.jsonl.gz" if compress is gzip.compress else "b.jsonl.zst")
        path.write_bytes(compress(data))
    assert documents(path, text_field="body") == TEXTS


def test_parquet_has_a_shard_per_row_group(tmp_path):
    write_parquet(tmp_path / "a.parquet", [*TEXTS, None], column="body")
    corpus = open_corpus(DataConfig(corpus=str(tmp_path), text_field="body"))
    assert [shard.documents() for shard in corpus.shards] == [TEXTS[:2], TEXTS[2:], []]
    assert [shard.name for shard in corpus.shards] == ["a.parquet#0", "a.parquet#1", "a.parquet#2"]


def test_a_folder_is_read_to_its_depths_in_order_of_names(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.py", "B.txt", "notes.pdf", ".hidden.txt", ".git/x.txt", "a/_d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    write_jsonl(tmp_path / "a" / "y.jsonl")
    assert documents(tmp_path) == ["B.txt", "a/_d.py", "a/b/c.py", *TEXTS, "a/z.md", "b.txt"]
    assert documents(f"{tmp_path}/*.txt") == ["B.txt", "b.txt"]
    assert documents(f"{tmp_path}/*/?.[mp]*") == ["a/z.md"]
    with pytest.raises(ConfigError, match=r"notes\.pdf has the suffix '\.pdf', .* allowed are \.txt, .*data\.format"):
        documents(f"{tmp_path}/*.pdf")
    assert documents(f"{tmp_path}/*.pdf", format="text") == ["notes.pdf"]


def test_json_lines_are_told_by_suffix_whatever_its_case_and_never_read_as_text(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl")
    for name in ("b.json", "c.ndjson", "D.JSONL", "e.Json.GZ", "f.json.zst"):
        compress = {"z": gzip.compress, "t": zstandard.compress}.get(name.lower()[-1], bytes)
        (tmp_path / name).write_bytes(compress(data))
        assert documents(tmp_path / name) == TEXTS
    for name, text in (("info.json", '{\n "features": {}\n}'), ("list.json", '[{"text": "x"}]'), ("one.json", "{}")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=rf"{name} is one JSON value, and no JSON Lines"):
            documents(tmp_path / name)
    corpus = open_corpus(DataConfig(corpus=str(tmp_path)))
    assert len(corpus.shards) == 6
    assert corpus.read_as == (
        "corpus: 6 files as JSON Lines (.jsonl 2, .json 1, .ndjson 1, .json.gz 1, .json.zst 1); "
        "not read: .json of one value 3"
    )
    (tmp_path / "g.json").write_bytes(data[:30] + b"\n" + data)  # a broken record, not another format
    with pytest.raises(DataError, match=r"g\.json:1 is not valid JSON"):
        documents(tmp_path)
    (tmp_path / "no suffix").write_bytes(data)
    with pytest.raises(ConfigError, match=r"no suffix has no suffix, which does not say what it holds"):
        documents(tmp_path / "no suffix")
    assert documents(tmp_path / "no suffix", format="jsonl") == TEXTS


def test_what_data_engines_leave_in_a_folder_is_not_read(tmp_path):
    for name in ("_delta_log/0.json", "_change_data/c.parquet", "_temporary/0/part-0.txt", "_SUCCESS", "_x/y.jsonl",
                 ".part.jsonl.crc", ".staging/a.jsonl", "_metadata.parquet", "__MACOSX/a.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("no document")
    for name in ("day=1/a.jsonl", "_day=2/a.jsonl", "_notes/a.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text('{"text": "x"}')
    corpus = open_corpus(DataConfig(corpus=str(tmp_path)))
    assert [shard.name for shard in corpus.shards] == ["_day=2/a.jsonl", "_notes/a.txt", "day=1/a.jsonl"]
    assert corpus.read_as.endswith("; not read: other tools' 7, hidden 2")
    assert len(open_corpus(DataConfig(corpus=f"{tmp_path}/*/*")).shards) == 3
    with pytest.raises(DataError, match=r"_x/y\.jsonl:1 is not valid"):
        documents(f"{tmp_path}/_x/*")


def test_links_are_followed_and_no_file_is_read_twice(tmp_path):
    root, other = tmp_path / "data", tmp_path / "other"
    for name in ("data/a.txt", "data/sub/b.txt", "other/c.txt", "elsewhere.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for name, to in (("l1", "."), ("sub/l2", ".."), ("A", "sub"), ("up", "../.."), ("a2.txt", "a.txt"), ("o", other),
                     ("p", other), ("q.txt", "../elsewhere.txt"), ("self.txt", "self.txt")):  # fmt: skip
        (root / name).symlink_to(to)
    (other / "back").symlink_to(root)
    corpus = open_corpus(DataConfig(corpus=str(root)))
    assert [shard.name for shard in corpus.shards] == ["a.txt", "o/c.txt", "q.txt", "self.txt", "sub/b.txt"]
    assert corpus.read_as.endswith("not read: links to what is read 7")
    assert [shard.name for shard in open_corpus(DataConfig(corpus=f"{root}/[Aops]*/?.txt")).shards] == [
        "o/c.txt",
        "sub/b.txt",
    ]
    with pytest.raises(DataError, match=r"self\.txt cannot be read \(Too many levels of symbolic links\)"):
        documents(root)


def test_odd_names_and_kinds_of_files(tmp_path):
    latin = os.fsdecode(b"caf\xe9.txt")
    names = ["\U0001f600 a b.txt", "line\nend.txt", "x" * 251 + ".txt", latin, "A.txt", "a.txt", "[1] x.txt"]
    for name in names:
        (tmp_path / name).write_text(name[0])
        assert documents(tmp_path / name) == [name[0]]
    assert len(documents(tmp_path)) == len(names)
    (tmp_path / "[b]").mkdir()
    (tmp_path / "[b]" / "x.txt").write_text("in brackets")
    assert documents(f"{tmp_path}/[b]/*.txt") == ["in brackets"]
    (tmp_path / latin).write_bytes(b"\xff")
    (tmp_path / "line\nend.txt").write_bytes(b"\xff")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"no file to read; it is a link to nowhere, which is not there"):
        documents(tmp_path / "gone.txt")
    _, left_out = skipping(tmp_path)
    told = [sentence.partition(f"{tmp_path}/")[2] for sentence in left_out]
    assert [sentence.split(" ", 1)[0] for sentence in told] == [
        r"caf\xe9.txt",
        "gone.txt",
        r"line\nend.txt",
        "pipe.txt",
    ]
    assert all(sentence.isprintable() and sentence.encode() for sentence in left_out)
    for device, what in (("/dev/null", "a device"), (str(tmp_path / "pipe.txt"), "a pipe")):
        for how in ("text", "auto"):
            with pytest.raises(DataError, match=rf"{device} is {what}; it must be a regular file"):
                documents(device, format=how)


def test_places_are_expanded_and_what_is_nowhere_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert documents("~/a.txt") == documents("~/*.txt") == documents("~") == ["at home"]
    for source, says in (
        ("~nobody-here/a.txt", r"~nobody-here is no user with a home here"),
        ("x" * 300, "where there is no file to read"),
        ("a\0b", r"is 'a\\x00b', where there is no file"),
        ("gs://bucket/a/../b", r"name it without \.\."),
    ):
        with pytest.raises(ConfigError, match=says):
            documents(source)


def test_shards_can_be_pickled(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    corpus = open_corpus(DataConfig(corpus=str(tmp_path)))
    assert pickle.loads(pickle.dumps(corpus)) == corpus


def test_long_text_is_cut_at_line_ends(tmp_path):
    lines = [f"line {i} " + "ä" * (i % 50) + "\n" for i in range(500)]
    (tmp_path / "a.txt").write_text("".join(lines))
    pieces = documents(tmp_path, document_bytes=400)
    assert "".join(pieces) == "".join(lines)
    assert all(piece.endswith("\n") and len(piece.encode()) <= 400 for piece in pieces)
    assert all(len(piece.encode()) > 400 - 120 for piece in pieces[:-1])


@pytest.mark.parametrize("document_bytes", [1, 2, 3, 7])
def test_a_line_longer_than_a_document_is_cut_between_characters(tmp_path, document_bytes):
    text = "aä€😀" * 20
    (tmp_path / "a.txt").write_text(text)
    pieces = documents(tmp_path, document_bytes=document_bytes)
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) < document_bytes + 4


def test_appended_text_leaves_earlier_pieces_equal(tmp_path):
    text = "".join(f"line {i}\n" * (i % 5) for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    before = documents(tmp_path, document_bytes=100)
    for more in ("x", "\n", "more\n" * 100):
        (tmp_path / "a.txt").write_text(text + more)
        assert documents(tmp_path, document_bytes=100)[: len(before) - 1] == before[:-1]


def test_the_split_is_stable_and_about_as_large_as_asked():
    texts = [f"document {i}" for i in range(4000)]
    kept = [text for text in texts if is_held_out(text, 0.1)]
    assert 300 < len(kept) < 500
    assert set(kept) < {text for text in texts if is_held_out(text, 0.2)}
    # Fixed for all time: another hash would move documents of existing runs from one side to the other.
    assert [i for i in range(60) if is_held_out(f"document {i}", 0.1)] == [40, 44, 59]


def test_added_files_and_duplicates_do_not_move_documents(tmp_path):
    def split():
        config = DataConfig(corpus=str(tmp_path), held_out=0.3)
        return set(training_documents(open_corpus(config).shards, config)), set(documents(tmp_path))

    for i in range(40):
        (tmp_path / f"b{i}.txt").write_text(f"document {i}")
    train, every = split()
    assert 0 < len(train) < len(every)
    for i in range(40):
        (tmp_path / f"a{i}.txt").write_text(f"document {i + 20}")  # half of them seen before
    train_after, every_after = split()
    assert train_after & every == train
    assert len(every_after) == 60


def test_no_training_documents_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("all alone")
    config = DataConfig(corpus=str(tmp_path), held_out=0.9999999)
    with pytest.raises(DataError, match=r"config\.data\.corpus.*config\.data\.held_out = 0\.9999999"):
        list(training_documents(open_corpus(config).shards, config))


def test_the_standard_library_is_read_exactly():
    corpus = open_corpus(DataConfig())
    root = Path(sysconfig.get_path("stdlib"))
    names = [shard.name for shard in corpus.shards]
    assert names == sorted(names)
    assert {"abc.py", "json/decoder.py", "argparse.py"} < set(names)
    assert not [name for name in names if "site-packages" in name or "__pycache__" in name]
    for shard in [shard for shard in corpus.shards if shard.name.startswith("json/")]:
        data = (root / shard.name).read_bytes()
        assert shard.documents() == ([data.decode()] if data else [])


def test_undecodable_library_files_are_skipped(tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_bytes(b"# \xff\n")
    (tmp_path / "good.py").write_bytes(b"x = 1\r\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_bytes(b"y = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert documents("stdlib") == ["x = 1\r\n"]


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


def skipping(source, **fields) -> tuple[list[str], list[str]]:
    """The documents of a corpus without its bad records, and what is said of those; the same twice."""
    found = []
    for _ in range(2):
        corpus = open_corpus(DataConfig(corpus=str(source), on_bad_record="skip", **fields))
        texts = [text for shard in corpus.shards for text in shard.documents()]
        again = [text for shard in corpus.shards for text in shard.documents()]
        assert texts == again
        found.append((texts, corpus.bad.left_out))
    assert found[0] == found[1]
    return found[0]


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
