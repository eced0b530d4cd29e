"""Parameters start as the references' do: mean, standard deviation, minimum and maximum of each.

The tables are written down from the references' sources: `nn.init` calls where there are any, and
PyTorch's defaults, U(+-1/sqrt(fan_in)), where there are none. Every parameter of a released size
has to be in its table. Widths are the released ones; of equal layers one is drawn, and of rows of
a table only some.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from statistics import NormalDist

import jax
import numpy as np
import pytest

from dar_jax.common.tree import flatten
from dar_jax.models.dar import llama
from dar_jax.models.dar.decoder import FlowDecoderConfig
from dar_jax.models.dar.encoder import EncoderConfig
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.models.dar.tokenizer import ConditionConfig, Tokenizer, TokenizerConfig
from dar_jax.models.kl_vae import KlVae, KlVaeConfig
from dar_jax.models.patchgan import PatchGan, PatchGanConfig
from dar_jax.models.transdiff import model as transdiff
from dar_jax.models.transdiff.model import TransDiff, TransDiffConfig
from dar_jax.nn.functional_model import FunctionalModel

CHANCE = 1e-6
"""Of a drawn extreme, mean or standard deviation to lie outside its bounds."""
SIGMAS = NormalDist().inv_cdf(1 - CHANCE / 2)


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Symmetric around `mean`; `quantile` is the inverse of its distribution function."""

    std: float
    quantile: Callable[[float], float]
    mean: float = 0.0


def constant(value: float) -> Distribution:
    return Distribution(0.0, lambda p: value, value)


def normal(std: float) -> Distribution:
    return Distribution(std, NormalDist(sigma=std).inv_cdf)


def uniform(limit: float) -> Distribution:
    return Distribution(limit / math.sqrt(3), lambda p: limit * (2 * p - 1))


def truncated_normal(cut: float) -> Distribution:
    """Standard normal where it lies within +-cut."""
    unit = NormalDist()
    outside = unit.cdf(-cut)
    inside = 1 - 2 * outside
    std = math.sqrt(1 - 2 * cut * unit.pdf(cut) / inside)
    return Distribution(std, lambda p: unit.inv_cdf(outside + p * inside))


def on_the_sphere(channels: int) -> Distribution:
    """A coordinate of normalised points of a cube; the largest of thousands is near the axis."""
    return Distribution(channels**-0.5, lambda p: 1.0 if p > 0.9999995 else 0.8)


ZERO, ONE = constant(0.0), constant(1.0)
Rule = Callable[[tuple[int, ...]], Distribution]
"""From the shape of a kernel (of a bias, its kernel's), without the layer axis."""


def framework(kernel: tuple[int, ...]) -> Distribution:
    return uniform(math.prod(kernel[:-1]) ** -0.5)


def xavier(kernel: tuple[int, ...]) -> Distribution:
    return uniform(math.sqrt(6 / sum(kernel)))


def fused_xavier(kernel: tuple[int, ...]) -> Distribution:
    """Queries, keys and values are one matrix [D, 3 D] in the reference."""
    return uniform(math.sqrt(6 / (kernel[0] + 3 * kernel[1])))


def of_width(kernel: tuple[int, ...]) -> Distribution:
    return normal(kernel[-1] ** -0.5)


NORMS = {r"(.*/)?\w*norm_?\d?/scale": ONE, r"(.*/)?\w*norm_?\d?/bias": ZERO}
D_AR_BLOCKS = {
    r"(encoder|condition_layers|decoder)/stack/blocks/modulation/(kernel|bias)": ZERO,
    r"(encoder|condition_layers|decoder)/stack/blocks/(?!.*norm).*kernel": normal(0.02),
    r"(encoder|condition_layers|decoder)/stack/blocks/(?!.*norm).*bias": ZERO,
    r"(encoder|condition_layers)/stack/blocks/gate[12]": ZERO,
}
TOKENIZER = D_AR_BLOCKS | {
    r"encoder/(patch_embed|query_projection|to_code)/(kernel|bias)": framework,
    r"encoder/query_table": truncated_normal(2.0),
    r"quantizer/codebook": on_the_sphere(8),
    r"condition_layers/from_code/kernel": framework,
    r"condition_layers/position_table": normal(0.02),
    r"decoder/(condition_projection|patch_embed|alignment_head/layer\d)/(kernel|bias)": framework,
    r"decoder/head/(kernel|bias)": ZERO,
}
OTHER_TOKENIZER = TOKENIZER | {
    r"encoder/query_table": normal(0.02),
    r"decoder/time_embed/(up|down)/(kernel|bias)": framework,
    r"decoder/head/(modulation|out)/(kernel|bias)": ZERO,
}
PRIOR = {
    r"stack/blocks/(attention|ffn)/\w+/kernel": normal(0.02),
    r"condition_embed/embedding": normal(0.02),
    r"condition_embed/(hidden|out)/kernel": normal(0.02),
    r"condition_embed/null_caption": of_width,
    r"token_embed/embedding": normal(0.02),
    r"output/kernel": ZERO,
}
TRANSDIFF = {
    r"encoder/(\w*_table|null_class|mask_token)": normal(0.02),
    r"encoder/reference_projection/kernel": xavier,
    r"(encoder|decoder)/stack/blocks/attention/[qkv]/kernel": fused_xavier,
    r"(encoder|decoder)/stack/blocks/attention/out/kernel": xavier,
    r"(encoder|decoder)/stack/blocks/(mlp|cross_attention)/\w+/kernel": xavier,
    r"decoder/(token_embed|condition_projection|modulation|time_embed/\w+)/kernel": xavier,
    r"decoder/position_table": normal(0.02),
    r"decoder/(stack/blocks|final_layer)/modulation_table": of_width,
    r"decoder/final_layer/out/kernel": ZERO,
    r"(?!.*norm).*/bias": ZERO,
}
KL_VAE = {r"(?!.*norm).*/(kernel|bias)": framework}
PATCHGAN = {
    r"(stem|head|layers/\d/conv)/kernel": normal(0.02),
    r"(stem|head)/bias": framework,
    r"layers/\d/norm/modulation/kernel": normal(0.01),
    r"layers/\d/norm/modulation/bias": ZERO,
}
SHALLOW_TOKENIZER = TokenizerConfig(
    encoder=EncoderConfig(depth=1),
    condition=ConditionConfig(depth=1),
    decoder=FlowDecoderConfig(depth=1),
)


