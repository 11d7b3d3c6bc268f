"""The errors that a user can mend: each ends a command in one line, without a traceback."""

import contextlib
import os
from collections.abc import Iterator


class UserError(Exception):
    """Something outside the code is wrong; the message is one sentence that says what, where and what is allowed.

    As text it is one line of valid Unicode, whatever the names of files in it.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class WorkdirError(UserError):
    """The work dir cannot be written, or another run is in it."""


def one_line(text: str) -> str:
    """Text that is shown on one line: what cannot be printed, and bytes of a name that is not UTF-8, are escaped."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    byte = ord(character) - 0xDC00  # how Python holds it
    return f"\\x{byte:02x}" if 0x80 <= byte < 0x100 else character.encode("unicode_escape", "surrogatepass").decode()


@contextlib.contextmanager
def writing(path: "str | os.PathLike[str]") -> Iterator[None]:
    """Within, what the system refuses ends in one sentence.

    Raises:
      WorkdirError: disk full, read-only, no permission, or gone.
    """
    try:
        yield
    except OSError as error:
        raise WorkdirError(
            f"{os.fspath(path)} cannot be written ({error.strerror or error}); the work dir must be writable, with "
            "space on its disk; what was saved before is untouched"
        ) from None
