"""What the compiled train step sums over devices, and in which dtype.

Read from the program as it is partitioned: CPU's compiler widens bfloat16 sums afterwards, as no
accelerator's does.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from dar_jax.models.dar.llama import LlamaConfig
from dar_jax.models.dar.tokenizer import Tokenizer
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.parallel import sharding
from dar_jax.parallel.sharding import MeshConfig
from dar_jax.tasks.base import FrozenModel
from dar_jax.tasks.dar_prior import DarPriorTask
from dar_jax.tasks.kl_vae import KlVaeLossConfig, KlVaeTask
from dar_jax.training.optimizer import OptimizerConfig
from dar_jax.training.state import abstract_state
from dar_jax.training.step import make_train_step
from tests.parallel.meshes_test import PRIOR, TOKENIZER, VAE

COMPUTE = Compute(dtype="bfloat16", remat="blocks")

BATCH_SIZE = 256
SUM = re.compile(r"= (\w+)\[([\d,]*)\]\S* (?:all-reduce|reduce-scatter)\(")


@pytest.fixture
def summed(tmp_path, monkeypatch):
    """Return the function from a task to how many numbers its step sums over devices, by dtype."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 2**6)

    def run(task, batch, **options):
        mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
        state = abstract_state(task, OptimizerConfig(), mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = make_train_step(task, OptimizerConfig(), shardings, **options)
        frozen = task.abstract_frozen()
        lowered = step.lower(
            state,
            placed(batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch)),
            placed(frozen, sharding.fsdp_sharding(frozen, mesh)),
        )
        lowered.compile({"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd-partitioning"})
        (dump,) = tmp_path.glob("*jit_train_step*after_spmd-partitioning*")
        counts = {}
        for dtype, shape in SUM.findall(dump.read_text()):
            counts.setdefault(dtype, 0)
            counts[dtype] += math.prod(int(size) for size in shape.split(",") if size)
        return counts

    return run


def placed(tree, shardings):
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings,
    )


def prior_task():
    tokenizer = FunctionalModel(Tokenizer, TOKENIZER)
    return DarPriorTask(
        LlamaConfig(**{**vars(PRIOR), "num_layers": 2}),
        FrozenModel(tokenizer, tokenizer.abstract_params()),
        COMPUTE,
        from_codes=True,
    )


CODES = {
    "codes": jax.ShapeDtypeStruct((BATCH_SIZE, 1, PRIOR.num_tokens), jnp.uint16),
    "label": jax.ShapeDtypeStruct((BATCH_SIZE,), jnp.int32),
}


@pytest.mark.parametrize("gather_dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("reduce_dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_summed_in_the_dtype_that_is_asked_for(summed, gather_dtype, reduce_dtype):
    counts = summed(prior_task(), CODES, gather_dtype=gather_dtype, reduce_dtype=reduce_dtype)
    if reduce_dtype == jnp.float32:
        assert set(counts) == {"f32"}
    else:
        assert counts["bf16"] > counts["f32"]  # norms and embeddings stay what they are


@pytest.mark.slow
def test_gradients_of_convolutions_are_summed_in_float32(summed):
    loss = KlVaeLossConfig(perceptual_weight=0.0)
    task = KlVaeTask(VAE, loss, COMPUTE, image_size=16)
    batch = {
        "pixels": jax.ShapeDtypeStruct((BATCH_SIZE, 16, 16, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((BATCH_SIZE,), jnp.int32),
    }
    assert set(summed(task, batch)) == {"f32"}
