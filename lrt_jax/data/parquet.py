"""Parquet files: a shard per row group, its rows read in batches.

Files come from elsewhere, so any error of pyarrow's is one sentence. What its C++ code ends the process over, the
statistics of a damaged footer, is asked for in a process of its own.
"""

import contextlib
import dataclasses
import functools
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from etils import epath

from lrt_jax.data import compressed
from lrt_jax.data.faults import BadRecords, DataError
from lrt_jax.data.shards import Shard, as_text

ROWS = 256  # decoded at once
BUFFER = 1 << 20  # bytes of a column read at once
PATIENCE = 60.0  # seconds for the other process
DAMAGED = "it is damaged"
BEGIN_OF = """
import sys, pyarrow.parquet
from etils import epath
path, group, column = sys.argv[1:]
with epath.Path(path).open("rb") as stream:
    found = pyarrow.parquet.ParquetFile(stream).metadata.row_group(int(group))
    columns = [found.column(i) for i in range(found.num_columns)]
    print(next(c.data_page_offset for c in columns if c.path_in_schema == column))
"""


@dataclasses.dataclass(frozen=True)
class ParquetShard(Shard):
    """One row group of a Parquet file: one document per row, in the column ``column``."""

    column: str
    row_group: int

    def _texts(self) -> Iterator[str]:
        number = 0
        for rows in self._batches():
            yield from self._good(self._reads(rows, number))
            number += len(rows)

    def _require_whole(self) -> None:
        for _ in self._batches():
            pass

    def _batches(self) -> Iterator[Any]:
        """The column's values, as arrays of pyarrow's."""
        compressed.require_regular(self.path)
        with epath.Path(self.path).open("rb") as stream:
            try:
                import pyarrow.parquet

                file = pyarrow.parquet.ParquetFile(
                    stream, page_checksum_verification=True, pre_buffer=False, buffer_size=BUFFER
                )
                batches = file.iter_batches(ROWS, row_groups=[self.row_group], columns=[self.column])
            except Exception as error:
                self._explain(error)
            while True:
                try:
                    batch = next(batches, None)
                    column = None if batch is None else batch.column(0)
                except Exception as error:
                    self._explain(error)
                if column is None:
                    return
                yield column

    def _reads(self, rows: Any, first: int) -> Iterator[Callable[[], str]]:
        read: Callable[[Any, str, str], str] = as_text
        try:
            values = rows.to_pylist()
        except Exception:  # some row is not UTF-8: each is decoded by itself
            read, values = _scalar_as_text, rows
        for number, value in enumerate(values, first):
            where = f"{self.path}, row group {self.row_group}, row {number}"
            yield functools.partial(read, value, where, self.column)

    def _explain(self, error: Exception) -> NoReturn:
        _raise_if_of_the_system(error)
        begin = _begin_of(self.path, self.row_group, self.column)
        place = "" if begin is None else f"byte offset {begin}: "
        raise DataError(
            f"config.data.corpus: {self.path}, row group {self.row_group} cannot be read ({place}{_said(error)}); "
            f"{_verdict(error)}"
        ) from None


def shards_of(path: str, name: str, bad: BadRecords, column: str) -> list[ParquetShard]:
    """The shards of one file.

    Raises:
      DataError: it is no Parquet file, or does not have the column once.
      OSError: it cannot be read.
    """
    compressed.require_regular(path)
    with epath.Path(path).open("rb") as stream:
        end = stream.seek(0, io.SEEK_END)
        try:
            import pyarrow.parquet

            file = pyarrow.parquet.ParquetFile(stream)
            columns, groups = list(file.schema_arrow.names), file.num_row_groups
        except Exception as error:
            _raise_if_of_the_system(error)
            verdict = _verdict(error)
            found = "is not a Parquet file" if verdict == DAMAGED else "is a Parquet file that cannot be read"
            raise DataError(
                f"config.data.corpus: {path} {found} (byte offset {end}, its end: {_said(error)}); {verdict}"
            ) from None
    if (count := columns.count(column)) != 1:
        found = f"has {count} columns" if count else "has no column"
        allowed = "it must have one" if count else f"found: {', '.join(columns)}"
        raise DataError(f"config.data.corpus: {path} {found} {column!r} (config.data.text_field); {allowed}")
    return [ParquetShard(path, f"{name}#{group}", bad, column, group) for group in range(groups)]


def _raise_if_of_the_system(error: Exception) -> None:
    """Raises what the file system says, of which pyarrow's errors have no number."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def _said(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _verdict(error: Exception) -> str:
    """What an error means: pyarrow cannot do something, or the file is damaged."""
    import pyarrow

    refused = ("not support", "Unsupported", "unsupported", "not implemented", "not built", "ncrypt")
    if isinstance(error, MemoryError):
        return "it is damaged, or its row groups need more memory than there is"
    if isinstance(error, pyarrow.ArrowNotImplementedError) or any(word in str(error) for word in refused):
        return "it may be intact, but pyarrow cannot read such a file: write it again, as with compression='zstd'"
    return DAMAGED


@functools.cache
def _begin_of(path: str, group: int, column: str) -> int | None:
    """Where the pages of a column begin in a file, in bytes; None where even that cannot be told."""
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        command = [sys.executable, "-c", BEGIN_OF, path, str(group), column]
        return int(subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True).stdout)
    return None


def _scalar_as_text(scalar: Any, where: str, field: str) -> str:
    """:func:`as_text` of a value of pyarrow's, which does not check text before it is asked for."""
    try:
        value = scalar.as_py()
    except Exception as error:
        raise DataError(f"config.data.corpus: {where}: {field!r} cannot be read ({error}); it must be UTF-8") from None
    return as_text(value, where, field)
