"""Where config fields may point: local paths, and buckets by gs:// and s3://."""

import errno
import re
import stat
from pathlib import Path
from typing import Literal

from etils import epath

from lrt_jax.setup.config import ConfigError

# What installs the package that reads buckets of a kind, by the kind's prefix.
EXTRAS = {"gs": "gcs", "s3": "s3"}


def path_of(source: str, field: str) -> epath.Path:
    """The path ``source`` of a config field, with ``~`` and ``~user`` expanded; there need be nothing.

    Raises:
      ConfigError: it is a URL of another kind, the package for its kind of bucket is missing, or there is no such user.
    """
    url = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)
    if url is None:
        path = epath.Path(source).expanduser()
        if str(path).startswith("~") and at(path, field, source) == "nothing":
            user = path.parts[0]
            raise ConfigError(f"{field} is {source!r}, and {user} is no user with a home here; write the whole path")
        return path
    if url[1] not in EXTRAS:
        raise ConfigError(f"{field} is {source!r}; allowed are local paths, gs:// and s3://")
    if ".." in source.split("/"):
        raise ConfigError(f"{field} is {source!r}; in a bucket no folder lies above another: name it without ..")
    path = epath.Path(source)
    try:
        path.exists()  # the package is not imported before
    except ImportError as error:
        raise ConfigError(
            f"{field} is {source!r}, and what reads {url[1]}:// is not installed ({error}); "
            f"pip install 'lrt-jax[{EXTRAS[url[1]]}]', or name a local path"
        ) from None
    return path


def at(path: epath.Path, field: str, source: str) -> Literal["folder", "file", "nothing"]:
    """What lies at a path that a config field led to, by its ``source``; a link is what it leads to.

    Raises:
      ConfigError: the system refuses to say.
    """
    try:
        if "://" in str(path):
            return "folder" if path.is_dir() else "file" if path.exists() else "nothing"
        return "folder" if stat.S_ISDIR(Path(path).stat().st_mode) else "file"
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: no name can have a NUL
        return "nothing"
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return "nothing"
        raise ConfigError(
            f"{field} is {source!r}, where {path} cannot be looked at ({error.strerror or error}); check it"
        ) from None


def listed(folder: epath.Path) -> list[epath.Path]:
    """What a folder holds.

    Raises:
      ConfigError: it cannot be listed.
    """
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise cannot_be_listed(str(folder), error) from None


def cannot_be_listed(folder: str, error: OSError) -> ConfigError:
    """The error of a folder of the corpus that may not be read."""
    return ConfigError(f"config.data.corpus: {folder} cannot be listed ({error.strerror or error}); check it")
