"""CORE of a model: every task read, asked, scored, recorded and summed up."""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lrt_jax.data.tokenizer import Tokenizer
from lrt_jax.few_shot import items as items_of
from lrt_jax.few_shot import prompts, statistics, tasks
from lrt_jax.few_shot.items import Item
from lrt_jax.few_shot.prompts import Prompt
from lrt_jax.few_shot.record import Record, Scored, from_json, scored, to_json
from lrt_jax.few_shot.scorer import Scorer
from lrt_jax.few_shot.statistics import Score
from lrt_jax.few_shot.tasks import FewShotError, Task
from lrt_jax.model.model import Model
from lrt_jax.setup import processes
from lrt_jax.setup.config import Config, DecodeConfig

# Scores go to disk after so many seconds.
SECONDS = 2.0
# Texts that are made into tokens together.
TEXTS = 512


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is asked, and how it is scored.

    Attributes:
      folder: of the tasks.
      named_by: the flag or field that names it.
      labels: of the tasks to ask; empty: all.
      items: how many of each task, at most; 0: all.
      decode: ``prefill`` says how true recurrence is computed.
      use_memory: False zeroes the memory that the model reads: for ablations.
    """

    folder: Path
    labels: tuple[str, ...] = ()
    items: int = 0
    decode: DecodeConfig = DecodeConfig()  # noqa: RUF009 - frozen
    use_memory: bool = True
    named_by: str = "--core"

    def files(self) -> dict[Task, str]:
        """The file of each task, as the first process finds it; "" where there is none.

        Raises:
          FewShotError: there is no such task, or the folder has none of their files.
        """
        wanted = tasks.chosen(self.labels)

        def paths() -> bytes:
            found = tasks.files(self.folder, wanted, self.named_by)
            return json.dumps([str(path or "") for _, path in found]).encode()

        return dict(zip(wanted, json.loads(processes.from_first(paths)), strict=True))

    @property
    def how(self) -> dict[str, Any]:
        """What scores depend on beside the model and the items, as JSON has it."""
        decode = dataclasses.asdict(self.decode) if self.decode.prefill == "fixed_point" else {"prefill": "sequential"}
        return decode | {"memory": self.use_memory, "items": self.items}

    @property
    def name(self) -> str:
        """Of a folder."""
        return self.decode.prefill + ("" if self.use_memory else "-nomemory")


@dataclasses.dataclass(frozen=True)
class Report:
    """What came of it.

    Attributes:
      scores: of each task that was scored.
      items: likewise, item by item.
      files: likewise, the SHA-256 of its file.
      missing: labels of tasks asked for, which have no file or too few items.
      mean: of centred accuracies.
      interval: of the mean.
      name: of the mean: CORE, or which part of it.
      how: see :attr:`Choice.how`.
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


