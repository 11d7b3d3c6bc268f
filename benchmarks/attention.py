"""Each kind of attention against the dense one: time forward and backward, and temporary memory, for subsets.

    python -m benchmarks.attention [--length=512] [--heads=6] [--width=64] [--rows=4] [--subsets=1,2,4,8] [--json=FILE]

A row is S forwards, one for each subset, so that all rows do the same work. Kinds are timed in turns. Splash attention
runs on a TPU only, cuDNN's on a GPU only.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.arguments import output, positive, several
from benchmarks.checks import check
from lrt_jax.model import attention, blocks, layers
from lrt_jax.model.backend import HOMES
from lrt_jax.model.kernels import KERNELS
from lrt_jax.setup import host_memory
from lrt_jax.setup.config import ModelConfig, ScheduleConfig
from lrt_jax.training import partitions

ROW = "{:<28}{:>10}{:>9}{:>10}{:>12}"


def kinds() -> list[str]:
    """Those that run here; the first is the reference."""
    return ["dense", "blocked", *(kind for kind, home in HOMES.items() if home == jax.default_backend())]


def attend(kind: str, partition: partitions.Strided, subset: int, window: int) -> Callable[..., jax.Array]:
    """One subset's attention as a function of q, k and v."""
    queries, keys = (
        jnp.asarray(partition.positions_SxP[subset])[None],
        jnp.asarray(partition.positions_SxP).reshape(1, -1),
    )
    subsets = partition.subsets
    if kind in KERNELS:
        options = {"subsets": subsets, "subset": subset, "mesh": None, "interpret": False}
        return lambda q, k, v: KERNELS[kind](q, k, v, window, **options)
    if kind == "blocked":
        return lambda q, k, v: blocks.attend_in_blocks(
            q, [k], [v], queries, keys, window, subsets=subsets, farthest=window
        )
    return lambda q, k, v: attention.attend(q, k, v, queries, keys, window)


def compiled(kind: str, subsets: int, window: int, options: argparse.Namespace) -> tuple[Callable[[], float], int]:
    """A function that runs the last subset's attention and its gradients, and says how long; and temporary bytes."""
    partition = partitions.strided(options.length, subsets)
    dtype = jnp.dtype(options.dtype)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [
        (options.rows, options.length // subsets, options.heads, options.width),
        *[(options.rows, options.heads, options.length, options.width)] * 2,
    ]
    q, k, v = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys[:3], shapes, strict=True))
    q, k = layers.rms_norm(q), layers.rms_norm(k)
    weights = jax.random.normal(keys[3], q.shape, dtype)
    one = attend(kind, partition, subsets - 1, window)

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return jax.grad(lambda *inputs: jnp.sum((weights * one(*inputs)).astype(jnp.float32)), (0, 1, 2))(q, k, v)

    program = jax.jit(gradients).lower(q, k, v).compile()

    def run() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(program(q, k, v))
        return time.perf_counter() - begin

    run()
    return run, int(program.memory_analysis().temp_size_in_bytes)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument("--json", type=output)
    parser.add_argument("--length", type=positive, default=512 if on_cpu else 2048)
    parser.add_argument("--heads", type=positive, default=6)
    parser.add_argument("--width", type=positive, default=64 if on_cpu else 128, help="of a head")
    parser.add_argument("--rows", type=positive, default=4 if on_cpu else 16)
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--subsets", type=several(positive), default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=positive, default=15)
    return parser.parse_args(arguments)


def main() -> None:
    """Measures, prints the table, and writes the rows."""
    host_memory.keep_freed()
    options = parse()
    for subsets in options.subsets:
        heads, width = options.heads, options.heads * options.width
        model = ModelConfig(1, width, heads, heads, sequence_length=options.length, vocab_size=1)
        check(model, ScheduleConfig(subsets=subsets) if subsets > 1 else None)
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, {options.dtype}, batch {options.rows}, T {options.length}")
    print(ROW.format("", "time", "ratio", "memory", "GB/s of KV"))
    rows = []
    for subsets in options.subsets:
        for window in (options.length, options.length // 2):
            made = {kind: compiled(kind, subsets, window, options) for kind in kinds()}
            seconds: dict[str, list[float]] = {kind: [] for kind in made}
            for _ in range(options.repeats):
                for kind, (run, _) in made.items():
                    seconds[kind].append(run())
            for kind, (_, temporary) in made.items():
                ratios = [mine / reference for mine, reference in zip(seconds[kind], seconds["dense"], strict=True)]
                row = {
                    "kind": kind,
                    "subsets": subsets,
                    "window": window,
                    "seconds": statistics.median(seconds[kind]) * subsets,
                    "time_ratio": statistics.median(ratios),
                    "temp_memory_ratio": temporary / made["dense"][1],
                }
                rows.append(row)
                print_row(row, options)
    if options.json:
        about = {"device": device.device_kind, "jax": jax.__version__, "length": options.length}
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


def print_row(row: dict[str, Any], options: argparse.Namespace) -> None:
    """One line of the table."""
    moved = 4 * options.rows * options.heads * options.length * options.width * jnp.dtype(options.dtype).itemsize
    cells = (f"{row['seconds'] * 1e3:.1f} ms", f"{row['time_ratio']:.2f} ×", f"{row['temp_memory_ratio']:.2f} ×")
    speed = moved * row["subsets"] / row["seconds"] / 1e9
    print(ROW.format(f"S={row['subsets']} window {row['window']} {row['kind']}", *cells, f"{speed:.1f}"), flush=True)


if __name__ == "__main__":
    main()
