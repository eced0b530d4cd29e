"""Prompts to pictures: by the command and in Python, in sets that resume, judged, and refused."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image

import dar_jax
from configs import common
from dar_jax.common.image import to_pixels
from dar_jax.config import build as read_config
from dar_jax.evaluation.clip_score import ClipScore
from dar_jax.generation import batches
from dar_jax.generation.batches import read_prompts
from dar_jax.generation.image_set import ImageSet
from dar_jax.models.text.encoder import open_encoder
from dar_jax.modes.evaluate import evaluate
from dar_jax.modes.sample import sample
from tests import tiny_model, tiny_text

pytest.importorskip("tokenizers")
T = 8
PROMPTS = ("a red apple", "the big blue car in a car", "<b>a</b> $(car)")
SAME = 1e-4
"""Of images in [-1, 1]: a batch of another size is another program, which rounds otherwise."""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_text.save(tmp_path_factory.mktemp("text") / "encoder")


@pytest.fixture(scope="module")
def prior(encoder):
    text = dict(caption_dim=tiny_text.DIM, condition_tokens=T, text_encoder=str(encoder))
    digest = open_encoder(str(encoder), T).digest
    return dataclasses.replace(tiny_model.PRIOR, **text, text_digest=digest)


@pytest.fixture(scope="module")
def model(tmp_path_factory, prior):
    return tiny_model.save(tmp_path_factory.mktemp("models"), prior=prior)


@pytest.fixture(scope="module")
def dar(model):
    return dar_jax.from_pretrained(model)


@pytest.fixture(autouse=True, scope="module")
def loaded_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "from_pretrained", functools.cache(batches.from_pretrained))
        yield


@pytest.fixture
def run(model, tmp_path):
    """Sample with these settings; return `WORKDIR/samples`."""

    def run(**settings):
        config = common.base()
        config.data.update(source="synthetic", image_size=32)
        defaults = dict(model=str(model), prompts="; ".join(PROMPTS), prefix_tokens=(2,))
        config.sample.update(defaults | settings)
        sample(read_config(config), str(tmp_path / "run"))
        return tmp_path / "run/samples"

    return run


def test_texts_are_drawn_as_their_features(dar, encoder):
    features, mask = open_encoder(str(encoder), T).encode(PROMPTS)
    by_features = dar.generate(features, caption_mask=mask, rng=0, guidance_scale=3.0)
    for texts in (PROMPTS, list(PROMPTS), np.asarray(PROMPTS)):
        by_texts = dar.generate(texts, rng=0, guidance_scale=3.0)
        np.testing.assert_array_equal(by_texts.indices, by_features.indices)
    *_, last = dar.stream(PROMPTS, rng=0, guidance_scale=3.0)
    np.testing.assert_array_equal(last.indices, by_features.indices)
    alone = dar.generate(PROMPTS[0], rng=0, guidance_scale=3.0)
    np.testing.assert_allclose(alone.images[0], by_texts.images[0], atol=SAME)
    other = dar.generate([PROMPTS[2], *PROMPTS[1:]], rng=0, guidance_scale=3.0)
    assert (other.indices[0] != by_texts.indices[0]).any()
    np.testing.assert_array_equal(other.indices[1:], by_texts.indices[1:])


def test_command_draws_a_row_for_every_prompt(run, dar):
    samples = run(images_per_class=2, batch_size=4)
    with np.load(samples / "samples.npz") as arrays:
        assert arrays["labels"].tolist() == [text for text in PROMPTS for _ in range(2)]
        expected = dar.generate([text for text in PROMPTS for _ in range(2)], rng=0)
        np.testing.assert_array_equal(arrays["indices"], expected.indices)
    with Image.open(samples / "grid.png") as grid:
        assert grid.height % len(PROMPTS) == 0 and grid.width > 2 * grid.height // len(PROMPTS)


def test_file_has_a_prompt_a_line(run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red apple; a car\n\n  the  big car \n")
    with np.load(run(prompts=str(path), images_per_class=1) / "samples.npz") as arrays:
        assert arrays["labels"].tolist() == ["a red apple; a car", "the big car"]


def test_layout_and_inpainting_take_prompts(run, tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    samples = run(
        prefix_image="test:0", inpaint_image="test:1", inpaint_mask=str(tmp_path / "mask.png")
    )
    assert {path.name for path in samples.iterdir()} == {"layout.png", "inpainting.png"}


def test_set_of_prompts_goes_on_after_a_kill(run, monkeypatch):
    write = ImageSet.write

    def write_once_then_die(self, first, *arrays):
        if first:
            raise KeyboardInterrupt
        write(self, first, *arrays)

    options = dict(num_images=10, batch_size=8)  # a multiple of the devices
    monkeypatch.setattr(ImageSet, "write", write_once_then_die)
    with pytest.raises(KeyboardInterrupt):
        run(**options)
    monkeypatch.setattr(ImageSet, "write", write)
    samples = run(**options)
    pieces = [dict(np.load(path)) for path in sorted(samples.glob("set/0*.npz"))]
    labels = np.concatenate([piece["labels"] for piece in pieces]).tolist()
    assert labels == [PROMPTS[i % 3] for i in range(10)]
    (merged,) = samples.glob("samples_10x*.npz")
    with np.load(merged) as arrays:
        assert arrays["arr_1"].tolist() == labels
    with pytest.raises(ValueError, match="is made with labels="):
        run(**options, prompts="a car")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": ""}, "the model draws captions: set --config.sample.prompts="),
        ({"prompts": " ; ;"}, "prompts=' ; ;' has no text"),
        ({"labels": (1,)}, r"labels=\(1,\) and prompts=.*: draw one of the two"),
        ({"search": {"method": "end", "num": 2, "reward": "classifier"}}, "needs classes"),
    ],
)
def test_what_is_no_prompt_is_one_line(run, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(**settings)
    assert "\n" not in str(caught.value)


@pytest.fixture
def judge(model, tmp_path):
    """Evaluate with a CLIP; return what is written."""

    def judge(clip=tiny_text.CLIP, **settings):
        weights = str(tiny_text.save(tmp_path / clip["model_type"], clip, seed=3))
        config = common.base()
        config.data.update(source="synthetic", image_size=32)
        config.sample.update({"model": str(model), "prompts": "; ".join(PROMPTS), **settings})
        config.evaluate.update(clip=weights, features="", lpips="", num_images=8)
        evaluate(read_config(config), str(tmp_path / "run"))
        return json.loads((tmp_path / "run/evaluation.json").read_text())

    return judge


def test_clip_scores_what_is_drawn_for_prompts(judge, dar, tmp_path):
    found = judge()
    judged = ClipScore(str(tmp_path / "clip"), tmp_path)
    drawn = dar.generate([PROMPTS[i % 3] for i in range(8)], rng=0)
    pixels = judged.features(to_pixels(np.asarray(drawn.images)))["embedding"]
    texts = judged.embed_texts(PROMPTS)
    pixels, texts = (each / np.linalg.norm(each, axis=1)[:, None] for each in (pixels, texts))
    cosines = pixels @ texts.T
    own = [cosines[i, i % 3] for i in range(8)]
    expected = 100 * np.mean(own)
    assert min(own) > 0  # what is less than nothing would count as nothing
    np.testing.assert_allclose(found["generation/clip_score"], expected, atol=100 * SAME)
    right = [cosines[i].argmax() == i % 3 for i in range(8)]
    assert found["generation/clip_retrieval"] == np.mean(right)


def test_clip_needs_prompts_and_has_to_be_one(judge, tmp_path):
    classes = str(tiny_model.save(tmp_path / "classes"))
    with pytest.raises(ValueError, match="evaluate.clip judges prompts, but .* draws classes"):
        judge(model=classes, prompts="")
    with pytest.raises(ValueError, match="is a text encoder, but no CLIP"):
        judge(clip=tiny_text.BERT | {"max_position_embeddings": 77})


def test_model_of_classes_takes_no_prompts(run, tmp_path):
    classes = tiny_model.save(tmp_path)
    with pytest.raises(ValueError, match="but the model draws classes: use config.sample.labels"):
        run(model=str(classes))
    with pytest.raises(ValueError, match="no class is called 'a red apple'"):
        dar_jax.from_pretrained(classes).generate(["a red apple"], rng=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_digest": "0" * 64}, "is another one than the model was trained with"),
        ({"text_encoder": "/nowhere"}, "unknown text encoder '/nowhere'"),
        ({"text_encoder": ""}, "the model names no text encoder"),
        ({"caption_dim": 13}, "makes 12 features of a token, but config.model.caption_dim=13"),
    ],
)
def test_encoder_that_is_not_the_models_is_refused(run, prior, changes, message, tmp_path):
    other = tiny_model.save(tmp_path, prior=dataclasses.replace(prior, **changes))
    with pytest.raises(ValueError, match=message) as caught:
        run(model=str(other))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        dar_jax.from_pretrained(other).generate(PROMPTS, rng=0)


def test_texts_take_no_mask(dar):
    with pytest.raises(ValueError, match="caption_mask is for features of captions"):
        dar.generate(PROMPTS, rng=0, caption_mask=np.ones((3, T), bool))


def test_prompts_are_read_from_text_or_file(tmp_path):
    assert read_prompts("a; b c ;;") == ("a", "b c")
    assert read_prompts("a; b\n\n c \n") == ("a; b", "c")
    (tmp_path / "junk").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot read config.sample.prompts="):
        read_prompts(str(tmp_path / "junk"))


def test_many_prompts_are_drawn_in_turns(dar):
    texts = [PROMPTS[i % 2] for i in range(5)]
    whole = dar.generate(texts, rng=0)
    dar.batch_size, kept = 2, dar.batch_size
    try:
        turns = dar.generate(texts, rng=0)
    finally:
        dar.batch_size = kept
    np.testing.assert_array_equal(turns.indices, whole.indices)
    assert isinstance(turns.indices, jax.Array)
