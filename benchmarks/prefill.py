"""Fixed-point prefill of a trained model: tolerance → refinements, speed-up over sequential prefill, BPB difference.

    python -m benchmarks.prefill WORKDIR [--json=FILE] [--lengths=64,256] [--tolerances=1,0.1,0.01] …

The prompts are held-out text of the work dir's corpus. Speed is that of one prompt, from tokens to the logits of the
next one, in turns with sequential prefill. Refinements, BPB and convergence are those of all ``--rows`` prompts.
"""

import argparse
import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.arguments import home_expanded, natural, output, positive, several, tolerance
from benchmarks.checks import in_one_line
from lrt_jax.inference import decode, prefill, scoring
from lrt_jax.model.model import Model
from lrt_jax.setup import host_memory
from lrt_jax.setup.config import DecodeConfig

TABLE = "{:>7}{:>9}{:>11}{:>13}{:>6}{:>11}{:>13}{:>12}{:>14}"


@dataclasses.dataclass
class Row:
    """One prompt length, number of subsets and tolerance.

    Attributes:
      tokens: of a prompt.
      subsets: S of a sweep; 1: full forwards.
      tolerance: largest change of a source state's entry that ends the refinement.
      refinements: mean over the prompts.
      refinements_max: the most of any prompt.
      speedup: sequential prefill's time as a multiple of this one's, one prompt at a time; median.
      milliseconds: median of one prompt's prefill.
      bpb_difference: bits per byte of the prompts' own tokens, minus those of sequential scoring.
      not_converged: share of prompts that were still changing after ``max_refinements`` and fell back.
    """

    tokens: int
    subsets: int
    tolerance: float
    refinements: float
    refinements_max: int
    speedup: float
    milliseconds: float
    bpb_difference: float
    not_converged: float


def measure(
    model: Model,
    tokens_NxT: np.ndarray,
    targets_NxT: np.ndarray,
    token_bytes: np.ndarray,
    options: argparse.Namespace,
) -> list[Row]:
    """The table of one prompt length, T here: the first row is sequential prefill, of tolerance nan."""
    length = tokens_NxT.shape[1]
    bytes_NxT = token_bytes[targets_NxT]

    def program(how: DecodeConfig) -> Callable[[np.ndarray], Any]:
        def read(model: Model, tokens_BxN: jax.Array) -> tuple[jax.Array, Any]:
            state = decode.start(model.config, len(tokens_BxN), length)
            done = prefill.run(model, state, tokens_BxN, how, from_start=True)
            return model.logits(done.hidden_BxNxD), done.state

        return functools.partial(jax.jit(read), model)

    def score(how: DecodeConfig) -> tuple[float, scoring.Scored]:
        found = jax.jit(functools.partial(scoring.score, config=how))(model, tokens_NxT, targets_NxT)
        return float(np.sum(found.losses_BxT * (bytes_NxT > 0)) / math.log(2) / bytes_NxT.sum()), found

    ways = [DecodeConfig("sequential")]
    ways += [
        DecodeConfig("fixed_point", tolerance, options.max_refinements, subsets)
        for subsets in options.subsets
        for tolerance in options.tolerances
    ]
    programs = [program(how) for how in ways]
    for run in programs:
        jax.block_until_ready(run(tokens_NxT[:1]))
    seconds: list[list[float]] = [[] for _ in ways]
    for prompt in range(options.timed):
        for run, times in zip(programs, seconds, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(run(tokens_NxT[prompt % len(tokens_NxT)][None]))
            times.append(time.perf_counter() - begin)

    rows = []
    exact = math.nan
    for how, times in zip(ways, seconds, strict=True):
        bpb, found = score(how)
        exact = bpb if how.prefill == "sequential" else exact
        rows.append(
            Row(
                tokens=length,
                subsets=how.subsets,
                tolerance=math.nan if how.prefill == "sequential" else how.tolerance,
                refinements=float(jnp.mean(found.refinements_B)),
                refinements_max=int(jnp.max(found.refinements_B)),
                speedup=statistics.median(a / b for a, b in zip(seconds[0], times, strict=True)),
                milliseconds=1e3 * statistics.median(times),
                bpb_difference=bpb - exact,
                not_converged=float(jnp.mean(found.fallbacks_B > 0)),
            )
        )
    print(f"{length} tokens: sequential {exact:.4f} bits per byte")
    for row in rows:
        sequential = math.isnan(row.tolerance)
        numbers = (row.tokens, "" if sequential else row.subsets, "sequential" if sequential else f"{row.tolerance:g}")
        counts = (f"{row.refinements:.1f}", row.refinements_max, f"{row.speedup:.2f} ×", f"{row.milliseconds:.1f} ms")
        print(TABLE.format(*numbers, *counts, f"{row.bpb_difference:+.6f}", f"{row.not_converged:.1%}"), flush=True)
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("workdir", type=home_expanded)
    parser.add_argument("--json", type=output, help="write the rows here")
    parser.add_argument(
        "--lengths", type=several(positive), default=[], help="default: 64, 256 and T, as far as T goes"
    )
    parser.add_argument("--tolerances", type=several(tolerance), default=[1.0, 0.3, 0.1, 0.01, 0.001])
    parser.add_argument(
        "--subsets", type=several(positive), default=[1, 2, 4], help="1: full forwards; S: sweeps over S subsets"
    )
    parser.add_argument("--max_refinements", type=natural, default=DecodeConfig().max_refinements)
    parser.add_argument("--rows", type=positive, default=32, help="held-out rows")
    parser.add_argument("--timed", type=positive, default=9, help="prompts that are timed")
    return parser.parse_args(arguments)


def main() -> None:
    """Measures, prints the table, and writes the rows."""
    host_memory.keep_freed()
    # Here alone: all other benchmarks run without a tokenizer.
    from lrt_jax.data import corpus, pipeline
    from lrt_jax.inference import load

    options = parse()
    with in_one_line():
        trained = load.load(options.workdir)
        config = trained.config
        held_out = pipeline.held_out_rows(config, corpus.open_corpus(config.data), trained.tokenizer, options.rows)
    whole = config.model.sequence_length
    lengths = options.lengths or sorted({length for length in (64, 256, whole) if length <= whole})
    if max(lengths) > whole:
        raise SystemExit(
            f"error: --lengths is {max(lengths)}; the model's context is {whole}, and no length exceeds it"
        )
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}; {options.workdir}, step {trained.step}, T {whole}")
    heads = ("tokens", "subsets", "tolerance", "refinements", "max", "speed-up", "one prompt", "BPB", "not converged")
    print(TABLE.format(*heads))
    found: list[Row] = []
    for length in lengths:
        tokens, targets = (array[:, :length] for array in (held_out.tokens_NxT, held_out.targets_NxT))
        found += measure(trained.decoding, tokens, targets, trained.tokenizer.token_bytes, options)
    if options.json:
        about = {"device": device.device_kind, "jax": jax.__version__, "model": dataclasses.asdict(config.model)}
        lines = [dataclasses.asdict(row) for row in found]
        options.json.write_text(json.dumps({"about": about, "rows": lines}, indent=2) + "\n")


if __name__ == "__main__":
    main()
