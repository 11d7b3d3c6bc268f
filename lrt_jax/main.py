"""Train: ``python -m lrt_jax.main --config=configs/base.py [--workdir=DIR] [--config.key=value …]``."""

import contextlib
import dataclasses
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from lrt_jax.data import corpus, pipeline, records, tokenizer
from lrt_jax.evaluation import health
from lrt_jax.evaluation.bits_per_byte import Evaluator
from lrt_jax.inference import load, text
from lrt_jax.inference.generate import Method, check_lengths
from lrt_jax.inference.sampling import Sampling
from lrt_jax.model import costs
from lrt_jax.model.backend import Attention, attention_kind, compute_dtype
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.model.parameters import table
from lrt_jax.setup import config as configs
from lrt_jax.setup import flags as command_line
from lrt_jax.setup import hardware, processes, streams, validation
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup import workdir as workdirs
from lrt_jax.setup.durations import require_ahead, train_steps
from lrt_jax.setup.errors import one_line
from lrt_jax.training import (
    binding,
    checkpoint,
    inventory,
    lock,
    loop,
    metrics,
    optimizer,
    stages,
    state,
)
from lrt_jax.training.interruption import Stopped, StopRequests
from lrt_jax.training.profiling import Profiler
from lrt_jax.training.startup import Startup
from lrt_jax.training.watchdog import Watchdog

# In the work dir, where the watchdog puts the stacks of a process that it ends.
WATCHDOG_LOG = "stacks.log"


def define_flags() -> None:
    """Declares the command's flags: only where it runs, so that commands can be imported side by side."""
    config_flags.DEFINE_config_file("config", None, "The config file, with its argument after a colon.")
    flags.DEFINE_string("workdir", None, "Where the run lives; default: runs/<config name>.")
    flags.DEFINE_integer(
        "stopped_exit_code",
        0,
        "Exit code where a signal stopped the run before its end, all saved; for launchers to whom 0 means complete.",
        lower_bound=0,
        upper_bound=255,
    )
    flags.DEFINE_integer(
        "profile",
        0,
        "So many steps are traced, after the first few, into the work dir's folder profile; 0: none.",
        lower_bound=0,
    )
    processes.define_flags()


def main() -> int:
    """Trains the config named by the flags, or goes on where a run in the same work dir stopped; the exit code."""
    streams.outlive_readers()
    if flags.FLAGS.config is None:
        raise configs.ConfigError("--config is not set; for the default run: --config=configs/base.py")
    config = validation.from_config_dict(flags.FLAGS.config)
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    place = workdirs.local(flags.FLAGS.workdir or str(default_workdir(name)))
    processes.start()
    scores = run(config, place, flags.FLAGS.profile)
    return 0 if scores else flags.FLAGS.stopped_exit_code


def default_workdir(config_file: str) -> Path:
    """``configs/base.py:debug`` → ``runs/base_debug``."""
    file, _, variant = config_file.partition(":")
    return Path("runs") / "_".join(part for part in (Path(file).stem, re.sub(r"[^\w=,.-]", "-", variant)) if part)


def run(config: configs.Config, workdir: Path, profile: int = 0) -> dict[str, float]:
    """Trains to the end, or to an interruption; scores and samples the result.

    Of several processes, which share the work dir, all compute and read, and the first writes and prints.

    Args:
      config: the run.
      workdir: where it lives, and no other run; if it holds checkpoints, the run goes on from the newest good one.
      profile: how many steps to trace.

    Returns:
      The closing metrics; empty if the run was interrupted.

    Raises:
      UserError: something that the user can mend.
    """
    startup, stop = Startup(), StopRequests()
    try:
        with (
            stop.listening(),
            Watchdog(workdir / WATCHDOG_LOG) as watchdog,
            watchdog.phase("set-up or closing", "config.train.phase_timeout", config.train.phase_timeout),
            contextlib.ExitStack() as alone,
        ):
            processes.require_same("config", dataclasses.asdict(config))
            processes.together(lambda: alone.enter_context(lock.held(workdir)) if processes.is_first() else None)
            workdirs.require_shared(workdir)
            return _run(config, workdir, startup, stop, watchdog, Profiler(workdir, profile))
    except Stopped:
        processes.say("stopped by a signal; run the same command to go on")
        return {}


