"""The files of a report: written whole, and only where nothing else is."""

from pathlib import Path

from etils import epath

from lrt_jax.durability import manifest
from lrt_jax.reporting import drawing
from lrt_jax.reporting.drawing import MARK
from lrt_jax.reporting.page import Page
from lrt_jax.reporting.runs import MARKS, ReportError
from lrt_jax.setup.errors import writing

PAGE = "index.html"
TRIED = ".written"  # and taken away at once, to see that files can be
BEGINNING = 4096  # bytes of a file in which our mark is


def check(out: Path) -> None:
    """Checks that a report may be written into a folder.

    Raises:
      ReportError: it is a run's work dir, holds a page or picture that no report has put there, or cannot be written.
    """
    try:
        if any((out / mark).exists() for mark in MARKS):
            raise ReportError(
                f"--out is {str(out)!r}, which is a run's work dir; name a folder of its own, as {out}/report"
            )
        for path in (out / PAGE, *sorted(out.glob("*.png"))):
            if path.exists() and not _is_ours(path):
                raise ReportError(
                    f"--out is {str(out)!r}, whose {path.name} is not of a report; name a folder that is new, or has "
                    "an earlier report"
                )
        out.mkdir(parents=True, exist_ok=True)
        (out / TRIED).touch()
        (out / TRIED).unlink()
    except OSError as error:
        raise ReportError(
            f"--out is {str(out)!r}, which cannot be written ({error.strerror}); name a folder that can"
        ) from None


def write(out: Path, page: Page) -> Path:
    """Writes page and charts, takes away charts of an earlier report that are not in this one, and returns the page.

    Raises:
      WorkdirError: the folder cannot be written.
    """
    text = page.html()  # draws the charts
    written = {f"{chart.name}.png": drawing.png(chart) for chart in page.charts}
    with writing(out):
        for name, data in (written | {PAGE: text.encode(errors="replace")}).items():
            manifest.write_whole(epath.Path(out / name), data)
        for path in out.glob("*.png"):
            if path.name not in written and _is_ours(path):
                path.unlink()
    return out / PAGE


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return MARK.encode() in stream.read(BEGINNING)
    except OSError:
        return False
