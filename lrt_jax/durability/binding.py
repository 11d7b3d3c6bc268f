"""What a work dir is bound to: the config, tokenizer and tokens that its newest checkpoint was made with.

Which of it a run that goes on may change is said here; the config that lies in the work dir is written and read here.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict

from lrt_jax.data import tokenizer
from lrt_jax.durability import inventory, manifest
from lrt_jax.setup.config import Config, ConfigError, from_json
from lrt_jax.setup.errors import writing

CONFIG_FILE = "config.json"
# Where in a checkpoint's folder orbax keeps the config, and the place in the data.
CONFIG_ITEM, DATA_ITEM = "config/metadata", "data/metadata"
# What a work dir is bound to: what parameters, tokens and the optimizer's state mean, and the stream of batches.
FIXED = ("model", "data", "seed", "train.batch_size", "optimizer.name")
# Fields within those that change speed only, never a number's meaning.
FREE = ("model.dtype", "model.attention", "model.scan_layers", "model.remat", "data.prefetch", "data.on_bad_record")
# Paths within those: what lies there is compared, by whoever reads it, and not how it is spelled.
PATHS = ("data.corpus", "data.tokenizer")
# The same for a work dir that holds imported parameters only: no stream of batches has begun.
FIXED_BY_PARAMETERS = ("model",)


def check_config(config: Config, workdir: epath.PathLike) -> list[str]:
    """Checks that a run may go on in a work dir that was begun before; returns a line for each change.

    What binds it is the config of the newest checkpoint; the work dir's own file only where there is none yet. A work
    dir of imported parameters is bound to the model only, a fresh one to nothing. A corpus may be spelled otherwise,
    and be moved once there is a checkpoint, which knows its files.

    Raises:
      ConfigError: a field that the saved state depends on has changed, or the config of before cannot be read.
    """
    steps = inventory.steps(workdir)
    path = inventory.folder_of(workdir, steps[-1]) / CONFIG_ITEM if steps else epath.Path(workdir) / CONFIG_FILE
    changes = []
    fixed = FIXED_BY_PARAMETERS if holds_parameters_only(workdir) else FIXED
    if steps or path.exists():
        before, now = (flatten_dict(json.loads(c.to_json()), sep=".") for c in (_config_in(path), config))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) == now.get(name):
                continue
            moved = name in PATHS and (steps or _is_same_place(before.get(name), now.get(name)))
            if _is_within(name, fixed) and name not in FREE and not moved:
                raise ConfigError(
                    f"config.{name} is {now.get(name)!r}, but {workdir} was begun with {before.get(name)!r}; "
                    "use that, or another --workdir"
                )
            changes.append(f"config.{name}: {before.get(name)!r} → {now.get(name)!r}")
    return changes


def records_of(workdir: epath.PathLike, step: int | None) -> str | None:
    """The name of the records that the checkpoint of ``step`` was trained on; None where it does not say."""
    return None if step is None else _noted(workdir, step, "records")


def check_tokenizer(config: Config, workdir: epath.PathLike) -> None:
    """Checks that saved parameters are not trained on with a tokenizer that they have never seen.

    Raises:
      ConfigError: the work dir holds imported parameters, no tokenizer came with them, and the config names none; or
        its tokenizer is another than when its newest checkpoint was saved.
    """
    kept = epath.Path(workdir) / tokenizer.FILE
    if holds_parameters_only(workdir) and not config.data.tokenizer and not kept.exists():
        raise ConfigError(
            f"config.data.tokenizer is '', but {workdir} holds imported parameters without their tokenizer; name the "
            "SentencePiece model that they were trained with"
        )
    if steps := inventory.steps(workdir):
        check_kept_tokenizer(workdir, steps[-1])


def check_kept_tokenizer(workdir: epath.PathLike, step: int) -> None:
    """Checks that the tokenizer that a work dir keeps is the one that the checkpoint of ``step`` was trained with.

    Where none is kept, or the checkpoint does not say which it was, there is nothing to check: imported parameters,
    and checkpoints from before it was noted.

    Raises:
      ConfigError: it is another.
    """
    kept = epath.Path(workdir) / tokenizer.FILE
    before = _noted(workdir, step, "tokenizer") if kept.exists() else None
    now = hashlib.sha256(tokenizer.bytes_kept(workdir)).hexdigest() if before else None
    if before != now:
        raise ConfigError(
            f"{kept} is not the tokenizer that the checkpoint of step {step:,} was trained with (its SHA-256 is {now}, "
            f"not {before}); put that one back, or begin anew in another --workdir"
        )


def _noted(workdir: epath.PathLike, step: int, field: str) -> str | None:
    """What a checkpoint says of its place in the data; None where it does not, or the run beside has removed it."""
    noted = inventory.folder_of(workdir, step) / DATA_ITEM
    if noted.exists() and not inventory.faults(workdir, step, ("data",)):
        with contextlib.suppress(FileNotFoundError):
            return json.loads(noted.read_bytes()).get(field)
    return None


def holds_parameters_only(workdir: epath.PathLike) -> bool:
    """Whether the newest checkpoint was imported: parameters, but no optimizer state and no place in the data."""
    steps = inventory.steps(workdir)
    return bool(steps) and not (inventory.folder_of(workdir, steps[-1]) / "optimizer").exists()


def write_config(config: Config, workdir: epath.PathLike) -> None:
    """Writes the config into the work dir, for readers, and to bind the dir until a checkpoint does; by one process."""
    path = epath.Path(workdir) / CONFIG_FILE
    with writing(workdir):
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_whole(path, config.to_json().encode())


def read_config(workdir: epath.PathLike) -> Config:
    """The config that a work dir was begun or last resumed with.

    Raises:
      ConfigError: there is none, or it cannot be read.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise ConfigError(f"--workdir is {str(workdir)!r}, which has no {CONFIG_FILE}; it must be a run's work dir")
    return _config_in(path)


def _config_in(path: epath.Path) -> Config:
    try:
        return from_json(path.read_bytes().decode())
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8: {error}"
    except ConfigError as error:
        reason = str(error)
    except OSError as error:
        reason = error.strerror or str(error)
    raise ConfigError(f"{path} cannot be used ({reason}); it must be the config as the run wrote it")


def _is_same_place(before: Any, now: Any) -> bool:
    """Whether two paths lead to the same place, without ``stdlib``, which is none."""
    if "stdlib" in (before, now) or not (isinstance(before, str) and isinstance(now, str)):
        return False
    return "" not in (before, now) and Path(before).expanduser().resolve() == Path(now).expanduser().resolve()


def _is_within(name: str, groups: tuple[str, ...]) -> bool:
    return any(name == group or name.startswith(group + ".") for group in groups)
