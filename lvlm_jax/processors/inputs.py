"""Lays out chat messages, or a processor's arrays, as tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lvlm_jax.errors import LVLMError, library_errors, shown
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors import templates
from lvlm_jax.processors.images import open_image
from lvlm_jax.processors.layout import Inputs, lay_out

Message = dict[str, Any]
Conversation = Sequence[Message]
Messages = Conversation | Sequence[Conversation] | Mapping[str, Any]  # or the arrays of a HF processor


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """An image that the tower has already encoded, for use in several prompts. Host arrays.

    Attributes:
        pixels: `Float[3, Y, X]`, the image as the tower receives it; contrast branches may change it.
        tokens: `Float[P, E]`, its image tokens for the decoder.
    """

    pixels: np.ndarray
    tokens: np.ndarray


def check_encodes_ahead(config: FamilyConfig) -> None:
    """Raises an `LVLMError` if the family's image tokens depend on more than the image.

    Raises:
        LVLMError: `FamilyConfig.tokens_per_image` is None.
    """
    if config.tokens_per_image is None:
        raise LVLMError(
            f"images of {config.model_type} cannot be encoded ahead: their tokens depend on the prompt or on the "
            "image's size; give the images themselves"
        )


def pixels_of(processor: Any, images: Sequence[Any], allow_urls: bool = False) -> np.ndarray:
    """Images as the tower receives them, `Float[I, 3, Y, X]`.

    Args:
        processor: the checkpoint's transformers processor.
        images, allow_urls: as for `open_image`.

    Raises:
        LVLMError: an image is unreadable, or the processor rejects it.
    """
    if not isinstance(images, Sequence) or isinstance(images, str | bytes) or not images:
        raise LVLMError(f"images are {shown(images)}; expected a list of images")
    opened_images = [open_image(image, allow_urls) for image in images]
    with library_errors(f"the processor cannot take images of {_sizes(opened_images)} pixels"):
        arrays = processor.image_processor(images=opened_images, return_tensors="np")
    return np.asarray(arrays["pixel_values"], np.float32)


def as_conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """A list of conversations, from one conversation or several.

    Raises:
        LVLMError: neither a list of messages nor a list of such lists.
    """
    if isinstance(messages, Sequence) and messages and isinstance(messages[0], Mapping):
        messages = [messages]
    good = isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages) > 0
    if not good or not all(
        isinstance(one, Sequence) and one and all(isinstance(message, Mapping) for message in one) for one in messages
    ):
        raise LVLMError(
            'messages must be a conversation, [{"role": "user", "content": [{"type": "image", "image": ...}, '
            '{"type": "text", "text": ...}]}], or a list of conversations'
        )
    return list(messages)


def from_messages(
    processor: Any, config: FamilyConfig, messages: Conversation | Sequence[Conversation], allow_urls: bool = False
) -> Inputs:
    """Lays out HF chat messages with the checkpoint's own processor.

    If a conversation ends with an assistant message, the answer continues it; otherwise a new answer begins.

    Args:
        processor: the checkpoint's transformers processor.
        config: the model's configuration.
        messages: one conversation or a list of them; images as for `open_image`, in parts of transformers' form (under
            "image", "path", "url", "base64" or "bytes") or OpenAI's (under "image_url"), or all of them as
            `EncodedImage`.
        allow_urls: whether to download images at `http` and `https` addresses.

    Raises:
        LVLMError: malformed messages, an unreadable image, placeholders that do not match the images, or only some
            images are encoded.
    """
    conversations = as_conversations(messages)
    prompts, parts, spans, encoded, count = [], [], [], [], 0
    for number, conversation in enumerate(conversations):
        try:
            bare, images = _split(conversation, allow_urls)
            encoded_images = [image for image in images if isinstance(image, EncodedImage)]
            prompt, own, span = _process_conversation(processor, config, bare, images, encoded_images)
        except LVLMError as error:
            raise error if len(conversations) == 1 else LVLMError(f"sample {number}: {error}") from error
        prompts.append(prompt)
        spans.append(span)
        parts += own
        encoded += encoded_images
        count += len(images)
    if encoded and len(encoded) < count:
        raise LVLMError(f"{len(encoded)} of {count} images are encoded; encode all images of a batch, or none")
    laid_out = _lay_out(prompts, None, 0, parts, config)
    padding = laid_out.tokens.shape[1] - laid_out.lengths
    laid_out = dataclasses.replace(laid_out, system=np.asarray(spans) + padding[:, None])
    if not encoded:
        return laid_out
    return dataclasses.replace(laid_out, image_tokens=np.stack([image.tokens for image in encoded]))


def _process_conversation(
    processor: Any, config: FamilyConfig, bare: Conversation, images: Sequence[Any], known: Sequence[EncodedImage]
) -> tuple[np.ndarray, list[dict[str, Any]], tuple[int, int]]:
    """Token ids of a conversation, the processor's arrays for its images, and the span of its system prompt.

    Args:
        bare: the conversation without its images.
        images: its images.
        known: those of the images that are already encoded.
    """
    continued = bare[-1]["role"] == "assistant"
    text = templates.render(processor, templates.in_template_form(processor, bare), not continued, continued)
    marker = image_marker(processor)
    placeholders = text.count(marker)
    if placeholders != len(images):
        raise LVLMError(
            f"the prompt has {placeholders} image placeholders and {len(images)} images were given; "
            f"give one image for each, and do not write {marker!r} into a message's text"
        )
    if not known:
        ids, part = run_processor(processor, config, text, images)
        parts = [part]
    else:  # the layout expands the placeholders of encoded images later
        # If a marker stands for more than image tokens, the processor has an attribute with the whole sequence.
        ids = token_ids(processor, text.replace(marker, getattr(processor, "full_image_sequence", marker)))
        parts = [{"pixel_values": image.pixels[None]} for image in known]
    check_ids(ids, config)
    return ids, parts, _system_span(processor, ids, *_system_text(bare, text))


def check_ids(ids: np.ndarray, config: FamilyConfig) -> None:
    """Raises an `LVLMError` if a token id has no row in the model's embedding.

    Raises:
        LVLMError: such an id occurs; the message names it.
    """
    rows = config.text.vocab_size
    stray = ids[(ids >= rows) & (ids != config.image_token_id)]
    if len(stray):
        raise LVLMError(
            f"the tokenizer wrote token {stray[0]}, and the model's embedding has rows for 0 to {rows - 1}; use the "
            "tokenizer that belongs to the weights, or leave the added token out of the text"
        )


def _system_text(messages: Sequence[Message], text: str) -> tuple[str, str]:
    """The text before the system prompt, and the system prompt; two empty texts without one."""
    content = messages[0]["content"] if messages[0]["role"] == "system" else ""
    system = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    before, system_text, _ = text.partition(system.strip()) if system.strip() else ("", "", "")
    return before, system_text


def _system_span(processor: Any, ids: np.ndarray, before: str, system: str) -> tuple[int, int]:
    """The system prompt's first token and the token after its last."""
    if not system:
        return 0, 0
    first, end = (_common_prefix(ids, token_ids(processor, text)) for text in (before, before + system))
    return first, max(first, end)


