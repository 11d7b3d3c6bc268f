"""What a config needs on a topology: the table on paper, and the real programs compiled on this machine's device."""

import dataclasses
import math
import re

import jax
import pytest

from lrt_jax.model import costs
from lrt_jax.model.backend import attention_kind, compiling_for, compute_dtype
from lrt_jax.model.parameters import table
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config, MeshConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from lrt_jax.setup.schema import ConfigError
from lrt_jax.topology import programs, search, traffic
from lrt_jax.topology.chips import CHIPS, TopologyError, chip_of
from lrt_jax.topology.programs import Compiled
from lrt_jax.topology.report import Report

# Depth 4: small, and divided by every power of two up to 64.
MODEL = ModelConfig(4, 512, 8, 8, 256, 1024, remat=True, scan_layers=True)
ALONE = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1, "slices": 1}


def config_of(rows=64, schedule="interleaved", **mesh) -> Config:
    return Config(
        MODEL, TrainConfig(batch_size=rows, steps=10), schedule=ScheduleConfig(name=schedule), mesh=MeshConfig(**mesh)
    )


def step_of(rows=64, schedule="interleaved", gather="auto", **sizes) -> traffic.Step:
    config = config_of(rows, schedule, gather=gather)
    return traffic.of_step(config, ALONE | sizes, config.schedule)


def received(step: traffic.Step) -> dict[str, float]:
    counted = [transfer for transfer in step.transfers if not re.search("embeddings|Muon", transfer.name)]
    return {transfer.axis: transfer.received for transfer in counted}


def test_one_chip_receives_nothing_and_does_all():
    step = step_of()
    assert step.transfers == ()
    config = config_of()
    assert step.flops == 64 * costs.train_flops(MODEL, config.schedule)
    assert step.recomputed == step.flops / 3  # a forward pass more


def test_flops_and_traffic_by_hand():
    """A plain step, whose collectives are few enough to count."""
    spec = table(MODEL)
    matrices = sum(
        parameter.size
        for parameter in spec.values()
        if parameter.group in ("matrix", "head") and "gate_inputs" not in parameter.axes
    )
    total = sum(parameter.size for parameter in spec.values())
    fsdp = {t.name: t.received for t in step_of(schedule="plain", fsdp=4, gather="forward").transfers}
    assert fsdp["all-gather of weights"] == pytest.approx(2 * 2 * matrices * 3 / 4)  # twice, bfloat16
    assert fsdp["reduce-scatter of gradients"] == pytest.approx(2 * matrices * 3 / 4)  # once, bfloat16
    values = 64 / 4 * 256 * (512 + 4 * 8 * 64)
    for schedule, orders in (("plain", 1), ("interleaved", 2)):
        each = {t.name: t.received for t in step_of(schedule=schedule, fsdp=4, gather="forward").transfers}
        assert each["all-to-all of looked-up embeddings"] == pytest.approx(2 * 2 * orders * values * 3 / 4)
        once = {t.name: t.received for t in step_of(schedule=schedule, fsdp=4).transfers}
        assert once["all-gather of weights"] == pytest.approx(2 * matrices * 3 / 4)
        assert once["reduce-scatter of gradients"] == pytest.approx(4 * matrices * 3 / 4)  # float32
        assert once["all-to-all of looked-up embeddings"] == pytest.approx(2 * 2 * values * 3 / 4)
    data, _ = step_of(schedule="plain", data=4).transfers
    assert data.received == pytest.approx(2 * 4 * total * 3 / 4) and data.dcn == 0
    (tensor,) = step_of(schedule="plain", tensor=2).transfers
    assert tensor.received == pytest.approx(2 * 6 * 4 * 64 * 256 * 512 * 2 / 2)  # 6 a layer, sent and received
    (sequence,) = step_of(schedule="plain", sequence=2).transfers
    assert sequence.received == pytest.approx(4 * 3 * 2 * 64 * 256 * 512 * 2 / 2)


