"""Peak FLOP/s by the names that devices give."""

from types import SimpleNamespace

import pytest

from lrt_jax.setup import hardware


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
    ],
)
def test_the_longest_name_in_whole_words_counts(kind, teraflops):
    assert hardware.peak_flops(SimpleNamespace(device_kind=kind)) == teraflops * 1e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA A10", "NVIDIA L400", "NVIDIA GH200 480GB"])
def test_a_device_without_a_data_sheet_is_measured(kind, monkeypatch):
    monkeypatch.setattr(hardware, "measured_flops", lambda device: 1.0)
    assert hardware.peak_flops(SimpleNamespace(device_kind=kind)) == 1.0
