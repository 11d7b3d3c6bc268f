"""Training steps of every schedule, as ratios to the plain step of the same run.

    python -m benchmarks.step [--json=FILE] [--depth=N | --layers= --width= --heads=] [--only=REGEX] …

A row's steps take turns with plain ones, so that a slow minute of a shared machine falls on both alike, and a ratio
is that of neighbours. No other row's state is held meanwhile. With --alone, the default on a GPU or TPU, whose memory
is dear and whose times vary little, the plain row is timed once and then let go. Turns in which the heap grows do not
count, three at most: several programs share it here, where a run that trains has one. A step is loss, gradients and
update; the update is AdamW's unless --optimizer=muon, since Muon's products would flatter the ratios. Temporary
memory is what XLA plans for the step beside its arguments. MFU is printed where the device's data sheet is known. The
file that --json names is written after every row.
"""

import argparse
import dataclasses
import functools
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.arguments import natural, output, pattern, positive, several
from benchmarks.checks import check
from lrt_jax.model import costs
from lrt_jax.model.backend import compute_dtype
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.parameters import table
from lrt_jax.setup import hardware, host_memory
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import MeshConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from lrt_jax.training import optimizer, state, step

ROW = "{:<26}{:>10}{:>9}{:>9}{:>12}{:>7}{:>10}{:>10}{:>10}"


@dataclasses.dataclass
class Row:
    """One schedule and memory variant.

    Attributes:
      schedule: name of the schedule; "plain" is the baseline model, without memory.
      subsets: S, 0 where it has none.
      refinements: K, 0 where it has none.
      memory: the model's memory.
      step_ratio: median time of a step, as a share of the plain row's.
      ideal_ratio: the same of FLOPs.
      temp_memory_ratio: temporary memory, as a share of the plain row's.
      tokens_per_second: training tokens, each counted once.
      mfu: FLOPs per second as a share of the device's peak; None where that is not known.
      compile_seconds: of the step, from scratch.
      step_seconds: median.
      temp_bytes: temporary memory.
      peak_bytes: with parameters and optimizer state.
    """

    schedule: str
    subsets: int
    refinements: int
    memory: str
    step_ratio: float = 1.0
    ideal_ratio: float = 1.0
    temp_memory_ratio: float = 1.0
    tokens_per_second: float = 0.0
    mfu: float | None = None
    compile_seconds: float = 0.0
    step_seconds: float = 0.0
    temp_bytes: int = 0
    peak_bytes: int = 0

    @property
    def name(self) -> str:
        """As the table prints it."""
        number = f"(S={self.subsets})" if self.subsets else f"(K={self.refinements})" if self.refinements else ""
        return f"{self.schedule}{number} {self.memory if self.schedule != 'plain' else ''}".strip()


def rows(
    subsets: list[int], refinements: list[int], memories: list[str], everything: bool
) -> Iterator[tuple[Row, ScheduleConfig]]:
    """What is compared: the plain baseline first, then every schedule with every memory.

    Unless it is to be ``everything``, memories after the first come with the first S only.
    """
    yield Row("plain", 0, 0, "none"), ScheduleConfig(name="plain")
    for memory in memories:
        whole = everything or memory == memories[0]
        for count in subsets if whole else subsets[:1]:
            yield Row("interleaved", count, 0, memory), ScheduleConfig(name="interleaved", subsets=count)
        for count in refinements if whole else []:
            schedule = ScheduleConfig(name="multi_refinement", refinements=count)
            yield Row("multi_refinement", 0, count, memory), schedule


@functools.cache
def creator(model: ModelConfig, optimizer_name: str) -> Callable[[int], state.TrainState]:
    """Makes fresh states from a seed; compiled once for all schedules of a model."""
    transformation = optimizer.build(OptimizerConfig(name=optimizer_name), table(model), steps=1000)
    return jax.jit(lambda seed: state.create(Decoder(model), transformation, meshes.make_mesh(MeshConfig()), seed))


class Timed:
    """A compiled training step with its state."""

    def __init__(self, model: ModelConfig, schedule: ScheduleConfig, batch: int, options: argparse.Namespace):
        """Compiles, from scratch."""
        transformation = optimizer.build(OptimizerConfig(name=options.optimizer), table(model), steps=1000)
        train = step.build(Decoder(model), schedule, transformation, options.accumulation)
        self._state = creator(model, options.optimizer)(0)
        shape = (batch, model.sequence_length + 1)
        tokens = jax.random.randint(jax.random.key(1), shape, 0, model.vocab_size, jnp.int32)
        self._batch = (tokens[:, :-1], tokens[:, 1:])
        lowered = train.lower(self._state, *self._batch)
        begin = time.perf_counter()
        self._compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - begin
        memory = self._compiled.memory_analysis()
        self.temp_bytes = int(memory.temp_size_in_bytes)
        self.peak_bytes = (
            int(memory.argument_size_in_bytes) + self.temp_bytes
        )  # the new state takes the old one's place

    def run(self) -> float:
        """Seconds of one step."""
        begin = time.perf_counter()
        self._state, metrics = self._compiled(self._state, *self._batch)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - begin


