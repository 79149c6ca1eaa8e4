"""Qwen-VL of 2023 (arXiv 2308.12966): ViT-bigG, a 256-query resampler, Qwen-7B.

Hub repositories Qwen/Qwen-VL and Qwen/Qwen-VL-Chat. Their `config.json` has the model type "qwen", like that of the
text models, and transformers has no class for it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.clip import VisionConfig
from lvlm_jax.models.config import DecoderConfig, first_not_none
from lvlm_jax.models.decoder import Decoder
from lvlm_jax.models.family import FamilyConfig, VisionLanguageModel, family
from lvlm_jax.models.pictures import Arrays, Pictures, square_map, square_pixels, whole_pictures
from lvlm_jax.models.qwen_vl_vision import POOL_HEAD_DIM, QwenVisionTower, Resampler
from lvlm_jax.models.vision import by_pictures

# Special tokens after the vocabulary, in this order: <|endoftext|>, <|im_start|>, <|im_end|>, 205 reserved ones, six
# for boxes, then <img>, </img>, <imgpad>. Configurations name <img>.
END_OF_TEXT, TURN_START, TURN_END = -214, -213, -212
IMAGE_END, IMAGE_PAD = 1, 2

# Defaults of the published configuration class.
_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 8192,
    "seq_length": 2048,
    "rotary_pct": 1.0,
    "rotary_emb_base": 10000,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
}
_COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "kv_channels",
    "max_position_embeddings", "seq_length",
)  # fmt: skip
_VISUAL_COUNTS = ("image_size", "patch_size", "width", "layers", "heads", "n_queries", "output_dim")
_NORM_EPSILON = 1e-6  # of the tower and the resampler; not in the file


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVlConfig(FamilyConfig):
    """Qwen-VL: ViT-bigG, resampler, Qwen decoder.

    Attributes:
        queries: number of queries of the resampler.
        image_token_id: <imgpad>, which occurs between <img> and </img>.
    """

    vision: VisionConfig
    queries: int
    model_type: str = "qwen_vl"

    @classmethod
    def from_hf(cls, raw: dict, hf: Any = None) -> "QwenVlConfig":
        """Reads a published `config.json`; transformers has no class for it.

        Beyond `seq_length` (2048) tokens, the published model stretches rotary positions with the prompt's length
        (`use_dynamic_ntk`) and scales attention (`use_logn_attn`). Up to there, both do nothing. Here, if one of them
        is on, the context ends there and longer prompts are refused.

        Raises:
            LVLMError: a text model without `visual`, or a value that is not supported.
        """
        del hf
        visual = raw.get("visual")
        if not isinstance(visual, dict):
            raise LVLMError(
                "config.json of model_type 'qwen' has no 'visual': a text model without a vision tower; "
                "expected Qwen-VL or Qwen-VL-Chat"
            )
        text = _decoder(raw)
        vision, queries = _vision(visual, text.hidden_size)
        start = _count("visual.image_start_id", visual.get("image_start_id"))
        if start + END_OF_TEXT < 0:
            raise LVLMError(
                f"visual.image_start_id is {start}; expected at least {-END_OF_TEXT}, the special tokens before <img>"
            )
        end = raw.get("eos_token_id", start + END_OF_TEXT)
        return cls(
            text=text,
            vision=vision,
            queries=queries,
            image_token_id=start + IMAGE_PAD,
            eos_token_ids=tuple(end) if isinstance(end, list) else (end,),
            pad_token_id=raw.get("pad_token_id", start + END_OF_TEXT),
            hf=raw,
        )

    @property
    def tokens_per_image(self) -> int:
        """How many tokens every image takes: one for each query."""
        return self.queries

    @property
    def image_start_id(self) -> int:
        """The id of <img>; that of </img> is the next."""
        return self.image_token_id - IMAGE_PAD

    def stop_tokens(self, generation: Mapping[str, Any]) -> tuple[int, ...]:
        """Tokens that end an answer under a `generation_config.json`; a chat model's turn ends with <|im_end|>.

        Raises:
            LVLMError: a stop word has several tokens.
        """
        end = first_not_none(generation.get("eos_token_id"), list(self.eos_token_ids))
        words = [[token] for token in (end if isinstance(end, list) else [end])]
        words += generation.get("stop_words_ids") or []
        if any(len(word) != 1 for word in words):
            raise LVLMError(
                "generation_config.json has stop_words_ids of several tokens, which are not supported; "
                "remove them and give generate(stop=...) the words"
            )
        if generation.get("chat_format") == "chatml":
            words += [[self.image_start_id + TURN_END], [self.image_start_id + TURN_START]]
        return tuple(dict.fromkeys(word[0] for word in words))

    def mark_images(self, prompt: np.ndarray) -> np.ndarray:
        """The prompt with placeholders between each <img> and </img>.

        The published tokenizer writes the bytes of the image's path there, padded with <imgpad>.

        Raises:
            LVLMError: an <img> without its </img>.
        """
        starts = np.flatnonzero(prompt == self.image_start_id)
        ends = np.flatnonzero(prompt == self.image_start_id + IMAGE_END)
        if len(starts) != len(ends) or (starts > ends).any() or (starts[1:] < ends[:-1]).any():
            raise LVLMError(
                f"the prompt has {len(starts)} <img> and {len(ends)} </img>, not in pairs; was it truncated?"
            )
        marked = np.array(prompt)
        for start, end in zip(starts, ends, strict=True):
            marked[start + 1 : end] = self.image_token_id
        return marked

    def pictures(self, parts: Sequence[Arrays], prompts: Sequence[np.ndarray]) -> Pictures | None:
        """The tower's inputs, from a processor's `pixel_values` `[I, 3, Y, X]`; None without images.

        Raises:
            LVLMError: pixels have another shape or are not finite.
        """
        del prompts
        pixels = square_pixels(parts, self.vision.image_size)
        return None if pixels is None else whole_pictures(pixels, self.tokens_per_image)

    def blank(self) -> Pictures:
        """One empty image, in the form of `pictures`."""
        side = self.vision.image_size
        return whole_pictures(np.zeros((1, 3, side, side), np.float32), self.tokens_per_image)

    def token_map(self, pictures: Pictures, image: int) -> Int[np.ndarray, "H W"]:
        """For each position of a square, the image token whose query belongs to it; queries also attend elsewhere."""
        del pictures, image
        return square_map(self.tokens_per_image)


def _decoder(raw: dict) -> DecoderConfig:
    """The decoder of a published configuration."""
    settings = {name: first_not_none(raw.get(name), default) for name, default in _DEFAULTS.items()}
    for name in _COUNTS:
        _count(name, settings[name])
    if not settings["scale_attn_weights"]:
        raise LVLMError("scale_attn_weights false is not supported; expected true")
    heads, head_dim, width = settings["num_attention_heads"], settings["kv_channels"], settings["hidden_size"]
    if heads * head_dim != width:
        raise LVLMError(
            f"num_attention_heads {heads} times kv_channels {head_dim} is not hidden_size {width}; "
            "the published model has no other form"
        )
    context = settings["max_position_embeddings"]
    if settings["use_dynamic_ntk"] or settings["use_logn_attn"]:
        context = min(context, settings["seq_length"])
    return DecoderConfig.from_hf(
        SimpleNamespace(
            model_type="qwen",
            vocab_size=settings["vocab_size"],
            hidden_size=width,
            intermediate_size=settings["intermediate_size"] // 2,  # the file counts both halves of the gated MLP
            num_hidden_layers=settings["num_hidden_layers"],
            num_attention_heads=heads,
            head_dim=head_dim,
            rms_norm_eps=settings["layer_norm_epsilon"],
            rope_parameters={
                "rope_theta": settings["rotary_emb_base"],
                "partial_rotary_factor": settings["rotary_pct"],
            },
            hidden_act="silu",
            max_position_embeddings=context,
            projection_bias=not settings["no_bias"],
            tie_word_embeddings=settings["tie_word_embeddings"],
        )
    )


def _vision(visual: dict, width: int) -> tuple[VisionConfig, int]:
    """The tower and the number of queries from `visual`; `width` is the decoder's."""
    settings = {"n_queries": 256, **visual}
    for name in _VISUAL_COUNTS:
        _count(f"visual.{name}", settings.get(name))
    output, queries = settings["output_dim"], settings["n_queries"]
    if output != width:
        raise LVLMError(f"visual.output_dim {output} is not the decoder's hidden_size {width}")
    if output % POOL_HEAD_DIM:
        raise LVLMError(f"visual.output_dim {output} is not a multiple of {POOL_HEAD_DIM}")
    if math.isqrt(queries) ** 2 != queries:
        raise LVLMError(f"visual.n_queries {queries} is not a square number")
    if settings["width"] % settings["heads"]:
        raise LVLMError(f"visual.width {settings['width']} is not a multiple of visual.heads {settings['heads']}")
    ratio = settings.get("mlp_ratio")
    if not isinstance(ratio, int | float) or ratio <= 0:
        raise LVLMError(f"visual.mlp_ratio is {ratio!r}; expected a positive number")
    vision = VisionConfig(
        hidden_size=settings["width"],
        intermediate_size=int(settings["width"] * ratio),
        num_layers=settings["layers"],
        num_heads=settings["heads"],
        image_size=settings["image_size"],
        patch_size=settings["patch_size"],
        hidden_act="gelu",
        layer_norm_eps=_NORM_EPSILON,
    )
    return vision, queries


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LVLMError(f"{name} is {value!r}; expected a positive whole number")
    return value


@family("qwen_vl", published_as="qwen")
class QwenVl(VisionLanguageModel):
    """Qwen-VL."""

    config: QwenVlConfig

    def setup(self):
        config = self.config
        self.vision_tower = QwenVisionTower(config.vision, self.dtype)
        self.connector = Resampler(config.queries, config.text.hidden_size, config.vision.layer_norm_eps, self.dtype)
        self.language_model = Decoder(config.text, self.dtype, self.remat)

    def encode_images(self, pixels: Float[Array, "I 3 Y X"]) -> Float[Array, "I Q E"]:
        """Image tokens of I images, for the decoder."""

        def look(model: QwenVl, pixels: Float[Array, "I 3 Y X"]) -> Float[Array, "I Q E"]:
            return model.connector(model.vision_tower(pixels))

        return by_pictures(self, look, pixels, self.config.vision.num_patches)
