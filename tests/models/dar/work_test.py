"""Work formulae against the published budget, and against XLA's own count of small models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from dar_jax.models.dar import work
from dar_jax.models.dar.decoder import FlowDecoderConfig
from dar_jax.models.dar.encoder import EncoderConfig
from dar_jax.models.dar.llama import SIZES, Llama, LlamaConfig
from dar_jax.models.dar.tokenizer import ConditionConfig, Tokenizer, TokenizerConfig
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel

GIGA, MEGA = 1e9, 1e6
ELEMENTWISE = 0.025  # XLA counts norms, activations and softmax too; small at these widths
UNROLLED = Compute(stacked=False)  # XLA counts the body of a loop once


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def tokens(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


NUM_TOKENS, DIM = 24, 256
IMAGE = array(1, 64, 64, 3)
PRIOR = LlamaConfig(
    num_layers=2,
    num_heads=4,
    dim=DIM,
    ffn_dim=512,
    vocab_size=1024,
    num_tokens=NUM_TOKENS,
    num_classes=9,
)
TOKENIZER = TokenizerConfig(
    image_size=64,
    num_tokens=NUM_TOKENS,
    num_groups=4,
    num_steps=4,
    codebook_size=512,
    code_dim=8,
    max_tokens=NUM_TOKENS,
    encoder=EncoderConfig(patch_size=16, dim=192, depth=2),
    condition=ConditionConfig(dim=DIM, depth=2),
    decoder=FlowDecoderConfig(
        patch_size=4, dim=320, depth=3, feature_layer=2, feature_dim=256, feature_hidden_dim=384
    ),
)


@pytest.mark.parametrize(
    ("size", "sampling", "training", "weights", "cache"),
    [
        ("b", None, 153, None, None),
        ("l", 339, 509, 0.650, 25.3),
        ("xl", 783, 1174, 1.505, 47.4),
        ("xxl", 1437, 2155, 2.769, 75.8),
    ],
)
def test_prior_work_is_the_published_budget(size, sampling, training, weights, cache):
    config = LlamaConfig(**SIZES[size])
    assert round(work.prior_train_flops(config) / GIGA) == training
    if sampling:
        assert round(work.prior_sampling_flops(config, guided=True) / GIGA) == sampling
        assert round(work.prior_weight_bytes(config, 2) / GIGA, 3) == weights
        assert round(work.kv_cache_bytes(config, 257, 2) / MEGA, 1) == cache


def test_tokenizer_work_is_the_published_budget():
    config = TokenizerConfig()
    assert round(work.encode_flops(config) / GIGA, 1) == 64.8
    assert round(work.flow_step_flops(config) / GIGA) == 332
    assert round(work.tokenizer_train_flops(config) / GIGA) == 1292


def flops(function, *arguments):
    """XLA's count of a function of abstract arguments."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def counted(model, method, *arguments):
    """XLA's count of a method of a model."""

    def run(params, *arguments):
        return method(model.bind(params), *arguments)

    return flops(run, model.abstract_params(), *arguments)


def masked_flops(num_layers):
    """What XLA computes of causal attention and masks out."""
    pairs = NUM_TOKENS**2 - work.causal_pairs(NUM_TOKENS)
    return num_layers * work.attention_flops(pairs, DIM)


def assert_counted(expected, found):
    assert expected <= found <= expected * (1 + ELEMENTWISE)


def test_prior_work_is_what_xla_counts():
    model = FunctionalModel(Llama, PRIOR, UNROLLED)
    found = counted(model, Llama.logits, tokens(1), tokens(1, NUM_TOKENS - 1))
    assert_counted(work.prior_forward_flops(PRIOR) + masked_flops(PRIOR.num_layers), found)


def test_caption_prior_with_grouped_queries_is_what_xla_counts():
    config = dataclasses.replace(
        PRIOR, num_kv_heads=2, caption_dim=64, condition_tokens=3, num_tokens=NUM_TOKENS - 2
    )
    model = FunctionalModel(Llama, config, UNROLLED)
    found = counted(model, Llama.logits, array(1, 3, 64), tokens(1, config.num_tokens - 1))
    # Teacher forcing has logits at the first condition tokens, too.
    unused = work.linear_flops(2, DIM, config.vocab_size)
    hidden = masked_flops(config.num_layers) + unused
    assert_counted(work.prior_forward_flops(config) + hidden, found)


def test_training_is_three_forwards():
    model = FunctionalModel(Llama, PRIOR, UNROLLED)

    def loss(params, labels, indices):
        return jnp.mean(model.bind(params).logits(labels, indices) ** 2)

    shapes = (model.abstract_params(), tokens(1), tokens(1, PRIOR.num_tokens - 1))
    found = flops(jax.value_and_grad(loss), *shapes)
    assert_counted(work.prior_train_flops(PRIOR) + 3 * masked_flops(PRIOR.num_layers), found)


@pytest.mark.parametrize("shared", [False, True])
def test_flow_work_is_what_xla_counts(shared):
    decoder = dataclasses.replace(TOKENIZER.decoder, shared_time=shared, modulated_head=shared)
    config = dataclasses.replace(TOKENIZER, decoder=decoder)
    assert_counted(work.flow_step_flops(config), velocity_flops(config, with_features=False))


def test_tokenizer_work_is_what_xla_counts():
    model = FunctionalModel(Tokenizer, TOKENIZER, UNROLLED)
    encode = counted(model, Tokenizer.encode, IMAGE)
    assert_counted(work.encode_flops(TOKENIZER), encode)
    condition = counted(model, Tokenizer.condition, array(1, NUM_TOKENS, TOKENIZER.code_dim))
    condition -= masked_flops(TOKENIZER.condition.depth)
    assert_counted(work.condition_flops(TOKENIZER), condition)
    flow = velocity_flops(TOKENIZER, with_features=True)
    assert_counted(work.tokenizer_train_flops(TOKENIZER), 3 * (encode + condition + flow))


def velocity_flops(config, *, with_features):
    method = functools.partial(Tokenizer.velocity, with_features=with_features)
    window = array(1, config.window, config.condition.dim)
    return counted(FunctionalModel(Tokenizer, config, UNROLLED), method, IMAGE, array(1), window)
