"""Sample from a checkpoint: ``python -m lrt_jax.generate --workdir=DIR --prompt='def '``."""

import dataclasses
import os
import sys
import time

import jax
from absl import flags

from lrt_jax.inference import load, text
from lrt_jax.inference.generate import Method
from lrt_jax.inference.load import Trained
from lrt_jax.inference.sampling import Sampling
from lrt_jax.setup import flags as command_line
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup import processes
from lrt_jax.setup import workdir as workdirs
from lrt_jax.setup.config import ConfigError
from lrt_jax.setup.errors import UserError

# Generated where --tokens says nothing, if the context has room for so many.
TOKENS = 128


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("workdir", None, "The run to sample from.")
    flags.DEFINE_integer("step", None, "The checkpoint's step; default: the newest.", lower_bound=0)
    flags.DEFINE_string("prompt", None, "The text to continue.")
    flags.DEFINE_string("file", None, "The file whose text to continue; - is standard input.")
    flags.DEFINE_bool("interactive", False, "Ask for one prompt after the other.")
    flags.DEFINE_bool("new_document", False, "Begin a document instead of continuing a prompt.")
    flags.DEFINE_integer("samples", 1, "How many continuations, with seeds that count up.", lower_bound=1)
    flags.DEFINE_integer(
        "tokens",
        None,
        f"How many tokens to generate, at most; default: {TOKENS}, or what the context has room for after the prompt.",
        lower_bound=1,
    )
    flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.")
    flags.DEFINE_integer("top_k", 0, "Keep the k most likely tokens; 0: all.")
    flags.DEFINE_float("top_p", 1.0, "Keep the most likely share.")
    flags.DEFINE_float("min_p", 0.0, "Keep tokens at least this share as likely as the most likely one.")
    flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: tokens the text has already become less likely.")
    flags.DEFINE_multi_string("stop", [], "End before this text; may be given several times.")
    flags.DEFINE_integer("seed", 0, "From 0 to 2**32 - 1; the same seed gives the same text.")
    flags.DEFINE_bool("memory", True, "--nomemory zeroes the recurrent memory: for ablations.")
    flags.DEFINE_bool("stats", False, "Print how fast it was, and how likely the model thought it, to standard error.")
    command_line.define_decode_flags("prefill", "How the prompt is read; default: config.decode.prefill.")
    processes.define_flags()


def main() -> None:
    """Prints prompts and what the model makes of them, with the recurrent memory."""
    if flags.FLAGS.workdir is None:
        raise ConfigError("--workdir is not set; it must be a run's work dir")
    sources = ("prompt", "file", "interactive", "new_document")
    given = [name for name in sources if flags.FLAGS[name].value not in (None, False)]
    if len(given) != 1:
        found = " and ".join(f"--{name}" for name in given) or "none"
        raise ConfigError(
            f"of --prompt=TEXT, --file=PATH (- is standard input), --interactive and --new_document {found} "
            "is given; give exactly one"
        )
    if "" in flags.FLAGS.stop:
        raise ConfigError("--stop is empty; give the text to end before, or no --stop")
    most = 2**32 - flags.FLAGS.samples  # the last sample's seed is 32 bits, too
    if not 0 <= flags.FLAGS.seed <= most:
        raise ConfigError(f"--seed is {flags.FLAGS.seed}; with --samples={flags.FLAGS.samples} allowed are 0 to {most}")
    sampling = Sampling(
        flags.FLAGS.repetition_penalty,
        flags.FLAGS.temperature,
        flags.FLAGS.top_k,
        flags.FLAGS.top_p,
        flags.FLAGS.min_p,
    )
    changes = command_line.decode_flags()
    if flags.FLAGS.prefill is not None:
        changes["prefill"] = flags.FLAGS.prefill
    prompt = None if flags.FLAGS.interactive else _prompt()
    processes.start()
    if flags.FLAGS.interactive and jax.process_count() > 1:
        raise ConfigError("--interactive needs one process, which can ask; give several --prompt or --file")
    workdir = workdirs.local(flags.FLAGS.workdir)
    trained = load.load(workdir, flags.FLAGS.step)
    meshes.cache_compilations(workdir)
    method = Method(sampling, dataclasses.replace(trained.config.decode, **changes), use_memory=flags.FLAGS.memory)
    if prompt is not None:
        write(trained, prompt, method)
        return
    print(f"step {trained.step:,}; type a text to continue, end with Ctrl-D", file=sys.stderr)
    while (prompt := _ask()) is not None:
        try:
            if prompt:
                write(trained, prompt, method)
            else:
                print("the prompt is empty; type some text", file=sys.stderr)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(file=sys.stderr)  # ends this text, not the session


