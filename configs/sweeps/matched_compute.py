"""Is an LRT worth its compute? Our schedule and the paper's against the plain baseline, at equal effective tokens.

    python -m lrt_jax.sweep configs/sweeps/matched_compute.py

A small model where tokens are plentiful: 0.27 M parameters, 10 to 30 tokens per parameter of the plain one, on the
standard library's source. A run of the largest budget takes about 10 minutes on 2 CPU cores. docs/RESULTS.md has what
it came to, and how the rates, which are the same for all, were searched for the baseline.
"""

from typing import Any

from ml_collections import ConfigDict

from lrt_jax.comparison.plan import Run, Sweep
from lrt_jax.setup.config import default_config

BUDGETS = (2_730_000, 4_730_000, 8_190_000)
# The baseline's curve must reach what the others come to.
BASELINE_BUDGETS = (*BUDGETS, 16_380_000)
SEEDS = (0, 1, 2)
PLAIN = {"model.memory": "none", "model.residual_injection": False, "schedule.name": "plain"}
# An upper-middle source layer, and memory in all layers but the lowest (configs/sweeps/source_layer.py).
MODEL = {"model.source_layer": "3", "model.memory_layers": "2-4"}
SETTLED = "plain:0.4, multi_refinement(1, settle=1):0.6"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "settled": MODEL | {"schedule.name": "staged", "schedule.stages": SETTLED},
    "interleaved": MODEL,
}


def get_sweep() -> Sweep:
    """All variants, budgets and seeds, one seed after the other."""
    return Sweep(
        tuple(
            Run(variant, laboratory(changes), budget, seed)
            for seed in SEEDS
            for budget in BASELINE_BUDGETS
            for variant, changes in VARIANTS.items()
            if budget in BUDGETS or variant == "plain"
        ),
        baseline="plain",
    )


def laboratory(changes: dict[str, Any]) -> ConfigDict:
    """The small model, with these fields changed."""
    config = default_config(
        model__layers=4,
        model__width=64,
        model__heads=1,
        model__kv_heads=1,
        model__sequence_length=256,
        model__vocab_size=512,
        train__batch_size=16,
    )
    config.model.value_embeddings = "none"
    config.train.update(steps=1, eval_every=0, save_every=500, keep=1)
    config.eval.update(batch_size=64, rows=64, final_rows=512, sample_tokens=0)
    config.optimizer.update(embedding_lr=0.3, head_lr=0.01, scalar_lr=0.02, b1=0.9, b2=0.99, warmup=0.02, warmdown=0.3)
    config.update_from_flattened_dict(changes)
    return config
