"""Each kind of attention against the dense one: time forward and backward, temporary memory, and the error.

    python -m benchmarks.attention [--length=512] [--heads=6] [--width=64] [--rows=4] [--subsets=1,2,4,8] [--json=FILE]
    python -m benchmarks.attention --sweep               # short and odd lengths and windows: errors only

A row is S forwards, one for each subset, and their gradients, so that all rows do the same work. Kinds are timed in
turns. The error is that of outputs and gradients, the largest of ‖found - exact‖ / ‖exact‖, where exact is dense
attention of the same inputs in float32. Splash attention runs on a TPU only, cuDNN's on a GPU only. The file that
--json names is written after every row.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.arguments import output, positive, several
from benchmarks.checks import check
from lrt_jax.method import partitions
from lrt_jax.model import attention, blocks, layers
from lrt_jax.model.backend import HOMES
from lrt_jax.model.cudnn import attend_by_cudnn
from lrt_jax.setup import host_memory
from lrt_jax.setup.config import ModelConfig, ScheduleConfig

ROW = "{:<28}{:>10}{:>9}{:>10}{:>10}{:>11}"
# For --sweep: P of a subset, and windows as shares of T.
LENGTHS = (1, 2, 3, 17, 63, 64, 65, 127, 129, 192, 320, 1023, 1088)
WINDOWS = (1.0, 0.5, 0.01)

Pieces = Sequence[jax.Array]


def kinds() -> list[str]:
    """Those that run here; the first is the reference."""
    return ["dense", "parts", "blocked", *(kind for kind, home in HOMES.items() if home == jax.default_backend())]


def attend(kind: str, partition: partitions.Strided, subset: int, window: int) -> Callable[..., jax.Array]:
    """One subset's attention as a function of q, and k and v in pieces."""
    queries, keys = (
        jnp.asarray(partition.positions_SxP[subset])[None],
        jnp.asarray(partition.positions_SxP).reshape(1, -1),
    )
    known: dict[str, Any] = {"subsets": partition.subsets, "subset": subset, "window": window, "interpret": False}
    if kind == "cudnn":
        return functools.partial(attend_by_cudnn, **known)
    if kind == "blocked":
        return lambda q, k, v: blocks.attend_in_blocks(
            q, k, v, queries, keys, window, subsets=partition.subsets, farthest=window
        )
    if kind == "splash":
        from lrt_jax.model.splash import attend_by_splash

        whole: Any = functools.partial(attend_by_splash, mesh=None, **known)
    else:
        dense = {"dense": attention.attend, "parts": attention.attend_in_parts}[kind]
        whole = functools.partial(dense, queries_BxP=queries, keys_BxN=keys, window=window)
    return lambda q, k, v: whole(q, *(jnp.concatenate(pieces, axis=2) for pieces in (k, v)))


def inputs(subsets: int, length: int, options: argparse.Namespace) -> tuple[Pieces, Pieces, Pieces, Pieces]:
    """Queries of each subset, keys and values in pieces, and what outputs are multiplied with."""
    dtype, keys = jnp.dtype(options.dtype), iter(jax.random.split(jax.random.key(length), 4 * subsets))
    of_queries, of_keys = (
        (options.rows, length, options.heads, options.width),
        (options.rows, options.heads, length, options.width),
    )

    def drawn(shape: tuple[int, ...]) -> Pieces:
        return [jax.random.normal(next(keys), shape, jnp.float32) for _ in range(subsets)]

    q, k = ([layers.rms_norm(array).astype(dtype) for array in drawn(shape)] for shape in (of_queries, of_keys))
    v, weights = ([array.astype(dtype) for array in drawn(shape)] for shape in (of_keys, of_queries))
    return q, k, v, weights


def program(kind: str, partition: partitions.Strided, window: int) -> Callable[..., Any]:
    """Outputs of all subsets, and gradients of q, k and v."""
    each = [attend(kind, partition, subset, window) for subset in range(partition.subsets)]

    def run(q: Pieces, k: Pieces, v: Pieces, weights: Pieces) -> Any:
        def outputs(q: Pieces, k: Pieces, v: Pieces) -> Any:
            return [one(mine, k, v) for one, mine in zip(each, q, strict=True)]

        found, back = jax.vjp(outputs, q, k, v)
        return found, back(weights)

    return run


def error(found: Any, exact: Any) -> float:
    """The largest of ‖found - exact‖ / ‖exact‖ over all arrays; NaN where any is not finite."""
    worst = 0.0
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        mine, theirs = mine.astype(jnp.float32), theirs.astype(jnp.float32)
        # An array of which nothing can be seen, as the gradient of a query with one key, is compared as it is.
        scale = jnp.maximum(jnp.linalg.norm(theirs), 1e-2 * theirs.size**0.5)
        worst = max(worst, float(jnp.linalg.norm(mine - theirs) / scale)) if bool(jnp.isfinite(mine).all()) else jnp.nan
    return worst


