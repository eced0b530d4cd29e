"""One training pass of the tokenizer with given draws: losses and gradients of the reference."""

import functools

import einops
import jax
import jax.numpy as jnp
import optax

from dar_jax.convert import dar as convert
from dar_jax.convert import lpips as convert_lpips
from dar_jax.convert.rules import to_state_dict
from dar_jax.losses.alignment import alignment_loss
from dar_jax.losses.perceptual import perceptual_distance
from dar_jax.models.dar.quantizer import dead_code_rate, entropy_loss
from dar_jax.models.dar.tokenizer import window_start
from dar_jax.models.frozen.lpips import Lpips, LpipsConfig
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.tasks.dar_tokenizer import training_forward
from tests.golden import fixtures, models

FOLDER = "dar/tokenizer_tiny"
LPIPS_FOLDER = "dar/lpips"
SEED = 11
FEATURE_SHAPE = (4, 256, 768)
FEATURE_STRIDE = 64
ENTROPY_RATIO = 0.0
CORE = {"fm_loss": 1.0, "vq_loss": 1.0, "commit_loss": 1.0}
TERMS = {
    "core": CORE,
    "fm": {"fm_loss": 1.0},
    "vq": {"vq_loss": 1.0},
    "commit": {"commit_loss": 1.0},
    "total": CORE | {"entropy_loss": 1.0, "lpips_loss": 0.5, "repa_loss": 0.5},
}
"""The sums of terms whose gradients are stored, and the weights of the terms."""
LPIPS = FunctionalModel(Lpips, LpipsConfig())


@functools.partial(jax.jit, static_argnames="model")
@functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
def weighted_loss(model, params, weights, lpips_slope, image, u, noise, target):
    """Sum of the terms with `weights`; also the terms and what they were computed from.

    LPIPS enters through its gradient at the prediction: its network then runs only once.
    """
    tokenizer = model.bind(params)
    out = training_forward(tokenizer, image, u, noise)
    distances = tokenizer.quantizer.distances(out.quantized.z)
    terms = {
        "fm_loss": out.flow_loss,
        "vq_loss": out.codebook_loss,
        "commit_loss": out.commitment_loss,
        "entropy_loss": ENTROPY_RATIO * entropy_loss(distances),
        "repa_loss": alignment_loss(target, out.features),
    }
    loss = weights["lpips_loss"] * jnp.sum(lpips_slope * out.predicted)
    return loss + sum(weights[name] * term for name, term in terms.items()), (terms, out)


@jax.jit
def lpips_and_slope(lpips_params, image, predicted):
    """Mean distance and its gradient with respect to the prediction."""

    def distance(predicted):
        lpips = LPIPS.bind(lpips_params)
        features = lpips.features(image), lpips.features(predicted), lpips.weights()
        return jnp.mean(perceptual_distance(*features))

    return jax.value_and_grad(distance)(predicted)


def weights_of(key):
    return {name: jnp.float32(TERMS[key].get(name, 0.0)) for name in TERMS["total"]}


def test_losses_and_gradients_equal_the_reference():
    model, params = models.tokenizer(FOLDER)
    state_dict = fixtures.load_state_dict(LPIPS_FOLDER)
    lpips_params = jax.device_put(
        convert_lpips.from_reference(state_dict, LPIPS.config, LPIPS.abstract_params())
    )
    with fixtures.Compare(FOLDER, "io_train") as golden:
        u = jnp.asarray(golden.arrays["time_steps"])
        image, noise = (
            jnp.asarray(einops.rearrange(golden.arrays[name], "b c h w -> b h w c"))
            for name in ("image_nchw", "noise")
        )
        target = jnp.asarray(fixtures.make(SEED, "input/repa_features", FEATURE_SHAPE))

        def run(key, lpips_slope):
            draws = (image, u, noise, target)
            (_, aux), gradient = weighted_loss(model, params, weights_of(key), lpips_slope, *draws)
            return *aux, gradient

        _, out, _ = run("core", jnp.zeros_like(image))
        lpips, slope = lpips_and_slope(lpips_params, image, out.predicted)
        for key, weights in TERMS.items():
            terms, _, gradient = run(key, slope)
            terms["lpips_loss"] = lpips
            if f"{key}_loss" in golden.spec:
                total = sum(weight * terms[name] for name, weight in weights.items())
                golden.check(f"{key}_loss", total)
            check_gradient(golden, model.config, f"grad_{key}", gradient)
        golden.check_all(**terms)
        golden.check_all(
            query_ids=window_start(u, model.config)[:, None] + jnp.arange(model.config.window),
            dead_code_rate=dead_code_rate(out.quantized.codes),
            shifted_time=out.t,
            predict_x1=einops.rearrange(out.predicted, "b h w c -> b c h w"),
            h_repa_sub=out.features[:2, ::FEATURE_STRIDE],
        )


def check_gradient(golden, config, prefix, gradient):
    """Compare a gradient under the reference's names."""
    gradient = jax.device_get(gradient)
    named = to_state_dict(convert.tokenizer_rules(config), gradient)
    for array in golden.spec:
        if array == f"{prefix}_global_norm":
            golden.check(array, optax.tree.norm(gradient))
        elif array.startswith(f"{prefix}/"):
            # Of the two tables only the rows in use are stored.
            rows = len(golden.arrays[array])
            golden.check(array, named[array.split("/")[1]][:rows])
