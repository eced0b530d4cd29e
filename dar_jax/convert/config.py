"""What is converted: the block `convert`."""

import dataclasses

from dar_jax.convert import frozen

DIRECTIONS = ("jax", "torch")


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """What is converted.

    Attributes:
        source: an official checkpoint, see `checkpoints.read_checkpoint`, as a path or
            `hf://owner/name/file`; towards torch a model directory, where empty is WORKDIR/model.
        to: "jax" writes the model directory WORKDIR/model, "torch" writes WORKDIR/KIND.safetensors
            under the reference's names.
        net: towards jax, a frozen network of losses or evaluation instead of config.task: one of
            `frozen.NETS`, which says what `source` is then.
    """

    source: str = ""
    to: str = "jax"
    net: str = ""

    def __post_init__(self):
        if self.net not in ("", *frozen.NETS):
            raise ValueError(f"net={self.net!r} must be one of {', '.join(frozen.NETS)}")
        if self.to not in DIRECTIONS:
            raise ValueError(f"to={self.to!r} must be one of {', '.join(DIRECTIONS)}")
