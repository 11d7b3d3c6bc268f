"""Prompts: an item behind its shots, as tokens, and which of these are scored. All as nanochat has it.

Shots are drawn for each item anew. A context and its continuation are joined by the task's delimiter, shots by a blank
line, and all follow BOS. Of multiple choice the tokens behind the common prefix of all options are scored, of schema
those of their common suffix, of language modelling those behind the prompt without the continuation.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lrt_jax.data.tokenizer import Tokenizer
from lrt_jax.few_shot.items import Item
from lrt_jax.few_shot.tasks import Task

# Shots of item i are drawn with the seed SHOTS + i.
SHOTS = 1234


class Question(NamedTuple):
    """What is scored together: options that begin with the same tokens.

    Attributes:
      shared: int32, the tokens that all of them begin with, perhaps none; the last of them is in ``options``.
      options: int32, the tokens behind these: the first of each is read, and not scored.
      scored: how many of the last tokens of each option are scored. None are, of an option that the others begin with.
    """

    shared: np.ndarray
    options: tuple[np.ndarray, ...]
    scored: tuple[int, ...]

    @property
    def longest(self) -> int:
        """How many tokens the longest option reads: all but its last."""
        return max(len(option) for option in self.options) - 1


class Prompt(NamedTuple):
    """A question, and what was done to it.

    Attributes:
      question: the tokens.
      cropped: whether first tokens were left out, to fit into the context.
    """

    question: Question
    cropped: bool


def shots(task: Task, items: Sequence[Item], index: int) -> list[Item]:
    """The solved items before item ``index``."""
    others = [other for other in range(len(items)) if other != index]
    return [items[other] for other in random.Random(SHOTS + index).sample(others, task.shots)]


def texts(task: Task, items: Sequence[Item], index: int) -> list[str]:
    """Each option of an item behind its shots; of language modelling the prompt without its continuation, and with."""
    before = "".join(task.delimiter.join(shot.options[shot.gold]) + "\n\n" for shot in shots(task, items, index))
    whole = [before + task.delimiter.join(option) for option in items[index].options]
    if task.kind == "language_modeling":
        # Without white space at its end, which most tokenizers join to the next word.
        return [(before + items[index].options[0][0] + task.delimiter).strip(), *whole]
    return whole


def prompt(task: Task, tokens: Sequence[np.ndarray], context: int) -> Prompt:
    """The question that these tokens ask.

    Args:
      task: whose it is.
      tokens: of each of :func:`texts`, int32, BOS first.
      context: how many tokens fit into the model. Longer options lose their first tokens.

    Raises:
      ValueError: saying why it cannot be asked.
    """
    if task.kind == "language_modeling":
        without, *tokens = tokens
        starts = [len(without)]
        if common(without, tokens[0]) < len(without) or len(without) == len(tokens[0]):
            raise ValueError("the tokenizer joins the end of the prompt and the beginning of the continuation")
    elif task.kind == "schema":
        suffix = _common_of_all([one[::-1] for one in tokens])
        starts = [len(one) - suffix for one in tokens]
    else:
        starts = [_common_of_all(tokens)] * len(tokens)
    # Without anything before it nothing is scored.
    scored = tuple(len(one) - start if start else 0 for one, start in zip(tokens, starts, strict=True))
    for number, count in enumerate(scored):
        if count >= context:
            raise ValueError(f"option {number} alone has {count} tokens; the context has {context}")
    lengths = [min(len(one), context) for one in tokens]
    cropped = [one[-length:] for one, length in zip(tokens, lengths, strict=True)]
    before = min(length - count for length, count in zip(lengths, scored, strict=True))
    shared = max(0, min(_common_of_all(cropped), before) - 1)
    question = Question(cropped[0][:shared], tuple(one[shared:] for one in cropped), scored)
    return Prompt(question, cropped=any(len(one) > context for one in tokens))


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Tokens of each text, int32, BOS first."""
    bos = np.array([tokenizer.bos_id], np.int32)
    return [np.concatenate([bos, tokens]) for tokens in tokenizer.encode_all(texts)]


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens both begin with."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def _common_of_all(tokens: Sequence[np.ndarray]) -> int:
    return min(common(tokens[0], other) for other in tokens[1:]) if len(tokens) > 1 else len(tokens[0])
