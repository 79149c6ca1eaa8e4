"""SmolVLM and Idefics3 against transformers on random checkpoints; which tiles are one image."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from lvlm_jax import LVLM, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.smolvlm import patch_positions, tiles_per_image
from lvlm_jax.weights.save import stored_shapes
from tests import checkpoints
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

TOKENS, PIXELS = ("input_ids", "attention_mask"), ("pixel_values", "pixel_attention_mask")
IMAGE_TOKEN, FENCE, GLOBAL, ROW, NEWLINE = 119, 118, 117, 116, 115

# Layouts: an integer stands for that many text tokens, a pair for an image of so many rows and columns of tiles.
ALONE = [(4, (0, 0), 3, (2, 1), 6)]  # a whole picture, then a portrait one that is cut
PADDED = [(9,), (3, (1, 2), 5), (2, (0, 0), (1, 2), 4, (0, 0), 9)]

CLASSES = {
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
}

# Overrides of `configuration`.
VARIETIES = {
    "smolvlm": {
        "vision": {"image_size": 26},
        "tie_word_embeddings": True,
    },  # 6 patches a side, 2 pixels to spare
    "idefics3": {
        "vision": {"image_size": 20, "hidden_act": "gelu"},  # positions of 5 a side, pictures of 6
        "text": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
        "scale_factor": 2,
    },
}


def configuration(kind, text=None, vision=None, **overrides):
    """A tiny configuration of 4 tokens a tile; tiles are 26 pixels a side."""
    return CLASSES[kind][0](
        text_config=AutoConfig.for_model("llama", **TEXT | (text or {})),
        vision_config=VISION | {"image_size": 24, "patch_size": 4} | (vision or {}),
        **{"scale_factor": 3, "image_token_id": IMAGE_TOKEN, "eos_token_id": None, **overrides},
    )


def build(kind, folder, seed, **overrides):
    """Saves a random checkpoint and returns the torch model, in float32."""
    config = configuration(kind, **overrides)
    config._attn_implementation = "eager"
    model = CLASSES[kind][1](config).float().eval()
    checkpoints.randomize(model, seed)
    norm = model.model.text_model.norm.weight.data
    norm.copy_((norm - 1).sign())  # of either sign: with tied embeddings a token would mostly predict itself
    model.save_pretrained(folder)
    return model


def tiles_of(rows, columns):
    return rows * columns + 1


def marked(rows, columns, size):
    """The tokens of one image, as processors lay them out."""
    tile = [IMAGE_TOKEN] * size
    tokens = []
    for _ in range(rows):
        for _ in range(columns):
            tokens += [FENCE, ROW, *tile]
        tokens.append(NEWLINE)
    return [*tokens, *([NEWLINE] if rows else []), FENCE, GLOBAL, *tile, FENCE]


def random_inputs(config, seed, layouts, masks=True):
    """Left-padded arrays with pixels [B, tiles, 3, 26, 26]; `masks` leaves out the edges of some tiles."""
    generator = np.random.default_rng(seed)
    size = (6 // config.scale_factor) ** 2
    rows, tiles = [], []
    for layout in layouts:
        images = [part for part in layout if isinstance(part, tuple)]
        rows.append(
            np.concatenate(
                [
                    marked(*part, size) if isinstance(part, tuple) else generator.integers(3, NEWLINE, part)
                    for part in layout
                ]
            )
        )
        tiles.append(sum(tiles_of(*image) for image in images))
    inputs = padded(rows)
    if sum(tiles) == 0:
        return inputs
    pixels = np.zeros((len(rows), max(tiles), 3, 26, 26), np.float32)
    mask = np.zeros((len(rows), max(tiles), 26, 26), np.int64)
    for row, count in enumerate(tiles):
        pixels[row, :count] = generator.normal(size=(count, 3, 26, 26))
        for tile in range(count):
            height, width = generator.integers(9, 27, 2) if masks and tile % 2 else (26, 26)
            mask[row, tile, :height, :width] = 1
    return inputs | {"pixel_values": pixels, "pixel_attention_mask": mask}


@pytest.fixture(scope="module", params=list(VARIETIES))
def pair(request, tmp_path_factory):
    """(transformers' model, ours), loaded from the same folder."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = build(request.param, folder, 11, **VARIETIES[request.param])
    return theirs, LVLM.from_pretrained(folder)


@pytest.mark.parametrize("layouts", [ALONE, PADDED, [(11,)]], ids=["alone", "padded", "text"])
def test_logits(pair, layouts):
    theirs, ours = pair
    inputs = random_inputs(theirs.config, 5, layouts)
    prompt = ours.prepare(inputs)
    images = [sum(isinstance(part, tuple) for part in layout) for layout in layouts]
    assert prompt.image_id.max(axis=1).tolist() == images
    want = logits_of(theirs, inputs)
    assert_logits_equal(ours.logits(prompt), want, inputs["attention_mask"])


def test_logits_without_a_mask_of_pixels(pair):
    theirs, ours = pair
    inputs = random_inputs(theirs.config, 6, ALONE)
    del inputs["pixel_attention_mask"]
    assert_logits_equal(ours.logits(inputs), logits_of(theirs, inputs), inputs["attention_mask"])


def test_prefill_and_decode_give_the_logits_of_one_pass(pair):
    theirs, ours = pair
    assert_decode_equals_one_pass(ours, random_inputs(theirs.config, 6, PADDED), behind)


def test_greedy_tokens(pair):
    theirs, ours = pair
    inputs = random_inputs(theirs.config, 8, PADDED)
    want = greedy_of(theirs, inputs, 32)
    out = ours.generate(inputs, max_new_tokens=32)
    np.testing.assert_array_equal(np.stack([np.asarray(tokens) for tokens in out.tokens]), want)
    assert min(len(set(row)) for row in want.tolist()) > 2


def test_a_saved_checkpoint_loads_in_transformers(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "saved")
    again = type(theirs).from_pretrained(tmp_path / "saved", attn_implementation="eager")
    inputs = random_inputs(theirs.config, 9, ALONE)
    np.testing.assert_allclose(logits_of(again, inputs), logits_of(theirs, inputs), rtol=0, atol=1e-4)


def test_placeholders_one_for_each_tile_or_for_each_row(pair):
    theirs, ours = pair
    pixels = random_inputs(theirs.config, 5, [((1, 2),)], masks=False)["pixel_values"]
    size = (6 // theirs.config.scale_factor) ** 2
    whole = ours.prepare({"input_ids": np.array([[5, IMAGE_TOKEN, 6]]), "pixel_values": pixels})
    assert whole.image_id.max() == 1 and (whole.image_id == 1).sum() == 3 * size
    ids = np.array([[5, *[IMAGE_TOKEN] * 3, 6]])
    each = ours.prepare({"input_ids": ids, "pixel_values": pixels})
    assert [(each.image_id == image).sum() for image in (1, 2, 3)] == [size] * 3


def test_rows_of_tiles_come_in_buckets(pair):
    theirs, ours = pair
    prompts = [ours.prepare(random_inputs(theirs.config, 5, [((1, count), 4)])) for count in (3, 4, 5)]
    assert [len(prompt.pixels) for prompt in prompts] == [4, 6, 6]
    assert prompts[1].owner.tolist() == [0] * 5 + [-1]


# Config facts of HuggingFaceTB/SmolVLM2-256M-Video-Instruct, -500M, -2.2B and HuggingFaceM4/Idefics3-8B-Llama3.
BASE = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512
)
LARGE = dict(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14
)
QUICK = "256m"
SIZES = {
    "256m": ("smolvlm", 64, 0.256, BASE | {"patch_size": 16}, 4, dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49280,
    )),
    "500m": ("smolvlm", 64, 0.507, BASE | {"patch_size": 16}, 4, dict(
        hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
        num_key_value_heads=5, vocab_size=49280,
    )),
    "2.2b": ("smolvlm", 81, 2.246, LARGE | {"image_size": 384}, 3, dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=49280,
    )),
    "8b": ("idefics3", 169, 8.462, LARGE | {"image_size": 364}, 2, dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128259,
    )),
}  # fmt: skip


