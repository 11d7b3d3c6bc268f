"""Which files make a corpus, and the documents in them."""

import gzip
import json
import os
import pickle
import sysconfig
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from corpora import TEXTS, documents, skipping, write_jsonl, write_parquet

from lrt_jax.data.corpus import is_held_out, open_corpus, training_documents
from lrt_jax.data.faults import DataError
from lrt_jax.setup.config import ConfigError, DataConfig


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
    assert [list(shard.texts()) for shard in corpus.shards] == [TEXTS[:2], TEXTS[2:], []]
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
        assert list(shard.texts()) == ([data.decode()] if data else [])


def test_undecodable_library_files_are_skipped(tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_bytes(b"# \xff\n")
    (tmp_path / "good.py").write_bytes(b"x = 1\r\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_bytes(b"y = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert documents("stdlib") == ["x = 1\r\n"]
