r"""Formats of samples in other projects: converts one row of any of these formats into a common form.

Pairs:

    TRL            {"images": [...], "prompt": ..., "chosen": ..., "rejected": ...}; strings or lists of messages
    LLaMA-Factory  {"conversations": [{"from": "human", "value": "<image>..."}], "chosen": {...}, "rejected": {...}},
                   or {"instruction": ..., "input": ..., "history": [[...]], "chosen": "...", "rejected": "..."},
                   or of its version 1 {"chosen_messages": [...], "rejected_messages": [...]}
    RLHF-V         {"question": ..., "chosen": ..., "rejected": ..., "image": ...}, or {"text": this as a JSON string}

Conversations:

    TRL            {"images": [...], "messages": [...]}; LLaMA-Factory's version 1 has its images in the messages
    LLaVA          {"id": ..., "image": ..., "conversations": [{"from": "human", "value": "<image>\n..."}, ...]}
    LLaMA-Factory  the same with "images", or {"instruction": ..., "input": ..., "history": [[...]], "output": ...}

Columns that would change what is learned but are unsupported (videos, tools, ...) are refused, not ignored. Every
function takes one row and `where`, the beginning of an error message; all raise `LVLMError`.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from lvlm_jax.errors import LVLMError
from lvlm_jax.files import field

Message = dict[str, Any]

ANSWERS = ("chosen", "rejected")
LIKED = {"good": "chosen", "bad": "rejected"}  # names in files for `lvlm fit`
IMAGE_KEYS = ("images", "image", "image_path")
ID_KEYS = ("id", "idx", "question_id")
ROLES = {"human": "user", "gpt": "assistant"}
_KNOWN_ROLES = ("system", "user", "assistant")
_REFUSED = ("videos", "video", "audios", "audio", "tools", "functions", "kto_tag")
_REFUSED_IN_MESSAGES = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_LEARNED = ("loss_weight", "weight", "loss", "train")  # whether a message is learned, in several projects
_PICTURES = ("image", "image_url")  # types of parts that are an image, and the keys that may name its file
_SOURCES = ("image", "image_url", "url", "path", "value")


class PairRow(NamedTuple):
    """One pair of a file.

    Attributes:
        prompt: chat messages; content is a string or a list of parts, images are placeholders.
        chosen, rejected: the two answers.
        used: the keys of the row that were read, without images and id.
    """

    prompt: list[Message]
    chosen: str
    rejected: str
    used: tuple[str, ...]


class Dialogue(NamedTuple):
    """One conversation of a file: chat messages as `PairRow.prompt`, and the keys of the row that were read."""

    messages: list[Message]
    used: tuple[str, ...]


def read_row(row: dict, where: str) -> PairRow:
    """The pair of a row in any of the formats, recognised by its keys."""
    refuse_columns(row, where)
    if set(LIKED) <= row.keys() and not set(ANSWERS) & row.keys():
        renamed_row = {LIKED.get(name, name): value for name, value in row.items()}
        parsed = read_row(renamed_row, where)
        return parsed._replace(used=(*parsed.used, *LIKED))
    if "text" in row and "chosen" not in row:
        return _packed(row, where)
    if "chosen_messages" in row:
        pair = {name: row.get(f"{name}_messages") for name in ANSWERS}
        return _implicit(pair, where)._replace(used=tuple(f"{name}_messages" for name in ANSWERS))
    if "conversations" in row:
        messages = [as_message(message, where) for message in field(row, ("conversations",), list, where)]
        return PairRow(_with_system(row, messages, where), *_answers(row, where), ("conversations", "system", *ANSWERS))
    if "question" in row:
        return PairRow([_user(row, "question", where)], *_answers(row, where), ("question", *ANSWERS))
    if "instruction" in row:
        messages, used_keys = _instruction(row, where)
        return PairRow(messages, *_answers(row, where), (*used_keys, *ANSWERS))
    if "prompt" in row:
        prompt = field(row, ("prompt",), (str, list), where)
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        else:
            messages = [as_message(message, where) for message in prompt]
        return PairRow(messages, *_answers(row, where), ("prompt", *ANSWERS))
    return _implicit(row, where)


def is_dialogue(row: dict, where: str) -> bool:
    """Whether a row is a conversation instead of a pair."""
    if any(name in row for name in (*ANSWERS, "chosen_messages", "rejected_messages")):
        return "messages" in row
    if any(name in row for name in ("messages", "conversations", "output")):
        return True
    if "text" in row:  # a packed pair
        return False
    raise LVLMError(
        f"{where} is neither a conversation (messages, conversations, or instruction and output) nor a pair "
        f"(chosen and rejected); it has {', '.join(map(str, row))[:100] or 'nothing'}"
    )


def read_dialogue(row: dict, where: str) -> Dialogue:
    """The conversation of a row in any of the formats, recognised by its keys."""
    refuse_columns(row, where)
    for name in ("messages", "conversations"):
        if name in row:
            messages_given = field(row, (name,), list, where)
            messages = [as_message(message, where) for message in messages_given]
            return Dialogue(_with_system(row, messages, where), (name, "system"))
    messages, used_keys = _instruction(row, where)
    answer = {"role": "assistant", "content": field(row, ("output",), str, where)}
    return Dialogue([*messages, answer], (*used_keys, "output"))


def refuse_columns(row: dict, where: str) -> None:
    """Raises an LVLMError if a row has a column that must not be ignored."""
    for name in _REFUSED:
        if row.get(name) not in (None, "", [], {}, "[]"):
            raise LVLMError(f"{where} has {name}, which is not supported; remove the row, or the column")


def gathered(row: dict, where: str) -> dict:
    """Moves the images that messages name (`{"type": "image", "image": "a.png"}`) to the column `images`."""
    images: list[Any] = []
    new_row = {}
    for name in ("prompt", "messages", *ANSWERS, "chosen_messages", "rejected_messages"):
        if isinstance(row.get(name), list):
            own: list[Any] = []
            new_row[name] = [_bare(message, own) for message in row[name]]
            # The images of a prompt that both answers repeat are the same images.
            images = images if own and own == images else images + own
    if not images:
        return row
    if image_key := next((name for name in IMAGE_KEYS if row.get(name)), None):
        raise LVLMError(f"{where} has images in its messages and in {image_key}; expected one of the two")
    rest = {name: value for name, value in row.items() if name not in IMAGE_KEYS}
    return rest | new_row | {"images": images}


def _bare(message: Any, images: list[Any]) -> Any:
    """A message whose image parts are placeholders; the images that they named are appended to `images`."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _PICTURES and (key := next((key for key in _SOURCES if part.get(key)), None)):
            source = part[key].get("url") if isinstance(part[key], Mapping) and "url" in part[key] else part[key]
            images.append(source)
            part = {"type": "image"}
        parts.append(part)
    return {**message, "content": parts}


