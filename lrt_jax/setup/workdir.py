"""The folder that a run lives in: what may name one, and whether all processes of a run see the same one."""

import contextlib
import json
import os
import re
import secrets
import time
from pathlib import Path

from lrt_jax.setup import paths, processes
from lrt_jax.setup.errors import writing
from lrt_jax.setup.schema import ConfigError

BUCKET = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")  # how a URL begins, also one whose slashes a program has merged
MARK = "run.seen-by-all."  # how the name of the file begins that the processes look for
ROOM = 256  # bytes of a path within a work dir, at most
PATIENCE = 60.0  # seconds to wait for it: so long NFS remembers that there was no such folder
INTERVAL = 0.1  # seconds between looks


def local(value: str, name: str = "--workdir", kind: str = "folder") -> Path:
    """The path that the flag or argument ``name`` gives, of what must be of a kind: a folder or a file.

    Raises:
      ConfigError: it is a bucket's URL, which a path cannot hold, or taken for one; the system knows no such names;
        what is there is of another kind; or a folder's path is not UTF-8, which is all that XLA and orbax can write to.
    """
    path = expanded(value, name)
    if BUCKET.match(value):
        raise ConfigError(
            f"{name} is {value!r}; it must be a {kind}: mount the bucket (launch/tpu_vm.sh --bucket does) and name "
            f"the {kind} there"
        )
    try:
        place = os.path.abspath(path)  # noqa: PTH100  resolves .., and no links
        there = path.exists()
    except OSError as error:
        raise ConfigError(f"{name} is {value!r}, where no {kind} can be ({error.strerror})") from None
    if not there and path.is_symlink():
        raise ConfigError(f"{name} is {value!r}, a link to {str(path.readlink())!r}, where there is nothing; mend it")
    if kind == "folder":
        nearest = next(above for above in (path, *path.parents, Path()) if above.exists())
        if not nearest.is_dir():
            raise ConfigError(f"{name} is {value!r}, but {str(nearest)!r} is there and no folder; it must be one")
        if fault := _unfit(place):
            raise ConfigError(
                f"{name} is {value!r}, whose path {fault}: checkpoints could not be written, or not be found again; "
                "choose another"
            )
    return path


def _unfit(place: str) -> str:
    """What orbax and tensorstore cannot take in an absolute path, as a part of a sentence; empty if they can."""
    try:
        length = len(place.encode())
    except UnicodeEncodeError:
        return f"{place!r} is not UTF-8"
    if "\\" in place:
        return "has a backslash, which is taken for a slash"
    if "gs:/" in place + "/":
        return "has a folder whose name ends in gs:, which is taken for a bucket"
    if (top := place.split("/")[1]) in paths.BUCKETS:
        return f"begins with /{top}, which is taken for {top}://"
    if length + ROOM > (longest := os.pathconf("/", "PC_PATH_MAX")):
        return f"has {length:,} bytes of the {longest:,} that a file's whole path may have, and {ROOM} must be left"
    return ""


def expanded(value: str, name: str) -> Path:
    """The path that a flag or argument names, with the home directory that a leading ~ stands for.

    A shell expands none behind "=".

    Raises:
      ConfigError: there is no such home directory.
    """
    path = os.path.expanduser(value)  # noqa: PTH111  pathlib's has an error of its own for what is unknown
    if path.startswith("~"):
        raise ConfigError(
            f"{name} is {value!r}, and there is no home directory {value.partition('/')[0]}; write the whole path (or "
            "./~… for a name that begins so)"
        )
    return Path(path)


def require_shared(workdir: Path) -> None:
    """Checks that what the first process writes into the work dir is there for every other one.

    Raises:
      WorkdirError: it cannot be written; or ProcessError: a process sees another folder, in all processes.
    """
    if processes.count() == 1:
        return

    def leave_mark() -> bytes:
        mark = workdir / (MARK + secrets.token_hex(8))
        with writing(mark):
            workdir.mkdir(parents=True, exist_ok=True)
            mark.touch()
        return mark.name.encode()

    mark = workdir / processes.from_first(leave_mark).decode()
    try:
        answers = processes.gathered(json.dumps([_appears(mark), str(workdir.absolute())]))
    finally:
        if processes.is_first():
            with contextlib.suppress(OSError):
                mark.unlink()
    seen = [json.loads(answer) for answer in answers]
    for process, (found, place) in enumerate(seen):
        if not found:
            raise processes.ProcessError(
                f"--workdir is not the same folder on process {process} ({place}) as on process 0 ({seen[0][1]}); all "
                "processes must share one, on a file system that each of them has mounted"
            )


def _appears(path: Path) -> bool:
    """Whether a file is there, sooner or later."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if path.exists():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(INTERVAL)
