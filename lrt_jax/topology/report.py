"""What a config needs and could reach on a topology, as a table; and what to change where it does not fit."""

import dataclasses
import math
from collections.abc import Iterator

from lrt_jax.model import costs
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config
from lrt_jax.topology import traffic
from lrt_jax.topology.chips import Chip
from lrt_jax.topology.programs import Compiled

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Report:
    """A config on a topology, the sizes of the mesh axes and of ``slices``, and what was compiled."""

    config: Config
    topology: str
    chip: Chip
    sizes: dict[str, int]
    compiled: tuple[Compiled, ...]

    @property
    def fits(self) -> bool:
        """Whether every program has room."""
        return all(program.fits for program in self.compiled)

    @property
    def chips(self) -> int:
        """In all slices."""
        return math.prod(size for axis, size in self.sizes.items() if axis != "slices")

    @property
    def step(self) -> traffic.Step:
        """The training step on paper; of a staged schedule, the last stage's."""
        return traffic.of_step(self.config, self.sizes, self.config.schedule.in_stages[-1].schedule)

    @property
    def gather(self) -> str:
        """What gathers weights, a step or a forward."""
        return "step" if meshes.gathers_once(self.config.mesh, self.sizes) else "forward"

    @property
    def seconds(self) -> dict[str, float]:
        """The least time that each resource needs for a step."""
        return self.step.seconds(self.chip, self.chips // self.sizes["slices"], self.sizes)

    @property
    def mfu_bound(self) -> float:
        """The share of peak FLOP/s that could be reached if everything overlapped."""
        return self.step.flops / self.chip.peak / max(self.seconds.values())

    def lines(self) -> Iterator[str]:
        """The table."""
        model, train = self.config.model, self.config.train
        counts, step, seconds = costs.count_parameters(model), self.step, self.seconds
        mesh = " × ".join(f"{axis} {size}" for axis, size in self.sizes.items() if axis != "slices")
        slices = f" × {self.sizes['slices']} slices" if self.sizes["slices"] > 1 else ""
        tokens = train.batch_size * model.sequence_length
        often = "once a step" if self.gather == "step" else "by every forward"
        gathered = f", weights gathered {often}" if self.sizes["fsdp"] > 1 else ""
        yield f"{self.topology}{slices}: {self.chips} chips as {mesh}{gathered}"
        yield f"{counts.total:,} parameters, {model.memory} memory; {tokens:,} tokens a step in {train.batch_size} rows"
        share = counts.total / (self.sizes["fsdp"] * self.sizes["tensor"])
        yield f"\nper chip\n  {'parameters':<44}{share / 1e6:>12.1f} M"
        for program in self.compiled:
            note = "" if program.fits else "  does not fit"
            where = f"peak memory, {program.name} (compiled in {program.seconds:.0f} s)"
            yield f"  {where:<44}{program.peak / GIB:>12.2f} GiB of {self.chip.hbm / GIB:.0f}{note}"
        yield f"  {'FLOPs of a step':<44}{step.flops / 1e12:>12.2f} T"
        if step.orthogonalized:
            yield f"  {'FLOPs of Muon beside':<44}{step.orthogonalized / 1e12:>12.2f} T"
        for transfer in step.transfers:
            for network, size in (("ICI", transfer.ici), ("DCN", transfer.dcn)):
                if size:
                    yield f"  {f'{network}, {transfer.axis}: {transfer.name}':<44}{size / 1e9:>12.3f} GB"
        yield f"  {'arithmetic intensity (memory)':<44}{step.intensity:>12.0f} FLOP/B"
        for name, time in seconds.items():
            yield f"  {f'least time, {name}':<44}{1e3 * time:>12.1f} ms"
        bound = max(seconds, key=lambda name: seconds[name])
        yield f"\nroofline: {1e3 * seconds[bound]:.1f} ms a step, bound by {bound}; MFU at most {self.mfu_bound:.1%}"
        yield "fits" if self.fits else "does not fit: " + "; ".join(self.advice())

    def advice(self) -> Iterator[str]:
        """What to change so that it fits, nearest first."""
        model, train, sizes = self.config.model, self.config.train, self.sizes
        failed = [program for program in self.compiled if not program.fits]
        held = max((program.arguments for program in failed), default=0.0)
        if held > self.chip.hbm / 2 and sizes["fsdp"] < self.chips // sizes["slices"]:
            yield f"parameters and optimizer state alone take {held / GIB:.1f} GiB, so raise config.mesh.fsdp"
        whole = traffic.held_whole(self.config, sizes)
        if whole > self.chip.hbm / 8:
            yield f"weights gathered for a step take {whole / GIB:.1f} GiB, so set config.mesh.gather=forward"
        if not model.remat:
            yield "set config.model.remat=True"
        if not model.scan_layers:
            yield "set config.model.scan_layers=True"
        rows = train.batch_size // train.accumulation // (sizes["data"] * sizes["fsdp"])
        if rows > 1:
            yield f"a chip has {rows} rows at once: double config.train.accumulation or halve config.train.batch_size"
        else:
            yield "raise config.mesh.tensor or config.mesh.sequence, or take more or larger chips"

    def row(self) -> str:
        """One row of docs/SCALING.md's tables."""
        train, seconds = self.config.train, self.seconds
        bound = max(seconds, key=lambda name: seconds[name])
        mesh = " × ".join(str(self.sizes[axis]) for axis in ("data", "fsdp", "tensor", "sequence"))
        mesh += f", {self.gather}" if self.sizes["fsdp"] > 1 else ""
        where = self.topology + (f" × {self.sizes['slices']}" if self.sizes["slices"] > 1 else "")
        ici, dcn = (sum(getattr(transfer, kind) for transfer in self.step.transfers) for kind in ("ici", "dcn"))
        peaks = " / ".join(f"{program.peak / GIB:.1f}" for program in self.compiled)
        return (
            f"| {self.config.model.layers} {self.config.model.memory} | {where} | {mesh} | "
            f"{train.batch_size * self.config.model.sequence_length / 2**20:.2g} M | "
            f"{peaks} of {self.chip.hbm / GIB:.0f} | "
            f"{self.step.flops / 1e12:.1f} | {ici / 1e9:.1f} / {dcn / 1e9:.2f} | "
            f"{1e3 * seconds[bound]:.0f} ms, {bound} | {self.mfu_bound:.0%} | {'fits' if self.fits else 'no'} |"
        )
