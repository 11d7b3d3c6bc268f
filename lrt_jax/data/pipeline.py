"""From documents to rows of tokens: Grain for training, a fixed selection for evaluation."""

import dataclasses
import hashlib
import itertools
from typing import Any, NamedTuple

import grain
import numpy as np

from lrt_jax.data.corpus import Corpus, DataError, Shard, is_held_out, training_documents
from lrt_jax.data.tokenizer import Tokenizer
from lrt_jax.setup.config import Config, ConfigError

# Shards read ahead by threads: enough to hide a bucket's latency, and few, since each is held whole.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)


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

    @property
    def bytes(self) -> int:
        """How many UTF-8 bytes the targets stand for: the denominator of bits per byte."""
        return len(self.text)


@dataclasses.dataclass(frozen=True)
class _TrainingDocuments(grain.experimental.FlatMapTransform):
    """The documents of a shard that are not held out."""

    held_out: float

    def flat_map(self, element: list[str]) -> list[str]:
        return [text for text in element if not is_held_out(text, self.held_out)]


class _Tokens(grain.IterDataset):
    """The token rows of a packed dataset, whose state survives JSON.

    Grain's packing keeps slices in its state and compares them with a tuple, while a checkpoint returns a list:
    restored as it is, it drops the document that begins where a row began.
    """

    def __iter__(self) -> grain.DatasetIterator:
        return _TokensIterator(iter(self._parent))


class _TokensIterator(grain.DatasetIterator):
    def __next__(self) -> np.ndarray:
        return next(self._parent)["tokens"]

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        slices = {feature: tuple(slice_) for feature, slice_ in state["remainder_slices"].items()}
        self._parent.set_state(state | {"remainder_slices": slices})


def training_batches(
    config: Config, corpus: Corpus, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator[Batch]:
    """This process's batches, without end: every epoch has the same documents in another order.

    Documents, each with BOS in front, are concatenated and cut into rows of T + 1 tokens: nothing is lost
    and nothing padded. The rows are then shuffled too, so that a small batch is not all of one document. The
    iterator's state is a few numbers and restores exactly, on the same corpus.

    Args:
      config: the run.
      corpus: its documents.
      tokenizer: its tokens.
      process_index: which process this is, 0 to ``process_count`` - 1; it reads every ``process_count``-th shard.
      process_count: how many processes share a batch of ``config.train.batch_size`` rows.

    Raises:
      ConfigError: the batch or the corpus cannot be shared by so many processes.
      DataError: there is no document to train on; later, from ``next``, a shard is unusable.
    """
    rows_here, rest = divmod(config.train.batch_size, process_count)
    if rest:
        raise ConfigError(
            f"config.train.batch_size is {config.train.batch_size}; it must be a multiple of the number of processes, "
            f"{process_count}"
        )
    shards = corpus.shards[process_index::process_count]
    if not shards:
        raise ConfigError(
            f"config.data.corpus is {corpus.source!r}, which has {len(corpus.shards)} shards (files, or row groups of "
            f"Parquet); {process_count} processes need one each, so split it into more files"
        )
    # A corpus smaller than the window is shuffled whole, so that no document comes twice before another came once.
    # Counting also raises where there is no document: the endless stream below would search forever.
    window = sum(1 for _ in itertools.islice(training_documents(shards, config.data), config.data.shuffle_window))
    seed = config.seed % 2**31
    rows = grain.MapDataset.source(shards).shuffle(seed).repeat().map(Shard.documents).to_iter_dataset(READ_OPTIONS)
    rows = grain.experimental.FlatMapIterDataset(rows, _TrainingDocuments(config.data.held_out))
    rows = grain.experimental.WindowShuffleIterDataset(rows, window_size=window, seed=seed)
    rows = rows.map(lambda text: {"tokens": _with_bos(text, tokenizer)})
    rows = grain.experimental.ConcatThenSplitIterDataset(
        rows, length_struct={"tokens": config.model.sequence_length + 1}
    )
    rows = _Tokens(rows)
    if config.data.shuffle_rows > 1:
        rows = grain.experimental.WindowShuffleIterDataset(rows, window_size=config.data.shuffle_rows, seed=seed)
    batches = rows.batch(rows_here).map(_split)
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=config.data.prefetch))


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
    for shard in sorted(corpus.shards, key=lambda shard: hashlib.blake2b(shard.name.encode()).digest()):
        if total >= wanted:
            break
        for text in shard.documents():
            if is_held_out(text, config.data.held_out):
                found.append(_with_bos(text, tokenizer))
                total += len(found[-1])
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


def _with_bos(text: str, tokenizer: Tokenizer) -> np.ndarray:
    return np.concatenate([np.array([tokenizer.bos_id], np.int32), tokenizer.encode(text)])


def _split(rows: Any) -> Batch:
    """Rows of T + 1 tokens as inputs and targets."""
    return Batch(rows[:, :-1], rows[:, 1:])
