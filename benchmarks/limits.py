"""What a step must cost at least: FLOPs and bytes on paper, by depth, number of subsets and kind of memory.

    python -m benchmarks.limits [--length=2048] [--vocab=32768] [--rows=8]

FLOPs are of one token, forward and backward (three times the forward pass). Bytes are those that a step of bfloat16
activations with float32 parameters has to move if every product reads its operands and writes its result once, and
nothing else touches memory: weights once a forward and twice a backward pass, activations once each way.
"""

import argparse

from benchmarks.arguments import positive
from lrt_jax.model import costs
from lrt_jax.model.parameters import table
from lrt_jax.setup.config import ModelConfig, ScheduleConfig

STEP = 3  # forward and backward pass, in forward passes
ACTIVATION, WEIGHT, GRADIENT = 2, 2, 4  # bytes of a number


def model_of(depth: int, memory: str, options: argparse.Namespace) -> ModelConfig:
    """nanochat's model of a depth."""
    heads = -(-depth // 2)
    return ModelConfig(
        layers=depth,
        width=128 * heads,
        heads=heads,
        kv_heads=heads,
        sequence_length=options.length,
        vocab_size=options.vocab,
        memory=memory,  # type: ignore[arg-type]
        residual_injection=memory != "none",
    )


def head_flops(model: ModelConfig) -> int:
    """FLOPs of the head, a token and forward pass."""
    return 2 * model.width * model.vocab_size


def weight_bytes(model: ModelConfig, forwards: int) -> float:
    """Bytes of matrices read by so many forwards with their backward passes, and of their gradients added up."""
    matrices = sum(spec.size for spec in table(model).values() if spec.group in ("matrix", "head"))
    return matrices * forwards * (STEP * WEIGHT + GRADIENT)


def activation_bytes(model: ModelConfig) -> float:
    """Bytes of inputs and outputs of a layer stack's products and of the head, a token, forward and backward."""
    D, F, H, K, C = model.width, model.mlp_width, model.heads, model.kv_heads, model.head_width
    layer = (D + (H + 2 * K) * C) + (H * C + D) + (D + F) + (F + D)
    return STEP * ACTIVATION * (model.layers * layer + D + model.vocab_size)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--length", type=positive, default=2048)
    parser.add_argument("--vocab", type=positive, default=32768)
    parser.add_argument("--rows", type=positive, default=8, help="rows of a device, over which weights are read once")
    options = parser.parse_args()
    print("| depth | MFLOP a token: layer | head | plain step | KB a token: layers | head | weights of a forward |")
    print("|---|---|---|---|---|---|---|")
    for depth in (12, 20, 24):
        plain = model_of(depth, "none", options)
        total = costs.train_flops(plain, ScheduleConfig(name="plain")) / plain.sequence_length
        head = STEP * head_flops(plain)
        head_bytes = STEP * ACTIVATION * (plain.width + plain.vocab_size)
        weights = weight_bytes(plain, 1) / (options.rows * options.length)
        cells = (
            f"{(total - head) / plain.layers / 1e6:.1f}",
            f"{head / 1e6:.1f}",
            f"{total / 1e6:,.0f}",
            f"{(activation_bytes(plain) - head_bytes) / 1e3:,.0f}",
            f"{head_bytes / 1e3:,.0f}",
            f"{weights / 1e3:,.0f}",
        )
        print("| " + " | ".join((str(depth), *cells)) + " |")
    print("\n| depth, memory | FLOPs, any S | bytes S = 2 | S = 4 | S = 8 | GB a row: buffer | streams of a pass |")
    print("|---|---|---|---|---|---|---|")
    for depth in (12, 20, 24):
        plain = model_of(depth, "none", options)
        tokens = options.rows * options.length
        baseline = activation_bytes(plain) * tokens + weight_bytes(plain, 1)
        for memory in ("shared", "layerwise"):
            model = model_of(depth, memory, options)
            flops = costs.train_flops(model, ScheduleConfig()) / costs.train_flops(plain, ScheduleConfig(name="plain"))
            moved = [
                (2 * activation_bytes(model) * tokens + weight_bytes(model, 1 + subsets)) / baseline
                for subsets in (2, 4, 8)
            ]
            buffer = ACTIVATION * 2 * model.layers * options.length * model.kv_heads * model.head_width
            streams = ACTIVATION * model.layers * options.length * model.width
            cells = (
                f"{flops:.3f}",
                *(f"{ratio:.2f}" for ratio in moved),
                f"{buffer / 1e9:.2f}",
                f"{streams / 1e9:.2f}",
            )
            print(f"| {depth}, {memory} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
