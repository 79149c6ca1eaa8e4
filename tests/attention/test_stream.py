"""Attention by blocks and by kernels against the whole map; methods whose rows come a few at a time."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import methods, native
from lvlm_jax.attention import kernels, stream
from lvlm_jax.attention.lazy_mask import LazyMask
from lvlm_jax.generation import forward
from lvlm_jax.methods import chain
from tests.slow import named

BATCH, HEADS, KEY_HEADS, SIZE = 2, 4, 2, 8
attend = sys.modules["lvlm_jax.attention.attend"]  # the package has the function under this name


def operands(rows: int, columns: int, dtype=jnp.float32):
    generator = np.random.default_rng(0)
    shapes = ((BATCH, HEADS, rows, SIZE), (BATCH, KEY_HEADS, columns, SIZE), (BATCH, KEY_HEADS, columns, SIZE))
    return [jnp.asarray(generator.normal(size=shape) * 2, dtype) for shape in shapes]


def sight_of(
    rows: int, columns: int, window: int | None = None, images: bool = False, left: bool = True, answers: bool = False
) -> LazyMask:
    """A window of the last `rows` of `columns`; the second sample has 37 columns of padding, and three images touch."""
    places = np.arange(columns)
    padding = places < 37 if left else places >= columns - 37
    valid = jnp.asarray(np.stack([places >= 0, ~padding]))
    image = jnp.asarray(np.isin(places // 40, (1, 2, 4)) & np.ones((BATCH, 1), bool))
    answer = jnp.asarray(np.stack([np.digitize(places, starts) for starts in ([150, 180], [90, 161])]))
    own = (image & valid if images else None, answer if answers else None)
    return LazyMask.of(jnp.arange(columns - rows, columns), valid, window, *own)


def whole(query, key, value, lazy_mask):
    """Attention by a softmax over the whole map, with repeated key heads."""
    key, value = (jnp.repeat(array, HEADS // KEY_HEADS, axis=1) for array in (key, value))
    logits = jnp.einsum("bhtd,bhsd->bhts", query, key, precision="highest") / SIZE**0.5
    weights = jax.nn.softmax(jnp.where(lazy_mask.mask()[:, None], logits, -1e30), axis=-1)
    return jnp.einsum("bhts,bhsd->bhtd", weights, value, precision="highest")


def with_slopes(function, alive, *arguments):
    """The result, and the gradients of query, key and value for a fixed cotangent; rows of padding are not compared."""

    def total(query, key, value, lazy_mask):
        mixed = jnp.where(alive, function(query, key, value, lazy_mask), 0)
        return (mixed * jnp.cos(jnp.arange(mixed.size).reshape(mixed.shape))).sum(), mixed

    return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*arguments)


FORMS = {
    "plain": (256, 256, {}),
    "window, padding behind": (200, 200, dict(window=50, left=False)),
    "whole images": (200, 200, dict(images=True)),
    "whole images, window": (256, 256, dict(images=True, window=70)),
    "behind a prefix": (72, 264, dict(window=100)),
    "two answers": (200, 200, dict(answers=True)),
}


@pytest.mark.parametrize("block", named([64, 96], slow=[96]))
@pytest.mark.parametrize(("rows", "columns", "how"), FORMS.values(), ids=FORMS)
def test_blocks_give_what_the_whole_map_gives(monkeypatch, block, rows, columns, how):
    monkeypatch.setattr(native.build, "available", lambda: False)  # else its attention runs, not the blocks
    monkeypatch.setattr(stream, "CPU_BLOCK", block)
    monkeypatch.setattr(stream, "FEW_ROWS_BLOCK", block)
    lazy_mask = sight_of(rows, columns, **how)
    alive = lazy_mask.mask().any(axis=-1)[:, None, :, None]
    arguments = (*operands(rows, columns), lazy_mask)
    got = with_slopes(stream.streaming_attention.__wrapped__, alive, *arguments)
    want = with_slopes(whole, alive, *arguments)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize(("window", "left"), [(None, True), (50, False)])
def test_what_kernels_are_given_is_what_the_loops_are_given(window, left):
    """Uses a stand-in for cuDNN's kernel, and the TPU kernel in interpret mode."""
    lazy_mask = sight_of(128, 128, window, left=left)
    arguments = (*operands(128, 128), lazy_mask)
    alive = np.asarray(lazy_mask.valid)[:, None, :, None]
    want = np.where(alive, whole(*arguments), 0)
    for kernel in (
        functools.partial(kernels.cudnn, implementation="xla"),
        functools.partial(kernels.splash, interpret=True),
    ):
        got = np.where(alive, jax.jit(kernel)(*arguments), 0)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_what_takes_a_kernel(monkeypatch):
    """The TPU kernel is used if a TPU compiler is installed; never for float32, a prefix, two answers or whole
    images."""
    monkeypatch.setattr(kernels, "compiles_for_tpus", lambda: True)
    query, key, _ = operands(128, 128, jnp.bfloat16)
    assert "tpu" in kernels.usable(query, key, sight_of(128, 128))
    assert kernels.usable(query[:, :, :64], key, sight_of(64, 128)) == {}
    assert kernels.usable(query, key, sight_of(128, 128, images=True)) == {}
    assert kernels.usable(query, key, sight_of(128, 128, answers=True)) == {}
    query, key, _ = operands(128, 128)
    assert kernels.usable(query, key, sight_of(128, 128)) == {}


