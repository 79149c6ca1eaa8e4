"""Which files of a folder are the model: those that transformers would load."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lvlm_jax import LVLM, models, weights
from lvlm_jax.weights.checkpoint import weight_files
from tests.evaluation.builders import write_json
from tests.models.families import FAMILIES
from tests.refusals import refused
from tests.weights import checkpoints as make

LORA = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 4)}


def names(folder, *files) -> list[str]:
    """The names of the weight files once these are there too."""
    for name in files:
        (folder / name).touch()
    return [path.name for path in weight_files(folder)]


@pytest.mark.parametrize("whole", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_of_all_weights_beats_an_index_of_an_earlier_save(whole, tmp_path):
    write_json(tmp_path / f"{whole}.index.json", {"weight_map": {"a": "gone.safetensors"}})
    assert names(tmp_path, whole) == [whole]


def test_safetensors_beat_torch_files_and_a_folder_is_none(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert names(tmp_path, "pytorch_model.bin") == ["pytorch_model.bin"]
    shard = "model-00001-of-00001.safetensors"
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": shard}})
    assert names(tmp_path, shard) == [shard]


def test_a_stray_adapter_is_not_the_model(drawn, drawn_config, tmp_path):
    save_file(LORA, tmp_path / "adapter_model.safetensors")
    refused(r"has an adapter \(adapter_model.safetensors\).*adapter=", weight_files, tmp_path)
    torch.save(make.hub_tensors(drawn), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(drawn.config.to_dict()))
    assert names(tmp_path) == ["pytorch_model.bin"]
    weights.load_parameters(tmp_path, drawn_config)


QUANTIZED = {
    "AWQ": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "GPTQ": {"quant_method": "gptq", "bits": 4},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "FP8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "of an unnamed kind": 3,
}


def test_quantized_checkpoints_are_refused_by_name(drawn, tmp_path):
    """From the configuration alone, then from the tensors."""
    raw = drawn.config.to_dict()
    original = make.original_config("openai/clip-vit-large-patch14-336", 96) | {"mm_hidden_size": 1024}
    for kind, quantized in QUANTIZED.items():
        change = {"quantization_config": quantized}
        for config in (raw | change, raw | {"text_config": raw["text_config"] | change}, original | change):
            make.write_config(tmp_path, config)
            refused(rf"quantization_config.*\({kind}\).*full weights", LVLM.from_pretrained, tmp_path)
    for none in (None, {}):
        models.config_from_hf(raw | {"quantization_config": none})
    state, name = make.hub_tensors(drawn), "language_model.model.layers.0.self_attn.q_proj."
    del state[f"{name}weight"]
    state |= {f"{name}qweight": torch.zeros(6, 48, dtype=torch.int32), f"{name}scales": torch.zeros(1, 48)}
    folder = make.write(tmp_path / "m", raw, state)
    refused(r"has quantized weights \(q_proj.qweight\).*full weights", make.load, folder)


def test_a_flat_configuration_of_glm_is_the_nested_one():
    raw = FAMILIES["glm4v"].raw()
    text = dict(raw["text_config"])
    rope = text.pop("rope_parameters")
    text |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor")}
    text["rope_scaling"] = {"type": "default", "mrope_section": rope["mrope_section"]}
    flat = text | {name: value for name, value in raw.items() if name != "text_config"}
    config = models.config_from_hf(flat)
    assert config == models.config_from_hf(raw) and config.hf == flat
