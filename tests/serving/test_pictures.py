"""Addresses of images: nothing private, no redirects, nothing too large."""

import contextlib
import http.server
import socket
import threading
import time

import pytest

from lvlm_jax.serving import pictures
from lvlm_jax.serving.errors import ApiError
from lvlm_jax.serving.limits import Limits
from tests.serving.test_chat import uri


class Host(http.server.BaseHTTPRequestHandler):
    """Answers a picture, a redirect, or more than is allowed."""

    def do_GET(self):
        content = pictures.base64.b64decode(uri(1).partition(",")[2])
        status, content = {"/moved": (302, b""), "/large": (200, b"x" * (2 << 20))}.get(self.path, (200, content))
        self.send_response(status)
        self.send_header("Location", "/a.png")
        self.end_headers()
        if self.path == "/slow":  # a byte now and then, for ever
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def host():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_downloads(host, monkeypatch):
    limits, allowed = Limits(max_image=1), {"images.example"}

    def read(path, name="images.example"):
        return pictures.read(f"http://{name}:{host}{path}", limits, allowed)

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.0.1", host))])
    with pytest.raises(ApiError, match="private network"):
        read("/a.png")
    monkeypatch.setattr(pictures, "_public", lambda *_: "127.0.0.1")
    monkeypatch.setattr(pictures, "LONGEST", 0.5)
    assert read("/a.png").size == (28, 28)
    for path, name, status, words in [
        ("/moved", "images.example", 400, "redirects are not followed"),
        ("/large", "images.example", 413, "more than 1 MiB"),
        ("/slow", "images.example", 400, "not downloaded within 0.5 s"),
        ("/a.png", "other.example", 400, "are not downloaded"),
    ]:
        with pytest.raises(ApiError, match=words) as raised:
            read(path, name)
        assert raised.value.status == status


def test_the_images_of_a_request_have_a_limit_together():
    assert pictures.read(uri(1), Limits(), pixels_left=28 * 28).size == (28, 28)
    with pytest.raises(ApiError, match="more than 160 million pixels together") as raised:
        pictures.read(uri(1), Limits(), pixels_left=28 * 28 - 1)
    assert raised.value.status == 413


PRIVATE = ["10.0.0.1", "169.254.169.254", "::1", "fe80::1%eth0", "192.168.1.1", "100.64.0.1", "224.0.0.1",
           "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(monkeypatch, address):
    found = [(2, 1, 6, "", ("93.184.216.34", 80)), (2, 1, 6, "", (address, 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ApiError, match="private network"):
        pictures._public("images.example", 80)
