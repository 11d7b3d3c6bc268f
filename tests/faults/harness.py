"""The training command with a fault inside it: ``python tests/faults/harness.py FAULT [flags of lrt_jax.main]``.

record:FILE     appends step, row of the batch and digest of every row of tokens that is fed
nan:STEP        the batch of this step gives a loss of NaN, and so a gradient of NaN
sleep:STEP:PID  before this step, process PID falls asleep in Python
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from lrt_jax import main
from lrt_jax.data import pipeline
from lrt_jax.method import schedules
from lrt_jax.setup import flags


class Tapped:
    """An iterator of batches that calls ``tap(step, batch)`` before it hands one out."""

    def __init__(self, batches, config, tap):
        self._batches, self._size, self._tap = batches, config.train.batch_size, tap

    def __next__(self):
        step = self._batches.get_state()["next_row"] // self._size + 1
        batch = next(self._batches)
        return self._tap(step, batch) or batch

    def __getattr__(self, name):
        return getattr(self._batches, name)


def tap_batches(tap):
    original = pipeline.training_batches

    def training_batches(config, records, here=None):
        rows = tuple(range(config.train.batch_size)) if here is None else tuple(here)
        return Tapped(original(config, records, here), config, lambda step, batch: tap(step, rows, batch))

    pipeline.training_batches = training_batches


def record(path):
    def tap(step, rows, batch):
        lines = [
            json.dumps([step, row, hashlib.sha256(tokens_T.tobytes()).hexdigest()])
            for row, tokens_T in zip(rows, batch.tokens_BxT, strict=True)
        ]
        with Path(f"{path}.{jax.process_index()}").open("a") as stream:
            stream.write("\n".join(lines) + "\n")

    tap_batches(tap)


def sleep(step, process):
    def tap(now, rows, batch):
        if now == int(step) and jax.process_index() == int(process):
            print("falls asleep", flush=True)
            time.sleep(10_000)

    tap_batches(tap)


def nan(step):
    """Marks the step's batch by negative targets; the schedule answers the mark with NaN."""
    build = schedules.build

    def tap(now, rows, batch):
        return batch._replace(targets_BxT=-1 - batch.targets_BxT) if now == int(step) else None

    def marked(config, sequence_length):
        inner = build(config, sequence_length)

        def schedule(model, tokens_BxT, targets_BxT):
            outcome = inner(model, tokens_BxT, jnp.maximum(targets_BxT, -1 - targets_BxT))
            return outcome.replace(loss=outcome.loss * jnp.where(jnp.any(targets_BxT < 0), jnp.nan, 1.0))

        return schedule

    tap_batches(tap)
    schedules.build = marked


if __name__ == "__main__":
    fault, *arguments = sys.argv.pop(1).split(":", 1)
    {"record": record, "nan": nan, "sleep": sleep}[fault](*(arguments[0].split(":") if fault == "sleep" else arguments))
    main.define_flags()
    flags.run(main.main)
