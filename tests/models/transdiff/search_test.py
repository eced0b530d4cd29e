"""Search with TransDiff: who goes on after passes and steps, devices, bad input."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.common.keys import image_keys
from dar_jax.flow import solvers
from dar_jax.kinds.loading import from_pretrained
from dar_jax.models.transdiff import sampler, search
from dar_jax.models.transdiff.options import TransDiffSampling
from dar_jax.parallel import sharding
from dar_jax.parallel.sharding import MeshConfig
from dar_jax.sampling.search import REWARD, Search, candidate_keys
from tests import tiny_transdiff

ROUNDING = 1e-4  # other batch sizes sum in another order; images are in -1 .. 1
KINDS = {"one_step": tiny_transdiff.ONE_STEP, "mrar": tiny_transdiff.MRAR}
LABELS = np.array([2, 0, 1, 1, 0, 2, 0, 1])
OPTIONS = dict(num_steps=4, guidance_scale=1.5, noise_scale=0.9)
REWARDS = {
    "bright": "def reward(images, labels):\n    return images.mean(axis=(1, 2, 3))\n",
    "equal": "def reward(images, labels):\n    return 0.0 * labels\n",
    "total": "def reward(images, labels):\n    return images.sum()\n",
    "broken": "def reward(images, labels):\n    raise KeyError('cat')\n",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Holds the model directories `one_step` and `mrar` of random weights, and rewards."""
    path = tmp_path_factory.mktemp("models")
    tiny_transdiff.save_vae(path)
    for name, config in KINDS.items():
        tiny_transdiff.save(path, name, config)
    for name, text in REWARDS.items():
        (path / f"{name}.py").write_text(text)
    return path


@pytest.fixture(scope="module")
def load(directory):
    return functools.cache(lambda name: from_pretrained(directory / name))


def searching(directory, method, num, reward="bright", **options):
    return Search(method, num, str(directory / f"{reward}.py"), **options)


@pytest.mark.parametrize("name", KINDS)
def test_candidate_0_draws_as_without_search(load, directory, name):
    """Where all are as good, the first goes on."""
    draw = functools.partial(load(name).generate, LABELS[:2], rng=1, **OPTIONS)
    found = draw(search=searching(directory, "groups", 2, "equal"))
    np.testing.assert_allclose(found.images, draw().images, atol=ROUNDING)


def test_every_pass_is_the_best_continuation_of_those_before(load, directory):
    """References and noise are those of the candidate that went on, noise of steps one's own."""
    pipeline, labels, num = load("mrar"), jnp.asarray(LABELS[:2]), 3
    rngs = image_keys(jax.random.key(1), len(labels))
    how = TransDiffSampling(**OPTIONS)
    keys = candidate_keys(rngs, num).reshape(-1, num)
    model, params = pipeline.prior.model, pipeline.prior.sampling_params
    noise = [sampler.initial_noise(keys[:, c], model.config) for c in range(num)]
    references, shown = [noise[0][:, None][:, :0]] * num, []
    for step_pass in range(4):
        latents, brightness = [], []
        for c in range(num):
            caches = sampler.condition_caches(model, params, labels, references[c], guided=True)
            start = solvers.start(noise[c])
            fixed = (model, params, caches, start, keys[:, c], how)
            latents.append(sampler.denoise(*fixed, step_pass=step_pass, part=(0, 4))[1])
            images = sampler.decode(pipeline.vae.model, pipeline.vae.params, latents[c])
            brightness.append(images.mean(axis=(1, 2, 3)))
        best = np.argmax(brightness, axis=0)

        def of_best(candidates, best=best):
            return jnp.stack([candidates[c][image] for image, c in enumerate(best)])

        noise = [of_best(noise)] * num
        continued = jnp.concatenate([of_best(references), of_best(latents)[:, None]], axis=1)
        references = [continued] * num
        shown.append(np.max(brightness, axis=0))
    options = {**OPTIONS, "search": searching(directory, "groups", num)}
    found = list(pipeline.stream(labels, rng=jax.random.key(1), **options))
    assert [preview.step for preview in found] == [4, 8, 12, 16]
    np.testing.assert_allclose(
        [preview.images.mean(axis=(1, 2, 3)) for preview in found], shown, atol=ROUNDING
    )
    np.testing.assert_allclose(found[-1].latents, references[0][:, -1], atol=20 * ROUNDING)


