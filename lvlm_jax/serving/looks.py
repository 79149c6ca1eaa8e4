"""Attention pages of answers: what is needed for one is kept for a while, and the page is made when it is opened."""

import secrets
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from lvlm_jax import analysis
from lvlm_jax.analysis import look, page
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import Method
from lvlm_jax.processors import text
from lvlm_jax.serving.chat import Ask
from lvlm_jax.serving.engine import Engine
from lvlm_jax.serving.errors import ApiError


class Kept(NamedTuple):
    """An answer that may be looked at."""

    conversation: list[dict]
    images: list
    method: Method | None
    tokens: list[int]


class Looks:
    """The newest answers whose attention was asked for, by names that nobody can guess."""

    def __init__(self, model: LVLM, engine: Engine, capacity: int):
        self._model, self._engine, self._capacity = model, engine, capacity
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def keep(self, ask: Ask, tokens: list[int]) -> str:
        """Keeps an answer; the path of its page."""
        name = secrets.token_urlsafe(18)
        self._kept[name] = Kept(ask.conversation, ask.images, ask.method, tokens)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return f"/attention/{name}"

    def page(self, name: str) -> Any:
        """The attention page of an answer, as a future.

        Raises:
            ApiError: it is not kept, or has no images to look at.
        """
        kept = self._find(name)
        return self._engine.call(lambda: self._page(kept))

    def maps(self, name: str) -> Any:
        """Where the model looked for each word, over each image, as a future of JSON values.

        Raises:
            ApiError: as `page`.
        """
        kept = self._find(name)
        return self._engine.call(lambda: self._maps(kept))

    def _find(self, name: str) -> Kept:
        kept = self._kept.get(name)
        if kept is None:
            message = f"this answer's attention is not kept (the newest {self._capacity} are); ask again"
            raise ApiError(404, message, "not_found")
        if not kept.images:
            raise ApiError(400, "the conversation has no images to look at", "no_images")
        return kept

    def _page(self, kept: Kept) -> str:
        looker = look.Looker(self._model, kept.images, kept.conversation)
        name = kept.method.label if kept.method else "plain"
        question = " ".join(part["text"] for part in kept.conversation[-1]["content"] if part["type"] == "text")
        return page.build("Where the model looked", question, looker.pictures, [
            looker.answer(name, kept.method, kept.tokens)
        ])  # fmt: skip

    def _maps(self, kept: Kept) -> dict[str, Any]:
        model = self._model
        prompt = model.prepare(kept.conversation)
        places = analysis.token_places(model.config, prompt, len(kept.images))
        decode = text.decode
        answer, words = analysis.words_of(kept.tokens, lambda tokens: decode(model.processor.tokenizer, tokens))
        weights = model.attention(prompt, [kept.tokens], kept.method)[0].transpose(1, 0, 2, 3)
        by_word = analysis.word_maps(weights.mean((1, 2)), words)
        maps = [np.round(one / max(float(one.max()), 1e-12), 3).tolist() for one in
                analysis.patch_maps(by_word, places)] if words else []  # fmt: skip
        return {"text": answer, "words": [[word.text, word.start, word.end] for word in words], "maps": maps}
