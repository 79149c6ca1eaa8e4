"""What a call needs besides parameters and configuration: devices, and tokenizers, which are read when first needed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.beam import Finished
from lvlm_jax.generation.drivers import Answers
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
        tokenizer: gives what turns answers into text; None for answers without text.
        words_tokenizer: gives what turns words before a contrast branch's prompt into tokens.
    """

    mesh: Mesh | None = None
    tokenizer: Callable[[], Any] | None = None
    words_tokenizer: Callable[[], Any] = _no_tokenizer

    def read(self, answers: Answers | Finished, stop: tuple[str, ...] = ()) -> Output:
        """Answers as users get them, cut at stop strings (`read_output`)."""
        return read_output(answers, stop, self.tokenizer and self.tokenizer())

    def stops(self, config: FamilyConfig, decoding: Decoding) -> Int[np.ndarray, "N"]:
        """Ids of the tokens that end an answer: of the settings, and of stop strings that are a special token.

        Text has no special tokens in which such a string could be found.

        Raises:
            LVLMError: stop strings without a tokenizer.
        """
        stops = decoding.stops(config)
        if not decoding.stop:
            return stops
        if self.tokenizer is None:
            raise LVLMError("stop strings need a tokenizer, and this model has none; use stop_token_ids")
        special = text.special_tokens(self.tokenizer())
        more = [special[one] for one in decoding.stop if one in special and special[one] not in stops]
        return np.concatenate([stops, np.asarray(more, np.int32)])


ALONE = Host()
