"""HTTP: routes, keys, limits of request bodies, and answers as JSON or as server-sent events."""

import asyncio
import contextlib
import hmac
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Container
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lvlm_jax.errors import LVLMError
from lvlm_jax.serving.batches import Batches
from lvlm_jax.serving.errors import ApiError
from lvlm_jax.serving.page import page
from lvlm_jax.serving.replies import DONE, event
from lvlm_jax.serving.service import Service
from lvlm_jax.version import __version__

Endpoint = Callable[[Request], Awaitable[Response]]
log = logging.getLogger("lvlm.serve")
SECURITY = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "SAMEORIGIN"}
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # for proxies
IGNORED = "X-LVLM-Ignored"  # header that lists the ignored fields of a request
UNPRINTABLE = re.compile("[^ -~]")  # characters that a header cannot contain


class App:
    """The application of one service."""

    def __init__(
        self, service: Service, key: str | None = None, state: Path | None = None, names: Container[str] | None = None
    ):
        """The ASGI application is `asgi`.

        Args:
            key: required value in `Authorization: Bearer KEY`; None lets everybody in.
            state: the folder of files and batches; None without them.
            names: host names of this server; a request's Host header must be one of them. None allows any. Without this
                check, a web page could point its own host name at this machine and read answers.
        """
        self._service, self._key, self._names = service, key, names
        self.batches = Batches(service, state) if state else None
        routes = [
            self._route("/", self._page, "GET", open=True),
            self._route("/health", self._health, "GET", open=True),
            self._route("/ready", self._ready, "GET", open=True),
            self._route("/version", self._version, "GET", open=True),
            self._route("/metrics", self._metrics, "GET", open=True),
            self._route("/v1/models", self._models, "GET"),
            self._route("/v1/models/{name:path}", self._model, "GET"),
            self._route("/v1/methods", self._methods, "GET"),
            self._route("/v1/chat/completions", self._chat, "POST"),
            # Open to everybody: the pages' names cannot be guessed, and a browser sends no key when it follows a link.
            self._route("/attention/{name}", self._attention, "GET", open=True),
            self._route("/attention/{name}/maps", self._maps, "GET", open=True),
        ]
        if self.batches:
            for path, method, endpoint in self.batches.routes(self._body):
                routes.append(self._route(path, endpoint, method))
        self.asgi = Starlette(
            routes=routes,
            lifespan=self._lifespan,
            exception_handlers={HTTPException: self._no_route, Exception: self._fault},
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        if self.batches:
            await self.batches.resume()
        yield
        if self.batches:
            await self.batches.close()
        await asyncio.to_thread(self._service.stop)

    def _route(self, path: str, endpoint: Endpoint, method: str, open: bool = False) -> Route:
        async def respond(request: Request) -> Response:
            try:
                self._check_origin(request)
                if not open:
                    self._check_key(request)
                response = await endpoint(request)
            except (ApiError, LVLMError) as error:
                api_error = error if isinstance(error, ApiError) else ApiError(400, error)
                response = JSONResponse(api_error.body, api_error.status, api_error.headers)
            except ClientDisconnect:
                response = Response(status_code=499)
            response.headers.update(SECURITY)
            self._service.metrics.requests.labels(path, str(response.status_code)).inc()
            return response

        return Route(path, respond, methods=[method])

    def _check_origin(self, request: Request) -> None:
        """Refuses requests that pages of other servers make through a visitor's browser."""
        host = request.headers.get("host", "")
        if self._names is not None and _name(host) not in self._names:
            message = f"this server is not called {host[:80]!r}; its operator can allow the name with --server-name"
            raise ApiError(403, message, "wrong_host")
        if request.method != "GET" and request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise ApiError(403, "pages of other servers may not send requests to this one", "wrong_origin")

    def _check_key(self, request: Request) -> None:
        """Compares the given key in constant time; the error says nothing about it."""
        if self._key is None:
            return
        header = request.headers.get("authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(header, f"Bearer {self._key}".encode()):
            raise ApiError(401, "the key is missing or wrong; send Authorization: Bearer KEY", "invalid_api_key")

    async def _no_route(self, request: Request, error: HTTPException) -> Response:
        message = {404: "there is no such path", 405: "the path does not take this method"}.get(
            error.status_code, str(error.detail)
        )
        api_error = ApiError(error.status_code, f"{request.method} {request.url.path[:100]}: {message}", "not_found")
        return JSONResponse(api_error.body, error.status_code, error.headers)

    async def _fault(self, request: Request, error: Exception) -> Response:
        api_error = ApiError(500, "the server failed at this request; its log says why")
        return JSONResponse(api_error.body, 500)

    async def _body(self, request: Request, limit: int) -> bytes:
        """The body of a request. Raises `ApiError` if it has more than `limit` bytes or arrives too late."""
        too_large = ApiError(413, f"the body has more than {limit >> 20} MiB", "request_too_large")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > limit:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._service.limits.timeout):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > limit:
                        raise too_large
        except TimeoutError as error:
            raise ApiError(503, "the body did not arrive in time; send it again", retry_after=1) from error
        return b"".join(parts)

    async def _chat(self, request: Request) -> Response:
        service = self._service
        if not service.engine.alive:
            raise ApiError(503, "the server is shutting down; try again in a moment", retry_after=5)
        with service.reading():
            ask, prompt = await service.read(await self._body(request, service.limits.max_body << 20))
        headers = {IGNORED: UNPRINTABLE.sub("?", ", ".join(ask.ignored))[:1000]} if ask.ignored else {}
        if not ask.stream:
            whole = await _unless_gone(request, service.whole(ask, prompt))
            return JSONResponse(whole, headers=headers)
        chunks = service.chunks(ask, prompt)
        # Await the first chunk before the response begins, so that early errors have their own HTTP status.
        first = await _unless_gone(request, anext(chunks))

        async def events() -> AsyncIterator[bytes]:
            async with contextlib.aclosing(chunks):
                yield event(first)
                try:
                    async for chunk in chunks:
                        yield event(chunk)
                except ApiError as error:
                    yield event(error.body)
                yield DONE

        return StreamingResponse(events(), media_type="text/event-stream", headers=headers | UNBUFFERED)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(name) for name in self._service.catalogue.models()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._service.catalogue.method(name)
        return JSONResponse(_model(name))

    async def _methods(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._service.catalogue.described()})

    async def _attention(self, request: Request) -> Response:
        return HTMLResponse(await asyncio.wrap_future(self._service.looks.page(request.path_params["name"])))

    async def _maps(self, request: Request) -> Response:
        return JSONResponse(await asyncio.wrap_future(self._service.looks.maps(request.path_params["name"])))

    async def _page(self, request: Request) -> Response:
        text, policy = page(self._service.catalogue.name)
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    async def _health(self, request: Request) -> Response:
        alive = self._service.engine.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def _ready(self, request: Request) -> Response:
        service = self._service
        body = {"ready": service.ready, "compiles": service.compiles.total}
        return JSONResponse(body, 200 if service.ready else 503)

    async def _version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def _metrics(self, request: Request) -> Response:
        text, kind = self._service.metrics.text()
        return Response(text, media_type=kind)


async def _unless_gone(request: Request, answer: Awaitable[Any]) -> Any:
    """Awaits an answer; cancels it if the client disconnects."""
    working = asyncio.ensure_future(answer)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


def _name(host: str) -> str:
    """The host name in a Host header, without the port."""
    return host.rpartition("]")[0].lstrip("[").lower() if host.startswith("[") else host.partition(":")[0].lower()


def _model(name: str) -> dict:
    return {"id": name, "object": "model", "created": 0, "owned_by": "lvlm_jax"}
