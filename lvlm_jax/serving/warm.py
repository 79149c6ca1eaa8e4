"""Compiles programs before the first request, by answering each size of prompt with each structure of methods."""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import rows
from lvlm_jax.methods import Method
from lvlm_jax.serving.prompts import Prompt, columns_behind
from lvlm_jax.serving.service import Service
from lvlm_jax.serving.work import Priority

SIDE = 336  # pixels of an image for warming up
WORDS = (1, 12, 40, 160, 600, 2400)  # words in prompts; these lead to every number of columns after the images
GREEDY = {"max_tokens": 12}
DRAWN = {"max_tokens": 4, "temperature": 1.0, "top_p": 0.9, "logprobs": True, "top_logprobs": 1, "seed": 0}


async def warm_up(service: Service, methods: Sequence[Method | None], say: Callable[[str], None]) -> None:
    """Answers a prompt of every expected size with every method; then restarts the count of compiled programs.

    Raises:
        LVLMError: the model cannot answer at all.
    """
    begun = time.monotonic()
    prompts = await asyncio.wrap_future(service.prompts.call(lambda: _prompts(service)))
    for method in methods:
        kinds = (GREEDY,) if rows.obstacle(method) else (GREEDY, DRAWN)
        for prompt in prompts:
            prompt.prefilled = None
            asks = [_ask(service, method, settings) for settings in kinds]
            # With a batch's priority: compiling may take longer than an interactive request may wait.
            await asyncio.gather(*(service.answers(ask, prompt, Priority.BATCH) for ask in asks))
    service.compiles.before = service.compiles.total
    service.ready = True
    say(f"ready: {service.compiles.total} programs in {time.monotonic() - begun:.0f} s")


def _ask(service: Service, method: Method | None, settings: dict):
    body = {"model": service.catalogue.name, "messages": [{"role": "user", "content": "?"}]}
    return dataclasses.replace(service.reader.read(body | settings), method=method)


def _prompts(service: Service) -> list[Prompt]:
    """Prompts with up to `warm_images` images; after these, every number of columns up to that of `warm_text`."""
    picture = Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8))
    longest = columns_behind(service.limits.warm_text)
    prompts: dict[tuple, Prompt] = {}
    for images in range(service.limits.warm_images + 1):
        for words in WORDS:
            content = [{"type": "image", "image": picture}] * images + [{"type": "text", "text": "a " * words}]
            try:
                prompt = service.prompts.prepared([{"role": "user", "content": content}])
            except LVLMError:  # longer than the context
                if not prompts:
                    raise
                break
            if prompt.behind > longest or (not images and prompt.before):
                break
            prompts.setdefault((prompt.before, prompt.behind, images), prompt)
    return list(prompts.values())
