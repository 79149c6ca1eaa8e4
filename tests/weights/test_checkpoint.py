"""Which files of a folder are the model: those that transformers would load."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lvlm_jax import LVLM, models, weights
from lvlm_jax.errors import LVLMError
from lvlm_jax.weights.checkpoint import weight_files
from tests.models.families import FAMILIES
from tests.weights import checkpoints as make

LORA = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 4)}


def names(folder) -> list[str]:
    return [path.name for path in weight_files(folder)]


def touch(folder, *files):
    for name in files:
        (folder / name).touch()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_file_of_all_weights_beats_an_index_of_an_earlier_save(suffix, tmp_path):
    whole = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    touch(tmp_path, whole)
    (tmp_path / f"{whole}.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert names(tmp_path) == [whole]


def test_safetensors_beat_torch_files(tmp_path):
    touch(tmp_path, "model-00001-of-00001.safetensors", "pytorch_model.bin")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert names(tmp_path) == ["model-00001-of-00001.safetensors"]


def test_a_stray_adapter_is_not_the_model(tmp_path):
    model = make.random_model()
    save_file(LORA, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LVLMError, match=r"holds an adapter \(adapter_model.safetensors\).*adapter="):
        weight_files(tmp_path)
    torch.save(make.renamed(make.tensors(model), *make.HUB), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    assert names(tmp_path) == ["pytorch_model.bin"]
    weights.load_parameters(tmp_path, make.config_of(tmp_path))


def test_a_folder_in_the_place_of_a_file_is_none(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    touch(tmp_path, "pytorch_model.bin")
    assert names(tmp_path) == ["pytorch_model.bin"]


QUANTIZED = {
    "AWQ": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "GPTQ": {"quant_method": "gptq", "bits": 4},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "FP8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "of an unnamed kind": 3,
}


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("part", [None, "text_config"])
def test_quantized_checkpoints_are_refused_by_name_from_the_configuration_alone(kind, part, tmp_path):
    raw = make.random_model().config.to_dict()
    (raw if part is None else raw[part])["quantization_config"] = QUANTIZED[kind]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(LVLMError, match=rf"quantization_config.*\({kind}\).*full weights"):
        LVLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("none", [None, {}])
def test_an_empty_quantization_is_none(none):
    raw = make.random_model().config.to_dict() | {"quantization_config": none}
    models.config_from_hf(raw)


def test_an_original_checkpoint_says_so_too(tmp_path):
    raw = make.original_config("openai/clip-vit-large-patch14-336", 96)
    raw |= {"mm_hidden_size": 1024, "quantization_config": QUANTIZED["bitsandbytes"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(LVLMError, match="bitsandbytes"):
        weights.model_config(tmp_path)


def test_tensors_of_a_quantized_checkpoint_are_named_as_such(tmp_path):
    model = make.random_model()
    state = make.renamed(make.tensors(model), *make.HUB)
    name = "language_model.model.layers.0.self_attn.q_proj."
    del state[f"{name}weight"]
    state |= {f"{name}qweight": torch.zeros(6, 48, dtype=torch.int32), f"{name}scales": torch.zeros(1, 48)}
    folder = make.write(tmp_path / "m", model.config.to_dict(), state)
    with pytest.raises(LVLMError, match=r"holds quantized weights \(q_proj.qweight\).*full weights"):
        weights.load_parameters(folder, make.config_of(folder))


def test_a_flat_configuration_of_glm_is_the_nested_one():
    raw = FAMILIES["glm4v"].raw()
    nested = models.config_from_hf(raw)
    text = dict(raw["text_config"])
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_scaling": {"type": "default", "mrope_section": rope["mrope_section"]},
    }
    rest = {name: value for name, value in raw.items() if name != "text_config"}
    flat = text | rest
    config = models.config_from_hf(flat)
    assert config == nested and config.hf == flat
