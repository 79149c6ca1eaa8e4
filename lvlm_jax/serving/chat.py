"""Requests for chat completions: their fields and what they mean here."""

import dataclasses
import secrets
from collections.abc import Callable, Container
from typing import Any

import pydantic
from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.settings import LARGEST_SEED, Decoding
from lvlm_jax.methods import Method
from lvlm_jax.serving import pictures
from lvlm_jax.serving.catalogue import Catalogue
from lvlm_jax.serving.errors import ApiError
from lvlm_jax.serving.limits import Limits

STOP_STRINGS, STOP_CHARACTERS = 4, 200  # per request; each is searched after every few tokens
TOP = 20  # top_logprobs
# OpenAI's fields without effect on an answer here, which are ignored silently.
SILENT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}


class Strict(pydantic.BaseModel):
    """Fields of exactly these types: "3" is not a number. Unknown fields are kept separately."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)


class StreamOptions(Strict):
    """OpenAI's `stream_options`: whether a stream ends with the token counts."""

    include_usage: bool = False


class Extra(Strict):
    """Requests for results that OpenAI's API does not have."""

    attention: bool = False


class ChatRequest(Strict):
    """The body of `POST /v1/chat/completions`."""

    model: str
    messages: list[dict[str, Any]] = pydantic.Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | int | None = None
    top_p: float | int | None = None
    top_k: int | None = None
    repetition_penalty: float | int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    method: str | None = None
    method_settings: dict[str, Any] | None = None
    lvlm: Extra | None = None


@dataclasses.dataclass(frozen=True)
class Ask:
    """A parsed request.

    Attributes:
        model: the name by which the client asks for the model.
        conversation: HF chat messages with PIL images.
        images: the images of the conversation, in order.
        method: the method; None for plain decoding.
        decodings: one per requested answer; they differ in their seeds.
        top: how many of the most likely tokens to show per step; None without log-probabilities.
        stream, usage: whether the answer is streamed, and whether the last chunk counts tokens.
        attention: whether the answer links to its attention page.
        ignored: fields of the request that have no effect here, or that were reduced to a limit.
    """

    model: str
    conversation: list[dict]
    images: list[Image.Image]
    method: Method | None
    decodings: list[Decoding]
    top: int | None
    stream: bool
    usage: bool
    attention: bool
    ignored: list[str]


