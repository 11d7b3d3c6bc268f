"""Checkpoints: the state, the data iterator's position and the config, by orbax; and what may be resumed.

The only module that knows orbax, whose API still moves.
"""

import dataclasses
import json
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lrt_jax.data import tokenizer
from lrt_jax.setup.config import Config, ConfigError, from_json
from lrt_jax.training.state import TrainState

CONFIG_FILE = "config.json"
FOLDER = "checkpoints"
# What a work dir is bound to: what parameters, tokens and the optimizer's state mean, and the stream of batches.
FIXED = ("model", "data", "seed", "train.batch_size", "optimizer.name")
# Fields within those that change speed only, never a number's meaning.
FREE = ("model.dtype", "model.attention", "model.scan_layers", "model.remat", "data.prefetch")
# The same for a work dir that holds imported parameters only: no stream of batches has begun.
FIXED_BY_PARAMETERS = ("model",)


class Checkpoints:
    """The checkpoints of one work dir. Saving is asynchronous; :meth:`close` waits for it."""

    def __init__(self, workdir: epath.PathLike, keep: int = 2):
        """Opens, or creates on the first save, ``workdir/checkpoints``, where the newest ``keep`` are kept."""
        options = ocp.CheckpointManagerOptions(preservation_policy=preservation_policy.LatestN(keep))
        self._manager = ocp.CheckpointManager(epath.Path(workdir).absolute() / FOLDER, options=options)

    @property
    def latest(self) -> int | None:
        """The newest checkpoint's step, or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, iterator: grain.DatasetIterator, config: Config) -> None:
        """Begins to save the state after ``state.step`` steps; a step that is saved already is left alone."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
                data=ocp.args.JsonSave(iterator.get_state()),
                config=ocp.args.JsonSave(dataclasses.asdict(config)),
            ),
        )

    def save_params(self, params: dict[str, jax.Array], config: Config) -> None:
        """Saves parameters alone as step 0: a run that begins here has a fresh optimizer and the first batch."""
        items = {"params": ocp.args.StandardSave(params), "config": ocp.args.JsonSave(dataclasses.asdict(config))}
        self._manager.save(0, args=ocp.args.Composite(**items))

    def restore(self, abstract: TrainState, iterator: grain.DatasetIterator, step: int) -> TrainState:
        """The state of a step, in the shardings of ``abstract``; moves ``iterator`` to where it was."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                optimizer=ocp.args.StandardRestore({"step": abstract.step, "opt_state": abstract.opt_state}),
                data=ocp.args.JsonRestore(),
            ),
        )
        iterator.set_state(restored.data)
        return TrainState(restored.optimizer["step"], restored.params, restored.optimizer["opt_state"])

    def restore_params(self, abstract: dict[str, Any], step: int) -> dict[str, jax.Array]:
        """The parameters of a step, in the shardings of ``abstract``."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=args).params

    def wait(self) -> None:
        """Waits until what was begun is saved."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self._manager.close()


def check_config(config: Config, workdir: epath.PathLike) -> list[str]:
    """Checks that a run may go on in a work dir that was begun before; a fresh one allows everything.

    A work dir of imported parameters is bound to the model only.

    Returns:
      A line for each field that has changed, where it may.

    Raises:
      ConfigError: a field that the saved state depends on has changed.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    changes = []
    fixed = FIXED_BY_PARAMETERS if holds_parameters_only(workdir) else FIXED
    if path.exists():
        before, now = (_flat(dataclasses.asdict(c)) for c in (read_config(workdir), config))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) == now.get(name):
                continue
            if _is_within(name, fixed) and name not in FREE:
                raise ConfigError(
                    f"config.{name} is {now.get(name)!r}, but {workdir} was begun with {before.get(name)!r}; "
                    "use that, or another --workdir"
                )
            changes.append(f"config.{name}: {before.get(name)!r} → {now.get(name)!r}")
    return changes


def check_tokenizer(config: Config, workdir: epath.PathLike) -> None:
    """Checks that imported parameters are not trained on with a tokenizer that they have never seen.

    Raises:
      ConfigError: the work dir holds imported parameters, no tokenizer came with them, and the config names none.
    """
    kept = epath.Path(workdir) / tokenizer.FILE
    if holds_parameters_only(workdir) and not config.data.tokenizer and not kept.exists():
        raise ConfigError(
            f"config.data.tokenizer is '', but {workdir} holds imported parameters without their tokenizer; name the "
            "SentencePiece model that they were trained with"
        )


def holds_parameters_only(workdir: epath.PathLike) -> bool:
    """Whether the newest checkpoint was imported: parameters, but no optimizer state and no place in the data."""
    folder = epath.Path(workdir) / FOLDER
    # A save that was cut off leaves a folder whose name is no number.
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.exists() else []
    return bool(steps) and not (folder / str(max(steps)) / "optimizer").exists()


def write_config(config: Config, workdir: epath.PathLike) -> None:
    """Writes the config into the work dir, which binds the dir to it; by the first process."""
    path = epath.Path(workdir) / CONFIG_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(config.to_json())
    unfinished.replace(path)


def read_config(workdir: epath.PathLike) -> Config:
    """The config that a work dir was begun or last resumed with.

    Raises:
      ConfigError: there is none, or it cannot be read.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise ConfigError(f"--workdir is {str(workdir)!r}, which has no {CONFIG_FILE}; it must be a run's work dir")
    return from_json(path.read_text())


def _is_within(name: str, groups: tuple[str, ...]) -> bool:
    return any(name == group or name.startswith(group + ".") for group in groups)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.loads(json.dumps(value))
    return flat
