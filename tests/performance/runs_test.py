"""Bounds of sampling: traced ones against closed forms and published ones, and how they add up."""

import dataclasses
import functools
import types

import jax
import pytest

from dar_jax.common.tree import num_parameters
from dar_jax.kinds import dar_runs, transdiff_runs
from dar_jax.kinds.dar_tokenizer import DarTokenizer
from dar_jax.models.dar.llama import SIZES, Llama, LlamaConfig
from dar_jax.models.dar.options import DarSampling
from dar_jax.models.dar.tokenizer import Tokenizer
from dar_jax.models.kl_vae import KlVae, KlVaeConfig
from dar_jax.models.transdiff import model as transdiff
from dar_jax.models.transdiff.options import TransDiffSampling
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.performance.device_speed import DeviceSpeed
from dar_jax.performance.runs import Work
from dar_jax.pipelines.dar import PriorPipeline
from dar_jax.pipelines.transdiff import LatentPipeline

H200 = DeviceSpeed(bandwidth=4.3e12, product_bandwidth=4.3e12, flops=790e12)
BFLOAT16 = Compute(dtype="bfloat16")
GIGA, MEGA = 1e9, 1e6
CLOSED_FORM = 0.02
"""A trace does not see masks, up to 1.9 % of D-AR-L; closed forms left out the biases and norms of
TransDiff, below 1 % of its bytes."""
MASKED = 0.02
"""The published bounds count causal attention at what its mask allows."""
SMALL_TRAFFIC = 0.04
"""The published bounds also count written caches and logits."""


def known(cls, config):
    """What is known of a model without parameters."""
    return types.SimpleNamespace(model=FunctionalModel(cls, config, BFLOAT16), config=config)


@functools.cache
def with_shapes(pipeline_class, cls, config):
    """The same, and the shapes of its parameters as sampling reads them."""
    pipeline = known(cls, config)
    pipeline.sampling_params = jax.eval_shape(
        lambda params: pipeline_class(pipeline.model, params).sampling_params,
        pipeline.model.abstract_params(),
    )
    return pipeline


def dar(size, batch_size=1, speed=H200, num_steps=0, **tokenizer):
    pipeline = types.SimpleNamespace(
        prior=with_shapes(PriorPipeline, Llama, LlamaConfig(**SIZES[size])),
        tokenizer=known(Tokenizer, dataclasses.replace(DarTokenizer.released, **tokenizer)),
    )
    sampling = DarSampling(num_steps=num_steps)
    return dar_runs.DarRuns(pipeline, sampling, speed, speed, batch_size, None, 1)


def trans_diff(size, batch_size=1, **form):
    config = transdiff.TransDiffConfig(**transdiff.SIZES[size], **form)
    pipeline = types.SimpleNamespace(
        prior=with_shapes(LatentPipeline, transdiff.TransDiff, config),
        vae=known(KlVae, KlVaeConfig()),
    )
    sampling = TransDiffSampling()
    return transdiff_runs.TransDiffRuns(pipeline, sampling, H200, H200, batch_size, None, 1)


def flops_of(part):
    return sum(work.flops for work in part.works)


PHASES = {
    dar: ("tokens", "flow", "end to end", "first preview", "streaming"),
    trans_diff: (
        *("encoder", "denoising", "decode"),
        *("end to end", "first preview", "streaming"),
    ),
}
CLOSED_FORMS = {
    (dar, "l", 1, 1.0): (0.0395534, 0.00340233, 0.0429557, 0.00528742, 0.0429557),
    (dar, "l", 1, 4.0): (0.0403961, 0.00340233, 0.0437985, 0.00531083, 0.0437985),
    (dar, "l", 64, 4.0): (0.146584, 0.217749, 0.364333, 0.0350468, 0.364333),
    (dar, "xl", 1, 4.0): (0.0927540, 0.00340233, 0.0961563, 0.0117122, 0.0961563),
    (dar, "xl", 64, 1.0): (0.190725, 0.217749, 0.408474, 0.0412199, 0.408474),
    (dar, "xl", 64, 4.0): (0.291857, 0.217749, 0.509606, 0.0440291, 0.509606),
    (trans_diff, "l", 1, 1.0): (
        *(0.00105784, 0.0644407, 0.000316628),
        *(0.0658152, 0.0164263, 0.0667651),
    ),
    (trans_diff, "l", 64, 4.0): (
        *(0.127052, 8.24841, 0.0202642),
        *(8.39573, 2.07395, 8.45652),
    ),
    (trans_diff, "h", 1, 4.0): (
        *(0.00385786, 0.248943, 0.000316628),
        *(0.253117, 0.0624530, 0.254067),
    ),
    (trans_diff, "h", 64, 1.0): (
        *(0.123451, 7.96616, 0.0202642),
        *(8.10988, 2.00863, 8.17067),
    ),
}
"""Seconds of the phases of a batch on `H200`, by size, batch size and guidance scale; TransDiff
with references. By hand, from the widths of all layers: products and attention at 2 FLOPs a
multiply-add, attention at the pairs that its mask allows, matrices and caches in bfloat16."""