BY_ROWS = {
    "none": None,
    "cmac": methods.CMAC(),
    "cmac of the code": methods.CMAC(variant="code"),
    "eah": methods.EAH(beta=0.0001, layer=0),
    "eah of the code": methods.EAH(variant="code", beta=0.0001, layer=0),
    "capl": methods.CAPL(layers=(0, 1)),
    "capl, truncated": methods.CAPL(mode="truncated"),
    "sid": methods.SID(keep=3, start_layer=1),
    "sevi": methods.SEVI(start_layer=0),
    "vaf": methods.VAF(start_layer=0),
    "farsight": methods.FarSight(),
    "dab": methods.DAB(tau=0.0),
    "var": methods.VAR(layers=(0, 1), tau=1.7, p=0.2, rho=0.9),
    "a chain": chain(methods.VAF(start_layer=0), methods.CMAC()),
    "a chain with the last row": chain(methods.EAH(beta=0.0001, layer=0), methods.SEVI(start_layer=0)),
    "a chain in layers of its own": chain(methods.EAH(beta=0.0001, layer=0), methods.SEVI(start_layer=1)),
    "not by rows": methods.CMAC(distort="attention_mask"),
}


# Other variants of a method, and methods that edit the same stages of the same rows.
SLOW = ("cmac of the code", "eah of the code", "capl", "farsight", "var", "a chain", "a chain in layers of its own")


@pytest.mark.parametrize("name", named(BY_ROWS, SLOW))
def test_methods_by_rows_give_what_they_give_of_the_whole_map(monkeypatch, model, mixed, name):
    """Logits of all branches and their keys and values, of a prompt that streams, rows of methods 16 at a time."""
    method, inputs = BY_ROWS[name], model.prepare(mixed)
    pictures = forward.encode_images(model.params, model.config, jnp.asarray(inputs.pixels), inputs.geometry)
    embedded = forward.embed(model.params, model.config, jnp.asarray(inputs.tokens), pictures)
    prompt = forward.Prompt(embedded, jnp.asarray(inputs.image_id))

    def prefill():
        shapes = dict(tail_rows=inputs.tail_rows, capacity=96, image_count=inputs.image_count)
        run = jax.jit(lambda *given: forward.prefill(given[0], model.config, *given[1:], **shapes))
        state, step = run(model.params, prompt, method)
        return step.main, step.contrast, [(cache.prefix, cache.own) for cache in state.caches]

    want = prefill()
    seen = []
    take = attend._row_blocks
    monkeypatch.setattr(attend, "_row_blocks", lambda *given, **more: seen.append(name) or take(*given, **more))
    for place, constant, value in (
        (forward, "STREAM_FROM", 1), (attend, "SHORT_QUERY", 0), (attend, "LARGEST_MAP", 1), (attend, "MIN_ROWS", 15),
    ):  # fmt: skip
        monkeypatch.setattr(place, constant, value)
    got = prefill()
    assert bool(seen) == (name not in ("none", "capl", "capl, truncated", "sevi", "a chain with the last row"))
    alive = jnp.asarray(inputs.image_id >= 0)

    def compare(one, other):
        if one.ndim == 4:  # keys and values: a row of padding means nothing
            here = jnp.pad(alive, ((0, 0), (0, 96 - alive.shape[1])))[:, None, : one.shape[2], None]
            one, other = jnp.where(here, one, 0), jnp.where(here, other, 0)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)

    jax.tree.map(compare, got, want)
