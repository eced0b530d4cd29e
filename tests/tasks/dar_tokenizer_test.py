"""The tokenizer task: loss parts, metrics, pictures, refused configs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.models.dar.decoder import FlowDecoderConfig
from dar_jax.models.dar.encoder import EncoderConfig
from dar_jax.models.dar.tokenizer import ConditionConfig, TokenizerConfig
from dar_jax.nn.compute import Compute
from dar_jax.tasks.codebook import CodebookPerplexity, CodebookUsage, code_counts
from dar_jax.tasks.dar_tokenizer import DarTokenizerTask, TokenizerLossConfig
from dar_jax.tasks.time_groups import group_average

CONFIG = TokenizerConfig(
    image_size=16,
    num_tokens=8,
    num_groups=4,
    num_steps=4,
    codebook_size=32,
    code_dim=4,
    max_tokens=8,
    encoder=EncoderConfig(patch_size=4, dim=32, depth=1, head_dim=16),
    condition=ConditionConfig(dim=32, depth=1, head_dim=16),
    decoder=FlowDecoderConfig(patch_size=4, dim=32, depth=1, head_dim=16, feature_layer=None),
)


@pytest.fixture(scope="module")
def task():
    return DarTokenizerTask(CONFIG, TokenizerLossConfig(), Compute())


@pytest.fixture(scope="module")
def params(task):
    return jax.jit(task.init)(jax.random.key(0))


@pytest.fixture
def batch():
    pixels = jax.random.randint(jax.random.key(1), (4, 16, 16, 3), 0, 256)
    return {"pixels": pixels.astype(jnp.uint8), "label": jnp.zeros(4, jnp.int32)}


def test_loss_is_the_sum_of_its_parts(task, params, batch):
    loss, outputs = jax.jit(task.loss)(params, batch, jax.random.key(2), {})
    parts = ("flow_loss", "codebook_loss", "commitment_loss")
    assert loss == pytest.approx(float(sum(outputs[name] for name in parts)), rel=1e-6)
    assert outputs["code_counts"].sum() == 4 * CONFIG.num_tokens


def test_entropy_weight_adds_the_entropy_term(params, batch):
    weight = 0.5
    task = DarTokenizerTask(CONFIG, TokenizerLossConfig(entropy_weight=weight), Compute())
    loss, outputs = jax.jit(task.loss)(params, batch, jax.random.key(2), {})
    plain = sum(outputs[name] for name in ("flow_loss", "codebook_loss", "commitment_loss"))
    assert loss == pytest.approx(float(plain + weight * outputs["entropy_loss"]), rel=1e-6)
    without = DarTokenizerTask(CONFIG, TokenizerLossConfig(entropy_weight=0.0), Compute())
    assert set(task.metrics()) - set(without.metrics()) == {"entropy_loss"}


def test_model_without_a_codebook_trains_on_its_flow_alone(params, batch):
    config = dataclasses.replace(CONFIG, codebook_size=0)
    task = DarTokenizerTask(config, TokenizerLossConfig(), Compute())
    params = {name: part for name, part in params.items() if name != "quantizer"}
    loss, outputs = jax.jit(task.loss)(params, batch, jax.random.key(2), {})
    assert loss == outputs["flow_loss"] > 0
    assert "code_counts" not in outputs
    assert not {"codebook_usage", "codebook_perplexity"} & set(task.metrics())
    task.pictures(params, batch, jax.random.key(0), {})
    with pytest.raises(ValueError, match="entropy_weight=0.5 needs a codebook"):
        DarTokenizerTask(config, TokenizerLossConfig(entropy_weight=0.5), Compute())


def test_bfloat16_compute_stays_close_and_returns_float32(task, params, batch):
    half = DarTokenizerTask(CONFIG, TokenizerLossConfig(), Compute(dtype="bfloat16"))
    loss, _ = jax.jit(task.loss)(params, batch, jax.random.key(2), {})
    half_loss, _ = jax.jit(half.loss)(params, batch, jax.random.key(2), {})
    assert half_loss.dtype == jnp.float32
    assert half_loss == pytest.approx(float(loss), rel=0.05)


def test_pictures_show_originals_and_previews(task, params, batch):
    panel = task.pictures(params, batch, jax.random.key(0), {})["reconstruction"]
    assert panel.cells.shape == (4, 1 + CONFIG.num_steps, 16, 16, 3)
    assert panel.header[:2] == ["original", "step 1"]
    np.testing.assert_array_equal(panel.cells[0, 0], batch["pixels"][0])
    names = [f"class {label}" for label in range(10)]
    picture = panel.draw(names)
    assert np.any(picture != panel.draw(names[::-1])), "rows are not labelled"
    assert np.any(picture != panel._replace(header=["", *panel.header[1:]]).draw(names))


def test_loss_may_be_negative_for_one_reason(task):
    assert task.why_negative == ""
    config = TokenizerLossConfig(entropy_weight=0.5)
    task = DarTokenizerTask(CONFIG, config, Compute())
    assert "0.5 entropy_loss, falls to -1.7 when" in task.why_negative  # -0.5 log 32


@pytest.mark.parametrize(
    ("options", "complete_after"),
    [
        ({"perceptual_start": 40}, 0),
        ({"adversarial_weight": 0.5, "adversarial_start": 40}, 40),
        ({"adversarial_weight": 0.5, "perceptual_weight": 0.5, "perceptual_start": 30_000}, 30_000),
    ],
)
def test_loss_is_complete_when_its_last_term_has_begun(options, complete_after):
    task = DarTokenizerTask(CONFIG, TokenizerLossConfig(**options), Compute())
    assert task.complete_after == complete_after


def test_codebook_metrics_accumulate_over_steps():
    first = code_counts(jnp.array([[0, 1], [1, 1]]), 8)
    second = code_counts(jnp.array([[2, 3], [0, 0]]), 8)
    usage = CodebookUsage.from_model_output(code_counts=first).merge(
        CodebookUsage.from_model_output(code_counts=second)
    )
    assert usage.compute() == 0.5
    uniform = CodebookPerplexity.from_model_output(code_counts=jnp.full(8, 3))
    assert uniform.compute() == pytest.approx(8.0, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 16}, "max_tokens=8"),
        ({"image_size": 18}, "image_size=18"),
        ({"encoder": EncoderConfig(patch_size=4, dim=30, head_dim=16)}, "encoder.dim=30"),
    ],
)
def test_config_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_metrics_go_on_from_an_interval_that_was_kept():
    """A resumed run has the numbers of a file, not of a device."""
    average = group_average(1)(total=jnp.array(6.0), count=jnp.array(3.0))
    kept, usage = jax.tree.map(np.asarray, (average, CodebookUsage(counts=jnp.array([2, 0, 1, 0]))))
    assert kept.merge(kept).compute() == 2
    assert usage.merge(usage).compute() == 0.5
