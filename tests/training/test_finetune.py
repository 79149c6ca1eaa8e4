"""A run from a checkpoint to an exported one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import LVLM, parallel
from lvlm_jax.errors import LVLMError
from lvlm_jax.training import finetune, records
from lvlm_jax.training.objectives import flow_alignment
from lvlm_jax.weights import lora, peft, quantize
from lvlm_jax.weights.tables import flatten, unflatten
from tests.training import line, pair_sets


def config_for(checkpoint, data, **changes):
    config = pair_sets.config(data, **{"recipe": "sft", "steps": 3, "batch": 4} | changes)
    config.model, config.optimizer.peak = checkpoint, 1e-2
    config.loop.update(workers=0, log_every=1)
    return config


def moved(before, after):
    """Paths of the parameters that differ."""
    after = flatten(after)
    return {path for path, leaf in flatten(before).items() if not np.array_equal(after[path], leaf)}


@pytest.fixture(scope="module")
def adapted(checkpoint, data, tmp_path_factory):
    """(work folder, config) of three steps of DPO with LoRA; the length is given in epochs, over 4 of 5 rows."""
    config = config_for(checkpoint, data, recipe="dpo", steps=0, epochs=2.4, validation=str(data))
    workdir = tmp_path_factory.mktemp("adapted")
    assert finetune.train(config, workdir) == workdir / "export"
    return workdir, config


def test_the_export_holds_the_base_and_the_adapter(adapted, model, mixed):
    """In the exported checkpoint only the targeted parameters have changed."""
    workdir, _ = adapted
    merged = LVLM.from_pretrained(workdir / "export")
    unmerged = LVLM(peft.load_adapter(workdir / "adapter", model.params, model.config), model.config)
    valid = mixed["attention_mask"].astype(bool)
    found, expected, plain = (np.asarray(one.logits(mixed))[valid] for one in (merged, unmerged, model))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(found - plain).max() > 1e-3
    assert json.loads((workdir / "adapter" / "adapter_config.json").read_text())["r"] == 16
    targeted = {path for path in flatten(model.params) if path.startswith("language_model/layers_") and "_proj" in path}
    assert moved(model.params, merged.params) == targeted


def test_what_is_logged_and_evaluated(adapted):
    records = line.records(adapted[0])
    assert [record["step"] for record in records] == [0, 1, 2, 3, 3]
    assert {"objective", "preference", "gradient_norm", "learning_rate"} <= records[1].keys()
    assert "val/preference" in records[-1]
    assert records[1]["preference"] == pytest.approx(np.log(2), abs=1e-6)  # policy and reference are the same
    assert records[0]["val/preference"] == pytest.approx(np.log(2), abs=1e-6)  # before the first step


def test_a_finished_run_is_exported_again_without_training(adapted, monkeypatch):
    workdir, config = adapted
    before = (workdir / "export" / "model.safetensors").read_bytes()
    (workdir / "export" / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(finetune.loop, "make_step", lambda *a: lambda *b: pytest.fail("a step was made"))
    finetune.train(config, workdir)
    assert (workdir / "export" / "model.safetensors").read_bytes() == before
    other = config.copy_and_resolve_references()
    other.lora.rank = 8
    message = r"another model \(.*lora_a is float32\[80, 16\] there and float32\[80, 8\] here\)"
    with pytest.raises(LVLMError, match=message):
        finetune.train(other, workdir)


def test_training_goes_on_from_an_adapter(adapted, checkpoint, data, model, tmp_path):
    """Policy and reference begin with the adapter, whose settings must be those of the run."""
    start = adapted[0] / "adapter"
    config = config_for(checkpoint, data, recipe="dpo", steps=1)
    config.lora.update(start=str(start), dropout=0.25)
    trainable, frozen = finetune.divide(finetune.load(config, parallel.make_mesh(1, 1, 1)).params, config)
    whole = flatten(peft.load_adapter(start, model.params, model.config))
    assert not moved(trainable, unflatten(whole)) and any(leaf.any() for leaf in jax.tree.leaves(trainable))
    rates = {float(leaf) for path, leaf in flatten(frozen).items() if path.endswith("lora_dropout")}
    assert rates == {0.25}
    config.lora.dropout = 0.0
    finetune.train(config, tmp_path)
    record, first = line.records(tmp_path)[0], line.records(adapted[0])[1]
    assert record["preference"] == pytest.approx(np.log(2), abs=1e-5)
    assert record["logps/chosen"] > first["logps/chosen"] + 1e-3
    assert moved(unflatten(whole), peft.load_adapter(tmp_path / "adapter", model.params, model.config))
    config.lora.update(rank=8, alpha=16.0)
    with pytest.raises(LVLMError, match=r"\(rank 8, alpha 16.0\); set --config.lora.rank=16 --config.lora.alpha=32.0"):
        finetune.load(config, None)


@pytest.mark.slow
def test_an_int8_base_is_trained_as_the_weights_that_it_stands_for(checkpoint, data, tmp_path):
    base = LVLM.from_pretrained(checkpoint, quant="int8")
    wide = LVLM(quantize.dequantize(base.params), base.config, base.folder)
    wide.save_pretrained(tmp_path / "wide")
    for model, quant in ((checkpoint, "int8"), (str(tmp_path / "wide"), "")):
        finetune.train(config_for(model, data, quant=quant), tmp_path / f"run{quant}")
    ours, expected = (line.records(tmp_path / run) for run in ("runint8", "run"))
    for name in ("objective", "gradient_norm"):
        assert [one[name] for one in ours] == pytest.approx([one[name] for one in expected], rel=1e-3)
    exported = LVLM.from_pretrained(tmp_path / "runint8" / "export").params
    merged = lora.merge(peft.load_adapter(tmp_path / "runint8" / "adapter", wide.params, wide.config))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), exported, merged)


def test_full_fine_tuning_in_bfloat16_keeps_float32_master_weights(checkpoint, data, model, tmp_path):
    config = config_for(checkpoint, data, lora={"enabled": False}, dtype="bfloat16", steps=1)
    config.train = r"^language_model/layers_1/|^connector/"
    trainable, frozen = finetune.divide(finetune.load(config, parallel.make_mesh(1, 1, 1)).params, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    kernel, base = (params["connector"]["linear_1"]["kernel"] for params in (trainable, model.params))
    np.testing.assert_array_equal(kernel, base)
    exported = LVLM.from_pretrained(finetune.train(config, tmp_path), dtype="bfloat16").params
    paths = moved(jax.tree.map(lambda leaf: leaf.astype("bfloat16"), model.params), exported)
    assert paths and all(path.startswith(("language_model/layers_1/", "connector/")) for path in paths)
    assert not (tmp_path / "adapter").exists()


def test_full_fine_tuning_keeps_the_base_for_a_recipe_that_needs_it(checkpoint, data, tmp_path, monkeypatch):
    """Flow alignment's teacher is the untrained model: after three steps the frozen part still has it."""
    seen = {}

    def train(task, trainable, frozen, *rest):
        seen.update(trainable=trainable, frozen=frozen)
        return trainable

    monkeypatch.setattr(finetune.loop, "train", train)
    finetune.train(config_for(checkpoint, data, recipe="flow_alignment", lora={"enabled": False}), tmp_path)
    assert not moved(seen["trainable"], seen["frozen"][flow_alignment.BASE])
    assert (tmp_path / "export" / "config.json").is_file()


