"""Flow alignment on the pocket model: trains SEVI's effect into the weights, and runs the pocket benchmark.

Folders below `Setup.out`:

    prompts/                           prompts about one image, for training and for validation
    flow_alignment/                    work folder of `lvlm train`: logs, checkpoints, adapter, export
    benchmark/PART/MODEL/              answers and scores
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lvlm_jax import files
from lvlm_jax.evaluation import get, rescore
from lvlm_jax.evaluation.run import Options, Run
from lvlm_jax.journal.record import checkpoint_hash, file_hash
from lvlm_jax.methods.sevi import SEVI
from lvlm_jax.pocket import benchmark as pocket
from lvlm_jax.pocket import training_report
from lvlm_jax.pocket.pairs import DESCRIPTION, Mix, write_prompts
from lvlm_jax.pocket.stages import Setup
from lvlm_jax.pocket.training_report import Arm, Findings
from lvlm_jax.training import finetune, held_out
from lvlm_jax.training.data import flow_data, pair_batches
from lvlm_jax.training.data.pair_batches import Encoder
from lvlm_jax.weights import names

RECIPE = "flow_alignment"
PROMPTS = ("one", "one-held-out")


def prompts_of(setup: Setup, name: str) -> Path:
    """The prompt file called `name`, one of `PROMPTS`."""
    return setup.out / "prompts" / name / "prompts.jsonl"


def sevi(setup: Setup) -> SEVI:
    """The method under which the teacher answers."""
    flow = setup.config.flow_alignment.flow
    return SEVI(omega=flow.omega, kappa=flow.kappa, start_layer=flow.start_layer)


def student(setup: Setup) -> str:
    """The checkpoint that training writes."""
    return str(setup.out / RECIPE / "export")


def draw_prompts(setup: Setup) -> None:
    """Draws training prompts and held-out prompts about one image, with different seeds."""
    settings, seed = setup.config.answers, setup.config.seed
    numbers = dict(zip(PROMPTS, ((settings.prompts, seed), (settings.held_out, seed + 1)), strict=True))

    def work() -> None:
        for name, (count, own) in numbers.items():
            write_prompts(setup.out / "prompts" / name, count, own, Mix(1.0, settings.describe))

    setup.stage("prompts", {"drawn": numbers, "describe": settings.describe}, work)


def train(setup: Setup) -> None:
    """Trains the student, by the same code as `lvlm train`."""
    config = setup.config[RECIPE].copy_and_resolve_references()
    data = [prompts_of(setup, name) for name in PROMPTS]
    config.model, (config.data, config.validation) = setup.config.model, map(str, data)
    about = setup.about_model() | {"config": config.to_dict(), "data": [file_hash(path) for path in data]}
    setup.stage(RECIPE, about, lambda: finetune.train(config, setup.out / RECIPE))


def benchmark(setup: Setup, part: pocket.Part, arms: Mapping[str, Arm], load: Callable) -> Findings:
    """Runs every model of `arms` on a part of the benchmark, and compares the others with the first.

    `load` loads a checkpoint.
    """
    world, protocol = setup.world(part), get(part.protocol)
    folders = {name: setup.out / "benchmark" / part.name / arm.folder for name, arm in arms.items()}
    scores_of, first = {}, next(iter(arms))
    for name, arm in arms.items():
        against = () if name == first else answer_files(folders[first], protocol)
        options = Options(setup.batch_size, against=against, resamples=setup.resamples)
        data = part.data(world)
        run = Run(arm.path, names.dtype("auto"), protocol, data, folders[name], arm.method, options)
        if not run.complete():
            run.ask(load(arm.path))
        scores_of[name] = run.score()

    def compare(one: str, other: str) -> Mapping:
        paths = [answer_files(folders[name], protocol) for name in (one, other)]
        scores = rescore.rescore(protocol, part.data(world), *paths, resamples=setup.resamples)
        return scores["against"]["differences"]

    return Findings(scores_of, compare)


def answer_files(folder: Path, protocol: Any) -> list[str]:
    """The answer files in the folder of a `Run`, as `rescore` expects them: FILE, or GROUP=FILE for each group."""
    whole = folder / "answers.jsonl"
    if whole.exists():
        return [str(whole)]
    return [f"{group}={folder / group}.jsonl" for group in protocol.groups]


def closeness(setup: Setup, load: Callable) -> dict[str, Mapping]:
    """Kind of held-out answers -> how close the student and the base are to the teacher."""
    path = setup.out / "benchmark" / "closeness" / "distances.json"
    prompts, trained = prompts_of(setup, PROMPTS[1]), student(setup)
    config = setup.config.flow_alignment

    def work() -> None:
        base = load(setup.base)
        encoder = Encoder(base.processor, base.config)
        # These answers were already generated for the validation of the training.
        answers = flow_data.read(
            prompts, base, sevi(setup), config.length, config.batch, setup.out / RECIPE / "answers"
        )
        rows = pair_batches.rows_of(answers, encoder.conversation, encoder, config.length, config.too_long)
        measured = held_out.distances(load(trained), base, rows, encoder, sevi(setup))
        files.write_whole(path, json.dumps(measured, indent=1) + "\n")

    about = setup.about_model() | {"student": checkpoint_hash(trained), "prompts": file_hash(prompts)}
    setup.stage("benchmark/closeness", about, work)
    measured = files.read_json(path, "distances")
    kinds = {
        "all": measured,
        "descriptions": [row for row in measured if row["id"].startswith(f"{DESCRIPTION}/")],
        "questions": [row for row in measured if not row["id"].startswith(f"{DESCRIPTION}/")],
    }
    return {kind: rescore.report(held_out.closeness(rows), setup.resamples) for kind, rows in kinds.items() if rows}


def run(setup: Setup, load: Callable) -> tuple[dict[str, Findings], dict[str, Mapping]]:
    """Runs the missing stages.

    Returns:
        The findings on each part of the benchmark, and how close the student is to the teacher.

    Raises:
        LVLMError: a model or folder cannot be used, or the folder belongs to another run.
    """
    draw_prompts(setup)
    train(setup)
    arms = training_report.arms(setup.base, student(setup), sevi(setup))
    findings = {part.name: benchmark(setup, part, arms, load) for part in training_report.PARTS}
    return findings, closeness(setup, load)
