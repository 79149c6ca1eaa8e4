"""Files of preference pairs and of conversations: reading them with every fault named by its line, and writing pairs.

Images are paths relative to the file, or `{"bytes": base64}` inside it. Placeholders are image parts of messages, or
"<image>" in their text; a prompt without any has its images before the first user message's text.
"""

import base64
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.training.data import dataset_info, pair_formats
from lvlm_jax.training.data.pair_formats import ID_KEYS, IMAGE_KEYS, Message

PLACEHOLDER = "<image>"
REJECTED_IMAGES, WEIGHT = (
    "rejected_images",
    "weight",
)  # columns of the pictures of a rejected side, and of a row's share


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Chat messages about images; the assistant's are what supervised fine-tuning learns.

    Attributes:
        images: picture files in reading order; the encoded picture itself where the file held it.
        messages: `{"role", "content"}`; content a list of `{"type": "text", "text"}` and `{"type": "image"}`, one of
            the latter for each image.
        id: the row's own id, or its number in the file.
        extra: what else the row had.
        weight: how much the row counts in the loss, beside 1 for others; above 0.
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
        images: picture files in reading order; the encoded picture itself where the file held it.
        prompt: chat messages as `Conversation.messages`, up to the one that is answered.
        chosen, rejected: the texts of the two answers.
        id: the row's own id, or its number in the file.
        extra: what else the row had; `write_pairs` keeps it.
        rejected_images: the pictures of the rejected side, as many; None: `images`.
        weight: how much the pair counts in the loss, beside 1 for others; above 0.
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
        """The prompt as `LVLM.generate` takes it, with the pictures in their places."""
        return with_pictures(self.prompt, self.images)


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a file, in its order.

    Args:
        path: JSON lines or one JSON list in any format of `pair_formats`, or LLaMA-Factory's `dataset_info.json`; the
            entry of one with several is named behind a colon, as in "data/dataset_info.json:my_pairs".

    Raises:
        LVLMError: naming the line: a malformed row, a pair without image, a missing or unreadable image, placeholders
            that do not match the images, an empty answer, or two equal ones about the same pictures.
    """
    pairs = []
    for where, number, row, folder in samples(path, "preference file"):
        found = pair_formats.read_row(row, where)
        images, prompt = placed_prompt(row, found.prompt, folder, where)
        for name in pair_formats.ANSWERS:
            check_answer(getattr(found, name), name, where)
        others = _rejected_images(row, images, folder, where)
        if found.chosen.strip() == found.rejected.strip() and others is None:
            raise LVLMError(
                f"{where}: chosen and rejected are equal; remove the pair, or give the rejected side other pictures "
                f"in {REJECTED_IMAGES}"
            )
        about = row_id(row, number), extra(row, found.used), others, weight(row, where)
        pairs.append(Pair(images, prompt, found.chosen, found.rejected, *about))
    return pairs


def read_conversations(path: str | Path) -> list[Conversation]:
    """The conversations of a file, in any format of `pair_formats`; of pairs the chosen answers.

    Raises:
        LVLMError: naming the line: what `read_pairs` refuses, a conversation without an answer, an empty answer.
    """
    where, _, first, _ = next(samples(path, "conversation file"))
    if not pair_formats.is_dialogue(first, where):
        return [
            Conversation(pair.images, [*pair.prompt, assistant(pair.chosen)], pair.id, pair.extra, pair.weight)
            for pair in read_pairs(path)
        ]
    conversations = []
    for where, number, row, folder in samples(path, "conversation file"):
        messages, used = pair_formats.read_dialogue(row, where)
        answers = [message for message in messages if message["role"] == "assistant"]
        if not answers or messages[-1] is not answers[-1]:
            raise LVLMError(f"{where}: the conversation does not end with an assistant message to learn")
        for answer in answers:
            check_answer(pair_formats.answer_text(answer, "an answer", where), "an answer", where)
        images = row_images(row, folder, where)
        placed = place_images(messages, len(images), where)
        conversations.append(Conversation(images, placed, row_id(row, number), extra(row, used), weight(row, where)))
    return conversations


def write_pairs(path: str | Path, pairs: Sequence[Pair]) -> None:
    """Writes TRL's format, `{"id", "images", "prompt", "chosen", "rejected"}` as JSON lines, whole or not at all.

    Raises:
        LVLMError: the file cannot be written.
    """
    path = Path(path)
    lines = [json.dumps(row_of(pair, path.parent), ensure_ascii=False) for pair in pairs]
    files.write_whole(path, "".join(line + "\n" for line in lines))


def row_of(pair: Pair, folder: Path) -> dict:
    """A pair as a row of TRL's format, for a file in `folder`; images inside the folder by their relative path."""
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
    """(beginning of an error message, number, row under our names, what its images are relative to) of each row."""
    file, folder, entry = dataset_info.resolved(path)
    for where, number, row in read_rows(file, what):
        row = row if entry is None else dataset_info.renamed(row, entry, where)
        yield where, number, pair_formats.gathered(row, where), folder


def read_rows(path: Path, what: str) -> Iterator[tuple[str, str, dict]]:
    """(beginning of an error message, number, row) of each row."""
    rows = files.read_rows(path, what)
    with path.open("rb") as file:
        unit = "entry" if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") else "line"
    for number, row in rows:
        yield f"{unit} {number} of {str(path)!r}", str(number), row


