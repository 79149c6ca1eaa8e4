"""LoRA adapters of projections that torch keeps in one module: GLM's gate and up, towers' query, key and value."""

import chex
import pytest
from safetensors.torch import load_file
from transformers import Glm4vForConditionalGeneration

from lvlm_jax import LVLM
from lvlm_jax.weights import lora
from lvlm_jax.weights.peft import WEIGHTS, load_adapter, save_adapter
from lvlm_jax.weights.tables import flatten, unflatten
from tests.models.families.patches import GLM4V
from tests.models.families.qwen_vl import QWEN_VL
from tests.refusals import refused
from tests.weights import checkpoints
from tests.weights.test_peft import adapted, assert_equal_logits, load_with_peft, saved_by_peft

FUSED = r"(gate_proj|up_proj|vision_tower/.*_proj)$"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(folder of a GLM-4.1V, ours, one prompt with a picture)."""
    folder = tmp_path_factory.mktemp("glm4v")
    theirs = GLM4V.build(folder)
    return folder, LVLM.from_pretrained(folder), GLM4V.inputs(theirs.config, 9, [(3, (4, 4), 5)])


@pytest.fixture
def base(case):
    """A model of transformers that PEFT may alter."""
    return Glm4vForConditionalGeneration.from_pretrained(case[0], attn_implementation="eager").float().eval()


def saved_and_loaded(params, model, folder):
    """Saves the adapter of `params` and checks that it merges to the same weights when loaded. Returns its folder."""
    save_adapter(folder, params, model.config)
    again = lora.merge(load_adapter(folder, model.params, model.config))
    chex.assert_trees_all_close(again, lora.merge(params), rtol=0, atol=1e-6)
    return folder


def test_peft_loads_what_we_save(case, base, tmp_path):
    """Every projection with an A, some with a rank or a scale of their own, and a query without its key."""
    _, ours, inputs = case
    params = adapted(ours.params, FUSED, rank=2, alpha=6.0)
    for targets, rank, alpha in ((r"layers_1/mlp/up_proj$", 3, 5.0), (r"language_model/.*q_proj$", 2, 2.0)):
        params = unflatten(flatten(params) | flatten(adapted(ours.params, targets, rank, alpha, key=rank)))
    missing = "vision_tower/layers_0/self_attn/k_proj/lora"
    params = unflatten({path: leaf for path, leaf in flatten(params).items() if missing not in path})
    folder = saved_and_loaded(params, ours, tmp_path / "adapter")
    assert_equal_logits(load_with_peft(base, folder), lora.merge(params), ours, inputs)


def test_we_load_what_peft_saves_and_save_it_as_it_was(case, base, tmp_path):
    _, ours, inputs = case
    settings = dict(r=3, lora_alpha=8, target_modules=["gate_up_proj", "qkv", "o_proj"], lora_dropout=0.1)
    theirs = saved_by_peft(base, tmp_path / "theirs", **settings)
    params = load_adapter(tmp_path / "theirs", ours.params, ours.config)
    assert_equal_logits(theirs, lora.merge(params), ours, inputs)
    save_adapter(tmp_path / "ours", params, ours.config)
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all((tensor == after[name]).all() for name, tensor in before.items())
    checkpoints.assert_same(load_adapter(tmp_path / "ours", ours.params, ours.config), params)


def test_heads_that_take_turns_in_a_tensor(tmp_path):
    """Qwen-VL's tower stores query, key and value head by head, its decoder all queries, then all keys and values."""
    QWEN_VL.build(tmp_path, 14)
    ours = LVLM.from_pretrained(tmp_path)
    params = adapted(ours.params, r"(language_model|vision_tower)/.*(q|k|v)_proj$", rank=2)
    folder = saved_and_loaded(params, ours, tmp_path / "adapter")
    modules = [(f"h.{i}.attn.c_attn", f"visual.transformer.resblocks.{i}.attn.in_proj") for i in (0, 1)]
    names = {f"base_model.model.transformer.{module}" for pair in modules for module in pair}
    assert {name.split(".lora_")[0] for name in load_file(folder / WEIGHTS)} == names
    other = adapted(ours.params, "connector/q_proj$")
    refused("connector/q_proj cannot be saved: PEFT has no linear module", save_adapter, folder, other, ours.config)
