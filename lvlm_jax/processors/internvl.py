"""The processor of a checkpoint in OpenGVLab's layout, made without running the checkpoint's code.

Their repositories contain a tokenizer, the normalisation of pixels, and Python files for the rest: splitting images
into tiles by the closest aspect ratio, and the chat format. transformers' InternVL processor does the same, so it is
built from these parts.
"""

from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, processors
from transformers.convert_slow_tokenizer import SpmConverter, import_protobuf

from lvlm_jax import files
from lvlm_jax.errors import LVLMError, library_errors
from lvlm_jax.models.internvl import InternVlConfig
from lvlm_jax.pixels import IMAGENET
from lvlm_jax.processors.load import processor_class
from lvlm_jax.weights.checkpoint import read_optional
from lvlm_jax.weights.internvl_chat import IMAGE_TOKEN

# Attributes that transformers' processor needs of a tokenizer -> the tokens of these checkpoints.
_MARKERS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": IMAGE_TOKEN}

# System message of checkpoints before InternVL 2.5; the blank after the comma is theirs.
_BEFORE_2_5 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
# Name of a conversation format in their `conversation.py` -> (system message, end of a message). Formats of unsupported
# decoders are left out. An image is on a separate line.
_FORMATS = {
    "internvl2_5": (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
        "<|im_end|>\n",
    ),
    "internlm2-chat": (_BEFORE_2_5, "<|im_end|>"),
    "Hermes-2": (_BEFORE_2_5, "<|im_end|>"),
}
_CHAT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nSYSTEMEND{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ 'END' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load(folder: Path, config: InternVlConfig) -> Any:
    """transformers' InternVL processor, made from a folder's tokenizer and the model's configuration.

    None for a checkpoint whose configuration has no `template`: transformers can load its processor.

    Raises:
        LVLMError: the template is unknown, the tokenizer is unreadable, or it has no image token.
    """
    if config.template is None:
        return None
    if config.template not in _FORMATS:
        raise LVLMError(
            f"the chat template {config.template!r} of {folder} is not supported; expected one of "
            f"{', '.join(_FORMATS)}; give prepare() arrays instead"
        )
    system, end = _FORMATS[config.template]
    tokenizer = _tokenizer(folder)
    for name, token in _MARKERS.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    tokenizer.video_token = "<video>"  # required, although videos are not supported here
    if tokenizer.context_image_token_id != config.image_token_id:
        raise LVLMError(
            f"the tokenizer of {folder} has {IMAGE_TOKEN} at {tokenizer.context_image_token_id} and the configuration "
            f"at {config.image_token_id}"
        )
    settings = read_optional(folder, "preprocessor_config.json")
    side = config.vision.image_size
    image_processor = transformers.GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=settings.get("image_mean", IMAGENET.mean),
        image_std=settings.get("image_std", IMAGENET.deviation),
        min_patches=config.tiles[0],
        max_patches=config.tiles[1],
    )
    return processor_class(config)(
        image_processor,
        tokenizer,
        image_seq_length=config.tokens_per_tile,
        chat_template=_CHAT.replace("SYSTEM", system).replace("END", end).replace("IMAGE", IMAGE_TOKEN),
    )


def _tokenizer(folder: Path) -> Any:
    """A folder's tokenizer.

    Raises:
        LVLMError: transformers has no code for it, or it is unreadable.
    """
    settings = read_optional(folder, "tokenizer_config.json")
    kind = str(settings.get("tokenizer_class", ""))
    own = getattr(transformers, kind, None)
    with library_errors(f"cannot read the tokenizer of {folder}"):
        if own is not None:
            return own.from_pretrained(folder, local_files_only=True)
        if (folder / "tokenizer.json").is_file():
            return transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        if kind in ("InternLM2Tokenizer", "InternLM2TokenizerFast") and (folder / "tokenizer.model").is_file():
            return _internlm2_tokenizer(folder, settings)
    raise LVLMError(
        f"the tokenizer of {folder} ({kind or 'of no named class'}) needs code that comes with the checkpoint and is "
        "not run; copy tokenizer.json from the checkpoint's -hf repository"
    )


def _internlm2_tokenizer(folder: Path, settings: dict) -> Any:
    """The tokenizer in InternLM2's SentencePiece file: byte-pair merges over ▁ for blanks, bytes last.

    Text before and after a special token is encoded separately, with a blank before it if the file says so.
    """
    described = import_protobuf().ModelProto()
    described.ParseFromString(files.read_bytes(folder / "tokenizer.model", "tokenizer"))
    added = {int(number): entry["content"] for number, entry in settings["added_tokens_decoder"].items()}
    # Special tokens replace unused pieces.
    names = {added.get(number, piece.piece): number for number, piece in enumerate(described.pieces)}
    tokenizer = SpmConverter.build_tokenizer_from_spm_proto(described, names)
    tokenizer.add_special_tokens(
        [AddedToken(added[number], special=True, normalized=False) for number in sorted(added)]
    )
    stray = {number: token for number, token in added.items() if tokenizer.token_to_id(token) != number}
    if stray:
        raise ValueError(f"added_tokens_decoder does not continue the ids of tokenizer.model: {stray}")
    if settings.get("add_bos_token", True):
        start = settings.get("bos_token", "<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    roles = ("bos_token", "eos_token", "unk_token", "pad_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        **{name: settings[name] for name in roles if isinstance(settings.get(name), str)},
    )
