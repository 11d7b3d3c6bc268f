"""See a run: ``python -m lrt_jax.report DIR… [--out=FOLDER]``: one page, and its charts as PNG files.

DIR is a run's work dir, or a folder that holds some, as that of a sweep. The page (``index.html``) asks nobody for
anything: open it, send it, print it. Work dirs are only read, also while a run is on; what needs a model is computed on
the CPU, unless JAX_PLATFORMS says otherwise.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from lrt_jax.reporting import files
from lrt_jax.reporting.measured import Measured, Texts, measure
from lrt_jax.reporting.page import Page
from lrt_jax.reporting.places import runs_in
from lrt_jax.reporting.runs import Run
from lrt_jax.setup import flags as command_line
from lrt_jax.setup import workdir as workdirs
from lrt_jax.setup.config import ConfigError

FOLDER = "report"


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string(
        "out", None, "Where the page and its PNG files go; default: DIR/report of one DIR, ./report of several."
    )
    flags.DEFINE_integer("samples", 2, "Samples of each run, with the memory on and zeroed; 0: none.", lower_bound=0)
    flags.DEFINE_string("prompt", None, "The text that they continue; default: config.eval.prompt.")
    flags.DEFINE_bool("model", True, "--nomodel reads metrics and configs only: no checkpoint, no corpus.")


def main(*places: str) -> None:
    """Writes the report of the work dirs that are given."""
    if not places:
        raise ConfigError("the arguments are none; give one work dir or several, or a folder that holds some")
    named = [workdirs.expanded(place, "the work dir") for place in places]
    out = Path(FOLDER) if len(named) > 1 else named[0] / FOLDER
    if flags.FLAGS.out is not None:
        out = workdirs.local(flags.FLAGS.out, "--out")
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")  # a run may need all of the accelerator's memory
    print(write(named, out, flags.FLAGS.samples, flags.FLAGS.prompt, with_model=flags.FLAGS.model))


def write(places: Sequence[Path], out: Path, samples: int, prompt: str | None, *, with_model: bool = True) -> Path:
    """Writes the report, and returns the page's file.

    Args:
      places: work dirs, or folders that hold some.
      out: where to.
      samples: of each run; 0: none.
      prompt: of the samples; None: as the configs say.
      with_model: whether checkpoints and held-out text are read.

    Raises:
      ReportError: there is no run, or something else lies in ``out``.
      WorkdirError: ``out`` cannot be written.
    """
    found, sweeps, notes = runs_in(places)
    files.check(out)
    measured: dict[str, Measured] = {}
    texts, chosen = Texts(), {run.label for run in _chosen(found)}
    for run in found if with_model else ():
        if run.label in chosen:
            print(f"{run.label}: reading its newest checkpoint and what was held out", flush=True)
        measured[run.label] = measure(run, texts, samples, prompt, whole=run.label in chosen)
    if len(chosen) < len(found) and with_model:
        notes.append("Gates and samples are of one run of each variant: that of the largest budget and first seed.")
    page = Page(found, sweeps, measured, notes)
    return files.write(out, page)


def _chosen(found: Sequence[Run]) -> list[Run]:
    """Those whose checkpoints are read: of the runs of a sweep's variant, that of the largest budget and first seed."""
    chosen: dict[tuple[Path, str], Run] = {}
    for run in found:
        of = (run.folder.resolve().parent if run.of_a_sweep else run.folder, run.series)
        if of not in chosen or _rank(run) > _rank(chosen[of]):
            chosen[of] = run
    return list(chosen.values())


def _rank(run: Run) -> tuple[float, float]:
    return (run.result.budget, -run.result.seed) if run.result else (0.0, 0.0)


if __name__ == "__main__":
    define_flags()
    command_line.run(main, takes_arguments=True)
