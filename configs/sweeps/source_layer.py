"""Which layer's state should be the memory? Every source layer, at equal effective tokens.

    python -m lrt_jax.sweep configs/sweeps/source_layer.py

The laboratory of matched_compute.py with a staged schedule; a run takes about 10 minutes on 2 CPU cores.
"""

from pathlib import Path

from lrt_jax.comparison.plan import Run, Sweep
from lrt_jax.setup.config_file import module

laboratory = module(str(Path(__file__).with_name("matched_compute.py"))).laboratory
SCHEDULE = {"schedule.name": "staged", "schedule.stages": "plain:0.4, interleaved(2):0.6"}


def get_sweep() -> Sweep:
    """Source layers 1 to 3 and the final one, two budgets and three seeds each."""
    return Sweep(
        tuple(
            Run(
                f"source layer {layer}",
                laboratory(SCHEDULE | {"model.source_layer": layer}),
                budget,
                seed,
            )
            for budget in (4_096_000, 8_192_000)
            for seed in (0, 1, 2)
            for layer in ("final", "1", "2", "3")
        ),
        baseline="source layer final",
    )
