"""D-AR on your own images: a folder with a folder per class, `DIR/CLASS/name.jpg`.

    python -m dar_jax.main --config=configs/image_folder.py:tokenizer --config.data.path=DIR \
        --workdir=runs/images/tokenizer
    python -m dar_jax.main --config=configs/image_folder.py:dar --config.data.path=DIR \
        --workdir=runs/images/dar

The second command trains on the tokens of the first one's model. Both are for 128 pixels;
`tokenizer_N` and `dar_N` are for N of them, 32 or any multiple of 16 from 48 to 256. Pictures may
have any size, and nothing has to be prepared. A fiftieth of every class is held out, or
`DIR/val/CLASS` where there is a `DIR/train/CLASS`. A folder of pictures without classes is one
class. The sizes suit tens of thousands of pictures on one accelerator; any of them can be changed.
`tokenizer_32` and `dar_32` are those of `configs/emoji.py` with short schedules, for a CPU and a
thousand pictures.

    variant  tokens  tokenizer  prior
    32       128     1.2M       2.2M
    64       128     15M        28M
    128      128     49M        66M
    256      256     300M       110M

Sizes between have the width and depth of the next larger one, and tokens as their sides are long.
`configs/photographs.py` shows what the perceptual loss does to held-out crops, with a small model
and pictures that packages ship.

Other forms of data: `--config.data.source=tar` (WebDataset), `records` (`--mode=cache`), or
`tfds:NAME`.
"""

import dataclasses
import functools

from configs import common, emoji, mnist
from dar_jax.config import ConfigDict
from dar_jax.models.dar.decoder import FlowDecoderConfig
from dar_jax.models.dar.encoder import EncoderConfig
from dar_jax.models.dar.llama import LlamaConfig, ffn_hidden_dim
from dar_jax.models.dar.tokenizer import ConditionConfig, TokenizerConfig
from dar_jax.tasks.dar_tokenizer import TokenizerLossConfig

TOKENIZERS = {
    64: TokenizerConfig(
        image_size=64,
        num_tokens=128,
        num_groups=4,
        num_steps=8,
        max_tokens=128,
        codebook_size=1024,
        encoder=EncoderConfig(patch_size=8, dim=256, depth=4),
        condition=ConditionConfig(dim=256, depth=2),
        decoder=FlowDecoderConfig(
            patch_size=4, dim=256, depth=6, rope_base=100.0, time_shift=30.0, feature_layer=None
        ),
    ),
    128: TokenizerConfig(
        image_size=128,
        num_tokens=128,
        max_tokens=128,
        codebook_size=4096,
        encoder=EncoderConfig(patch_size=8, dim=384, depth=6),
        condition=ConditionConfig(dim=384, depth=4),
        decoder=FlowDecoderConfig(patch_size=8, dim=384, depth=8, feature_layer=None),
    ),
    256: TokenizerConfig(
        max_tokens=256,
        decoder=FlowDecoderConfig(feature_layer=None),
    ),
}
"""The released tokenizer at 256 pixels, and smaller ones in its proportions; that of 64 pixels in
those of the emoji's: 300 steps of 16 emoji of 64 pixels, in a cut-down width, came to 15.6 dB of
held-out pictures, and to 12.2 with 8 tokens a step and the released positions and times.
"""

PRIORS = {64: (8, 8, 512), 128: (12, 10, 640), 256: (12, 12, 768)}
"""Layers, heads and width by image size."""


def next_larger(image_size: int) -> int:
    """The size of `TOKENIZERS` whose proportions an image size has."""
    return min(size for size in TOKENIZERS if size >= image_size)


def num_tokens(image_size: int) -> int:
    """Tokens of an image."""
    larger = next_larger(image_size)
    return TOKENIZERS[larger].num_tokens * image_size // larger


def accelerated(config: ConfigDict, image_size: int) -> None:
    config.compute.update(dtype="bfloat16", remat="auto")
    config.data.image_size = image_size


def tokenizer(config: ConfigDict, image_size: int) -> None:
    accelerated(config, image_size)
    config.task = "dar_tokenizer"
    length = num_tokens(image_size)
    sizes = dict(image_size=image_size, num_tokens=length, max_tokens=length)
    larger = TOKENIZERS[next_larger(image_size)]
    config.model = common.block(dataclasses.replace(larger, **sizes))
    # Small data sets fill a codebook more slowly than the ImageNet of the released recipe.
    config.loss = common.block(TokenizerLossConfig(entropy_weight=0.02))
    config.data.update(crop="random", flip=True, batch_size=128)
    config.optimizer.update(
        learning_rate=2e-4,
        warmup_steps=500,
        b1=0.9,
        b2=0.95,
        weight_decay=0.0,
        clip_norm=1.0,
        ema_decay=0.999,
    )
    config.train.update(steps=100_000)
    config.evaluate.evaluators = "reconstruction"


def dar(config: ConfigDict, image_size: int) -> None:
    accelerated(config, image_size)
    larger = next_larger(image_size)
    num_layers, num_heads, dim = PRIORS[larger]
    config.task = "dar_prior"
    config.tokenizer = "runs/images/tokenizer/model"
    config.model = common.block(
        LlamaConfig(
            num_layers=num_layers,
            num_heads=num_heads,
            dim=dim,
            ffn_dim=ffn_hidden_dim(dim),
            vocab_size=TOKENIZERS[larger].codebook_size,
            num_tokens=num_tokens(image_size),
            num_classes=0,
        )
    )
    config.data.update(crop="ten_crop", batch_size=256)
    config.optimizer.update(
        learning_rate=4e-4,
        warmup_steps=500,
        decay_start=75_000,
        decay_end=100_000,
        final_learning_rate=1e-5,
        b1=0.9,
        b2=0.95,
        weight_decay=0.05,
        clip_norm=1.0,
        ema_decay=0.999,
    )
    config.train.update(steps=100_000)
    config.sample.guidance_scale = (1.1, 4.0)


def tokenizer_32(config: ConfigDict) -> None:
    emoji.tokenizer(config, image_size=32)
    mnist.quick_evaluation(config)
    config.loss = common.block(TokenizerLossConfig(entropy_weight=0.02))
    config.data.update(crop="random", flip=True, padding=0)
    emoji.schedule(config, steps=2000, learning_rate=1e-2)


def dar_32(config: ConfigDict) -> None:
    emoji.dar(config, image_size=32)
    mnist.quick_evaluation(config)
    config.tokenizer = "runs/images/tokenizer/model"
    config.data.update(crop="ten_crop", padding=0)
    emoji.schedule(config, steps=2000, learning_rate=4e-3)
    config.sample.untrained_model = ""


def get_config(name: str = "tokenizer") -> ConfigDict:
    config = common.base()
    sizes = {"": 128, **{f"_{size}": size for size in range(48, 257, 16)}}
    variants = {
        f"{part.__name__}{suffix}": functools.partial(part, image_size=size)
        for part in (tokenizer, dar)
        for suffix, size in sizes.items()
    }
    config.data.source = "folder"
    common.variant(name, {**variants, "tokenizer_32": tokenizer_32, "dar_32": dar_32})(config)
    return config
