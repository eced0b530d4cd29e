"""Devices that are compiled for, which need not exist: a TPU slice, or NVIDIA GPUs.

TPU's compiler knows its slices by name. NVIDIA's is told what a card is, from the vendor's figures
of H100 SXM, H200 (the same chip with another memory) and B200; its autotuning needs a card, so that
products get default tiles: what is fused, sent and held is that of the card, the tiles are not.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from dar_jax.parallel.chips import CHIPS
from dar_jax.performance.config import LOCAL

EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e:16x16, h100:1x8, h200:8x8, b200:9x8"


@dataclasses.dataclass(frozen=True)
class Card:
    """Figures of a card that XLA asks for beside those of `CHIPS`.

    Attributes:
        kind: key of `CHIPS`.
        capability: major compute capability.
        cores: multiprocessors.
        l2_bytes: second-level cache.
        clock: GHz.
        tensor_clock: GHz of the tensor cores.
        tensor_ops: multiply-adds per clock of one of four tensor cores, in 8 bits.
        core_ops: the same of one of 128 cores, in 16 bits.
    """

    kind: str
    capability: int
    cores: int
    l2_bytes: int
    clock: float
    tensor_clock: float
    tensor_ops: int
    core_ops: int


H100 = Card(
    "NVIDIA H100 80GB HBM3",
    capability=9,
    cores=132,
    l2_bytes=52428800,
    clock=1.98,
    tensor_clock=1.83,
    tensor_ops=1024,
    core_ops=2,
)
GPUS = {
    "h100": H100,
    "h200": dataclasses.replace(H100, kind="NVIDIA H200"),
    "b200": Card("NVIDIA B200", 10, 148, 132644864, 1.965, 1.835, 2048, 1),
}
EIGHT_BITS, SIXTEEN_BITS, FLOAT32 = (2, 6, 19, 20, 23, 24, 25, 28, 29, 33, 35, 36), (10, 16), 11
"""XLA's numbers of types."""
CORE_UNITS = {4: 64, 8: 64, 10: 128, 11: 128, 12: 64, 16: 128}
"""Cores of a multiprocessor that compute with a type."""
DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2_bytes} clock_rate_ghz: {clock}
  device_memory_size: {memory:.0f} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {capability} feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  scalar_unit_description {{ {core_rates} }} matrix_unit_description {{ {tensor_core_rates} }}
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability {capability}.0a"
  device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true name: "{kind}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{kind}"
"""


def find_devices(topology: str) -> Sequence[Any]:
    """Return the devices of a topology, which need not exist, or those at hand.

    Raises:
        ValueError: there is no such topology, or no compiler for it.
    """
    if topology == LOCAL:
        return jax.devices()
    gpus = re.fullmatch(r"(\w+):(\d+)x(\d+)", topology)
    is_gpu = gpus is not None and gpus[1] in GPUS
    # Without a TPU, libtpu would ask the cloud's metadata server about one. No chip is touched, so
    # other processes may have it loaded, which it would take for a conflict.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # to load a program takes the chip
    extra = "gpu-aot" if is_gpu else "tpu"
    try:
        if gpus is not None and is_gpu:
            return _gpus(*gpus.groups())
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        if is_gpu or "not installed" in str(error):
            raise ValueError(
                f"compile.topology={topology} needs the compiler of these devices: "
                f"pip install -e '.[{extra}]' ({_first_line(error)})"
            ) from error
        raise ValueError(
            f"no compile.topology {topology!r}: {error}; examples: {EXAMPLES}, {LOCAL}"
        ) from error


def _gpus(card: str, hosts: str, devices: str) -> Sequence[Any]:
    """GPUs of one kind: so many hosts, each with so many devices."""
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=card_description(card),
        topology=f"1x{hosts}x{devices}",
    ).devices


def card_description(name: str) -> str:
    """What XLA wants to know of a card, as a text protocol buffer."""
    card = GPUS[name]
    chip = CHIPS[card.kind]

    def rate(key: int, clock: float, units: int, ops: int) -> str:
        return (
            f"rate_infos {{ key: {key} value {{ clock_rate_ghz: {clock} units_per_core: {units} "
            f"ops_per_clock: {ops} }} }}"
        )

    tensor_ops = {
        **dict.fromkeys(EIGHT_BITS, card.tensor_ops),
        **dict.fromkeys(SIXTEEN_BITS, card.tensor_ops // 2),
        FLOAT32: card.tensor_ops // 4,
    }
    core_ops = dict.fromkeys(CORE_UNITS, 1) | dict.fromkeys(SIXTEEN_BITS, card.core_ops)
    return DESCRIPTION.format(
        **dataclasses.asdict(card),
        bandwidth=chip.hbm_bandwidth,
        memory=chip.hbm_bytes,
        core_rates=" ".join(
            rate(key, card.clock, units, core_ops[key]) for key, units in CORE_UNITS.items()
        ),
        tensor_core_rates=" ".join(
            rate(key, card.tensor_clock, 4, ops) for key, ops in tensor_ops.items()
        ),
    )


def _first_line(error: Exception) -> str:
    (reason, *_) = str(error).splitlines() or [type(error).__name__]
    return reason


def devices_per_host(devices: Sequence[Any]) -> int:
    """How many of the devices share a host, and its fast links, with the first one.

    A TPU's reach other hosts.
    """
    if devices[0].platform == "tpu":
        return len(devices)
    return sum(each.process_index == devices[0].process_index for each in devices)
