"""Qwen-VL's own processor: tokens against a plain encoder by ranks, chat texts and pixels as published."""

import base64
import json
import pickle
import random
import unicodedata

import numpy as np
import pytest
import regex
from PIL import Image

from lvlm_jax import LVLM, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.processors import text
from lvlm_jax.processors.load import has_processor, load_processor
from lvlm_jax.processors.qwen_vl import build_tokenizer, read_ranks
from tests.models.families.qwen_vl import PUBLISHED, QWEN_VL

# The published order of single bytes: those with a letter of their own first.
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173]
# The published vocabulary goes on with words like these, each the union of two earlier ones. Three are added that no
# sequence of joins reaches: "xyzzy", "the" (only " the" is joined), and the last, whose parts have a higher rank.
WORDS = [
    b"  ", b"    ", b"in", b" t", b"er", b"   ", b"on", b" a", b"re", b"at", b"st", b"en", b"or", b" th", b"\n\n",
    b" c", b"le", b"it", b"an", b" the", b"ing", b" cat", b"at ", b"cat", b"ould", b"'s", b"ation", b"\r\n", b"!\n",
    "图".encode()[:2], "图".encode(), "片".encode(), "é".encode(), b"xyzzy", b"the", b"reat", b"eat", b"ea",
]  # fmt: skip
RANKS = {word: rank for rank, word in enumerate([*(bytes([byte]) for byte in BYTES), *WORDS])}
COUNT = len(RANKS)
IMAGE_START = COUNT + 214

PATTERN = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def encode_by_ranks(string):
    """The published encoding: per word, join the neighbours whose union has the lowest rank until none has one."""
    tokens = []
    for word in PATTERN.findall(unicodedata.normalize("NFC", string)):
        whole = word.encode()
        parts = [whole] if whole in RANKS else [bytes([byte]) for byte in whole]
        while True:
            unions = [RANKS.get(a + b, COUNT) for a, b in zip(parts, parts[1:], strict=False)]
            if not unions or min(unions) == COUNT:
                break
            place = unions.index(min(unions))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        tokens += [RANKS[part] for part in parts]
    return tokens


