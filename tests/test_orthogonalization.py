"""Muon on a mesh: updates as on one device, though whole matrices are on different ones; on 8 virtual devices."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lrt_jax.model.parameters import Parameter
from lrt_jax.setup.mesh import AXES, data_ways_of_a_slice, shards_rows_only
from lrt_jax.training.orthogonalization import orthogonalizer, shares

PROGRAM = """
import json, re
import jax
jax.config.update("jax_enable_x64", True)
import numpy as np
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.parameters import table
from lrt_jax.setup.config import MeshConfig, ModelConfig, OptimizerConfig
from lrt_jax.setup import mesh as meshes
from lrt_jax.training import optimizer, state
LAYERS = 3  # which no mesh of 8 devices divides
for memory, sizes, slices in (
    ("layerwise", (1, 1), 1), ("layerwise", (1, 8), 1), ("layerwise", (8, 1), 1), ("layerwise", (2, 4), 1),
    ("shared", (1, 1), 1), ("shared", (4, 2), 2), ("shared", (1, 2), 1),
):
    meshes.data_ways_of_a_slice = lambda mesh: mesh.shape["data"] // slices  # of which virtual devices have none
    config = ModelConfig(LAYERS, 32, 4, 2, 8, 48, memory=memory)
    mesh = meshes.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    muon = optimizer.build(OptimizerConfig(), table(config), 10, mesh)
    whole = state.abstract(Decoder(config, mesh), muon, mesh)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jax.device_put(rng.normal(size=leaf.shape), leaf.sharding)
    params = {name: draw(leaf) for name, leaf in whole.params.items()}
    wide = lambda leaf: leaf.astype("float64") if leaf.dtype == "float32" else leaf
    places = jax.tree.map(lambda leaf: leaf.sharding, (whole.params, whole.opt_state))
    opt_state = jax.jit(lambda params: jax.tree.map(wide, muon.init(params)), out_shardings=places[1])(params)
    lowered = jax.jit(muon.update, out_shardings=places).lower(params, opt_state, params)
    update = lowered.compile()
    for _ in range(2):  # so that momentum counts
        grads = {name: draw(leaf) for name, leaf in whole.params.items()}
        updates, opt_state = update(grads, jax.tree.map(wide, opt_state), params)
    if sizes == (1, 1):
        expected = {name: np.asarray(leaf) for name, leaf in updates.items()}
    shards = [  # of every device: what should be alike on several is
        np.abs(np.asarray(shard.data) - expected[name][shard.index]).max()
        for name, leaf in updates.items() for shard in leaf.addressable_shards
    ]
    text, gathers = update.as_text(), r"all_gather.*?dense<(\\[\\[.*?\\]\\])>"
    kinds = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")
    print(json.dumps({
        "error": float(max(shards)),
        "least": min(float(np.abs(np.asarray(leaf)).max()) for leaf in updates.values()),
        "groups": [json.loads(group) for group in re.findall(gathers, lowered.as_text())],
        "moved": {kind: len(re.findall(rf"= .*? {kind}(?:-start)?\\(", text)) for kind in kinds},
    }))
"""


def test_updates_are_those_of_one_device_and_matrices_move_once():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    one, over_fsdp, over_data, over_both, _, shared, evenly = runs
    for run in runs:
        assert run["least"] > 1e-3 and run["error"] < 1e-12, run
    assert not any(one["moved"].values())
    # Shapes, by what fsdp shards: 32 × 32 (query, output), 32 × 16 (key, value and memory's projections), 32 × 128.
    none = dict.fromkeys(one["moved"], 0)
    assert over_fsdp["moved"] == none | {"all-to-all": 2 * 3}
    # With those that fsdp leaves alone: the gates of values and of memory.
    assert over_data["moved"] == none | {"all-gather": 3 + 2}
    # 6 matrices of 32 × 32 and of 32 × 128, 12 of 32 × 16: more than 4 devices of fsdp take at once.
    assert over_both["moved"] == none | {"all-to-all": 2 * 3, "all-gather": 3 + 2}
    assert shared["moved"] == none | {"all-to-all": 2 * 3, "all-gather": 3 + 2}
    # Devices 0 to 3 are the first of two slices there: no group has devices of both.
    groups = [{device < 4 for device in group} for gather in shared["groups"] for group in gather]
    assert len(groups) >= 2 * 5 and all(len(sides) == 1 for sides in groups), shared["groups"]
    assert any(len(group) > 1 for gather in shared["groups"] for group in gather)
    assert evenly["moved"] == none | {"all-to-all": 2 * 3}  # 2 devices share 6 or 12 without padding


@pytest.mark.parametrize("shape", [(256, 256), (128, 512), (512, 128)])
def test_flops_are_those_of_the_program(shape):
    spec = {"mlp_in": Parameter((3, *shape), ("layers", "embed", "mlp"), jax.nn.initializers.zeros, "matrix", (1,))}
    stack = jax.ShapeDtypeStruct((3, *shape), "float32")
    program = jax.jit(orthogonalizer(spec)).lower({"mlp_in": stack}).compile()
    ((kind, (names, share)),) = shares(spec, spec, data=1, fsdp=1).items()
    assert names == ["mlp_in"] and kind.shape == tuple(sorted(shape)) and not kind.sharded
    assert share.each * kind.flops == pytest.approx(program.cost_analysis()["flops"], rel=0.02)  # and elementwise


@pytest.mark.parametrize(
    ("sizes", "rows_only"),
    [((1, 1, 1, 1), False), ((1, 8, 1, 1), True), ((4, 2, 1, 1), True), ((2, 2, 2, 1), False), ((2, 2, 1, 2), False)],
)
def test_meshes_that_shard_rows_only(sizes, rows_only):
    assert shards_rows_only(dict(zip(AXES, sizes, strict=True))) == rows_only


def test_work_is_shared_out_within_a_slice():
    def mesh(slices, platform="tpu"):
        devices = [SimpleNamespace(platform=platform, slice_index=index * slices // 8) for index in range(8)]
        return SimpleNamespace(shape={"data": 4, "fsdp": 2}, devices=np.array(devices).reshape(4, 2, 1, 1))

    assert [data_ways_of_a_slice(mesh(slices)) for slices in (1, 2, 4)] == [4, 2, 1]
    assert data_ways_of_a_slice(mesh(8, "gpu")) == 4  # eight hosts
