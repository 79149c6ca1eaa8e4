"""Presents a GGUF file as a checkpoint folder."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from lvlm_jax.compilation import cache_folder
from lvlm_jax.errors import LVLMError
from lvlm_jax.weights.folder import put_in_place, write_json
from lvlm_jax.weights.gguf import SUFFIX, GgufFile


def as_folder(path: str | os.PathLike) -> Path:
    """Makes a checkpoint folder for a GGUF file in the user's cache: configuration, tokenizer, and a link to the file.

    Raises:
        LVLMError: the file is unreadable, or the folder cannot be written.
    """
    source = Path(path).resolve()
    about = source.stat()
    key = hashlib.sha256(f"{source} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder("gguf") / f"{source.stem}-{key}"
    if folder.is_dir():
        return folder
    file = GgufFile(source)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    except OSError as error:
        raise LVLMError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        write_json(partial / "config.json", file.hf_config())
        file.write_tokenizer(partial)
        (partial / f"model{SUFFIX}").symlink_to(source)
        put_in_place(partial, folder)
    except OSError as error:
        raise LVLMError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
