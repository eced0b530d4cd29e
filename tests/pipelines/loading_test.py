"""`from_pretrained`: where it looks, what it refuses, and loading onto a mesh."""

import dataclasses
import json

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.common import model_dir, tree
from dar_jax.common.config_build import MAY_BE_ZERO
from dar_jax.kinds import KINDS
from dar_jax.kinds.loading import from_pretrained, open_model
from dar_jax.nn.compute import DTYPES, Compute
from dar_jax.parallel.sharding import MIN_SHARDED_SIZE, MeshConfig, make_mesh
from dar_jax.pipelines.dar import DarPipeline, PriorPipeline, TokenizerPipeline
from tests.golden import models

TOKENIZER, PRIOR = "dar/tokenizer_tiny", "dar/gpt_tiny"
CLASS_NAMES = ("cat", "dog")
LABELS = np.int32([1, 2])
BFLOAT16_ROUNDING = 0.1  # of logits of about 3, and of such pixels on average
ROUNDING = 1e-4  # products split over devices sum in another order


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with a prior and its tokenizer."""
    path = tmp_path_factory.mktemp("workdir")
    for folder, kind, load, companions in (
        (TOKENIZER, "dar_tokenizer", models.tokenizer, {}),
        (PRIOR, "dar_prior", models.prior, {"tokenizer": path / "dar_tokenizer"}),
    ):
        model, params = load(folder)
        config = dataclasses.asdict(model.config)
        extra = {"class_names": CLASS_NAMES}
        model_dir.save_model(path / kind, kind, config, params, extra, companions=companions)
    (path / "dar_prior").rename(path / "model")
    return path


@pytest.fixture
def copy(workdir, tmp_path):
    """A prior's model directory to spoil."""
    config, params = model_dir.load_model(workdir / "model")
    companions = {"tokenizer": workdir / "dar_tokenizer"}
    path = tmp_path / "copy"
    model_dir.save_model(path, "dar_prior", config["model"], params, {}, companions=companions)
    return path


def test_workdir_stands_for_its_model(workdir):
    pipeline = from_pretrained(str(workdir))
    assert isinstance(pipeline, DarPipeline)
    assert pipeline.class_names == pipeline.tokenizer.class_names == CLASS_NAMES


def test_hub_repository_is_loaded(workdir, monkeypatch):
    asked = []

    def download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(workdir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    pipeline = from_pretrained("hf://owner/name/model")
    assert isinstance(pipeline, DarPipeline)
    names = ["config.json", "model.safetensors", "digests.json"]
    names += [f"*/{name}" for name in names]
    assert asked == [("owner/name", [f"model/{name}" for name in names])]


def test_mesh_holds_every_parameter_in_parts(workdir):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    pipeline = from_pretrained(workdir, mesh=mesh)
    expected = (models.prior(PRIOR)[1], models.tokenizer(TOKENIZER)[1])
    leaves = jax.tree.leaves((pipeline.prior.params, pipeline.tokenizer.params))
    for leaf, array in zip(leaves, jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, array)
        assert len(leaf.sharding.device_set) == mesh.size
        if leaf.size >= MIN_SHARDED_SIZE:
            assert leaf.addressable_shards[0].data.size == leaf.size // mesh.shape["fsdp"]

    labels = np.arange(mesh.size, dtype=np.int32)
    out = pipeline.generate(labels, rng=jax.random.key(3), temperature=0.0)
    assert out.images.shape == (mesh.size, 32, 32, 3) and jnp.isfinite(out.images).all()
    whole = from_pretrained(workdir)
    likeliest = jnp.argmax(whole.prior.logits(labels, out.indices), axis=-1)
    np.testing.assert_array_equal(out.indices, likeliest)
    decoded = whole.tokenizer.decode(out.indices, rng=jax.random.key(3))
    np.testing.assert_allclose(out.images, np.clip(decoded, -1, 1), atol=ROUNDING)
    assert out.images.addressable_shards[0].data.shape == (1, 32, 32, 3)
    encoded = (p.tokenizer.encode(out.images) for p in (pipeline, whole))
    np.testing.assert_array_equal(*encoded)


@pytest.mark.parametrize("lookahead", [0, 4])
def test_eight_devices_draw_the_indices_of_one(lookahead):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    options = dict(rng=jax.random.key(3), guidance_scale=(1.1, 4.0), lookahead=lookahead)
    split, whole = (
        PriorPipeline(*models.prior(PRIOR), mesh=devices).generate_indices(
            np.arange(mesh.size), **options
        )
        for devices in (mesh, None)
    )
    np.testing.assert_array_equal(split, whole)
    assert split.addressable_shards[0].data.shape == (1, 16)


def test_batch_that_does_not_divide_over_the_mesh_is_refused():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    tokenizer = TokenizerPipeline(*models.tokenizer(TOKENIZER), mesh=mesh)
    prior = PriorPipeline(*models.prior(PRIOR), mesh=mesh)
    with pytest.raises(ValueError, match="batch_size 2 does not divide over 8"):
        DarPipeline(prior, tokenizer).stream(LABELS, rng=jax.random.key(0))
    with pytest.raises(ValueError, match="use a multiple of 8"):
        tokenizer.encode(np.zeros((12, 32, 32, 3), np.float32))


def test_each_device_reads_its_own_part_only(workdir, monkeypatch):
    """No process reads a whole parameter that it shards, so none holds the model twice."""
    sizes = []
    make_array = jax.make_array_from_callback

    def record(shape, sharding, callback):
        def counted(index):
            part = callback(index)
            sizes.append((part.size, int(np.prod(shape))))
            return part

        return make_array(shape, sharding, counted)

    monkeypatch.setattr(jax, "make_array_from_callback", record)
    from_pretrained(workdir, mesh=make_mesh(MeshConfig(data=1, fsdp=8)))
    assert sizes
    assert all(part * 8 == whole for part, whole in sizes if whole >= MIN_SHARDED_SIZE)


def test_compute_dtype_is_an_argument(workdir):
    pipelines = [from_pretrained(workdir, compute=Compute(dtype=dtype)) for dtype in DTYPES]
    for pipeline, dtype in zip(pipelines, DTYPES, strict=True):
        assert pipeline.tokenizer.model.compute.dtype == "float32"
        assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(pipeline.tokenizer.params))
        read = tree.flatten(pipeline.prior.sampling_params)
        is_kernel = {name: name.endswith("kernel") for name in read}
        assert any(is_kernel.values()) and not all(is_kernel.values())
        # The residual stream is float32, and so is what enters it without a product.
        assert all(
            leaf.dtype == (dtype if is_kernel[name] else jnp.float32) for name, leaf in read.items()
        )
    single, half = (p.prior.logits(LABELS, np.zeros((2, 16), np.int32)) for p in pipelines)
    assert 0 < jnp.abs(single - half).max() < BFLOAT16_ROUNDING


