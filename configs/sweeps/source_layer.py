"""Which layer's state should be the memory, and which layers should read it? At equal effective tokens.

    python -m lrt_jax.sweep configs/sweeps/source_layer.py

The laboratory and the schedule of matched_compute.py at its smallest budget; a run takes about 2 minutes on 2 CPU
cores.
"""

from pathlib import Path

from lrt_jax.comparison.plan import Run, Sweep
from lrt_jax.setup.config_file import module

matched = module(str(Path(__file__).with_name("matched_compute.py")))
SCHEDULE = {"schedule.name": "staged", "schedule.stages": matched.SETTLED}
# Source layer and band: every source with all layers, and bands below, around and above the best of these.
CHOICES = (
    *((source, "all") for source in ("1", "2", "3", "final")),
    *(("3", band) for band in ("2-4", "3-4", "2-3", "1-3")),
    *(("2", band) for band in ("2-4", "1-2")),
)


def get_sweep() -> Sweep:
    """Each choice, one seed."""
    runs = tuple(
        Run(
            f"source {source}, read by {band}",
            matched.laboratory(SCHEDULE | {"model.source_layer": source, "model.memory_layers": band}),
            matched.BUDGETS[0],
        )
        for source, band in CHOICES
    )
    return Sweep(runs, baseline=runs[0].variant)