def _run(
    config: configs.Config,
    workdir: Path,
    startup: Startup,
    stop: StopRequests,
    watchdog: Watchdog,
    profiler: Profiler,
) -> dict[str, float]:
    """:func:`run`, while signals are heard and a watchdog watches."""
    began = time.perf_counter()
    mesh = meshes.make_mesh(config.mesh)
    meshes.check(config, mesh.shape)
    # What this machine cannot compute is refused now, and not when the tokens are made.
    compute_dtype(config.model)
    _attention(config, mesh)
    start = _recover(workdir)
    changes = binding.check_config(config, workdir)
    counts = costs.count_parameters(config.model)
    steps = train_steps(config.train, config.model.sequence_length, counts.total)
    require_ahead(config.train, steps, start or 0)
    meshes.cache_compilations(workdir)
    startup.lap("devices and checkpoints")

    texts = corpus.open_corpus(config.data, records.begun(workdir, binding.records_of(workdir, start)))
    processes.say(one_line(texts.read_as))
    binding.check_tokenizer(config, workdir)
    with watchdog.phase("making tokens", "none", 0.0):  # of a corpus of any size: no limit suits all
        tokens = tokenizer.Tokenizer(
            processes.from_first(lambda: tokenizer.load_or_train(config, texts, workdir).model)
        )
        if config.eval.sample_tokens:  # said now, and not when all is trained
            prompt = text.encode(tokens, config.eval.prompt)
            check_lengths([prompt], config.eval.sample_tokens, config.model.sequence_length)
        rows = records.prepare(config, texts, tokens, workdir)
    batches = pipeline.training_batches(config, rows, meshes.local_rows(mesh, config.train.batch_size))
    held_out = pipeline.held_out_rows(config, texts, tokens, config.eval.final_rows)

    startup.lap("data")

    decoder = Decoder(config.model, mesh)
    transformation = optimizer.build(config.optimizer, table(config.model), steps, mesh)
    evaluator = Evaluator(config, mesh, held_out, tokens.token_bytes)

    checkpoints = checkpoint.Checkpoints(workdir, config.train.keep)
    imported = binding.holds_parameters_only(workdir)
    if start is not None and not imported:
        train_state = checkpoints.restore(state.abstract(decoder, transformation, mesh), batches, start)
    else:
        train_state = state.create(decoder, transformation, mesh, config.seed)
        if imported:
            params = checkpoints.restore_params(state.abstract_params(decoder, mesh), start or 0)
            train_state = train_state.replace(params=params)
    # Only now, so that a mistake in the config leaves nothing behind that binds the work dir to it.
    if processes.is_first():
        tokenizer.keep(tokens, workdir)
        binding.write_config(config, workdir)
    writer = metrics.Writer(workdir, start or 0, steps) if processes.is_first() else metrics.Silent()
    begins = f"going on from step {start:,}" if start is not None else "beginning at step 0"
    begins = "beginning at step 0 with the parameters imported into it" if imported else begins
    for line in _opening(config, counts, mesh, steps, [*changes, *_left_out(rows), f"{workdir}: {begins}"]):
        writer.line(line)

    startup.lap("state")

    def between() -> None:
        watchdog.beat()
        stop.check(mesh)

    parts = loop.Parts(
        stages=tuple(stages.build(config, decoder, mesh, transformation, steps)),
        batches=batches,
        mesh=mesh,
        checkpoints=checkpoints,
        writer=writer,
        evaluate=lambda params: evaluator(Model(decoder, params), config.eval.rows, between),
        peak_flops=hardware.peak_flops(mesh.local_devices[0]) * mesh.size,
        stop=stop,
        watchdog=watchdog,
        startup=startup,
        profiler=profiler,
        constant={"data/left_out": rows.left_out} if config.data.on_bad_record == "skip" else {},
        documents=lambda batch: pipeline.described(batch, tokens),
        workdir=workdir,
    )
    try:
        train_state, complete = loop.train(config, parts, train_state)
        if not complete:
            writer.line(f"stopped at step {int(train_state.step):,}; run the same command to go on from there")
            return {}
        with stop.deferred():
            scores = evaluator(Model(decoder, train_state.params), between=between)
        writer.write(steps, scores)
    finally:
        writer.close()
        batches.close()
        checkpoints.close()
    for line in _closing(config, scores, evaluator, parts, time.perf_counter() - began):
        processes.say(line)
    if config.eval.sample_tokens:
        processes.say(f"\nA sample, decoded with the memory, after {config.eval.prompt!r}:\n")
        trained = load.Trained(config, Model(decoder, train_state.params), tokens, steps)
        method = Method(Sampling(temperature=config.eval.temperature), config.decode)
        for piece in text.stream(trained, config.eval.prompt, tokens=config.eval.sample_tokens, method=method):
            processes.say(piece, end="")
        processes.say()
    return scores


