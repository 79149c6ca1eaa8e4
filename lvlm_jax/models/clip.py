"""The CLIP vision tower (arXiv 2103.00020), up to its hidden states."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lvlm_jax.models.config import VisionConfig
from lvlm_jax.models.layers import activation, layer_norm, linear


class ClipAttention(nn.Module):
    """Bidirectional multi-head attention over the patches of one image."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "I P W"]) -> Float[Array, "I P W"]:
        heads, width = self.config.num_heads, self.config.hidden_size

        precision = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

        def project(name: str) -> Float[Array, "I P H D"]:
            return linear(width, self.dtype, name, use_bias=True)(x).reshape(*x.shape[:2], heads, -1)

        # Written out: jax.nn.dot_product_attention knows no float16 on CPUs.
        product = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
        logits = product("IPHD,IQHD->IHPQ", project("q_proj"), project("k_proj")) * (width // heads) ** -0.5
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        mixed = product("IHPQ,IQHD->IPHD", weights, project("v_proj")).astype(self.dtype)
        return linear(width, self.dtype, "out_proj", use_bias=True)(mixed.reshape(x.shape))


class ClipMlp(nn.Module):
    """Two projections around the activation, with biases."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "I P W"]) -> Float[Array, "I P W"]:
        hidden = linear(self.config.intermediate_size, self.dtype, "fc1", use_bias=True)(x)
        return linear(x.shape[-1], self.dtype, "fc2", use_bias=True)(
            activation(self.config.hidden_act)(hidden)
        )


class ClipLayer(nn.Module):
    """Attention and MLP, each behind its norm and added to the stream."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "I P W"]) -> Float[Array, "I P W"]:
        epsilon = self.config.layer_norm_eps
        normed = layer_norm(epsilon, self.dtype, "layer_norm1")(x)
        x = x + ClipAttention(self.config, self.dtype, name="self_attn")(normed)
        normed = layer_norm(epsilon, self.dtype, "layer_norm2")(x)
        return x + ClipMlp(self.config, self.dtype, name="mlp")(normed)


class ClipTower(nn.Module):
    """Images to hidden states."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels: Float[Array, "I 3 Y X"]) -> list[Float[Array, "I P W"]]:
        """Returns the hidden states of I images: the normalised embeddings, then each layer's output.

        P counts the class token, then the patches row by row. States that the caller leaves unused cost nothing
        once compiled.
        """
        config = self.config
        patches = nn.Conv(
            config.hidden_size,
            kernel_size=(config.patch_size, config.patch_size),
            strides=config.patch_size,
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            precision=jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None,
            name="patch_embedding",
        )(pixels.transpose(0, 2, 3, 1))
        images = pixels.shape[0]
        initializer = nn.initializers.normal(0.02)
        token = self.param("class_embedding", initializer, (config.hidden_size,)).astype(self.dtype)
        x = jnp.concatenate(
            [
                jnp.broadcast_to(token, (images, 1, config.hidden_size)),
                patches.reshape(images, -1, config.hidden_size),
            ],
            axis=1,
        )
        positions = nn.Embed(
            config.num_patches + 1, config.hidden_size, dtype=self.dtype, embedding_init=initializer,
            name="position_embedding",
        )  # fmt: skip
        x = x + positions(jnp.arange(config.num_patches + 1))
        states = [layer_norm(config.layer_norm_eps, self.dtype, "pre_layernorm")(x)]
        for index in range(config.num_layers):
            states.append(ClipLayer(config, self.dtype, name=f"layers_{index}")(states[-1]))
        # Part of every CLIP checkpoint, though language models read the states before it.
        layer_norm(config.layer_norm_eps, self.dtype, "post_layernorm")(states[-1])
        return states
