"""Images of requests: data URIs, and addresses on hosts that the operator allows. Nothing else is opened.

Bytes and pixels are counted before anything is decoded. Only internet addresses are read: the host name is resolved
once, private addresses are refused, and the connection goes to the checked address. Redirects are errors, and downloads
have a time limit.
"""

import base64
import binascii
import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import urllib.parse
import warnings
from collections.abc import Container

from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.processors.images import open_image
from lvlm_jax.serving.errors import ApiError
from lvlm_jax.serving.limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # other decoders are not used for untrusted bytes
TIMEOUT = 10  # seconds for each part of a download
LONGEST = 30  # seconds for the whole download
# Networks whose addresses contain an address of the other protocol: NAT64 and 6to4.
CARRIERS = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "2002::/16")))
SHOWN = 60  # characters of an address in a message


def read(address: str, limits: Limits, hosts: Container[str] = (), pixels_left: float = float("inf")) -> Image.Image:
    """The image of an `image_url`, upright RGB.

    Args:
        address: the data URI or the address on the internet.
        limits: limits on bytes and pixels.
        hosts: hosts from which images may be downloaded.
        pixels_left: pixels that remain for this image within the request's limit.

    Raises:
        ApiError: the address is not allowed or unreadable (400), the image has too many bytes or pixels (413), or the
            address is not a string (422).
    """
    if not isinstance(address, str):
        raise ApiError(422, "image_url has no url; expected a string", param="messages")
    scheme = address[:8].partition(":")[0].lower()
    if scheme == "data":
        content = _of_data(address, limits)
    elif scheme in ("http", "https"):
        content = _downloaded(address, limits, hosts)
    else:
        raise _refused(f"an image's address is {address[:SHOWN]!r}; expected data:image/png;base64,...")
    return decoded(content, limits, pixels_left)


def decoded(content: bytes, limits: Limits, pixels_left: float = float("inf")) -> Image.Image:
    """The image in the bytes of a file, upright RGB.

    Raises:
        ApiError: the bytes are not an image, or the image has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # only our own limit applies
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
    except Exception as error:  # damaged headers raise different errors in each format
        raise _refused(f"an image of {len(content):,} bytes is none of {', '.join(FORMATS)}, or is damaged") from error
    if width * height > limits.max_pixels * 1_000_000:
        message = f"an image has {width} x {height} pixels; the limit is {limits.max_pixels} million"
        raise ApiError(413, message, "image_too_large", "messages")
    if width * height > pixels_left:
        message = f"the images have more than {limits.max_request_pixels} million pixels together"
        raise ApiError(413, message, "image_too_large", "messages")
    try:
        return open_image(content)
    except LVLMError as error:
        raise _refused(error) from error


def _refused(message: object) -> ApiError:
    return ApiError(400, message, "invalid_image", "messages")


def _too_large(limits: Limits) -> ApiError:
    return ApiError(413, f"an image has more than {limits.max_image} MiB", "image_too_large", "messages")


def _of_data(address: str, limits: Limits) -> bytes:
    header, comma, content = address.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise _refused(f"an image's data is {address[:SHOWN]!r}; expected data:image/png;base64,...")
    if len(content) * 3 // 4 > limits.max_image << 20:
        raise _too_large(limits)
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused(f"an image's data is not base64 ({error}); encode it again") from error


def _downloaded(address: str, limits: Limits, hosts: Container[str]) -> bytes:
    try:
        parts = urllib.parse.urlsplit(address)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError as error:
        raise _refused(f"an image's address is {address[:SHOWN]!r}, which is malformed ({error})") from error
    if host not in hosts:
        raise _refused(
            f"images from {host[:SHOWN]!r} are not downloaded; send data:image/png;base64,..., or have the operator "
            "allow the host"
        )
    secure = parts.scheme.lower() == "https"
    port = port or (443 if secure else 80)
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    connection = ending = None
    late = threading.Event()
    try:
        connection = _connected(host, _public(host, port), port, secure)
        ending = threading.Timer(LONGEST, _cut, [connection.sock, late])
        ending.start()
        connection.request("GET", target, headers={"User-Agent": "lvlm_jax", "Accept": "image/*"})
        response = connection.getresponse()
        if response.status != 200:
            redirect = " (redirects are not followed)" if 300 <= response.status < 400 else ""
            raise _refused(f"{address[:SHOWN]!r} answered {response.status}{redirect}")
        content = response.read((limits.max_image << 20) + 1)
        if late.is_set():
            raise _refused(f"{address[:SHOWN]!r} was not downloaded within {LONGEST} s")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _refused(f"{address[:SHOWN]!r} cannot be downloaded: {type(error).__name__}") from error
    finally:
        if ending is not None:
            ending.cancel()
        if connection is not None:
            connection.close()
    if len(content) > limits.max_image << 20:
        raise _too_large(limits)
    return content


def _cut(connection: socket.socket, late: threading.Event) -> None:
    """Ends a download that takes too long: its reader sees the end of the data."""
    late.set()
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _public(host: str, port: int) -> str:
    """An address of the host, if all its addresses are on the internet."""
    addresses = {entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    for one in addresses:
        address = ipaddress.ip_address(one.partition("%")[0])
        if not address.is_global or address.is_multicast or any(address in network for network in CARRIERS):
            raise _refused(f"{host[:SHOWN]!r} is on a private network; nothing is read from there")
    return sorted(addresses)[0]


def _connected(host: str, ip: str, port: int, secure: bool) -> http.client.HTTPConnection:
    """A connection to the checked address `ip`; with TLS, the certificate must be that of `host`."""
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    connection.sock = socket.create_connection((ip, port), TIMEOUT)
    if secure:
        connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
    return connection
