"""`--mode=sample`: large sets that survive interruption, figures, and what it says to bad input."""

import functools
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from configs import common
from dar_jax.common.image import LEGIBLE_SIZE, to_pixels
from dar_jax.config import build as read_config
from dar_jax.data.sources import DataConfig, load_source
from dar_jax.data.transforms import center_crop
from dar_jax.generation import batches, editing
from dar_jax.generation.image_set import ImageSet
from dar_jax.modes.sample import sample
from tests import tiny_model, tiny_transdiff
from tests.tiny_model import SIZE, TOKENIZER

ROOT = pathlib.Path(__file__).parents[2]
NUM_IMAGES = 12
ONE_LEVEL = 1  # a compiled program per batch size rounds differently


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True, scope="module")
def loaded_once():
    """Most of the time of a mistake is loading the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "from_pretrained", functools.cache(batches.from_pretrained))
        yield


@pytest.fixture
def run(model, tmp_path):
    """Sample with these settings; return `WORKDIR/samples`."""

    def run(data_size=32, **settings):
        config = common.base()
        config.data.update(source="synthetic", image_size=data_size)
        defaults = dict(model=str(model), batch_size=8, labels=(3, 1), prefix_tokens=(2, 4))
        config.sample.update(defaults | settings)
        sample(read_config(config), str(tmp_path / "run"))
        return tmp_path / "run/samples"

    return run


def contents(directory):
    """Images and tokens of a set, in order."""
    pieces = [dict(np.load(path)) for path in sorted(directory.glob("set/0*.npz"))]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A set that nothing interrupted, of one batch."""
    config = common.base()
    config.sample.update(model=str(model), batch_size=16, labels=(3, 1, 4), num_images=NUM_IMAGES)
    workdir = tmp_path_factory.mktemp("whole")
    sample(read_config(config), str(workdir))
    return workdir / "samples"