def closed_form_cases():
    for case in CLOSED_FORMS:
        family, size, batch_size, scale = case
        marks = () if family is dar else pytest.mark.slow
        yield pytest.param(case, id=f"{family.__name__}-{size}-{batch_size}-{scale:g}", marks=marks)


@pytest.mark.parametrize("case", closed_form_cases())
def test_bounds_are_those_of_closed_forms(case):
    family, size, batch_size, scale = case
    form = transdiff.MRAR if family is trans_diff else {}
    runs = family(size, batch_size, **form)
    expected = dict(zip(PHASES[family], CLOSED_FORMS[case], strict=True))
    found = {**runs.bounds(scale), **runs.bounds(None)}
    assert found == pytest.approx(expected, rel=CLOSED_FORM)


@pytest.mark.parametrize(
    ("size", "batch_size", "images_per_second"),
    [
        ("l", 1, 22.8),
        ("l", 8, 100),
        ("l", 64, 172),
        ("l", 256, 187),
        ("xl", 1, 10.4),
        ("xl", 8, 55.6),
        ("xl", 64, 122),
        ("xl", 256, 140),
    ],
)
def test_end_to_end_is_the_published_bound(size, batch_size, images_per_second):
    found = batch_size / dar(size, batch_size).bounds(2.0)["end to end"]
    assert found == pytest.approx(images_per_second, rel=SMALL_TRAFFIC)


@pytest.mark.parametrize(
    ("size", "guided_gigaflops", "weights", "cache"),
    [("l", 339, 0.650, 25.3), ("xl", 783, 1.505, 47.4), ("xxl", 1437, 2.769, 75.8)],
)
def test_prior_is_of_the_published_size(size, guided_gigaflops, weights, cache):
    """FLOPs of the tokens of a guided image, gigabytes of weights, megabytes of a whole cache."""
    runs = dar(size)
    assert flops_of(runs.tokens(2.0)) / GIGA == pytest.approx(guided_gigaflops, rel=MASKED)
    assert round(runs.cache_bytes(1.0) / 2 / MEGA, 1) == cache
    one = runs.tokens_work(1.0, (1,))
    assert round((one.num_bytes - runs.cache_bytes(1.0) / 2 / 257) / GIGA, 3) == weights


def test_tokens_are_bound_by_the_slower_of_memory_and_matrix_units():
    def tokens(batch_size, flops):
        speed = dataclasses.replace(H200, flops=flops)
        return dar("l", batch_size, speed).bounds(2.0)["tokens"]

    assert tokens(1, 1e18) == tokens(1, H200.flops)
    assert tokens(8, 1e12) == pytest.approx(8 * 0.3393, rel=MASKED)  # 339.3 GFLOP each


def test_first_preview_is_its_groups_and_their_steps():
    runs = dar("xl")
    tokens, flow = runs.first_preview(1.0)
    assert tokens == runs.tokens_work(1.0, (32,))
    assert flow == runs.flow_work(32, 1)
    bounds = runs.bounds(1.0)
    assert bounds["first preview"] == pytest.approx(runs.seconds([tokens]) + runs.seconds([flow]))
    assert 8 * bounds["first preview"] < bounds["end to end"]
    wide = dar("xl", tokens_per_step=64)
    assert wide.first_preview(1.0) == (wide.tokens_work(1.0, (32, 64)), wide.flow_work(64, 1))
    # Steps of twice as many, of which one sees the first group alone, and half as many.
    many, few = dar("xl", num_steps=16), dar("xl", num_steps=4)
    assert many.first_preview(1.0)[1].flops == pytest.approx(flow.flops)
    whole = [flops_of(each.flow()) for each in (few, runs, many)]
    assert whole[2] - whole[1] == pytest.approx(2 * (whole[1] - whole[0]))


