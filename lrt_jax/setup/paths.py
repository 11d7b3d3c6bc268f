"""Paths taken as they are written: no character of them is a pattern's, and no file needs an owner with a name.

orbax and this package read and write through etils' epath. That looks for files in a folder by a pattern of the whole
path, so that none is found where a folder's name has a bracket; and it asks for the name of a file's owner along with
its size, which ends in a KeyError where a container or NFS has a uid that no name belongs to.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from etils import epath
from etils.epath.gpath import PosixGPath
from etils.epath.stat_utils import StatResult

# First folders of absolute paths that epath takes for buckets: to it /gs/x is gs://x.
BUCKETS = ("gs", "s3", "az", "hf")


class LocalPath(PosixGPath):
    """A path on this machine; what is made of it, within orbax too, is of its kind."""

    def glob(self, pattern: str) -> Iterator["LocalPath"]:
        """The files within that match ``pattern``, whatever this path holds."""
        return map(LocalPath, Path(self).glob(pattern))

    def stat(self) -> StatResult:
        """Size, time and mode; who owns it is left out."""
        found = os.stat(self)  # noqa: PTH116  pathlib's stat is the one that is replaced here
        return StatResult(stat.S_ISDIR(found.st_mode), found.st_size, int(found.st_mtime), mode=found.st_mode)


def bytes_of(path: epath.PathLike) -> int:
    """The bytes of a file, local or in a bucket.

    Raises:
      OSError: there is none, or it may not be asked for.
    """
    path = epath.Path(path)
    return (path if "://" in os.fspath(path) else LocalPath(path)).stat().length
