"""Signals that ask to stop: SIGINT, SIGTERM and SIGQUIT, of which a second one ends the process at once, and others.

While there is something to save, the first signal is only noted, and the training loop stops at the next step; else
it raises :class:`Stopped`. Several processes agree on the step: a signal to one of them stops all.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lrt_jax.setup import mesh as meshes

# What somebody sends who waits for the end: a second one means "at once".
INSISTENT = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
# A closed terminal, whose shell says so again; a limit of CPU time, told every second; a batch system's warning.
# Service managers send some of them along with SIGTERM.
PATIENT = (signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (*INSISTENT, *PATIENT)


class Stopped(Exception):  # noqa: N818, it is no error
    """A signal asked to stop, and nothing is left to save."""


class StopRequests:
    """Listens to the signals within ``with``.

    Bytes arrive in a thread as well as in Python's handlers: those run in the main thread only once it is back from
    native code, and a second signal must end a process that hangs there too.
    """

    def __init__(self) -> None:
        self._asked = self._deferred = False
        self._vote: jax.Array | None = None
        self._any: Any = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within, the signals ask to stop; but not those of PATIENT that are ignored, as nohup has it for SIGHUP."""
        asked = [n for n in SIGNALS if n in INSISTENT or signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in asked}
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._receive, args=(receiver, asked), name="signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            sender.close()  # ends the thread
            thread.join()
            receiver.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, the first signal is only noted.

        Raises:
          Stopped: there was a signal before.
        """
        self._deferred = True
        try:
            if self._asked and jax.process_count() == 1:
                raise Stopped
            yield
        finally:
            self._deferred = False

    def agreed(self, mesh: Mesh) -> bool:
        """Whether to stop at this step: the same answer in every process that asks for the same step.

        Several processes vote on the devices, and read the vote of the call before, so that nobody waits: a signal
        takes effect a step later.
        """
        if jax.process_count() == 1:
            return self._asked
        before, self._vote = self._vote, self._cast(mesh)
        return before is not None and bool(before)

    def check(self, mesh: Mesh) -> None:
        """Raises :class:`Stopped` if any process was asked to stop; all must call it, and wait for each other."""
        if self._asked if jax.process_count() == 1 else bool(self._cast(mesh)):
            raise Stopped

    def _cast(self, mesh: Mesh) -> jax.Array:
        if self._any is None:
            self._any = jax.jit(jnp.any, out_shardings=meshes.replicated(mesh))
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        mine = np.array([self._asked])
        return self._any(jax.make_array_from_callback((mesh.size,), sharding, lambda index: mine))

    def _handle(self, number: int, frame: Any) -> None:
        del number, frame
        self._asked = True
        if not self._deferred:
            self._deferred = True  # so that the way out is not disturbed
            raise Stopped

    def _receive(self, receiver: socket.socket, asked: list[signal.Signals]) -> None:
        insisted = 0
        while numbers := receiver.recv(1):
            if numbers[0] not in asked:
                continue
            self._asked = True
            insisted += numbers[0] in INSISTENT
            if insisted == 2:
                with contextlib.suppress(OSError):  # the terminal is gone, say
                    os.write(2, b"stopped at once by a second signal; the last complete checkpoint is untouched\n")
                os._exit(128 + numbers[0])
