"""The three requests of lm-evaluation-harness, answered by a trained model with its memory.

Texts are cut into context and continuation as the harness's own models do it: white space at the end of a context
belongs to the continuation, whose tokens are those of the whole text behind the context's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lrt_jax.evaluation import texts
from lrt_jax.few_shot import prompts
from lrt_jax.few_shot.prompts import Question
from lrt_jax.few_shot.scorer import Scorer
from lrt_jax.inference import text
from lrt_jax.inference.generate import Method
from lrt_jax.inference.load import Trained
from lrt_jax.inference.sampling import Sampling
from lrt_jax.setup.config import DecodeConfig
from lrt_jax.setup.errors import UserError

# New tokens of a text, where a request does not say how many.
TOKENS = 256
# Continuations of one context that are scored as one question, at most.
OPTIONS = 8


class Answers:
    """A trained model, asked in texts."""

    def __init__(self, trained: Trained, how: DecodeConfig, *, use_memory: bool = True):
        """Says how it reads.

        Args:
          trained: the model.
          how: ``prefill`` says how true recurrence is computed.
          use_memory: False zeroes the memory that the model reads: for ablations.
        """
        self._trained, self._how, self._use_memory = trained, how, use_memory
        self._context = trained.config.model.sequence_length
        self._rows = trained.config.eval.batch_size
        self._scorer = Scorer(trained.mesh, self._context, how, self._rows * self._context, use_memory=use_memory)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each context and continuation: ln p(continuation | context), and whether all its tokens are most likely.

        Contexts longer than the model's lose their first tokens. Pairs with the same context are scored together.

        Raises:
          UserError: a continuation has no token of its own, or more than the context has room for.
        """
        encoded = self._encode(pairs)
        together: dict[bytes, list[int]] = {}
        for number, (context, continuation) in enumerate(encoded):
            # Those that are cropped lose as many tokens as their continuation has.
            room = self._context + 1 - len(continuation)
            encoded[number] = (context[-room:], continuation)
            together.setdefault(encoded[number][0].tobytes(), []).append(number)
        # A few of each, so that batches have as many options as questions, nearly.
        groups = [numbers[at : at + OPTIONS] for numbers in together.values() for at in range(0, len(numbers), OPTIONS)]
        questions = []
        for numbers in groups:
            context = encoded[numbers[0]][0]
            options = tuple(np.concatenate([context[-1:], encoded[number][1]]) for number in numbers)
            questions.append(Question(context[:-1], options, tuple(len(option) - 1 for option in options)))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for batch in self._scorer(self._trained.model, questions):
            for group, answer in batch:
                for number, loss, greedy in zip(groups[group], answer.losses, answer.greedy, strict=True):
                    found[number] = (-float(loss), bool(greedy))
        return found

    def loglikelihood_rolling(self, documents: Sequence[str]) -> list[float]:
        """ln p of each document; a long one in the harness's windows, of which only the last overlaps."""
        how, stride = self._how, self._context
        scored = texts.score(self._trained, documents, how, use_memory=self._use_memory, stride=stride)
        return [-one.nats for one in scored]

    def generate_until(self, prompts_and_options: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The text that continues each prompt, up to a stop string.

        Options are the harness's: ``until``, ``max_gen_toks``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``. A
        prompt without room for the new tokens loses its first ones.

        Raises:
          UserError: the context has no room for so many new tokens.
        """
        found = [""] * len(prompts_and_options)
        together: dict[str, list[int]] = {}
        for number, (_, options) in enumerate(prompts_and_options):
            together.setdefault(repr(sorted(options.items())), []).append(number)
        for numbers in together.values():
            options = prompts_and_options[numbers[0]][1]
            tokens = int(options.get("max_gen_toks", min(TOKENS, self._context // 2)))
            if not 0 < tokens < self._context:
                allowed = f"with a context of {self._context} allowed are 1 to {self._context - 1}"
                raise UserError(f"max_gen_toks is {tokens}; {allowed}")
            until = options.get("until") or ()
            stops = (until,) if isinstance(until, str) else tuple(until)
            method = Method(_sampling(options), self._how, use_memory=self._use_memory)
            # Of similar length together, so that little is padded.
            cropped = {
                number: text.encode(self._trained.tokenizer, prompts_and_options[number][0])[tokens - self._context :]
                for number in numbers
            }
            order = sorted(numbers, key=lambda number: -len(cropped[number]))
            for begin in range(0, len(order), self._rows):
                part = order[begin : begin + self._rows]
                asked = [cropped[number] for number in part]
                done = text.complete(self._trained, asked, tokens=tokens, method=method, seeds=part, stop_strings=stops)
                for number, completion in zip(part, done, strict=True):
                    found[number] = completion.text
        return found

    def _encode(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens of each context, BOS first, and of its continuation."""
        contexts = [context.rstrip() for context, _ in pairs]
        wholes = [context + continuation for context, continuation in pairs]
        encoded = prompts.encode(self._trained.tokenizer, [*contexts, *wholes])
        found = []
        for (_, continuation), context, whole in zip(pairs, encoded, encoded[len(pairs) :], strict=False):
            rest = whole[len(context) :]
            if not 0 < len(rest) <= self._context:
                raise UserError(
                    f"the continuation {continuation[:40]!r} has {len(rest)} tokens behind its context; allowed are 1 "
                    f"to {self._context}"
                )
            found.append((context, rest))
        return found


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """Greedy, unless ``do_sample`` is set or a temperature is given."""
    temperature = float(options.get("temperature") or 0.0)
    if options.get("do_sample") and not temperature:
        temperature = 1.0
    if options.get("do_sample") is False:
        temperature = 0.0
    top_k, top_p = int(options.get("top_k") or 0), float(options.get("top_p") or 1.0)
    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
