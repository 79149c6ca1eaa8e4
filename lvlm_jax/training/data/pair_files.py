"""Reads files of preference pairs and of conversations, with line numbers in all errors; writes pairs.

An image is a path relative to the file, a `file:` address, or the encoded image itself as a data URI or as
`{"bytes": base64}`. A placeholder is an image part of a message, or "<image>" in its text; without placeholders, images
come before the text of the first user message.
"""

import base64
import dataclasses
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.processors import addresses
from lvlm_jax.training.data import dataset_info, pair_formats
from lvlm_jax.training.data.pair_formats import ID_KEYS, IMAGE_KEYS, Message

PLACEHOLDER = "<image>"
# Unsupported placeholders: LLaMA-Factory's for videos and sounds, and Qwen-VL's, which contains the image's path.
FOREIGN = ("<video>", "<audio>", "<img>")
REJECTED_IMAGES, WEIGHT = ("rejected_images", "weight")  # columns of the rejected side's images, and of a row's weight


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Chat messages about images; supervised fine-tuning learns the assistant messages.

    Attributes:
        images: image files in reading order; the encoded image itself if the data file contains it.
        messages: `{"role", "content"}`; content is a list of `{"type": "text", "text"}` and `{"type": "image"}`, one of
            the latter per image.
        id: the row's own id, or its number in the file.
        extra: the other columns of the row.
        weight: the row's weight in the loss, by default 1; above 0.
    """

    images: tuple[Path | bytes, ...]
    messages: list[Message]
    id: str
    extra: dict = dataclasses.field(default_factory=dict)
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt with a chosen and a rejected answer.

    Attributes:
        images: image files in reading order; the encoded image itself if the data file contains it.
        prompt: chat messages as `Conversation.messages`, up to the user message that is answered.
        chosen, rejected: the texts of the two answers.
        id: the row's own id, or its number in the file.
        extra: the other columns of the row; `write_pairs` keeps them.
        rejected_images: the images of the rejected side, as many as `images`; None if both sides have the same images.
        weight: the pair's weight in the loss, by default 1; above 0.
    """

    images: tuple[Path | bytes, ...]
    prompt: list[Message]
    chosen: str
    rejected: str
    id: str
    extra: dict = dataclasses.field(default_factory=dict)
    rejected_images: tuple[Path | bytes, ...] | None = None
    weight: float = 1.0

    def conversation(self) -> list[Message]:
        """The prompt as `LVLM.generate` takes it, with the images in their places."""
        return with_pictures(self.prompt, self.images)


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a file, in its order.

    Args:
        path: JSON lines or one JSON list in any format of `pair_formats`, or LLaMA-Factory's `dataset_info.json`; if it
            has several entries, a colon and the name follow, as in "data/dataset_info.json:my_pairs".

    Raises:
        LVLMError: (with the line) a malformed row, a pair without image, a missing or unreadable image, placeholders
            that do not match the images, an empty answer, or two equal answers about the same images.
    """
    pairs = []
    for line_name, number, row, folder in samples(path, "preference file"):
        parsed = pair_formats.read_row(row, line_name)
        images, prompt = placed_prompt(row, parsed.prompt, folder, line_name)
        for name in pair_formats.ANSWERS:
            check_answer(getattr(parsed, name), name, line_name)
        others = _rejected_images(row, images, folder, line_name)
        if parsed.chosen.strip() == parsed.rejected.strip() and others is None:
            raise LVLMError(
                f"{line_name}: chosen and rejected are equal; remove the pair, or give the rejected side other "
                f"images in {REJECTED_IMAGES}"
            )
        about = row_id(row, number), extra(row, parsed.used), others, weight(row, line_name)
        pairs.append(Pair(images, prompt, parsed.chosen, parsed.rejected, *about))
    return pairs


def read_conversations(path: str | Path) -> list[Conversation]:
    """The conversations of a file, in any format of `pair_formats`; a pair is read as its prompt and chosen answer.

    Raises:
        LVLMError: (with the line) an error of `read_pairs`, a conversation without an answer, or an empty answer.
    """
    where, _, first, _ = next(samples(path, "conversation file"))
    if not pair_formats.is_dialogue(first, where):
        return [
            Conversation(pair.images, [*pair.prompt, assistant(pair.chosen)], pair.id, pair.extra, pair.weight)
            for pair in read_pairs(path)
        ]
    conversations = []
    for where, number, row, folder in samples(path, "conversation file"):
        messages, used_keys = pair_formats.read_dialogue(row, where)
        answers = [message for message in messages if message["role"] == "assistant"]
        if not answers or messages[-1] is not answers[-1]:
            raise LVLMError(f"{where}: the conversation does not end with an assistant message to learn")
        for answer in answers:
            check_answer(pair_formats.answer_text(answer, "an answer", where), "an answer", where)
        images = row_images(row, folder, where)
        messages_with_images = place_images(messages, len(images), where)
        conversations.append(
            Conversation(images, messages_with_images, row_id(row, number), extra(row, used_keys), weight(row, where))
        )
    return conversations


def write_pairs(path: str | Path, pairs: Sequence[Pair]) -> None:
    """Writes TRL's format, `{"id", "images", "prompt", "chosen", "rejected"}` as JSON lines, completely or not at all.

    Raises:
        LVLMError: the file cannot be written.
    """
    path = Path(path)
    lines = [json.dumps(row_of(pair, path.parent), ensure_ascii=False) for pair in pairs]
    files.write_whole(path, "".join(line + "\n" for line in lines))


def row_of(pair: Pair, folder: Path) -> dict:
    """A pair as a row of TRL's format, for a file in `folder`. Paths of images inside the folder are relative."""
    row = {
        "id": pair.id,
        "images": [_written(image, folder) for image in pair.images],
        "prompt": pair.prompt,
        "chosen": [assistant(pair.chosen)],
        "rejected": [assistant(pair.rejected)],
    }
    if pair.rejected_images is not None:
        row[REJECTED_IMAGES] = [_written(image, folder) for image in pair.rejected_images]
    if pair.weight != 1:
        row[WEIGHT] = pair.weight
    return row | pair.extra


