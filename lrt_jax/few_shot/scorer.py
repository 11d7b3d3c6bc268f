"""Scores of many questions under true recurrence, in batches of few shapes.

What the options of a question begin with is read once; each option then goes on from the state after it. A score does
not depend on which other questions there are, but for the rounding of float32.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from lrt_jax.few_shot.prompts import Question
from lrt_jax.inference import decode, prefill
from lrt_jax.inference.decode import PAD, DecodeState
from lrt_jax.model.model import Model
from lrt_jax.setup import host_memory
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import DecodeConfig

T = TypeVar("T")

# Fewest columns of a batch, and rows of a small one.
COLUMNS = 8
ROWS = 8
# How many logits are computed at once, at most: 128 MB in float32.
LOGITS = 2**25


class Answer(NamedTuple):
    """How a question's options fared.

    Attributes:
      losses: of each option, nats, the sum over its scored tokens; 0 where there are none.
      greedy: of each, whether every scored token is the most likely one.
      refinements: of fixed point: the most that any part of the question took; 0 where scored sequentially.
      fallbacks: chunks that did not converge, and were computed sequentially instead.
    """

    losses: np.ndarray
    greedy: np.ndarray
    refinements: int
    fallbacks: int


class Programs(NamedTuple):
    """What is compiled, once for each shape.

    Attributes:
      read: (model, tokens_RxP, slots) → the state after them, and :class:`_Effort`.
      judge: (model, state, owner_R, tokens_RxN, targets_RxM, scored_RxM) → :class:`_Judged`; row r goes on from the
        state of row ``owner_R[r]``. Targets are of the last M columns: no token of others is scored.
    """

    read: Callable[..., Any]
    judge: Callable[..., Any]


class _Effort(NamedTuple):
    """Of each row, as in :class:`prefill.Prefilled`."""

    refinements_R: jax.Array
    fallbacks_R: jax.Array


class _Judged(NamedTuple):
    """Of each row: the summed loss, whether all its tokens are the most likely ones, and what it took."""

    losses_R: jax.Array
    greedy_R: jax.Array
    effort: _Effort


@functools.lru_cache(maxsize=16)
def programs(mesh: Mesh, how: DecodeConfig, use_memory: bool) -> Programs:
    """The programs of one way of scoring; asked for again, they do not compile again."""

    def read(model: Model, tokens_RxP: jax.Array, slots: int) -> tuple[DecodeState, _Effort]:
        model = model.for_decoding()
        state = decode.start(model.config, len(tokens_RxP), slots)
        done = prefill.run(model, state, tokens_RxP, how, use_memory=use_memory, from_start=True)
        return done.state, everywhere(_Effort(done.refinements_B, done.fallbacks_B))

    def judge(
        model: Model,
        state: DecodeState,
        owner_R: jax.Array,
        tokens_RxN: jax.Array,
        targets_RxM: jax.Array,
        scored_RxM: jax.Array,
    ) -> _Judged:
        model = model.for_decoding()
        mine = jax.tree.map(lambda leaf: jnp.take(leaf, owner_R, axis=0), state)
        done = prefill.run(model, mine, tokens_RxN, how, use_memory=use_memory, keep_hidden=True)
        rows, length = targets_RxM.shape
        hidden_RxMxD = done.hidden_BxNxD[:, -length:]
        columns = max(1, LOGITS // (rows * model.config.vocab_size))
        losses_R, greedy_R = jnp.zeros((rows,)), jnp.ones((rows,), bool)
        for begin in range(0, length, columns):
            part = slice(begin, begin + columns)
            logits_RxmxV = model.logits(hidden_RxMxD[:, part])
            targets_Rxm, scored_Rxm = targets_RxM[:, part], scored_RxM[:, part]
            chosen_Rxm = jnp.take_along_axis(logits_RxmxV, targets_Rxm[:, :, None], axis=-1)[:, :, 0]
            losses_Rxm = jax.nn.logsumexp(logits_RxmxV, axis=-1) - chosen_Rxm
            losses_R = losses_R + jnp.sum(jnp.where(scored_Rxm, losses_Rxm, 0.0), axis=1)
            greedy_R &= jnp.all((jnp.argmax(logits_RxmxV, axis=-1) == targets_Rxm) | ~scored_Rxm, axis=1)
        found = _Judged(losses_R, greedy_R, _Effort(done.refinements_B, done.fallbacks_B))
        return everywhere(found)

    def everywhere(arrays: T) -> T:
        """Every process reads them, so every device has them."""
        return lax.with_sharding_constraint(arrays, meshes.replicated(mesh))

    return Programs(jax.jit(read, static_argnames="slots"), jax.jit(judge))


class _Shape(NamedTuple):
    """Of a batch: columns of what options share, of options and of what is scored; slots of the cache."""

    shared: int
    options: int
    scored: int
    slots: int


class Scorer:
    """Scores questions with one model config, on one mesh."""

    def __init__(self, mesh: Mesh, context: int, how: DecodeConfig, tokens: int, *, use_memory: bool = True):
        """Says how; nothing is compiled yet.

        Args:
          mesh: where to compute.
          context: T, the most tokens that a question may read.
          how: ``prefill`` says whether sequentially, which is exact, or by fixed point.
          tokens: about how many are read at once: rows of a batch times slots of their cache.
          use_memory: False zeroes the memory that the model reads: for ablations.
        """
        self._mesh, self._context, self._how, self._tokens = mesh, context, how, tokens
        self._programs = programs(mesh, how, use_memory)

    def __call__(
        self, model: Model, questions: Sequence[Question], between: Callable[[], None] = lambda: None
    ) -> Iterator[list[tuple[int, Answer]]]:
        """The number and the answer of every question, batch by batch as they are done.

        Args:
          model: what is scored, of the config and on the mesh that this was made for.
          questions: each with at most T tokens in an option, not counting its last.
          between: called before each batch; may raise, to end the scoring.
        """
        by_shape = self._by_shape(questions)
        pending: tuple[Sequence[int], Any] | None = None
        for shape, indices in sorted(by_shape.items(), reverse=True):  # the largest first: it may be too large
            indices.sort(key=lambda index: -len(questions[index].shared))
            rows = self._rows(shape, len(indices))
            for batch in _batches(indices, rows):
                between()
                dispatched = self._dispatch(model, shape, rows, [questions[index] for index in batch])
                if pending is not None:  # fetched only now, so that the device does not wait for the host
                    yield _answers(questions, *pending)
                pending = (batch, dispatched)
        if pending is not None:
            yield _answers(questions, *pending)

    def _shape(self, question: Question) -> _Shape:
        whole = len(question.shared) + question.longest
        if whole > self._context:
            raise ValueError(f"an option reads {whole} tokens; the context has {self._context}")
        sizes = (len(question.shared), question.longest, max(question.scored), whole)
        shared, options, scored, slots = (self._rounded(size) for size in sizes)
        # Token by token, empty first columns of what is shared cost nothing: one shape serves all.
        return _Shape(slots if self._how.prefill == "sequential" else shared, options, scored, slots)

    def _by_shape(self, questions: Sequence[Question]) -> dict[_Shape, list[int]]:
        """The numbers of the questions of each shape; a few of their own shape are padded to that of others."""
        found: dict[_Shape, list[int]] = {}
        for index, question in enumerate(questions):
            found.setdefault(self._shape(question), []).append(index)
        for shape in sorted(found):
            fitting = (other for other in found if other != shape and self._fits(shape, other))
            if len(found[shape]) <= ROWS and (other := min(fitting, default=None)):
                found[other] += found.pop(shape)
        return found

    def _fits(self, shape: _Shape, other: _Shape) -> bool:
        """Whether questions of one shape may be padded to another. By fixed point chunks must stay as they are."""
        larger = all(ours <= theirs for ours, theirs in zip(shape, other, strict=True))
        chunk = self._how.chunk - self._how.chunk % self._how.subsets
        same_chunks = shape.shared == other.shared and other.options <= chunk
        return larger and (self._how.prefill == "sequential" or same_chunks)

    def _rounded(self, number: int) -> int:
        """The smallest size from ``number`` on that batches have: few, since each combination is compiled.

        Four times apart where little is lost by it, and twice from 128 on; T is the largest.
        """
        size = COLUMNS
        while size < number:
            size *= 4 if size < 128 else 2
        return meshes.whole_columns(self._mesh, min(size, self._context))

    def _rows(self, shape: _Shape, questions: int) -> int:
        """Rows of a batch: few on a CPU, where a row costs the same alone; else enough for all, if they fit."""
        rows = ROWS if host_memory.cpu_is_device() else max(ROWS, 1 << (questions - 1).bit_length())
        return meshes.whole_rows(self._mesh, min(rows, max(1, self._tokens // max(shape))))

    def _dispatch(self, model: Model, shape: _Shape, rows: int, questions: Sequence[Question]) -> Any:
        """Starts the computation of a batch; what it returns is still on the device."""
        shared_RxP = np.full((rows, shape.shared), PAD, np.int32)
        for row, question in enumerate(questions):
            _put(shared_RxP[row], question.shared)
        state, effort = self._programs.read(model, self._global(shared_RxP), slots=shape.slots)
        owned = [
            (row, *one) for row, each in enumerate(questions) for one in zip(each.options, each.scored, strict=True)
        ]
        judged = []
        for part in _batches(owned, rows):
            owner_R = np.zeros(rows, np.int32)
            tokens_RxN = np.full((rows, shape.options), PAD, np.int32)
            targets_RxM = np.zeros((rows, shape.scored), np.int32)
            scored_RxM = np.zeros(targets_RxM.shape, bool)
            for row, (owner, option, scored) in enumerate(part):
                owner_R[row] = owner
                _put(tokens_RxN[row], option[:-1])
                _put(targets_RxM[row], option[len(option) - scored :])
                scored_RxM[row, shape.scored - scored :] = True
            arrays = map(self._global, (tokens_RxN, targets_RxM, scored_RxM))
            judged.append(self._programs.judge(model, state, owner_R, *arrays))
        return effort, judged

    def _global(self, array_RxN: np.ndarray) -> jax.Array:
        return meshes.global_batch(self._mesh, array_RxN)


def _answers(
    questions: Sequence[Question], batch: Sequence[int], dispatched: tuple[_Effort, list[_Judged]]
) -> list[tuple[int, Answer]]:
    """Number and answer of each question of a batch, fetched."""
    effort, judged = jax.device_get(dispatched)
    # Rows of all parts one after the other; those that fill up the last one come last.
    losses_n, greedy_n, (refinements_n, fallbacks_n) = jax.tree.map(lambda *parts: np.concatenate(parts), *judged)
    begin, answers = 0, []
    for row, index in enumerate(batch):
        mine = slice(begin, begin := begin + len(questions[index].options))
        answer = Answer(
            losses=losses_n[mine].astype(np.float64),
            greedy=greedy_n[mine],
            refinements=int(max(effort.refinements_R[row], *refinements_n[mine])),
            fallbacks=int(effort.fallbacks_R[row] + fallbacks_n[mine].sum()),
        )
        answers.append((index, answer))
    return answers


def _batches(sequence: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The sequence in parts of so many, the last with what is left."""
    for begin in range(0, len(sequence), size):
        yield sequence[begin : begin + size]


def _put(row_N: np.ndarray, tokens: np.ndarray) -> None:
    """At the end of a row."""
    row_N[len(row_N) - len(tokens) :] = tokens
