"""What the Python API of D-AR says to bad input: one line, at the call."""

import jax
import numpy as np
import pytest

from dar_jax.pipelines.dar import DarPipeline, PriorPipeline
from dar_jax.sampling.search import Search

LABELS = (3, 1)
VOCAB, NUM_CLASSES = 64, 10


def ones(*shape):
    return np.ones(shape, np.float32)


def zeros(*shape):
    return np.zeros(shape, np.int32)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (ones(32, 32, 3), r"images has shape \(32, 32, 3\), expected \(B, H, W, 3\)"),
        (ones(1, 3, 32, 32), r"images has shape \(1, 3, 32, 32\)"),
        (ones(1, 32, 36, 3), "image of 32x36 pixels"),
        (ones(1, 32, 32, 3) * 255, "images hold 255, expected floats in .* or uint8 pixels"),
        (ones(1, 32, 32, 3) * np.nan, "images: 3072 of 3072 numbers are not finite"),
        (zeros(1, 32, 32, 3), "images are int32, expected floats in .* or uint8 pixels"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_encode_refuses(tokenizer, images, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(images)


@pytest.mark.parametrize(
    ("indices", "options", "message"),
    [
        (zeros(2, 16) + VOCAB, {}, "indices: 64 is out of range, expected 0..63"),
        (zeros(2, 16) - 1, {}, "indices: -1 is out of range"),
        (zeros(16), {}, r"indices has shape \(16,\)"),
        (ones(2, 16), {}, "indices are float32, expected integers: tokens"),
        (zeros(2, 7), {}, "indices hold 7 tokens, expected 16 to 16"),
        (zeros(2, 17), {}, "indices hold 17 tokens"),
        (zeros(2, 7), {"num_groups": 2}, "indices hold 7 tokens, expected 8 to 16"),
        (zeros(2, 16), {"num_groups": 0}, "num_groups=0 must be in 1..4"),
        (zeros(2, 16), {"num_groups": 5}, "num_groups=5 must be in 1..4"),
        (zeros(2, 16), {"num_groups": 1.5}, "num_groups=1.5 must be an integer"),
        (zeros(2, 16), {"start_step": 0.5}, "start_step=0.5 must be an integer"),
        (zeros(2, 16), {"num_steps": 0}, "num_steps=0 must be in 1..10000"),
        (zeros(2, 16), {"start_step": 5}, "start_step=5 must be in 0..4"),
        (zeros(2, 16), {"start_step": -1}, "start_step=-1 must be in 0..4"),
        (zeros(2, 16), {"start_step": 2, "num_groups": 2}, "start_step=2 must be in 0..1"),
        (zeros(2, 16), {"rng": None}, "rng is missing"),
        (zeros(2, 16), {"noise": ones(1, 32, 32, 3)}, r"noise has shape \(1, 32, 32, 3\)"),
        (zeros(2, 16), {"noise": ones(2, 33, 32, 3)}, "image of 33x32 pixels"),
        (zeros(2, 16), {"start_image": ones(2, 8, 8, 3)}, r"start_image has shape \(2, 8, 8, 3\)"),
        (zeros(2, 16), {"noise": ones(2, 32, 32, 3) * np.nan}, "noise: 6144 of 6144 .* not finite"),
        (zeros(2, 16), {"start_image": ones(2, 32, 32, 3)}, "start_step=0 starts from noise"),
        (zeros(2, 16), {"solver": "heun"}, "solver 'heun'"),
        (zeros(2, 16), {"known": ones(2, 32, 32, 3)}, "needs both known= .* and mask="),
        (zeros(2, 16), {"known": ones(1, 8, 8, 3), "mask": zeros(8, 8)}, "known has shape"),
        (
            zeros(2, 16),
            {"known": ones(2, 32, 32, 3), "mask": zeros(2, 8, 8)},
            r"mask has shape \(2, 8, 8\), expected \(2, 32, 32\)",
        ),
        (
            zeros(2, 16),
            {"known": ones(2, 32, 32, 3), "mask": zeros(32, 32) + 255},
            "mask must hold 0 .* and 1",
        ),
        (zeros(4, 16), {"microbatch": 3}, "microbatch=3 must divide the batch of 4"),
        (zeros(4, 16), {"microbatch": 0}, "microbatch=0 must divide"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_decode_refuses(tokenizer, indices, options, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(indices, **({"rng": jax.random.key(0)} | options))


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 11], {}, "labels: 11 is out of range, expected 0.."),
        ([], {}, r"labels are empty, expected classes in 0\.\.9"),
        ([1.0], {}, "labels are float64, expected integers"),
        ([True], {}, "labels are bool, expected integers"),
        ([1], {"prefix": ones(1, 4)}, "prefix are float32, expected integers: tokens"),
        ([1], {"rng": 0.5}, "rng is no key but 0.5: pass rng=jax.random.key"),
        ([1], {"rng": 2**32}, "rng=4294967296 must be in 0..4294967295"),
        ([1], {"guidance_scale": "3"}, "guidance_scale='3' must be a number"),
        ([1], {"guidance_scale": (2.0, np.inf)}, "guidance_scale=.* must be .* finite"),
        ([1], {"temperature": np.nan}, "temperature=nan must be at least 0 .* and finite"),
        ([1], {"top_k": 2.5}, "top_k=2.5 must be an integer"),
        ([1], {"num_steps": True}, "num_steps=True must be an integer"),
        ([1], {"num_steps": 10**9}, r"num_steps=1000000000 must be in 1..10000 \(0 is"),
        ([1], {"rng": jax.random.split(jax.random.key(0), 1)}, r"rng holds keys of shape \(1,\)"),
        ([-1], {}, "labels: -1 is out of range"),
        ([[1]], {}, r"labels has shape \(1, 1\)"),
        ([1, 2], {"prefix": zeros(1, 4)}, r"prefix has shape \(1, 4\), expected \(2, K\)"),
        ([1], {"prefix": zeros(4)}, r"prefix has shape \(4,\)"),
        ([1], {"prefix": zeros(1, 16)}, "prefix holds 16 tokens, expected fewer than 16"),
        ([1], {"prefix": zeros(1, 4) + VOCAB}, "prefix: 64 is out of range"),
        ([1], {"rng": None}, "rng is missing"),
        ([1], {"guidance_scale": 0.5}, r"guidance_scale=\(0.5,\) must be at least 1"),
        ([1], {"temperature": -1.0}, "temperature=-1.0"),
        ([1], {"top_k": -1}, "top_k=-1"),
        ([1], {"top_p": 0.0}, "top_p=0.0"),
        ([1], {"temperature": np.float32("nan")}, "temperature=nan"),
        ([1], {"guidance_interval": -5}, "guidance_interval=-5 must be at least 0"),
        ([1], {"guidance_interval": (0.9, 3.7)}, "guidance_interval=.* must be an integer, or two"),
        ([1], {"caption_mask": ones(1, 5)}, "caption_mask is for models of captions"),
        ([1], {"microbatch": 1.0}, "microbatch=1.0 must be an integer"),
        ([1], {"first_index": 0.5}, "first_index=0.5 must be an integer"),
        ([1], {"first_index": 2**31}, "first_index=2147483648 must be in 0..2147483647"),
        ([1], {"sampling": Search()}, "sampling=Search.* must be an instance of DarSampling"),
        ([1], {"lookahead": 1}, "lookahead=1 must be at least 2 .0 is off, -1 chooses"),
        ([1], {"lookahead": -2}, "lookahead=-2 must be at least 2"),
        ([1], {"lookahead": 2.5}, "lookahead=2.5 must be an integer"),
        ([1], {"guidance_schedule": "square"}, "guidance_schedule 'square' must be one of"),
        ([1], {"guidance_interval": (3, 16)}, r"guidance_interval=\(3, 16\) must be"),
        ([1], {"solver": "heun"}, "solver 'heun'"),
        ([1], {"mask": zeros(32, 32)}, "needs both known= .* and mask="),
        ([1, 2, 3], {"microbatch": 2}, "microbatch=2 must divide the batch of 3"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_stream_refuses_at_the_call(dar, labels, options, message):
    options = {"rng": jax.random.key(0)} | options
    with pytest.raises(ValueError, match=message):
        dar.stream(labels, **options)
    if not options.keys() & {"solver", "mask", "microbatch", "first_index", "sampling"}:
        with pytest.raises(ValueError, match=message):
            dar.prior.generate_indices(labels, **options)


@pytest.mark.usefixtures("unchecked")
def test_names_are_those_of_classes(dar):
    with pytest.raises(ValueError, match="no class is called '3'; this model knows its classes by"):
        dar.stream(["3"], rng=jax.random.key(0))
    with pytest.raises(ValueError, match="labels are <U1, expected integers: classes in"):
        dar.prior.generate_indices(["3"], rng=jax.random.key(0))


def test_label_of_no_class_draws_nothing(dar, prior):
    with pytest.raises(ValueError, match=r"labels: 10 is out of range, expected 0\.\.9"):
        dar.generate([NUM_CLASSES], rng=jax.random.key(0))
    assert prior.logits(zeros(1) + NUM_CLASSES, zeros(1, 16)).shape == (1, 16, VOCAB)


def test_what_is_not_finite_is_refused_with_its_image(dar, prior, tokenizer):
    broken = jax.tree.map(np.asarray, prior.params)
    broken["condition_embed"]["embedding"] = broken["condition_embed"]["embedding"].copy()
    broken["condition_embed"]["embedding"][1] = np.nan
    broken = DarPipeline(PriorPipeline(prior.model, broken), tokenizer)
    with pytest.raises(ValueError, match="image 8: what the model draws is not finite, as of 1 of"):
        broken.generate(LABELS, rng=jax.random.key(0), first_index=7)


@pytest.mark.usefixtures("unchecked")
def test_captions_of_another_shape_are_refused(captions_prior):
    with pytest.raises(ValueError, match=r"captions has shape \(1, 4, 24\), expected \(B, 5, 24\)"):
        captions_prior.generate_indices(ones(1, 4, 24), rng=jax.random.key(0))


def test_logits_refuse_tokens_out_of_range(prior):
    with pytest.raises(ValueError, match="indices: 64 is out of range"):
        prior.logits(zeros(1), zeros(1, 16) + VOCAB)
    with pytest.raises(ValueError, match="labels: 11 is out of range"):
        prior.logits(zeros(1) + 11, zeros(1, 16))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (ones(1, 16), "indices are float32, expected integers"),
        (zeros(16), r"indices has shape \(16,\), expected \(1, n\)"),
        (zeros(2, 16), r"indices has shape \(2, 16\), expected \(1, n\)"),
        (zeros(1, 17), "indices hold 17 tokens, expected 1..16"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_logits_refuse_what_are_no_tokens(prior, indices, message):
    with pytest.raises(ValueError, match=message):
        prior.logits([3], indices)
