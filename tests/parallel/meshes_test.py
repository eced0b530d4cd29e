"""Every task has the same loss, gradients and update on one device and on any mesh of eight.

Single gradients differ by more than 1e-6 in float32, where sums over shards round differently. In
float64 they agree to 1e-10, which shows that rounding is all the difference there is.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest

from dar_jax.common import model_dir
from dar_jax.kinds.loading import frozen_model
from dar_jax.models.dar.decoder import FlowDecoderConfig
from dar_jax.models.dar.encoder import EncoderConfig
from dar_jax.models.dar.llama import LlamaConfig
from dar_jax.models.dar.tokenizer import ConditionConfig, TokenizerConfig
from dar_jax.models.kl_vae import KlVaeConfig
from dar_jax.models.transdiff.model import TransDiffConfig
from dar_jax.nn.compute import Compute
from dar_jax.parallel import sharding
from dar_jax.parallel.sharding import MeshConfig
from dar_jax.tasks.dar_prior import DarPriorTask
from dar_jax.tasks.dar_tokenizer import DarTokenizerTask, TokenizerLossConfig
from dar_jax.tasks.kl_vae import KlVaeLossConfig, KlVaeTask
from dar_jax.tasks.transdiff import TransDiffLossConfig, TransDiffTask
from dar_jax.training.optimizer import OptimizerConfig
from dar_jax.training.state import create_state
from dar_jax.training.step import make_train_step

ROOT = pathlib.Path(__file__).parents[2]
COMPUTE = Compute()
TASKS = ("prior", "tokenizer", "kl_vae", "transdiff", "transdiff_mrar")
SHAPES = ((8, 1, 1), (1, 8, 1), (2, 2, 2))
RTOL = 1e-6
"""Of the loss, and of the gradient as one vector: sums over shards round differently in float32."""
LEAF_RTOL = 1e-5
"""Of each parameter's gradient: some are small sums of large terms."""
FLOAT64_RTOL = 1e-10
"""Of all of them in float64, whose rounding errors are 1e-9 of those of float32."""
NOISE = 1e-3
"""Gradients this much smaller than the largest are rounding errors of sums that cancel, as those
of the biases of keys, which the softmax does not see."""
MIN_SHARDED_SIZE = 2**6
"""Small enough that the tiny models are split."""
RUN_FLOAT64 = """
import sys
import jax
import jax.numpy as jnp
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)
jnp.float32 = jnp.float64  # what the code and flax ask for where float32 is the point
from dar_jax.nn.compute import Compute
Compute.jnp_dtype = jnp.dtype("float64")
from dar_jax.common import image
image.to_float = lambda pixels: pixels.astype("float64") / 127.5 - 1
from tests.parallel import meshes_test
meshes_test.write_errors(*sys.argv[1:])
"""
TOKENIZER = TokenizerConfig(
    image_size=16,
    num_tokens=4,
    num_groups=2,
    num_steps=2,
    codebook_size=32,
    code_dim=4,
    max_tokens=4,
    encoder=EncoderConfig(patch_size=8, dim=32, depth=2, head_dim=16),
    condition=ConditionConfig(dim=32, depth=1, head_dim=16),
    decoder=FlowDecoderConfig(patch_size=8, dim=32, depth=1, head_dim=16, feature_layer=None),
)
PRIOR = LlamaConfig(
    num_layers=2, num_heads=2, dim=32, ffn_dim=64, vocab_size=32, num_tokens=4, num_classes=10
)
VAE = KlVaeConfig(
    width=8,
    width_factors=(1, 2),
    num_blocks=1,
    attention_levels=(1,),
    latent_channels=2,
    num_groups=4,
)
TRANSDIFF = TransDiffConfig(
    latent_size=8,
    channels=2,
    num_classes=10,
    condition_tokens=64,
    buffer_size=4,
    dim=32,
    num_heads=2,
    encoder_depth=2,
    decoder_depth=2,
)
OPTIMIZER = OptimizerConfig(
    warmup_steps=0, learning_rate=1.0, b1=0.0, eps=1.0, clip_norm=1e9, ema_decay=0.9
)
"""Without momentum and clipping, the first moment after one step is the gradient; with a large eps
the update is about as large, where AdamW's own would make a whole step of a rounding error."""


def perturbed(params, rng):
    """Move parameters off their initial values, of which zeros would hide half the network."""
    leaves, structure = jax.tree.flatten(params)
    rngs = jax.random.split(rng, len(leaves))
    return jax.tree.unflatten(
        structure,
        [x + 0.1 * jax.random.normal(rng, x.shape) for x, rng in zip(leaves, rngs, strict=True)],
    )


class Step(NamedTuple):
    """Loss and gradients of one train step, and the parameters after it."""

    loss: float
    gradients: dict
    params: dict


