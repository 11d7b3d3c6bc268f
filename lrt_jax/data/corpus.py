"""Documents from places: the Python standard library, or text, JSONL and Parquet files, local or in a bucket.

A corpus is an ordered list of shards, each small enough to be read whole: a text file, a JSONL file, one row
group of a Parquet file. Order and names depend on the files alone, not on the machine.
"""

import abc
import dataclasses
import functools
import hashlib
import itertools
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from lrt_jax.data import compressed, places
from lrt_jax.data.faults import BadRecords, DataError
from lrt_jax.setup.config import ConfigError, DataConfig
from lrt_jax.setup.paths import bytes_of

# What is taken from a folder; Parquet compresses by itself.
SUFFIXES = (".parquet", *(kind + by for kind in (".txt", ".md", ".py", ".jsonl") for by in ("", ".gz", ".zst")))
NOT_STDLIB = ("site-packages", "dist-packages", "__pycache__", "lib-dynload")  # but in the same folder


@dataclasses.dataclass(frozen=True)
class Shard(abc.ABC):
    """A part of a corpus that is read whole."""

    path: str
    name: str  # the path below the corpus's root, the same on every machine
    bad: BadRecords = dataclasses.field(compare=False, repr=False)  # of the whole corpus

    def documents(self) -> list[str]:
        """The shard's documents, in order, none of them empty; without those that ``bad`` leaves out.

        Raises:
          DataError: naming the file and the line, row or byte offset that is unusable.
        """
        try:
            return [text for text in self._texts() if text]
        except DataError as error:
            self.bad.leave_out(error)
        except OSError as error:
            self.bad.leave_out(
                DataError(f"config.data.corpus: {self.path} cannot be read ({error.strerror or error}); check it")
            )
        return []

    @abc.abstractmethod
    def _texts(self) -> Iterable[str]:
        """What :meth:`documents` says, with empty ones; an error that it raises is one of the whole shard."""

    def _good(self, records: Iterable[Callable[[], str]]) -> Iterator[str]:
        """The texts of records that are good, each read by a call."""
        for read in records:
            try:
                yield read()
            except DataError as error:
                self.bad.leave_out(error)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An ordered list of shards, and what the user called it.

    Attributes:
      source: ``config.data.corpus``.
      shards: its parts.
      bad: the records that are left out of them.
      left_out: a sentence for each file that is no shard, since not even its parts are known.
    """

    source: str
    shards: tuple[Shard, ...]
    bad: BadRecords = dataclasses.field(compare=False, repr=False)
    left_out: tuple[str, ...] = ()


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that ``config.corpus`` names, its shards sorted by name.

    Raises:
      ConfigError: nothing usable lies at that path.
      DataError: the files hold no text, or the first of them is unusable.
    """
    bad = BadRecords(config.on_bad_record)
    if config.corpus == "stdlib":
        root = epath.Path(sysconfig.get_path("stdlib"))
        shards: list[Shard] = [
            SourceShard(path, name, bad) for path, name in _named(_below(root, (".py",), NOT_STDLIB), root)
        ]
    else:
        shards = [shard for path, name in _files(config.corpus) for shard in _shards(path, name, bad, config)]
    left_out = tuple(bad.left_out)
    if not any(shard.documents() for shard in shards):
        raise DataError(f"config.data.corpus is {config.corpus!r}, which holds no text; it must hold documents")
    return Corpus(config.corpus, tuple(shards), bad, left_out)


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is kept for validation, for about ``share`` (0 to 1) of all documents.

    A hash of the text decides: added files move no document from one side to the other, and exact
    duplicates are on the same side.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def training_documents(shards: Iterable[Shard], config: DataConfig) -> Iterator[str]:
    """The documents of ``shards``, in order, that are not held out.

    Raises:
      DataError: at the end, if there was none.
    """
    empty = True
    for shard in shards:
        for text in shard.documents():
            if not is_held_out(text, config.held_out):
                empty = False
                yield text
    if empty:
        raise DataError(
            f"config.data.corpus is {config.corpus!r}, where config.data.held_out = {config.held_out} leaves no "
            "document to train on; lower it, lower config.data.document_bytes or add text"
        )


