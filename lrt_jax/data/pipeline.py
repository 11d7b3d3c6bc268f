"""From rows of tokens to batches: Grain for training, a fixed selection for evaluation."""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from lrt_jax.data.corpus import Corpus, is_held_out
from lrt_jax.data.faults import DataError
from lrt_jax.data.records import Records
from lrt_jax.data.tokenizer import FILE, Tokenizer
from lrt_jax.setup.config import Config

# Batches read at once: enough to hide a bucket's latency.
THREADS = 4
# Characters by which a document is told.
DESCRIBED = 60


class Batch(NamedTuple):
    """Rows of a step on one process; targets are the tokens that follow."""

    tokens_BxT: np.ndarray  # int32
    targets_BxT: np.ndarray  # int32


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Validation rows: consecutive stretches of the held-out text."""

    tokens_NxT: np.ndarray  # int32
    targets_NxT: np.ndarray  # int32; each token of the stretch but the first, once
    text: bytes  # the UTF-8 bytes of the targets, in order; special tokens have none


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The rows of every step on this process, by the step's number: what Grain reads from."""

    rows: grain.MapDataset[np.ndarray]
    batch_size: int
    here: tuple[int, ...]

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size

    def __getitem__(self, step: int) -> Batch:
        rows = np.stack([self.rows[step * self.batch_size + row] for row in self.here])
        return Batch(rows[:, :-1], rows[:, 1:])


class _Batches(grain.DatasetIterator[Batch]):
    """Batches whose state is the same on every process: the records' name and tokenizer, the next row's number."""

    def __init__(self, parent: grain.DatasetIterator[Batch], name: str, tokenizer: str, batch_size: int):
        super().__init__(parent)
        self._name, self._tokenizer, self._batch_size = name, tokenizer, batch_size

    def __next__(self) -> Batch:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        next_row = self._parent.get_state()["next_index"] * self._batch_size
        return {"records": self._name, "tokenizer": self._tokenizer, "next_row": next_row}

    def set_state(self, state: dict[str, Any]) -> None:
        before = state.get("tokenizer")  # older checkpoints do not say it
        if before not in (None, self._tokenizer):
            raise DataError(
                f"the tokenizer is another than when this run began (its SHA-256 was {before}, now {self._tokenizer}); "
                f"the run goes on only with the same {FILE}, or begins anew in another --workdir"
            )
        if state["records"] != self._name:
            what = "has other files" if before else "has other files, or the work dir another tokenizer,"
            raise DataError(
                f"config.data.corpus {what} than when this run began (its tokens were {state['records']}, now "
                f"{self._name}); the run goes on only with the same ones, or begins anew in another --workdir, if with "
                "these parameters by `python -m lrt_jax.convert export`, then `import`"
            )
        self._parent.set_state({"next_index": state["next_row"] // self._batch_size})


def training_batches(
    config: Config, records: Records, here: Sequence[int] | None = None
) -> grain.DatasetIterator[Batch]:
    """Batches without end: every epoch has all rows, in another order.

    The global stream is rows of the records, shuffled anew each epoch; batch k holds its rows k B to k B + B - 1,
    whoever reads them. The iterator's state is the number of the next row, the same on every process.
    ``here`` are the rows of a batch, from 0 to B - 1, that this process needs; None: all.
    """
    size = config.train.batch_size
    rows = grain.MapDataset.source(records).shuffle(config.seed % 2**31).repeat()
    steps = grain.MapDataset.source(_Steps(rows, size, tuple(range(size) if here is None else here)))
    return stream(steps, config, name=records.name, tokenizer=records.tokenizer)


def stream(
    steps: grain.MapDataset[Batch], config: Config, *, name: str, tokenizer: str
) -> grain.DatasetIterator[Batch]:
    """The batches of steps, read ahead; ``name`` and ``tokenizer`` tell, when a run goes on, whether they are those."""
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=max(config.data.prefetch, THREADS))
    return _Batches(iter(steps.to_iter_dataset(options)), name, tokenizer, config.train.batch_size)


def held_out_rows(config: Config, corpus: Corpus, tokenizer: Tokenizer, rows: int) -> HeldOut:
    """Up to ``rows`` rows of T held-out tokens and their targets, the same for every seed and process.

    Shards are visited in an order given by a hash of their names, so that added files disturb little. Rows
    overlap by one token. Where the corpus has fewer, all full rows are returned.

    Raises:
      DataError: the held-out documents do not fill one row.
    """
    length = config.model.sequence_length
    wanted = rows * length + 1
    found: list[np.ndarray] = []
    total = 0
    shards = sorted(corpus.shards, key=lambda shard: hashlib.blake2b(os.fsencode(shard.name)).digest())
    for text in (text for shard in shards for text in shard.texts() if is_held_out(text, config.data.held_out)):
        found.append(_with_bos(text, tokenizer))
        total += len(found[-1])
        if total >= wanted:
            break
    count = min(rows, (total - 1) // length)
    if count < 1:
        raise DataError(
            f"config.data.corpus is {corpus.source!r}, whose held-out documents have {total} tokens; one row of "
            f"evaluation needs {length + 1}: raise config.data.held_out = {config.data.held_out}, lower "
            "config.model.sequence_length or config.data.document_bytes, or add text"
        )
    stream = np.concatenate(found)[: count * length + 1]
    targets = stream[1:]
    return HeldOut(stream[:-1].reshape(count, length), targets.reshape(count, length), tokenizer.decode_bytes(targets))


def described(batch: Batch, tokenizer: Tokenizer) -> list[str]:
    """What a batch is made of, a line per row: how each document in it begins, or goes on."""
    lines = []
    for row, tokens_T in enumerate(batch.tokens_BxT):
        pieces = np.split(tokens_T, np.flatnonzero(tokens_T == tokenizer.bos_id))
        texts = [tokenizer.decode(piece) for piece in pieces if len(piece)]
        lines.append(f"row {row}: " + " | ".join(repr(text[:DESCRIBED]) for text in texts))
    return lines


def _with_bos(text: str, tokenizer: Tokenizer) -> np.ndarray:
    return np.concatenate([np.array([tokenizer.bos_id], np.int32), tokenizer.encode(text)])