class Core:
    """Asks a model the tasks of a folder; compiles once, however often it is asked."""

    def __init__(self, config: Config, mesh: Mesh, tokenizer: Tokenizer, choice: Choice):
        """Finds the tasks' files, and reads none yet.

        Args:
          config: of the run; ``eval.batch_size`` times T is about how many tokens are read at once.
          mesh: where to compute.
          tokenizer: the model's.
          choice: what is asked, and how.

        Raises:
          FewShotError: there is no such task, or the folder has none of their files.
        """
        self._tokenizer, self._choice, self._context = tokenizer, choice, config.model.sequence_length
        tokens = config.eval.batch_size * self._context
        self._scorer = Scorer(mesh, self._context, choice.decode, tokens, use_memory=choice.use_memory)
        self._files = choice.files()

    def __call__(
        self,
        model: Model,
        folder: Path | None = None,
        settings: dict[str, Any] | None = None,
        say: Callable[[str], None] = processes.say,
        between: Callable[[], None] = lambda: None,
    ) -> Report:
        """Scores a model, and records it.

        Args:
          model: of the config, on the mesh.
          folder: where scores are kept, item by item, and looked for first; None: nowhere.
          settings: what tells this model from others whose scores are in the folder.
          say: is told of each task that is done, and of what is left out.
          between: called before each batch; may raise, to end it.

        Raises:
          FewShotError: nothing can be scored.
        """
        began = time.monotonic()
        scores, items, digests, missing = [], {}, {}, []
        for task, path in self._files.items():
            if not path:
                say(f"{task.label}: {self._choice.folder} has no {task.file}; the task is left out")
                missing.append(task.label)
                continue
            data = processes.from_first(functools.partial(_contents, path))
            digest = hashlib.sha256(data).hexdigest()
            record = None
            if folder is not None:
                record = Record(folder, task, digest, (settings or {}) | self._choice.how)
            try:
                asked, left_out = items_of.read(task, path, data, say, self._choice.items or None)
                found, refused = self._scored(model, task, path, asked, record, say, between)
                if not found:
                    raise FewShotError(f"{path} has no item that can be asked")
            except FewShotError as error:
                say(f"{task.label}: {error}; the task is left out")
                missing.append(task.label)
                continue
            scores.append(statistics.score(task, found, left_out + refused))
            items[task], digests[task] = found, digest
            say(_line(scores[-1]))
        if not scores:
            raise FewShotError(f"{self._choice.folder}: no task could be scored; the lines above say why")
        value, interval = statistics.mean(items)
        whole = not self._choice.items and not any(score.left_out for score in scores)
        return Report(
            scores=tuple(scores),
            items=items,
            files=digests,
            missing=tuple(missing),
            mean=value,
            interval=interval,
            name=statistics.name_of_mean([score.task for score in scores], whole=whole),
            how=self._choice.how,
            seconds=time.monotonic() - began,
        )

    def _scored(
        self,
        model: Model,
        task: Task,
        path: str,
        asked: Sequence[Item],
        record: Record | None,
        say: Callable[[str], None],
        between: Callable[[], None],
    ) -> tuple[list[Scored], int]:
        """All scores of a task, in the order of items, and how many cannot be asked."""
        done = _known(record)
        numbers, ready = [], []
        refused = 0
        for number, prompt in self._prompts(task, asked, done):
            if isinstance(prompt, Prompt):
                numbers.append(number)
                ready.append(prompt)
            else:
                say(f"{path}, line {asked[number].line}: {prompt}; it is left out")
                refused += 1
        waiting, saved = [], time.monotonic()
        for index, answer in self._scorer(model, [prompt.question for prompt in ready], between):
            number = numbers[index]
            waiting.append(scored(task, number, asked[number], ready[index], answer))
            if record is not None and time.monotonic() - saved > SECONDS:
                _save(record, waiting)
                done |= {one.item: one for one in waiting}
                waiting, saved = [], time.monotonic()
        if record is not None and waiting:
            _save(record, waiting)
        done |= {one.item: one for one in waiting}
        return [done[number] for number in sorted(done)], refused

    def _prompts(
        self, task: Task, asked: Sequence[Item], done: dict[int, Scored]
    ) -> Iterator[tuple[int, Prompt | ValueError]]:
        """The prompt of each item that is not done, or why it cannot be asked."""
        left = [number for number in range(len(asked)) if number not in done]
        options = len(asked[0].options) + 1
        for begin in range(0, len(left), max(1, TEXTS // options)):
            part = left[begin : begin + max(1, TEXTS // options)]
            texts = [prompts.texts(task, asked, number) for number in part]
            encoded = iter(prompts.encode(self._tokenizer, [text for of_one in texts for text in of_one]))
            for number, of_one in zip(part, texts, strict=True):
                tokens = [next(encoded) for _ in of_one]
                try:
                    yield number, prompts.prompt(task, tokens, self._context)
                except ValueError as error:
                    yield number, error


def _contents(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise FewShotError(f"{path} cannot be read ({error.strerror or error})") from None


def _known(record: Record | None) -> dict[int, Scored]:
    """What is scored already: as the first process has it, in all of them."""
    if record is None:
        return {}
    found = processes.from_first(lambda: json.dumps([to_json(one) for one in record.items.values()]).encode())
    return {one.item: one for one in map(from_json, json.loads(found))}


def _save(record: Record, items: Sequence[Scored]) -> None:
    """By the first process alone."""
    if processes.is_first():
        record.add(items)


def _line(score: Score) -> str:
    low, high = (f"{100 * edge:.1f}" for edge in score.interval)
    return (
        f"{score.task}: {100 * score.accuracy:.1f} % right of {score.items:,} items ({low} to {high}); a guess has "
        f"{100 * score.chance:.1f}"
    )