@pytest.mark.parametrize(
    ("name", "method", "previews"),
    [("one_step", "groups", [1, 2, 3, 4]), ("mrar", "smc", [16]), ("mrar", "end", [16])],
)
def test_images_get_brighter_where_that_is_rewarded(load, directory, name, method, previews):
    stream = functools.partial(load(name).stream, LABELS, rng=1, **OPTIONS)
    *_, plain = stream()
    found = list(stream(search=searching(directory, method, 4, temperature=1e-3)))
    assert np.mean(found[-1].images) > np.mean(plain.images) + 0.01
    assert [each.step for each in found] == previews


@pytest.mark.slow
@pytest.mark.parametrize("method", ["groups", "smc"])
def test_eight_devices_find_what_one_finds(load, directory, method):
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2))
    split = from_pretrained(directory / "mrar", mesh=mesh)
    options = dict(rng=0, search=searching(directory, method, 2), **OPTIONS)
    images = split.generate(LABELS, **options).images
    assert len(images.sharding.device_set) == 8
    np.testing.assert_allclose(images, load("mrar").generate(LABELS, **options).images, atol=1e-3)


def test_reward_is_known_by_the_content_of_its_file(load, directory):
    digests = {
        load("mrar").settings(TransDiffSampling(search=searching(directory, "end", 2, name)))[
            REWARD
        ]
        for name in REWARDS
    }
    assert len(digests) == len(REWARDS)
    assert REWARD not in load("mrar").settings(TransDiffSampling())


def test_calls_are_counted():
    mrar, one_step = tiny_transdiff.MRAR, tiny_transdiff.ONE_STEP
    scales = (1.0, 1.0, 1.0, 2.0)
    how = TransDiffSampling(num_steps=10, guidance_scale=scales)
    assert search.calls(how, mrar) == (5, 50, 1)
    searched = functools.partial(TransDiffSampling, num_steps=10)
    groups, end = Search("groups", 3, "bright.py"), Search("end", 3, "bright.py")
    assert search.calls(searched(search=groups), mrar) == (12, 120, 12)
    assert search.calls(searched(search=groups), one_step) == (3, 30, 12)
    assert search.calls(searched(search=end), one_step) == (3, 30, 3)


MISTAKES = {
    "likelihood": (dict(reward="likelihood"), "TransDiff has no likelihood of tokens: name a Pyth"),
    "classifier": (dict(reward="classifier"), "TransDiff has no likelihood of tokens: name a Pyth"),
    "no file": (
        dict(reward="nowhere.py"),
        "'nowhere.py' is neither likelihood, classifier nor a f",
    ),
    "previews": (
        dict(preview_every=3),
        "preview_every=3 must be None, with search.method='groups'",
    ),
    "equal candidates": (dict(solver="euler", noise_scale=1.0), "draws nothing on the way"),
    "no noise": (dict(noise_scale=0.0), "noise_scale=0.0 and num_steps=4 draws nothing on the way"),
    "one number": (dict(reward="total"), "returns () for images (4, 8, 8, 3), and not one number"),
    "fails": (
        dict(reward="broken"),
        "broken.py fails: KeyError: 'cat'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(load, directory, name):
    options, message = MISTAKES[name]
    options = {**OPTIONS, "reward": "bright", **options}
    path = directory / f"{options['reward']}.py"
    reward = str(path) if path.exists() else options["reward"]
    options["search"] = Search("groups", 2, reward)
    del options["reward"]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        list(load("mrar").stream(LABELS[:2], rng=0, **options))
    assert "\n" not in str(caught.value)


def test_latents_alone_are_not_searched(load, directory):
    how = TransDiffSampling(search=searching(directory, "end", 2))
    with pytest.raises(ValueError, match="search needs the pictures of an autoencoder"):
        load("mrar").prior.sample_latents(LABELS, rng=jax.random.key(0), sampling=how)


@pytest.mark.parametrize("method", ["log_likelihood", "class_log_likelihoods", "classify"])
def test_images_have_no_likelihood(load, method):
    with pytest.raises(ValueError, match="no likelihood and no posterior over classes"):
        getattr(load("mrar"), method)(np.zeros((1, 8, 8, 3)), [0])
