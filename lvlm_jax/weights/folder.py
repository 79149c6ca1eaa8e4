"""What lies beside the weights of a saved checkpoint, and how the finished folder takes the place of an old one."""

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
# InstructBLIP's second tokenizer; chat templates besides the usual one.
PROCESSOR_FOLDERS = ("qformer_tokenizer", "additional_chat_templates")
_EXCHANGE = 2  # of Linux's renameat2 and of macOS's renamex_np alike
_HERE = -100  # names are relative to the current folder


def copy_processor(source: Path, target: Path, config: FamilyConfig) -> None:
    """Copies the processor's files. Code in the source is named in a warning, and not copied."""
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
            f"{source} has code of its own, which is not copied: {', '.join(code[:5])}"
            f"{', ...' if len(code) > 5 else ''}; what needs it (trust_remote_code) finds it in the source alone",
            stacklevel=3,
        )


def _pad(folder: Path) -> None:
    """Makes transformers pad images to squares, as the configuration of an authors' LLaVA says (`processors.llava`)."""
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
    """Puts a finished folder in place of another, if there is one.

    Where the system can exchange two names, there is no moment without a checkpoint under `folder`. Elsewhere the old
    one lies beside it, under a hidden name, for the moment between two renames; `resolve_checkpoint` names it.
    """
    if not folder.exists():
        partial.rename(folder)
    elif not _exchange(partial, folder):
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
        folder.rename(old)  # onto an empty folder: atomic
        try:
            partial.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    # What saves left that were cut off between the two.
    remove_stale(folder.parent, f".{glob.escape(folder.name)}.old-*")


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders in one step; False where the system or the file system cannot."""
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    names = os.fsencode(one), os.fsencode(other)
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
