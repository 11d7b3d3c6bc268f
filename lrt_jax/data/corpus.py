"""Documents from places: the Python standard library, or text, JSON Lines and Parquet files, local or in a bucket.

A corpus is an ordered list of shards: a text file, a JSON Lines file, one row group of a Parquet file. Order and names
depend on the files alone, not on the machine.
"""

import collections
import contextlib
import dataclasses
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator

from etils import epath

from lrt_jax.data import compressed, files, kinds, parquet, shards
from lrt_jax.data.begun import Begun
from lrt_jax.data.faults import BadRecords, DataError
from lrt_jax.data.files import File, Found
from lrt_jax.data.shards import Shard
from lrt_jax.setup.config import ConfigError, DataConfig

NOT_STDLIB = frozenset(("site-packages", "dist-packages", "__pycache__", "lib-dynload"))  # but in the same folder
LOOKED_AT = 1 << 20  # characters of a corpus that are read to see that it can be


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An ordered list of shards, and what the user called it.

    Attributes:
      source: ``config.data.corpus``.
      shards: its parts.
      bad: the records that are left out of them.
      left_out: a sentence for each file that is no shard, since not even its parts are known.
      read_as: a line that says how many files are read as what, and how many are not.
    """

    source: str
    shards: tuple[Shard, ...]
    bad: BadRecords = dataclasses.field(compare=False, repr=False)
    left_out: tuple[str, ...] = ()
    read_as: str = ""


def open_corpus(config: DataConfig, begun: Begun | None = None) -> Corpus:
    """The corpus that ``config.corpus`` names, its shards sorted by name; a run that has begun keeps its files.

    Raises:
      ConfigError: nothing usable lies at that path.
      DataError: the files hold no text, the beginning of the first of them is unusable, or they are others than those
        of ``begun``.
    """
    bad = BadRecords(config.on_bad_record)
    as_before = begun is not None and begun.as_before
    found = _stdlib() if config.corpus == "stdlib" else _found(config, as_before)

    def has_no_part(file: File) -> bool:
        return _kind(file, config, as_before) == "parquet" and not _shards(file, "parquet", bad, config)

    chosen = begun.files_of(found, config.corpus, has_no_part) if begun else found.files
    if config.corpus == "stdlib":
        parts: list[Shard] = [shards.SourceShard(file.path, file.name, bad) for file in chosen]
        read_as = f"corpus: the Python standard library, {len(chosen):,} files"
    else:
        by_kind = [(file, _kind(file, config, as_before)) for file in chosen]
        parts = [shard for file, kind in by_kind for shard in _shards(file, kind, bad, config)]
        read_as = _read_as(by_kind, found.not_read)
    left_out = tuple(bad.left_out)
    if not any(_has_text(shard) for shard in parts):
        raise DataError(f"config.data.corpus is {config.corpus!r}, which holds no text; it must hold documents")
    return Corpus(config.corpus, tuple(parts), bad, left_out, read_as)


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is kept for validation, for about ``share`` (0 to 1) of all documents.

    A hash of the text decides: added files move no document from one side to the other, and exact
    duplicates are on the same side.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def training_documents(parts: Iterable[Shard], config: DataConfig) -> Iterator[str]:
    """The documents of ``parts``, in order, that are not held out.

    Raises:
      DataError: at the end, if there was none.
    """
    empty = True
    for shard in parts:
        for text in shard.texts():
            if not is_held_out(text, config.held_out):
                empty = False
                yield text
    if empty:
        raise DataError(
            f"config.data.corpus is {config.corpus!r}, where config.data.held_out = {config.held_out} leaves no "
            "document to train on; lower it, lower config.data.document_bytes or add text"
        )


def _has_text(shard: Shard) -> bool:
    """Whether there is a document in a shard, of which the beginning is read to see that it can be."""
    characters = 0
    for text in shard.texts():
        characters += len(text)
        if characters > LOOKED_AT:
            break
    return characters > 0


def _stdlib() -> Found:
    root = epath.Path(sysconfig.get_path("stdlib"))
    return files.below(root, lambda name: "text" if name.endswith(".py") else None, NOT_STDLIB)


def _found(config: DataConfig, as_before: bool) -> Found:
    """What ``config.corpus`` names; of a folder, what is of a kind that is read."""

    def kind_of(name: str) -> kinds.Kind | None:
        return kinds.kind_of(name) if config.format == "auto" else config.format

    def is_one_value(path: str) -> bool:
        by_suffix = config.format == "auto" and not as_before
        return by_suffix and shards.is_one_json_value(path, config.text_field)

    return files.named(config.corpus, kind_of, is_one_value)


def _kind(file: File, config: DataConfig, as_before: bool) -> kinds.Kind:
    """How a file is read.

    Raises:
      ConfigError: its suffix does not say.
      DataError: it is a pipe, a socket or a device.
    """
    kind = kinds.kind_before(file.name) if as_before else kinds.kind_of(file.name)
    kind = kind if config.format == "auto" else config.format
    if kind is None:
        with contextlib.suppress(OSError):
            compressed.require_regular(file.path)
        suffix = kinds.suffix_of(file.name)
        raise ConfigError(
            f"config.data.corpus: {file.path} has {f'the suffix {suffix!r}' if suffix else 'no suffix'}, which does "
            f"not say what it holds; {kinds.ALLOWED}; or say it by config.data.format ('text', 'jsonl', 'parquet')"
        )
    return kind


def _shards(file: File, kind: kinds.Kind, bad: BadRecords, config: DataConfig) -> list[Shard]:
    """The shards of one file; none where that is unreadable, and left out."""
    if kind == "text":
        return [shards.TextShard(file.path, file.name, bad, config.document_bytes)]
    if kind == "jsonl":
        return [shards.JsonlShard(file.path, file.name, bad, config.text_field)]
    try:
        return [*parquet.shards_of(file.path, file.name, bad, config.text_field)]
    except DataError as error:
        bad.leave_out(error)
    except OSError as error:
        bad.leave_out(
            DataError(f"config.data.corpus: {file.path} cannot be read ({error.strerror or error}); check it")
        )
    return []


def _read_as(by_kind: list[tuple[File, kinds.Kind]], not_read: collections.Counter[str]) -> str:
    parts = []
    for kind, title in kinds.TITLES.items():
        suffixes = collections.Counter(kinds.suffix_of(file.name) for file, its in by_kind if its == kind)
        if suffixes:
            parts.append(
                f"{suffixes.total():,} file{'s'[: suffixes.total() - 1]} as {title} ({files.counted(suffixes)})"
            )
    read = f"corpus: {', '.join(parts)}"
    return f"{read}; not read: {files.counted(not_read)}" if not_read else read