def test_the_record_says_under_which_method_and_on_what_a_model_was_trained(checkpoint, data, tmp_path, monkeypatch):
    """SFT under CAPL, then DPO of what came out, under plain attention."""
    monkeypatch.setattr(finetune.loop, "train", lambda task, trainable, *rest: trainable)
    first = finetune.train(config_for(checkpoint, data, sft={"method": "capl:rho=0.8"}), tmp_path / "sft")
    finetune.train(config_for(str(first), data, recipe="dpo"), tmp_path / "dpo")
    said = records.read(tmp_path / "dpo" / "export")
    assert said == records.read(tmp_path / "dpo" / "adapter") and records.read(checkpoint) is None
    assert (said["recipe"], said["method"], said["model"]["name"]) == ("dpo", None, str(first))
    before = said["model"]["training"]
    assert before["recipe"] == "sft" and before["model"]["training"] is None
    assert (before["method"]["name"], before["method"]["rho"], before["method"]["mode"]) == ("CAPL", 0.8, "cross")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(train="nothing", lora={"enabled": False}), "matches nothing"),
        (dict(lora={"targets": "nothing"}), "matches nothing"),
        (dict(model="/no/such/folder"), "/no/such/folder"),
        (dict(data="/no/such/pairs.jsonl"), "/no/such/pairs.jsonl"),
        (dict(mesh={"data": 3}), "does not cover 1 devices"),
        (dict(length=50), r"\d of 5 rows are longer than 50 tokens, first \d with"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_one_line(checkpoint, data, tmp_path, changes, message):
    config = config_for(checkpoint, data)
    config.update(changes)
    with pytest.raises(LVLMError, match=message):
        finetune.train(config, tmp_path)
