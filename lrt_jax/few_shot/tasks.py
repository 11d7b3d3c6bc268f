"""The 22 tasks of CORE (DataComp-LM, arXiv 2406.11794), and where a folder has them.

CORE is the mean over all of them of centred accuracy: 0 for a guess, 1 for no mistake. Labels, shots, delimiters and
the accuracy of a guess are those of nanochat's evaluation.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from lrt_jax.setup.errors import UserError

Kind = Literal["multiple_choice", "schema", "language_modeling"]
Accuracy = TypeVar("Accuracy", float, np.ndarray)


class FewShotError(UserError):
    """Few-shot tasks cannot be scored; one sentence says why."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      label: its name.
      file: where its items are, below the folder.
      shots: how many solved items come before the question.
      kind: of its items.
      delimiter: between a context and its continuation.
      chance: accuracy of a guess.
    """

    label: str
    file: str
    shots: int
    kind: Kind
    delimiter: str
    chance: float

    def centred(self, accuracy: Accuracy) -> Accuracy:
        """(accuracy - chance) / (1 - chance)."""
        return (accuracy - self.chance) / (1 - self.chance)


def _task(label: str, folder: str, shots: int, kind: Kind, chance: float, file: str = "", answer: bool = False) -> Task:
    return Task(label, f"{folder}/{file or label}.jsonl", shots, kind, "\nAnswer: " if answer else " ", chance)


CORE = (
    _task("hellaswag_zeroshot", "language_understanding", 0, "multiple_choice", 0.25, file="hellaswag"),
    _task("jeopardy", "world_knowledge", 10, "language_modeling", 0.0, file="jeopardy_all", answer=True),
    _task("bigbench_qa_wikidata", "world_knowledge", 10, "language_modeling", 0.0),
    _task("arc_easy", "world_knowledge", 10, "multiple_choice", 0.25, answer=True),
    _task("arc_challenge", "world_knowledge", 10, "multiple_choice", 0.25, answer=True),
    _task("copa", "commonsense_reasoning", 0, "multiple_choice", 0.5),
    _task("commonsense_qa", "commonsense_reasoning", 10, "multiple_choice", 0.403),
    _task("piqa", "commonsense_reasoning", 10, "multiple_choice", 0.5, answer=True),
    _task("openbook_qa", "commonsense_reasoning", 0, "multiple_choice", 0.25),
    _task("lambada_openai", "language_understanding", 0, "language_modeling", 0.0),
    _task("hellaswag", "language_understanding", 10, "multiple_choice", 0.25),
    _task("winograd", "language_understanding", 0, "schema", 0.5, file="winograd_wsc"),
    _task("winogrande", "language_understanding", 0, "schema", 0.5),
    _task("bigbench_dyck_languages", "symbolic_problem_solving", 10, "language_modeling", 0.0),
    _task("agi_eval_lsat_ar", "symbolic_problem_solving", 3, "multiple_choice", 0.25),
    _task("bigbench_cs_algorithms", "symbolic_problem_solving", 10, "language_modeling", 0.0),
    _task("bigbench_operators", "symbolic_problem_solving", 10, "language_modeling", 0.0),
    _task("bigbench_repeat_copy_logic", "symbolic_problem_solving", 10, "language_modeling", 0.0),
    _task("squad", "reading_comprehension", 10, "language_modeling", 0.0),
    _task("coqa", "reading_comprehension", 0, "language_modeling", 0.0),
    _task("boolq", "reading_comprehension", 10, "multiple_choice", 0.62, answer=True),
    _task("bigbench_language_identification", "language_understanding", 10, "multiple_choice", 0.25),
)
LABELS = tuple(task.label for task in CORE)


def chosen(labels: Sequence[str], name: str = "--tasks") -> list[Task]:
    """The tasks of these labels in CORE's order; all of them if there are none. ``name`` is that of the flag or field.

    Raises:
      FewShotError: CORE has no task of a label.
    """
    if unknown := [label for label in labels if label not in LABELS]:
        raise FewShotError(f"{name} has {unknown[0]!r}, which is no task of CORE; allowed are: {', '.join(LABELS)}")
    return [task for task in CORE if not labels or task.label in labels]


def files(folder: Path, tasks: Iterable[Task], name: str = "--core") -> Iterator[tuple[Task, Path | None]]:
    """Each task with its file; None where there is none.

    The folder has the tasks' own folders in it, or is the unpacked bundle that has these in ``eval_data``. ``name`` is
    that of the flag or field that names it.

    Raises:
      FewShotError: it is no folder, or has none of the files.
    """
    if not os.path.isdir(folder):  # noqa: PTH112 - pathlib's raises where the name is too long
        raise FewShotError(f"{name} is {str(folder)!r}, which is no folder; it must be one with {CORE[1].file}, say")
    found = []
    for task in tasks:
        places = (folder / task.file, folder / "eval_data" / task.file)
        found.append((task, next((place for place in places if place.is_file()), None)))
    if all(path is None for _, path in found):
        wanted = found[0][0].file
        raise FewShotError(f"{name} is {str(folder)!r}, where no task has a file; there must be {wanted}, or others")
    yield from found
