"""A draft by its model directory: the same images, on one device or eight, and what is refused."""

import dataclasses
import re

import numpy as np
import pytest

from dar_jax.common import model_dir, tree
from dar_jax.common.files import write_safetensors
from dar_jax.generation import batches
from dar_jax.generation.config import SampleConfig
from dar_jax.kinds.loading import from_pretrained
from dar_jax.models.dar.options import DarSampling
from dar_jax.parallel.sharding import MeshConfig, make_mesh
from dar_jax.sampling.search import Search
from tests import tiny_model

LABELS = (3, 1)
SMALLER = dataclasses.replace(tiny_model.PRIOR, ffn_dim=4)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("small"), prior=SMALLER)


@pytest.fixture(scope="module")
def dar(path):
    return from_pretrained(path)


@pytest.fixture
def options(small):
    return dict(rng=0, guidance_scale=(1.0, 2.0), lookahead=3, draft=small)


def without(options):
    return {**options, "lookahead": 0, "draft": ""}


def test_draft_streams_the_same_images(dar, options):
    expected = list(dar.stream(LABELS, **without(options)))
    for preview, plain in zip(dar.stream(LABELS, **options), expected, strict=True):
        np.testing.assert_array_equal(preview.indices, plain.indices)
        np.testing.assert_array_equal(preview.images, plain.images)
    drawn = dar.generate(LABELS, **options)
    np.testing.assert_array_equal(drawn.images, expected[-1].images)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["groups", "smc"])
def test_search_goes_on_with_the_guesses_of_those_it_keeps(dar, options, method):
    options["search"] = Search(method, 2, "likelihood")
    indices = dar.generate(LABELS, **options).indices
    np.testing.assert_array_equal(indices, dar.generate(LABELS, **without(options)).indices)


@pytest.mark.parametrize("guidance", [1.0, pytest.param((1.1, 4.0), marks=pytest.mark.slow)])
def test_eight_devices_draw_the_indices_of_one(path, dar, options, guidance):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    options["guidance_scale"], labels = guidance, np.arange(mesh.size)
    split = from_pretrained(path, mesh=mesh).generate(labels, **options).indices
    np.testing.assert_array_equal(split, dar.generate(labels, **without(options)).indices)
    assert split.addressable_shards[0].data.shape == (1, tiny_model.NUM_TOKENS)


def test_draft_is_read_once_and_only_where_it_guesses(path, options, monkeypatch):
    read, load_params = [], model_dir.load_params

    def recording(directory, *arguments):
        read.append(directory)
        return load_params(directory, *arguments)

    dar = from_pretrained(path)
    monkeypatch.setattr(model_dir, "load_params", recording)
    prior = dar.prior
    assert prior.draft(DarSampling(lookahead=-1, draft=str(options["draft"])), 1) is None  # a CPU
    assert not read
    for _ in range(2):
        dar.stream(LABELS, **options)
    assert read == [options["draft"]]