def write_files(folder, chat_format="chatml"):
    lines = [f"{base64.b64encode(word).decode()} {rank}" for word, rank in RANKS.items()]
    (folder / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    generation = {"chat_format": chat_format, "eos_token_id": COUNT, "pad_token_id": COUNT}
    (folder / "generation_config.json").write_text(json.dumps(generation))


TOKENS = {"vocab_size": IMAGE_START + 8, "visual": {"image_start_id": IMAGE_START}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen_vl")
    QWEN_VL.build(folder, 4, **TOKENS)
    write_files(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return LVLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(model):
    return model.processor.tokenizer


def picture(seed, width=60, height=33):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def parts(*content):
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
        for part in content
    ]


def test_special_tokens_have_the_published_numbers():
    """The published vocabulary has 151643 ranks."""
    names = "<|endoftext|> <|im_start|> <|im_end|> <|extra_0|> <|extra_204|> <ref> </ref> <box> </box> <quad> </quad> "
    names += "<img> </img> <imgpad>"
    published = [151643, 151644, 151645, 151646, *range(151850, 151860)]
    tokenizer = build_tokenizer(RANKS)
    ids = tokenizer.convert_tokens_to_ids(names.split())
    assert ids == [number - 151643 + COUNT for number in published]
    assert PUBLISHED["visual"]["image_start_id"] == published[-3]
    assert len(tokenizer) == COUNT + 217
    for name, number in zip(names.split(), ids, strict=True):
        assert tokenizer(f"a{name}b")["input_ids"] == [RANKS[b"a"], number, RANKS[b"b"]]


def test_tokens_of_text(tokenizer):
    """Of texts with all kinds of words, then of random ones."""
    for string in (
        "the cats' greatest eating, it's 2023!\n\n\nThe  end ",
        "xyzzy xyzzy the reat",
        "图片 cafe\u0301 café\r\n\t I'LL would\u00a0not",
        "   \n  !!\n\n ...?\r\n",
        "",
    ):
        ids = tokenizer(string)["input_ids"]
        assert ids == encode_by_ranks(string)
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", string)
    generator = random.Random(0)
    pieces = [*"at|re|ing| the| |  |\n|it|'s|é|e\u0301|图|片|9|!|xyzzy|c|a".split("|")]
    for _ in range(400):
        string = "".join(generator.choices(pieces, k=generator.randint(1, 14)))
        assert tokenizer(string)["input_ids"] == encode_by_ranks(string), repr(string)


def test_boxes_stay_in_answers_and_other_specials_do_not(tokenizer):
    ids = tokenizer("<ref>cat</ref><box>(1,2),(3,4)</box><|im_end|><|endoftext|>")["input_ids"]
    assert text.decode(tokenizer, ids) == "<ref>cat</ref><box>(1,2),(3,4)</box>"


def test_chat_text(model):
    conversation = [
        {"role": "user", "content": parts(picture(0), picture(1), "What?")},
        {"role": "assistant", "content": parts("A cat.")},
        {"role": "user", "content": parts("And ", picture(2), "?")},
    ]
    asked = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "Picture 1: <img><imgpad></img>\nPicture 2: <img><imgpad></img>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nAnd Picture 3: <img><imgpad></img>\n?<|im_end|>\n"
    )
    render = model.processor.apply_chat_template
    text = render(conversation, tokenize=False, add_generation_prompt=True)
    assert text == asked + "<|im_start|>assistant\n"
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    brief = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert render(own, tokenize=False) == brief
    begun = [*own, {"role": "assistant", "content": parts("Well, ")}]
    continued = render(begun, tokenize=False, continue_final_message=True)
    assert continued.rstrip() == brief + "<|im_start|>assistant\nWell,"


def test_text_of_the_base_model_and_of_a_template_beside_the_weights(tmp_path, model):
    write_files(tmp_path, "raw")
    render = load_processor(tmp_path, model.config).apply_chat_template
    conversation = [
        {"role": "user", "content": parts(picture(0), "Is it a cat? Answer:")},
        {"role": "assistant", "content": parts(" yes")},
        {"role": "user", "content": parts(picture(1), "Is it a dog? Answer:")},
    ]
    want = "Picture 1: <img><imgpad></img>\nIs it a cat? Answer: yes\n"
    want += "Picture 2: <img><imgpad></img>\nIs it a dog? Answer:"
    assert render(conversation, tokenize=False, add_generation_prompt=True) == want
    write_files(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    processor = load_processor(tmp_path, model.config)
    assert processor.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!"


def test_prepared_messages(model):
    """Tokens and pixels of messages with two images, written out."""
    images = [picture(0), picture(1, 20, 90)]
    inputs = model.prepare([{"role": "user", "content": parts(*images, "What is it?")}])
    slots = [IMAGE_START, *[IMAGE_START + 2] * 16, IMAGE_START + 1]
    start, end = COUNT + 1, COUNT + 2
    system = encode_by_ranks("system\nYou are a helpful assistant.")
    want = [start, *system, end, *encode_by_ranks("\n"), start, *encode_by_ranks("user\n")]
    for number in (1, 2):
        want += [*encode_by_ranks(f"Picture {number}: "), *slots]
        want += encode_by_ranks("\nPicture 2: ")[:1] if number == 1 else encode_by_ranks("\nWhat is it?")
    want += [end, *encode_by_ranks("\n"), start, *encode_by_ranks("assistant\n")]
    assert inputs.tokens[0, -len(want) :].tolist() == want
    assert (inputs.image_id[0] > 0).sum() == 32 and inputs.image_id.max() == 2
    assert inputs.pixels.shape == (2, 3, 40, 40)
    for image, pixels in zip(images, inputs.pixels, strict=True):
        square = np.asarray(image.resize((40, 40), Image.BICUBIC)) / 255
        normal = (square - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
        np.testing.assert_allclose(pixels, normal.transpose(2, 0, 1), atol=1e-5)


def test_the_model_with_its_processor(model, tmp_path):
    """Encoded images give the same layout, answers are text and end with the turn, and the processor travels."""
    image = picture(3)
    conversation = [{"role": "user", "content": parts(image, "What?")}]
    plain = model.prepare(conversation)
    (encoded,) = model.encode_images([image])
    again = model.prepare([{"role": "user", "content": parts(encoded, "What?")}])
    np.testing.assert_array_equal(again.tokens, plain.tokens)
    np.testing.assert_array_equal(again.pixels, plain.pixels)
    out = model.generate(conversation, max_new_tokens=4)
    assert model.config.eos_token_ids == (COUNT, COUNT + 2, COUNT + 1)
    assert out.text[0] == text.decode(model.processor.tokenizer, out.tokens[0])
    assert len(out.tokens[0]) and out.text[0]
    folder = model.save_pretrained(tmp_path / "saved")
    assert has_processor(folder, model.config)
    again = LVLM({}, model.config, folder).prepare(conversation)
    np.testing.assert_array_equal(again.tokens, plain.tokens)
    model.save_pretrained(folder, overwrite=True)
    again = pickle.loads(pickle.dumps(model.processor))  # between processes
    assert again.tokenizer("the cat")["input_ids"] == encode_by_ranks("the cat")
    assert json.loads(again.image_processor.to_json_string())["size"] == 40


def test_what_is_refused(tmp_path, model):
    for ask, message in (
        (lambda: model.processor(text="<img><imgpad></img>"), "1 <imgpad> and 0 images"),
        (lambda: model.processor(text="a", return_tensors="pt"), "return_tensors is 'pt'"),
        (
            lambda: model.prepare([{"role": "user", "content": parts(picture(0), "<imgpad>")}]),
            "2 image placeholders and 1 images",
        ),
        (lambda: load_processor(tmp_path, model.config), "qwen.tiktoken. cannot be read"),
    ):
        with pytest.raises(LVLMError, match=message):
            ask()
    write_files(tmp_path, "other")
    with pytest.raises(LVLMError, match="chat_format .* is 'other'"):
        load_processor(tmp_path, model.config)
    with pytest.raises(LVLMError, match="image_start_id 151857"):
        load_processor(tmp_path, models.config_from_hf(PUBLISHED))
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(LVLMError, match="chat_format .* is None"):
        load_processor(tmp_path, model.config)
    for content, message in (
        ("IQ== zero", "line 1"), ("I!Q 0", "line 1"), ("\nIQ==", "line 2"), ("IQ== 0", "single bytes"),
        ("", "single bytes"),
    ):  # fmt: skip
        (tmp_path / "qwen.tiktoken").write_text(content)
        with pytest.raises(LVLMError, match=message):
            read_ranks(tmp_path / "qwen.tiktoken")
