"""How long a process takes from its start to its first step, and with what."""

import time
from pathlib import Path


def seconds_since_start() -> float:
    """Since the process was started, where the system tells (Linux); else the CPU time so far."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        hertz = 100  # of /proc, whatever the kernel's own: USER_HZ
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / hertz
    except (OSError, ValueError, IndexError, AttributeError):
        return time.process_time()


class Startup:
    """Laps from the start of the process; the first one is what came before this object.

    Of several runs in one process, each but the first one starts with its object.
    """

    _of_process = True

    def __init__(self) -> None:
        self.laps: dict[str, float] = {"imports": seconds_since_start()} if Startup._of_process else {}
        Startup._of_process = False
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends a lap; laps of one name add up."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def seconds(self) -> float:
        """All laps together."""
        return sum(self.laps.values())

    def __str__(self) -> str:
        laps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.laps.items())
        return f"first step {self.seconds:.1f} s after the start: {laps}"
