"""Few-shot items per second: ours with the memory, ours without it, and a loop over single options.

    python -m benchmarks.few_shot WORKDIR FOLDER [--json=FILE] [--tasks=copa,arc_easy] [--items=32] …

FOLDER has the tasks of CORE (docs/EVALUATION.md). The loop scores one option at a time, whole, by the same recurrence,
compiled for lengths that are powers of two: what one writes first. All are run once before, so that compilation does
not count, and then in turns; of the loop only ``--loop_items`` of the items are timed, spread over all lengths. Its
scores must be those of ``sequential``.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.arguments import home_expanded, output, positive, several
from benchmarks.checks import in_one_line
from lrt_jax.few_shot import items as items_of
from lrt_jax.few_shot import prompts, tasks
from lrt_jax.few_shot.prompts import Question
from lrt_jax.few_shot.scorer import Scorer
from lrt_jax.inference import load, scoring
from lrt_jax.inference.decode import PAD
from lrt_jax.inference.load import Trained
from lrt_jax.setup import host_memory

TABLE = "{:<36}{:<14}{:>8}{:>12}{:>10}"


@dataclasses.dataclass
class Row:
    """One task scored one way.

    Attributes:
      task: its label.
      way: ``sequential``, ``fixed_point``, ``no memory`` (by one full forward) or ``loop`` (sequentially).
      items: that were timed.
      items_per_second: median of the turns.
      speedup: items per second as a multiple of the loop's.
    """

    task: str
    way: str
    items: int
    items_per_second: float
    speedup: float


def loop(trained: Trained, questions: list[Question]) -> list[list[float]]:
    """Summed losses of each question's options, one option after the other."""
    context = trained.config.model.sequence_length
    found = []
    for question in questions:
        losses = []
        for option, scored in zip(question.options, question.scored, strict=True):
            tokens = np.concatenate([question.shared, option])
            length = min(context, 1 << (len(tokens) - 2).bit_length())
            tokens_1xT = np.full((1, length), PAD, np.int32)
            targets_1xT = np.zeros_like(tokens_1xT)
            tokens_1xT[0, length - len(tokens) + 1 :] = tokens[:-1]
            targets_1xT[0, length - len(tokens) + 1 :] = tokens[1:]
            losses_T = np.asarray(_losses(trained.model, jnp.asarray(tokens_1xT), jnp.asarray(targets_1xT))[0])
            losses.append(float(losses_T[-scored:].sum()))
        found.append(losses)
    return found


@functools.partial(jax.jit)
def _losses(model: Any, tokens_1xT: jax.Array, targets_1xT: jax.Array) -> jax.Array:
    return scoring.score(model, tokens_1xT, targets_1xT).losses_BxT


def measure(trained: Trained, label: str, questions: list[Question], options: argparse.Namespace) -> list[Row]:
    """The rows of one task."""
    config = trained.config
    tokens = config.eval.batch_size * config.model.sequence_length
    fixed_point = dataclasses.replace(config.decode, prefill="fixed_point")
    sequential = dataclasses.replace(config.decode, prefill="sequential")

    def scorer(how: Any, **memory: bool) -> Callable[[], list[list[float]]]:
        score = Scorer(trained.mesh, config.model.sequence_length, how, tokens, **memory)

        def run() -> list[list[float]]:
            found = {index: answer for batch in score(trained.model, questions) for index, answer in batch}
            return [found[index].losses.tolist() for index in range(len(questions))]

        return run

    questions = sorted(questions, key=lambda question: len(question.shared) + question.longest)
    count = min(options.loop_items, len(questions))
    chosen = [(2 * index + 1) * len(questions) // (2 * count) for index in range(count)]
    few = [questions[index] for index in chosen]
    ways = {
        "loop": (len(few), lambda: loop(trained, few)),
        "sequential": (len(questions), scorer(sequential)),
        "fixed_point": (len(questions), scorer(fixed_point)),
        "no memory": (len(questions), scorer(fixed_point, use_memory=False)),
    }
    scores = {way: run() for way, (_, run) in ways.items()}
    for index, expected in zip(chosen, scores["loop"], strict=True):
        np.testing.assert_allclose(scores["sequential"][index], expected, rtol=1e-4)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, (_, run) in ways.items():
            begin = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - begin)
    speed = {way: count / statistics.median(seconds[way]) for way, (count, _) in ways.items()}
    rows = [Row(label, way, ways[way][0], speed[way], speed[way] / speed["loop"]) for way in ways]
    for row in rows:
        speedup = f"{row.speedup:.1f} ×"
        print(TABLE.format(row.task, row.way, row.items, f"{row.items_per_second:.2f}", speedup), flush=True)
    return rows


def questions_of(trained: Trained, task: tasks.Task, path: Any, count: int) -> list[Question]:
    """The first questions of a task that can be asked."""
    items = items_of.read(task, str(path), path.read_bytes(), print).asked
    found: list[Question] = []
    for index in range(len(items)):
        encoded = prompts.encode(trained.tokenizer, prompts.texts(task, items, index))
        try:
            found.append(prompts.prompt(task, encoded, trained.config.model.sequence_length).question)
        except ValueError:
            continue
        if len(found) == count:
            break
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("workdir", type=home_expanded)
    parser.add_argument("folder", type=home_expanded)
    parser.add_argument("--json", type=output, help="write the rows here")
    parser.add_argument("--tasks", type=several(str), default=["copa", "arc_easy", "winogrande", "bigbench_operators"])
    parser.add_argument("--items", type=positive, default=32, help="of each task")
    parser.add_argument("--loop_items", type=positive, default=8, help="that the loop is timed on")
    parser.add_argument("--rounds", type=positive, default=3)
    return parser.parse_args(arguments)


def main() -> None:
    """Measures, and prints a table."""
    options = parse()
    with in_one_line():
        trained = load.load(options.workdir)
        host_memory.keep_freed()
        found = list(tasks.files(options.folder, tasks.chosen(options.tasks), "FOLDER"))
    print(TABLE.format("task", "way", "items", "items/s", "loop = 1"))
    rows: list[Row] = []
    for task, path in found:
        if path is None:
            print(f"{task.label}: no {task.file}")
            continue
        with in_one_line():
            questions = questions_of(trained, task, path, options.items)
        rows += measure(trained, task.label, questions, options)
        if options.json:
            options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
