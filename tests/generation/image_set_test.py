"""Sets of images on disk: what is missing, who makes it, what is refused, and the one file."""

import contextlib
import dataclasses
import itertools
import subprocess
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
from absl import logging
from PIL import Image

from dar_jax.common.files import host
from dar_jax.generation import batches, resumable_arrays
from dar_jax.generation.config import SampleConfig
from dar_jax.generation.image_set import PIXELS, ImageSet
from dar_jax.generation.resumable_arrays import MANIFEST_NAME, is_whole_archive
from dar_jax.models.dar.options import DarSampling
from dar_jax.nn.compute import Compute
from dar_jax.parallel import leases
from dar_jax.pipelines.base import Pipeline
from tests.damage import DAMAGES, damage, warnings

LABELS = (7, 2, 5)
SIZE = 4
SETTINGS = {"seed": 0, "guidance_scale": (1.1, 8.0)}


def picture(index):
    """A picture that says which one it is."""
    return np.full((SIZE, SIZE, 3), index, np.uint8)


def fill(image_set, batch_size, stop_after=None, delay=0.0):
    """Write what is missing; return what was written."""
    written = []
    with contextlib.closing(image_set.rounds(batch_size)) as rounds:
        for first, stop in itertools.chain.from_iterable(rounds):
            if len(written) == stop_after:
                return written
            time.sleep(delay)
            pixels = np.stack([picture(index) for index in range(first, stop)])
            indices = np.zeros((stop - first, 2), np.int32)
            image_set.write(first, pixels, {"indices": indices})
            written.append((first, stop))
    return written


@pytest.fixture
def image_set(tmp_path):
    made = ImageSet(tmp_path / "set", 20, LABELS)
    made.bind(SETTINGS)
    return made


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_share_all_images_and_leave_no_lease(image_set, workers, monkeypatch):
    monkeypatch.setattr(resumable_arrays, "POLL_SECONDS", 0.01)
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(fill, image_set, 3, delay=0.05) for _ in range(workers)]
        shares = [job.result() for job in jobs]
    assert all(shares), "each has some"
    runs = [run for share in shares for run in share]
    assert sorted(index for run in runs for index in range(*run)) == list(range(20))
    assert not image_set.missing().any() and fill(image_set, 3) == []
    assert not [*image_set.directory.glob(".*")]


def test_batches_that_a_dead_process_had_taken_are_made_by_others(image_set):
    dead = subprocess.Popen(["true"])
    dead.wait()
    text = f"process {dead.pid} on {host()} (0) 3\n"
    (image_set.directory / ".lease-00000003-0").write_text(text)
    assert fill(image_set, batch_size=3)[1] == (3, 6)
    assert not [*image_set.directory.glob(".*")]


