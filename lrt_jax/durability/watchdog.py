"""The watchdog: where nothing moves for too long, the stacks go to the log and the process ends, to be restarted.

Its thread looks once a second. Should that thread not run either, because some native code holds the interpreter's
lock, a second watcher aborts the process a little later. It is a process of its own, this file run as a program: a
timer within, such as faulthandler's, goes on while the process is stopped (SIGSTOP) and would end it when it goes on.
"""

import contextlib
import faulthandler
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# "Temporary failure, try again" in sysexits.h: what a supervisor should do.
EXIT_CODE = 75
INTERVAL = 1.0  # seconds between looks
FROZEN = 5.0  # seconds by which a look is late if the process was stopped (SIGSTOP) and goes on
GRACE = 3.0  # seconds from the stacks to the end: the processes that end with this one, one of which hangs, tell theirs
SLACK = 30.0  # seconds by which the second watcher is later, and that it leaves for the way out


class Watchdog:
    """Ends the process if :meth:`beat` is not called in time; as a context manager, only within."""

    def __init__(self, log: Path):
        """The file ``log`` gets the stacks, too; standard error always does."""
        self._log = log
        self._name, self._field, self._limit = "the start", "", 0.0
        self._since = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._second: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Watchdog":
        if not faulthandler.is_enabled():  # it shows the stacks of a process that is aborted
            faulthandler.enable(sys.__stderr__ or 2)
        if Path("/proc/self/stat").exists():
            with contextlib.suppress(OSError):
                self._second = subprocess.Popen(
                    [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(INTERVAL)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    bufsize=0,
                    cwd="/",
                    start_new_session=True,  # where no signal of the terminal reaches it
                )
                assert self._second.stdin is not None
                os.set_blocking(self._second.stdin.fileno(), False)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._second is not None:
            with self._second as second:
                second.kill()

    def beat(self) -> None:
        """What is being done has moved on."""
        self._since = time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: str, field: str, limit: float) -> Iterator[None]:
        """Within, the limit is another: so many seconds between beats, by a config field; 0: none.

        The sentence names what is done by ``name``, as in "the start".
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
            now = time.monotonic()
            late, looked = now - looked - INTERVAL, now
            if late > FROZEN:  # the whole process was stopped meanwhile, and is no slower for it
                self._since = min(self._since + late, now)
            limit, waited = self._limit, now - self._since
            self._allow(limit - waited + SLACK if limit else 0.0)
            if limit and waited > limit:
                self._end(waited)

    def _allow(self, seconds: float) -> None:
        """Tells the second watcher after how many seconds without another word it shall act; 0: never."""
        if self._second is not None and self._second.stdin is not None:
            with contextlib.suppress(OSError):  # it was killed, say; nor is it waited for
                self._second.stdin.write(f"{seconds:.3f}\n".encode())

    def _end(self, waited: float) -> None:
        with contextlib.suppress(OSError), self._log.open("w") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        message = (
            f"error: nothing has moved for {waited:.0f} seconds in {self._name} ({self._field} = {self._limit:g}); the "
            f"stacks of all threads are above and in {self._log}; exit {EXIT_CODE}: start again to go on from the last "
            "checkpoint\n"
        )
        with contextlib.suppress(OSError):  # the terminal is gone, say
            os.write(2, message.encode())
        time.sleep(GRACE)
        os._exit(EXIT_CODE)


def second_watcher(process: int, interval: float) -> None:
    """Aborts ``process``, its parent, where it lets the time go by that standard input names; ends when that ends.

    Time is counted in looks of ``interval`` seconds, and not while the parent is stopped: neither a stop of the parent
    nor one of both adds to it.
    """
    left = 0.0
    while os.getppid() == process:
        if select.select([0], [], [], interval)[0]:
            said = os.read(0, 1 << 16)  # all that a pipe holds
            if not said:
                return
            left = float(said.split()[-1])
        elif left > 0 and not _is_stopped(process):
            left -= interval
            if left <= 0:
                _abort(process)


def _is_stopped(process: int) -> bool:
    """By a signal or a debugger."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")


def _abort(process: int) -> None:
    import resource  # as /proc, not everywhere

    message = (
        "error: nothing has moved, and native code keeps Python from ending the process; it is aborted, exit "
        f"{128 + signal.SIGABRT}, its stacks follow: start again to go on from the last checkpoint\n"
    )
    with contextlib.suppress(OSError):
        os.write(2, message.encode())
    with contextlib.suppress(OSError, ValueError):
        resource.prlimit(process, resource.RLIMIT_CORE, (0, 0))  # all of its memory, for nobody
    os.kill(process, signal.SIGABRT)
    if not select.select([0], [], [], SLACK)[0]:
        os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has ended meanwhile
        second_watcher(int(sys.argv[1]), float(sys.argv[2]))