def write(trained: Trained, prompt: str, method: Method) -> None:
    """Prints the prompt and its continuations: one as it is decoded, several one after the other."""
    samples, seed = flags.FLAGS.samples, flags.FLAGS.seed
    stop = [_as_utf8(given, "--stop") for given in flags.FLAGS.stop]
    tokens = flags.FLAGS.tokens
    if tokens is None:
        room = trained.config.model.sequence_length - len(text.encode(trained.tokenizer, prompt))
        tokens = max(1, min(TOKENS, room))  # 1 where there is no room, which is refused
    if samples == 1 and not flags.FLAGS.stats:
        pieces = text.stream(trained, prompt, tokens=tokens, method=method, seed=seed, stop_strings=stop)
        first = next(pieces, "")  # so that an error is all that is printed
        processes.say(prompt + first, end="")
        for piece in pieces:
            processes.say(piece, end="")
        processes.say()
        return
    seeds = [seed + index for index in range(samples)]
    began = time.perf_counter()
    completions = text.complete(
        trained, [prompt] * samples, tokens=tokens, method=method, seeds=seeds, stop_strings=stop
    )
    seconds = time.perf_counter() - began
    for index, completion in enumerate(completions):
        if samples > 1:
            processes.say(f"--- sample {index + 1} of {samples}, seed {seeds[index]}")
        processes.say(prompt + completion.text)
        if flags.FLAGS.stats:
            count = len(completion.tokens)
            mean = completion.log_probabilities.mean() if count else 0.0
            processes.say(f"[{count} tokens, {mean:.3f} nats each on average, {completion.ended_by}]", file=sys.stderr)
    if flags.FLAGS.stats:
        total = sum(len(completion.tokens) for completion in completions)
        processes.say(f"[{total / seconds:,.0f} tokens/s, prefill and compilation included]", file=sys.stderr)


def _prompt() -> str:
    """The prompt that the flags name; empty for a new document.

    Raises:
      ConfigError: it is empty, or cannot be read.
    """
    if flags.FLAGS.new_document:
        return ""
    prompt, source = _as_utf8(flags.FLAGS.prompt or "", "--prompt"), "--prompt"
    if flags.FLAGS.file is not None:
        source = "standard input" if flags.FLAGS.file == "-" else f"--file {flags.FLAGS.file}"
        path = workdirs.expanded(flags.FLAGS.file, "--file")
        try:
            raw = sys.stdin.buffer.read() if flags.FLAGS.file == "-" else path.read_bytes()
            prompt = raw.decode()
        except OSError as error:
            raise ConfigError(f"--file is {flags.FLAGS.file!r}, which cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{source} is not UTF-8 text") from None
    if not prompt:
        raise ConfigError(f"{source} is empty; give some text to continue, or --new_document to begin one")
    return prompt


def _as_utf8(text: str, flag: str) -> str:
    """The text of a flag: where the locale is another, Python has kept each byte that it has not understood.

    Raises:
      ConfigError: they are not UTF-8 either.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode()
        except UnicodeError:
            raise ConfigError(f"{flag} is not UTF-8 text") from None
    return text


def _ask() -> str | None:
    """A line typed by the user; None at the end of the input."""
    try:
        return input("> ")
    except EOFError:
        return None


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
