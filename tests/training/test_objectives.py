"""What holds for every objective, on the small model: a task that says what it is, learns, and ignores padding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lvlm_jax import models
from lvlm_jax.errors import LVLMError
from lvlm_jax.training import registry, settings
from lvlm_jax.training.data import pair_batches
from lvlm_jax.training.step import loss
from lvlm_jax.weights import lora
from tests.training import pair_sets

NAMES = [objective.name for objective in registry.all_objectives()]
# Strengths are learned in a way of their own, and have tests of their own.
OF_PARAMETERS = [name for name in NAMES if name != "learned_method"]
# Settings under which all parts of an objective act on so small a model.
CHANGES = {
    "capl": {"preference": {"rho": 0.6}},
    "kto": {"batch": 10},  # two answers of each pair
    "flow_alignment": {"flow": {"omega": 2.0, "kappa": 0.4, "start_layer": 0.0}},
}


def task_of(name, model, data, folder, **changes):
    config = pair_sets.config(data, recipe=name, **CHANGES.get(name, {}) | changes)
    settings.check(config)
    return registry.find(name).task(model, models.build(model.config), config, folder)


@pytest.fixture(scope="module", params=OF_PARAMETERS)
def made(request, model, tmp_path_factory):
    """(name, task, gradient, adapters, frozen): `gradient` of what is minimised, and the metrics."""
    folder = tmp_path_factory.mktemp(request.param)
    data = pair_sets.write(folder)
    task = task_of(request.param, model, data, folder, validation=str(data))

    def total(trainable, frozen, batch):
        metrics = task.objective(trainable, frozen, batch, None)
        return loss(metrics, task.terms, {name: metrics[name].count for name in task.terms}), metrics

    adapters, frozen = lora.attach(model.params, 4, 8.0, lora.TARGETS, 0.0, jax.random.key(0))
    rng = np.random.default_rng(5)  # a policy that is not the base
    moved = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.02, leaf.shape).astype(np.float32), adapters)
    return request.param, task, jax.jit(jax.value_and_grad(total, has_aux=True)), moved, frozen


def test_a_task_says_what_it_is(made):
    name, task, *_ = made
    assert task.name == name and all(weight > 0 for weight in task.terms.values())
    assert task.source.steps(epochs=4) == 4 and task.source.steps(epochs=0.1) == 1
    rows = getattr(task.source, "batches", task.source).rows
    assert task.describe(0).split(", ") == [rows[index].id for index in task.source(0)["ids"]]


def test_an_evaluation_without_dropout_has_the_metrics_of_a_batch_of_everything(made):
    name, task, gradient, adapters, frozen = made
    _, expected = gradient(adapters, frozen, task.source(0))[0]
    found = task.evaluate(adapters, frozen)
    shared = found.keys() & expected.keys()
    assert shared == expected.keys() or name == "flow_alignment"  # it measures both stages
    for metric in shared:
        np.testing.assert_allclose(found[metric].value, expected[metric].value, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing(made):
    """More columns, answer places, images and rows than needed: metrics and gradient stay."""
    _, task, gradient, adapters, frozen = made
    whole = task.source(0)
    source = getattr(task.source, "batches", task.source)
    order, rows, encoder = source.order(0), source.rows, source.encoder
    tight = pair_batches.shape_of(rows, encoder, len(rows))
    loose = pair_batches.Shape(tight.rows + 1, tight.length + 64, tight.answers + 64, tight.images + 3)
    padded = pair_batches.assemble(encoder, [rows[index] for index in order], order, loose)
    if "stage" in whole:
        padded["stage"] = np.ones(loose.rows, np.int32)
    (_, wanted), slope = gradient(adapters, frozen, whole)
    (_, found), change = gradient(adapters, frozen, padded)
    for name, mean in wanted.items():
        np.testing.assert_allclose(found[name].value, mean.value, rtol=1e-4, atol=1e-5, err_msg=name)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(slope))
    for one, other in zip(jax.tree.leaves(change), jax.tree.leaves(slope), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * largest)


def test_ten_steps_lower_what_is_minimised(made):
    _, task, gradient, adapters, frozen = made
    optimizer, batch = optax.adam(3e-3), task.source(0)
    state, update, values = optimizer.init(adapters), jax.jit(optimizer.update), []
    for _ in range(11):
        (value, _), change = gradient(adapters, frozen, batch)
        updates, state = update(change, state)
        adapters = jax.tree.map(jnp.add, adapters, updates)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("name", NAMES)
def test_data_must_be_given(model, tmp_path, name):
    with pytest.raises(LVLMError, match=r"data is not set; give a file of .*, as in --config.data=\w+\.jsonl"):
        task_of(name, model, "", tmp_path)
