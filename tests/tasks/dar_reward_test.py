"""Training by reward: what a token is blamed for, and that rewards grow."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import mnist
from dar_jax.config import build as read_config
from dar_jax.kinds.loading import build_task, from_pretrained
from dar_jax.modes import train
from dar_jax.nn.compute import Compute
from dar_jax.nn.linear import keep_parts
from dar_jax.tasks.base import FrozenModel
from dar_jax.tasks.dar_reward import DarRewardTask, RewardConfig
from tests.golden import models

ROUNDING = 1e-4
BRIGHT = "def reward(images, labels):\n    return images.mean(axis=(1, 2, 3))\n"


def task_of(**loss):
    prior, tokenizer = models.prior("dar/gpt_tiny"), models.tokenizer("dar/tokenizer_tiny")
    options = {"trained": FrozenModel(*prior), "from_codes": True}
    config = RewardConfig(**loss)
    return DarRewardTask(
        prior[0].config, FrozenModel(*tokenizer), Compute(), loss=config, **options
    )


REWARDS = jnp.array([[0.0, 1.0, 1.0, 2.0], [0.0, 0.0, 3.0, 4.0]])
"""Of two samples after each of four groups: the second is as good, worse, better and better."""


def test_tokens_are_judged_by_what_they_may_have_changed():
    advantages = task_of(group_size=2)._advantages(REWARDS)
    groups = advantages.reshape(2, 4, -1)
    np.testing.assert_array_equal(groups, np.broadcast_to(groups[..., :1], groups.shape))
    # The scores of the second are 0, -1, 1 and 1; of each, the mean of those from there on.
    np.testing.assert_allclose(groups[1, :, 0], [1 / 4, 1 / 3, 1, 1], rtol=5 * ROUNDING)
    np.testing.assert_allclose(groups[0], -groups[1], rtol=ROUNDING)


def test_tokens_are_judged_by_the_image_alone():
    advantages = task_of(group_size=2, dense=False)._advantages(REWARDS)
    np.testing.assert_allclose(advantages[1], 1.0, rtol=2 * ROUNDING)


def test_equal_samples_teach_nothing():
    advantages = task_of(group_size=2)._advantages(REWARDS[:1].repeat(2, axis=0))
    np.testing.assert_array_equal(advantages, 0.0)


def test_first_step_diverges_from_nothing_and_changes_what_is_likely():
    """The gradient is that of a weighted log-likelihood of the tokens that were drawn."""
    task = task_of(group_size=4, reward="likelihood")
    model, params = models.prior("dar/gpt_tiny")
    batch = {"label": jnp.array([3, 1])}
    rng, frozen = jax.random.key(0), task.frozen()
    (_, outputs), grads = jax.value_and_grad(task.loss, has_aux=True)(params, batch, rng, frozen)
    np.testing.assert_allclose(outputs["divergence"], 0.0, atol=1e-6)
    labels = batch["label"].repeat(4)
    indices, rewards = task._rollout(params, labels, rng, frozen)
    weights = task._advantages(rewards)

    def expected(params):
        log_p = jax.nn.log_softmax(model.bind(params).logits(labels, indices[:, :-1]))
        return -jnp.mean(weights * jnp.take_along_axis(log_p, indices[..., None], axis=-1)[..., 0])

    for own, other in zip(
        jax.tree.leaves(grads), jax.tree.leaves(jax.grad(expected)(params)), strict=True
    ):
        np.testing.assert_allclose(own, other, atol=ROUNDING * float(jnp.abs(other).max() + 1e-6))


def test_weights_gathered_in_another_dtype_draw_the_tokens_of_their_copies():
    task, (_, params) = task_of(group_size=4, reward="likelihood"), models.prior("dar/gpt_tiny")
    copies = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    inputs = jnp.array([3, 1]).repeat(4), jax.random.key(0), task.frozen()
    found = task._rollout(keep_parts(copies, params), *inputs)
    expected = task._rollout(copies, *inputs)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_batch_too_far_from_the_reference_only_leads_back():
    """The gradient is that of the divergence; with a limit above it, it is not."""
    batch, rng = {"label": jnp.array([3, 1])}, jax.random.key(0)
    model, reference = models.prior("dar/gpt_tiny")
    params = jax.tree.map(lambda leaf: 1.5 * leaf, reference)
    grads, divergence = {}, None
    for limit in (1e-3, 1e3):
        task = task_of(group_size=4, reward="likelihood", max_divergence=limit)
        gradient = jax.grad(task.loss, has_aux=True)
        grads[limit], outputs = gradient(params, batch, rng, task.frozen())
        divergence = float(outputs["divergence"].mean())
    assert 1e-3 < divergence < 1e3
    indices, _ = task._rollout(params, batch["label"].repeat(4), rng, task.frozen())

    def expected(params):
        of = [
            model.bind(p).logits(batch["label"].repeat(4), indices[:, :-1])
            for p in (params, reference)
        ]
        log_p, log_q = map(jax.nn.log_softmax, of)
        return task.config.kl_weight * jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    def assert_equal(own, other):
        scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(other))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=ROUNDING * scale), own, other
        )

    assert_equal(grads[1e-3], jax.grad(expected)(params))
    with pytest.raises(AssertionError):
        assert_equal(grads[1e3], grads[1e-3])


def rewarded(**changes):
    config = mnist.get_config("dar_reward")
    config.train.update(steps=2, log_every=1, image_every=0)
    config.data.batch_size = 8
    config.loss.group_size = 4
    config.update_from_flattened_dict(changes)
    return read_config(config)


@pytest.mark.slow
def test_pictures_are_judged_by_a_file(tmp_path):
    """Digits get brighter, and what is released is a prior."""
    (tmp_path / "bright.py").write_text(BRIGHT)
    changes = {
        "loss.reward": str(tmp_path / "bright.py"),
        "train.steps": 12,
        "optimizer.learning_rate": 3e-3,
        "optimizer.warmup_steps": 0,
        "loss.kl_weight": 0.0,
        "loss.num_steps": 4,
    }
    train.train_and_evaluate(rewarded(**changes), str(tmp_path / "run"))
    curve = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rewards = [line["train/reward"] for line in curve if "train/reward" in line]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.05
    assert curve[-1]["train/divergence"] > 0
    assert from_pretrained(tmp_path / "run").prior.config.num_classes == 10
    (tmp_path / "bright.py").write_text(BRIGHT.replace("images.", "-images."))
    with pytest.raises(ValueError, match=r"another loss.reward \([0-9a-f]{12}, now ") as caught:
        train.train_and_evaluate(rewarded(**{**changes, "train.steps": 14}), str(tmp_path / "run"))
    assert "allow_change" not in str(caught.value)


REFUSED = {
    "group_size=1 must be at least 2": {"loss.group_size": 1},
    "kl_weight=-1.0 must be at least 0": {"loss.kl_weight": -1.0},
    "num_steps=-1 must be in 1..10000": {"loss.num_steps": -1},
    "max_divergence=0.5 must be .* needs a kl_weight=0.0 above 0": {
        "loss.max_divergence": 0.5,
        "loss.kl_weight": 0.0,
    },
    "'nowhere.py' is neither likelihood, classifier nor a file": {"loss.reward": "nowhere.py"},
    "vocab_size=300, but the tokenizer": {"model.vocab_size": 300},
    "decode_weights=int8 draws with another model than learns": {"compute.decode_weights": "int8"},
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_be_rewarded_is_refused(line):
    with pytest.raises(ValueError, match=line):
        build_task(rewarded(**REFUSED[line]))
