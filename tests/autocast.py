"""The references' arithmetic in training, from their text: what PyTorch's autocast makes of it.

Matrix products take and give `low`, and sum in `wide`; norms, gates, embeddings and what is added
to them are `wide`; activations are computed in `wide` and rounded. With both dtypes float64 it is
the exact model. Parameters are those of `dar_jax`, whose modules this does not use.
"""

import dataclasses
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Autocast:
    low: Any = jnp.bfloat16
    wide: Any = jnp.float32

    def linear(self, p, x):
        kernel = p["kernel"].astype(self.low)
        y = jnp.matmul(x.astype(self.low), kernel, preferred_element_type=self.wide)
        if "bias" in p:
            y += p["bias"].astype(self.low).astype(self.wide)
        return y.astype(self.low)

    def silu(self, x):
        return jax.nn.silu(x.astype(self.wide)).astype(x.dtype)

    def mlp(self, p, x):
        return self.linear(p["down"], self.silu(self.linear(p["up"], x)))

    def layer_norm(self, x, p=None):
        x = x.astype(self.wide)
        x -= jnp.mean(x, axis=-1, keepdims=True)
        x /= jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        return x if p is None else x * p["scale"] + p["bias"]

    def rms_norm(self, p, x):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * p["scale"]

    def rotate(self, x, angles):
        if angles is None:
            return x
        cos, sin = (f(jnp.asarray(angles, self.wide))[:, None] for f in (jnp.cos, jnp.sin))
        even, odd = (x[..., i::2].astype(self.wide) for i in (0, 1))
        pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
        return pairs.reshape(x.shape).astype(x.dtype)

    def attention(self, p, x, context=None, *, heads, q_angles=None, k_angles=None, mask=None):
        context = x if context is None else context
        split = lambda y: einops.rearrange(y, "b n (h d) -> b n h d", h=heads)  # noqa: E731
        q, k, v = (
            split(self.linear(p[n], y)) for n, y in (("q", x), ("k", context), ("v", context))
        )
        if "q_norm" in p:
            q = self.layer_norm(q, p["q_norm"]).astype(self.low)
            k = self.layer_norm(k, p["k_norm"]).astype(self.low)
        q, k = self.rotate(q, q_angles), self.rotate(k, k_angles)
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=self.wide)
        scores /= np.sqrt(q.shape[-1])
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.low)
        out = jnp.einsum("bhnm,bmhd->bnhd", weights, v, preferred_element_type=self.wide)
        return self.linear(p["out"], einops.rearrange(out.astype(self.low), "b n h d -> b n (h d)"))

    def stack(self, block, p, x):
        body = lambda x, layer: (block(layer, x), None)  # noqa: E731
        return jax.lax.scan(body, x, p["blocks"])[0]


def prior_loss(cast, params, config, labels, indices):
    """Cross-entropy of the prior, without dropout."""
    tables = (params[name]["embedding"] for name in ("condition_embed", "token_embed"))
    of_class, of_token = tables
    x = jnp.concatenate([of_class[labels][:, None], of_token[indices[:, :-1]]], axis=1)
    angles = angles_of(np.arange(x.shape[1]), config.head_dim)
    options = dict(q_angles=angles, k_angles=angles, mask=np.tri(x.shape[1], dtype=bool))

    def block(p, x):
        h = cast.rms_norm(p["attention_norm"], x)
        x = x + cast.attention(p["attention"], h, heads=config.num_heads, **options)
        h, ffn = cast.rms_norm(p["ffn_norm"], x), p["ffn"]
        gated = cast.silu(cast.linear(ffn["gate"], h)) * cast.linear(ffn["up"], h)
        return x + cast.linear(ffn["down"], gated)

    hidden = cast.rms_norm(params["norm"], cast.stack(block, params["stack"], x))
    logits = cast.linear(params["output"], hidden).astype(cast.wide)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.mean(jnp.take_along_axis(log_probs, indices[..., None], axis=-1))


