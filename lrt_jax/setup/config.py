"""The configuration as the rest of the package, and users' config files, import it.

A config file (``configs/*.py``) returns an ``ml_collections.ConfigDict``; command-line overrides edit that;
:func:`from_config_dict` turns it into a :class:`Config` or raises :class:`ConfigError`. Everything behind ``main.py``
sees the dataclasses only.
"""
# ruff: noqa: F401  all that is imported here is for others

from lrt_jax.setup.fields import (
    ALL,
    FINAL,
    NAMED,
    UNNAMED,
    Config,
    DataConfig,
    DecodeConfig,
    Dtype,
    EvalConfig,
    Gather,
    Memory,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    Prefill,
    TrainConfig,
    ValueEmbeddings,
    default_config,
    fingerprint,
)
from lrt_jax.setup.schedule import ScheduleConfig
from lrt_jax.setup.schema import ConfigError
from lrt_jax.setup.validation import from_config_dict, from_json, validate, validate_model
