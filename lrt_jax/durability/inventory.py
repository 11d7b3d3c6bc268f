"""Which checkpoints of a work dir count: complete and verified ones; what to do with the others.

    checkpoints/STEP/               a checkpoint; complete once it has a manifest
    checkpoints/saving              names the step whose save is under way
    checkpoints/damaged/STEP        set aside, since its files are not what was saved; never deleted
    checkpoints/superseded/STEP     newer than the one that the run was taken back to; never deleted

A save that was cut off never counted: it is removed before the run goes on. A checkpoint that was complete and is
not what was saved any more is set aside, and the newest good one before it is used. A run that had checkpoints and has
none left stops, rather than begin at step 0.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence

from etils import epath

from lrt_jax.durability import manifest
from lrt_jax.setup.errors import UserError
from lrt_jax.setup.paths import LocalPath

FOLDER = "checkpoints"
SAVING = "saving"
DAMAGED, SUPERSEDED = "damaged", "superseded"
DELETED = ".deleted"  # what a checkpoint's name ends in while it is removed
TEMPORARY = ".orbax-checkpoint-tmp"  # what the name of a folder holds that orbax has not finished
LOOKS, INTERVAL = 3, 0.1  # at a checkpoint beside a run, and seconds between them
NAMED = 4  # damaged files that a sentence names


class CheckpointError(UserError):
    """No checkpoint can be used, or none written; one sentence says which and why."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One checkpoint as it is found: unfinished where its save was cut off or goes on; its files' faults; its bytes."""

    step: int
    unfinished: bool
    faults: tuple[str, ...]
    bytes: int


def folder_of(workdir: epath.PathLike, step: int | None = None) -> epath.Path:
    """Where the checkpoints are, or the one of ``step``."""
    folder = LocalPath(workdir).absolute() / FOLDER
    return folder if step is None else folder / str(step)


def steps(workdir: epath.PathLike) -> list[int]:
    """The steps of the complete checkpoints, ascending; whether they are good is not known yet."""
    return [step for step in _all(workdir) if manifest.exists(folder_of(workdir, step))]


def survey(workdir: epath.PathLike) -> list[Entry]:
    """Every checkpoint in its place, verified, ascending; one that a run removes meanwhile is left out."""
    entries = (_examined(workdir, step) for step in _all(workdir))
    return [entry for entry in entries if entry is not None]