def tokenizer_loss(cast, params, config, batch):
    """Flow loss of the tokenizer whose codes are given, and whose window is the first one."""
    encoder, decoder = params["encoder"], params["decoder"]
    image, noise, t, nearest = batch
    heads, tokens = config.encoder.dim // config.encoder.head_dim, config.num_tokens

    def block(p, x, **options):
        h = cast.layer_norm(x, p["norm1"])
        x = x + p["gate1"] * cast.attention(p["attention"], h, heads=heads, **options)
        return x + p["gate2"] * cast.mlp(p["mlp"], cast.layer_norm(x, p["norm2"]))

    patches = patches_of(image, config.encoder.patch_size)
    queries = cast.linear(encoder["query_projection"], encoder["query_table"][:tokens])
    queries = jnp.broadcast_to(queries, (len(image), *queries.shape))
    patches = cast.layer_norm(cast.linear(encoder["patch_embed"], patches))
    x = jnp.concatenate([patches, queries.astype(cast.wide)], axis=1)
    angles = grid_angles(image.shape[1] // config.encoder.patch_size, config.encoder.head_dim)
    angles = np.concatenate([angles, np.zeros((tokens, angles.shape[1]))])
    mask = np.tri(x.shape[1], dtype=bool) | (np.arange(x.shape[1]) < patches.shape[1])
    options = dict(q_angles=angles, k_angles=angles, mask=mask)
    x = cast.stack(lambda p, x: block(p, x, **options), encoder["stack"], x)
    z = cast.linear(encoder["to_code"], cast.layer_norm(x[:, -tokens:])).astype(cast.wide)
    z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    codes = z + jax.lax.stop_gradient(nearest - z)

    layers = params["condition_layers"]
    x = cast.linear(layers["from_code"], codes) + layers["position_table"][:tokens]
    causal = np.tri(tokens, dtype=bool)
    x = cast.layer_norm(cast.stack(lambda p, x: block(p, x, mask=causal), layers["stack"], x))
    data = config.decoder.data_std * image
    x_t = t[:, None, None, None] * data + (1 - t[:, None, None, None]) * noise
    velocity = flow_velocity(cast, decoder, config.decoder, x_t, t, x[:, : config.window])
    target = patches_of(data - noise, config.decoder.patch_size)
    return jnp.mean((velocity.astype(cast.wide) - target) ** 2)


def flow_velocity(cast, params, config, x_t, t, condition):
    """Velocity in patches: the one model whose stream is `low`."""
    heads = config.dim // config.head_dim
    angles = grid_angles(x_t.shape[1] // config.patch_size, config.head_dim)
    frequencies = np.exp(-np.log(10000) * np.arange(config.dim // 2) / (config.dim // 2))
    phases = 1000 * t[:, None] * jnp.asarray(frequencies, cast.wide)
    time = jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], axis=-1)
    condition = cast.layer_norm(cast.linear(params["condition_projection"], condition))

    def block(p, x):
        context = cast.layer_norm(cast.mlp(p["condition_mlp"], condition))
        h = cast.layer_norm(x)
        h = cast.attention(p["cross_attention"], h, context, heads=heads, q_angles=angles)
        h = cast.silu(cast.mlp(p["time_embed"], time)[:, None] + h)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(
            cast.linear(p["modulation"], h), 6, axis=-1
        )
        h = cast.layer_norm(x) * (1 + scale_a) + shift_a
        h = cast.attention(p["attention"], h, heads=heads, q_angles=angles, k_angles=angles)
        x = x + gate_a * h
        return x + gate_m * cast.mlp(p["mlp"], cast.layer_norm(x) * (1 + scale_m) + shift_m)

    x = cast.linear(params["patch_embed"], patches_of(x_t, config.patch_size))
    return cast.linear(params["head"], cast.layer_norm(cast.stack(block, params["stack"], x)))


def patches_of(image, size):
    return einops.rearrange(image, "b (h p) (w q) c -> b (h w) (c p q)", p=size, q=size)


def angles_of(positions, dim):
    return positions[:, None] * 10000.0 ** (-np.arange(0, dim, 2) / dim)


def grid_angles(side, head_dim):
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    halves = [angles_of(axis.reshape(-1), head_dim // 2) for axis in (rows, columns)]
    return np.concatenate(halves, axis=-1)
