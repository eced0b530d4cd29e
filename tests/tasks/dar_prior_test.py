"""Training the prior: what saves memory changes neither loss nor gradients; which work counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.common import model_dir
from dar_jax.common.flops import flops
from dar_jax.common.image import to_float
from dar_jax.data.base import DataConfig
from dar_jax.kinds import find_kind
from dar_jax.kinds.loading import frozen_model
from dar_jax.models.dar.decoder import FlowDecoderConfig
from dar_jax.models.dar.encoder import EncoderConfig
from dar_jax.models.dar.llama import LlamaConfig
from dar_jax.models.dar.tokenizer import ConditionConfig, Tokenizer, TokenizerConfig
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.parallel import sharding
from dar_jax.parallel.sharding import MeshConfig
from dar_jax.tasks.dar_prior import DarPriorTask
from dar_jax.training.optimizer import OptimizerConfig
from dar_jax.training.state import create_state
from dar_jax.training.step import flops_per_image, make_train_step

RTOL = 1e-6
"""Of the gradient as one vector: sums in another order."""
TOKENIZER = TokenizerConfig(
    image_size=16,
    num_tokens=8,
    num_groups=2,
    num_steps=2,
    codebook_size=32,
    code_dim=4,
    max_tokens=8,
    encoder=EncoderConfig(patch_size=8, dim=32, depth=1, head_dim=16),
    condition=ConditionConfig(dim=32, depth=1, head_dim=16),
    decoder=FlowDecoderConfig(patch_size=8, dim=32, depth=1, head_dim=16, feature_layer=None),
)
PRIOR = LlamaConfig(
    num_layers=2,
    num_heads=2,
    dim=32,
    ffn_dim=64,
    vocab_size=32,
    num_tokens=8,
    num_classes=10,
    token_dropout=0.0,
    residual_dropout=0.0,
    label_dropout=0.0,
)
"""Without dropout a step does not depend on how its random numbers are drawn."""
OPTIMIZER = OptimizerConfig(warmup_steps=0, b1=0.0, clip_norm=1e9, ema_decay=0.0)
"""Without momentum and clipping, the first moment after one step is the gradient."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tokenizer"
    params = FunctionalModel(Tokenizer, TOKENIZER).init(jax.random.key(0))
    model_dir.save_model(path, "dar_tokenizer", dataclasses.asdict(TOKENIZER), params, {})
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(directory):
    return frozen_model("dar_tokenizer", directory, Compute())


def step_of(task, accumulation=1):
    """Loss and gradient of one step on 8 images over 4 devices, from parameters off zero."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    params = task.init(jax.random.key(1))
    params["output"]["kernel"] = 0.3 * jax.random.normal(jax.random.key(2), (32, 32))
    state = create_state(
        task, OPTIMIZER, jax.random.key(0), mesh=mesh, params=sharding.put(params, mesh)
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(task, OPTIMIZER, shardings, accumulation=accumulation)
    rng = np.random.default_rng(0)
    batch = {
        "pixels": rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8),
        "label": rng.integers(0, 10, 8, dtype=np.int32),
    }
    frozen = sharding.put(task.frozen(), mesh)
    state, metrics = step(state, sharding.put_batch(batch, mesh), frozen)
    leaves = jax.tree.leaves(jax.device_get(state.opt_state[1][0].mu))
    return float(metrics.loss.compute()), np.concatenate([leaf.ravel() for leaf in leaves])


@pytest.fixture(scope="module")
def plain(tokenizer):
    return step_of(DarPriorTask(PRIOR, tokenizer, Compute()))


@pytest.mark.parametrize(
    ("options", "accumulation"),
    [({"loss_chunks": 4, "remat": "dots"}, 1), ({"loss_chunks": 2, "remat": "blocks"}, 2)],
)
def test_what_saves_memory_changes_no_gradient(tokenizer, plain, options, accumulation):
    loss, gradient = step_of(DarPriorTask(PRIOR, tokenizer, Compute(**options)), accumulation)
    assert loss == pytest.approx(plain[0], rel=RTOL)
    assert np.linalg.norm(plain[1]) > 0.1
    assert np.linalg.norm(gradient - plain[1]) <= RTOL * np.linalg.norm(plain[1])


def test_codes_are_the_same_whatever_dtypes_train_and_decode(directory):
    rng = np.random.default_rng(0)
    batch = {"pixels": rng.integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)}
    codes = []
    for compute in (Compute(), Compute(dtype="bfloat16", decode_dtype="bfloat16")):
        task = DarPriorTask(PRIOR, frozen_model("dar_tokenizer", directory, compute), compute)
        codes.append(jax.jit(task._indices)(batch, jax.random.key(0), task.frozen()))
    np.testing.assert_array_equal(*codes)
    encode = jax.jit(lambda params, image: task.tokenizer.bind(params).encode(image).indices)
    half = encode(task.frozen()["tokenizer"], to_float(batch["pixels"]))
    assert np.any(half != codes[0]), "nothing is close"


def test_cached_codes_spare_the_work_of_encoding(tokenizer):
    encoding, cached = (
        DarPriorTask(PRIOR, tokenizer, Compute(), from_codes=codes) for codes in (False, True)
    )
    encode = lambda params, image: encoding.tokenizer.bind(params).encode(image).indices  # noqa: E731
    params, image = encoding.frozen()["tokenizer"], jnp.zeros((1, 16, 16, 3))
    spared = flops_per_image(encoding) - flops_per_image(cached)
    assert spared == flops(encode, params, image) > 0


def test_data_of_classes_do_not_train_a_model_of_captions():
    kind = find_kind("dar_prior", "config.task")
    with pytest.raises(ValueError, match=r"caption_dim=8 and config.data.captions=False do"):
        kind.check_data(LlamaConfig(caption_dim=8), DataConfig(), {})


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("dar_tokenizer", dict(source="codes"), "data.source='codes' has no pictures"),
        ("kl_vae", dict(source="latents"), "data.source='latents' has no pictures"),
        ("dar_prior", dict(source="latents"), "data.source='latents' has no pictures"),
        ("transdiff", dict(source="codes"), "data.source='codes' has no pictures"),
        ("dar_tokenizer", dict(num_references=4), "num_references=4, but .* one picture at a time"),
        ("kl_vae", dict(num_references=4), "num_references=4, but .* one picture at a time"),
    ],
)
def test_data_of_another_kind_are_refused_before_training(kind, data, message):
    found = find_kind(kind, "config.task")
    with pytest.raises(ValueError, match=message):
        found.check_data(found.architecture(), DataConfig(**data), {})
