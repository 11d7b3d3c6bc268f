"""The files that a path, a folder or a pattern names, each of them once, whatever links there are."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from etils import epath

from lrt_jax.data import kinds, places
from lrt_jax.data.faults import DataError
from lrt_jax.setup.config import ConfigError
from lrt_jax.setup.paths import bytes_of

FIELD = "config.data.corpus"
KindOf = Callable[[str], kinds.Kind | None]
AT_ONCE = 32  # files that are asked about at once: a bucket takes its time for each
# Why a file in a folder is not read, beside its suffix.
LINKED, HIDDEN, OF_A_TOOL, NOT_LINES = "links to what is read", "hidden", "other tools'", ".json of one value"


@dataclasses.dataclass(frozen=True, order=True)
class File:
    """A file of a corpus: its path below the corpus's root, the same wherever that lies, and where it lies."""

    name: str
    path: str


@dataclasses.dataclass(frozen=True)
class Found:
    """What a source names.

    Attributes:
      root: the folder that the names begin at.
      files: sorted by name.
      not_read: how many files of a folder are not read, by the reason.
    """

    root: str
    files: tuple[File, ...]
    not_read: collections.Counter[str]


def named(source: str, kind_of: KindOf, is_one_value: Callable[[str], bool]) -> Found:
    """The files that a path, a folder or a pattern names.

    Args:
      source: of the config.
      kind_of: how a file is read, by its name; None: of a folder it is not.
      is_one_value: whether a JSON file, by its path, holds no records.

    Raises:
      ConfigError: there is none, or a folder cannot be listed.
      DataError: a file that is named, or matched, holds one JSON value.
    """
    root = places.path_of(source, FIELD)
    kind = places.at(root, FIELD, source)
    if kind == "folder":
        found = below(root, kind_of)
        found = _without(_single_values(found, is_one_value), found)
        allowed = f"in a folder, {kinds.ALLOWED}"
        if found.not_read:
            allowed += f"; not read are {counted(found.not_read)}"
    elif kind == "file":
        found = Found(str(root.parent), (File(root.name, str(root)),), collections.Counter())
    else:
        found = _matching(root, source, kind_of)
        allowed = "it must be 'stdlib', a file, a folder or a pattern such as folder/*.jsonl"
        with contextlib.suppress(OSError, ValueError):  # where it is no link
            allowed = f"it is a link to {Path(root).readlink()}, which is not there"
    if kind != "folder":
        for file in _single_values(found, is_one_value):
            raise DataError(
                f"{FIELD}: {file.path} is one JSON value, and no JSON Lines: it must have a record on each line, as "
                f"`jq -c '.[]'` writes an array"
            )
    if not found.files:
        raise ConfigError(f"{FIELD} is {source!r}, where there is no file to read; {allowed}")
    return found


def below(root: epath.Path, kind_of: KindOf, skip: frozenset[str] = frozenset()) -> Found:
    """The files of a kind in a folder and its subfolders, without hidden ones and what is called as in ``skip``."""
    walk = _Walk(root, kind_of, skip)
    if "://" in str(root):
        walk.bucket(root, "")
    else:
        walk.local()
    return Found(str(root), tuple(sorted(walk.files)), walk.not_read)


def sizes(paths: Iterable[str]) -> dict[str, int | None]:
    """The bytes of each file; None where they cannot be told, which is for its reader to say."""
    paths = list(paths)
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(paths, pool.map(_size, paths), strict=True))


def counted(counter: collections.Counter[str], shown: int = 6) -> str:
    """``.pdf 3, hidden 1``."""
    parts = [f"{what or 'no suffix'} {count:,}" for what, count in counter.most_common(shown)]
    if rest := counter.total() - sum(count for _, count in counter.most_common(shown)):
        parts.append(f"others {rest:,}")
    return ", ".join(parts)


