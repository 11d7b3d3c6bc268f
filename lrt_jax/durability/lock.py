"""One run at a time in a work dir: the first process of a training run holds a lock on a file there.

The lock is the kernel's (flock): it ends with the process, however that ends, and the file itself means nothing. Other
machines see it where the file system passes it on (NFS); on the mount of a bucket it holds within one machine.
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lrt_jax.setup.errors import WorkdirError, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = "run.lock"
PATIENCE = 10.0  # seconds to wait for a run that is still dying: a supervisor is quick
INTERVAL = 0.1  # seconds between tries


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Within, no other run is in ``workdir``; leaves no file behind, nor a folder that was made for it and is empty.

    Where files cannot be locked, a line says so, and that is all.

    Raises:
      WorkdirError: another run is there, or the work dir cannot be written.
    """
    if fcntl is None:
        _tell(workdir, "no lock is known for such a system")
        yield
        return
    with writing(workdir):
        made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    path, descriptor = workdir / FILE, None
    try:
        descriptor = _take(path)
        yield
    finally:
        if descriptor is not None:
            if _is(path, descriptor):
                with contextlib.suppress(OSError):
                    path.unlink()  # before the lock ends, else it could be the next run's
            os.close(descriptor)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def taken(descriptor: int) -> bool:
    """Locks a file that is open, until it is closed; False: another process has. True where files cannot be locked."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _take(path: Path) -> int | None:
    """The file, open and locked; None where it cannot be locked."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        late, holder = time.monotonic() > deadline, ""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "it does not say which"
        except OSError as error:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            _tell(path.parent, error.strerror or str(error))
            return None
        if not holder and (late or _is(path, descriptor)):
            with contextlib.suppress(OSError):  # who it is helps; it need not fit on the disk
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)  # of another run, or of one that has just ended and removed it
        if late:
            raise WorkdirError(
                f"{path.parent} is in use by another run ({holder}), which still holds {path.name} after {PATIENCE:g} "
                "seconds; stop that one and run the same command again, or choose another --workdir"
            )
        time.sleep(INTERVAL)


def _is(path: Path, descriptor: int) -> bool:
    """Whether a file that is open still has its name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _tell(workdir: Path, reason: str) -> None:
    print(
        f"warning: {workdir} cannot be locked ({reason}): nothing keeps a second run out of it",
        file=sys.stderr,
        flush=True,
    )
