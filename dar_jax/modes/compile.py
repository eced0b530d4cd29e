"""Ahead-of-time compilation: does it fit, what does it send, how fast can it be? Without the chips.

The real train step and the real programs of the sampler are compiled for a TPU topology by libtpu's
compiler, which needs no TPU (`pip install -e '.[tpu]'`), for NVIDIA GPUs by XLA's, which needs no
GPU (`pip install -e '.[gpu-aot]'`), or for the devices at hand. Of each:

    memory        of one device: arguments, temporaries, all together against the chip's
    work          model FLOPs of the whole batch, and those that the program really runs:
                  recomputation and masked halves of attention included
    collectives   by kind, with what a device receives, loops included
    kernels       of GPUs: how many run, which are of libraries, and how long they take by the model
                  of `performance.kernels`
    roofline      seconds for the FLOPs at peak, for the bytes of main memory and for those of the
                  interconnect. A run takes the longest of them if all overlap, their sum if nothing
                  does; real ones lie between or above, since nothing reaches its peak.

No weights are read. A model whose tokenizer or autoencoder does not exist yet is compiled with the
released one's architecture.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import logging

from dar_jax.common.files import write_json
from dar_jax.common.flops import traced_flops
from dar_jax.config import Config
from dar_jax.kinds import find_kind
from dar_jax.kinds.loading import build_task
from dar_jax.kinds.train_step import train_step, with_remat
from dar_jax.nn.fused_attention import check_device
from dar_jax.nn.target import traced_for
from dar_jax.parallel import sharding
from dar_jax.parallel.chips import Chip, chip_of
from dar_jax.parallel.workdir import open_workdir
from dar_jax.performance.hlo import Collective, HloProgram
from dar_jax.performance.kernels import kernels_of
from dar_jax.performance.programs import Program, memory_of
from dar_jax.performance.topologies import devices_per_host, find_devices

REPORT_NAME = "compile.json"


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one run at the chip's limits, and the model FLOPs utilisation they allow.

    Attributes:
        compute: executed FLOPs at bfloat16 peak.
        memory: bytes of main memory at its bandwidth.
        interconnect: bytes of collectives over the links that they can use, those between hosts
            included where these are joined by a network.
        overlapped: the longest of the three.
        serial: their sum.
        mfu_overlapped: if all overlap.
        mfu_serial: if nothing does.
    """

    compute: float
    memory: float
    interconnect: float
    overlapped: float
    serial: float
    mfu_overlapped: float
    mfu_serial: float


def compile_programs(config: Config, workdir: str) -> None:
    """Compile, write `WORKDIR/compile.json` and log it as a table.

    Raises:
        ValueError: an unknown topology, no compiler for it, or a configuration that cannot be used.
    """
    settings = config.compile
    devices = find_devices(settings.topology)
    check_device(config.compute, devices)
    mesh = sharding.make_mesh(config.mesh, devices)
    chip = chip_of(devices)
    with traced_for(devices):
        trained = with_remat(config, mesh, None if chip is None else chip.hbm_bytes)
        programs = [train_step(trained, mesh), *sampling_programs(config, mesh)]
    directory = open_workdir(workdir)
    report = {
        "topology": settings.topology,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "compute": dataclasses.asdict(trained.compute),
        "programs": {},
    }
    for number, program in enumerate(programs, 1):
        logging.info("Compiling %s, program %d of %d", program.name, number, len(programs))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # kernels ask it for their card
            report["programs"][program.name] = analyse(program, devices)
        write_json(directory / REPORT_NAME, report)
    logging.info("Wrote %s:\n%s", directory / REPORT_NAME, table(report))


def sampling_programs(config: Config, mesh: sharding.Mesh) -> Iterator[Program]:
    """Return what sampling runs over and over; nothing is computed."""
    task = build_task(config, with_weights=False)
    images = config.compile.images_per_device * mesh.size
    return find_kind(config.task, "config.task").programs(task, mesh, images)


def analyse(program: Program, devices: Sequence[Any]) -> dict[str, Any]:
    """Compile one program and return its report, as JSON types."""
    with traced_for(devices):
        traced = program.function.trace(*program.arguments, **program.options)
    executed = traced_flops(traced.jaxpr)
    report = {
        "images": program.images,
        "model_flops": program.model_flops or executed,
        "executed_flops": executed,
    }
    start = time.monotonic()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**report, "fits": False, "error": str(error).splitlines()[0]}
    chip = chip_of(devices)
    text = HloProgram(compiled.as_text(), len(devices), devices_per_host(devices))
    collectives = text.collectives()
    report |= {
        "compile_seconds": time.monotonic() - start,
        "memory": memory_of(compiled),
        "memory_traffic": text.memory_traffic(),
        "collectives": [dataclasses.asdict(each) for each in collectives],
        "loops_of_unknown_length": sorted(text.unknown_loops),
    }
    if chip is not None:
        report["fits"] = report["memory"]["total"] <= chip.hbm_bytes
        report["memory"]["of_chip"] = chip.hbm_bytes
        report["roofline"] = dataclasses.asdict(roofline(report, collectives, chip, len(devices)))
        if devices[0].platform != "tpu":  # whose products are written otherwise
            report["kernels"] = kernels_of(text, chip)._asdict()
    return report


