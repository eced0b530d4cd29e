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
from dar_jax.nn.functional import FunctionalModel
from dar_jax.tasks.dar_tokenizer import training_forward
from tests.golden import fixtures, models

FOLDER = "dar/tokenizer_tiny"
LPIPS_FOLDER = "dar/lpips"
SEED = 11
FEATURE_SHAPE = (4, 256, 768)
FEATURE_STRIDE = 64
PERCEPTUAL_WEIGHT = 0.5
ALIGNMENT_WEIGHT = 0.5
ENTROPY_WEIGHT = 0.0
GRADIENTS = {
    "grad_core": "core_loss",
    "grad_fm": "fm_loss",
    "grad_vq": "vq_loss",
    "grad_commit": "commit_loss",
    "grad_total": "total_loss",
}
"""Prefix of the stored gradients, and of what."""
LPIPS = FunctionalModel(Lpips, LpipsConfig())


@functools.partial(jax.jit, static_argnames="model")
def losses_and_gradients(model, params, lpips_params, image, u, noise, target):
    """All terms, their pieces, and the stacked gradients of those in `GRADIENTS`."""

    def terms(params):
        tokenizer = model.bind(params)
        out = training_forward(tokenizer, image, u, noise)
        distances = tokenizer.quantizer.distances(out.quantized.z)
        lpips = LPIPS.bind(lpips_params)
        features = lpips.features(image), lpips.features(out.predicted), lpips.weights()
        values = {
            "fm_loss": out.flow_loss,
            "vq_loss": out.codebook_loss,
            "commit_loss": out.commitment_loss,
            "entropy_loss": ENTROPY_WEIGHT * entropy_loss(distances),
            "lpips_loss": jnp.mean(perceptual_distance(*features)),
            "repa_loss": alignment_loss(target, out.features),
        }
        values["core_loss"] = out.flow_loss + out.codebook_loss + out.commitment_loss
        values["total_loss"] = (
            values["core_loss"]
            + values["entropy_loss"]
            + PERCEPTUAL_WEIGHT * values["lpips_loss"]
            + ALIGNMENT_WEIGHT * values["repa_loss"]
        )
        return values, out

    values, pullback, out = jax.vjp(terms, params, has_aux=True)
    chosen = {name: jnp.float32([name == key for key in GRADIENTS.values()]) for name in values}
    return values, out, jax.vmap(pullback)(chosen)[0]


def test_losses_and_gradients_equal_the_reference():
    model, params = models.tokenizer(FOLDER)
    lpips_params = convert_lpips.from_reference(
        fixtures.load_state_dict(LPIPS_FOLDER), LPIPS.config, LPIPS.abstract_params()
    )
    with fixtures.Compare(FOLDER, "io_train") as golden:
        u = jnp.asarray(golden.arrays["time_steps"])
        image, noise = (
            jnp.asarray(einops.rearrange(golden.arrays[name], "b c h w -> b h w c"))
            for name in ("image_nchw", "noise")
        )
        target = fixtures.make(SEED, "input/repa_features", FEATURE_SHAPE)
        values, out, gradients = losses_and_gradients(
            model, params, lpips_params, image, u, noise, target
        )
        golden.check_all(**values)
        golden.check_all(
            query_ids=window_start(u, model.config)[:, None] + jnp.arange(model.config.window),
            dead_code_rate=dead_code_rate(out.quantized.codes),
            shifted_time=out.t,
            predict_x1=einops.rearrange(out.predicted, "b h w c -> b c h w"),
            h_repa_sub=out.features[:2, ::FEATURE_STRIDE],
        )
        check_gradients(golden, model.config, gradients)


def check_gradients(golden, config, gradients):
    """Compare gradients under the reference's names."""
    for i, prefix in enumerate(GRADIENTS):
        gradient = jax.tree.map(lambda leaf, i=i: leaf[i], gradients)
        named = to_state_dict(convert.tokenizer_rules(config), gradient)
        for array in golden.spec:
            if array == f"{prefix}_global_norm":
                golden.check(array, optax.tree.norm(gradient))
            elif array.startswith(f"{prefix}/"):
                # Of the two tables only the rows in use are stored.
                rows = len(golden.arrays[array])
                golden.check(array, named[array.split("/")[1]][:rows])
