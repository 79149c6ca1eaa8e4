"""LoRA adapters that PEFT loads, and adapters that PEFT saved, with the same logits on both sides."""

import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from lvlm_jax import LVLM
from lvlm_jax.cli import convert, infer
from lvlm_jax.generation.forward import full_forward
from lvlm_jax.journal import record
from lvlm_jax.weights import lora, parts, peft_settings
from lvlm_jax.weights.checkpoint import TRAINED
from lvlm_jax.weights.peft import CONFIG, WEIGHTS, load_adapter, save_adapter
from lvlm_jax.weights.tables import flatten, unflatten
from tests import checkpoints, small
from tests.checkpoints import IMAGE
from tests.killing import contents
from tests.refusals import refused
from tests.weights import checkpoints as make

EVERYWHERE = r"(_proj|fc\d|linear_\d|lm_head)$"
DECODER = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def question(torch_model):
    """One prompt with two images, unpadded."""
    return checkpoints.random_inputs(torch_model.config, seed=9, layouts=[(3, IMAGE, 2, IMAGE, 5)])


@pytest.fixture
def base(checkpoint):
    """A transformers model of the small checkpoint that PEFT may alter."""
    return LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()


def adapted(*arguments, **options):
    """Parameters with adapters whose B is not zero; see `make.adapted`."""
    return parts.join(*make.adapted(*arguments, **options))


def load_with_peft(base, folder):
    with warnings.catch_warnings():
        # PEFT only warns of tensors that are missing or left over.
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(base, folder).eval()


def assert_equal_logits(theirs, params, model, question):
    """Our logits equal theirs to 1e-5 of their spread, and differ from the base model's."""
    with torch.no_grad():
        expected = theirs(**checkpoints.to_torch(question)).logits.numpy()
    assert np.abs(np.asarray(model.logits(question)) - expected).max() > 0.05
    got = np.asarray(LVLM(params, model.config).logits(question))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * expected.std())


def saved_by_peft(base, folder, **settings):
    """PEFT's model of an adapter with random A and B, which PEFT saved in the folder."""
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(folder, save_embedding_layers=False)
    return theirs


@pytest.fixture(scope="module")
def params(model):
    """The small model with an adapter on the default targets."""
    return adapted(model.params, lora.TARGETS)


@pytest.fixture(scope="module")
def exported(model, params, tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("exported"), params, model.config, "some/base")


@pytest.fixture
def adapter(exported, tmp_path):
    """A folder with that adapter, for the test to alter."""
    return Path(shutil.copytree(exported, tmp_path / "adapter"))


@pytest.fixture
def load(model):
    """load(folder): the parameters of the small model with the adapter of a folder."""
    return lambda folder: load_adapter(folder, model.params, model.config)


@pytest.mark.parametrize(("targets", "rslora"), [(lora.TARGETS, False), (EVERYWHERE, True)], ids=["default", "rslora"])
def test_peft_loads_what_we_save(targets, rslora, base, model, question, load, tmp_path):
    params = adapted(model.params, targets, dropout=0.05, rslora=rslora)
    folder = save_adapter(tmp_path / "new" / "adapter", params, model.config, "some/base", rslora)
    assert {file.name for file in folder.iterdir()} == {CONFIG, WEIGHTS}
    theirs = load_with_peft(base, folder)
    modules = [name for name, one in theirs.named_modules() if isinstance(one, peft.tuners.lora.LoraLayer)]
    if targets == lora.TARGETS:
        names = {f"base_model.model.model.language_model.layers.{i}.{name}" for i in (0, 1) for name in DECODER}
        assert set(modules) == names
    assert len(modules) == sum(path.endswith("/lora_a") for path in flatten(params))
    assert_equal_logits(theirs, params, model, question)
    settings = theirs.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout, settings.use_rslora) == (3, 7, 0.05, rslora)
    assert settings.base_model_name_or_path == "some/base"
    make.assert_same(load(folder), params)


def test_ranks_and_scales_of_each_kind_survive(base, model, question, load, tmp_path):
    params = adapted(model.params, "layers_0/mlp", rank=2, alpha=10.0)
    for targets, rank, alpha in (("vision_tower/.*q_proj$", 3, 10.0), ("layers_1/mlp", 2, 1.0)):
        other = flatten(adapted(model.params, targets, rank, alpha, key=rank))
        params = unflatten({**flatten(params), **other})
    folder = save_adapter(tmp_path / "adapter", params, model.config)
    assert_equal_logits(load_with_peft(base, folder), lora.merge(params), model, question)
    make.assert_same(load(folder), params)


