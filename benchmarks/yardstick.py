"""What users would pick instead: the same plain and interleaved steps in eager PyTorch, tokens per second.

    PYTHON_WITH_TORCH -m benchmarks.yardstick [--json=FILE] [--layers= --width= --heads= --length= --vocab= --batch=]
    python -m benchmarks.yardstick --against PYTHON_WITH_TORCH       # both, in turns, and the ratio

Written for comparison: the baseline with value embeddings on every layer, scaled-dot-product attention, AdamW; the
interleaved step recomputes each subset through a boolean mask, with layerwise memory. It comes in two forms:

* ``interleaved``: as lean as eager code gets. The initialization forward has no memory projections, since they would
  project zeros; keys and values are written by ``index_copy``; RoPE tables are float32.
* ``released``: the operations of the authors' release (read at its commit a133a67): the
  initialization forward projects a memory of zeros in every layer, the shared buffer is cloned and written by index
  assignment, subsets are picked by boolean masks, and RoPE tables are bfloat16.

Both have the same losses, to the precision of the tables. It imports torch only when it runs torch, so that it works
from any environment that has it.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.arguments import output, positive, python_with_torch

# What a row of eager PyTorch is compared with: our schedule, as ``benchmarks.step`` names it.
COUNTERPART = {"plain": "plain", "interleaved": "interleaved", "released": "interleaved"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=output, help="write tokens per second here")
    parser.add_argument("--against", type=python_with_torch, help="a Python that has torch: compare lrt_jax with it")
    parser.add_argument("--rounds", type=positive, default=3, help="with --against: turns")
    sizes = {"layers": 6, "width": 384, "heads": 6, "length": 512, "vocab": 4096, "batch": 4, "subsets": 2}
    for name, default in (sizes | {"repeats": 5}).items():
        parser.add_argument(f"--{name}", type=positive, default=default)
    options = parser.parse_args(arguments)
    if not options.against and importlib.util.find_spec("torch") is None:
        parser.error("this Python has no torch: run it with one that has, or name one by --against")
    return options


def torch_tokens_per_second(options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of a plain and an interleaved step, lean and as released, in eager PyTorch."""
    import torch  # type: ignore[import-not-found, unused-ignore]
    from torch.nn import functional  # type: ignore[import-not-found, unused-ignore]

    torch.manual_seed(0)
    layers, width, heads, length = options.layers, options.width, options.heads, options.length
    head = width // heads
    windows = [length // 2 if layer % 4 != 3 and layer < layers - 1 else length for layer in range(layers)]
    positions = torch.arange(length)
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, head, 2) / head)
    cosine, sine = torch.cos(angles)[:, None], torch.sin(angles)[:, None]

    def parameter(*shape: int, std: float = width**-0.5) -> Any:
        return torch.nn.Parameter(torch.randn(*shape) * std)

    shared = {"embedding": parameter(options.vocab, width, std=1.0), "head": parameter(options.vocab, width, std=0.001)}
    stacks = [
        {
            **{name: parameter(width, width) for name in ("query", "key", "value", "output", "uk", "uv")},
            "up": parameter(4 * width, width),
            "down": parameter(width, 4 * width),
            "gate": parameter(3 * heads, width, std=0.0),
            "embedding": parameter(options.vocab, width),
            "alpha": torch.nn.Parameter(torch.tensor(1.0)),
            "beta": torch.nn.Parameter(torch.tensor(0.1)),
            "gamma": torch.nn.Parameter(torch.tensor(0.1)),
        }
        for _ in range(layers)
    ]
    everything = [*shared.values(), *(array for stack in stacks for array in stack.values())]
    optimizer = torch.optim.AdamW(everything, lr=1e-4)

    def norm(x: Any) -> Any:
        return functional.rms_norm(x, (x.shape[-1],))

    def rotate(x: Any, c: Any, s: Any) -> Any:
        a, b = x.chunk(2, -1)
        return torch.cat([a * c + b * s, b * c - a * s], -1)

    def written_at(old: Any, where: Any, new: Any, released: bool) -> Any:
        if not released:
            return old.index_copy(1, where, new)
        copy = old.clone()
        copy[:, where] = new
        return copy

    def forward(tokens: Any, where: Any, memory: Any, buffer: Any, released: bool = False) -> tuple[Any, list[Any]]:
        kind = torch.bfloat16 if released else torch.float32
        turn = (cosine[where].to(kind), sine[where].to(kind))
        x = first = norm(functional.embedding(tokens, shared["embedding"]))
        rows, count = tokens.shape
        written = []
        for layer, stack in enumerate(stacks):
            x = stack["alpha"] * x + stack["beta"] * first
            if memory is not None:
                x = x + stack["gamma"] * memory
            h = norm(x)
            q, k, v = (
                functional.linear(h, stack[name]).view(rows, count, heads, head) for name in ("query", "key", "value")
            )
            local, recurrent, embedded = (
                (2 * torch.sigmoid(functional.linear(h, stack["gate"]))).view(rows, count, 3, heads, 1).unbind(2)
            )
            extra = functional.embedding(tokens, stack["embedding"]).view(rows, count, heads, head)
            k, v = local * k, local * v + embedded * extra
            if memory is not None:
                k = k + recurrent * functional.linear(memory, stack["uk"]).view(rows, count, heads, head)
                v = v + recurrent * functional.linear(memory, stack["uv"]).view(rows, count, heads, head)
            q, k = norm(rotate(q, *turn)), norm(rotate(k, *turn))
            keys = where
            if buffer is not None:
                k, v = (written_at(old, where, new, released) for old, new in zip(buffer[layer], (k, v), strict=True))
                keys = positions
            written.append((k, v))
            distance = where[:, None] - keys[None, :]
            causal = buffer is None and windows[layer] == length
            mask = None if causal else (distance >= 0) & (distance <= windows[layer])
            q, k, v = (array.transpose(1, 2) for array in (q, k, v))
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
            x = x + functional.linear(mixed.transpose(1, 2).reshape(rows, count, width), stack["output"])
            x = x + functional.linear(functional.relu(functional.linear(norm(x), stack["up"])).square(), stack["down"])
        return norm(x), written

    def loss_of(hidden: Any, targets: Any) -> Any:
        logits = 15 * torch.tanh(functional.linear(hidden, shared["head"]) / 15)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def plain(tokens: Any, targets: Any) -> Any:
        return loss_of(forward(tokens, positions, None, None)[0], targets)

    def released(tokens: Any, targets: Any) -> Any:
        zeros = torch.zeros(*tokens.shape, width)
        source, buffer = forward(tokens, positions, zeros, None, released=True)
        losses = [loss_of(source, targets)]
        for subset in range(options.subsets):
            visited = positions % options.subsets == subset
            memory = torch.cat([torch.zeros_like(source[:, :1]), source[:, :-1]], 1)[:, visited]
            fresh, buffer = forward(tokens[:, visited], positions[visited], memory, buffer, released=True)
            losses.append(loss_of(fresh, targets[:, visited]))
            source = written_at(source, visited, fresh, released=True)
        return sum(losses) / len(losses)

    def interleaved(tokens: Any, targets: Any) -> Any:
        source, buffer = forward(tokens, positions, None, None)
        losses = [loss_of(source, targets)]
        for subset in range(options.subsets):
            where = positions[subset :: options.subsets]
            memory = functional.pad(source, (0, 0, 1, 0))[:, where]
            fresh, buffer = forward(tokens[:, where], where, memory, buffer)
            source = source.index_copy(1, where, fresh)
            losses.append(loss_of(fresh, targets[:, where]))
        return sum(losses) / len(losses)

    tokens = torch.randint(options.vocab, (options.batch, length + 1))
    found = {}
    for name, schedule in (("plain", plain), ("interleaved", interleaved), ("released", released)):
        seconds = []
        for _ in range(options.repeats + 1):
            begin = time.perf_counter()
            optimizer.zero_grad()
            schedule(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
            seconds.append(time.perf_counter() - begin)
        found[name] = options.batch * length / statistics.median(seconds[1:])
    return found


def ours_tokens_per_second(options: argparse.Namespace) -> dict[str, float]:
    """The same of lrt_jax, in a process of its own, by ``benchmarks.step``."""
    sizes = [f"--{name}={getattr(options, name)}" for name in ("layers", "width", "heads", "length", "vocab", "batch")]
    only = ["--memories=layerwise", f"--subsets={options.subsets}", "--refinements=", f"--repeats={options.repeats}"]
    with tempfile.NamedTemporaryFile(suffix=".json") as found:
        arguments = [sys.executable, "-m", "benchmarks.step", *sizes, *only, f"--json={found.name}"]
        subprocess.run(arguments, check=True, capture_output=True)
        rows = json.loads(Path(found.name).read_text())["rows"]
    return {row["schedule"]: row["tokens_per_second"] for row in rows}


def main() -> None:
    """Measures, and prints."""
    options = parse()
    if not options.against:
        found = torch_tokens_per_second(options)
        print(json.dumps(found))
        if options.json:
            options.json.write_text(json.dumps(found))
        return
    arguments = [options.against, "-m", "benchmarks.yardstick"]
    arguments += [
        f"--{name}={getattr(options, name)}"
        for name in ("layers", "width", "heads", "length", "vocab", "batch", "subsets", "repeats")
    ]
    path, options.json = options.json, None
    turns = []
    for _ in range(options.rounds):
        theirs = json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)
        turns.append((ours_tokens_per_second(options), theirs))
        for name, theirs_rate in theirs.items():
            ours_rate = turns[-1][0][COUNTERPART[name]]
            line = f"{name:<12} ours {ours_rate:8,.0f}  torch {theirs_rate:8,.0f} tokens/s"
            print(f"{line}  ratio {ours_rate / theirs_rate:.2f}", flush=True)
    for name, counterpart in COUNTERPART.items():
        ratio = statistics.median(ours[counterpart] / theirs[name] for ours, theirs in turns)
        print(f"{name}: {ratio:.2f} × eager PyTorch's tokens per second (median of {options.rounds})")
    if path:
        path.write_text(json.dumps([{"ours": ours, "torch": theirs} for ours, theirs in turns], indent=2) + "\n")


if __name__ == "__main__":
    main()
