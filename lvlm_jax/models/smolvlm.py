r"""Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299): SigLIP tower, pixel shuffle, LLaMA-like decoder.

Processors split an image into square tiles, followed by the whole image at a small size. Each tile has a run of
placeholders; between the runs there is text:

    fence <row_1_col_1> tile  fence <row_1_col_2> tile \n ... \n  fence <global-img> tile fence

All tiles of an image count as one image here. The prompt shows which tiles belong together, whatever the ids of these
tokens: the fence is the token after a prompt's last tile. One fence between two tiles continues an image; two fences
end one image and begin the next. In prompts of another form, each tile is an image.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.config import decoder_config, special_tokens
from lvlm_jax.models.decoder import Decoder
from lvlm_jax.models.family import FamilyConfig, VisionLanguageModel, family
from lvlm_jax.models.layers import linear
from lvlm_jax.models.pictures import Arrays, Pictures, named_arrays, round_up_to_bucket, square_map
from lvlm_jax.models.siglip import SiglipConfig, SiglipTower
from lvlm_jax.models.vision import by_pictures

VISION_TYPES = ("smolvlm_vision", "smolvlm", "idefics3_vision", "idefics3")  # the same tower


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolVlmConfig(FamilyConfig):
    """SmolVLM or Idefics3: SigLIP tower, pixel shuffle, LLaMA-like decoder.

    Attributes:
        scale: side, in patches, of the square that becomes one image token.
        model_type: "smolvlm" or "idefics3", which differ in name only.
    """

    vision: SiglipConfig
    scale: int
    model_type: str = "smolvlm"
    # SmolVLM's own processor gives the same arrays, but needs packages for videos.
    processor_name: ClassVar[str] = "Idefics3Processor"
    tiled: ClassVar[bool] = True

    @classmethod
    def from_hf(cls, raw: dict, hf: Any) -> "SmolVlmConfig":
        """Reads a transformers `SmolVLMConfig` or `Idefics3Config` object; `raw` is its original dict.

        Raises:
            LVLMError: a part of the configuration is not supported.
        """
        text = decoder_config(hf)
        # As in the file: the default padding token of transformers' class is outside small vocabularies.
        tokens = special_tokens(SimpleNamespace(**raw | {"text_config": hf.text_config}))
        padding = (hf.text_config.pad_token_id, tokens["pad_token_id"])
        tokens["pad_token_id"] = next((token for token in padding if token in range(text.vocab_size)), 0)
        return cls(
            text=text,
            vision=SiglipConfig.from_hf(hf.vision_config, VISION_TYPES),
            image_token_id=hf.image_token_id,
            scale=hf.scale_factor,
            model_type=hf.model_type,
            hf=raw,
            **tokens,
        )

    @property
    def processor_fields(self) -> dict[str, Any]:
        """Settings with which SmolVLM's processor counts placeholders."""
        return {"image_seq_len": (self.vision.side // self.scale) ** 2}

    def valid_patches(self, geometry: Mapping[str, np.ndarray]) -> Bool[np.ndarray, "R P"]:
        """Which patches of each tile are not filler."""
        return geometry["mask"]

    def pictures(self, parts: Sequence[Arrays], prompts: Sequence[np.ndarray]) -> Pictures | None:
        """The tower's inputs, from a processor's `pixel_values` `[B, tiles, 3, Y, X]`; None without images.

        Tiles of zeros are filler and are dropped. `pixel_attention_mask` `[B, tiles, Y, X]` marks the pixels that
        belong to the image; by default all do.

        Raises:
            LVLMError: arrays have other shapes, pixels are not finite, or the tiles do not fit the prompts.
        """
        present = [part for part in parts if part.get("pixel_values") is not None]
        batches = named_arrays(present, "pixel_values")
        real = [(batch != 0).any(axis=(2, 3, 4)) for batch in map(self._checked, batches)]
        if not any(sample.any() for sample in real):
            return None
        if len({batch.shape[-1] for batch in batches}) > 1:
            sides = ", ".join(str(batch.shape[-1]) for batch in batches)
            raise LVLMError(f"pixel_values has tiles of {sides} pixels a side; expected one size in a batch")
        pixels = np.concatenate([batch[sample] for batch, sample in zip(batches, real, strict=True)])
        batches_and_masks = zip(present, batches, real, strict=True)
        mask = np.concatenate([self._patches(part, batch)[sample] for part, batch, sample in batches_and_masks])
        size = (mask.shape[1] // self.scale) ** 2
        rows = [int(row.sum()) for sample in real for row in sample if row.any()]
        tiles = self._tiles_per_image(prompts, rows, size)
        positions = patch_positions(mask, self.vision.side)
        spare = round_up_to_bucket(len(pixels), 1) - len(pixels)
        geometry = {
            "positions": np.pad(positions, ((0, spare), (0, 0))),
            "mask": np.pad(mask.reshape(len(mask), -1), ((0, spare), (0, 0)), constant_values=True),
        }
        return Pictures(
            np.pad(pixels, ((0, spare), (0, 0), (0, 0), (0, 0))),
            np.pad(np.repeat(np.arange(len(tiles)), tiles), (0, spare), constant_values=-1),
            tiles * size,
            geometry,
        )

    def blank(self) -> Pictures:
        """One empty tile of a single token, in the form of `pictures`."""
        mask = np.ones((1, self.scale, self.scale), bool)
        side = self.scale * self.vision.patch_size
        geometry = {"positions": patch_positions(mask, self.vision.side), "mask": mask.reshape(1, -1)}
        return Pictures(np.zeros((1, 3, side, side), np.float32), np.zeros(1, int), np.ones(1, int), geometry)

    def token_map(self, pictures: Pictures, image: int) -> Int[np.ndarray, "H W"]:
        """For each position of the image, the token that covers it in the last tile, which shows the whole image."""
        tile = (pictures.pixels.shape[-1] // self.vision.patch_size // self.scale) ** 2
        return square_map(tile, first=int(pictures.token_counts[image]) - tile)

    def _checked(self, pixels: np.ndarray) -> np.ndarray:
        """Checks that the pixels are square tiles whose patches can be shuffled."""
        unit = self.vision.patch_size * self.scale
        good = pixels.ndim == 5 and pixels.shape[2] == 3 and pixels.shape[3] == pixels.shape[4]
        if not good or pixels.shape[3] // self.vision.patch_size % self.scale or pixels.shape[3] < unit:
            raise LVLMError(
                f"pixel_values has shape {pixels.shape}; expected [samples, tiles, 3, side, side] with a number of "
                f"patches along the side ({self.vision.patch_size} pixels each) that {self.scale} divides"
            )
        return pixels

    def _patches(self, part: Arrays, pixels: np.ndarray) -> np.ndarray:
        """Which patches of each tile belong to the image, `Bool[B, tiles, side, side]`, side in patches."""
        expected = (*pixels.shape[:2], *pixels.shape[3:])
        mask = part.get("pixel_attention_mask")
        mask = np.ones(expected, bool) if mask is None else np.asarray(mask).astype(bool)
        if mask.shape != expected:
            raise LVLMError(f"pixel_attention_mask has shape {mask.shape}; expected {expected}, as pixel_values")
        patch = self.vision.patch_size
        side = expected[-1] // patch
        cropped = mask[..., : side * patch, : side * patch]
        patches = cropped.reshape(*expected[:2], side, patch, side, patch).any(axis=(3, 5))
        empty = (pixels != 0).any(axis=(2, 3, 4)) & ~patches[..., 0, 0]
        if empty.any():
            raise LVLMError(
                f"pixel_attention_mask leaves out the upper left corner of tile {int(np.argwhere(empty)[0, 1])} of "
                f"sample {int(np.argwhere(empty)[0, 0])}, where its picture begins; expected a mask as processors "
                "make it"
            )
        return patches

    def _tiles_per_image(self, prompts: Sequence[np.ndarray], rows: Sequence[int], size: int) -> np.ndarray:
        """How many tiles each image has, `Int[I]`.

        Args:
            prompts: token ids of each sample.
            rows: number of tiles in each row of the pixels.
            size: number of tokens of a tile.
        """
        counts = [int((prompt == self.image_token_id).sum()) for prompt in prompts]
        if sum(counts) == sum(rows) * size:
            for row, count in enumerate(counts):
                if count % size:
                    raise LVLMError(f"sample {row} has {count} image tokens and a tile takes {size}; was it truncated?")
            counts_by_prompt = [tiles_per_image(prompt, self.image_token_id, size) for prompt in prompts]
            return np.array([tiles for sample in counts_by_prompt for tiles in sample], np.int64)
        if sum(counts) == sum(rows):
            return np.ones(sum(rows), np.int64)
        if sum(counts) == len(rows):
            return np.array(rows, np.int64)
        raise LVLMError(
            f"the prompt has {sum(counts)} image tokens and its {sum(rows)} tiles take {sum(rows) * size}; give the "
            f"prompt of the processor that cut the tiles ({size} placeholders for each) and do not truncate it, or one "
            "placeholder for each tile, or one for each row of pixel_values"
        )


def tiles_per_image(prompt: np.ndarray, image_token_id: int, size: int) -> list[int]:
    """How many tiles each image of an expanded prompt has, according to the fences (see the module docstring).

    Args:
        prompt: token ids `[T]`.
        image_token_id: the placeholder.
        size: number of tokens of a tile.
    """
    places = np.flatnonzero(prompt == image_token_id)
    if len(places) == 0:
        return []
    begins, ends = places[::size], places[size - 1 :: size] + 1
    after_last = prompt[ends[-1] :]
    if len(after_last) == 0 or after_last[0] not in prompt[: begins[0]]:
        return [1] * len(begins)
    fence = after_last[0]
    tiles = [1]
    for end, begin in zip(ends[:-1], begins[1:], strict=True):
        if (prompt[end:begin] == fence).sum() == 1:
            tiles[-1] += 1
        else:
            tiles.append(1)
    return tiles


def patch_positions(mask: np.ndarray, side: int) -> np.ndarray:
    """The learned position of each patch: its relative place in the image, in the tower's own grid.

    Rounding decides about patches on a border of that grid, so everything is float32, as in training.

    Args:
        mask: `Bool[R, Y, X]`, which patches belong to the image: a rectangle from the upper left corner.
        side: side of the tower's grid of positions.

    Returns:
        `Int[R, Y * X]`; 0 for patches outside the image.
    """
    borders = np.arange(1 / side, 1.0, 1 / side).astype(np.float32)

    def places(count: np.ndarray, length: int) -> np.ndarray:
        step = np.float32(1) / count.astype(np.float32)
        fraction = np.minimum(np.arange(length, dtype=np.float32) * step[:, None], np.float32(1 - 1e-6))
        return np.searchsorted(borders, fraction, side="right")

    down = places(mask[:, :, 0].sum(axis=1), mask.shape[1])
    across = places(mask[:, 0, :].sum(axis=1), mask.shape[2])
    positions = down[:, :, None] * side + across[:, None, :]
    return np.where(mask, positions, 0).reshape(len(mask), -1).astype(np.int32)


@family("smolvlm", "idefics3")
class SmolVlm(VisionLanguageModel):
    """SmolVLM and Idefics3."""

    config: SmolVlmConfig

    def setup(self):
        self.vision_tower = SiglipTower(self.config.vision, self.dtype)
        self.connector = linear(self.config.text.hidden_size, self.dtype, None)
        self.language_model = Decoder(self.config.text, self.dtype, self.remat)

    def encode_images(
        self, pixels: Float[Array, "R 3 Y X"], positions: Int[Array, "R P"], mask: Bool[Array, "R P"]
    ) -> Float[Array, "N E"]:
        """Image tokens of all tiles in reading order, then those of filler rows."""

        def look(model: SmolVlm, pixels: Array, positions: Array, mask: Array) -> Float[Array, "R Q E"]:
            _, features = model.vision_tower(pixels.astype(model.dtype), positions, mask)
            return model.connector(pixel_shuffle(features, model.config.scale))

        tokens = by_pictures(self, look, pixels, positions.shape[1], positions, mask)
        return tokens.reshape(-1, self.config.text.hidden_size)


def pixel_shuffle(features: Float[Array, "R P W"], scale: int) -> Float[Array, "R Q C"]:
    """Pixel shuffle of square tiles: `scale` x `scale` patches, row by row, become the channels of one token."""
    rows, patches, width = features.shape
    side = int(patches**0.5) // scale
    grid = features.reshape(rows, side, scale, side, scale, width).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(rows, side * side, scale * scale * width)
