"""All that is worth knowing of one GPU or TPU, by one command that may be cut off at any time.

    python -m benchmarks.accelerator --minutes=9 --out=DIR [--only=REGEX] [--list]

It runs the other benchmarks, and a training run on real text that is killed and goes on, each in a process of its own,
most valuable first. DIR gets three files: results.json, table.md, whose tables are for docs/LOG.md, and log.txt. They
have every row seconds after it was measured. A benchmark that does not fit the time that is left is left out, and said
to be; one that takes too long is ended, and its rows so far count. On a CPU everything is shrunk, to see that it works.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import reports
from benchmarks.arguments import pattern

ROOT = Path(__file__).parents[1]
# Kept back for the last report.
RESERVE = 5.0
TRAINING = "training on text, killed and resumed"
# Seconds that a process that is told to end has to do so.
GRACE = 5.0
# Seconds between reports while something runs.
INTERVAL = 2.0


class OutOfTimeError(Exception):
    """A process was ended at its limit."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Where sections run.

    Attributes:
      folder: for their files, which nobody needs afterwards.
      log: what they print goes here.
      report: called every few seconds while something runs.
    """

    folder: Path
    log: Path
    report: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Section:
    """One process, or a few, and what they measure.

    Attributes:
      name: in the report.
      least: seconds without which it is not worth beginning.
      most: seconds after which it is ended.
      run: given the time at which it must be done, leaves rows in ``file`` of the work's folder.
    """

    name: str
    least: float
    most: float
    run: Callable[[Work, float], None]

    @property
    def file(self) -> str:
        """Where its rows are."""
        return re.sub(r"\W+", "_", self.name) + ".json"


def sections(platform: str) -> Iterator[Section]:
    """What is measured, most valuable first, on a ``cpu``, ``gpu`` or ``tpu``."""
    on_cpu = platform == "cpu"
    small = ["--layers=2", "--width=64", "--heads=2", "--length=64", "--vocab=256"]
    depth = (lambda n: small) if on_cpu else (lambda n: [f"--depth={n}"])
    step = ["--subsets=2", "--refinements=1", "--memories=shared"]
    rate = ["--models=shared", "--no-loops", *(["--tokens=16", "--prompt=8"] if on_cpu else ["--length=2048"])]
    kinds = "--kinds=" + ",".join(["parts", "blocked", *{"gpu": ["cudnn"], "tpu": ["splash"]}.get(platform, [])])
    attention = [kinds, "--subsets=1,2,4", *(["--length=64", "--repeats=1"] if on_cpu else ["--repeats=5"])]
    yield benchmark("attention", 25, 90, "attention", *attention)
    yield benchmark("step, depth 12", 60, 200, "step", *depth(12), *step)
    yield benchmark("step, depth 20", 90, 240, "step", *depth(20), *step)
    yield benchmark("decode, batch 1", 30, 90, "decode", *depth(12), *rate)
    yield Section(TRAINING, 100, 220, lambda work, end: trained_and_killed(work, end, on_cpu))
    yield Section("prefill", 25, 90, lambda work, end: prefill(work, end, on_cpu))
    if not on_cpu:
        yield benchmark("decode, batch 64", 30, 90, "decode", *depth(12), *rate, "--batch=64")
    if platform == "gpu":  # splash attention takes whole blocks only
        yield benchmark("attention, odd lengths", 40, 120, "attention", "--sweep", "--subsets=1,2,3", "--rows=2")
    yield Section("equal compute", 60, math.inf, lambda work, end: equal_compute(work, end, on_cpu))


def benchmark(name: str, least: float, most: float, module: str, *arguments: str) -> Section:
    """A section that is one of the other benchmarks."""

    def run(work: Work, end: float) -> None:
        path = work.folder / Section(name, 0, 0, run).file
        execute([f"benchmarks.{module}", *arguments, f"--json={path}"], work, end)

    return Section(name, least, most, run)


def execute(arguments: list[str], work: Work, end: float, until: Callable[[], bool] | None = None) -> None:
    """Runs a module of this checkout to its end; or, once ``until`` says so, kills it.

    Args:
      arguments: the module and its arguments.
      work: where.
      end: when it must be done, by ``time.monotonic``.
      until: asked again and again.

    Raises:
      OutOfTimeError: it took too long, and was ended.
      RuntimeError: it ended with an error.
    """
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ, "PYTHONUNBUFFERED": "1"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    told = time.monotonic()
    with work.log.open("ab") as stream:
        stream.write(f"\n$ python -m {' '.join(arguments)}\n".encode())
        stream.flush()
        child = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=environment | {"PYTHONPATH": path},
            start_new_session=True,
        )
        try:
            while child.poll() is None:
                if until is not None and until():
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
                    return
                if time.monotonic() > end:
                    raise OutOfTimeError
                if time.monotonic() > told + INTERVAL:
                    work.report()
                    told = time.monotonic()
                time.sleep(0.1)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)
                try:
                    child.wait(GRACE)
                except subprocess.TimeoutExpired:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
    if child.returncode:
        last = work.log.read_text(errors="replace").strip().splitlines()[-1]
        raise RuntimeError(f"exit {child.returncode}: {last}")


def training(work: Work, name: str, on_cpu: bool, *changes: str) -> tuple[list[str], Path]:
    """The command of a training run on the standard library's source, and its work dir."""
    workdir = work.folder / "runs" / name
    config = "configs/base.py:debug" if on_cpu else "configs/nanochat.py:depth=12"
    settings = ["train.tokens_per_parameter=0.0", "eval.batch_size=8", "eval.rows=8", "eval.final_rows=16"]
    if not on_cpu:
        settings += ["model.vocab_size=8192", "train.batch_size=32", "eval.batch_size=32", "eval.final_rows=64"]
    settings += ["train.log_every=10", "train.eval_every=0", *changes]
    return ["lrt_jax.main", f"--config={config}", f"--workdir={workdir}", *(f"--config.{s}" for s in settings)], workdir


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics that are whole."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def trained_and_killed(work: Work, end: float, on_cpu: bool) -> None:
    """Trains, kills the process without a word after its first checkpoint, and lets the same command end the run."""
    steps, save = (40, 10) if on_cpu else (300, 100)
    command, workdir = training(work, "killed", on_cpu, f"train.steps={steps}", f"train.save_every={save}")

    def saved_and_gone_on() -> bool:
        saved = any((workdir / "checkpoints").glob("*/manifest.json"))
        return saved and max((line["step"] for line in metrics(workdir)), default=0) > save

    began = time.monotonic()
    execute(command, work, end, until=saved_and_gone_on)
    killed = max(line["step"] for line in metrics(workdir))
    before = len(metrics(workdir))
    execute(command, work, end)
    lines = metrics(workdir)
    first = [line["perf/seconds_to_first_step"] for line in lines if "perf/seconds_to_first_step" in line]
    rates = [line for line in lines if "perf/tokens_per_second" in line]
    row = {
        "steps": lines[-1]["step"],
        "killed_at": killed,
        "resumed_at": min(line["step"] for line in lines[before:]),
        "seconds_to_first_step": first,
        "tokens_per_second": max(line["perf/tokens_per_second"] for line in rates),
        "mfu": max(line["perf/mfu"] for line in rates),
        "seconds": time.monotonic() - began,
        **{name: lines[-1][name] for name in ("val/bpb", "val/bpb_sequential", "val/bpb_init")},
    }
    write(work, TRAINING, [row])


