"""The Python API: streaming, previews and model directories."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.common.batches import MAX_PADDED
from dar_jax.common.image import to_float
from dar_jax.common.keys import image_keys
from dar_jax.common.model_dir import save_model
from dar_jax.kinds.loading import from_pretrained
from dar_jax.models.dar.llama import Llama
from dar_jax.models.dar.sampler import initial_noise
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.pipelines.dar import DarPipeline, PriorPipeline, TokenizerPipeline
from dar_jax.sampling import groups
from tests.golden import fixtures
from tests.random_params import random_params

LABELS = (3, 1)
NUM_GROUPS, VOCAB, NUM_CLASSES = 4, 64, 10
ROUNDING = 1e-4  # one compiled step at a time against a compiled loop; images reach 8


@pytest.fixture(scope="module")
def previews(dar):
    return list(dar.stream(LABELS, rng=jax.random.key(0), guidance_scale=2.0))


def test_stream_yields_every_group(previews):
    assert [preview.step for preview in previews] == [1, 2, 3, 4]
    assert [preview.num_tokens for preview in previews] == [4, 8, 12, 16]
    for preview in previews:
        assert preview.images.shape == (2, 32, 32, 3)
        assert np.max(np.abs(preview.images)) <= 1.0
        final = previews[-1].indices[:, : preview.num_tokens]
        np.testing.assert_array_equal(preview.indices, final)


def test_generate_is_the_end_of_the_stream(dar, previews):
    images, indices = dar.generate(LABELS, rng=jax.random.key(0), guidance_scale=2.0)
    np.testing.assert_array_equal(images, previews[-1].images)
    np.testing.assert_array_equal(indices, previews[-1].indices)


def test_previews_are_decoded_prefixes(tokenizer, previews):
    for group in (2, NUM_GROUPS):
        decoded = tokenizer.decode(previews[-1].indices, rng=jax.random.key(0), num_groups=group)
        expected = np.clip(decoded, -1, 1)
        np.testing.assert_allclose(previews[group - 1].images, expected, atol=ROUNDING)


def test_next_group_is_under_way_when_a_preview_is_handed_out(dar, previews, monkeypatch):
    stops, decode = [], groups.decode

    def recording(*arguments, **options):
        stops.append(options["stop"])
        return decode(*arguments, **options)

    monkeypatch.setattr(groups, "decode", recording)
    stream = dar.stream(LABELS, rng=jax.random.key(0), guidance_scale=2.0)
    first = next(stream)
    assert (first.num_tokens, stops) == (4, [4, 8])
    np.testing.assert_array_equal(first.images, previews[0].images)
    assert len(list(stream)) == NUM_GROUPS - 1
    assert stops == [4, 8, 12, 16]


def test_known_pixels_are_kept_in_every_preview(dar, previews):
    known = np.linspace(-1, 1, 2 * 32 * 32 * 3, dtype=np.float32).reshape(2, 32, 32, 3)
    mask = np.arange(32) < 12
    mask = np.broadcast_to(mask, (32, 32))
    options = dict(rng=jax.random.key(0), guidance_scale=2.0, known=known)
    stream = list(dar.stream(LABELS, mask=mask, **options))
    for preview, free in zip(stream, previews, strict=True):
        np.testing.assert_array_equal(preview.images[:, mask], known[:, mask])
        # The first step starts from the same noise; from then on the known pixels steer the rest.
        changed = np.abs(preview.images - free.images)[:, ~mask].max()
        assert changed < ROUNDING if preview.step == 1 else changed > 0.01
        np.testing.assert_array_equal(preview.indices, free.indices)
    images, _ = dar.generate(LABELS, mask=np.zeros((32, 32), int), **options)
    np.testing.assert_allclose(images, previews[-1].images, atol=ROUNDING)


def test_guidance_options_reach_the_prior(dar):
    generate = functools.partial(dar.prior.generate_indices, LABELS, rng=jax.random.key(0))
    free, ends_early, list_of_two, tuple_of_two = (
        np.asarray(generate(**options))
        for options in (
            {},
            {"guidance_scale": 8.0, "guidance_interval": (0, 3)},
            {"guidance_scale": [1.1, 8.0]},
            {"guidance_scale": (1.1, 8.0)},
        )
    )
    np.testing.assert_array_equal(list_of_two, tuple_of_two)
    assert np.any(ends_early[:, :4] != free[:, :4])
    cosine = generate(guidance_scale=(1.1, 8.0), guidance_schedule="cosine")
    assert np.any(cosine != tuple_of_two)


def test_stream_draws_the_tokens_of_generate_indices(prior, previews):
    indices = prior.generate_indices(jnp.array(LABELS), rng=jax.random.key(0), guidance_scale=2.0)
    np.testing.assert_array_equal(previews[-1].indices, indices)


def test_lookahead_streams_the_same_images(dar, previews):
    options = dict(rng=jax.random.key(0), guidance_scale=2.0, lookahead=3)
    for preview, expected in zip(dar.stream(LABELS, **options), previews, strict=True):
        np.testing.assert_array_equal(preview.indices, expected.indices)
        np.testing.assert_array_equal(preview.images, expected.images)


def test_later_images_of_a_set_are_those_of_an_earlier_batch(dar, previews):
    options = dict(rng=jax.random.key(0), guidance_scale=2.0)
    images, indices = dar.generate((LABELS[1], 7), first_index=1, **options)
    np.testing.assert_array_equal(indices[0], previews[-1].indices[1])
    np.testing.assert_allclose(images[0], previews[-1].images[1], atol=ROUNDING)


def test_prefix_fixes_the_first_tokens(dar, previews):
    prefix = previews[1].indices
    images, indices = dar.generate(LABELS, rng=jax.random.key(0), guidance_scale=2.0, prefix=prefix)
    np.testing.assert_array_equal(indices, previews[-1].indices)
    np.testing.assert_allclose(images, previews[-1].images, atol=ROUNDING)


def test_greedy_needs_no_key(prior):
    generate = functools.partial(prior.generate_indices, np.array(LABELS), temperature=0.0)
    np.testing.assert_array_equal(generate(), generate(rng=jax.random.key(5)))


def test_logits_are_teacher_forced(prior):
    golden = fixtures.Compare("dar/gpt_tiny", "io_forward")
    golden.check("eval_logits", prior.logits(golden.arrays["labels"], golden.arrays["tokens"]))


def test_caption_logits_are_teacher_forced(captions_prior):
    golden = fixtures.Compare("dar/gpt_t2i_tiny", "io_forward")
    captions, tokens = golden.arrays["caption"], golden.arrays["tokens"]
    golden.check("logits_nomask", captions_prior.logits(captions, tokens))


def test_decode_draws_each_image_from_its_own_key(tokenizer, previews):
    rng, indices = jax.random.key(7), previews[-1].indices
    noise = initial_noise(image_keys(rng, 2), (32, 32))
    decoded = tokenizer.decode(indices, rng=rng)
    np.testing.assert_array_equal(decoded, tokenizer.decode(indices, noise=noise))


def test_model_directories_load(dar, tokenizer, prior, tmp_path):
    names = {"class_names": [str(label) for label in range(NUM_CLASSES)]}
    config = dataclasses.asdict(prior.config)
    save_model(tmp_path / "prior", "dar_prior", config, prior.params, names)
    config = dataclasses.asdict(tokenizer.config)
    save_model(tmp_path / "prior/tokenizer", "dar_tokenizer", config, tokenizer.params, {})
    loaded = from_pretrained(tmp_path / "prior", compute=Compute(remat="blocks"))
    assert loaded.class_names == tuple("0123456789")
    assert loaded.prior.model.compute == Compute(remat="blocks")
    assert (loaded.prior.config, loaded.tokenizer.config) == (prior.config, tokenizer.config)
    jax.tree.map(np.testing.assert_array_equal, loaded.prior.params, prior.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.tokenizer.params, tokenizer.params)
    assert isinstance(from_pretrained(str(tmp_path / "prior/tokenizer")), TokenizerPipeline)


def test_unknown_kind_is_refused(tmp_path):
    save_model(tmp_path / "model", "gan", {"dim": 1}, {"a": np.zeros(1)}, {})
    with pytest.raises(ValueError, match="unknown kind 'gan'"):
        from_pretrained(tmp_path / "model")


def test_pixels_are_encoded_as_what_they_show(tokenizer):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(tokenizer.encode(pixels), tokenizer.encode(to_float(pixels)))


def test_padding_to_a_bucket_changes_no_image(dar):
    """Three images are made in the program of four, bitwise as beside a fourth one."""
    options = dict(rng=jax.random.key(1), guidance_scale=(1.5, 3.0), first_index=5)
    prefix = np.zeros((4, 4), np.int32) + np.arange(4, dtype=np.int32)[:, None]
    images, indices = dar.generate([7, 2, 9], **options, prefix=prefix[:3])
    whole = dar.generate([7, 2, 9, 4], **options, prefix=prefix)
    assert images.shape == (3, 32, 32, 3) and indices.shape == (3, 16)
    np.testing.assert_array_equal(indices, whole.indices[:3])
    np.testing.assert_array_equal(images, whole.images[:3])


@pytest.mark.slow
def test_all_sizes_of_small_batches_share_six_programs(dar):
    """Only the first size of each bucket compiles anything."""
    compiled = []

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    options = dict(rng=jax.random.key(0), guidance_scale=2.0)
    per_size = {}
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for size in range(1, MAX_PADDED + 1):
            compiled.clear()
            dar.generate(np.arange(size) % NUM_CLASSES, **options)
            per_size[size] = len(compiled)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert {size for size, number in per_size.items() if number} <= {1, 2, 3, 5, 9, 17}, per_size


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_few_steps_end_with_all_tokens(dar, num_steps):
    options = dict(rng=0, num_steps=num_steps)
    streamed = list(dar.stream(LABELS, **options))
    assert streamed[-1].indices.shape == (2, 16) and streamed[-1].step == num_steps
    drawn = dar.generate(LABELS, **options)
    np.testing.assert_array_equal(drawn.indices, dar.generate(LABELS, rng=0).indices)
    np.testing.assert_array_equal(drawn.images, streamed[-1].images)


def test_labels_of_any_type_are_the_classes_that_they_name(dar):
    """The null class need not fit the type of labels."""
    wide = dataclasses.replace(dar.prior.config, num_classes=300)
    model = FunctionalModel(Llama, wide, Compute())
    prior = PriorPipeline(model, random_params(model.abstract_params(), 0))
    drawn = [
        prior.generate_indices(np.array([3, 5], dtype), rng=0, guidance_scale=4.0)
        for dtype in (np.uint8, np.int32)
    ]
    np.testing.assert_array_equal(*drawn)
    named = DarPipeline(dar.prior, dar.tokenizer, class_names=tuple("abcdefghij"))
    by_name, by_index = named.generate(np.array(["d", "b"]), rng=0), named.generate([3, 1], rng=0)
    np.testing.assert_array_equal(by_name.indices, by_index.indices)
