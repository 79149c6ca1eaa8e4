"""Opening pictures: modes, orientation, and one clear error for everything that is no picture."""

import base64
import functools
import http.server
import io
import os
import struct
import threading
import urllib.parse
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.processors import addresses
from lvlm_jax.processors.images import image_size, open_image, within


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


def gif(screen, frame):
    """The header of an animation, and one frame's."""
    header = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
    return header + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02L\x01\x00;"


@pytest.mark.parametrize("size", [(30_000, 30_000), (12_000, 12_000)])
@pytest.mark.parametrize("make", [lambda s: png_with_header(*s), lambda s: gif(s, (1, 1)), lambda s: gif((1, 1), s)])
def test_a_huge_header_is_refused_before_decoding(tmp_path, size, make):
    (tmp_path / "bomb").write_bytes(make(size))
    for read in (open_image, image_size):
        with pytest.raises(LVLMError, match="pixels, the limit is 100,000,000"):
            read(tmp_path / "bomb")


def test_postscript_is_not_run():
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n"
    for source in (program, Image.open(io.BytesIO(program))):
        with pytest.raises(LVLMError, match="is PostScript, a program, and is not run"):
            open_image(source)


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


@pytest.fixture
def file(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a b.png")
    return tmp_path / "a b.png"


@pytest.mark.parametrize(
    "given",
    [
        lambda file: file.read_bytes(),
        lambda file: bytearray(file.read_bytes()),
        lambda file: io.BytesIO(file.read_bytes()),
        lambda file: file.open("rb"),
        lambda file: {"bytes": file.read_bytes(), "path": None},
        lambda file: {"bytes": None, "path": str(file)},
        lambda file: {"url": file.as_uri()},
        lambda file: "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode(),
        lambda file: "data:image;base64," + urllib.parse.quote(base64.b64encode(file.read_bytes())),
        lambda file: "data:image/png," + urllib.parse.quote(file.read_bytes()),
        lambda file: file.as_uri(),
        lambda file: f"file:{urllib.parse.quote(str(file))}",
    ],
)
def test_images_as_people_hand_them_over(given, file, pixels):
    np.testing.assert_array_equal(np.asarray(open_image(given(file))), pixels)
    assert image_size(given(file)) == (30, 20)


def test_a_file_that_was_read_before_is_read_from_its_beginning(file, pixels):
    content = io.BytesIO(file.read_bytes())
    content.read()
    np.testing.assert_array_equal(np.asarray(open_image(content)), pixels)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"", "'the bytes' is not a picture"),
        (b"no picture", "'the bytes' is not a picture"),
        ("data:image/png;base64,@@@", "is no base64 text"),
        ("data:image/png;base64", "has no data"),
        ("data:image/png;base64,AAAA", "data:image/png;base64,AAAA…' is not a picture"),
        ("file:///nowhere/a.png", "'/nowhere/a.png' does not exist"),
        ("file://elsewhere/a.png", "lies on another machine"),
        ("s3://bucket/a.png", "of a kind that is not read; download it"),
        ({"bytes": None, "path": None}, "a dict with 'bytes', 'path'; expected one of"),
        ({}, "a dict with nothing; expected one of"),
        (io.StringIO("text"), "open it in mode 'rb'"),
    ],
)
def test_what_is_handed_over_and_is_no_image(given, message):
    for read in (open_image, image_size):
        with pytest.raises(LVLMError, match=message) as caught:
            read(given)
        assert "\n" not in str(caught.value)


def test_a_closed_file_is_refused(file):
    with file.open("rb") as closed:
        pass
    with pytest.raises(LVLMError, match="open file cannot be read"):
        open_image(closed)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Gives files, and says nothing about it."""

    def log_message(self, *said):
        pass


@pytest.fixture
def address(file):
    """Where a server of this machine gives the file's folder."""
    handler = functools.partial(Quiet, directory=file.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_addresses_are_read_where_the_user_allows_it(address, file, pixels, monkeypatch):
    place = address + urllib.parse.quote(file.name)
    with pytest.raises(LVLMError, match="nothing is downloaded unless you say so; give --allow-urls"):
        open_image(place)
    np.testing.assert_array_equal(np.asarray(open_image(place, allow_urls=True)), pixels)
    assert image_size({"url": place}, allow_urls=True) == (30, 20)
    with pytest.raises(LVLMError, match="cannot be downloaded: HTTP Error 404"):
        open_image(address + "missing.png", allow_urls=True)
    with pytest.raises(LVLMError, match="cannot be downloaded"):
        open_image("https://127.0.0.1:1/a.png", allow_urls=True)
    monkeypatch.setattr(addresses, "LARGEST_DOWNLOAD", 100)
    with pytest.raises(LVLMError, match="more than 100 bytes"):
        open_image(place, allow_urls=True)


def test_tiff_files_lie_upright_once(tmp_path):
    corner = np.zeros((4, 6, 3), np.uint8)
    corner[0, 0] = 255
    for orientation, place, size in (
        (1, (0, 0), (6, 4)),
        (3, (3, 5), (6, 4)),
        (6, (0, 3), (4, 6)),
        (8, (5, 0), (4, 6)),
    ):
        for mode in ("RGB", "L"):  # Pillow maps files of grey pictures into memory
            path = tmp_path / f"{orientation}{mode}.tiff"
            Image.fromarray(corner).convert(mode).save(path, tiffinfo={0x0112: orientation})
            image = np.asarray(open_image(path))
            assert image[place].tolist() == [255] * 3 and image.sum() == 3 * 255
            assert image_size(path) == size == open_image(path).size


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.ppm", b"P6\n4 x\n255\n" + bytes(48)),
        ("b.ppm", b"P6\n4 4\n99999999\n" + bytes(48)),
        ("c.ppm", b"P6\n4 4\n255\n" + bytes(7)),
        ("d.ppm", b"P3\n2 2\n255\n1 2 nothing"),
        ("a.dds", b"DDS " + struct.pack("<4I", 124, 0, 4, 4) + b"\xff" * 108),
        ("b.dds", b"DDS " + bytes(124)),
        ("a.avif", b"\x00\x00\x00\x1cftypavif" + b"\x00" * 60),
        ("a.tiff", b"II*\x00\xff\xff\xff\x7f"),
        ("a.gif", b"GIF89a\x04\x00\x04\x00\xff\x00\x00"),
        ("a.bmp", b"BM" + b"\xff" * 60),
    ],
)
def test_a_damaged_file_of_any_format_is_one_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    for given in (tmp_path / name, content):
        with pytest.raises(LVLMError, match=r"cannot be (decoded|opened)|is not a picture") as caught:
            open_image(given)
        assert "\n" not in str(caught.value)


def test_names_that_no_file_has(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    expected = {
        "pipe.png": "is a pipe",
        "a" * 300 + ".png": "cannot be opened: File name too long",
        "caf\ud83d.png": "cannot be opened|does not exist",
        "a\0b.png": "cannot be opened: .*null",
        "a.png/b.png": "does not exist",
    }
    for name, message in expected.items():
        for read in (open_image, image_size):
            with pytest.raises(LVLMError, match=message) as caught:
                read(tmp_path / name)
            said = str(caught.value)
            assert "\n" not in said and len(said) < 400
            said.encode()  # half a letter is written out
    with pytest.raises(LVLMError, match="is a pipe"):
        open_image("/dev/null")


def test_a_file_of_questions_may_name_addresses():
    assert within("folder", "a.png") == Path("folder/a.png")
    for name in ("data:image/png;base64,AAAA", "file:///a.png", "https://example.org/a.png"):
        assert within("folder", name) == name
