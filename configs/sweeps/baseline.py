"""Which rates suit the plain baseline? One of them changed at a time, at the smallest budget of matched_compute.py.

    python -m lrt_jax.sweep configs/sweeps/baseline.py

What serves the baseline best all variants were given then: the laboratory has these rates by now. A run takes about 2
minutes on 2 CPU cores.
"""

from pathlib import Path

from lrt_jax.comparison.plan import Run, Sweep
from lrt_jax.setup.config_file import module

matched = module(str(Path(__file__).with_name("matched_compute.py")))
# The rates that the search began with, which are those of configs/base.py but for embedding_lr.
BEGAN = {"optimizer.embedding_lr": 0.5, "optimizer.warmdown": 0.5}
CHANGES = {
    "as they were": {},
    "muon_lr 0.01": {"optimizer.muon_lr": 0.01},
    "muon_lr 0.04": {"optimizer.muon_lr": 0.04},
    "embedding_lr 0.25": {"optimizer.embedding_lr": 0.25},
    "embedding_lr 1": {"optimizer.embedding_lr": 1.0},
    "head_lr 0.02": {"optimizer.head_lr": 0.02},
    "warmdown 0.3": {"optimizer.warmdown": 0.3},
    "warmdown 0.8": {"optimizer.warmdown": 0.8},
}


def get_sweep() -> Sweep:
    """Each change alone, one seed."""
    return Sweep(
        tuple(
            Run(name, matched.laboratory(matched.PLAIN | BEGAN | change), matched.BUDGETS[0])
            for name, change in CHANGES.items()
        ),
        baseline="as they were",
    )
