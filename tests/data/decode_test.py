"""Picture files of all sorts to 8-bit RGB."""

import io
import sys
import types

import numpy as np
import pytest
from PIL import Image

from dar_jax.data import decode as decoder
from dar_jax.data.decode import (
    MAX_ASPECT,
    CorruptTally,
    UnreadablePictureError,
    decode,
    encode_png,
    picture_suffixes,
    readable_formats,
)
from dar_jax.data.transforms import resize_shorter_side

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_png_round_trip_is_exact():
    np.testing.assert_array_equal(decode(encode_png(PIXELS), "a"), PIXELS)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_other_modes_become_rgb_as_pillow_converts_them(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    found = decode(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), "a")
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))
    assert found.shape == (9, 7, 3) and found.dtype == np.uint8


def test_cmyk_jpeg_keeps_its_colours():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    found = decode(encoded(red, "JPEG", quality=95), "a").reshape(-1, 3)
    np.testing.assert_allclose(found.mean(axis=0), [255, 0, 0], atol=8)


def jpegs():
    """JPEGs of all kinds by what they are, and whether their pixels are decoded without Pillow."""
    smooth = np.clip(np.add.outer(np.arange(33), np.arange(47))[..., None] * [3, 2, 1], 0, 255)
    image = Image.fromarray((smooth + RNG.integers(0, 9, smooth.shape)).clip(0, 255).astype("u1"))
    turned = Image.Exif()
    turned[0x0112] = 6
    for sampling in ("4:4:4", "4:2:2", "4:2:0"):
        yield sampling, encoded(image, "JPEG", subsampling=sampling, quality=85), True
    yield "progressive", encoded(image, "JPEG", progressive=True), True
    yield "coarse", encoded(image, "JPEG", quality=5), True
    yield "grey", encoded(image.convert("L"), "JPEG"), True
    yield "CMYK", encoded(image.convert("CMYK"), "JPEG"), False
    yield "turned", encoded(image, "JPEG", exif=turned), False
    yield "thin", encoded(image.resize((MAX_ASPECT * 3, 3)), "JPEG"), True


@pytest.mark.parametrize(
    ("data", "is_plain"), [p[1:] for p in jpegs()], ids=[p[0] for p in jpegs()]
)
def test_jpeg_has_the_same_pixels_without_pillow(data, is_plain, monkeypatch):
    pytest.importorskip("simplejpeg")
    found, plain = decode(data, "a"), decoder._plain_jpeg(data)
    assert (plain is not None) == is_plain
    monkeypatch.setattr(decoder, "_plain_jpeg", lambda _: None)
    np.testing.assert_array_equal(found, decode(data, "a"))


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_jpeg_is_refused_either_way(keep):
    data = encoded(Image.fromarray(np.tile(PIXELS, (9, 9, 1))), "JPEG")
    with pytest.raises(UnreadablePictureError, match="truncated"):
        decode(data[: int(keep * len(data))], "a")


def test_alpha_is_dropped():
    image = Image.fromarray(np.dstack([PIXELS, np.zeros((9, 7), np.uint8)]))
    np.testing.assert_array_equal(decode(encoded(image), "a"), PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    found = decode(encoded(Image.fromarray(values), kind), "a")
    np.testing.assert_array_equal(found[..., 1], [[0, 0, 1], [128, 254, 255]])


def test_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(data, "a"), np.asarray(frames[0]))


def test_photographs_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned to the left
    data = encoded(Image.fromarray(PIXELS), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data, "a"), np.rot90(PIXELS, -1))


JPEG = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
FLOAT_TIFF = encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a picture"),
        (b"GIF it is not", "not a picture"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (encode_png(PIXELS)[:-30], ""),
        (FLOAT_TIFF, "no range"),
    ],
)
def test_broken_files_are_named(data, reason):
    with pytest.raises(UnreadablePictureError, match=rf"^cats/a\.jpg: .*{reason}"):
        decode(data, "cats/a.jpg")


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "SGI", "XBM", "PCX", "IM"])
def test_formats_that_are_not_meant_are_not_opened(kind, monkeypatch):
    data = encoded(Image.new("1" if kind == "XBM" else "RGB", (16, 16)), kind)
    monkeypatch.setattr(Image.Image, "load", None)  # EPS would start Ghostscript
    with pytest.raises(UnreadablePictureError, match="not a picture of a known format"):
        decode(data, "a.png")


@pytest.mark.parametrize("kind", readable_formats())
def test_damaged_files_of_every_format_are_named_or_read(kind):
    data = encoded(Image.fromarray(PIXELS), kind)
    rng = np.random.default_rng(len(kind))
    outcomes = []
    for _ in range(300):
        broken = bytearray(data)
        for place in rng.integers(0, min(len(data), 80), 3):
            broken[place] = rng.choice([0, 127, 255])
        try:
            decode(bytes(broken), "a.png", max_pixels=10_000)
        except UnreadablePictureError as error:
            outcomes.append(str(error))
    assert outcomes and all(text.startswith("a.png: ") for text in outcomes)


@pytest.mark.parametrize("suffix", [".jpg", ".jfif", ".tga", ".avif", ".jp2", ".webp", ".qoi"])
def test_formats_are_found_by_content_and_their_suffixes_are_known(suffix):
    assert suffix in picture_suffixes()
    kind = Image.registered_extensions()[suffix]
    data = encoded(Image.fromarray(PIXELS), kind)
    assert decode(data, "a.png").shape == PIXELS.shape


@pytest.mark.parametrize("suffix", [".eps", ".pdf", ".pfm", ".svg", ".txt", ".npz", ""])
def test_suffixes_of_other_files_are_not_known(suffix):
    assert suffix not in picture_suffixes()


def test_plugin_that_is_installed_adds_its_format(monkeypatch):
    """A stand-in for `pillow_heif`, which registers its format when it is told to."""

    def register():
        Image.register_open("HEIF", Image.OPEN["PNG"][0], lambda prefix: prefix[4:8] == b"ftyp")
        Image.register_extension("HEIF", ".heic")

    monkeypatch.setitem(
        sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register)
    )
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
    for function in (readable_formats, picture_suffixes):
        function.cache_clear()
    try:
        assert "HEIF" in readable_formats() and ".heic" in picture_suffixes()
    finally:
        for function in (readable_formats, picture_suffixes):
            function.cache_clear()


@pytest.mark.parametrize("shape", [(1, 3000, 3), (30_000, 1, 3), (2, 2 * MAX_ASPECT + 1, 3)])
def test_thin_pictures_are_refused_before_they_are_decoded(shape, monkeypatch):
    data = encode_png(np.zeros(shape, np.uint8))
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(UnreadablePictureError, match=f"more than {MAX_ASPECT} times the other"):
        decode(data, "a")


def test_picture_at_the_limit_of_thinness_is_read_and_scaled_within_bounds():
    pixels = decode(encode_png(np.zeros((1, MAX_ASPECT, 3), np.uint8)), "a")
    assert resize_shorter_side(pixels, 32).size == 3 * MAX_ASPECT * 32**2


def test_tally_counts_a_picture_once_and_refuses_too_many():
    tally = CorruptTally(lambda: 100, max_fraction=0.02)
    for index in (3, 3, 7, 3):
        tally.add(UnreadablePictureError(f"{index}.jpg: truncated"))
    assert len(tally) == 2
    with pytest.raises(ValueError, match=r"3 of 100 .*max_corrupt_fraction=0\.02 .*9\.jpg") as e:
        tally.add(UnreadablePictureError("9.jpg: truncated"))
    assert len(str(e.value).splitlines()) == 1
