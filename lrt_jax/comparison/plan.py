"""What a sweep runs: configs, each for a budget of effective tokens, and where each run lives."""

import dataclasses
import re

from ml_collections import ConfigDict

from lrt_jax.model import costs
from lrt_jax.setup.config import Config, ConfigError, from_config_dict
from lrt_jax.setup.config_file import returned
from lrt_jax.setup.schema import NotEmpty, NotNegative, Positive, checked


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      variant: what it is compared as: runs of one variant differ in budget and seed only.
      config: of the run; its duration and seed are set by the next two.
      effective_tokens: its budget: training tokens times the forwards that each costs (METHOD.md,
        "Training schedules").
      seed: of parameters, batches and draws.
    """

    variant: str
    config: ConfigDict
    effective_tokens: float
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks what its folder is named by.

        Raises:
          ConfigError: a field cannot be.
        """
        checked(NotEmpty[str], self.variant, "a run's variant")
        checked(Positive[float], self.effective_tokens, f"the budget of {self.variant!r}")
        checked(NotNegative[int], self.seed, f"the seed of {self.variant!r}")

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{re.sub(r'[^0-9A-Za-z.]+', '-', self.variant)}_{self.effective_tokens:.4g}_{self.seed}"

    @property
    def complete(self) -> Config:
        """The whole config: as many tokens as the budget allows its schedule.

        Raises:
          ConfigError: the config cannot be.
        """
        config = self.config.copy_and_resolve_references()
        whole = from_config_dict(config)
        forwards = costs.forwards_equivalent(whole.model, whole.schedule)
        config.seed = self.seed
        config.train.update(steps=0, tokens_per_parameter=0.0, tokens=max(1, round(self.effective_tokens / forwards)))
        return from_config_dict(config)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs in the order in which they are to run, and the variant that others are compared with.

    Of state tracking it is only the first in the tables.
    """

    runs: tuple[Run, ...]
    baseline: str

    @property
    def variants(self) -> list[str]:
        """Each once, the baseline first."""
        return list(dict.fromkeys([self.baseline, *(run.variant for run in self.runs)]))


def load(path: str) -> Sweep:
    """The sweep that a Python file's function ``get_sweep`` returns.

    Raises:
      ConfigError: there is no such file, it fails, returns something else, or two runs have one name.
    """
    rule = "it must be a Python file whose function get_sweep returns a lrt_jax.comparison.plan.Sweep"
    sweep = returned(f"the sweep is {path!r}", path, "get_sweep", rule, folder="configs/sweeps")
    if not isinstance(sweep, Sweep) or not sweep.runs:
        raise ConfigError(f"the sweep is {path!r}, whose get_sweep returns no runs; {rule}")
    for run in sweep.runs:
        if not isinstance(run, Run) or not isinstance(run.config, ConfigDict) or "data" not in run.config:
            raise ConfigError(f"the sweep is {path!r}, which has {run!r:.80}; it must be a Run with a whole config")
    if sweep.baseline not in {run.variant for run in sweep.runs}:
        raise ConfigError(f"the sweep is {path!r}, whose baseline {sweep.baseline!r} is none of its variants")
    variants: dict[str, str] = {}
    for run in sweep.runs:
        if run.name in variants:
            both = " and ".join(map(repr, dict.fromkeys([variants[run.name], run.variant])))
            raise ConfigError(f"the sweep is {path!r}, in which two runs, of {both}, have the folder {run.name}")
        variants[run.name] = run.variant
    if len({bool(run.config.data.task) for run in sweep.runs}) > 1:
        raise ConfigError(
            f"the sweep is {path!r}, in which some runs have a config.data.task and others text; make two"
        )
    return sweep


def share(runs: tuple[Run, ...], shard: str) -> tuple[Run, ...]:
    """The runs of one of n machines, by ``i/n`` with i from 0: every n-th.

    Raises:
      ConfigError: the shard cannot be read.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(f"--shard is {shard!r}; it must be i/n with i from 0 to n - 1, as in 0/2")
    return runs[int(match[1]) :: int(match[2])]
