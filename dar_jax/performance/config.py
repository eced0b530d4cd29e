"""What is compiled and what is timed: the blocks `compile` and `benchmark`."""

import dataclasses

from dar_jax.common.checks import check_microbatch

BENCHMARKS = ("sample", "train", "encode", "data", "evaluate")
LOCAL = "local"
"""Names the devices at hand where a topology is asked for."""


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """What is compiled for.

    Attributes:
        topology: a TPU slice such as "v5e:16x16"; GPUs such as "h200:8x8", eight hosts of eight
            (also "h100", "b200"); or "local": the devices at hand.
        images_per_device: images that the sampler's programs work on, per device.
    """

    topology: str = LOCAL
    images_per_device: int = 16

    def __post_init__(self):
        if self.images_per_device < 1:
            raise ValueError(f"images_per_device {self.images_per_device} is not positive")


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """What is timed.

    Attributes:
        what: `sample`; `train`, steps of `config.task` on all devices with its batches; `encode`,
            the pictures of these to tokens or latents; `data`, reading these batches; or
            `evaluate`, images of `data.image_size` through the network of `evaluate.features`. The
            other keys, but `repeats`, are of `sample`.
        model: model directory of a model that draws images; empty takes random weights of the size
            of `config.model`, which are as fast.
        batch_sizes: images at a time; those that do not fit into memory are skipped.
        guidance_scales: 1 is no guidance and half the work. All else that there is to choose in
            drawing is as in `config.sample`.
        microbatch: images that the flow decoder (D-AR) or the autoencoder (TransDiff) sees at a
            time in larger batches; 0 is all.
        repeats: timed runs of everything.
    """

    what: str = "sample"
    model: str = ""
    batch_sizes: tuple[int, ...] = (1, 8, 64, 256)
    guidance_scales: tuple[float, ...] = (4.0, 1.0)
    microbatch: int = 0
    repeats: int = 3

    def __post_init__(self):
        if self.what not in BENCHMARKS:
            raise ValueError(f"what={self.what!r} must be one of {', '.join(BENCHMARKS)}")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes={self.batch_sizes} must be one or more sizes from 1 on")
        if not self.guidance_scales or min(self.guidance_scales) < 1:
            raise ValueError(
                f"guidance_scales={self.guidance_scales} must be one or more scales of at least 1"
            )
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be at least 1")
        for batch_size in self.batch_sizes:
            check_microbatch(self.microbatch or None, batch_size)