def test_killed_set_goes_on_with_another_batch_size(run, whole, monkeypatch):
    write = ImageSet.write

    def write_once_then_die(self, first, *arrays):
        if first:
            raise KeyboardInterrupt
        write(self, first, *arrays)

    settings = dict(num_images=NUM_IMAGES, labels=(3, 1, 4))
    with monkeypatch.context() as patch:
        patch.setattr(ImageSet, "write", write_once_then_die)
        with pytest.raises(KeyboardInterrupt):
            run(**settings)
    samples = run(batch_size=16, **settings)
    names = sorted(path.name for path in samples.glob("set/*.npz"))
    assert names == ["00000000-00000008.npz", "00000008-00000012.npz"]
    resumed, expected = contents(samples), contents(whole)
    np.testing.assert_array_equal(resumed["indices"], expected["indices"])
    np.testing.assert_array_equal(resumed["labels"], [3, 1, 4] * (NUM_IMAGES // 3))
    np.testing.assert_allclose(
        resumed["arr_0"].astype(int), expected["arr_0"].astype(int), atol=ONE_LEVEL
    )


def start_processes(model, workdir, *arguments):
    """Start a job of two processes that draw together."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "dar_jax.main", "--config=configs/mnist.py:dar", "--mode=sample"),
        *(f"--workdir={workdir}", f"--config.sample.model={model}", "--config.sample.labels=3,1,4"),
        *arguments,
        *("--config.sample.batch_size=2", "--num_processes=2"),
        f"--coordinator_address=localhost:{port}",
    ]
    return [
        subprocess.Popen([*command, f"--process_id={process}"], cwd=ROOT) for process in range(2)
    ]


@pytest.mark.slow
def test_killed_job_of_two_processes_goes_on(model, whole, tmp_path):
    total = 400
    options = [f"--config.sample.num_images={total}", "--config.sample.guidance_scale=1"]
    processes = start_processes(model, tmp_path, *options)
    while not list(tmp_path.glob("samples/set/0*.npz")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.wait()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("samples/set/0*.npz")}
    assert not list(tmp_path.glob("samples/samples_*"))
    processes = start_processes(model, tmp_path, *options)
    assert [process.wait() for process in processes] == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    expected, found = contents(whole), contents(tmp_path / "samples")
    np.testing.assert_array_equal(found["indices"][:NUM_IMAGES], expected["indices"])
    with np.load(tmp_path / f"samples/samples_{total}x{SIZE}x{SIZE}x3.npz") as merged:
        np.testing.assert_array_equal(merged["arr_0"], found["arr_0"])
        assert len(np.unique(merged["arr_0"], axis=0)) == total


def test_merged_set_holds_the_images(whole):
    with np.load(whole / f"samples_{NUM_IMAGES}x{SIZE}x{SIZE}x3.npz") as merged:
        np.testing.assert_array_equal(merged["arr_0"], contents(whole)["arr_0"])
        np.testing.assert_array_equal(merged["arr_1"], contents(whole)["labels"])
        assert len(np.unique(merged["arr_0"], axis=0)) == NUM_IMAGES


def test_set_of_another_seed_is_refused(whole, run, tmp_path):
    (tmp_path / "run").symlink_to(whole.parent)
    with pytest.raises(ValueError, match="is made with seed=0, not 1;"):
        run(labels=(3, 1, 4), num_images=NUM_IMAGES, seed=1)


def test_png_set_resumes_by_the_image(run, whole):
    settings = dict(num_images=NUM_IMAGES, labels=(3, 1, 4), format="png")
    samples = run(**settings)
    pictures = sorted(samples.glob("set/*.png"))
    assert len(pictures) == NUM_IMAGES
    merged = samples / f"samples_{NUM_IMAGES}x{SIZE}x{SIZE}x3.npz"
    before = np.load(merged)["arr_0"]
    np.testing.assert_array_equal(np.asarray(Image.open(pictures[5])), before[5])
    for lost in (pictures[2], pictures[11]):
        lost.unlink()
    kept = [path.stat().st_mtime_ns for path in pictures if path.exists()]
    run(**settings)
    assert kept == [p.stat().st_mtime_ns for i, p in enumerate(pictures) if i not in (2, 11)]
    after = np.load(merged)["arr_0"].astype(int)
    np.testing.assert_allclose(after, before.astype(int), atol=ONE_LEVEL)


@pytest.fixture
def drawn_batches(monkeypatch):
    """What the figures draw."""
    drawn = []

    def record(*arguments, **options):
        for batch in generate(*arguments, **options):
            drawn.append(batch)
            yield batch

    generate = editing.generate
    monkeypatch.setattr(editing, "generate", record)
    return drawn


def cells(path, rows, columns):
    """The pictures of a figure, [rows, columns, SIZE, SIZE, 3], and its margins (top, left)."""
    figure = np.asarray(Image.open(path))
    cell = LEGIBLE_SIZE + 1  # and a border
    top, left = figure.shape[0] - rows * cell, figure.shape[1] - columns * cell
    body = figure[top:, left:].reshape(rows, cell, columns, cell, 3).swapaxes(1, 2)
    scale = LEGIBLE_SIZE // SIZE
    return body[:, :, :-1:scale, :-1:scale], (top, left)


def test_layout_keeps_the_first_tokens_under_every_label(run, drawn_batches, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    samples = run(prefix_image=str(tmp_path / "grey.png"), prefix_tokens=(2, 4), labels=(3, 1, 4))
    pictures, (top, left) = cells(samples / "layout.png", rows=2, columns=4)
    assert min(top, left) > 0  # names of rows and columns
    reference = center_crop(np.repeat(pixels[..., None], 3, axis=-1), SIZE)
    for row, batch in zip(pictures, drawn_batches, strict=True):
        np.testing.assert_array_equal(row[0], reference)
        np.testing.assert_array_equal(row[1:], batch.previews[-1])
        np.testing.assert_array_equal(batch.labels, [3, 1, 4])
    tokens = drawn_batches[1].kept["indices"]
    assert (tokens[:, :4] == tokens[0, :4]).all()
    assert (drawn_batches[0].kept["indices"][:, :2] == tokens[0, :2]).all()
    assert len(np.unique(drawn_batches[0].kept["indices"][:, 2:], axis=0)) == 3
    assert [path.name for path in samples.iterdir()] == ["layout.png"]


def test_variations_share_a_prefix_and_a_label(run, drawn_batches):
    samples = run(prefix_image="test:3", prefix_tokens=(4,), variations=5, labels=(2,))
    (batch,) = drawn_batches
    np.testing.assert_array_equal(batch.labels, [2] * 5)
    assert (batch.kept["indices"][:, :4] == batch.kept["indices"][0, :4]).all()
    assert len(np.unique(batch.kept["indices"][:, 4:], axis=0)) == 5
    pictures, _ = cells(samples / "variations.png", rows=1, columns=6)
    np.testing.assert_array_equal(pictures[0, 1:], batch.previews[-1])


def test_interpolation_goes_from_prefix_to_prefix(run, drawn_batches, model):
    where = dict(prefix_image="test:3", prefix_image_to="test:8", prefix_tokens=(2, 4))
    samples = run(**where, images_per_class=3, labels=(2,))
    pictures, _ = cells(samples / "interpolation.png", rows=2, columns=5)
    drawn = np.concatenate([batch.previews[-1] for batch in drawn_batches])
    np.testing.assert_array_equal(pictures[:, 1:-1].reshape(drawn.shape), drawn)
    tokens = np.concatenate([batch.kept["indices"] for batch in drawn_batches])
    tokenizer = batches.from_pretrained(model).autoencoder
    ends = np.asarray(tokenizer.encode(pictures[0, [0, -1]]))
    np.testing.assert_array_equal(tokens[[0, 2], :2], ends[:, :2])
    np.testing.assert_array_equal(tokens[[3, 5], :4], ends[:, :4])
    assert [path.name for path in samples.iterdir()] == ["interpolation.png"]
    run(prefix_image="test:8", prefix_tokens=(2,), labels=(2,))
    np.testing.assert_array_equal(drawn_batches[-1].kept["indices"][0], tokens[2])


def test_reconstructions_show_originals_and_every_step(run, model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    names = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for name, turned in zip(names, (pixels, pixels[::-1]), strict=True):
        Image.fromarray(turned).save(name)
    samples = run(originals=(",".join(names),), data_size=SIZE)
    steps = TOKENIZER.num_steps
    pictures, (top, left) = cells(samples / "reconstructions.png", rows=2, columns=1 + steps)
    assert min(top, left) > 0
    np.testing.assert_array_equal(pictures[:, 0], [pixels, pixels[::-1]])
    tokenizer = batches.from_pretrained(model).autoencoder
    made = tokenizer.reconstruct(pictures[:, 0], rng=jax.random.key(0))
    expected = to_pixels(np.asarray(made.images)).astype(int)
    np.testing.assert_allclose(pictures[:, -1].astype(int), expected, atol=ONE_LEVEL)


@pytest.mark.parametrize("kind", ["dar_tokenizer", "kl_vae"])
def test_autoencoders_draw_held_out_pictures(run, model, tmp_path, kind):
    path, columns = model.parent / kind, 1 + TOKENIZER.num_steps
    if kind == "kl_vae":
        path, columns = tiny_transdiff.save_vae(tmp_path), 2
    samples = run(model=str(path), data_size=SIZE)
    assert [path.name for path in samples.iterdir()] == ["reconstructions.png"]
    pictures, _ = cells(samples / "reconstructions.png", rows=10, columns=columns)
    source = load_source(DataConfig(source="synthetic", image_size=SIZE), "test")
    np.testing.assert_array_equal(pictures[:, 0], source.pixels[:10])


@pytest.fixture
def files(tmp_path):
    """Pictures, masks and other things to point at."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "files"
    folder.mkdir()
    pixels = rng.integers(0, 256, (SIZE, SIZE, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "rgba.png")
    mask = np.zeros((SIZE, SIZE), np.uint8)
    Image.fromarray(mask).save(folder / "black.png")
    mask[:, : SIZE // 2] = 255
    Image.fromarray(mask).save(folder / "left.png")
    Image.fromarray(mask[:-2]).save(folder / "short.png")
    (folder / "text.png").write_text("no picture")
    return folder


def test_inpainting_redraws_what_is_white(run, files):
    samples = run(
        inpaint_image=f"{files}/rgba.png", inpaint_mask=f"{files}/left.png", images_per_class=3
    )
    pictures, _ = cells(samples / "inpainting.png", rows=2, columns=5)
    original, kept, drawn = pictures[:, 0], pictures[:, 1], pictures[:, 2:]
    half = SIZE // 2
    expected = np.asarray(Image.open(files / "rgba.png").convert("RGB"))
    np.testing.assert_array_equal(original, [expected] * 2)
    np.testing.assert_array_equal(kept[:, :, half:], original[:, :, half:])
    assert (kept[:, :, :half] == editing.GREY).all()
    known = np.broadcast_to(original[:, None], drawn.shape)[..., half:, :].astype(int)
    np.testing.assert_allclose(drawn[..., half:, :].astype(int), known, atol=ONE_LEVEL)
    assert len(np.unique(drawn[..., :half, :].reshape(6, -1), axis=0)) == 6


MISTAKES = {
    "missing picture": (dict(prefix_image="{f}/none.png"), "cannot read {f}/none.png: No such"),
    "a folder": (dict(prefix_image="{f}"), "cannot read {f}: Is a directory"),
    "no picture": (dict(prefix_image="{f}/text.png"), "text.png: not a picture"),
    "no such held-out picture": (dict(prefix_image="test:5000"), "pictures 0..1023"),
    "prefix too long": (dict(prefix_image="test:0", prefix_tokens=(4, 8)), "numbers in 0..7"),
    "negative prefix": (dict(prefix_image="test:0", prefix_tokens=(-1,)), "numbers in 0..7"),
    "no prefix": (dict(prefix_image="test:0", prefix_tokens=()), "numbers in 0..7"),
    "variations of what": (dict(variations=3), "variations=3 needs prefix_image"),
    "two labels": (dict(prefix_image="test:0", prefix_tokens=(4,), variations=3), "one class"),
    "interpolation from where": (
        dict(prefix_image_to="test:0"),
        "'test:0' needs prefix_image=FILE",
    ),
    "interpolation to where": (
        dict(
            prefix_image="test:0", prefix_image_to="{f}/none.png", labels=(3,), prefix_tokens=(2,)
        ),
        "config.sample.prefix_image_to: cannot read {f}/none.png: No such",
    ),
    "interpolation of one image": (
        dict(
            **dict(prefix_image="test:0", prefix_image_to="test:1", prefix_tokens=(2,)),
            **dict(labels=(3,), images_per_class=1),
        ),
        "config.sample.images_per_class=1 must be at least 2",
    ),
    "interpolation of two labels": (
        dict(prefix_image="test:0", prefix_image_to="test:1", prefix_tokens=(2,)),
        "are of one class, not 2",
    ),
    "label": (dict(num_images=4, labels=(3, 10)), "10 is not a class, expected 0..9"),
    "label in a figure": (dict(prefix_image="test:0", prefix_tokens=(4,), labels=(-1,)), "-1"),
    "label is a word": (dict(labels=("bird",)), "no class is called 'bird'; there is"),
    "no mask": (dict(inpaint_image="test:0"), "inpaint_mask=FILE need each other"),
    "mask of another size": (
        dict(inpaint_image="{f}/rgba.png", inpaint_mask="{f}/short.png"),
        "short.png is 16 x 14 pixels large, its picture 16 x 16",
    ),
    "black mask": (
        dict(inpaint_image="{f}/rgba.png", inpaint_mask="{f}/black.png"),
        "black.png is white nowhere",
    ),
    "no such original": (dict(originals=("test:5000",), data_size=SIZE), "originals=test:5000"),
    "originals and a set": (dict(originals=("test:0",), num_images=4), "originals=('test:0',) and"),
    "originals of another size": (dict(originals=("test:0",)), "config.data.image_size=32 must"),
    "number": (dict(num_images=-1), "num_images=-1 must be at least 0"),
    "format": (dict(num_images=4, format="jpg"), "format='jpg' must be one of npz, png"),
    "schedule": (dict(num_images=4, guidance_schedule="sine"), "'sine'"),
    "solver": (dict(num_images=4, solver="heun"), "'heun' must be one of euler, adams_bashforth2"),
    "interval": (dict(num_images=4, guidance_interval=(3, 99)), "guidance_interval=(3, 99)"),
    "three scales": (dict(num_images=4, guidance_scale=(1.0, 2.0, 3.0)), "(1.0, 2.0, 3.0)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_and_writes_nothing(run, files, tmp_path, name):
    settings, message = MISTAKES[name]
    settings = {
        key: value.format(f=files) if isinstance(value, str) else value
        for key, value in settings.items()
    }
    with pytest.raises(ValueError, match=re.escape(message.format(f=files))) as caught:
        run(**settings)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_job_of_two_processes_draws_the_pictures_of_one(model, run, tmp_path):
    options = ["--config.sample.images_per_class=2", "--config.sample.guidance_scale=4"]
    processes = start_processes(model, tmp_path / "two", *options)
    assert [process.wait() for process in processes] == [0, 0]
    settings = dict(labels=(3, 1, 4), images_per_class=2, guidance_scale=(4.0,), solver="euler")
    written = [run(**settings), tmp_path / "two" / "samples"]
    one, two = (np.load(samples / "samples.npz") for samples in written)
    np.testing.assert_array_equal(two["labels"], one["labels"])
    np.testing.assert_allclose(two["images"].astype(int), one["images"].astype(int), atol=ONE_LEVEL)
    assert len({tuple(sorted(path.name for path in each.iterdir())) for each in written}) == 1