def roofline(
    report: dict[str, Any], collectives: Sequence[Collective], chip: Chip, num_devices: int
) -> Roofline:
    """Return the limits of a program whose work is split evenly over the devices."""
    compute = report["executed_flops"] / num_devices / chip.peak_flops
    memory = report["memory_traffic"] / chip.hbm_bandwidth
    times = (each.bytes / bandwidth_of(each, chip, num_devices) for each in collectives)
    interconnect = sum(times, start=0.0)
    overlapped, serial = max(compute, memory, interconnect), compute + memory + interconnect
    ideal = report["model_flops"] / num_devices / chip.peak_flops
    return Roofline(
        compute, memory, interconnect, overlapped, serial, ideal / overlapped, ideal / serial
    )


def bandwidth_of(collective: Collective, chip: Chip, num_devices: int) -> float:
    """Bytes/s that each device can receive in a collective.

    Devices of a host pool their network adapters: a ring enters the host once, through all of them.
    """
    bandwidth = chip.ici_bandwidth * share_of_links(collective, chip, num_devices)
    if chip.network_bandwidth is None or collective.on_a_host == collective.group_size:
        return bandwidth
    return min(bandwidth, chip.network_bandwidth * collective.on_a_host)


def share_of_links(collective: Collective, chip: Chip, num_devices: int) -> float:
    """Share of a chip's links that a collective can use.

    A group is taken to fill as few axes of a cubic torus as it can. The last one it may fill in
    part: as a line, at whose ends one of two links is idle. A permutation goes around one axis.
    """
    if chip.torus_axes == 1 or num_devices == 1:
        return 1.0
    if collective.kind == "collective-permute":
        return 1 / chip.torus_axes
    side = num_devices ** (1 / chip.torus_axes)
    filled = math.log(max(collective.group_size, 2), side)
    whole = min(math.floor(filled + 1e-9), chip.torus_axes)
    part = 0.5 if filled > whole + 1e-9 and whole < chip.torus_axes else 0.0
    return (whole + part) / chip.torus_axes


def table(report: dict[str, Any]) -> str:
    """Return the report as a Markdown table, a row per program."""
    head = (
        "program | images | GB per device: arguments + temporaries = total | fits | "
        "TFLOP model / executed | received per device | compute, memory, interconnect ms | "
        "run ms | MFU | kernels"
    )
    rows = [head, " | ".join("---" for _ in head.split(" | "))]
    rows += [_row(name, each) for name, each in report["programs"].items()]
    return "\n".join(f"| {row} |" for row in rows)


def _row(name: str, report: dict[str, Any]) -> str:
    flops = f"{report['model_flops'] / 1e12:.4g} / {report['executed_flops'] / 1e12:.4g}"
    if "memory" not in report:
        return f"{name} | {report['images']} | {report['error']} | no | {flops} | | | | | "
    memory = {part: f"{size / 1e9:.2f}" for part, size in report["memory"].items()}
    kinds = dict.fromkeys(each["kind"] for each in report["collectives"])
    received = ", ".join(
        f"{_total(report, kind, 'count'):g} {kind} {_total(report, kind, 'bytes') / 1e6:.4g} MB"
        for kind in kinds
    )
    cells = [
        name,
        str(report["images"]),
        f"{memory['arguments']} + {memory['temporaries']} = {memory['total']}",
        {True: "yes", False: "no", None: ""}[report.get("fits")],
        flops,
        received or "nothing",
    ]
    if "roofline" not in report:
        return " | ".join([*cells, "", "", "", ""])
    limits = {part: value * 1e3 for part, value in report["roofline"].items()}
    cells += [
        f"{limits['compute']:.4g}, {limits['memory']:.4g}, {limits['interconnect']:.4g}",
        f"{limits['overlapped']:.4g} .. {limits['serial']:.4g}",
        f"{limits['mfu_overlapped'] / 10:.0f} .. {limits['mfu_serial'] / 10:.0f} %",
    ]
    kernels = report.get("kernels")
    cells.append(f"{kernels['count']}, {1e3 * kernels['seconds']:.4g} ms" if kernels else "")
    return " | ".join(cells)


def _total(report: dict[str, Any], kind: str, field: str) -> float:
    values = (each[field] for each in report["collectives"] if each["kind"] == kind)
    return sum(values, start=0.0)
