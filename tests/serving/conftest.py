"""A server of the small model in a thread of this process, on a free port."""

import asyncio
import contextlib
import http.client
import json
import threading
import time

import pytest
import uvicorn

from lvlm_jax.serving.app import App
from lvlm_jax.serving.limits import Limits
from lvlm_jax.serving.run import Server
from lvlm_jax.serving.service import Service

LIMITS = {"rows": 3, "max_tokens": 24, "max_body": 1, "warm_text": 32, "max_choices": 4, "workers": 1}


class Running:
    """A started server; `post` and `get` speak to it without a library of OpenAI's."""

    def __init__(self, service, port):
        self.service, self.port = service, port
        self.url = f"http://127.0.0.1:{port}"

    def request(self, method, path, body=None, headers=None):
        """Status, headers and body; JSON where it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, content, headers or {})
        response = connection.getresponse()
        text = response.read()
        kind = response.headers.get("content-type", "")
        return response.status, response.headers, json.loads(text) if kind == "application/json" else text

    def post(self, body, **headers):
        return self.request("POST", "/v1/chat/completions", body, headers)


@contextlib.contextmanager
def running(model, state=None, key=None, aliases=None, names=None, name="small", **limits):
    """Serves a model while the block runs."""
    service = Service(model, name, Limits(**LIMITS | limits), aliases)
    config = uvicorn.Config(App(service, key, state, names).asgi, port=0, log_level="error", lifespan="on")
    server, socket = Server(config, service), config.bind_socket()
    service.start()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([socket])))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Running(service, socket.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
        socket.close()


@pytest.fixture(scope="session")
def server(model):
    with running(model, aliases={"strong": "cmac:alpha=5"}) as started:
        yield started
