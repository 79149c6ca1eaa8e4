"""Opens images: anything that names an image becomes an upright RGB `PIL.Image`, or one clear error."""

import io
import os
import pathlib
import re
import stat
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lvlm_jax.errors import LVLMError, shown
from lvlm_jax.processors import addresses

# Larger than any camera's image, 300 MB once decoded: a larger header is a mistake or an attack.
MAX_PIXELS = 100_000_000
LYING = (5, 6, 7, 8)  # EXIF orientations that swap width and height
LONGEST_NAME = 200  # characters of a name in a message


def open_image(source: Any, allow_urls: bool = False) -> Image.Image:
    """Reads an image as upright 8-bit RGB.

    The conversion equals that of transformers and of LLaVA's own scripts, so that figures agree: the EXIF orientation
    is applied, palettes are looked up, transparency is dropped, and animations give their first frame. 16-bit images
    are scaled to 8 bits (Pillow's own conversion would clip them at 255).

    Args:
        source: a path; a `PIL.Image`; an array `[H, W]`, `[H, W, 1]`, `[H, W, 3]` or `[H, W, 4]` of uint8 (0 to 255),
            uint16 (0 to 65535) or floating point (0 to 1); the bytes of a file, or a file open for reading; a dict with
            "bytes" or "path", as in `datasets`, or with "url", as in OpenAI's `image_url`; an address: `file://...`,
            `data:image/png;base64,...`, `https://...`.
        allow_urls: whether to download images (`http://` and `https://`).

    Raises:
        LVLMError: a missing file, a file that is not an image or is truncated, an image of more than 100 million pixels
            (according to its header, before anything is decoded), an array of another form, or an address that is not
            allowed or cannot be read.
    """
    return _with_image(source, _to_rgb, allow_urls)


def image_size(source: Any, allow_urls: bool = False) -> tuple[int, int]:
    """(width, height) of the result of `open_image`; for most files, this reads only the header.

    Raises:
        LVLMError: as `open_image`, but damage after the header may go unnoticed.
    """
    return _with_image(source, _upright_size, allow_urls)


def in_folder(folder: str | os.PathLike, name: str) -> pathlib.Path | str:
    """The image that a question file names: a path relative to the folder, or an address unchanged."""
    return name if addresses.is_address(name) else pathlib.Path(folder) / name


def _with_image(source: Any, read: Callable[[Image.Image, str], Any], allow_urls: bool) -> Any:
    """Calls `read(image, name)` with the opened image."""
    if isinstance(source, Mapping):
        source = _of_dict(source)
    if isinstance(source, Image.Image):
        return read(source, "the PIL image")
    name = "the bytes"
    if isinstance(source, str) and addresses.is_address(source):
        name, source = addresses.read(source, allow_urls)
    if isinstance(source, str | os.PathLike):
        try:
            path = pathlib.Path(source)
        except (TypeError, ValueError) as error:  # raised by a user's own path type
            raise LVLMError(f"an image's path is {shown(source)}: {_reason(error)}") from error
        _check_file(path)
        return _read(path, str(path), read)
    if isinstance(source, bytes | bytearray | memoryview):
        return _read(io.BytesIO(source), name, read)
    if hasattr(source, "__array__"):
        return read(_from_array(_array(source)), "the array")
    if callable(getattr(source, "read", None)):
        return _read(io.BytesIO(_content(source)), "the open file", read)
    raise LVLMError(
        f"an image was given as {type(source).__name__}; expected a path, a PIL image, an array [H, W, 3], the bytes "
        "of a file, or an address"
    )


def _array(source: Any) -> np.ndarray:
    try:
        return np.asarray(source)
    except Exception as error:  # arrays of other libraries may raise anything
        raise LVLMError(f"an image array cannot be read: {_reason(error)}; give a NumPy array") from error


def _of_dict(image_dict: Mapping) -> Any:
    """The image in a dict of `datasets` (bytes, path) or OpenAI (url)."""
    for key in ("bytes", "path", "url"):
        if image_dict.get(key) is not None:
            return image_dict[key]
    raise LVLMError(
        f"an image was given as a dict with {', '.join(map(repr, image_dict)) or 'nothing'}; expected one of 'bytes', "
        "'path' and 'url' in it"
    )


