"""Parquet files from elsewhere: whatever is wrong with one is one sentence, and ends no process."""

import io
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from lrt_jax.data import parquet
from lrt_jax.data.corpus import open_corpus
from lrt_jax.data.faults import DataError
from lrt_jax.setup.config import DataConfig

TEXTS = [f"document {i}" for i in range(600)]  # of more than two batches


def written(**options) -> bytes:
    data = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"text": TEXTS}), data, **options)
    return data.getvalue()


def footer_of(data: bytes) -> range:
    return range(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data))


def read(path: Path, policy="stop") -> tuple[list[str], list[str]]:
    """The documents, and what is said of those that are left out."""
    corpus = open_corpus(DataConfig(corpus=str(path.parent), on_bad_record=policy))
    return [text for shard in corpus.shards for text in shard.texts()], corpus.bad.left_out


def test_rows_are_read_in_batches_and_counted_through(tmp_path):
    texts = [*TEXTS]
    texts[parquet.ROWS] = None
    column = pa.array([b"\xff" if i == 599 else (text and text.encode()) for i, text in enumerate(texts)])
    pyarrow.parquet.write_table(pa.table({"text": column.view(pa.string())}), tmp_path / "a.parquet")
    found, left_out = read(tmp_path / "a.parquet", "skip")
    assert found == [text for text in texts[:-1] if text]
    assert [re.search(r"row (\d+): 'text' cannot", sentence)[1] for sentence in left_out] == ["599"]


def test_no_flipped_bit_of_a_footer_is_more_than_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_begin_of", lambda *_: None)  # which starts a process
    data, path = written(), tmp_path / "a.parquet"
    said = set()
    for at in footer_of(data)[::2]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << (at % 8)
        path.write_bytes(flipped)
        try:
            read(path)
        except DataError as error:
            said.add(re.sub(r"\(.*\)", "", str(error)).partition(f"{path}")[2])
    assert {" is not a Parquet file ; it is damaged", ", row group 0 cannot be read ; it is damaged"} < said
    assert len(said) < 20


def test_where_a_page_begins_is_asked_for_in_another_process(tmp_path):
    data, path = written(), tmp_path / "a.parquet"
    path.write_bytes(data)
    begin = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    assert parquet._begin_of(str(path), 0, "text") == begin
    assert parquet._begin_of(str(tmp_path / "gone.parquet"), 0, "text") is None


def test_what_pyarrow_does_not_decode_is_not_called_damaged(tmp_path):
    data, path = bytearray(written(compression="snappy")), tmp_path / "a.parquet"
    at = data.index(b"\x04text\x15\x02", footer_of(data)[0]) + 6
    data[at] = 3 << 1  # the codec, LZO
    path.write_bytes(data)
    with pytest.raises(
        DataError, match=r"row group 0 cannot be read \(byte offset \d+: .*LZO.*\); it may be intact, but"
    ):
        read(path)
    path.write_bytes(written()[:-4] + b"PARE")  # as files with an encrypted footer end
    with pytest.raises(
        DataError, match=r"a\.parquet is a Parquet file that cannot be read \(.*ncrypt.*it may be intact"
    ):
        read(path)


def test_of_a_damaged_row_group_nothing_is_used_where_bad_records_are_left_out(tmp_path):
    table, path = pa.table({"text": [f"{i} " * 50 for i in range(2000)]}), tmp_path / "a.parquet"
    options = {"use_dictionary": False, "write_page_checksum": True, "data_page_size": 1000, "compression": "none"}
    pyarrow.parquet.write_table(table, path, **options)
    data = bytearray(path.read_bytes())
    data[footer_of(data)[0] - 500] ^= 1  # in the last pages
    path.write_bytes(data)
    (tmp_path / "b.txt").write_text("last")
    found, left_out = read(path, "skip")
    assert found == ["last"] and len(left_out) == 1
