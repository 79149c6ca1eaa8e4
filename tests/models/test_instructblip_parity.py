"""InstructBLIP against transformers on random checkpoints, in both layouts."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from lvlm_jax import LVLM, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import ICD
from lvlm_jax.weights.save import stored_shapes
from tests import small
from tests.checkpoints import to_torch
from tests.models import instructblip_checkpoints as checkpoints

ALONE, TWO_IMAGES, PADDED = [(1, 9)], [(2, 7)], [(0, 6), (1, 5), (2, 9)]
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Gives (transformers' model, ours) of a variety, loaded from the same folder, with a processor."""
    known = {}

    def load(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            theirs = checkpoints.make(folder, seed=11, **checkpoints.VARIETIES[name])
            checkpoints.write_processor(folder, name == "published")
            known[name] = theirs, LVLM.from_pretrained(folder, dtype="float32")
        return known[name]

    return load


@pytest.fixture
def model(loaded):
    return loaded("vicuna")[1]


def arrays(pair, seed, samples):
    """(for transformers, for us)."""
    theirs, ours = pair
    inputs = checkpoints.random_inputs(theirs.config, seed, samples)
    return inputs, checkpoints.for_us(inputs, theirs.config, ours.config)


def assert_logits(ours, prompt, expected, mask):
    """Equality at the valid tokens, which are the last of every row."""
    got = np.asarray(ours.logits(prompt))
    assert expected.std() > 1
    for row, valid in enumerate(mask.sum(axis=1)):
        np.testing.assert_allclose(got[row, -valid:], expected[row, -valid:], rtol=0, atol=1e-4)


def logits_of(theirs, inputs):
    with torch.no_grad():
        return theirs(**to_torch(inputs)).logits.numpy()


BATCHES = {"alone": ALONE, "two_images": TWO_IMAGES, "padded": PADDED}


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        pytest.param(name, batch, marks=[] if "vicuna" == name or batch == "padded" else pytest.mark.slow)
        for name in checkpoints.VARIETIES
        for batch in BATCHES
    ],
)
def test_logits(loaded, name, batch):
    pair = loaded(name)
    inputs, given = arrays(pair, 5, BATCHES[batch])
    assert_logits(pair[1], given, logits_of(pair[0], inputs), inputs["attention_mask"])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "vicuna" else pytest.mark.slow)
        for name in checkpoints.VARIETIES
    ],
)
def test_text_alone(loaded, name):
    """A prompt without images is the decoder's own."""
    pair = loaded(name)
    inputs, given = arrays(pair, 5, [(0, 7), (0, 12)])
    with torch.no_grad():
        expected = pair[0].language_model(**to_torch(inputs)).logits.numpy()
    assert_logits(pair[1], given, expected, inputs["attention_mask"])


@pytest.mark.parametrize("name", list(checkpoints.VARIETIES))
def test_greedy_tokens(loaded, name):
    pair = loaded(name)
    inputs, given = arrays(pair, 8, PADDED)
    with torch.no_grad():
        expected = pair[0].generate(**to_torch(inputs), max_new_tokens=NEW_TOKENS, do_sample=False)
    expected = expected.numpy()[:, -NEW_TOKENS:]
    out = pair[1].generate(given, max_new_tokens=NEW_TOKENS)
    np.testing.assert_array_equal(np.stack([np.asarray(tokens) for tokens in out.tokens]), expected)
    assert max(len(set(row)) for row in expected.tolist()) > 6  # not stuck


def test_prefill_and_decode_give_the_logits_of_one_pass(loaded):
    theirs, ours = loaded("vicuna")
    inputs, given = arrays((theirs, ours), 6, PADDED)
    forced = np.random.default_rng(7).integers(3, 200, (len(PADDED), 3))
    state, step = ours.prefill(given)
    steps = [step.main]
    for column in forced.T:
        state, step = ours.decode(state, column)
        steps.append(step.main)
    longer = given | {
        "input_ids": np.concatenate([given["input_ids"], forced], axis=1),
        "attention_mask": np.pad(given["attention_mask"], ((0, 0), (0, 3)), constant_values=1),
    }
    whole = ours.logits(longer)[:, -4:]
    np.testing.assert_allclose(np.stack(steps, axis=1), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["vicuna", "published"])