class Reader:
    """Parses requests for one model."""

    def __init__(
        self,
        catalogue: Catalogue,
        limits: Limits,
        hosts: Container[str] = (),
        settled: Callable[[Decoding], Decoding] = lambda decoding: decoding,
    ):
        """Makes a reader.

        Args:
            hosts: hosts from which images may be downloaded.
            settled: fills in settings that a request leaves out (`generation.defaults.with_defaults`).
        """
        self._catalogue, self._limits, self._hosts, self._settled = catalogue, limits, hosts, settled

    def read(self, body: Any) -> Ask:
        """Parses a request from JSON; blocks while images are decoded or downloaded.

        Raises:
            ApiError: fields of a wrong type (422), unusable values (400), an unknown model (404), too much data (413).
        """
        request = self._checked(body)
        method = self._catalogue.method(request.model, request.method, request.method_settings)
        ignored = sorted(name for name in request.model_extra or {} if name not in SILENT)
        if request.tools:
            raise ApiError(400, "tools are not supported; leave them out", "unsupported", "tools")
        if (request.response_format or {"type": "text"}).get("type") != "text":
            raise ApiError(400, "response_format is only supported for text", "unsupported", "response_format")
        decodings = self._decodings(request, ignored)
        conversation, images = self._conversation(request.messages)
        extra = request.lvlm or Extra()
        return Ask(
            model=request.model,
            conversation=conversation,
            images=images,
            method=method,
            decodings=decodings,
            top=self._top(request),
            stream=bool(request.stream),
            usage=bool(request.stream_options and request.stream_options.include_usage),
            attention=extra.attention,
            ignored=ignored,
        )

    def _checked(self, body: Any) -> ChatRequest:
        if not isinstance(body, dict):
            raise ApiError(422, f"the body is a JSON {type(body).__name__}; expected an object")
        try:
            return ChatRequest.model_validate(body)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            param = str(first["loc"][0]) if first["loc"] else None  # None if the body itself is wrong
            raise ApiError(422, f"{where or 'the body'}: {first['msg']}", param=param) from error

    def _decodings(self, request: ChatRequest, ignored: list[str]) -> list[Decoding]:
        limits = self._limits
        limits_given = (request.max_completion_tokens, request.max_tokens, limits.max_tokens)
        longest = next(value for value in limits_given if value is not None)
        if longest > limits.max_tokens:
            longest = limits.max_tokens
            ignored.append(f"max_tokens>{longest}")
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        if len(stop) > STOP_STRINGS or any(len(one) > STOP_CHARACTERS for one in stop):
            message = (
                f"stop has {len(stop)} strings; expected at most {STOP_STRINGS}, of up to {STOP_CHARACTERS} letters"
            )
            raise ApiError(400, message, param="stop")
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        settings = {name: value for name in names if (value := getattr(request, name)) is not None}
        if settings.get("top_k") == -1:  # other servers' value for all tokens
            settings["top_k"] = 0
        count = 1 if request.n is None else request.n
        if not 1 <= count <= limits.max_choices:
            raise ApiError(400, f"n is {count}; expected 1 to {limits.max_choices}", param="n")
        seed = secrets.randbits(31) if request.seed is None else request.seed
        try:
            first = self._settled(Decoding(max_new_tokens=longest, stop=stop, seed=seed, **settings))
        except LVLMError as error:
            param = str(error).partition(" ")[0]
            raise ApiError(400, error, param=param if param in ChatRequest.model_fields else None) from error
        return [dataclasses.replace(first, seed=(first.seed + place) % (LARGEST_SEED + 1)) for place in range(count)]

    def _top(self, request: ChatRequest) -> int | None:
        top = request.top_logprobs
        if top is not None and not (0 <= top <= TOP and request.logprobs):
            message = f"top_logprobs is {top}; expected 0 to {TOP}, beside logprobs: true"
            raise ApiError(400, message, param="top_logprobs")
        return (top or 0) if request.logprobs else None

    def _conversation(self, messages: list[dict[str, Any]]) -> tuple[list[dict], list[Image.Image]]:
        """HF chat messages, rebuilt from checked fields: nothing else from a client is passed on."""
        limits, images, pixels, characters, read = self._limits, [], 0, 0, []
        if len(messages) > limits.max_messages:
            message = f"there are {len(messages)} messages; the limit is {limits.max_messages}"
            raise ApiError(413, message, param="messages")
        for number, message in enumerate(messages):
            message_name = f"messages[{number}]"
            role = message.get("role")
            if role not in ("system", "developer", "user", "assistant"):
                raise ApiError(400, f"{message_name}.role is {str(role)[:40]!r}; expected system, user or assistant",
                               param="messages")  # fmt: skip
            content = message.get("content")
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            if not isinstance(content, list):
                raise ApiError(422, f"{message_name}.content: expected a string or a list of parts", param="messages")
            parts = []
            for part in content:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind == "text" and isinstance(part.get("text"), str):
                    characters += len(part["text"])
                    parts.append({"type": "text", "text": part["text"]})
                elif kind == "image_url" and role == "user":
                    if len(images) == limits.max_images:
                        message = f"there are more than {limits.max_images} images"
                        raise ApiError(413, message, "too_many_images", "messages")
                    source = part.get("image_url")
                    address = source.get("url") if isinstance(source, dict) else source
                    image = pictures.read(address, limits, self._hosts, limits.max_request_pixels * 1_000_000 - pixels)
                    pixels += image.width * image.height
                    images.append(image)
                    parts.append({"type": "image", "image": image})
                else:
                    raise ApiError(
                        400,
                        f"{message_name} has a part of type {str(kind)[:40]!r}; expected text, or image_url in user "
                        "messages",
                        param="messages",
                    )
            if characters > limits.max_text:
                message = f"the messages have more than {limits.max_text} characters"
                raise ApiError(413, message, "too_much_text", "messages")
            read.append({"role": "system" if role == "developer" else role, "content": parts})
        return read, images
