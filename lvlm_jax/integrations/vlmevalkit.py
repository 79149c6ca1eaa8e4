"""Our models in VLMEvalKit (open-compass/VLMEvalKit): a `BaseModel` that keeps images and text in their order.

A message is a list of `{"type": "image" | "text", "value": path or text}`; VLMEvalKit sends one at a time.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmeval.vlm.base import BaseModel

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.settings import LARGEST_SEED
from lvlm_jax.integrations import GENERATION, build_method, decoding, load, whole
from lvlm_jax.journal.log import seed_of

LONGEST_ANSWER = 512  # tokens; the limit of VLMEvalKit's own LLaVA


class LVLMJax(BaseModel):
    """A model of this package, with or without a method, with the interface of VLMEvalKit.

    Args:
        model_path: "pocket", a checkpoint folder, or a hub id.
        dtype: "auto" (float32 on a CPU, else bfloat16), "float32", "bfloat16" or "float16".
        method: "none", a method's name, or several joined by +.
        seed: seed of sampling; a message has the same random stream wherever it is in a benchmark.
        stop: strings that end an answer.
        settings: those of the method (`alpha=3.0`, `preset="llava-1.5/pope"`), and of generation under the names of
            transformers (`max_new_tokens`, `do_sample`, `temperature`, `top_p`, `num_beams`, ...).

    Raises:
        LVLMError: a model, method or setting cannot be used.
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(
        self,
        model_path: str,
        dtype: str = "auto",
        method: str = "none",
        seed: int = 0,
        stop: str | Sequence[str] = (),
        **settings: Any,
    ):
        super().__init__()
        generation = {name: settings.pop(name) for name in GENERATION if name in settings}
        reserved = ("model_path", "dtype", "method", "seed", "stop", *GENERATION)
        self.method = build_method(str(method), settings, reserved)
        self.decoding = decoding(generation, LONGEST_ANSWER, stop)
        self.seed = whole("seed", seed, 0, LARGEST_SEED)
        self.model = load(model_path, dtype)

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The answer to one message; `dataset` is ignored.

        Raises:
            LVLMError: the message is empty, a part is neither text nor image, or an image is unreadable.
        """
        if not message:
            raise LVLMError("the message is empty; expected a list of {'type': 'image' or 'text', 'value': ...}")
        content = [_part(part) for part in message]
        # The seed depends on the names of images alone: the folder of VLMEvalKit's data differs between machines.
        parts = (Path(part["value"]).name if part["type"] == "image" else part["value"] for part in message)
        seed = seed_of(self.seed, "\n".join(map(str, parts)))
        conversation = [{"role": "user", "content": content}]
        decoding = dataclasses.replace(self.decoding, seed=(seed,))
        return self.model.generate([conversation], method=self.method, **vars(decoding)).text[0]


def _part(part: Mapping[str, str]) -> dict[str, str]:
    """A part of a message in the form of chat messages."""
    if part.get("type") not in LVLMJax.allowed_types or "value" not in part:
        raise LVLMError(
            f"a message part has type {part.get('type')!r}; expected {{'type': 'image' or 'text', 'value': ...}}"
        )
    return {"type": part["type"], part["type"]: part["value"]}
