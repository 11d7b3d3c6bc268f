"""What is scored is on disk at once, item by item: a file of lines for each task and way of scoring.

A process that is killed loses the batches it was at. Files are named by all that scores depend on, and only ever grow.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lrt_jax.durability import lock
from lrt_jax.few_shot.items import Item
from lrt_jax.few_shot.prompts import Prompt
from lrt_jax.few_shot.scorer import Answer
from lrt_jax.few_shot.tasks import Task
from lrt_jax.setup.errors import WorkdirError, writing

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
    pairs = zip(answer.losses, prompt.question.scored, strict=True)
    losses = tuple(float(loss) / count if count else math.nan for loss, count in pairs)
    # Where the first is NaN, so is Python's least: nanochat's rule.
    least = losses.index(min(losses))
    correct = bool(answer.greedy[0]) if task.kind == "language_modeling" else least == item.gold
    return Scored(number, item.line, correct, losses, prompt.cropped, answer.refinements, answer.fallbacks)


class Record:
    """The file of one task, held by this process alone: a line of JSON on how it was scored, then one for each item."""

    def __init__(self, folder: Path, task: Task, data: str, settings: dict[str, Any]):
        """Opens the file, and reads what is there; half a line that a killed process left is cut off.

        Args:
          folder: where files are.
          task: whose items these are.
          data: SHA-256 of the file of items.
          settings: what else scores depend on, as JSON has it.

        Raises:
          WorkdirError: it cannot be written, or another process has it open.
        """
        header = {"task": dataclasses.asdict(task), "data": data, "settings": settings}
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:8]
        self.path = folder / f"{task.label}-{digest}.jsonl"
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
            if not lock.taken(self._file.fileno()):
                self._file.close()
                raise WorkdirError(f"{self.path} is being written by another process; wait until that one has ended")
            self._file.seek(0)
            lines = self._file.read().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):
                self._file.truncate(sum(map(len, lines[:-1])))
                lines = lines[:-1]
        self.items = _items(lines)
        if not lines:
            self._append(header)

    def add(self, items: Sequence[Scored]) -> None:
        """Puts scores on disk.

        Raises:
          WorkdirError: they cannot be written.
        """
        self._append(*map(to_json, items))
        self.items |= {one.item: one for one in items}

    def close(self) -> None:
        """Lets others have it."""
        self._file.close()

    def _append(self, *values: dict[str, Any]) -> None:
        with writing(self.path):
            self._file.write(b"".join(json.dumps(one, allow_nan=False).encode() + b"\n" for one in values))
            self._file.flush()
            os.fsync(self._file.fileno())


def read(path: Path) -> dict[int, Scored]:
    """The scores in a file, by the numbers of the items; lines that are damaged have none."""
    return _items(path.read_bytes().splitlines(keepends=True))


def header_of(path: Path) -> dict[str, Any]:
    """The first line of a file: how its items were scored.

    Raises:
      ValueError: it is damaged.
    """
    with path.open("rb") as stream:
        return json.loads(stream.readline())


def _items(lines: Sequence[bytes]) -> dict[int, Scored]:
    found: dict[int, Scored] = {}
    for line in lines[1:]:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            one = from_json(json.loads(line))
            found.setdefault(one.item, one)
    return found


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
