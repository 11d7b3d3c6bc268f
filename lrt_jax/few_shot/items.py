"""Items of a task: a line of JSON each, read and checked one by one."""

import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from lrt_jax.few_shot.tasks import FewShotError, Kind, Task

# Seed of the order in which a task's items are asked, and before which a cut is made (nanochat's).
ORDER = 1337


class Item(NamedTuple):
    """A question with its options, in a form that all kinds have in common.

    Attributes:
      line: of the file, from 1.
      options: context and continuation of each; one of language modelling, of other kinds two or more.
      gold: the right one.
    """

    line: int
    options: tuple[tuple[str, str], ...]
    gold: int


class Items(NamedTuple):
    """What a file has to ask.

    Attributes:
      asked: the items, in their order.
      left_out: how many lines are not.
      cut: whether there are more.
    """

    asked: list[Item]
    left_out: int
    cut: bool


def read(task: Task, path: str, data: bytes, say: Callable[[str], None], most: int | None = None) -> Items:
    """The items of a task in the order in which they are asked.

    Args:
      task: whose items they are.
      path: of the file, for messages.
      data: what is in it.
      say: is told of each line that is left out: file, line, what was found and what is allowed.
      most: so many items at most.

    Raises:
      FewShotError: there are too few good lines.
    """
    lines, left_out = data.split(b"\n"), 0
    items = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                items.append(_item(task.kind, number, line))
            except ValueError as error:
                say(f"{path}, line {number}: {error}; it is left out")
                left_out += 1
    random.Random(ORDER).shuffle(items)
    if len(items[:most]) <= task.shots:
        found = (
            f"{most} of its {len(items):,} items are asked"
            if len(items[:most]) < len(items)
            else f"it has {len(items)}"
        )
        what = f"{task.shots} solved items and one to ask" if task.shots else "one item"
        raise FewShotError(f"{path}: {found}; {task.label} needs {what}")
    return Items(items[:most], left_out, cut=len(items[:most]) < len(items))


def _item(kind: Kind, number: int, line: bytes) -> Item:
    """The item of a line.

    Raises:
      ValueError: saying what is wrong with it.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(values, dict):
        raise ValueError("is no JSON object")
    if kind == "language_modeling":
        return Item(number, ((_text(values, "context", may_be_empty=True).strip(), _text(values, "continuation")),), 0)
    if kind == "schema":
        contexts, continuation = _texts(values, "context_options"), _text(values, "continuation")
        return Item(number, tuple((context, continuation) for context in contexts), _gold(values, len(contexts)))
    query, choices = _text(values, "query"), _texts(values, "choices")
    return Item(number, tuple((query, choice) for choice in choices), _gold(values, len(choices)))


def _text(values: dict[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    if name not in values:
        raise ValueError(f"{name} is missing")
    return _checked(values[name], name, may_be_empty=may_be_empty)


def _texts(values: dict[str, Any], name: str) -> list[str]:
    """Two texts or more."""
    if name not in values:
        raise ValueError(f"{name} is missing")
    texts = values[name]
    if not isinstance(texts, list) or len(texts) < 2:
        found = f"has {len(texts)}" if isinstance(texts, list) else f"is {type(texts).__name__}"
        raise ValueError(f"{name} {found}; it must be a list of two texts or more")
    return [_checked(text, f"{name}[{index}]") for index, text in enumerate(texts)]


def _checked(text: Any, name: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{name} is {json.dumps(text)[:40]}; it must be text")
    if not (may_be_empty or text.strip()):
        raise ValueError(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half of a surrogate pair, which no UTF-8 text does") from None
    return text


def _gold(values: dict[str, Any], options: int) -> int:
    if "gold" not in values:
        raise ValueError("gold is missing")
    gold = values["gold"]
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < options:
        raise ValueError(f"gold is {json.dumps(gold)[:40]}; with {options} options allowed are 0 to {options - 1}")
    return gold
