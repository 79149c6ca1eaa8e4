"""Converts the authors' own checkpoint layout (liuhaotian/llava-v1.5-*) to a normal LLaVA configuration.

It differs from the `llava-hf` repositories in three ways:

- the configuration is a LLaMA configuration with `mm_*` fields, without the vision tower's configuration;
- the tower's weights are usually in a CLIP checkpoint that `mm_vision_tower` names;
- the vocabulary has no image token. Prompts use the number -200 there. `llava-hf` appended `<image>` and `<pad>` and
  rounded the vocabulary up to a multiple of 64, so that 32000 became 32064 and `<image>` 32000; we do the same, which
  makes the processor files of a `llava-hf` repository fit. Its converter drew the new rows at random around the mean
  row. Here each new row of the embedding and of the output layer is the mean row itself. This is deterministic, and the
  logit of an added token is then the mean of all logits, which greedy decoding never chooses.
"""

import os
from pathlib import Path

import numpy as np

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.weights.checkpoint import read_configuration, resolve_checkpoint, weight_files

VOCABULARY_MULTIPLE = 64
_ADDED_TOKENS = 2  # <image>, <pad>
_SELECT = {"patch": "default", "cls_patch": "full"}

# Sizes of known towers, for checkpoints that contain the tower's weights but not its configuration.
_CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
_KNOWN_TOWERS = {
    "clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
}


def is_original(config: dict) -> bool:
    """Whether a `config.json` has the authors' layout."""
    return "vision_config" not in config and ("mm_vision_tower" in config or "mm_projector_type" in config)


def find_tower(folder: Path, config: dict, vision_tower: str | os.PathLike | None = None) -> Path | None:
    """The folder of the CLIP checkpoint that belongs to an original checkpoint, or None.

    Searched in this order: `vision_tower` (a folder or a hub id), `mm_vision_tower` as a folder, a folder with
    the last part of that name, inside or beside the checkpoint.

    Raises:
        LVLMError: `vision_tower` was given and does not exist.
    """
    if vision_tower is not None:
        return resolve_checkpoint(vision_tower)
    tower_name = config.get("mm_vision_tower")
    if not tower_name:
        return None
    name = Path(tower_name).name
    candidates = (files.expand(tower_name), folder / name, folder.resolve().parent / name)
    return next((path for path in candidates if (path / "config.json").is_file()), None)


def to_hf_config(folder: Path, config: dict, vision_tower: str | os.PathLike | None = None) -> dict:
    """The `LlavaConfig` dict of transformers for an original configuration.

    Args:
        folder: the checkpoint's folder, where the tower is searched.
        config: its `config.json`.
        vision_tower: the CLIP checkpoint, if `config` does not lead to it.

    Raises:
        LVLMError: a projector, feature selection, tower or image option that LLaVA-1.5 does not have, or there is no
            tower configuration.
    """
    projector = config.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise LVLMError(f"mm_projector_type {projector!r} is not supported; expected 'mlp2x_gelu' (LLaVA-1.5)")
    feature = config.get("mm_vision_select_feature", "patch")
    if feature not in _SELECT:
        raise LVLMError(f"mm_vision_select_feature {feature!r} is not supported; expected one of {', '.join(_SELECT)}")
    _check_kept(config)
    vision = _vision_config(folder, config, vision_tower)
    width = vision.get("hidden_size", 768)  # CLIP's own default, which its files leave out
    if config.get("mm_hidden_size", width) != width:
        raise LVLMError(
            f"mm_hidden_size {config['mm_hidden_size']} of {folder} and hidden_size {width} of the vision tower "
            "differ; name the right tower with vision_tower="
        )
    own = {name: value for name, value in config.items() if not name.startswith(("mm_", "tune_mm_", "freeze_mm_"))}
    removed = ("architectures", "auto_map", "image_aspect_ratio", "image_grid_pinpoints", "_name_or_path")
    text = {name: value for name, value in own.items() if name not in removed}
    vocabulary = config.get("vocab_size", 32000)
    padded = -(-(vocabulary + _ADDED_TOKENS) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    text |= {"model_type": "mistral" if "mistral" in config.get("model_type", "") else "llama", "vocab_size": padded}
    hf = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": vocabulary,
        "pad_token_id": vocabulary + 1,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "vision_config": vision,
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _SELECT[feature],
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }
    if config.get("image_aspect_ratio") == "pad":
        hf["image_aspect_ratio"] = "pad"  # read by `processors.llava`
    return hf | {key: config[key] for key in ("torch_dtype", "dtype") if key in config}


def _check_kept(config: dict) -> None:
    """Raises an LVLMError for a setting under which LLaVA would read images or prompts differently from us."""
    supported_values = {
        "image_aspect_ratio": (("pad", "square", None), "'pad' or 'square' ('anyres' is LLaVA-NeXT: take llava-hf's)"),
        "mm_patch_merge_type": (("flat", None), "'flat' (other kinds are LLaVA-NeXT: take llava-hf's)"),
        "mm_resampler_type": ((None, "identity"), "none"),
        "mm_use_im_start_end": (
            (False, None),
            "false: images between <im_start> and <im_end> are not supported; train without mm_use_im_start_end",
        ),
    }
    for name, (supported, expected) in supported_values.items():
        value = config.get(name)
        if not any(value is one or value == one for one in supported):
            raise LVLMError(f"{name} of config.json is {str(value)[:40]!r}; expected {expected}")


def _vision_config(folder: Path, config: dict, vision_tower: str | os.PathLike | None) -> dict:
    tower = find_tower(folder, config, vision_tower)
    tower_name = str(config.get("mm_vision_tower"))
    if tower is None:
        sizes = _KNOWN_TOWERS.get(Path(tower_name).name)
        if sizes is None:
            raise LVLMError(
                f"the vision tower {tower_name} of {folder} was not found; give its folder with vision_tower="
            )
        return dict(sizes)
    vision = read_configuration(tower)
    vision = vision.get("vision_config", vision)
    kind = vision.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise LVLMError(f"{tower / 'config.json'} has model_type {kind!r}; expected a CLIP checkpoint")
    return vision | {"model_type": kind}


def tower_files(folder: Path, config: dict, vision_tower: str | os.PathLike | None = None) -> list[Path]:
    """The weight files of the separate vision tower.

    Raises:
        LVLMError: they were not found.
    """
    tower = find_tower(folder, config, vision_tower)
    if tower is None:
        raise LVLMError(
            f"{folder} has no vision tower, and {config.get('mm_vision_tower')} is not a folder: give its folder or "
            "hub id with vision_tower="
        )
    return weight_files(tower)


def append_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """Appends `count` rows, [N, E] -> [N + count, E], each the mean row (computed in float64)."""
    mean = rows.mean(axis=0, dtype=np.float64).astype(rows.dtype)
    return np.concatenate([rows, np.broadcast_to(mean, (count, rows.shape[1]))])
