"""Runs the training recipes on the pocket world: data, trainings, and the benchmark of their effect, each stage once.

CAPL learns on pairs with rejected answers from truncated attention; DPO, the paper's ablation, on pairs with rejected
answers from the unmodified model; chosen answers are the truth in both. Flow alignment trains SEVI's effect into the
weights. Folders below that of a `Setup`:

    prompts/, pairs/                   prompts, and pairs from `lvlm preferences`, for training and held out
    capl/, dpo/, flow_alignment/       work folders of `lvlm train`: logs, checkpoints, adapter, export
    benchmark/PART/MODEL/              answers and scores
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import get, rescore
from lvlm_jax.evaluation.run import Options, Run
from lvlm_jax.journal.record import checkpoint_hash, differences, file_hash
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import Method
from lvlm_jax.methods.capl import CAPL
from lvlm_jax.methods.sevi import SEVI
from lvlm_jax.pocket import benchmark as pocket
from lvlm_jax.pocket import training_report
from lvlm_jax.pocket.pairs import DESCRIPTION, write_prompts
from lvlm_jax.pocket.training_report import Arm, Findings
from lvlm_jax.training import finetune, held_out, pairwise
from lvlm_jax.training.data import flow_data, pair_batches, pairs, preferences
from lvlm_jax.training.data.pair_batches import EncodedRow, Encoder
from lvlm_jax.training.data.pair_files import read_pairs
from lvlm_jax.training.data.pair_filters import Filters
from lvlm_jax.weights import names

RECIPES = ("capl", "dpo", "flow_alignment")
LEARNT = {"capl": "truncated", "dpo": "plain"}  # recipe -> the source of the rejected answers of its pairs


@dataclasses.dataclass(frozen=True)
class Setup:
    """Settings that all parts of a run share.

    Attributes:
        config: of configs/pocket_training.py.
        batch_size: questions at once.
        images, captions: test images to ask about and to describe.
    """

    config: ConfigDict
    out: Path
    batch_size: int
    resamples: int
    images: int
    captions: int

    def world(self, part: pocket.Part) -> Path:
        """Folder of the test images of a part of the benchmark."""
        count = self.captions if part.benchmark.descriptions else self.images
        folder = self.out / f"world-{count}"
        pocket.write_world(folder, count)
        return folder

    @property
    def base(self) -> str:
        """Folder of the checkpoint from which every training starts."""
        return names.checkpoint(self.config.model)

    def stage(self, name: str, about: Mapping[str, Any], work: Callable[[], object]) -> float:
        """Does a piece of work once, even if it is interrupted and started again.

        Args:
            about: everything that determines the result.

        Returns:
            Its duration in seconds, including earlier attempts that were not killed.

        Raises:
            LVLMError: the folder has a result with another `about`.
        """
        path = self.out / name / "stage.json"
        about = json.loads(json.dumps(about, default=str))
        stored = files.read_json(path, "stage of the run") if path.exists() else {"about": about, "seconds": 0.0}
        if changes := differences(stored["about"], about):
            raise LVLMError(
                f"{str(path.parent)!r} was made with other settings ({'; '.join(changes[:3])}); repeat those, give "
                "another --out, or remove it"
            )
        if stored.get("done"):
            return stored["seconds"]
        print(f"{name} ...", flush=True)
        began, finished = time.monotonic(), False
        try:
            work()
            finished = True
        finally:
            stored |= {"seconds": round(stored["seconds"] + time.monotonic() - began, 1), "done": finished}
            files.write_whole(path, json.dumps(stored, indent=1) + "\n")
        return stored["seconds"]

    def prompts(self, name: str) -> Path:
        """A file of prompts about "several" images or "one", or of held-out prompts."""
        return self.out / "prompts" / name / "prompts.jsonl"

    def pairs(self, rejected: str, held_out: bool = False) -> Path:
        """A file of pairs, by the source of the rejected answers."""
        return self.out / "pairs" / (f"{rejected}-held-out" if held_out else rejected) / "pairs.jsonl"

    def trained(self, recipe: str) -> str:
        """The checkpoint that a recipe's training has written."""
        return str(self.out / recipe / "export")

    def about_model(self) -> dict[str, str]:
        """The base model, for records."""
        return {"model": checkpoint_hash(self.base), "dtype": names.dtype("auto")}

    @property
    def capl(self) -> Method:
        """CAPL's attention, at inference as in training."""
        return pairwise.method_of(self.config.capl.preference)

    @property
    def sevi(self) -> SEVI:
        """The teacher's method."""
        flow = self.config.flow_alignment.flow
        return SEVI(omega=flow.omega, kappa=flow.kappa, start_layer=flow.start_layer)


