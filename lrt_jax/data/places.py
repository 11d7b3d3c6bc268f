"""Where config fields may point: local paths, and buckets by gs:// and s3://."""

import re

from etils import epath

from lrt_jax.setup.config import ConfigError

# What installs the package that reads buckets of a kind, by the kind's prefix.
EXTRAS = {"gs": "gcs", "s3": "s3"}


def path_of(source: str, field: str) -> epath.Path:
    """The path that a config field names; there need be nothing.

    Args:
      source: what the field says.
      field: its name, for errors.

    Raises:
      ConfigError: it is a URL of another kind, or the package for its kind of bucket misses.
    """
    url = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)
    if url is None:
        return epath.Path(source).expanduser()
    if url[1] not in EXTRAS:
        raise ConfigError(f"{field} is {source!r}; allowed are local paths, gs:// and s3://")
    path = epath.Path(source)
    try:
        path.exists()  # the package is not imported before
    except ImportError as error:
        raise ConfigError(
            f"{field} is {source!r}, and what reads {url[1]}:// is not installed ({error}); "
            f"pip install 'lrt-jax[{EXTRAS[url[1]]}]', or name a local path"
        ) from None
    return path
