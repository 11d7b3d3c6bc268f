"""Checkpoints: the state, the data iterator's position and the config, by orbax; and what may be resumed.

With :mod:`lrt_jax.training.readback` the only module that knows orbax, whose API still moves.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lrt_jax.data import tokenizer
from lrt_jax.setup.config import Config, ConfigError, from_json
from lrt_jax.setup.errors import writing
from lrt_jax.training import inventory, manifest, readback
from lrt_jax.training.state import TrainState

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


class Checkpoints:
    """The checkpoints of one work dir, written by this run. Saving is asynchronous; :meth:`close` waits for it.

    A save counts once its manifest is written, which :mod:`lrt_jax.training.inventory` does after orbax has
    finished and finds what it wrote; older checkpoints are removed only after that.
    """

    def __init__(self, workdir: epath.PathLike, keep: int = 2):
        """Opens, or creates, ``workdir/checkpoints``, where the newest ``keep`` are kept.

        Raises:
          CheckpointError: the folder cannot be made.
        """
        self._workdir, self._keep = epath.Path(workdir), keep
        _leave_out_late_writes()
        options = ocp.CheckpointManagerOptions(preservation_policy=preservation_policy.PreserveAll())
        try:
            self._manager = ocp.CheckpointManager(inventory.folder_of(workdir), options=options)
        except OSError as error:
            raise inventory.CheckpointError(f"{inventory.folder_of(workdir)} cannot be made ({error})") from None
        self._sealing: threading.Thread | None = None
        self._failure: Exception | None = None

    @property
    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        return inventory.steps(self._workdir)

    def save(self, state: TrainState, iterator: grain.DatasetIterator, config: Config) -> None:
        """Begins to save the state after ``state.step`` steps; a step that is saved already is left alone.

        Raises:
          CheckpointError: this save, or the one before it, cannot be written.
        """
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave(_beside_params(state)),
            "data": ocp.args.JsonSave(iterator.get_state()),
            "config": ocp.args.JsonSave(dataclasses.asdict(config)),
        }
        self._begin(int(state.step), items)

    def save_params(self, params: dict[str, jax.Array], config: Config) -> None:
        """Saves parameters alone as step 0: a run that begins here has a fresh optimizer and the first batch."""
        items = {"params": ocp.args.StandardSave(params), "config": ocp.args.JsonSave(dataclasses.asdict(config))}
        self._begin(0, items)

    def restore(self, abstract: TrainState, iterator: grain.DatasetIterator, step: int) -> TrainState:
        """The state of a step, in the shardings of ``abstract``; moves ``iterator`` to where it was.

        Raises:
          CheckpointError: orbax cannot read it.
        """
        restored = self._restored(
            step,
            params=ocp.args.StandardRestore(abstract.params),
            optimizer=ocp.args.StandardRestore(_beside_params(abstract)),
            data=ocp.args.JsonRestore(),
        )
        iterator.set_state(restored.data)
        return TrainState(params=restored.params, **restored.optimizer)

    def restore_params(self, abstract: dict[str, Any], step: int) -> dict[str, jax.Array]:
        """The parameters of a step, in the shardings of ``abstract``.

        Raises:
          CheckpointError: orbax cannot read them.
        """
        return self._restored(step, params=ocp.args.StandardRestore(abstract)).params

    def wait(self) -> None:
        """Waits until what was begun is saved, and counts.

        Raises:
          CheckpointError: it cannot be written.
        """
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None
        self.check()

    def check(self) -> None:
        """Raises the error of a save that has failed in the background.

        Raises:
          CheckpointError: it could not be written.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Waits, and lets go of the folder.

        Raises nothing: what could not be saved is told by :meth:`wait`; or something else has ended the run, and must
        not be hidden.
        """
        if self._sealing is not None:
            self._sealing.join()
        with contextlib.suppress(Exception):
            self._manager.close()

    def _begin(self, step: int, items: dict[str, ocp.args.CheckpointArgs]) -> None:
        self.wait()
        if step in self._manager.all_steps():
            return
        try:
            if jax.process_index() == 0:
                inventory.begin(self._workdir, step)
            self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._explained(step, error) from error
        trees = {name: given.item for name, given in items.items() if isinstance(given, ocp.args.StandardSave)}
        saved = {name: readback.arrays(tree) for name, tree in trees.items()}
        self._sealing = threading.Thread(target=self._seal, args=(step, saved), name=f"seal checkpoint {step}")
        self._sealing.start()

    def _seal(self, step: int, saved: dict[str, readback.Arrays]) -> None:
        """In a thread: waits for orbax, then makes the checkpoint count, if it can be read."""
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                self._require_readable(step, saved)
                inventory.complete(self._workdir, step, self._keep)
        except Exception as error:
            self._failure = self._explained(step, error)
            self._failure.__cause__ = error

    def _require_readable(self, step: int, saved: dict[str, readback.Arrays]) -> None:
        folder = inventory.folder_of(self._workdir, step)
        if fault := readback.fault(folder, saved):
            raise inventory.CheckpointError(
                f"the checkpoint of step {step:,} was written to {folder}, and cannot be read back ({fault}); it does "
                f"not count, and what was saved before is untouched (steps: {self._kept()})"
            )

    def _restored(self, step: int, **args: ocp.args.CheckpointArgs) -> Any:
        with readback.restoring(inventory.folder_of(self._workdir, step)):
            return self._manager.restore(step, args=ocp.args.Composite(**args))

    def _kept(self) -> str:
        return ", ".join(map(str, self.steps)) or "none"

    def _explained(self, step: int, error: Exception) -> Exception:
        """What a failed save means to the user, if the storage is at fault; else the error itself."""
        reason = error.strerror if isinstance(error, OSError) else None
        if reason is None and (found := re.search(r"os_error_code='(\d+)'", str(error))):
            reason = os.strerror(int(found[1]))
        if reason is None:
            return error
        return inventory.CheckpointError(
            f"the checkpoint of step {step:,} cannot be written to {inventory.folder_of(self._workdir)} ({reason}); "
            f"what was saved before is untouched (steps: {self._kept()}): mend that, and the same command goes on from "
            "there"
        )


def _leave_out_late_writes() -> None:
    """Keeps Python from printing that nobody waits for a write any more.

    When one write of a save fails, orbax ends the event loop of all, and each that ends later finds it closed: an
    exception in a thread of tensorstore's, of which Python prints a traceback. The failure itself is told by
    :meth:`Checkpoints.wait`, in one line.
    """
    before = sys.unraisablehook

    def leave_out(event: "sys.UnraisableHookArgs") -> None:
        late = isinstance(event.exc_value, RuntimeError) and str(event.exc_value) == "Event loop is closed"
        if not late or event.object is not None:
            before(event)

    if getattr(before, "__qualname__", "") != leave_out.__qualname__:
        sys.unraisablehook = leave_out


def _beside_params(state: TrainState) -> dict[str, Any]:
    """All of the state but the parameters, which are an item of their own so that they can be read alone."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "params"}


