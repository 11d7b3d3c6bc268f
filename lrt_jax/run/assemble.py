"""A run put together: from a config and a work dir to a trained, scored and sampled model."""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optax
from grain import DatasetIterator
from jax.sharding import Mesh

from lrt_jax.data import corpus, pipeline, records, tasks, tokenizer
from lrt_jax.data.pipeline import Batch
from lrt_jax.data.tokenizer import Tokenizer
from lrt_jax.durability import binding, checkpoint, inventory, lock
from lrt_jax.durability.interruption import Stopped, StopRequests
from lrt_jax.durability.watchdog import Watchdog
from lrt_jax.evaluation.accuracy import Accuracy
from lrt_jax.evaluation.bits_per_byte import Evaluator
from lrt_jax.few_shot import results
from lrt_jax.few_shot.core import Choice, Core
from lrt_jax.few_shot.tasks import FewShotError
from lrt_jax.inference import load, text
from lrt_jax.inference.generate import Method, check_lengths
from lrt_jax.inference.sampling import Sampling
from lrt_jax.model import costs
from lrt_jax.model.backend import compute_dtype
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.model.parameters import table
from lrt_jax.run import loop, metrics, report, stages
from lrt_jax.run.loop import Watchers
from lrt_jax.run.profiling import Profiler
from lrt_jax.run.startup import Startup
from lrt_jax.setup import hardware, processes
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup import workdir as workdirs
from lrt_jax.setup.config import Config
from lrt_jax.setup.durations import require_ahead, train_steps
from lrt_jax.setup.errors import one_line
from lrt_jax.training import optimizer, state
from lrt_jax.training.state import TrainState

# In the work dir, where the watchdog puts the stacks of a process that it ends.
WATCHDOG_LOG = "stacks.log"


def run(config: Config, workdir: Path, profile: int = 0) -> dict[str, float]:
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
            contextlib.ExitStack() as opened,
        ):
            processes.require_same("config", dataclasses.asdict(config))
            processes.together(lambda: alone.enter_context(lock.held(workdir)) if processes.is_first() else None)
            workdirs.require_shared(workdir)
            return _run(config, workdir, Watchers(stop, watchdog, startup, Profiler(workdir, profile)), opened)
    except Stopped:
        processes.say("stopped by a signal; run the same command to go on")
        return {}


def _run(config: Config, workdir: Path, watchers: Watchers, opened: contextlib.ExitStack) -> dict[str, float]:
    """:func:`run`, while signals are heard and a watchdog watches; what is opened is closed by ``opened``."""
    began, startup = time.perf_counter(), watchers.startup
    mesh = _machine(config)
    few_shot = _few_shot(config)
    start = _recover(workdir)
    changes = binding.check_config(config, workdir)
    counts = costs.count_parameters(config.model)
    steps = train_steps(config.train, config.model.sequence_length, counts.total)
    require_ahead(config.train, steps, start or 0)
    meshes.cache_compilations(workdir)
    startup.lap("devices and checkpoints")
    data = _data(config, workdir, mesh, start, watchers.watchdog)
    opened.callback(data.batches.close)
    startup.lap("data")
    decoder = Decoder(config.model, mesh)
    transformation = optimizer.build(config.optimizer, table(config.model), steps, mesh)
    plan = stages.build(config, decoder, mesh, transformation, steps)
    ask = _asking(config, workdir, decoder, data.tokenizer, few_shot)
    checkpoints = checkpoint.Checkpoints(workdir, config.train.keep)
    opened.callback(checkpoints.close)
    train_state, begins = _state(config, workdir, start, checkpoints, decoder, transformation, data.batches)
    # Only now, so that a mistake in the config leaves nothing behind that binds the work dir to it.
    if processes.is_first():
        if data.tokenizer is not None:
            tokenizer.keep(data.tokenizer, workdir)
        binding.write_config(config, workdir)
    writer = metrics.Writer(workdir, start or 0, steps) if processes.is_first() else metrics.Silent()
    opened.callback(writer.close)
    notes = [*changes, *_left_out(data.left_out), f"{workdir}: {begins}"]
    for line in report.opening(config, counts, mesh, plan, notes):
        writer.line(line)
    startup.lap("state")

    def between() -> None:
        watchers.watchdog.beat()
        watchers.stop.check(mesh)

    parts = loop.Parts(
        plan=plan,
        mesh=mesh,
        batches=data.batches,
        documents=data.documents,
        evaluate=lambda params, rows: data.evaluator(Model(decoder, params), rows, between),
        few_shot=lambda params, step: ask(params, step, writer.line, between),
        checkpoints=checkpoints,
        writer=writer,
        constant={"data/left_out": data.left_out} if config.data.on_bad_record == "skip" else {},
        peak_flops=hardware.peak_flops(mesh.local_devices[0]) * mesh.size,
        workdir=workdir,
    )
    params, scores = _trained(config, parts, watchers, train_state)
    opened.close()
    if scores:
        for line in report.closing(config, plan, data.evaluator.lines(scores), time.perf_counter() - began):
            processes.say(line)
        if data.tokenizer is not None:
            _sample(load.Trained(config, Model(decoder, params), data.tokenizer, steps))
    return scores


