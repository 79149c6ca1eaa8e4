"""InternVL 2.5 and 3 (arXiv 2412.05271, 2504.10479): InternViT over tiles, pixel shuffle, a connector, a decoder."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.config import DecoderConfig, activation_name, special_tokens
from lvlm_jax.models.decoder import Decoder
from lvlm_jax.models.family import FamilyConfig, VisionLanguageModel, family
from lvlm_jax.models.internvit import InternVit, InternVitConfig
from lvlm_jax.models.layers import activation, layer_norm, linear
from lvlm_jax.models.pictures import Arrays, Pictures, concatenate, round_up_to_bucket, square_map, square_pixels
from lvlm_jax.models.vision import by_pictures, class_attention

CONNECTOR_NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternVlConfig(FamilyConfig):
    """InternVL.

    Attributes:
        shuffle: number of neighbouring patches along each axis that become one image token.
        feature_layer: the hidden state of the tower that the connector reads: 0 for the embeddings, i for the output of
            layer i - 1; the number of layers plus one for the final, normalised state.
        template: name of the chat template in OpenGVLab's code if the checkpoint has their layout, else None.
        tiles: smallest and largest number of tiles of an image, without the thumbnail.
    """

    vision: InternVitConfig
    shuffle: int
    feature_layer: int
    projector_act: str
    template: str | None
    tiles: tuple[int, int]
    model_type: str = "internvl"
    tiled: ClassVar[bool] = True

    @property
    def tokens_per_tile(self) -> int:
        """How many tokens each tile of an image takes."""
        return (self.vision.side // self.shuffle) ** 2

    @property
    def processor_fields(self) -> dict[str, Any]:
        """Settings with which InternVL's processor counts placeholders."""
        return {"image_seq_length": self.tokens_per_tile}

    @classmethod
    def from_hf(cls, raw: dict, hf: Any) -> "InternVlConfig":
        """Reads a transformers `InternVLConfig` object; `raw` is its original dict.

        Raises:
            LVLMError: a part of the configuration is not supported.
        """
        vision = InternVitConfig.from_hf(hf.vision_config)
        strategy = hf.vision_feature_select_strategy
        if strategy != "default":
            raise LVLMError(
                f"vision_feature_select_strategy {strategy!r} is not supported; expected 'default': with the class "
                "token patches lie on no grid"
            )
        # Files of transformers 4 leave the outer flag out if it has that version's default; then the inner flag counts.
        tied = bool(raw.get("tie_word_embeddings", hf.text_config.tie_word_embeddings))
        tiles = (raw.get("min_dynamic_patch", 1), raw.get("max_dynamic_patch", 12))
        return cls(
            text=dataclasses.replace(DecoderConfig.from_hf(hf.text_config), tie_word_embeddings=tied),
            vision=vision,
            image_token_id=hf.image_token_id,
            shuffle=_shuffle(hf.downsample_ratio, vision.side),
            feature_layer=_feature_layer(hf.vision_feature_layer, vision.num_layers),
            projector_act=activation_name("projector_hidden_act", hf.projector_hidden_act),
            template=raw.get("template"),
            tiles=tiles,
            hf=raw | {"tie_word_embeddings": tied},
            **special_tokens(hf),
        )

    def pictures(self, parts: Sequence[Arrays], prompts: Sequence[np.ndarray]) -> Pictures | None:
        """The tower's inputs, from a processor's `pixel_values` `[tiles, 3, Y, X]`; None without images.

        An image is an uninterrupted run of placeholders. If prompts have one placeholder per image, then every image
        has one tile, or the only image has all tiles, or `num_patches` `[images]` says how many each has.

        Raises:
            LVLMError: pixels have another shape or are not finite, or placeholders do not match the tiles.
        """
        pixels = square_pixels(parts, self.vision.image_size, "tiles")
        if pixels is None:
            return None
        num_patches = concatenate(parts, "num_patches")
        if num_patches is not None:
            counts = _check_counts(num_patches, len(pixels))
        else:
            placeholders = [np.asarray(prompt) == self.image_token_id for prompt in prompts]
            counts = _tile_counts(placeholders, len(pixels), self.tokens_per_tile)
        return _tile_rows(pixels, counts, self.tokens_per_tile)

    def blank(self) -> Pictures:
        """One empty image, in the form of `pictures`."""
        side = self.vision.image_size
        return _tile_rows(np.zeros((1, 3, side, side), np.float32), np.ones(1, np.int64), self.tokens_per_tile)

    def token_map(self, pictures: Pictures, image: int) -> Int[np.ndarray, "H W"]:
        """For each position of the image, the token that covers it in the last tile, which shows the whole image."""
        tile = self.tokens_per_tile
        return square_map(tile, first=int(pictures.token_counts[image]) - tile)


def _shuffle(ratio: float, side: int) -> int:
    """Number of patches along each axis that become one token.

    Raises:
        LVLMError: it is not whole, or does not divide a tile.
    """
    shuffle = round(1 / ratio) if ratio > 0 else 0
    if shuffle < 1 or abs(shuffle * ratio - 1) > 1e-6 or side % shuffle:
        raise LVLMError(
            f"downsample_ratio {ratio} is not supported; expected one over a divisor of the {side} patches along a "
            "tile's side"
        )
    return shuffle


