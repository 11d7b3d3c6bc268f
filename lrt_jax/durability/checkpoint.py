"""Checkpoints: the state, the data iterator's position and the config, by orbax.

With :mod:`lrt_jax.durability.readback` the only module that knows orbax, whose API still moves.
"""

import contextlib
import dataclasses
import os
import re
import sys
import threading
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lrt_jax.durability import inventory, readback
from lrt_jax.setup.config import Config
from lrt_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one work dir, written by this run. Saving is asynchronous; :meth:`close` waits for it.

    A save counts once its manifest is written, which :mod:`lrt_jax.durability.inventory` does after orbax has
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
        return ", ".join(map(str, inventory.steps(self._workdir))) or "none"

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
