"""The default run beside its plain baseline, at equal effective compute: ``make compare``.

    python -m lrt_jax.sweep configs/sweeps/default.py

The baseline has the same layers, width, tokenizer and data, no memory, and as many more training tokens as its cheaper
steps allow. What it came to is kept in ``configs/base.py``, whose closing table shows it.
"""

from pathlib import Path

from lrt_jax.comparison.plan import Run, Sweep
from lrt_jax.model import costs
from lrt_jax.setup.config import from_config_dict
from lrt_jax.setup.config_file import module

PLAIN = {
    "model.memory": "none",
    "model.residual_injection": False,
    "model.memory_layers": "all",
    "schedule.name": "plain",
    "schedule.stages": "",
}


def get_sweep() -> Sweep:
    """The plain model, then the default one."""
    base = module(str(Path(__file__).parents[1] / "base.py")).get_config()
    config = from_config_dict(base)
    tokens = config.train.steps * config.train.batch_size * config.model.sequence_length
    budget = tokens * costs.forwards_equivalent(config.model, config.schedule)
    plain = base.copy_and_resolve_references()
    plain.update_from_flattened_dict(PLAIN)
    return Sweep((Run("plain", plain, budget), Run("LRT", base, budget)), baseline="plain")
