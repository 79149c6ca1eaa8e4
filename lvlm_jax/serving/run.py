"""Runs a service under uvicorn: warm-up, signals, and the end of the process."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn

from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import Method
from lvlm_jax.serving.app import App
from lvlm_jax.serving.service import Service
from lvlm_jax.serving.warm import warm_up

LOCAL = ("127.0.0.1", "localhost", "::1")
ON_ITS_WAY = 0.5  # seconds that the request of a new connection may take to arrive when the server ends
KEEP_ALIVE = 75  # seconds that a connection may be idle; longer than nginx's own limit


class Server(uvicorn.Server):
    """Finishes running answers before it ends, and exits with code 0, because the end was requested."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT let running answers finish; a second SIGINT ends the server at once.

        Only the main thread receives signals.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, self._end, one)
        try:
            yield
        finally:
            for one in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(one)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts no new connection, reads requests that are arriving on open ones, and ends after the answers."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(ON_ITS_WAY)
        await super().shutdown(sockets)

    def _end(self, number: int) -> None:
        self._service.ready = False
        self.force_exit = self.should_exit and number == signal.SIGINT
        self.should_exit = True


def serve(
    service: Service,
    methods: Sequence[Method | None],
    host: str,
    port: int,
    key: str | None = None,
    state: Path | None = None,
    names: Sequence[str] = (),
) -> int:
    """Serves until a signal ends it; returns the exit code.

    Args:
        methods: methods to compile before the server reports that it is ready.
        key: see `App`.
        state: the folder of files and batches; None without them.
        names: further host names of a server on a loopback address.

    Raises:
        LVLMError: the model cannot answer, or the address cannot be used.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    app = App(service, key, state, {*LOCAL, host, *names} if host in LOCAL else None)
    config = uvicorn.Config(
        app.asgi,
        host,
        port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=service.limits.drain,
        h11_max_incomplete_event_size=64 << 10,
        lifespan="on",
    )
    return asyncio.run(_serve(Server(config, service), service, methods, host, port))


async def _serve(server: Server, service: Service, methods: Sequence[Method | None], host: str, port: int) -> int:
    def say(line: str) -> None:
        print(line, flush=True)

    try:
        listening = server.config.bind_socket()
    except SystemExit as error:  # uvicorn's reaction to an address in use
        raise LVLMError(f"{host}:{port} is not available; is another server running there? give --port") from error
    place = f"[{host}]" if ":" in host else host
    say(f"http://{place}:{listening.getsockname()[1]} answers for {service.catalogue.name}; compiling programs")
    service.start()
    serving = asyncio.create_task(server.serve([listening]))
    warming = asyncio.create_task(warm_up(service, methods, say))
    await asyncio.wait({serving, warming}, return_when=asyncio.FIRST_COMPLETED)
    failed = warming.done() and not server.should_exit and warming.exception()
    server.should_exit = server.should_exit or bool(failed)
    await serving
    warming.cancel()
    await asyncio.gather(warming, return_exceptions=True)
    if failed:
        raise LVLMError(f"the model cannot be served: {failed}") from failed
    return 0
