"""The corpus as tokens, written once: fixed-length rows that any process can read by a global index.

Documents, each with BOS in front, are concatenated in the corpus's order. Row r holds the T + 1 tokens from r T on,
so that every token is a target once; the last row runs on into the first. Nothing depends on how many processes
wrote the files or read them: a place in the data is one number.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from lrt_jax.data import files
from lrt_jax.data.begun import Begun
from lrt_jax.data.corpus import Corpus, is_held_out
from lrt_jax.data.faults import DataError
from lrt_jax.data.shards import Shard
from lrt_jax.data.tokenizer import Tokenizer
from lrt_jax.setup import processes, schema
from lrt_jax.setup.config import NAMED, UNNAMED, Config, DataConfig
from lrt_jax.setup.errors import writing
from lrt_jax.setup.paths import LocalPath, bytes_of

FOLDER = "tokens"  # in the work dir
INDEX = "index.json"  # written last: where it lies, the files are complete
RULES = "read_as"  # in the index; where it is missing, files were read by the rules of before there were several
SOURCES = "sources.json"  # written first: how many bytes each file of the corpus had
# Files of a corpus with that many shards: few enough to open, enough for every process to write some.
PARTS = 256
AGAIN = "remove {}, and the same command makes the tokens again"
GO_ON = "the tokens beside it are complete: remove that file alone, and sizes are no longer compared"
ENCODED_AT_ONCE = 1 << 21  # characters
LEFT_OUT = ".left_out"  # ends the name of a file that lists, for one of tokens, the bad records that are not in it


class Records:
    """Rows of T + 1 tokens, read where they lie. ``records[r]`` is int32 [T + 1].

    Attributes:
      name: a digest of corpus, tokenizer and what makes tokens of one with the other.
      tokenizer: the SHA-256 of the tokenizer that made the tokens, in hex.
      tokens: how many tokens there are.
      left_out: how many records of the corpus were bad and left out, as ``*.left_out`` beside the tokens names them.
    """

    def __init__(self, folder: epath.Path, index: dict[str, Any], tokenizer: str, sequence_length: int):
        """Opens what :func:`prepare` wrote, of which ``index`` says what there is."""
        self.name: str = index["name"]
        self.tokenizer = tokenizer
        self.left_out: int = index["left_out"]
        self._length, self._dtype = sequence_length, np.dtype(index["dtype"])
        self._files = [str(folder / _file(part)) for part in range(len(index["tokens"]))]
        self._begins = [0, *itertools.accumulate(index["tokens"])]
        self.tokens: int = self._begins[-1]
        for file, count in zip(self._files, index["tokens"], strict=True):
            _check_size(epath.Path(file), count * self._dtype.itemsize)

    def __len__(self) -> int:
        return -(-self.tokens // self._length)

    def __getitem__(self, row: int) -> np.ndarray:
        begin, missing, pieces = (row % len(self)) * self._length, self._length + 1, []
        while missing:
            piece = self._read(begin % self.tokens, missing)
            pieces.append(piece)
            begin, missing = begin + len(piece), missing - len(piece)
        return np.concatenate(pieces).astype(np.int32)

    def _read(self, begin: int, count: int) -> np.ndarray:
        """Up to ``count`` tokens from ``begin``, which end with their file."""
        part = bisect.bisect_right(self._begins, begin) - 1
        first = begin - self._begins[part]
        count = min(count, self._begins[part + 1] - begin)
        file = self._files[part]
        try:  # opened for each row: a map of each file would hold a descriptor of each
            found = np.fromfile(file, self._dtype, count, offset=first * self._dtype.itemsize)
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}); was the work dir removed?") from None
        if len(found) < count:
            _check_size(epath.Path(file), (self._begins[part + 1] - self._begins[part]) * self._dtype.itemsize)
        return found


def prepare(config: Config, corpus: Corpus, tokenizer: Tokenizer, workdir: epath.PathLike) -> Records:
    """The records of a work dir, written first where they are not complete; all processes share the writing.

    Raises:
      DataError: a shard is unusable, there is no document to train on, or a file has changed since.
    """
    name = _name(config.data, corpus, tokenizer)
    folder = LocalPath(workdir) / FOLDER / name
    parts = [list(part) for part in np.array_split(np.arange(len(corpus.shards)), min(PARTS, len(corpus.shards)))]
    index = processes.from_first(lambda: _index_of_unchanged(folder, corpus, parts))
    if not index:
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        processes.together(lambda: _write_share(folder, config.data, corpus, tokenizer, parts, dtype))
        index = processes.from_first(lambda: _finish(folder, config.data, corpus, name, len(parts), dtype))
    return Records(folder, json.loads(index), tokenizer.sha256, config.model.sequence_length)


def begun(workdir: epath.PathLike, name: str | None, *, binding: bool = True) -> Begun | None:
    """The files that records of a work dir, by their name, were made of, and whether the run is bound to them.

    None where that is not known, or they are not complete.

    Raises:
      DataError: what was noted of them is damaged.
    """
    folder = epath.Path(workdir) / FOLDER / (name or "")
    if name is None or not ((folder / INDEX).exists() and (folder / SOURCES).exists()):
        return None
    sizes = json.loads(_checked(folder / SOURCES, (), GO_ON))
    index = json.loads(_checked(folder / INDEX, (), AGAIN.format(folder)))
    return Begun(sizes, as_before=RULES not in index, binding=binding)


def _name(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer) -> str:
    """Whatever changes the tokens changes the name: of the config what the annotations of ``DataConfig`` say."""
    named, unnamed = (schema.marked(type(config), mark) for mark in (NAMED, UNNAMED))
    newer = [field.name for field in dataclasses.fields(config) if field.name not in (*named, *unnamed)]
    while newer and getattr(config, newer[-1]) == getattr(type(config), newer[-1]):
        newer.pop()
    parts = [hashlib.blake2b(tokenizer.model).hexdigest(), *(getattr(config, name) for name in (*named, *newer))]
    text = json.dumps([*parts, [shard.name for shard in corpus.shards]])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _index_of_unchanged(folder: epath.Path, corpus: Corpus, parts: list[list[int]]) -> bytes:
    """The index, once the corpus's files are known to have the sizes of before; empty where there is none yet.

    Tokens without an index belong to no run yet: those of files that were mended meanwhile are made again. Where no
    sizes were noted, nothing is compared.

    Raises:
      DataError: a file has another size than when its tokens were made; or what was noted of them is damaged.
    """
    again = AGAIN.format(folder)
    index = _checked(folder / INDEX, ("name", "dtype", "tokens", "left_out"), again)
    before = json.loads(_checked(folder / SOURCES, (), GO_ON if index else again) or b"{}")
    names: dict[str, str] = {}
    for shard in corpus.shards:
        names.setdefault(shard.path, shard.name)  # of several shards of a file the first
    sizes = files.sizes(names)
    noted = {path: before.get(name) for path, name in names.items()}
    changed = {path: size for path, size in noted.items() if None not in (size, sizes[path]) and size != sizes[path]}
    if not index:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for part, shards in enumerate(parts):
                if any(corpus.shards[shard].path in changed for shard in shards):
                    for path in (folder / _file(part), (folder / _file(part)).with_suffix(LEFT_OUT)):
                        path.unlink(missing_ok=True)
            unfinished = folder / (SOURCES + ".tmp")
            unfinished.write_text(json.dumps({name: sizes[path] for path, name in names.items()}))
            unfinished.replace(folder / SOURCES)
    elif changed:
        path, size = next(iter(changed.items()))
        more = f" ({len(changed) - 1} more have changed too)" if len(changed) > 1 else ""
        raise DataError(
            f"config.data.corpus: {path} has {sizes[path]:,} bytes, but had {size:,} when its tokens were made{more}; "
            f"put that file back, begin anew in another --workdir, or remove {folder}, to go on with other rows"
        )
    return index


def _checked(path: epath.Path, fields: tuple[str, ...], mend: str) -> bytes:
    """A file with one JSON object that has these fields; empty where there is none.

    Raises:
      DataError: it holds something else, or cannot be read; ``mend`` says what to do then.
    """
    if not path.exists():
        return b""
    try:
        data = path.read_bytes()
        found = json.loads(data)
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); {mend}") from None
    if not isinstance(found, dict) or not found.keys() >= set(fields):
        raise DataError(f"{path} is damaged (it is no object with {', '.join(fields) or 'sizes'}); {mend}")
    return data


def _file(part: int) -> str:
    return f"{part:05}.bin"


def _write_share(
    folder: epath.Path,
    config: DataConfig,
    corpus: Corpus,
    tokenizer: Tokenizer,
    parts: list[list[int]],
    dtype: np.dtype,
) -> None:
    """Writes this process's files; one that is there already is complete."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for part in range(jax.process_index(), len(parts), jax.process_count()):
        path = folder / _file(part)
        if path.exists():
            continue
        unfinished = path.with_name(path.name + ".tmp")
        with writing(path), corpus.bad.listed() as left_out:
            with unfinished.open("wb") as stream:
                for tokens in _tokens([corpus.shards[i] for i in parts[part]], config, tokenizer):
                    stream.write(tokens.astype(dtype).tobytes())
            if left_out:
                path.with_suffix(LEFT_OUT).write_text("\n".join(left_out) + "\n", encoding="utf-8")
            unfinished.replace(path)