@dataclasses.dataclass(frozen=True)
class SourceShard(Shard):
    """A Python source file of the standard library: one document, never cut."""

    def _texts(self) -> Iterable[str]:
        try:
            return [compressed.read(self.path).decode()]
        except UnicodeDecodeError:
            return []  # the library ships a few that are broken on purpose, for its own tests


@dataclasses.dataclass(frozen=True)
class TextShard(Shard):
    """A text file, cut at line ends into documents of at most ``document_bytes``."""

    document_bytes: int

    def _texts(self) -> Iterable[str]:
        data = compressed.read(self.path)
        pieces = _cut(data, self.document_bytes)
        return self._good(functools.partial(_decoded, data, piece, self.path) for piece in pieces)


@dataclasses.dataclass(frozen=True)
class JsonlShard(Shard):
    """A JSONL file: one document per line, in the field ``field``; blank lines do not count."""

    field: str

    def _texts(self) -> Iterable[str]:
        lines = compressed.read(self.path).split(b"\n")
        begins = itertools.accumulate((len(line) + 1 for line in lines), initial=0)
        return self._good(
            functools.partial(self._text, line, f"{self.path}:{number}", begin)
            for number, (line, begin) in enumerate(zip(lines, begins, strict=False), 1)
            if line.strip()
        )

    def _text(self, line: bytes, where: str, begin: int) -> str:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # broken JSON or broken UTF-8, or nested without end
            at = begin + getattr(error, "pos", getattr(error, "start", 0))
            raise DataError(f"config.data.corpus: {where} is not valid JSON (byte offset {at}: {error})") from None
        if not isinstance(record, dict) or self.field not in record:
            found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"config.data.corpus: {where} has no field {self.field!r} (config.data.text_field); found: {found}"
            )
        return _as_text(record[self.field], where, self.field)


@dataclasses.dataclass(frozen=True)
class ParquetShard(Shard):
    """One row group of a Parquet file: one document per row, in the column ``column``."""

    column: str
    row_group: int
    begin: int  # where in the file

    def _texts(self) -> Iterable[str]:
        import pyarrow.parquet

        where = f"{self.path}, row group {self.row_group}"
        damaged = f"config.data.corpus: {where} cannot be read (byte offset {self.begin}: %s); it is damaged"
        with epath.Path(self.path).open("rb") as stream:
            try:
                file = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
                column = file.read_row_group(self.row_group, columns=[self.column]).column(self.column)
            except (ValueError, OSError) as error:  # pyarrow.ArrowInvalid; a broken page
                raise DataError(damaged % error) from None
        read: Callable[[Any, str, str], str] = _as_text
        try:
            rows = column.to_pylist()
        except ValueError:  # some row is not UTF-8: each is decoded by itself
            read, rows = _scalar_as_text, column
        return self._good(
            functools.partial(read, row, f"{where}, row {number}", self.column) for number, row in enumerate(rows)
        )


def _scalar_as_text(scalar: Any, where: str, field: str) -> str:
    """:func:`_as_text` of a value of pyarrow's, which does not check text before it is asked for."""
    try:
        value = scalar.as_py()
    except ValueError as error:
        raise DataError(f"config.data.corpus: {where}: {field!r} cannot be read ({error}); it must be UTF-8") from None
    return _as_text(value, where, field)


def _as_text(value: Any, where: str, field: str) -> str:
    """``value`` if it is valid text, "" if it is null."""
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


def _cut(data: bytes, document_bytes: int) -> Iterator[slice]:
    """UTF-8 text in pieces of at most ``document_bytes``, cut after a line end, or between characters of a longer line.

    A piece depends only on the bytes up to its end and the ``document_bytes`` after its start, so that what is
    appended to a file changes its last piece only.
    """
    start = 0
    while start < len(data):
        end = min(start + document_bytes, len(data))
        if end < len(data):
            end = data.rfind(b"\n", start, end) + 1 or end
            while end < len(data) and data[end] & 0xC0 == 0x80:  # a continuation byte: not between characters
                end += 1
        yield slice(start, end)
        start = end


