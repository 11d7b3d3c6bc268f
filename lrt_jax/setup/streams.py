"""Standard streams that end no command: of an encoding that lacks a character, closed, missing, or of a lost terminal.

What standard output cannot show becomes a question mark. What a command computes is worth more than what it prints:
training goes on without a reader (:func:`outlive_readers`), while ``generate | head`` ends with its reader.
"""

import contextlib
import errno
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from lrt_jax.setup.errors import UserError

# What writing says where the other end of a pipe, or the terminal, is gone.
GONE = (errno.EPIPE, errno.EIO)
# How an encoding is called where the system says nothing about one.
UNSAID = ("ascii", "us-ascii", "ansi_x3.4-1968", "646")


class StreamError(UserError):
    """Standard output cannot be written."""


class Stream:
    """A text stream that says in one sentence why it cannot be written; or, if it is lasting, drops what it cannot."""

    def __init__(self, stream: TextIO, *, lasting: bool):
        """Writes to ``stream``, which has a file descriptor."""
        self._stream, self.lasting = stream, lasting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes all of ``text``."""
        with self._telling():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered."""
        with self._telling():
            self._stream.flush()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.lasting and error.errno in GONE:
                raise
            if not self.lasting:
                raise StreamError(f"standard output cannot be written ({error.strerror})") from None
            if error.errno in GONE:  # a disk that is full may have room again
                drop(self._stream)


def prepare() -> None:
    """Makes the standard streams of this process usable, whatever it was given; to be called before files are opened.

    A descriptor that is closed would be the next file's, which then gets what is printed: it becomes the null device.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
    # Input that is not of its encoding is refused by who reads it.
    encoding = "utf-8" if (sys.stdin.encoding or "").lower() in UNSAID else sys.stdin.encoding
    _reconfigure(sys.stdin, encoding=encoding, errors="surrogateescape")
    _reconfigure(sys.stdout, errors="replace")
    sys.stdout = Stream(sys.stdout, lasting=False)
    sys.stderr = Stream(sys.stderr, lasting=True)


def outlive_readers() -> None:
    """From here on, standard output may lose its reader or its terminal, and the process goes on."""
    if isinstance(sys.stdout, Stream):
        sys.stdout.lasting = True


def unread() -> bool:
    """Whether nobody reads standard output any more, as after ``| head``; what is left of it is then dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # that the other end is closed is told unasked
    if not poll.poll(0):
        return False
    drop(sys.stdout)
    return True


def drop(stream: TextIO) -> None:
    """Sends what is written to a stream from now on, and what it has buffered, to nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _reconfigure(stream: Any, **settings: str | None) -> None:
    """Of a stream that is what Python made it; another, such as a notebook's, is left alone."""
    with contextlib.suppress(AttributeError):
        stream.reconfigure(**settings)