def turns(steps: list[Timed], repeats: int, spare: int = 3) -> Iterator[list[float]]:
    """Seconds of every step, run in turn, ``repeats`` times.

    The first turn does not count, nor do others that meet fresh pages of memory: ``spare`` at most, all together.
    """
    counted = uncounted = 0
    while counted < repeats:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds = [step_.run() for step_ in steps]
        # Temporary memory of a step on a CPU is hundreds of pages, even of 2 MB.
        grew = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before >= 100
        if uncounted < spare and (grew or not uncounted):
            uncounted += 1
            continue
        if grew:
            print("  the heap still grew in a turn that counts", file=sys.stderr)
        counted += 1
        yield seconds


def model_of(model: ModelConfig, row: Row) -> ModelConfig:
    """The model with a row's memory."""
    return dataclasses.replace(model, memory=row.memory, residual_injection=row.schedule != "plain")


def measure(
    model: ModelConfig,
    chosen: list[tuple[Row, ScheduleConfig]],
    options: argparse.Namespace,
) -> Iterator[Row]:
    """Fills in the rows, and yields each as it is done; beside each other row, the plain one is timed again.

    Args:
      model: its shape; the memory is the row's.
      chosen: the rows, the plain one first.
      options: of the command line.
    """

    def timed(row: Row, schedule: ScheduleConfig) -> Timed:
        made = Timed(model_of(model, row), schedule, options.batch, options)
        row.compile_seconds, row.temp_bytes, row.peak_bytes = made.compile_seconds, made.temp_bytes, made.peak_bytes
        print(f"  compiled {row.name} in {made.compile_seconds:.1f} s", file=sys.stderr, flush=True)
        return made

    plain, plain_schedule = chosen[0]
    baseline: Timed | None = timed(plain, plain_schedule)
    plain_seconds: list[float] = []
    if options.alone or len(chosen) == 1:
        plain_seconds = [taken for (taken,) in turns([baseline], options.repeats)]
        baseline = None
        yield _filled(plain, plain_schedule, plain_seconds, [1.0], chosen[0], model, options.batch)
    for row, schedule in chosen[1:]:
        if baseline is None:
            seconds = [taken for (taken,) in turns([timed(row, schedule)], options.repeats)]
            ratios = [taken / statistics.median(plain_seconds) for taken in seconds]
        else:
            pairs = list(turns([baseline, timed(row, schedule)], options.repeats))
            seconds, ratios = [taken for _, taken in pairs], [taken / before for before, taken in pairs]
            plain_seconds += [before for before, _ in pairs]
            if row is chosen[1][0]:
                yield _filled(plain, plain_schedule, plain_seconds, [1.0], chosen[0], model, options.batch)
        yield _filled(row, schedule, seconds, ratios, chosen[0], model, options.batch)


def _filled(
    row: Row,
    schedule: ScheduleConfig,
    seconds: list[float],
    ratios: list[float],
    plain: tuple[Row, ScheduleConfig],
    model: ModelConfig,
    batch: int,
) -> Row:
    """A row with what follows from the seconds of its steps, and their ratios to plain ones."""
    flops = costs.train_flops(model_of(model, row), schedule)
    peak = hardware.data_sheet_flops(jax.devices()[0])
    row.step_seconds = statistics.median(seconds)
    row.step_ratio = statistics.median(ratios)
    row.ideal_ratio = flops / costs.train_flops(model_of(model, plain[0]), plain[1])
    row.temp_memory_ratio = row.temp_bytes / plain[0].temp_bytes
    row.tokens_per_second = batch * model.sequence_length / row.step_seconds
    row.mfu = None if peak is None else flops * batch / row.step_seconds / (peak * jax.device_count())
    return row


