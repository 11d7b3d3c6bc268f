"""Score a checkpoint: ``python -m lrt_jax.evaluate --workdir=DIR [--step=N] [--rows=N] [--scoring=fixed_point]``."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from absl import flags

from lrt_jax.data import corpus, pipeline, records
from lrt_jax.durability import binding
from lrt_jax.evaluation.bits_per_byte import Evaluator
from lrt_jax.inference import load
from lrt_jax.setup import flags as command_line
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup import processes
from lrt_jax.setup import workdir as workdirs
from lrt_jax.setup.config import ConfigError, Prefill


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("workdir", None, "The run to score.")
    flags.DEFINE_integer("step", None, "The checkpoint's step; default: the newest.", lower_bound=0)
    flags.DEFINE_integer("rows", None, "Held-out rows; default: config.eval.final_rows.", lower_bound=1)
    flags.DEFINE_integer(
        "passes", None, "Full forwards that show how memory settles; default: config.eval.passes.", lower_bound=0
    )
    flags.DEFINE_string("corpus", None, "Whose held-out documents are scored, if it was moved; default: the run's.")
    command_line.define_decode_flags("scoring", "How true recurrence is computed; default: config.eval.scoring.")
    processes.define_flags()


def main() -> None:
    """Prints the metrics of the checkpoint that the flags name, as one JSON object."""
    if flags.FLAGS.workdir is None:
        raise ConfigError("--workdir is not set; it must be a run's work dir")
    decode = command_line.decode_flags()
    processes.start()
    found = evaluate(
        workdirs.local(flags.FLAGS.workdir),
        flags.FLAGS.step,
        flags.FLAGS.rows,
        scoring=flags.FLAGS.scoring,
        passes=flags.FLAGS.passes,
        source=flags.FLAGS.corpus,
        **decode,
    )
    processes.say(json.dumps(found, indent=2))


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
    config = trained.config
    config = dataclasses.replace(
        config,
        eval=dataclasses.replace(
            config.eval,
            scoring=scoring or config.eval.scoring,
            passes=config.eval.passes if passes is None else passes,
        ),
        decode=dataclasses.replace(config.decode, **decode),
    )
    data = dataclasses.replace(config.data, corpus=source or config.data.corpus)
    begun = records.begun(workdir, binding.records_of(workdir, trained.step), binding=False)
    texts = corpus.open_corpus(data, begun)
    held_out = pipeline.held_out_rows(config, texts, trained.tokenizer, rows or config.eval.final_rows)
    token_bytes = trained.tokenizer.token_bytes
    evaluator = Evaluator(config, trained.mesh, held_out, token_bytes)
    scores = evaluator(trained.model)
    gzip = evaluator.gzip_bits_per_byte()
    return {"step": trained.step, **scores, "gzip": gzip, "scoring": evaluator.scoring}


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
