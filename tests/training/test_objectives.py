"""Every objective on the small model: its task has a record, learns, and ignores padding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.training import registry
from lvlm_jax.training.data import pair_batches
from tests.slow import named
from tests.training import pair_sets

# Settings under which all parts of an objective act on so small a model.
CHANGES = {
    "capl": {"preference": {"rho": 0.6}},
    "kto": {"batch": 10},  # two answers of each pair
    "flow_alignment": {"flow": {"omega": 2.0, "kappa": 0.4, "start_layer": 0.0}},
}


# Strengths are learned in a way of their own, and have tests of their own.
NAMES = [name for name in registry.names() if name != "learned_method"]


def objectives(quick):
    """Runs a test for every objective; quick are those in some words, whose data or whose terms no other one has."""
    slow = set(NAMES) - set(quick.split())
    return pytest.mark.parametrize("made", named(NAMES, slow), indirect=True, scope="module")


@pytest.fixture(scope="module")
def made(request, model, data, fresh, tmp_path_factory):
    """(name, task, gradient, adapters, frozen)"""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    task = pair_sets.task(model, data, folder, name, validation=str(data), **CHANGES.get(name, {}))
    rng = np.random.default_rng(5)  # a policy that is not the base
    moved = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.02, leaf.shape).astype(np.float32), fresh[0])
    return name, task, pair_sets.gradient(task), moved, fresh[1]


@pytest.mark.parametrize("name", registry.names())
def test_data_must_be_given(model, tmp_path, name):
    with pytest.raises(LVLMError, match=r"data is not set; give a file of .*, as in --config.data=\w+\.jsonl"):
        pair_sets.task(model, "", tmp_path, name)


@objectives(quick=" ".join(NAMES))
def test_a_task_says_what_it_is(made):
    name, task, *_ = made
    assert task.name == name and all(weight > 0 for weight in task.terms.values())
    assert task.source.steps(epochs=4) == 4 and task.source.steps(epochs=0.1) == 1
    rows = getattr(task.source, "batches", task.source).rows
    assert task.describe(0).split(", ") == [rows[index].id for index in task.source(0)["ids"]]


@objectives(quick="flow_alignment kto")
def test_an_evaluation_without_dropout_has_the_metrics_of_a_batch_of_everything(made):
    name, task, gradient, adapters, frozen = made
    _, expected = gradient(adapters, frozen, task.source(0))[0]
    found = task.evaluate(adapters, frozen)
    shared = found.keys() & expected.keys()
    assert shared == expected.keys() or name == "flow_alignment"  # it measures both stages
    for metric in shared:
        np.testing.assert_allclose(found[metric].value, expected[metric].value, rtol=1e-4, atol=1e-5)


@objectives(quick="flow_alignment kto mdpo sft")
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


@objectives(quick="flow_alignment kto mdpo orpo sft simpo")
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