def _few_shot(config: Config) -> Choice | None:
    """What ``config.eval.core`` asks, if it is set.

    Raises:
      FewShotError: there is no such task, or the folder has none of their files.
    """
    if not config.eval.core:
        return None
    choice = Choice(
        folder=workdirs.expanded(config.eval.core, "config.eval.core"),
        labels=config.eval.core_tasks,
        items=config.eval.core_items,
        decode=config.scoring,
        names=("config.eval.core", "config.eval.core_tasks"),
    )
    choice.files()
    return choice


def _asking(
    config: Config, workdir: Path, decoder: Decoder, tokenizer: Tokenizer | None, choice: Choice | None
) -> Callable[..., dict[str, float]]:
    """A function of (params, step, say, between) that scores them on few-shot tasks."""
    if choice is None:
        return lambda *_: {}
    assert decoder.mesh is not None and tokenizer is not None
    core = Core(config, decoder.mesh, tokenizer, choice)

    told: set[str] = set()

    def ask(params: Any, step: int, say: Callable[[str], None], between: Callable[[], None]) -> dict[str, float]:
        def say_once(line: str) -> None:  # what is wrong with an item is so each time
            if line not in told:
                told.add(line)
                say(line)

        kept = results.folder_of(workdir, step, choice)
        try:
            report = core(Model(decoder, params), kept, say_once, between=between)
        except FewShotError as error:
            say_once(f"warning: {error}")
            return {}
        table = results.write(kept, report) if processes.is_first() else kept
        say(f"{report.name}: {report.mean:+.4f} after step {step:,} ({table})")
        return report.metrics()

    return ask


def _trained(
    config: Config, parts: loop.Parts, watchers: Watchers, train_state: TrainState
) -> tuple[dict[str, Any], dict[str, float]]:
    """The parameters at the run's end, and their scores; these are empty if a signal ended it before."""
    trainer = loop.Trainer(config, parts, watchers, train_state)
    if not trainer.train():
        parts.writer.line(f"stopped at step {trainer.step:,}; run the same command to go on from there")
        return trainer.state.params, {}
    with watchers.stop.deferred():
        scores = parts.evaluate(trainer.state.params, None)
        parts.writer.write(trainer.step, scores)
        few_shot = parts.few_shot(trainer.state.params, trainer.step)
        if few_shot:
            parts.writer.write(trainer.step, few_shot)
    return trainer.state.params, scores | few_shot


def _machine(config: Config) -> Mesh:
    """The mesh; what this machine cannot compute is refused now, and not when the tokens are made."""
    mesh = meshes.make_mesh(config.mesh)
    meshes.check(config, mesh.shape)
    compute_dtype(config.model)
    report.attention(config, mesh)
    return mesh


