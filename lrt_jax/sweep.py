"""Compare variants at equal compute: ``python -m lrt_jax.sweep FILE --out=DIR [--shard=i/n] [--list]``.

FILE lists runs (``configs/sweeps/``), each with a budget of effective tokens. They run one after the other, each in a
folder of DIR; the same command goes on where it was stopped, and leaves out what is done. It ends with a table of
what is done so far (``table.md``), the numbers (``results.json``) and a picture (``bpb.png``; of
state tracking one for each task, ``accuracy-TASK.png``).
"""

import contextlib
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import jax
from absl import flags
from etils import epath

from lrt_jax import main as training
from lrt_jax.comparison import answers, plan, results
from lrt_jax.comparison.results import Answered, Result
from lrt_jax.data import records, tokenizer
from lrt_jax.durability import manifest
from lrt_jax.model import costs
from lrt_jax.reporting import drawing, sweep_charts
from lrt_jax.run.loop import TrainingError
from lrt_jax.setup import flags as command_line
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup import workdir as workdirs
from lrt_jax.setup.config import ConfigError
from lrt_jax.setup.durations import train_steps
from lrt_jax.setup.errors import writing

SECONDS = "seconds.json"  # in a run's folder: how long its sessions took


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("out", None, "The folder of the sweep's runs and results; default: runs/sweeps/<name of FILE>.")
    flags.DEFINE_string("shard", "0/1", "Of n machines with one folder, run the share of the i-th: i/n.")
    flags.DEFINE_bool("list", False, "Only print the runs, and which of them are done.")


def main(*files: str) -> int:
    """Runs what is not done yet, and reports."""
    if len(files) != 1:
        raise ConfigError(
            f"the arguments are {', '.join(files) or 'none'}; give one sweep file, as configs/sweeps/x.py"
        )
    sweep = plan.load(files[0])
    out = workdirs.local(flags.FLAGS.out or f"runs/sweeps/{Path(files[0]).stem}")
    mine = plan.share(sweep.runs, flags.FLAGS.shard)
    for run in mine:
        run.complete  # noqa: B018 - what cannot be is refused before the first run, and not in the middle
    if flags.FLAGS.list:
        for run in mine:
            print(f"{'done' if results.read(out / run.name) else 'to do'}  {run.name}")
        return 0
    # Of all runs together: those that differ by seed or budget alone have the same programs.
    meshes.cache_compilations(out)
    for number, run in enumerate(mine):
        if results.read(out / run.name) is None:
            print(f"\n=== run {number + 1} of {len(mine)}: {run.name}", flush=True)
            if not _run(run, out, sweep):
                print("stopped; the same command goes on from here")
                return 0
    report(sweep, out)
    return 0


def _run(run: plan.Run, out: Path, sweep: plan.Sweep) -> bool:
    """Trains and scores one run; False if a signal stopped it.

    A run whose training cannot go on (a loss that is not finite, say) is said to be so, and left out.
    """
    folder, config = out / run.name, run.complete
    _share_tokens(folder, [out / other.name for other in sweep.runs])
    began = time.perf_counter()
    scores: dict[str, float] = {}
    try:
        scores = training.run(config, folder)
    except TrainingError as error:
        print(f"warning: {run.name} is left out: {error}", file=sys.stderr, flush=True)
        return True
    finally:
        seconds = _add_seconds(folder / SECONDS, time.perf_counter() - began)
        jax.clear_caches()
    if not scores:
        return False
    parameters = costs.count_parameters(config.model).total
    steps = train_steps(config.train, config.model.sequence_length, parameters)
    try:
        results.write(folder, results.result_of(run, scores, seconds, parameters, steps))
    except ConfigError as error:
        print(f"warning: {run.name} is left out: {error}", file=sys.stderr, flush=True)
    return True


def _share_tokens(folder: Path, others: list[Path]) -> None:
    """Gives a new run the tokenizer and tokens of another one, so that all have the same and make them once."""
    ready = [other for other in others if (other / tokenizer.FILE).exists() and _complete(other / records.FOLDER)]
    if folder.exists() or not ready:
        return
    unfinished = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(ready[0] / records.FOLDER, unfinished / records.FOLDER, copy_function=_linked)
    shutil.copy2(ready[0] / tokenizer.FILE, unfinished / tokenizer.FILE)
    unfinished.rename(folder)


def _complete(tokens: Path) -> bool:
    """Whether the tokens are all there: a machine that is still writing them must not share its files."""
    return any(tokens.glob(f"*/{records.INDEX}"))


def _linked(source: str, target: str) -> None:
    """The same file in two folders; a copy where the disk cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _add_seconds(path: Path, more: float) -> float:
    before = 0.0
    with contextlib.suppress(OSError, ValueError, TypeError):  # there is none yet, or it is damaged
        before = float(json.loads(path.read_text()))
    if path.parent.exists():
        manifest.write_whole(epath.Path(path), json.dumps(before + more).encode())
    return before + more


def report(sweep: plan.Sweep, out: Path) -> None:
    """Writes and prints what the runs that are done, on whatever machine, came to."""
    found = [result for run in sweep.runs if (result := results.read(out / run.name)) is not None]
    texts = [result for result in found if isinstance(result, Result)]
    answered = [result for result in found if isinstance(result, Answered)]
    tables = answers.tables(sweep.variants, answered) if answered else [results.rows(sweep.variants, texts)]
    lines = [f"{len(found)} of {len(sweep.runs)} runs are done"]
    for table in tables:
        lines += ["", *results.markdown(table)]
    summary = {"reported_on": _machine(), **results.summary(sweep.variants, found)}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text("\n".join(lines) + "\n")
        (out / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    print("\n" + "\n".join(lines))
    compared = sweep_charts.equal_compute(texts, drawing.looks(sweep.variants), "bpb")
    for chart in filter(None, [compared, *sweep_charts.answers_by_length(answered, "accuracy")]):
        with writing(out):
            (out / f"{chart.name}.png").write_bytes(drawing.png(chart, "lrt_jax.sweep"))


def _machine() -> dict[str, str | int | None]:
    """What these numbers, or the last of them, were made with."""
    device = jax.devices()[0]
    about = {"device": device.device_kind, "devices": jax.device_count(), "cores": os.cpu_count()}
    return about | {"jax": jax.__version__, "python": platform.python_version()}


if __name__ == "__main__":
    define_flags()
    command_line.run(main, takes_arguments=True)
