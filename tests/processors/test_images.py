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
from lvlm_jax.processors.images import image_size, in_folder, open_image


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


@pytest.fixture
def file(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a b.png")
    return tmp_path / "a b.png"


def test_rgb_arrives_unchanged_from_path_image_and_array(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    for source in (path, str(path), Image.fromarray(pixels), pixels, pixels / 255.0):
        image = open_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_other_modes(pixels, tmp_path):
    """Transparency is dropped as in transformers, palettes are looked up, sixteen bits are scaled and not cut off."""
    alpha = np.zeros((20, 30, 1), np.uint8)
    Image.fromarray(np.concatenate([pixels, alpha], -1)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.png")), pixels)
    colours = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)[np.array([[0, 1], [1, 0]])]
    Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "a.gif")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.gif")), colours)
    grey = np.array([[0, 256, 32768, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    for source in (tmp_path / "grey.png", grey):
        np.testing.assert_array_equal(np.asarray(open_image(source))[0, :, 0], [0, 1, 128, 255])


def test_pictures_lie_upright_once(tmp_path):
    image = Image.new("RGB", (8, 4), "white")
    exif = image.getexif()
    exif[0x0112] = 6  # stored lying on its side
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (4, 8)
    with Image.open(tmp_path / "a.jpg") as lying:
        for source in (tmp_path / "a.jpg", lying, np.asarray(open_image(tmp_path / "a.jpg"))):
            assert image_size(source) == (4, 8)
    corner = np.zeros((4, 6, 3), np.uint8)
    corner[0, 0] = 255
    places = {1: ((0, 0), (6, 4)), 3: ((3, 5), (6, 4)), 6: ((0, 3), (4, 6)), 8: ((5, 0), (4, 6))}
    for orientation, (place, size) in places.items():
        for mode in ("RGB", "L"):  # Pillow maps TIFF files of grey pictures into memory
            path = tmp_path / f"{orientation}{mode}.tiff"
            Image.fromarray(corner).convert(mode).save(path, tiffinfo={0x0112: orientation})
            image = np.asarray(open_image(path))
            assert image[place].tolist() == [255] * 3 and image.sum() == 3 * 255
            assert image_size(path) == size == open_image(path).size


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


def refused(read, given, message):
    """The error is one printable line of moderate length."""
    with pytest.raises(LVLMError, match=message) as caught:
        read(given)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 400
    said.encode()  # half a letter is written out


PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n"
NO_PICTURES = [
    (b"", "'the bytes' is not in an image format"),
    (b"no picture", "'the bytes' is not in an image format"),
    ("data:image/png;base64,@@@", "is not base64 text"),
    ("data:image/png;base64", "has no data"),
    ("data:image/png;base64,AAAA", "data:image/png;base64,AAAA…' is not in an image format"),
    ("file:///nowhere/a.png", "'/nowhere/a.png' does not exist"),
    ("file://elsewhere/a.png", "is on another machine"),
    ("s3://bucket/a.png", "of an unsupported kind; download it"),
    ("https://example.org/a.jpg", "download it"),
    ({"bytes": None, "path": None}, "a dict with 'bytes', 'path'; expected one of"),
    ({}, "a dict with nothing; expected one of"),
    (io.StringIO("text"), "open it in mode 'rb'"),
    ("/dev/null", "is a pipe"),
]


def test_what_is_no_picture():
    for given, message in NO_PICTURES:
        for read in (open_image, image_size):
            refused(read, given, message)
    for program in (PROGRAM, Image.open(io.BytesIO(PROGRAM))):
        refused(open_image, program, "is PostScript, a program, and is not run")
    for array, message in (
        (np.zeros((3, 20, 30), np.uint8), "move the channels"),
        (np.zeros((20, 30, 3), np.int64), "dtype int64"),
        (np.full((20, 30, 3), 200.0), "from 0 to 1"),
        (np.zeros((0, 30, 3), np.uint8), "is empty"),
        (7, "given as int"),
    ):
        refused(open_image, array, message)


def test_files_that_are_no_pictures(file):
    folder, whole, damaged = file.parent, file.read_bytes(), "cannot be (decoded|opened)|is not in an image format"
    for name, content, message in (
        ("text.jpg", b"not a picture", "not in an image format"),
        ("empty.jpg", b"", "not in an image format"),
        ("half.png", whole[:900], "truncated"),
        ("a.ppm", b"P6\n4 x\n255\n" + bytes(48), damaged),
        ("b.ppm", b"P6\n4 4\n99999999\n" + bytes(48), damaged),
        ("d.ppm", b"P3\n2 2\n255\n1 2 nothing", damaged),
        ("a.dds", b"DDS " + struct.pack("<4I", 124, 0, 4, 4) + b"\xff" * 108, damaged),
        ("a.avif", b"\x00\x00\x00\x1cftypavif" + b"\x00" * 60, damaged),
        ("a.tiff", b"II*\x00\xff\xff\xff\x7f", damaged),
    ):  # damage of more formats, and more of it, is among the fuzzed cases
        (folder / name).write_bytes(content)
        for given in (folder / name, content):
            refused(open_image, given, message)
    refused(open_image, Image.open(folder / "half.png"), "truncated")
    os.mkfifo(folder / "pipe.png")
    for name, message in (
        ("missing.jpg", "does not exist"),
        ("", "is a folder"),
        ("pipe.png", "is a pipe"),
        ("a" * 300 + ".png", "cannot be opened: File name too long"),
        ("caf\ud83d.png", "cannot be opened|does not exist"),
        ("a\0b.png", "cannot be opened: .*null"),
        ("a.png/b.png", "does not exist"),
    ):
        for read in (open_image, image_size):
            refused(read, folder / name, message)
    with file.open("rb") as closed:
        pass
    refused(open_image, closed, "open file cannot be read")


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
    assert in_folder("folder", "a.png") == Path("folder/a.png")  # as files of questions name pictures
    for name in ("data:image/png;base64,AAAA", "file:///a.png", "https://example.org/a.png"):
        assert in_folder("folder", name) == name


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
    place, read = address + urllib.parse.quote(file.name), functools.partial(open_image, allow_urls=True)
    refused(open_image, place, "downloads are off by default; give --allow-urls")
    np.testing.assert_array_equal(np.asarray(read(place)), pixels)
    assert image_size({"url": place}, allow_urls=True) == (30, 20)
    refused(read, address + "missing.png", "cannot be downloaded: HTTP Error 404")
    refused(read, "https://127.0.0.1:1/a.png", "cannot be downloaded")
    monkeypatch.setattr(addresses, "LARGEST_DOWNLOAD", 100)
    refused(read, place, "more than 100 bytes")
