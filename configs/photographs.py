"""What LPIPS does: a small tokenizer on crops of photographs that come with packages, in minutes.

    python -m tests.photographs photographs
    for part in common off on; do
      python -m dar_jax.main --config=configs/photographs.py:$part \
          --workdir=runs/photographs/$part
      python -m dar_jax.main --config=configs/photographs.py:$part \
          --workdir=runs/photographs/$part --mode=evaluate --config.evaluate.lpips=vgg16
    done
    python -m tests.reconstructions photographs photographs.png \
        off=runs/photographs/off/model on=runs/photographs/on/model

`common` trains without LPIPS; `off` and `on` continue from its model for equally many steps, `on`
with LPIPS (of VGG16) at the published weight. Means over 137 held-out crops of 64 tokens each:

                      off     on
    LPIPS, VGG16      0.601   0.554
    LPIPS, AlexNet    0.462   0.445
    PSNR              18.1    17.9 dB

So the perceptual loss lowers the distance, even that of a network it was not trained with, at the
price of a little PSNR. Both look coarse after 3,300 steps of 8 crops, but textures are finer with
it. `.github/pictures/photographs.png` shows what the last command draws.
"""

from configs import common as blocks
from configs import image_folder
from dar_jax.config import ConfigDict

COMMON_STEPS, BRANCH_STEPS = 3000, 300
PERCEPTUAL_WEIGHT = 0.5


def small(config: ConfigDict) -> None:
    """The folder's tokenizer for 64 pixels, cut to 0.8M parameters and to float32 for a CPU."""
    config.compute.update(dtype="float32", remat="none", unroll=True)
    config.data.update(path="photographs", batch_size=8)
    config.model.update(code_dim=4, codebook_size=512)
    config.model.update(num_tokens=64, max_tokens=64, num_groups=8, num_steps=8)
    config.model.encoder.update(dim=96, depth=2, head_dim=32)
    config.model.condition.update(dim=64, depth=1, head_dim=32)
    config.model.decoder.update(dim=96, depth=2, head_dim=8, rope_base=100.0, time_shift=4.0)
    config.optimizer.update(name="muon", ema_decay=0.99, warmup_steps=20)
    config.train.update(log_every=20, image_every=0)
    config.evaluate.update(evaluators="reconstruction", features="")


def common(config: ConfigDict) -> None:
    config.optimizer.learning_rate = 1e-2
    config.train.steps = COMMON_STEPS


def off(config: ConfigDict) -> None:
    """Linear decay to zero."""
    config.optimizer.update(learning_rate=4e-3, decay_start=20, decay_end=BRANCH_STEPS)
    config.train.update(steps=BRANCH_STEPS, init_from="runs/photographs/common/model")


def on(config: ConfigDict) -> None:
    off(config)
    config.loss.perceptual_weight = PERCEPTUAL_WEIGHT


def get_config(name: str = "on") -> ConfigDict:
    config = image_folder.get_config("tokenizer_64")
    fill = blocks.variant(name, {"common": common, "off": off, "on": on})
    small(config)
    fill(config)
    return config