def other_tokenizer(config: TokenizerConfig) -> TokenizerConfig:
    """Full-rank queries, one time embedding, and the head that it modulates."""
    return dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, query_rank=None),
        decoder=dataclasses.replace(config.decoder, shared_time=True, modulated_head=True),
    )


def prior_cases():
    shallow = dict(num_layers=1, vocab_size=512, num_classes=100)
    for name, size in llama.SIZES.items():
        marks = () if name == "b" else pytest.mark.slow  # up to 200M draws a layer
        released = LlamaConfig(**size)
        drawn = dataclasses.replace(released, **shallow)
        yield pytest.param(Llama, released, drawn, PRIOR, id=name, marks=marks)
    captions = LlamaConfig(caption_dim=2048, condition_tokens=120)
    drawn = dataclasses.replace(captions, **shallow)
    yield pytest.param(Llama, captions, drawn, PRIOR, id="l-captions", marks=pytest.mark.slow)


def transdiff_cases():
    shallow = dict(encoder_depth=1, decoder_depth=1)
    for name, size in transdiff.SIZES.items():
        for kind, options in (
            ("", {}),
            ("-mrar", transdiff.MRAR),
            ("-512", transdiff.AT_512_PIXELS),
        ):
            released = TransDiffConfig(**size, **options)
            drawn = dataclasses.replace(released, **shallow)
            marks = () if name + kind == "b" else pytest.mark.slow
            yield pytest.param(
                TransDiff, released, drawn, TRANSDIFF, id=f"transdiff-{name}{kind}", marks=marks
            )


@pytest.mark.parametrize(
    ("cls", "released", "drawn", "table"),
    [
        pytest.param(Tokenizer, TokenizerConfig(), SHALLOW_TOKENIZER, TOKENIZER, id="tokenizer"),
        pytest.param(
            Tokenizer,
            other_tokenizer(TokenizerConfig()),
            other_tokenizer(SHALLOW_TOKENIZER),
            OTHER_TOKENIZER,
            id="tokenizer-other",
            marks=pytest.mark.slow,
        ),
        *prior_cases(),
        *transdiff_cases(),
        pytest.param(
            KlVae, KlVaeConfig(), KlVaeConfig(), KL_VAE, id="kl_vae", marks=pytest.mark.slow
        ),
        pytest.param(PatchGan, PatchGanConfig(), PatchGanConfig(), PATCHGAN, id="patchgan"),
    ],
)
def test_parameters_start_as_the_reference(cls, released, drawn, table):
    expected = expectations(FunctionalModel(cls, drawn), table)
    assert set(expected) == set(flatten(FunctionalModel(cls, released).abstract_params()))
    params = flatten(draw(FunctionalModel(cls, drawn)))
    wrong = {name: problem for name in params if (problem := compare(params[name], expected[name]))}
    assert wrong == {}


def expectations(model: FunctionalModel, table: dict[str, Rule | Distribution]):
    """Return the distribution of every parameter, by name."""
    shapes = {
        name: leaf.shape[1:] if "/blocks/" in name else leaf.shape
        for name, leaf in flatten(model.abstract_params()).items()
    }
    result = {}
    for name in shapes:
        rules = [rule for end, rule in (table | NORMS).items() if re.fullmatch(end, name)]
        assert rules, f"{name} is not in the table"
        kernel = shapes.get(re.sub("bias$", "kernel", name), shapes[name])
        result[name] = rules[0] if isinstance(rules[0], Distribution) else rules[0](kernel)
    return result


@functools.partial(jax.jit, static_argnums=0)
def draw(model: FunctionalModel):
    return model.init(jax.random.key(0))


def compare(leaf: jax.Array, expected: Distribution) -> str | None:
    """Return what is wrong with the values of a parameter, if anything is."""
    values = np.asarray(leaf)
    mean = values.mean(dtype=np.float64)
    spread = math.sqrt(np.mean(np.square(values - mean), dtype=np.float64))
    size, std = values.size, expected.std
    highest = expected.quantile(1 - CHANCE / (2 * size)), expected.quantile(CHANCE ** (1 / size))
    lowest = [2 * expected.mean - bound for bound in highest]
    found = f"{mean:.4g} +- {spread:.4g}, {values.min():.4g} .. {values.max():.4g}"
    rounding = 1e-6 * max(std, abs(expected.mean))
    within = [
        abs(mean - expected.mean) <= SIGMAS * std / math.sqrt(size) + rounding,
        abs(spread - std) <= SIGMAS * std / math.sqrt(size) + rounding,
        highest[1] - rounding <= values.max() <= highest[0] + rounding,
        lowest[0] - rounding <= values.min() <= lowest[1] + rounding,
    ]
    return None if all(within) else f"{found}; not std {std:.4g} around {expected.mean}"