SUFFIXES = {"target_modules": ["q_proj", "down_proj", "fc1", "linear_2"]}
RANKS = {"down_proj": 5, r"vision_tower\..*\.q_proj": 1}
PEFT_SETTINGS = {
    "suffixes": SUFFIXES | {"lora_dropout": 0.1},
    "expression": {"target_modules": r".*language_model.*\.(o|up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["lm_head"]},
    "patterns": SUFFIXES | {"rank_pattern": RANKS, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
    "rslora": SUFFIXES | {"use_rslora": True, "init_lora_weights": "gaussian"},
    "left out": SUFFIXES | {"exclude_modules": r".*vision_tower.*"},
    "one layer": SUFFIXES | {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("name", PEFT_SETTINGS)
def test_we_load_what_peft_saves(name, base, model, question, load, tmp_path):
    theirs = saved_by_peft(base, tmp_path, r=3, lora_alpha=8, **PEFT_SETTINGS[name])
    params = load(tmp_path)
    assert_equal_logits(theirs, lora.merge(params), model, question)
    rates = {float(leaf) for path, leaf in flatten(params).items() if path.endswith("lora_dropout")}
    assert rates == ({np.float32(0.1)} if name == "suffixes" else set())
    if name == "head":
        # PEFT stores the whole output layer beside its adapter, as it does when it was trained too: it takes the place
        # of the base.
        theirs.base_model.model.lm_head.base_layer.weight.data.mul_(1.5)
        theirs.save_pretrained(tmp_path, save_embedding_layers=True)
        assert_equal_logits(theirs, lora.merge(load(tmp_path)), model, question)
        message = "replaces .*lm_head/kernel, which is int8.*without quant"
        refused(message, LVLM.from_pretrained, model.folder, adapter=tmp_path, quant="int8")


def test_gradients_of_pefts_adapter_are_pefts(base, model, question, load, tmp_path):
    """Training continues from the adapter, on the mean cross-entropy of the prompt's own tokens."""
    of_decoder = r".*language_model.*(q|down)_proj"
    theirs = saved_by_peft(base, tmp_path, r=3, lora_alpha=8, use_rslora=True, target_modules=of_decoder)
    logits = theirs(**checkpoints.to_torch(question)).logits[0, :-1]
    targets = torch.from_numpy(question["input_ids"][0, 1:]).long()
    torch.nn.functional.cross_entropy(logits, targets).backward()
    expected = {name.replace(".default", ""): one.grad for name, one in theirs.named_parameters() if "lora_" in name}
    adapters, frozen = lora.detach_adapters(load(tmp_path), "language_model/.*(q|down)_proj$", 0.0)
    prompt = model.prepare(question)
    (_, _, embedded, _), options = model.prefill_arguments(prompt)

    def loss(adapters):
        params = parts.join(adapters, frozen)
        logits, _ = full_forward(params, model.config, embedded, None, options["tail_rows"], 2)
        return optax.softmax_cross_entropy_with_integer_labels(
            logits[0, -len(targets) - 1 : -1], targets.numpy()
        ).mean()

    # Written as an adapter, gradients have PEFT's names; its embeddings were made without the tower's adapters.
    found = save_adapter(tmp_path / "gradients", parts.join(jax.grad(loss)(adapters), frozen), model.config)
    found = {name: tensor for name, tensor in load_file(found / WEIGHTS).items() if "language_model" in name}
    assert len(found) == 2 * 2 * 2
    for name, tensor in found.items():
        scale = expected[name].abs().max()
        assert scale > 1e-4 and (tensor - expected[name]).abs().max() < 1e-4 * scale, name
    message = r"the adapter, which does not change .*; set lora.targets='language_model/\.\*\(down_proj\|q_proj\)\$'"
    refused(message, lora.detach_adapters, load(tmp_path), lora.TARGETS, 0.0)


@pytest.mark.parametrize("names", [make.HUB, make.ORIGINAL], ids=["transformers 4", "original"])
def test_names_that_other_versions_give(names, params, load, adapter):
    prefix = "base_model.model."
    state = load_file(adapter / WEIGHTS)
    renamed = make.renamed(state, *((prefix + old, prefix + new) for old, new in names))
    assert not renamed.keys() & state.keys()
    save_file(renamed, adapter / WEIGHTS)
    make.change_config(adapter, {"target_modules": None}, CONFIG)
    make.assert_same(load(adapter), params)


def test_adapters_are_merged_when_saved(model, adapter, question, tmp_path):
    ours = LVLM.from_pretrained(model.folder, adapter=adapter)
    assert any("lora_a" in path for path in flatten(ours.params))
    ours.save_pretrained(tmp_path / "saved")
    assert convert.main([str(model.folder), str(tmp_path / "converted"), "--adapter", str(adapter)]) == 0
    saved, converted = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "converted"))
    assert saved.keys() == converted.keys()
    assert all(torch.equal(tensor, converted[name]) for name, tensor in saved.items())
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert_equal_logits(loaded, lora.merge(ours.params), model, question)


def test_the_command_line_takes_an_adapter(model, params, adapter):
    words = ["--model-path", str(model.folder), "--adapter", str(adapter), "--prompt", "?"]
    loaded = infer.load(infer.command_line(words))
    make.assert_same(loaded.params, params)
    ours = flatten(LVLM.from_pretrained(model.folder, dtype="bfloat16", adapter=adapter).params)
    for path, leaf in flatten(params).items():  # bfloat16 parameters take a float32 adapter
        expected = leaf if "lora" in path else leaf.astype(jnp.bfloat16)
        assert ours[path].dtype == expected.dtype
        np.testing.assert_array_equal(ours[path], expected)
    # A job that goes on with another adapter would mix answers.
    first = record.adapter_record(str(adapter))
    save_file({name: -tensor for name, tensor in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS)
    assert first != record.adapter_record(str(adapter)) and record.adapter_record(None) == {}


def test_kinds_of_adapters_that_are_not_supported(load, adapter):
    settings = json.loads((adapter / CONFIG).read_text())
    for change, message in (
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only LORA"), ({"modules_to_save": ["lm_head"]}, "modules_to_save = "),
        ({"use_dora": True}, "use_dora = True, which is not supported"), ({"bias": "all"}, "bias = 'all'"),
        ({"layer_replication": [[0, 1]], "lora_bias": True}, "layer_replication = .*, lora_bias = True"),
        ({"some_future_kind": {"a": 1}}, "some_future_kind = "), ({"use_rslora": "no"}, "use_rslora is 'no'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"), ({"r": 10**400}, "r is 1000"),
        ({"r": None}, "r is None; expected a positive number"), ({"r": 2.5}, "r is 2.5; expected a whole number"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"), ({"lora_alpha": True}, "lora_alpha is True"),
        ({"target_modules": 3}, "3 is neither a list of modules nor an expression"),
        ({"target_modules": [["q_proj"]]}, "neither a list of modules nor"),
        ({"target_modules": "("}, "not a regular expression"), ({"rank_pattern": {"(": 2}}, "not a regular expression"),
        ({"target_modules": "a{99999999999999999999}"}, "not a regular expression"),
        ({"alpha_pattern": {"q_proj": np.nan}}, "q_proj is nan"), ({"rank_pattern": {"q_proj": 0}}, "q_proj is 0"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is .*expected an object"),
        ({"lora_dropout": 1}, "lora_dropout is 1"), ({"layers_to_transform": [[1]]}, "layers_to_transform is "),
    ):  # fmt: skip
        (adapter / CONFIG).write_text(json.dumps(settings | change))
        assert str(adapter) in refused(message, load, adapter)


def test_ranks_written_with_a_decimal_point_are_whole_numbers(adapter):
    rank = json.loads((adapter / CONFIG).read_text())["r"]
    make.change_config(adapter, {"r": float(rank), "rank_pattern": {"q_proj": 4.0}}, CONFIG)
    settings = peft_settings.read_settings(adapter)
    assert [(type(one), one) for one in (settings["r"], settings["rank_pattern"]["q_proj"])] == [(int, rank), (int, 4)]


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "rank_pattern"])
def test_an_expression_that_runs_for_ever(name, load, adapter):
    first = 4 if name == "rank_pattern" else 2  # PEFT puts two groups in front
    endless = "(.+)" * 9 + "".join(rf"(?:x|.\{number})" for number in range(first, first + 4))
    make.change_config(adapter, {name: {endless: 2} if name == "rank_pattern" else endless}, CONFIG)
    refused("takes too long; write the modules as a list", load, adapter)


def test_all_that_is_wrong_with_the_tensors_is_said_at_once(load, adapter):
    state = load_file(adapter / WEIGHTS)
    start = "base_model.model.model.language_model.layers."
    for name in ("0.mlp.up_proj.lora_A", "1.mlp.up_proj.lora_A", "1.mlp.up_proj.lora_B"):
        del state[f"{start}{name}.weight"]
    state[f"{start}7.mlp.up_proj.lora_A.weight"] = torch.zeros(3, 48)
    state[f"{start}0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 48)
    name = f"{start}0.self_attn.k_proj.lora_A.weight"
    state[name] = state[name].to(torch.int32)
    save_file(state, adapter / WEIGHTS)
    message = refused(f"1 unexpected: {start}7.mlp.up_proj.lora_A.weight", load, adapter)
    assert all(part in message for part in ("3 missing", "1 misshapen", "1 not floating-point"))


def test_an_adapter_of_a_tied_output_layer_says_what_to_do(tmp_path):
    base = checkpoints.make_llava(tmp_path / "m", 3, **small.OVERRIDES, tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved_by_peft(base, tmp_path / "a", r=2, target_modules=["lm_head", "q_proj"])
    message = "lm_head, which this model ties to its embedding: .*merge the adapter"
    refused(message, LVLM.from_pretrained, tmp_path / "m", adapter=tmp_path / "a")


def test_a_folder_of_llavas_own_training(base, model, question, load, tmp_path):
    """Adapters of the decoder alone under endings that the tower has too, and the trained projector beside them."""
    names = [f"model.language_model.layers.{i}.self_attn.{one}_proj" for i in range(2) for one in "qv"]
    theirs = saved_by_peft(base, tmp_path, r=2, lora_alpha=4, target_modules=names)
    projector = theirs.base_model.model.model.multi_modal_projector
    trained = {}
    for number, layer in (("0", projector.linear_1), ("2", projector.linear_2)):
        for kind, parameter in layer.named_parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 6)
            trained[f"base_model.model.model.mm_projector.{number}.{kind}"] = parameter.data.clone()
    pairs = [("base_model.model.model.language_model.", "base_model.model.model.")]
    adapters = make.renamed(load_file(tmp_path / WEIGHTS), *pairs)
    save_file(adapters, tmp_path / WEIGHTS)
    torch.save(trained, tmp_path / "non_lora_trainables.bin")
    make.change_config(tmp_path, {"target_modules": ["q_proj", "v_proj"]}, CONFIG)
    params = load(tmp_path)
    assert_equal_logits(theirs, lora.merge(params), model, question)
    assert not any("vision_tower" in path for path in flatten(params) if "lora" in path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(adapters, tmp_path / "adapter_model.bin")
    make.assert_same(load(tmp_path), params)
    for name in TRAINED[:2]:
        (tmp_path / "non_lora_trainables.bin").rename(tmp_path / name)
        make.assert_same(load(tmp_path), params)
        (tmp_path / name).rename(tmp_path / "non_lora_trainables.bin")
    for held, message in (  # what was trained besides must fit
        ({"base_model.model.model.mm_projector.0.weight": torch.zeros(3, 3)}, r"misshapen: .*\[3, 3\]"),
        ({"base_model.model.model.mm_projector.4.weight": torch.zeros(3)}, "unexpected: .*mm_projector.4"),
        ({"model.mm_projector.0.weight": torch.zeros(2, dtype=torch.int8)}, "misshapen"),
        ({"a": print}, "cannot read"),
        ([torch.zeros(2)], "no state dict|not a state dict"),
    ):
        torch.save(held, tmp_path / "non_lora_trainables.bin")
        assert "non_lora_trainables.bin" in refused(message, load, tmp_path)


def test_adapters_of_other_models_and_files_that_are_not_there(base, model, params, load, adapter, tmp_path):
    saved_by_peft(base, tmp_path / "other", r=2, target_modules=["embed_tokens"])
    refused("unexpected: .*embed_tokens.lora_embedding_A", load, tmp_path / "other")
    save_file({}, tmp_path / "other" / WEIGHTS)
    refused("adapts no projection of this model", load, tmp_path / "other")
    refused("already have a LoRA adapter", load_adapter, adapter, params, model.config)  # one kernel takes one
    refused("have no LoRA adapter", save_adapter, adapter, model.params, model.config)
    (adapter / WEIGHTS).rename(adapter / "adapter_model.gguf")
    message = r"no adapter_model\.safetensors and no adapter_model\.bin in .*, only adapter_model\.gguf; "
    refused(message, load, adapter)
    (adapter / CONFIG).unlink()
    refused(r"no adapter_config\.json", load, adapter)
    refused("no such folder", load, tmp_path / "absent")


def test_an_adapter_is_replaced_whole_or_not_at_all(model, load, adapter, monkeypatch):
    before = contents(adapter)
    other = adapted(model.params, lora.TARGETS, rank=2, key=8)

    def full(file, tensors, fetch):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("lvlm_jax.weights.peft.write_tensors", full)
        refused("No space left", save_adapter, adapter, other, model.config)
    assert contents(adapter) == before
    refused("cannot be written", save_adapter, adapter / CONFIG / "below", other, model.config)
    save_adapter(adapter, other, model.config)
    make.assert_same(load(adapter), other)