@pytest.mark.parametrize("path", ["model", pytest.param("dar_tokenizer", marks=pytest.mark.slow)])
def test_tokenizer_decodes_in_a_dtype_of_its_own(workdir, path):
    images = np.random.default_rng(0).uniform(-1, 1, (4, 32, 32, 3)).astype(np.float32)
    single, half = (
        from_pretrained(workdir / path, compute=Compute(decode_dtype=dtype)) for dtype in DTYPES
    )
    single, half = (getattr(pipeline, "tokenizer", pipeline) for pipeline in (single, half))
    codes = single.encode(images)
    np.testing.assert_array_equal(codes, half.encode(images))
    decoded = [tokenizer.decode(codes, noise=images) for tokenizer in (single, half)]
    assert 0 < jnp.abs(decoded[0] - decoded[1]).mean() < BFLOAT16_ROUNDING


def test_half_precision_directory_is_widened(workdir, copy):
    config, params = model_dir.load_model(copy)
    half = jax.tree.map(lambda array: array.astype(jnp.bfloat16), params)
    companions = {"tokenizer": workdir / "dar_tokenizer"}
    model_dir.save_model(copy, "dar_prior", config["model"], half, {}, companions=companions)
    loaded = jax.tree.leaves(from_pretrained(copy).prior.params)
    for array, expected in zip(loaded, jax.tree.leaves(half), strict=True):
        assert array.dtype == jnp.float32
        np.testing.assert_array_equal(array, expected.astype(np.float32))


def spoil(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: spoil(p, kind="vqgan"),
            "unknown kind 'vqgan' must be one of dar_tokenizer, ",
        ),
        (lambda p: spoil(p, model=3), r"not a readable model directory .*no kind and model"),
        (lambda p: (p / "config.json").write_text("[]"), "no kind and model"),
        (lambda p: spoil(p, model={"depth": 3}), "unknown key 'depth'"),
        (
            lambda p: spoil(p, model={"num_layers": 2, "dim": 64, "num_heads": 2, "ffn_dim": 192}),
            r"weights do not fit the config: .*condition_embed/embedding is .* and \d+ more",
        ),
        (
            lambda p: (p / "model.safetensors").write_bytes(b"cut"),
            "copy is not a readable model directory",
        ),
        (lambda p: (p / "tokenizer" / "config.json").unlink(), "not a readable model directory"),
        (
            lambda p: spoil(p / "tokenizer", kind="dar_prior"),
            "tokenizer holds a dar_prior, expected a dar_tokenizer",
        ),
    ],
)
def test_damage_is_one_line(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message) as caught:
        from_pretrained(copy)
    assert "\n" not in str(caught.value)


def test_tokenizer_of_another_prior_is_refused(copy):
    config = json.loads((copy / "tokenizer" / "config.json").read_text())
    spoil(copy / "tokenizer", model={**config["model"], "num_tokens": 32})
    with pytest.raises(ValueError, match=r"num_tokens=16, but the tokenizer in .* num_tokens=32"):
        from_pretrained(copy)


SIZES = (0, -1, 10**7, 2**63)


def sizes_of(config, path=()):
    """Yield the paths of all whole numbers of an architecture."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from sizes_of(value, (*path, name))
        elif type(value) is int or (isinstance(value, list) and value):
            yield (*path, name)


@pytest.mark.parametrize("kind", ["dar_tokenizer", "dar_prior", "transdiff", "kl_vae"])
def test_sizes_are_bounded_before_anything_is_made(tmp_path, kind):
    """Every size at zero, negative and huge: one line at once, or a size that has a meaning."""
    model = json.loads(json.dumps(dataclasses.asdict(KINDS[kind].architecture())))
    paths = list(sizes_of(model))
    assert len(paths) >= 5
    for path in paths:
        for size in SIZES:
            spoilt = json.loads(json.dumps(model))
            block = spoilt
            for name in path[:-1]:
                block = block[name]
            block[path[-1]] = [size] if isinstance(block[path[-1]], list) else size
            (tmp_path / "config.json").write_text(json.dumps({"kind": kind, "model": spoilt}))
            line = refusal_or_none(tmp_path)
            assert (line is None) == (size == 0 and path[-1] in MAY_BE_ZERO), (path, size, line)


def refusal_or_none(directory):
    try:
        open_model(directory)
    except ValueError as error:
        (line,) = str(error).splitlines()
        return line


@pytest.mark.parametrize("names", [5, "cat", [1, 2], {"0": "cat"}, None])
def test_class_names_of_another_type_are_one_line(copy, names):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "class_names": names}))
    assert "class_names must be a list of names" in refusal_or_none(copy)
