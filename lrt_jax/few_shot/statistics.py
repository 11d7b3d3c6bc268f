"""Accuracies with their intervals, and two runs compared item by item."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from lrt_jax.few_shot.record import Scored
from lrt_jax.few_shot.tasks import CORE, Task

# Of the bootstrap: how often items are drawn anew, and the share of draws that an interval holds.
DRAWS = 10_000
SHARE = 0.95


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one task, or, as a mean of centred accuracies, of several.

    Attributes:
      task: its label.
      items: how many were scored.
      shots: before each.
      chance: accuracy of a guess.
      accuracy: share of items that were right.
      interval: of the accuracy, by bootstrap over items.
      centred: accuracy with a guess at 0 and no mistake at 1.
      centred_interval: of that.
      refinements: of fixed point: mean of the items.
      fallbacks: chunks that did not converge, and were scored sequentially.
      cropped: items that lost first tokens to fit into the context.
      left_out: items of the file that could not be asked.
    """

    task: str
    items: int
    shots: int
    chance: float
    accuracy: float
    interval: tuple[float, float]
    centred: float
    centred_interval: tuple[float, float]
    refinements: float
    fallbacks: int
    cropped: int
    left_out: int

    def __str__(self) -> str:
        low, high = (f"{100 * edge:.1f}" for edge in self.interval)
        found = f"{self.task}: {100 * self.accuracy:.1f} % right of {self.items:,} items ({low} to {high})"
        return f"{found}; a guess has {100 * self.chance:.1f}"

    @property
    def is_a_guess(self) -> bool:
        """Whether so many right items or more are not unlikely for a guess (one-sided, 2.5 %)."""
        right = round(self.accuracy * self.items)
        return right == 0 or special.bdtrc(right - 1, self.items, self.chance) > (1 - SHARE) / 2


def score(task: Task, items: Sequence[Scored], left_out: int) -> Score:
    """The score of a task; ``items`` are one or more."""
    accuracy = float(np.mean([one.correct for one in items]))
    interval = _interval(_draws(task, items))
    return Score(
        task=task.label,
        items=len(items),
        shots=task.shots,
        chance=task.chance,
        accuracy=accuracy,
        interval=interval,
        centred=task.centred(accuracy),
        centred_interval=(task.centred(interval[0]), task.centred(interval[1])),
        refinements=float(np.mean([one.refinements for one in items])),
        fallbacks=sum(one.fallbacks for one in items),
        cropped=sum(one.cropped for one in items),
        left_out=left_out,
    )


def mean(items: Mapping[Task, Sequence[Scored]]) -> tuple[float, tuple[float, float]]:
    """The mean of the tasks' centred accuracies, and its interval. It is CORE only if it is of all tasks."""
    accuracies = {task: float(np.mean([one.correct for one in scored])) for task, scored in items.items()}
    drawn = np.mean([task.centred(_draws(task, scored)) for task, scored in items.items()], axis=0)
    return float(np.mean([task.centred(accuracy) for task, accuracy in accuracies.items()])), _interval(drawn)


def name_of_mean(tasks: Sequence[str], *, whole: bool) -> str:
    """What to call it: CORE, or the part of it that it is.

    Args:
      tasks: labels of those that were scored.
      whole: whether all items of each were asked, or as many as there are.
    """
    missing = [task.label for task in CORE if task.label not in tasks]
    if not missing and whole:
        return "CORE"
    which = f"{len(tasks)} of CORE's {len(CORE)} tasks" if missing else f"CORE's {len(CORE)} tasks"
    return f"mean over {'' if whole else 'a part of the items of '}{which}, which is not CORE"


def _draws(task: Task, items: Sequence[Scored]) -> np.ndarray:
    """Accuracies of items drawn anew, with replacement: right ones among them are binomially distributed."""
    seed = [ord(character) for character in task.label]  # tasks are drawn independently
    right = sum(one.correct for one in items)
    return np.random.default_rng(seed).binomial(len(items), right / len(items), DRAWS) / len(items)


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)


class Comparison(NamedTuple):
    """McNemar's test of two runs on the items of a task that both have scored.

    Attributes:
      items: how many there are.
      only_first: items that just the first run has right.
      only_second: likewise.
      p_value: how likely a difference like this or larger is if both are as good (exact, two-sided).
    """

    items: int
    only_first: int
    only_second: int
    p_value: float

    @property
    def difference(self) -> float:
        """Accuracy of the first run, less that of the second."""
        return (self.only_first - self.only_second) / self.items


def compare(pairs: Sequence[tuple[bool, bool]]) -> Comparison:
    """Compares two runs, given which of them were right on each item; there is one item or more."""
    first = sum(a and not b for a, b in pairs)
    second = sum(b and not a for a, b in pairs)
    # Tosses of a fair coin, if both are as good: how likely are so few heads, or so few tails?
    as_far = float(special.bdtr(min(first, second), first + second, 0.5))
    return Comparison(len(pairs), first, second, min(1.0, 2 * as_far))
