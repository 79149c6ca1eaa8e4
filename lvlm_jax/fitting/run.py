"""Runs a fit: batches of pairs, partial results that survive a kill, one file at the end."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from lvlm_jax import LVLM, files
from lvlm_jax.errors import LVLMError
from lvlm_jax.fitting import attribution, directions, object_tokens
from lvlm_jax.journal.progress import counted
from lvlm_jax.journal.record import differences, file_hash
from lvlm_jax.methods.fitted import Fitted, Source, settings_text, write
from lvlm_jax.training.data.pair_files import Pair, read_pairs

Arrays = Mapping[str, np.ndarray]


class Fitter(NamedTuple):
    """How the arrays of a method are fitted.

    Attributes:
        collect: returns the arrays of a batch of pairs, which are concatenated along the first axis.
        finish: computes the fitted arrays from them.
        confirm: in a second round, returns arrays of a batch of pairs, given the arrays of all batches; None for one
            round.
        random: whether `collect` draws random numbers and takes the seed of the job as its last argument.
    """

    collect: Callable[..., dict[str, np.ndarray]]
    finish: Callable[[Arrays], dict[str, np.ndarray]]
    confirm: Callable[[LVLM, Sequence[Pair], Arrays], dict[str, np.ndarray]] | None = None
    random: bool = False


FITTERS = {
    "vti": Fitter(directions.vti_collect, directions.vti_finish, random=True),
    "adhh": Fitter(attribution.adhh_collect, attribution.adhh_finish, attribution.adhh_confirm),
    "adaiat": Fitter(object_tokens.adaiat_collect, object_tokens.adaiat_finish),
    "nullu": Fitter(directions.nullu_collect, directions.nullu_finish),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A fit: the method, the model and the pairs.

    Attributes:
        method: a key of `FITTERS`.
        pairs: the file of pairs, see `training.data.pair_files.read_pairs`; good and bad are other names for chosen and
            rejected.
        out: the file to write.
        batch_size: pairs at once.
        limit: only the first pairs of the file.
        seed: of the masks of VTI's images.
    """

    method: str
    pairs: Path
    out: Path
    batch_size: int = 4
    limit: int | None = None
    seed: int = 0


def fit(model: LVLM, job: Job) -> Fitted:
    """Fits the data that a method needs and writes them; resumes a fit that was stopped.

    Raises:
        LVLMError: an unknown method, unusable pairs, a model that does not come from a folder, or partial results of
            another fit beside the file.
    """
    if job.method not in FITTERS:
        raise LVLMError(f"method {job.method!r} has nothing to fit; expected one of {', '.join(FITTERS)}")
    if model.hash is None:
        raise LVLMError("this model was not read from a folder, so the file could not name its checkpoint")
    fitter, pairs = FITTERS[job.method], read_pairs(job.pairs)[: job.limit]
    draws = {"seed": job.seed} if fitter.random else {}
    source = Source(
        method=job.method,
        model=model.hash,
        pairs=file_hash(job.pairs),
        settings=settings_text({"pairs": len(pairs), "batch_size": job.batch_size} | draws),
    )
    parts = _parts(job.out, source)
    batches = [pairs[start : start + job.batch_size] for start in range(0, len(pairs), job.batch_size)]
    collect = functools.partial(fitter.collect, model, **draws)
    arrays = _round(parts, "", batches, collect, "batches of pairs")
    if fitter.confirm:
        confirm = functools.partial(fitter.confirm, model, collected=dict(arrays))
        arrays |= _round(parts, "confirmed-", batches, confirm, "batches of the second round")
    result = Fitted(jax.tree.map(jnp.asarray, fitter.finish(arrays)), source)
    write(job.out, result)
    shutil.rmtree(parts)
    return result


def _round(
    parts: Path, prefix: str, batches: Sequence[Sequence[Pair]], collect: Callable[[Sequence[Pair]], Arrays], what: str
) -> dict[str, np.ndarray]:
    """The arrays of all batches, concatenated; a batch that already has a file is not computed again."""
    paths = [parts / f"{prefix}{number:06d}.safetensors" for number in range(len(batches))]
    num_done = sum(path.exists() for path in paths)
    rest = zip(paths[num_done:], batches[num_done:], strict=True)
    for path, batch in counted(rest, len(batches), num_done, what):
        with files.atomic_file(path) as file:
            file.write(safetensors.numpy.save(collect(batch)))
    by_batch = [_loaded(path) for path in paths]
    return {name: np.concatenate([one[name] for one in by_batch]) for name in by_batch[0]}


def _loaded(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise LVLMError(f"{path} is damaged ({error}); remove it and start again") from error


def _parts(out: Path, source: Source) -> Path:
    """The folder of the partial results of exactly this fit.

    Raises:
        LVLMError: it cannot be made, or belongs to another fit.
    """
    parts, record = Path(f"{out}.parts"), dataclasses.asdict(source)
    record_path = parts / "record.json"
    try:
        parts.mkdir(parents=True, exist_ok=True)
        if record_path.exists():
            if changes := differences(json.loads(record_path.read_text()), record):
                raise LVLMError(f"{parts} belongs to another fit ({changes[0][:120]}); remove it or give another --out")
        else:
            with files.atomic_file(record_path) as file:
                file.write(json.dumps(record).encode())
    except (OSError, ValueError) as error:
        raise LVLMError(f"{parts} cannot be used: {error}; remove it or give another --out") from error
    return parts
