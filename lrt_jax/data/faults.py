"""Records that cannot be read: by config they end the run, or are left out, told and counted."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Literal

from lrt_jax.setup.errors import UserError

Policy = Literal["stop", "skip"]


class DataError(UserError, ValueError):
    """The corpus holds something unusable, or too little; one sentence says what and where."""


class BadRecords:
    """What was left out of a corpus, and what happens to the next one.

    Which records are bad depends on their bytes alone, so a run that leaves them out has the same stream every time.

    Attributes:
      policy: "stop" raises; "skip" leaves out.
      left_out: a sentence for each record or file, once however often it is read; in order of appearance.
    """

    def __init__(self, policy: Policy = "stop"):
        self.policy = policy
        self.left_out: list[str] = []
        self._listeners: list[list[str]] = []

    @contextlib.contextmanager
    def listed(self) -> Iterator[list[str]]:
        """The sentences for what is left out within, whether it was met before or not."""
        sentences: list[str] = []
        self._listeners.append(sentences)
        try:
            yield sentences
        finally:
            self._listeners.remove(sentences)

    def leave_out(self, error: DataError) -> None:
        """Tells of a bad record and counts it.

        Raises:
          DataError: ``error`` itself, if the policy is to stop.
        """
        if self.policy == "stop":
            raise error
        sentence = str(error)
        for listener in self._listeners:
            listener.append(sentence)
        if sentence not in self.left_out:
            self.left_out.append(sentence)
            print(f"warning: left out: {sentence}", file=sys.stderr, flush=True)
