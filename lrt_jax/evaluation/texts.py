"""Bits per byte of any text, document by document, under true recurrence.

A document longer than the context is read in windows of T tokens, each half a context behind the one before: every
token but the first T is scored with T / 2 tokens or more before it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lrt_jax.evaluation.bits_per_byte import bits_per_byte
from lrt_jax.inference import scoring
from lrt_jax.inference.decode import PAD
from lrt_jax.inference.load import Trained
from lrt_jax.inference.text import encode
from lrt_jax.model.model import Model
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import ConfigError, DecodeConfig


class Document(NamedTuple):
    """The score of a document.

    Attributes:
      tokens: how many it has, BOS not counted.
      bytes: of its UTF-8 text.
      nats: their loss, all together.
      fallbacks: of fixed point: chunks that did not converge, and were scored sequentially.
    """

    tokens: int
    bytes: int
    nats: float
    fallbacks: int

    @property
    def bits_per_byte(self) -> float:
        """nats / (ln 2 · bytes)."""
        return bits_per_byte(self.nats, self.bytes)


class _Window(NamedTuple):
    """Tokens of a document, of which the last ``scored`` are."""

    document: int
    tokens: np.ndarray
    scored: int


def total(documents: Sequence[Document]) -> Document:
    """All of them as one."""
    return Document(*(sum(column) for column in zip(*documents, strict=True)))


def read(path: Path) -> str:
    """The text of a file.

    Raises:
      ConfigError: it cannot be read, is not UTF-8 or is empty.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"--text is {str(path)!r}, which cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--text is {str(path)!r}, which is not UTF-8 text") from None
    if not text:
        raise ConfigError(f"--text is {str(path)!r}, which is empty; it must have some text")
    return text


def windows(tokens: np.ndarray, context: int, stride: int) -> Iterator[tuple[np.ndarray, int]]:
    """Windows of a document, and how many of the last tokens of each are scored: every one but BOS exactly once.

    Args:
      tokens: of the document, BOS first.
      context: T: a window has up to T + 1 tokens, the last of which is not read.
      stride: how many tokens a window after the first scores, at most; the rest of it is there to be read.
    """
    done, end = 1, min(len(tokens), context + 1)
    while done < len(tokens):
        yield tokens[max(0, end - context - 1) : end], end - done
        done, end = end, min(len(tokens), end + stride)


def score(
    trained: Trained, texts: Sequence[str], how: DecodeConfig, *, use_memory: bool = True, stride: int | None = None
) -> list[Document]:
    """Scores documents, ``eval.batch_size`` windows at once.

    Args:
      trained: the model.
      texts: the documents.
      how: ``prefill`` says how true recurrence is computed.
      use_memory: False zeroes the memory that the model reads: for ablations.
      stride: see :func:`windows`; None: half a context.

    Raises:
      UserError: a text is none, but bytes that are not UTF-8.
    """
    context, mesh = trained.config.model.sequence_length, trained.mesh
    encoded = [encode(trained.tokenizer, text) for text in texts]
    # Of similar length together, so that little is padded.
    stride = stride or max(1, context // 2)
    cut = [_Window(number, *one) for number, tokens in enumerate(encoded) for one in windows(tokens, context, stride)]
    cut.sort(key=lambda window: -len(window.tokens))
    rows = meshes.whole_rows(mesh, max(1, min(trained.config.eval.batch_size, len(cut))))

    @jax.jit
    def program(model: Model, tokens_BxT: jax.Array, targets_BxT: jax.Array, scored_BxT: jax.Array) -> Any:
        found = scoring.score(model, tokens_BxT, targets_BxT, how, use_memory=use_memory)
        sums = ((found.losses_BxT * scored_BxT).sum(axis=1), found.fallbacks_B)
        return jax.lax.with_sharding_constraint(sums, meshes.replicated(mesh))

    nats, fallbacks = np.zeros(len(texts)), np.zeros(len(texts), int)
    for begin in range(0, len(cut), rows):
        batch = cut[begin : begin + rows]
        columns = meshes.whole_columns(mesh, min(context, 1 << (len(batch[0].tokens) - 2).bit_length()))
        tokens_BxT = np.full((rows, columns), PAD, np.int32)
        targets_BxT, scored_BxT = np.zeros_like(tokens_BxT), np.zeros(tokens_BxT.shape, bool)
        for row, window in enumerate(batch):
            length = len(window.tokens) - 1
            tokens_BxT[row, columns - length :] = window.tokens[:-1]
            targets_BxT[row, columns - length :] = window.tokens[1:]
            scored_BxT[row, columns - window.scored :] = True
        arrays = meshes.global_batch(mesh, (tokens_BxT, targets_BxT, scored_BxT))
        losses_B, fallbacks_B = jax.device_get(program(trained.model, *arrays))
        for row, window in enumerate(batch):
            nats[window.document] += losses_B[row]
            fallbacks[window.document] += fallbacks_B[row]
    return [
        Document(len(tokens) - 1, len(text.encode()), float(nats[number]), int(fallbacks[number]))
        for number, (tokens, text) in enumerate(zip(encoded, texts, strict=True))
    ]