def faults(workdir: epath.PathLike, step: int, items: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with the checkpoint of ``step``, as :func:`manifest.faults` says it.

    Raises:
      CheckpointError: a file of it may not be read, which is no damage.
    """
    try:
        return manifest.faults(folder_of(workdir, step), items)
    except PermissionError as error:
        raise CheckpointError(
            f"{error.filename} cannot be read ({error.strerror}), so that nobody knows whether the checkpoint of step "
            f"{step:,} is good; make it readable"
        ) from None


def aside(workdir: epath.PathLike) -> dict[str, list[str]]:
    """The names of what was set aside: under ``damaged`` and under ``superseded``.

    Raises:
      CheckpointError: a file lies where such a folder must be.
    """
    places = {kind: _place_of(workdir, kind) for kind in (DAMAGED, SUPERSEDED)}
    return {kind: sorted(p.name for p in place.iterdir()) if place.exists() else [] for kind, place in places.items()}


def recover(workdir: epath.PathLike, tell: Callable[[str], None]) -> int | None:
    """Puts the checkpoints in order before a run goes on, and finds where it goes on from.

    Removes saves that were cut off, sets damaged checkpoints aside, and tells a sentence for each that was not used.

    Returns:
      The newest good checkpoint's step; None where no save was ever completed.

    Raises:
      CheckpointError: there were checkpoints, and no good one is left; or they cannot be moved.
    """
    folder = folder_of(workdir)
    try:
        for path in list(folder.iterdir()) if folder.exists() else ():
            if TEMPORARY in path.name:
                path.rmtree()
        _sweep(folder)
        for step in reversed(_all(workdir)):
            if _is_unfinished(workdir, step):
                _remove(folder / str(step))
                tell(f"the save of step {step:,} had not been completed when the run ended; it does not count")
                continue
            found = faults(workdir, step)
            if not found:
                (folder / SAVING).unlink(missing_ok=True)
                return step
            place = _set_aside(workdir, step, DAMAGED)
            tell(f"the checkpoint of step {step:,} is damaged: {named(found)}; it was moved to {place}")
        (folder / SAVING).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoints in {folder} cannot be put in order ({error.strerror or error}); the work dir must be "
            "readable and writable"
        ) from None
    damaged = aside(workdir)[DAMAGED]
    if damaged:
        raise CheckpointError(
            f"no good checkpoint is left in {folder}, and {', '.join(damaged)} in {DAMAGED}/ cannot be used; "
            "put back an intact copy of one, or begin anew with another --workdir"
        )
    return None


def newest_good(workdir: epath.PathLike, tell: Callable[[str], None], items: tuple[str, ...] = ()) -> int | None:
    """The newest good checkpoint's step, for readers: nothing is moved, since a run may be writing here.

    Tells a sentence for each damaged checkpoint. ``items`` are going to be read of it; none: everything.

    Raises:
      CheckpointError: there are checkpoints, but no good one.
    """
    seen: set[int] = set()
    while new := [step for step in steps(workdir) if step not in seen]:  # others come while old ones are removed
        for step in reversed(new):
            damage = faults(workdir, step, items)
            if not damage:
                return step
            if not is_gone(workdir, step):
                tell(f"the checkpoint of step {step:,} is damaged: {named(damage)}; it is not used")
        seen.update(new)
    if found := steps(workdir):
        raise CheckpointError(f"no good checkpoint is in {folder_of(workdir)}: all of {found} are damaged")
    return None


def is_gone(workdir: epath.PathLike, step: int) -> bool:
    """Whether a checkpoint is not there any more, which is no damage: a run removes old ones beside its readers."""
    return not folder_of(workdir, step).exists()


def begin(workdir: epath.PathLike, step: int) -> None:
    """Notes that a save of ``step`` is under way, before its first byte is written."""
    folder_of(workdir).mkdir(parents=True, exist_ok=True)
    (folder_of(workdir) / SAVING).write_text(str(step))


def complete(workdir: epath.PathLike, step: int, keep: int) -> None:
    """Writes the manifest of a save that has ended; only then removes what is older than the newest ``keep``."""
    folder = folder_of(workdir)
    manifest.write(folder / str(step))
    (folder / SAVING).unlink(missing_ok=True)
    _sweep(folder)
    for old in steps(workdir)[:-keep]:
        _remove(folder / str(old))


def rewind(workdir: epath.PathLike, step: int) -> list[int]:
    """Sets checkpoints newer than ``step`` aside, so that the run goes on from it; returns their steps.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
    """
    found = steps(workdir)
    if step not in found:
        raise CheckpointError(
            f"--rewind is {step}, but {workdir} has no checkpoint of that step; allowed are: "
            f"{', '.join(map(str, found)) or 'none'}"
        )
    if damage := faults(workdir, step):
        raise CheckpointError(f"--rewind is {step}, a checkpoint that is damaged: {named(damage)}")
    newer = [other for other in found if other > step]
    for other in newer:
        _set_aside(workdir, other, SUPERSEDED)
    return newer


def named(found: Sequence[str]) -> str:
    """The first few faults, and how many more there are."""
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ", ".join(found[:NAMED]) + more


def _all(workdir: epath.PathLike) -> list[int]:
    """The steps that have a folder, whatever is in it, ascending.

    Raises:
      CheckpointError: the folder of all of them cannot be listed.
    """
    folder = folder_of(workdir)
    try:
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.exists() else []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed ({error.strerror}); it must be a run's folder") from None


def _examined(workdir: epath.PathLike, step: int) -> Entry | None:
    """A checkpoint as it is found; None if it is gone by the time that something is found to be wrong with it."""
    folder = folder_of(workdir, step)
    for _ in range(LOOKS):
        if manifest.exists(folder):
            found = tuple(faults(workdir, step))
            return None if found and is_gone(workdir, step) else Entry(step, False, found, manifest.total_bytes(folder))
        if _is_unfinished(workdir, step):
            return Entry(step, True, (), 0)
        if is_gone(workdir, step):
            return None
        time.sleep(INTERVAL)  # neither finished nor not: a save may have ended between the two questions
    return Entry(step, False, tuple(faults(workdir, step)), 0)


def _is_unfinished(workdir: epath.PathLike, step: int) -> bool:
    """Whether a save was cut off. Without the note that it was under way, a missing manifest is a damage."""
    if manifest.exists(folder_of(workdir, step)):
        return False
    try:
        return (folder_of(workdir) / SAVING).read_text() == str(step)
    except FileNotFoundError:
        return False


def _place_of(workdir: epath.PathLike, kind: str) -> epath.Path:
    """The folder for checkpoints of a kind that are set aside, whether it is there yet or not."""
    place = folder_of(workdir) / kind
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"{place} is a file; {kind} checkpoints are set aside in a folder of that name: move it")
    return place


def _set_aside(workdir: epath.PathLike, step: int, kind: str) -> epath.Path:
    """Moves a checkpoint to a folder of its kind, beside earlier ones of the same step."""
    folder = _place_of(workdir, kind)
    folder.mkdir(parents=True, exist_ok=True)
    place, copies = folder / str(step), 1
    while place.exists():
        copies += 1
        place = folder / f"{step}.{copies}"
    return folder_of(workdir, step).rename(place)


def _remove(path: epath.Path) -> None:
    """Deletes a checkpoint's folder; renamed first, so that one that is deleted in part is never taken for one."""
    with contextlib.suppress(FileNotFoundError):
        path.rename(path.with_name(path.name + DELETED))
    _sweep(path.parent)


def _sweep(folder: epath.Path) -> None:
    """Deletes what was renamed to be deleted; what somebody still reads, on NFS, is left for the next time."""
    for path in list(folder.iterdir()) if folder.exists() else ():
        if path.name.endswith(DELETED):
            with contextlib.suppress(OSError):
                path.rmtree()
