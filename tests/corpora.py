"""Small corpora that tests write, and their documents."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from lrt_jax.data.corpus import open_corpus
from lrt_jax.setup.config import DataConfig

TEXTS = ["first document", "zweites Dokument: ä\r\n", "third\u2028with a separator", "😀 last"]


def documents(source, **fields) -> list[str]:
    corpus = open_corpus(DataConfig(corpus=str(source), **fields))
    return [text for shard in corpus.shards for text in shard.texts()]


def write_jsonl(path: Path, texts=TEXTS, field="text") -> bytes:
    data = "\n".join(json.dumps({"id": i, field: text}) for i, text in enumerate(texts)).encode() + b"\n\n"
    path.write_bytes(data)
    return data


def write_parquet(path: Path, texts=TEXTS, column="text", rows=2) -> None:
    pyarrow.parquet.write_table(pa.table({"id": range(len(texts)), column: texts}), path, row_group_size=rows)


def skipping(source, **fields) -> tuple[list[str], list[str]]:
    """The documents of a corpus without its bad records, and what is said of those; the same twice."""
    found = []
    for _ in range(2):
        corpus = open_corpus(DataConfig(corpus=str(source), on_bad_record="skip", **fields))
        texts = [text for shard in corpus.shards for text in shard.texts()]
        again = [text for shard in corpus.shards for text in shard.texts()]
        assert texts == again
        found.append((texts, corpus.bad.left_out))
    assert found[0] == found[1]
    return found[0]
