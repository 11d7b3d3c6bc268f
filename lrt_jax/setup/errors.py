"""The errors that a user can mend: each ends a command in one line, without a traceback."""


class UserError(Exception):
    """Something outside the code is wrong; the message is one sentence that says what, where and what is allowed."""
