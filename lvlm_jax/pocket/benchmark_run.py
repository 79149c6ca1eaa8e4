"""Runs the pocket benchmark: asks and scores every method on every part, beside controls, and writes the tables."""

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
Shares are in per cent, with 95 % bootstrap intervals (images resampled). Below each share is its difference to greedy
decoding, with the paired interval. Seconds are the time of answering, compilation included. A method is "significantly
better" than a control if the whole paired interval of their difference lies on the better side of 0, and "significantly
worse" if it lies on the worse side; otherwise there is "no difference shown". `lvlm_jax/evaluation/controls.py`
explains the controls."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """The models and methods to compare, and their folder.

    Attributes:
        out: folder of worlds, answers, scores and `table.md`; a run resumes from its content.
        model: a checkpoint trained on the pocket world, as for `LVLM.from_pretrained`.
        images, captions: numbers of test images to ask about and to describe.
        batch_size: number of prompts that are answered at once.
        resamples: number of bootstrap resamples.
        command: the command line, for the document.
        dtype: dtype of weights and products.
        seeds: number of seeds; successive images use the seeds in turn.
        parts: parts of the benchmark.
        claims: method -> figures that the method improves according to its paper (keys of `claims.FIGURES`).
        controls: controls to run beside each method, from `evaluation.controls.RUNS`; greedy decoding always runs.
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
        """Folder of the test images of a part of the benchmark."""
        images = self.captions if part.benchmark.descriptions else self.images
        return self.out / (f"world-{images}" if self.seeds == 1 else f"world-{images}-of-{self.seeds}")


def run(setup: Setup, methods: Mapping[str, Method | Mapping[str, Method]]) -> str:
    """Runs everything that is missing, and rewrites `table.md` after every method.

    Args:
        methods: name of a table row -> its method, or a mapping from parts to methods. Greedy decoding is added as
            the first row.

    Returns:
        The text of `table.md`.

    Raises:
        LVLMError: a model or folder cannot be used, or the folder belongs to another run.
    """
    for part in setup.parts:
        images = setup.captions if part.benchmark.descriptions else setup.images
        benchmark.write_world(setup.world(part), images, setup.seeds)
    path, dtype = names.checkpoint(setup.model), names.dtype(setup.dtype)
    model = LVLM.from_pretrained(path, dtype=dtype)
    scores_of: dict[str, dict] = {part.name: {} for part in setup.parts}
    text = ""
    for name, method_or_methods in {"greedy": None, **methods}.items():
        jax.clear_caches()  # together, the programs of all methods take gigabytes
        for part in setup.parts:
            method = method_or_methods.get(part.name) if isinstance(method_or_methods, Mapping) else method_or_methods
            if method is None and method_or_methods is not None:
                continue
            folder = setup.out / part.name
            options = Options(
                setup.batch_size,
                controls=folder if method is not None else None,
                runs=setup.controls,
                resamples=setup.resamples,
            )
            # The greedy control is the greedy row itself: both use the same log.
            data = part.data(setup.world(part))
            one = Run(path, dtype, get(part.protocol), data, folder / name, method, options)
            one.ask(model)
            scores_of[part.name][name] = one.score()
        text = document(setup, scores_of, path)
        files.write_whole(setup.out / "table.md", text)
    return text


def document(setup: Setup, scores_of: Mapping[str, Mapping[str, Mapping]], path: str) -> str:
    """The tables, with the command and the settings that made them.

    Args:
        scores_of: part -> method -> content of its `scores.json`.
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
    tables = [benchmark.markdown(part, scores_of[part.name]) for part in setup.parts if scores_of[part.name]]
    claimed = [claims.page(scores_of, setup.claims, setup.out, setup.seeds)] if setup.claims else []
    lines = ["# Pocket benchmark", "", f"    {setup.command}", "", about, "", *claimed, NOTES, "", *tables]
    return "\n".join(lines)
