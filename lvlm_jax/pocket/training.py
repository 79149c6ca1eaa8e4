"""The pocket recipes of training: data, trainings, and the benchmark of what they changed, each stage done once.

CAPL learns on pairs whose rejected answers come from truncated attention; DPO, the paper's ablation, on pairs whose
rejected answers the unmodified model gives; chosen answers are the truth in both. Flow alignment puts SEVI's effect
into the weights. Folders in the one that a `Setup` names:

    prompts/, pairs/                   prompts, and pairs as `lvlm preferences` writes them, to learn and held out
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
from lvlm_jax.training.data.pair_batches import Encoder, Row
from lvlm_jax.training.data.pair_files import read_pairs
from lvlm_jax.training.data.pair_filters import Filters
from lvlm_jax.weights import names

RECIPES = ("capl", "dpo", "flow_alignment")
LEARNT = {"capl": "truncated", "dpo": "plain"}  # recipe -> how the rejected answers of its pairs come about


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all parts of a run share.

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
        """Folder of the test images that a part of the benchmark is about."""
        count = self.captions if part.benchmark.descriptions else self.images
        folder = self.out / f"world-{count}"
        pocket.write_world(folder, count)
        return folder

    @property
    def base(self) -> str:
        """Folder of the checkpoint that every training begins with."""
        return names.checkpoint(self.config.model)

    def stage(self, name: str, about: Mapping[str, Any], work: Callable[[], object]) -> float:
        """Does a piece of work once, whatever stops it in between.

        Args:
            about: everything that decides its outcome.

        Returns:
            Seconds that it took, those of earlier attempts included unless they were killed.

        Raises:
            LVLMError: the folder holds the outcome of something else.
        """
        path = self.out / name / "stage.json"
        about = json.loads(json.dumps(about, default=str))
        known = files.read_json(path, "stage of the run") if path.exists() else {"about": about, "seconds": 0.0}
        if changed := differences(known["about"], about):
            raise LVLMError(
                f"{str(path.parent)!r} was made with other settings ({'; '.join(changed[:3])}); repeat those, give "
                "another --out, or remove it"
            )
        if known.get("done"):
            return known["seconds"]
        print(f"{name} ...", flush=True)
        began, done = time.monotonic(), False
        try:
            work()
            done = True
        finally:
            known |= {"seconds": round(known["seconds"] + time.monotonic() - began, 1), "done": done}
            files.write_atomically(path, json.dumps(known, indent=1) + "\n")
        return known["seconds"]

    def prompts(self, name: str) -> Path:
        """File of prompts, "several" or "one" image, or those held out."""
        return self.out / "prompts" / name / "prompts.jsonl"

    def pairs(self, rejected: str, held: bool = False) -> Path:
        """File of pairs, by how the rejected answers came about."""
        return self.out / "pairs" / (f"{rejected}-held-out" if held else rejected) / "pairs.jsonl"

    def trained(self, recipe: str) -> str:
        """The checkpoint that a recipe's training has left."""
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
    """Prompts about several images and about one, to learn on and held out: other pictures, another seed."""
    config = setup.config
    wanted = {
        "several": (config.pairs.prompts, config.seed, 0.0, 0.0),
        "several-held-out": (config.pairs.held_out, config.seed + 1, 0.0, 0.0),
        "one": (config.answers.prompts, config.seed, 1.0, config.answers.describe),
        "one-held-out": (config.answers.held_out, config.seed + 1, 1.0, config.answers.describe),
    }

    def work() -> None:
        for name, arguments in wanted.items():
            write_prompts(setup.out / "prompts" / name, *arguments)

    return setup.stage("prompts", {"drawn": wanted}, work)


def make_pairs(setup: Setup) -> float:
    """Both sets of pairs, and held-out pairs for each, as `lvlm preferences` makes them."""
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
            for held in (False, True):
                prompts = setup.prompts("several-held-out" if held else "several")
                out = setup.pairs(rejected, held).parent
                made = preferences.answered(prompts, plan, setup.base, "auto", out, "pocket", wanted.batch)
                figures = pairs.write(out, made.found, made.prompts, made.record, Filters(), seed=setup.config.seed)
                print(preferences.table(figures))

    hashes = [file_hash(setup.prompts(name)) for name in ("several", "several-held-out")]
    return setup.stage("pairs", setup.about_model() | {"settings": settings, "prompts": hashes}, work)


