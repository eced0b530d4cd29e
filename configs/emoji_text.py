"""The emoji of `configs/emoji.py` by their names: "woman mechanic: medium skin tone".

    bash launch/emoji.sh    # pictures and tokenizer
    python -m dar_jax.main --config=configs/emoji_text.py --mode=cache --workdir=runs/emoji/names
    python -m dar_jax.main --config=configs/emoji_text.py --workdir=runs/emoji/text \
        --config.data.source=codes --config.data.path=runs/emoji/names
    python -m dar_jax.main --config=configs/emoji_text.py --mode=evaluate --workdir=runs/emoji/text
    python -m dar_jax.main --config=configs/emoji_text.py --mode=sample --workdir=runs/emoji/text \
        --config.sample.prompts="woman mechanic: dark skin tone; green heart"

Of a role, a gender and a skin tone no two are the same combination, and some of these are held out:
names that were never seen, of words that were. Evaluation draws these, and asks judges of what they
say (`dar_jax.evaluation.attributes`), beside the pictures that they name. `package://emoji_text` is
what came of the 32 pixels, see `dar_jax/shipped/README.md`.
"""

from configs import common, emoji
from dar_jax.config import ConfigDict

ROLES = (
    "farmer|cook|student|singer|artist|teacher|factory worker|technologist|office worker|mechanic|"
    "scientist|astronaut|firefighter|health worker|judge|pilot|police officer|detective|"
    "construction worker|superhero|supervillain|mage|fairy|vampire|elf"
)
TONES = "|".join(
    f"{tone} skin tone" for tone in ("light", "medium-light", "medium", "medium-dark", "dark")
)
ATTRIBUTES = {
    "role": ROLES,
    "gender": "man|woman",
    "tone": TONES,
    "hair": "red hair|blond hair|white hair|curly hair|bald|beard",
    "colour": "red|orange|yellow|green|blue|purple|brown",
}


def get_config(name: str = "32") -> ConfigDict:
    common.variant(name, dict.fromkeys(map(str, emoji.TOKENIZERS)))
    config = emoji.get_config(f"dar_{name}")
    config.model = common.block(emoji.prior(int(name), num_layers=4, num_heads=4, dim=128))
    config.model.update(text_encoder="minilm", caption_dim=384, condition_tokens=24, num_classes=1)
    emoji.schedule(config, steps=4100, learning_rate=4e-3)
    config.data.captions = True
    config.cache.kind = "codes"
    config.evaluate.update(evaluators="generation", classifier=False)
    config.sample.untrained_model = "package://emoji_text" if name == "32" else ""
    config.sample.update(guidance_scale=(2.0,), temperature=0.5)
    config.evaluate.reference = "test"
    config.evaluate.attributes = "; ".join(f"{n}={values}" for n, values in ATTRIBUTES.items())
    return config
