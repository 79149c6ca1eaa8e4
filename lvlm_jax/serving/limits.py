"""The server's limits, and how it divides the device; each field is a flag of `lvlm serve`."""

import dataclasses
from typing import Any

from lvlm_jax.errors import LVLMError


def limit(default: float | int, doc: str, low: float = 1) -> Any:
    """A field of `Limits`: a number of at least `low`, with its description."""
    return dataclasses.field(default=default, metadata={"doc": doc, "low": low})


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of requests, queues, caches and times.

    Raises:
        LVLMError: a limit is too small; the message names it.
    """

    rows: int = limit(8, "answers generated at once, for each structure of methods")
    lanes: int = limit(4, "structures of methods with rows on the device at once")
    max_tokens: int = limit(512, "longest answer, also the default of a request")
    queue: int = limit(256, "requests that may wait; more get 429")
    timeout: float = limit(300.0, "seconds until a request must be answered; then it gets 503", low=0.1)
    drain: float = limit(60.0, "seconds for unfinished answers after SIGTERM", low=0)
    workers: int = limit(2, "threads that read images and lay out prompts")
    max_body: int = limit(32, "MiB of a request")
    max_image: int = limit(16, "MiB of one image file")
    max_pixels: int = limit(40, "million pixels of one image")
    max_request_pixels: int = limit(160, "million pixels of all images of a request together")
    max_images: int = limit(16, "images of a request")
    max_text: int = limit(100_000, "characters of a request's texts together")
    max_messages: int = limit(256, "messages of a request")
    max_choices: int = limit(16, "answers to one request (n)")
    image_cache: int = limit(256, "MiB of cached image tokens", low=0)
    prefix_cache: int = limit(512, "MiB of cached prompt prefixes", low=0)
    warm_images: int = limit(
        1, "largest number of images of a prompt for which programs are compiled at the start", low=0
    )
    warm_text: int = limit(
        128, "largest number of tokens after the images for which programs are compiled at the start"
    )
    looks: int = limit(64, "newest answers whose attention page is available", low=0)
    look_cache: int = limit(256, "MiB of images stored for attention pages", low=0)
    max_state: int = limit(4096, "MiB of files in --state; more get 413")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), field.metadata["low"]
            if not value >= low:
                raise LVLMError(f"{field.name} is {value}; expected {low} or more ({field.metadata['doc']})")