def prefill(work: Work, end: float, on_cpu: bool) -> None:
    """Fixed-point prefill of the model that the training run left."""
    workdir = work.folder / "runs" / "killed"
    if not workdir.exists():
        raise RuntimeError("there is no trained model: its run was left out")
    lengths = "--lengths=16" if on_cpu else "--lengths=512,1024"
    path = work.folder / Section("prefill", 0, 0, prefill).file
    options = [lengths, "--tolerances=0.1,0.01", "--rows=8", f"--json={path}"]
    execute(["benchmarks.prefill", str(workdir), *options], work, end)


def equal_compute(work: Work, end: float, on_cpu: bool) -> None:
    """Plain, settled and interleaved training of a small model, each for as many effective tokens; as many as fit."""
    steps = 40 if on_cpu else 600
    small = [] if on_cpu else ["model.layers=6", "model.width=384", "model.heads=3", "model.kv_heads=3"]
    small += [] if on_cpu else ["model.sequence_length=512", "train.batch_size=64"]
    plain = ["schedule.name=plain", "model.memory=none", "model.residual_injection=False"]
    recurrent = ["model.source_layer=1"] if on_cpu else ["model.source_layer=4", "model.memory_layers=2-6"]
    stages = "schedule.stages='plain:0.4, multi_refinement(1, settle=1):0.6'"
    settled = [*recurrent, "schedule.name=staged", stages]
    interleaved = 1 / 2 if on_cpu else 1 / (1 / 6 + 2 * 5 / 6)
    rows: list[dict[str, Any]] = []
    longest = 0.0
    runs = (("plain", 1.0, plain), ("settled", 1 / 1.1, settled), ("interleaved", interleaved, recurrent))
    for name, share, changes in runs:
        began = time.monotonic()
        if began + longest > end:
            return
        command, workdir = training(work, name, on_cpu, *small, f"train.steps={round(share * steps)}", *changes)
        execute(command, work, end)
        seconds = time.monotonic() - began
        longest = max(longest, seconds)
        last = metrics(workdir)[-1]
        effective = [line["compute/effective"] for line in metrics(workdir) if "compute/effective" in line]
        bpb = "val/bpb_sequential"
        rows.append({"schedule": name, "effective_tokens": effective[-1], bpb: last[bpb], "seconds": seconds})
        write(work, "equal compute", rows)


