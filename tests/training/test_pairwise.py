"""CAPL and DPO as tasks, on the small model: one forward, the right reference, values and gradients as in NumPy."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from lvlm_jax.methods import CAPL, CMAC
from lvlm_jax.training import forward, one_row, pairwise
from lvlm_jax.training.data.pair_batches import PAIR
from lvlm_jax.weights import lora, parts
from lvlm_jax.weights.tables import flatten, unflatten
from tests.reference import capl as reference
from tests.reference import llava
from tests.reference.preference import Losses, sequence_logits, token_logprobs
from tests.slow import named
from tests.training import pair_sets
from tests.training.pair_sets import PAIRS, values

RHO = 0.6  # of 16 tokens of an image; a share that leaves several out
CROSS = reference.Capl(rho=str(RHO))


def drawn(like, seed, scale):
    rng = np.random.default_rng(seed)
    return unflatten({path: rng.normal(0, scale, leaf.shape).astype("f") for path, leaf in flatten(like).items()})


@pytest.fixture(scope="module")
def adapted(fresh):
    """(adapters, frozen) with factors that change the model visibly."""
    return drawn(fresh[0], seed=5, scale=0.05), fresh[1]


@pytest.fixture(scope="module")
def capl(model, data, tmp_path_factory):
    """(task, gradient): CAPL over all pairs at once."""
    task = pair_sets.task(model, data, tmp_path_factory.mktemp("capl"), method="capl", rho=RHO, nll=1.0)
    return task, pair_sets.gradient(task)


@pytest.fixture(scope="module")
def found(capl, adapted):
    """The metrics of all pairs under the adapted model, and the gradient."""
    (_, metrics), gradient = capl[1](*adapted, capl[0].source(0))
    return values(metrics), gradient


@pytest.fixture(scope="module")
def logprobs(torch_model):
    """(parameters, batch, method) -> per pair those of both answers, from the NumPy model with adapters merged."""
    weights, shape = llava.from_torch(torch_model)

    def compute(params, batch, method):
        flat, moved = flatten(params), dict(weights)
        for name in weights:
            if re.search(r"language_model\.layers.*_proj\.weight$", name):
                layer, block, projection = name.split(".")[-4:-1]
                own = f"language_model/layers_{layer}/{block}/{projection}"
                product = np.float64(flat[f"{own}/lora_a"]) @ flat[f"{own}/lora_b"] if f"{own}/lora_a" in flat else 0
                moved[name] = (np.float64(flat[f"{own}/kernel"]) + 2.0 * product).T
        images, pairs = iter(batch["images"]), []
        for row in range(len(batch["ids"])):
            pixels, answers = [next(images) for _ in range(batch["chosen"]["image_id"][row].max())], []
            for name in PAIR:
                ids = batch[name]["tokens"][row][batch[name]["image_id"][row] >= 0]
                logits = sequence_logits(moved, shape, ids, pixels, method)
                answers.append(token_logprobs(logits, ids, len(ids) - batch[name]["answers"][row].sum()))
            pairs.append(answers)
        return pairs

    return compute


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
    count = sum(images for _, images, _, _ in PAIRS)
    arrays = {"input_ids": sequence["tokens"], "attention_mask": valid, "pixel_values": batch["images"][:count]}
    expected = model.logits(arrays, method)
    np.testing.assert_allclose(found[valid], expected[valid], atol=2e-5)
    for row in range(len(valid)):
        places = np.flatnonzero(sequence["answers"][row])
        np.testing.assert_array_equal(targets[row, mask[row]], sequence["tokens"][row, places])
        np.testing.assert_allclose(logits[row, mask[row]], expected[row, places - 1], atol=2e-5)


def test_capl_and_its_gradient_equal_numpy(capl, adapted, found, logprobs):
    """Both under cross-image attention: the policy with its adapters, the reference without.

    The gradient is taken along a random direction, against central differences in float64.
    """
    batch, losses = capl[0].source(0), Losses("sigmoid", 0.1, 0.0, 1.0)
    base = logprobs(adapted[1], batch, CROSS)

    def means(trainable):
        policy = logprobs(parts.join(trainable, adapted[1]), batch, CROSS)
        return losses.mean([(*one, *other) for one, other in zip(policy, base, strict=True)])

    wanted = means(adapted[0])
    assert found[0] == pytest.approx({name: wanted[name] for name in found[0]}, rel=1e-5, abs=1e-5)
    plain = logprobs(adapted[1], batch, None)
    assert max(np.abs(one[0] - other[0]).max() for one, other in zip(plain, base, strict=True)) > 1e-2
    direction = drawn(adapted[0], seed=2, scale=0.05)
    up, down = (
        means(jax.tree.map(lambda x, v, step=step: np.float64(x) + step * v, adapted[0], direction))["objective"]
        for step in (1e-4, -1e-4)
    )
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, v: np.sum(np.float64(g) * v), found[1], direction)))
    assert abs(slope) > 1e-2
    np.testing.assert_allclose(slope, (up - down) / 2e-4, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", named(["none", "capl"], slow=["none"]))
def test_a_pair_in_one_row_is_a_pair_in_two(method, model, data, tmp_path, adapted, monkeypatch):
    """The same loss and gradient; layers that the method leaves alone keep attention by blocks."""
    found = []
    for pays in (True, False):
        monkeypatch.setattr(one_row, "pays", lambda *_, pays=pays: pays)
        task = pair_sets.task(model, data, tmp_path, method=method, rho=RHO, nll=1.0)
        gradient, batch = pair_sets.gradient(task), task.source(0)
        (_, metrics), slopes = gradient(*adapted, batch)
        found.append((values(metrics), slopes))
        assert str(gradient.trace(*adapted, batch).jaxpr).count("name=streaming_attention") > 0
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5, abs=1e-5)
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6), *(one[1] for one in found)
    )


def test_what_stays_two_rows(module, capl):
    """Rows are not shared for long answers, 16 bits, methods that count tokens, sliding windows, rejected images."""
    config, batch = module.config, capl[0].source(0)
    length, answers = (batch["chosen"][name].shape[1] for name in ("tokens", "columns"))
    scorer = pairwise.Scorer(module, CAPL(rho=RHO), 2)
    assert scorer.in_one_row(batch) == (2 * answers <= length)
    assert not scorer.in_one_row(batch | {"rejected_pictures": {}})
    assert one_row.pays(config, np.float32, None, 64, 32)
    windowed = dataclasses.replace(config, text=dataclasses.replace(config.text, sliding_window=(8, None)))
    for given in ((config, np.float32, None, 64, 33), (config, "bfloat16", None, 64, 32),
                  (config, np.float32, CMAC(), 64, 32), (windowed, np.float32, None, 64, 32)):  # fmt: skip
        assert not one_row.pays(*given)


def test_plain_ipo_equals_numpy(model, data, tmp_path, adapted, logprobs):
    task = pair_sets.task(model, data, tmp_path, loss="ipo", beta=0.2)
    batch = task.source(0)
    policy, base = (logprobs(params, batch, None) for params in (parts.join(*adapted), adapted[1]))
    wanted = Losses("ipo", 0.2).mean([(*one, *other) for one, other in zip(policy, base, strict=True)])
    found = values(jax.jit(task.objective)(*adapted, batch, None))
    assert found == pytest.approx({name: wanted[name] for name in found}, rel=1e-5, abs=1e-5)


def test_a_fresh_adapter_is_the_reference(fresh, capl):
    found = values(capl[1](*fresh, capl[0].source(0))[0][1])
    assert found["preference"] == pytest.approx(np.log(2), abs=1e-6)
    assert [found[name] for name in ("rewards/margin", "rewards/chosen", "drift")] == pytest.approx([0] * 3, abs=1e-6)


def test_the_tower_runs_once_for_both_answers_policy_and_reference(model, capl, adapted):
    def towers(trainable, frozen):
        traced = jax.make_jaxpr(capl[0].objective)(trainable, frozen, capl[0].source(0), None)
        return str(traced).count("conv_general_dilated[")

    assert towers(*adapted) == 1
    connector = lora.attach_adapters(model.params, 2, 4.0, r"connector/linear_1$", 0.0, jax.random.key(0))
    assert towers(*connector) == 2  # the reference's own image tokens


def test_neither_an_adapter_of_the_connector_nor_dropout_reaches_the_reference(model, capl):
    adapters, frozen = lora.attach_adapters(model.params, 2, 4.0, r"connector/linear_1$", 0.5, jax.random.key(0))
    score, batch = jax.jit(capl[0].objective), capl[0].source(0)
    moved = jax.tree.map(lambda leaf: leaf + 0.3, adapters)
    fresh, first, second, again = (
        values(score(trainable, frozen, batch, jax.random.key(number)))
        for trainable, number in ((adapters, 1), (moved, 1), (moved, 2), (moved, 1))
    )
    assert fresh["drift"] == pytest.approx(0, abs=1e-6) and first["drift"] > 0.01
    assert first == again and abs(first["logps/chosen"] - second["logps/chosen"]) > 1e-3
    base = [found["logps/chosen"] - found["rewards/chosen"] / 0.1 for found in (fresh, first, second)]
    assert base == pytest.approx([fresh["logps/chosen"]] * 3, rel=1e-5)


def test_a_precomputed_reference_is_the_same(model, data, tmp_path, adapted, found):
    """On held-out pairs, each of which counts once, and in training batches; full fine-tuning has no other."""
    changes = dict(method="capl", rho=RHO, nll=1.0, reference="precomputed", batch=2, validation=str(data))
    task = pair_sets.task(model, data, tmp_path, **changes, lora={"enabled": False})
    metrics = task.evaluate(*adapted)
    assert metrics["preference"].count == len(PAIRS)
    assert values(metrics) == pytest.approx(found[0], rel=1e-4, abs=1e-5)
    batch = task.source(0)
    for sequence, name in enumerate(PAIR):
        known = batch["reference"][:, sequence] != 0
        np.testing.assert_array_equal(known.sum(axis=1), batch[name]["answers"].sum(axis=1))
    assert len(list((tmp_path / "reference").iterdir())) == 1  # both files have the same pairs


def test_a_reference_is_computed_before_where_pairs_are_seen_again(model, data, tmp_path, adapted, found):
    changes = dict(method="capl", rho=RHO, nll=1.0)
    once, twice = (pair_sets.task(model, data, tmp_path, steps=steps, **changes) for steps in (1, 2))
    off = pair_sets.task(model, data, tmp_path, steps=2, reference="adapter_off", **changes)
    assert ["reference" in one.source(0) for one in (once, twice, off)] == [False, True, False]
    (_, metrics), slopes = pair_sets.gradient(twice)(*adapted, twice.source(0))
    assert values(metrics) == pytest.approx(found[0], rel=1e-5, abs=1e-5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), slopes, found[1])


def test_settings_become_terms_and_a_method(model, data, tmp_path):
    assert pair_sets.task(model, data, tmp_path, nll=0.5).terms == {"preference": 1.0, "nll": 0.5}
    assert pair_sets.task(model, data, tmp_path).terms == {"preference": 1.0}
    chosen = pair_sets.config(data, method="capl", rho=0.9, sigma=0.25)
    assert pairwise.method_of(chosen.preference) == CAPL(rho=0.9, sigma=0.25)
    assert pairwise.method_of(pair_sets.config(data).preference) is None
