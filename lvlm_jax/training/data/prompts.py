"""Prompts for making preference pairs: images and a question about them, from a file of JSON lines."""

import dataclasses
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.training.data import pair_files, pair_formats
from lvlm_jax.training.data.pair_formats import Message


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question about one image or several.

    Attributes:
        images: image files in reading order; the encoded image itself if the data file contains it.
        messages: chat messages as in `pair_files.Pair.prompt`; the last one is the user's.
        id: name of the prompt in logs and in files of corrected answers.
        extra: the other columns of the row; the pair keeps them.
    """

    images: tuple[Path | bytes, ...]
    messages: list[Message]
    id: str
    extra: dict = dataclasses.field(default_factory=dict)

    @property
    def truth(self) -> str | None:
        """The right answer; None if the file gives none."""
        return self.extra.get("truth")

    @property
    def wrong(self) -> tuple[str, ...]:
        """Wrong answers to the prompt; empty if the file gives none."""
        return tuple(self.extra.get("wrong", ()))

    @property
    def text(self) -> str:
        """The words of all messages."""
        return " ".join(part.get("text", "") for message in self.messages for part in message["content"])

    def conversation(self) -> list[Message]:
        """The messages as `LVLM.prepare` takes them, with the images in their places."""
        return self.paired("", "").conversation()

    def paired(self, chosen: str, rejected: str) -> pair_files.Pair:
        """The preference pair of this prompt and two answers."""
        return pair_files.Pair(self.images, self.messages, chosen, rejected, self.id, self.extra)


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a file of JSON lines (or one JSON list) `{images, prompt, id?, truth?, wrong?, kind?}`.

    `images` are paths, relative to the file. `prompt` is a text or a list of chat messages; "<image>" or an image part
    is the place of an image; if there is no such place, all images come first. The default `id` is the line's
    number. A file of pairs is also such a file; its answers are not used.

    Raises:
        LVLMError: (with the line) a malformed row, a prompt without image, a missing image, placeholders that do not
            match the images, an id that occurs twice.
    """
    path = files.expand(path)
    prompts, ids = [], set()
    for where, number, row in pair_files.read_rows(path, "prompt file"):
        images = pair_files.row_images(row, path.parent, where)
        if not images:
            raise LVLMError(f"{where} has no image; a preference pair needs at least one, in the field images")
        prompt = files.field(row, ("prompt",), (str, list), where)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [pair_formats.as_message(message, where) for message in turns]
        if not messages or messages[-1]["role"] != "user":
            raise LVLMError(f"{where}: the prompt does not end with a user message; there is nothing to answer")
        messages = pair_files.place_images(messages, len(images), where)
        if not any(part.get("text", "").strip() for part in messages[-1]["content"]):
            raise LVLMError(f"{where}: the prompt is empty; ask something")
        if "truth" in row:
            files.field(row, ("truth",), str, where)
        if "wrong" in row and not all(isinstance(one, str) for one in files.field(row, ("wrong",), list, where)):
            raise LVLMError(f"{where}: wrong is not a list of strings; give the wrong answers as texts")
        key = pair_files.row_id(row, number)
        files.unique(ids, key, where)
        used = ("prompt", *pair_formats.ANSWERS, *pair_formats.IMAGE_KEYS, pair_formats.ID_KEYS[0])
        extra = {name: row[name] for name in row if name not in used}
        prompts.append(Prompt(images, messages, key, extra))
    return prompts


def of_pair(pair: pair_files.Pair) -> Prompt:
    """The prompt of a pair."""
    return Prompt(pair.images, pair.prompt, pair.id, pair.extra)
