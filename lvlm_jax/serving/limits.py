"""What the server allows, and how it divides the device; each field is a flag of `lvlm serve`."""

import dataclasses
from typing import Any

from lvlm_jax.errors import LVLMError


def limit(default: float | int, doc: str, low: float = 1) -> Any:
    """A field of `Limits`: a number of at least `low`, with its words."""
    return dataclasses.field(default=default, metadata={"doc": doc, "low": low})


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of requests, queues, caches and times.

    Raises:
        LVLMError: one is too small; it is named.
    """

    rows: int = limit(8, "answers under way at once, for each structure of methods")
    lanes: int = limit(4, "structures of methods that keep their rows on the device at once")
    max_tokens: int = limit(512, "longest answer, also where a request names none")
    queue: int = limit(256, "requests that may wait; more get 429")
    timeout: float = limit(300.0, "seconds that a request may wait and be answered in; then it gets 503", low=0.1)
    drain: float = limit(60.0, "seconds for the answers under way after SIGTERM", low=0)
    workers: int = limit(2, "threads that read images and lay out prompts")
    max_body: int = limit(32, "MiB of a request")
    max_image: int = limit(16, "MiB of one image file")
    max_pixels: int = limit(40, "million pixels of one image")
    max_request_pixels: int = limit(160, "million pixels of all images of a request together")
    max_images: int = limit(16, "images of a request")
    max_text: int = limit(100_000, "characters of a request's texts together")
    max_messages: int = limit(256, "messages of a request")
    max_choices: int = limit(16, "answers to one request (n)")
    image_cache: int = limit(256, "MiB of image tokens that are kept", low=0)
    prefix_cache: int = limit(512, "MiB of prompt prefixes that are kept", low=0)
    warm_images: int = limit(1, "images of a prompt for which programs are compiled at the start", low=0)
    warm_text: int = limit(128, "tokens behind the images for which programs are compiled at the start")
    looks: int = limit(64, "answers whose attention page can still be asked for", low=0)
    look_cache: int = limit(256, "MiB of images that are kept for attention pages", low=0)
    max_state: int = limit(4096, "MiB of files in --state; more get 413")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), field.metadata["low"]
            if not value >= low:
                raise LVLMError(f"{field.name} is {value}; expected {low} or more ({field.metadata['doc']})")
