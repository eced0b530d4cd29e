"""TransDiff against the reference: encoder, decoder, losses, gradients and sampling."""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dar_jax.convert import transdiff as convert
from dar_jax.convert.rules import to_state_dict
from dar_jax.flow import solvers
from dar_jax.flow.path import interpolate
from dar_jax.flow.times import logit_normal_times
from dar_jax.models.transdiff import sampler
from dar_jax.models.transdiff.decoder import TIME_FEATURES
from dar_jax.models.transdiff.options import TransDiffSampling
from dar_jax.nn.embeddings import timestep_features
from dar_jax.nn.patch import patchify, unpatchify
from dar_jax.pipelines.transdiff import LatentPipeline
from dar_jax.tasks.transdiff import NUM_LEVELS, image_losses
from tests.golden import fixtures, models

ONE_STEP = ("transdiff/transdiff_tiny", "transdiff/transdiff_512_tiny")
MRAR = "transdiff/transdiff_mrar_tiny"
FOLDERS = (*ONE_STEP, MRAR)
GRADIENT_TOLERANCE = 2e-3
"""Of a tensor's largest norm, sum or element; the reference's float32 gradients are about 3e-4 off
those in float64, see `train_grad_norm`."""
ZERO_IN_THEORY = ("wk.bias",)
"""The softmax does not see a bias of all keys: what is left is rounding. So is the key third of
`qkv.bias`, but nothing beside the others."""
ROUNDING = 1e-6
"""Far above it, and far below every other gradient."""


def to_nhwc(latents):
    return einops.rearrange(jnp.asarray(latents), "... c h w -> ... h w c")


def to_nchw(latents):
    return einops.rearrange(np.asarray(latents), "... h w c -> ... c h w")


def to_grid(tokens):
    """[..., N, C] tokens of a square as [..., h, w, C]."""
    side = int(tokens.shape[-2] ** 0.5)
    return einops.rearrange(jnp.asarray(tokens), "... (h w) c -> ... h w c", h=side)


def to_tokens(latents):
    return einops.rearrange(np.asarray(latents), "... h w c -> ... (h w) c")


class Training:
    """Inputs of the training loss in our layout: [B, images, copies], copies side by side."""

    def __init__(self, folder, arrays):
        self.model, self.params = models.transdiff(folder)
        several = self.model.config.num_references > 1
        latents = arrays["imgs"] if several else arrays["imgs"][None]
        self.latents = to_nhwc(einops.rearrange(latents, "k b c h w -> b k c h w"))
        batch = {"b": len(self.latents)}
        draws = "k (copies b) -> b k copies", "k (copies b) n c -> b k copies n c"
        normals, noise = arrays["train_normals"], arrays["train_noise"]
        if not several:
            normals, noise = normals[None], noise[None]
        self.normals = jnp.float32(einops.rearrange(normals, draws[0], **batch))
        self.noise = to_grid(einops.rearrange(noise, draws[1], **batch))
        self.labels = jnp.int32(arrays["labels"])
        self.drop = jnp.asarray(arrays["train_drop_uniform"])

    def losses(self, params, labels):
        model = self.model.bind(params)
        condition = model.condition(labels, self.latents[:, :-1])
        draws = self.latents, self.normals, self.noise
        return image_losses(model, condition, *draws, num_levels=NUM_LEVELS)

    @functools.cached_property
    def evaluation(self):
        """Losses [B, images, copies] in evaluation mode."""
        return jax.jit(self.losses)(self.params, self.labels)

    @functools.cached_property
    def training(self):
        """Losses and gradient in training mode; dropout is off, the dropped labels are given."""

        def loss(params):
            labels = self.model.bind(params).drop_labels(self.labels, self.drop)
            losses = self.losses(params, labels)
            return jnp.mean(losses), losses

        (_, losses), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(self.params)
        return losses, grads


@functools.cache
def training(folder):
    return Training(folder, fixtures.load_io(folder)[0])


@functools.partial(jax.jit, static_argnames="model")
def encoder_parts(model, params, labels, uncond, probe):
    module = model.bind(params)
    encoder, none = module.encoder, jnp.zeros((1, 0, 1, 1, 1))
    embedded = encoder.embed(labels[:1], none)
    return dict(
        enc_in_ln_b0=embedded,
        enc_block0_b0=encoder.stack(embedded, None, stop=1),
        enc_z=module.condition(labels),
        enc_z_uncond=module.condition(uncond),
        eps_probe_z_proj_ln=encoder.input_norm(probe),
        eps_probe_encoder_norm=encoder.norm(probe),
        eps_probe_encoder_block=encoder.stack(probe, None, stop=1),
    )


