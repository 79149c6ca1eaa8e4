"""Renders chat templates, with each message in the form that the template expects.

A template reads a message's content as a string (`{{ message.content }}`), as a list of parts (`{% for part in
message.content %}`), or as either, possibly differently for each role. The form is found by trial: every text is
replaced by a unique word, and the right forms are those in which all these words reach the prompt, and none of them
inside a printed Python list.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from lvlm_jax.errors import LVLMError
from lvlm_jax.processors import rendering

Message = Mapping[str, Any]
Forms = dict[str, str]  # by role

AS_GIVEN, STRINGS, PARTS = "as given", "strings", "parts"
SPEAKERS = ("system", "user", "assistant")
LONGEST_REASON = 300  # characters of a library's error message
MOST_KNOWN = 1000
_KNOWN: dict[tuple, Forms] = {}  # by template and signature of a conversation


def in_template_form(processor: Any, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages in the forms that the processor's chat template reads; unchanged if it reads their form.

    Args:
        processor: the checkpoint's processor.
        messages: `{"role", "content"}`; content is a string or a list of text and image parts, without the images
            themselves.
    """
    signature = tuple((_speaker(message), _part_letters(message["content"])) for message in messages)
    key = (type(processor), str(getattr(processor, "chat_template", None)), signature)
    if key not in _KNOWN:
        if len(_KNOWN) >= MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = _forms(processor, messages)
    forms = _KNOWN[key]
    return [_in_form(message, forms[_speaker(message)]) for message in messages]


def render(processor: Any, messages: Sequence[Message], prompt: bool, continued: bool = False) -> str:
    """The text of messages that `in_template_form` returned.

    Args:
        prompt: whether to write the beginning of an answer.
        continued: whether the last message is to be continued, so that nothing is written after it.

    Raises:
        LVLMError: the template is broken, refuses the conversation, or exceeds a limit of `rendering`.
    """
    try:
        text = _rendered(processor, messages, prompt, continued)
        text.encode()
        return text
    except UnicodeEncodeError as error:
        raise LVLMError(
            f"the conversation contains {text[error.start]!r}, which is half of a character; write the text again"
        ) from error
    except _Raised as error:
        raise _fault(error) from error


def check_system(processor: Any, system: str) -> None:
    """Checks that the chat template writes a system prompt into the prompt; "" passes without a check.

    Raises:
        LVLMError: the template refuses or ignores a system message.
    """
    if not system:
        return
    text = [{"type": "text", "text": "?"}]
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}, {"role": "user", "content": text}]
    problem = "does not write it"
    try:
        if system in render(processor, in_template_form(processor, messages), True):
            return
    except LVLMError as error:
        problem = str(error)
    raise LVLMError(
        f"this checkpoint's chat template has no place for the system prompt {system[:40]!r}: {problem}; "
        "leave it out with --system none"
    )


def tokenizer_options(processor: Any, text: str) -> dict[str, bool]:
    """Options for tokenising a text from the chat template: no special tokens are added if it begins with one.

    `apply_chat_template(tokenize=True)` of transformers' processors does the same.
    """
    begin = getattr(processor.tokenizer, "bos_token", None)
    return {"add_special_tokens": False} if begin and text.startswith(begin) else {}


def reason(error: Exception) -> str:
    """The message of an exception, as one line of limited length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + "…"


def _speaker(message: Message) -> str:
    return message["role"] if message["role"] in SPEAKERS else "other"


def _part_letters(content: str | Sequence[Message]) -> str:
    """A letter for each part of a content, t for text and i for an image; s if the content is a string."""
    return "s" if isinstance(content, str) else "".join(part["type"][0] for part in content)


def _in_form(message: Message, form: str) -> dict[str, Any]:
    content = message["content"]
    if form == PARTS and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif form == STRINGS and not isinstance(content, str) and all(part["type"] == "text" for part in content):
        content = "".join(part["text"] for part in content)
    return {**message, "content": content}


class _Raised(Exception):
    """An exception of a template: the kind of fault, the exception's name, its message, and the broken line."""

    def __init__(self, sort: str, name: str, message: str, line: int = 0):
        super().__init__(message)
        self.sort, self.name, self.line = sort, name, line


def _rendered(processor: Any, messages: Sequence[Message], prompt: bool, continued: bool) -> str:
    """The text from `apply_chat_template` of transformers' processors and tokenizers."""
    template = processor.chat_template
    if isinstance(template, Mapping):  # several templates, by name
        template = template.get("default")
    if not isinstance(template, str):
        raise LVLMError(f"the chat template is {str(template)[:40]!r}; expected a text, or several with a 'default'")
    options = {"add_generation_prompt": prompt, "continue_final_message": continued}
    clean_messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    special = getattr(processor.tokenizer, "special_tokens_map", {})
    reply = rendering.RENDERER.render(template, clean_messages, {**special, **options})
    if "text" not in reply:
        raise _Raised(**reply)
    return reply["text"]


def _forms(processor: Any, messages: Sequence[Message]) -> Forms:
    """The form (`AS_GIVEN`, `STRINGS` or `PARTS`) in which the template reads most texts of each role's messages."""
    trial = _trial(messages)
    speakers = sorted({_speaker(message) for message, _ in trial})
    choices = itertools.product((AS_GIVEN, STRINGS, PARTS), repeat=len(speakers))
    best, refused, tried = (-1, None), None, []
    # Small changes are tried first, so that the first of the best results changes nothing without need.
    for chosen in sorted(choices, key=lambda forms: sum(form != AS_GIVEN for form in forms)):
        forms = dict(zip(speakers, chosen, strict=True))
        formed = [_in_form(message, forms[_speaker(message)]) for message, _ in trial]
        if formed in tried:
            continue
        tried.append(formed)
        try:
            text = _rendered(processor, formed, False, False)
        except _Raised as error:
            if error.sort != "other":  # "other" also includes raise_exception, whose message explains the problem
                refused = refused or forms
            continue
        lists = (message["content"] for message in formed if not isinstance(message["content"], str))
        if any(content and repr(content) in text for content in lists):
            continue
        read = sum(not words or any(word in text for word in words) for _, words in trial)
        if read > best[0]:
            best = (read, forms)
        if read == len(trial):
            break
    return best[1] or refused or dict.fromkeys(speakers, AS_GIVEN)


def _trial(messages: Sequence[Message]) -> list[tuple[dict[str, Any], list[str]]]:
    """The messages with unique words for texts, each with its words.

    The words are numbers, because templates may change the case of letters.
    """
    numbers = (str(number) for number in itertools.count(770_001))
    trial = []
    for message in messages:
        content, words = message["content"], []
        if isinstance(content, str):
            words = [next(numbers)]
            content = words[0]
        else:
            texts = [part["type"] == "text" for part in content]
            words = list(itertools.islice(numbers, sum(texts)))
            remaining = iter(words)
            content = [
                {"type": "text", "text": next(remaining)} if is_text else part
                for part, is_text in zip(content, texts, strict=True)
            ]
        trial.append(({**message, "content": content}, words))
    return trial


def _fault(error: _Raised) -> LVLMError:
    if error.sort == "syntax":
        return LVLMError(
            f"the chat template is broken at line {error.line} ({reason(error)}); copy chat_template.jinja from the "
            "checkpoint's repository"
        )
    if error.sort == "refusal":
        return LVLMError(f"the chat template refuses the conversation: {reason(error)}")
    return LVLMError(
        f"the chat template cannot write the conversation ({error.name}: {reason(error)}); give messages of "
        "another form, or the checkpoint another template (chat_template.jinja)"
    )
