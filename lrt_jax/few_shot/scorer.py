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
# Slots of all rows' cache up to which a CPU gains by more rows than ROWS (docs/LOG.md).
CPU_SLOTS = 1024


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
      read: (model, tokens_RxP, slots) → the state after them, and :class:`_Effort`. The model is as
        ``Model.for_decoding`` leaves it.
      judge: (model, state, owner_R, tokens_RxN, targets_RxN, scored_RxN) → :class:`_Judged`; row r goes on from the
        state of row ``owner_R[r]``. Columns before the first in which a row is scored have no logits.
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
        state = decode.start(model.config, len(tokens_RxP), slots)
        done = prefill.run(model, state, tokens_RxP, how, use_memory=use_memory, from_start=True)
        return done.state, everywhere(_Effort(done.refinements_B, done.fallbacks_B))

    def judge(
        model: Model,
        state: DecodeState,
        owner_R: jax.Array,
        tokens_RxN: jax.Array,
        targets_RxN: jax.Array,
        scored_RxN: jax.Array,
    ) -> _Judged:
        mine = jax.tree.map(lambda leaf: jnp.take(leaf, owner_R, axis=0), state)
        done = prefill.run(model, mine, tokens_RxN, how, use_memory=use_memory, keep_hidden=True)
        losses_R, greedy_R = _losses(model, done.hidden_BxNxD, targets_RxN, scored_RxN)
        found = _Judged(losses_R, greedy_R, _Effort(done.refinements_B, done.fallbacks_B))
        return everywhere(found)

    def everywhere(arrays: T) -> T:
        """Every process reads them, so every device has them."""
        return lax.with_sharding_constraint(arrays, meshes.replicated(mesh))

    return Programs(jax.jit(read, static_argnames="slots"), jax.jit(judge))


def _losses(
    model: Model, hidden_RxNxD: jax.Array, targets_RxN: jax.Array, scored_RxN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of each row, its summed loss and whether all its tokens are the most likely ones, one column after the other."""
    rows, length = scored_RxN.shape
    any_N = jnp.any(scored_RxN, axis=0)
    first = jnp.where(jnp.any(any_N), jnp.argmax(any_N), length)

    def body(column: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_Rx1xD, target_Rx1, scored_Rx1 = (
            lax.dynamic_slice_in_dim(array, column, 1, axis=1) for array in (hidden_RxNxD, targets_RxN, scored_RxN)
        )
        logits_RxV = model.logits(hidden_Rx1xD)[:, 0]
        chosen_Rx1 = jnp.take_along_axis(logits_RxV, target_Rx1, axis=-1)
        losses_R = jax.nn.logsumexp(logits_RxV, axis=-1) - chosen_Rx1[:, 0]
        # Whether it is the first of the largest, as argmax says, which a CPU takes as long for as for all the rest.
        before_RxV = jnp.arange(logits_RxV.shape[1])[None] < target_Rx1
        best_R = jnp.all(jnp.where(before_RxV, logits_RxV < chosen_Rx1, logits_RxV <= chosen_Rx1), axis=-1)
        scored_R = scored_Rx1[:, 0]
        return found[0] + jnp.where(scored_R, losses_R, 0.0), found[1] & (best_R | ~scored_R)

    return lax.fori_loop(first, length, body, (jnp.zeros((rows,)), jnp.ones((rows,), bool)))


class _Shape(NamedTuple):
    """Of a batch: columns of what options share, and of options; slots of the cache."""

    shared: int
    options: int
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
        model = model.for_decoding()
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
        sizes = (len(question.shared), question.longest, whole)
        shared, options, slots = (self._rounded(size) for size in sizes)
        # Token by token, empty first columns cost nothing: one shape serves all that the cache has room for.
        return _Shape(slots, slots, slots) if self._how.prefill == "sequential" else _Shape(shared, options, slots)

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

        8, 32 and then twice as many each time; T is the largest.
        """
        size = COLUMNS
        while size < number:
            size *= 4 if size == COLUMNS else 2
        return meshes.whole_columns(self._mesh, min(size, self._context))

    def _rows(self, shape: _Shape, questions: int) -> int:
        """Rows of a batch: enough for all, if they fit; few on a CPU, which gains by more only with small caches."""
        rows = min(max(ROWS, 1 << (questions - 1).bit_length()), max(1, self._tokens // max(shape)))
        if host_memory.cpu_is_device():
            rows = min(rows, max(ROWS, CPU_SLOTS // shape.slots))
        return meshes.whole_rows(self._mesh, rows)

    def _dispatch(self, model: Model, shape: _Shape, rows: int, questions: Sequence[Question]) -> Any:
        """Starts the computation of a batch: :func:`_answers` takes what it returns, still on the device."""
        shared_RxP = np.full((rows, shape.shared), PAD, np.int32)
        for row, question in enumerate(questions):
            _put(shared_RxP[row], question.shared)
        state, effort = self._programs.read(model, self._global(shared_RxP), slots=shape.slots)
        owned = [
            (row, *one) for row, each in enumerate(questions) for one in zip(each.options, each.scored, strict=True)
        ]
        # Those of a length together: a batch takes as many steps as its longest option.
        order = sorted(range(len(owned)), key=lambda index: -len(owned[index][1]))
        judged = []
        for part in _batches([owned[index] for index in order], rows):
            owner_R = np.zeros(rows, np.int32)
            tokens_RxN = np.full((rows, shape.options), PAD, np.int32)
            targets_RxN = np.zeros_like(tokens_RxN)
            scored_RxN = np.zeros(targets_RxN.shape, bool)
            for row, (owner, option, scored) in enumerate(part):
                owner_R[row] = owner
                _put(tokens_RxN[row], option[:-1])
                _put(targets_RxN[row], option[1:])
                scored_RxN[row, shape.options - scored :] = True
            arrays = map(self._global, (tokens_RxN, targets_RxN, scored_RxN))
            judged.append(self._programs.judge(model, state, owner_R, *arrays))
        return effort, judged, np.argsort(order)

    def _global(self, array_RxN: np.ndarray) -> jax.Array:
        return meshes.global_batch(self._mesh, array_RxN)


def _answers(
    questions: Sequence[Question], batch: Sequence[int], dispatched: tuple[_Effort, list[_Judged], np.ndarray]
) -> list[tuple[int, Answer]]:
    """Number and answer of each question of a batch, fetched."""
    effort, judged, place_n = jax.device_get(dispatched)
    # Rows of all parts one after the other, and of these each option's: no row that fills up the last part.
    rows_n = jax.tree.map(lambda *parts: np.concatenate(parts)[place_n], *judged)
    losses_n, greedy_n, (refinements_n, fallbacks_n) = rows_n
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
