"""Bits per byte of held-out text: parallel (initialization forward and merged) and sequential.

BPB = nats of the targets / (ln 2 · UTF-8 bytes of the targets); special tokens count in neither.
"""

import gzip
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lrt_jax.data.pipeline import HeldOut
from lrt_jax.inference import decode
from lrt_jax.model.decoder import Decoder
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import ScheduleConfig
from lrt_jax.training import schedules

# Where the position buckets of sequential BPB begin; the last one ends at T.
BUCKETS = (0, 16, 64, 256, 1024, 4096)


class Evaluator:
    """Scores parameters on held-out rows; compiles once, whatever the number of rows."""

    def __init__(
        self,
        decoder: Decoder,
        schedule: ScheduleConfig,
        mesh: Mesh,
        held_out: HeldOut,
        token_bytes: np.ndarray,
        batch_size: int,
    ):
        """Prepares the scoring functions.

        Args:
          decoder: the model.
          schedule: whose forwards are scored in parallel; of a staged one, the last stage.
          mesh: where to compute.
          held_out: rows of tokens and targets.
          token_bytes: int [V], UTF-8 bytes of each token, 0 for special tokens.
          batch_size: rows scored together.
        """
        self._mesh, self.held_out, self._batch_size = mesh, held_out, batch_size
        self._token_bytes = token_bytes
        self.rows = len(held_out.tokens_NxT)

        last = schedule.in_stages[-1].schedule
        forwards = schedules.build(last, decoder.config.sequence_length)
        begins_with_init = schedules.forward_names(last)[0] == "init"

        def parallel(params: Any, tokens_BxT: jax.Array, targets_BxT: jax.Array, counted_BxT: jax.Array) -> Any:
            outcome = forwards(decoder, params, tokens_BxT, targets_BxT)
            first = outcome if begins_with_init else schedules.plain(decoder, params, tokens_BxT, targets_BxT)
            losses = {"init": first.token_losses_FxBxT[0], "merged": outcome.merged_losses_BxT}
            return {name: jnp.sum(losses_BxT * counted_BxT, axis=0) for name, losses_BxT in losses.items()}

        def sequential(params: Any, tokens_BxT: jax.Array, targets_BxT: jax.Array, counted_BxT: jax.Array) -> Any:
            losses_BxT = decode.score(decoder, params, tokens_BxT, targets_BxT)
            return {"sequential": jnp.sum(losses_BxT * counted_BxT, axis=0)}

        self._parallel, self._sequential = jax.jit(parallel), jax.jit(sequential)

    def __call__(self, params: Any, rows: int | None = None) -> dict[str, float]:
        """Metrics of the first ``rows`` rows (None: all).

        Returns:
          ``val/bpb`` (merged: each position scored by the last forward that computed it), ``val/bpb_init``,
          ``val/bpb_sequential`` (true recurrence, as in decoding), and the latter by position, from A to B
          exclusive, as ``val/bpb_sequential/A_to_B``.
        """
        rows = self.rows if rows is None else min(rows, self.rows)
        nats: dict[str, np.ndarray] = {}
        for batch in self._batches(rows):
            # Both are dispatched before either is fetched.
            for part in (self._parallel(params, *batch), self._sequential(params, *batch)):
                for name, nats_T in part.items():
                    nats[name] = nats.get(name, 0.0) + np.asarray(nats_T, np.float64)
        bytes_T = self._token_bytes[self.held_out.targets_NxT[:rows]].sum(axis=0)
        names = {"merged": "val/bpb", "init": "val/bpb_init", "sequential": "val/bpb_sequential"}
        metrics = {names[name]: _bits_per_byte(nats_T.sum(), bytes_T.sum()) for name, nats_T in nats.items()}
        edges = [edge for edge in BUCKETS if edge < len(bytes_T)] + [len(bytes_T)]
        for begin, end in itertools.pairwise(edges):
            bucket = _bits_per_byte(nats["sequential"][begin:end].sum(), bytes_T[begin:end].sum())
            metrics[f"val/bpb_sequential/{begin}_to_{end}"] = bucket
        return metrics

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
            yield meshes.shard_rows(self._mesh, local)


def _bits_per_byte(nats: float, count: float) -> float:
    return float(nats / (math.log(2) * count)) if count else math.nan
