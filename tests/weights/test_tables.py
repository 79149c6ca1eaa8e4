"""The key tables against transformers' own classes at full size, on the meta device: names and shapes, no memory."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from lvlm_jax import models
from lvlm_jax.weights.save import stored_shapes
from lvlm_jax.weights.tables import LINEAR, SAME, Table, flatten, inverse, permute, table_for

NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40), "small": (48, 80, 2, 4)}
TOWER = dict(zip(NAMES, (1024, 4096, 24, 16), strict=True)) | dict(image_size=336, patch_size=14)


def build(size: str, **text) -> LlavaForConditionalGeneration:
    fields = {"model_type": "llama", "vocab_size": 32064} | dict(zip(NAMES, SIZES[size], strict=True))
    if size == "small":
        fields |= {"num_key_value_heads": 2, "vocab_size": 96}
    with torch.device("meta"):
        vision = TOWER | {"model_type": "clip_vision_model"}
        return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=fields | text))


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
    table, paths = table_for(config), flatten(models.abstract_parameters(config))
    claimed: dict[str, list[str]] = {}
    for scheme in table.schemes:
        names = table.names(paths, scheme)
        assert len(names) == len(paths)
        for name, path in names.items():  # one that two schemes share must mean the same parameter in both
            assert claimed.setdefault(name, path) == path


def test_every_registered_family_has_a_table():
    for model_type in models.FAMILIES:
        assert isinstance(table_for(SimpleNamespace(model_type=model_type)), Table)
    for axes in (SAME, LINEAR, (2, 3, 1, 0)):
        shape = tuple(range(10, 10 + len(axes or (0,))))
        assert permute(permute(shape, axes), inverse(axes)) == shape
    assert permute((7,), LINEAR) == (7,)
