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

VARIANTS = {"plain": "plain", "LRT": ""}


def get_sweep() -> Sweep:
    """The plain model, then the default one, each for the compute of the default one."""
    get_config = module(str(Path(__file__).parents[1] / "base.py")).get_config
    config = from_config_dict(get_config())
    tokens = config.train.steps * config.train.batch_size * config.model.sequence_length
    budget = tokens * costs.forwards_equivalent(config.model, config.schedule)
    return Sweep(tuple(Run(name, get_config(variant), budget) for name, variant in VARIANTS.items()), baseline="plain")
