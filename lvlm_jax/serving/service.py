"""Answers requests, without HTTP: parses, lays out, submits, collects. A server has one `Service`."""

import asyncio
import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Container, Iterator, Mapping
from typing import Any

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import defaults, rows, searches
from lvlm_jax.generation.continuous import PromptSize
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods.parse import method_for
from lvlm_jax.processors import load
from lvlm_jax.serving.catalogue import Catalogue
from lvlm_jax.serving.chat import Ask, Reader
from lvlm_jax.serving.engine import Engine
from lvlm_jax.serving.errors import ApiError
from lvlm_jax.serving.limits import Limits
from lvlm_jax.serving.looks import Looks
from lvlm_jax.serving.metrics import Compiles, Metrics
from lvlm_jax.serving.prompts import Prompt, Prompts, columns_before, columns_behind
from lvlm_jax.serving.replies import Pieces, Reply
from lvlm_jax.serving.work import FAULT, Job, Late, Priority, Update


class Service:
    """A model that answers requests.

    Attributes:
        catalogue, limits, engine, compiles, metrics, looks, prompts, reader: parts of the service.
        ready: whether programs are compiled and the server is not shutting down.
    """

    def __init__(
        self,
        model: LVLM,
        name: str = "model",
        limits: Limits | None = None,
        aliases: Mapping[str, str] | None = None,
        hosts: Container[str] = (),
        only: bool = False,
    ):
        """The engine does not run yet (`start`).

        Args:
            name: the model's name for clients.
            aliases, only: see `Catalogue`.
            hosts: hosts from which images may be downloaded.

        Raises:
            LVLMError: the method of an alias cannot be built.
        """
        self.model, self.limits = model, limits or Limits()
        self.catalogue = Catalogue(name, aliases or {}, only)
        for method in self.catalogue.aliases.values():
            method_for(method, lambda: model.hash, name)  # refuses arrays that were fitted for another model
        self.compiles = Compiles()
        self.engine = Engine(model, self.limits, self._largest())
        self.metrics = Metrics(self.engine, self.compiles)
        self.looks = Looks(model, self.engine, self.limits)
        self.ready = False
        self.prompts = Prompts(model, self.limits.workers, self.limits.warm_text)

        def settled(decoding):
            return defaults.with_defaults(decoding, model.generation_config, model.folder)

        self.reader = Reader(self.catalogue, self.limits, hosts, settled)
        # Two threads must not share a tokenizer; the engine's thread has the model's own.
        self._tokenizer = load.load_processor(model.folder, model.config).tokenizer
        self._reading = 0  # requests that are arriving or being laid out

    def _largest(self) -> PromptSize:
        """The size of prompts with `warm_images` images and `warm_text` tokens after them."""
        config, images = self.model.config, self.limits.warm_images
        # If an image's tokens depend on its size, the first requests widen the rows.
        before = columns_before(images * ((config.tokens_per_image or 0) + 32)) if images else 0
        columns_after = columns_behind(self.limits.warm_text)
        return PromptSize((before + columns_after,), columns_after, 1 << max(0, images - 1).bit_length())

    def start(self) -> None:
        """Starts the engine; `warm_up` reports when it is ready."""
        self.engine.start()

    def stop(self) -> None:
        """Ends the engine and the pool of threads."""
        self.ready = False
        self.engine.stop()
        self.prompts.close()

    async def read(self, content: bytes | Mapping[str, Any]) -> tuple[Ask, Prompt]:
        """Parses a request from JSON text or JSON values, and lays out its prompt.

        Raises:
            ApiError: the request is invalid.
        """

        def work() -> tuple[Ask, Prompt]:
            body = _json(content) if isinstance(content, bytes) else content
            ask = self.reader.read(body)
            try:
                prompt = self.prompts.prepared(ask.conversation)
            except LVLMError as error:
                raise ApiError(400, error, "invalid_prompt", "messages") from error
            if ask.stream and (reason := searches.obstacle(ask.method) or rows.obstacle(ask.method)):
                raise ApiError(400, f"{reason}, so its answer cannot be streamed; leave stream out", param="stream")
            if ask.top and (reason := searches.obstacle(ask.method) or rows.obstacle(ask.method)):
                raise ApiError(400, f"{reason}; leave top_logprobs out", param="top_logprobs")
            # Decoded images are large: of a waiting request, only the model's inputs are kept.
            return ask if ask.attention else dataclasses.replace(ask, conversation=[], images=[]), prompt

        return await asyncio.wrap_future(self.prompts.call(work))

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Counts a client's request while it arrives and is parsed; the number of such requests is limited.

        Raises:
            ApiError: too many requests arrive or are parsed.
        """
        if self._reading >= self.limits.queue:
            raise ApiError(429, "too many requests are being read; try again in 1 s", "queue_full", retry_after=1)
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    async def updates(
        self, ask: Ask, prompt: Prompt, priority: Priority = Priority.PERSON
    ) -> AsyncIterator[tuple[int, Update]]:
        """Yields the updates of each answer to a request, with its number; ends when all answers have ended.

        If the caller stops early, unfinished answers are cancelled and their rows freed.

        Raises:
            ApiError: too many requests wait (429), an answer is late (503), or an answer failed (400, 500).
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def teller(index: int):
            def tell(update: Update | LVLMError) -> None:
                loop.call_soon_threadsafe(events.put_nowait, (index, update))

            return tell

        now = time.monotonic()
        deadline = now + self.limits.timeout if priority == Priority.PERSON else float("inf")
        jobs = [
            Job(prompt, ask.method, decoding, teller(index), ask.stream, bool(ask.top), deadline, priority, arrived=now)
            for index, decoding in enumerate(ask.decodings)
        ]
        self.engine.submit(jobs)
        unfinished = len(jobs)
        try:
            while unfinished:
                index, update = await events.get()
                if isinstance(update, LVLMError):
                    raise _failed(update)
                unfinished -= update.reason is not None
                yield index, update
        finally:
            if unfinished:
                for job in jobs:
                    job.cancelled = True
                self.engine.wake()

    async def answers(self, ask: Ask, prompt: Prompt, priority: Priority = Priority.PERSON) -> list[Update]:
        """All answers to a request, complete; errors as in `updates`."""
        newest: dict[int, Update] = {}
        async for index, update in self.updates(ask, prompt, priority):
            newest[index] = update
        return [newest[index] for index in range(len(ask.decodings))]

    def reply(self, ask: Ask, prompt: Prompt, id: str | None = None, created: int | None = None) -> Reply:
        """The common parts of the answer to a request."""
        return Reply(
            id=id or f"chatcmpl-{secrets.token_hex(12)}",
            created=int(time.time()) if created is None else created,
            model=ask.model,
            prompt_tokens=prompt.length,
            tokenizer=self._tokenizer,
            top=ask.top,
            extra={"method": ask.method.label if ask.method else None, "seed": ask.decodings[0].seed},
        )

    async def whole(self, ask: Ask, prompt: Prompt, priority: Priority = Priority.PERSON) -> dict[str, Any]:
        """A complete chat completion as JSON values; errors as in `updates`."""
        reply = self.reply(ask, prompt)
        answers = await self.answers(ask, prompt, priority)
        self._look(ask, reply, answers)
        return reply.whole(answers)

    async def chunks(self, ask: Ask, prompt: Prompt, reply: Reply | None = None) -> AsyncIterator[dict[str, Any]]:
        """A chat completion in chunks; errors as in `updates`."""
        reply = reply or self.reply(ask, prompt)
        pieces = [Pieces(reply, index, decoding.stop) for index, decoding in enumerate(ask.decodings)]
        newest: dict[int, Update] = {}
        async for index, update in self.updates(ask, prompt):
            if index not in newest:
                yield pieces[index].first()
            newest[index] = update
            for chunk in pieces[index].chunks(update):
                yield chunk
        answers = [newest[index] for index in range(len(pieces))]
        self._look(ask, reply, answers)
        if ask.usage or ask.attention:
            yield reply.last(answers)

    def _look(self, ask: Ask, reply: Reply, answers: list[Update]) -> None:
        """Stores the inputs of the attention page, if requested, and adds its address to the reply."""
        if ask.attention:
            reply.extra["attention"] = self.looks.keep(ask, answers[0].tokens)


def _failed(error: LVLMError) -> ApiError:
    if isinstance(error, Late):
        return ApiError(503, error, "timeout", retry_after=5)
    if str(error) == FAULT:
        return ApiError(500, error)
    return ApiError(400, error)


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error})", "invalid_json") from error
