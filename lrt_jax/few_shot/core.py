"""CORE of a model: every task read, asked, scored, recorded and summed up."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from lrt_jax.data.tokenizer import Tokenizer
from lrt_jax.few_shot import items as items_of
from lrt_jax.few_shot import prompts, statistics, tasks
from lrt_jax.few_shot.items import Item, Items
from lrt_jax.few_shot.prompts import Prompt
from lrt_jax.few_shot.record import Record, Scored, from_json, scored, to_json
from lrt_jax.few_shot.report import Report
from lrt_jax.few_shot.scorer import Scorer
from lrt_jax.few_shot.statistics import Score
from lrt_jax.few_shot.tasks import FewShotError, Task
from lrt_jax.model.backend import compute_dtype
from lrt_jax.model.model import Model
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup import processes
from lrt_jax.setup.config import Config, DecodeConfig

# Texts that are made into tokens together.
TEXTS = 512


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is asked, and how it is scored.

    Attributes:
      folder: of the tasks.
      labels: of the tasks to ask; empty: all.
      items: how many of each task, at most; 0: all.
      decode: ``prefill`` says how true recurrence is computed.
      use_memory: False zeroes the memory that the model reads: for ablations.
      names: of the flags or fields that say ``folder`` and ``labels``.
    """

    folder: Path
    labels: tuple[str, ...] = ()
    items: int = 0
    decode: DecodeConfig = DecodeConfig()  # noqa: RUF009 - frozen
    use_memory: bool = True
    names: tuple[str, str] = ("--core", "--tasks")

    @property
    def how(self) -> dict[str, Any]:
        """What scores depend on beside the model and the items, as JSON has it."""
        decode = dataclasses.asdict(self.decode) if self.decode.prefill == "fixed_point" else {"prefill": "sequential"}
        return decode | {"memory": self.use_memory, "items": self.items}

    def files(self) -> dict[Task, str]:
        """The file of each task, as the first process finds it; "" where there is none.

        Raises:
          FewShotError: there is no such task, or the folder has none of their files.
        """
        wanted = tasks.chosen(self.labels, self.names[1])

        def paths() -> bytes:
            found = tasks.files(self.folder, wanted, self.names[0])
            return json.dumps([str(path or "") for _, path in found]).encode()

        return dict(zip(wanted, json.loads(processes.from_first(paths)), strict=True))


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
        self._mesh, self._tokenizer, self._choice = mesh, tokenizer, choice
        self._context, self._dtype = config.model.sequence_length, str(compute_dtype(config.model))
        tokens = config.eval.batch_size * self._context
        self._scorer = Scorer(mesh, self._context, choice.decode, tokens, use_memory=choice.use_memory)
        self._files = choice.files()

    def __call__(
        self,
        model: Model,
        folder: Path | None = None,
        say: Callable[[str], None] = processes.say,
        done: Callable[[Score], None] = lambda _: None,
        between: Callable[[], None] = lambda: None,
    ) -> Report:
        """Scores a model, and records it.

        Args:
          model: of the config, on the mesh.
          folder: where scores are kept, item by item, and looked for first; None: nowhere.
          say: is told of each task and item that is left out.
          done: is given each task's score.
          between: called before each batch; may raise, to end it.

        Raises:
          FewShotError: nothing can be scored.
          WorkdirError: scores cannot be kept.
        """
        began = time.monotonic()
        settings = self._choice.how | {"dtype": self._dtype, "context": self._context}
        settings |= {"weights": checksum(model, self._mesh), "tokenizer": self._tokenizer.sha256}
        scores, items, digests, missing, cut = [], {}, {}, [], False
        for task, path in self._files.items():
            try:
                data = _contents(task, path, self._choice.folder)
                digest = hashlib.sha256(data).hexdigest()
                found = items_of.read(task, path, data, say, self._choice.items or None)
                ready, refused = self._ready(task, path, found, say)
            except FewShotError as error:
                say(f"{task.label} is left out: {error}")
                missing.append(task.label)
                continue
            record, known = _opened(folder, task, digest, settings)
            try:
                known |= self._scored(model, task, found.asked, ready, known, record, between)
            finally:
                if record is not None:
                    record.close()
            items[task], digests[task] = [known[number] for number in sorted(ready)], digest
            scores.append(statistics.score(task, items[task], found.left_out + refused))
            cut = cut or found.cut
            done(scores[-1])
        if not scores:
            raise FewShotError(f"{self._choice.folder}: no task could be scored; the lines above say why")
        value, interval = statistics.mean(items)
        whole = not (cut or any(score.left_out for score in scores))
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

    def _ready(self, task: Task, path: str, found: Items, say: Callable[[str], None]) -> tuple[dict[int, Prompt], int]:
        """The prompts of all items that can be asked, by their numbers, and how many cannot.

        Raises:
          FewShotError: none can.
        """
        ready: dict[int, Prompt] = {}
        for number, prompt in self._prompts(task, found.asked):
            if isinstance(prompt, Prompt):
                ready[number] = prompt
            else:
                say(f"{path}, line {found.asked[number].line}: {prompt}; it is left out")
        if not ready:
            raise FewShotError(f"{path} has no item that can be asked")
        return ready, len(found.asked) - len(ready)

    def _prompts(self, task: Task, asked: Sequence[Item]) -> Iterator[tuple[int, Prompt | ValueError]]:
        """The prompt of each item, or why it cannot be asked."""
        together = max(1, TEXTS // (len(asked[0].options) + 1))
        for begin in range(0, len(asked), together):
            part = range(begin, min(begin + together, len(asked)))
            texts = [prompts.texts(task, asked, number) for number in part]
            encoded = iter(prompts.encode(self._tokenizer, [text for of_one in texts for text in of_one]))
            for number, of_one in zip(part, texts, strict=True):
                tokens = [next(encoded) for _ in of_one]
                try:
                    yield number, prompts.prompt(task, tokens, self._context)
                except ValueError as error:
                    yield number, error

    def _scored(
        self,
        model: Model,
        task: Task,
        asked: Sequence[Item],
        ready: dict[int, Prompt],
        known: dict[int, Scored],
        record: Record | None,
        between: Callable[[], None],
    ) -> dict[int, Scored]:
        """The scores of all items that are not known, put on disk batch by batch."""
        left = [number for number in ready if number not in known]
        new: dict[int, Scored] = {}
        for answers in self._scorer(model, [ready[number].question for number in left], between):
            batch = [
                scored(task, left[index], asked[left[index]], ready[left[index]], answer) for index, answer in answers
            ]
            if record is not None:
                record.add(batch)
            new |= {one.item: one for one in batch}
        return new


def checksum(model: Model, mesh: Mesh) -> str:
    """Of a model's parameters, to the bit; the same on any mesh, since sums of whole numbers have no order."""

    def one(leaf: jax.Array) -> jax.Array:
        bits = lax.bitcast_convert_type(leaf, jnp.uint32)
        places = lax.iota(jnp.uint32, bits.size).reshape(bits.shape)
        return jnp.sum(bits * (2 * places + 1), dtype=jnp.uint32)

    sums = jax.jit(lambda params: jax.tree.map(one, params), out_shardings=meshes.replicated(mesh))(model.params)
    values = {name: int(array) for name, array in sums.items()}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _contents(task: Task, path: str, folder: Path) -> bytes:
    """A task's file as the first process reads it, in all of them.

    Raises:
      FewShotError: it is not there, or cannot be read.
    """

    def read() -> bytes:  # in all processes the same is raised
        if not path:
            return f"!{folder} has no {task.file}".encode()
        try:
            return b" " + Path(path).read_bytes()
        except OSError as error:
            return f"!{path} cannot be read ({error.strerror or error})".encode(errors="replace")

    data = processes.from_first(read)
    if data.startswith(b"!"):
        raise FewShotError(data[1:].decode())
    return data[1:]


def _opened(
    folder: Path | None, task: Task, digest: str, settings: dict[str, Any]
) -> tuple[Record | None, dict[int, Scored]]:
    """The record of a task, in the first process alone, and what it knows, in all of them."""
    if folder is None:
        return None, {}
    opened: list[Record] = []

    def items() -> bytes:
        opened.append(Record(folder, task, digest, settings))
        return json.dumps([to_json(one) for one in opened[0].items.values()]).encode()

    known = map(from_json, json.loads(processes.from_first(items)))
    return opened[0] if opened else None, {one.item: one for one in known}