def row_id(row: dict, number: str) -> str:
    """The row's own id; without one its number in the file."""
    return str(next((row[key] for key in ID_KEYS if row.get(key) is not None), number))


def check_answer(text: str, name: str, where: str) -> None:
    """Raises an `LVLMError` if an answer is empty or has a placeholder of an image."""
    if not text.strip():
        raise LVLMError(f"{where}: {name} is empty; remove the row or give it an answer")
    if PLACEHOLDER in text:
        raise LVLMError(f"{where}: {name} contains {PLACEHOLDER}; an answer is text alone")


def placed_prompt(
    row: dict, prompt: list[Message], folder: Path, where: str
) -> tuple[tuple[Path | bytes, ...], list[Message]]:
    """The images of a row that is to be preferred or not, and its prompt with a part for each.

    Raises:
        LVLMError: no image, one that is missing, placeholders that do not match, or a prompt that asks nothing.
    """
    images = row_images(row, folder, where)
    if not images:
        raise LVLMError(f"{where} has no image; a preference pair needs at least one, in the field images")
    if not prompt or prompt[-1]["role"] != "user":
        raise LVLMError(f"{where}: the prompt does not end with a user message; there is nothing to answer")
    return images, place_images(prompt, len(images), where)


def extra(row: dict, used: Sequence[str]) -> dict:
    """The columns of a row that nothing here has read."""
    known = (*used, *IMAGE_KEYS, REJECTED_IMAGES, WEIGHT, ID_KEYS[0])
    return {key: value for key, value in row.items() if key not in known}


def weight(row: dict, where: str) -> float:
    """The row's `weight`; 1 without one."""
    given = row.get(WEIGHT)
    if given is None:
        return 1.0
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not number or not 0 < given < math.inf:
        raise LVLMError(f"{where}: weight is {repr(given)[:40]}; expected a number above 0, or remove the row")
    return float(given)


def _rejected_images(row: dict, images: tuple, folder: Path, where: str) -> tuple[Path | bytes, ...] | None:
    """The pictures of the rejected side; None where they are those of the chosen one."""
    given = row.get(REJECTED_IMAGES)
    if given in (None, [], ""):
        return None
    found = tuple(_image(one, folder, where) for one in (given if isinstance(given, list) else [given]))
    if len(found) != len(images):
        raise LVLMError(
            f"{where} has {len(found)} {REJECTED_IMAGES} and {len(images)} images; expected as many, in the same order"
        )
    return None if found == images else found


def row_images(row: dict, folder: Path, where: str) -> tuple[Path | bytes, ...]:
    """The images of a row under the first of IMAGE_KEYS that it has."""
    named = [key for key in IMAGE_KEYS if row.get(key) not in (None, [], "")]
    if len(named) > 1:
        raise LVLMError(f"{where} has images under {' and '.join(named)}; expected one of them")
    given = next((row[key] for key in named), [])
    return tuple(_image(one, folder, where) for one in (given if isinstance(given, list) else [given]))


def _image(given: Any, folder: Path, where: str) -> Path | bytes:
    if isinstance(given, dict) and given.get("bytes") is not None:
        try:
            data = base64.b64decode(given["bytes"], validate=True)
            PIL.Image.open(io.BytesIO(data))
        except Exception as error:  # a reader of pictures raises whatever the first broken byte provokes
            raise LVLMError(f"{where}: an image's bytes are no base64 of a picture that can be opened") from error
        return data
    name = given.get("path") if isinstance(given, dict) else given
    if not isinstance(name, str) or not name:
        raise LVLMError(f'{where}: an image is {repr(given)[:60]}; expected a path or {{"bytes": base64}}')
    path = folder / os.path.expanduser(name)
    if not files.is_file(path):
        raise LVLMError(
            f"{where}: image {str(path)[-150:]!r} does not exist; paths are relative to the file of samples"
        )
    return path


def _written(image: Path | bytes, folder: Path) -> str | dict:
    if isinstance(image, bytes):
        return {"bytes": base64.b64encode(image).decode("ascii")}
    image, folder = Path(os.path.abspath(image)), Path(os.path.abspath(folder))
    return str(image.relative_to(folder) if image.is_relative_to(folder) else image)


def place_images(messages: list[Message], images: int, where: str) -> list[Message]:
    """Messages whose content is a list of parts, with one image part for each image."""
    placed = [{"role": message["role"], "content": _parts(message["content"], where)} for message in messages]
    found = sum(part["type"] == "image" for message in placed for part in message["content"])
    if found == 0 and images:
        asked = next((message for message in placed if message["role"] == "user"), None)
        if asked is None:
            raise LVLMError(f"{where} has images and no user message to put them in")
        asked["content"] = [{"type": "image"}] * images + asked["content"]
    elif found != images:
        raise LVLMError(
            f"{where} has {found} image placeholders and {images} images; expected one for each, or no placeholder"
        )
    return placed


def _parts(content: str | list, where: str) -> list[dict]:
    """The parts of a message; text is split at placeholders, and the line break behind one is the template's."""
    parts = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
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
    """Messages as `LVLM.generate` takes them, with the pictures in the places of their parts."""
    pictures = iter(images)

    def filled(part: dict) -> dict:
        return {"type": "image", "image": next(pictures)} if part["type"] == "image" else part

    return [{**message, "content": [filled(part) for part in message["content"]]} for message in messages]
