"""What a sweep runs: configs, each for a budget of effective tokens, and where each run lives."""

import collections
import dataclasses
import re

from ml_collections import ConfigDict

from lrt_jax.model import costs
from lrt_jax.setup.config import Config, ConfigError, from_config_dict
from lrt_jax.setup.config_file import returned


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
    """Runs in the order in which they are to run, and the variant that others are compared with."""

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
    if sweep.baseline not in {run.variant for run in sweep.runs}:
        raise ConfigError(f"the sweep is {path!r}, whose baseline {sweep.baseline!r} is none of its variants")
    name, count = collections.Counter(run.name for run in sweep.runs).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"the sweep is {path!r}, in which two runs are {name}; they must differ")
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
