"""List and verify a run's checkpoints: ``python -m lrt_jax.checkpoints DIR [--rewind=STEP]``."""

from pathlib import Path

from absl import flags

from lrt_jax.durability import inventory, lock
from lrt_jax.setup import flags as command_line
from lrt_jax.setup import workdir as workdirs
from lrt_jax.setup.config import ConfigError


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_integer(
        "rewind",
        None,
        "Go on from this step; newer checkpoints go to checkpoints/superseded/ first. Refused while a run is on.",
        lower_bound=0,
    )


def main(*arguments: str) -> int:
    """Reads every byte of every checkpoint; 1 if one is damaged."""
    if len(arguments) != 1:
        raise ConfigError(f"the arguments are {' '.join(arguments) or 'nothing'!r}; give one run's work dir")
    workdir = workdirs.local(arguments[0], "the work dir")
    if not inventory.folder_of(workdir).exists():
        raise ConfigError(f"{str(workdir)!r} has no folder {inventory.FOLDER}; it must be a run's work dir")
    if flags.FLAGS.rewind is not None:
        with lock.held(workdir):
            moved = inventory.rewind(workdir, flags.FLAGS.rewind)
        for step in moved:
            print(f"step {step:>10,}  moved to {inventory.FOLDER}/{inventory.SUPERSEDED}/")
    return show(workdir)


def show(workdir: Path) -> int:
    """Prints a line for each checkpoint, and for each damaged file; 1 if there is one."""
    entries = inventory.survey(workdir)
    for entry in entries:
        verdict = "unfinished, does not count" if entry.unfinished else "DAMAGED" if entry.faults else "good"
        print(f"step {entry.step:>10,}  {entry.bytes:>16,} bytes  {verdict}")
        for fault in entry.faults:
            print(f"    {fault}")
    for kind, names in inventory.aside(workdir).items():
        if names:
            print(f"{kind}, set aside: {', '.join(names)}")
    damaged = sum(bool(entry.faults) for entry in entries)
    good = sum(not entry.faults and not entry.unfinished for entry in entries)
    print(f"{workdir}: {good} good, {damaged} damaged")
    return 1 if damaged else 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main, takes_arguments=True)
