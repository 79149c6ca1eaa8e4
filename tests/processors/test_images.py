"""Opening pictures: modes, orientation, and one clear error for everything that is no picture."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.processors.images import image_size, open_image


def png_with_header(width, height):
    """A tiny PNG file whose header claims the given size."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_rgb_arrives_unchanged_from_path_image_and_array(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    for source in (path, str(path), Image.fromarray(pixels), pixels, pixels / 255.0):
        image = open_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_transparency_is_dropped_as_in_transformers(pixels, tmp_path):
    alpha = np.zeros((20, 30, 1), np.uint8)
    Image.fromarray(np.concatenate([pixels, alpha], -1)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.png")), pixels)


def test_palette_is_looked_up(tmp_path):
    colours = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)
    index = np.array([[0, 1], [1, 0]])
    Image.fromarray(colours[index]).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "a.gif")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.gif")), colours[index])


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path):
    grey = np.array([[0, 256, 32768, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", grey):
        np.testing.assert_array_equal(np.asarray(open_image(source))[0, :, 0], [0, 1, 128, 255])


def test_orientation_record_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4), "white")
    exif = image.getexif()
    exif[0x0112] = 6  # stored lying on its side
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (4, 8)
    with Image.open(tmp_path / "a.jpg") as lying:
        for source in (tmp_path / "a.jpg", lying, np.asarray(open_image(tmp_path / "a.jpg"))):
            assert image_size(source) == (4, 8)


@pytest.mark.parametrize("size", [(30_000, 30_000), (12_000, 12_000)])
def test_a_huge_header_is_refused_before_decoding(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_with_header(*size))
    for read in (open_image, image_size):
        with pytest.raises(LVLMError, match="pixels, the limit is 100,000,000"):
            read(tmp_path / "bomb.png")


def test_files_that_are_no_pictures(pixels, tmp_path):
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    expected = {
        "text.jpg": "not a picture",
        "empty.jpg": "not a picture",
        "half.png": "truncated",
        "missing.jpg": "does not exist",
        "": "is a folder",
    }
    for name, message in expected.items():
        with pytest.raises(LVLMError, match=message) as caught:
            open_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(LVLMError, match="truncated"):
        open_image(Image.open(tmp_path / "half.png"))
    with pytest.raises(LVLMError, match="download it"):
        open_image("https://example.org/a.jpg")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 20, 30), np.uint8), "move the channels"),
        (np.zeros((20, 30, 3), np.int64), "dtype int64"),
        (np.full((20, 30, 3), 200.0), "from 0 to 1"),
        (np.zeros((0, 30, 3), np.uint8), "is empty"),
        (7, "given as int"),
    ],
)
def test_arrays_that_are_no_pictures(array, message):
    with pytest.raises(LVLMError, match=message):
        open_image(array)
