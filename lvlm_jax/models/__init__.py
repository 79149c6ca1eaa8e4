"""Model families, keyed by the `model_type` of a Hugging Face `config.json`.

A family is a configuration class (`from_hf`, `pictures`, `blank`) and a `VisionLanguageModel` with its own `setup` and
`encode_images`. Adding one is a file here, a line in `FAMILIES` and a key table in `weights/`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lvlm_jax.attention.context import Context
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.clip import VisionConfig
from lvlm_jax.models.config import DecoderConfig
from lvlm_jax.models.family import VisionLanguageModel
from lvlm_jax.models.gemma3 import Gemma3, Gemma3Config
from lvlm_jax.models.glm4v import Glm4v, Glm4vConfig
from lvlm_jax.models.instructblip import InstructBlip, InstructBlipConfig
from lvlm_jax.models.internvl import InternVl, InternVlConfig
from lvlm_jax.models.llava import Llava, LlavaConfig
from lvlm_jax.models.llava_next import LlavaNext, LlavaNextConfig
from lvlm_jax.models.llava_onevision import LlavaOnevision, LlavaOnevisionConfig
from lvlm_jax.models.qwen2_5_vl import Qwen25Vl, Qwen25VlConfig
from lvlm_jax.models.qwen2_vl import Qwen2Vl, Qwen2VlConfig
from lvlm_jax.models.qwen3_vl import Qwen3Vl, Qwen3VlConfig
from lvlm_jax.models.qwen_vl import QwenVl, QwenVlConfig
from lvlm_jax.models.smolvlm import SmolVlm, SmolVlmConfig

__all__ = [
    "FAMILIES",
    "DecoderConfig",
    "LlavaConfig",
    "VisionConfig",
    "abstract_parameters",
    "build",
    "config_from_hf",
]

FAMILIES: dict[str, tuple[type, type[VisionLanguageModel]]] = {
    "gemma3": (Gemma3Config, Gemma3),
    "glm4v": (Glm4vConfig, Glm4v),
    "idefics3": (SmolVlmConfig, SmolVlm),
    "instructblip": (InstructBlipConfig, InstructBlip),
    "internvl": (InternVlConfig, InternVl),
    "llava": (LlavaConfig, Llava),
    "llava_next": (LlavaNextConfig, LlavaNext),
    "llava_onevision": (LlavaOnevisionConfig, LlavaOnevision),
    "qwen2_5_vl": (Qwen25VlConfig, Qwen25Vl),
    "qwen2_vl": (Qwen2VlConfig, Qwen2Vl),
    "qwen3_vl": (Qwen3VlConfig, Qwen3Vl),
    "qwen_vl": (QwenVlConfig, QwenVl),
    "smolvlm": (SmolVlmConfig, SmolVlm),
}

# Families whose published `config.json` has another `model_type`.
PUBLISHED_AS = {"qwen": "qwen_vl"}


def config_from_hf(raw: dict[str, Any]) -> Any:
    """Reads the dict of a Hugging Face `config.json`.

    Raises:
        LVLMError: the model type or a value in the configuration is not supported.
    """
    model_type = PUBLISHED_AS.get(raw.get("model_type"), raw.get("model_type"))
    if model_type not in FAMILIES:
        raise LVLMError(f"model_type {model_type!r} is not supported; expected one of {', '.join(FAMILIES)}")
    # Imported here: reading a configuration is the only thing in this room that needs transformers.
    from transformers import CONFIG_MAPPING

    try:
        # Families that transformers does not carry read their own dict.
        hf = CONFIG_MAPPING[model_type].from_dict(raw) if model_type in CONFIG_MAPPING else None
    except Exception as error:  # transformers raises whatever the first bad field provokes
        raise LVLMError(
            f"config.json is not a valid {model_type} configuration: {' '.join(str(error).split())}"
        ) from error
    return FAMILIES[model_type][0].from_hf(raw, hf)


def build(config: Any, dtype: DTypeLike = jnp.float32, remat: bool = False) -> VisionLanguageModel:
    """The Linen module of a configuration. `dtype` is the compute dtype."""
    return FAMILIES[config.model_type][1](config, jnp.dtype(dtype), remat)


def abstract_parameters(config: Any, dtype: DTypeLike = jnp.float32) -> dict:
    """The parameter tree of a configuration as `jax.ShapeDtypeStruct` leaves; nothing is allocated."""
    module = build(config, dtype)
    blank = config.blank()

    def create(key: jax.Array) -> dict:
        tokens = jnp.zeros((1, 1), jnp.int32)
        context = Context(
            image_id=jnp.zeros((1, 1), jnp.int32),
            positions=tokens,
            first_row=jnp.zeros((), jnp.int32),
            image_end=jnp.zeros((1,), jnp.int32),
        )
        pixels, geometry = jax.tree.map(jnp.asarray, (blank.pixels, blank.geometry))
        return module.init(key, tokens, pixels, geometry, context)["params"]

    shapes = jax.eval_shape(create, jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