def _common_prefix(ids: Sequence[int], other: Sequence[int]) -> int:
    """The number of equal leading tokens."""
    differ = (place for place, (one, two) in enumerate(zip(ids, other, strict=False)) if one != two)
    return next(differ, min(len(ids), len(other)))


def image_marker(processor: Any) -> str:
    """The text that a chat template writes for an image."""
    return str(getattr(processor, "boi_token", None) or processor.image_token)


def run_processor(
    processor: Any, config: FamilyConfig, text: str, images: Sequence[Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Token ids `Int[T]` of a text, and the processor's arrays for its images; no arrays without images.

    Args:
        images: PIL images, one per marker in the text.

    Raises:
        LVLMError: the processor rejects the text or the images.
    """
    # Some processors treat a single image differently.
    image_argument = [images] if images and config.nested_images else images
    options = templates.tokenizer_options(processor, text)
    sizes = f" with images of {_sizes(images)} pixels" if images else ""
    with library_errors(f"the processor cannot take the conversation{sizes}"):
        arrays = dict(processor(images=image_argument or None, text=text, return_tensors="np", **options))
    ids = np.asarray(arrays.pop("input_ids"))[0]
    return ids, arrays if images else {}


def _sizes(images: Sequence[Any]) -> str:
    return ", ".join(f"{image.width} x {image.height}" for image in images)


def token_ids(processor: Any, text: str) -> np.ndarray:
    """Token ids `Int[T]` of a text from a chat template, without image markers.

    Raises:
        LVLMError: the tokenizer rejects the text.
    """
    with library_errors(f"the tokenizer cannot take {text[:40]!r}…"):
        return np.asarray(processor.tokenizer(text, **templates.tokenizer_options(processor, text))["input_ids"])


def _source(part: Mapping[str, Any]) -> Any:
    """The source of an image part, for `open_image`."""
    if part.get("base64") is not None:
        return f"data:;base64,{part['base64']}"
    sources = (part[key] for key in ("image", "bytes", "path", "url", "image_url") if part.get(key) is not None)
    source = next(sources, None)
    if source is None:
        raise LVLMError('an image part has no image; expected {"type": "image", "image": path or picture}')
    return source


def _split(conversation: Conversation, allow_urls: bool) -> tuple[list[Message], list[Any]]:
    """The conversation without its images, and the images in reading order."""
    bare, images = [], []
    for message in conversation:
        if not {"role", "content"} <= message.keys():
            raise LVLMError(f"a message needs 'role' and 'content'; got the keys {', '.join(map(shown, message))}")
        content = message["content"]
        if not isinstance(content, str | Sequence):
            raise LVLMError(f"the content of a message is {shown(content)}; expected a text, or a list of parts")
        if not isinstance(message["role"], str):
            raise LVLMError(f"the role of a message is {shown(message['role'])}; expected a text such as user")
        if isinstance(content, str):
            bare.append(dict(message))
            continue
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            kind_name = kind if isinstance(kind, str) else None
            if kind_name == "text" and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
            elif kind_name in ("image", "image_url"):
                source = _source(part)
                encoded = isinstance(source, EncodedImage)
                images.append(source if encoded else open_image(source, allow_urls))
                parts.append({"type": "image"})
            else:
                raise LVLMError(
                    f"a message part of type {shown(kind)} is not supported; expected "
                    '{"type": "text", "text": ...}, {"type": "image", "image": ...} or '
                    '{"type": "image_url", "image_url": {"url": ...}}'
                )
        bare.append({**message, "content": parts})
    return bare, images


def from_arrays(arrays: Mapping[str, Any], config: FamilyConfig) -> Inputs:
    """Lays out the arrays that a HF processor returns: `input_ids`, optionally `attention_mask`, and image arrays.

    Padding may be on either side. Prompts with one placeholder per image are expanded.

    Args:
        arrays: `input_ids` `[B, U]`, `attention_mask` `[B, U]`, and the image arrays that `config.pictures` reads; for
            LLaVA `pixel_values` `[I, 3, Y, X]`.

    Raises:
        LVLMError: a missing array, wrong shapes, token ids outside the vocabulary, or pixels that are not finite.
    """
    if arrays.get("input_ids") is None:
        raise LVLMError(f"input_ids is missing; got the keys {', '.join(map(str, arrays)) or '(none)'}")
    arrays = {name: _array(name, mask_given) for name, mask_given in arrays.items() if mask_given is not None}
    tokens = arrays["input_ids"]
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise LVLMError(f"input_ids has shape {tokens.shape} and dtype {tokens.dtype}; expected whole numbers [B, T]")
    vocabulary = config.text.vocab_size
    stray = (tokens < 0) | ((tokens >= vocabulary) & (tokens != config.image_token_id))
    mask_given = arrays.get("attention_mask")
    mask = np.ones(tokens.shape, bool) if mask_given is None else mask_given.astype(bool)
    if mask.shape != tokens.shape:
        raise LVLMError(f"attention_mask has shape {mask.shape}; expected that of input_ids, {tokens.shape}")
    if (stray & mask).any():
        raise LVLMError(f"input_ids holds {tokens[stray & mask][0]}; expected 0 to {vocabulary - 1}")
    if not mask.any(axis=1).all():
        raise LVLMError(f"sample {int(np.argmin(mask.any(axis=1)))} of the batch has no tokens")
    columns = [np.flatnonzero(row) for row in mask]
    prompts = [row[sample_columns] for row, sample_columns in zip(tokens, columns, strict=True)]
    return _lay_out(prompts, columns, tokens.shape[1], [arrays], config)


def _array(name: Any, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except Exception as error:  # rows of several lengths, a tensor on another device, or a user's object
        raise LVLMError(f"{name} is not an array of numbers ({templates.reason(error)}); give NumPy arrays") from error
    if array.ndim == 0 or not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise LVLMError(f"{name} is {shown(value)}; expected an array of numbers")
    return array


def with_placeholders(
    prompts: Sequence[np.ndarray], parts: Sequence[Mapping[str, Any]], config: FamilyConfig
) -> list[np.ndarray]:
    """The prompts with placeholders for their images, even if the family's tokenizer or processor writes other tokens.

    Args:
        prompts: token ids of each sample.
        parts: the processor's image arrays.
    """
    return list(config.placed(parts, [config.mark_images(prompt) for prompt in prompts]))


def _lay_out(
    prompts: list[np.ndarray],
    columns: list[np.ndarray] | None,
    width: int,
    parts: Sequence[Mapping[str, Any]],
    config: FamilyConfig,
) -> Inputs:
    original, prompts = prompts, with_placeholders(prompts, parts, config)
    if any(len(prompt) != len(before) for prompt, before in zip(prompts, original, strict=True)):
        columns = None
    pictures = config.pictures(parts, prompts)
    counts = [] if pictures is None else pictures.token_counts
    placeholders = [prompt == config.image_token_id for prompt in prompts]
    if sum(int(mask.sum()) for mask in placeholders) == len(counts) < sum(counts):
        first_image = 0
        for row, mask in enumerate(placeholders):
            repeats = np.ones(len(mask), np.int64)
            repeats[mask] = counts[first_image : first_image + mask.sum()]
            first_image += int(mask.sum())
            prompts[row] = np.repeat(prompts[row], repeats)
        columns = None
    if columns is None:
        width = max(len(prompt) for prompt in prompts)
        columns = [np.arange(width - len(prompt), width) for prompt in prompts]
    return lay_out(
        prompts,
        columns,
        width,
        pictures,
        config.image_token_id,
        config.pad_token_id,
        config.text.max_position_embeddings,
    )
