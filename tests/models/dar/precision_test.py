"""In bfloat16, gradients are as exact as the references' are under autocast.

Both are compared with float64 at the same random weights. XLA may skip roundings that it is asked
for; here it may not, so that the arithmetic compared is the one that is written.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.flow.path import interpolate, velocity
from dar_jax.losses.cross_entropy import token_cross_entropy
from dar_jax.models.dar.decoder import FlowDecoderConfig
from dar_jax.models.dar.encoder import EncoderConfig
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.models.dar.quantizer import l2_normalize
from dar_jax.models.dar.tokenizer import ConditionConfig, Tokenizer, TokenizerConfig
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from tests import autocast
from tests.autocast import Autocast

pytestmark = pytest.mark.slow
COMPUTE = Compute(dtype="bfloat16")
MAX_RATIO = 1.15
"""Of our error to the reference's: both are sums of independent roundings, equal but for chance."""
NUM_DRAWS = 4
"""Of weights and batches: the ratio of a single one varies by a tenth."""
AS_WRITTEN = {"xla_allow_excess_precision": False}
TOKENIZER = TokenizerConfig(
    image_size=32,
    num_tokens=16,
    num_groups=2,
    codebook_size=32,
    max_tokens=16,
    encoder=EncoderConfig(patch_size=8, dim=128),
    condition=ConditionConfig(dim=128),
    decoder=FlowDecoderConfig(patch_size=4, dim=128, feature_layer=None),
)
BATCH_SIZE = 4


def random_weights(model, rng):
    """Draw weights of a trained model's size: no gate or layer is zero."""

    def draw(path, leaf):
        name, values = path[-1].key, rng.normal(size=leaf.shape)
        match name:
            case "kernel":
                values /= leaf.shape[-2] ** 0.5
            case "scale" | "gate1" | "gate2":
                values = 1 + 0.1 * values
            case "bias":
                values *= 0.1
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, model.abstract_params())


def widened(arrays):
    return jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, arrays)


def gradient_of(loss, **options):
    """Return the gradient as one vector, given parameters and batch."""
    gradient = jax.jit(jax.grad(loss), **options)

    def flat(params, batch):
        leaves = jax.tree.leaves(jax.device_get(gradient(params, batch)))
        return np.concatenate([leaf.ravel() for leaf in leaves])

    return flat


def errors(ours, theirs, draws):
    """Return the relative errors of our gradient and of the reference's, over all draws.

    Args:
        ours: loss of parameters and a batch.
        theirs: the same of an arithmetic, parameters and a batch.
        draws: parameters and batches.
    """
    exact = gradient_of(functools.partial(theirs, Autocast(jnp.float64, jnp.float64)))
    rounded = (
        gradient_of(loss, compiler_options=AS_WRITTEN)
        for loss in (ours, functools.partial(theirs, Autocast()))
    )
    with jax.enable_x64(True):
        expected = [exact(*widened(draw)) for draw in draws]
    relative = [
        [
            np.linalg.norm(gradient(*draw) - e) / np.linalg.norm(e)
            for draw, e in zip(draws, expected, strict=True)
        ]
        for gradient in rounded
    ]
    return np.sqrt(np.mean(np.square(relative), axis=1))


@pytest.mark.parametrize("num_layers", [24, 48])
def test_gradient_of_the_prior_is_as_exact_as_the_reference(num_layers):
    config = LlamaConfig(
        num_layers=num_layers, num_heads=2, dim=128, ffn_dim=512, vocab_size=256, num_tokens=64
    )
    model = FunctionalModel(Llama, config, COMPUTE)

    def draw(rng):
        batch = rng.integers(0, 1000, BATCH_SIZE), rng.integers(0, 256, (BATCH_SIZE, 64))
        return random_weights(model, rng), batch

    def ours(params, batch):
        prior, (labels, indices) = model.bind(params), batch
        hidden = prior.hidden(labels, indices[:, :-1])
        return token_cross_entropy(prior.head, hidden, indices).loss

    def theirs(cast, params, batch):
        return autocast.prior_loss(cast, params, config, *batch)

    check(*errors(ours, theirs, draws_of(draw)))


def test_gradient_of_the_tokenizer_is_as_exact_as_the_reference():
    """Codes are given: a close call that falls otherwise is not an error of the arithmetic."""
    model = FunctionalModel(Tokenizer, TOKENIZER, COMPUTE)
    shape = (BATCH_SIZE, TOKENIZER.image_size, TOKENIZER.image_size, 3)

    def draw(rng):
        nearest = rng.normal(size=(BATCH_SIZE, TOKENIZER.num_tokens, TOKENIZER.code_dim))
        nearest /= np.linalg.norm(nearest, axis=-1, keepdims=True)
        image, noise, t = (
            rng.uniform(-1, 1, shape),
            rng.normal(size=shape),
            rng.uniform(size=BATCH_SIZE),
        )
        batch = tuple(array.astype(np.float32) for array in (image, noise, t, nearest))
        return random_weights(model, rng), batch

    def ours(params, batch):
        tokenizer, (image, noise, t, nearest) = model.bind(params), batch
        z = l2_normalize(tokenizer.encoder(image).astype(jnp.float32))
        condition = tokenizer.condition(z + jax.lax.stop_gradient(nearest - z))
        data = TOKENIZER.decoder.data_std * image
        x_t = interpolate(data, noise, t)
        predicted = tokenizer.velocity(x_t, t, condition[:, : TOKENIZER.window]).velocity
        return jnp.mean((predicted - velocity(data, noise)) ** 2)

    def theirs(cast, params, batch):
        return autocast.tokenizer_loss(cast, params, TOKENIZER, batch)

    check(*errors(ours, theirs, draws_of(draw)))


def draws_of(draw):
    return [draw(np.random.default_rng(seed)) for seed in range(NUM_DRAWS)]


def check(ours, theirs):
    assert 1e-3 < theirs < 0.2  # neither float32 nor noise
    assert ours / theirs <= MAX_RATIO, f"{ours:.4%} against {theirs:.4%}"
