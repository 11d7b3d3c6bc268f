"""Documents from places: the Python standard library, or text, JSONL and Parquet files, local or in a bucket.

A corpus is an ordered list of shards, each small enough to be read whole: a text file, a JSONL file, one row
group of a Parquet file. Order and names depend on the files alone, not on the machine.
"""

import abc
import dataclasses
import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from lrt_jax.setup.config import ConfigError, DataConfig
from lrt_jax.setup.errors import UserError

# What is taken from a folder; Parquet compresses by itself.
SUFFIXES = (".parquet", *(kind + by for kind in (".txt", ".md", ".py", ".jsonl") for by in ("", ".gz", ".zst")))
NOT_STDLIB = ("site-packages", "dist-packages", "__pycache__", "lib-dynload")  # but in the same folder


class DataError(UserError, ValueError):
    """The corpus holds something unusable, or too little; one sentence says what and where."""


@dataclasses.dataclass(frozen=True)
class Shard(abc.ABC):
    """A part of a corpus that is read whole."""

    path: str
    name: str  # the path below the corpus's root, the same on every machine

    def documents(self) -> list[str]:
        """The shard's documents, in order, none of them empty.

        Raises:
          DataError: naming the file and the line, row or byte offset that is unusable.
        """
        return [text for text in self._texts() if text]

    @abc.abstractmethod
    def _texts(self) -> Iterable[str]:
        """What :meth:`documents` says, with empty ones."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An ordered list of shards, and what the user called it."""

    source: str  # config.data.corpus
    shards: tuple[Shard, ...]


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that ``config.corpus`` names, its shards sorted by name.

    Raises:
      ConfigError: nothing usable lies at that path.
      DataError: the files hold no text, or the first of them is unusable.
    """
    if config.corpus == "stdlib":
        root = epath.Path(sysconfig.get_path("stdlib"))
        shards: list[Shard] = [
            SourceShard(path, name) for path, name in _named(_below(root, (".py",), NOT_STDLIB), root)
        ]
    else:
        shards = [shard for path, name in _files(config.corpus) for shard in _shards(path, name, config)]
    if not any(shard.documents() for shard in shards):
        raise DataError(f"config.data.corpus is {config.corpus!r}, which holds no text; it must hold documents")
    return Corpus(config.corpus, tuple(shards))


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
            return [_read(self.path).decode()]
        except UnicodeDecodeError:
            return []  # the library ships a few that are broken on purpose, for its own tests


@dataclasses.dataclass(frozen=True)
class TextShard(Shard):
    """A text file, cut at line ends into documents of at most ``document_bytes``."""

    document_bytes: int

    def _texts(self) -> Iterable[str]:
        return _cut(_read(self.path), self.path, self.document_bytes)


@dataclasses.dataclass(frozen=True)
class JsonlShard(Shard):
    """A JSONL file: one document per line, in the field ``field``; blank lines do not count."""

    field: str

    def _texts(self) -> Iterable[str]:
        lines = _read(self.path).split(b"\n")
        return (self._text(line, f"{self.path}:{number}") for number, line in enumerate(lines, 1) if line.strip())

    def _text(self, line: bytes, where: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:  # broken JSON or broken UTF-8
            raise DataError(f"config.data.corpus: {where} is not valid JSON ({error})") from None
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

    def _texts(self) -> Iterable[str]:
        import pyarrow.parquet

        where = f"{self.path}, row group {self.row_group}"
        with epath.Path(self.path).open("rb") as stream:
            try:
                group = pyarrow.parquet.ParquetFile(stream).read_row_group(self.row_group, columns=[self.column])
                values = group.column(self.column).to_pylist()
            except ValueError as error:  # pyarrow.ArrowInvalid, or text that is not UTF-8
                raise DataError(f"config.data.corpus: {where} cannot be read ({error}); it is damaged") from None
        return (_as_text(value, f"{where}, row {number}", self.column) for number, value in enumerate(values))


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


def _cut(data: bytes, path: str, document_bytes: int) -> list[str]:
    """Text in pieces of at most ``document_bytes``, cut after a line end, or between characters of a longer line.

    A piece depends only on the bytes up to its end and the ``document_bytes`` after its start, so that what is
    appended to a file changes its last piece only.
    """
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"config.data.corpus: {path} has 0x{data[error.start]:02x} at byte offset {error.start}, which is not "
            "valid UTF-8; text must be UTF-8"
        ) from None
    pieces = []
    start = 0
    while start < len(data):
        end = min(start + document_bytes, len(data))
        if end < len(data):
            end = data.rfind(b"\n", start, end) + 1 or end
            while end < len(data) and data[end] & 0xC0 == 0x80:  # a continuation byte: not between characters
                end += 1
        pieces.append(data[start:end].decode())
        start = end
    return pieces


def _read(path: str) -> bytes:
    """A file's bytes, decompressed."""
    data = epath.Path(path).read_bytes()
    try:
        if path.endswith(".gz"):
            return gzip.decompress(data)
        return _unzstd(data) if path.endswith(".zst") else data
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"config.data.corpus: {path} cannot be decompressed ({error}); it is damaged") from None


def _unzstd(data: bytes) -> bytes:
    """All frames of ``data``; unlike zstandard's readers it notices that the last one is cut off (EOFError)."""
    import zstandard

    frames = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            frames.append(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        if not frame.eof:
            raise EOFError("zstd: the end is missing")
        data = frame.unused_data
    return b"".join(frames)


def _shards(path: str, name: str, config: DataConfig) -> list[Shard]:
    """The shards of one file, by its suffix; a suffix that is not known means text."""
    if path.endswith(".parquet"):
        return _parquet_shards(path, name, config.text_field)
    if path.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl"):
        return [JsonlShard(path, name, config.text_field)]
    return [TextShard(path, name, config.document_bytes)]


def _parquet_shards(path: str, name: str, column: str) -> list[Shard]:
    import pyarrow
    import pyarrow.parquet

    with epath.Path(path).open("rb") as stream:
        try:
            file = pyarrow.parquet.ParquetFile(stream)
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"config.data.corpus: {path} is not a Parquet file ({error})") from None
        columns, groups = file.schema_arrow.names, file.num_row_groups
    if column not in columns:
        raise DataError(
            f"config.data.corpus: {path} has no column {column!r} (config.data.text_field); found: {', '.join(columns)}"
        )
    return [ParquetShard(path, f"{name}#{group}", column, group) for group in range(groups)]


def _files(source: str) -> list[tuple[str, str]]:
    """(path, name) of the files that a path or pattern names, by name."""
    root = epath.Path(source).expanduser()
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
    for path in folder.iterdir():  # not walk(), whose paths lack the gs:// of a bucket
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
