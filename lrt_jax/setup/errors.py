"""The errors that a user can mend: each ends a command in one line, without a traceback."""

import contextlib
import os
from collections.abc import Iterator


class UserError(Exception):
    """Something outside the code is wrong; the message is one sentence that says what, where and what is allowed."""


class WorkdirError(UserError):
    """The work dir cannot be written, or another run is in it."""


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
