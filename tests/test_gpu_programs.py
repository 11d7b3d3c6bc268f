"""What a train step holds that is lowered for an NVIDIA GPU: full size, nothing compiled, no GPU needed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lrt_jax.model import cudnn

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


@pytest.mark.parametrize("window", [15, 64])
def test_cudnn_is_called_as_jax_calls_it(window, monkeypatch):
    """All positions within a window, forward and backward: what the kernels are told is the same but for the layout."""
    for check, answer in (("check_cudnn_version", 91200), ("check_compute_capability", True)):
        monkeypatch.setattr(cudnn.fused, check, lambda *_, answer=answer: answer)
    monkeypatch.setattr(cudnn.fused, "is_cuda_compute_capability_equal", lambda _: False)

    def told(attend, *shapes):
        def loss(q, k, v):
            return jnp.sum(attend(q, k, v).astype(jnp.float32))

        inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
        text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
        found = [
            json.loads(call.replace(r"\22", '"')) for call in re.findall(r'backend_config = "(\{.*?\})"[,}]', text)
        ]
        return [
            {
                name: value
                for name, value in call["cudnn_fmha_backend_config"].items()
                if "dimension_numbers" not in name
            }
            for call in found
        ]

    def theirs(q, k, v):
        size = (window, 0) if window < 63 else None
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=size, implementation="cudnn")

    def ours(q, k, v):
        return cudnn.attend_by_cudnn(q, (k,), (v,), window=window, subsets=1, subset=0, interpret=False)

    rows, heads_first = (2, 64, 4, 128), (2, 4, 64, 128)
    found, expected = told(ours, rows, heads_first, heads_first), told(theirs, rows, rows, rows)
    assert len(found) == len(expected) == 2
    for mine, their in zip(found, expected, strict=True):
        assert mine.pop("fmha_scale") == pytest.approx(their.pop("fmha_scale"))
        del mine["seed"], their["seed"]  # of a dropout that there is not
        assert mine == their and mine["dropout_rate"] == 0
