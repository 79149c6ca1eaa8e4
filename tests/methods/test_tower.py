"""A method's edit of the vision tower: the same in every call, cached under its own key, off at no cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.generation import decode_loop, forcing, forward
from lvlm_jax.methods.base import frozen
from lvlm_jax.methods.fitted import Fitted, Source
from lvlm_jax.models import qwen_vision, vision
from lvlm_jax.serving.limits import Limits
from lvlm_jax.serving.prefill import Prefill
from lvlm_jax.serving.prompts import Prompts
from tests.models import zoo
from tests.small import conversation, encoded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(methods.TowerEdit):
    """Multiplies outputs of feed-forward blocks by 1 + amount (layer + 1)."""

    amount: jax.Array

    def mlp(self, layer, output):
        return output * (1 + self.amount * (layer + 1))


@frozen
class Loud(methods.Method):
    """A method that edits the tower alone."""

    amount: methods.Strength = methods.strength(1.0, "amount")
    unrelated: methods.Strength = methods.strength(1.0, "does nothing here")

    def tower_edit(self):
        return Scaled(self.amount) if self.amount else None


ASKED = [conversation("What?", seed=3), conversation("Why?"), conversation("Who?", seed=5)]


def first(model, prompts, method):
    return np.asarray(model.prefill(prompts, method)[1].main)


def test_samples_with_images_change_and_off_is_the_plain_program(model, all_programs_kept):
    plain, count = first(model, ASKED, None), decode_loop.encode_images._cache_size()
    np.testing.assert_array_equal(first(model, ASKED, Loud(0.0)), plain)
    assert decode_loop.encode_images._cache_size() == count
    edited = first(model, ASKED, Loud(1.0))
    count = decode_loop.encode_images._cache_size()
    change = np.abs(edited - plain).max(axis=1)
    assert change[0] > 0.05 < change[2]
    np.testing.assert_allclose(edited[1], plain[1], rtol=0, atol=1e-5)
    # (1 + a)(1 + b) in both layers: two edits of a chain, and another strength compiles nothing.
    other = first(model, ASKED, Loud(0.25))
    assert decode_loop.encode_images._cache_size() == count
    chained = first(
        model, ASKED, methods.chain(Loud(0.0), methods.VAF(start_layer=0, enhance=1, suppress=1), Loud(0.25))
    )
    np.testing.assert_allclose(chained, other, rtol=0, atol=1e-5)
    twice = methods.chain(Loud(0.25), Loud(0.25)).tower_edit()
    np.testing.assert_allclose(twice.mlp(1, jnp.ones(2)), [2.25, 2.25])


def test_the_gradient_of_vtis_strength_in_the_tower(model):
    """It equals a central difference; training does not see it and refuses to learn it (test_learned_method)."""
    tower, random = model.config.vision, np.random.default_rng(2)
    arrays = {"vision_directions": jnp.asarray(random.normal(size=(tower.num_layers, tower.hidden_size)), jnp.float32)}
    given = Fitted(arrays, Source("vti", "model", "pairs", "{}"))
    pixels = jnp.asarray(model.prepare(ASKED[0]).pixels)

    @jax.jit
    def scalar(strength):
        edit = methods.VTI(lambda_image=strength, fitted=given).tower_edit()
        return jnp.sin(forward.encode_images(model.params, model.config, pixels, None, edit)).sum()

    slope = (scalar(5.1) - scalar(4.9)) / 0.2
    assert abs(slope) > 0.05 and abs(slope - jax.grad(scalar)(5.0)) < 0.02 * abs(slope)


def test_every_call_edits_the_tower(model):
    """Encoded images went through the plain tower; known answers, sweeps and separate rows agree with `generate`."""
    asked, settings = ASKED[:1], {"max_new_tokens": 4}
    want = model.generate(asked, Loud(1.0), **settings)
    assert model.generate(encoded(model, asked), Loud(1.0), **settings).tokens == want.tokens
    plain = model.generate(asked, **settings)
    swept = model.sweep(asked, [Loud(0.0), Loud(1.0), Loud(1.0, 2.0)], **settings)
    for got, one in zip(swept, (plain, want, want), strict=True):
        assert got.tokens == one.tokens
        np.testing.assert_allclose(got.logprobs[0], one.logprobs[0], rtol=0, atol=1e-4)
    assert np.abs(np.subtract(plain.logprobs[0], want.logprobs[0])).max() > 1e-3
    prompt = model.prepare(asked)
    opened = forcing.forced_inputs(model.params, model.config, prompt, Loud(1.0), [[want.tokens[0]]])
    scored = forcing.logprobs(model.params, model.config, opened, Loud(1.0), 1)[0, 0, :4]
    np.testing.assert_allclose(scored, want.logprobs[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        model.logits(asked, Loud(1.0))[0, -1], first(model, asked, Loud(1.0))[0], rtol=0, atol=1e-4
    )


def test_a_server_keeps_the_tokens_of_each_edit(model):
    """One after another on one picture: none, an edit, another one, none; and words before a contrast branch."""
    prompts, prefill = Prompts(model, 1, 32), Prefill(model, Limits())
    edited = methods.chain(Loud(1.0), methods.ICD(tokens=(5, 7)))
    try:
        for method in (None, Loud(1.0), Loud(0.5), None, Loud(1.0, 7.0), edited):
            prompt = prompts.laid_out(model.prepare(ASKED[0]))
            while not prefill.ready(prompt, method):
                pass
            got, want = prompt.prefilled[1], model.prefill(ASKED[0], method)[1]
            for name in ("main", "contrast"):
                if getattr(want, name) is not None:
                    np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=0, atol=1e-4)
    finally:
        prompts.close()
    assert prefill.images.misses == 3  # plain and two edits; an unrelated strength is not of the key


@pytest.mark.parametrize("name", ["qwen2_5_vl", *(pytest.param(one, marks=pytest.mark.slow) for one in zoo.FAMILIES
                                                 if one not in ("qwen2_5_vl", "internvl_chat"))])  # fmt: skip
def test_every_tower(name, tmp_path, monkeypatch):
    """Each layer's block is edited once, in whatever parts patches go through it; no edit is the plain tower."""
    case = zoo.load(name, tmp_path)
    config, params, prompt = case.model.config, case.model.params, case.prompt(0, 0, 2, 2)
    geometry = jax.tree.map(jnp.asarray, prompt.geometry)
    count, layers = int((prompt.image_id > 0).sum()), []

    class Noted(Scaled):
        def mlp(self, layer, output):
            layers.append(layer)
            return super().mlp(layer, output)

    def tokens(edit):
        encoded = jax.jit(lambda pixels: forward.encode_images(params, config, pixels, geometry, edit))
        return np.asarray(encoded(prompt.pixels)).reshape(-1, config.text.hidden_size)[:count]

    plain, whole = tokens(None), tokens(Noted(jnp.float32(1)))
    assert layers == list(range(config.vision.num_layers))
    assert np.isfinite(whole).all() and np.abs(whole - plain).max() > 0.01
    np.testing.assert_array_equal(tokens(Scaled(jnp.float32(0))), plain)
    monkeypatch.setattr(vision, "CHUNK", 1)
    monkeypatch.setattr(qwen_vision, "CHUNK", 1)
    np.testing.assert_allclose(tokens(Scaled(jnp.float32(1))), whole, rtol=0, atol=1e-4)
