"""The watchdog: where nothing moves for too long, the stacks go to the log and the process ends, to be restarted.

Its thread looks once a second. Should that thread not run either, because some native code holds the interpreter's
lock, faulthandler's own timer, which needs no lock, does the same a little later.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# "Temporary failure, try again" in sysexits.h: what a supervisor should do.
EXIT_CODE = 75
INTERVAL = 1.0  # seconds between looks
FROZEN = 5.0  # seconds by which a look is late if the process was stopped (SIGSTOP) and goes on
SLACK = 30.0  # seconds by which faulthandler's timer is later


class Watchdog:
    """Ends the process if :meth:`beat` is not called in time; as a context manager, only within.

    Args:
      log: a file that gets the stacks too; standard error always does.
    """

    def __init__(self, log: Path):
        self._log = log
        self._name, self._field, self._limit = "the start", "", 0.0
        self._since = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """What is being done has moved on."""
        self._since = time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: str, field: str, limit: float) -> Iterator[None]:
        """Within, the limit is another.

        Args:
          name: what is done, as in "no step": the sentence names it.
          field: the config field that the limit comes from.
          limit: seconds between beats; 0: none.
        """
        before = self._name, self._field, self._limit
        self.beat()
        self._name, self._field, self._limit = name, field, limit
        try:
            yield
        finally:
            self.beat()  # first, so that the limit before is not measured from the start of the phase
            self._name, self._field, self._limit = before

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(INTERVAL):
            late, looked = time.monotonic() - looked - INTERVAL, time.monotonic()
            if late > FROZEN:  # the whole process was stopped meanwhile, and is no slower for it
                self._since += late
            limit, waited = self._limit, time.monotonic() - self._since
            if not limit:
                faulthandler.cancel_dump_traceback_later()
            elif waited > limit:
                self._end(waited)
            else:
                faulthandler.dump_traceback_later(limit - waited + SLACK, exit=True)

    def _end(self, waited: float) -> None:
        with contextlib.suppress(OSError), self._log.open("w") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        message = (
            f"error: nothing has moved for {waited:.0f} seconds in {self._name} ({self._field} = {self._limit:g}); the "
            f"stacks of all threads are above and in {self._log}; exit {EXIT_CODE}: start again to go on from the last "
            "checkpoint\n"
        )
        os.write(2, message.encode())
        os._exit(EXIT_CODE)
