"""Opening pictures: whatever a user names becomes one upright RGB `PIL.Image`, or one clear error."""

import os
import pathlib
import re
import struct
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lvlm_jax.errors import LVLMError

# Above any camera's picture, and 300 MB once decoded: a larger header is a mistake or an attack.
MAX_PIXELS = 100_000_000
LYING = (5, 6, 7, 8)  # orientations of the EXIF record that swap width and height
# What a damaged file raises depends on its format's decoder.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error)


def open_image(source) -> Image.Image:
    """Read a picture as upright 8-bit RGB.

    `source` is a path, a `PIL.Image`, or an array `[H, W]`, `[H, W, 1]`, `[H, W, 3]` or `[H, W, 4]` of uint8
    (0 to 255), uint16 (0 to 65535) or floating point (0 to 1).

    The conversion is the one that transformers and LLaVA's own scripts do, so that figures agree: the orientation
    in the EXIF record is applied, palettes are looked up, transparency is dropped, the first frame of an animation
    is taken. 16-bit pictures are scaled to 8 bits (Pillow's own conversion would cut them off at 255).

    Raises `LVLMError` for a missing file, a file that is no picture or is truncated, a picture of more than
    100 million pixels (told from its header, before anything is decoded), or an array of another form.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the PIL image")
    if isinstance(source, (str, os.PathLike)):
        return _read(source, _to_rgb)
    if hasattr(source, "__array__"):
        return _from_array(np.asarray(source))
    raise LVLMError(
        f"an image was given as {type(source).__name__}; expected a path, a PIL image or an array [H, W, 3]"
    )


def image_size(source) -> tuple[int, int]:
    """(width, height) of what `open_image` makes of a picture; of most files the header alone is read.

    Raises `LVLMError` as `open_image` does, unless the header does not tell.
    """
    if isinstance(source, Image.Image):
        return _upright_size(source, "the PIL image")
    if isinstance(source, (str, os.PathLike)):
        return _read(source, _upright_size)
    return open_image(source).size


def _read(source: str | os.PathLike, read: Callable[[Image.Image, str], Any]) -> Any:
    """What `read(image, name)` makes of a picture file."""
    if re.match(r"(https?|ftp|data|s3|gs):", str(source)):
        raise LVLMError(
            f"image {str(source)[:100]!r} is an address; only local files are read: download it first"
        )
    path = pathlib.Path(source)
    if path.is_dir():
        raise LVLMError(f"image {str(path)!r} is a folder; give one picture file")
    if not path.exists():
        raise LVLMError(f"image {str(path)!r} does not exist; check the path")
    try:
        with warnings.catch_warnings():
            # Pillow warns between its limit and ours; ours is the one that decides.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return read(image, str(path))
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise LVLMError(_too_large(f"{int(pixels[0]):,}" if pixels else "too many", path)) from error
    except UnidentifiedImageError as error:
        raise LVLMError(
            f"image {str(path)!r} is not a picture in a format that Pillow knows (JPEG, PNG, WebP, …); "
            "check that the file is what its name says"
        ) from error
    except OSError as error:
        raise LVLMError(f"image {str(path)!r} cannot be opened: {error.strerror or error}") from error


def _too_large(pixels: str, name) -> str:
    return (
        f"image {str(name)!r} says it has {pixels} pixels, the limit is {MAX_PIXELS:,}; "
        "make it smaller before asking about it"
    )


def _check_size(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise LVLMError(_too_large(f"{image.width:,} x {image.height:,}", name))
    if image.width == 0 or image.height == 0:
        raise LVLMError(f"image {name!r} is empty ({image.width} x {image.height}); give one with pixels")


def _damaged(name: str, error: Exception) -> LVLMError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return LVLMError(
        f"image {name!r} cannot be decoded ({reason}); it may be truncated or damaged: copy it again"
    )


def _upright_size(image: Image.Image, name: str) -> tuple[int, int]:
    _check_size(image, name)
    try:
        lying = image.getexif().get(ExifTags.Base.Orientation, 1) in LYING
    except DAMAGE as error:
        raise _damaged(name, error) from error
    return image.size[::-1] if lying else image.size


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_size(image, name)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except DAMAGE as error:
        raise _damaged(name, error) from error
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_eight_bits(np.asarray(image), image.mode))
    return image.convert("RGB")


def _to_eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of more than eight bits a pixel, `[H, W]`, as uint8."""
    if mode == "F":
        values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
        scale = 255.0 if values.max() <= 1 else 1.0  # TIFF files hold either range
    elif mode == "I":
        scale = 1 / 256 if values.max() > 255 else 1.0  # 32-bit files hold 16-bit or 8-bit grey
    else:
        scale = 1 / 256
    return np.clip(values * scale, 0, 255).astype(np.uint8)


def _from_array(values: np.ndarray) -> Image.Image:
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        hint = "; move the channels to the end" if values.ndim == 3 and values.shape[0] in (1, 3, 4) else ""
        raise LVLMError(
            f"an image array has shape {tuple(values.shape)}; expected [H, W], [H, W, 3] or [H, W, 4]{hint}"
        )
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.dtype == np.uint16:
        values = (values >> 8).astype(np.uint8)
    elif np.issubdtype(values.dtype, np.floating):
        if not (values.size and np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise LVLMError("a floating-point image array must hold values from 0 to 1; scale it first")
        values = np.rint(values * 255.0).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise LVLMError(
            f"an image array has dtype {values.dtype}; expected uint8 (0 to 255), uint16, or floats from 0 to 1"
        )
    return _to_rgb(Image.fromarray(values), "the array")