def _feature_layer(layer: Any, depth: int) -> int:
    """`vision_feature_layer` as an index into the tower's states; -1 means the final state.

    Raises:
        LVLMError: several layers, or one outside the tower.
    """
    if not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
        raise LVLMError(
            f"vision_feature_layer {layer!r} is not supported; expected one of the tower's {depth + 1} hidden states"
        )
    return depth + 1 if layer == -1 else layer % (depth + 1)


def _check_counts(counts: np.ndarray, tiles: int) -> Int[np.ndarray, "N"]:
    """The given numbers of tiles per image.

    Raises:
        LVLMError: they are not whole and positive, or do not add up to all tiles.
    """
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or (counts < 1).any() or counts.sum() != tiles:
        raise LVLMError(
            f"num_patches is {counts.tolist()} and pixel_values has {tiles} tiles; expected the number of tiles of "
            "each image; they must add up"
        )
    return counts.astype(np.int64)


def _tile_counts(placeholders: Sequence[np.ndarray], tiles: int, tokens: int) -> Int[np.ndarray, "N"]:
    """Number of tiles of each image, from a mask of the placeholders in each prompt.

    Args:
        placeholders: the masks.
        tiles: number of tiles in all.
        tokens: number of placeholders of an expanded tile.

    Raises:
        LVLMError: placeholders do not match the tiles.
    """
    total = sum(int(mask.sum()) for mask in placeholders)
    if total == tiles * tokens:
        # A zero around each prompt, so that no run continues into the next prompt.
        steps = np.diff(np.concatenate([np.pad(mask.astype(np.int8), 1) for mask in placeholders]))
        runs = np.flatnonzero(steps == -1) - np.flatnonzero(steps == 1)
        if (runs % tokens).any():
            raise LVLMError(
                f"image {int(np.argmax(runs % tokens > 0)) + 1} of the batch has {runs[runs % tokens > 0][0]} tokens; "
                f"expected whole tiles of {tokens} tokens: do not truncate prompts"
            )
        return runs // tokens
    if total == tiles:
        return np.ones(tiles, np.int64)
    if total == 1:
        return np.array([tiles])
    raise LVLMError(
        f"the prompts have {total} image tokens and pixel_values has {tiles} tiles of {tokens} tokens each; expected "
        f"{tiles * tokens} tokens, or one for each image and num_patches, the tiles of each"
    )


def _tile_rows(pixels: Float[np.ndarray, "R 3 Y X"], counts: Int[np.ndarray, "N"], tokens: int) -> Pictures:
    """One row per tile, padded to a bucket with empty tiles."""
    filler = round_up_to_bucket(len(pixels), 1) - len(pixels)
    owner = np.concatenate([np.repeat(np.arange(len(counts)), counts), np.full(filler, -1)])
    return Pictures(np.pad(pixels, [(0, filler), (0, 0), (0, 0), (0, 0)]), owner, counts * tokens)


def pixel_shuffle(x: Float[Array, "R P W"], shuffle: int) -> Float[Array, "R Q V"]:
    """Stacks each square of `shuffle` x `shuffle` neighbouring patches into the channels of one token, row by row."""
    side = round(x.shape[1] ** 0.5) // shuffle
    squares = x.reshape(len(x), side, shuffle, side, shuffle, x.shape[-1])
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), side**2, -1)


class InternVlConnector(nn.Module):
    """Maps shuffled vision features to decoder embeddings: a layer norm and two projections around the activation."""

    config: InternVlConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features: Float[Array, "R Q V"]) -> Float[Array, "R Q E"]:
        width = self.config.text.hidden_size
        normed = layer_norm(CONNECTOR_NORM_EPS, self.dtype, "layer_norm")(features)
        hidden = linear(width, self.dtype, "linear_1", use_bias=True)(normed)
        return linear(width, self.dtype, "linear_2", use_bias=True)(activation(self.config.projector_act)(hidden))


@family("internvl")
class InternVl(VisionLanguageModel):
    """InternVL 2.5 and 3."""

    config: InternVlConfig

    def setup(self):
        self.vision_tower = InternVit(self.config.vision, self.dtype)
        self.connector = InternVlConnector(self.config, self.dtype)
        self.language_model = Decoder(self.config.text, self.dtype, self.remat)

    def salience(self, pixels: Float[Array, "R 3 Y X"]) -> Float[Array, "N"]:
        """The attention that the class token pays to each image token, in the layer that the connector reads."""
        depth = self.config.vision.num_layers
        state = self.config.feature_layer % (depth + 2)  # the final state is the norm of the one before
        layer = max(min(state, depth) - 1, 0)

        def look(model: InternVl, pixels: Float[Array, "R 3 Y X"]) -> Float[Array, "R P"]:
            return class_attention(lambda: model.vision_tower(pixels.astype(model.dtype)), layer)

        ranked = by_pictures(self, look, pixels, self.config.vision.side**2)
        return pixel_shuffle(ranked[..., None], self.config.shuffle).mean(axis=-1).reshape(-1)

    def encode_images(self, pixels: Float[Array, "R 3 Y X"]) -> Float[Array, "R Q E"]:
        """Image tokens of R tiles, for the decoder."""

        def look(model: InternVl, pixels: Float[Array, "R 3 Y X"]) -> Float[Array, "R Q E"]:
            features = model.vision_tower(pixels.astype(model.dtype))[model.config.feature_layer][:, 1:]
            return model.connector(pixel_shuffle(features, model.config.shuffle))

        return by_pictures(self, look, pixels, self.config.vision.side**2)
