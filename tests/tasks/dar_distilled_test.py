"""Guidance in one row: what the student sees and learns, and that it draws as it was taught."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import mnist
from dar_jax.common import model_dir
from dar_jax.config import build as read_config
from dar_jax.kinds.loading import build_task, from_pretrained
from dar_jax.models.dar import search
from dar_jax.models.dar.llama import Llama
from dar_jax.models.dar.options import DarSampling
from dar_jax.modes import train
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.pipelines.dar import PriorPipeline
from dar_jax.serving.drawing import LaneBatch
from dar_jax.tasks.base import FrozenModel
from dar_jax.tasks.dar_distilled import DarDistilledTask
from tests.golden import models

ROUNDING = 1e-5
"""Of logits of the order of one: sums in another order."""
LABELS = np.array([3, 1])


@pytest.fixture(scope="module")
def teacher():
    return models.prior("dar/gpt_tiny")


@pytest.fixture(scope="module")
def student(teacher):
    """The teacher with an input for the scale, and the parameters that it starts from."""
    model, params = teacher
    without = {"token_dropout": 0.0, "residual_dropout": 0.0, "label_dropout": 0.5}
    config = dataclasses.replace(model.config, max_guidance=8.0, **without)
    model = FunctionalModel(Llama, config, Compute())
    return model, {**model.init(jax.random.key(1)), **params}


def awake(student):
    """A student to whom scales matter."""
    model, params = student
    embed = jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(2), leaf.shape),
        params["guidance_embed"],
    )
    return model, {**params, "guidance_embed": embed}


def batch_of(config):
    tokens = jax.random.randint(jax.random.key(0), (8, 1, config.num_tokens), 0, config.vocab_size)
    return {"codes": tokens.astype(jnp.uint16), "label": jnp.arange(8) % config.num_classes}


def test_student_begins_as_its_teacher(teacher, student):
    tokens = batch_of(student[0].config)["codes"][:2, 0].astype(jnp.int32)
    scales = jnp.linspace(1, 8, tokens.size).reshape(tokens.shape)
    theirs = teacher[0].bind(teacher[1]).logits(jnp.asarray(LABELS), tokens[:, :-1])
    hidden = student[0].bind(student[1]).hidden(jnp.asarray(LABELS), tokens[:, :-1], scales=scales)
    np.testing.assert_array_equal(student[0].bind(student[1]).head(hidden), theirs)


@pytest.mark.parametrize("lookahead", [0, 4])
@pytest.mark.parametrize("num_given", [0, 3])
def test_drawing_tells_the_scale_of_every_token(student, lookahead, num_given):
    model, params = awake(student)
    sampling = DarSampling(guidance_scale=(1.0, 6.0), temperature=0.0, lookahead=lookahead)
    pipeline = PriorPipeline(model, params)
    given = batch_of(model.config)["codes"][:2, 0, :num_given].astype(jnp.int32)
    drawn = pipeline.generate_indices(LABELS, sampling=sampling, prefix=given)
    scales = jnp.broadcast_to(sampling.scales(drawn.shape[1]), drawn.shape)
    prior = model.bind(params)
    logits = prior.head(prior.hidden(jnp.asarray(LABELS), drawn[:, :-1], scales=scales))
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1)[:, num_given:], drawn[:, num_given:])
    other = pipeline.generate_indices(LABELS, temperature=0.0, prefix=given)
    assert np.any(other != drawn), "scales make no difference"


def test_student_needs_no_unconditional_rows(student):
    guided = DarSampling(guidance_scale=(3.0,))
    tokenizer = models.tokenizer("dar/tokenizer_tiny")[0].config
    config = student[0].config
    plain = dataclasses.replace(config, max_guidance=0.0)
    assert search.calls(guided, config, tokenizer).decoded == config.num_tokens
    assert search.calls(guided, plain, tokenizer).decoded == 2 * config.num_tokens


def test_loss_is_least_for_guided_logits(teacher, student):
    """Without guidance the student already is what is asked for; with it, it has to learn."""
    tokenizer = FrozenModel(*models.tokenizer("dar/tokenizer_tiny"))

    def outcome(max_scale):
        config = dataclasses.replace(student[0].config, max_guidance=max_scale)
        options = {"loss": None, "trained": FrozenModel(*teacher), "from_codes": True}
        task = DarDistilledTask(config, tokenizer, Compute(), **options)
        of = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
        batch = batch_of(student[0].config)
        (_, outputs), grads = of(student[1], batch, jax.random.key(5), task.frozen())
        norm = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
        return float(outputs["divergence"]), norm

    divergence, gradient = outcome(1 + 1e-7)
    assert abs(divergence) < ROUNDING and gradient < ROUNDING
    divergence, gradient = outcome(8.0)
    assert divergence > 100 * ROUNDING and gradient > 100 * ROUNDING


def distilled(**changes):
    config = mnist.get_config("dar_distilled")
    config.train.update(steps=2, log_every=1, image_every=0)
    config.data.batch_size = 8
    config.compute.unroll = False
    config.update_from_flattened_dict(changes)
    return read_config(config)


def test_what_is_released_is_a_prior(tmp_path):
    train.train_and_evaluate(distilled(), str(tmp_path))
    pipeline = from_pretrained(tmp_path)
    assert type(pipeline.prior) is PriorPipeline and pipeline.prior.config.max_guidance == 8
    assert pipeline.sampling.guidance_scale == (1.0, 5.0)
    assert not (tmp_path / "model" / "teacher").exists()
    with pytest.raises(ValueError, match=r"guidance_scale=\(9\.0,\) must be at most 8"):
        pipeline.generate([1], rng=0, guidance_scale=9.0)
    with pytest.raises(ValueError, match="the model is distilled"):
        LaneBatch(pipeline, pipeline.sampling, 4)


REFUSED = {
    r"max_guidance=0\.0, and that of package://mnist is 0\.0": {"model.max_guidance": 0.0},
    r"num_tokens=16, but the tokenizer in package://mnist/tokenizer": {"model.num_tokens": 16},
    r"num_classes=11, but the prior in package://mnist has num_classes=10": {
        "model.num_classes": 11
    },
    r"max_guidance=1\.0 must be above 1": {"model.max_guidance": 1.0},
}


@pytest.mark.parametrize("line", REFUSED)
def test_teacher_that_does_not_fit_is_refused(line):
    with pytest.raises(ValueError, match=line):
        build_task(distilled(**REFUSED[line]))


def test_teacher_of_another_tokenizer_is_refused(tmp_path):
    other = tmp_path / "tokenizer"
    shutil.copytree(model_dir.locate("package://mnist/tokenizer"), other)
    (other / "digests.json").unlink(missing_ok=True)
    with (other / "config.json").open("a") as file:
        file.write("\n")
    config = distilled()
    companions = {**config.companions, "tokenizer": str(other)}
    with pytest.raises(
        ValueError, match=r"is another one than that of the teacher package://mnist"
    ):
        build_task(dataclasses.replace(config, companions=companions))
