"""What a benchmark refuses, in one line, before it compiles anything."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator

from lrt_jax.setup.config import ModelConfig, ScheduleConfig, from_json
from lrt_jax.setup.errors import UserError


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Within, what a user can mend ends the benchmark as it ends a command of ``lrt_jax``.

    Raises:
      SystemExit: with the one line.
    """
    try:
        yield
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def check(model: ModelConfig, schedule: ScheduleConfig | None = None, **train: int) -> None:
    """Checks a model, and what trains it, as a config of ``lrt_jax.main`` is checked.

    Args:
      model: of a row.
      schedule: of the row; None: the plain one.
      **train: fields of ``config.train``.

    Raises:
      SystemExit: with one line that names the field, what was found and what is allowed.
    """
    fields = {
        "model": dataclasses.asdict(model),
        "schedule": dataclasses.asdict(schedule or ScheduleConfig(name="plain")),
        "train": {"steps": 1, "batch_size": 1} | train,
    }
    with in_one_line():
        from_json(json.dumps(fields))
