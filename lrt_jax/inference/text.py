"""Text that continues text: prompts to tokens, tokens to text as it comes, stop strings."""

import codecs
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from lrt_jax.data.tokenizer import Tokenizer
from lrt_jax.inference.decode import PAD
from lrt_jax.inference.generate import Generation, Method
from lrt_jax.inference.load import Trained
from lrt_jax.setup.errors import UserError

# Tokens generated between two looks for stop strings, where nobody reads along.
BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Completion:
    """One generated text.

    Attributes:
      text: without the prompt and without what ended it.
      tokens: int32, the generated ids, those of a stop string included.
      log_probabilities: of each token, nats, under the model's own logits.
      ended_by: ``length``, ``stop_token`` (the model began a new document, or a token given) or ``stop_string``.
    """

    text: str
    tokens: np.ndarray
    log_probabilities: np.ndarray
    ended_by: Literal["length", "stop_token", "stop_string"]


class Reader:
    """Tokens of one row become text: whole characters only, and nothing of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        """Begins with no text."""
        self._tokenizer, self._stops = tokenizer, tuple(filter(None, stop_strings))
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def read(self, token: int) -> str:
        """The text that one more token makes certain. After a stop string there is none."""
        return self._release(self._bytes.decode(self._tokenizer.decode_bytes([token])))

    def close(self) -> str:
        """What was held back, once no more tokens come."""
        text = self._release(self._bytes.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _release(self, text: str) -> str:
        """Adds text; gives out all that cannot be the beginning of a stop string any more."""
        if self.stopped:
            return ""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for place in range(max(0, len(self._held) - longest), len(self._held)):
            if any(stop.startswith(self._held[place:]) for stop in self._stops):
                break
        else:
            place = len(self._held)
        certain, self._held = self._held[:place], self._held[place:]
        return certain


def encode(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """The prompt's token ids after BOS; an empty prompt is a new document.

    Raises:
      UserError: the prompt is no text, but bytes that are not UTF-8.
    """
    if broken := [char for char in prompt if "\ud800" <= char <= "\udfff"]:
        raise UserError(f"the prompt holds {broken[0]!r}, which no UTF-8 text does; it must be UTF-8")
    return np.concatenate([np.array([tokenizer.bos_id], np.int32), tokenizer.encode(prompt)])


def stream(
    trained: Trained,
    prompt: str,
    *,
    tokens: int,
    method: Method = Method(),  # noqa: B008  frozen
    seed: int = 0,
    stop_strings: Sequence[str] = (),
) -> Iterator[str]:
    """The text that continues a prompt, token by token, in pieces that are whole characters.

    It ends where the model begins a new document. The arguments are those of :func:`complete`.

    Raises:
      UserError: the prompt with the new tokens is longer than the context.
    """
    generation = _begin(trained, [prompt], tokens, method, [seed])
    reader = Reader(trained.tokenizer, stop_strings)
    for count in range(1, tokens + 1):
        found = generation.advance(count)[0]
        if len(found) < count or found[-1] == PAD:
            break
        yield reader.read(int(found[-1]))
        if reader.stopped:
            return
    yield reader.close()


def complete(
    trained: Trained,
    prompts: Sequence[str | np.ndarray],
    *,
    tokens: int,
    method: Method = Method(),  # noqa: B008  frozen
    seeds: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
) -> list[Completion]:
    """Continues all prompts together.

    Args:
      trained: the model.
      prompts: each follows BOS; an empty one begins a new document. There may be none. One may be given as the tokens
        that :func:`encode` makes of it, or as the last of them.
      tokens: how many tokens each gets, at most.
      method: how. BOS, which begins another document, is always a stop token.
      seeds: one for each prompt; None: 0, 1, …
      stop_strings: a text ends before the first of these.

    Raises:
      UserError: a prompt with the new tokens is longer than the context.
    """
    if not prompts:
        return []
    generation = _begin(trained, prompts, tokens, method, seeds)
    readers = [Reader(trained.tokenizer, stop_strings) for _ in prompts]
    texts, lengths = [""] * len(readers), [0] * len(readers)
    going = True
    while going:
        done = max(lengths)
        found_BxM = generation.advance(done + BLOCK if stop_strings else tokens)
        for row, reader in enumerate(readers):
            for token in found_BxM[row, lengths[row] :]:
                if token == PAD or reader.stopped:
                    break
                texts[row] += reader.read(int(token))
                lengths[row] += 1
            if reader.stopped:
                generation.end(row)
        going = generation.going
    completions = []
    for row, (reader, length) in enumerate(zip(readers, lengths, strict=True)):
        text = texts[row] + reader.close()
        ended_by: Literal["length", "stop_token", "stop_string"] = "length" if length == tokens else "stop_token"
        ended_by = "stop_string" if reader.stopped else ended_by
        log_probabilities = generation.log_probabilities[row, :length]
        completions.append(Completion(text, found_BxM[row, :length], log_probabilities, ended_by))
    return completions


def _begin(
    trained: Trained, prompts: Sequence[str | np.ndarray], tokens: int, method: Method, seeds: Sequence[int] | None
) -> Generation:
    stops = tuple(sorted({*method.stop_tokens, trained.tokenizer.bos_id}))
    method = dataclasses.replace(method, stop_tokens=stops)
    ids = [encode(trained.tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    return Generation(trained.decoding, ids, tokens, method, seeds)
