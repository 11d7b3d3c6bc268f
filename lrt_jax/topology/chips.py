"""Facts about TPU chips: the one table that everything else here reads."""

import dataclasses

from lrt_jax.setup.errors import UserError
from lrt_jax.setup.hardware import PEAK_FLOPS


class TopologyError(UserError, ValueError):
    """A topology that there is not, or that cannot be compiled for; one sentence says why."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
      kind: its name in ``setup.hardware.PEAK_FLOPS``.
      hbm: bytes of memory that the data sheet promises; the compiler keeps a little of it for itself.
      hbm_bandwidth: bytes per second.
      ici: bytes per second that all its links to neighbours receive together (half of the bidirectional figure).
      torus: how many axes its network has.
      dcn: bytes per second of the data center network, its share of the host's.
      source: where these are from.
    """

    kind: str
    hbm: float
    hbm_bandwidth: float
    ici: float
    torus: int
    dcn: float
    source: str

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return PEAK_FLOPS[self.kind]

    @property
    def ici_axis(self) -> float:
        """Bytes per second received over one axis of the torus: a ring, used both ways."""
        return self.ici / self.torus


# Read in November 2026. A figure for a pod is divided by its chips; GB are 10⁹ bytes, GiB 2³⁰.
CHIPS = {
    # 16 GB, 819 GBps, ICI 400 GBps bidirectional, DCN 6.4 Tbps per pod of 256.
    "v5e": Chip("TPU v5e", 16 * 2**30, 819e9, 200e9, 2, 3.125e9, "docs.cloud.google.com/tpu/docs/v5e"),
    # 95 GiB, 2765 GBps, ICI 1200 GBps bidirectional, DCN 50 Gbps per chip.
    "v5p": Chip("TPU v5p", 95 * 2**30, 2765e9, 600e9, 3, 6.25e9, "docs.cloud.google.com/tpu/docs/v5p-training"),
    # 32 GB, 1638 GBps, ICI 800 GBps bidirectional, DCN 25.6 Tbps per pod of 256.
    "v6e": Chip("TPU v6e", 32 * 2**30, 1638e9, 400e9, 2, 12.5e9, "docs.cloud.google.com/tpu/docs/v6e"),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology's name: ``v5e:16x16`` → v5e.

    Raises:
      TopologyError: it is not known.
    """
    kind, colon, shape = topology.partition(":")
    if kind not in CHIPS or not colon or not all(part.isdecimal() and int(part) for part in shape.split("x")):
        raise TopologyError(
            f"--topology is {topology!r}; it must be CHIP:SHAPE as in v5e:16x16 or v5p:4x4x4, with a chip of: "
            f"{', '.join(CHIPS)}"
        )
    return CHIPS[kind]
