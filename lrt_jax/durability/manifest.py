"""A checkpoint's manifest: size and SHA-256 of every file, written last; without it a checkpoint does not count.

Nothing below us checks what it reads: a flipped bit in a checkpoint's data is restored as a wrong number. Files are
read in pieces, a few at once, so memory stays bounded whatever their size.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
from typing import Any

from etils import epath

from lrt_jax.setup.paths import bytes_of

FILE = "manifest.json"
THREADS = min(8, os.cpu_count() or 1)  # hashing releases the interpreter's lock


def write(folder: epath.Path) -> None:
    """Writes the manifest of everything in ``folder``, once all of it is on the disk; atomic.

    Raises:
      OSError: a file cannot be read, or the manifest not be written.
    """
    names = _names(folder)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda name: _digest(folder / name, flush=True), names)
        files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in zip(names, digests, strict=True)}
    for parent in {(folder / name).parent for name in names}:
        _flush_folder(parent)
    write_whole(folder / FILE, _serialized(files))


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes a file that is there with all of its bytes or not at all, a power cut included.

    Raises:
      OSError: it cannot be written; what was there before is untouched.
    """
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as stream:
        stream.write(data)
        stream.flush()
        _flush(stream)
    unfinished.replace(path)
    _flush_folder(path.parent)


def exists(folder: epath.Path) -> bool:
    """Whether a manifest is there: whether the save of this checkpoint was completed."""
    return (folder / FILE).exists()


def faults(folder: epath.Path, items: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with a checkpoint, one sentence part per damaged file; empty if every byte is as it was saved.

    Looks only at the subfolders ``items``, and at the files beside them; none: at everything.

    Raises:
      PermissionError: a file may not be read, so that nothing is known of it.
    """
    try:
        files = _parsed((folder / FILE).read_bytes())
    except FileNotFoundError:
        return [f"{FILE} is missing"]
    except PermissionError:
        raise
    except (ValueError, OSError) as error:
        return [f"{FILE} is damaged ({error})"]
    chosen = [name for name in files if not items or "/" not in name or name.split("/")[0] in items]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _fault(folder, name, files[name]), chosen)
        return [fault for fault in found if fault]


def total_bytes(folder: epath.Path) -> int:
    """The size of a checkpoint, by its manifest; 0 where that cannot be read."""
    try:
        return sum(file["bytes"] for file in _parsed((folder / FILE).read_bytes()).values())
    except (ValueError, OSError):
        return 0


def _fault(folder: epath.Path, name: str, expected: dict[str, Any]) -> str:
    path = folder / name
    try:
        found = bytes_of(path)
        if found != expected["bytes"]:
            return f"{name} has {found:,} bytes instead of {expected['bytes']:,}"
        _, digest = _digest(path)
    except FileNotFoundError:
        return f"{name} is missing"
    except PermissionError:
        raise
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    return "" if digest == expected["sha256"] else f"{name} is not what was saved (its checksum differs)"


def _serialized(files: dict[str, Any]) -> bytes:
    """The manifest's bytes: one spelling per content, and a checksum of itself, so that any flipped bit shows."""
    body = json.dumps({"files": files}, sort_keys=True)
    return f'{body[:-1]}, "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"}}\n'.encode()


def _parsed(data: bytes) -> dict[str, Any]:
    files = json.loads(data)["files"] if data.startswith(b'{"files": {') else None
    if files is None or _serialized(files) != data:
        raise ValueError("its own checksum differs")
    return files


def _names(folder: epath.Path) -> list[str]:
    """The files below a folder, by their paths within it, sorted; the manifest itself is none of them."""
    names, folders = [], [folder]
    while folders:
        for path in folders.pop().iterdir():
            if path.is_dir():
                folders.append(path)
            elif path.name not in (FILE, FILE + ".tmp"):
                names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def _digest(path: epath.Path, *, flush: bool = False) -> tuple[int, str]:
    with path.open("rb") as stream:
        digest, size = hashlib.file_digest(stream, "sha256"), stream.tell()
        if flush:
            _flush(stream)
    return size, digest.hexdigest()


def _flush(stream: Any) -> None:
    """To the disk, where the file is on one: a manifest must not outlive a power cut that its files do not."""
    with contextlib.suppress(AttributeError, OSError):  # in a bucket there is nothing to flush
        os.fsync(stream.fileno())


def _flush_folder(folder: epath.Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(os.fspath(folder), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