def test_batch_of_a_living_process_is_waited_for_by_name(image_set, monkeypatch, caplog):
    monkeypatch.setattr(resumable_arrays, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(leases, "GONE_SECONDS", 0.3)
    (image_set.directory / ".lease-00000003-0").write_text("process 1 on elsewhere (0) 3\n")
    logging.get_absl_logger().propagate = True
    with caplog.at_level("INFO", logger="absl"):
        written = fill(image_set, batch_size=3)
    assert written[-1] == (3, 6), "after all others"
    assert "Waiting for rows from 3 on, of process 1 on elsewhere (0)" in caplog.messages


@pytest.mark.parametrize("text", ["process 1 on elsewhere (0) 3\n", "garbage"])
def test_batch_of_a_lost_host_is_made_long_before_its_lease_has_run_out(
    image_set, text, monkeypatch, caplog
):
    monkeypatch.setattr(resumable_arrays, "POLL_SECONDS", 0.05)
    for start in (3, 9):
        (image_set.directory / f".lease-{start:08d}-0").write_text(text)
    logging.get_absl_logger().propagate = True
    begin = time.monotonic()
    with caplog.at_level("INFO", logger="absl"):
        written = fill(image_set, batch_size=3, delay=0.01)
    assert time.monotonic() - begin < leases.GONE_SECONDS / 4
    assert sorted(written[-2:]) == [(3, 6), (9, 12)], "after all others"
    assert sum("as well as" in message for message in caplog.messages) == 2
    np.testing.assert_array_equal(image_set.array(PIXELS), [picture(i) for i in range(20)])
    assert not [*image_set.directory.glob(".*")]


@pytest.mark.parametrize("image_format", ["npz", "png"])
def test_interrupted_set_goes_on_with_other_batches(tmp_path, image_format):
    image_set = ImageSet(tmp_path, 20, LABELS, image_format)
    first = fill(image_set, batch_size=3, stop_after=5)
    second = fill(image_set, batch_size=8)
    assert sorted(index for run in first + second for index in range(*run)) == list(range(20))
    np.testing.assert_array_equal(image_set.array(PIXELS), [picture(index) for index in range(20)])


def test_set_grows_and_shrinks(image_set):
    fill(image_set, batch_size=8)
    smaller = ImageSet(image_set.directory, 10, LABELS)
    assert not smaller.missing().any()
    assert len(smaller.array(PIXELS)) == 10
    assert fill(ImageSet(image_set.directory, 23, LABELS), batch_size=8) == [(20, 23)]


def test_failed_write_leaves_nothing(image_set, monkeypatch):
    def fail(file, **arrays):
        file.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        fill(image_set, batch_size=8)
    assert image_set.missing().all()
    assert [path.name for path in image_set.directory.iterdir()] == [MANIFEST_NAME]


def test_half_written_file_of_a_killed_run_is_no_piece(image_set):
    (image_set.directory / ".00000000-00000008-0123abcd.npz").write_bytes(b"half of it")
    assert image_set.missing().all()
    fill(image_set, batch_size=8)
    assert len(image_set.array(PIXELS)) == 20


def test_labels_take_turns(image_set):
    fill(image_set, batch_size=8)
    np.testing.assert_array_equal(image_set.labels_of(2, 7), [5, 7, 2, 5, 7])
    with np.load(image_set.directory / "00000008-00000016.npz") as piece:
        np.testing.assert_array_equal(piece["labels"], image_set.labels_of(8, 16))
        assert piece["indices"].shape == (8, 2)


@pytest.mark.parametrize(
    ("settings", "labels", "message"),
    [
        (SETTINGS | {"seed": 1}, LABELS, "is made with seed=0, not 1;"),
        (
            SETTINGS | {"guidance_scale": (4.0,)},
            LABELS,
            r"guidance_scale=\[1.1, 8.0\], not \[4.0\]",
        ),
        (SETTINGS | {"top_k": 3}, LABELS, "top_k=None, not 3"),
        (SETTINGS, (1,), r"labels=\[7, 2, 5\], not \[1\]"),
    ],
)
def test_other_settings_are_refused(image_set, settings, labels, message):
    image_set.bind(SETTINGS)
    with pytest.raises(ValueError, match=message):
        ImageSet(image_set.directory, 5, labels).bind(settings)


def test_images_of_unknown_settings_are_refused(image_set):
    fill(image_set, batch_size=8)
    (image_set.directory / MANIFEST_NAME).unlink()
    with pytest.raises(ValueError, match="pieces but no manifest.json"):
        image_set.bind(SETTINGS)


def test_merged_file_is_what_the_adm_evaluator_reads(image_set, tmp_path):
    fill(image_set, batch_size=8)
    path = tmp_path / "merged.npz"
    image_set.merge(path)
    # Its reader takes the header from the archive and streams the rest.
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        assert (shape, fortran, dtype) == ((20, SIZE, SIZE, 3), False, np.uint8)
    with np.load(path) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], [picture(i) for i in range(20)])
        np.testing.assert_array_equal(arrays["arr_1"], image_set.labels_of(0, 20))


def test_merged_file_of_another_set_is_none_of_this(image_set, tmp_path):
    fill(image_set, batch_size=8)
    path = tmp_path / "merged.npz"
    assert not image_set.is_merged(path)
    image_set.merge(path)
    assert image_set.is_merged(path)
    other = ImageSet(tmp_path / "other", 20, LABELS)
    other.bind({**SETTINGS, "seed": -1})
    assert not other.is_merged(path)


def test_merging_holds_few_pieces_at_a_time(tmp_path):
    image_set = ImageSet(tmp_path, 64, LABELS)
    piece = np.zeros((4, 128, 128, 3), np.uint8)
    for first in range(0, 64, 4):
        image_set.write(first, piece, {})
    tracemalloc.start()
    image_set.merge(tmp_path / "merged.npz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * piece.nbytes / 3


def test_lost_and_broken_pieces_are_named(image_set, tmp_path):
    fill(image_set, batch_size=8)
    path = image_set.directory / "00000008-00000016.npz"
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=f"cannot read .*{path.name}"):
        image_set.merge(tmp_path / "merged.npz")
    path.unlink()
    with pytest.raises(ValueError, match="lacks row 8 of 20"):
        image_set.merge(tmp_path / "merged.npz")
    assert not list(tmp_path.glob("*merged*"))


