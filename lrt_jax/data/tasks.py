"""State tracking: random words over a group as tokens, and the state after each letter as its answer.

The state begins at the identity; after letter g_t it is g_t applied to the state before. Every position has an answer,
so the loss is on answers only, and no token is a target. A model that keeps its state in the memory has one group
operation to do for each token, however long the word; what a Transformer can do in one forward ends with its depth
(Merrill, Petty and Sabharwal, "The Illusion of State in State-Space Models", arXiv 2404.08819).

Words are drawn, not stored: row r of seed s is always the same word.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from lrt_jax.data.pipeline import Batch, stream
from lrt_jax.setup.config import Config, ConfigError

# Ends the seed of words that are scored, which no row of training below 2³² has. Short words may be the same all the
# same.
HELD_OUT = 1
# Symbols of a word that the report of a bad step shows.
DESCRIBED = 32


class Group(NamedTuple):
    """A finite group whose elements are the numbers 0 to N - 1, 0 the identity.

    Attributes:
      product_NxN: int32; ``product_NxN[g, s]`` is the state after letter g in state s.
      letters: int32, the elements that words are made of.
      guess: the share of right answers of who knows nothing but how long a long word is.
    """

    product_NxN: np.ndarray
    letters: np.ndarray
    guess: float


@functools.cache
def group(task: str) -> Group:
    """The group of ``config.data.task``.

    ``parity`` and ``mod5`` are sums modulo 2 and 5. ``s5`` is all 120 permutations of five things; ``swap_s5`` has the
    same states, and words of the ten swaps of two things.
    """
    modulus = {"parity": 2, "mod5": 5}.get(task)
    if modulus is not None:
        elements = np.arange(modulus, dtype=np.int32)
        return Group((elements[:, None] + elements[None]) % modulus, elements, 1 / modulus)
    permutations = list(itertools.permutations(range(5)))
    number = {permutation: index for index, permutation in enumerate(permutations)}
    product = [[number[tuple(g[i] for i in s)] for s in permutations] for g in permutations]
    moved = [sum(i != at for at, i in enumerate(permutation)) for permutation in permutations]
    letters = range(len(permutations)) if task == "s5" else (index for index, count in enumerate(moved) if count == 2)
    # A swap is odd, so of an even number of them the state is even.
    reached = len(permutations) // (1 if task == "s5" else 2)
    return Group(np.array(product, np.int32), np.array([*letters], np.int32), 1 / reached)


def words(task: str, seeds: Sequence[Sequence[int]], length: int) -> Batch:
    """One word of ``length`` letters for each seed, and its answers; the start of a longer word is the shorter one."""
    product_NxN, letters, _ = group(task)
    chosen_BxT = np.stack([np.random.default_rng(seed).integers(len(letters), size=length) for seed in seeds])
    tokens_BxT = letters[chosen_BxT]
    answers_BxT = np.empty_like(tokens_BxT)
    state_B = np.zeros(len(tokens_BxT), np.int32)
    for position in range(length):
        state_B = answers_BxT[:, position] = product_NxN[tokens_BxT[:, position], state_B]
    return Batch(tokens_BxT, answers_BxT)


def training_batches(config: Config, here: Sequence[int] | None = None) -> grain.DatasetIterator[Batch]:
    """Batches of words of T letters without end, each drawn by itself; ``here`` as in ``pipeline.training_batches``.

    Raises:
      ConfigError: the vocabulary is too small for the task.
    """
    check(config)
    size = config.train.batch_size
    here = range(size) if here is None else here
    steps = _Steps(config.data.task, config.seed, config.model.sequence_length, size, here)
    return stream(grain.MapDataset.source(steps), config, name=f"task {config.data.task}", tokenizer="")


def held_out_words(config: Config, rows: int, length: int) -> Batch:
    """Words that are scored, the same ones for every seed of the config."""
    return words(config.data.task, [(row, 0, HELD_OUT) for row in range(rows)], length)


def check(config: Config) -> None:
    """Checks that the model has a symbol for every state.

    Raises:
      ConfigError: it has not.
    """
    task, vocabulary = config.data.task, config.model.vocab_size
    states = len(group(task).product_NxN)
    if vocabulary < states:
        raise ConfigError(
            f"config.model.vocab_size is {vocabulary}; config.data.task = {task!r} has {states} states, and it must be "
            "that or more"
        )


def described(batch: Batch) -> list[str]:
    """What a batch is made of, a line per row."""
    first = slice(0, DESCRIBED)
    return [
        f"row {row}: letters {' '.join(map(str, tokens_T[first]))} … answers {' '.join(map(str, answers_T[first]))} …"
        for row, (tokens_T, answers_T) in enumerate(zip(*batch, strict=True))
    ]


class _Steps:
    """The words of every step on this process, by the step's number: what Grain reads from."""

    def __init__(self, task: str, seed: int, length: int, batch_size: int, here: Sequence[int]):
        self._task, self._seed, self._length, self._batch_size, self._here = task, seed, length, batch_size, here

    def __len__(self) -> int:
        return (2**63 - 1) // self._batch_size

    def __getitem__(self, step: int) -> Batch:
        seeds = [(self._seed, step * self._batch_size + row) for row in self._here]
        return words(self._task, seeds, self._length)
