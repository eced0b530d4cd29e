"""5,000 MNIST digits that come with a package: both methods end to end, in minutes on a laptop.

D-AR:

    python -m dar_jax.main --config=configs/mnist.py:tokenizer --workdir=runs/mnist/tokenizer
    python -m dar_jax.main --config=configs/mnist.py:dar --workdir=runs/mnist/dar

The second command trains on the tokens of the first one's model. `bash launch/quickstart.sh` runs
both, samples and measures the result.

From the prior that comes with the package, or any other: guidance in one row instead of two, and
training by reward,

    python -m dar_jax.main --config=configs/mnist.py:dar_distilled --workdir=runs/mnist/distilled
    python -m dar_jax.main --config=configs/mnist.py:dar_reward --workdir=runs/mnist/rewarded

TransDiff: an autoencoder, the one-step model of its latents, and multi-reference autoregression
fine-tuned from that:

    for name in kl_vae transdiff transdiff_mrar; do
      python -m dar_jax.main --config=configs/mnist.py:$name --workdir=runs/mnist/$name
    done
"""

from configs import common
from dar_jax.config import ConfigDict
from dar_jax.models.dar.decoder import FlowDecoderConfig
from dar_jax.models.dar.encoder import EncoderConfig
from dar_jax.models.dar.llama import LlamaConfig, ffn_hidden_dim
from dar_jax.models.dar.tokenizer import ConditionConfig, TokenizerConfig
from dar_jax.models.kl_vae import KlVaeConfig
from dar_jax.models.transdiff.model import TransDiffConfig
from dar_jax.tasks.dar_reward import RewardConfig
from dar_jax.tasks.dar_tokenizer import TokenizerLossConfig
from dar_jax.tasks.kl_vae import KlVaeLossConfig
from dar_jax.tasks.transdiff import TransDiffLossConfig

NUM_TOKENS = 32
CODEBOOK_SIZE = 256


def tokenizer(config: ConfigDict) -> None:
    """32 tokens in 4 groups for a 32x32 image; 2 of the 8 denoising steps per group."""
    config.task = "dar_tokenizer"
    config.model = common.block(
        TokenizerConfig(
            image_size=32,
            num_tokens=NUM_TOKENS,
            num_groups=4,
            num_steps=8,
            codebook_size=CODEBOOK_SIZE,
            code_dim=4,
            max_tokens=NUM_TOKENS,
            encoder=EncoderConfig(patch_size=8, dim=96, depth=2, head_dim=32),
            condition=ConditionConfig(dim=64, depth=1, head_dim=32),
            decoder=FlowDecoderConfig(
                patch_size=4,
                dim=64,
                depth=3,
                # An image token learns where it is from how each head weighs the condition
                # tokens of a step, which takes several heads and several tokens.
                head_dim=8,
                rope_base=100.0,  # an 8x8 grid needs short wavelengths
                time_shift=10.0,  # small pictures show through little noise: stay near the noise
                feature_layer=None,
            ),
        )
    )
    # In a few thousand steps the codebook does not fill by itself.
    config.loss = common.block(TokenizerLossConfig(entropy_weight=0.02))
    config.evaluate.evaluators = "reconstruction"
    config.compute.unroll = True
    # With only 4,500 pictures, small shifts and weight decay help on the held-out ones.
    config.data.update(batch_size=32, padding=1)
    config.optimizer.weight_decay = 0.1
    short_schedule(config, steps=2500, learning_rate=1e-2)


def short_schedule(config: ConfigDict, steps: int, learning_rate: float) -> None:
    """Muon with a linear decay to zero gets the most out of a few minutes."""
    config.optimizer.update(
        name="muon",
        learning_rate=learning_rate,
        warmup_steps=50,
        decay_start=50,
        decay_end=steps,
        ema_decay=0.99,
    )
    config.train.update(steps=steps, log_every=50, checkpoint_every=500, image_every=1000)


def dar(config: ConfigDict) -> None:
    """A Llama over the tokenizer's 32 tokens."""
    config.task = "dar_prior"
    config.tokenizer = "runs/mnist/tokenizer/model"
    config.model = common.block(
        LlamaConfig(
            num_layers=4,
            num_heads=4,
            dim=128,
            ffn_dim=ffn_hidden_dim(128, multiple_of=128),
            vocab_size=CODEBOOK_SIZE,
            num_tokens=NUM_TOKENS,
            num_classes=10,
        )
    )
    config.compute.unroll = True
    config.data.batch_size = 64
    config.optimizer.weight_decay = 0.05
    short_schedule(config, steps=500, learning_rate=4e-3)
    config.evaluate.evaluators = "reconstruction,previews"
    config.sample.untrained_model = "package://mnist"
    config.sample.guidance_scale = (1.0, 5.0)
    config.sample.solver = "euler"  # the last of 8 steps is too long to extrapolate
    config.sample.prefix_tokens = (1, 2, 4, 8)


