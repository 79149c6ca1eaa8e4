"""Runs long prompts in chunks: some rows at a time, which also attend to the columns of earlier chunks.

So the temporary memory is that of one chunk, and other answers continue between two chunks. The last rows, which
include those that a method edits, are a chunk of their own, which `forward.prefill` runs:

    column    0 ..... | ......... | ......... | ......... split .. T-1
    rows      padding | chunk     | chunk     | chunk     | `forward.prefill`

If a method needs more than the last rows of a prompt, the prompt runs in one piece.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from lvlm_jax.attention import LayerCache
from lvlm_jax.generation import decode_loop
from lvlm_jax.generation.forward import edited_rows
from lvlm_jax.generation.state import Prompt, State, Step
from lvlm_jax.journal import progress
from lvlm_jax.methods import Method
from lvlm_jax.methods.base import contrast_kind
from lvlm_jax.models.family import FamilyConfig

ROWS = 1024  # rows of a prompt that are run at once while other answers are under way
MOST = 2**15  # the largest number of rows, over all prompts of a batch, that are run at once


def obstacle(config: FamilyConfig, method: Method | None) -> str | None:
    """Why prompts must be run in one piece; None if they need not be."""
    if config.text.whole_images:
        return f"image tokens of {config.model_type} see later ones"
    return method_obstacle(method)


def method_obstacle(method: Method | None) -> str | None:
    """Why a method needs more than the last rows of a prompt; None if it does not."""
    if method is None:
        return None
    if method.warm_up_fields:
        return f"{method.label} has a warm-up pass over the whole prompt"
    if contrast_kind(method) != "same":
        return f"the branches of {method.label} read prompts of their own"
    return f"{method.label} edits all rows of a prompt" if edited_rows(method, 1, 2) > 1 else None


def prefix(
    params: dict, config: FamilyConfig, prompt: Prompt, split: int, first: int, rows: int, image_count: int
) -> Iterator[tuple[LayerCache, ...]]:
    """Yields the caches of the first `split` columns of a prompt after each chunk; the last value is complete.

    Args:
        first: the first column that holds a token of any sample.
        rows: how many rows are run at a time; all of them if image tokens see later ones.
    """
    if split - first <= rows or config.text.whole_images:
        yield decode_loop.prefix(params, config, prompt, end=split, split=split, image_count=image_count)
        return
    caches = None
    for remaining in range(-(-(split - first) // rows), 0, -1):
        start = jnp.int32(max(0, split - remaining * rows))
        sizes = {"rows": rows, "split": split, "image_count": image_count}
        caches = decode_loop.extended(params, config, prompt, caches, start, **sizes)
        yield tuple(LayerCache(cache.own[0], ()) for cache in caches)


class Prefill:
    """The prefill of a prompt, which runs chunk by chunk.

    Attributes:
        result: the state and the first logits; None until all chunks have been run.
    """

    def __init__(
        self,
        params: dict,
        config: FamilyConfig,
        main: Prompt,
        method: Method | None,
        contrast: Prompt | None,
        options: Mapping[str, Any],
        before: Iterator[tuple[LayerCache, ...] | None] | None = None,
    ):
        """Prepares the prefill; runs nothing yet.

        Args:
            main, method, contrast, options: as `forward.prefill` takes them.
            before: yields a value after each chunk of the prefix; the last value is the complete prefix. If it is None,
                the prompt runs in one piece.
        """
        self.result: tuple[State, Step] | None = None
        self._model, self._main, self._method = (params, config), main, method
        self._contrast, self._options = contrast, dict(options)
        self._chunks, self._before = before or iter(()), None

    def step(self) -> None:
        """Runs the next chunk; does not wait for it."""
        for before in self._chunks:
            self._before = before
            return
        main, more = self._main, {}
        if self._before is not None:
            split = self._before[0].prefix.length
            main = Prompt(main.embeddings[:, split:], main.image_id, main.axes)
            more = {"before": self._before}
        self.result = decode_loop.prefill(
            *self._model, main, self._method, contrast=self._contrast, **self._options, **more
        )
        self._before = None

    def finish(self) -> tuple[State, Step]:
        """Runs the remaining chunks."""
        while self.result is None:
            self.step()
        return self.result


@functools.cache
def say(reason: str) -> None:
    """Tells users once why their long prompts are run in one piece."""
    progress.say(f"long prompts are run in one piece: {reason}")
