"""The parts of a corpus, and the documents in each: text and JSON Lines, read as they come.

Nothing of a file is held but the document at hand, however large the file.
"""

import abc
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from lrt_jax.data import compressed
from lrt_jax.data.faults import BadRecords, DataError

WHOLE_JSON = 64 << 20  # bytes up to which a file is looked at as one JSON value


@dataclasses.dataclass(frozen=True)
class Shard(abc.ABC):
    """A part of a corpus."""

    path: str
    name: str  # the path below the corpus's root, the same on every machine
    bad: BadRecords = dataclasses.field(compare=False, repr=False)  # of the whole corpus

    def texts(self) -> Iterator[str]:
        """The shard's documents, in order, none of them empty; without those that ``bad`` leaves out.

        Raises:
          DataError: naming the file and the line, row or byte offset that is unusable.
        """
        try:
            if self.bad.policy == "skip":
                self._require_whole()
            yield from (text for text in self._texts() if text)
        except DataError as error:
            self.bad.leave_out(error)
        except OSError as error:
            self.bad.leave_out(
                DataError(f"config.data.corpus: {self.path} cannot be read ({error.strerror or error}); check it")
            )

    @abc.abstractmethod
    def _texts(self) -> Iterator[str]:
        """What :meth:`texts` says, with empty ones; an error that it raises is one of the whole shard."""

    def _require_whole(self) -> None:
        """Raises what would be found after a part was read: of a damaged shard nothing is used."""
        if compressed.is_compressed(self.path):
            with compressed.opened(self.path) as stream:
                while stream.read(compressed.BLOCK):
                    pass

    def _good(self, records: Iterable[Callable[[], str]]) -> Iterator[str]:
        """The texts of records that are good, each read by a call."""
        for read in records:
            try:
                yield read()
            except DataError as error:
                self.bad.leave_out(error)


@dataclasses.dataclass(frozen=True)
class SourceShard(Shard):
    """A Python source file of the standard library: one document, never cut."""

    def _texts(self) -> Iterator[str]:
        with compressed.opened(self.path) as stream, contextlib.suppress(UnicodeDecodeError):
            yield stream.read().decode()  # the library ships a few that are broken on purpose, for its own tests


@dataclasses.dataclass(frozen=True)
class TextShard(Shard):
    """A text file, cut at line ends into documents of at most ``document_bytes``."""

    document_bytes: int

    def _texts(self) -> Iterator[str]:
        with compressed.opened(self.path) as stream:
            pieces = _cut(stream, self.document_bytes)
            yield from self._good(functools.partial(_decoded, piece, begin, self.path) for begin, piece in pieces)


@dataclasses.dataclass(frozen=True)
class JsonlShard(Shard):
    """A JSON Lines file: one document per line, in the field ``field``; blank lines do not count."""

    field: str

    def _texts(self) -> Iterator[str]:
        with compressed.opened(self.path) as stream:
            yield from self._good(
                functools.partial(self._text, line, f"{self.path}:{number}", begin)
                for number, begin, line in _lines(stream)
            )

    def _text(self, line: bytes, where: str, begin: int) -> str:
        try:
            record = _loads(line)
        except (ValueError, RecursionError) as error:  # broken JSON or broken UTF-8, or nested without end
            at = begin + getattr(error, "pos", getattr(error, "start", 0))
            raise DataError(f"config.data.corpus: {where} is not valid JSON (byte offset {at}: {error})") from None
        if not isinstance(record, dict) or self.field not in record:
            found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"config.data.corpus: {where} has no field {self.field!r} (config.data.text_field); found: {found}"
            )
        return as_text(record[self.field], where, self.field)


def is_one_json_value(path: str, field: str) -> bool:
    """Whether a file holds one JSON value, over lines or not, and no record with the field ``field``: no JSON Lines.

    What cannot be read, or is neither, counts as JSON Lines, whose reader says what is wrong.
    """
    try:
        with compressed.opened(path) as stream:
            first = b""
            while not first.strip() and (first := stream.readline(WHOLE_JSON)):
                pass
            if first.lstrip().startswith(b"["):
                return True
            if _has(field, first):
                return False
            json.loads(first + stream.read(WHOLE_JSON))
    except (DataError, OSError, ValueError, RecursionError):
        return False
    return True


def _loads(line: bytes) -> Any:
    """JSON, with numbers of any length, which Python refuses to convert from some length on."""
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:
        return json.loads(line, parse_int=str)


def _has(field: str, line: bytes) -> bool:
    try:
        record = _loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and field in record


def as_text(value: Any, where: str, field: str) -> str:
    """``value`` if it is valid text, "" if it is null.

    Raises:
      DataError: it is neither.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"config.data.corpus: {where}: {field!r} is {type(value).__name__}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"config.data.corpus: {where}: {field!r} has half of a surrogate pair at character {error.start}; "
            "it must be valid Unicode"
        ) from None
    return value


def _lines(stream: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Number, byte offset and bytes of each line that is not blank."""
    begin = 0
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield number, begin, line.removesuffix(b"\n")
        begin += len(line)


def _cut(stream: BinaryIO, document_bytes: int) -> Iterator[tuple[int, bytes]]:
    """UTF-8 text in pieces of at most ``document_bytes``, cut after a line end, or between characters of a longer line.

    Each comes after its byte offset. A piece depends only on the bytes up to its end and the ``document_bytes`` after
    its start, so that what is appended to a file changes its last piece only.
    """
    data, begin, needed = bytearray(), 0, document_bytes + 3  # a character may go on for 3 bytes
    more = True
    while more:
        while more and len(data) <= needed + compressed.BLOCK:
            block = stream.read(compressed.BLOCK)
            more = bool(block)
            data += block
        start = 0
        while len(data) - start > (needed if more else 0):
            end = min(start + document_bytes, len(data))
            if end < len(data):
                end = data.rfind(b"\n", start, end) + 1 or end
                limit = min(end + 3, len(data))
                while end < limit and data[end] & 0xC0 == 0x80:  # a continuation byte: not between characters
                    end += 1
            yield begin + start, bytes(data[start:end])
            start = end
        del data[:start]
        begin += start


def _decoded(piece: bytes, begin: int, path: str) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"config.data.corpus: {path} has 0x{piece[error.start]:02x} at byte offset {begin + error.start}, which is "
            "not valid UTF-8; text must be UTF-8"
        ) from None
