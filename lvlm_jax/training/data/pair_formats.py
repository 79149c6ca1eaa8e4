"""How others write preference pairs down: one row of TRL's, LLaMA-Factory's or RLHF-V's format as one common form.

    TRL            {"images": [...], "prompt": ..., "chosen": ..., "rejected": ...}; strings or lists of messages
    LLaMA-Factory  {"conversations": [{"from": "human", "value": "<image>..."}], "chosen": {...}, "rejected": {...}},
                   or {"instruction": ..., "input": ..., "chosen": "...", "rejected": "..."}
    RLHF-V         {"question": ..., "chosen": ..., "rejected": ..., "image": ...}, or {"text": that as a JSON string}

Every function takes one row and `where`, the beginning of an error message; all raise `LVLMError`.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from lvlm_jax.errors import LVLMError
from lvlm_jax.files import field

Message = dict[str, Any]

ANSWERS = ("chosen", "rejected")
IMAGE_KEYS = ("images", "image", "image_path")
ID_KEYS = ("id", "idx", "question_id")
# LLaMA-Factory's own names of columns and tags, which an entry of `dataset_info.json` may rename.
COLUMNS = {"messages": "conversations", "prompt": "instruction", "query": "input", "system": "system"}
TAGS = {"role_tag": "from", "content_tag": "value"}
ROLE_TAGS = {"user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}
ROLES = {"human": "user", "gpt": "assistant"}


class Row(NamedTuple):
    """One pair as its file has it.

    Attributes:
        prompt: chat messages; content a string or a list of parts, images still as placeholders.
        chosen, rejected: the two answers.
        used: the keys of the row that were read, images and id not among them.
    """

    prompt: list[Message]
    chosen: str
    rejected: str
    used: tuple[str, ...]


def read_row(row: dict, where: str) -> Row:
    """The pair of a row in any of the formats, told apart by its keys."""
    if "text" in row and "chosen" not in row:
        return _packed(row, where)
    if "conversations" in row:
        messages = [as_message(message, where) for message in field(row, ("conversations",), list, where)]
        return Row(
            _with_system(row, messages, where), *_answers(row, where), ("conversations", "system", *ANSWERS)
        )
    if "question" in row:
        return Row([_user(row, "question", where)], *_answers(row, where), ("question", *ANSWERS))
    if "instruction" in row:
        asked = field(row, ("instruction",), str, where)
        if row.get("input"):
            asked += "\n" + field(row, ("input",), str, where)
        messages = _with_system(row, [{"role": "user", "content": asked}], where)
        return Row(messages, *_answers(row, where), ("instruction", "input", "system", *ANSWERS))
    if "prompt" in row:
        asked = field(row, ("prompt",), (str, list), where)
        if isinstance(asked, str):
            messages = [{"role": "user", "content": asked}]
        else:
            messages = [as_message(message, where) for message in asked]
        return Row(messages, *_answers(row, where), ("prompt", *ANSWERS))
    return _implicit(row, where)


def renamed(row: dict, entry: dict) -> dict:
    """A row as an entry of LLaMA-Factory's `dataset_info.json` describes it, under the names of `read_row`."""
    columns, tags = entry.get("columns", {}), {**TAGS, **ROLE_TAGS, **entry.get("tags", {})}
    names = {given: COLUMNS.get(key, key) for key, given in columns.items() if given}
    roles = {tags[key]: ROLES.get(ours, ours) for key, ours in ROLE_TAGS.items()}

    def message(given: Any) -> Any:
        if not isinstance(given, Mapping) or tags["role_tag"] not in given:
            return given
        role = given[tags["role_tag"]]
        return {"role": roles.get(role, role), "content": given.get(tags["content_tag"])}

    def value(given: Any) -> Any:
        return [message(one) for one in given] if isinstance(given, list) else message(given)

    return {names.get(key, key): value(given) for key, given in row.items()}


def as_message(message: Any, where: str) -> Message:
    """A chat message from `{"role", "content"}` or `{"from", "value"}`."""
    if isinstance(message, Mapping):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(role, str) and isinstance(content, str | list):
            return {"role": ROLES.get(role, role), "content": content}
    raise LVLMError(
        f'{where}: a message is {repr(message)[:60]}; expected {{"role": "user", "content": ...}} '
        'or {"from": "human", "value": ...}'
    )


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
        raise LVLMError(f"{where}: {name} holds something that is not text; an answer is text alone")
    return "".join(part["text"] for part in parts)


def _answers(row: dict, where: str) -> tuple[str, str]:
    return tuple(answer_text(field(row, (name,), (str, list, dict), where), name, where) for name in ANSWERS)


def _user(row: dict, key: str, where: str) -> Message:
    return {"role": "user", "content": field(row, (key,), str, where)}


def _with_system(row: dict, messages: list[Message], where: str) -> list[Message]:
    if not row.get("system"):
        return messages
    return [{"role": "system", "content": field(row, ("system",), str, where)}, *messages]


def _packed(row: dict, where: str) -> Row:
    """RLHF-V's first release: question and answers are a JSON string in the field `text`."""
    inner = field(row, ("text",), (str, dict), where)
    if isinstance(inner, str):
        try:
            inner = json.loads(inner)
        except ValueError as error:
            raise LVLMError(
                f"{where}: text is no JSON string of a question with two answers ({error})"
            ) from error
    if not isinstance(inner, dict):
        raise LVLMError(f"{where}: text is a JSON {type(inner).__name__}; expected an object")
    found = read_row({key: value for key, value in inner.items() if key != "text"}, where)
    return found._replace(used=("text",))


def _implicit(row: dict, where: str) -> Row:
    """TRL's pairs without a prompt: both answers are whole conversations, and what they share is the prompt."""
    chosen, rejected = (row.get(name) for name in ANSWERS)
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise LVLMError(
            f"{where} has no prompt; expected the keys images, prompt, chosen, rejected (TRL), conversations, chosen, "
            f"rejected (LLaMA-Factory) or question, chosen, rejected (RLHF-V), got {', '.join(map(str, row)) or 'none'}"
        )
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    texts = (
        answer_text(answer[shared:], name, where)
        for name, answer in zip(ANSWERS, (chosen, rejected), strict=True)
    )
    return Row([as_message(message, where) for message in chosen[:shared]], *texts, ANSWERS)
