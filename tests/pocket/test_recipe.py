import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.pocket import get_config
from lvlm_jax import LVLM
from lvlm_jax.cli import train
from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket import catalogue
from lvlm_jax.pocket import recipe as pocket
from lvlm_jax.pocket import recipe_data as pocket_data
from lvlm_jax.pocket.scenes import render, scene_at
from lvlm_jax.training import registry

pytestmark = pytest.mark.full_compiler  # bit-equal to what another process learns

ROOT = Path(__file__).resolve().parents[2]


def small(**changes):
    """The shipped recipe with a model and batches small enough for a test."""
    config = get_config()
    config.steps = 30
    config.evaluation_rows = 8
    config.loop.update(workers=0, log_every=5, evaluate_every=30, save_every=10)
    config.model.text.update(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4
    )
    config.model.vision.update(hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    for stage in ("tower", "connector"):
        config[stage].update(batch=8, warmup=5)
    config.everything.update(warmup=5, single=dict(rows=3, length=256, images=3))
    config.everything.several.update(rows=1, length=320, images=4)
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, pocket.train(small(), folder)


def logged(folder, stage, name):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record[name] for record in records if record["stage"] == stage and name in record]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tower", "connector", "everything"])
def test_thirty_steps_lower_the_loss_of_every_stage(run, stage):
    losses = logged(run[0], stage, "objective")
    assert len(losses) == 6
    assert losses[-1] < 0.8 * losses[0]
    assert (
        len(logged(run[0], stage, "val/existence/accuracy" if stage == "everything" else "val/pictures/patch_loss"))
        == 1
    )


@pytest.mark.slow
def test_the_exported_checkpoint_answers_a_question(run):
    model = LVLM.from_pretrained(run[1])
    picture = render(scene_at("test", 0))
    message = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]}
    ]
    out = model.generate(message, max_new_tokens=4)
    assert 1 <= len(out.tokens[0]) <= 4
    assert model.config.text.tie_word_embeddings and set(model.params) == {
        "language_model",
        "vision_tower",
        "connector",
    }
    assert (run[1] / "model.safetensors").stat().st_size < 12e6


@pytest.mark.slow
def test_a_run_stopped_in_the_middle_of_a_stage_ends_in_the_same_weights(tmp_path):
    """Killed after 20 of 30 steps of the last stage: the newest checkpoint is all that is left."""
    config = small(stages=("everything",))
    recipe = pocket.Recipe.create(config)
    params = pocket.initial_parameters(recipe.module.config, 3)
    settings = pocket.settings_of(config, "everything")
    task = recipe.task("everything", settings)
    uninterrupted = pocket.loop.train(task, params, {}, settings, tmp_path / "whole")

    def killed(step):
        if step == 21:
            raise KeyError("killed")
        return task.source(step)

    broken = dataclasses.replace(task, source=killed)
    with pytest.raises(KeyError, match="killed"):
        pocket.loop.train(broken, params, {}, settings, tmp_path / "halves")
    resumed = pocket.loop.train(task, params, {}, settings, tmp_path / "halves")
    assert jax.tree.all(jax.tree.map(np.array_equal, resumed, uninterrupted))


def test_fresh_parameters_are_reproducible_and_of_the_right_size():
    module = pocket.Recipe.create(get_config()).module
    first, again, other = (pocket.initial_parameters(module.config, seed) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    kernel = first["language_model"]["layers_0"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_allclose(kernel.std(), 192**-0.5, rtol=0.05)
    assert not np.array_equal(kernel, other["language_model"]["layers_0"]["self_attn"]["q_proj"]["kernel"])
    assert 2 * sum(leaf.size for leaf in jax.tree.leaves(first)) < 12e6  # bytes in float16


def test_patch_accuracy_counts_patches_with_objects_only():
    labels = np.array([[0, 1, len(catalogue.CATEGORIES), -1]])
    logits = np.zeros((1, 4, pocket_data.LABEL_COUNT), np.float32)
    logits[0, 0, 0] = logits[0, 1, 5] = logits[0, 2, 5] = 9
    found = pocket.patch_metrics(jax.numpy.asarray(logits), jax.numpy.asarray(labels))
    assert found["patch_accuracy"] == (1, 2)
    assert found["patch_loss"].count == 3


def test_an_unknown_stage_is_named(tmp_path):
    with pytest.raises(LVLMError, match="stage 'polish' is unknown"):
        pocket.train(small(stages=("polish",)), tmp_path)


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--config.stages=('polish',)", "stage 'polish' is unknown"),
        ("--config.everything.step=5", "no key everything.step; did you mean everything.steps?"),
        ("--workdri=x", "Unknown command line flag 'workdri'"),
    ],
)
def test_the_command_line_complains(tmp_path, flag, complaint):
    with pytest.raises(LVLMError, match=re.escape(complaint)):
        train.main(["--config", str(ROOT / "configs/pocket.py"), "--workdir", str(tmp_path), flag])


def test_a_complaint_is_one_line_and_exit_code_2(tmp_path):
    words = ["--config", "configs/pocket.py", "--workdir", str(tmp_path), "--config.recipe=soup"]
    done = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    known = ", ".join(sorted({*registry.names(), "pocket"}))
    assert done.stderr.splitlines() == [f"lvlm train: recipe 'soup' is unknown; expected one of {known}"]
