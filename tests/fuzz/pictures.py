"""Readers of pictures, of conversations about them, and of the processors that take both."""

import base64
import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lvlm_jax import models
from lvlm_jax.processors import inputs, load, templates
from lvlm_jax.processors.images import image_size, open_image
from lvlm_jax.processors.qwen_vl import build_tokenizer, read_ranks
from tests import small
from tests.fuzz import generators as make
from tests.fuzz.engine import Reader, same, used
from tests.fuzz.questions import made
from tests.models.families import FAMILIES

FORMATS = {
    "PNG": ("RGB", "L", "P", "RGBA", "LA", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK"), "GIF": ("P", "L"),
    "WEBP": ("RGB", "RGBA"), "TIFF": ("RGB", "L", "1", "CMYK", "I;16", "F"), "BMP": ("RGB", "1", "P"),
    "PPM": ("RGB", "L", "1"), "ICO": ("RGBA",), "TGA": ("RGB", "L"), "PCX": ("RGB", "P"), "JPEG2000": ("RGB", "L"),
    "DDS": ("RGBA", "L"), "SGI": ("RGB",), "IM": ("RGB",), "QOI": ("RGB",), "ICNS": ("RGBA",), "AVIF": ("RGB",),
    "MPO": ("RGB",), "XBM": ("1",), "SPIDER": ("F",), "MSP": ("1",), "BLP": ("P",), "PALM": ("L",), "PDF": ("RGB",),
    "EPS": ("RGB",),
}  # fmt: skip


@functools.cache
def encoded(form: str, mode: str, orientation: int, frames: int = 1) -> bytes:
    """A small image in a format of Pillow's; empty if Pillow cannot write the format."""
    grey = np.arange(96, dtype=np.uint8).reshape(8, 12) * 2
    image = Image.fromarray(grey.astype(np.uint16) * 200) if mode == "I;16" else Image.fromarray(grey)
    if mode != "I;16":
        image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    try:
        frames = 1 if form == "AVIF" else frames  # Pillow's writer may crash with more
        more = {"save_all": True, "append_images": [image] * (frames - 1)} if frames > 1 else {}
        image.save(file, form, **({"exif": exif} if form in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF") else {}), **more)
    except Exception:
        return b""
    return file.getvalue()


@st.composite
def picture_bytes(draw) -> bytes:
    form = draw(st.sampled_from(tuple(FORMATS)))
    content = encoded(
        form, draw(st.sampled_from(FORMATS[form])), draw(st.integers(0, 9)), draw(st.sampled_from((1, 1, 1, 2)))
    )
    return draw(st.just(content) | make.damaged(content) | make.damaged(content) | st.binary(max_size=20))


def picture(content: bytes, folder: Path) -> None:
    """The image equals the one that Pillow reads, rotated upright."""
    path = folder / "a.png"
    path.write_bytes(content)
    ours = open_image(path)
    same(ours.mode, "RGB", "mode")
    same(image_size(path), ours.size, "size")
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
            theirs = ImageOps.exif_transpose(image).convert("RGB")
            same((ours.size, ours.tobytes()), (theirs.size, theirs.tobytes()), "pixels")
    same(open_image(content).tobytes(), ours.tobytes(), "pixels of the bytes")


PNG = encoded("PNG", "RGB", 1)
ADDRESS = "data:image/png;base64," + base64.b64encode(PNG).decode()
ARRAYS = (
    np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint16), np.zeros((4, 6, 1)), np.full((4, 6, 4), 1.5),
    np.zeros((4, 6, 3), np.float16), np.zeros((4, 6, 3), np.int64), np.zeros((0, 6, 3), np.uint8), np.zeros((2, 0)),
    np.zeros((4, 6, 2), np.uint8), np.zeros((1, 4, 6, 3), np.uint8), np.full((4, 6, 3), np.nan),
    np.zeros((4, 6), bool),
    np.zeros((4, 6, 3), ">u2"), np.zeros((4, 6, 3), complex), np.array([["a"]]),
    np.zeros((4, 6, 3), np.uint8)[::2, ::-1], np.array([[object()]]), np.zeros((4, 6), [("a", "u1")]),
)  # fmt: skip


class Odd:
    """Values that look like images but are not."""

    class Array:
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("no\narray")

    class File:
        def read(self):
            return 3

        def seek(self, place):
            raise OSError("no seeking")

    class Name:
        def __fspath__(self):
            return 3


IMAGE_VALUES = st.sampled_from(
    (
        *ARRAYS, PNG, bytearray(PNG), memoryview(PNG), Image.new("RGB", (4, 6)), Image.new("F", (4, 6)), Odd.Array(),
        Image.new("RGB", (0, 6)), Image.new("PA", (4, 6)), Image.new("I;16", (4, 6)), Odd.File(), Odd.Name(),
        "/dev/zero",
        "/dev/null", "/", "a.png", Path("a.png"), ADDRESS,
        "data:image/png;base64,%zz", "data:,", "http://a", "ftp://a", "file:a.png", "file://", "https://[::1", "//x/y",
        {"bytes": PNG}, {"path": "a.png"}, {"url": "a.png"}, {"bytes": 3}, {"path": {"path": "a.png"}},
        {"url": b"\xff"},
        {"image_url": {"url": {}}}, io.StringIO("x"), io.BytesIO(PNG),
    )
)  # fmt: skip
images = IMAGE_VALUES | make.any_values | st.dictionaries(st.sampled_from(("bytes", "path", "url")), make.any_values)


def image_argument(value: Any, folder: Path) -> None:
    ours = open_image(value)
    same(ours.mode, "RGB", "mode")
    same(min(ours.size) > 0, True, "pixels")
    if not hasattr(value, "read"):
        same(image_size(value), ours.size, "size")
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3:
        same(np.asarray(ours).tolist(), value.tolist(), "pixels")


@functools.cache
def family(name: str):
    return models.config_from_hf(FAMILIES[name].raw())


TALK = [
    {"role": "system", "content": "Be."},
    {"role": "user", "content": [{"type": "image", "image": "PNG"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "PNG"}}, {"type": "text", "text": "And?"}]},
]


@st.composite
def conversations(draw) -> Any:
    """Conversations with values of any kind in any place."""
    first = draw(st.integers(0, 3))
    talk = draw(make.changed(TALK[first:], images, most=3))
    return draw(st.just(talk) | st.just([talk]) | st.just((talk, talk)) | st.just({"messages": talk}) | make.any_values)


def with_pictures(value: Any) -> Any:
    """The conversation, with an image in the place of each "PNG"."""
    if isinstance(value, dict):
        return {key: with_pictures(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(with_pictures, value))
    return PNG if isinstance(value, str) and value == "PNG" else value


def conversation(value: Any, folder: Path) -> None:
    taken_by, config = small_processor()
    laid_out = inputs.from_messages(taken_by, config, with_pictures(value))
    same(laid_out.tokens.shape, laid_out.image_id.shape, "shapes")
    same(
        0 <= laid_out.tokens.min() and laid_out.tokens.max() < config.text.vocab_size, True, "tokens in the vocabulary"
    )
    used(laid_out.tail_rows, laid_out.image_count, laid_out.pictures)


@functools.cache
def small_processor():
    """The processor of the tests' small model, and a configuration for it."""
    family = FAMILIES["llava"]
    text = {"vocab_size": small.IMAGE_TOKEN_ID + 1, "max_position_embeddings": 512}
    raw = family.config(text=text, image_token_index=small.IMAGE_TOKEN_ID).to_dict()
    return small.build_processor(), models.config_from_hf(raw)


PIXELS = (
    np.zeros((1, 3, 28, 28), np.float32), np.full((1, 3, 28, 28), np.nan, np.float32), np.zeros((4, 12)),
    np.array([[1, 4, 6]]), np.array([[28, 28]]), np.zeros((1, 5, 3, 28, 28), np.float32),
)  # fmt: skip
ARRAY_NAMES = ("input_ids", "attention_mask", "pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
BATCH = {"input_ids": [[5, 6, 7, 8], [5, 5, 9, 9]], "attention_mask": [[1, 1, 1, 1], [0, 0, 1, 1]]}


@st.composite
def processor_arrays(draw) -> tuple[str, dict]:
    """A family, and what a processor might return for it."""
    values = make.any_values | st.sampled_from(ARRAYS) | st.sampled_from(PIXELS)
    arrays = dict(BATCH) | draw(st.dictionaries(st.sampled_from(ARRAY_NAMES), values, max_size=4))
    return draw(st.sampled_from(tuple(FAMILIES))), draw(make.changed(arrays, values)) if draw(st.booleans()) else arrays


def arrays(case: tuple[str, dict], folder: Path) -> None:
    name, given = case
    if not isinstance(given, dict):
        given = {"input_ids": given}
    laid_out = inputs.from_arrays(given, family(name))
    used(laid_out.tail_rows, laid_out.image_count, laid_out.pictures)


@functools.cache
def processor_files() -> make.Files:
    return made(small.write_processor)


def processor_folder(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    config = small_processor()[1]
    found = load.load_processor(folder, config)
    laid_out = inputs.from_messages(found, config, with_pictures(TALK[1:2]))
    same(bool(np.isfinite(laid_out.pixels).all()), True, "pixels are finite")


TEMPLATES = (
    small.CHAT_TEMPLATE,
    "{% for m in messages %}{{ m.role }}: {{ m.content if m.content is string else m.content[-1].text }}\n{% endfor %}",
    "{{ raise_exception('no\nsystem') }}",
    "{% for i in range(99999) %}{{ messages }}{% endfor %}",
    "{% macro a(n) %}{{ a(n + 1) }}{% endmacro %}{{ a(0) }}",
    "{{ messages[0].content * 1000 }}{{ 'x' * 1000000 }}",
    "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__ }}",
    "{% set x = namespace(a=1) %}{{ x.a / 0 }}",
)


@st.composite
def chat_templates(draw) -> str:
    text = draw(st.sampled_from(TEMPLATES))
    for _ in range(draw(st.integers(0, 3))):
        text = draw(make.changed_text(text))
    return text


def chat_template(text: str, folder: Path) -> None:
    one = small.build_processor()
    one.chat_template = text
    written = templates.render(one, templates.in_template_form(one, [{"role": "user", "content": "Hi"}]), True)
    written.encode()
    inputs.from_messages(one, small_processor()[1], [{"role": "user", "content": "Hi"}])
    templates.check_system(one, "Be.")


def _ranks() -> bytes:
    return b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)) + b"YWI= 256\n"


def tiktoken(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    tokenizer = build_tokenizer(read_ranks(folder / "qwen.tiktoken"))
    text = "ab Ünder"
    same(tokenizer.decode(tokenizer(text)["input_ids"]), text, "text")


READERS = (
    Reader("picture", picture_bytes(), picture, 4),
    Reader("image argument", images, image_argument, 2),
    Reader("conversation", conversations(), conversation, 3),
    Reader("processor's arrays", processor_arrays(), arrays, 2),
    Reader("processor's folder", st.deferred(lambda: make.changed_folder(processor_files())), processor_folder),
    Reader("chat template", chat_templates(), chat_template, 0.4),
    Reader("tiktoken", st.deferred(lambda: make.changed_folder({"qwen.tiktoken": _ranks()})), tiktoken, 0.5),
)
