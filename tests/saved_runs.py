"""A work dir with real checkpoints, to do things to."""

import dataclasses
import shutil
from pathlib import Path

import grain
import jax
import numpy as np

from lrt_jax.durability import checkpoint
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.parameters import table
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from lrt_jax.training import optimizer, state


@dataclasses.dataclass
class Run:
    """A work dir with the checkpoints 1, 2 and 3, the state that each holds, and what restoring needs."""

    workdir: Path
    config: Config
    states: dict[int, dict[str, np.ndarray]]
    abstract: state.TrainState

    def restored(self, step: int) -> dict[str, np.ndarray]:
        opened = checkpoint.Checkpoints(self.workdir, keep=3)
        iterator = numbers()
        found = arrays(opened.restore(self.abstract, iterator, step))
        opened.close()
        assert next(iterator) == step
        return found

    def copy(self, place: Path) -> "Run":
        shutil.copytree(self.workdir, place)
        return dataclasses.replace(self, workdir=place)


def numbers():
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def arrays(train_state) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(train_state)}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def make(workdir: Path, model: ModelConfig) -> Run:
    config = Config(model, TrainConfig(batch_size=2, steps=3, keep=3))
    decoder, mesh = Decoder(model), meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    adamw = optimizer.build(OptimizerConfig(name="adamw"), table(model), 10)
    run = Run(workdir, config, {}, state.abstract(decoder, adamw, mesh))
    opened, iterator = checkpoint.Checkpoints(run.workdir, keep=3), numbers()
    for step in (1, 2, 3):
        next(iterator)
        current = state.create(decoder, adamw, mesh, seed=step)
        current = current.replace(step=current.step + step)
        opened.save(current, iterator, config)
        run.states[step] = arrays(current)
    opened.wait()
    opened.close()
    return run
