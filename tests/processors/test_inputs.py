"""Messages as people write them: image parts of every form lay out as the same prompt."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.processors import addresses
from tests.small import conversation


@pytest.fixture(scope="module")
def content():
    """The bytes of a file with the image of a conversation."""
    file = io.BytesIO()
    Image.fromarray(conversation("What?", seed=3)[0]["content"][0]["image"]).save(file, "PNG")
    return file.getvalue()


def address(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


def asked(part):
    return [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]


@pytest.mark.parametrize(
    "part",
    [
        lambda content: {"type": "image", "image": content},
        lambda content: {"type": "image", "image": io.BytesIO(content)},
        lambda content: {"type": "image", "image": {"bytes": content, "path": None}},
        lambda content: {"type": "image", "bytes": content, "path": None},
        lambda content: {"type": "image", "base64": base64.b64encode(content).decode()},
        lambda content: {"type": "image_url", "image_url": {"url": address(content)}},
        lambda content: {"type": "image_url", "image_url": address(content)},
    ],
)
def test_image_parts_of_every_form(model, content, part):
    want = model.prepare(conversation("What?", seed=3))
    got = model.prepare(asked(part(content)))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.pixels, want.pixels)


def test_addresses_are_downloaded_only_where_the_model_may(model, content, monkeypatch):
    part = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    with pytest.raises(LVLMError, match="^sample 1: .*downloads are off by default"):
        model.prepare([asked({"type": "image", "image": content}), asked(part)])
    monkeypatch.setattr(addresses, "_download", lambda *given: content)
    monkeypatch.setattr(model, "allow_urls", True)
    np.testing.assert_array_equal(
        model.prepare(asked(part)).pixels, model.prepare(conversation("What?", seed=3)).pixels
    )


def test_parts_that_hold_no_image(model):
    for part, message in (
        ({"type": "image"}, "an image part has no image"),
        ({"type": "image_url", "image_url": {}}, "a dict with nothing"),
        ({"type": "video", "video": "a.mp4"}, "a message part of type 'video' is not supported"),
        ({"type": "image", "base64": "@"}, "is not base64 text"),
    ):
        with pytest.raises(LVLMError, match=message):
            model.prepare(asked(part))
