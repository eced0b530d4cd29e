"""Eight CPU devices, exact matrix products and checked shapes, set before anything is imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # -m gpu wants JAX_PLATFORMS=cuda
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
from jaxtyping import install_import_hook

install_import_hook("dar_jax", "beartype.beartype")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compilation
