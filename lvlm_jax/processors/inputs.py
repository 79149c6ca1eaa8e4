"""From what users have (chat messages, or a processor's arrays) to a token layout."""

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
    """A picture that the tower has run over, for use in several prompts. Host arrays.

    Attributes:
        pixels: `Float[3, Y, X]`, the picture as the tower receives it; contrast branches may change it.
        tokens: `Float[P, E]`, its image tokens as the decoder receives them.
    """

    pixels: np.ndarray
    tokens: np.ndarray


def check_encodes_ahead(config: FamilyConfig) -> None:
    """Refuses a family whose image tokens depend on more than the image (`FamilyConfig.tokens_per_image` is None).

    Raises:
        LVLMError: it is one.
    """
    if config.tokens_per_image is None:
        raise LVLMError(
            f"pictures of {config.model_type} cannot be encoded ahead: their tokens depend on the prompt or on the "
            "picture's size; give the pictures themselves"
        )


def pixels_of(processor: Any, images: Sequence[Any], allow_urls: bool = False) -> np.ndarray:
    """Pictures as the tower receives them, `Float[I, 3, Y, X]`.

    Args:
        processor: the checkpoint's transformers processor.
        images, allow_urls: what `open_image` takes.

    Raises:
        LVLMError: an unreadable image, or one that the processor does not take.
    """
    if not isinstance(images, Sequence) or isinstance(images, str | bytes) or not images:
        raise LVLMError(f"images are {shown(images)}; expected a list of them")
    opened = [open_image(image, allow_urls) for image in images]
    with library_errors(f"the processor cannot take images of {_sizes(opened)} pixels"):
        arrays = processor.image_processor(images=opened, return_tensors="np")
    return np.asarray(arrays["pixel_values"], np.float32)


def as_conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """A list of conversations, from one or several.

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
    """Lays out HF chat messages through the checkpoint's own processor.

    A conversation that ends with an assistant message is continued, any other gets the prompt for an answer.

    Args:
        processor: the checkpoint's transformers processor.
        config: the model's configuration.
        messages: one conversation or a list of them; images as `open_image` takes them, in parts of transformers'
            form (under "image", "path", "url", "base64" or "bytes") or of OpenAI's (under "image_url"), or all of them
            as `EncodedImage`.
        allow_urls: whether images are downloaded from `http` and `https` addresses.

    Raises:
        LVLMError: malformed messages, an unreadable image, placeholders that do not match the images, or encoded
            images beside others.
    """
    conversations = as_conversations(messages)
    prompts, parts, spans, encoded, count = [], [], [], [], 0
    for number, conversation in enumerate(conversations):
        try:
            bare, images = _split(conversation, allow_urls)
            known = [image for image in images if isinstance(image, EncodedImage)]
            prompt, own, span = _read(processor, config, bare, images, known)
        except LVLMError as error:
            raise error if len(conversations) == 1 else LVLMError(f"sample {number}: {error}") from error
        prompts.append(prompt)
        spans.append(span)
        parts += own
        encoded += known
        count += len(images)
    if encoded and len(encoded) < count:
        raise LVLMError(f"{len(encoded)} of {count} images are encoded; encode all images of a batch, or none")
    laid_out = _lay_out(prompts, None, 0, parts, config)
    padding = laid_out.tokens.shape[1] - laid_out.lengths
    laid_out = dataclasses.replace(laid_out, system=np.asarray(spans) + padding[:, None])
    if not encoded:
        return laid_out
    return dataclasses.replace(laid_out, image_tokens=np.stack([image.tokens for image in encoded]))


def _read(
    processor: Any, config: FamilyConfig, bare: Conversation, images: Sequence[Any], known: Sequence[EncodedImage]
) -> tuple[np.ndarray, list[dict[str, Any]], tuple[int, int]]:
    """Token ids of a conversation, what the processor made of its images, and where its system prompt stands.

    Args:
        bare: the conversation without its images.
        known: those of the images that are encoded.
    """
    continued = bare[-1]["role"] == "assistant"
    text = templates.render(processor, templates.suited(processor, bare), not continued, continued)
    marker = image_marker(processor)
    placeholders = text.count(marker)
    if placeholders != len(images):
        raise LVLMError(
            f"the prompt has {placeholders} image placeholders and {len(images)} images were given; "
            f"give one image for each, and do not write {marker!r} into a message's text"
        )
    if not known:
        ids, part = processed(processor, config, text, images)
        parts = [part]
    else:  # their placeholders are expanded later, by the layout
        # Where one marker stands for more than image tokens, the processor says for what.
        ids = token_ids(processor, text.replace(marker, getattr(processor, "full_image_sequence", marker)))
        parts = [{"pixel_values": image.pixels[None]} for image in known]
    check_ids(ids, config)
    return ids, parts, _span(processor, ids, *_system_text(bare, text))


def check_ids(ids: np.ndarray, config: FamilyConfig) -> None:
    """Refuses token ids that have no row in the model's embedding.

    Raises:
        LVLMError: one of them, named.
    """
    rows = config.text.vocab_size
    stray = ids[(ids >= rows) & (ids != config.image_token_id)]
    if len(stray):
        raise LVLMError(
            f"the tokenizer wrote token {stray[0]}, and the model's embedding has rows for 0 to {rows - 1}; use the "
            "tokenizer that belongs to the weights, or leave the added token out of the text"
        )


def _system_text(messages: Sequence[Message], text: str) -> tuple[str, str]:
    """What a prompt's text has before its system prompt, and the system prompt; two empty texts without one."""
    content = messages[0]["content"] if messages[0]["role"] == "system" else ""
    system = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    before, found, _ = text.partition(system.strip()) if system.strip() else ("", "", "")
    return before, found


