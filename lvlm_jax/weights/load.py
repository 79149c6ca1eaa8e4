"""Loads Hugging Face files as parameters on devices, one tensor at a time.

Peak host memory is the parameters that stay on the host plus one tensor: files are mapped, a tensor's pages are
released as soon as it is on its device, and of a sharded tensor only this process's slices are read. With quantization,
a tensor goes to its device in its stored type, is quantized there, and is freed before the next one.
"""

import dataclasses
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax import models
from lvlm_jax.errors import LVLMError, shown
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.weights import internvl_chat, original, quantize
from lvlm_jax.weights.checkpoint import open_files, read_configuration, read_optional, weight_files
from lvlm_jax.weights.plan import Source, TensorFile, plan
from lvlm_jax.weights.tables import LINEAR, flatten, inverse, permute, unflatten

Sharding = jax.sharding.Sharding
Place = Callable[[str, tuple[int, ...]], Sharding]
DTYPES = ("float32", "bfloat16", "float16")
Files = str | os.PathLike | Sequence[str | os.PathLike]

# `model_type` that transformers does not support -> function (folder, configuration) that rewrites the configuration.
_REWRITTEN = {internvl_chat.MODEL_TYPE: internvl_chat.to_hf_config}


def read_config(folder: str | os.PathLike, vision_tower: str | os.PathLike | None = None) -> dict:
    """The Hugging Face configuration of a checkpoint folder; rewrites the layouts of models' authors.

    Args:
        folder: the checkpoint folder.
        vision_tower: the CLIP checkpoint of an original checkpoint, if its configuration does not lead to it.

    Raises:
        LVLMError: there is no readable `config.json`, or a value in it is not supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LVLMError(f"no such folder: {folder}; expected a checkpoint folder")
    config = read_configuration(folder)
    try:
        if original.is_original(config):
            return original.to_hf_config(folder, config, vision_tower)
        _check_no_tower(folder, vision_tower)
        model_type = config.get("model_type")
        rewrite = _REWRITTEN.get(model_type) if isinstance(model_type, str) else None
        return rewrite(folder, config) if rewrite else config
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:  # a field has another type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise LVLMError(f"config.json of {folder} has a field of the wrong type: {reason}") from error


def model_config(folder: str | os.PathLike, vision_tower: str | os.PathLike | None = None) -> FamilyConfig:
    """The model's configuration; stop tokens of `generation_config.json` take precedence over those of `config.json`.

    Arguments and errors as in `read_config`.
    """
    config = models.config_from_hf(read_config(folder, vision_tower))
    stops = config.stop_tokens(read_optional(Path(folder), "generation_config.json"))
    return dataclasses.replace(config, eos_token_ids=stops)


def parameter_dtype(name: str) -> jnp.dtype:
    """The dtype called "float32", "bfloat16" or "float16".

    Raises:
        LVLMError: another name.
    """
    try:
        dtype = jnp.dtype(name) if name is not None else None
    except (TypeError, ValueError):
        dtype = None
    if str(name if isinstance(name, str) else dtype) not in DTYPES:  # NumPy has other names for them
        raise LVLMError(f"dtype {shown(name)} is not supported; expected one of {', '.join(DTYPES)}")
    return dtype


def load_parameters(
    folder_or_files: Files,
    config: FamilyConfig,
    dtype=None,
    sharding: Sharding | Place | Mapping | None = None,
    vision_tower: str | os.PathLike | None = None,
    quant: str | None = None,
) -> dict:
    """Loads a checkpoint into the parameter tree of a configuration.

    Args:
        folder_or_files: a checkpoint folder, or the weight files themselves.
        config: the model's configuration, for example a `LlavaConfig`.
        dtype: dtype of the parameters; None keeps that of the files.
        sharding: where parameters live: one sharding for all, a nested dict of shardings shaped like the tree, or a
            function of a path and a shape such as "language_model/norm/scale" and (4096,). None: the default device,
            uncommitted.
        vision_tower: the CLIP checkpoint (folder or hub id) of an original checkpoint without a tower. If given, it is
            used even if there is a tower inside.
        quant: "int8" quantizes the decoder (`weights.quantize`); shardings are then those of the quantized tree.

    Returns:
        A nested dict of arrays. Parameters that no chosen feature layer reads (the tower's last layers) are zeros if
        the checkpoint lacks them.

    Raises:
        LVLMError: a file is unreadable, or `quant` is unknown, or tensors are missing, unexpected, misshapen or not
            floating-point; all such tensors are reported at once.
    """
    quantize.check_quant(quant)
    expected = {path: tuple(leaf.shape) for path, leaf in flatten(models.abstract_parameters(config)).items()}
    files, tower = open_checkpoint(folder_or_files, vision_tower)
    single = isinstance(folder_or_files, str | os.PathLike)
    source_name = folder_or_files if single else ", ".join(map(str, folder_or_files))
    sources = plan(source_name, config, expected, files, tower)
    place = _placement(sharding)
    dtype = None if dtype is None else np.dtype(dtype)
    flat = {}
    for path, shape in expected.items():
        if quant is not None and quantize.is_quantized(path):
            flat |= _load_quantized(path, sources[path], place)
        elif path in sources:
            flat[path] = _load(sources[path], dtype, place(path, shape))
        else:
            flat[path] = jnp.zeros(shape, dtype or jnp.float32, device=place(path, shape))
    return unflatten(flat)


def open_checkpoint(folder_or_files: Files, vision_tower=None) -> tuple[list[TensorFile], list[TensorFile]]:
    """Opens the files of a checkpoint and those of a separate vision tower; arguments as in `load_parameters`.

    Raises:
        LVLMError: there are no files, one is unreadable, or they contain quantized weights.
    """
    if not isinstance(folder_or_files, str | os.PathLike):
        tower = weight_files(original.find_tower(Path(), {}, vision_tower)) if vision_tower else []
        return open_files(folder_or_files), open_files(tower)
    folder = Path(folder_or_files)
    files = open_files(weight_files(folder))
    _check_not_quantized(folder, files)
    config = read_configuration(folder)
    if not original.is_original(config):
        _check_no_tower(folder, vision_tower)
        return files, []
    inside = any(".vision_tower." in name for file in files for name in file.shapes)
    if inside and vision_tower is None:
        return files, []
    return files, open_files(original.tower_files(folder, config, vision_tower))


def _check_not_quantized(folder: Path, files: Sequence[TensorFile]) -> None:
    """Recognises quantized files by the names of their tensors, if the configuration does not name the quantization."""
    marks = (".qweight", ".qzeros")  # AWQ, GPTQ
    marks += (".absmax", ".SCB")  # bitsandbytes
    marks += (".weight_scale", ".weight_scale_inv", ".weight_packed")  # FP8, compressed-tensors
    marks += ("._data", "_qdata")  # quanto, torchao
    quantized = next((name for file in files for name in file.shapes if name.endswith(marks)), None)
    if quantized is not None:
        raise LVLMError(
            f"{folder} has quantized weights ({'.'.join(quantized.split('.')[-2:])}), which are not supported; use the "
            "checkpoint with full weights"
        )


def _check_no_tower(folder: Path, vision_tower) -> None:
    if vision_tower is not None:
        raise LVLMError(f"vision_tower {vision_tower} was given, but {folder} has its tower inside: leave it out")


def _placement(sharding) -> Callable[[str, tuple[int, ...]], Sharding | None]:
    if sharding is None or isinstance(sharding, Sharding):
        return lambda path, shape: sharding
    if isinstance(sharding, Mapping):
        by_path = flatten(sharding)
        return lambda path, shape: by_path[path]
    return sharding


def _load_quantized(path: str, source: Source, place: Callable) -> dict[str, jax.Array]:
    """Loads a kernel and quantizes it; returns path -> leaf."""
    transposed = dataclasses.replace(source, axes=None if source.axes == LINEAR else LINEAR)  # [out, in]
    wide = _load(transposed, None, place(quantize.leaf_paths(path)[0], transposed.shape))
    leaves = quantize.leaves(path, wide, place)
    jax.block_until_ready(leaves)
    wide.delete()
    return leaves


def _load(source: Source, dtype: np.dtype | None, sharding: Sharding | None) -> jax.Array:
    host = source.view()
    if sharding is None:
        array = jax.device_put(_copy_if_needed(host, dtype))
    else:
        slices = sharding.addressable_devices_indices_map(host.shape)
        pieces = [jax.device_put(_copy_if_needed(host[index], dtype), device) for device, index in slices.items()]
        array = jax.make_array_from_single_device_arrays(host.shape, sharding, pieces)
    array.block_until_ready()
    source.file.release(source.name)
    return array


def _copy_if_needed(piece: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """The piece in its final dtype, in memory that the device array may keep without aliasing the file.

    JAX on a CPU adopts aligned contiguous memory, even of a read-only map. It always copies a transposed view, and
    transposes several times faster than NumPy, so it gets that view.
    """
    dtype = piece.dtype if dtype is None else dtype
    if piece.dtype == dtype and not piece.flags.c_contiguous:
        return piece
    # The copy keeps the order of axes in memory. Its memory is mapped, not from the heap: freed heap memory of this
    # size stays with the process in fragments and raises its peak.
    order = tuple(int(axis) for axis in np.argsort([-stride for stride in piece.strides], kind="stable"))
    buffer = mmap.mmap(-1, max(1, piece.size * dtype.itemsize))
    copy = np.frombuffer(buffer, dtype, piece.size).reshape(permute(piece.shape, order))
    copy[...] = piece.transpose(order)
    return copy.transpose(inverse(order))
