"""What only InstructBLIP has: a Q-Former that reads the instruction, with a tokenizer of its own, in two layouts."""

import functools

import numpy as np
import pytest

from lvlm_jax import LVLM, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import ICD
from tests import small
from tests.checkpoints import IMAGE
from tests.models.families.instructblip import INSTRUCTBLIP, QUERIES
from tests.models.test_published import published
from tests.reference import contrast


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(layout): transformers' model, ours with a processor, transformers' processor."""

    @functools.cache
    def made(layout):
        folder = tmp_path_factory.mktemp(layout)
        theirs = INSTRUCTBLIP.build(folder, **INSTRUCTBLIP.varieties[layout])
        processor = INSTRUCTBLIP.write_processor(folder, layout == "published")
        return theirs, LVLM.from_pretrained(folder, dtype="float32"), processor

    return made


@pytest.fixture(params=["vicuna", "published"])
def pair(request, load):
    """In one of the two layouts."""
    return load(request.param)


@pytest.fixture
def vicuna(load):
    return load("vicuna")[:2]


def arrays(theirs, ours, seed, layouts):
    """(for transformers, for us)."""
    inputs = INSTRUCTBLIP.inputs(theirs.config, seed, layouts)
    return inputs, INSTRUCTBLIP.for_us(inputs, theirs.config, ours.config)


def assert_logits(ours, prompt, expected):
    for got, want in zip(np.asarray(ours.logits(prompt)), expected, strict=True):
        np.testing.assert_allclose(got[-len(want) :], want, rtol=0, atol=1e-4)


def test_without_placeholders_the_queries_stand_in_front(pair):
    """What a processor of transformers 4 gives: text alone, and a row of the Q-Former's words for each prompt."""
    theirs, ours, _ = pair
    inputs, given = arrays(theirs, ours, 9, [(IMAGE, 6), (IMAGE, 6)])
    bare = given | {"input_ids": given["input_ids"][:, QUERIES:]}
    bare["attention_mask"] = np.ones_like(bare["input_ids"])
    assert_logits(ours, bare, INSTRUCTBLIP.logits(theirs, inputs))
    for column, token in ((0, ours.config.image_token_id), (QUERIES, bare["input_ids"][0, 0])):
        prompt = ours.prepare(bare)
        assert prompt.tokens[0, prompt.tokens.shape[1] - prompt.lengths[0] + column] == token


def test_instructions_for_prompts_or_for_images(vicuna):
    """Two images and one row of words: both are read with it. Masked words are not read, wherever they stand."""
    theirs, ours = vicuna
    inputs, given = arrays(theirs, ours, 5, [(IMAGE, IMAGE, 7)])
    words = given["qformer_input_ids"]
    once = given | {"qformer_input_ids": words[:1], "qformer_attention_mask": np.ones_like(words[:1])}
    plain = INSTRUCTBLIP.logits(theirs, inputs)
    assert_logits(ours, once, plain)
    del once["qformer_attention_mask"]  # all ones
    np.testing.assert_array_equal(ours.logits(once), ours.logits(given))
    before = {
        "qformer_input_ids": np.pad(words, ((0, 0), (3, 0)), constant_values=7),
        "qformer_attention_mask": np.pad(np.ones_like(words), ((0, 0), (3, 0))),
    }
    expected = INSTRUCTBLIP.logits(theirs, inputs | before)
    assert_logits(ours, given | before, expected)
    assert np.abs(expected[0] - plain[0]).max() > 0.05  # positions count


def test_the_second_tokenizer_is_saved_too(pair, tmp_path):
    _, ours, _ = pair
    folder = ours.save_pretrained(tmp_path / "saved")
    again, _ = INSTRUCTBLIP.load(folder)
    inputs = INSTRUCTBLIP.inputs(pair[0].config, 5, [(IMAGE, 9)])
    got, want = (INSTRUCTBLIP.logits(model, inputs)[0] for model in (again, pair[0]))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    ours.save_pretrained(folder, overwrite=True)  # the second tokenizer's folder is no stranger
    prompt = small.conversation("what is this?", seed=1)
    words = [model.prepare(prompt).geometry["words"] for model in (LVLM.from_pretrained(folder), ours)]
    np.testing.assert_array_equal(*words)


