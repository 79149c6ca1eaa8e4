"""Attention pages of answers: their inputs are stored for a while, and a page is made when it is opened."""

import secrets
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from lvlm_jax import analysis
from lvlm_jax.analysis import look, overlay, page
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import Method
from lvlm_jax.processors import text
from lvlm_jax.serving.chat import Ask
from lvlm_jax.serving.engine import Engine
from lvlm_jax.serving.errors import ApiError
from lvlm_jax.serving.limits import Limits


class KeptAnswer(NamedTuple):
    """An answer with an attention page."""

    conversation: list[dict]
    images: list
    method: Method | None
    tokens: list[int]

    @property
    def size(self) -> int:
        """Bytes of the images, as RGB pixels."""
        return sum(3 * image.width * image.height for image in self.images)


class Looks:
    """The newest answers with attention pages, by names that cannot be guessed."""

    def __init__(self, model: LVLM, engine: Engine, limits: Limits):
        self._model, self._engine = model, engine
        self._capacity, self._room = limits.looks, limits.look_cache << 20
        self._answers: OrderedDict[str, KeptAnswer] = OrderedDict()

    def keep(self, ask: Ask, tokens: list[int]) -> str:
        """Stores an answer; returns the path of its page."""
        name = secrets.token_urlsafe(18)
        self._answers[name] = KeptAnswer(ask.conversation, ask.images, ask.method, tokens)
        while len(self._answers) > self._capacity or sum(one.size for one in self._answers.values()) > self._room:
            self._answers.popitem(last=False)
        return f"/attention/{name}"

    def page(self, name: str) -> Any:
        """The attention page of an answer, as a future.

        Raises:
            ApiError: the answer is no longer stored, or its conversation has no images.
        """
        answer = self._find(name)
        return self._engine.call(lambda: self._page(answer))

    def maps(self, name: str) -> Any:
        """Attention maps of each word over each image, as a future of JSON values.

        Raises:
            ApiError: as `page`.
        """
        answer = self._find(name)
        return self._engine.call(lambda: self._maps(answer))

    def _find(self, name: str) -> KeptAnswer:
        answer = self._answers.get(name)
        if answer is None:
            message = f"this answer's attention is no longer stored (only the newest {self._capacity} are); ask again"
            raise ApiError(404, message, "not_found")
        if not answer.images:
            raise ApiError(400, "the conversation has no images", "no_images")
        return answer

    def _page(self, answer: KeptAnswer) -> str:
        looker = look.Looker(self._model, answer.images, answer.conversation)
        name = answer.method.label if answer.method else "plain"
        question = " ".join(part["text"] for part in answer.conversation[-1]["content"] if part["type"] == "text")
        return page.build("Where the model looked", question, looker.pictures, [
            looker.answer(name, answer.method, answer.tokens)
        ])  # fmt: skip

    def _maps(self, stored: KeptAnswer) -> dict[str, Any]:
        """Maps averaged over layers and heads; those of all images are packed one after another (`page.pack`)."""
        model = self._model
        prompt = model.prepare(stored.conversation)
        places = analysis.token_places(model.config, prompt, len(stored.images))
        answer, words = analysis.words_of(stored.tokens, lambda tokens: text.decode(model.processor.tokenizer, tokens))
        weights = model.attention(prompt, [stored.tokens], stored.method)[0].transpose(1, 0, 2, 3)
        maps = analysis.patch_maps(analysis.word_maps(weights.mean((1, 2)), words), places)
        cells, scales = page.pack(np.concatenate([one.reshape(len(words), -1) for one in maps], axis=-1))
        fit = overlay.fitted(model, len(stored.images))
        return {
            "text": answer,
            "words": [[word.text, word.start, word.end] for word in words],
            "grids": [list(grid.shape) for grid in places],
            "regions": [page.share_of(image.size, overlay.seen_region(*image.size, fit)) for image in stored.images],
            "maps": cells,
            "scales": scales,
        }
