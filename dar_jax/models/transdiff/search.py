"""Search for TransDiff: candidates are judged by pictures on their way; see `sampling.search`.

With references (MRAR) each pass adds a whole image, which is judged, and those that go on keep
their references and initial noise. The model of one pass is judged after each quarter of its steps
by the data that the last velocity points to. Candidates draw noise of their own.

Cost of an image: n times all rows of both networks, and a picture whenever it is judged; see
`calls`.
"""

from typing import NamedTuple

from dar_jax.models.transdiff import sampler
from dar_jax.models.transdiff.model import TransDiffConfig
from dar_jax.models.transdiff.options import TransDiffSampling


class Calls(NamedTuple):
    """Rows that the networks see for one image.

    Attributes:
        conditions: of the encoder.
        velocities: of the diffusion decoder.
        pictures: latents that are decoded.
    """

    conditions: int
    velocities: int
    pictures: int


def stops(sampling: TransDiffSampling, config: TransDiffConfig) -> range:
    """Steps of every pass after which candidates are judged, beside the last one."""
    if sampling.search.method == "end":
        return range(0)
    every = sampler.steps_per_preview(config, sampling.num_steps)
    return range(every, sampling.num_steps, every)


def num_judged(sampling: TransDiffSampling, config: TransDiffConfig) -> int:
    """How often candidates are judged."""
    if sampling.search.method == "end":
        return 1
    return config.num_references * (len(stops(sampling, config)) + 1)


def calls(sampling: TransDiffSampling, config: TransDiffConfig) -> Calls:
    """Count what one image costs with these options."""
    scales = map(sampling.scale_of, range(config.num_references))
    rows = sampling.search.num * sum(1 if scale == 1 else 2 for scale in scales)
    pictures = sampling.search.num * num_judged(sampling, config) if sampling.search.method else 1
    return Calls(rows, rows * sampling.num_steps, pictures)