def _tokens(shards: list[Shard], config: DataConfig, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The tokens of documents that are not held out, in order, BOS in front of each."""
    bos = np.array([tokenizer.bos_id], np.int32)
    texts = (text for shard in shards for text in shard.texts() if not is_held_out(text, config.held_out))
    for some in _batches(texts):
        for ids in tokenizer.encode_all(some):
            yield bos
            yield ids


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about as many characters as are worth all cores, so that they alone are held."""
    some: list[str] = []
    characters = 0
    for text in texts:
        some.append(text)
        characters += len(text)
        if characters > ENCODED_AT_ONCE:
            yield some
            some, characters = [], 0
    yield some


def _finish(folder: epath.Path, config: DataConfig, corpus: Corpus, name: str, parts: int, dtype: np.dtype) -> bytes:
    """Writes and returns the index, which says that everything else is there."""
    tokens = [bytes_of(folder / _file(part)) // dtype.itemsize for part in range(parts)]
    if not sum(tokens):
        raise DataError(
            f"config.data.corpus is {corpus.source!r}, where config.data.held_out = {config.held_out} leaves no "
            "document to train on; lower it, lower config.data.document_bytes or add text"
        )
    unfinished = folder / (INDEX + ".tmp")
    with writing(folder):
        if corpus.left_out:
            (folder / ("files" + LEFT_OUT)).write_text("\n".join(corpus.left_out) + "\n", encoding="utf-8")
        left_out = sum(path.read_bytes().count(b"\n") for path in folder.glob("*" + LEFT_OUT))
        index = json.dumps(
            {"name": name, "dtype": dtype.name, "tokens": tokens, "left_out": left_out, RULES: corpus.read_as}
        ).encode()
        unfinished.write_bytes(index)
        unfinished.replace(folder / INDEX)
    return index


def _check_size(path: epath.Path, expected: int) -> None:
    found = bytes_of(path) if path.exists() else None
    if found != expected:
        problem = "is missing" if found is None else f"has {found:,} bytes instead of {expected:,}"
        raise DataError(f"{path} {problem}; remove its folder, and the same command makes the tokens again")
