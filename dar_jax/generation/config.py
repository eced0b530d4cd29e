"""What is sampled, and how: the block `sample`."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from dar_jax.common.checks import check_seed
from dar_jax.common.config_build import build
from dar_jax.generation.image_set import FORMATS
from dar_jax.kinds import KINDS
from dar_jax.kinds.base import Kind


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """What is sampled, and how.

    Attributes:
        model: model directory; empty takes `WORKDIR/model`.
        untrained_model: model directory for a workdir in which no training has begun; empty: none.
        labels: classes to draw, by index or name; empty takes the first ten, or all for a set of
            images.
        prompts: texts to draw, by a model of captions: "a red apple; a blue car", or a file with
            one a line.
        images_per_class: images of every class or text, side by side.
        batch_size: images that a process generates at a time; 0 takes what the model directory
            recommends.
        seed: image i depends on this seed, i and its label only.
        num_images: size of a set of images, classes in turns; 0 draws pictures to look at.
        format: of that set: "npz" or "png".
        prefix_image: picture file, or `test:3` for a picture of the data source: keep its first
            tokens and draw every label. Like what follows for models of tokens only.
        prefix_tokens: numbers of tokens to keep.
        variations: draw this many images of one label from each prefix instead.
        prefix_image_to: picture as above: draw what lies between the first tokens of the two, as
            many images as `images_per_class`, of one label.
        inpaint_image: picture as above, to redraw in part.
        inpaint_mask: file as large as that picture, white where it is redrawn.
        originals: pictures as above, to draw beside their reconstructions; of a tokenizer or
            autoencoder, where nothing is named, the first held-out ones.
        options: how images are drawn: keys of their own in the block, those of the kind's options
            (`models.dar.options`, `models.transdiff.options`) that are set.
    """

    model: str = ""
    untrained_model: str = ""
    labels: tuple[int | str, ...] = ()
    prompts: str = ""
    images_per_class: int = 10
    batch_size: int = 0
    seed: int = 0
    num_images: int = 0
    format: str = "npz"
    prefix_image: str = ""
    prefix_tokens: tuple[int, ...] = (8, 16, 32)
    variations: int = 0
    prefix_image_to: str = ""
    inpaint_image: str = ""
    inpaint_mask: str = ""
    originals: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name, least in (
            ("images_per_class", 1),
            ("batch_size", 0),
            ("num_images", 0),
            ("variations", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.labels and self.prompts:
            raise ValueError(
                f"labels={self.labels} and prompts={self.prompts!r}: draw one of the two"
            )
        check_seed("seed", self.seed)
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format!r} must be one of {', '.join(FORMATS)}")
        if self.variations and not self.prefix_image:
            raise ValueError(f"variations={self.variations} needs prefix_image=FILE")
        if self.prefix_image_to and (self.variations or not self.prefix_image):
            raise ValueError(
                f"prefix_image_to={self.prefix_image_to!r} needs prefix_image=FILE and variations=0"
            )
        if bool(self.inpaint_image) != bool(self.inpaint_mask):
            raise ValueError("inpaint_image=FILE and inpaint_mask=FILE need each other")
        asked = ("originals", "num_images", "prefix_image", "inpaint_image")
        given = [f"{name}={getattr(self, name)!r}" for name in asked if getattr(self, name)]
        if len(given) > 1 and (self.originals or self.num_images):
            raise ValueError(
                f"{' and '.join(given)} are drawn one at a time: leave all but one out"
            )

    def sampling(self, recommended: Any) -> Any:
        """How a model draws images: as it is best used, but for what is set.

        Args:
            recommended: its own options, an instance of its kind's class.

        Raises:
            ValueError: an option that the kind does not have, or one out of range.
        """
        names = [field.name for field in dataclasses.fields(recommended)]
        for name, value in self.options.items():
            if name not in names:
                raise ValueError(
                    f"config.sample.{name}={value!r} is not an option of this kind of model; it "
                    f"takes {', '.join(names)}"
                )
        values = {**dataclasses.asdict(recommended), **self.options}
        return build(type(recommended), values, "config.sample")

    def reconstruction(self, recommended: Any) -> Any:
        """How an autoencoder decodes: likewise, with those of the options that it has.

        Raises:
            ValueError: one of them is out of range.
        """
        if recommended is None:
            return None
        own = dataclasses.asdict(recommended)
        own |= {name: value for name, value in self.options.items() if name in own}
        return build(type(recommended), own, "config.sample")

    def recommendation(self, kind: Kind) -> dict[str, Any]:
        """What the config of a model directory says of how the model is best used.

        Raises:
            ValueError: an option that the kind does not have, or one out of range.
        """
        size = {"batch_size": self.batch_size} if self.batch_size else {}
        if kind.sampling is None:
            return size
        chosen = self.sampling if kind.draws_images else self.reconstruction
        return {"sampling": dataclasses.asdict(chosen(kind.sampling())), **size}


def sampling_fields() -> dict[str, Any]:
    """Annotations of the options of all kinds, by name."""
    fields = {}
    for kind in KINDS.values():
        if kind.sampling is not None:
            fields |= typing.get_type_hints(kind.sampling)
    return fields
