"""Model families, by the `model_type` of a Hugging Face `config.json`.

To add a family, write a file here that registers its two classes (`models.family`), and a key table in `weights/`.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lvlm_jax.attention.context import Context
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.family import FAMILIES, PUBLISHED_AS, FamilyConfig, VisionLanguageModel

__all__ = ["FAMILIES", "FamilyConfig", "abstract_parameters", "build", "config_from_hf"]

for _file in pkgutil.iter_modules(__path__):  # each family registers itself
    importlib.import_module(f"{__name__}.{_file.name}")


def config_from_hf(raw: dict[str, Any]) -> FamilyConfig:
    """Reads the dict of a Hugging Face `config.json`.

    Raises:
        LVLMError: the model type or a value in the configuration is not supported.
    """
    model_type_given = raw.get("model_type")
    model_type = PUBLISHED_AS.get(model_type_given, model_type_given) if isinstance(model_type_given, str) else ""
    if model_type not in FAMILIES:
        names = ", ".join(sorted(FAMILIES))
        raise LVLMError(f"model_type {model_type_given!r} is not supported; expected one of {names}")
    _refuse_quantized(raw)
    family = FAMILIES[model_type].config
    nested = family.nested(raw)
    # Imported here, because only reading a configuration needs transformers.
    from transformers import CONFIG_MAPPING

    try:
        # Families without a class in transformers read the dict themselves.
        hf = CONFIG_MAPPING[model_type].from_dict(nested) if model_type in CONFIG_MAPPING else None
        config = family.from_hf(nested, hf)
        decoder = config.text.model_type
        if decoder.endswith("_text") and decoder != f"{model_type}_text":
            raise LVLMError(
                f"text_config.model_type {decoder!r} belongs to {decoder.removesuffix('_text')!r} and is not supported "
                f"in {model_type!r}"
            )
        hash(config)  # jit needs a hashable configuration
        config.blank()  # fails here if the sizes are inconsistent
    except LVLMError:
        raise
    except Exception as error:  # an invalid field may raise anything in transformers or in arithmetic
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise LVLMError(f"config.json is not a valid {model_type} configuration: {reason}") from error
    # Keep the original dict for writing it back, even if the family nested it for reading.
    return config if nested is raw else dataclasses.replace(config, hf=raw)


_QUANTIZED = {"awq": "AWQ", "gptq": "GPTQ", "bitsandbytes": "bitsandbytes", "fp8": "FP8", "fbgemm_fp8": "FP8"}


def _refuse_quantized(raw: Mapping[str, Any]) -> None:
    """Raises an LVLMError if a configuration, or a part of it, says that the weights are quantized."""
    for part in (raw, *(value for value in raw.values() if isinstance(value, Mapping))):
        for field in ("quantization_config", "compression_config"):
            if settings := part.get(field):
                raise LVLMError(
                    f"config.json has a {field}: its weights are quantized ({_quantization(settings)}), which is not "
                    'supported; take the checkpoint with full weights (quant="int8" makes its decoder small)'
                )


def _quantization(settings: Any) -> str:
    """The usual name of a kind of quantization."""
    settings = settings if isinstance(settings, Mapping) else {}
    kind = settings.get("quant_method") or settings.get("quant_algo")
    if kind is None and any(str(name).startswith(("load_in_", "bnb_", "_load_in_")) for name in settings):
        kind = "bitsandbytes"
    return _QUANTIZED.get(str(kind).lower(), str(kind or "of an unnamed kind")[:40])


def build(config: FamilyConfig, dtype: DTypeLike = jnp.float32, remat: bool = False) -> VisionLanguageModel:
    """The Linen module of a configuration; `dtype` is the compute dtype."""
    return FAMILIES[config.model_type].module(config, jnp.dtype(dtype), remat)


@functools.lru_cache(maxsize=8)  # cached, because it traces the whole model
def abstract_parameters(config: FamilyConfig, dtype: DTypeLike = jnp.float32) -> dict:
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
