"""Expected errors in one line."""

import pytest

from lvlm_jax.errors import LVLMError


def refused(message, call, *given, **more):
    """The call raises an `LVLMError`, which is one short line by itself, that matches the message; its text."""
    with pytest.raises(LVLMError, match=message) as caught:
        call(*given, **more)
    return str(caught.value)