@functools.partial(jax.jit, static_argnames="model")
def decoder_parts(model, params, x, t, condition, times, probe):
    decoder = model.bind(params).decoder
    time, modulation = decoder.embed_time(times)
    context = condition[:1]
    probe_caches = decoder.stack.each(lambda block: block.cross_attention.keys_values(context))
    caches = decoder.keys_values(condition)
    first = decoder.stack(
        decoder.embed(x), decoder.embed_time(t)[1], None, per_layer=caches, stop=1
    )
    return dict(
        time_temb=time,
        time_proj=einops.rearrange(modulation, "b six d -> b (six d)"),
        net_block0_b0=first[:1],
        net_out=to_tokens_jnp(-decoder.velocity(x, 1 - t, caches)),
        eps_probe_decoder_block=decoder.stack(
            probe, modulation[2:3], None, per_layer=probe_caches, stop=1
        ),
        eps_probe_final=decoder.final_layer(probe, time[2:3]),
    )


def to_tokens_jnp(latents):
    return einops.rearrange(latents, "b h w c -> b (h w) c")


def check_present(golden, values):
    """Check those of the values that the folder has."""
    golden.check_all(**{name: value for name, value in values.items() if name in golden.arrays})


def check_samples(golden, folder, without=()):
    """Run the sampler as listed in the folder's config with its noise."""
    config = fixtures.load_json(folder, "config")
    pipeline = LatentPipeline(*models.transdiff(folder))
    arrays = golden.arrays
    noise = to_grid(arrays["sample_noise"])
    for run in config["sampling_runs"]:
        if run["name"] in without:
            continue
        steps = run["num_sampling_steps"]
        step_noise = to_grid(arrays["sample_step_noise"])
        step_noise = step_noise[..., : steps - 1, :, :, :, :]
        options = dict(
            noise=noise,
            step_noise=step_noise,
            num_steps=steps,
            guidance_scale=run["cfg"],
            drift_scale=run["scale_0"],
            noise_scale=run["scale_1"],
        )
        latents = pipeline.sample_latents(arrays["labels"], **options)
        golden.check(f"sample_{run['name']}", to_nchw(latents))


@pytest.mark.parametrize("folder", [ONE_STEP[0], pytest.param(ONE_STEP[1], marks=pytest.mark.slow)])
def test_one_step_model_equals_the_reference(folder):
    model, params = models.transdiff(folder)
    with fixtures.Compare(folder) as golden:
        arrays = golden.arrays
        latents = to_nhwc(arrays["imgs"])
        grid = latents.shape[1:3]
        golden.check("patchify_out", patchify(latents, 1))
        values = dict(patchify_p2_out=patchify(latents, 2))
        if "unpatchify_in" in arrays:
            values["unpatchify_out"] = to_nchw(
                unpatchify(jnp.asarray(arrays["unpatchify_in"]), 1, grid)
            )
        null = jnp.int32([model.config.num_classes])
        probe, labels = arrays["eps_probe_in"], jnp.int32(arrays["labels"])
        times, t = arrays["time_t"] / 1000, arrays["net_t"] / 1000
        x, condition = to_grid(arrays["net_x"]), arrays["net_c"]
        values |= encoder_parts(model, params, labels, null, probe)
        values |= decoder_parts(model, params, x, t, condition, times, probe)
        values["time_features"] = timestep_features(jnp.asarray(times), TIME_FEATURES)
        check_present(golden, values)
        check_losses(golden, folder)
        check_samples(golden, folder)
        if "sample_x_steps" in arrays:
            check_trajectory(golden, folder)


def check_losses(golden, folder):
    """Times, losses and gradients."""
    run = training(folder)
    t = logit_normal_times(run.normals, NUM_LEVELS)
    levels = einops.rearrange(jnp.round(NUM_LEVELS * (1 - t)), "b k copies -> k (copies b)")
    shape = golden.arrays["train_timesteps"].shape
    golden.check("train_timesteps", np.int64(levels).reshape(shape))
    losses, grads = run.training
    golden.check("loss_eval", jnp.mean(run.evaluation))
    golden.check("loss_train", jnp.mean(losses))
    golden.check("train_grad_norm", optax.tree.norm(grads))
    parts = dict(loss_eval_parts=run.evaluation, loss_train_parts=losses)
    check_present(golden, {name: jnp.mean(part, axis=(0, 2)) for name, part in parts.items()})
    if "train_net_out_eval" in golden.arrays:
        golden.check("train_net_out_eval", predictions(run))


def predictions(run):
    """The reference's prediction, noise - data, at the noisy latents of training."""
    model = run.model.bind(run.params)
    copies = run.normals.shape[-1]
    data = einops.repeat(run.latents, "b 1 h w c -> (b copies) h w c", copies=copies)
    noise = einops.rearrange(run.noise, "b 1 copies h w c -> (b copies) h w c")
    t = logit_normal_times(run.normals, NUM_LEVELS).reshape(-1)
    caches = model.decoder.keys_values(model.condition(run.labels))
    predicted = -model.decoder.velocity(interpolate(data, noise, t), t, caches)
    return to_tokens(einops.rearrange(predicted, "(b m) ... -> (m b) ...", m=copies))


