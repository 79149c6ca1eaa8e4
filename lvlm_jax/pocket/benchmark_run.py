"""The pocket benchmark from nothing to the tables: every method asked and scored on every part, beside controls."""

import dataclasses
import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from lvlm_jax import files
from lvlm_jax.evaluation import get, statistics
from lvlm_jax.evaluation.controls import RUNS
from lvlm_jax.evaluation.run import Options, Run
from lvlm_jax.journal.record import checkpoint_hash
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import Method
from lvlm_jax.pocket import benchmark, claims
from lvlm_jax.version import __version__
from lvlm_jax.weights import names

NOTES = """\
Shares are in per cent, with 95 % bootstrap intervals (images resampled); below them the difference to greedy with its
paired interval. Seconds are those of answering, programs compiled included. A method is "significantly better" than a
control where the paired interval of the difference lies on the better side of 0, "significantly worse" where it lies on
the worse one; else there is "no difference shown". The controls are explained in `lvlm_jax/evaluation/controls.py`."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is compared, and where.

    Attributes:
        out: folder of worlds, answers, scores and `table.md`; a run goes on from what is there.
        model: a checkpoint trained on the pocket world, as `LVLM.from_pretrained` takes it.
        images, captions: test images to ask about and to describe.
        batch_size: prompts at once.
        resamples: of the bootstrap.
        command: the command line, for the document.
        dtype: of weights and products.
        seeds: worlds that the images are drawn from, in turns.
        parts: of the benchmark.
        claims: method -> figures that are better with it, says its paper: names of `claims.FIGURES`.
        controls: runs beside each method, of `evaluation.controls.RUNS`; greedy decoding always is.
    """

    out: Path
    model: str = "pocket"
    images: int = 200
    captions: int = 200
    batch_size: int = 64
    resamples: int = statistics.RESAMPLES
    command: str = "lvlm pocket-benchmark"
    dtype: str = "auto"
    seeds: int = 1
    parts: Sequence[benchmark.Part] = benchmark.PARTS
    claims: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    controls: Sequence[str] = RUNS

    def world(self, part: benchmark.Part) -> Path:
        """Folder of the test images that a part of the benchmark is about."""
        images = self.captions if part.benchmark.descriptions else self.images
        return self.out / (f"world-{images}" if self.seeds == 1 else f"world-{images}-of-{self.seeds}")


def run(setup: Setup, methods: Mapping[str, Method | Mapping[str, Method]]) -> str:
    """Runs what is missing, and writes `table.md` anew after every method.

    Args:
        methods: by the name of their rows, or, where it depends on the part, by its name too; greedy decoding comes
            first by itself.

    Returns:
        The text of `table.md`.

    Raises:
        LVLMError: an unusable model or folder, or a folder of another run.
    """
    for part in setup.parts:
        images = setup.captions if part.benchmark.descriptions else setup.images
        benchmark.write_world(setup.world(part), images, setup.seeds)
    path, dtype = names.checkpoint(setup.model), names.dtype(setup.dtype)
    model = LVLM.from_pretrained(path, dtype=dtype)
    found: dict[str, dict] = {part.name: {} for part in setup.parts}
    text = ""
    for name, given in {"greedy": None, **methods}.items():
        jax.clear_caches()  # the programs of all methods together are gigabytes
        for part in setup.parts:
            method = given.get(part.name) if isinstance(given, Mapping) else given
            if method is None and given is not None:
                continue
            folder = setup.out / part.name
            options = Options(
                setup.batch_size,
                controls=folder if method is not None else None,
                runs=setup.controls,
                resamples=setup.resamples,
            )
            # The greedy control is the greedy row itself: both have the same log.
            data = part.data(setup.world(part))
            one = Run(path, dtype, get(part.protocol), data, folder / name, method, options)
            one.ask(model)
            found[part.name][name] = one.score()
        text = document(setup, found, path)
        files.write_atomically(setup.out / "table.md", text)
    return text


def document(setup: Setup, found: Mapping[str, Mapping[str, Mapping]], path: str) -> str:
    """The tables, with what they were made by and of.

    Args:
        found: part -> method -> contents of its `scores.json`.
        path: folder of the checkpoint.
    """
    name = "smol" if setup.model == "smol" else Path(path).name
    worlds = "" if setup.seeds == 1 else f", of the worlds of the seeds 0 to {setup.seeds - 1} in turns"
    about = (
        f"{datetime.date.today().isoformat()}, {os.cpu_count()} x {platform.processor() or platform.machine()}, "
        f"{jax.devices()[0].device_kind}, Python {platform.python_version()}, jax {jax.__version__}, "
        f"lvlm_jax {__version__}, model {name} {checkpoint_hash(path)[:12]}, {setup.images} images "
        f"to ask about, {setup.captions} to describe{worlds}."
    )
    tables = [benchmark.markdown(part, found[part.name]) for part in setup.parts if found[part.name]]
    claimed = [claims.page(found, setup.claims, setup.out, setup.seeds)] if setup.claims else []
    lines = ["# Pocket benchmark", "", f"    {setup.command}", "", about, "", *claimed, NOTES, "", *tables]
    return "\n".join(lines)
