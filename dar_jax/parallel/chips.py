"""What accelerators can do, in one table: figures of one chip, from the vendors' data sheets.

TPU     cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e (key specifications). The
        interconnect is given there in both directions together; here it is one direction.
        v4's: six links of 50 GB/s (arXiv:2304.01433).
NVIDIA  data sheets of A100 (80 GB SXM), H100 (SXM), H200 and DGX B200: dense bfloat16, NVLink one
        way; the network is that of DGX machines: an adapter per card, of 200 or 400 Gbit/s.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one chip, or of one core of it where JAX sees cores.

    Attributes:
        peak_flops: bfloat16 FLOP/s of the matrix units.
        hbm_bytes: memory.
        hbm_bandwidth: bytes/s.
        ici_bandwidth: bytes/s that it can receive over all its links to other chips together.
        torus_axes: axes of the torus that those links form; 1 for a switch.
        network_bandwidth: bytes/s to other hosts, where the links do not reach them.
    """

    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    torus_axes: int = 1
    network_bandwidth: float | None = None


CHIPS = {
    "TPU v4": Chip(275e12, 32 * GIB, 1.2e12, 300e9, 3),
    "TPU v5 lite": Chip(197e12, 16 * GIB, 819e9, 200e9, 2),  # v5e
    "TPU v5": Chip(459e12, 95 * GIB, 2765e9, 600e9, 3),  # v5p
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1638e9, 400e9, 2),  # v6e
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * GIB, 2039e9, 300e9, 1, 25e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80 * GIB, 3350e9, 450e9, 1, 50e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9, 1, 50e9),
    "NVIDIA B200": Chip(2250e12, 180e9, 8000e9, 900e9, 1, 50e9),
}
"""By `device_kind`, as JAX reports it."""


def chip_of(devices: Sequence[Any]) -> Chip | None:
    """Return the figures of each of these equal devices; None if they are not in the table."""
    chip = CHIPS.get(devices[0].device_kind)
    if chip is None:
        return None
    cores = 1 + max(getattr(device, "core_on_chip", 0) for device in devices)
    return dataclasses.replace(
        chip,
        peak_flops=chip.peak_flops / cores,
        hbm_bytes=chip.hbm_bytes / cores,
        hbm_bandwidth=chip.hbm_bandwidth / cores,
        ici_bandwidth=chip.ici_bandwidth / cores,
    )
