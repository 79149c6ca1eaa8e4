"""From a laid out prompt to a state whose answer can begin; image tokens and prompt prefixes are kept and used again.

A prefix is kept where no method of the request edits its rows and all branches read the same prompt. It belongs to the
model alone, so a request with another method, or none, finds it too.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from lvlm_jax.generation import branches, drivers
from lvlm_jax.generation.forward import edited_rows
from lvlm_jax.generation.state import Prompt as Read
from lvlm_jax.generation.state import State, Step
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import Method
from lvlm_jax.methods.base import OTHER_PICTURES, contrast_kind
from lvlm_jax.serving.caches import Cache
from lvlm_jax.serving.limits import Limits
from lvlm_jax.serving.prompts import Prompt, columns_before, fixed


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
        if self._model.config.reads_instruction or (method is not None and method.primes):
            return False
        return edited_rows(method, 1, 2) <= 1

    def _behind_prefix(self, prompt: Prompt, method: Method | None) -> tuple[State, Step]:
        model, laid_out, cut = self._model, prompt.laid_out, prompt.before
        image_id, axes = jnp.asarray(laid_out.image_id), laid_out.axes
        axes = None if axes is None else jnp.asarray(axes)
        kept = self.prefixes.get(prompt.key)
        if kept is None:
            embeddings = drivers.embed(model.params, model.config, laid_out.tokens[:, :cut], self._image_tokens(prompt))
            first = Read(embeddings, image_id[:, :cut], None if axes is None else axes[:, :, :cut])
            options = {"end": cut, "split": cut, "image_count": laid_out.image_count}
            kept = drivers.prefix(model.params, model.config, first, **options)
            self.prefixes.put(prompt.key, kept)
        rest = drivers.embed(model.params, model.config, laid_out.tokens[:, cut:], None)
        return self._prefilled(prompt, Read(rest, image_id, axes), method, prompt.behind, before=kept)

    def _whole(self, prompt: Prompt, method: Method | None) -> tuple[State, Step]:
        model = self._model
        tokens = self._image_tokens(prompt)
        laid_out = dataclasses.replace(prompt.laid_out, image_tokens=tokens)
        main = branches.embedded(model.params, model.config, laid_out)
        (ready,) = branches.warmed_up(model.params, model.config, laid_out, main, [method])
        window = prompt.behind if prompt.before else laid_out.tokens.shape[1]
        kind = contrast_kind(method)
        if kind == "same":
            return self._prefilled(prompt, main, ready, window)
        if kind in OTHER_PICTURES:
            reads = branches.contrast_inputs(model.config, laid_out, method, model.host)
            contrast = main if reads is laid_out else branches.embedded(model.params, model.config, reads)
            return self._prefilled(prompt, main, ready, window, contrast=contrast)
        given = dataclasses.replace(prompt.given, image_tokens=tokens)
        reads = branches.contrast_inputs(model.config, given, method, model.host)
        columns = columns_before(int(reads.lengths[0]))
        reads = reads.anchored(0, 0, columns, model.config.pad_token_id)
        contrast = branches.embedded(model.params, model.config, reads)
        return self._prefilled(prompt, main, ready, window, contrast=contrast, contrast_capacity=columns)

    def _prefilled(
        self, prompt: Prompt, reads: Read, method: Method | None, window: int, **options: Any
    ) -> tuple[State, Step]:
        model, columns = self._model, prompt.before + prompt.behind
        fixed_options = {"window": window, "capacity": columns, "image_count": prompt.laid_out.image_count}
        fixed_options |= {"contrast": None, "contrast_capacity": 0, "before": None} | options
        return drivers.prefill(model.params, model.config, reads, method, **fixed_options)

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
                tokens = drivers.encode_images(model.params, model.config, rows, given.geometry)
                self.images.put(key, tokens)
            found.append(tokens)
        return found[0] if len(found) == 1 else jnp.concatenate(found)
