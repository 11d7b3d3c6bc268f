"""Equality 7 on meshes: the same losses and scores on any of them, in a process of its own with 8 devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import ConfigError, MeshConfig

PROGRAM = """
import json, sys
import jax
jax.config.update("jax_disable_most_optimizations", True)  # compiling is nearly all of the time
import numpy as np
import optax
from lrt_jax.few_shot.prompts import Question
from lrt_jax.few_shot.scorer import Scorer
from lrt_jax.inference import scoring
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.setup.config import DecodeConfig, MeshConfig, ModelConfig, ScheduleConfig
from lrt_jax.setup import mesh as meshes
from lrt_jax.training import state, step
jax.config.update("jax_enable_x64", True)
ROWS, T, V = 8, 16, 48
def model(**layers):
    return ModelConfig(2, 32, 4, 2, T, V, dtype="float64", **layers)
rows = np.random.default_rng(0).integers(0, V, (ROWS, T + 1), dtype=np.int32)
# Those that shard just rows gather weights once a step, unless told otherwise.
MESHES = (((1, 1, 1, 1), "auto"), ((8, 1, 1, 1), "auto"), ((1, 8, 1, 1), "auto"), ((2, 4, 1, 1), "forward"),
          ((2, 2, 2, 1), "auto"), ((1, 2, 2, 2), "auto"), ((1, 1, 1, 8), "auto"))
for name, schedule, config in (
    ("interleaved", ScheduleConfig(subsets=2), model(scan_layers=True, remat=True)),
    ("multi_refinement", ScheduleConfig(name="multi_refinement", refinements=1, settle=1, jitter=0.1,
                                        plain_prefix=True, unroll=False),
     model(scan_layers=True, remat=True, memory_layers="2-2")),
    ("unrolled", ScheduleConfig(subsets=2, kv_refresh=True), model(memory="layerwise", value_embeddings="alternate")),
):
    initial = None
    for sizes, gather in MESHES:
        if name != "interleaved" and sizes in ((8, 1, 1, 1), (1, 8, 1, 1)):
            continue  # those gather once: test_replicas has them, unrolled and scanned
        mesh = meshes.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        decoder, sgd = Decoder(config, mesh), optax.sgd(0.1, momentum=0.9)
        once = meshes.gathers_once(MeshConfig(gather=gather), mesh.shape)
        train = step.build(decoder, schedule, sgd, gather_once=once)
        if initial is None:
            initial = jax.tree.map(np.asarray, state.create(decoder, sgd, mesh, seed=0))
        current, losses, score = jax.device_put(initial, state.state_shardings(decoder, sgd, mesh)), [], None
        for i in range(4):
            batch = meshes.global_batch(mesh, (np.roll(rows, i, 0)[:, :-1], np.roll(rows, i, 0)[:, 1:]))
            current, metrics = train(current, *batch)
            losses.append(float(metrics["train/loss"]))
        if name == "interleaved":
            score = jax.jit(lambda *given: scoring.score(*given).losses_BxT.mean(axis=0))
            score = np.asarray(score(Model(decoder, current.params), *batch)).tolist()
            # Few-shot questions whose options share some tokens.
            asked = [Question(row[:4], (row[4:10], row[3:12]), (2, 3)) for row in rows[:3]]
            scored = Scorer(mesh, T, DecodeConfig(), 64)(Model(decoder, current.params), asked)
            answers = {number: answer for batch in scored for number, answer in batch}
            score += [float(loss) for number in range(3) for loss in answers[number].losses]
        shards = {leaf: len({str(shard.index) for shard in current.params[leaf].addressable_shards})
                  for leaf in ("query", "value_embedding")}
        print(json.dumps({"schedule": name, "mesh": sizes, "losses": losses, "score": score, "shards": shards,
                          "compiled": train._cache_size()}), flush=True)
"""


def test_7_losses_and_scores_are_the_same_on_every_mesh():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(runs) == 7 + 5 + 5
    for name in ("interleaved", "multi_refinement", "unrolled"):
        single, *others = [run for run in runs if run["schedule"] == name]
        assert single["mesh"] == [1, 1, 1, 1] and single["losses"][-1] < single["losses"][0]
        assert name != "interleaved" or len(single["score"]) == 16 + 6
        for run in others:
            np.testing.assert_allclose(run["losses"], single["losses"], rtol=1e-9, err_msg=str(run["mesh"]))
            if name == "interleaved":  # sequential decoding of every position
                np.testing.assert_allclose(run["score"], single["score"], rtol=1e-9, err_msg=str(run["mesh"]))
            ways = run["mesh"][1] * run["mesh"][2]
            assert run["shards"] == {"query": ways, "value_embedding": ways}  # really sharded, over fsdp × tensor
            assert run["compiled"] == 1  # the state comes out as it went in


class Device:
    """What a mesh asks of a device: number ``id`` on one of two hosts, of four each."""

    device_kind = "stand-in"

    def __init__(self, platform, number):
        self.platform, self.id = platform, number
        self.process_index = self.slice_index = number // 4


@pytest.mark.parametrize("sizes", [(-1, 1, 1, 1), (2, 4, 1, 1), (1, 8, 1, 1), (1, 2, 4, 1)])
def test_any_axis_goes_over_the_hosts_of_gpus(sizes):
    devices = [Device("gpu", number) for number in range(8)]
    mesh = meshes.make_mesh(MeshConfig(*sizes), devices)
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    assert meshes.data_ways_of_a_slice(mesh) == mesh.shape["data"]


@pytest.mark.parametrize("slices", [1, 4])
def test_slices_of_tpus_must_be_those_found(slices):
    devices = [Device("tpu", number) for number in range(8)]
    with pytest.raises(ConfigError, match=f"config.mesh.slices is {slices}; the devices found lie in 2"):
        meshes.make_mesh(MeshConfig(data=8, slices=slices), devices)
