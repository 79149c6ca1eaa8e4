"""The host's part of a call: devices, and tokenizers that are loaded on first use."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.beam import Finished
from lvlm_jax.generation.decode_loop import Answers
from lvlm_jax.generation.output import Output, read_output
from lvlm_jax.generation.settings import Decoding
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors import text


def _no_tokenizer() -> Any:
    raise LVLMError("there is no tokenizer for the contrast branch's words; give them as token ids")


class Host(NamedTuple):
    """The host's part of a model.

    Attributes:
        mesh: the devices; None for the default one.
        tokenizer: returns the tokenizer that turns answers into text; None for answers without text.
        words_tokenizer: returns the tokenizer for the words of a contrast branch's prompt.
    """

    mesh: Mesh | None = None
    tokenizer: Callable[[], Any] | None = None
    words_tokenizer: Callable[[], Any] = _no_tokenizer

    def read(self, answers: Answers | Finished, stop: tuple[str, ...] = ()) -> Output:
        """The answers as an `Output`, cut at stop strings."""
        return read_output(answers, stop, self.tokenizer and self.tokenizer())

    def stops(self, config: FamilyConfig, decoding: Decoding) -> Int[np.ndarray, "N"]:
        """Ids of the tokens that end an answer: those of the settings, and stop strings that are special tokens.

        The text contains no special tokens, so such strings cannot be found there.

        Raises:
            LVLMError: there are stop strings, but no tokenizer.
        """
        stops = decoding.stops(config)
        if not decoding.stop:
            return stops
        if self.tokenizer is None:
            raise LVLMError("stop strings need a tokenizer, and this model has none; use stop_token_ids")
        special = text.special_tokens(self.tokenizer())
        extra = [special[one] for one in decoding.stop if one in special and special[one] not in stops]
        return np.concatenate([stops, np.asarray(extra, np.int32)])


ALONE = Host()
