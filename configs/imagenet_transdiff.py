"""TransDiff on ImageNet, in the latents of MAR's KL-16 (config.vae), as published.

    python -m dar_jax.main --config=configs/imagenet_transdiff.py:l --workdir=DIR

A variant is a size, b, l or h, optionally followed by `,mrar` (256 pixels, four references) or
`,512` (512 pixels, only the decoder is trained). Both start from the one-step model that
--config.train.init_from names (`tasks.transdiff` says how tensors of other shapes are made to fit).

The official weights instead of training, where config.vae is the converted autoencoder:

    python -m dar_jax.main --config=configs/imagenet_transdiff.py:l --mode=convert \
        --config.convert.source=checkpoint-last.pth --workdir=DIR

The published recipe encodes every picture anew. To encode the centre crop and its mirror once:

    python -m dar_jax.main --config=configs/imagenet_transdiff.py:l --mode=cache \
        --config.cache.kind=latents --config.data.crop=center --workdir=LATENTS
    python -m dar_jax.main --config=configs/imagenet_transdiff.py:l --workdir=DIR \
        --config.data.source=latents --config.data.path=LATENTS

Published FID and IS (arXiv:2506.09482; 50,000 images, ADM suite, 100 steps), with the scales below:

    variant    b     b,mrar  l     l,mrar  h     h,mrar  l,512
    FID        2.47  2.25    1.69  1.49    1.61  1.42    2.51
    IS         244   282     244   293     282   301     287

Learning rates are for a batch of 2,048: the one-step recipe says 1e-4 per 256 samples, the others
give absolute rates. An epoch is 1,281,167 images, or groups for MRAR. The reference trains in
float16 or casts everything to bfloat16; here parameters, optimizer and average stay float32.
"""

from configs import common
from dar_jax.config import ConfigDict
from dar_jax.models.transdiff.model import AT_512_PIXELS, MRAR, SIZES, TransDiffConfig
from dar_jax.tasks.transdiff import TransDiffLossConfig

BATCH_SIZE = 2048
CLIP_NORM = 3.0
ACCUMULATED = 2
"""Microbatches of the fine-tuning recipes. The reference sums their gradients, so the threshold for
their mean is half as large."""
IMAGENET_IMAGES = 1_281_167
STEPS_PER_EPOCH = IMAGENET_IMAGES // BATCH_SIZE
SAMPLING = {
    "b": (1.30, 0.87, 0.91),
    "l": (1.30, 0.89, 0.95),
    "h": (1.23, 0.87, 0.93),
    "b,mrar": (1.30, 0.87, 0.91),
    "l,mrar": (1.30, 0.925, 0.95),
    "h,mrar": (1.28, 0.87, 0.91),
    "l,512": (1.30, 0.87, 0.87),
}
"""Guidance, drift and noise scale of the published figures; at 512, b and h take those of l."""


def get_config(name: str = "l") -> ConfigDict:
    size, _, form = name.partition(",")
    config = common.base()
    common.variant(form, FORMS)(config, common.variant(size, SIZES))
    guidance, drift, noise = SAMPLING.get(name, SAMPLING["l,512"])
    config.sample.update(
        solver="euler_maruyama",
        guidance_scale=(guidance,),
        drift_scale=drift,
        noise_scale=noise,
    )
    return config


def one_step(config: ConfigDict, size: dict[str, int]) -> None:
    """256 pixels, 800 epochs from scratch."""
    config.task = "transdiff"
    config.vae = "runs/imagenet/kl_vae/model"
    config.model = common.block(TransDiffConfig(**size))
    config.loss = common.block(TransDiffLossConfig(copies=4))
    config.data.update(
        source="tfds:imagenet2012",
        image_size=256,
        crop="square",
        flip=True,
        batch_size=BATCH_SIZE,
    )
    config.compute.update(dtype="bfloat16", remat="auto")
    config.mesh.update(data=-1, fsdp=-1, gather="step")
    config.optimizer.update(
        learning_rate=8e-4,
        weight_decay=0.02,
        undecayed="decoder/",
        clip_norm=CLIP_NORM,
        ema_decay=0.9999,
    )
    _schedule(config, epochs=800, warmup_epochs=100)


def mrar(config: ConfigDict, size: dict[str, int]) -> None:
    """Multi-reference autoregression: 40 epochs of groups, from a one-step model."""
    one_step(config, size)
    config.model.update(MRAR)
    config.loss.copies = 2
    config.data.num_references = MRAR["num_references"]
    config.optimizer.update(learning_rate=5e-5, clip_norm=CLIP_NORM / ACCUMULATED)
    _schedule(config, epochs=40, warmup_epochs=10)


def at_512_pixels(config: ConfigDict, size: dict[str, int]) -> None:
    """512 pixels: 150 epochs of the decoder alone, from a one-step model of 256."""
    one_step(config, size)
    config.model.update(AT_512_PIXELS)
    config.data.image_size = 512
    config.optimizer.update(
        learning_rate=1e-4,
        clip_norm=CLIP_NORM / ACCUMULATED,
        ema_decay=0.999,
        trained="decoder/",
    )
    _schedule(config, epochs=150, warmup_epochs=10)


def _schedule(config: ConfigDict, epochs: int, warmup_epochs: int) -> None:
    config.optimizer.warmup_steps = warmup_epochs * STEPS_PER_EPOCH
    config.train.update(steps=epochs * STEPS_PER_EPOCH, checkpoint_every=5000, image_every=5000)


FORMS = {"": one_step, "mrar": mrar, "512": at_512_pixels}
