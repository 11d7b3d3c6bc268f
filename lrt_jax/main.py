"""Train: ``python -m lrt_jax.main --config=configs/base.py [--workdir=DIR] [--config.key=value …]``."""

import re
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from lrt_jax.run.assemble import run
from lrt_jax.setup import config as configs
from lrt_jax.setup import flags as command_line
from lrt_jax.setup import processes, streams
from lrt_jax.setup import workdir as workdirs


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
    config = configs.from_config_dict(flags.FLAGS.config)
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    place = workdirs.local(flags.FLAGS.workdir or str(default_workdir(name)))
    processes.start()
    scores = run(config, place, flags.FLAGS.profile)
    return 0 if scores else flags.FLAGS.stopped_exit_code


def default_workdir(config_file: str) -> Path:
    """``configs/base.py:debug`` → ``runs/base_debug``."""
    file, _, variant = config_file.partition(":")
    return Path("runs") / "_".join(part for part in (Path(file).stem, re.sub(r"[^\w=,.-]", "-", variant)) if part)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
