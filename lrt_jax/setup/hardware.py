"""What the devices can do at best: the denominator of MFU."""

import re
import time

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s of one JAX device (a v4 or v5p device is a chip), from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,  # SXM: its device says "80GB HBM3"
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "Tesla T4": 65e12,
}
PROBE_SIZE = 1024
PROBE_SECONDS = 0.1  # so long that a moment in which another process has the cores does not count


def peak_flops(device: jax.Device) -> float:
    """Peak FLOP/s of one device: its data sheet's, or, for a device that has none here, what a probe reaches."""
    return data_sheet_flops(device) or measured_flops(device)


def data_sheet_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of one device by its data sheet; None for a device that has none here.

    A name stands for all kinds that begin with it in whole words; of several the longest counts.
    """
    known = [name for name in PEAK_FLOPS if re.match(rf"{re.escape(name)}(?!\w)", device.device_kind)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def measured_flops(device: jax.Device) -> float:
    """FLOP/s of a square float32 matrix product, the fastest within PROBE_SECONDS.

    On a machine that others share it is a lower bound of the peak, so what is a share of it may exceed 1.
    """
    square = jax.device_put(jnp.ones((PROBE_SIZE, PROBE_SIZE)), device)
    product = jax.jit(jnp.matmul)
    product(square, square).block_until_ready()
    seconds: list[float] = []
    while sum(seconds) < PROBE_SECONDS:
        begin = time.perf_counter()
        product(square, square).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * PROBE_SIZE**3 / min(seconds)
