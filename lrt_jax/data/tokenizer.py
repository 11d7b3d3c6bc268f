"""SentencePiece: a byte-complete BPE vocabulary, trained on the corpus, that loses nothing of any text."""

import hashlib
import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece
from etils import epath

from lrt_jax.data import normalizer, places
from lrt_jax.data.corpus import Corpus, training_documents
from lrt_jax.data.faults import DataError
from lrt_jax.setup.config import Config, ConfigError
from lrt_jax.setup.errors import writing

FILE = "tokenizer.model"  # in the work dir
SPECIALS = 2  # <unk> and <s>
SPACE = "\u2581"  # SentencePiece writes a space so, and takes a literal one for a space
SENTENCE = 2000  # characters; SentencePiece drops sentences that are longer than it is told to expect
ENCODED = 1 << 21  # characters of a document that are encoded as one
# Text that vocabularies not made for lossless coding change: spaces, line ends, NUL, reserved names, rare characters.
PROBE = " two  spaces\t\r\n\n<s> <unk> <0x0A> \x00 \u2581 \ufb01 \u00e9 e\u0301 \uff21 \U0001f600 end "


class Tokenizer:
    """Text to token ids and back, without loss for any valid Unicode.

    Attributes:
      model: the serialized SentencePiece model.
      sha256: of ``model``, in hex.
      vocab_size: V, the number of tokens.
      bos_id: the id of the token that begins a document.
      token_bytes: int32 [V], how many UTF-8 bytes each token stands for; 0 for special tokens.
    """

    def __init__(self, model: bytes):
        """Loads a serialized SentencePiece model.

        Raises:
          ValueError: ``model`` is not one, or has no beginning-of-sentence token or no byte fallback.
        """
        if not model:  # which SentencePiece takes for "not loaded yet"
            raise ValueError("is empty")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError("is not a SentencePiece model") from None
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self._pieces = [self._piece_bytes(i) for i in range(self.vocab_size)]
        self.token_bytes = np.array([len(piece) for piece in self._pieces], np.int32)
        byte_ids = {self._pieces[i]: i for i in range(self.vocab_size) if self._processor.is_byte(i)}
        if self.bos_id < 0 or len(byte_ids) < 256:
            raise ValueError("has no token for the beginning of a document, or none for some byte")
        self._space_ids = np.array([byte_ids[bytes([byte])] for byte in SPACE.encode()], np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 [n], of ``text``, with no token for the beginning of a document."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """:meth:`encode` of each text, on all cores."""
        parts = [[list(_cut(part)) for part in text.split(SPACE)] for text in texts]
        flat = [piece for split in parts for pieces in split for piece in pieces]
        encoded = iter(self._processor.encode(flat, out_type="numpy", num_threads=-1))
        rows = []
        for split in parts:
            ids: list[np.ndarray] = []
            for i, pieces in enumerate(split):
                ids += [self._space_ids] if i else []
                ids += [np.asarray(next(encoded), np.int32) for _ in pieces]
            rows.append(np.concatenate(ids) if len(ids) > 1 else ids[0])
        return rows

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ``ids`` (each 0 to V - 1); bytes that make no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The UTF-8 bytes of ``ids`` (each 0 to V - 1), ``token_bytes[ids].sum()`` of them."""
        return b"".join([self._pieces[i] for i in ids])

    def _piece_bytes(self, i: int) -> bytes:
        piece = self._processor.id_to_piece(i)
        if self._processor.is_byte(i):
            return bytes([int(piece[1:-1], 16)])
        if self._processor.is_control(i) or self._processor.is_unknown(i):
            return b""
        return piece.replace(SPACE, " ").encode()


def train(documents: Iterable[str], vocab_size: int) -> bytes:
    """A serialized SentencePiece BPE model of exactly ``vocab_size`` tokens; the same input gives the same bytes.

    Raises:
      ConfigError: the text does not allow that vocabulary size.
      DataError: there is no text.
    """
    model = io.BytesIO()
    raised: list[BaseException] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(documents, raised),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * SENTENCE,
            unk_id=0,
            bos_id=1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise (raised[0] if raised else _explained(str(error), vocab_size)) from None
    return model.getvalue()


def load_or_train(config: Config, corpus: Corpus, workdir: epath.PathLike) -> Tokenizer:
    """The work dir's tokenizer; where there is none yet, ``config.data.tokenizer`` or a new one, for :func:`keep`.

    A new one is trained on about ``config.data.tokenizer_bytes`` of documents that are not held out, from
    shards in an order shuffled by ``config.seed``.

    Raises:
      ConfigError: ``config.data.tokenizer`` or ``config.model.vocab_size`` does not fit, or the former is another
        than the work dir's.
      DataError: there are no documents to train on.
    """
    kept = epath.Path(workdir) / FILE
    if kept.exists():
        model = bytes_kept(workdir)
        if config.data.tokenizer and _bytes_given(config) not in (None, model):
            raise ConfigError(
                f"config.data.tokenizer is {config.data.tokenizer!r}, another tokenizer than {kept}, which the work "
                "dir was begun with; there must be a copy of that, or use another --workdir"
            )
        return checked(model, str(kept), config)
    if config.data.tokenizer:
        return given(config)
    shards = list(corpus.shards)
    random.Random(config.seed).shuffle(shards)
    documents = _first_bytes(training_documents(shards, config.data), config.data.tokenizer_bytes)
    return Tokenizer(train(documents, config.model.vocab_size))


def given(config: Config) -> Tokenizer:
    """The tokenizer that ``config.data.tokenizer`` names.

    Raises:
      ConfigError: there is none, or it does not fit the config.
    """
    model = _bytes_given(config)
    if model is None:
        raise ConfigError(
            f"config.data.tokenizer is {config.data.tokenizer!r}, where there is no file; it must be a "
            "SentencePiece model, or '' to train one"
        )
    return checked(model, config.data.tokenizer, config)


def _bytes_given(config: Config) -> bytes | None:
    """The bytes of the file that ``config.data.tokenizer`` names; None where there is none."""
    path = places.path_of(config.data.tokenizer, "config.data.tokenizer")
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise ConfigError(
            f"config.data.tokenizer is {config.data.tokenizer!r}, which cannot be read ({error.strerror or error}); "
            "it must be a SentencePiece model"
        ) from None


def keep(tokenizer: Tokenizer, workdir: epath.PathLike) -> None:
    """Puts a tokenizer into a work dir, unless it has one already."""
    kept = epath.Path(workdir) / FILE
    if kept.exists():
        return
    with writing(workdir):
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_name(FILE + ".tmp")
        unfinished.write_bytes(tokenizer.model)
        unfinished.replace(kept)


def load(workdir: epath.PathLike, config: Config) -> Tokenizer:
    """The tokenizer that a work dir keeps.

    Raises:
      ConfigError: there is none, or it does not fit the config.
    """
    kept = epath.Path(workdir) / FILE
    if not kept.exists():
        raise ConfigError(
            f"--workdir is {str(workdir)!r}, which has no {FILE}; it must be the work dir of a run, or of an "
            "import with --tokenizer"
        )
    return checked(bytes_kept(workdir), str(kept), config)


def bytes_kept(workdir: epath.PathLike) -> bytes:
    """The bytes of the tokenizer that a work dir keeps.

    Raises:
      ConfigError: they cannot be read.
    """
    kept = epath.Path(workdir) / FILE
    try:
        return kept.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{kept} cannot be read ({error.strerror or error}); it must be the run's tokenizer"
        ) from None


