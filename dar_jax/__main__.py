"""`python -m dar_jax` is `python -m dar_jax.main`."""

from dar_jax.main import run

run()