def draw_prompts(setup: Setup) -> float:
    """Draws prompts about several images and about one, for training and held out (other images, another seed)."""
    config = setup.config
    files_wanted = {
        "several": (config.pairs.prompts, config.seed, 0.0, 0.0),
        "several-held-out": (config.pairs.held_out, config.seed + 1, 0.0, 0.0),
        "one": (config.answers.prompts, config.seed, 1.0, config.answers.describe),
        "one-held-out": (config.answers.held_out, config.seed + 1, 1.0, config.answers.describe),
    }

    def work() -> None:
        for name, arguments in files_wanted.items():
            write_prompts(setup.out / "prompts" / name, *arguments)

    return setup.stage("prompts", {"drawn": files_wanted}, work)


def make_pairs(setup: Setup) -> float:
    """Makes both sets of pairs, and held-out pairs for each, as `lvlm preferences` does."""
    wanted, attention = setup.config.pairs, setup.config.capl.preference
    settings = {
        "corrector": "pocket",
        "seed": setup.config.seed,
        "batch_size": wanted.batch,
        "max_new_tokens": wanted.max_new_tokens,
        "rho": attention.rho,
        "sigma": attention.sigma,
    }

    def work() -> None:
        for rejected in preferences.REJECTED:
            plan = preferences.plan(
                CAPL(rho=attention.rho, sigma=attention.sigma),
                rejected,
                max_new_tokens=wanted.max_new_tokens,
                seed=setup.config.seed,
            )
            for is_held_out in (False, True):
                prompts = setup.prompts("several-held-out" if is_held_out else "several")
                out = setup.pairs(rejected, is_held_out).parent
                candidates = preferences.answered(prompts, plan, setup.base, "auto", out, "pocket", wanted.batch)
                figures = pairs.write(
                    out, candidates.found, candidates.prompts, candidates.record, Filters(), seed=setup.config.seed
                )
                print(preferences.table(figures))

    hashes = [file_hash(setup.prompts(name)) for name in ("several", "several-held-out")]
    return setup.stage("pairs", setup.about_model() | {"settings": settings, "prompts": hashes}, work)


def train(setup: Setup, recipe: str) -> float:
    """Runs one training, with the code of `lvlm train`."""
    config = setup.config[recipe].copy_and_resolve_references()
    config.model = setup.config.model
    if recipe in LEARNT:
        data = [setup.pairs(LEARNT[recipe], is_held_out) for is_held_out in (False, True)]
    else:
        data = [setup.prompts(name) for name in ("one", "one-held-out")]
    config.data, config.validation = map(str, data)
    about = setup.about_model() | {"config": config.to_dict(), "data": [file_hash(path) for path in data]}
    return setup.stage(recipe, about, lambda: finetune.train(config, setup.out / recipe))


def benchmark(setup: Setup, part: pocket.Part, arms: Mapping[str, Arm], load: Callable) -> Findings:
    """Runs every model of `arms` on a part of the pocket benchmark; the first one is the reference."""
    world, protocol = setup.world(part), get(part.protocol)
    folders = {name: setup.out / "benchmark" / part.name / arm.folder for name, arm in arms.items()}
    found, first = {}, next(iter(arms))
    for name, arm in arms.items():
        against = () if name == first else answer_files(folders[first], protocol)
        options = Options(setup.batch_size, against=against, resamples=setup.resamples)
        data = part.data(world)
        run = Run(arm.path, names.dtype("auto"), protocol, data, folders[name], arm.method, options)
        if not run.complete():
            run.ask(load(arm.path))
        found[name] = run.score()

    def compare(one: str, other: str) -> Mapping:
        answer_paths = [answer_files(folders[name], protocol) for name in (one, other)]
        scores = rescore.rescore(protocol, part.data(world), *answer_paths, resamples=setup.resamples)
        return scores["against"]["differences"]

    return Findings(found, compare)