def test_without_placeholders_the_queries_stand_in_front(loaded, name):
    """What a processor of transformers 4 gives: text alone, and a row of the Q-Former's words for each prompt."""
    theirs, ours = loaded(name)
    inputs, given = arrays((theirs, ours), 9, [(1, 6), (1, 6)])
    bare = given | {"input_ids": given["input_ids"][:, checkpoints.QUERIES :]}
    bare["attention_mask"] = np.ones_like(bare["input_ids"])
    expected = logits_of(theirs, inputs)
    assert_logits(ours, bare, expected, inputs["attention_mask"])
    for column, token in ((0, ours.config.image_token_id), (checkpoints.QUERIES, bare["input_ids"][0, 0])):
        prompt = ours.prepare(bare)
        assert prompt.tokens[0, prompt.tokens.shape[1] - prompt.lengths[0] + column] == token


def test_instructions_for_prompts_or_for_images(loaded):
    """Two images and one row of words: both are read with it. Masked words are not read, wherever they stand."""
    theirs, ours = loaded("vicuna")
    inputs, given = arrays((theirs, ours), 5, TWO_IMAGES)
    words = given["qformer_input_ids"]
    once = given | {"qformer_input_ids": words[:1], "qformer_attention_mask": np.ones_like(words[:1])}
    assert_logits(ours, once, logits_of(theirs, inputs), inputs["attention_mask"])
    del once["qformer_attention_mask"]  # all ones
    np.testing.assert_array_equal(ours.logits(once), ours.logits(given))
    before = given | {
        "qformer_input_ids": np.pad(words, ((0, 0), (3, 0)), constant_values=7),
        "qformer_attention_mask": np.pad(np.ones_like(words), ((0, 0), (3, 0))),
    }
    expected = logits_of(theirs, inputs | {name: before[name] for name in before if "qformer" in name})
    assert_logits(ours, before, expected, inputs["attention_mask"])
    assert np.abs(expected - logits_of(theirs, inputs)).max() > 0.05  # positions count


@pytest.mark.parametrize("name", ["vicuna", "published"])
def test_saved_checkpoints_load_in_transformers(loaded, tmp_path, name):
    theirs, ours = loaded(name)
    folder = ours.save_pretrained(tmp_path / "saved")
    back = checkpoints.runnable(InstructBlipForConditionalGeneration.from_pretrained(folder).eval())
    inputs, _ = arrays((theirs, ours), 5, ALONE)
    np.testing.assert_allclose(logits_of(back, inputs), logits_of(theirs, inputs), rtol=0, atol=1e-4)
    ours.save_pretrained(folder, overwrite=True)  # the second tokenizer's folder is no stranger
    again = LVLM.from_pretrained(folder)
    prompt = small.conversation("what is this?", seed=1)
    np.testing.assert_array_equal(
        again.prepare(prompt).geometry["words"], ours.prepare(prompt).geometry["words"]
    )


