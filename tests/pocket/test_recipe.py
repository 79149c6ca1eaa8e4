import dataclasses
import runpy
import sys

import jax
import numpy as np
import pytest

from configs.pocket import get_config
from lvlm_jax import LVLM, models
from lvlm_jax.cli import train
from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket import catalogue
from lvlm_jax.pocket import recipe as pocket
from lvlm_jax.pocket import recipe_data as pocket_data
from lvlm_jax.pocket.scenes import render, scene_at
from lvlm_jax.training import registry
from tests import small as small_model
from tests.training import line

HEADS = dict(num_attention_heads=4, num_key_value_heads=4)


def small(**changes):
    """The shipped recipe with a model and batches small enough for a test."""
    config = get_config()
    config.steps = 30
    config.evaluation_rows = 8
    config.loop.update(workers=0, log_every=5, evaluate_every=30, save_every=10)
    config.model.text.update(hidden_size=64, intermediate_size=96, num_hidden_layers=2, **HEADS)
    config.model.vision.update(hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    for stage in ("tower", "connector"):
        config[stage].update(batch=8, warmup=5)
    config.everything.update(warmup=5, single=dict(rows=3, length=256, images=3))
    config.everything.several.update(rows=1, length=320, images=4)
    config.update(changes)
    return config


@pytest.mark.slow
def test_thirty_steps_lower_the_loss_of_every_stage_and_the_export_answers(tmp_path):
    export = pocket.train(small(), tmp_path)
    for stage in ("tower", "connector", "everything"):
        records = [record for record in line.records(tmp_path) if record["stage"] == stage]
        losses = [record["objective"] for record in records if "objective" in record]
        assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
        measured = "val/existence/accuracy" if stage == "everything" else "val/pictures/patch_loss"
        assert sum(measured in record for record in records) == 1
    model = LVLM.from_pretrained(export)
    (asked,) = small_model.conversation("What is it?")
    asked["content"].insert(0, {"type": "image", "image": render(scene_at("test", 0))})
    assert 1 <= len(model.generate([asked], max_new_tokens=4).tokens[0]) <= 4
    assert model.config.text.tie_word_embeddings
    assert set(model.params) == {"language_model", "vision_tower", "connector"}
    assert (export / "model.safetensors").stat().st_size < 12e6


@pytest.mark.slow
def test_a_run_stopped_in_the_middle_of_a_stage_ends_in_the_same_weights(tmp_path):
    """Killed after 20 of 30 steps of the last stage: the newest checkpoint is all that is left."""
    config = small(stages=("everything",))
    recipe, settings = pocket.Recipe.create(config), pocket.settings_of(config, "everything")
    params = pocket.initial_parameters(recipe.module.config, 3)
    task = recipe.task("everything", settings)
    uninterrupted = pocket.loop.train(task, params, {}, settings, tmp_path / "whole")

    def killed(step):
        if step == 21:
            raise KeyError("killed")
        return task.source(step)

    with pytest.raises(KeyError, match="killed"):
        pocket.loop.train(dataclasses.replace(task, source=killed), params, {}, settings, tmp_path / "halves")
    resumed = pocket.loop.train(task, params, {}, settings, tmp_path / "halves")
    assert jax.tree.all(jax.tree.map(np.array_equal, resumed, uninterrupted))


def test_fresh_parameters_are_reproducible_and_of_the_right_size():
    shipped, config = (pocket.Recipe.create(one).module.config for one in (get_config(), small()))
    assert 2 * sum(leaf.size for leaf in jax.tree.leaves(models.abstract_parameters(shipped))) < 12e6  # in float16
    first, again, other = (pocket.initial_parameters(config, seed) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    kernel, changed = (one["language_model"]["layers_0"]["self_attn"]["q_proj"]["kernel"] for one in (first, other))
    np.testing.assert_allclose(kernel.std(), 64**-0.5, rtol=0.1)
    assert not np.array_equal(kernel, changed)


def test_patch_accuracy_counts_patches_with_objects_only():
    labels = np.array([[0, 1, len(catalogue.CATEGORIES), -1]])
    logits = np.zeros((1, 4, pocket_data.LABEL_COUNT), np.float32)
    logits[0, 0, 0] = logits[0, 1, 5] = logits[0, 2, 5] = 9
    found = pocket.patch_metrics(jax.numpy.asarray(logits), jax.numpy.asarray(labels))
    assert found["patch_accuracy"] == (1, 2)
    assert found["patch_loss"].count == 3


def test_complaints(tmp_path, monkeypatch, capsys):
    """Faults of the config are errors; the script `train.py` prints one line and exits with code 2."""
    words = ["--config", "configs/pocket.py", "--workdir", str(tmp_path)]
    with pytest.raises(LVLMError, match="stage 'polish' is unknown"):
        train.main([*words, "--config.stages=('polish',)"])
    with pytest.raises(LVLMError, match="nothing can be trained under PAI"):
        train.main([*words, "--config.everything.method=pai"])
    with pytest.raises(LVLMError, match=r"no key everything.step; did you mean everything.steps\?"):
        train.main([*words, "--config.everything.step=5"])
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--config.recipe=soup"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path("train.py", run_name="__main__")
    known = ", ".join(sorted({*registry.names(), "pocket"}))
    assert left.value.code == 2
    assert capsys.readouterr().err == f"lvlm train: recipe 'soup' is unknown; expected one of {known}\n"
