"""Does what wins in the laboratory win in a model four times as large? One seed, 10 tokens per parameter.

    python -m lrt_jax.sweep configs/sweeps/larger.py

The laboratory of matched_compute.py with width 128 and two heads: 0.95 M parameters. A run takes about half an hour on
one CPU core. docs/RESULTS.md has what it came to.
"""

from pathlib import Path

from lrt_jax.comparison.plan import Run, Sweep
from lrt_jax.setup.config_file import module

matched = module(str(Path(__file__).with_name("matched_compute.py")))
WIDER = {"model.width": 128, "model.heads": 2, "model.kv_heads": 2}
BUDGET = 9_200_000


def get_sweep() -> Sweep:
    """The plain baseline and the schedule that won."""
    runs = tuple(
        Run(variant, matched.laboratory(matched.VARIANTS[variant] | WIDER), BUDGET) for variant in ("plain", "settled")
    )
    return Sweep(runs, baseline="plain")
