"""Questions: makes HF chat messages from a prompt and images, and reads JSON-lines files of questions."""

import dataclasses
import json
import pathlib

from lvlm_jax import files
from lvlm_jax.errors import LVLMError

PLACEHOLDER = "<image>"
# The system prompt that Vicuna was trained with; the authors of LLaVA-1.5, VCD and OPERA send it, the hub's chat
# templates do not.
VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
SHORTEST = 64  # characters; shorter prompts form the first class, and each further class reaches to twice the length


def system_prompt(choice: str) -> str:
    """The system prompt for a user's choice: "vicuna" for Vicuna's sentence, "none" for an empty one, else the text
    itself."""
    return {"vicuna": VICUNA, "none": ""}.get(choice.strip().lower(), choice.strip())


def conversation(images, text: str, system: str = "") -> list[dict]:
    """One user turn about `images` (PIL images or paths), after a system prompt if there is one.

    Each `<image>` in `text` is the place of the next image; without placeholders, the images come first. Raises
    `LVLMError` if there are placeholders, but not one per image.
    """
    pieces = text.split(PLACEHOLDER)
    if len(pieces) == 1:
        pieces = [""] * len(images) + [text]
    if len(pieces) - 1 != len(images):
        raise LVLMError(
            f"the prompt has {len(pieces) - 1} {PLACEHOLDER} placeholders but {len(images)} images were given; "
            "give one image for each, or no placeholder to put the images first"
        )
    content = []
    for number, piece in enumerate(pieces):
        if number:
            content.append({"type": "image", "image": images[number - 1]})
        if piece.strip():
            content.append({"type": "text", "text": piece.strip()})
    if not any(part["type"] == "text" for part in content):
        raise LVLMError("the prompt is empty; ask something")
    before = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    return [*before, {"role": "user", "content": content}]


def length_class(text: str) -> int:
    """A small number that is the same for texts of similar length."""
    return max(0, (len(text) - 1) // SHORTEST).bit_length()


@dataclasses.dataclass(frozen=True)
class Question:
    """One line of a question file. `image` is as in the file: None, one name, or a list of names."""

    line: int  # from 1; unique, unlike the question_id
    question_id: int | str
    text: str
    image: str | list[str] | None

    @property
    def image_names(self) -> list[str]:
        """The file names of the images."""
        if self.image is None:
            return []
        return [self.image] if isinstance(self.image, str) else self.image


def _parse(raw: bytes, line: int) -> Question:
    try:
        entry = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise LVLMError(f"not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise LVLMError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise LVLMError("not a question (nested too deeply)") from error
    except ValueError as error:  # a number with more digits than Python accepts
        raise LVLMError(f"not a question ({error})") from error
    if not isinstance(entry, dict):
        raise LVLMError(f"a JSON {type(entry).__name__}; expected an object with question_id, image and text")
    question_id, text, image = (entry.get(key) for key in ("question_id", "text", "image"))
    if isinstance(question_id, bool) or not isinstance(question_id, (int, str)):
        raise LVLMError(f"question_id is {question_id!r}; expected a number or a string")
    if not isinstance(text, str) or not text.strip():
        raise LVLMError(f"text is {text!r}; expected the question as a string")
    names = image if isinstance(image, list) else [] if image is None else [image]
    if not all(isinstance(name, str) and name for name in names):
        raise LVLMError(f"image is {image!r}; expected a file name or a list of file names")
    return Question(line, question_id, text, image)


def read_questions(path) -> tuple[list[Question], dict[int, str]]:
    """Reads a JSON-lines file of `{"question_id", "image", "text"}`; `image` may be missing, a name or a list.

    Returns the questions, and for every malformed line its number (from 1) and the reason. Empty lines are skipped.
    Raises `LVLMError` if the file cannot be read or is not a JSON-lines file at all.
    """
    path = pathlib.Path(path)
    content = files.read_bytes(path, "question file")
    content = content.removeprefix(b"\xef\xbb\xbf")
    if content.lstrip().startswith(b"["):
        raise LVLMError(
            f"question file {str(path)!r} is one JSON list; expected JSON lines: one object a line, no commas between"
        )
    questions, failures = [], {}
    for line, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            questions.append(_parse(raw, line))
        except LVLMError as error:
            failures[line] = str(error)
    if not questions and not failures:
        raise LVLMError(f"question file {str(path)!r} is empty; expected one JSON object a line")
    return questions, failures
