"""The key tables against transformers' own classes at full size, on the meta device: names and shapes, no memory."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from lvlm_jax import models
from lvlm_jax.weights.save import stored_shapes
from lvlm_jax.weights.tables import LINEAR, SAME, Table, flatten, inverse, permuted, table_for

SIZES = {
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "13b": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
}
TOWER = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
TOWER |= dict(image_size=336, patch_size=14)


SMALL = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, vocab_size=96)


def build(size: str, **text) -> LlavaForConditionalGeneration:
    text = {"model_type": "llama", "vocab_size": 32064} | SIZES.get(size, SMALL) | text
    with torch.device("meta"):
        vision = TOWER | {"model_type": "clip_vision_model"}
        return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


@pytest.mark.parametrize(
    ("size", "text", "billions"),
    [
        ("7b", {}, 7.06),
        ("13b", {}, 13.35),
        ("small", {"attention_bias": True, "mlp_bias": True}, 0.303),
        ("small", {"model_type": "qwen2"}, 0.303),
        ("small", {"model_type": "qwen3", "head_dim": 16}, 0.303),
        ("small", {"model_type": "mistral", "head_dim": 16}, 0.303),
    ],
)
def test_every_tensor_of_the_classes_maps_by_exactly_one_row(size, text, billions):
    model = build(size, **text)
    config = models.config_from_hf(model.config.to_dict())
    state = model.state_dict()
    assert stored_shapes(config, "state_dict") == {name: tuple(t.shape) for name, t in state.items()}
    assert sum(tensor.numel() for tensor in state.values()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_all_schemes_give_every_parameter_its_own_name():
    config = models.config_from_hf(build("7b").config.to_dict())
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
        assert isinstance(table_for(SimpleNamespace(model_type=model_type)), Table)


def test_axes():
    for axes in (SAME, LINEAR, (2, 3, 1, 0)):
        shape = tuple(range(10, 10 + len(axes or (0,))))
        assert permuted(permuted(shape, axes), inverse(axes)) == shape
    assert permuted((7,), LINEAR) == (7,)
