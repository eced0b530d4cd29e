"""Search: who goes on, that the caches follow, what it costs, and what it says to bad input."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from dar_jax.common.keys import image_keys
from dar_jax.config import build as read_config
from dar_jax.models.dar import draws
from dar_jax.models.dar import search as dar_search
from dar_jax.models.dar.llama import LlamaConfig
from dar_jax.models.dar.options import DarSampling
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig
from dar_jax.pipelines.dar import DarPipeline, PriorPipeline, TokenizerPipeline
from dar_jax.sampling import autoregressive, search
from dar_jax.sampling.rewards import load_reward
from dar_jax.sampling.search import REWARD, Search
from tests.golden import models

ROUNDING = 1e-4  # one compiled step at a time against a compiled loop
LABELS, GROUPS = np.array([3, 1]), (4, 8, 12, 16)
BRIGHT = "def reward(images, labels):\n    return images.mean(axis=(1, 2, 3))\n"


@pytest.fixture(scope="module")
def dar():
    prior = PriorPipeline(*models.prior("dar/gpt_tiny"))
    return DarPipeline(prior, TokenizerPipeline(*models.tokenizer("dar/tokenizer_tiny")))


def drawn(items, sent):
    """A generator of rows that notes what is sent back."""
    for item in items:
        sent.append((yield item))


def run(method, rewards, num=2, **options):
    """Survivors, and what was sent back, of candidates whose rewards are their rows."""
    sent, items = [], [jnp.asarray(rows, jnp.float32).ravel() for rows in rewards]
    rngs = jax.random.split(jax.random.key(0), len(rewards[0]))
    options = Search(method, num, **options)
    kept = search.survivors(drawn(items, sent), lambda x: x, options, rngs, num_groups=len(items))
    return [np.asarray(rows).tolist() for rows in kept], sent


def test_best_of_every_group_goes_on():
    kept, sent = run("groups", [[[1, 2], [4, 3]], [[5, 6], [8, 7]]])
    assert kept == [[2, 4], [6, 8]]
    np.testing.assert_array_equal(sent[0], [[1, 1], [0, 0]])


def test_best_of_n_is_chosen_at_the_end():
    kept, sent = run("end", [[[9, 2], [4, 9]], [[5, 6], [8, 7]]])
    assert kept == [[6, 8]] and sent == [None]


def test_monte_carlo_draws_by_the_exponential_of_the_reward():
    num_images = 4000
    (kept,), _ = run("smc", [[[0.0, 2 * np.log(3)]] * num_images], temperature=2.0)
    share = np.mean(np.array(kept) > 0)
    assert abs(share - 3 / 4) < 4 * np.sqrt(3 / 16 / num_images)
    (kept,), sent = run("smc", [[[1, 2], [4, 3]], [[5, 5], [7, 7]]], temperature=1e-3)
    np.testing.assert_array_equal(sent[0], [[1, 1], [0, 0]])
    assert kept == [5, 7]


@pytest.mark.parametrize("least", [np.nan, -np.inf])
def test_monte_carlo_goes_on_where_nothing_could_be_judged(least):
    rewards = [[[least] * 3], [[0, 0, 5]]]
    kept, sent = run("smc", rewards, num=3, temperature=1e-3)
    np.testing.assert_array_equal(sent[0], [[0, 1, 2]])
    assert kept == [[5]]


def test_take_gathers_all_rows_of_a_candidate():
    rows = jnp.arange(12).reshape(12, 1)  # two images, three candidates, two rows of each
    taken = autoregressive.take(rows, jnp.array([[2, 0, 0], [1, 1, 2]]))
    assert taken[:, 0].tolist() == [4, 5, 0, 1, 0, 1, 8, 9, 8, 9, 10, 11]


@pytest.mark.parametrize("lookahead", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_every_group_is_the_best_continuation_of_those_before(dar, lookahead):
    """The gathered caches continue a prefix as running it anew does."""
    search_options = Search("groups", 2, "likelihood")
    options = DarSampling(guidance_scale=2.0, search=search_options, lookahead=lookahead)
    rngs = jax.random.split(jax.random.key(5), len(LABELS))
    prior, params = dar.prior.model.unstacked(), dar.prior.sampling_params
    flow = (dar.tokenizer.model, dar.tokenizer.params)
    scorer, labels = (dar.prior.model, dar.prior.params), jnp.asarray(LABELS)
    found = list(dar_search.stream(prior, params, *flow, labels, rngs, options, scorer=scorer))
    tokens = np.asarray(found[-1].indices)
    assert [preview.num_tokens for preview in found] == list(GROUPS)
    keys = search.candidate_keys(rngs, 2).reshape(-1, 2)
    for start, stop in ((0, 4), (8, 12)):
        continued = []
        for candidate in range(2):
            prefix = jnp.asarray(tokens[:, :start])
            draw = functools.partial(draws.generate_indices, prior, params, jnp.asarray(LABELS))
            groups = draw(keys[:, candidate], options, prefix=prefix, boundaries=(stop,))
            continued.append(next(groups))
        reward = dar_search.token_reward("likelihood", *scorer, labels)
        best = np.argmax([reward(each) for each in continued], axis=0)
        expected = [continued[chosen][image] for image, chosen in enumerate(best)]
        np.testing.assert_array_equal(tokens[:, :stop], expected)


def test_reward_of_a_file_sees_the_images(dar, tmp_path):
    path = tmp_path / "bright.py"
    path.write_text(BRIGHT)
    rng = jax.random.key(0)
    found = dar.generate(LABELS, rng=rng, search=Search("end", 3, str(path)))
    keys = search.candidate_keys(image_keys(rng, len(LABELS)), 3).reshape(-1, 3)
    model, params = dar.prior.model.unstacked(), dar.prior.sampling_params
    draw = functools.partial(draws.generate_indices, model, params, jnp.asarray(LABELS))
    brightness = []
    for candidate in range(3):
        *_, indices = draw(keys[:, candidate], DarSampling(), boundaries=GROUPS)
        image = dar.tokenizer.decode(indices, rng=rng)  # all candidates have the image's noise
        brightness.append(np.clip(image, -1, 1).mean(axis=(1, 2, 3)))
    assert np.all(np.ptp(brightness, axis=0) > ROUNDING)
    kept = np.mean(found.images, axis=(1, 2, 3))
    np.testing.assert_allclose(kept, np.max(brightness, axis=0), atol=ROUNDING)


def test_reward_is_known_by_the_content_of_its_file(dar, tmp_path):
    path = tmp_path / "reward.py"
    sampling = DarSampling(search=Search("end", 2, str(path)))
    settings, scores = [], []
    for sign in ("", "-"):
        path.write_text(BRIGHT.replace("images.", f"{sign}images."))
        settings.append(dar.settings(sampling))
        reward = load_reward(str(path))
        scores.append(float(reward(jnp.ones((1, 4, 4, 3)), jnp.zeros(1, jnp.int32))[0]))
    assert scores == [1.0, -1.0]
    assert [k for k, old in settings[0].items() if settings[1][k] != old] == [REWARD]
    assert REWARD not in dar.settings(DarSampling(search=Search("end", 2)))


def test_calls_are_counted():
    prior = LlamaConfig(num_tokens=16, num_classes=10)
    tokenizer = TokenizerConfig(num_tokens=16, num_groups=4, num_steps=8, max_tokens=16)
    count = functools.partial(dar_search.calls, prior=prior, tokenizer=tokenizer)
    assert count(DarSampling()) == (16, 0, 8)
    assert count(DarSampling(guidance_scale=2.0)) == (32, 0, 8)
    assert count(DarSampling(search=Search("groups", 3))) == (48, 3 * 10 * 40, 8)
    assert count(DarSampling(search=Search("end", 2, "likelihood"))) == (32, 2 * 2 * 16, 8)
    assert count(DarSampling(search=Search("end", 2, "bright.py"))) == (32, 0, 16)


def test_search_is_a_block_of_the_config():
    config = common.base()
    assert "search" not in read_config(config).sample.options
    config.sample.search.update(method="groups", num=4)
    options = read_config(config).sample.sampling(DarSampling())
    assert options.search == Search("groups", 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="beam", num=2), "search.method='beam' must be one of groups, end, smc"),
        (dict(num=2), "search.method='' and search.num=2 need each other"),
        (dict(method="smc"), "search.method='smc' and search.num=1 need each other"),
        (dict(method="smc", num=2, temperature=0.0), "search.temperature=0.0 must be above 0"),
    ],
)
def test_mistake_in_the_options_is_one_line(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Search(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(reward="nowhere.py"), "'nowhere.py' is neither likelihood, classifier nor a file"),
        (dict(reward="{wrong}"), "has no function reward(images, labels)"),
        (dict(reward="{broken}"), "fails: ZeroDivisionError: division by zero"),
        (dict(reward="{leaving}"), "fails: SystemExit: 0"),
        (dict(temperature=0.0), "temperature=0 draws equal candidates"),
        (dict(caption_mask=np.ones((2, 1))), "caption_mask is for models of captions"),
    ],
)
def test_mistake_is_found_before_anything_is_drawn(dar, tmp_path, options, message):
    (tmp_path / "wrong.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)\n")
    files = {name: str(tmp_path / f"{name}.py") for name in ("wrong", "broken", "leaving")}
    reward = options.pop("reward", "classifier").format(**files)
    with pytest.raises(ValueError, match=re.escape(message)):
        dar.stream(LABELS, rng=jax.random.key(0), search=Search("groups", 2, reward), **options)


def test_tokens_alone_have_no_groups_to_search(dar):
    with pytest.raises(ValueError, match="search needs the groups of a tokenizer"):
        dar.prior.generate_indices(LABELS, rng=jax.random.key(0), search=Search("end", 2))


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_few_steps_are_searched_by_their_previews(dar, tmp_path, num_steps):
    path = tmp_path / "bright.py"
    path.write_text(BRIGHT)
    how = Search("groups", 2, str(path))
    assert dar.generate(LABELS, rng=0, num_steps=num_steps, search=how).indices.shape == (2, 16)


def test_reward_is_a_real_number(dar, tmp_path):
    path = tmp_path / "complex.py"
    path.write_text("def reward(images, labels):\n    return images.mean((1, 2, 3)) + 1j\n")
    with pytest.raises(ValueError, match="returns complex64, and not real numbers"):
        dar.generate(LABELS, rng=0, search=Search("end", 2, str(path)))


def test_microbatch_bounds_the_candidates_that_are_decoded_at_a_time(dar, tmp_path, monkeypatch):
    path, rows, velocity = tmp_path / "bright.py", [], Tokenizer.velocity

    def recording(self, x, *arguments, **options):
        rows.append(len(x))
        return velocity(self, x, *arguments, **options)

    path.write_text(BRIGHT)
    how = Search("end", 3, str(path))
    expected = dar.generate(LABELS, rng=0, search=how)
    monkeypatch.setattr(Tokenizer, "velocity", recording)
    jax.clear_caches()
    found = dar.generate(LABELS, rng=0, search=how, microbatch=2)
    assert set(rows) == {2}
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.images, expected.images, atol=ROUNDING)
