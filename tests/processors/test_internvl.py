"""Processors of checkpoints in OpenGVLab's layout: tokenizers of three kinds, chat texts, and what is refused."""

import json

import numpy as np
import pytest
from tokenizers import pre_tokenizers
from transformers.convert_slow_tokenizer import import_protobuf

from lvlm_jax import LVLM
from lvlm_jax.errors import LVLMError
from tests.models.families.base import byte_tokenizer
from tests.models.families.internvl import IMAGE_TOKEN, INTERNVL, write_chat


def internlm2_tokenizer(folder, prefix):
    """A SentencePiece file of single bytes and some merges, with special tokens over and behind its last pieces."""
    described = import_protobuf().ModelProto()
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁abcdef", "ab", "▁ab", "abc", "[UNUSED_1]", "[UNUSED_2]"]
    for number, piece in enumerate(pieces):
        described.pieces.add(piece=piece, score=float(-number))
    described.trainer_spec.model_type = 2
    described.trainer_spec.unk_piece = "<unk>"
    described.trainer_spec.byte_fallback = True
    described.normalizer_spec.add_dummy_prefix = prefix
    (folder / "tokenizer.model").write_bytes(described.SerializeToString())
    count = len(pieces)
    specials = {count - 2: "<|im_start|>", count - 1: "<|im_end|>"}
    specials |= {count + i: token for i, token in enumerate(["<img>", "</img>", "<IMG_CONTEXT>"])}
    specials |= {0: "<unk>", 1: "<s>", 2: "</s>"}
    settings = {
        "tokenizer_class": "InternLM2Tokenizer",
        "added_tokens_decoder": {str(number): {"content": token} for number, token in specials.items()},
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return {token: number for number, token in [*enumerate(pieces), *specials.items()]}


@pytest.mark.parametrize("prefix", [False, True])
def test_messages_of_an_internlm2_checkpoint(prefix, tmp_path):
    ids = internlm2_tokenizer(tmp_path, prefix)
    model = INTERNVL.build(None, 2, text={"model_type": "llama", "vocab_size": len(ids) + 8})
    write_chat(tmp_path, model, True, ids["<IMG_CONTEXT>"])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "size": 28}))
    ours = LVLM.from_pretrained(tmp_path)
    assert ours.config.eos_token_ids == (ids["<|im_end|>"],)
    picture = np.random.default_rng(1).integers(0, 256, (30, 90, 3), dtype=np.uint8)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "abc ab"}]
    prompt = ours.prepare([{"role": "system", "content": "ab"}, {"role": "user", "content": content}])
    tokens = prompt.tokens[0, prompt.image_id[0] >= 0].tolist()
    assert tokens[0] == ids["<s>"] and tokens[1] == ids["<|im_start|>"]
    image = tokens.index(ids["<img>"])
    assert tokens[image + 1 : image + 18] == [ids["<IMG_CONTEXT>"]] * 16 + [ids["</img>"]]
    behind = tokens[image + 18 :]
    start = behind.index(ids["<|im_end|>"])
    # The line break, then "abc ab" by its merges; a blank is written before each stretch of text if the file says so.
    assert behind[:start] == [ids["▁"]] * prefix + [ids["<0x0A>"], ids["abc"], ids["▁ab"]]
    assert ours.processor.tokenizer.decode(behind[:start]) == "\nabc ab"
    assert (prompt.image_id == 1).sum() == 16 and prompt.owner.tolist() == [0] * 4
    whole = ours.processor.image_processor(images=[picture], crop_to_patches=True, return_tensors="np")
    np.testing.assert_array_equal(prompt.pixels, whole["pixel_values"])
    assert np.abs(whole["pixel_values"]).max() <= 0.5 / 0.224 + 1e-5


def qwen2_tokenizer(folder, specials):
    """The files of a Qwen2 tokenizer without merges; returns the number of the first special token."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {
        str(len(words) + i): {"content": token, "special": True, "normalized": False}
        for i, token in enumerate(["<|endoftext|>", *specials])
    }
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(words) + 1


NEW = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
OLD = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"


def published_prompt(template: str, turns: list[tuple[str, str]]) -> str:
    """`get_prompt` of OpenGVLab's conversation.py (style MPT): every stretch ends with the format's separator."""
    system, end = {"internvl2_5": (NEW, "<|im_end|>\n")}.get(template, (OLD, "<|im_end|>"))
    return "".join(f"<|im_start|>{role}\n{text}{end}" for role, text in [("system", system), *turns])


@pytest.mark.parametrize(
    ("kind", "template"),
    [("qwen2", "internvl2_5"), ("tokenizer.json", "internvl2_5"), ("qwen2", "internlm2-chat"), ("qwen2", "Hermes-2")],
)
def test_messages_of_a_checkpoint_with_another_tokenizer(kind, template, tmp_path):
    """Tokenizers that transformers reads; the chat formats with their own system messages, and answers continued."""
    specials = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    if kind == "qwen2":
        first = qwen2_tokenizer(tmp_path, specials)
    else:
        tokenizer, first = byte_tokenizer(specials), 259
        tokenizer.save_pretrained(tmp_path)
    model = INTERNVL.build(None, 2, text={"vocab_size": 270})
    write_chat(tmp_path, model, False, first + 4, template=template)
    ours = LVLM.from_pretrained(tmp_path)
    picture = np.zeros((20, 20, 3), np.uint8)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    user = {"role": "user", "content": content}
    asked = ours.prepare([*said, user])
    text = ours.processor.tokenizer.decode(asked.tokens[0, asked.image_id[0] >= 0])
    image = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    turns = [("user", "Hi"), ("assistant", "Yes"), ("user", f"{image}\nWhat?")]
    assert text == published_prompt(template, turns) + "<|im_start|>assistant\n"
    begun = ours.prepare([*said, user, {"role": "assistant", "content": "A"}])
    assert ours.processor.tokenizer.decode(begun.tokens[0, begun.image_id[0] >= 0]) == text + "A"


def test_processors_that_cannot_be_made(tmp_path):
    for number, (settings, changes, message) in enumerate(
        (
            ({"tokenizer_class": "InternLM3Tokenizer"}, {}, "InternLM3Tokenizer.* copy tokenizer.json"),
            ({}, {"template": "phi3-chat"}, "chat template 'phi3-chat'"),
            ({"tokenizer_class": "PreTrainedTokenizerFast"}, {}, "cannot read the tokenizer of"),
            (None, {}, "has <IMG_CONTEXT> at {0} and the configuration at {1}"),
        )
    ):
        folder, token = tmp_path / str(number), IMAGE_TOKEN
        folder.mkdir()
        if settings is None:
            first = qwen2_tokenizer(folder, ["<img>", "</img>", "<IMG_CONTEXT>"])
            message, token = message.format(first + 2, first + 5), first + 5
        else:
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        write_chat(folder, INTERNVL.build(None, 2, text={"vocab_size": 270}), False, token, **changes)
        with pytest.raises(LVLMError, match=message):
            LVLM.from_pretrained(folder).prepare([{"role": "user", "content": "a"}])
