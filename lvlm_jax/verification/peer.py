"""transformers for comparison: its processor's arrays for conversations, and its model's answers.

Imports torch, but only to run transformers' model.
"""

import contextlib
import dataclasses
import gc
import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors import load
from lvlm_jax.processors.templates import reason
from lvlm_jax.verification.conversations import Conversation
from lvlm_jax.weights import original
from lvlm_jax.weights.checkpoint import read_configuration, read_optional

_LOCAL = {"local_files_only": True, "trust_remote_code": False}
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Peer:
    """transformers' processor of a checkpoint.

    Attributes:
        processor: the processor itself.
        name: its name in messages.
    """

    processor: Any
    name: str

    def arrays(self, conversation: Conversation) -> Arrays:
        """The result of `apply_chat_template` for a conversation: token ids, and the tower's inputs.

        Exceptions of a template or a processor are passed through.
        """
        continued = conversation[-1]["role"] == "assistant"
        arrays = self.processor.apply_chat_template(
            self._readable(conversation, continued), tokenize=True, return_dict=True, return_tensors="np",
            add_generation_prompt=not continued, continue_final_message=continued,
        )  # fmt: skip
        return {name: np.asarray(array) for name, array in arrays.items()}

    def _readable(self, conversation: Conversation, continued: bool) -> Conversation:
        """The conversation unchanged if the template writes all its texts into the prompt, else in another form."""
        error = None
        for string, single in ((None, None), (False, False), (True, True), (True, False)):
            formed = [
                message | {"content": _formed(message["content"], single if message["role"] == "user" else string)}
                for message in conversation
            ]
            try:
                text = self.processor.apply_chat_template(
                    formed, add_generation_prompt=not continued, continue_final_message=continued
                )
            except Exception as problem:  # noqa: BLE001 - a template may raise anything
                error = error or problem
                continue
            if "[{'type'" not in text and all(words.strip() in text for words in _texts(conversation)):
                return formed
        raise error or ValueError("the chat template leaves a text out, in whatever form it is given")


def _texts(conversation: Conversation) -> list[str]:
    """Every text of a conversation."""
    contents = [message["content"] for message in conversation]
    parts = [[{"text": content}] if isinstance(content, str) else content for content in contents]
    return [part["text"] for content in parts for part in content if "text" in part]


def _formed(content: Any, string: bool | None) -> Any:
    """A content as one string (True), as parts (False) or unchanged (None); content with an image stays parts."""
    if string is None or (string and any("image" in part for part in content if not isinstance(content, str))):
        return content
    if string:
        return content if isinstance(content, str) else "".join(part["text"] for part in content)
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def obstacle(folder: Path) -> str | None:
    """Why transformers cannot read a checkpoint; None if it can."""
    from transformers import CONFIG_MAPPING

    config = read_configuration(folder)
    if original.is_original(config):
        return "transformers does not read the layout of LLaVA's authors"
    if config.get("model_type") not in CONFIG_MAPPING:
        return f"transformers reads model_type {config.get('model_type')!r} with code of the checkpoint alone"
    return None


def processor(folder: Path, config: FamilyConfig) -> Peer:
    """transformers' own processor, with Pillow; its exceptions are passed through."""
    import transformers

    try:
        loaded_processor = transformers.AutoProcessor.from_pretrained(folder, backend=load.BACKEND, **_LOCAL)
        name = f"AutoProcessor ({type(loaded_processor).__name__}, Pillow)"
    except ImportError:  # its part for videos needs torchvision, and has no other backend
        loaded_processor = load.processor_class(config).from_pretrained(folder, **_LOCAL)
        loaded_processor.image_processor = transformers.AutoImageProcessor.from_pretrained(
            folder, backend=load.BACKEND, **_LOCAL
        )
        name = f"transformers' {type(loaded_processor).__name__} without its part for videos (Pillow)"
    settings = read_optional(folder, load.FILES[0])
    for field, value in config.processor_fields.items():
        if settings.get(field) is None:
            setattr(loaded_processor, field, value)
    return Peer(loaded_processor, name)


def no_model() -> str | None:
    """Why transformers' model cannot run; None if it can."""
    return None if importlib.util.find_spec("torch") else "torch is not installed (pip install torch)"


@dataclasses.dataclass(frozen=True)
class Answers:
    """Results of transformers' model for a prompt.

    Attributes:
        logits: `Float[T, V]` at every token of the prompt.
        tokens: the greedy answer, of the requested length.
        margins: `Float[M]`, how far the chosen token's logit is above the second largest.
    """

    logits: np.ndarray
    tokens: list[int]
    margins: np.ndarray


@contextlib.contextmanager
def model(folder: Path) -> Iterator[Any]:
    """transformers' model of a checkpoint in float32 on the CPU; it is freed at the end of the block.

    Raises:
        ValueError: the folder lacks tensors or has unused ones. Exceptions of transformers are passed through.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    loaded_model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **_LOCAL
    )
    stray = {kind: sorted(report[kind])[:3] for kind in ("missing_keys", "unexpected_keys") if report[kind]}
    if stray:
        raise ValueError(f"transformers finds {stray}")
    try:
        yield loaded_model.eval()
    finally:
        del loaded_model
        gc.collect()


def ask(model: Any, prompts: Sequence[Arrays], new_tokens: int) -> list[Answers]:
    """Logits and greedy answers of transformers' model, prompt by prompt; stop tokens are ignored."""
    import torch
    from transformers import GenerationConfig

    # The checkpoint's own values (penalties, sampling, stop tokens) would be used for all settings that we leave out.
    model.generation_config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, use_cache=True, return_dict_in_generate=True, output_logits=True,
        pad_token_id=0,
    )  # fmt: skip
    # All logits of the prompt come from the pass that begins the answer, because a second pass may take minutes.
    every = {"logits_to_keep": 0} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    answers, passes = [], []
    hook = model.register_forward_hook(lambda module, tensors, out: passes.append(out.logits[0]))
    with torch.no_grad():
        for arrays in prompts:
            passes.clear()
            tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
            out = model.generate(**tensors, **every)
            best = torch.stack(out.logits)[:, 0].float().topk(2).values.numpy()
            logits, tokens = passes[0].float().numpy(), out.sequences[0, -new_tokens:].tolist()
            answers.append(Answers(logits, tokens, best[:, 0] - best[:, 1]))
    hook.remove()
    return answers


def error_line(error: Exception) -> str:
    """An exception of transformers in one line."""
    return f"{type(error).__name__}: {reason(error)}"