def check_config(config: Config, workdir: epath.PathLike) -> list[str]:
    """Checks that a run may go on in a work dir that was begun before; a fresh one allows everything.

    What binds it is the config of the newest checkpoint; the work dir's own file only where there is none yet. A work
    dir of imported parameters is bound to the model only. A corpus may be spelled otherwise, and be moved once there is
    a checkpoint, which knows its files.

    Returns:
      A line for each field that has changed, where it may.

    Raises:
      ConfigError: a field that the saved state depends on has changed, or the config of before cannot be read.
    """
    steps = inventory.steps(workdir)
    path = inventory.folder_of(workdir, steps[-1]) / CONFIG_ITEM if steps else epath.Path(workdir) / CONFIG_FILE
    changes = []
    fixed = FIXED_BY_PARAMETERS if holds_parameters_only(workdir) else FIXED
    if steps or path.exists():
        before, now = (_flat(dataclasses.asdict(c)) for c in (_config_in(path), config))
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
    noted = inventory.folder_of(workdir, step or 0) / DATA_ITEM
    if step is None or not noted.exists() or inventory.faults(workdir, step, ("data",)):
        return None
    return json.loads(noted.read_bytes()).get("records")


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
    noted = inventory.folder_of(workdir, step) / DATA_ITEM
    if not (kept.exists() and noted.exists()) or inventory.faults(workdir, step, ("data",)):
        return
    try:
        before = json.loads(noted.read_bytes()).get("tokenizer")
    except FileNotFoundError:  # the run beside this reader has removed it
        return
    now = hashlib.sha256(tokenizer.bytes_kept(workdir)).hexdigest()
    if before not in (None, now):
        raise ConfigError(
            f"{kept} is not the tokenizer that the checkpoint of step {step:,} was trained with (its SHA-256 is {now}, "
            f"not {before}); put that one back, or begin anew in another --workdir"
        )


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


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.loads(json.dumps(value))
    return flat
