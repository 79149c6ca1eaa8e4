"""What a call needs besides parameters and configuration: devices, and tokenizers, which are read when first needed."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.beam import Finished
from lvlm_jax.generation.drivers import Answers
from lvlm_jax.generation.output import Output, read_output


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


ALONE = Host()
