"""Rebuild the pocket world's sprite sheet from the Noto Color Emoji font.

The sheet (`sprites.png`), its index (`sprites.json`) and the font's licence text are committed, so this tool is needed
only to change the set of objects. The font comes with Debian's package `fonts-noto-color-emoji`.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # drawing has no use for an accelerator's memory

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError

CELL = 48
COLUMNS = 12
STRIKE = 109  # the only bitmap size in the font
HUES = {"red": 0, "yellow": 34, "green": 88, "blue": 150, "purple": 195}  # Pillow's hue circle has 256 steps

# Category (COCO's name) -> list of (emoji, colour name or None). "base>target" recolours the saturated pixels.
EMOJI: dict[str, list[tuple[str, str | None]]] = {
    "person": [("🧍", None), ("🚶🏾", None), ("👩🏽", None), ("👨", None), ("🧒🏿", None)],
    "bicycle": [("🚲", None)],
    "car": [("🚗", c) for c in ("red", "blue", "green", "yellow", "purple")] + [("🚙", "blue")],
    "motorcycle": [("🏍", None), ("🛵", None)],
    "airplane": [("✈", None), ("🛩", None)],
    "bus": [("🚌", None), ("🚍", None)],
    "train": [("🚂", None), ("🚆", None), ("🚃", None)],
    "truck": [("🚚", None), ("🚛", None), ("🚒", None)],
    "boat": [("⛵", None), ("🚤", None), ("🚢", None)],
    "traffic light": [("🚦", None)],
    "stop sign": [("🛑", None)],
    "bird": [("🐦", None), ("🦆", None), ("🐓", None), ("🦜", None)],
    "cat": [("🐈", None), ("🐱", None), ("🐈‍⬛", None)],
    "dog": [("🐕", None), ("🐶", None), ("🐩", None)],
    "horse": [("🐎", None), ("🐴", None)],
    "sheep": [("🐑", None), ("🐏", None)],
    "cow": [("🐄", None), ("🐮", None)],
    "elephant": [("🐘", None)],
    "bear": [("🐻", None), ("🐻‍❄️", None)],
    "zebra": [("🦓", None)],
    "giraffe": [("🦒", None)],
    "backpack": [("🎒", c) for c in ("red", "blue", "green", "purple")],
    "umbrella": [("☂", c) for c in ("purple", "red", "blue", "green", "yellow")],
    "handbag": [("👜", None), ("👜", "red"), ("👜", "blue"), ("👜", "green")],
    "tie": [("👔", None)],
    "suitcase": [("🧳", c) for c in ("blue", "red", "green", "yellow")],
    "frisbee": [("🥏", c) for c in ("blue", "red", "green", "yellow", "purple")],
    "skis": [("🎿", None)],
    "sports ball": [("⚽", None), ("🏀", None), ("🏐", None)],
    "kite": [("🪁", None)],
    "skateboard": [("🛹", None)],
    "tennis racket": [("🎾", None)],
    "bottle": [("🍾", None), ("🍼", None)],
    "wine glass": [("🍷", None)],
    "cup": [("☕", None), ("🥤", None), ("🍵", None)],
    "fork": [("🍴", None)],
    "knife": [("🔪", None)],
    "spoon": [("🥄", None)],
    "bowl": [("🥣", c) for c in ("blue", "red", "green", "yellow")],
    "banana": [("🍌", None)],
    "apple": [("🍎", "red"), ("🍏", "green")],
    "sandwich": [("🥪", None)],
    "orange": [("🍊", None)],
    "broccoli": [("🥦", None)],
    "carrot": [("🥕", None)],
    "hot dog": [("🌭", None)],
    "pizza": [("🍕", None)],
    "donut": [("🍩", None)],
    "cake": [("🎂", None), ("🍰", None)],
    "chair": [("🪑", None)],
    "couch": [("🛋", c) for c in ("blue", "red", "green", "purple")],
    "potted plant": [("🪴", None)],
    "bed": [("🛏", None)],
    "toilet": [("🚽", None)],
    "tv": [("📺", None)],
    "laptop": [("💻", None)],
    "mouse": [("🖱", None)],
    "keyboard": [("⌨", None)],
    "cell phone": [("📱", None)],
    "book": [("📕", "red"), ("📗", "green"), ("📘", "blue"), ("📖", None)],
    "clock": [("🕐", None), ("🕰", None)],
    "vase": [("🏺", None)],
    "scissors": [("✂", None)],
    "teddy bear": [("🧸", None)],
    "toothbrush": [("🪥", None)],
}

# Emoji whose drawing already has the colour named in EMOJI; the others are recoloured.
NATURAL = {
    ("🚗", "red"),
    ("🚙", "blue"),
    ("🎒", "red"),
    ("☂", "purple"),
    ("🧳", "blue"),
    ("🥏", "blue"),
    ("🥣", "blue"),
}
NATURAL |= {("🍎", "red"), ("🍏", "green"), ("🛋", "blue"), ("📕", "red"), ("📗", "green"), ("📘", "blue")}


def recolour(sprite: Image.Image, colour: str) -> Image.Image:
    """Move every saturated pixel of an RGBA `sprite` to the hue of `colour`, keeping light and shade."""
    hsv = np.asarray(sprite.convert("RGB").convert("HSV")).astype(np.int32)
    saturated = hsv[..., 1] > 70
    hsv[..., 0] = np.where(saturated, HUES[colour], hsv[..., 0])
    if colour == "yellow":  # dark yellow reads as brown
        hsv[..., 2] = np.where(saturated, np.minimum(255, hsv[..., 2] * 5 // 4 + 30), hsv[..., 2])
    rgb = Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")
    rgb.putalpha(sprite.getchannel("A"))
    return rgb


def draw(emoji: str, colour: str | None, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji as an RGBA sprite whose longer side is `CELL` pixels."""
    canvas = Image.new("RGBA", (400, 160))
    ImageDraw.Draw(canvas).text((4, 4), emoji, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None or box[2] - box[0] > 150:
        raise SystemExit(f"error: the font draws {emoji!r} as nothing or as several glyphs; choose another emoji")
    sprite = canvas.crop(box)
    if emoji == "🍴":  # the emoji shows fork and knife side by side
        sprite = sprite.crop((0, 0, sprite.width // 2, sprite.height))
        sprite = sprite.crop(sprite.getbbox())
    if colour is not None and (emoji, colour) not in NATURAL:
        sprite = recolour(sprite, colour)
    scale = CELL / max(sprite.size)
    size = (max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale)))
    return sprite.resize(size, Image.Resampling.LANCZOS)


def main(arguments: list[str]) -> int:
    """Draw every emoji and write the sheet and its index."""
    parser = common.Parser(prog="pocket_sprites.py", description=__doc__)
    parser.add_argument("--font", required=True, help="NotoColorEmoji.ttf")
    parser.add_argument("--out", type=Path, required=True, help="folder for sprites.png and sprites.json")
    flags = parser.parse_args(arguments)
    if not features.check("raqm"):
        raise LVLMError("this Pillow cannot join emoji sequences; it needs the Raqm library (FriBiDi installed)")
    try:
        font = ImageFont.truetype(flags.font, STRIKE)
    except OSError as error:
        raise LVLMError(f"{flags.font!r} is not a font ({error}); Debian has it in fonts-noto-color-emoji") from error
    entries = [(category, e, c) for category, variants in EMOJI.items() for e, c in variants]
    rows = -(-len(entries) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    index = []
    for i, (category, emoji, colour) in enumerate(entries):
        sprite = draw(emoji, colour, font)
        left, top = i % COLUMNS * CELL, i // COLUMNS * CELL
        sheet.paste(sprite, (left, top))
        index.append({"category": category, "emoji": emoji, "colour": colour, "box": [left, top, *sprite.size]})
    flags.out.mkdir(parents=True, exist_ok=True)
    sheet.save(flags.out / "sprites.png", optimize=True)
    lines = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in index)
    (flags.out / "sprites.json").write_text(f"[\n  {lines}\n]\n", encoding="utf-8")
    print(f"{len(index)} sprites of {len(EMOJI)} categories in {flags.out / 'sprites.png'}")
    return 0


if __name__ == "__main__":
    common.run(main)
