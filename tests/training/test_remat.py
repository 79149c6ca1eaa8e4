"""Rematerialized layers give the gradients of layers whose activations are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import methods, models
from lvlm_jax.training import forward

IMAGES = 2


SLOW = [pytest.param(one, marks=pytest.mark.slow) for one in (None, methods.CAPL())]


@pytest.mark.parametrize("method", [*SLOW, methods.chain(methods.EAH(), methods.SEVI(start_layer=0))])
def test_gradients(model, method):
    rng = np.random.default_rng(0)
    inside = model.config.tokens_per_image
    image_id = np.array([[0, 0] + [1] * inside + [0] + [2] * inside + [0] * 4 + [-1] * 3])
    tokens = np.where(image_id > 0, model.config.image_token_id, rng.integers(3, 200, image_id.shape))
    size = model.config.vision.image_size
    pixels = rng.normal(size=(IMAGES, 3, size, size)).astype(np.float32)

    def loss(params, remat):
        module = models.build(model.config, jnp.float32, remat)
        pictures = forward.encode_images(module, params, jnp.asarray(pixels))
        embeddings = forward.embed(module, params, jnp.asarray(tokens), pictures)
        decoded = forward.decode(module, params, jnp.asarray(image_id), embeddings, method, IMAGES)
        return jnp.square(decoded.hidden[:, :, : tokens.shape[1] - 3]).mean()

    kept, again = (jax.jit(jax.grad(loss), static_argnums=1)(model.params, remat) for remat in (False, True))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(kept)) > 1e-4
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