def test_muon_by_hand():
    """4 layers of width 512: 512 × 512 four times a layer and once more for each of memory's two, 512 × 2048 twice."""
    square, wide = 4 * 4 + 2, 4 * 2
    each = 5 * 6 * 512**3, 5 * (4 * 512**2 * 2048 + 2 * 512**3)
    assert step_of().orthogonalized == pytest.approx(square * each[0] + wide * each[1], rel=0.01)  # and gates
    # 8 chips: 18 matrices are 3 a chip, 8 are 1; on 2 × 4 the same, the second half of those comes over data.
    for data, fsdp in ((1, 8), (2, 4)):
        step = step_of(data=data, fsdp=fsdp)
        assert step.orthogonalized == pytest.approx(3 * each[0] + each[1], rel=0.01)
        moved = {t.axis: t.received for t in step.transfers if "Muon" in t.name}
        size = 4 * (3 * 512**2 + 512 * 2048)
        assert moved["fsdp"] == pytest.approx(2 * size * (fsdp - 1) / fsdp)
        assert moved.get("data", 0) == pytest.approx(size if data > 1 else 0, rel=0.02)  # and gates
    # A second slice does the same again: nothing of it crosses the slow network.
    twice = step_of(data=4, fsdp=4, slices=2)
    assert twice.orthogonalized == step_of(data=2, fsdp=4).orthogonalized
    received_by = lambda step: {t.name: t.received for t in step.transfers if "Muon" in t.name}  # noqa: E731
    assert received_by(twice) == received_by(step_of(data=2, fsdp=4)) != {}
    assert step_of(tensor=2).orthogonalized == step_of().orthogonalized  # at least


def test_traffic_grows_with_forwards_and_slices():
    each = (received(step_of(schedule=name, gather="forward", fsdp=8)) for name in ("plain", "interleaved"))
    plain, interleaved = each
    assert interleaved["fsdp"] == 3 * plain["fsdp"]  # 1 + S forwards gather all weights each
    one, two = (step_of(schedule="plain", data=4, slices=slices).transfers[0] for slices in (1, 2))
    assert one.received == two.received and one.dcn == 0
    # Each slice of two copies first adds its own: each chip then exchanges half of the gradient over DCN.
    assert two.dcn == pytest.approx(2 * 4 * sum(p.size for p in table(MODEL).values()) / 2 / 2)
    assert step_of(data=2, fsdp=4).flops == step_of().flops / 8


def report_of(*peaks: tuple[float, bool], **sizes) -> Report:
    compiled = tuple(Compiled(f"program {i}", 1.0, peak, 2**30, fits) for i, (peak, fits) in enumerate(peaks))
    return Report(config_of(), "v5e:4x4", CHIPS["v5e"], ALONE | {"data": 4, "fsdp": 4} | sizes, compiled)


def test_the_report_says_what_fits():
    report = report_of((3 * 2**30, True), (2**30, True))
    text = "\n".join(report.lines())
    assert text.endswith("\nfits")
    assert "v5e:4x4: 16 chips as data 4 × fsdp 4 × tensor 1 × sequence 1" in text
    assert re.search(r"peak memory, program 0 .* 3\.00 GiB of 16\n", text)
    assert "ICI, fsdp: all-gather of weights" in text and "DCN" not in text.replace("least time, DCN", "")
    assert 0 < report.mfu_bound < 1 and "MFU at most" in text
    slowest = max(report.seconds.values())
    assert report.mfu_bound == pytest.approx(report.step.flops / 197e12 / slowest)
    assert report.row().count("|") == 11 and report.row().endswith("| fits |")


def test_the_report_says_what_to_change():
    report = report_of((20 * 2**30, False))
    last = list(report.lines())[-1]
    assert last.startswith("does not fit: a chip has 4 rows at once: double config.train.accumulation")
    without = dataclasses.replace(MODEL, remat=False, scan_layers=False)
    report = dataclasses.replace(report, config=dataclasses.replace(report.config, model=without))
    assert "set config.model.remat=True" in list(report.lines())[-1]
    wide = dataclasses.replace(report.config, model=dataclasses.replace(MODEL, layers=96, width=2048))
    assert ", so set config.mesh.gather=forward; a chip" in list(dataclasses.replace(report, config=wide).lines())[-1]
    held = dataclasses.replace(report, compiled=(Compiled("train step", 1.0, math.nan, 12 * 2**30, False),))
    assert "raise config.mesh.fsdp" in list(held.lines())[-1]


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded",
            20.5 * 2**30,
        ),
        ("XLA:TPU compile permanent error. CompileTimeHbmOom: used 512.0M of 1.0M", 512 * 2**20),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (30.27G) exceeds available HBM (15.75G). HLO module: jit_step.",
            30.27 * 2**30,
        ),
        ("INVALID_ARGUMENT: something else", None),
    ],
)
def test_out_of_memory_is_read_from_the_compilers_words(message, wanted):
    assert programs._wanted(message) == wanted


