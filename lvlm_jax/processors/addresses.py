"""Reads images from addresses: `data:`, `file:`, and `http:` if the user allows it."""

import base64
import http.client
import re
import urllib.parse
import urllib.request
from pathlib import Path

from lvlm_jax.errors import LVLMError

LARGEST_DOWNLOAD = 100_000_000  # bytes
TIMEOUT = 30  # seconds without an answer
SHOWN = 100  # characters of an address in a message
SCHEME = re.compile(r"(https?|file|data|ftp|s3|gs):", re.IGNORECASE)


def is_address(name: str) -> bool:
    """Whether a string is an address and not a path."""
    return SCHEME.match(name) is not None


def read(address: str, allow_urls: bool) -> tuple[str, bytes | Path]:
    """Reads an address: returns its name for messages, and its bytes or the file that it names.

    Args:
        address: a string for which `is_address` is true.
        allow_urls: whether to download `http` and `https` addresses.

    Raises:
        LVLMError: the scheme is not supported or not allowed, or nothing can be read there.
    """
    scheme = address.partition(":")[0].lower()
    name = address if len(address) <= SHOWN else f"{address[:SHOWN]}…"
    if scheme == "data":
        return f"{address[:40]}…", _of_data(address)
    if scheme == "file":
        return name, _file(address)
    if scheme not in ("http", "https"):
        raise LVLMError(f"image {name!r} is an address of an unsupported kind; download it first")
    if not allow_urls:
        raise LVLMError(
            f"image {name!r} is an address, and downloads are off by default; give --allow-urls "
            "(allow_urls=True to LVLM.from_pretrained), or download it first"
        )
    return name, _download(address, name)


def _of_data(address: str) -> bytes:
    """The bytes of `data:[kind][;base64],...`."""
    header, comma, content = address.partition(",")
    try:
        if comma and header.lower().endswith(";base64"):
            return base64.b64decode("".join(urllib.parse.unquote(content).split()), validate=True)
        if comma:
            return urllib.parse.unquote_to_bytes(content)
    except ValueError as error:
        raise LVLMError(f"image {address[:40]!r}… is not base64 text ({error}); encode it again") from error
    raise LVLMError(f"image {address[:40]!r}… has no data; expected data:image/png;base64,...")


def _file(address: str) -> Path:
    """The path of `file:///path` or `file:path`."""
    parts = urllib.parse.urlsplit(address)
    if parts.netloc not in ("", "localhost"):
        raise LVLMError(f"image {address[:SHOWN]!r} is on another machine; expected file:///path")
    return Path(urllib.request.url2pathname(parts.path))


def _download(address: str, name: str) -> bytes:
    request = urllib.request.Request(address, headers={"User-Agent": "lvlm_jax"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            content = response.read(LARGEST_DOWNLOAD + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LVLMError(f"image {name!r} cannot be downloaded: {reason}") from error
    if len(content) > LARGEST_DOWNLOAD:
        raise LVLMError(f"image {name!r} has more than {LARGEST_DOWNLOAD:,} bytes; make it smaller")
    return content
