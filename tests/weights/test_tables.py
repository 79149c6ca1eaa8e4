"""The key tables against transformers' own classes at full size, on the meta device: names and shapes, no memory."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lvlm_jax import models
from lvlm_jax.weights.save import stored_shapes
from lvlm_jax.weights.tables import LINEAR, SAME, Row, Table, flatten, inverse, permuted, table_for

SIZES = {
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "13b": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
}
TOWER = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)


def build(size: str, **text) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**SIZES[size], vocab_size=32064, **text),
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("size, billions", [("7b", 7.06), ("13b", 13.35)])
def test_every_tensor_of_the_full_size_classes_maps_by_exactly_one_row(size, billions):
    model = build(size)
    config = models.config_from_hf(model.config.to_dict())
    state = model.state_dict()
    assert stored_shapes(config, "state_dict") == {name: tuple(t.shape) for name, t in state.items()}
    assert sum(tensor.numel() for tensor in state.values()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize(
    "text",
    [
        dict(model_type="llama", attention_bias=True, mlp_bias=True),
        dict(model_type="qwen2"),
        dict(model_type="qwen3", head_dim=16),
        dict(model_type="mistral", head_dim=16),
    ],
    ids=lambda text: text["model_type"],
)
def test_every_decoder_family(text):
    sizes = dict(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    hf = LlavaConfig(vision_config=TOWER | {"model_type": "clip_vision_model"}, text_config=sizes | text)
    with torch.device("meta"):
        state = LlavaForConditionalGeneration(hf).state_dict()
    config = models.config_from_hf(hf.to_dict())
    assert stored_shapes(config, "state_dict") == {name: tuple(t.shape) for name, t in state.items()}


def test_all_schemes_give_every_parameter_its_own_name():
    model = build("7b")
    config = models.config_from_hf(model.config.to_dict())
    table = table_for(config)
    paths = flatten(models.abstract_parameters(config))
    claimed: dict[str, list[str]] = {}
    for scheme in table.schemes:
        names = table.names(paths, scheme)
        assert len(names) == len(paths)
        for name, path in names.items():
            # A name that two schemes share must mean the same parameter in both.
            assert claimed.setdefault(name, path) == path


def test_every_registered_family_has_a_table():
    for model_type in models.FAMILIES:

        class Config:
            pass

        Config.model_type = model_type
        assert isinstance(table_for(Config), Table)


@pytest.mark.parametrize(
    "rows",
    [
        (Row("a", "x/kernel", "x.weight"), Row("a", "x/kernel", "y.weight")),
        (Row("a", "x/kernel", "x.weight"), Row("a", "y/kernel", "x.weight")),
    ],
)
def test_two_rows_for_one_tensor_are_refused(rows):
    with pytest.raises(ValueError, match="same tensor"):
        Table(rows=rows, schemes={})


def test_axes():
    for axes in (SAME, LINEAR, (2, 3, 1, 0)):
        shape = tuple(range(10, 10 + len(axes or (0,))))
        assert permuted(permuted(shape, axes), inverse(axes)) == shape
    assert permuted((7,), LINEAR) == (7,)
