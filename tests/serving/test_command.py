"""`lvlm serve` as a process: bad flags, the line that says it is ready, and SIGTERM while it answers."""

import asyncio
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvicorn

from lvlm_jax.cli.serve import _several
from lvlm_jax.serving.run import Server
from tests.cli.command import run
from tests.serving.test_chat import asking


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--alias", "cmac"], "--alias is 'cmac'; expected NAME=METHOD"),
        (["--methods", "cmac,nothing"], "there is no method 'nothing'"),
        (["--rows", "0"], "0 is out of range, expected >= 1"),
        (["--key-file", "/nowhere/key"], "key file '/nowhere/key'"),
    ],
)
def test_bad_flags(monkeypatch, capsys, words, message):
    code, _, error = run(monkeypatch, capsys, "serve", *words)
    assert code == 2 and message in error and error.count("\n") == 1


def test_methods_are_separated_by_commas_that_no_setting_has():
    words = "cmac:alpha=3,beta=0.1,vcd, sevi/balanced:layers=8,9,kappa=0.3,eah+cmac"
    assert _several(words) == ["cmac:alpha=3,beta=0.1", "vcd", "sevi/balanced:layers=8,9,kappa=0.3", "eah+cmac"]


def test_a_request_on_its_way_is_answered_when_the_server_ends():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"here"})

    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
    server, listening = Server(config, types.SimpleNamespace(ready=True)), config.bind_socket()
    port, thread = listening.getsockname()[1], threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        time.sleep(0.1)
        server.should_exit = True
        time.sleep(0.25)  # it looks every tenth of a second
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 200"
    thread.join()


@pytest.mark.slow
def test_what_was_accepted_is_answered_after_sigterm(checkpoint, model):
    words = ["--model", checkpoint, "--name", "small", "--port", "0", "--rows", "2", "--warm-text", "32"]
    words += ["--alias", "strong=cmac:alpha=5"]
    server = subprocess.Popen([sys.executable, "-m", "lvlm_jax", "serve", *words], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)  # fmt: skip
    port = int(re.search(r":(\d+) answers for small", server.stdout.readline())[1])
    assert server.stdout.readline().startswith("ready: ")

    def ask(seed):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        name = "strong" if seed % 2 else "small"
        body = {"model": name, "messages": asking("Eh?", seed), "max_tokens": 20}
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            response = connection.getresponse()
        except ConnectionRefusedError:
            return None
        return json.loads(response.read())["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(ask, seed) for seed in range(24)]
        asked[0].result()
        server.send_signal(signal.SIGTERM)
        said = [one.result() for one in asked]
    assert server.wait(60) == 0 and server.stderr.read() == ""
    assert sum(text is not None for text in said) >= 12
    for seed, text in enumerate(said):
        method = "cmac:alpha=5" if seed % 2 else None
        assert text in (None, model.generate(asking("Eh?", seed), method, max_new_tokens=20).text[0])
