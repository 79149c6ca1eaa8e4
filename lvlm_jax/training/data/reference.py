"""Log-probabilities under the reference model, computed once and cached on disk.

Full fine-tuning changes all base weights, so the alternative would be a second copy of the model. The file's name is a
hash of everything that determines its content, so a resumed run finds the file, and a run with other
log-probabilities does not use it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lvlm_jax import files, parallel
from lvlm_jax.journal import progress
from lvlm_jax.training.data.pair_batches import Batch, EncodedRow, Encoder, in_order
from lvlm_jax.training.data.pictures import Cropped, Picture
from lvlm_jax.training.validation import on_mesh
from lvlm_jax.weights.fingerprint import fingerprint


def with_reference(
    rows: tuple[EncodedRow, ...],
    encoder: Encoder,
    score: Callable[[Any, Batch], jax.Array],
    params: Any,
    settings: dict,
    folder: Path,
    size: int,
    mesh: Mesh | None = None,
) -> tuple[EncodedRow, ...]:
    """Rows with their answer tokens' log-probabilities under `params`, from the cache if it has them.

    Args:
        score: (params, batch) -> log-probabilities of the answer tokens of S sequences, `Float[B, S, A]`; pure.
        params: the reference model.
        settings: everything else that determines the log-probabilities, such as the method and the dtype; plain JSON
            values.
        folder: folder of the cache; created if missing.
        size: number of rows that are computed together.

    Raises:
        LVLMError: the cache cannot be written.
    """
    path = folder / f"{digest(rows, encoder, params, settings)}.npz"
    lengths = [int(tokens.answers.sum()) for row in rows for tokens in row.sequences.values()]
    logprobs = _read(path, lengths)
    # All processes compute, or none: a program on their common mesh needs all of them.
    if not np.all(multihost_utils.process_allgather(np.asarray(logprobs is not None))):
        logprobs = _compute(rows, encoder, jax.jit(score), params, size, mesh)
        if jax.process_index() == 0:
            _write(path, logprobs, lengths)
    per_row = len(rows[0].sequences)
    pieces = np.split(logprobs, np.cumsum(lengths)[:-1])
    return tuple(
        replace(row, reference=tuple(pieces[per_row * index : per_row * (index + 1)])) for index, row in enumerate(rows)
    )


def digest(rows: Sequence[EncodedRow], encoder: Encoder, params: Any, settings: dict) -> str:
    """A hash of the parameters, the rows' tokens and images, the image processor and the settings.

    Image files are identified by path, size and time of change; their contents are not read.
    """
    hasher = hashlib.sha256(fingerprint(params).encode())
    hasher.update(json.dumps(settings, sort_keys=True).encode())
    hasher.update(encoder.processor.image_processor.to_json_string().encode())
    for row in rows:
        for tokens in row.sequences.values():
            hasher.update(b"tokens" + tokens.ids.tobytes() + b"answers" + tokens.answers.tobytes())
        for image in (*row.images, *(image for name in sorted(row.pictures) for image in row.pictures[name])):
            hasher.update(b"image" + _stamp(image))
    return hasher.hexdigest()[:32]


def _stamp(image: Picture) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, Cropped):
        return _stamp(image.image) + repr(image.box).encode()
    status = os.stat(image)
    return f"{os.path.abspath(image)} {status.st_size} {status.st_mtime_ns}".encode()


def _compute(
    rows: tuple[EncodedRow, ...], encoder: Encoder, score: Callable, params: Any, size: int, mesh: Mesh | None
) -> np.ndarray:
    """The log-probabilities of all answer tokens of all rows, concatenated."""
    pieces = []
    batches = in_order(rows, encoder, size)
    for batch in progress.counted(batches, -(-len(rows) // size), title="reference, batches"):
        logprobs = np.asarray(parallel.local(score(params, on_mesh(batch, mesh))))
        for index in np.flatnonzero(batch["weight"]):
            for sequence, name in enumerate(rows[0].sequences):
                pieces.append(logprobs[index, sequence, : batch[name]["answers"][index].sum()])
    return np.concatenate(pieces).astype(np.float32)


def _read(path: Path, lengths: list[int]) -> np.ndarray | None:
    """The cached log-probabilities; None if there are none, or if the file is damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            logprobs, counts = arrays["logprobs"], arrays["counts"]
            fits = counts.tolist() == lengths and logprobs.shape == (sum(lengths),)
    except Exception as error:  # a damaged file raises whatever its first wrong byte causes
        logging.warning("reference cache %s cannot be read (%s) and is computed again", path, error)
        return None
    return logprobs if fits else None


def _write(path: Path, logprobs: np.ndarray, lengths: list[int]) -> None:
    with files.atomic_file(path) as file:
        np.savez(file, logprobs=logprobs, counts=np.asarray(lengths, np.int64))