def assistant(text: str) -> Message:
    """An answer as a chat message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def samples(path: str | Path, what: str) -> Iterator[tuple[str, str, dict, Path]]:
    """Yields each row of a file: (beginning of an error message, number, row under our names, folder of images)."""
    file, folder, entry = dataset_info.resolved(path)
    for where, number, row in read_rows(file, what):
        row = row if entry is None else dataset_info.renamed(row, entry, where)
        yield where, number, pair_formats.gathered(row, where), folder


def read_rows(path: Path, what: str) -> Iterator[tuple[str, str, dict]]:
    """Yields each row of a file: (beginning of an error message, number, row)."""
    rows = files.read_rows(path, what)
    with path.open("rb") as file:
        unit = "entry" if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") else "line"
    for number, row in rows:
        yield f"{unit} {number} of {str(path)!r}", str(number), row


def row_id(row: dict, number: str) -> str:
    """The row's own id; if it has none, its number in the file."""
    return str(next((row[key] for key in ID_KEYS if row.get(key) is not None), number))


def check_answer(text: str, name: str, where: str) -> None:
    """Raises an `LVLMError` if an answer is empty or has an image placeholder."""
    if not text.strip():
        raise LVLMError(f"{where}: {name} is empty; remove the row or give it an answer")
    if PLACEHOLDER in text:
        raise LVLMError(f"{where}: {name} contains {PLACEHOLDER}; an answer is text alone")


def placed_prompt(
    row: dict, prompt: list[Message], folder: Path, where: str
) -> tuple[tuple[Path | bytes, ...], list[Message]]:
    """The images of a preference row, and its prompt with one part per image.

    Raises:
        LVLMError: there is no image, an image is missing, placeholders do not match, or the prompt has no question.
    """
    images = row_images(row, folder, where)
    if not images:
        raise LVLMError(f"{where} has no image; a preference pair needs at least one, in the field images")
    if not prompt or prompt[-1]["role"] != "user":
        raise LVLMError(f"{where}: the prompt does not end with a user message; there is nothing to answer")
    return images, place_images(prompt, len(images), where)


def extra(row: dict, used: Sequence[str]) -> dict:
    """The columns of a row that were not read; `used` names those that were, besides images, weight and id."""
    known_columns = (*used, *IMAGE_KEYS, REJECTED_IMAGES, WEIGHT, ID_KEYS[0])
    return {key: value for key, value in row.items() if key not in known_columns}


def weight(row: dict, where: str) -> float:
    """The row's `weight`; 1 if it has none."""
    value = row.get(WEIGHT)
    if value is None:
        return 1.0
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise LVLMError(f"{where}: weight is {repr(value)[:40]}; expected a number above 0, or remove the row")
    return float(value)


