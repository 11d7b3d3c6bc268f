"""Files read whole and decompressed: gzip and Zstandard, by their suffix."""

import zlib
from typing import Any

from etils import epath

from lrt_jax.data.faults import DataError


def read(path: str) -> bytes:
    """A file's bytes, decompressed if it ends in .gz or .zst.

    Raises:
      DataError: what is compressed is damaged, or its end is missing; with the byte offset.
      OSError: the file cannot be read.
    """
    data = epath.Path(path).read_bytes()
    if not path.endswith((".gz", ".zst")):
        return data
    parts, begin = [], 0
    while begin < len(data):  # streams follow each other
        stream, broken = _stream(path)
        try:
            parts.append(stream.decompress(memoryview(data)[begin:]))
        except broken as error:
            raise _damaged(path, f"what begins at byte offset {begin}: {error}") from None
        if not stream.eof:
            raise _damaged(path, f"it ends at byte offset {len(data)}, in the middle of what began at {begin}")
        begin = len(data) - len(stream.unused_data)
        if path.endswith(".gz") and not data[begin:].strip(b"\0"):  # padding, which gzip allows
            break
    return b"".join(parts)


def _stream(path: str) -> tuple[Any, type[Exception]]:
    """A decompressor, and the error it raises. Libraries' readers of whole files do not notice every cut-off end."""
    if path.endswith(".gz"):
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16), zlib.error
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError


def _damaged(path: str, reason: str) -> DataError:
    return DataError(f"config.data.corpus: {path} cannot be decompressed ({reason}); it is damaged")
