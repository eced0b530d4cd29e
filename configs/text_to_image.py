"""Text to image at 256 pixels as the reference trains it: priors over the tokens of tokenizer v1,
conditioned on 120 tokens of FLAN-T5-XL, on WebDataset tars of pictures and captions.

    python -m dar_jax.main --config=configs/text_to_image.py:xl --mode=cache \
        '--config.data.path=shards/{00000..01999}.tar' --workdir=runs/text_to_image/codes
    python -m dar_jax.main --config=configs/text_to_image.py:xl --config.data.source=codes \
        --config.data.path=runs/text_to_image/codes --workdir=runs/text_to_image/xl

The second stage goes on from the first one's model, on fewer pictures with better captions:

    python -m dar_jax.main --config=configs/text_to_image.py:xl,stage2 --config.data.source=codes \
        --config.data.path=runs/text_to_image/better --workdir=runs/text_to_image/xl2

Settings are those of LlamaGen's `train_t2i.py`, which D-AR's tree has and does not use: batches of
256, a constant rate of 1e-4, a tenth of the captions dropped; and of its samples, guidance 7.5 and
the 1,000 likeliest tokens. LlamaGen's second stage has 512 pixels, which tokenizer v1 has no tokens
for: here it is a change of data. No scores are published, and none were measured.

A caption takes 4 kB a token on disk: about 80 kB.
"""

from configs import common, imagenet_dar
from dar_jax.config import ConfigDict

NAMES = ("xl", "1b", "3b")
STAGE2 = "stage2"


def get_config(name: str = "xl") -> ConfigDict:
    size, _, stage = name.partition(",")
    variants = {**dict.fromkeys(NAMES), **dict.fromkeys(f"{n},{STAGE2}" for n in NAMES)}
    common.variant(name, variants)
    config = imagenet_dar.get_config(size)
    config.model.update(text_encoder="t5", caption_dim=2048, condition_tokens=120, num_classes=1)
    config.data.update(source="tar", captions=True, crop="center", batch_size=256)
    config.optimizer.update(learning_rate=1e-4, decay_start=0, decay_end=0, final_learning_rate=0.0)
    config.train.steps = 300_000
    if stage:
        config.train.init_from = f"runs/text_to_image/{size}/model"
    config.cache.kind = "codes"
    config.sample.update(guidance_scale=(7.5,), top_k=1000)
    return config
