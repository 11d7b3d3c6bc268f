"""State tracking: the share of right answers by position, under true recurrence, also beyond the trained length.

Attention looks back as far as in training, so beyond T it sees the last T positions: what is older is left to the
memory, or is lost.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lrt_jax.data import tasks
from lrt_jax.inference import decode, prefill
from lrt_jax.method import schedules
from lrt_jax.model.model import Model
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config


class Accuracy:
    """Scores a model on held-out words of ``config.data.task``."""

    def __init__(self, config: Config, mesh: Mesh):
        """Draws ``eval.final_rows`` words of the longest of ``eval.lengths``; compiles nothing yet.

        Raises:
          ConfigError: the vocabulary is too small for the task.
        """
        tasks.check(config)
        self._config, self._mesh = config, mesh
        self._batch_size = meshes.whole_rows(mesh, config.eval.batch_size)
        longest = meshes.whole_columns(mesh, longest_of(config))
        self._words = tasks.held_out_words(config, config.eval.final_rows, longest)
        self._parallel, self._sequential = programs(config, mesh)

    def __call__(
        self, model: Model, rows: int | None = None, between: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Metrics of the first ``rows`` words (None: all).

        Args:
          model: what is scored.
          rows: how many.
          between: called before each batch; may raise, to end the scoring.

        Returns:
          ``val/accuracy/A_to_B``, the share of right answers at positions A to B exclusive, counted from 0, under true
          recurrence, between the lengths of ``config.eval.lengths``; ``val/accuracy``, that of the T positions of
          training. In nats per answer, of these positions: ``val/loss_sequential``, ``val/loss_merged`` (each in the
          last forward of the schedule that computed it) and ``val/loss_init`` (zero memory).
        """
        trained = self._config.model.sequence_length
        length = self._words.tokens_BxT.shape[1]
        rows = len(self._words.tokens_BxT) if rows is None else min(rows, len(self._words.tokens_BxT))
        right_T, losses = np.zeros(length), np.zeros(3)
        for begin in range(0, rows, self._batch_size):
            between()
            merged, init = self._parallel(model, *self._batch(begin, rows, trained))
            right, sequential = self._sequential(model, *self._batch(begin, rows, length))
            right_T += np.asarray(right)
            losses += [float(sequential), float(merged), float(init)]
        metrics = {f"val/accuracy/{begin}_to_{end}": _mean(right_T[begin:end], rows) for begin, end in self._intervals}
        names = ("sequential", "merged", "init")
        per_answer = {
            f"val/loss_{name}": float(loss) / (rows * trained) for name, loss in zip(names, losses, strict=True)
        }
        return {"val/accuracy": _mean(right_T[:trained], rows), **metrics, **per_answer}

    @property
    def _intervals(self) -> Iterator[tuple[int, int]]:
        return itertools.pairwise([0, *self._config.eval.lengths])

    def lines(self, scores: dict[str, float]) -> Iterator[str]:
        """The closing table."""
        trained = self._config.model.sequence_length
        yield f"\n{self._config.data.task}: right answers of {len(self._words.tokens_BxT)} words, true recurrence"
        for begin, end in self._intervals:
            beyond = "  beyond the trained length" if begin >= trained else ""
            yield f"  positions {begin + 1:>5} to {end:<29}{scores[f'val/accuracy/{begin}_to_{end}']:8.1%}{beyond}"
        yield f"  a guess{tasks.group(self._config.data.task).guess:46.1%}"
        yield f"nats per answer of the first {trained}"
        for name in ("init", "merged", "sequential"):
            yield f"  {name:<14}val/loss_{name:<22}{scores[f'val/loss_{name}']:8.4f}"
        if self._config.eval.scoring != "sequential":
            yield f"true recurrence was computed by {self._config.eval.scoring}"

    def _batch(self, begin: int, rows: int, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Letters, answers, and which of them count; the last batch is filled up with rows that do not."""
        chosen = np.arange(begin, begin + self._batch_size)
        tokens_BxT, answers_BxT = (array[chosen % rows, :length] for array in self._words)
        counted_BxT = np.tile((chosen < rows)[:, None], (1, length))
        return meshes.global_batch(self._mesh, (tokens_BxT, answers_BxT, counted_BxT))


def longest_of(config: Config) -> int:
    """How many letters the words have that are scored."""
    return max(config.eval.lengths[-1], config.model.sequence_length)


def programs(config: Config, mesh: Mesh) -> tuple[Any, Any]:
    """The jitted functions ``(model, tokens_BxT, answers_BxT, counted_BxT) -> sums``.

    The first has the losses of the schedule's forwards, merged, and of zero memory; the second, under true recurrence,
    right answers by position, [T], and the loss of the trained positions.
    """
    trained, how = config.model.sequence_length, config.scoring
    forwards = schedules.build(config.schedule.scored, trained)
    begins_with_init = schedules.forward_names(config.schedule.scored)[0] == "init"

    def parallel(model: Model, tokens_BxT: jax.Array, answers_BxT: jax.Array, counted_BxT: jax.Array) -> Any:
        outcome = forwards(model, tokens_BxT, answers_BxT)
        first = outcome if begins_with_init else schedules.plain(model, tokens_BxT, answers_BxT)
        both = outcome.merged_losses_BxT, first.token_losses_FxBxT[0]
        return [jnp.sum(losses_BxT * counted_BxT) for losses_BxT in both]

    def sequential(model: Model, tokens_BxT: jax.Array, answers_BxT: jax.Array, counted_BxT: jax.Array) -> Any:
        model = model.for_decoding()
        rows, length = tokens_BxT.shape
        state = decode.start(model.config, rows, length)
        done = prefill.run(model, state, tokens_BxT, how, keep_hidden=True, from_start=True)
        right_BxT = jnp.argmax(model.logits(done.hidden_BxNxD), axis=-1) == answers_BxT
        losses_BxT = model.losses(done.hidden_BxNxD[:, :trained], answers_BxT[:, :trained])
        return jnp.sum(right_BxT & counted_BxT, axis=0), jnp.sum(losses_BxT * counted_BxT[:, :trained])

    everywhere = meshes.replicated(mesh)
    return jax.jit(parallel, out_shardings=everywhere), jax.jit(sequential, out_shardings=everywhere)


def _mean(right_T: np.ndarray, rows: int) -> float:
    return float(right_T.mean() / rows)