def write(work: Work, name: str, rows: list[dict[str, Any]]) -> None:
    """Leaves a section's rows where the report reads them."""
    (work.folder / Section(name, 0, 0, prefill).file).write_text(json.dumps({"rows": rows}, indent=2) + "\n")


def machine(limit: float) -> dict[str, Any]:
    """What JAX finds here, asked in a process of its own: the device is left to the benchmarks.

    Raises:
      SystemExit: JAX finds no device it can use.
    """
    ask = "import jax, json; d = jax.devices()[0]; print(json.dumps([d.platform, d.device_kind, jax.__version__]))"
    try:
        found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"error: JAX finds no device within {limit:.0f} s") from None
    if found.returncode:
        raise SystemExit(f"error: JAX finds no device: {found.stderr.strip().rpartition(chr(10))[2]}")
    platform, kind, version = json.loads(found.stdout.splitlines()[-1])
    about = {"platform": platform, "device": kind, "jax": version, "date": time.strftime("%Y-%m-%d")}
    return about | {"commit": commit()}


def commit() -> str:
    """Of this checkout; "unknown" where there is no git, or no repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        found = ""
    return found or "unknown"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="all together")
    parser.add_argument("--out", type=Path, required=True, help="a folder, made if it is missing; must be empty")
    parser.add_argument(
        "--only", type=pattern, default="", help="a regular expression that a section's name must match"
    )
    parser.add_argument("--list", action="store_true", help="only name the sections, and what they take")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"argument --minutes: {options.minutes} is not allowed; it must be above 0")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"argument --out: {options.out} must be a new or an empty folder")
    return options


def main() -> None:
    """Runs what fits the time, and reports after every section."""
    options = parse()
    end = time.monotonic() + 60 * options.minutes - RESERVE
    about = machine(60 * options.minutes)
    chosen = [s for s in sections(about["platform"]) if re.search(options.only, s.name)]
    if not chosen:
        names = ", ".join(section.name for section in sections(about["platform"]))
        raise SystemExit(f"error: --only matches no section; sections are: {names}")
    if options.list:
        for section in chosen:
            most = f"to {section.most:.0f} s" if math.isfinite(section.most) else "s and all that is left"
            print(f"{section.name}: {section.least:.0f} {most}")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    out, said = options.out.resolve(), dict[str, str]()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended, too
    with tempfile.TemporaryDirectory(prefix="lrt-jax-") as folder:
        files = {section.name: Path(folder) / section.file for section in chosen}
        reported = functools.partial(reports.write, out, files, said, about)
        run_all(chosen, Work(Path(folder), out / "log.txt", reported), said, end)
    print((out / "table.md").read_text())


def run_all(chosen: list[Section], work: Work, said: dict[str, str], end: float) -> None:
    """Runs what fits the time, and notes in ``said`` how each ended."""
    for section in chosen:
        began = time.monotonic()
        if end - began < section.least:
            said[section.name] = f"left out: {max(end - began, 0):.0f} s are left, and it needs {section.least:.0f}"
        else:
            try:
                said[section.name] = "under way"
                section.run(work, min(end, began + section.most))
                said[section.name] = f"{time.monotonic() - began:.0f} s"
            except OutOfTimeError:
                said[section.name] = f"ended after {time.monotonic() - began:.0f} s"
            except (RuntimeError, ValueError, KeyError) as error:
                said[section.name] = f"failed after {time.monotonic() - began:.0f} s: {error}"
        print(f"{section.name}: {said[section.name]}", flush=True)
        work.report()


if __name__ == "__main__":
    main()
