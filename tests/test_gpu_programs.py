"""What a train step holds that is lowered for an NVIDIA GPU: full size, nothing compiled, no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def programs():
    """By name, what ``programs/steps_for_gpus.py`` found."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / "programs" / "steps_for_gpus.py"
    found = subprocess.run([sys.executable, script], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    return {row["name"]: row for row in map(json.loads, found.stdout.splitlines())}


@pytest.mark.parametrize(
    ("name", "backward"),
    [
        # A scanned layer holds a kernel for each of two windows; a subset's has one for each of two pieces.
        ("depth=12,memory=none, fsdp 1", 2),
        ("depth=12, fsdp 1", 2 + 2 * 2 * 2),
        ("depth=20, fsdp 1", 2 + 2 * 2 * 2),
        ("depth=12, fsdp 4", 2 + 2 * 2 * 2),
    ],
)
def test_a_step_attends_by_cudnn_alone(programs, name, backward):
    row = programs[name]
    assert row["backward"] == backward
    assert row["forward"] == row["bfloat16"] == 2 * backward  # computed again for the backward pass
    assert row["squares"] == []  # scores, or a mask, of a whole row


def test_logits_of_all_rows_are_nowhere_held_in_float32(programs):
    assert [programs[f"depth={depth}, fsdp 1"]["logits"] for depth in (12, 20)] == [[], []]


def test_no_layer_exchanges_anything_with_other_devices(programs):
    assert programs["control"]["exchanges"] == 2
    assert programs["control"]["exchanges_in_loops"] == ["stablehlo.all_reduce"]
    assert programs["depth=12, fsdp 4"]["exchanges"] > 2
    # What is looked up in value embeddings, and its gradient: one table after the other.
    assert programs["depth=12, fsdp 4"]["exchanges_in_loops"] == ["stablehlo.all_to_all"] * 2
