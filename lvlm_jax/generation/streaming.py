"""Streams one answer piece by piece while it is written."""

from collections.abc import Iterator

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import answer, decode_loop, searches
from lvlm_jax.generation.host import ALONE, Host
from lvlm_jax.generation.settings import Decoding
from lvlm_jax.methods import Method
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors import text
from lvlm_jax.processors.layout import Inputs


def stream(
    params: dict, config: FamilyConfig, prompt: Inputs, method: Method | None, decoding: Decoding, host: Host = ALONE
) -> Iterator[str]:
    """Yields the answer to one prompt piece by piece; arguments as in `answer.generate`.

    The pieces together are the text of `answer.generate`.

    Raises:
        LVLMError: the method is a search, or there is more than one prompt.
    """
    if reason := searches.obstacle(method, decoding):
        raise LVLMError(f"{reason}, so its answer cannot be streamed; use generate")
    if prompt.batch != 1:
        raise LVLMError(f"stream takes one conversation and got {prompt.batch}; use generate")
    return _pieces(params, config, prompt, method, decoding, host)


def _pieces(
    params: dict, config: FamilyConfig, prompt: Inputs, method: Method | None, decoding: Decoding, host: Host
) -> Iterator[str]:
    answers, limit = answer.begin(params, config, prompt, method, decoding, host)
    writer = text.StreamWriter(decoding.stop)
    for under_way in decode_loop.stream(params, config, answers, limit):
        output = host.read(under_way, decoding.stop)
        at_stop = output.finish_reason[0] == "stop"
        if piece := writer.push(output.text[0], final=at_stop):
            yield piece
        if at_stop:
            return
    if rest := writer.push(output.text[0], final=True):
        yield rest
