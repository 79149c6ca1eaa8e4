"""CAPL and DPO as tasks, on the small model: one forward, the right reference, padding without effect."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lvlm_jax import models
from lvlm_jax.methods import CAPL
from lvlm_jax.training import forward, pairwise
from lvlm_jax.training.data import pair_batches
from lvlm_jax.training.step import loss
from lvlm_jax.weights import lora, parts
from lvlm_jax.weights.tables import flatten, unflatten
from tests.reference import capl as reference
from tests.reference import llava
from tests.reference.preference import Losses, sequence_logits, token_logprobs
from tests.training import pair_sets
from tests.training.pair_sets import PAIRS, config

RHO = 0.6  # of 16 tokens of an image; a share that leaves several out
RANK = 4


@pytest.fixture(scope="module")
def module(model):
    return models.build(model.config)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pair_sets.write(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def encoder(model):
    return pair_batches.Encoder(model.processor, model.config)


@pytest.fixture(scope="module")
def adapted(model):
    """(adapters, frozen) with factors that change the model visibly."""
    adapters, frozen = lora.attach(model.params, RANK, 8.0, lora.TARGETS, 0.0, jax.random.key(0))
    rng = np.random.default_rng(5)
    drawn = {
        path: jnp.asarray(rng.normal(0, 0.05, leaf.shape), jnp.float32) for path, leaf in flatten(adapters).items()
    }
    return unflatten(drawn), frozen


def make(model, module, data, tmp_path, **changes):
    return pairwise.task(model, module, config(data, **changes), tmp_path)


def values(metrics):
    return {name: float(mean.value) for name, mean in metrics.items()}


@pytest.fixture(scope="module")
def capl(model, module, data, tmp_path_factory):
    """(task, gradient): CAPL over all pairs at once, and (trainable, frozen, batch) -> (gradient, metrics)."""
    task = make(model, module, data, tmp_path_factory.mktemp("capl"), method="capl", rho=RHO, nll=1.0)

    def total(trainable, frozen, batch):
        metrics = task.objective(trainable, frozen, batch, None)
        return loss(metrics, task.terms, {name: metrics[name].count for name in task.terms}), metrics

    return task, jax.jit(jax.grad(total, has_aux=True))


@pytest.fixture(scope="module")
def expected(capl, adapted):
    """The metrics of all pairs under the adapted model."""
    task, gradient = capl
    return values(gradient(*adapted, task.source(0))[1])


def numpy_logprobs(torch_model, params, batch, name, cross):
    """Per pair the log-probabilities of one answer, from the NumPy model with the weights of `params`."""
    weights, shape = _numpy_model(torch_model, params)
    images, found = iter(batch["images"]), []
    for index in range(len(batch["ids"])):
        rows = {key: array[index] for key, array in batch[name].items()}
        ids = rows["tokens"][rows["image_id"] >= 0]
        pixels = [next(images) for _ in range(rows["image_id"].max())]
        logits = sequence_logits(weights, shape, ids, pixels, reference.Capl(rho=str(RHO)) if cross else None)
        found.append(token_logprobs(logits, ids, len(ids) - rows["answers"].sum()))
    return found


def _numpy_model(torch_model, params):
    """The reference's weights with the language model's kernels of `params`, adapters merged."""
    weights, shape = llava.from_torch(torch_model)
    flat = flatten(lora.merge(params))
    for name in [name for name in weights if re.search(r"language_model\.layers.*_proj\.weight$", name)]:
        layer, block, projection = name.split(".")[-4:-1]
        kernel = flat[f"language_model/layers_{layer}/{block}/{projection}/kernel"]
        weights[name] = np.asarray(kernel, np.float64).T
    return weights, shape


def test_right_padded_rows_have_the_logits_of_left_padded_ones(model, module, capl):
    """The training forward computes what `LVLM.logits` does, for every token."""
    batch, method = capl[0].source(0), CAPL(rho=RHO)
    sequence, valid = batch["chosen"], batch["chosen"]["image_id"] >= 0

    @jax.jit
    def forwards(params, sequence, images):
        image_tokens = forward.encode_images(module, params, images)
        embedded = forward.embed(module, params, sequence["tokens"], image_tokens)
        decoded = forward.decode(module, params, sequence["image_id"], embedded, method, image_count=2)
        every = module.apply({"params": params}, decoded.hidden[0], method="head")
        return every, *forward.answer_logits(module, params, decoded.hidden[0], sequence)

    found, logits, targets, mask = forwards(model.params, sequence, batch["images"])
    arrays = {"input_ids": sequence["tokens"], "attention_mask": valid}
    count = sum(images for _, images, _, _ in PAIRS)
    expected = model.logits(arrays | {"pixel_values": batch["images"][:count]}, method)
    np.testing.assert_allclose(found[valid], expected[valid], atol=2e-5)
    for row in range(len(valid)):
        places = np.flatnonzero(sequence["answers"][row])
        np.testing.assert_array_equal(targets[row, mask[row]], sequence["tokens"][row, places])
        np.testing.assert_allclose(logits[row, mask[row]], expected[row, places - 1], atol=2e-5)


def test_capl_equals_numpy(torch_model, capl, adapted, expected):
    """Both under cross-image attention: the policy with its adapters, the reference without."""
    batch = capl[0].source(0)
    answers = [
        numpy_logprobs(torch_model, params, batch, name, cross=True)
        for params in (parts.join(*adapted), adapted[1])
        for name in pair_batches.PAIR
    ]
    wanted = Losses("sigmoid", 0.1, 0.0, 1.0).mean(list(zip(*answers, strict=True)))
    for name, value in expected.items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)
    plain = numpy_logprobs(torch_model, adapted[1], batch, "chosen", cross=False)
    assert max(np.abs(one - other).max() for one, other in zip(plain, answers[2], strict=True)) > 1e-2


def test_plain_ipo_equals_numpy(model, torch_model, module, data, tmp_path, adapted):
    task = make(model, module, data, tmp_path, loss="ipo", beta=0.2)
    batch = task.source(0)
    answers = [
        numpy_logprobs(torch_model, params, batch, name, cross=False)
        for params in (parts.join(*adapted), adapted[1])
        for name in pair_batches.PAIR
    ]
    wanted = Losses("ipo", 0.2).mean(list(zip(*answers, strict=True)))
    found = values(jax.jit(task.objective)(*adapted, batch, None))
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_fresh_adapter_is_the_reference(model, capl):
    fresh = lora.attach(model.params, RANK, 8.0, lora.TARGETS, 0.0, jax.random.key(0))
    task, gradient = capl
    found = values(gradient(*fresh, task.source(0))[1])
    assert found["preference"] == pytest.approx(np.log(2), abs=1e-6)
    for name in ("rewards/margin", "rewards/chosen", "drift"):
        assert found[name] == pytest.approx(0, abs=1e-6)


def test_the_tower_runs_once_for_both_answers_policy_and_reference(model, capl, adapted):
    task = capl[0]
    batch = task.source(0)

    def towers(trainable, frozen):
        traced = jax.make_jaxpr(task.objective)(trainable, frozen, batch, None)
        return str(traced).count("conv_general_dilated[")

    assert towers(*adapted) == 1
    connector = lora.attach(model.params, 2, 4.0, r"connector/linear_1$", 0.0, jax.random.key(0))
    assert towers(*connector) == 2  # the reference's own image tokens


def test_neither_an_adapter_of_the_connector_nor_dropout_reaches_the_reference(model, capl):
    adapters, frozen = lora.attach(model.params, 2, 4.0, r"connector/linear_1$", 0.5, jax.random.key(0))
    task = capl[0]
    score, batch = jax.jit(task.objective), task.source(0)
    moved = jax.tree.map(lambda leaf: leaf + 0.3, adapters)
    fresh, first, second, again = (
        values(score(trainable, frozen, batch, jax.random.key(number)))
        for trainable, number in ((adapters, 1), (moved, 1), (moved, 2), (moved, 1))
    )
    assert fresh["drift"] == pytest.approx(0, abs=1e-6) and first["drift"] > 0.01
    assert first == again and abs(first["logps/chosen"] - second["logps/chosen"]) > 1e-3
    base = [found["logps/chosen"] - found["rewards/chosen"] / 0.1 for found in (fresh, first, second)]
    assert base == pytest.approx([fresh["logps/chosen"]] * 3, rel=1e-5)


def test_a_few_steps_raise_the_margin(model, capl):
    trainable, frozen = lora.attach(model.params, RANK, 8.0, lora.TARGETS, 0.0, jax.random.key(0))
    task, gradient = capl
    optimizer = optax.adam(3e-3)
    state, history = optimizer.init(trainable), []
    update = jax.jit(optimizer.update)
    for index in range(12):
        change, metrics = gradient(trainable, frozen, task.source(index))
        updates, state = update(change, state)
        trainable = jax.tree.map(jnp.add, trainable, updates)
        history.append(values(metrics))
    first, last = history[0], history[-1]
    assert last["rewards/margin"] > 0.2 > abs(first["rewards/margin"])
    assert last["rewards/accuracy"] == 1 and last["preference"] < first["preference"]
    assert last["nll"] < first["nll"] and last["drift"] > first["drift"]


def test_a_precomputed_reference_is_the_same(model, module, data, tmp_path, adapted, expected):
    """On held-out pairs, each of which counts once, and in training batches; full fine-tuning has no other."""
    changes = dict(method="capl", rho=RHO, nll=1.0, reference="precomputed", batch=2, validation=str(data))
    task = make(model, module, data, tmp_path, **changes, lora={"enabled": False})
    found = task.evaluate(*adapted)
    assert found["preference"].count == len(PAIRS)
    assert values(found) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    batch = task.source(0)
    for sequence, name in enumerate(pair_batches.PAIR):
        known = batch["reference"][:, sequence] != 0
        np.testing.assert_array_equal(known.sum(axis=1), batch[name]["answers"].sum(axis=1))
    assert len(list((tmp_path / "reference").iterdir())) == 1  # both files have the same pairs


def test_a_likelihood_without_weight_is_no_term(model, module, data, tmp_path):
    assert make(model, module, data, tmp_path, nll=0.5).terms == {"preference": 1.0, "nll": 0.5}
    assert make(model, module, data, tmp_path).terms == {"preference": 1.0}


def test_the_cross_image_attention_can_be_set(data):
    chosen = config(data, method="capl", rho=0.9, sigma=0.25)
    assert pairwise.method_of(chosen.preference) == CAPL(rho=0.9, sigma=0.25)
    assert pairwise.method_of(config(data).preference) is None
