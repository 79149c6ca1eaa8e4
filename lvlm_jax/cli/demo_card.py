"""A PNG card: an image beside answers about it, with the names of absent objects in red."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from lvlm_jax import files

WIDTH, SIDE, MARGIN = 960, 288, 18  # pixels: of the card, of the image, and around both
SIZE, SMALL, LINE = 26, 20, 35  # pixels: of letters, and from line to line
GROUND, INK, SOFT, WRONG = "#ffffff", "#22252b", "#6b7078", "#c2261b"
FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")

Piece = tuple[str, bool]  # a stretch of an answer, and whether it names something that is not there


def draw(path: Path, image: Image.Image, answers: Mapping[str, Sequence[Piece]], remark: str) -> None:
    """Writes the card.

    Args:
        answers: name of a method -> its answer, cut into stretches.
        remark: the text below the answers, in small letters.

    Raises:
        LVLMError: the file cannot be written.
    """
    plain, bold, small = (
        ImageFont.truetype(FONTS / name, size)
        for name, size in (("DejaVuSans.ttf", SIZE), ("DejaVuSans-Bold.ttf", SIZE), ("DejaVuSans.ttf", SMALL))
    )
    card = Image.new("RGB", (WIDTH, 2000), GROUND)
    brush, top = ImageDraw.Draw(card), MARGIN
    card.paste(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), (MARGIN, MARGIN))
    for name, pieces in answers.items():
        brush.text((SIDE + 2 * MARGIN, top), name, SOFT, bold)
        words = [(word, wrong) for text, wrong in pieces for word in _words(text)]
        top = _write(brush, top + LINE, words, plain, bold) + LINE // 2
    top = _write(brush, top, [(word, False) for word in _words(remark)], small, small, SOFT)
    card = card.crop((0, 0, WIDTH, max(top, SIDE + MARGIN) + MARGIN))
    with files.atomic_file(path) as file:
        card.save(file, "png", optimize=True)


def _words(text: str) -> list[str]:
    """Words with the blanks after them."""
    parts = text.split(" ")
    return [f"{part} " for part in parts[:-1]] + parts[-1:]


def _write(brush: ImageDraw.ImageDraw, top: int, words, plain, bold, ink: str = INK) -> int:
    """Writes words into the lines beside the image; returns the top of the next line."""
    left = at = SIDE + 2 * MARGIN
    for word, wrong in words:
        font = bold if wrong else plain
        if at + brush.textlength(word.rstrip(), font) > WIDTH - MARGIN:
            at, top = left, top + LINE
        brush.text((at, top), word, WRONG if wrong else ink, font)
        at += brush.textlength(word, font)
    return top + LINE
