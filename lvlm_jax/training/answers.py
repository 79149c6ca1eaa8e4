"""Answers of the model in training to a few held-out prompts: people read them, and the log counts the right ones."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lvlm_jax.errors import LVLMError
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import Method
from lvlm_jax.processors.images import open_image
from lvlm_jax.training.data.labelled import Labelled
from lvlm_jax.training.data.pair_files import Conversation, Pair, with_pictures
from lvlm_jax.training.monitor import Answer
from lvlm_jax.weights import parts


@dataclasses.dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt and its right answer.

    Attributes:
        id: id of the row.
        messages: chat messages, as for `LVLM.prepare`.
        truth: the right answer.
        images: the prompt's images, as in `pair_files.Pair`.
    """

    id: str
    messages: list[dict]
    truth: str
    images: tuple[Any, ...]

    @property
    def text(self) -> str:
        """The words of all messages."""
        return "\n".join(part["text"] for message in self.messages for part in message["content"] if "text" in part)


def chosen(examples: Sequence[Pair | Conversation | Labelled], count: int) -> tuple[AnsweredPrompt, ...]:
    """At most `count` prompts of the examples, at equal distances in their order.

    Raises:
        LVLMError: prompts are requested in a run with several processes.
    """
    if not count:
        return ()
    if jax.process_count() > 1:
        raise LVLMError("loop.answers needs a single process; set it to 0 in a run over several")
    questions = list(_answered_prompts(examples))
    places = np.linspace(0, len(questions) - 1, min(count, len(questions))).round().astype(int)
    return tuple(questions[place] for place in places)


def _answered_prompts(examples: Sequence[Pair | Conversation | Labelled]) -> Iterator[AnsweredPrompt]:
    for example in examples:
        if isinstance(example, Conversation):
            *prompt, last = example.messages
            truth = "".join(part["text"] for part in last["content"])
        elif isinstance(example, Pair):
            prompt, truth = example.prompt, example.chosen
        elif example.desirable:
            prompt, truth = example.prompt, example.answer
        else:
            continue
        yield AnsweredPrompt(example.id, with_pictures(prompt, example.images), truth.strip(), example.images)


def generate_answers(
    model: LVLM,
    prompts: Sequence[AnsweredPrompt],
    new_tokens: int,
    batch: int,
    method: Method | None,
    trainable: Any,
    frozen: Any,
) -> list[Answer]:
    """Greedy answers of the model in training.

    Args:
        model: the base model; its configuration, folder and mesh are used.
        new_tokens: largest number of tokens of an answer.
        batch: number of prompts that are answered together.
        method: the method under which the model answers, or None.
        trainable, frozen: the two parts of the parameters.
    """
    current = LVLM(parts.join(trainable, frozen), model.config, model.folder, model.mesh)
    replies = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        padded = [*some, *[some[-1]] * (batch - len(some))]  # the last batch is padded to full size
        texts = current.generate([prompt.messages for prompt in padded], method, max_new_tokens=new_tokens).text
        for prompt, text in zip(some, texts, strict=False):
            first_image = np.asarray(open_image(prompt.images[0])) if prompt.images else None
            replies.append(Answer(prompt.id, prompt.text, prompt.truth, text, first_image))
    return replies
