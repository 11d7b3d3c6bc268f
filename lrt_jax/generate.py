"""Sample from a checkpoint: ``python -m lrt_jax.generate --workdir=DIR --prompt='def '``."""

from pathlib import Path

from absl import flags

from lrt_jax.inference import load, sampling
from lrt_jax.setup import flags as command_line
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import ConfigError


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("workdir", None, "The run to sample from.")
    flags.DEFINE_integer("step", None, "The checkpoint's step; default: the newest.", lower_bound=0)
    flags.DEFINE_string("prompt", "", "The text to continue; empty: a new document.")
    flags.DEFINE_integer("tokens", 128, "How many tokens to generate, at most.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.", lower_bound=0.0)
    flags.DEFINE_integer("top_k", 0, "Keep the k most likely tokens; 0: all.", lower_bound=0)
    flags.DEFINE_float("top_p", 1.0, "Keep the most likely share.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_integer("seed", 0, "The same seed gives the same text.")


def main() -> None:
    """Prints the prompt and what the model makes of it, as it is decoded, with the recurrent memory."""
    if flags.FLAGS.workdir is None:
        raise ConfigError("--workdir is not set; it must be a run's work dir")
    trained = load.load(Path(flags.FLAGS.workdir), flags.FLAGS.step)
    meshes.cache_compilations(Path(flags.FLAGS.workdir))
    text = sampling.stream(
        trained,
        flags.FLAGS.prompt,
        tokens=flags.FLAGS.tokens,
        temperature=flags.FLAGS.temperature,
        top_k=flags.FLAGS.top_k,
        top_p=flags.FLAGS.top_p,
        seed=flags.FLAGS.seed,
    )
    first = next(text, "")
    print(flags.FLAGS.prompt + first, end="", flush=True)
    for piece in text:
        print(piece, end="", flush=True)
    print(flush=True)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