def as_message(message: Any, where: str) -> Message:
    """Makes a chat message from `{"role", "content"}` or `{"from", "value"}`."""
    if isinstance(message, Mapping):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(role, str) and isinstance(content, str | list):
            role = ROLES.get(role, role)
            _check_message(message, role, where)
            parts = [_with_text(part) for part in content] if isinstance(content, list) else content
            return {"role": role, "content": parts}
    raise LVLMError(
        f'{where}: a message is {repr(message)[:60]}; expected {{"role": "user", "content": ...}} '
        'or {"from": "human", "value": ...}'
    )


def _check_message(message: Mapping, role: str, where: str) -> None:
    """Raises an LVLMError if a message has an unsupported role or field."""
    if role not in _KNOWN_ROLES:
        raise LVLMError(f"{where}: a message has the role {role[:40]!r}; expected {', '.join(_KNOWN_ROLES)}")
    for name in _REFUSED_IN_MESSAGES:
        if message.get(name):
            raise LVLMError(f"{where}: a message has {name}, which is not supported; remove the row")
    for name in _LEARNED:
        weight = message.get(name)
        expected = 1 if role == "assistant" else 0
        if weight is not None and weight != expected:
            raise LVLMError(
                f"{where}: {name} of a message of {role!r} is {repr(weight)[:40]}; every answer is learned and "
                f"nothing else is, so expected {expected} or none"
            )