def _rejected_images(row: dict, images: tuple, folder: Path, where: str) -> tuple[Path | bytes, ...] | None:
    """The images of the rejected side; None if both sides have the same images."""
    value = row.get(REJECTED_IMAGES)
    if value in (None, [], ""):
        return None
    rejected = tuple(_image(one, folder, where) for one in (value if isinstance(value, list) else [value]))
    if len(rejected) != len(images):
        raise LVLMError(
            f"{where} has {len(rejected)} {REJECTED_IMAGES} and {len(images)} images; expected one for each image, "
            "in the same order"
        )
    return None if rejected == images else rejected


def row_images(row: dict, folder: Path, where: str) -> tuple[Path | bytes, ...]:
    """The images of a row, under whichever of IMAGE_KEYS the row has."""
    present = [key for key in IMAGE_KEYS if row.get(key) not in (None, [], "")]
    if len(present) > 1:
        raise LVLMError(f"{where} has images under {' and '.join(present)}; expected one of them")
    value = next((row[key] for key in present), [])
    return tuple(_image(one, folder, where) for one in (value if isinstance(value, list) else [value]))


def _image(value: Any, folder: Path, where: str) -> Path | bytes:
    if isinstance(value, dict) and value.get("bytes") is not None:
        return _encoded(lambda: base64.b64decode(value["bytes"], validate=True), where)
    name = value.get("path") if isinstance(value, dict) else value
    if not isinstance(name, str) or not name:
        raise LVLMError(f'{where}: an image is {repr(value)[:60]}; expected a path or {{"bytes": base64}}')
    if name.lower().startswith("data:"):
        return _encoded(lambda: addresses.read(name, False)[1], where)
    if addresses.is_address(name):
        try:
            name = str(addresses.read(name, False)[1])
        except LVLMError as error:
            raise LVLMError(f"{where}: image {name[:60]!r} is not read; download it, and name the file") from error
    path = folder / os.path.expanduser(name)
    if not files.is_file(path):
        raise LVLMError(
            f"{where}: image {str(path)[-150:]!r} does not exist; paths are relative to the file of samples"
        )
    return path


def _encoded(decode: Callable[[], bytes], where: str) -> bytes:
    """The bytes of an image in a data file."""
    try:
        data = decode()
        PIL.Image.open(io.BytesIO(data))
    except Exception as error:  # image readers raise whatever the first broken byte causes
        raise LVLMError(f"{where}: an image's bytes are not base64 of an image that can be opened") from error
    return data


def _written(image: Path | bytes, folder: Path) -> str | dict:
    if isinstance(image, bytes):
        return {"bytes": base64.b64encode(image).decode("ascii")}
    image, folder = Path(os.path.abspath(image)), Path(os.path.abspath(folder))
    return str(image.relative_to(folder) if image.is_relative_to(folder) else image)


def place_images(messages: list[Message], images: int, where: str) -> list[Message]:
    """Messages whose content is a list of parts; each of the `images` images has one part."""
    with_parts = [{"role": message["role"], "content": _parts(message["content"], where)} for message in messages]
    count = sum(part["type"] == "image" for message in with_parts for part in message["content"])
    if count == 0 and images:
        first_user = next((message for message in with_parts if message["role"] == "user"), None)
        if first_user is None:
            raise LVLMError(f"{where} has images and no user message to put them in")
        first_user["content"] = [{"type": "image"}] * images + first_user["content"]
    elif count != images:
        raise LVLMError(
            f"{where} has {count} image placeholders and {images} images; expected one for each, or no placeholder"
        )
    return with_parts


def _parts(content: str | list, where: str) -> list[dict]:
    """The parts of a message. Text is split at placeholders, and a line break after a placeholder is removed."""
    parts = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            if foreign := next((one for one in FOREIGN if one in part["text"]), None):
                raise LVLMError(
                    f"{where} has {foreign} in a text; expected {PLACEHOLDER} for each image, and its file in images"
                )
            for index, text in enumerate(part["text"].split(PLACEHOLDER)):
                parts += [{"type": "image"}] * (index > 0)
                text = text.removeprefix("\n") if index else text
                parts += [{"type": "text", "text": text}] if text else []
        else:
            raise LVLMError(
                f'{where}: a part of a message is {repr(part)[:60]}; expected {{"type": "text", "text": ...}} '
                'or {"type": "image"}'
            )
    return parts


def with_pictures(messages: Sequence[Message], images: Sequence[Any]) -> list[Message]:
    """Messages as `LVLM.generate` takes them, with the images in the places of their parts."""
    pictures = iter(images)

    def filled(part: dict) -> dict:
        return {"type": "image", "image": next(pictures)} if part["type"] == "image" else part

    return [{**message, "content": [filled(part) for part in message["content"]]} for message in messages]