def _span(processor: Any, ids: np.ndarray, before: str, system: str) -> tuple[int, int]:
    """Tokens of a prompt before its system prompt, and before what follows it."""
    if not system:
        return 0, 0
    first, end = (_common(ids, token_ids(processor, text)) for text in (before, before + system))
    return first, max(first, end)


def _common(ids: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    differ = (place for place, (one, two) in enumerate(zip(ids, other, strict=False)) if one != two)
    return next(differ, min(len(ids), len(other)))


def image_marker(processor: Any) -> str:
    """What stands for an image in the text that a chat template makes."""
    return str(getattr(processor, "boi_token", None) or processor.image_token)


def processed(
    processor: Any, config: FamilyConfig, text: str, images: Sequence[Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Token ids `Int[T]` of a text, and what the processor makes of its images; no arrays without images.

    Args:
        images: PIL images, one for each marker in the text.

    Raises:
        LVLMError: a text or images that the processor does not take.
    """
    # Some processors treat an image that comes alone in another way.
    given = [images] if images and config.nested_images else images
    options = templates.tokenizer_options(processor, text)
    sizes = f" with images of {_sizes(images)} pixels" if images else ""
    with library_errors(f"the processor cannot take the conversation{sizes}"):
        arrays = dict(processor(images=given or None, text=text, return_tensors="np", **options))
    ids = np.asarray(arrays.pop("input_ids"))[0]
    return ids, arrays if images else {}


def _sizes(images: Sequence[Any]) -> str:
    return ", ".join(f"{image.width} x {image.height}" for image in images)


def token_ids(processor: Any, text: str) -> np.ndarray:
    """Token ids `Int[T]` of a text that a chat template wrote, without what stands for images.

    Raises:
        LVLMError: a text that the tokenizer does not take.
    """
    with library_errors(f"the tokenizer cannot take {text[:40]!r}…"):
        return np.asarray(processor.tokenizer(text, **templates.tokenizer_options(processor, text))["input_ids"])


def _source(part: Mapping[str, Any]) -> Any:
    """What an image part says the image is, for `open_image`."""
    if part.get("base64") is not None:
        return f"data:;base64,{part['base64']}"
    given = (part[key] for key in ("image", "bytes", "path", "url", "image_url") if part.get(key) is not None)
    source = next(given, None)
    if source is None:
        raise LVLMError('an image part has no image; expected {"type": "image", "image": path or picture}')
    return source


def _split(conversation: Conversation, allow_urls: bool) -> tuple[list[Message], list[Any]]:
    """The conversation with its images taken out, and the images in reading order."""
    bare, images = [], []
    for message in conversation:
        content = message.get("content")
        if "role" not in message or not isinstance(content, str | Sequence):
            raise LVLMError(f"a message needs 'role' and 'content'; got the keys {', '.join(map(shown, message))}")
        if not isinstance(message["role"], str):
            raise LVLMError(f"the role of a message is {shown(message['role'])}; expected a text such as user")
        if isinstance(content, str):
            bare.append(dict(message))
            continue
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            known = kind if isinstance(kind, str) else None
            if known == "text" and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
            elif known in ("image", "image_url"):
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
    """Lays out what a HF processor returns: `input_ids`, optional `attention_mask`, and what it made of the images.

    Padding may be on either side. Prompts whose placeholders are not yet expanded (one per image) are expanded.

    Args:
        arrays: `input_ids` `[B, U]`, `attention_mask` `[B, U]`, and for the images what `config.pictures` reads, for
            LLaVA `pixel_values` `[I, 3, Y, X]`.

    Raises:
        LVLMError: a missing array, wrong shapes, token ids outside the vocabulary, or pixels that are not finite.
    """
    if arrays.get("input_ids") is None:
        raise LVLMError(f"input_ids is missing; got the keys {', '.join(map(str, arrays)) or '(none)'}")
    arrays = {name: _array(name, given) for name, given in arrays.items() if given is not None}
    tokens = arrays["input_ids"]
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise LVLMError(f"input_ids has shape {tokens.shape} and dtype {tokens.dtype}; expected whole numbers [B, T]")
    vocabulary = config.text.vocab_size
    stray = (tokens < 0) | ((tokens >= vocabulary) & (tokens != config.image_token_id))
    given = arrays.get("attention_mask")
    mask = np.ones(tokens.shape, bool) if given is None else given.astype(bool)
    if mask.shape != tokens.shape:
        raise LVLMError(f"attention_mask has shape {mask.shape}; expected that of input_ids, {tokens.shape}")
    if (stray & mask).any():
        raise LVLMError(f"input_ids holds {tokens[stray & mask][0]}; expected 0 to {vocabulary - 1}")
    if not mask.any(axis=1).all():
        raise LVLMError(f"sample {int(np.argmin(mask.any(axis=1)))} of the batch has no tokens")
    columns = [np.flatnonzero(row) for row in mask]
    prompts = [row[kept] for row, kept in zip(tokens, columns, strict=True)]
    return _lay_out(prompts, columns, tokens.shape[1], [arrays], config)


def _array(name: Any, given: Any) -> np.ndarray:
    try:
        array = np.asarray(given)
    except Exception as error:  # rows of several lengths, a tensor on another device, an object of the user's
        raise LVLMError(f"{name} is no array of numbers ({templates.reason(error)}); give NumPy arrays") from error
    if array.ndim == 0 or not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise LVLMError(f"{name} is {shown(given)}; expected an array of numbers")
    return array


def with_placeholders(
    prompts: Sequence[np.ndarray], parts: Sequence[Mapping[str, Any]], config: FamilyConfig
) -> list[np.ndarray]:
    """Prompts with placeholders where images belong, also in families whose tokenizer or processor writes others.

    Args:
        parts: what the processor made of the images.
    """
    return list(config.placed(parts, [config.mark_images(prompt) for prompt in prompts]))


def _lay_out(
    prompts: list[np.ndarray],
    columns: list[np.ndarray] | None,
    width: int,
    parts: Sequence[Mapping[str, Any]],
    config: FamilyConfig,
) -> Inputs:
    given, prompts = prompts, with_placeholders(prompts, parts, config)
    if any(len(prompt) != len(before) for prompt, before in zip(prompts, given, strict=True)):
        columns = None
    pictures = config.pictures(parts, prompts)
    counts = [] if pictures is None else pictures.token_counts
    placeholders = [prompt == config.image_token_id for prompt in prompts]
    if sum(int(found.sum()) for found in placeholders) == len(counts) < sum(counts):
        taken = 0
        for row, found in enumerate(placeholders):
            repeats = np.ones(len(found), np.int64)
            repeats[found] = counts[taken : taken + found.sum()]
            taken += int(found.sum())
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
