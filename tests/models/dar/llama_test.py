"""The prior against the reference; causality, cached decoding, dropout, released sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dar_jax.common.tree import num_parameters
from dar_jax.convert import dar as convert
from dar_jax.convert.rules import to_state_dict
from dar_jax.models.dar.decoding import decoding_params
from dar_jax.models.dar.draws import generate_indices
from dar_jax.models.dar.llama import (
    SIZES,
    Llama,
    LlamaConfig,
    cache_mask,
    caption_key_mask,
    ffn_hidden_dim,
)
from dar_jax.models.dar.options import DarSampling
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.sampling.autoregressive import grow
from dar_jax.sampling.logits import SamplingConfig, guidance_schedule, guide, scale_and_filter
from tests.golden import fixtures, models

CLASS_FOLDERS = ("dar/gpt_tiny", "dar/gpt_gqa_tiny")
CAPTION_FOLDER = "dar/gpt_t2i_tiny"
FOLDERS = (*CLASS_FOLDERS, CAPTION_FOLDER)
PREFIX_LENGTH = 5
CACHE_MULTIPLE = 8
"""The reference rounds the length of its caches up to a multiple of this."""
ROUNDING = 1e-4  # cached and full passes sum in another order; logits are about 3

# Number of parameters, from the instantiated modules of the reference.
CLASS_PARAMETERS = {
    "b": 110_888_448,
    "l": 342_910_976,
    "xl": 774_699_520,
    "xxl": 1_410_972_672,
    "xxxl": 3_893_027_840,
    "1b": 1_199_616_000,
    "3b": 3_096_659_200,
    "7b": 6_614_589_440,
}
CAPTION_PARAMETERS = {
    "b": 112_282_368,
    "l": 345_031_680,
    "xl": 777_678_080,
    "xxl": 1_414_940_160,
    "xxxl": 3_902_261_760,
    "1b": 1_205_954_560,
    "3b": 3_110_249_600,
    "7b": 6_635_655_168,
}
CAPTION_SHAPE = (120, 2048)


@functools.partial(jax.jit, static_argnames="model")
def full_logits(model, params, condition, tokens, mask=None):
    return model.bind(params).logits(condition, tokens, mask=mask)


@functools.partial(jax.jit, static_argnames="model")
def embed(model, params, condition, draws):
    prior = model.bind(params)
    return prior.embed_condition(prior.drop_condition(condition, draws))


@functools.partial(jax.jit, static_argnames="model")
def cached_logits(model, params, condition, tokens, key_mask=None):
    """Logits [B, N, V] of tokens decoded one by one, teacher-forced, with full-length caches."""
    prior = model.bind(params)
    x = prior.embed_condition(condition)
    num_slots = x.shape[1] + tokens.shape[1] - 1
    caches = grow(prior.empty_caches(len(x)), num_slots)
    first, caches = prior.extend(x, caches, 0, key_mask)

    def body(caches, inputs):
        token, position = inputs
        x, caches = prior.extend(prior.token_embed(token[:, None]), caches, position, key_mask)
        return caches, prior.head(x[:, 0])

    positions = jnp.arange(x.shape[1], num_slots)
    _, others = jax.lax.scan(body, caches, (tokens[:, :-1].T, positions))
    return jnp.concatenate([prior.head(first[:, -1])[None], others]).transpose(1, 0, 2)


@functools.partial(jax.jit, static_argnames="model")
@functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
def training_loss(model, params, condition, tokens, mask=None, valid=None):
    """Weighted mean cross-entropy, and the logits of the image tokens."""
    logits = model.bind(params).logits(condition, tokens[:, :-1], mask=mask)
    logits = logits[:, model.config.condition_tokens - 1 :]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    weights = jnp.ones_like(losses) if valid is None else jnp.broadcast_to(valid, losses.shape)
    return jnp.sum(weights * losses) / jnp.maximum(jnp.sum(weights), 1), logits


def unstacked(folder):
    model, params = models.prior(folder)
    return model.unstacked(), decoding_params(params)


def check_training(golden, model, params, condition, tokens, **options):
    """Loss, logits and gradients in training mode, conditions dropped by the given draws."""
    prior = model.bind(params)
    draws = jnp.asarray(golden.arrays["label_drop_draws"])
    dropped = prior.drop_condition(condition, draws)
    (loss, logits), gradient = training_loss(model, params, dropped, tokens, **options)
    golden.check_all(train_loss=loss, train_logits=logits)
    gradient = jax.device_get(gradient)
    named = to_state_dict(convert.prior_rules(model.config), gradient)
    for array in golden.spec:
        if array.startswith("train_grad/"):
            golden.check(array, named[array.split("/")[1]])
    golden.check("train_grad_global_norm", optax.tree.norm(gradient))


def forced_draws(golden):
    """Draws that drop exactly the conditions that the reference was forced to drop."""
    return 1.0 - jnp.asarray(golden.arrays["force_drop_ids"], jnp.float32)


@pytest.mark.parametrize("folder", CLASS_FOLDERS)
def test_class_prior_equals_the_reference(folder):
    model, params = models.prior(folder)
    with fixtures.Compare(folder, "io_forward") as golden:
        labels, tokens = (jnp.asarray(golden.arrays[name]) for name in ("labels", "tokens"))
        logits = full_logits(model, params, labels, tokens)
        (eval_loss, eval_logits), _ = training_loss(model, params, labels, tokens)
        golden.check_all(
            rope=np.stack(model.bind(params).rope(), axis=-1),
            logits_full=logits,
            logits_prefix=full_logits(model, params, labels, tokens[:, :PREFIX_LENGTH]),
            eval_logits=eval_logits,
            eval_loss=eval_loss,
            dropped_embedding=embed(model, params, labels, forced_draws(golden)),
        )
        if "logits_cached" in golden.spec:
            cached = cached_logits(*unstacked(folder), labels, tokens)
            golden.check("logits_cached", cached)
        check_training(golden, model, params, labels, tokens)


def test_caption_prior_equals_the_reference():
    model, params = models.prior(CAPTION_FOLDER)
    with fixtures.Compare(CAPTION_FOLDER, "io_forward") as golden:
        captions, tokens = (jnp.asarray(golden.arrays[name]) for name in ("caption", "tokens"))
        mask = jnp.asarray(golden.arrays["train_mask"][:, :-1, :-1])
        logits = [
            full_logits(model, params, captions, tokens[:, :-1], chosen)[:, -tokens.shape[1] :]
            for chosen in (None, mask)
        ]
        golden.check_all(
            logits_nomask=logits[0],
            logits_masked=logits[1],
            cached_logits=cached_logits(*unstacked(CAPTION_FOLDER), captions, tokens),
            caption_embedding=embed(model, params, captions, jnp.ones(len(captions))),
            dropped_embedding=embed(model, params, captions, forced_draws(golden)),
        )
        valid = jnp.asarray(golden.arrays["valid"][:, None], jnp.float32)
        check_training(golden, model, params, captions, tokens, mask=mask, valid=valid)


def read_scale(cfg_scale):
    """The reference's `cfg_scale`: a number or text, one value or `first,last`."""
    values = [float(value) for value in str(cfg_scale).split(",")]
    return values[0] if len(values) == 1 else tuple(values)