def _recover(workdir: Path) -> int | None:
    """The newest good checkpoint's step; the first process puts the others away."""

    def recover() -> bytes:
        found = inventory.recover(workdir, lambda line: print(f"warning: {line}", file=sys.stderr, flush=True))
        return b"" if found is None else str(found).encode()

    found = processes.from_first(recover)
    return int(found) if found else None


class _Data(NamedTuple):
    """What a run reads, text or words of a task.

    Attributes:
      batches: of this process, without end.
      evaluator: scores a model on what is held out.
      documents: tells what a batch is made of.
      tokenizer: None of a task, which has no text.
      left_out: how many bad records are not there.
    """

    batches: DatasetIterator
    evaluator: Evaluator | Accuracy
    documents: Callable[[Batch], Sequence[str]]
    tokenizer: Tokenizer | None
    left_out: int


def _data(config: Config, workdir: Path, mesh: Mesh, start: int | None, watchdog: Watchdog) -> _Data:
    here = meshes.local_rows(mesh, config.train.batch_size)
    if config.data.task:
        batches = tasks.training_batches(config, here)
        return _Data(batches, Accuracy(config, mesh), tasks.described, tokenizer=None, left_out=0)
    texts = corpus.open_corpus(config.data, records.begun(workdir, binding.records_of(workdir, start)))
    processes.say(one_line(texts.read_as))
    binding.check_tokenizer(config, workdir)
    with watchdog.phase("making tokens", "none", 0.0):  # of a corpus of any size: no limit suits all
        tokens = Tokenizer(processes.from_first(lambda: tokenizer.load_or_train(config, texts, workdir).model))
        if config.eval.sample_tokens:  # said now, and not when all is trained
            prompt = text.encode(tokens, config.eval.prompt)
            check_lengths([prompt], config.eval.sample_tokens, config.model.sequence_length)
        rows = records.prepare(config, texts, tokens, workdir)
    held_out = pipeline.held_out_rows(config, texts, tokens, config.eval.final_rows)
    return _Data(
        batches=pipeline.training_batches(config, rows, here),
        evaluator=Evaluator(config, mesh, held_out, tokens.token_bytes),
        documents=functools.partial(pipeline.described, tokenizer=tokens),
        tokenizer=tokens,
        left_out=rows.left_out,
    )


def _state(
    config: Config,
    workdir: Path,
    start: int | None,
    checkpoints: checkpoint.Checkpoints,
    decoder: Decoder,
    transformation: optax.GradientTransformation,
    batches: DatasetIterator,
) -> tuple[TrainState, str]:
    """The state that training begins with, where ``batches`` then are too; and what it is, in words."""
    assert decoder.mesh is not None
    imported = binding.holds_parameters_only(workdir)
    if start is not None and not imported:
        restored = checkpoints.restore(state.abstract(decoder, transformation, decoder.mesh), batches, start)
        return restored, f"going on from step {start:,}"
    created = state.create(decoder, transformation, decoder.mesh, config.seed)
    if not imported:
        return created, "beginning at step 0"
    params = checkpoints.restore_params(state.abstract_params(decoder, decoder.mesh), start or 0)
    return created.replace(params=params), "beginning at step 0 with the parameters imported into it"


def _left_out(count: int) -> Iterator[str]:
    if count:
        yield f"{count:,} bad records of the corpus are left out (config.data.on_bad_record = skip)"


def _sample(trained: load.Trained) -> None:
    """Prints what the model writes, as it comes."""
    config = trained.config
    if not config.eval.sample_tokens:
        return
    processes.say(f"\nA sample, decoded with the memory, after {config.eval.prompt!r}:\n")
    method = Method(Sampling(temperature=config.eval.temperature), config.decode)
    with contextlib.suppress(Stopped):  # the run is complete, whatever becomes of its sample
        for piece in text.stream(trained, config.eval.prompt, tokens=config.eval.sample_tokens, method=method):
            processes.say(piece, end="")
    processes.say()