def print_row(row: Row) -> None:
    """A row, for people."""
    cells = (f"{row.step_ratio:.2f} ×", f"{row.ideal_ratio:.2f} ×", f"{row.temp_memory_ratio:.2f} ×")
    mfu = "" if row.mfu is None else f"{row.mfu:.1%}"
    rest = (f"{row.tokens_per_second:,.0f}", mfu, f"{row.compile_seconds:.1f} s", f"{row.step_seconds * 1e3:,.0f} ms")
    print(ROW.format(row.name, *cells, *rest, f"{row.peak_bytes / 1e9:.1f} GB"), flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    on_cpu = jax.default_backend() == "cpu"

    parser.add_argument("--json", type=output, help="write the rows here")
    parser.add_argument("--depth", type=natural, default=0, help="nanochat's dial: sets layers, width and heads of 128")
    parser.add_argument("--layers", type=positive, default=6)
    parser.add_argument("--width", type=positive, default=384)
    parser.add_argument("--heads", type=positive, default=6)
    parser.add_argument("--kv_heads", type=natural, default=0, help="0: as many as heads")
    parser.add_argument("--length", type=positive, default=512 if on_cpu else 2048)
    parser.add_argument("--vocab", type=positive, default=4096 if on_cpu else 32768)
    parser.add_argument(
        "--batch", type=natural, default=4 if on_cpu else 0, help="0: what is estimated to fit; halved until it does"
    )
    parser.add_argument("--accumulation", type=positive, default=1)
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "muon"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--scan_layers", action="store_true")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--subsets", type=several(positive), default=[2, 4, 8])
    parser.add_argument("--refinements", type=several(positive, or_none=True), default=[1, 2] if on_cpu else [1, 2, 3])
    parser.add_argument("--memories", type=several(str), default=["shared", "layerwise"])
    parser.add_argument(
        "--everything",
        action=argparse.BooleanOptionalAction,
        default=not on_cpu,
        help="all S and K with every memory; else memories after the first come with the first S only",
    )
    parser.add_argument("--only", type=pattern, default="", help="a regular expression that a row's name must match")
    parser.add_argument("--repeats", type=positive, default=3 if on_cpu else 10)
    parser.add_argument("--alone", action=argparse.BooleanOptionalAction, default=not on_cpu)
    options = parser.parse_args(arguments)
    if options.depth:
        options.layers, options.heads = options.depth, -(-options.depth // 2)
        options.width = 128 * options.heads
    return options


def main() -> None:
    """Measures, prints the table, and writes the rows."""
    host_memory.keep_freed()
    options = parse()
    model = ModelConfig(
        layers=options.layers,
        width=options.width,
        heads=options.heads,
        kv_heads=options.kv_heads or options.heads,
        sequence_length=options.length,
        vocab_size=options.vocab,
        dtype=options.dtype,
        scan_layers=options.scan_layers,
        remat=options.remat,
    )
    chosen = list(rows(options.subsets, options.refinements, options.memories, options.everything))
    if not any(options.only.search(row.name) for row, _ in chosen):
        names = ", ".join(row.name for row, _ in chosen)
        raise SystemExit(f"error: --only is {options.only.pattern!r}, which matches no row; rows are: {names}")
    chosen = [chosen[0], *(pair for pair in chosen[1:] if options.only.search(pair[0].name))]
    device, options.batch = jax.devices()[0], options.batch or fitting_batch(model, options.accumulation)
    for row, schedule in chosen:
        check(model_of(model, row), schedule, batch_size=options.batch, accumulation=options.accumulation)
    kind = f"{jax.device_count()} × {device.device_kind}, jax {jax.__version__}, {compute_dtype(model)}"
    print(kind)
    print(f"{model.layers} layers, width {model.width}, {model.heads} heads, T {options.length}, V {options.vocab}")
    about: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "model": dataclasses.asdict(model)}
    while not all_measured(model, chosen, options, about):
        options.batch //= 2


def fitting_batch(model: ModelConfig, accumulation: int) -> int:
    """The largest power of two of rows that is estimated to fit the device, for the schedule that needs most."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 16e9)
    forwards, layer = 2, 40 * model.width  # bytes that a position leaves for the backward pass, about
    position = forwards * (model.layers * layer + 2 * model.vocab_size) / accumulation
    rows = (0.9 * limit - 16 * costs.count_parameters(model).total) / (position * model.sequence_length)
    return max(accumulation, 2 ** math.floor(math.log2(max(rows, 1))))


def all_measured(
    model: ModelConfig, chosen: list[tuple[Row, ScheduleConfig]], options: argparse.Namespace, about: dict[str, Any]
) -> bool:
    """Measures, prints and writes every row; False if the batch did not fit, and half of it may.

    Raises:
      SystemExit: not even the smallest batch fits.
    """
    print(f"batch {options.batch}")
    print(ROW.format("", "time", "ideal", "memory", "tokens/s", "MFU", "compile", "step", "peak"))
    lines = []
    try:
        for row in measure(model, chosen, options):
            print_row(row)
            lines.append(dataclasses.asdict(row))
            if options.json:
                text = json.dumps({"about": about | {"batch": options.batch}, "rows": lines}, indent=2)
                options.json.write_text(text + "\n")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if options.batch <= options.accumulation:
            raise SystemExit(f"error: --batch={options.batch} does not fit the device's memory") from None
        print(f"  batch {options.batch} does not fit", file=sys.stderr, flush=True)
        return False
    return True


if __name__ == "__main__":
    main()
