"""InstructBLIP (arXiv 2305.06500): EVA-CLIP tower, a Q-Former that reads the instruction, Vicuna.

An image becomes 32 tokens, the Q-Former's queries, which depend on the instruction: the text of a prompt is tokenised
twice, for the decoder and for the Q-Former. So image tokens cannot be reused in another prompt, and `tokens_per_image`
is None.

Position of the queries: the model was trained on one image followed by its text, with the queries even before the
beginning-of-text token: `<32 queries> </s> What is unusual about this image?`. There are two layouts of checkpoints.
Current processors write the placeholders (`image_token_index`) at the front. The first checkpoints on the hub have no
placeholder: no `image_token_index`, no `<image>` in the tokenizer, no `num_query_tokens` in the processor; the model
itself put the queries at the front. Here both layouts give the same result: if no prompt of a batch has a placeholder,
the placeholders of a sample's images are put at its front, image after image. A conversation's images always come
first, wherever they are in its messages, and each is read with all of the conversation's text. Without
`image_token_index`, the placeholder is the first id after the vocabulary. A prompt without images is only text.

Encoder-decoder language models (Flan-T5) are not supported.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.config import DecoderConfig, special_tokens
from lvlm_jax.models.decoder import Decoder
from lvlm_jax.models.eva import EvaConfig, EvaTower
from lvlm_jax.models.family import FamilyConfig, VisionLanguageModel, family
from lvlm_jax.models.layers import linear
from lvlm_jax.models.pictures import Arrays, Pictures, round_up_to_bucket, square_pixels
from lvlm_jax.models.qformer import QFormer, QFormerConfig
from lvlm_jax.models.vision import by_pictures

END = 2  # </s> of every LLaMA tokenizer
SHORTEST_INSTRUCTION = 16  # instructions are padded to this many tokens times 1, 2, 3, 4, 6, ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructBlipConfig(FamilyConfig):
    """InstructBLIP with a decoder-only language model."""

    vision: EvaConfig
    qformer: QFormerConfig
    model_type: str = "instructblip"
    reads_instruction: ClassVar[bool] = True

    @classmethod
    def from_hf(cls, raw: dict, hf: Any) -> "InstructBlipConfig":
        """Reads a transformers `InstructBlipConfig` object; `raw` is its original dict.

        Raises:
            LVLMError: a part of the configuration is not supported.
        """
        if not hf.use_decoder_only_language_model:
            raise LVLMError(
                f"text_config.model_type {hf.text_config.model_type!r} is an encoder-decoder, which is not supported; "
                "expected a decoder, as in Salesforce/instructblip-vicuna-7b"
            )
        text = DecoderConfig.from_hf(hf.text_config)
        image = hf.image_token_index
        tokens = special_tokens(hf)
        tokens["pad_token_id"] = max(0, tokens["pad_token_id"])  # -1 in published checkpoints
        if _misnumbered(raw):
            tokens |= {"bos_token_id": END, "eos_token_ids": (END,)}
        return cls(
            text=text,
            vision=EvaConfig.from_hf(hf.vision_config),
            qformer=QFormerConfig.from_hf(hf.qformer_config, hf.num_query_tokens),
            image_token_id=text.vocab_size if image is None else image,
            hf=raw,
            **tokens,
        )

    def stop_tokens(self, generation: Mapping[str, Any]) -> tuple[int, ...]:
        """As in the base class, without the misnumbered token."""
        if generation.get("eos_token_id") == 1 and _misnumbered(self.hf):
            return self.eos_token_ids
        return super().stop_tokens(generation)

    def placed(self, parts: Sequence[Arrays], prompts: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """The prompts, with placeholders for their images at the front if no prompt has any.

        Raises:
            LVLMError: there are several prompts and a different number of images, so it is unclear which belong
                together.
        """
        if any((prompt == self.image_token_id).any() for prompt in prompts):
            return prompts
        counts = [0 if part.get("pixel_values") is None else len(part["pixel_values"]) for part in parts]
        if not any(counts):
            return prompts
        if len(parts) != len(prompts):
            if counts[0] != len(prompts):
                raise LVLMError(
                    f"{len(prompts)} prompts without placeholders and {counts[0]} images were given; expected one "
                    f"image each, or token {self.image_token_id} at the front of every prompt for each of its images"
                )
            counts = [1] * len(prompts)
        return [
            np.concatenate([np.full(count, self.image_token_id, prompt.dtype), prompt])
            for count, prompt in zip(counts, prompts, strict=True)
        ]

    def pictures(self, parts: Sequence[Arrays], prompts: Sequence[np.ndarray]) -> Pictures | None:
        """The inputs of tower and Q-Former; None without images.

        Args:
            parts: `pixel_values` `[I, 3, Y, X]`, `qformer_input_ids` `[N, L]` and `qformer_attention_mask` `[N, L]`
                (default: all ones); N is the number of images, as for transformers' model, or the number of prompts, as
                from its processor.
            prompts: token ids with placeholders.

        Raises:
            LVLMError: arrays are missing, have another shape, or contain tokens outside the Q-Former's vocabulary.
        """
        pixels = square_pixels(parts, self.vision.image_size)
        if pixels is None:
            return None
        counts = [int((prompt == self.image_token_id).sum()) for prompt in prompts]
        tokens_per_image = 1 if sum(counts) == len(pixels) else self.qformer.num_queries  # placeholders per image
        images = [count // tokens_per_image for count in counts]
        owned = [images] if len(parts) == 1 else [[count] for count in images]
        rows = [
            row
            for part, own in zip(parts, owned, strict=True)
            if part.get("pixel_values") is not None
            for row in self._instructions(part, own)
        ]
        return self._pictures(pixels, rows)

    def blank(self) -> Pictures:
        """One empty image and an empty instruction, in the form of `pictures`."""
        side = self.vision.image_size
        return self._pictures(np.zeros((1, 3, side, side), np.float32), [np.zeros((2, 0), np.int32)])

    def token_map(self, pictures: Pictures, image: int) -> None:
        """None: each query attends to the whole image."""

    def instructed(self, geometry: Mapping[str, np.ndarray], words: Sequence[int], keep: bool) -> dict[str, np.ndarray]:
        """The geometry of the same images, with `words` after the `[CLS]` of each instruction.

        Args:
            geometry: the geometry of `pictures`; empty without images.
            words: ids of the Q-Former's vocabulary.
            keep: whether the old instruction follows, or only `[SEP]`.

        Raises:
            LVLMError: words outside the vocabulary, or an instruction that becomes too long.
        """
        if not geometry:
            return {}
        rows = []
        for tokens, mask in zip(geometry["words"], geometry["mask"], strict=True):
            own = tokens[mask] if keep or mask.sum() < 2 else tokens[mask][[0, -1]]
            tokens_with_words = np.insert(own, min(1, len(own)), np.asarray(words, tokens.dtype))
            rows.append(np.stack([tokens_with_words, np.ones_like(tokens_with_words)]))
        return self._geometry(rows)

    def _instructions(self, part: Arrays, images: Sequence[int]) -> list[np.ndarray]:
        """`Int[2, L]` for each image of a part: the Q-Former's tokens, and which of them are words.

        Args:
            part: the processor's arrays of one call.
            images: number of images of each prompt of the part.
        """
        if part.get("qformer_input_ids") is None:
            raise LVLMError(
                "qformer_input_ids is missing: InstructBLIP reads images with an instruction; give its processor's "
                "arrays"
            )
        tokens = np.asarray(part["qformer_input_ids"])
        mask_given = part.get("qformer_attention_mask")
        mask = np.ones_like(tokens) if mask_given is None else np.asarray(mask_given).astype(tokens.dtype)
        count = len(part["pixel_values"])
        if tokens.ndim != 2 or mask.shape != tokens.shape or len(tokens) not in (count, len(images)):
            raise LVLMError(
                f"qformer_input_ids has shape {tokens.shape} and qformer_attention_mask {mask.shape}; expected the "
                f"same, and a row for each of {count} images or of {len(images)} prompts"
            )
        rows = np.stack([tokens, mask], axis=1)
        return list(rows if len(rows) == count else np.repeat(rows, images, axis=0))

    def _pictures(self, pixels: np.ndarray, rows: Sequence[np.ndarray]) -> Pictures:
        count = len(pixels)
        tokens = np.full(count, self.qformer.num_queries)
        return Pictures(pixels, np.arange(count), tokens, self._geometry(rows))

    def _geometry(self, rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Instructions, padded on the right to a bucket; columns must not move, because they are positions."""
        longest, limit = max((row.shape[1] for row in rows), default=0), self.qformer.max_position_embeddings
        if longest > limit:
            raise LVLMError(f"the instruction has {longest} tokens and the Q-Former reads {limit}; shorten the prompt")
        length = round_up_to_bucket(longest, SHORTEST_INSTRUCTION)
        words, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
        for place, (tokens, valid) in enumerate(rows):
            words[place, : len(tokens)], mask[place, : len(tokens)] = tokens, valid
        vocabulary = self.qformer.vocab_size
        stray = mask & ((words < 0) | (words >= vocabulary))
        if stray.any():
            raise LVLMError(f"qformer_input_ids holds {words[stray][0]}; expected 0 to {vocabulary - 1}")
        return {"words": np.where(mask, words, 0), "mask": mask}