def checked(model: bytes, path: str, config: Config) -> Tokenizer:
    """The tokenizer of a model file, once it is known to fit the config and to be lossless.

    Raises:
      ConfigError: naming ``path``, what was found and what is allowed.
    """
    try:
        tokenizer = Tokenizer(model)
    except ValueError as error:
        raise ConfigError(
            f"the tokenizer {path} {error}; it must be a SentencePiece model trained with byte_fallback"
        ) from None
    if tokenizer.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"config.model.vocab_size is {config.model.vocab_size}, but the tokenizer {path} has "
            f"{tokenizer.vocab_size} tokens; allowed is {tokenizer.vocab_size}"
        )
    changes = normalizer.changes(model)
    if changes or tokenizer.decode(tokenizer.encode(PROBE)) != PROBE:
        how = f" ({', '.join(changes)})" if changes else ""
        raise ConfigError(
            f"the tokenizer {path} changes text{how}; it must be trained with byte_fallback, identity normalization "
            "and neither dummy prefix nor removal of whitespace"
        )
    return tokenizer


def _sentences(documents: Iterable[str], raised: list[BaseException]) -> Iterator[str]:
    """Pieces of documents. SentencePiece turns what reading them raises into its own error: here it is kept."""
    try:
        for text in documents:
            for start in range(0, len(text), SENTENCE):
                yield text[start : start + SENTENCE]
    except GeneratorExit:
        raise
    except BaseException as error:  # a signal that asks to stop, too
        raised.append(error)
        raise


def _cut(text: str) -> Iterator[str]:
    """Text in pieces that SentencePiece can hold, which needs 40 bytes for each; cut where words begin, as it does."""
    begin = 0
    while len(text) - begin > ENCODED:
        end = text.rfind(" ", begin + 1, begin + ENCODED)
        while end > begin + 1 and text[end - 1] == " ":
            end -= 1
        end = end if end > begin else begin + ENCODED
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _first_bytes(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Whole documents until together they have ``limit`` UTF-8 bytes."""
    for text in documents:
        yield text
        limit -= len(text.encode())
        if limit <= 0:
            return


def _explained(message: str, vocab_size: int) -> ValueError:
    """What SentencePiece's message means to the user."""
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        allowed = f"its characters, 256 bytes and {SPECIALS} special tokens need {match[1]} or more"
    elif match := re.search(r"set it to a value <= (\d+)", message):
        allowed = f"this little text allows {match[1]} or less"
    else:
        return DataError(f"config.data.corpus gives no text to train a tokenizer on (SentencePiece: {message})")
    return ConfigError(f"config.model.vocab_size is {vocab_size}, which does not fit the tokenizer's text: {allowed}")