def from_dar(config: ConfigDict, task: str, teacher: str) -> None:
    """Another training of the digits that come with the package, or of any model of `dar`."""
    dar(config)
    config.task = task
    config.tokenizer = "package://mnist/tokenizer"
    config[teacher] = config.train.init_from = "package://mnist"
    config.model.update(token_dropout=0.0, residual_dropout=0.0)


def dar_distilled(config: ConfigDict) -> None:
    """A prior that needs one row of the network, not two, for a guided token."""
    from_dar(config, "dar_distilled", "teacher")
    config.model.max_guidance = 8.0
    short_schedule(config, steps=400, learning_rate=2e-3)


def dar_reward(config: ConfigDict) -> None:
    """A prior that is rewarded for digits that are recognised."""
    from_dar(config, "dar_reward", "reference")
    config.loss = common.block(RewardConfig(reward="likelihood"))
    config.data.batch_size = 10
    short_schedule(config, steps=200, learning_rate=2e-4)
    config.optimizer.name = "adamw"


def kl_vae(config: ConfigDict) -> None:
    """An autoencoder of 8x8x4 latents for a 32x32 image."""
    config.task = "kl_vae"
    config.model = common.block(
        KlVaeConfig(
            width=16,
            width_factors=(1, 2, 4),
            num_blocks=1,
            attention_levels=(),
            latent_channels=4,
            num_groups=8,
            latent_scale=0.735,  # 1 / deviation of the latents of the training digits
        )
    )
    config.loss = common.block(KlVaeLossConfig(kl_weight=1e-3, perceptual_weight=0.0))
    config.evaluate.evaluators = "reconstruction"
    config.data.batch_size = 32
    short_schedule(config, steps=400, learning_rate=2e-3)
    config.optimizer.name = "adamw"  # most kernels are convolutions, which Muon leaves to AdamW


LATENT_SIZE, LATENT_CHANNELS = 8, 4


def transdiff(config: ConfigDict) -> None:
    """TransDiff over the latents of `kl_vae`: 64 condition tokens, 64 latent tokens."""
    config.task = "transdiff"
    config.vae = "runs/mnist/kl_vae/model"
    config.model = common.block(
        TransDiffConfig(
            latent_size=LATENT_SIZE,
            channels=LATENT_CHANNELS,
            num_classes=10,
            condition_tokens=LATENT_SIZE**2,
            buffer_size=4,
            dim=64,
            num_heads=4,
            encoder_depth=2,
            decoder_depth=4,
            attention_dropout=0.0,
            dropout=0.0,
        )
    )
    config.loss = common.block(TransDiffLossConfig(copies=2))
    config.compute.unroll = True
    config.data.update(batch_size=32, padding=1)
    short_schedule(config, steps=1500, learning_rate=1e-2)
    config.sample.update(solver="euler_maruyama", guidance_scale=(1.5,), num_steps=50)


def transdiff_mrar(config: ConfigDict) -> None:
    """The same with four references of 16 tokens each, from the one-step model."""
    transdiff(config)
    config.train.init_from = "runs/mnist/transdiff/model"
    config.model.update(num_references=4, reference_patch_size=2)
    config.data.update(num_references=4, batch_size=16)
    config.loss.copies = 1
    short_schedule(config, steps=800, learning_rate=5e-3)


def quick_evaluation(config: ConfigDict) -> None:
    """A classifier judges digits well and within seconds; the large networks are off."""
    config.evaluate.update(classifier=True, features="", lpips="", num_images=1000)


def get_config(name: str = "dar") -> ConfigDict:
    config = common.base()
    quick_evaluation(config)
    common.variant(
        name,
        {
            "tokenizer": tokenizer,
            "dar": dar,
            "dar_distilled": dar_distilled,
            "dar_reward": dar_reward,
            "kl_vae": kl_vae,
            "transdiff": transdiff,
            "transdiff_mrar": transdiff_mrar,
        },
    )(config)
    return config
