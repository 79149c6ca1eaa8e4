"""From a laid out prompt to a state whose answer can begin; image tokens and prompt prefixes are kept and used again.

A prefix is kept where no method of the request edits its rows and all branches read the same prompt. It belongs to the
model alone, so a request with another method, or none, finds it too.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lvlm_jax.attention import LayerCache
from lvlm_jax.compilation import jit
from lvlm_jax.generation import branches, decode_loop
from lvlm_jax.generation.forward import edited_rows
from lvlm_jax.generation.state import Prompt as Read
from lvlm_jax.generation.state import State, Step
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import Method
from lvlm_jax.methods.base import OTHER_PICTURES, contrast_kind
from lvlm_jax.processors.layout import Inputs
from lvlm_jax.serving.caches import Cache
from lvlm_jax.serving.limits import Limits
from lvlm_jax.serving.prompts import Prompt, columns_before, fixed


class Kept(NamedTuple):
    """A prompt's columns before the cut.

    Attributes:
        caches: keys and values of every layer.
        embeddings: what the decoder read; some rows before the cut are run again with those behind it.
    """

    caches: tuple[LayerCache, ...]
    embeddings: Float[Array, "1 P E"]


@jit
def _in_place(
    kept: Kept, words: Float[Array, "1 W E"], places: Int[Array, "T"]
) -> tuple[tuple[LayerCache, ...], Float[Array, "1 W E"]]:
    """The first columns of a prompt whose padding is on the left, and the embeddings of the last W.

    Keys are rotated by the positions of tokens and not of columns, so that they may be moved.

    Args:
        words: embeddings behind the cut.
        places: see `Prompt.places`.
    """
    columns = kept.embeddings.shape[1]
    before = jax.tree.map(lambda block: jnp.take(block, places[:columns], axis=2), kept.caches)
    return before, jnp.take(jnp.concatenate([kept.embeddings, words], axis=1), places[columns:], axis=1)


def _axes(prompt: Inputs) -> Int[Array, "A 1 T"] | None:
    return None if prompt.axes is None else jnp.asarray(prompt.axes)


class Prefill:
    """Runs prompts, one at a time; for the thread that owns the device.

    Attributes:
        images: image tokens by their image.
        prefixes: keys and values of prompt prefixes.
    """

    def __init__(self, model: LVLM, limits: Limits):
        self._model = model
        self.images, self.prefixes = Cache(limits.image_cache << 20), Cache(limits.prefix_cache << 20)

    def __call__(self, prompt: Prompt, method: Method | None) -> tuple[State, Step]:
        """A prompt prefilled without columns for an answer, as `rows.place` takes it.

        Raises:
            LVLMError: the contrast branch's prompt exceeds the context.
        """
        if prompt.prefilled is None:
            run = self._behind_prefix if prompt.before and self.shares(method) else self._whole
            prompt.prefilled = run(prompt, method)
        return prompt.prefilled

    def shares(self, method: Method | None) -> bool:
        """Whether the columns before the cut of a prompt are the model's alone, whatever the method's strengths."""
        if self._model.config.reads_instruction or (method is not None and method.warm_up_fields):
            return False
        return edited_rows(method, 1, 2) <= 1

    def _behind_prefix(self, prompt: Prompt, method: Method | None) -> tuple[State, Step]:
        model, laid_out = self._model, prompt.laid_out
        first, rest = prompt.parts()
        kept = self.prefixes.get(prompt.key)
        if kept is None:
            embeddings = decode_loop.embed(model.params, model.config, first.tokens, self._image_tokens(prompt))
            read = Read(embeddings, jnp.asarray(first.image_id), _axes(first))
            options = {"end": prompt.before, "split": prompt.before, "image_count": first.image_count}
            kept = Kept(decode_loop.prefix(model.params, model.config, read, **options), embeddings)
            self.prefixes.put(prompt.key, kept)
        words = decode_loop.embed(model.params, model.config, rest, None)
        before, embeddings = _in_place(kept, words, prompt.places())
        read = Read(embeddings, jnp.asarray(laid_out.image_id), _axes(laid_out))
        return self._prefilled(prompt, read, method, prompt.behind, before=before)

    def _whole(self, prompt: Prompt, method: Method | None) -> tuple[State, Step]:
        model = self._model
        tokens = self._image_tokens(prompt)
        laid_out = dataclasses.replace(prompt.laid_out, image_tokens=tokens)
        main = branches.embed_prompt(model.params, model.config, laid_out)
        (ready,) = branches.after_warm_up(model.params, model.config, laid_out, main, [method])
        tail_rows = prompt.behind if prompt.before else laid_out.tokens.shape[1]
        kind = contrast_kind(method)
        if kind == "same":
            return self._prefilled(prompt, main, ready, tail_rows)
        if kind == "tokens":
            return self._prefilled(prompt, main, ready, tail_rows, contrast=decode_loop.contrast_tokens(ready, main))
        if kind == "fewer_tokens":
            columns = laid_out.tokens.shape[1]
            contrast = branches.with_fewer_tokens(model.params, model.config, laid_out, main, ready)
            return self._prefilled(prompt, main, ready, tail_rows, contrast=contrast, contrast_capacity=columns)
        if kind in OTHER_PICTURES:
            reads = branches.make_contrast_prompt(model.config, laid_out, method, model.host)
            contrast = main if reads is laid_out else branches.embed_prompt(model.params, model.config, reads)
            return self._prefilled(prompt, main, ready, tail_rows, contrast=contrast)
        given = dataclasses.replace(prompt.given, image_tokens=tokens)
        reads = branches.make_contrast_prompt(model.config, given, method, model.host)
        columns = columns_before(int(reads.lengths[0]))
        reads = reads.padded(columns, model.config.pad_token_id)
        contrast = branches.embed_prompt(model.params, model.config, reads)
        return self._prefilled(prompt, main, ready, tail_rows, contrast=contrast, contrast_capacity=columns)

    def _prefilled(
        self, prompt: Prompt, reads: Read, method: Method | None, tail_rows: int, **options: Any
    ) -> tuple[State, Step]:
        model, columns = self._model, prompt.before + prompt.behind
        fixed_options = {"tail_rows": tail_rows, "capacity": columns, "image_count": prompt.laid_out.image_count}
        fixed_options |= {"contrast": None, "contrast_capacity": 0, "before": None} | options
        return decode_loop.prefill(model.params, model.config, reads, method, **fixed_options)

    def _image_tokens(self, prompt: Prompt) -> Any | None:
        """What the tower makes of the images: one by one where they do not depend on each other."""
        given, model = prompt.given, self._model
        if given.pixels is None:
            return None
        pixels = given.pixels[:, None] if fixed(model.config, given) else [given.pixels]
        found = []
        for key, rows in zip(prompt.images, pixels, strict=True):
            tokens = self.images.get(key)
            if tokens is None:
                tokens = decode_loop.encode_images(model.params, model.config, rows, given.geometry)
                self.images.put(key, tokens)
            found.append(tokens)
        return found[0] if len(found) == 1 else jnp.concatenate(found)
