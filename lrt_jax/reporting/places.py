"""What lies in the places that a report is of: work dirs, folders that hold some, sweeps."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from lrt_jax.comparison import results
from lrt_jax.comparison.results import Answered, Result
from lrt_jax.reporting import runs
from lrt_jax.reporting.runs import MARKS, OF_A_SWEEP, ReportError, Run
from lrt_jax.setup.errors import one_line

SUMMARY = "results.json"  # of a sweep


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A folder of ``lrt_jax.sweep``: the results of its runs, whoever wrote them, and what they are compared with.

    Attributes:
      name: of the folder.
      results: of runs on text.
      answered: of runs of state tracking.
      baseline: a variant.
    """

    name: str
    results: tuple[Result, ...]
    answered: tuple[Answered, ...]
    baseline: str

    @property
    def variants(self) -> list[str]:
        """Each once, the baseline first."""
        return list(dict.fromkeys([self.baseline, *(one.variant for one in (*self.results, *self.answered))]))


def runs_in(places: Sequence[Path]) -> tuple[list[Run], list[Sweep], list[str]]:
    """The runs of work dirs and of folders that hold some, the sweeps among these, and notes on what is left out.

    Raises:
      ReportError: there is no such place, or no run in it.
    """
    folders: dict[Path, tuple[Path, bool]] = {}  # by where they really are: as they were named, and if of a sweep
    sweeps: dict[Path, tuple[Path, list[Path]]] = {}  # likewise: as they were named, and where their runs really are
    notes: list[str] = []
    for place in places:
        inside, is_sweep = _inside(place, notes)
        for folder in inside:
            real = folder.resolve()
            if real in folders:
                notes.append(f"{folder} was given more than once, and is shown once.")
            if is_sweep or real not in folders:
                folders[real] = (folder, is_sweep)
        if is_sweep:
            sweeps[place.resolve()] = (place, [folder.resolve() for folder in inside])
    labels = _labels(list(folders))
    found = {real: runs.read(folder, labels[real], of_a_sweep) for real, (folder, of_a_sweep) in folders.items()}
    for _, inside in sweeps.values():
        found |= _named({real: found[real] for real in inside})
    compared = [_sweep(place, [found[real] for real in inside]) for place, inside in sweeps.values()]
    return list(found.values()), compared, notes


def _named(found: dict[Path, Run]) -> dict[Path, Run]:
    """Those runs of a sweep that are not done, under the name of their variant, if another run of it is done."""
    begins = {real: match[1] for real in found if (match := OF_A_SWEEP.fullmatch(real.name))}
    names = {begin: found[real].series for real, begin in begins.items() if found[real].result}
    return {
        real: dataclasses.replace(found[real], series=names[begin])
        for real, begin in begins.items()
        if found[real].result is None and begin in names
    }


def _inside(place: Path, notes: list[str]) -> tuple[list[Path], bool]:
    """The work dirs that a place is or holds, and whether it is a sweep's folder."""
    try:
        if not place.is_dir():
            found = "is a file" if place.exists() else "is not there"
            raise ReportError(f"{str(place)!r} {found}; give a run's work dir, or a folder that holds some")
        if _is_workdir(place):
            return [place], False
        inside = sorted((path for path in place.iterdir() if _is_run(path, notes)), key=_in_order)
    except OSError as error:
        raise ReportError(f"{str(place)!r} cannot be read ({error.strerror}); it must be a run's work dir") from None
    if not inside:
        raise ReportError(
            f"{str(place)!r} holds no run: neither it nor a folder in it has {' or '.join(MARKS[:2])}; give a run's "
            "work dir, or a folder that holds some"
        )
    return inside, (place / SUMMARY).exists() or any((path / results.FILE).exists() for path in inside)


def _is_workdir(path: Path) -> bool:
    return any((path / mark).exists() for mark in MARKS)


def _is_run(path: Path, notes: list[str]) -> bool:
    try:
        return path.is_dir() and _is_workdir(path)
    except OSError as error:
        notes.append(f"{path} cannot be read ({error.strerror}), and is left out.")
        return False


def _in_order(path: Path) -> tuple[str, float, int, str]:
    """By variant, budget and seed."""
    match = OF_A_SWEEP.fullmatch(path.name)
    return (match[1], float(match[2]), int(match[3]), "") if match else (path.name, 0.0, 0, "")


def _labels(folders: list[Path]) -> dict[Path, str]:
    """As much of the end of each path as tells it from the others."""
    for parts in range(1, 1 + max(len(folder.parts) for folder in folders)):
        labels = {folder: one_line("/".join(folder.parts[-parts:])) for folder in folders}
        if len(set(labels.values())) == len(labels):
            break
    return labels


def _sweep(place: Path, runs: Sequence[Run]) -> Sweep:
    done = [run.result for run in runs if run.result is not None]
    variants = list(dict.fromkeys(result.variant for result in done))
    baseline = None
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        baseline = json.loads((place / SUMMARY).read_text())["baseline"]
    usual = "plain" if "plain" in variants else next(iter(variants), "")
    return Sweep(
        name=one_line(place.resolve().name),
        results=tuple(result for result in done if isinstance(result, Result)),
        answered=tuple(result for result in done if isinstance(result, Answered)),
        baseline=baseline if baseline in variants else usual,
    )
