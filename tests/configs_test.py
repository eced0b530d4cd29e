"""Every config in every variant: its blocks build, and its model has the published size."""

import jax
import pytest

from configs import (
    emoji,
    emoji_text,
    image_folder,
    imagenet_dar,
    imagenet_kl_vae,
    imagenet_tokenizer,
    imagenet_transdiff,
    mnist,
    photographs,
    text_folder,
    text_to_image,
)
from dar_jax.common import model_dir
from dar_jax.common.tree import num_parameters
from dar_jax.config import build as read_config
from dar_jax.kinds.dar_tokenizer import DarTokenizer
from dar_jax.kinds.loading import build_task
from dar_jax.models.dar.llama import SIZES
from dar_jax.models.dar.tokenizer import TokenizerConfig
from dar_jax.training.optimizer import learning_rate_schedule, make_optimizer
from tests.data import tiny_sets

TRANSDIFF_PARAMETERS = {
    "b": 289_959_184,
    "l": 682_519_568,
    "h": 1_327_891_216,
    "b,mrar": 290_044_432,
    "l,mrar": 682_633_232,
    "l,512": 683_306_000,
}
NULL_CAPTION = 120 * 2048
CONFIGS = {
    "mnist:tokenizer": lambda: mnist.get_config("tokenizer"),
    "mnist:dar": lambda: mnist.get_config("dar"),
    "mnist:dar_distilled": lambda: mnist.get_config("dar_distilled"),
    "mnist:dar_reward": lambda: mnist.get_config("dar_reward"),
    "mnist:kl_vae": lambda: mnist.get_config("kl_vae"),
    "mnist:transdiff": lambda: mnist.get_config("transdiff"),
    "mnist:transdiff_mrar": lambda: mnist.get_config("transdiff_mrar"),
    "imagenet_tokenizer": imagenet_tokenizer.get_config,
    "imagenet_kl_vae": imagenet_kl_vae.get_config,
    **{f"imagenet_dar:{n}": lambda n=n: imagenet_dar.get_config(n) for n in SIZES},
    "photographs": photographs.get_config,
    **{
        f"text_folder:{n}": lambda n=n: text_folder.get_config(n)
        for n in ("32", "64", "128", "256")
    },
    **{
        f"text_to_image:{n}": lambda n=n: text_to_image.get_config(n)
        for n in ("xl", "1b", "3b", "xl,stage2")
    },
    **{
        f"emoji:{part}_{size}": lambda part=part, size=size: emoji.get_config(f"{part}_{size}")
        for part in ("tokenizer", "dar")
        for size in emoji.TOKENIZERS
    },
    **{
        f"emoji:{n}": lambda n=n: emoji.get_config(n)
        for n in ("kl_vae", "transdiff", "transdiff_mrar")
    },
    **{f"emoji_text:{n}": lambda n=n: emoji_text.get_config(n) for n in ("32", "64")},
    **{
        f"imagenet_transdiff:{n}": lambda n=n: imagenet_transdiff.get_config(n)
        for n in TRANSDIFF_PARAMETERS
    },
    **{
        f"image_folder:{n}": lambda n=n: image_folder.get_config(n)
        for part in ("tokenizer", "dar")
        for n in (part, *(f"{part}_{size}" for size in (32, 48, 96, *image_folder.TOKENIZERS)))
    },
}
PARAMETERS = {
    "imagenet_tokenizer": 307_444_672,
    "imagenet_kl_vae": 66_456_019,
    "imagenet_dar:b": 110_888_448,
    "imagenet_dar:l": 342_910_976,
    "imagenet_dar:xl": 774_699_520,
    "imagenet_dar:xxl": 1_410_972_672,
    "imagenet_dar:xxxl": 3_893_027_840,
    "imagenet_dar:1b": 1_199_616_000,
    "imagenet_dar:3b": 3_096_659_200,
    "imagenet_dar:7b": 6_614_589_440,
    **{f"imagenet_transdiff:{name}": count for name, count in TRANSDIFF_PARAMETERS.items()},
    "text_to_image:xl": 777_678_080 + NULL_CAPTION,
    "text_to_image:1b": 1_205_954_560 + NULL_CAPTION,
    "text_to_image:3b": 3_110_249_600 + NULL_CAPTION,
}
"""Counts of the reference's modules."""