def exact(partition: partitions.Strided, window: int, arrays: Any) -> Any:
    """What dense attention gives in float32."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(program("parts", partition, window))(*jax.tree.map(lambda x: x.astype(jnp.float32), arrays))


class Timed:
    """A compiled program with its inputs."""

    def __init__(self, kind: str, partition: partitions.Strided, window: int, arrays: Any):
        """Compiles."""
        self._arrays = arrays
        self._program = jax.jit(program(kind, partition, window)).lower(*arrays).compile()
        self.temp_bytes = int(self._program.memory_analysis().temp_size_in_bytes)
        self.found = self._program(*arrays)

    def run(self, calls: int) -> float:
        """Seconds of one call, of several dispatched together."""
        jax.block_until_ready(self.found)
        begin = time.perf_counter()
        for _ in range(calls):
            self.found = self._program(*self._arrays)
        jax.block_until_ready(self.found)
        return (time.perf_counter() - begin) / calls


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
    parser.add_argument("--kinds", type=several(str), default=kinds())
    parser.add_argument("--repeats", type=positive, default=15)
    parser.add_argument("--calls", type=positive, default=1 if on_cpu else 10, help="timed together")
    parser.add_argument("--sweep", action="store_true", help="errors at short and odd lengths and windows")
    return parser.parse_args(arguments)


def main() -> None:
    """Measures, prints the table, and writes the rows."""
    host_memory.keep_freed()
    options = parse()
    for subsets in options.subsets:
        heads, width = options.heads, options.heads * options.width
        model = ModelConfig(1, width, heads, heads, sequence_length=options.length, vocab_size=1)
        check(model, ScheduleConfig(subsets=subsets) if subsets > 1 else None)
    unknown = set(options.kinds) - set(kinds())
    if unknown:
        raise SystemExit(f"error: --kinds names {', '.join(sorted(unknown))}; here there are: {', '.join(kinds())}")
    device = jax.devices()[0]
    about = {"device": device.device_kind, "jax": jax.__version__, "length": options.length, "dtype": options.dtype}
    print(f"{device.device_kind}, jax {jax.__version__}, {options.dtype}, batch {options.rows}, T {options.length}")
    print(ROW.format("", "time", "ratio", "memory", "TFLOP/s", "error"))
    rows: list[dict[str, Any]] = []
    for row in sweep(options) if options.sweep else measure(options):
        rows.append(row)
        print_row(row, options)
        if options.json:
            options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


def measure(options: argparse.Namespace) -> Any:
    """Yields a row for each kind, S and window, timed in turns with the first kind."""
    for subsets in options.subsets:
        partition = partitions.strided(options.length, subsets)
        arrays = inputs(subsets, options.length // subsets, options)
        for window in (options.length, options.length // 2):
            reference = exact(partition, window, arrays)
            made = {kind: Timed(kind, partition, window, arrays) for kind in options.kinds}
            errors = {kind: error(timed.found, reference) for kind, timed in made.items()}
            seconds: dict[str, list[float]] = {kind: [] for kind in made}
            for _ in range(options.repeats):
                for kind, timed in made.items():
                    seconds[kind].append(timed.run(options.calls))
            first = options.kinds[0]
            for kind, timed in made.items():
                ratios = [mine / other for mine, other in zip(seconds[kind], seconds[first], strict=True)]
                yield {
                    "kind": kind,
                    "subsets": subsets,
                    "window": window,
                    "seconds": statistics.median(seconds[kind]),
                    "time_ratio": statistics.median(ratios),
                    "temp_memory_ratio": timed.temp_bytes / made[first].temp_bytes,
                    "error": errors[kind],
                }


def sweep(options: argparse.Namespace) -> Any:
    """Yields the error of the last kind, the machine's kernel, at short and odd lengths, for every S and window."""
    for subsets in options.subsets:
        for length in LENGTHS:
            partition = partitions.strided(subsets * length, subsets)
            arrays = inputs(subsets, length, options)
            for window in sorted({int(share * subsets * length) for share in WINDOWS}):
                found = jax.jit(program(options.kinds[-1], partition, window))(*arrays)
                wrong = error(found, exact(partition, window, arrays))
                yield {
                    "kind": options.kinds[-1],
                    "subsets": subsets,
                    "length": length,
                    "window": window,
                    "error": wrong,
                }


def print_row(row: dict[str, Any], options: argparse.Namespace) -> None:
    """One line of the table."""
    if "seconds" not in row:
        name = f"S={row['subsets']} P={row['length']} window {row['window']} {row['kind']}"
        print(ROW.format(name, "", "", "", "", f"{row['error']:.1e}"), flush=True)
        return
    visible = sum(min(position, row["window"]) + 1 for position in range(options.length))
    # Two products forward, five backward, of which one computes scores again.
    flops = 7 * 2 * options.rows * options.heads * options.width * visible
    cells = (f"{row['seconds'] * 1e3:.2f} ms", f"{row['time_ratio']:.2f} ×", f"{row['temp_memory_ratio']:.2f} ×")
    rate = f"{flops / row['seconds'] / 1e12:.1f}"
    name = f"S={row['subsets']} window {row['window']} {row['kind']}"
    print(ROW.format(name, *cells, rate, f"{row['error']:.1e}"), flush=True)


if __name__ == "__main__":
    main()