def test_pictures_of_another_size_are_refused(tmp_path):
    image_set = ImageSet(tmp_path, 2, LABELS, "png")
    for index, size in enumerate((4, 5)):
        Image.new("RGB", (size, size)).save(tmp_path / f"{index:08d}.png")
    with pytest.raises(ValueError, match=r"00000001.png holds arr_0 of \(5, 5, 3\)"):
        image_set.array(PIXELS)


def test_rows_are_read_across_pieces(image_set):
    fill(image_set, batch_size=8)
    for first, stop in ((0, 1), (5, 9), (7, 20), (16, 20)):
        rows = np.concatenate(list(image_set.rows(PIXELS, first, stop)))
        np.testing.assert_array_equal(rows, [picture(index) for index in range(first, stop)])
    assert image_set.names() == (PIXELS, "labels", "indices")


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("image_format", ["npz", "png"])
def test_damaged_pieces_are_made_again(tmp_path, caplog, image_format, how):
    image_set = ImageSet(tmp_path, 9, LABELS, image_format)
    image_set.bind(SETTINGS)
    fill(image_set, batch_size=3)
    before = image_set.array(PIXELS)
    path = sorted(tmp_path.glob(f"*.{image_format}"))[1]
    assert damage(path, how)
    with warnings(caplog) as told:
        image_set.bind(SETTINGS)
    assert how == "deleted" or (len(told) == 1 and "is damaged: it is made again" in told[0])
    assert image_set.missing().any()
    fill(image_set, batch_size=3)
    np.testing.assert_array_equal(image_set.array(PIXELS), before)


@pytest.mark.parametrize("image_format", ["npz", "png"])
@pytest.mark.parametrize("other", [SETTINGS, SETTINGS | {"seed": 1}])
def test_piece_of_other_rows_or_of_another_set_is_made_again(tmp_path, caplog, image_format, other):
    """It is whole, and lies under the name of another one."""
    image_sets = [ImageSet(tmp_path / n, 9, LABELS, image_format) for n in ("own", "other")]
    for image_set, settings in zip(image_sets, (SETTINGS, other), strict=True):
        image_set.bind(settings)
        fill(image_set, batch_size=3)
    own, other_set = image_sets
    before, pieces = own.array(PIXELS), sorted(own.directory.glob(f"*.{image_format}"))
    taken = pieces[1] if other == SETTINGS else other_set.directory / pieces[2].name
    pieces[2].write_bytes(taken.read_bytes())
    with warnings(caplog) as told:
        own.bind(SETTINGS)
    assert len(told) == 1 and f"{pieces[2].name} is damaged" in told[0]
    fill(own, batch_size=3)
    np.testing.assert_array_equal(own.array(PIXELS), before)


def test_piece_that_is_older_than_marks_is_kept(image_set):
    fill(image_set, batch_size=8)
    for path in image_set.directory.glob("*.npz"):
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = b""
    image_set.bind(SETTINGS)
    assert not image_set.missing().any()


@pytest.mark.parametrize("how", ["emptied", "truncated"])
def test_damaged_manifest_is_one_line(image_set, how):
    fill(image_set, batch_size=8)
    damage(image_set.directory / MANIFEST_NAME, how)
    with pytest.raises(ValueError, match=r"cannot read .*manifest\.json") as caught:
        image_set.bind(SETTINGS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_merged_file_is_noticed(image_set, tmp_path, how):
    fill(image_set, batch_size=8)
    path = tmp_path / "merged.npz"
    image_set.merge(path)
    assert is_whole_archive(path)
    damage(path, how)
    assert not is_whole_archive(path)


def test_set_depends_on_every_precision():
    def identity(**compute):
        parts = dict(compute=Compute(**compute), sampling=DarSampling())
        pipeline = mock.Mock(spec=Pipeline, settings=dataclasses.asdict, **parts)
        return batches.identity(SampleConfig(), pipeline, "model")

    low = {"dtype": "bfloat16"}
    variants = [{}, low, low | {"decode_dtype": "bfloat16"}, low | {"residual_dtype": "compute"}]
    variants += [{"decode_weights": "int8"}, {"decode_cache": "int8"}]
    assert len({str(identity(**compute)) for compute in variants}) == len(variants)
    assert identity(residual_dtype="compute") == identity()