@pytest.mark.parametrize("name", ["vicuna", "published"])
def test_conversations_go_through_the_processor(loaded, tmp_path, name):
    theirs, ours = loaded(name)
    processor = checkpoints.write_processor(tmp_path, False)
    pictures = [np.random.default_rng(seed).integers(0, 256, (40, 20, 3), dtype=np.uint8) for seed in (1, 2)]
    (one,) = small.conversation("What is this?")
    image = {"type": "image", "image": pictures[0]}
    conversation = [one | {"content": [*one["content"], image]}]
    prompt = ours.prepare(conversation)
    wanted = processor(images=pictures[0], text="What is this?", return_tensors="np")
    ids = np.where(
        np.arange(wanted["input_ids"].shape[1]) < 4, ours.config.image_token_id, wanted["input_ids"]
    )
    assert (wanted["input_ids"][0, :4] == small.IMAGE_TOKEN_ID).all() and wanted["input_ids"][0, 4] == 1
    np.testing.assert_array_equal(prompt.tokens[prompt.image_id >= 0], ids[0])
    np.testing.assert_array_equal(prompt.pixels, wanted["pixel_values"])
    np.testing.assert_array_equal(
        prompt.geometry["words"][prompt.geometry["mask"]], wanted["qformer_input_ids"][0]
    )
    np.testing.assert_array_equal(prompt.image_id[0][prompt.image_id[0] >= 0][:5], [1, 1, 1, 1, 0])
    # A batch: two images, each read with the whole conversation in mind, beside text alone.
    answer = {"role": "assistant", "content": "red"}
    second = one | {
        "content": [{"type": "image", "image": pictures[1]}, {"type": "text", "text": "the what?"}]
    }
    batch = ours.prepare([[*conversation, answer, second], small.conversation("Is it red?")])
    read = "What is this? red\nthe what?"
    np.testing.assert_array_equal(batch.image_id[1][batch.image_id[1] >= 0], 0)
    words = [row[kept] for row, kept in zip(batch.geometry["words"], batch.geometry["mask"], strict=True)]
    np.testing.assert_array_equal(words, [processor.qformer_tokenizer(read)["input_ids"]] * 2)
    tokens = [*[ours.config.image_token_id] * 8, *processor.tokenizer(read)["input_ids"]]
    np.testing.assert_array_equal(batch.tokens[0][batch.image_id[0] >= 0], tokens)
    np.testing.assert_array_equal(batch.pixels[:1], wanted["pixel_values"])
    out = ours.generate(conversation, max_new_tokens=2)
    assert len(out.tokens[0]) == 2


def test_icd_disturbs_what_the_qformer_reads(model):
    prompt = model.prepare([small.conversation("what is this?", seed=1), small.conversation("is this red?")])
    reader = model.processor.qformer_tokenizer
    _, step = model.prefill(prompt, ICD(prompt="you are confused"))
    words = reader("you are confused what is this?")["input_ids"]
    valid = prompt.tokens[0][prompt.image_id[0] >= 0]
    disturbed = {
        "input_ids": valid[None],
        "pixel_values": prompt.pixels,
        "qformer_input_ids": np.array([words]),
    }
    expected = np.asarray(model.logits(disturbed))[0, -1]
    np.testing.assert_allclose(step.contrast[0], expected, rtol=0, atol=1e-4)
    assert np.abs(np.asarray(step.main[0]) - expected).max() > 0.05
    np.testing.assert_array_equal(step.combined[1], step.main[1])  # no image, nothing to disturb
    tokens = tuple(reader("you are confused", add_special_tokens=False)["input_ids"])
    bare = LVLM(model.params, model.config)  # no processor
    np.testing.assert_array_equal(bare.prefill(prompt, ICD(tokens=tokens))[1].contrast, step.contrast)
    text = model.prepare(small.conversation("is this red?"))
    _, step = model.prefill(text, ICD(prompt="you are confused"))
    np.testing.assert_allclose(step.combined, step.main, rtol=0, atol=1e-5)


def test_image_tokens_are_not_encoded_ahead(model):
    with pytest.raises(LVLMError, match="pictures of instructblip cannot be encoded ahead"):
        model.encode_images([np.zeros((28, 28, 3), np.uint8)])


def test_instructions_come_in_few_lengths(model):
    shapes = set()
    for length in range(1, 24):
        given = checkpoints.random_inputs(checkpoints.config(), 1, ALONE)
        given["qformer_input_ids"] = np.full((1, length), 5)
        given["qformer_attention_mask"] = np.ones((1, length), int)
        shapes.add(model.prepare(given).geometry["words"].shape)
    assert shapes == {(1, 16), (1, 32)}


PUBLISHED = {
    # Salesforce/instructblip-vicuna-7b and -13b; vocabulary and placeholder of the first files and of those since 2024.
    "7b": (
        dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
        7.914,
    ),
    "13b": (
        dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
        14.19,
    ),
}


