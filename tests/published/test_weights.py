"""Configurations and indexes of weights that were really published."""

import difflib
import json

import pytest
from transformers import CONFIG_MAPPING

from lvlm_jax import models
from lvlm_jax.errors import LVLMError
from lvlm_jax.verification import tensors
from lvlm_jax.verification.results import PASSED
from lvlm_jax.weights import model_config, original
from lvlm_jax.weights.save import stored_shapes
from tests.models.families import FAMILIES
from tests.models.test_published import transformers_state
from tests.published import folders

# Ours -> transformers' name in the decoder's configuration.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
}


@folders.of(folders.configured)
def test_a_configuration_is_read_as_transformers_reads_it(folder):
    config, raw = model_config(folder), folders.raw(folder)
    assert config.eos_token_ids and max(config.eos_token_ids) < config.text.vocab_size
    given = {**raw, **raw.get("text_config", {}), **raw.get("llm_config", {})}
    if raw["model_type"] in CONFIG_MAPPING and "text_config" in raw:  # with transformers' defaults
        given = CONFIG_MAPPING[raw["model_type"]].from_dict(raw).text_config.to_dict() | given
    # An authors' LLaVA gets rows for two tokens; Qwen counts both halves of its gated MLP, and we end where it would
    # stretch its positions.
    otherwise = {"vocab_size"} if original.is_original(raw) else set()
    otherwise |= {"intermediate_size", "max_position_embeddings"} if raw["model_type"] == "qwen" else set()
    for ours, theirs in FIELDS.items():
        if theirs in given and theirs not in otherwise:
            assert getattr(config.text, ours) == given[theirs], ours


@folders.of(folders.quantized)
def test_quantized_weights_are_refused_by_their_kind(folder):
    kind = folders.raw(folder)["quantization_config"]["quant_method"]
    with pytest.raises(LVLMError, match=f"(?i)its weights are quantized .{kind}"):
        model_config(folder)


@folders.of(folders.indexed, folders.configured)
def test_every_tensor_of_an_index_has_its_place(folder):
    """By name; and by size, where the index states one: shapes that were wrong would have another sum."""
    config, parameters = folders.known(folder)
    result = tensors.of_index(folders.index(folder), config, parameters)
    assert result.status == PASSED, result.words
    stated = result.figures["total_size"]
    if stated:
        # An authors' LLaVA has no rows for the tokens that we add, and a buffer of 64 float32 numbers a layer.
        original = result.figures["scheme"] == "original"
        rows = 2 * 64 * config.text.hidden_size if original else 0
        buffers = 4 * 64 * config.text.num_layers if original else 0
        assert stated == 2 * (result.figures["parameters"] - rows) + buffers


@folders.of(folders.indexed, folders.configured)
def test_shapes_are_those_of_transformers(folder):
    raw = folders.raw(folder)
    if raw["model_type"] not in FAMILIES or "vision_config" not in raw or raw["model_type"] == "qwen_vl":
        pytest.skip("transformers has no class for it")
    want = {name: tuple(tensor.shape) for name, tensor in transformers_state(raw["model_type"], raw).items()}
    assert stored_shapes(folders.known(folder)[0], "state_dict", folders.known(folder)[1]) == want


@folders.of(folders.indexed, lambda folder: not folders.raw(folder))
def test_an_index_alone_fits_the_configuration_of_a_kin(folder):
    candidates = [one for one in folders.FOLDERS if folders.configured(one)]
    if not candidates:
        pytest.skip("no configuration beside it")
    kin = max(candidates, key=lambda one: difflib.SequenceMatcher(None, one.name, folder.name).ratio())
    result = tensors.of_index(folders.index(folder), *folders.known(kin))
    assert result.status == PASSED, result.words
    assert result.figures["total_size"] in (0, 2 * result.figures["parameters"])


@folders.of(folders.indexed, folders.quantized)
def test_names_of_quantized_weights_are_those_of_the_full_ones(folder):
    names = json.loads(folders.index(folder).read_text())["weight_map"].keys()
    packed = {name.removesuffix("qweight") for name in names if name.endswith(".qweight")}
    own = (".qzeros", ".scales", ".g_idx")
    names = {name.replace(".qweight", ".weight") for name in names if not name.endswith(own)}
    config = models.config_from_hf({k: v for k, v in folders.raw(folder).items() if k != "quantization_config"})
    _, _, missing, unexpected = tensors.compare_names(names, config, models.abstract_parameters(config))
    assert not missing
    assert all(name.removesuffix("bias") in packed for name in unexpected)  # GPTQ gives each kernel a bias