def train_once(task, mesh):
    """Run one train step from the same parameters on the same batch."""
    params = perturbed(task.init(jax.random.key(1)), jax.random.key(2))
    params = sharding.put(params, mesh)
    state = create_state(task, OPTIMIZER, jax.random.key(0), mesh=mesh, params=params)
    step = make_train_step(task, OPTIMIZER, jax.tree.map(lambda leaf: leaf.sharding, state))
    rng = np.random.default_rng(0)
    images = getattr(task.model.config, "num_references", 1)
    group = () if images == 1 else (images,)
    batch = {
        "pixels": rng.integers(0, 256, (16, *group, 16, 16, 3), dtype=np.uint8),
        "label": rng.integers(0, 10, 16, dtype=np.int32),
    }
    frozen = sharding.put(task.frozen(), mesh)
    state, metrics = step(state, sharding.put_batch(batch, mesh), frozen)
    return Step(
        float(metrics.loss.compute()), *jax.device_get((state.opt_state[1][0].mu, state.params))
    )


def make_task(name, directory):
    """Build a tiny task; `directory` is for the models that it is made from."""
    vae = KlVaeTask(
        VAE, KlVaeLossConfig(kl_weight=0.1, perceptual_weight=0.0), COMPUTE, image_size=16
    )
    tokenizer = DarTokenizerTask(TOKENIZER, TokenizerLossConfig(), COMPUTE)
    match name:
        case "kl_vae":
            return vae
        case "tokenizer":
            return tokenizer
        case "prior":
            return DarPriorTask(PRIOR, save(tokenizer, "dar_tokenizer", directory), COMPUTE)
    references = dict(num_references=4, reference_patch_size=2) if name == "transdiff_mrar" else {}
    config = dataclasses.replace(TRANSDIFF, **references)
    loss = TransDiffLossConfig(copies=2, diversity_weight=0.1)
    return TransDiffTask(config, loss, save(vae, "kl_vae", directory), COMPUTE, image_size=16)


def save(task, kind, directory):
    """Write the model directory of a task's model and read it as a frozen one."""
    params = perturbed(task.init(jax.random.key(3)), jax.random.key(4))
    model_dir.save_model(directory, kind, task.model_config(), params, {})
    return frozen_model(kind, str(directory), Compute())


class Errors(NamedTuple):
    """Relative errors of the loss, of the gradient as one vector and of each array's.

    The arrays are the gradients and, after them, the updated parameters.
    """

    loss: float
    gradient: float
    leaves: dict[str, float]


def relative_errors(result, expected):
    """Compare two results of `train_once`."""

    def norms(first, second):
        sizes = jax.tree.map(np.linalg.norm, second)
        return sizes, jax.tree.map(lambda a, b: np.linalg.norm(a - b), first, second)

    sizes, errors = norms(result.gradients, expected.gradients)
    whole, total = (np.linalg.norm(jax.tree.leaves(tree)) for tree in (sizes, errors))
    largest = max(jax.tree.leaves(sizes))
    gradients = jax.tree.map(lambda e, size: e / max(size, NOISE * largest), errors, sizes)
    sizes, errors = norms(result.params, expected.params)
    updated = jax.tree.map(np.divide, errors, sizes)
    leaves = named({"gradient": gradients, "updated": updated})
    return Errors(abs(result.loss / expected.loss - 1), total / whole, leaves)


def named(tree):
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): float(leaf) for path, leaf in pairs}


def on_one_device(task):
    return train_once(task, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.fixture(
    scope="module", params=["prior", *(pytest.param(n, marks=pytest.mark.slow) for n in TASKS[1:])]
)
def task(request, tmp_path_factory):
    return make_task(request.param, tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def expected(task):
    return on_one_device(task)


@pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES[:2]] + [SHAPES[2]]
)
def test_train_step_is_that_of_one_device(task, expected, shape, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", MIN_SHARDED_SIZE)
    result = train_once(task, sharding.make_mesh(MeshConfig(*shape)))
    errors = relative_errors(result, expected)
    assert errors.loss <= RTOL and errors.gradient <= RTOL
    assert {name: error for name, error in errors.leaves.items() if error > LEAF_RTOL} == {}


def write_errors(name, directory):
    """Write the errors of every shape as JSON; run by a process that computes in float64."""
    sharding.MIN_SHARDED_SIZE = MIN_SHARDED_SIZE
    task = make_task(name, directory)
    expected = on_one_device(task)
    assert {leaf.dtype for leaf in jax.tree.leaves(expected.gradients)} == {np.dtype("float64")}
    for shape in SHAPES:
        result = train_once(task, sharding.make_mesh(MeshConfig(*shape)))
        errors = relative_errors(result, expected)
        sys.stdout.write(json.dumps([shape, *errors]) + "\n")


@pytest.mark.slow  # about a minute each
@pytest.mark.parametrize("name", TASKS)
def test_train_step_in_float64_differs_by_nothing_but_rounding(name, tmp_path):
    command = [sys.executable, "-c", RUN_FLOAT64, name, str(tmp_path / "model")]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    lines = [json.loads(line) for line in output.splitlines()]
    assert [tuple(shape) for shape, *_ in lines] == list(SHAPES)
    for shape, loss, gradient, leaves in lines:
        worst = max(leaves, key=leaves.get)
        assert max(loss, gradient, leaves[worst]) <= FLOAT64_RTOL, (shape, worst)
