"""Bits per byte of held-out text: parallel (initialization forward and merged) and sequential.

BPB = nats of the targets / (ln 2 · UTF-8 bytes of the targets); special tokens count in neither.
"""

import functools
import gzip
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lrt_jax.data.pipeline import HeldOut
from lrt_jax.evaluation import health
from lrt_jax.inference import scoring
from lrt_jax.method import schedules
from lrt_jax.model.model import Model
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config, fingerprint

# Where the position buckets of sequential BPB begin; the last one ends at T.
BUCKETS = (0, 16, 64, 256, 1024, 4096)


class Evaluator:
    """Scores a model on held-out rows; compiles once, whatever the number of rows."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        held_out: HeldOut,
        token_bytes: np.ndarray,
    ):
        """Prepares the scoring functions.

        Args:
          config: of the run. The forwards of its schedule are scored in parallel (of a staged one, the last stage's);
            ``eval.scoring`` says how true recurrence is computed, ``eval.batch_size`` how many rows together.
          mesh: where to compute.
          held_out: rows of tokens and targets.
          token_bytes: int [V], UTF-8 bytes of each token, 0 for special tokens.
        """
        self._config, self._mesh, self.held_out = config, mesh, held_out
        self._batch_size = meshes.whole_rows(mesh, config.eval.batch_size)
        self._decode = config.scoring
        self._token_bytes = token_bytes
        self.rows = len(held_out.tokens_NxT)
        self._reading = config.model.memory_range
        self._programs = [one for one in (*programs(config, mesh), health.program(config, mesh)) if one]

    def __call__(
        self, model: Model, rows: int | None = None, between: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Metrics of the first ``rows`` rows (None: all).

        Args:
          model: what is scored.
          rows: how many.
          between: called before each batch; may raise, to end the scoring.

        Returns:
          ``val/bpb`` (merged: each position scored by the last forward that computed it), ``val/bpb_init``,
          ``val/bpb_sequential`` (true recurrence, as in decoding), and the latter by position, from A to B
          exclusive, as ``val/bpb_sequential/A_to_B``. Where that was scored by fixed point also ``val/refinements``,
          mean of the rows, and ``val/fallbacks``, the share of chunks that did not converge and were scored exactly.
          ``val/gap`` is sequential / merged - 1; the rest is of ``health.metrics``.
        """
        rows = self.rows if rows is None else min(rows, self.rows)
        sums: dict[str, np.ndarray] = {}
        for batch in self._batches(rows):
            between()
            # All are dispatched before any is fetched.
            for part in [program(model, *batch) for program in self._programs]:
                for name, array in part.items():
                    sums[name] = sums.get(name, 0.0) + np.asarray(array, np.float64)
        bytes_T = self._token_bytes[self.held_out.targets_NxT[:rows]].sum(axis=0)
        names = {"merged": "val/bpb", "init": "val/bpb_init", "sequential": "val/bpb_sequential"}
        metrics = {names[name]: bits_per_byte(sums[name].sum(), bytes_T.sum()) for name in names}
        metrics["val/gap"] = metrics["val/bpb_sequential"] / metrics["val/bpb"] - 1
        if "after" in sums:
            metrics |= health.metrics(sums, self._reading, functools.partial(bits_per_byte, count=bytes_T.sum()))
        if self._decode.prefill == "fixed_point":
            chunks = -(-len(bytes_T) // self._decode.chunk)
            metrics["val/refinements"] = float(sums["refinements"] / rows)
            metrics["val/fallbacks"] = float(sums["fallbacks"] / (rows * chunks))
        edges = [edge for edge in BUCKETS if edge < len(bytes_T)] + [len(bytes_T)]
        for begin, end in itertools.pairwise(edges):
            bucket = bits_per_byte(sums["sequential"][begin:end].sum(), bytes_T[begin:end].sum())
            metrics[f"val/bpb_sequential/{begin}_to_{end}"] = bucket
        return metrics

    @property
    def scoring(self) -> str:
        """How ``val/bpb_sequential`` is computed, in words."""
        if self._decode.prefill == "sequential":
            return "sequential"
        how = self._decode
        subsets = f", subsets={how.subsets}" if how.subsets > 1 else ""
        return f"fixed_point(tolerance={how.tolerance:g}, max_refinements={how.max_refinements}{subsets})"

    def lines(self, scores: dict[str, float]) -> Iterator[str]:
        """The closing table, of what a call returned."""
        rows = {
            "initialization forward  val/bpb_init": scores["val/bpb_init"],
            "merged                  val/bpb": scores["val/bpb"],
            "sequential              val/bpb_sequential": scores["val/bpb_sequential"],
            "gzip -9, the same bytes": self.gzip_bits_per_byte(),
        }
        if self._config.eval.baseline and self._config.eval.baseline_of == fingerprint(self._config):
            rows["plain model, same compute, measured before"] = self._config.eval.baseline
        yield f"\nbits per byte of {len(self.held_out.text):,} held-out bytes"
        for name, value in rows.items():
            yield f"  {name:<46}{value:8.4f}"
        yield from health.lines(scores)
        if warning := health.warning(scores, self._config.eval.gap):
            yield warning
        if self.scoring != "sequential":
            yield f"val/bpb_sequential was computed by {self.scoring}"

    def gzip_bits_per_byte(self) -> float:
        """What ``gzip -9`` needs for the UTF-8 bytes of all rows' targets: a yardstick anyone can check."""
        text = self.held_out.text
        return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)

    def _batches(self, rows: int) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
        """Tokens, targets and which targets count; the last batch is filled up with rows that do not."""
        for begin in range(0, rows, self._batch_size):
            chosen = slice(begin, min(begin + self._batch_size, rows))
            tokens_BxT, targets_BxT = self.held_out.tokens_NxT[chosen], self.held_out.targets_NxT[chosen]
            counted_BxT = self._token_bytes[targets_BxT] > 0
            missing = ((0, self._batch_size - len(tokens_BxT)), (0, 0))
            local = tuple(np.pad(array, missing) for array in (tokens_BxT, targets_BxT, counted_BxT))
            yield meshes.global_batch(self._mesh, local)


def programs(config: Config, mesh: Mesh) -> tuple[Any, Any]:
    """The jitted functions ``(model, tokens_BxT, targets_BxT, counted_BxT) -> sums by position``.

    The first scores the forwards of the schedule in parallel, the second true recurrence.
    """
    how = config.scoring
    scored = config.schedule.scored
    forwards = schedules.build(scored, config.model.sequence_length)
    begins_with_init = schedules.forward_names(scored)[0] == "init"

    def parallel(model: Model, tokens_BxT: jax.Array, targets_BxT: jax.Array, counted_BxT: jax.Array) -> Any:
        outcome = forwards(model, tokens_BxT, targets_BxT)
        first = outcome if begins_with_init else schedules.plain(model, tokens_BxT, targets_BxT)
        losses = {"init": first.token_losses_FxBxT[0], "merged": outcome.merged_losses_BxT}
        return {name: jnp.sum(losses_BxT * counted_BxT, axis=0) for name, losses_BxT in losses.items()}

    def sequential(model: Model, tokens_BxT: jax.Array, targets_BxT: jax.Array, counted_BxT: jax.Array) -> Any:
        found = scoring.score(model, tokens_BxT, targets_BxT, how)
        rows_B = jnp.any(counted_BxT, axis=1)  # the others fill up the last batch
        return {
            "sequential": jnp.sum(found.losses_BxT * counted_BxT, axis=0),
            "refinements": jnp.sum(found.refinements_B * rows_B),
            "fallbacks": jnp.sum(found.fallbacks_B * rows_B),
        }

    # Every process reads the sums, so every device has them.
    everywhere = meshes.replicated(mesh)
    return jax.jit(parallel, out_shardings=everywhere), jax.jit(sequential, out_shardings=everywhere)


def bits_per_byte(nats: float, count: float) -> float:
    """nats / (ln 2 · count of UTF-8 bytes); NaN of none."""
    return float(nats / (math.log(2) * count)) if count else math.nan
