"""How long a run is: its steps, from whichever unit the config sets."""

from lrt_jax.setup.fields import LARGEST, TrainConfig
from lrt_jax.setup.schema import ConfigError

UNITS = ("steps", "tokens", "tokens_per_parameter")


def train_steps(train: TrainConfig, sequence_length: int, parameters: int) -> int:
    """The run's number of optimizer steps (at least 1), from whichever unit of duration is set.

    T is ``sequence_length``; ``parameters`` are counted for ``tokens_per_parameter``.

    Raises:
      ConfigError: there are more than can be counted.
    """
    per_step = train.batch_size * sequence_length
    tokens = train.steps * per_step or train.tokens or train.tokens_per_parameter * parameters
    if tokens > LARGEST * per_step:
        raise ConfigError(f"{_set(train)}; that must be at most {LARGEST:,} steps (2**31 - 1)")
    return train.steps or max(1, round(tokens / per_step))


def require_ahead(train: TrainConfig, steps: int, step: int) -> None:
    """Checks that a run of ``steps`` steps does not end before the one, ``step``, that it goes on from.

    Raises:
      ConfigError: it would.
    """
    if step <= steps:
        return
    found = _set(train) if train.steps else f"{_set(train)}, which makes {steps:,} steps"
    wanted = f"give {step}" if train.steps else f"give as much as makes {step:,}"
    raise ConfigError(
        f"{found}, but the run is at step {step:,}; {wanted} or more, or go back to an earlier checkpoint: "
        "python -m lrt_jax.checkpoints DIR --rewind=STEP"
    )


def _set(train: TrainConfig) -> str:
    """The field that is set, and to what."""
    unit = next(unit for unit in UNITS if getattr(train, unit))
    return f"config.train.{unit} is {getattr(train, unit)!r}"
