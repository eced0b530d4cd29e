"""The released models at full size, from generated weights, through the command a user runs."""

import filecmp
import functools
import math
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import imagenet_dar, imagenet_tokenizer
from dar_jax.common.config_build import build
from dar_jax.common.files import write_safetensors
from dar_jax.common.tree import num_parameters
from dar_jax.config import build as read_config
from dar_jax.convert import dar
from dar_jax.convert.rules import reference_shapes
from dar_jax.kinds.loading import from_pretrained
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig
from dar_jax.modes import convert as mode
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.sampling.autoregressive import grow
from dar_jax.sampling.logits import guide
from tests.golden import fixtures

pytestmark = pytest.mark.slow

PRIOR = "dar/real_gpt_l"
CONFIGS = {
    "dar_tokenizer": imagenet_tokenizer.get_config,
    "dar_prior": lambda: imagenet_dar.get_config("l"),
}
SEED = 0
VOCABULARY_STRIDE = 16
"""The golden folder holds every 16th vocabulary entry."""
ROUNDING = 1e-4  # float32, sums in another order; images are in [-1, 1]


def generated_tokenizer():
    """Weights for the tokenizer v1, drawn by name as in the golden folders."""
    config = build(TokenizerConfig, imagenet_tokenizer.get_config().model.to_dict(), "model")
    like = FunctionalModel(Tokenizer, config).abstract_params()
    shapes = reference_shapes(dar.tokenizer_rules(config), like)
    state_dict = {}
    for name, shape in shapes.items():
        offset, scale = 0.0, 1 / math.sqrt(math.prod(shape[1:]))
        if name.endswith("bias"):
            scale = 0.02
        elif "norm" in name:
            offset, scale = 1.0, 0.1
        elif "gate" in name:
            offset, scale = 0.5, 0.2
        state_dict[name] = fixtures.make(SEED, name, shape, offset, scale)
    return {**state_dict, dar.CODEBOOK_QUEUE: np.zeros(dar.CODEBOOK_QUEUE_LENGTH, np.float32)}


def convert(config, state_dict, workdir):
    """Run the command on a file that holds the state dict."""
    source = workdir.parent / "source.safetensors"
    write_safetensors(source, state_dict)
    config.convert.source = str(source)
    mode.convert(read_config(config), str(workdir))
    source.unlink()


@pytest.fixture(scope="module")
def released():
    """Workdirs by kind: the tokenizer v1, and D-AR-L with it."""
    with tempfile.TemporaryDirectory() as root:
        tokenizer, prior = pathlib.Path(root, "tokenizer"), pathlib.Path(root, "dar_l")
        convert(imagenet_tokenizer.get_config(), generated_tokenizer(), tokenizer)
        config = imagenet_dar.get_config("l")
        config.tokenizer = str(tokenizer)
        convert(config, fixtures.load_state_dict(PRIOR), prior)
        yield {"dar_tokenizer": tokenizer, "dar_prior": prior}


@functools.partial(jax.jit, static_argnames="model")
def cached_last_logits(model, params, labels, tokens):
    """Logits after the last token, decoded one token at a time."""
    prior = model.bind(params)
    caches = grow(prior.empty_caches(len(labels)), 1 + tokens.shape[1])
    _, caches = prior.extend(prior.embed_condition(labels), caches, 0)

    def body(caches, inputs):
        token, position = inputs
        x, caches = prior.extend(prior.token_embed(token[:, None]), caches, position)
        return caches, prior.head(x[:, 0])

    positions = 1 + jnp.arange(tokens.shape[1])
    return jax.lax.scan(body, caches, (tokens.T, positions))[1][-1]


def test_prior_equals_the_reference(released):
    prior = from_pretrained(released["dar_prior"]).prior
    assert num_parameters(prior.params) == 342_910_976
    with fixtures.Compare(PRIOR) as golden:
        labels, tokens = (jnp.asarray(golden.arrays[name]) for name in ("labels", "tokens"))
        logits = prior.logits(labels, jnp.pad(tokens, ((0, 0), (0, 1))))
        guided = guide(logits[:1, -1], logits[1:, -1], jnp.float32(4.0))
        cached = cached_last_logits(prior.model.unstacked(), prior.sampling_params, labels, tokens)
        golden.check_all(
            logits_sub=logits[..., ::VOCABULARY_STRIDE],
            logsumexp=jax.nn.logsumexp(logits, axis=-1),
            top1=jnp.argmax(logits, axis=-1),
            top_values=jax.lax.top_k(logits, 2)[0],
            cached_last_sub=cached[:, ::VOCABULARY_STRIDE],
            cfg4_last_sub=guided[0, ::VOCABULARY_STRIDE],
        )


def test_tokenizer_encodes_and_decodes_256_pixels(released):
    tokenizer = from_pretrained(released["dar_tokenizer"])
    assert num_parameters(tokenizer.params) == 307_444_672
    rows = np.linspace(-1, 1, 256, dtype=np.float32)
    image = np.stack(np.broadcast_arrays(rows[:, None], rows, 0.3), axis=-1)[None]
    indices = tokenizer.encode(image)
    assert indices.shape == (1, 256) and indices.dtype == jnp.int32
    assert len(np.unique(indices)) > 100

    noise = jax.random.normal(jax.random.key(0), (1, 256, 256, 3))
    decoded = tokenizer.decode(indices, noise=noise)
    assert decoded.shape == (1, 256, 256, 3)
    assert jnp.isfinite(decoded).all() and decoded.std() > 0.1
    previews = [
        tokenizer.decode(changed, noise=noise, num_groups=4)
        for changed in (indices, indices.at[:, 128:].add(1) % tokenizer.config.codebook_size)
    ]
    np.testing.assert_array_equal(*previews)
    assert jnp.abs(previews[0] - decoded).max() > ROUNDING


def test_generates_in_bfloat16(released):
    pipeline = from_pretrained(released["dar_prior"], compute=Compute(dtype="bfloat16"))
    out = pipeline.generate([207], rng=jax.random.key(0), guidance_scale=(1.1, 8.0))
    assert out.images.shape == (1, 256, 256, 3) and out.indices.shape == (1, 256)
    assert jnp.isfinite(out.images).all() and out.images.std() > 0.1


@pytest.mark.parametrize("kind", CONFIGS)
def test_full_size_round_trip_is_bitwise(released, kind):
    workdir, config = released[kind], CONFIGS[kind]()
    config.convert.to = "torch"
    mode.convert(read_config(config), str(workdir))
    config.convert.update(to="jax", source=str(workdir / f"{kind}.safetensors"))
    mode.convert(read_config(config), str(workdir / "again"))
    first, second = (path / "model/model.safetensors" for path in (workdir, workdir / "again"))
    assert filecmp.cmp(first, second, shallow=False)
