"""Autoregressive-diffusion image generation in JAX."""

from dar_jax.pipelines import from_pretrained

__all__ = ["from_pretrained"]