def train(setup: Setup, recipe: str) -> float:
    """One training, by the same code as `lvlm train`."""
    config = setup.config[recipe].copy_and_resolve_references()
    config.model = setup.config.model
    if recipe in LEARNT:
        data = [setup.pairs(LEARNT[recipe], held) for held in (False, True)]
    else:
        data = [setup.prompts(name) for name in ("one", "one-held-out")]
    config.data, config.validation = map(str, data)
    about = setup.about_model() | {"config": config.to_dict(), "data": [file_hash(path) for path in data]}
    return setup.stage(recipe, about, lambda: finetune.train(config, setup.out / recipe))


def benchmark(setup: Setup, part: pocket.Part, arms: Mapping[str, Arm], load: Callable) -> Findings:
    """Every model of `arms` on a part of the pocket benchmark; the first one is what the others differ from."""
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
        given = [answer_files(folders[name], protocol) for name in (one, other)]
        scores = rescore.rescore(protocol, part.data(world), *given, resamples=setup.resamples)
        return scores["against"]["differences"]

    return Findings(found, compare)


def answer_files(folder: Path, protocol: Any) -> list[str]:
    """The answers in a folder of `Run`, as `rescore` takes them."""
    whole = folder / "answers.jsonl"
    if whole.exists():
        return [str(whole)]
    return [f"{group}={folder / group}.jsonl" for group in protocol.groups]


def held_out_pairs(setup: Setup, arms: Mapping[str, Arm], load: Callable) -> Findings:
    """Accuracy of the models of `arms` on both sets of held-out pairs; the first one is where training began."""
    encoder = Encoder(load(setup.base).processor, load(setup.base).config)
    length = min(setup.config[recipe].length for recipe in LEARNT)
    rows: dict[str, tuple[Row, ...]] = {
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

    found = {name: rescore.report(one, setup.resamples) for name, one in scores.items()}
    first, *others = scores
    for name in others:
        found[name]["against"] = {"differences": compare(name, first)}
    return Findings(found, compare)


def closeness(setup: Setup, load: Callable) -> dict[str, Mapping]:
    """How much closer than the base the student is to the edited teacher, on held-out answers of each kind."""
    path = setup.out / "benchmark" / "closeness" / "distances.json"
    prompts, student = setup.prompts("one-held-out"), setup.trained("flow_alignment")
    config = setup.config.flow_alignment

    def work() -> None:
        base = load(setup.base)
        encoder = Encoder(base.processor, base.config)
        # The answers that training's own validation has generated.
        answers = flow_data.read(
            prompts, base, setup.sevi, config.length, config.batch, setup.out / "flow_alignment" / "answers"
        )
        rows = pair_batches.rows_of(answers, encoder.conversation, encoder, config.length, config.too_long)
        measured = held_out.distances(load(student), base, rows, encoder, setup.sevi)
        files.write_atomically(path, json.dumps(measured, indent=1) + "\n")

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
    """Does what is missing of all stages.

    Args:
        command: the command line, for the document.

    Returns:
        The tables, and in words what helped.

    Raises:
        LVLMError: an unusable model or folder, or a folder of another run.
    """
    load = functools.lru_cache(maxsize=2)(lambda path: LVLM.from_pretrained(path, dtype="auto"))
    seconds = {"prompts": draw_prompts(setup), "pairs": make_pairs(setup)}
    seconds |= {recipe: train(setup, recipe) for recipe in RECIPES}
    several, one = training_report.arms(setup.base, setup.trained, setup.capl, setup.sevi)
    found = {
        part.name: benchmark(setup, part, several if part is training_report.SEVERAL else one, load)
        for part in training_report.PARTS
    }
    preferred, close = held_out_pairs(setup, several, load), closeness(setup, load)
    statistics = {
        name: files.read_json(setup.pairs(name).with_name("statistics.json"), "statistics")
        for name in preferences.REJECTED
    }
    return training_report.document(setup.config, setup.base, command, seconds, statistics, found, preferred, close)
