"""Compile a config for a TPU slice that is not there: ``python -m lrt_jax.aot --config=FILE --topology=v5p:4x4x4``.

Compiles the real train step, decode step and evaluation on this machine's CPU, prints what a chip needs and could
reach, and ends with "fits" and 0, or with what to change and 1. ``--search`` tries meshes and batch sizes on
paper, compiles the best and ranks them.
"""

import dataclasses

import jax
from absl import flags
from ml_collections import config_flags

from lrt_jax.setup import config as configs
from lrt_jax.setup import flags as command_line
from lrt_jax.setup import mesh as meshes
from lrt_jax.topology import programs, search
from lrt_jax.topology.chips import chip_of
from lrt_jax.topology.report import Report


def define_flags() -> None:
    """Declares the command's flags."""
    config_flags.DEFINE_config_file("config", None, "The config file, with its argument after a colon.")
    flags.DEFINE_string("topology", None, "CHIP:SHAPE of a slice, as in v5e:16x16 or v5p:4x4x4.")
    flags.DEFINE_integer("slices", 1, "How many slices, joined by the data center network.", lower_bound=1)
    flags.DEFINE_multi_enum("program", programs.PROGRAMS, programs.PROGRAMS, "What to compile; may be repeated.")
    flags.DEFINE_bool("search", False, "Try the reasonable meshes and batch sizes, and rank them.")
    flags.DEFINE_integer("best", 3, "With --search: how many of the best on paper to compile.", lower_bound=1)
    flags.DEFINE_bool("row", False, "Print a row of docs/SCALING.md's tables instead.")


def main() -> int:
    """Compiles for the topology that the flags name; 0 if everything fits."""
    for name in ("config", "topology"):
        if flags.FLAGS[name].value is None:
            raise configs.ConfigError(f"--{name} is not set; see python -m lrt_jax.aot --help")
    chip_of(flags.FLAGS.topology)
    jax.config.update("jax_platforms", "cpu")  # nothing runs here, and a TPU's library must not look for its chips
    config = configs.from_config_dict(flags.FLAGS.config)
    if flags.FLAGS.search:
        return _search(config)
    report = compiled(config, flags.FLAGS.topology, flags.FLAGS.slices, tuple(dict.fromkeys(flags.FLAGS.program)))
    print("\n".join([report.row()] if flags.FLAGS.row else report.lines()))
    return 0 if report.fits else 1


def compiled(config: configs.Config, topology: str, slices: int, names: tuple[str, ...]) -> Report:
    """The report of a config on a topology, its programs compiled.

    Raises:
      TopologyError: there is no such topology, or no compiler for it.
      ConfigError: the mesh does not fit the topology or the model.
    """
    chip = chip_of(topology)
    found = programs.devices(topology, slices)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slices=slices))
    mesh = meshes.make_mesh(config.mesh, found)
    sizes = {**mesh.shape, "slices": slices}
    return Report(config, topology, chip, sizes, tuple(programs.compile_all(config, mesh, names)))


def _search(config: configs.Config) -> int:
    """Ranks candidates on paper, compiles the best of them, and says which fit."""
    topology, slices = flags.FLAGS.topology, flags.FLAGS.slices
    chips = len(programs.devices(topology, slices))
    ranked = search.candidates(config, chip_of(topology), chips, slices)
    if not ranked:
        print(f"no mesh of {chips} chips has room for this model: take more or larger chips, or set config.model.remat")
        return 1
    print(f"{len(ranked)} meshes and batch sizes on {chips} chips; the best on paper, compiled:")
    reports = []
    for candidate in ranked[: flags.FLAGS.best]:
        reports.append(compiled(candidate.config, topology, slices, ("train",)))
        print(reports[-1].row(), flush=True)
    fitting = [report for report in reports if report.fits]
    if not fitting:
        print("none of these fits; raise --best, or see --config.model.remat and --config.train.accumulation")
        return 1
    chosen = fitting[0].config
    sizes = {field.name: getattr(chosen.mesh, field.name) for field in dataclasses.fields(chosen.mesh)}
    overrides = " ".join(f"--config.mesh.{axis}={size}" for axis, size in sizes.items())
    print(f"fits: --config.train.batch_size={chosen.train.batch_size} {overrides}")
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
