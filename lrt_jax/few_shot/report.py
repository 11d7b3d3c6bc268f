"""What a model scored on few-shot tasks, as a table and as JSON."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from lrt_jax.few_shot.record import Scored
from lrt_jax.few_shot.statistics import Score
from lrt_jax.few_shot.tasks import Task


@dataclasses.dataclass(frozen=True)
class Report:
    """The scores of one model.

    Attributes:
      scores: of each task that was scored.
      items: likewise, item by item.
      files: likewise, the SHA-256 of its file.
      missing: labels of tasks asked for that could not be scored.
      mean: of centred accuracies.
      interval: of the mean.
      name: of the mean: CORE, or which part of it.
      how: what scores depend on beside the model and the items, as JSON has it.
      seconds: that scoring took, without what was scored before.
    """

    scores: tuple[Score, ...]
    items: dict[Task, list[Scored]]
    files: dict[Task, str]
    missing: tuple[str, ...]
    mean: float
    interval: tuple[float, float]
    name: str
    how: dict[str, Any]
    seconds: float

    def metrics(self) -> dict[str, float]:
        """By the names of docs/OPERATIONS.md."""
        accuracies = {f"few_shot/{score.task}": score.accuracy for score in self.scores}
        return accuracies | {"few_shot/mean_centred": self.mean}

    def to_json(self) -> dict[str, Any]:
        """All but single items."""
        scores = [dataclasses.asdict(score) for score in self.scores]
        mean = {"name": self.name, "value": self.mean, "interval": self.interval}
        return {"mean": mean, "tasks": scores, "missing": self.missing, "how": self.how, "seconds": self.seconds}

    def table(self) -> Iterator[str]:
        """As Markdown."""
        yield "| task | items | shots | accuracy % | 95 % interval | chance % | centred |"
        yield "|---|---|---|---|---|---|---|"
        for one in self.scores:
            low, high = (f"{100 * edge:.1f}" for edge in one.interval)
            guess = " (no better than a guess)" if one.is_a_guess else ""
            yield (
                f"| {one.task} | {one.items:,} | {one.shots} | {100 * one.accuracy:.1f} | {low} to {high}{guess} | "
                f"{100 * one.chance:.1f} | {one.centred:+.4f} |"
            )
        yield (f"\n{self.name}: {self.mean:+.4f} (95 % interval {self.interval[0]:+.4f} to {self.interval[1]:+.4f})")
        if self.missing:
            yield f"Not scored: {', '.join(self.missing)}."
        yield from self.notes()

    def notes(self) -> Iterator[str]:
        """How it was scored, in sentences."""
        memory = "with the memory" if self.how["memory"] else "with the memory zeroed"
        if self.how["prefill"] == "sequential":
            yield f"Scored token by token, {memory}, in {self.seconds:,.0f} s."
        else:
            items = sum(score.items for score in self.scores)
            refinements = sum(score.refinements * score.items for score in self.scores) / items
            fallbacks = sum(score.fallbacks for score in self.scores)
            yield (
                f"Scored by fixed point (tolerance {self.how['tolerance']:g}), {memory}, in {self.seconds:,.0f} s: "
                f"{refinements:.1f} refinements on average, {fallbacks:,} chunks fell back to token by token."
            )
        cropped, left_out = (sum(getattr(score, name) for score in self.scores) for name in ("cropped", "left_out"))
        if cropped:
            yield f"{cropped:,} items lost first tokens, to fit into the context."
        if left_out:
            yield f"{left_out:,} items are left out; the lines above say why."