def _decoded(data: bytes, piece: slice, path: str) -> str:
    try:
        return data[piece].decode()
    except UnicodeDecodeError as error:
        at = piece.start + error.start
        raise DataError(
            f"config.data.corpus: {path} has 0x{data[at]:02x} at byte offset {at}, which is not valid UTF-8; text must "
            "be UTF-8"
        ) from None


def _shards(path: str, name: str, bad: BadRecords, config: DataConfig) -> list[Shard]:
    """The shards of one file, by its suffix; a suffix that is not known means text."""
    if path.endswith(".parquet"):
        try:
            return _parquet_shards(path, name, bad, config.text_field)
        except DataError as error:
            bad.leave_out(error)
            return []
    if path.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl"):
        return [JsonlShard(path, name, bad, config.text_field)]
    return [TextShard(path, name, bad, config.document_bytes)]


def _parquet_shards(path: str, name: str, bad: BadRecords, column: str) -> list[Shard]:
    import pyarrow
    import pyarrow.parquet

    try:
        with epath.Path(path).open("rb") as stream:
            file = pyarrow.parquet.ParquetFile(stream)
            columns, groups = file.schema_arrow.names, file.num_row_groups
            described = [file.metadata.row_group(group) for group in range(groups)]
    except (pyarrow.ArrowInvalid, OSError) as error:
        end = bytes_of(path) if epath.Path(path).exists() else 0
        raise DataError(
            f"config.data.corpus: {path} is not a Parquet file (byte offset {end}, its end: {error})"
        ) from None
    if column not in columns:
        raise DataError(
            f"config.data.corpus: {path} has no column {column!r} (config.data.text_field); found: {', '.join(columns)}"
        )
    if (count := columns.count(column)) > 1:
        raise DataError(
            f"config.data.corpus: {path} has {count} columns {column!r} (config.data.text_field); it must have one"
        )
    begins = [
        next((c.data_page_offset for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column), 0)
        for group in described
    ]
    return [ParquetShard(path, f"{name}#{group}", bad, column, group, begins[group]) for group in range(groups)]


def _files(source: str) -> list[tuple[str, str]]:
    """(path, name) of the files that a path or pattern names, by name."""
    root = places.path_of(source, "config.data.corpus")
    if root.is_dir():
        found = _below(root, SUFFIXES)
        allowed = f"a folder must hold files that end in {', '.join(SUFFIXES)}"
    elif root.exists():
        return [(str(root), root.name)]
    else:
        if "**" in source:
            raise ConfigError(f"config.data.corpus is {source!r}; instead of ** name the folder: all below it is read")
        parts = root.parts
        fixed = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
        root = epath.Path(*parts[:fixed])
        matches = root.glob("/".join(parts[fixed:])) if fixed < len(parts) else ()
        found = [path for path in matches if not path.is_dir()]
        allowed = "it must be 'stdlib', a file, a folder or a pattern such as folder/*.jsonl"
    if not found:
        raise ConfigError(f"config.data.corpus is {source!r}, where there is no file to read; {allowed}")
    return _named(found, root)


def _below(folder: epath.Path, suffixes: tuple[str, ...], skip: tuple[str, ...] = ()) -> list[epath.Path]:
    """The files that end so in a folder and its subfolders, without hidden ones and subfolders named in ``skip``."""
    found = []
    try:
        entries = list(folder.iterdir())  # not walk(), whose paths lack the gs:// of a bucket
    except OSError as error:
        raise ConfigError(f"config.data.corpus: {folder} cannot be listed ({error.strerror or error})") from None
    for path in entries:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found += [] if path.name in skip else _below(path, suffixes, skip)
        elif path.name.endswith(suffixes):
            found.append(path)
    return found


def _named(files: Iterable[epath.Path], root: epath.Path) -> list[tuple[str, str]]:
    """(path, name) of each file, sorted by name."""
    return sorted(((str(path), path.relative_to(root).as_posix()) for path in files), key=lambda file: file[1])