def check_trajectory(golden, folder):
    """State and time of every network call of the guided run."""
    model, params = models.transdiff(folder)
    arrays = golden.arrays
    run = {r["name"]: r for r in fixtures.load_json(folder, "config")["sampling_runs"]}["cfg"]
    config = TransDiffSampling(
        num_steps=run["num_sampling_steps"],
        guidance_scale=(run["cfg"],),
        drift_scale=run["scale_0"],
        noise_scale=run["scale_1"],
    )
    noise = to_grid(arrays["sample_noise"])
    labels, references = jnp.int32(arrays["labels"]), jnp.zeros((2, 0, *noise.shape[1:]))
    caches = sampler.condition_caches(model, params, labels, references, guided=True)
    state, states = solvers.start(jnp.asarray(noise)), []
    step_noise = to_grid(arrays["sample_step_noise"])
    for i in range(config.num_steps):
        states.append(to_tokens(state.x))
        state, _ = sampler.advance(
            model,
            params,
            caches,
            state,
            config.grid[i : i + 2],
            config.coefficients.select(slice(i, i + 1)),
            step_noise[min(i, len(step_noise) - 1)][None],
            scale=run["cfg"],
            interval=config.guided_times,
        )
    golden.check("sample_x_steps", np.stack(states))
    golden.check("sample_time_inputs", 1000 * (1 - config.grid[:-1]))


@pytest.mark.parametrize("folder", FOLDERS)
def test_gradients_equal_the_reference(folder):
    model, _ = models.transdiff(folder)
    _, grads = training(folder).training
    ours = to_state_dict(convert.transdiff_rules(model.config), grads)
    expected = fixtures.load_json(folder, "grads")
    assert set(ours) == set(expected)
    for name, reference in expected.items():
        gradient = np.asarray(ours[name], np.float64)
        if name.endswith(ZERO_IN_THEORY):
            assert np.linalg.norm(gradient) < ROUNDING and reference["norm"] < ROUNDING, name
            continue
        if reference is None:
            assert not gradient.any(), name
            continue
        tolerance = GRADIENT_TOLERANCE * max(reference["norm"], 1e-3)
        assert abs(np.linalg.norm(gradient) - reference["norm"]) < tolerance, name
        np.testing.assert_allclose(
            gradient.ravel()[:4], reference["head"], atol=tolerance, err_msg=name
        )
        # A sum of n elements is as large as sqrt(n) norms and may cancel.
        assert abs(gradient.sum() - reference["sum"]) < tolerance * gradient.size**0.5, name


def test_mrar_model_equals_the_reference():
    model, params = models.transdiff(MRAR)
    run = training(MRAR)
    with fixtures.Compare(MRAR) as golden:
        arrays = golden.arrays
        references = run.latents[:, :3]
        golden.check("ref_tokens", np.stack([patchify(references[:, k], 2) for k in range(3)]))
        bound = model.bind(params)
        golden.check("attention_mask", bound.encoder.mask(3))
        positions = params["encoder"]["condition_position_table"]
        null = jnp.int32([model.config.num_classes])
        condition = jax.jit(lambda p, *a: model.bind(p).condition(*a))
        z = condition(params, run.labels, references)
        uncond = condition(params, null, references[:1, :1])
        golden.check("z_full", z)
        golden.check("enc_out", z - positions)
        golden.check("enc_uncond", uncond - positions[: uncond.shape[1]])
        x = to_grid(arrays["sample_noise"][:1])
        velocity = jax.jit(lambda p, *a: model.bind(p).decoder.velocity(*a))
        for k, t in enumerate((246.5, 496.5, 746.5, 996.5)):
            caches = bound.decoder.keys_values(jnp.asarray(arrays["z_full"][:1, : 64 * (k + 1)]))
            golden.check(
                f"net_out_{k + 1}",
                to_tokens(-velocity(params, x, 1 - jnp.float32([t / 1000]), caches)),
            )
        check_losses(golden, MRAR)
        check_samples(golden, MRAR, without=IN_PASSES)
        check_passes(golden)


IN_PASSES = ("nocfg", "cfg_list")


def check_passes(golden):
    """Results of the first three passes and of the last."""
    model, params = models.transdiff(MRAR)
    arrays = golden.arrays
    labels, noise = jnp.int32(arrays["labels"]), jnp.asarray(to_grid(arrays["sample_noise"]))
    step_noise = jnp.asarray(to_grid(arrays["sample_step_noise"]))
    runs = {r["name"]: r for r in fixtures.load_json(MRAR, "config")["sampling_runs"]}
    for name in IN_PASSES:
        run = runs[name]
        config = TransDiffSampling(
            num_steps=run["num_sampling_steps"],
            guidance_scale=tuple(run["cfg"]),
            drift_scale=run["scale_0"],
            noise_scale=run["scale_1"],
        )
        passes = list(sampler.run(model, params, labels, noise, step_noise, config))
        results = np.stack([progress.latents for progress in passes])
        golden.check(f"iters_{name}", to_nchw(results[:3]))
        golden.check(f"sample_{name}", to_nchw(results[-1]))
    references = jnp.asarray(results[:3].swapaxes(0, 1))
    bound = model.bind(params)
    for k in range(4):
        condition = bound.condition(labels[:1], references[:1, :k])
        golden.check(f"iter_z{k}", condition)