def test_half_of_the_rows_without_guidance():
    """Half of the FLOPs and of the caches, but the same weights."""
    for runs in (dar("l"), trans_diff("l", **transdiff.MRAR)):
        assert runs.cache_bytes(4.0) == 2 * runs.cache_bytes(1.0)
        for guided, alone in zip(runs.parts(4.0), runs.parts(1.0), strict=True):
            for double, single in zip(guided.works, alone.works, strict=True):
                assert double.flops == 2 * single.flops
                caches = double.num_bytes - single.num_bytes
                assert 0 < caches < single.num_bytes or (caches, guided.phase) == (0, "encoder")


@pytest.mark.parametrize(
    ("size", "teraflops"),
    [
        ("l", 29.7),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("b", 12.8), ("h", 57.4))),
    ],
)
def test_latents_are_bound_by_the_published_work(size, teraflops):
    """Published without cached keys and values of the condition, which save 11 %."""
    bounds = trans_diff(size, 64).bounds(1.3)
    seconds = bounds["encoder"] + bounds["denoising"]
    assert seconds == pytest.approx(64 * 0.89 * teraflops * 1e12 / H200.flops, rel=0.01)


@pytest.mark.parametrize(
    ("size", "teraflops"),
    [
        ("l", 103),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("b", 44), ("h", 200))),
    ],
)
def test_latents_with_references_take_the_published_work(size, teraflops):
    parts = trans_diff(size, **transdiff.MRAR).parts(1.3)
    found = sum(map(flops_of, parts))
    assert found / 1e12 == pytest.approx(teraflops, rel=0.01)


@pytest.mark.parametrize(
    "form", [{}, transdiff.MRAR, pytest.param(transdiff.AT_512_PIXELS, marks=pytest.mark.slow)]
)
def test_phases_of_transdiff_add_up(form):
    runs, previews = trans_diff("l", 8, **form), 4
    bounds, decode = runs.bounds(1.5), runs.bounds(None)["decode"]
    latents = bounds["encoder"] + bounds["denoising"]
    assert bounds["end to end"] == pytest.approx(latents + decode)
    assert bounds["streaming"] == pytest.approx(latents + previews * decode)
    # A quarter of the steps, all with the whole condition, or all those with a part of it.
    steps = 100 if form == transdiff.MRAR else 25
    first = [runs.encoder_work(1.5, 0), runs.steps_work(1.5, 0, steps)]
    assert bounds["first preview"] == pytest.approx(runs.seconds(first) + decode)
    assert bounds["denoising"] == pytest.approx(2 * runs.bounds(1.0)["denoising"])


def test_step_reads_the_decoder_and_the_condition():
    caches = 2 * 12 * 256 * 768
    for rows, size, scale in ((1, 1, 1.0), (8, 4, 2.0)):
        runs = trans_diff("b", size)
        params = runs.pipeline.prior.sampling_params
        # Not read in a step: keys and values, their projection; tables and biases, below 2 %.
        weights = num_parameters(params["decoder"]) - (1 + 2 * 12) * 768**2
        expected = 2 * (weights + rows * caches)
        assert runs.steps_work(scale, 0, 3).num_bytes == pytest.approx(3 * expected, rel=0.02)
    weights = num_parameters(params["encoder"]["stack"]) + (1 + 2 * 12) * 768**2
    assert runs.encoder_work(1.0, 0).num_bytes == pytest.approx(2 * weights, rel=0.01)


def test_seconds_of_works_one_after_the_other():
    runs = dar("l", speed=DeviceSpeed(bandwidth=10.0, product_bandwidth=1.0, flops=100.0))
    assert runs.seconds([Work(200.0, 10), Work(100.0, 30), Work(50.0)]) == 2 + 3 + 0.5
