"""Weights gathered once a step: gradients as on one device, by as many collectives for any S, on 8 devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lrt_jax.setup.config import ConfigError, MeshConfig
from lrt_jax.setup.mesh import AXES, gathers_once

PROGRAM = """
import json, re
import jax
jax.config.update("jax_disable_most_optimizations", True)  # compiling is nearly all of the time
import numpy as np
import optax
from lrt_jax.model.decoder import Decoder
from lrt_jax.setup.config import MeshConfig, ModelConfig, ScheduleConfig
from lrt_jax.setup import mesh as meshes
from lrt_jax.training import state, step
jax.config.update("jax_enable_x64", True)
ROWS, T, V = 16, 8, 48
rows = np.random.default_rng(0).integers(0, V, (ROWS, T + 1), dtype=np.int32)
rng = np.random.default_rng(1)
for scan, memory, subsets, accumulation, sizes, values, dtype in (
    (False, "layerwise", 2, 2, (2, 4), "all", "float64"),
    (False, "layerwise", 4, 1, (2, 4), "all", "float64"),
    (True, "shared", 2, 1, (1, 8), "alternate", "bfloat16"),
    (False, "shared", 2, 1, (8, 1), "alternate", "float64"),
):
    config = ModelConfig(
        2, 32, 4, 2, T, V, dtype=dtype, scan_layers=scan, remat=scan, memory=memory, value_embeddings=values
    )
    schedule = ScheduleConfig(subsets=subsets)
    found = []
    for once, devices in ((False, (1, 1)), (True, sizes)):
        mesh = meshes.make_mesh(MeshConfig(*devices), jax.devices()[: int(np.prod(devices))])
        decoder = Decoder(config, mesh)
        shapes = state.abstract_params(decoder, mesh)
        if not once:  # no zeros, as fresh parameters have
            drawn = {name: rng.normal(size=leaf.shape, scale=0.2) for name, leaf in shapes.items()}
        params = {name: jax.device_put(drawn[name].astype(leaf.dtype), leaf.sharding) for name, leaf in shapes.items()}
        batch = meshes.global_batch(mesh, (rows[:, :-1], rows[:, 1:]))
        gradient = jax.jit(step.gradient_of(decoder, schedule, accumulation, gather_once=once))
        lowered = gradient.lower(params, *batch)
        found.append(jax.tree.map(np.asarray, lowered.compile()(params, *batch)))
    kinds = ("all_gather", "reduce_scatter", "all_to_all", "all_reduce")
    collectives = {kind: len(re.findall(f"stablehlo.{kind}", lowered.as_text())) for kind in kinds}
    error = jax.tree.map(lambda one, other: float(np.abs(one - other).max() / np.abs(one).max()), *found)
    gathered = sorted(set(re.findall(r"stablehlo.all_gather.*x(\\w+)>$", lowered.as_text(), re.M)))
    print(json.dumps({"metrics": error[0], "gradient": error[1], "collectives": collectives, "gathered": gathered}))
"""


def test_gradients_are_those_of_one_device_and_collectives_do_not_grow_with_the_subsets():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two, four, over_fsdp, over_data = [json.loads(line) for line in done.stdout.splitlines()]
    for run in (two, four, over_fsdp, over_data):
        assert {"embedding", "value_embedding", "head", "memory_key", "alpha"} <= run["gradient"].keys()
        close = 0.02 if run is over_fsdp else 1e-11  # bfloat16, added up in another order
        assert all(error < close for error in (*run["metrics"].values(), *run["gradient"].values())), run
    # 4 matrices and 2 projections of memory for each of 2 layers, the head, and the tokens of both microbatches, which
    # look up the embeddings of their group.
    assert two["collectives"]["reduce_scatter"] == four["collectives"]["reduce_scatter"] == 2 * 6 + 1
    assert four["collectives"]["all_reduce"] - two["collectives"]["all_reduce"] == 2  # losses of two more forwards
    assert four["collectives"]["all_gather"] == 2 * 6 + 1 + 1 and four["gathered"] == ["f64", "i32"]
    assert over_data["collectives"]["all_gather"] == over_data["collectives"]["reduce_scatter"] == 0
    # Each stack once, in the dtype of activations, though parameters and their gradients are float32.
    assert over_fsdp["collectives"]["all_gather"] == 9 + 1 and over_fsdp["gathered"] == ["bf16", "i32"]


@pytest.mark.parametrize(
    ("gather", "sizes", "once"),
    [
        ("auto", (2, 4, 1, 1), True),
        ("auto", (1, 1, 1, 1), False),
        ("auto", (2, 2, 2, 1), False),
        ("auto", (2, 1, 1, 2), False),
        ("step", (8, 1, 1, 1), True),
        ("forward", (2, 4, 1, 1), False),
    ],
)
def test_what_is_gathered_once_depends_on_the_mesh(gather, sizes, once):
    assert gathers_once(MeshConfig(gather=gather), dict(zip(AXES, sizes, strict=True))) == once


def test_a_mesh_that_shards_more_than_rows_cannot_gather_once():
    with pytest.raises(ConfigError, match=r'gather is "step", which needs tensor and sequence to be 1, not 2 and 4'):
        gathers_once(MeshConfig(gather="step"), {"data": 1, "fsdp": 1, "tensor": 2, "sequence": 4})
