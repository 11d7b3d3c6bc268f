"""A run goes on with the same files under another name of their folder, and reads them as it did when it began."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from lrt_jax.data import records
from lrt_jax.data.begun import Begun
from lrt_jax.data.corpus import Corpus, open_corpus
from lrt_jax.data.faults import DataError
from lrt_jax.setup.config import DataConfig

NAMES = ("a.txt", "sub/b.txt", "sub/c.jsonl")


def write(folder: Path, names=NAMES) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": f"document {i} in {name}"}))
    return folder


def begun_of(corpus: Corpus, **fields) -> Begun:
    return Begun({shard.name: Path(shard.path).stat().st_size for shard in corpus.shards}, **fields)


def opened(source, begun: Begun | None = None, **fields) -> Corpus:
    return open_corpus(DataConfig(corpus=str(source), **fields), begun)


def names_of(corpus: Corpus) -> list[str]:
    return [shard.name for shard in corpus.shards]


def test_names_below_the_root_and_sizes_are_what_counts(tmp_path, monkeypatch):
    before = opened(write(tmp_path / "c"))
    begun = begun_of(before)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("c")
    (tmp_path / "above").mkdir()
    for source in ("c", "./c", "c/", "c/../c", tmp_path / "c", "link"):
        assert names_of(opened(source, begun)) == list(NAMES)
    (tmp_path / "c").rename(tmp_path / "above" / "d")
    for source in ("above/d", "above"):  # where all names have one folder more
        again = opened(source, begun)
        assert names_of(again) == list(NAMES)
        assert [list(shard.texts()) for shard in again.shards] == [
            [(tmp_path / "above" / "d" / name).read_text()] if name.endswith(".txt") else [f"document 2 in {name}"]
            for name in NAMES
        ]


def test_one_file_may_have_another_name(tmp_path):
    file = write(tmp_path, ["a.txt"]) / "a.txt"
    begun = begun_of(opened(file))
    other = file.rename(tmp_path / "b.TXT")
    assert names_of(opened(other, begun)) == ["a.txt"]
    with other.open("a") as stream:
        stream.write("more")
    with pytest.raises(DataError, match=r"1 more, such as b\.TXT; 1 gone, such as a\.txt"):
        opened(other, begun)


def test_other_files_are_refused_with_a_way_on(tmp_path):
    begun = begun_of(opened(write(tmp_path / "c")))
    (tmp_path / "c" / "new.md").write_text("x")
    with pytest.raises(DataError, match=r"has other files than .* \(1 more, such as new\.md\); .*convert export`"):
        opened(tmp_path / "c", begun)
    assert len(names_of(opened(tmp_path / "c", dataclasses.replace(begun, binding=False)))) == 4  # only to be scored
    (tmp_path / "c" / "new.md").unlink()
    (tmp_path / "c" / "a.txt").unlink()
    with pytest.raises(DataError, match=r"\(1 gone, such as a\.txt\)"):
        opened(tmp_path / "c", begun)


def test_a_file_that_is_left_out_whole_is_not_one_more(tmp_path):
    folder = write(tmp_path / "c")
    (folder / "bad.parquet").write_text("no")
    begun = begun_of(opened(folder, on_bad_record="skip"))
    assert names_of(opened(folder, begun, on_bad_record="skip")) == list(NAMES)
    with pytest.raises(DataError, match=r"bad\.parquet is not a Parquet file"):
        opened(folder, begun)


def test_tokens_of_before_are_gone_on_with_as_they_were_read(tmp_path):
    folder = write(tmp_path / "c", [*NAMES, "_temporary/d.txt", "e.json", "f.NDJSON", "_g.jsonl"])
    (folder / "latest").symlink_to("sub")
    before = ["_g.jsonl", "_temporary/d.txt", "a.txt", "latest/b.txt", "latest/c.jsonl", "sub/b.txt", "sub/c.jsonl"]
    begun = Begun({name: (folder / name).stat().st_size for name in before}, as_before=True)
    assert names_of(opened(folder)) == ["a.txt", "e.json", "f.NDJSON", "sub/b.txt", "sub/c.jsonl"]
    assert names_of(opened(folder, begun)) == before
    (folder / "new.txt").write_text("x")  # which would have been read then, too
    with pytest.raises(DataError, match=r"has other files .* \(1 more, such as new\.txt\);"):
        opened(folder, begun)
    for name in ("x.log", "y.json"):  # what was not known was text
        (tmp_path / name).write_text('{"text": "x"}')
        as_text = Begun({name: 13}, as_before=True)
        assert list(opened(tmp_path / name, as_text).shards[0].texts()) == ['{"text": "x"}']


def test_what_tokens_were_made_of_is_known_once_they_are_complete(tmp_path):
    folder = tmp_path / "tokens" / "abc"
    folder.mkdir(parents=True)
    assert records.begun(tmp_path, None) is None
    (folder / "sources.json").write_text(json.dumps({os.fsdecode(b"\xe9.txt"): 3}))
    assert records.begun(tmp_path, "abc") is None
    (folder / "index.json").write_text("{}")
    assert records.begun(tmp_path, "abc") == Begun({os.fsdecode(b"\xe9.txt"): 3}, as_before=True)
    (folder / "index.json").write_text('{"read_as": ""}')
    assert records.begun(tmp_path, "abc", binding=False) == Begun({"\udce9.txt": 3}, binding=False)
    (folder / "sources.json").write_text("[")
    with pytest.raises(DataError, match=r"sources\.json is damaged"):
        records.begun(tmp_path, "abc")
