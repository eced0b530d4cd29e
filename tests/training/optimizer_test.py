"""Learning-rate rows of the reference, weight-decay groups, clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.tasks.base import DISCRIMINATOR
from dar_jax.training.optimizer import (
    MUON_UPDATE_RMS,
    OptimizerConfig,
    check_names,
    learning_rate_schedule,
    make_optimizer,
    trained_gradients,
    weight_decay_mask,
)
from tests.golden import fixtures

TOKENIZER = OptimizerConfig(learning_rate=2e-4, warmup_steps=500)
PRIOR = OptimizerConfig(
    learning_rate=1e-4,
    warmup_steps=0,
    decay_start=300_000,
    decay_end=360_000,
    final_learning_rate=1e-5,
)


@pytest.mark.parametrize(("row", "config"), [("lr_tokenizer", TOKENIZER), ("lr_ar", PRIOR)])
def test_learning_rate_equals_the_reference(row, config):
    golden = fixtures.Compare("dar/schedules")
    rates = jax.vmap(learning_rate_schedule(config))(golden.arrays["lr_steps"])
    golden.check(row, rates * jnp.ones(len(golden.arrays["lr_steps"])))


def _params():
    return {
        "blocks": {
            "mlp": {"kernel": jnp.ones((3, 4, 5)), "bias": jnp.ones((3, 5))},
            "norm": {"scale": jnp.ones((3, 4))},
        },
        "head": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)},
        "text": {"null_caption": jnp.ones((4, 5))},
    }


def test_weight_decay_touches_matrices_only():
    mask = weight_decay_mask(_params())
    assert mask == {
        "blocks": {"mlp": {"kernel": True, "bias": False}, "norm": {"scale": False}},
        "head": {"kernel": True, "bias": False},
        "text": {"null_caption": False},
    }


def test_parameters_can_be_exempt_from_weight_decay():
    mask = weight_decay_mask(_params(), undecayed="head/")
    assert mask["blocks"]["mlp"]["kernel"] and not mask["head"]["kernel"]


def test_pattern_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"trained 'decoder\(' is not a regular expression"):
        OptimizerConfig(trained="decoder(")


@pytest.mark.parametrize("name", ["trained", "undecayed"])
def test_pattern_that_starts_no_name_is_refused(name):
    with pytest.raises(
        ValueError, match=rf"optimizer\.{name}='hed/' is how .* blocks/, head/, text/"
    ):
        check_names(OptimizerConfig(**{name: "hed/"}), _params())
    check_names(OptimizerConfig(**{name: "head/"}), _params())
    check_names(OptimizerConfig(**{name: "(text|hed)/"}), _params())
    check_names(
        OptimizerConfig(**{name: f"{DISCRIMINATOR}/"}), {**_params(), DISCRIMINATOR: {"w": 0}}
    )


def test_discriminator_is_trained_beside_what_is_chosen():
    params = {**_params(), DISCRIMINATOR: {"head": {"kernel": jnp.ones((2, 2))}}}
    config = OptimizerConfig(trained="text/")
    check_names(config, params)
    grads = trained_gradients(config, params)
    assert {name: bool(jax.tree.leaves(tree)[0].any()) for name, tree in grads.items()} == {
        **dict.fromkeys(("blocks", "head"), False),
        **dict.fromkeys(("text", DISCRIMINATOR), True),
    }


def test_update_without_gradient_is_weight_decay_alone():
    params = _params()
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.1)
    optimizer = make_optimizer(config)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    expected = jax.tree.map(lambda matrix: -0.05 if matrix else 0.0, weight_decay_mask(params))
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-6), updates, expected)


def test_gradient_is_clipped_to_the_global_norm():
    params = {"kernel": jnp.zeros((2, 2))}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_steps=0, eps=1.0))
    state = optimizer.init(params)
    small, _ = optimizer.update({"kernel": jnp.full((2, 2), 0.5)}, state, params)
    large, _ = optimizer.update({"kernel": jnp.full((2, 2), 50.0)}, state, params)
    np.testing.assert_allclose(small["kernel"], large["kernel"], rtol=1e-5)


def test_decay_that_ends_before_it_starts_is_refused():
    with pytest.raises(ValueError, match="decay from step 10 to 5"):
        OptimizerConfig(warmup_steps=0, decay_start=10, decay_end=5)
    with pytest.raises(ValueError, match=r"ema_decay 1\.0"):
        OptimizerConfig(ema_decay=1.0)


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), _params())
    config = OptimizerConfig(name="muon", learning_rate=1.0, warmup_steps=0, clip_norm=1e9)
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    for kernel in (*updates["blocks"]["mlp"]["kernel"], updates["head"]["kernel"]):
        values = np.linalg.svd(kernel, compute_uv=False)
        assert values.max() / values.min() < 2  # the gradient's own ratio is several times larger
        assert np.sqrt(np.mean(np.square(kernel))) == pytest.approx(MUON_UPDATE_RMS, rel=0.3)
    bias = updates["blocks"]["mlp"]["bias"] / -np.sign(params["blocks"]["mlp"]["bias"])
    np.testing.assert_allclose(bias, bias[0, 0], rtol=1e-3)  # Adam's first step is the sign
    assert bias[0, 0] > 0


def test_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="'sgd'"):
        OptimizerConfig(name="sgd")
