"""Decoding: the step of each memory variant against the plain model's, and the loop against a hand-written one.

    python -m benchmarks.decode [--json=FILE] [--layers= --width= --heads=] [--batch=N] …

What is timed is the loop that users run (``inference.generate``), greedy, after a prompt. Rows are timed in turns,
so that a slow minute of a shared machine falls on all alike; ratios are medians of ratios within a turn.
``minimal`` is the shared model decoded by a loop written by hand for this one case: all rows at one position, greedy,
no stop tokens, no log-probabilities, weights by layer. ``streamed`` returns to Python after every token.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from benchmarks.arguments import natural, output, positive, several, two_or_more
from benchmarks.checks import check
from lrt_jax.inference.generate import Generation, Method
from lrt_jax.inference.sampling import GREEDY
from lrt_jax.model.backend import compute_dtype
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.setup import host_memory
from lrt_jax.setup.config import ModelConfig
from lrt_jax.training.state import init_params

TABLE = "{:<20}{:>9}{:>9}{:>12}{:>13}{:>16}"


@dataclasses.dataclass
class Row:
    """One way to decode.

    Attributes:
      model: plain, shared or layerwise; or shared in another loop.
      step_ratio: median time of a step, as a share of the plain row's.
      tokens_per_second: of all rows of the batch together, prompts not counted.
      compilations: during the timed generations.
      of_minimal: tokens per second as a share of the minimal loop's; None where that was not run.
      step_seconds: median.
    """

    model: str
    step_ratio: float = 1.0
    tokens_per_second: float = 0.0
    compilations: int = 0
    of_minimal: float | None = None
    step_seconds: float = 0.0


def variants(model: ModelConfig) -> dict[str, ModelConfig]:
    """The models that are compared."""
    return {
        "plain": dataclasses.replace(model, memory="none", residual_injection=False),
        "shared": model,
        "layerwise": dataclasses.replace(model, memory="layerwise"),
    }


def generated(model: Model, options: argparse.Namespace, stride: int) -> Callable[[], float]:
    """A generation of ``options.tokens`` tokens, ``stride`` at a time: seconds of a step."""
    prompts = [np.arange(options.prompt, dtype=np.int32) % model.config.vocab_size] * options.batch

    def run() -> float:
        generation = Generation(model, prompts, options.tokens, Method(GREEDY))
        generation.advance(1)
        begin = time.perf_counter()
        for count in range(1 + stride, options.tokens + stride, stride):
            generation.advance(count)
        return (time.perf_counter() - begin) / (options.tokens - 1)

    return run


def minimal(config: ModelConfig, params: Any, options: argparse.Namespace) -> Callable[[], float]:
    """The same by hand, for a shared memory that the last layer writes: seconds of a step."""
    rows, heads, width = options.batch, config.heads, config.head_width
    sizes = [min(window, options.prompt + options.tokens) for window in config.windows]
    frequencies = config.rope_base ** -(np.arange(0, width, 2, dtype=np.float32) / width)
    dtype = compute_dtype(config)

    def norm(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        return (wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + jnp.finfo(jnp.float32).eps)).astype(dtype)

    def project(x_BxD: jax.Array, weight_DxKxC: jax.Array) -> jax.Array:
        return (x_BxD @ weight_DxKxC.reshape(config.width, -1)).reshape(rows, heads, width)

    def one(params: Any, carry: tuple[Any, ...]) -> tuple[tuple[Any, ...], jax.Array]:
        caches, memory_BxD, token_B, position = carry
        x0 = x = norm(params["embedding"][token_B])
        values_LxBxKxC = params["value_embedding"][:, token_B]
        memory_k, memory_v = (project(memory_BxD, params[f"memory_{name}"]) for name in ("key", "value"))
        cos, sin = jnp.cos(position * frequencies), jnp.sin(position * frequencies)

        def turned(x: jax.Array) -> jax.Array:
            a, b = x[..., : width // 2], x[..., width // 2 :]
            return norm(jnp.concatenate([a * cos + b * sin, b * cos - a * sin], -1))

        after = []
        for layer, (k_cache, v_cache) in enumerate(caches):
            of = {name: array[layer] for name, array in params.items() if isinstance(array, tuple)}
            x = of["alpha"] * x + of["beta"] * x0 + of["gamma"] * memory_BxD
            h = norm(x)
            joined = (h @ of["attention_in"].reshape(config.width, -1)).reshape(rows, heads, 3, width)
            q, k, v = (joined[:, :, i] for i in range(3))
            gates = 2 * jax.nn.sigmoid((h @ of["memory_gate"].reshape(config.width, -1)).reshape(rows, 3, heads, 1))
            local, recurrent, embedded = (gates[:, i] for i in range(3))
            k = turned(local * k + recurrent * memory_k)
            v = local * v + recurrent * memory_v + embedded * values_LxBxKxC[layer]
            slots = sizes[layer]
            # The newest takes the oldest's place first: a window short of one position, and no second product.
            k_cache = lax.dynamic_update_slice(k_cache, k[:, :, None], (0, 0, position % slots, 0))
            v_cache = lax.dynamic_update_slice(v_cache, v[:, :, None], (0, 0, position % slots, 0))
            after.append((k_cache, v_cache))
            scores = jnp.einsum("bkc,bknc->bkn", turned(q) * width**-0.5, k_cache)
            weights = jax.nn.softmax(jnp.where(jnp.arange(slots) <= position, scores, -jnp.inf), -1)
            x = x + jnp.einsum("bkn,bknc->bkc", weights, v_cache).reshape(rows, -1) @ of["output"].reshape(
                heads * width, -1
            )
            x = x + jnp.square(jax.nn.relu(norm(x) @ of["mlp_in"])) @ of["mlp_out"]
        memory_BxD = norm(x)
        logits = config.softcap * jnp.tanh(memory_BxD @ params["head"] / config.softcap)
        token_B = jnp.argmax(logits, -1).astype(jnp.int32)
        return (tuple(after), memory_BxD, token_B, position + 1), token_B

    def empty(slots: int) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((rows, heads, slots, width), dtype), jnp.zeros((rows, heads, slots, width), dtype)

    def steps(params: Any, carry: tuple[Any, ...]) -> Any:
        return lax.scan(lambda carry, _: one(params, carry), carry, length=options.tokens - 1)

    loop = jax.jit(steps, donate_argnums=1)

    def run() -> float:
        memory_BxD, token_B = jnp.zeros((rows, config.width), dtype), jnp.zeros((rows,), jnp.int32)
        carry = (tuple(empty(slots) for slots in sizes), memory_BxD, token_B, jnp.int32(options.prompt))
        jax.block_until_ready(carry)
        begin = time.perf_counter()
        jax.block_until_ready(loop(params, carry))
        return (time.perf_counter() - begin) / (options.tokens - 1)

    return run


def measure(model: ModelConfig, options: argparse.Namespace) -> list[Row]:
    """Times every row in turns."""
    runs: dict[str, Callable[[], float]] = {}
    for name, config in variants(model).items():
        if name not in ("plain", *options.models):
            continue
        decoder = Decoder(config)
        prepared = Model(decoder, nn.unbox(init_params(decoder, jax.random.key(0)))).for_decoding()
        runs[name] = generated(prepared, options, options.tokens)
        if name == "shared" and options.loops:
            runs["shared, streamed"] = generated(prepared, options, 1)
            runs["shared, minimal"] = minimal(config, prepared.params, options)
    for run in runs.values():
        run()
    compiled = 0

    def count(event: str, seconds: float, **about: Any) -> None:
        nonlocal compiled
        del seconds, about
        compiled += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    jax.jit(lambda x: x + options.repeats)(
        1.0
    )  # the listener hears what is compiled, or the rows would say 0 for nothing
    if not compiled:
        raise RuntimeError("this version of jax does not report compilations by the name that is counted here")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    compilations = dict.fromkeys(runs, 0)
    for _ in range(options.repeats):
        for name, run in runs.items():
            before = compiled
            seconds[name].append(run())
            compilations[name] += compiled - before

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))

    return [
        Row(
            model=name,
            step_ratio=ratio(name, "plain"),
            tokens_per_second=options.batch / statistics.median(seconds[name]),
            compilations=compilations[name],
            of_minimal=ratio("shared, minimal", name) if "shared, minimal" in runs else None,
            step_seconds=statistics.median(seconds[name]),
        )
        for name in runs
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=output, help="write the rows here")
    parser.add_argument("--depth", type=natural, default=0, help="nanochat's dial: sets layers, width and heads of 128")
    parser.add_argument("--models", type=several(str), default=["shared", "layerwise"], help="beside the plain one")
    parser.add_argument("--loops", action=argparse.BooleanOptionalAction, default=True, help="other loops, too")
    parser.add_argument("--layers", type=positive, default=6)
    parser.add_argument("--width", type=positive, default=384)
    parser.add_argument("--heads", type=positive, default=6)
    parser.add_argument("--length", type=positive, default=512)
    parser.add_argument("--vocab", type=positive, default=4096)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--prompt", type=positive, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=two_or_more, default=192, help="tokens generated; the first is not timed")
    parser.add_argument("--repeats", type=positive, default=9)
    options = parser.parse_args(arguments)
    if options.depth:
        options.layers, options.heads = options.depth, -(-options.depth // 2)
        options.width = 128 * options.heads
    return options


def main() -> None:
    """Measures, prints the table, and writes the rows."""
    host_memory.keep_freed()
    options = parse()
    model = ModelConfig(
        layers=options.layers,
        width=options.width,
        heads=options.heads,
        kv_heads=options.heads,
        sequence_length=options.length,
        vocab_size=options.vocab,
        dtype=options.dtype,
    )
    check(model)
    unknown = [name for name in options.models if name not in variants(model)]
    if unknown:
        raise SystemExit(f"error: --models names {', '.join(unknown)}; allowed are: {', '.join(variants(model))}")
    if options.prompt + options.tokens > options.length:
        found = f"{options.prompt} + {options.tokens}"
        raise SystemExit(f"error: --prompt and --tokens are {found}; together they may be --length = {options.length}")
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, {compute_dtype(model)}, batch {options.batch}")
    print(f"{model.layers} layers, width {model.width}, T {options.length}; {options.prompt} + {options.tokens} tokens")
    found = measure(model, options)
    print(TABLE.format("", "time", "step", "tokens/s", "of minimal", "compilations"))
    for row in found:
        step, rate = f"{row.step_seconds * 1e3:.2f} ms", f"{row.tokens_per_second:,.0f}"
        share = "" if row.of_minimal is None else f"{row.of_minimal:.2f}"
        print(TABLE.format(row.model, f"{row.step_ratio:.3f} ×", step, rate, share, row.compilations))
    if options.json:
        about = {"device": device.device_kind, "jax": jax.__version__, "batch": options.batch}
        lines = [dataclasses.asdict(row) for row in found]
        text = json.dumps({"about": about | {"model": dataclasses.asdict(model)}, "rows": lines}, indent=2)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
