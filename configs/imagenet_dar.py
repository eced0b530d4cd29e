"""D-AR priors over the 256 tokens of tokenizer v1, ImageNet 256x256, in all sizes that the
reference names.

    python -m dar_jax.main --config=configs/imagenet_dar.py:l --workdir=runs/imagenet/dar_l

The official weights instead of training (L and XL are released):

    python -m dar_jax.main --config=configs/imagenet_dar.py:l --mode=convert \
        --config.convert.source=D-AR-L-360K.pt --workdir=runs/imagenet/dar_l

Both need the model directory of a tokenizer, `--config.tokenizer=DIR`: by default the one that
`configs/imagenet_tokenizer.py` trains or converts to.

Training encodes every picture anew, which is 13 % of the work for L. To encode once, in ten crops
(6.6 GB), and to train on the codes:

    python -m dar_jax.main --config=configs/imagenet_dar.py:l --mode=cache \
        --config.cache.kind=codes --workdir=runs/imagenet/codes
    python -m dar_jax.main --config=configs/imagenet_dar.py:l --workdir=runs/imagenet/dar_l \
        --config.data.source=codes --config.data.path=runs/imagenet/codes

Published FID and IS (arXiv:2505.23660; 50,000 images, ADM suite, no top-k, top-p or temperature),
with the ramp of `--config.sample.guidance_scale=(first,last)`:

    variant  parameters  FID   IS     guidance       without guidance
    l        343M        2.44  263.0  (1.1, 8.0)     7.43, 117.6
    xl       775M        2.09  298.4  (1.1, 10.0)    5.11, 145.8
    xxl      1.4B        2.00  300.6  not published

Measured by

    python -m dar_jax.main --config=configs/imagenet_dar.py:l --mode=evaluate \
        --workdir=runs/imagenet/dar_l --config.sample.guidance_scale=1.1,8.0 \
        --config.evaluate.reference=VIRTUAL_imagenet256_labeled.npz \
        --config.evaluate.weights=runs/imagenet/inception

and, with `--config.evaluate.evaluators=previews`, after every group of tokens. The weights are
those that `--mode=convert --config.convert.net=inception` writes.

The recommended guidance, 4.0 for all tokens, is what the reference draws pictures to look at with.

For the other sizes (b 111M, xxxl 3.9B, 1b, 3b, 7b) the reference gives no scores. Published
training: 300 epochs, about 360,000 steps of 1024 images; L took 2 days on 16 A100.
"""

from configs import common
from dar_jax.config import ConfigDict
from dar_jax.models.dar.llama import SIZES, LlamaConfig

UP_TO_2B = ("b", "l", "xl", "xxl", "1b")


def get_config(name: str = "l") -> ConfigDict:
    config = common.base()
    config.task = "dar_prior"
    config.tokenizer = "runs/imagenet/tokenizer/model"
    config.model = common.block(LlamaConfig(**common.variant(name, SIZES)))
    config.compute.update(dtype="bfloat16", remat="auto")
    # Half the traffic, for 4 bytes per parameter and device: 16 GB have no room for larger sizes.
    config.mesh.update(data=-1, fsdp=-1, gather="step" if name in UP_TO_2B else "layer")
    config.data.update(source="tfds:imagenet2012", image_size=256, crop="ten_crop", batch_size=1024)
    config.optimizer.update(
        learning_rate=4e-4,
        warmup_steps=0,
        decay_start=300_000,
        decay_end=360_000,
        final_learning_rate=1e-5,
        b1=0.9,
        b2=0.95,
        weight_decay=0.05,
        clip_norm=1.0,
        ema_decay=0.0,
    )
    config.train.update(steps=360_000, image_every=5_000)
    config.sample.guidance_scale = (4.0,)
    return config