def _content(file: Any) -> bytes:
    """All bytes of an open file, from its beginning if it can seek."""
    try:
        if getattr(file, "seekable", bool)():
            file.seek(0)
        content = file.read()
    except Exception as error:  # users' file objects may raise anything
        raise LVLMError(f"an image's open file cannot be read: {_reason(error)}") from error
    if not isinstance(content, bytes):
        raise LVLMError("an image's open file gives text; open it in mode 'rb'")
    return content


def _check_file(path: pathlib.Path) -> None:
    """Raises an `LVLMError` unless the path is a regular file; reading a pipe could block for ever."""
    name = _shown(str(path))
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LVLMError(f"image {name} does not exist; check the path") from error
    except (OSError, ValueError) as error:  # too long, or characters that no file name may contain
        reason = getattr(error, "strerror", None) or _reason(error)
        raise LVLMError(f"image {name} cannot be opened: {reason}; check the path") from error
    if stat.S_ISDIR(mode):
        raise LVLMError(f"image {name} is a folder; give one image file")
    if not stat.S_ISREG(mode):
        raise LVLMError(f"image {name} is a pipe, a socket or a device; give one image file")


def _read(file: pathlib.Path | io.BytesIO, name: str, read: Callable[[Image.Image, str], Any]) -> Any:
    """Calls `read(image, name)` with an opened image file."""
    try:
        with warnings.catch_warnings():
            # Pillow's warnings about large images and inconsistent headers are hidden; `_check_header` has our limit.
            warnings.simplefilter("ignore")
            # Given a path, Pillow would memory-map files, and swap the sides of TIFF images.
            stream = file.open("rb") if isinstance(file, pathlib.Path) else file
            with stream, Image.open(stream) as image:
                return read(image, name)
    except LVLMError:
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise LVLMError(_too_large(f"{int(pixels[0]):,}" if pixels else "too many", name)) from error
    except UnidentifiedImageError as error:
        raise LVLMError(
            f"image {_shown(name)} is not in an image format that Pillow supports (JPEG, PNG, WebP, …); check the "
            "file's real format"
        ) from error
    except OSError as error:
        raise LVLMError(f"image {_shown(name)} cannot be opened: {error.strerror or _reason(error)}") from error
    except Exception as error:  # damaged files raise whatever their format's decoder raises
        raise _damaged(name, error) from error


def _shown(name: str) -> str:
    return repr(name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME // 2]}…")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _too_large(pixels: str, name: str) -> str:
    return f"image {_shown(name)} says it has {pixels} pixels, the limit is {MAX_PIXELS:,}; make it smaller"


def _check_header(image: Image.Image, name: str) -> None:
    """Refuses, before anything is decoded, images that would take too much memory or run a program."""
    if image.format == "EPS":
        raise LVLMError(f"image {_shown(name)} is PostScript, a program, and is not run; convert it to PNG or JPEG")
    if image.width * image.height > MAX_PIXELS:
        raise LVLMError(_too_large(f"{image.width:,} x {image.height:,}", name))
    if image.width == 0 or image.height == 0:
        raise LVLMError(f"image {_shown(name)} is empty ({image.width} x {image.height}); give one with pixels")


def _damaged(name: str, error: Exception) -> LVLMError:
    return LVLMError(
        f"image {_shown(name)} cannot be decoded ({_reason(error)}); it may be truncated or damaged: copy it again"
    )


def _upright_size(image: Image.Image, name: str) -> tuple[int, int]:
    _check_header(image, name)
    try:
        # Pillow returns the upright size of a TIFF, although its EXIF record still has the orientation.
        lying = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) in LYING
    except Exception as error:  # raised by a decoder
        raise _damaged(name, error) from error
    return image.size[::-1] if lying else image.size


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_header(image, name)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = Image.fromarray(_to_eight_bits(np.asarray(image), image.mode))
        return image.convert("RGB")
    except Exception as error:  # raised by a decoder
        raise _damaged(name, error) from error


def _to_eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Converts grey values of more than eight bits per pixel, `[H, W]`, to uint8."""
    if mode == "F":
        values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
        scale = 255.0 if values.max() <= 1 else 1.0  # TIFF files use either range
    elif mode == "I":
        scale = 1 / 256 if values.max() > 255 else 1.0  # 32-bit files contain 16-bit or 8-bit grey values
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
    return Image.fromarray(values)