@pytest.mark.parametrize(
    "size", [size if size == QUICK else pytest.param(size, marks=pytest.mark.slow) for size in SIZES]
)
def test_every_tensor_of_the_published_sizes(size):
    kind, tokens, billions, vision, scale, text = SIZES[size]
    raw = {
        "model_type": kind,
        "image_token_id": text["vocab_size"] - 90,
        "scale_factor": scale,
        # Idefics3's file names its tower by the model; padding tokens lie behind small vocabularies.
        "vision_config": vision | {"model_type": "idefics3" if kind == "idefics3" else "smolvlm_vision"},
        "text_config": text | {"model_type": "llama", "pad_token_id": 2},
        "pad_token_id": 128002,
    }
    with torch.device("meta"):
        state = CLASSES[kind][1](CLASSES[kind][0].from_dict(raw)).state_dict()
    config = models.config_from_hf(raw)
    assert stored_shapes(config, "state_dict") == {name: tuple(t.shape) for name, t in state.items()}
    assert sum(tensor.numel() for tensor in state.values()) / 1e9 == pytest.approx(billions, abs=0.05)
    assert (config.vision.side // config.scale) ** 2 == tokens and config.pad_token_id == 2


@pytest.mark.parametrize(
    ("seen", "side"), [(6, 6), (5, 6), (2, 6), (1, 6), (26, 26), (17, 26), (27, 27), (32, 32)]
)
def test_positions_of_patches(seen, side):
    """Against transformers, for towers and pictures whose fractions lie on borders of the grid and between them."""
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

    config = AutoConfig.for_model(
        "smolvlm", vision_config={"hidden_size": 1, "image_size": side, "patch_size": 1}
    ).vision_config
    embeddings = SmolVLMVisionEmbeddings(config)
    embeddings.patch_embedding.weight.data.zero_()
    embeddings.patch_embedding.bias.data.zero_()
    embeddings.position_embedding.weight.data.copy_(torch.arange(side**2)[:, None])
    mask = np.zeros((1, side, side), bool)
    mask[:, :seen, : max(1, seen - 1)] = True
    with torch.no_grad():
        want = embeddings(torch.zeros(1, 3, side, side), torch.from_numpy(mask))[..., 0].numpy()
    np.testing.assert_array_equal(patch_positions(mask, side), want)


@pytest.fixture(scope="module", params=list(CLASSES))
def ours(request, tmp_path_factory):
    return with_processor(request.param, tmp_path_factory.mktemp("processor"))


def with_processor(kind, folder):
    """A model with a processor beside it, whose tokens are bytes; Idefics3 writes its marks letter by letter."""
    special = ["<image>", "<fake_token_around_image>", "<end_of_utterance>"]
    if kind == "smolvlm":
        special += ["<global-img>", *(f"<row_{i}_col_{j}>" for i in (1, 2, 3) for j in (1, 2, 3))]
    text = {"vocab_size": 259 + len(special), "max_position_embeddings": 2048}
    build(kind, folder, 12, text=text, image_token_id=259)
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    )
    pil = {"smolvlm": SmolVLMImageProcessorPil, "idefics3": Idefics3ImageProcessorPil}[kind]
    processor = Idefics3Processor(
        pil(size={"longest_edge": 72}, max_image_size={"longest_edge": 24}),
        byte_tokenizer(special),
        image_seq_len=4,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and kind == "smolvlm":  # as its repositories name it
            path.write_text(path.read_text().replace("Idefics3Processor", "SmolVLMProcessor"))
    return LVLM.from_pretrained(folder)


def test_messages_equal_the_processors_own_arrays(ours):
    generator = np.random.default_rng(1)
    sizes = [(40, 24), (10, 60), (24, 24)]
    pictures = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    parts = [{"type": "image", "image": picture} for picture in pictures]
    parts.insert(2, {"type": "text", "text": "a "})
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "b"}]}]
    prompt = ours.prepare(messages)
    want = ours.processor(images=pictures, text="<image><image>a <image>b", return_tensors="np")
    length = want["input_ids"].shape[1]
    np.testing.assert_array_equal(prompt.tokens[:, -length:], want["input_ids"])
    np.testing.assert_array_equal(prompt.pixels[prompt.owner >= 0], want["pixel_values"][0])
    # 72 x 44 pixels are 3 x 2 tiles, 12 x 72 are 1 x 3, 72 x 72 are 3 x 3, and each has the whole besides.
    assert [(prompt.owner == image).sum() for image in range(3)] == [7, 4, 10]
    assert [(prompt.image_id == image).sum() for image in (1, 2, 3)] == [28, 16, 40]