def _misnumbered(raw: Mapping[str, Any]) -> bool:
    """Whether special tokens are numbered as in the first conversion of LLaMA, as in published checkpoints.

    These numbers (begin 0, end 1, padding -1) are wrong for every LLaMA tokenizer: token 1 is <s>, which ends nothing.
    With InstructBLIP's tokenizer a text begins and ends with </s>.
    """
    text = raw.get("text_config") or {}
    return (text.get("bos_token_id"), text.get("eos_token_id")) == (0, 1)


@family("instructblip")
class InstructBlip(VisionLanguageModel):
    """InstructBLIP."""

    config: InstructBlipConfig

    def setup(self):
        self.vision_tower = EvaTower(self.config.vision, self.dtype)
        self.qformer = QFormer(self.config.qformer, self.dtype)
        self.connector = linear(self.config.text.hidden_size, self.dtype, None, use_bias=True)
        self.language_model = Decoder(self.config.text, self.dtype, self.remat)

    def encode_images(
        self, pixels: Float[Array, "I 3 Y X"], words: Int[Array, "I L"], mask: Bool[Array, "I L"]
    ) -> Float[Array, "I Q E"]:
        """Image tokens of I images, each read with its own instruction; see `QFormer`."""

        def look(model: InstructBlip, pixels: Array, words: Array, mask: Array) -> Float[Array, "I Q E"]:
            patches = model.vision_tower(pixels.astype(model.dtype))
            return model.connector(model.qformer(patches, words, mask))

        return by_pictures(self, look, pixels, self.config.vision.num_patches, words, mask)
