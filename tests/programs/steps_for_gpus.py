"""Train steps lowered for NVIDIA GPUs on a machine that has none: what is in them, as one JSON object a line."""

import collections
import json
import re

import jax

from configs import nanochat
from lrt_jax.model import backend
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import from_config_dict
from lrt_jax.topology import programs


class Hopper:
    """What is asked of a device."""

    platform, compute_capability, device_kind = "gpu", "9.0", "NVIDIA H100 80GB HBM3"


def in_loops(text: str) -> str:
    """What loops run, layers among it: their bodies, and the functions called there."""
    functions = {part.split("@", 1)[1].split("(", 1)[0]: part for part in re.split(r"\n  func\.func ", text)[1:]}
    found = "\n".join(body for part in functions.values() for body in bodies(part))
    reached: set[str] = set()
    while new := set(re.findall(r"call @(\w+)", found)) & set(functions) - reached:
        reached |= new
        found += "\n".join(functions[name] for name in new)
    return found


def bodies(function: str) -> list[str]:
    """The lines of a function's outermost loops: each ends where as many braces are closed as it opened."""
    found, depth = [], None
    for line in function.splitlines():
        if depth is None and "stablehlo.while" in line:
            found.append("")
            depth = 0
        elif depth is not None:
            found[-1] += line + "\n"
            depth += line.count("{") - line.count("}")
            depth = None if depth == 0 and "}" in line else depth
    return found


EXCHANGES = re.compile(r"stablehlo\.(?:all_gather|reduce_scatter|all_reduce|all_to_all)")


def control() -> None:
    """Prints how many exchanges are seen in a loop that has one, behind a call, beside one outside."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    def exchanged(x):
        return jax.lax.psum(x, "x")

    def looped(x):
        return jax.lax.scan(lambda carry, _: (exchanged(carry), None), jax.lax.psum(x, "x"), length=3)[0]

    spec = jax.sharding.PartitionSpec("x")
    sharded = jax.jit(jax.shard_map(looped, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    text = sharded.trace(jax.ShapeDtypeStruct((4,), "float32")).lower(lowering_platforms=("cuda",)).as_text()
    found = {"exchanges": len(EXCHANGES.findall(text)), "exchanges_in_loops": EXCHANGES.findall(in_loops(text))}
    print(json.dumps({"name": "control"} | found), flush=True)


def report(variant: str, fsdp: int, **model: object) -> None:
    """Prints what the step of ``configs/nanochat.py`` with these changes holds."""
    settings = nanochat.get_config(variant)
    settings.model.update(model)
    settings.train.update(batch_size=8, steps=10, tokens_per_parameter=0.0)
    settings.mesh.update(data=1, fsdp=fsdp)
    config = from_config_dict(settings)
    mesh = meshes.make_mesh(config.mesh, jax.devices()[:fsdp])
    with backend.compiling_for(Hopper()):
        ((_, function, arguments),) = programs.train_steps_of(config, mesh)
        text = function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    length, vocabulary = config.model.sequence_length, config.model.vocab_size
    squares = "|".join(rf"{size}x{size}" for size in (length, length // 2))
    # What a device holds of rows: all of them, or its own where weights are gathered once.
    calls = collections.Counter(re.findall(r"custom_call @(__cudnn\$fmha\w+)", text))
    print(
        json.dumps(
            {
                "name": f"{variant}, fsdp {fsdp}",
                "forward": calls["__cudnn$fmhaSoftmax"],
                "backward": calls["__cudnn$fmhaSoftmaxBackward"],
                "bfloat16": len(re.findall(r"@__cudnn\$fmhaSoftmax\(.*xbf16>", text)),
                "squares": sorted(set(re.findall(rf"tensor<(?:\d+x)*(?:{squares})x(?:f32|bf16|i1)>", text))),
                "logits": sorted(
                    set(re.findall(rf"tensor<(?:\d+x)*(?:{length}|{length // 2})x{vocabulary}xf32>", text))
                ),
                "exchanges": len(EXCHANGES.findall(text)),
                "exchanges_in_loops": sorted(EXCHANGES.findall(in_loops(text))),
            }
        ),
        flush=True,
    )


control()
report("depth=12", 1)
report("depth=20", 1)
report("depth=12", 4)
report("depth=12,memory=none", 1)
