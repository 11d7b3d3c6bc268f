"""A trained model, from its work dir."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lrt_jax.data import tokenizer
from lrt_jax.data.tokenizer import Tokenizer
from lrt_jax.durability import binding, inventory, readback
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup import processes
from lrt_jax.setup.config import Config, ConfigError, MeshConfig
from lrt_jax.training import state

# How often another checkpoint is chosen, where a run has removed the last one while it was read.
TRIES = 10


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model after so many steps, on the mesh where its parameters are; its tokenizer, and the config of its run."""

    config: Config
    model: Model
    tokenizer: Tokenizer
    step: int

    @property
    def mesh(self) -> Mesh:
        """Where the model is."""
        assert self.model.mesh is not None
        return self.model.mesh

    @functools.cached_property
    def decoding(self) -> Model:
        """The model once more, as decoding reads it fastest."""
        return self.model.for_decoding()


def load(workdir: Path, step: int | None = None) -> Trained:
    """The model of a work dir after ``step`` steps (None: the newest good checkpoint).

    Raises:
      ConfigError: ``workdir`` is no run's work dir, has no such checkpoint, or not its tokenizer; or its run had no
        text.
      CheckpointError: the checkpoint is damaged.
    """
    task = binding.read_config(workdir).data.task
    if task:
        raise ConfigError(
            f"--workdir is {str(workdir)!r}, a run of config.data.task = {task!r}: it knows no text; "
            "`python -m lrt_jax.evaluate --workdir=DIR` scores its answers"
        )
    config, params, step = load_params(workdir, step)
    binding.check_kept_tokenizer(workdir, step)
    model = Model(Decoder(config.model, mesh_of(config)), params)
    return Trained(config, model, tokenizer.load(workdir, config), step)


def load_params(workdir: Path, step: int | None = None) -> tuple[Config, dict[str, Any], int]:
    """The config, the parameters and the step of a checkpoint (None: the newest good one).

    Raises:
      ConfigError: ``workdir`` is no run's work dir, or has no such checkpoint.
      CheckpointError: the checkpoint is damaged; without ``step``, all of them are.
    """
    config = binding.read_config(workdir)
    abstract = state.abstract_params(Decoder(config.model), mesh_of(config))
    for _ in range(TRIES):
        chosen = int(processes.from_first(lambda: str(_chosen(workdir, step)).encode()))
        try:
            return config, readback.params(workdir, abstract, chosen), chosen
        except inventory.CheckpointError:
            if not inventory.is_gone(workdir, chosen):
                raise
            if processes.count() > 1:  # the others may have read it
                break
    raise inventory.CheckpointError(
        f"the checkpoint of step {chosen:,} was removed from {workdir} while it was read: a run there keeps only its "
        f"newest {config.train.keep} (config.train.keep); run the same command again, or copy the work dir first"
    )


def _chosen(workdir: Path, step: int | None) -> int:
    """The step to read, whose files are good."""
    asked = step
    if asked is None:
        step = inventory.newest_good(workdir, lambda line: print(line, file=sys.stderr), items=("params",))
    elif asked in inventory.steps(workdir):
        faults = inventory.faults(workdir, asked, items=("params",))
        if faults and not inventory.is_gone(workdir, asked):
            raise inventory.CheckpointError(f"the checkpoint of step {asked:,} is damaged: {inventory.named(faults)}")
    found = inventory.steps(workdir)
    if step is None or (asked is not None and asked not in found):
        wanted = "a checkpoint" if step is None else f"a checkpoint of step {step}"
        listed = ", ".join(map(str, found)) or "none"
        raise ConfigError(f"the work dir {str(workdir)!r} has not {wanted}; found: {listed}")
    return step


def mesh_of(config: Config) -> Mesh:
    """The run's mesh; where the devices here do not make it up, one device of each process alone."""
    try:
        return meshes.make_mesh(config.mesh)
    except ConfigError:
        first = {device.process_index: device for device in reversed(jax.devices())}
        return meshes.make_mesh(MeshConfig(), [first[process] for process in sorted(first)])
