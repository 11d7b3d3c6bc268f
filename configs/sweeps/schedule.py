"""When should memory begin, and in which schedule? At the smallest budget of matched_compute.py, one seed.

    python -m lrt_jax.sweep configs/sweeps/schedule.py

A run takes about 2 minutes on 2 CPU cores.
"""

from pathlib import Path
from typing import Any

from lrt_jax.comparison.plan import Run, Sweep
from lrt_jax.setup.config_file import module

matched = module(str(Path(__file__).with_name("matched_compute.py")))
SETTLED = "multi_refinement(1, settle=1)"


def staged(stages: str, **model: str) -> dict[str, Any]:
    """The changes of a staged run with the source layer and band of matched_compute.py, or others."""
    model = matched.MODEL | {f"model.{name}": value for name, value in model.items()}
    return model | {"schedule.name": "staged", "schedule.stages": stages}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": matched.PLAIN,
    "settled from 0.2 on": staged(f"plain:0.2, {SETTLED}:0.8"),
    "settled from 0.4 on": staged(f"plain:0.4, {SETTLED}:0.6"),
    "settled from 0.6 on": staged(f"plain:0.6, {SETTLED}:0.4"),
    "settled from 0.8 on": staged(f"plain:0.8, {SETTLED}:0.2"),
    "some of it deeper": staged(f"plain:0.4, mix({SETTLED} 0.9, multi_refinement(1, settle=3) 0.1):0.6"),
    "some of it plain": staged(f"plain:0.4, mix({SETTLED} 0.75, plain 0.25):0.6"),
    "with gradient": staged("plain:0.4, multi_refinement(1):0.6"),
    "with gradient, light": staged("plain:0.4, multi_refinement(1, init_weight=0.2):0.6"),
    "subsets": staged("plain:0.4, interleaved(2, settle=1):0.6"),
    "interleaved": staged("plain:0.4, interleaved(2):0.6"),
    "all layers": staged(f"plain:0.4, {SETTLED}:0.6", memory_layers="all"),
    "all layers, final source": staged(f"plain:0.4, {SETTLED}:0.6", memory_layers="all", source_layer="final"),
}


def get_sweep() -> Sweep:
    """Each once."""
    runs = (Run(name, matched.laboratory(changes), matched.BUDGETS[0]) for name, changes in VARIANTS.items())
    return Sweep(tuple(runs), baseline="plain")
