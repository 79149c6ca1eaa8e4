"""Writes the files beside a checkpoint's weights, and moves a finished folder into place."""

import ctypes
import errno
import glob
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

from lvlm_jax.files import remove_stale
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.weights.checkpoint import read_optional

PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "qwen.tiktoken",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
# InstructBLIP's second tokenizer, and further chat templates.
PROCESSOR_FOLDERS = ("qformer_tokenizer", "additional_chat_templates")
TRAINING = "training.json"  # how a checkpoint or an adapter was trained
_EXCHANGE = 2  # the same for Linux's renameat2 and macOS's renamex_np
_HERE = -100  # names are relative to the current folder


def copy_processor(source: Path, target: Path, config: FamilyConfig) -> None:
    """Copies the processor's files. Code in the source is not copied; a warning names it."""
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for name in PROCESSOR_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
    if config.hf.get("image_aspect_ratio") == "pad":
        _pad(target)
    if code := sorted(path.name for path in source.glob("*.py")):
        warnings.warn(
            f"{source} has its own code, which is not copied: {', '.join(code[:5])}"
            f"{', ...' if len(code) > 5 else ''}; programs with trust_remote_code need the source",
            stacklevel=3,
        )


def _pad(folder: Path) -> None:
    """Makes transformers pad images to squares, if the configuration of the authors' LLaVA says so
    (`processors.llava`)."""
    for name, part in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        file = read_optional(folder, name)
        settings = file if part is None else file.get(part)
        if isinstance(settings, dict) and settings:
            settings |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
            settings.pop("feature_extractor_type", None)
            write_json(folder / name, file)


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file as transformers does."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def put_in_place(partial: Path, folder: Path) -> None:
    """Moves a finished folder into place, replacing an old one if there is one.

    If the system can exchange two names, there is a checkpoint at `folder` at every moment. Otherwise, between two
    renames, the old folder is briefly beside `folder` under a hidden name, which `resolve_checkpoint` reports.
    """
    if not folder.exists():
        partial.rename(folder)
    elif not _exchange(partial, folder):
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
        folder.rename(old)  # replacing an empty folder is atomic
        try:
            partial.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    # Folders left by saves that were interrupted between the two renames.
    remove_stale(folder.parent, f".{glob.escape(folder.name)}.old-*")


def _exchange(old: Path, new: Path) -> bool:
    """Exchanges the names of two folders atomically; False if the system or the file system cannot."""
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    names = os.fsencode(old), os.fsencode(new)
    if hasattr(library, "renameat2"):
        failed = library.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE)
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, _EXCHANGE)
    else:
        return False
    number = ctypes.get_errno()
    if failed and number not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(number, os.strerror(number))
    return not failed