def test_set_may_go_on_with_another_draft(path, dar, small):
    draft = {"lookahead": 4, "draft": str(small)}
    made_with = [
        batches.identity(SampleConfig(model=str(path), options=options), dar, "")
        for options in (draft, {"lookahead": 4}, {})
    ]
    assert made_with[0] == made_with[1] != made_with[2]
    assert "draft" not in made_with[2]  # as sets that were drawn before there were drafts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "runs/small"}, "draft='runs/small' guesses for look-ahead, which is off: set"),
        ({"draft": 3, "lookahead": 4}, "draft=3 must be the path of a model directory"),
        ({"draft": "nowhere", "lookahead": 4}, "draft='nowhere' is no prior .*not a readable"),
        ({"draft": "x" * 10_000, "lookahead": 4}, "is no prior that guesses: .*too long"),
        ({"draft": "", "lookahead": 1}, "lookahead=1 must be at least 2"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_options_that_make_no_sense_are_refused(dar, options, message):
    with pytest.raises(ValueError, match=message):
        dar.stream(LABELS, rng=0, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 9}, "has num_classes=9, but the model that draws has 10: name a prior"),
        ({"max_guidance": 1.5}, r"guidance_scale=\(1.0, 2.0\) must be at most 1.5, up to which dr"),
        ({"caption_dim": 4}, "has caption_dim=4, but the model that draws has None"),
        ({"num_tokens": 16}, "has num_tokens=16, but the model that draws has 8"),
        ({"vocab_size": 64}, "has vocab_size=64, but the model that draws has 32"),
        ({"num_layers": 0}, "num_layers=0 is out of range, expected 1"),
    ],
)
def test_prior_of_another_kind_is_refused(dar, path, options, tmp_path, changes, message):
    config = {**dataclasses.asdict(SMALLER), **changes}
    options["draft"] = tmp_path / "other"
    model_dir.save_model(options["draft"], "dar_prior", config, {}, {})
    message = re.escape(f"draft={str(options['draft'])!r}") + ".*" + message
    if "guidance" in message:
        message = message.partition(".*")[2]
    with pytest.raises(ValueError, match=message) as raised:
        dar.stream(LABELS, **options)
    assert "\n" not in str(raised.value)
    sample = {name: value for name, value in options.items() if name != "rng"}
    sample["draft"] = str(sample["draft"])
    with pytest.raises(ValueError, match=message):  # before weights are read
        batches.check(SampleConfig(options=sample), str(path))


def test_other_kinds_tokenizers_and_weights_are_refused(dar, small, options, tmp_path):
    with pytest.raises(ValueError, match=r"draft=.* holds a dar_tokenizer, expected a dar_prior"):
        dar.stream(LABELS, **{**options, "draft": small / "tokenizer"})
    other = dataclasses.replace(tiny_model.TOKENIZER, code_dim=8)
    options["draft"] = tiny_model.save(tmp_path, tokenizer=other, prior=SMALLER)
    with pytest.raises(ValueError, match=r"draft=.* another tokenizer than that in .*: name a"):
        dar.stream(LABELS, **options)
    config, params = model_dir.load_model(small)
    options["draft"] = tmp_path / "spoilt"
    model_dir.save_model(options["draft"], "dar_prior", config["model"], params, {})
    params["output"]["kernel"][0, 0] = np.nan
    write_safetensors(options["draft"] / model_dir.WEIGHTS_NAME, tree.flatten(params))
    (options["draft"] / "digests.json").unlink()
    with pytest.raises(ValueError, match="parameter output/kernel: 1 of .* not finite"):
        dar.stream(LABELS, **options)


def test_draft_without_a_tokenizer_says_not_whose_tokens_they_are(dar, small, options, tmp_path):
    config, params = model_dir.load_model(small)
    model_dir.save_model(tmp_path / "alone", "dar_prior", config["model"], params, {})
    alone = dar.generate(LABELS, **{**options, "draft": tmp_path / "alone"}).indices
    np.testing.assert_array_equal(alone, dar.generate(LABELS, **options).indices)


def test_draft_of_captions_knows_the_same_texts(tmp_path):
    config = dataclasses.replace(
        tiny_model.PRIOR, caption_dim=4, condition_tokens=2, text_encoder="minilm", num_classes=1
    )
    for name, encoder in (("same", "minilm"), ("unknown", ""), ("other", "t5")):
        saved = dataclasses.asdict(dataclasses.replace(config, text_encoder=encoder, num_classes=7))
        model_dir.save_model(tmp_path / name, "dar_prior", saved, {}, {})
        sampling = DarSampling(lookahead=2, draft=str(tmp_path / name))
        if name != "other":
            sampling.check(config)
            continue
        with pytest.raises(ValueError, match="has text_encoder='t5', but the model .* 'minilm'"):
            sampling.check(config)
