"""Picture files of all sorts to 8-bit RGB."""

import io

import numpy as np
import pytest
from PIL import Image

from dar_jax.data.decode import CorruptTally, UnreadablePictureError, decode, encode_png

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


def test_tally_counts_a_picture_once_and_refuses_too_many():
    tally = CorruptTally(lambda: 100, max_fraction=0.02)
    for index in (3, 3, 7, 3):
        tally.add(index, UnreadablePictureError(f"{index}.jpg: truncated"))
    assert len(tally) == 2
    with pytest.raises(ValueError, match=r"3 of 100 .*max_corrupt_fraction=0\.02 .*9\.jpg") as e:
        tally.add(9, UnreadablePictureError("9.jpg: truncated"))
    assert len(str(e.value).splitlines()) == 1
