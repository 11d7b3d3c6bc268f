"""Equality 7 on meshes: the same losses and parameters on any of them, in a process of its own with 8 devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

PROGRAM = """
import json, sys
import jax
jax.config.update("jax_disable_most_optimizations", True)  # compiling is nearly all of the time
import numpy as np
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.parameters import table
from lrt_jax.setup.config import MeshConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from lrt_jax.setup import mesh as meshes
from lrt_jax.training import optimizer, schedules, state, step
jax.config.update("jax_enable_x64", True)
config = ModelConfig(2, 16, 4, 2, 8, 48, dtype="float64", scan_layers=True)
rows = np.random.default_rng(0).integers(0, 48, (8, 9), dtype=np.int32)
MESHES = ((1, 1, 1, 1), (2, 2, 2, 1), (8, 1, 1, 1), (1, 8, 1, 1))
for name, schedule, chosen in (
    ("interleaved", ScheduleConfig(subsets=2, unroll=False), MESHES),
    ("multi_refinement", ScheduleConfig(name="multi_refinement", refinements=1, unroll=False), MESHES[:2]),
):
    for sizes in chosen:
        devices = jax.devices()[: int(np.prod(sizes))]
        mesh = meshes.make_mesh(MeshConfig(*sizes), devices)
        decoder, adamw = Decoder(config), optimizer.build(OptimizerConfig(name="adamw", eps=1e-3), table(config), 10)
        train = step.build(decoder, schedules.build(schedule, 8), adamw, schedules.forward_names(schedule))
        current, losses = state.create(decoder, adamw, mesh, seed=0), []
        for i in range(10):
            batch = meshes.global_batch(mesh, (np.roll(rows, i, 0)[:, :-1], np.roll(rows, i, 0)[:, 1:]))
            current, metrics = train(current, *batch)
            losses.append(float(metrics["train/loss"]))
        shards = len({str(shard.index) for shard in current.params["query"].addressable_shards})
        print(json.dumps({"schedule": name, "mesh": sizes, "losses": losses, "shards": shards}), flush=True)
"""


def test_7_losses_are_the_same_on_every_mesh():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(runs) == 6
    for name in ("interleaved", "multi_refinement"):
        single, *others = [run for run in runs if run["schedule"] == name]
        assert single["mesh"] == [1, 1, 1, 1] and single["losses"][-1] < single["losses"][0]
        for run in others:
            np.testing.assert_allclose(run["losses"], single["losses"], rtol=1e-9, err_msg=str(run["mesh"]))
            assert run["shards"] == run["mesh"][1] * run["mesh"][2]  # really sharded, over fsdp × tensor