def check_generation(golden, run, options, condition, key_mask):
    """Greedy tokens, and the guided logits of every position given these tokens."""
    folder = golden.where.rpartition("/")[0]
    model, params = unstacked(folder)
    num_tokens, num_condition = model.config.num_tokens, model.config.condition_tokens
    scales = guidance_schedule(read_scale(options["cfg_scale"]), num_tokens)
    golden.check(f"{run}/scales", scales)
    if "cfg_interval" in options:
        scales = guidance_schedule(
            read_scale(options["cfg_scale"]), num_tokens, interval=options["cfg_interval"]
        )
    rngs = jax.random.split(jax.random.key(0), len(condition))
    generated = generate_indices(
        model,
        params,
        condition,
        rngs,
        DarSampling(
            guidance_scale=read_scale(options["cfg_scale"]),
            guidance_interval=options.get("cfg_interval", ()),
            temperature=0.0,
        ),
        key_mask=key_mask,
    )
    (tokens,) = generated
    golden.check(f"{run}/tokens", tokens)

    prior = model.bind(params)
    if np.any(scales != 1):
        condition = jnp.concatenate([condition, prior.null_condition(len(condition))])
        tokens = jnp.concatenate([tokens, tokens])
        key_mask = None if key_mask is None else jnp.concatenate([key_mask, key_mask])
    if key_mask is not None:
        num_slots = -(-(num_condition + num_tokens) // CACHE_MULTIPLE) * CACHE_MULTIPLE
        padded = caption_key_mask(key_mask, num_slots - num_condition)
        golden.check(f"{run}/causal_mask", cache_mask(0, num_slots, num_slots, padded)[:, 0])
        key_mask = padded[:, : num_condition + num_tokens]
    logits = cached_logits(model, params, condition, tokens, key_mask).transpose(1, 0, 2)
    if np.any(scales != 1):
        logits = jax.vmap(guide)(*jnp.split(logits, 2, axis=1), jnp.asarray(scales))
    golden.check(f"{run}/step_logits", logits)
    ordered = jnp.sort(logits, axis=-1)
    golden.check(f"{run}/margin", ordered[..., -1] - ordered[..., -2])
    if f"{run}/probs" in golden.spec:
        names = ("temperature", "top_k", "top_p")
        config = SamplingConfig(**{name: options[name] for name in names})
        filtered = [scale_and_filter(step, config) for step in logits]
        golden.check(f"{run}/probs", jax.nn.softmax(jnp.stack(filtered), axis=-1))


def test_class_generation_equals_the_reference():
    check_class_generation()


def check_class_generation():
    folder = "dar/gpt_tiny"
    with fixtures.Compare(folder, "io_generate") as golden:
        for run, options in fixtures.load_json(folder, "runs").items():
            labels = jnp.asarray(golden.arrays["labels"])
            check_generation(golden, run, options, labels, None)


def test_caption_generation_equals_the_reference():
    forward = fixtures.load_io(CAPTION_FOLDER, "io_forward")[0]
    with fixtures.Compare(CAPTION_FOLDER, "io_generate") as golden:
        for run, options in fixtures.load_json(CAPTION_FOLDER, "runs").items():
            valid = jnp.asarray(forward["caption_mask"], bool)
            key_mask = valid if options["use_emb_masks"] else None
            check_generation(golden, run, options, jnp.asarray(forward["caption"]), key_mask)


def conditions(model, batch_size=2):
    """Some class labels or captions, the first caption with padding."""
    config = model.config
    if config.caption_dim is None:
        return jnp.arange(batch_size)
    shape = (batch_size, config.condition_tokens, config.caption_dim)
    return jax.random.normal(jax.random.key(3), shape)


def image_tokens(model, batch_size=2):
    config = model.config
    shape = (batch_size, config.num_tokens)
    return jax.random.randint(jax.random.key(4), shape, 0, config.vocab_size)


@pytest.mark.parametrize("folder", ["dar/gpt_gqa_tiny", CAPTION_FOLDER])
def test_logits_depend_on_earlier_tokens_only(folder):
    model, params = models.prior(folder)
    config = model.config
    tokens = jnp.arange(config.num_tokens)[None]

    @jax.jit
    @jax.jacrev
    def sensitivity(table):
        changed = params | {"token_embed": {"embedding": table}}
        logits = model.bind(changed).logits(conditions(model, 1), tokens)
        return jnp.sum(jnp.square(logits[0]), axis=-1)

    influence = jnp.linalg.norm(sensitivity(params["token_embed"]["embedding"]), axis=-1)
    expected = np.tri(len(influence), config.num_tokens, -config.condition_tokens, dtype=bool)
    np.testing.assert_array_equal(influence[:, : config.num_tokens] > 0, expected)


@pytest.mark.parametrize("folder", FOLDERS)
def test_cached_decoding_equals_the_full_forward(folder):
    check_cached_decoding(folder)


def check_cached_decoding(folder):
    model, params = models.prior(folder)
    condition, tokens = conditions(model), image_tokens(model)
    key_mask = full_mask = None
    if model.config.caption_dim is not None:
        valid = jnp.arange(model.config.condition_tokens) >= jnp.array([[2], [0]])
        key_mask = caption_key_mask(valid, model.config.num_tokens)
        size = key_mask.shape[1] - 1
        full_mask = cache_mask(0, size, size, key_mask)[:, 0]
    full = full_logits(model, params, condition, tokens[:, :-1], full_mask)
    cached = cached_logits(*unstacked(folder), condition, tokens, key_mask)
    expected = full[:, model.config.condition_tokens - 1 :]
    np.testing.assert_allclose(cached, expected, atol=ROUNDING)


def test_padded_caption_tokens_do_not_matter():
    model, params = unstacked(CAPTION_FOLDER)
    captions, tokens = conditions(model), image_tokens(model)
    valid = jnp.arange(model.config.condition_tokens) >= jnp.array([[2], [3]])
    key_mask = caption_key_mask(valid, model.config.num_tokens)
    changed = jnp.where(valid[..., None], captions, 7.0)
    a, b = (cached_logits(model, params, c, tokens, key_mask) for c in (captions, changed))
    np.testing.assert_array_equal(a, b)


def test_dropout_needs_a_key():
    model, params = models.prior("dar/gpt_tiny")
    config = dataclasses.replace(model.config, token_dropout=0.1, residual_dropout=0.1)
    model = FunctionalModel(Llama, config)
    labels, tokens = conditions(model), image_tokens(model)

    @jax.jit
    def logits(rng):
        return model.bind(params).logits(labels, tokens, rng=rng)

    key = jax.random.key
    np.testing.assert_array_equal(logits(key(0)), logits(key(0)))
    assert np.all(np.any(logits(key(0)) != logits(key(1)), axis=-1))
    np.testing.assert_array_equal(logits(None), full_logits(model, params, labels, tokens))


def test_drop_condition_replaces_the_share_of_labels():
    model, params = models.prior("dar/gpt_tiny")
    prior = model.bind(params)
    labels, draws = jnp.array([3, 4, 5]), jnp.array([0.0999, 0.1, 0.9])
    np.testing.assert_array_equal(prior.drop_condition(labels, draws), [10, 4, 5])


def test_null_caption_gets_no_gradient():
    model, params = models.prior(CAPTION_FOLDER)
    captions = model.bind(params).null_condition(2)
    assert captions.shape == (2, 5, 24)

    def loss(params):
        prior = model.bind(params)
        return jnp.sum(jnp.square(prior.embed_condition(prior.null_condition(2))))

    gradient = jax.jit(jax.grad(loss))(params)["condition_embed"]
    np.testing.assert_array_equal(gradient["null_caption"], 0.0)
    assert jnp.any(gradient["hidden"]["kernel"] != 0)


def test_decoding_in_bfloat16_stays_close():
    model, params = unstacked("dar/gpt_tiny")
    coarse = FunctionalModel(Llama, model.config, Compute(dtype="bfloat16", stacked=False))
    arguments = conditions(model), image_tokens(model)
    exact = cached_logits(model, params, *arguments)
    logits = cached_logits(coarse, params, *arguments)
    assert logits.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(logits - exact) / np.linalg.norm(exact) < 0.05


@pytest.mark.parametrize("size", SIZES)
def test_released_sizes(size):
    classes = FunctionalModel(Llama, LlamaConfig(**SIZES[size])).abstract_params()
    assert num_parameters(classes) == CLASS_PARAMETERS[size]
    tokens, width = CAPTION_SHAPE
    config = LlamaConfig(**SIZES[size], caption_dim=width, condition_tokens=tokens)
    params = FunctionalModel(Llama, config).abstract_params()
    null_caption = params["condition_embed"]["null_caption"]
    assert null_caption.shape == CAPTION_SHAPE
    assert num_parameters(params) - null_caption.size == CAPTION_PARAMETERS[size]


def test_ffn_hidden_dim_rounds_up():
    assert ffn_hidden_dim(1024) == 2816
    assert ffn_hidden_dim(64, multiple_of=32, multiplier=1.3) == 224


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dim=100), "dim=100 must be a multiple of num_heads=16"),
        (dict(num_kv_heads=3), "num_heads=16 must be a multiple of num_kv_heads=3"),
        (dict(residual_dropout=10.0), r"residual_dropout=10.0 must be in \[0, 1\)"),
        (dict(token_dropout=-0.5), r"token_dropout=-0.5 must be in \[0, 1\)"),
        (dict(label_dropout=10.0), r"label_dropout=10.0 must be in \[0, 1\]"),
        (dict(rope_base=0.0), "rope_base=0.0 must be above 0"),
        (dict(norm_epsilon=-1.0), "norm_epsilon=-1.0 must be above 0"),
        (dict(condition_tokens=2), "condition_tokens=2 must be 1, for a class label"),
        (dict(dim=9, num_heads=1, max_guidance=8.0), "dim=9 must be even"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**options)
