"""MAR's KL-16 (66M parameters), the autoencoder under TransDiff: exactly the released model.

The official weights, `kl16.ckpt` of MAR (arXiv:2406.11838), which released TransDiff models need:

    python -m dar_jax.main --config=configs/imagenet_kl_vae.py --mode=convert \
        --config.convert.source=kl16.ckpt --workdir=runs/imagenet/kl_vae

How they were trained has not been published. This config trains with the loss of latent diffusion
(arXiv:2112.10752) without its discriminator, at rates of our own, not tried at this size:

    python -m dar_jax.main --config=configs/imagenet_kl_vae.py --workdir=runs/imagenet/kl_vae
"""

from configs import common
from dar_jax.config import ConfigDict
from dar_jax.models.kl_vae import KlVaeConfig
from dar_jax.tasks.kl_vae import KlVaeLossConfig


def get_config() -> ConfigDict:
    config = common.base()
    config.task = "kl_vae"
    config.model = common.block(KlVaeConfig())
    config.loss = common.block(KlVaeLossConfig())
    config.compute.update(dtype="bfloat16", remat="blocks")
    config.mesh.update(data=-1, fsdp=-1)
    config.data.update(
        source="tfds:imagenet2012", image_size=256, crop="random", flip=True, batch_size=256
    )
    config.optimizer.update(learning_rate=1e-4, warmup_steps=5_000, b2=0.999, ema_decay=0.9999)
    config.train.update(steps=500_000, checkpoint_every=5_000, image_every=5_000)
    return config
