"""Gemma 3 against transformers on random checkpoints, and what its whole-image attention asks of the machinery."""

import jax
import numpy as np
import pytest
import torch
from transformers import AutoConfig, Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from lvlm_jax import LVLM, methods, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import branches
from lvlm_jax.training import forward as training
from lvlm_jax.weights.save import stored_shapes
from tests import checkpoints
from tests.checkpoints import IMAGE
from tests.models.siglip_checkpoints import (
    TEXT,
    VISION,
    assert_decode_equals_one_pass,
    assert_logits_equal,
    behind,
    byte_tokenizer,
    greedy_of,
    logits_of,
    padded,
)

IMAGE_TOKEN, BEGIN, END = 119, 118, 117
ALONE = [(4, IMAGE, 3, IMAGE, 6)]
PADDED = [(26,), (3, IMAGE, 5), (2, IMAGE, 4, IMAGE, 9)]

# Overrides of `configuration`. The window is narrower than an image.
VARIETIES = {
    "tied": {},
    "biases_untied_odd_grid": {
        "text": {
            "attention_bias": True,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        "vision": {"image_size": 29, "hidden_act": "gelu"},  # 7 patches a side, of which 6 make 3 squares
        "mm_tokens_per_image": 9,
        "tie_word_embeddings": False,
    },
}


def configuration(text=None, vision=None, **overrides):
    """A tiny Gemma3Config of 16 tokens per image."""
    text = TEXT | {
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    } | (text or {})  # fmt: skip
    vision = VISION | {"image_size": 32, "patch_size": 4, "vision_use_head": False} | (vision or {})
    return Gemma3Config(
        text_config=AutoConfig.for_model("gemma3_text", **text),
        vision_config=AutoConfig.for_model("siglip_vision_model", **vision),
        **{
            "mm_tokens_per_image": 16,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": BEGIN,
            "eoi_token_index": END,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
            **overrides,
        },
    )


def build(folder, seed, **overrides):
    """Saves a random checkpoint and returns the torch model, in float32."""
    config = configuration(**overrides)
    config._attn_implementation = "eager"
    model = Gemma3ForConditionalGeneration(config).float().eval()
    checkpoints.randomize(model, seed)
    for name, parameter in model.named_parameters():
        if "norm" in name and "vision_tower" not in name:
            parameter.data -= 1  # these norms multiply by one more
        if "post_attention_layernorm" in name or "post_feedforward_layernorm" in name:
            parameter.data += 2  # as large as the embeddings, which are scaled
    model.save_pretrained(folder)
    return model


def random_inputs(config, seed, layouts):
    """Left-padded arrays; in a layout an integer stands for that many text tokens, IMAGE for an image in its marks."""
    generator = np.random.default_rng(seed)
    rows, images = [], 0
    for layout in layouts:
        parts = []
        for part in layout:
            if part == IMAGE:
                images += 1
                parts.append([BEGIN, *[IMAGE_TOKEN] * config.mm_tokens_per_image, END])
            else:
                parts.append(generator.integers(3, END, part))
        rows.append(np.concatenate(parts))
    size = config.vision_config.image_size
    pixels = {"pixel_values": generator.normal(size=(images, 3, size, size)).astype(np.float32)}
    return padded(rows) | (pixels if images else {})


def marked(inputs):
    """What transformers asks for besides, to see images as wholes."""
    return {"token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).astype(np.int64)}


@pytest.fixture(scope="module", params=list(VARIETIES))
def pair(request, tmp_path_factory):
    """(transformers' model, ours), loaded from the same folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return build(folder, 11, **VARIETIES[request.param]), LVLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return with_processor(tmp_path_factory.mktemp("processor"))


def with_processor(folder):
    """A model with a processor beside it, whose tokens are bytes."""
    first = 259
    build(
        folder, 12, text={"vocab_size": first + 3},
        image_token_index=first, boi_token_index=first + 1, eoi_token_index=first + 2,
    )  # fmt: skip
    tokenizer = byte_tokenizer(
        ["<image_soft_token>", "<start_of_image>", "<end_of_image>"],
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>",
    )  # fmt: skip
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<start_of_image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    )
    Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer,
        chat_template=template,
        image_seq_length=16,
    ).save_pretrained(folder)
    return LVLM.from_pretrained(folder)


def arrays_of(ours, layouts):
    """Random arrays for the model with a processor, whose image token is another."""
    arrays = random_inputs(configuration(), 4, layouts)
    arrays["input_ids"][arrays["input_ids"] == IMAGE_TOKEN] = ours.config.image_token_id
    return arrays


@pytest.mark.parametrize("layouts", [ALONE, PADDED, [(11,)]], ids=["alone", "padded", "text"])
def test_logits(pair, layouts):
    theirs, ours = pair
    inputs = random_inputs(theirs.config, 5, layouts)
    want = logits_of(theirs, inputs, **marked(inputs))
    assert_logits_equal(ours.logits(inputs), want, inputs["attention_mask"])


def test_prefill_and_decode_give_the_logits_of_one_pass(pair):
    theirs, ours = pair
    assert_decode_equals_one_pass(ours, random_inputs(theirs.config, 6, PADDED), behind)


def test_greedy_tokens(pair):
    theirs, ours = pair
    inputs = random_inputs(theirs.config, 8, PADDED)
    want = greedy_of(theirs, inputs, 32, **marked(inputs))
    out = ours.generate(inputs, max_new_tokens=32)
    np.testing.assert_array_equal(np.stack([np.asarray(tokens) for tokens in out.tokens]), want)
    assert min(len(set(row)) for row in want.tolist()) > 2


def test_a_saved_checkpoint_loads_in_transformers(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "saved")
    again = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    inputs = random_inputs(theirs.config, 9, ALONE)
    want = logits_of(theirs, inputs, **marked(inputs))
    np.testing.assert_allclose(logits_of(again, inputs, **marked(inputs)), want, rtol=0, atol=1e-4)


def test_a_shared_prefix_that_ends_inside_an_image_changes_nothing(ours):
    """The split lies 16 columns before the end of the prompt, where 10 tokens follow an image."""
    prompt = ours.prepare(arrays_of(ours, [(2, IMAGE, 3, IMAGE, 9), (30,)]))
    split = prompt.tokens.shape[1] - prompt.window
    assert (prompt.image_id[0, split - 1 : split + 1] == 2).all()
    forced = np.random.default_rng(3).integers(3, END, (4, 2))
    states = [ours.prefill(prompt, methods.CMAC(), share_prefix=shared) for shared in (True, False)]
    assert (states[0][0].caches[0].prefix is not None) and states[1][0].caches[0].prefix is None
    for tokens in (None, *forced):
        if tokens is not None:
            states = [ours.decode(state, tokens.astype(np.int32)) for state, _ in states]
        (_, shared), (_, apart) = states
        assert np.abs(np.asarray(apart.main - apart.contrast)[0]).max() > 1e-2
        for name in ("main", "contrast"):
            np.testing.assert_allclose(getattr(shared, name), getattr(apart, name), rtol=0, atol=1e-4)


def test_the_forward_pass_of_training_sees_whole_images(ours):
    prompt = ours.prepare(arrays_of(ours, ALONE))
    main = branches.embedded(ours.params, ours.config, prompt)
    module = models.build(ours.config)

    @jax.jit
    def logits(params):
        decoded = training.decode(module, params, main.image_id, main.embeddings)
        return module.apply({"params": params}, decoded.hidden[0], method="head")

    got, want = logits(ours.params), ours.logits(prompt)
    np.testing.assert_allclose(np.asarray(got)[:, -want.shape[1] :], want, rtol=0, atol=1e-4)


# The sizes of google/gemma-3-4b-it, -12b-it and -27b-it; what their files leave out is the class's default.
ROPE = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
SIZES = {
    "4b": (4.3, dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34)),
    "12b": (12.19, dict(
        hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16,
        num_key_value_heads=8,
    )),
    "27b": (27.43, dict(
        hidden_size=5376, intermediate_size=21504, num_hidden_layers=62, num_attention_heads=32,
        num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168,
    )),
}  # fmt: skip
TOWER = dict(
    model_type="siglip_vision_model",
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=896,
    patch_size=14,
    vision_use_head=False,
)


LARGE = [pytest.param(size, marks=pytest.mark.slow) for size in ("12b", "27b")]


@pytest.mark.parametrize("size", ["4b", *LARGE])
def test_every_tensor_of_the_published_sizes(size):
    billions, text = SIZES[size]
    raw = {
        "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "text_config": {"model_type": "gemma3_text"} | text | ROPE,
        "vision_config": TOWER,
    }
    with torch.device("meta"):
        state = Gemma3ForConditionalGeneration(Gemma3Config.from_dict(raw)).state_dict()
    config = models.config_from_hf(raw)
    state.pop("lm_head.weight")  # the embedding
    assert stored_shapes(config, "state_dict") == {name: tuple(t.shape) for name, t in state.items()}
    assert sum(tensor.numel() for tensor in state.values()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert config.tokens_per_image == 256 and config.text.layer_rope(5).factor == 8
    assert [config.text.window(layer) for layer in (4, 5)] == [1024, None]


def test_messages_equal_the_processors_own_arrays(ours):
    generator = np.random.default_rng(1)
    pictures = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((40, 24), (20, 50))]
    parts = [
        {"type": "image", "image": pictures[0]},
        {"type": "text", "text": "a "},
        {"type": "image", "image": pictures[1]},
        {"type": "text", "text": "b"},
    ]
    messages = [{"role": "user", "content": parts}]
    prompt = ours.prepare(messages)
    text = "<start_of_image>a <start_of_image>b"
    want = ours.processor(images=pictures, text=text, return_tensors="np")
    length = want["input_ids"].shape[1]
    np.testing.assert_array_equal(prompt.tokens[:, -length:], want["input_ids"])
    np.testing.assert_array_equal(prompt.pixels, want["pixel_values"])
    assert [(prompt.image_id == image).sum() for image in (1, 2)] == [16, 16]
    encoded = ours.encode_images(pictures)
    for part, image in zip(parts[::2], encoded, strict=True):
        part["image"] = image
    again = ours.prepare(messages)
    np.testing.assert_array_equal(again.tokens, prompt.tokens)
    np.testing.assert_allclose(ours.logits(again), ours.logits(prompt), rtol=0, atol=1e-4)


def test_crops_count_as_images_unless_the_arrays_say_whose_they_are(ours):
    picture = np.random.default_rng(2).integers(0, 256, (30, 90, 3), dtype=np.uint8)
    scan = dict(do_pan_and_scan=True, pan_and_scan_min_crop_size=16, pan_and_scan_max_num_crops=3)
    scan |= dict(pan_and_scan_min_ratio_to_activate=1.2)
    arrays = ours.processor(images=[picture], text="<start_of_image>b", return_tensors="np", **scan)
    pixels = arrays["pixel_values"]
    assert len(pixels) == 4 and ours.prepare(arrays).image_id.max() == 4
    known = ours.prepare({**arrays, "num_crops": np.array([3])})
    assert known.image_id.max() == 1 and known.owner.tolist() == [0, 0, 0, 0]
    with pytest.raises(LVLMError, match="num_crops .* 3 rows of pixel_values, which has 4"):
        ours.prepare({**arrays, "num_crops": np.array([2])})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"text": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping 30.0"),
        ({"text": {"attn_logit_softcapping": 50.0}}, "attn_logit_softcapping 50.0"),
        ({"text": {"use_bidirectional_attention": True}}, "use_bidirectional_attention"),
        ({"text": {"sliding_window": None}}, "sliding_window is None"),
        ({"vision": {"vision_use_head": True}}, "vision_use_head"),
        ({"mm_tokens_per_image": 15}, "mm_tokens_per_image 15 does not fit"),
        ({"mm_tokens_per_image": 81}, "mm_tokens_per_image 81 does not fit"),
    ],
)
def test_configurations_that_are_refused(overrides, message):
    with pytest.raises(LVLMError, match=message):
        models.config_from_hf(configuration(**overrides).to_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"pixel_values": a["pixel_values"][:, :, :20]}, "expected .images, 3, 32, 32."),
        (lambda a: {"pixel_values": a["pixel_values"][:1]}, "2 image placeholders and 1 images"),
        (lambda a: {"pixel_values": a["pixel_values"] * np.nan}, "NaN"),
        (lambda a: {name: a[name][:, :-9] for name in ("input_ids", "attention_mask")}, "truncate"),
    ],
)
def test_bad_arrays(ours, change, message):
    arrays = arrays_of(ours, [(4, IMAGE, 3, IMAGE)])
    with pytest.raises(LVLMError, match=message):
        ours.prepare(arrays | change(arrays))


def test_bfloat16_parameters_run(ours):
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), ours.params)
    arrays = arrays_of(ours, ALONE)
    half = np.asarray(LVLM(params, ours.config).logits(arrays), np.float32)
    assert np.corrcoef(half[0, -1], np.asarray(ours.logits(arrays))[0, -1])[0, 1] > 0.99