def _recover(workdir: Path) -> int | None:
    """The newest good checkpoint's step; the first process puts the others away."""

    def recover() -> bytes:
        found = inventory.recover(workdir, lambda line: print(f"warning: {line}", file=sys.stderr, flush=True))
        return b"" if found is None else str(found).encode()

    found = processes.from_first(recover)
    return int(found) if found else None


def _left_out(rows: records.Records) -> Iterator[str]:
    if rows.left_out:
        yield f"{rows.left_out:,} bad records of the corpus are left out (config.data.on_bad_record = skip)"


def _attention(config: configs.Config, mesh: Mesh) -> Attention:
    """How the forwards of the run's last stage attend, those of its subsets where it has some."""
    schedule, length = config.schedule.in_stages[-1].schedule, config.model.sequence_length
    subsets = schedule.description.strided(schedule)
    traced = subsets is not None and subsets > 1 and not schedule.unroll
    return attention_kind(config.model, length // (subsets or 1), mesh, subsets, traced=traced)


def _opening(
    config: configs.Config, counts: costs.ParameterCounts, mesh: Mesh, steps: int, notes: list[str]
) -> Iterator[str]:
    """What is about to happen, in a few lines."""
    model, train = config.model, config.train
    kind = "plain Transformer" if not model.recurrent else f"Latent Recurrent Transformer, {model.memory} memory"
    yield f"{kind}: {model.layers} layers, width {model.width}, {model.heads} heads, context {model.sequence_length}"
    yield f"parameters\n{counts}"
    device, attention = jax.devices()[0], _attention(config, mesh)
    yield (
        f"{jax.device_count()} × {device.device_kind} ({device.platform}), {compute_dtype(model)} compute, "
        f"{attention.kind} attention"
    )
    if attention.why:
        yield f"warning: no kernel serves this model's attention, so steps take longer: {attention.why}"
    if mesh.size > 1:
        axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
        often = "once a step" if meshes.gathers_once(config.mesh, mesh.shape) else "by every forward"
        what = "weights gathered and gradients summed" if mesh.shape["fsdp"] > 1 else "gradients summed"
        yield f"mesh: {axes}, {what} {often}" if mesh.shape["data"] * mesh.shape["fsdp"] > 1 else f"mesh: {axes}"
    tokens = steps * train.batch_size * model.sequence_length
    schedule = config.schedule.stages or config.schedule.name
    yield f"{schedule}, {config.optimizer.name}, {steps:,} steps, {tokens:,} tokens"
    yield from notes


def _closing(
    config: configs.Config, scores: dict[str, float], evaluator: Evaluator, parts: loop.Parts, seconds: float
) -> Iterator[str]:
    """The closing table."""
    per_step = config.train.batch_size * config.model.sequence_length
    tokens, effective = parts.steps * per_step, parts.forwards_until(parts.steps) * per_step
    rows = {
        "initialization forward  val/bpb_init": scores["val/bpb_init"],
        "merged                  val/bpb": scores["val/bpb"],
        "sequential              val/bpb_sequential": scores["val/bpb_sequential"],
        "gzip -9, the same bytes": evaluator.gzip_bits_per_byte(),
    }
    if config.eval.baseline and config.eval.baseline_of == configs.fingerprint(config):
        rows["plain model, same compute, measured before"] = config.eval.baseline
    yield f"\n{parts.steps:,} steps, {tokens:,} tokens, {effective:,.0f} effective"
    yield f"{seconds / 60:.1f} minutes in this session, setup and evaluation included"
    yield f"\nbits per byte of {len(evaluator.held_out.text):,} held-out bytes"
    for name, value in rows.items():
        yield f"  {name:<46}{value:8.4f}"
    yield from health.lines(scores)
    if warning := health.warning(scores, config.eval.gap):
        yield warning
    if evaluator.scoring != "sequential":
        yield f"val/bpb_sequential was computed by {evaluator.scoring}"


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
