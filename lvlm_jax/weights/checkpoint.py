"""Finds a checkpoint (a folder or a hub id), its configuration and its weight files."""

import difflib
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.weights.bin_file import BinFile
from lvlm_jax.weights.gguf import GgufFile
from lvlm_jax.weights.safetensors_file import SafetensorsFile

# (single file, index file, glob of files without an index), in the order of transformers. So a single file takes
# precedence over an index left by an earlier save, and an adapter's file is never taken for the model.
_LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json", "model*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ("model.gguf", "model.gguf.index.json", "model*.gguf"),
)
# Parameters that were trained besides adapters; if two files have the same one, that of the later file is used.
TRAINED = ("mm_projector.bin", "non_lora_state_dict.bin", "non_lora_trainables.bin", "non_lora_trainables.safetensors")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin", *TRAINED)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TEXT_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "*.tiktoken"]


def resolve_checkpoint(path_or_hub_id: str | os.PathLike, weights: bool = True) -> Path:
    """A folder on this machine for a path or a hub id ("llava-hf/llava-1.5-7b-hf").

    An existing folder is returned as it is. Anything else is downloaded, or taken from the hub's cache, following
    `HF_HUB_OFFLINE`, `HF_HOME` and similar variables; weights as safetensors, or as `.bin` if the repository has
    nothing else. No code of a repository is downloaded or run.

    Args:
        path_or_hub_id: the folder or hub id.
        weights: False downloads the index of the weights, but no weights.

    Raises:
        LVLMError: there is no such folder, and no such model on the hub (or the hub is out of reach).
    """
    folder, name = files.expand(path_or_hub_id), os.fsdecode(path_or_hub_id)
    if name and folder.is_dir():
        return folder
    if folder.is_file():
        raise LVLMError(f"{name} is a file; expected a checkpoint folder or a hub id like owner/name")
    if folder.parent.is_dir() and (old := sorted(folder.parent.glob(f".{glob.escape(folder.name)}.old-*"))):
        raise LVLMError(
            f"{name} does not exist; an interrupted save left the old checkpoint in "
            f"{old[0]}: rename that, or save again"
        )
    if not _HUB_ID.fullmatch(name):
        raise LVLMError(f"no such folder: {name!r}; expected a checkpoint folder or a hub id like owner/name")
    # Imported here: the import is slow and not needed for a folder.
    from huggingface_hub import snapshot_download

    try:
        patterns = [*_TEXT_FILES, *(("model*.safetensors", *_ADAPTER_FILES) if weights else ())]
        snapshot = Path(snapshot_download(name, allow_patterns=patterns))
        if weights and not any(snapshot.glob("model*.safetensors")):
            snapshot = Path(snapshot_download(name, allow_patterns=[*_TEXT_FILES, "pytorch_model*.bin"]))
    except Exception as error:  # the hub's client has a dozen unrelated classes for missing files and network errors
        reason = " ".join(str(error).split()) or type(error).__name__
        close = difflib.get_close_matches(name, ("pocket", "smol"), n=1)  # `names.checkpoint` knows these
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise LVLMError(
            f"{name} is neither a folder nor a model that could be downloaded from the hub{hint}: {reason[:300]}"
        ) from error
    return snapshot


def read_configuration(folder: Path) -> dict:
    """Reads the `config.json` of a checkpoint folder.

    Raises:
        LVLMError: the file is missing, is not JSON, or is not an object.
    """
    path = folder / "config.json"
    if not path.exists():
        raise LVLMError(f"no config.json in {folder}; expected a Hugging Face checkpoint folder")
    return files.read_json(path, "configuration", dict)


def read_optional(folder: Path, name: str) -> dict:
    """Reads another JSON file of a checkpoint folder; an empty dict if there is none.

    Raises:
        LVLMError: it is unreadable, is not JSON, or is not an object.
    """
    path = folder / name
    return files.read_json(path, "file", dict) if path.is_file() else {}


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, in the first format of which it has files: safetensors, `.bin` or GGUF.

    In this format, they are the single file, else the files that an index names, else all files whose names match.

    Raises:
        LVLMError: there is no such folder, no weights in it, a malformed index, or a missing shard.
    """
    if not folder.is_dir():
        raise LVLMError(f"no such folder: {folder}; expected a checkpoint folder")
    for single, index, pattern in _LAYOUTS:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _shards(folder / index)
        if matches := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return matches
    adapter = next((name for name in _ADAPTER_FILES if (folder / name).is_file()), None)
    if adapter is not None:
        raise LVLMError(
            f"{folder} has an adapter ({adapter}) and no weights of a model: load the model it was trained on, and "
            "give this folder as adapter="
        )
    looked_for = ", ".join(name for layout in _LAYOUTS for name in layout)
    raise LVLMError(f"no weights in {folder}: looked for {looked_for}")


def _shards(index: Path) -> list[Path]:
    weight_map = files.read_json(index, "index of weights", dict).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LVLMError(f"{index} has no weight_map; expected tensor name -> file name")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise LVLMError(f"{index} names {outside[0]}; expected files in its own folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise LVLMError(
            f"{index} names {len(missing)} of {len(names)} files that do not exist: {', '.join(missing[:10])}; "
            "download them"
        )
    return [index.parent / name for name in names]


_READERS = {".bin": BinFile, ".pt": BinFile, ".pth": BinFile, ".gguf": GgufFile}  # all others: safetensors


def open_files(paths: Sequence[str | os.PathLike]) -> list[SafetensorsFile | BinFile | GgufFile]:
    """Opens weight files by their suffix.

    Raises:
        LVLMError: a file is unreadable.
    """
    return [_READERS.get(Path(path).suffix, SafetensorsFile)(path) for path in paths]
