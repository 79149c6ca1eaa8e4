"""The pocket model's tokenizer, chat template and processor, and the encoding of conversations for training.

The tokenizer is byte-level BPE trained on the world's own text: every word of the world is one token, and any other
text can still be encoded. Everything is saved in Hugging Face's format; nothing here needs torch.
"""

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket import catalogue, conversations
from lvlm_jax.pocket.scenes import GRID, PATCH, SIZE

UNKNOWN, BEGIN, END, PAD, IMAGE = "<unk>", "<s>", "</s>", "<pad>", "<image>"
SPECIALS = (UNKNOWN, BEGIN, END, PAD, IMAGE)  # ids 0 to 4; the first three are as in LLaMA's vocabulary
VOCABULARY = 1280
CONTEXT = 1024
IMAGE_TOKENS = GRID * GRID
TRAINING_CONVERSATIONS = 4000

# LLaVA-1.5's conversation: "USER: <image>\nquestion ASSISTANT: answer</s>USER: ...". Unlike llava-hf's own template, it
# keeps images where the user put them and ends each answer, so that training text and prompt agree.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'USER: ' }}{%- endif -%}
{%- if message['role'] == 'assistant' -%}{{ ' ASSISTANT: ' }}
{%- generation -%}
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}
{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}{{ '</s>' }}
{%- endgeneration -%}
{%- elif message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'system' -%}{{ ' ' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}
"""

# Everyday words that the world's own sentences lack, so that users' questions are not split into bytes.
EVERYDAY = """
a about above after again all also always am an and animal animals another answer any anything are around as
at away background bad be because been before behind below beside best better between big black brown but by
call came can cannot close come could day dark describe did different do does doing done door down drink
during each eat empty enough even ever every everything explain far fast find first floor food for foreground
found four from front fruit full funny gave get give go going good gray green ground group had hand happening
hard has have he head hello help her here him his hold house how i if important in inside instead into is it
its just keep kind know large last later leave left less let light like list little long look looking lot made
main make man many may maybe me mean might more most move much must my name near need never new next nice no
not nothing now number object objects of off often old on once one only open or orange other our out outside
over own part people person photo photograph picture piece pink place please point put question quick quite
rather read really red reply right road room round run said same say scene see seen sentence shape she short
should show side sit sky small some someone something sort standing start still stop story such sure table
take tell than thank thanks that the their them then there these they thing things think this those three
through time to today together too top toward tree true try turn two type under until up use used very wait
walk wall want was water way we wear wearing well were what when where which while white who whole why will
window wish with without woman word words work world would write wrong year yes you young your color colors
colour count image images bright bottom center centre corner half middle seven eight nine ten zero
"""


def world_text(conversation_count: int = TRAINING_CONVERSATIONS) -> Iterator[str]:
    """Text to train the tokenizer on: rendered conversations, every category name, digits and everyday words."""
    for index in range(conversation_count):
        scenes, turns = conversations.sample_text(0, index)
        yield conversation_text(len(scenes), turns).replace(IMAGE, "")
    for name in catalogue.CATEGORIES:
        yield f" {name} a {name}. {catalogue.plural(name)}? a {name}," * 50
    yield " ".join("0123456789" * 50) + "0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n" * 50
    words = EVERYDAY.split()
    yield (" " + " ".join(words)) * 20
    yield "\n".join(word.capitalize() for word in words) * 3


def train_tokenizer(texts: Iterable[str], size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE on `texts`; the `size` entries are special tokens, then all 256 bytes, then merges."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(texts, trainer)
    # Without this, prompts would lack the begin token, which training texts have.
    bare.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, bare.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


@functools.cache
def pocket_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer trained on the world's text; takes seconds and is always the same."""
    return train_tokenizer(world_text())


def build_processor(tokenizer: PreTrainedTokenizerFast | None = None) -> LlavaProcessor:
    """LLaVA's processor for the pocket model: images to 96 x 96, `<image>` to 64 image tokens."""
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer or pocket_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def write_processor(folder: str | Path, tokenizer: PreTrainedTokenizerFast | None = None) -> LlavaProcessor:
    """Saves tokenizer, chat template and image processor to `folder`; `AutoProcessor.from_pretrained` loads them."""
    folder = Path(folder)
    processor = build_processor(tokenizer)
    processor.save_pretrained(str(folder))
    # Transformers 4 needs the image settings in a separate file, and its own class names.
    processor.image_processor.save_pretrained(str(folder))
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {"image_token": IMAGE}}
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return processor


def conversation_text(image_count: int, turns: Sequence[tuple[str, str]]) -> str:
    """The conversation as the chat template writes it, one `<image>` per image before the first question."""
    return "".join(prompt + answer for prompt, answer in _segments(image_count, turns))


def conversation_messages(image_count: int, turns: Sequence[tuple[str, str]]) -> list[dict]:
    """The conversation as Hugging Face chat messages."""
    messages = []
    for i, (question, answer) in enumerate(turns):
        parts = [{"type": "image"}] * image_count if i == 0 else []
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def _segments(image_count: int, turns: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(prompt, answer) pieces of the conversation's text; only the answers are learned."""
    images = f"{IMAGE}\n" * image_count
    for question, answer in turns:
        yield f"USER: {images}{question} ASSISTANT:", f" {answer}{END}"
        images = ""


def encode_conversation(
    tokenizer: PreTrainedTokenizerFast,
    images: int | Sequence[np.ndarray],
    turns: Sequence[tuple[str, str]],
    max_length: int,
    image_tokens: int = IMAGE_TOKENS,
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a training conversation, and which tokens have loss.

    Args:
        images: the images, or their number.
        turns: (question, answer) pairs. Turns are left out from the first one that does not fit `max_length`.
        max_length: largest number of tokens to return.
        image_tokens: number of tokens per `<image>`.

    Returns:
        input_ids: int32 [L], beginning with `<s>`.
        loss_mask: bool [L], true at the tokens of answers and their `</s>`: at targets, not at the positions that
            predict them.

    Raises:
        LVLMError: not even the first turn fits.
    """
    count = images if isinstance(images, int) else len(images)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    ids: list[int] = [tokenizer.bos_token_id]
    mask: list[bool] = [False]
    for prompt, answer in _segments(count, turns):
        prompt_ids = []
        for token in _encode(tokenizer, prompt):
            prompt_ids.extend([image_id] * image_tokens if token == image_id else [token])
        answer_ids = _encode(tokenizer, answer)
        if len(ids) + len(prompt_ids) + len(answer_ids) > max_length:
            break
        ids += prompt_ids + list(answer_ids)
        mask += [False] * len(prompt_ids) + [True] * len(answer_ids)
    if len(ids) == 1:
        raise LVLMError(
            f"the first turn of a conversation over {count} images does not fit {max_length} tokens; "
            f"each image takes {image_tokens}, so give a larger max_length"
        )
    return np.array(ids, np.int32), np.array(mask, bool)


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Sequence[int]:
    """Ids of `text` without `<s>`."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
