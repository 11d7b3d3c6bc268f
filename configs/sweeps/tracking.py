"""State tracking: which schedules learn a recurrence that goes on beyond the trained length?

    python -m lrt_jax.sweep configs/sweeps/tracking.py

Words of 32 letters in training (permutations: 8 swaps, or 4 letters), of 512 in the test; the tasks of
``configs/state_tracking.py``. All schedules see the same words, so they differ in cost, which the table shows. A run
takes one to ten minutes of a CPU core. docs/RESULTS.md has what they came to.
"""

from pathlib import Path
from typing import Any

from lrt_jax.comparison.plan import Run, Sweep
from lrt_jax.model import costs
from lrt_jax.setup.config import from_config_dict
from lrt_jax.setup.config_file import module

SEEDS = (0, 1, 2)
TASKS = ("parity", "mod5", "swap_s5", "s5")
STEPS = {"parity": 300, "mod5": 300}  # the config's 400 are for a single run; of the others, as there
STATE_TRACKING = module(str(Path(__file__).parents[1] / "state_tracking.py"))
PLAIN = {"model.memory": "none", "model.residual_injection": False, "schedule.name": "plain"}


def _staged(stages: str) -> dict[str, Any]:
    return {"schedule.name": "staged", "schedule.stages": stages}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    **{f"interleaved({s})": {"schedule.name": "interleaved", "schedule.subsets": s} for s in (2, 4, 8, 16)},
    "interleaved(8, sweeps=2)": {"schedule.name": "interleaved", "schedule.subsets": 8, "schedule.sweeps": 2},
    **{f"multi_refinement({k})": {"schedule.name": "multi_refinement", "schedule.refinements": k} for k in (1, 3, 7)},
    "sequential": {"schedule.name": "sequential"},
    # The default run's schedule; and 75 / 22 / 3 % with one, two and three passes (arXiv 2608.08888).
    "settled": _staged("plain:0.4, multi_refinement(1, settle=1):0.6"),
    "passes 1, 2, 3": _staged("plain:0.75, mix(multi_refinement(1) 0.88, multi_refinement(2) 0.12):0.25"),
}


def get_sweep() -> Sweep:
    """All tasks, variants and seeds, one task after the other."""
    runs = (_run(task, name, seed) for task in TASKS for seed in SEEDS for name in VARIANTS)
    return Sweep(tuple(run for run in runs if run is not None), baseline="parity plain")


def _run(task: str, name: str, seed: int) -> Run | None:
    """One run: as many steps for every schedule, and so as much compute as it takes.

    None where the words are too short for the variant: subsets of one letter, or more refinements than letters.
    """
    config = STATE_TRACKING.get_config(task)
    length = config.model.sequence_length
    if (
        VARIANTS[name].get("schedule.subsets", 0) > length // 2
        or VARIANTS[name].get("schedule.refinements", 0) >= length
    ):
        return None
    config.train.steps = STEPS.get(task, config.train.steps)
    config.update_from_flattened_dict(VARIANTS[name])
    whole = from_config_dict(config)
    tokens = whole.train.steps * whole.train.batch_size * whole.model.sequence_length
    return Run(f"{task} {name}", config, tokens * costs.forwards_equivalent(whole.model, whole.schedule), seed)
