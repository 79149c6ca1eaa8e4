"""Prefills a laid-out prompt; image tokens and prompt prefixes are cached and reused.

A prefix is cached if the request's method does not edit the prefix's rows and all branches read the same prompt. Such a
prefix depends on the model alone, so a request with another method, or none, can reuse it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lvlm_jax.attention import LayerCache
from lvlm_jax.compilation import jit
from lvlm_jax.generation import branches, chunks, decode_loop, prefixes
from lvlm_jax.generation.state import Prompt as Read
from lvlm_jax.generation.state import State, Step
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import Method
from lvlm_jax.methods.base import OTHER_PICTURES, contrast_kind
from lvlm_jax.methods.tower import TowerEdit, edit_key
from lvlm_jax.processors.layout import Inputs
from lvlm_jax.serving.caches import Cache
from lvlm_jax.serving.limits import Limits
from lvlm_jax.serving.prompts import Prompt, columns_before, fixed


class PrefixState(NamedTuple):
    """A prompt's columns before the cut.

    Attributes:
        caches: keys and values of every layer.
        embeddings: the decoder's input; some rows before the cut are run again with those after it.
    """

    caches: tuple[LayerCache, ...]
    embeddings: Float[Array, "1 P E"]


@jit
def _in_place(
    prefix: PrefixState, words: Float[Array, "1 W E"], places: Int[Array, "T"]
) -> tuple[tuple[LayerCache, ...], Float[Array, "1 W E"]]:
    """The first columns of a left-padded prompt, and the embeddings of the last W columns.

    Keys are rotated by the positions of tokens, not of columns, so columns may be moved.

    Args:
        words: embeddings after the cut.
        places: see `Prompt.places`.
    """
    columns = prefix.embeddings.shape[1]
    before = jax.tree.map(lambda block: jnp.take(block, places[:columns], axis=2), prefix.caches)
    return before, jnp.take(jnp.concatenate([prefix.embeddings, words], axis=1), places[columns:], axis=1)


def _axes(prompt: Inputs) -> Int[Array, "A 1 T"] | None:
    return None if prompt.axes is None else jnp.asarray(prompt.axes)


class Prefill:
    """Runs prompts, one at a time; used by the thread that owns the device.

    Attributes:
        images: cached image tokens, by image and edit of the tower.
        prefixes: cached keys and values of prompt prefixes.
    """

    def __init__(self, model: LVLM, limits: Limits):
        self._model = model
        self.images, self.prefixes = Cache(limits.image_cache << 20), Cache(limits.prefix_cache << 20)

    def ready(self, prompt: Prompt, method: Method | None) -> bool:
        """Runs a prompt, or the next chunk of a long one; does not wait for it.

        Returns:
            Whether the whole prompt has been run. `prompt.prefilled` is then its state without columns for an answer,
            and its first logits, as `rows.place` takes them.

        Raises:
            LVLMError: the contrast branch's prompt exceeds the context.
        """
        if prompt.prefilled is None:
            work, prompt.work = prompt.work, None
            if work is None:
                behind = prompt.before and self.shares(method)
                work = self._behind_prefix(prompt, method) if behind else self._whole(prompt, method)
            prompt.prefilled = next(work)
            prompt.work = work if prompt.prefilled is None else None
        return prompt.prefilled is not None

    def shares(self, method: Method | None) -> bool:
        """Whether the columns before a prompt's cut depend only on the model, and not on the method."""
        return prefixes.shares(self._model.config, method)

    def long(self, prompt: Prompt, method: Method | None) -> bool:
        """Whether a prompt will be run in chunks, and none of them has been run yet."""
        if prompt.prefilled is not None or prompt.work is not None or prompt.cut <= chunks.ROWS:
            return False
        return prompt.key not in self.prefixes and self.shares(method)

    def _behind_prefix(self, prompt: Prompt, method: Method | None) -> Iterator[tuple[State, Step] | None]:
        model, laid_out = self._model, prompt.laid_out
        first, rest = prompt.parts()
        prefix = self.prefixes.get(prompt.key)
        if prefix is None:
            embeddings = decode_loop.embed(model.params, model.config, first.tokens, self._image_tokens(prompt))
            read = Read(embeddings, jnp.asarray(first.image_id), _axes(first))
            options = {"split": prompt.before, "image_count": first.image_count}
            if prompt.cut > chunks.ROWS and not chunks.obstacle(model.config, None):
                options |= {"first": prompt.before - prompt.cut, "rows": chunks.ROWS}
                for done in chunks.prefix(model.params, model.config, read, **options):
                    caches = done
                    yield None
            else:
                caches = decode_loop.prefix(model.params, model.config, read, end=prompt.before, **options)
            prefix = PrefixState(caches, embeddings)
            self.prefixes.put(prompt.key, prefix)
        words = decode_loop.embed(model.params, model.config, rest, None)
        before, embeddings = _in_place(prefix, words, prompt.places())
        read = Read(embeddings, jnp.asarray(laid_out.image_id), _axes(laid_out))
        yield self._prefilled(prompt, read, method, prompt.behind, before=before)

    def _whole(self, prompt: Prompt, method: Method | None) -> Iterator[tuple[State, Step]]:
        yield self._in_one_piece(prompt, method)

    def _in_one_piece(self, prompt: Prompt, method: Method | None) -> tuple[State, Step]:
        model = self._model
        edit = branches.tower_edit(method)
        tokens = self._image_tokens(prompt, edit)
        laid_out = dataclasses.replace(prompt.laid_out, image_tokens=tokens)
        main = branches.embed_prompt(model.params, model.config, laid_out)
        (method_ready,) = branches.after_warm_up(model.params, model.config, laid_out, main, [method])
        tail_rows = prompt.behind if prompt.before else laid_out.tokens.shape[1]
        kind = contrast_kind(method)
        if kind == "same":
            return self._prefilled(prompt, main, method_ready, tail_rows)
        if kind == "tokens":
            return self._prefilled(
                prompt, main, method_ready, tail_rows, contrast=decode_loop.contrast_tokens(method_ready, main)
            )
        if kind == "fewer_tokens":
            columns = laid_out.tokens.shape[1]
            contrast = branches.with_fewer_tokens(model.params, model.config, laid_out, main, method_ready)
            return self._prefilled(prompt, main, method_ready, tail_rows, contrast=contrast, contrast_capacity=columns)
        if kind in OTHER_PICTURES:
            contrast_prompt = branches.make_contrast_prompt(model.config, laid_out, method, model.host)
            contrast = (
                main
                if contrast_prompt is laid_out
                else branches.embed_prompt(model.params, model.config, contrast_prompt)
            )
            return self._prefilled(prompt, main, method_ready, tail_rows, contrast=contrast)
        plain = tokens if edit is None or kind == "no_image" else self._image_tokens(prompt)
        inputs = dataclasses.replace(prompt.inputs, image_tokens=plain)
        contrast_prompt = branches.make_contrast_prompt(model.config, inputs, method, model.host)
        columns = columns_before(int(contrast_prompt.lengths[0]))
        contrast_prompt = contrast_prompt.padded(columns, model.config.pad_token_id)
        contrast = branches.embed_prompt(model.params, model.config, contrast_prompt)
        return self._prefilled(prompt, main, method_ready, tail_rows, contrast=contrast, contrast_capacity=columns)

    def _prefilled(
        self, prompt: Prompt, reads: Read, method: Method | None, tail_rows: int, **options: Any
    ) -> tuple[State, Step]:
        model, columns = self._model, prompt.before + prompt.behind
        fixed_options = {"tail_rows": tail_rows, "capacity": columns, "image_count": prompt.laid_out.image_count}
        fixed_options |= {"contrast": None, "contrast_capacity": 0, "before": None} | options
        return decode_loop.prefill(model.params, model.config, reads, method, **fixed_options)

    def _image_tokens(self, prompt: Prompt, edit: TowerEdit | None = None) -> Any | None:
        """The tower's output for the images; images that do not depend on each other are encoded one by one."""
        inputs, model = prompt.inputs, self._model
        if inputs.pixels is None:
            return None
        pixels = inputs.pixels[:, None] if fixed(model.config, inputs) else [inputs.pixels]
        by_image = []
        for image, rows in zip(prompt.images, pixels, strict=True):
            key = (image, edit_key(edit))
            tokens = self.images.get(key)
            if tokens is None:
                tokens = decode_loop.encode_images(model.params, model.config, rows, inputs.geometry, edit)
                self.images.put(key, tokens)
            by_image.append(tokens)
        return by_image[0] if len(by_image) == 1 else jnp.concatenate(by_image)