def _with_text(part: Any) -> Any:
    """A part of LLaMA-Factory's version 1, `{"type": "text", "value": ...}`, in the usual form."""
    if isinstance(part, Mapping) and part.get("type") == "text" and "text" not in part and "value" in part:
        return {"type": "text", "text": part["value"]}
    return part


def answer_text(answer: Any, name: str, where: str) -> str:
    """The text of an answer: a string, an assistant message, or a list of one assistant message."""
    if isinstance(answer, str):
        return answer
    messages = answer if isinstance(answer, list) else [answer]
    if len(messages) != 1:
        raise LVLMError(f"{where}: {name} has {len(messages)} messages; expected one answer of the assistant")
    message = as_message(messages[0], where)
    if message["role"] != "assistant":
        raise LVLMError(f"{where}: {name} is a message of {message['role']!r}; expected the assistant's")
    if isinstance(message["content"], str):
        return message["content"]
    parts = message["content"]
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise LVLMError(f"{where}: {name} contains something other than text; an answer is only text")
    return "".join(part["text"] for part in parts)


def _answers(row: dict, where: str) -> tuple[str, str]:
    return tuple(answer_text(field(row, (name,), (str, list, dict), where), name, where) for name in ANSWERS)


def _user(row: dict, key: str, where: str) -> Message:
    return {"role": "user", "content": field(row, (key,), str, where)}


def _instruction(row: dict, where: str) -> tuple[list[Message], tuple[str, ...]]:
    """Messages of LLaMA-Factory's alpaca rows (earlier turns, then the question), and the keys that were read."""
    instruction = field(row, ("instruction",), str, where)
    if row.get("input"):
        instruction += "\n" + field(row, ("input",), str, where)
    turns = []
    for turn in field(row, ("history",), list, where) if row.get("history") else ():
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise LVLMError(f"{where}: a turn of history is {repr(turn)[:60]}; expected [question, answer]")
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages = [*turns, {"role": "user", "content": instruction}]
    return _with_system(row, messages, where), ("instruction", "input", "history", "system")


def _with_system(row: dict, messages: list[Message], where: str) -> list[Message]:
    if not row.get("system"):
        return messages
    if messages and messages[0]["role"] == "system":
        raise LVLMError(f"{where} has a system prompt in its messages and another in the column system")
    return [{"role": "system", "content": field(row, ("system",), str, where)}, *messages]


def _packed(row: dict, where: str) -> PairRow:
    """RLHF-V's first release: question and answers are a JSON string in the field `text`."""
    inner = field(row, ("text",), (str, dict), where)
    if isinstance(inner, str):
        try:
            inner = json.loads(inner)
        except (ValueError, RecursionError) as error:
            raise LVLMError(f"{where}: text is not a JSON string of a question with two answers ({error})") from error
    if not isinstance(inner, dict):
        raise LVLMError(f"{where}: text is a JSON {type(inner).__name__}; expected an object")
    parsed = read_row({key: value for key, value in inner.items() if key != "text"}, where)
    return parsed._replace(used=("text",))


def _implicit(row: dict, where: str) -> PairRow:
    """TRL's pairs without a prompt: both answers are whole conversations, and their common beginning is the prompt."""
    chosen, rejected = (row.get(name) for name in ANSWERS)
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise LVLMError(
            f"{where} has no prompt; expected the keys images, prompt, chosen, rejected (TRL), conversations, chosen, "
            "rejected (LLaMA-Factory) or question, chosen, rejected (RLHF-V), got "
            + (", ".join(map(str, row))[:100] or "none")
        )
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    texts = (
        answer_text(answer[shared:], name, where) for name, answer in zip(ANSWERS, (chosen, rejected), strict=True)
    )
    return PairRow([as_message(message, where) for message in chosen[:shared]], *texts, ANSWERS)