def answer_files(folder: Path, protocol: Any) -> list[str]:
    """The answers in a folder of `Run`, as for `rescore`."""
    path = folder / "answers.jsonl"
    if path.exists():
        return [str(path)]
    return [f"{group}={folder / group}.jsonl" for group in protocol.groups]


def held_out_pairs(setup: Setup, arms: Mapping[str, Arm], load: Callable) -> Findings:
    """Accuracy of the models of `arms` on both sets of held-out pairs; the first one is the starting point."""
    encoder = Encoder(load(setup.base).processor, load(setup.base).config)
    length = min(setup.config[recipe].length for recipe in LEARNT)
    rows: dict[str, tuple[EncodedRow, ...]] = {
        name: pair_batches.rows_of(read_pairs(setup.pairs(name, True)), encoder.pair, encoder, length, "error")
        for name in preferences.REJECTED
    }
    ids = {name: [row.id for row in members] for name, members in rows.items()}

    @functools.cache
    def logprobs(path: str, attention: bool) -> dict[str, Any]:
        method = setup.capl if attention else None
        return {
            name: held_out.pair_logprobs(
                load(path), members, encoder, method, setup.out / "benchmark" / "pairs", setup.config.capl.batch
            )
            for name, members in rows.items()
        }

    scores = {}
    for name, arm in arms.items():
        attention = arm.method is not None
        before = None if arm.path == setup.base else logprobs(setup.base, attention)
        scores[name] = held_out.pair_scores(ids, logprobs(arm.path, attention), before)

    def compare(one: str, other: str) -> Mapping:
        return rescore.compare(scores[one], scores[other], setup.resamples)["differences"]

    reports = {name: rescore.report(one, setup.resamples) for name, one in scores.items()}
    first, *others = scores
    for name in others:
        reports[name]["against"] = {"differences": compare(name, first)}
    return Findings(reports, compare)


def closeness(setup: Setup, load: Callable) -> dict[str, Mapping]:
    """How much closer the student is to the edited teacher than the base, on held-out answers of each kind."""
    path = setup.out / "benchmark" / "closeness" / "distances.json"
    prompts, student = setup.prompts("one-held-out"), setup.trained("flow_alignment")
    config = setup.config.flow_alignment

    def work() -> None:
        base = load(setup.base)
        encoder = Encoder(base.processor, base.config)
        # The answers that training's own validation generated.
        answers = flow_data.read(
            prompts, base, setup.sevi, config.length, config.batch, setup.out / "flow_alignment" / "answers"
        )
        rows = pair_batches.rows_of(answers, encoder.conversation, encoder, config.length, config.too_long)
        measured = held_out.distances(load(student), base, rows, encoder, setup.sevi)
        files.write_whole(path, json.dumps(measured, indent=1) + "\n")

    about = setup.about_model() | {"student": checkpoint_hash(student), "prompts": file_hash(prompts)}
    setup.stage("benchmark/closeness", about, work)
    measured = files.read_json(path, "distances")
    kinds = {
        "all": measured,
        "descriptions": [row for row in measured if row["id"].startswith(f"{DESCRIPTION}/")],
        "questions": [row for row in measured if not row["id"].startswith(f"{DESCRIPTION}/")],
    }
    return {kind: rescore.report(held_out.closeness(rows), setup.resamples) for kind, rows in kinds.items() if rows}


def run(setup: Setup, command: str) -> str:
    """Does everything that is missing, in all stages.

    Args:
        command: the command line, for the document.

    Returns:
        The tables, and conclusions in words.

    Raises:
        LVLMError: an unusable model or folder, or a folder of another run.
    """
    load = functools.lru_cache(maxsize=2)(lambda path: LVLM.from_pretrained(path, dtype="auto"))
    seconds = {"prompts": draw_prompts(setup), "pairs": make_pairs(setup)}
    seconds |= {recipe: train(setup, recipe) for recipe in RECIPES}
    several, one = training_report.arms(setup.base, setup.trained, setup.capl, setup.sevi)
    findings = {
        part.name: benchmark(setup, part, several if part is training_report.SEVERAL else one, load)
        for part in training_report.PARTS
    }
    preferred, close = held_out_pairs(setup, several, load), closeness(setup, load)
    statistics = {
        name: files.read_json(setup.pairs(name).with_name("statistics.json"), "statistics")
        for name in preferences.REJECTED
    }
    return training_report.document(setup.config, setup.base, command, seconds, statistics, findings, preferred, close)
