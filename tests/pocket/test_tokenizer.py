"""Tokenizer, chat template, processor, and the encoding that training uses."""

import subprocess
import sys

import numpy as np
import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket import tokenizer as pocket
from lvlm_jax.pocket.catalogue import CATEGORIES, plural
from lvlm_jax.pocket.conversations import sample_conversation, sample_text


@pytest.fixture(scope="module")
def tokenizer():
    return pocket.train_tokenizer(pocket.world_text(400))


@pytest.fixture(scope="module")
def processor(tokenizer):
    return pocket.build_processor(tokenizer)


def test_specials_and_size(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(pocket.SPECIALS)) == [0, 1, 2, 3, 4]
    assert len(tokenizer) == pocket.VOCABULARY
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)


def test_any_text_survives_the_round_trip(tokenizer):
    rng = np.random.default_rng(0)
    drawn = ["".join(chr(p) for p in rng.integers(0, 0x10FFFF, 20) if not 0xD800 <= p <= 0xDFFF) for _ in range(50)]
    for text in ("naïve — 狗 🐶\t\n  two  spaces", "\x00\x7f ÿ", "Wo ist der Hund? 3.14159", "a\r\nb", *drawn):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


def test_words_of_the_world_are_single_tokens(tokenizer):
    words = {word for name in CATEGORIES for word in f"{name} {plural(name)}".split()}
    words |= {*"0123456789", "Yes", "No", "left", "right", "middle", "two", "red"}
    split = [word for word in words if len(tokenizer.encode(" " + word, add_special_tokens=False)) != 1]
    assert split == []


def test_encoding_equals_template_and_processor(tokenizer, processor):
    """Training sees exactly the ids that the chat template and the processor give at inference."""
    sizes = set()
    for index in range(60):
        images, turns = sample_conversation(2, index)
        sizes.add(len(images))
        text = processor.apply_chat_template(pocket.conversation_messages(len(images), turns))
        assert text == pocket.conversation_text(len(images), turns)
        expected = processor(text=text, images=images, return_tensors="np")
        ids, mask = pocket.encode_conversation(tokenizer, images, turns, 2048)
        np.testing.assert_array_equal(ids, expected["input_ids"][0])
        assert expected["pixel_values"].shape == (len(images), 3, 96, 96)
        assert (ids == tokenizer.convert_tokens_to_ids("<image>")).sum() == 64 * len(images)
        learned = tokenizer.decode(ids[mask])
        assert learned == "".join(f" {answer}</s>" for _, answer in turns)
    assert len(sizes) > 1


def test_the_template(processor):
    """The prompt at inference is the beginning of the training text; interleaved images and a system message stay."""

    def render(*messages):
        return processor.apply_chat_template(list(messages), add_generation_prompt=True)

    prompt = render({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a dog?"}]})
    assert prompt == "USER: <image>\nIs there a dog? ASSISTANT:"
    assert pocket.conversation_text(1, [("Is there a dog?", "No.")]) == prompt + " No.</s>"
    parts = [{"type": "text", "text": "A "}, {"type": "image"}, {"type": "text", "text": "B "}, {"type": "image"}]
    assert render({"role": "user", "content": parts}) == "USER: A <image>\nB <image>\n ASSISTANT:"
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    assert render(system, user) == "Be brief. USER: Hi ASSISTANT:"


def test_turns_that_do_not_fit_are_left_out(tokenizer):
    _, turns = sample_text(2, 0)
    whole, _ = pocket.encode_conversation(tokenizer, 1, turns, 2048)
    for length in (120, 160, len(whole) - 1):
        ids, mask = pocket.encode_conversation(tokenizer, 1, turns, length)
        assert len(ids) == len(mask) <= length
        np.testing.assert_array_equal(ids, whole[: len(ids)])
        assert ids[-1] == tokenizer.eos_token_id
    assert len(pocket.encode_conversation(tokenizer, 1, turns, len(whole))[0]) == len(whole)
    with pytest.raises(LVLMError, match="does not fit 60 tokens.*takes 64"):
        pocket.encode_conversation(tokenizer, 1, turns, 60)


def test_the_saved_processor_loads_where_there_is_no_torch(tokenizer, tmp_path):
    pocket.write_processor(tmp_path, tokenizer)
    program = f"""
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None
import numpy as np
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained({str(tmp_path)!r})
picture = np.full((200, 300, 3), 255, np.uint8)
out = processor(text="USER: <image>\\nHi ASSISTANT:", images=[picture], return_tensors="np")
print(type(processor).__name__, out["pixel_values"].shape, out["input_ids"][0].tolist())
print(round(float(out["pixel_values"].max()), 4), processor.tokenizer.padding_side)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second = result.stdout.strip().splitlines()
    ids = tokenizer("USER: " + "<image>" * 64 + "\nHi ASSISTANT:")["input_ids"]
    assert first == f"LlavaProcessor (1, 3, 96, 96) {ids}"
    assert second == "2.1459 left"  # (1 - 0.40821) / 0.27578, CLIP's blue channel
