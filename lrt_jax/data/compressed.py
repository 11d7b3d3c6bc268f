"""Files read in blocks and decompressed on the way: gzip and Zstandard, by their suffix."""

import contextlib
import io
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from lrt_jax.data.faults import DataError

GZIP, ZSTANDARD = ".gz", ".zst"
SUFFIXES = (GZIP, ZSTANDARD)
BLOCK = 1 << 20  # bytes read at once
COMPRESSED_BLOCK = 1 << 14  # the same of what may be a thousand times as large
WINDOW = 1 << 31  # the largest that Zstandard has: `zstd --long=31`
# How what a decoder says begins where it is not asked to decode such a thing, though it may be intact.
REFUSED = {
    "Frame requires too much memory": "it needs a window of more than 2 GiB; compress it again with --long=31 or less",
    "Dictionary mismatch": "it was compressed with a dictionary; decompress it with that (zstd -d -D FILE)",
    "Allocation error": "its window needs more memory than there is; compress it again without --long",
    "nsupported": "it is of a kind that this decoder does not read; compress it again",
    "ersion not supported": "it is of a version that this decoder does not read; compress it again",
    "unknown compression method": "not the one of gzip; compress it again",
}
# The files that can be read once only, or without end.
SPECIAL = {
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISDIR: "a folder",
}


def is_compressed(path: str) -> bool:
    """Whether a file of this name is decompressed."""
    return path.lower().endswith(SUFFIXES)


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """A file as a stream of bytes, decompressed if it ends in .gz or .zst, whatever their case.

    Raises:
      DataError: here, it is no file that can be read again; while it is read, what is compressed is damaged, or its end
        is missing, with the byte offset.
      OSError: the file cannot be read.
    """
    require_regular(path)
    with epath.Path(path).open("rb") as stream:
        if is_compressed(path):
            yield io.BufferedReader(_Decompressed(stream, path), BLOCK)
        else:
            yield stream


def require_regular(path: str) -> None:
    """Checks that a path is not a pipe, a socket or a device, which would be waited for, or never end.

    Raises:
      DataError: it is.
      OSError: nothing is there.
    """
    if "://" in path:
        return
    mode = Path(path).stat().st_mode
    for is_kind, name in SPECIAL.items():
        if is_kind(mode):
            raise DataError(
                f"config.data.corpus: {path} is {name}; it must be a regular file, since it is read more than once"
            )


class _Decompressed(io.RawIOBase):
    """What a compressed file holds, for a buffered reader."""

    def __init__(self, stream: BinaryIO, path: str):
        self._blocks, self._rest = _blocks(stream, path), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _blocks(stream: BinaryIO, path: str) -> Iterator[bytes]:
    """The decompressed bytes of streams that follow each other.

    By the decoders, and not by their readers of whole files, which do not notice every cut-off end.
    """
    data = stream.read(COMPRESSED_BLOCK)
    end = len(data)  # the byte offset up to which the file was read
    while data:
        begin, (decoder, broken) = end - len(data), _decoder(path)
        head = data[:4]
        while not decoder.eof:
            if not data:
                raise _damaged(path, f"it ends at byte offset {end}, in the middle of what began at {begin}")
            try:
                yield decoder.decompress(data)
            except (broken, MemoryError) as error:
                raise _told(path, begin, head, str(error) or "Allocation error") from None
            data = b"" if decoder.eof else stream.read(COMPRESSED_BLOCK)
            end += len(data)
        data = decoder.unused_data
        while path.lower().endswith(GZIP) and data and not data.strip(b"\0"):  # padding, which gzip allows
            data = stream.read(COMPRESSED_BLOCK)
            end += len(data)
        if not data:
            data = stream.read(COMPRESSED_BLOCK)
            end += len(data)


def _decoder(path: str) -> tuple[Any, type[Exception]]:
    """A decompressor of one stream, and the error it raises."""
    if path.lower().endswith(GZIP):
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16), zlib.error
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj(), zstandard.ZstdError


def _told(path: str, begin: int, head: bytes, message: str) -> DataError:
    """The error of a decoder at what begins with the bytes ``head``: a refusal, a wrong name, or damage."""
    for said, reason in REFUSED.items():
        if said in message:
            return DataError(
                f"config.data.corpus: {path} cannot be decompressed here (what begins at byte offset {begin}: "
                f"{message}): it may be intact, but {reason}"
            )
    if "incorrect header check" in message or "Unknown frame descriptor" in message:
        kind = "gzip" if path.lower().endswith(GZIP) else "Zstandard"
        message = f"{message}, since {head!r} begins nothing of {kind}"
        if begin == 0:
            return DataError(
                f"config.data.corpus: {path} cannot be decompressed (what begins at byte offset 0: {message}); it is "
                "damaged, or has another format than its suffix says"
            )
    return _damaged(path, f"what begins at byte offset {begin}: {message}")


def _damaged(path: str, reason: str) -> DataError:
    return DataError(f"config.data.corpus: {path} cannot be decompressed ({reason}); it is damaged")
