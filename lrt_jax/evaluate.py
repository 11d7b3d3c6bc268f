"""Score a checkpoint on held-out text, on any text, on few-shot tasks, or on the words of state tracking.

python -m lrt_jax.evaluate --workdir=DIR [--step=N] [--rows=N] [--scoring=fixed_point]
python -m lrt_jax.evaluate --workdir=DIR [--lengths=32,512]        # of a run of config.data.task
python -m lrt_jax.evaluate --workdir=DIR --text=FILE [--text=FILE …]
python -m lrt_jax.evaluate --workdir=DIR --core=FOLDER [--tasks=copa,arc_easy] [--items=N] [--against=DIR]
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from absl import flags

from lrt_jax.data import corpus, pipeline, records
from lrt_jax.durability import binding
from lrt_jax.evaluation import texts
from lrt_jax.evaluation.accuracy import Accuracy
from lrt_jax.evaluation.bits_per_byte import Evaluator
from lrt_jax.few_shot import results
from lrt_jax.few_shot.core import Choice, Core
from lrt_jax.inference import load
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.setup import flags as command_line
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup import processes
from lrt_jax.setup import workdir as workdirs
from lrt_jax.setup.config import Config, ConfigError, DecodeConfig, Prefill, validate

# Flags of one way of scoring alone.
OF = {
    "core": ("tasks", "items", "against"),
    "held-out text": ("rows", "passes", "corpus"),
    "words": ("rows", "lengths"),
}
# Of these one is what the run was about.
OWN = ("held-out text", "words")


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("workdir", None, "The run to score.")
    flags.DEFINE_integer("step", None, "The checkpoint's step; default: the newest.", lower_bound=0)
    flags.DEFINE_integer("rows", None, "Held-out rows or words; default: config.eval.final_rows.", lower_bound=1)
    flags.DEFINE_list(
        "lengths", [], "Of config.data.task: accuracy between these lengths; default: config.eval.lengths."
    )
    flags.DEFINE_integer(
        "passes", None, "Full forwards that show how memory settles; default: config.eval.passes.", lower_bound=0
    )
    flags.DEFINE_string("corpus", None, "Whose held-out documents are scored, if it was moved; default: the run's.")
    flags.DEFINE_multi_string("text", [], "Score this file instead, one document; may be given several times.")
    flags.DEFINE_string("core", None, "Score the few-shot tasks of CORE in this folder instead.")
    flags.DEFINE_list("tasks", [], "Of --core: labels of the tasks to ask, with commas between; default: all.")
    flags.DEFINE_integer("items", 0, "Of --core: so many items of each task, at most; 0: all.", lower_bound=0)
    flags.DEFINE_string("against", None, "Of --core: compare with the scores of this work dir, item by item.")
    flags.DEFINE_bool("memory", True, "--nomemory zeroes the recurrent memory, with --core or --text: for ablations.")
    command_line.define_decode_flags("scoring", "How true recurrence is computed; default: config.eval.scoring.")
    processes.define_flags()


def main() -> None:
    """Prints the scores of the checkpoint that the flags name: one JSON object, or with --core a table."""
    values = flags.FLAGS
    if values.workdir is None:
        raise ConfigError("--workdir is not set; it must be a run's work dir")
    workdir = workdirs.local(values.workdir)
    ways = _ways()
    _refuse_flags_of_others(ways)
    decode = command_line.decode_flags()
    if ways == OWN:  # which of them, the run says
        ways = OWN[1:] if binding.read_config(workdir).data.task else OWN[:1]
        _refuse_flags_of_others(ways)
    (way,) = ways
    processes.start()
    own = {name for of in OF.values() for name in of}
    names = ("step", "text", "core", "memory", "scoring", *command_line.DECODE_FLAGS, *sorted(own))
    processes.require_same("flags", {name: values[name].value for name in names})
    if way == "held-out text":
        scores = evaluate(workdir, values.step, values.rows, values.scoring, values.passes, values.corpus, **decode)
        processes.say(json.dumps(scores, indent=2))
        return
    if way == "words":
        lengths = tuple(map(_length, values.lengths))
        scores = answers(workdir, values.step, values.rows, lengths, values.scoring, **decode)
        processes.say(json.dumps(scores, indent=2))
        return
    trained = load.load(workdir, values.step)
    meshes.cache_compilations(workdir)
    how = trained.config.scoring
    how = dataclasses.replace(how, prefill=values.scoring or how.prefill, **decode)
    if way == "core":
        few_shot(trained, workdir, how)
    else:
        text(trained, how)


def _ways() -> tuple[str, ...]:
    """What may be scored: ``core``, ``text``, or one of OWN.

    Raises:
      ConfigError: flags do not go together.
    """
    values = flags.FLAGS
    if values.core is not None and values.text:
        raise ConfigError("--core and --text are both set; give one of them")
    ways = ("core",) if values.core is not None else ("text",) if values.text else OWN
    if ways == OWN and not values.memory:
        said = "held-out text and words are scored without memory, too: val/bpb_init, val/loss_init"
        raise ConfigError(f"--nomemory is for --core or --text only; {said}")
    return ways


def _refuse_flags_of_others(ways: tuple[str, ...]) -> None:
    """Checks that no flag is set which is for none of these ways.

    Raises:
      ConfigError: one is.
    """
    values, own = flags.FLAGS, {name for way in ways for name in OF.get(way, ())}
    for name in sorted({name for names in OF.values() for name in names} - own):
        if values[name].value != values[name].default:
            owners = [f"--{way}=FOLDER" if way == "core" else way for way, names in OF.items() if name in names]
            raise ConfigError(f"--{name} is set, which is for {' and '.join(owners)} only, not for {' or '.join(ways)}")


def few_shot(trained: load.Trained, workdir: Path, how: DecodeConfig) -> None:
    """Scores the tasks of ``--core``, prints a table, and leaves scores and table in the work dir."""
    values = flags.FLAGS
    choice = Choice(
        workdirs.expanded(values.core, "--core"), tuple(values.tasks), values.items, how, use_memory=values.memory
    )
    other = None if values.against is None else workdirs.expanded(values.against, "--against")
    if other is not None:
        processes.together(lambda: results.require_scores(other) if processes.is_first() else None)
    core = Core(trained.config, trained.mesh, trained.tokenizer, choice)
    kept = results.folder_of(workdir, trained.step, choice)
    report = core(trained.model, kept, done=lambda score: processes.say(str(score)))
    if not processes.is_first():
        return
    table = results.write(kept, report)
    print("", *report.table(), f"\nThis table: {table}; item by item: {kept}", sep="\n", flush=True)
    if other is not None:
        print("", *results.against(report, other, kept), sep="\n", flush=True)


def text(trained: load.Trained, how: DecodeConfig) -> None:
    """Scores the files of ``--text``, each a document, and prints bits per byte of each and of all.

    Raises:
      ConfigError: one cannot be read, is not UTF-8 or is empty.
    """
    paths = [workdirs.expanded(given, "--text") for given in flags.FLAGS.text]
    read = processes.from_first(lambda: json.dumps([texts.read(path) for path in paths]).encode())
    found = texts.score(trained, json.loads(read), how, use_memory=flags.FLAGS.memory)
    documents = [
        {"file": str(path), "bpb": one.bits_per_byte, **one._asdict()} for path, one in zip(paths, found, strict=True)
    ]
    scored = texts.total(found)
    said = {"step": trained.step, "bpb": scored.bits_per_byte, **scored._asdict(), "documents": documents}
    said |= {"scoring": how.prefill, "memory": flags.FLAGS.memory}
    processes.say(json.dumps(said, indent=2))


def evaluate(
    workdir: Path,
    step: int | None = None,
    rows: int | None = None,
    scoring: Prefill | None = None,
    passes: int | None = None,
    source: str | None = None,
    **decode: Any,
) -> dict[str, Any]:
    """The checkpoint's ``val/…`` metrics, ``step``, ``gzip`` on the same bytes, and ``scoring``: how it was scored.

    Args:
      workdir: the run's.
      step: of the checkpoint; None: the newest.
      rows: held-out rows to score; None: ``config.eval.final_rows``.
      scoring: how ``val/bpb_sequential`` is computed; None: as ``config.eval.scoring`` says.
      passes: how many forwards show how memory settles; None: ``config.eval.passes``.
      source: the corpus whose held-out documents are scored; None: ``config.data.corpus``.
      **decode: fields of ``config.decode`` to replace.

    Raises:
      UserError: there is no such checkpoint, or the corpus cannot be read.
    """
    trained = load.load(workdir, step)
    meshes.cache_compilations(workdir)
    config = _asked(trained.config, scoring, decode, passes=passes)
    data = dataclasses.replace(config.data, corpus=source or config.data.corpus)
    begun = records.begun(workdir, binding.records_of(workdir, trained.step), binding=False)
    texts = corpus.open_corpus(data, begun)
    held_out = pipeline.held_out_rows(config, texts, trained.tokenizer, rows or config.eval.final_rows)
    token_bytes = trained.tokenizer.token_bytes
    evaluator = Evaluator(config, trained.mesh, held_out, token_bytes)
    scores = evaluator(trained.model)
    gzip = evaluator.gzip_bits_per_byte()
    return {"step": trained.step, **scores, "gzip": gzip, "scoring": evaluator.scoring}


def answers(
    workdir: Path,
    step: int | None = None,
    rows: int | None = None,
    lengths: tuple[int, ...] = (),
    scoring: Prefill | None = None,
    **decode: Any,
) -> dict[str, Any]:
    """The metrics of :class:`Accuracy` of a run of ``config.data.task``, ``step``, and ``scoring``: how it was scored.

    Args:
      workdir, step, scoring, **decode: as in :func:`evaluate`.
      rows: words to score; None: ``config.eval.final_rows``.
      lengths: where the intervals of positions end; none: ``config.eval.lengths``.

    Raises:
      UserError: there is no such checkpoint, or the lengths cannot be.
    """
    config, params, step = load.load_params(workdir, step)
    meshes.cache_compilations(workdir)
    config = validate(_asked(config, scoring, decode, final_rows=rows, lengths=lengths or None))
    mesh = load.mesh_of(config)
    scores = Accuracy(config, mesh)(Model(Decoder(config.model, mesh), params))
    return {"step": step, **scores, "scoring": config.eval.scoring}


def _length(text: str) -> int:
    """One of ``--lengths``.

    Raises:
      ConfigError: it is no number.
    """
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--lengths has {text!r}; it must be numbers with commas between, as in 32,512") from None


def _asked(config: Config, scoring: Prefill | None, decode: dict[str, Any], **scored: Any) -> Config:
    """The run's config with what the flags ask for: fields of ``decode``, and those of ``eval`` that are not None."""
    changes = {name: value for name, value in {"scoring": scoring, **scored}.items() if value is not None}
    return dataclasses.replace(
        config,
        eval=dataclasses.replace(config.eval, **changes),
        decode=dataclasses.replace(config.decode, **decode),
    )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