def test_conversations_go_through_the_processor(pair):
    _, ours, processor = pair
    pictures = [np.random.default_rng(seed).integers(0, 256, (40, 20, 3), dtype=np.uint8) for seed in (1, 2)]
    (one,) = small.conversation("What is this?")
    image = {"type": "image", "image": pictures[0]}
    conversation = [one | {"content": [*one["content"], image]}]
    prompt = ours.prepare(conversation)
    wanted = processor(images=pictures[0], text="What is this?", return_tensors="np")
    ids, placeholder = wanted["input_ids"][0], ours.config.image_token_id
    assert (ids[:4] == small.IMAGE_TOKEN_ID).all() and ids[4] == 1
    np.testing.assert_array_equal(prompt.tokens[prompt.image_id >= 0], [placeholder] * 4 + list(ids[4:]))
    np.testing.assert_array_equal(prompt.pixels, wanted["pixel_values"])
    words = prompt.geometry["words"][prompt.geometry["mask"]]
    np.testing.assert_array_equal(words, wanted["qformer_input_ids"][0])
    np.testing.assert_array_equal(prompt.image_id[0][prompt.image_id[0] >= 0][:5], [1, 1, 1, 1, 0])
    # A batch: two images, each read with the whole conversation in mind, beside text alone.
    answer = {"role": "assistant", "content": "red"}
    parts = [{"type": "image", "image": pictures[1]}, {"type": "text", "text": "the what?"}]
    batch = [[*conversation, answer, one | {"content": parts}], small.conversation("Is it red?")]
    batch = ours.prepare(batch)
    read = "What is this? red\nthe what?"
    np.testing.assert_array_equal(batch.image_id[1][batch.image_id[1] >= 0], 0)
    words = [row[kept] for row, kept in zip(batch.geometry["words"], batch.geometry["mask"], strict=True)]
    np.testing.assert_array_equal(words, [processor.qformer_tokenizer(read)["input_ids"]] * 2)
    tokens = [*[placeholder] * 8, *processor.tokenizer(read)["input_ids"]]
    np.testing.assert_array_equal(batch.tokens[0][batch.image_id[0] >= 0], tokens)
    np.testing.assert_array_equal(batch.pixels[:1], wanted["pixel_values"])
    assert len(ours.generate(conversation, max_new_tokens=2).tokens[0]) == 2


@pytest.mark.parametrize("variant", ["question", "normal"])
def test_icd_disturbs_what_the_qformer_reads(vicuna, variant):
    _, model = vicuna
    prompt = model.prepare([small.conversation("what is this?", seed=1), small.conversation("is this red?")])
    reader = model.processor.qformer_tokenizer
    _, step = model.prefill(prompt, ICD(prompt="you are confused", qformer=variant))
    words = contrast.instruction(
        reader("what is this?")["input_ids"], reader("you are confused", add_special_tokens=False)["input_ids"],
        variant, reader.cls_token_id, reader.sep_token_id,
    )  # fmt: skip
    valid = prompt.tokens[0][prompt.image_id[0] >= 0]
    disturbed = {"input_ids": valid[None], "pixel_values": prompt.pixels}
    expected = np.asarray(model.logits(disturbed | {"qformer_input_ids": np.array([words])}))[0, -1]
    np.testing.assert_allclose(step.contrast[0], expected, rtol=0, atol=1e-4)
    assert np.abs(np.asarray(step.main[0]) - expected).max() > 0.05
    np.testing.assert_array_equal(step.combined[1], step.main[1])  # no image, nothing to disturb
    tokens = tuple(reader("you are confused", add_special_tokens=False)["input_ids"])
    bare = LVLM(model.params, model.config)  # no processor
    given = ICD(tokens=tokens, qformer=variant)
    np.testing.assert_array_equal(bare.prefill(prompt, given)[1].contrast, step.contrast)
    text = model.prepare(small.conversation("is this red?"))
    _, step = model.prefill(text, ICD(prompt="you are confused"))
    np.testing.assert_allclose(step.combined, step.main, rtol=0, atol=1e-5)


def test_instructions_come_in_few_lengths_and_image_tokens_not_ahead(vicuna, tmp_path):
    shapes = set()
    for length in range(1, 24):
        given = INSTRUCTBLIP.inputs(INSTRUCTBLIP.config(), 1, [(IMAGE, 9)])
        given["qformer_input_ids"] = np.full((1, length), 5)
        given["qformer_attention_mask"] = np.ones((1, length), int)
        shapes.add(vicuna[1].prepare(given).geometry["words"].shape)
    assert shapes == {(1, 16), (1, 32)}
    with pytest.raises(LVLMError, match="images of instructblip cannot be encoded ahead"):
        vicuna[1].encode_images([np.zeros((28, 28, 3), np.uint8)])
    INSTRUCTBLIP.write_processor(tmp_path, False)
    for file in (tmp_path / "qformer_tokenizer").iterdir():
        file.unlink()
    with pytest.raises(LVLMError, match="cannot read the qformer_tokenizer"):
        LVLM(vicuna[1].params, vicuna[1].config, tmp_path).prepare(small.conversation("what?", seed=1))


def test_stop_tokens():
    """The numbers of the first LLaMA conversion are one below the tokenizer's; others are believed."""
    config = models.config_from_hf(published("instructblip", "instructblip-vicuna-7b"))
    assert config.tokens_per_image is None
    assert config.stop_tokens({"eos_token_id": 1}) == config.stop_tokens({}) == (2,)
    assert config.stop_tokens({"eos_token_id": [2, 7]}) == (2, 7)
    hf = INSTRUCTBLIP.config(text={"bos_token_id": 1, "eos_token_id": 5})
    config = models.config_from_hf(hf.to_dict())
    assert (config.bos_token_id, config.eos_token_ids) == (1, (5,))
    assert config.stop_tokens({"eos_token_id": 1}) == (1,)
