"""The conversations of a verification: always the same, with images drawn by a formula."""

from typing import Any

import numpy as np
from PIL import Image

Conversation = list[dict[str, Any]]


def picture(width: int, height: int, kind: int = 0) -> Image.Image:
    """An image of stripes and curves with every grey level; the same on every machine."""
    y, x = np.mgrid[:height, :width]
    channels = [(3 + kind + channel) * x + (5 + 2 * channel) * y + (kind + 1) * x * y // 7 for channel in range(3)]
    return Image.fromarray((np.stack(channels, axis=-1) % 256).astype(np.uint8))


def _text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def _image(width: int, height: int, kind: int = 0) -> dict[str, Any]:
    return {"type": "image", "image": picture(width, height, kind)}


def _turn(role: str, *content: Any) -> dict[str, Any]:
    """A message: one string, or parts."""
    return {"role": role, "content": content[0] if isinstance(content[0], str) else list(content)}


def forms() -> dict[str, Conversation]:
    """All common forms of conversations, by name; narrow images have few tiles, so the checks are quick."""
    brief, ask, cat = "Answer briefly.", "What is in the picture?", "A cat on a chair."
    scripts = "  Zwölf Boxkämpfer,\n\n\tжук, 漢字 und 🐈:  what is it?"
    return {
        "text": [_turn("user", "Name three colours.")],
        "text in parts": [_turn("user", _text("Name three"), _text(" colours."))],
        "image, text": [_turn("user", _image(120, 90), _text(ask))],
        "text, image": [_turn("user", _text("Look at this:"), _image(40, 260))],
        "system in a string": [_turn("system", brief), _turn("user", "Name three colours.")],
        "system in parts": [_turn("system", _text(brief)), _turn("user", _image(224, 40), _text(ask))],
        "images between texts": [
            _turn("user", _text("One:"), _image(30, 160), _text("two:"), _image(200, 32, 1), _text("Which is wider?"))
        ],
        "several turns": [_turn("user", "Hello."), _turn("assistant", "Hello!"), _turn("user", "Name a colour.")],
        "several turns about an image": [
            _turn("user", _image(150, 30, 2), _text(ask)), _turn("assistant", cat),
            _turn("user", _text("Of which colour?")),
        ],
        "images in two turns": [
            _turn("user", _image(20, 130), _text(ask)), _turn("assistant", _text(cat)),
            _turn("user", _image(180, 32, 3), _text("And now?")),
        ],
        "a continued answer": [_turn("user", "Name three colours."), _turn("assistant", "Red, green")],
        "a continued answer about an image": [
            _turn("system", brief), _turn("user", _image(28, 140), _text(ask)), _turn("assistant", _text("I see a")),
        ],
        "blanks and scripts": [_turn("user", _image(160, 28), _text(scripts))],
    }  # fmt: skip


def prompts() -> list[Conversation]:
    """Three prompts with images, for comparing logits."""
    return [
        [_turn("user", _image(240, 32), _text("Describe the picture."))],
        [_turn("user", _text("First"), _image(32, 224, 1), _text("then"), _image(256, 40, 2), _text("What changed?"))],
        [
            _turn("user", _image(224, 56, 3), _text("Is there a dog?")), _turn("assistant", _text("No.")),
            _turn("user", _text("What else is there?")),
        ],
    ]  # fmt: skip
