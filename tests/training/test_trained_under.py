"""Training under a method: the logits are those of a generation under it, the gradient is right, others are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import forcing
from lvlm_jax.methods.parse import as_method
from lvlm_jax.training import forward, trained_under
from lvlm_jax.training.data.pair_batches import in_order
from tests.methods.entries import ENTRIES, build
from tests.slow import named
from tests.training import pair_sets

TRAINABLE = {"capl", "vaf", "nullu", "vti"}  # with the settings of ENTRIES, VTI on a plain tower
MORE = [
    "capl:mode=truncated,variant=code-qwen",
    "cmac:imd=false,gamma=3",
    "dab:decode=true",
    "capl:rho=0.6+vaf:layers=0",
]


def built(model, name):
    sizes = {"L": model.config.text.num_layers, "E": model.config.text.hidden_size}
    method = build(name, **sizes) if name in ENTRIES else as_method(name)
    return dataclasses.replace(method, lambda_image=0) if name == "vti" else method


SLOW = ("capl", "nullu", "vti", "dab:decode=true")


@pytest.mark.parametrize("name", named([*sorted(TRAINABLE), *MORE], SLOW))
def test_training_computes_what_a_generation_computes(model, module, encoder, pairs, rows, name):
    method, (batch,) = built(model, name), in_order(rows, encoder, len(rows))
    trained_under.refuse(method, model.config.text.num_layers)

    @jax.jit
    def trained(params, batch):
        sequence = batch["chosen"]
        embedded = forward.embed(module, params, sequence["tokens"], forward.image_tokens(module, params, batch))
        decoded = forward.decode(module, params, sequence["image_id"], embedded, method, image_count=2)
        return forward.answer_logits(module, params, decoded.hidden[0], sequence)[0]

    sequence = batch["chosen"]
    prompt = model.prepare([pair.conversation() for pair in pairs])
    answers = [[sequence["tokens"][row][sequence["answers"][row]].tolist()] for row in range(len(rows))]
    opened = forcing.forced_inputs(model.params, model.config, prompt, method, answers)
    ready = jax.tree.map(jnp.asarray, method)
    wanted = jax.jit(lambda params: forcing.logits(params, model.config, opened, ready, 2).main)(model.params)
    found = trained(model.params, batch)
    for row, (answer,) in enumerate(answers):
        np.testing.assert_allclose(found[row, : len(answer)], wanted[row, 0, : len(answer)], rtol=0, atol=5e-5)


def test_the_gradient_flows_through_the_attention_of_the_method(model, data, fresh, tmp_path):
    """The loss's gradient along a random direction equals central differences, and is another one than without it."""
    adapters, frozen = fresh
    rng = np.random.default_rng(3)
    start, way = (
        jax.tree.map(lambda leaf, s=s: rng.normal(0, s, leaf.shape).astype("f"), adapters) for s in (0.2, 0.05)
    )
    slopes = {}
    for words in ("none", "capl:rho=0.6,sigma=0.9"):
        task = pair_sets.task(model, data, tmp_path, "sft", sft={"method": words})
        batch, gradient = task.source(0), pair_sets.gradient(task)

        def loss(step, gradient=gradient, batch=batch):
            moved = jax.tree.map(lambda leaf, by: leaf + step * by, start, way)
            return float(gradient(moved, frozen, batch)[0][0])

        found = jax.tree.map(lambda g, v: np.sum(np.float64(g) * v), gradient(start, frozen, batch)[1], way)
        slopes[words] = sum(jax.tree.leaves(found))
        assert slopes[words] == pytest.approx((loss(0.005) - loss(-0.005)) / 0.01, rel=2e-2)
    plain, under = slopes.values()
    assert abs(under - plain) > 0.05 * abs(plain)


def test_other_methods_are_refused_by_name():
    for name in methods.names():
        method = methods.OPERA() if name == "opera" else build(name)
        depth = ENTRIES[name].depth if name in ENTRIES else 2
        if name in TRAINABLE - {"vti"}:
            trained_under.refuse(method, depth)
            continue
        with pytest.raises(LVLMError, match=f"nothing can be trained under {type(method).__name__}: it .*; use capl"):
            trained_under.refuse(method, depth)


def test_words_that_name_no_method(model, data, tmp_path):
    for words, message in (
        ("nothing", "nothing"),
        ("pai", "under PAI: it combines the logits of several branches"),
        ("vaf", "none of this model's 2 layers"),
    ):
        with pytest.raises(LVLMError, match=message):
            pair_sets.task(model, data, tmp_path, "sft", sft={"method": words})
