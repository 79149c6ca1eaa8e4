"""Batches: files of requests, answered with lower priority than interactive requests, also across restarts.

Answers are appended to a log (`journal`). A restarted server continues with the requests that the log does not answer.
"""

import asyncio
import contextlib
import json
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lvlm_jax.errors import LVLMError
from lvlm_jax.journal.log import AnswerLog, expect
from lvlm_jax.journal.record import file_hash
from lvlm_jax.serving.errors import ApiError
from lvlm_jax.serving.service import Service
from lvlm_jax.serving.store import Store, new_id
from lvlm_jax.serving.work import Priority

ENDPOINT = "/v1/chat/completions"
LARGEST = 200 << 20  # bytes of a file of requests
UPLOADS = 2  # uploads at the same time; each is in memory
REQUESTS = 50_000  # requests per batch
UNDER_WAY = ("in_progress", "cancelling")


def _entry_of_line(entry: dict) -> tuple[str, dict]:
    expect(entry, {"custom_id": str, "response": dict})
    return entry["custom_id"], entry


class Batches:
    """Files and batches of one server, in a folder."""

    def __init__(self, service: Service, folder: Path):
        self._service, self._store = service, Store(folder)
        self._running: dict[str, asyncio.Task] = {}
        self._uploading = asyncio.Semaphore(UPLOADS)

    def routes(
        self, body: Callable[[Request, int], Awaitable[bytes]]
    ) -> list[tuple[str, str, Callable[[Request], Awaitable[Response]]]]:
        """Path, HTTP method and endpoint of each route; `body` reads a request's bytes up to a limit."""
        self._body = body
        return [
            ("/v1/files", "POST", self._upload),
            ("/v1/files", "GET", self._files),
            ("/v1/files/{id}", "GET", self._file),
            ("/v1/files/{id}", "DELETE", self._delete),
            ("/v1/files/{id}/content", "GET", self._content),
            ("/v1/batches", "POST", self._create),
            ("/v1/batches", "GET", self._batches),
            ("/v1/batches/{id}", "GET", self._batch),
            ("/v1/batches/{id}/cancel", "POST", self._cancel),
        ]

    async def resume(self) -> None:
        """Resumes the batches that an earlier server began."""
        for batch in self._store.all("batch"):
            if batch["status"] in UNDER_WAY:
                self._start(batch)

    async def close(self) -> None:
        """Stops all batches; finished answers are in their logs."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _upload(self, request: Request) -> Response:
        async with self._uploading:
            return await self._uploaded(request)

    async def _uploaded(self, request: Request) -> Response:
        content = await self._body(request, LARGEST)

        async def stream():
            yield content
            yield b""

        try:
            form = await MultiPartParser(request.headers, stream(), max_files=1, max_fields=20).parse()
        except (MultiPartException, KeyError, AssertionError) as error:
            raise ApiError(400, "the body is not a form with file and purpose", "invalid_form") from error
        file, purpose = form.get("file"), form.get("purpose")
        if not hasattr(file, "read") or not isinstance(purpose, str):
            raise ApiError(400, "the form needs file and purpose", param="file")
        limit = self._service.limits.max_state
        if self._store.size() + len(content) > limit << 20:
            message = f"the stored files would exceed {limit} MiB; delete some"
            raise ApiError(413, message, "storage_full", "file")
        return JSONResponse(self._store.add_file((file.filename or "file")[:200], purpose[:40], await file.read()))

    async def _files(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._store.all("file"), "has_more": False})

    async def _file(self, request: Request) -> Response:
        return JSONResponse(self._store.load(request.path_params["id"], "file"))

    async def _content(self, request: Request) -> Response:
        return Response(self._store.content(request.path_params["id"]), media_type="application/jsonl")

    async def _delete(self, request: Request) -> Response:
        id = request.path_params["id"]
        if any(one["input_file_id"] == id and one["status"] in UNDER_WAY for one in self._store.all("batch")):
            raise ApiError(400, f"a running batch reads {id}; cancel it first", "file_in_use")
        self._store.remove_file(id)
        return JSONResponse({"id": id, "object": "file", "deleted": True})

    async def _create(self, request: Request) -> Response:
        try:
            body = json.loads(await self._body(request, 1 << 20))
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON ({error})", "invalid_json") from error
        if not isinstance(body, dict) or body.get("endpoint") != ENDPOINT:
            raise ApiError(400, f"a batch needs endpoint {ENDPOINT} and input_file_id", param="endpoint")
        file = str(body.get("input_file_id"))
        requests = await asyncio.to_thread(_requests, self._store.content(file))
        now = int(time.time())
        batch = {
            "id": new_id("batch"),
            "object": "batch",
            "endpoint": ENDPOINT,
            "errors": None,
            "input_file_id": file,
            "completion_window": str(body.get("completion_window", "24h")),
            "status": "in_progress",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "in_progress_at": now,
            "expires_at": None,
            "completed_at": None,
            "cancelled_at": None,
            "request_counts": {"total": len(requests), "completed": 0, "failed": 0},
            "metadata": body.get("metadata"),
        }
        self._store.save(batch)
        self._start(batch)
        return JSONResponse(batch)

    async def _batches(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._store.all("batch"), "has_more": False})

    async def _batch(self, request: Request) -> Response:
        return JSONResponse(self._store.load(request.path_params["id"], "batch"))

    async def _cancel(self, request: Request) -> Response:
        batch = self._store.load(request.path_params["id"], "batch")
        task = self._running.get(batch["id"])
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            batch = self._store.load(batch["id"], "batch")
            if batch["status"] in UNDER_WAY:
                self._store.save(batch | {"status": "cancelled", "cancelled_at": int(time.time())})
        return JSONResponse(self._store.load(batch["id"], "batch"))

    def _start(self, batch: dict[str, Any]) -> None:
        task = asyncio.create_task(self._run(batch))
        self._running[batch["id"]] = task
        task.add_done_callback(lambda _: self._running.pop(batch["id"], None))

    async def _run(self, batch: dict[str, Any]) -> None:
        """Answers the remaining requests, and writes the files of answers and of errors."""
        store = self._store
        try:
            requests = await asyncio.to_thread(_requests, store.content(batch["input_file_id"]))
            record = {"requests": file_hash(store.path(batch["input_file_id"], ".jsonl"))}
            path = store.path(batch["id"], ".log")
            with AnswerLog(path, record, _entry_of_line, set(requests)) as log:
                answers = dict(log.answers)
                counts = batch["request_counts"]
                counts["failed"] = sum(_failed(entry) for entry in answers.values())
                counts["completed"] = len(answers) - counts["failed"]
                room = asyncio.Semaphore(2 * self._service.limits.rows)

                async def one(name: str, body: dict) -> None:
                    async with room:
                        entry = await self._entry(name, body)
                    log.append([entry])
                    answers[name] = entry
                    counts["failed" if _failed(entry) else "completed"] += 1
                    store.save(batch)

                async with asyncio.TaskGroup() as group:
                    for name, body in requests.items():
                        if name not in answers:
                            group.create_task(one(name, body))
            good = [answers[name] for name in requests if not _failed(answers[name])]
            bad = [answers[name] for name in requests if _failed(answers[name])]
            for key, entries in (("output_file_id", good), ("error_file_id", bad)):
                if entries:
                    content = "".join(json.dumps(entry) + "\n" for entry in entries)
                    file = store.add_file(f"{batch['id']}_{key[:-8]}.jsonl", "batch_output", content.encode())
                    batch[key] = file["id"]
            store.save(batch | {"status": "completed", "completed_at": int(time.time())})
        except Exception as error:
            first = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
            known = isinstance(first, ApiError | LVLMError | OSError)
            if not known:
                traceback.print_exception(first)
            message = str(first)[:300] if known else "the server failed at this batch; its log says why"
            with contextlib.suppress(OSError):
                errors = {"object": "list", "data": [{"code": "failed", "message": message}]}
                store.save(batch | {"status": "failed", "errors": errors})

    async def _entry(self, name: str, body: dict) -> dict[str, Any]:
        """The answer to one request of a batch; waits while the server is full."""
        while True:
            try:
                ask, prompt = await self._service.read(body | {"stream": False})
                status, reply = 200, await self._service.whole(ask, prompt, Priority.BATCH)
            except ApiError as error:
                if error.status in (429, 503):
                    await asyncio.sleep(error.retry_after or 1)
                    continue
                status, reply = error.status, error.body
            response = {"status_code": status, "request_id": name, "body": reply}
            return {"id": new_id("batch"), "custom_id": name, "response": response, "error": None}


def _failed(entry: dict[str, Any]) -> bool:
    return entry["response"]["status_code"] != 200


def _requests(content: bytes) -> dict[str, dict]:
    """The bodies of a file of requests, by custom id.

    Raises:
        ApiError: a line is not a request, an id occurs twice, or there are too many requests or none.
    """
    bodies: dict[str, dict] = {}
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, body = entry["custom_id"], entry["body"]
            right = isinstance(name, str) and isinstance(body, dict) and entry.get("url", ENDPOINT) == ENDPOINT
        except (ValueError, RecursionError, TypeError, KeyError):
            right = False
        if not right:
            message = f'line {number} is not a request; expected {{"custom_id": ..., "url": "{ENDPOINT}", "body": ...}}'
            raise ApiError(400, message, "invalid_line", "input_file_id")
        if name in bodies:
            raise ApiError(400, f"line {number} has the custom_id {name[:60]!r} of another line", param="input_file_id")
        bodies[name] = body
    if not 0 < len(bodies) <= REQUESTS:
        raise ApiError(400, f"the file has {len(bodies)} requests; expected 1 to {REQUESTS}", param="input_file_id")
    return bodies