def tokenizer_of(config):
    match config.data.source:
        case "mnist":
            return mnist.get_config("tokenizer")
        case "emoji":
            return emoji.get_config(f"tokenizer_{config.data.image_size}")
        case "folder":
            return image_folder.get_config(f"tokenizer_{config.data.image_size}")
        case _:
            return imagenet_tokenizer.get_config()


def task_of(config, directory):
    """The config's task; a prior gets a tokenizer that holds a config and no weights."""
    if config.task == "dar_prior":
        tokenizer = tokenizer_of(config)
        config.tokenizer = str(directory / "tokenizer")
        model_dir.save_model(config.tokenizer, tokenizer.task, tokenizer.model.to_dict(), {}, {})
    if config.task == "transdiff":
        small = {"mnist": mnist, "emoji": emoji}.get(config.data.source)
        vae = small.get_config("kl_vae") if small else imagenet_kl_vae.get_config()
        config.vae = str(directory / "vae")
        model_dir.save_model(config.vae, vae.task, vae.model.to_dict(), {}, {})
    return build_task(read_config(config), with_weights=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_block_builds(name, tmp_path):
    config = CONFIGS[name]()
    settings = read_config(config)
    if config.data.source == "folder":
        config.data.update(**tiny_sets.make_folder(tmp_path / "set"), path=str(tmp_path / "set"))
    if config.data.source == "emoji":
        config.data.path = str(tiny_sets.make_emoji(tmp_path / "emoji.tgz"))
    task = task_of(config, tmp_path)
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert jax.eval_shape(make_optimizer(settings.optimizer).init, params)
    if name in PARAMETERS:
        assert num_parameters(params) == PARAMETERS[name]


def test_released_tokenizer_is_the_default():
    model = read_config(imagenet_tokenizer.get_config()).model
    assert model == TokenizerConfig(tokens_per_step=32) == DarTokenizer.released


def test_published_recipes():
    """Batch, length and rates; the optimizer tests cover the schedules themselves."""
    tokenizer = read_config(imagenet_tokenizer.get_config())
    assert (tokenizer.data.batch_size, tokenizer.train.steps) == (1024, 210_000)
    assert (tokenizer.data.crop, tokenizer.data.flip) == ("random", True)
    assert tokenizer.optimizer.ema_decay == 0.999
    one_step, mrar, large = (
        read_config(imagenet_transdiff.get_config(name)) for name in ("l", "l,mrar", "l,512")
    )
    assert (one_step.data.batch_size, one_step.train.steps) == (2048, 800 * 625)
    assert (mrar.data.num_references, large.data.image_size) == (4, 512)
    rates = [run.optimizer.learning_rate for run in (one_step, mrar, large)]
    assert rates == pytest.approx([8e-4, 5e-5, 1e-4])
    assert [run.optimizer.trained for run in (one_step, mrar, large)] == ["", "", "decoder/"]
    prior = read_config(imagenet_dar.get_config("xl"))
    assert (prior.data.batch_size, prior.train.steps) == (1024, 360_000)
    assert (prior.optimizer.weight_decay, prior.optimizer.ema_decay) == (0.05, 0.0)
    rate = learning_rate_schedule(prior.optimizer)
    steps = [0, 300_000, 330_000, 360_000]
    assert [float(rate(s)) for s in steps] == pytest.approx([4e-4, 4e-4, 2.05e-4, 1e-5])


def test_number_of_classes_of_a_folder_is_read_from_it(tmp_path):
    config = image_folder.get_config("dar_64")
    config.data.update(**tiny_sets.make_folder(tmp_path / "set"), path=str(tmp_path / "set"))
    assert task_of(config, tmp_path).model_config()["num_classes"] == len(tiny_sets.CLASSES)


def test_unknown_variant_is_refused():
    with pytest.raises(ValueError, match=r"unknown config variant 'xs'; available: b, l, xl"):
        imagenet_dar.get_config("xs")