def test_the_real_programs_are_compiled():
    """On the device at hand: what libtpu says of a TPU is in docs/SCALING.md."""
    model = dataclasses.replace(MODEL, layers=2, width=32, heads=2, kv_heads=2, sequence_length=16, vocab_size=64)
    model = dataclasses.replace(model, memory="none")
    config = dataclasses.replace(config_of(2, "plain", data=1), model=model, optimizer=OptimizerConfig("adamw"))
    mesh = meshes.make_mesh(config.mesh, jax.devices()[:1])
    found = list(programs.compile_all(config, mesh))
    assert [program.name for program in found] == [
        "train step",
        "decode step",
        "parallel evaluation",
        "sequential evaluation",
        "health of the recurrence",
    ]
    parameters = costs.count_parameters(config.model).total
    for program in found:
        assert program.fits and program.peak > 0
        assert program.arguments >= 4 * parameters
    assert found[0].arguments > 2.5 * found[2].arguments  # with the optimizer's state


def test_what_is_left_to_the_machine_follows_the_target():
    class Tpu:
        platform = "tpu"

    assert compute_dtype(MODEL) == "float32" and attention_kind(MODEL, 256).kind == "blocked"
    with compiling_for(Tpu()):
        assert compute_dtype(MODEL) == "bfloat16"
        assert attention_kind(MODEL, 256).kind == "splash" and attention_kind(MODEL, 100).kind == "dense"
    assert compute_dtype(MODEL) == "float32"


def test_search_ranks_meshes_that_fit():
    config, chip = config_of(), CHIPS["v5e"]
    found = search.candidates(config, chip, 16, 1)
    assert found and all(math.prod(c.sizes[axis] for axis in meshes.AXES) == 16 for c in found)
    assert [round(c.mfu_bound, 2) for c in found] == sorted((round(c.mfu_bound, 2) for c in found), reverse=True)
    for candidate in found:
        meshes.check(candidate.config, candidate.sizes)
    assert {c.config.train.batch_size for c in found} == {32, 64, 128, 256}
    assert all(c.sizes["data"] % 2 == 0 for c in search.candidates(config, chip, 16, 2))
    assert not search.candidates(config, dataclasses.replace(chip, hbm=2**20), 16, 1)
    assert found[0].sizes["tensor"] == found[0].sizes["sequence"] == 1


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "v5e:2xx", "v5e:0x2", "v5e-16"])
def test_unknown_topologies_are_said(topology):
    with pytest.raises(TopologyError, match=f"--topology is '{topology}'; it must be CHIP:SHAPE .*v5e, v5p, v6e"):
        chip_of(topology)


def test_a_missing_compiler_is_said(monkeypatch):
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TopologyError, match="compiling for a TPU needs its compiler: pip install"):
        programs.devices("v5e:2x2")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "data × fsdp = 3 does not divide config.train.batch_size / train.accumulation = 64"),
        ({"fsdp": 128}, "data × fsdp = 128 does not divide"),
        ({"tensor": 16}, "tensor = 16 does not divide config.model.heads = 8"),
        ({"sequence": 3}, "sequence = 3 does not divide config.model.sequence_length = 256"),
        (
            {"sequence": 256},
            r"sequence = 256 does not divide config.P = model.sequence_length / schedule.subsets = 128",
        ),
    ],
)
def test_what_does_not_divide_is_said(sizes, message):
    with pytest.raises(ConfigError, match=message):
        meshes.check(config_of(), ALONE | sizes)


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        (MeshConfig(data=3), 8, "needs 3 devices; 8 found"),
        (MeshConfig(fsdp=3), 8, "needs a multiple of 3 devices; 8 found"),
        (MeshConfig(fsdp=8, slices=2), 8, "config.mesh.slices is 2, which does not divide the data axis of 1"),
    ],
)
def test_what_does_not_fit_the_devices_is_said(mesh, devices, message):
    with pytest.raises(ConfigError, match=message):
        meshes.resolve(mesh, devices)
