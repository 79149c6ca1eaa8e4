"""Answers that are labelled good or bad, without a second answer: the data of KTO.

    TRL            {"images": [...], "prompt": ..., "completion": ..., "label": true}
    LLaMA-Factory  a conversation, {"messages" or "conversations": [...], "kto_tag": true}, or its alpaca form with
                   "output" and "kto_tag"

In a file of preference pairs, each chosen answer is a good one and each rejected answer a bad one.
"""

import dataclasses
from pathlib import Path

from lvlm_jax.errors import LVLMError
from lvlm_jax.training.data import pair_files, pair_formats
from lvlm_jax.training.data.pair_formats import Message

LABELS = ("label", "kto_tag")


@dataclasses.dataclass(frozen=True)
class Labelled:
    """An answer with its label.

    Attributes:
        images: image files in reading order; the encoded image itself if the data file contains it.
        prompt: chat messages as in `pair_files.Pair.prompt`, up to the user message that is answered.
        answer: the text of the answer.
        desirable: whether the answer is good.
        mismatched: the answer of the file's next row, which does not belong to this prompt.
        id: the row's own id, or its number in the file.
        extra: the other columns of the row.
        weight: the row's weight in the loss, by default 1; above 0.
    """

    images: tuple[Path | bytes, ...]
    prompt: list[Message]
    answer: str
    desirable: bool
    mismatched: str
    id: str
    extra: dict = dataclasses.field(default_factory=dict)
    weight: float = 1.0


def read(path: str | Path) -> list[Labelled]:
    """The labelled answers of a file, in its order.

    Raises:
        LVLMError: (with the line) a row has no label that is true or false, or `pair_files` refuses the row; or the
            file has only one answer, so that no other row gives a mismatched answer.
    """
    first_line, _, first, _ = next(pair_files.samples(path, "file of labelled answers"))
    if any(name in first for name in LABELS):
        examples = [_labelled(*sample) for sample in pair_files.samples(path, "file of labelled answers")]
    elif "completion" in first:
        raise LVLMError(f"{first_line} has a completion and no label; expected label, true or false")
    else:
        examples = [answer for pair in pair_files.read_pairs(path) for answer in _of_pair(pair)]
    if len(examples) < 2:
        raise LVLMError(
            f"{str(path)!r} has one answer; KTO compares each with that of another row, so expected at least 2"
        )
    answers = [example.answer for example in examples]
    return [
        dataclasses.replace(example, mismatched=other)
        for example, other in zip(examples, [*answers[1:], answers[0]], strict=True)
    ]


def _of_pair(pair: pair_files.Pair) -> tuple[Labelled, Labelled]:
    rejected = pair.images if pair.rejected_images is None else pair.rejected_images
    return tuple(
        Labelled(images, pair.prompt, text, good, "", f"{pair.id} ({name})", pair.extra, pair.weight)
        for images, text, name, good in (
            (pair.images, pair.chosen, "chosen", True),
            (rejected, pair.rejected, "rejected", False),
        )
    )


def _labelled(where: str, number: str, row: dict, folder: Path) -> Labelled:
    name = next((name for name in LABELS if name in row), LABELS[0])
    desirable = row.get(name)
    if not isinstance(desirable, bool):
        raise LVLMError(f"{where}: {name} is {repr(desirable)[:40]}; expected true or false")
    row = {key: value for key, value in row.items() if key != name}
    if "completion" in row:
        parsed = pair_formats.read_row(row | dict.fromkeys(pair_formats.ANSWERS, row["completion"]), where)
        prompt, answer, used_keys = parsed.prompt, parsed.chosen, (*parsed.used, "completion")
    else:
        messages, used_keys = pair_formats.read_dialogue(row, where)
        if messages[-1]["role"] != "assistant":
            raise LVLMError(f"{where}: the conversation does not end with an assistant message to learn")
        prompt, answer = messages[:-1], pair_formats.answer_text(messages[-1], "the answer", where)
    images, prompt = pair_files.placed_prompt(row, prompt, folder, where)
    pair_files.check_answer(answer, "the answer", where)
    about = pair_files.row_id(row, number), pair_files.extra(row, used_keys), pair_files.weight(row, where)
    return Labelled(images, prompt, answer, desirable, "", *about)