@pytest.mark.parametrize("size, vocabulary, image", [("7b", 32064, 32001), ("13b", 32001, None)])
def test_every_tensor_of_the_full_size_classes_maps_by_exactly_one_row(size, vocabulary, image):
    fields, billions = PUBLISHED[size]
    text = dict(
        fields, model_type="llama", vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, pad_token_id=-1
    )
    hf = InstructBlipConfig(
        text_config=text,
        vision_config=dict(hidden_size=1408, num_hidden_layers=39, image_size=224, patch_size=14),
        qformer_config=dict(vocab_size=30523, hidden_size=768, num_hidden_layers=12),
        num_query_tokens=32,
        image_token_index=image,
    )
    with torch.device("meta"):
        state = InstructBlipForConditionalGeneration(hf).state_dict()
    config = models.config_from_hf(hf.to_dict())
    assert stored_shapes(config, "state_dict") == {name: tuple(t.shape) for name, t in state.items()}
    assert sum(tensor.numel() for tensor in state.values()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert config.image_token_id == (32001 if image is None else image)
    assert config.tokens_per_image is None
    # The numbers of the first LLaMA conversion are one below the tokenizer's, and padding is none.
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (2, (2,), 0)
    assert config.stop_tokens({"eos_token_id": 1}) == config.stop_tokens({}) == (2,)
    assert config.stop_tokens({"eos_token_id": [2, 7]}) == (2, 7)


def test_other_stop_tokens_are_believed():
    hf = checkpoints.config(text={"bos_token_id": 1, "eos_token_id": 5})
    config = models.config_from_hf(hf.to_dict())
    assert (config.bos_token_id, config.eos_token_ids) == (1, (5,))
    assert config.stop_tokens({"eos_token_id": 1}) == (1,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qformer_input_ids": None}, "qformer_input_ids is missing"),
        ({"qformer_input_ids": np.full((3, 5), 4)}, r"shape \(3, 5\).*each of 2 images or of 1 prompts"),
        ({"qformer_attention_mask": np.ones((2, 15), int)}, r"qformer_attention_mask \(2, 15\)"),
        (
            {"qformer_input_ids": np.full((2, 25), 4), "qformer_attention_mask": None},
            "25 tokens and the Q-Former reads 24",
        ),
        (
            {"qformer_input_ids": np.full((2, 5), 13), "qformer_attention_mask": None},
            "qformer_input_ids holds 13; expected 0 to 12",
        ),
        ({"pixel_values": np.zeros((2, 3, 14, 28), np.float32)}, r"expected \[images, 3, 28, 28\]"),
        ({"input_ids": np.array([[small.IMAGE_TOKEN_ID] * 7 + [5]])}, "7 image tokens.*truncated"),
        ({"input_ids": np.array([[small.IMAGE_TOKEN_ID] * 4 + [5]])}, "1 image placeholders and 2 images"),
        ({"input_ids": np.full((3, 5), 5)}, "3 prompts without placeholders and 2 images"),
    ],
)
def test_bad_inputs(model, change, message):
    given = checkpoints.random_inputs(checkpoints.config(), 5, TWO_IMAGES)
    given.pop("attention_mask")
    changed = {name: array for name, array in (given | change).items() if array is not None}
    with pytest.raises(LVLMError, match=message):
        model.prepare(changed)


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("text_config", {"model_type": "t5"}, "text_config.model_type 't5' is an encoder-decoder"),
        ("text_config", {"model_type": "opt"}, "text_config.model_type 'opt' is not supported"),
        (
            "vision_config",
            {"image_size": [224, 224]},
            r"vision_config.image_size .*expected one whole number",
        ),
        ("vision_config", {"hidden_act": "mish"}, "vision_config.hidden_act 'mish'"),
        ("qformer_config", {"hidden_act": "mish"}, "qformer_config.hidden_act 'mish'"),
    ],
)
def test_unsupported_configurations(part, fields, message):
    raw = checkpoints.config().to_dict()
    raw[part] = fields if part == "text_config" else raw[part] | fields
    with pytest.raises(LVLMError, match=message):
        models.config_from_hf(raw)


def test_a_folder_without_the_second_tokenizer_says_so(loaded, tmp_path):
    _, ours = loaded("vicuna")
    checkpoints.write_processor(tmp_path, False)
    for file in (tmp_path / "qformer_tokenizer").iterdir():
        file.unlink()
    model = LVLM(ours.params, dataclasses.replace(ours.config), tmp_path)
    with pytest.raises(LVLMError, match="cannot read the qformer_tokenizer"):
        model.prepare(small.conversation("what?", seed=1))
