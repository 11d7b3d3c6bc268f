"""nanochat's model and recipe on the depth dial: ``configs/nanochat.py:depth=20,memory=shared``.

    python -m lrt_jax.main --config=configs/nanochat.py:depth=20,memory=shared --config.data.corpus=FOLDER

Depth 20 has about 1.3 B parameters; the paper trains it on FineWeb-Edu, 10 tokens per parameter, to 0.752
validation bits per byte (plain: 0.767). FOLDER holds the Parquet files. memory: shared, layerwise, or none,
which is the plain baseline. Written for accelerators; it has not been trained here.
"""

import math

from ml_collections import ConfigDict

from lrt_jax.setup.config import ConfigError, default_config

HEAD_WIDTH = 128
MEMORIES = ("shared", "layerwise", "none")


def get_config(variant: str = "") -> ConfigDict:
    """The config of ``depth=N,memory=KIND``; the default is ``depth=20,memory=shared``."""
    depth, memory = _parse(variant)
    width = math.ceil(64 * depth / HEAD_WIDTH) * HEAD_WIDTH
    config = default_config(
        model__layers=depth,
        model__width=width,
        model__heads=width // HEAD_WIDTH,
        model__kv_heads=width // HEAD_WIDTH,
        model__sequence_length=2048,
        model__vocab_size=32768,
        train__batch_size=256,
    )
    config.model.update(memory=memory, residual_injection=memory != "none", scan_layers=True, remat=True)
    config.schedule.name = "plain" if memory == "none" else "interleaved"
    config.train.update(tokens_per_parameter=10.0, eval_every=1000, save_every=1000)
    # All rates × √(batch tokens / 2¹⁹), AdamW's × √(768 / D).
    batch = math.sqrt(config.train.batch_size * config.model.sequence_length / 2**19)
    adamw = batch * math.sqrt(768 / width)
    config.optimizer.muon_lr *= batch
    for name in ("embedding_lr", "head_lr", "alpha_lr", "scalar_lr"):
        config.optimizer[name] *= adamw
    config.optimizer.weight_decay = 0.2 * (12 / depth) ** 2
    return config


def _parse(variant: str) -> tuple[int, str]:
    chosen = {"depth": "20", "memory": "shared"}
    for part in filter(None, variant.split(",")):
        name, _, value = part.partition("=")
        if name not in chosen:
            raise ConfigError(f"configs/nanochat.py has no argument {name!r}; allowed are: depth=N, memory=KIND")
        chosen[name] = value
    if not chosen["depth"].isdecimal() or int(chosen["depth"]) < 1:
        raise ConfigError(f"configs/nanochat.py: depth is {chosen['depth']!r}; it must be a whole number above 0")
    if chosen["memory"] not in MEMORIES:
        raise ConfigError(f"configs/nanochat.py: memory is {chosen['memory']!r}; allowed are: {', '.join(MEMORIES)}")
    return int(chosen["depth"]), chosen["memory"]
