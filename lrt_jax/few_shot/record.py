"""What is scored is on disk at once, item by item: a file of lines for each task and way of scoring.

A process that is killed loses the batch it was at. Its files are named by all that scores depend on, so nothing is
taken for what it is not, and nothing is ever overwritten.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lrt_jax.few_shot.items import Item
from lrt_jax.few_shot.prompts import Prompt
from lrt_jax.few_shot.scorer import Answer
from lrt_jax.few_shot.tasks import Task
from lrt_jax.setup.errors import writing

FOLDER = "few_shot"  # in a work dir


class Scored(NamedTuple):
    """An item's score.

    Attributes:
      item: its number, in the order in which items are asked.
      line: in the task's file.
      correct: whether the model is right; of language modelling: whether all tokens are the most likely ones.
      losses: of each option, nats per scored token; null in the file where they are not finite.
      cropped: whether first tokens were left out, to fit into the context.
      refinements: of fixed point.
      fallbacks: likewise.
    """

    item: int
    line: int
    correct: bool
    losses: tuple[float, ...]
    cropped: bool
    refinements: int
    fallbacks: int


def scored(task: Task, number: int, item: Item, prompt: Prompt, answer: Answer) -> Scored:
    """The score of an answer; of several options with the same mean loss the first is the model's."""
    counts = prompt.question.scored
    losses = tuple(float(loss) / count for loss, count in zip(answer.losses, counts, strict=True))
    if task.kind == "language_modeling":
        correct = bool(answer.greedy[0])
    else:
        correct = all(map(math.isfinite, losses)) and losses.index(min(losses)) == item.gold
    return Scored(number, item.line, correct, losses, prompt.cropped, answer.refinements, answer.fallbacks)


class Record:
    """The file of one task: a line of JSON that says how it was scored, then one for each item."""

    def __init__(self, folder: Path, task: Task, data: str, settings: dict[str, Any]):
        """Reads what is there; half a line that a killed process left is cut off when the next is written.

        Args:
          folder: where files are; it is made when something is written.
          task: whose items these are.
          data: SHA-256 of the file of items.
          settings: what else scores depend on, as JSON has it.
        """
        self._header = {"task": dataclasses.asdict(task), "data": data, "settings": settings}
        digest = hashlib.sha256(json.dumps(self._header, sort_keys=True).encode()).hexdigest()[:8]
        self.path = folder / f"{task.label}-{digest}.jsonl"
        # Items by number, and how many bytes are good lines.
        self.items, self._whole = _read(self.path) if self.path.exists() else ({}, 0)

    def add(self, items: Sequence[Scored]) -> None:
        """Puts scores on disk.

        Raises:
          WorkdirError: they cannot be written.
        """
        lines = [] if self._whole else [json.dumps(self._header)]
        lines += [json.dumps(to_json(one), allow_nan=False) for one in items]
        data = ("\n".join(lines) + "\n").encode()
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("r+b" if self.path.exists() else "wb") as stream:
                stream.truncate(self._whole)
                stream.seek(self._whole)
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        self._whole += len(data)
        self.items |= {one.item: one for one in items}


def read(path: Path) -> dict[int, Scored]:
    """The scores in a file, by the numbers of the items."""
    return _read(path)[0]


def header_of(path: Path) -> dict[str, Any]:
    """The first line of a file: how its items were scored.

    Raises:
      ValueError: it is damaged.
    """
    with path.open("rb") as stream:
        return json.loads(stream.readline())


def _read(path: Path) -> tuple[dict[int, Scored], int]:
    """The scores in a file, and how many bytes they take; it ends at the first line that is damaged."""
    items: dict[int, Scored] = {}
    whole = 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            values = json.loads(line)
            if whole:
                one = from_json(values)
                items[one.item] = one
        except (ValueError, TypeError, KeyError):
            break
        whole += len(line)
    return items, whole


def to_json(one: Scored) -> dict[str, Any]:
    """A score as JSON has it: without NaN."""
    return one._asdict() | {"losses": [loss if math.isfinite(loss) else None for loss in one.losses]}


def from_json(values: dict[str, Any]) -> Scored:
    """What :func:`to_json` made; infinity becomes NaN.

    Raises:
      KeyError, TypeError: it is another thing.
    """
    losses = tuple(math.nan if loss is None else loss for loss in values["losses"])
    return Scored(**values)._replace(losses=losses)