def test_pictures_that_are_not_cut(ours):
    picture = np.random.default_rng(2).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    arrays = ours.processor(
        images=[[picture, picture]], text="<image><image>b", return_tensors="np", do_image_splitting=False
    )
    prompt = ours.prepare(dict(arrays))
    assert prompt.image_id.max() == 2 and prompt.owner.tolist() == [0, 1]


def test_tiles_without_marks_are_images():
    tile = [9, 9]
    assert tiles_per_image(np.array([*tile, 1, *tile, 1]), 9, 2) == [1, 1]  # no fence in front
    assert tiles_per_image(np.array([1, *tile, 1, *tile]), 9, 2) == [1, 1]  # none behind
    assert tiles_per_image(np.array([1, *tile, *tile, 1]), 9, 2) == [1, 1]  # none between
    assert tiles_per_image(np.array([1, *tile, 1, *tile, 1, 1, *tile, 1]), 9, 2) == [2, 1]
    assert tiles_per_image(np.array([1, 2]), 9, 2) == []


@pytest.mark.parametrize("pair", ["smolvlm"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"pixel_values": a["pixel_values"][:, 0]}, "expected .samples, tiles, 3, side, side."),
        (
            lambda a: {"pixel_values": a["pixel_values"][..., :24, :]},
            "expected .samples, tiles, 3, side, side.",
        ),
        (
            lambda a: {"pixel_values": a["pixel_values"][..., :16, :16]},
            "expected .samples, tiles, 3, side, side.",
        ),
        (lambda a: {"pixel_values": a["pixel_values"] * np.nan}, "NaN"),
        (lambda a: {name: a[name][:, :3] for name in PIXELS}, "16 image tokens and its 3 tiles take 12"),
        (lambda a: {"pixel_values": None}, "16 image tokens"),
        (lambda a: {name: a[name][:, :-8] for name in TOKENS}, "do not truncate"),
        (
            lambda a: {"pixel_attention_mask": a["pixel_attention_mask"][..., 1:]},
            "pixel_attention_mask has shape",
        ),
        (lambda a: {"pixel_attention_mask": a["pixel_attention_mask"] * 0}, "upper left corner of tile 0"),
    ],
)
def test_bad_arrays(pair, change, message):
    inputs = random_inputs(pair[0].config, 4, [(4, (1, 2), 3, (0, 0), 2)])
    with pytest.raises(LVLMError, match=message):
        pair[1].prepare(inputs | change(inputs))


def test_configurations_that_are_refused():
    raw = configuration("smolvlm").to_dict()
    raw["vision_config"]["patch_size"] = [4, 4]
    with pytest.raises(LVLMError, match="patch_size .* not supported"):
        models.config_from_hf(raw)