class _Walk:
    """A walk through a folder. Links come last, so that a file is known by its own name if it has one there."""

    def __init__(self, root: epath.Path, kind_of: KindOf, skip: frozenset[str]):
        self.files: list[File] = []
        self.not_read: collections.Counter[str] = collections.Counter()
        self._root, self._kind_of, self._skip = str(root), kind_of, skip
        self._links: list[tuple[str, str, str]] = []  # name, path, and the real path of the folder that it lies in
        self._seen: set[str] = set()  # real paths of folders and files

    def bucket(self, folder: epath.Path, prefix: str) -> None:
        for path in places.listed(folder):  # not walk(), whose paths lack the gs:// of a bucket
            if self._leaves_out(path.name):
                continue
            if path.is_dir():
                self.bucket(path, f"{prefix}{path.name}/")
            else:
                self._take(prefix + path.name, str(path))

    def local(self) -> None:
        real_root = os.path.realpath(self._root)
        self._tree(self._root, "", real_root)
        while self._links:
            self._links.sort(reverse=True)
            name, path, above = self._links.pop()
            real = os.path.realpath(path)
            holds_it = any(_is_within(place, real) for place in (real_root, above))
            if real in self._seen or holds_it:
                self.not_read[LINKED] += 1
            elif Path(path).is_dir():
                self._tree(path, name + "/", real)
            else:
                self._seen.add(real)
                self._take(name, path)

    def _tree(self, folder: str, prefix: str, real: str) -> None:
        """All below a folder but what is behind links, which are put by."""
        pending = [(folder, prefix, real)]
        while pending:
            folder, prefix, real = pending.pop()
            if real in self._seen:
                continue
            self._seen.add(real)
            for entry in _scanned(folder):
                name, below = prefix + entry.name, _below(real, entry.name)
                if self._leaves_out(entry.name):
                    continue
                if entry.is_symlink():
                    self._links.append((name, entry.path, real))
                elif entry.is_dir():
                    pending.append((entry.path, name + "/", below))
                elif below not in self._seen:
                    self._seen.add(below)
                    self._take(name, entry.path)

    def _leaves_out(self, name: str) -> bool:
        if kinds.is_hidden(name):
            self.not_read[HIDDEN] += 1
        return kinds.is_hidden(name) or name in self._skip

    def _take(self, name: str, path: str) -> None:
        kind = self._kind_of(name)
        if kinds.is_of_a_tool(name, kind):
            self.not_read[OF_A_TOOL] += 1
        elif kind is not None:
            self.files.append(File(name, path))
        else:
            self.not_read[kinds.suffix_of(name)] += 1


def _matching(path: epath.Path, source: str, kind_of: KindOf) -> Found:
    """The files that match a pattern; what exists under a name with brackets is no pattern."""
    if "**" in source:
        raise ConfigError(f"{FIELD} is {source!r}; instead of ** name the folder: all below it is read")
    parts = path.parts
    fixed = next((i for i in range(len(parts)) if set(parts[i]) & set("*?[") and not _exists(parts[: i + 1])), None)
    if fixed is None:
        return Found(str(path.parent), (), collections.Counter())
    root = epath.Path(*parts[:fixed])
    level = [("", root)]
    for pattern in parts[fixed:]:
        level = [
            (f"{name}/{entry.name}".lstrip("/"), entry)
            for name, folder in level
            if places.at(folder, FIELD, source) == "folder"
            for entry in places.listed(folder)
            if fnmatch.fnmatchcase(entry.name, pattern) and (pattern[0] == "." or not kinds.is_hidden(entry.name))
        ]
    asked_for = any(pattern.startswith("_") for pattern in parts[fixed:])
    files = [
        File(name, str(entry))
        for name, entry in level
        if (asked_for or not kinds.is_of_a_tool(name, kind_of(name))) and places.at(entry, FIELD, source) != "folder"
    ]
    return Found(str(root), tuple(sorted(_each_once(files, str(root)))), collections.Counter())


def _each_once(files: list[File], root: str) -> Iterator[File]:
    """Files without those that a link names once more: what lies there itself comes before what is linked to."""
    if "://" in root:
        yield from files
        return
    real_root, seen = os.path.realpath(root), set()
    real = {file: os.path.realpath(file.path) for file in files}
    for file in sorted(files, key=lambda file: (real[file] != _below(real_root, file.name), file.name)):
        if real[file] not in seen:
            seen.add(real[file])
            yield file


def _single_values(found: Found, is_one_value: Callable[[str], bool]) -> list[File]:
    """Files of JSON that hold no records: other tools describe a data set so."""
    asked = [file for file in found.files if kinds.uncompressed(file.name.lower()).endswith(".json")]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        answers = pool.map(lambda file: is_one_value(file.path), asked)
        return [file for file, one_value in zip(asked, answers, strict=True) if one_value]


def _without(left_out: list[File], found: Found) -> Found:
    files = tuple(file for file in found.files if file not in left_out)
    return Found(found.root, files, found.not_read + collections.Counter({NOT_LINES: len(left_out)}))


def _scanned(folder: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise places.cannot_be_listed(folder, error) from None


def _is_within(path: str, folder: str) -> bool:
    return _below(path, "").startswith(_below(folder, ""))


def _below(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def _exists(parts: tuple[str, ...]) -> bool:
    try:
        return epath.Path(*parts).exists()
    except OSError:
        return False


def _size(path: str) -> int | None:
    try:
        return bytes_of(path)
    except OSError:
        return None
