"""The experiment about CAPL on the pocket model: a base that needs CAPL's attention, and trainings that start from it.

1. The base is fine-tuned under CAPL's cross-image attention. Half of its conversations are about several images: the
   question stands before the images, and some kinds of questions need a comparison of the images.
2. The gate: under truncated attention the base must lose at least `config.gate` of its accuracy. If it loses less, it
   answers without attention between images, and the results of the arms say nothing about CAPL.
3. Pairs are made for one set of prompts. The chosen answer is the truth. The rejected answer is a wrong one, by a model
   under truncated attention or by the unmodified model; if neither is wrong, it is a wrong option of the prompt.
4. The arms start from the base and train with equal prompts, steps and λ, once for every seed. Then CAPL is trained
   without its likelihood term, and in further rounds, for which the model trained by CAPL answers new prompts.
5. All models answer the balanced questions of the test split, under CAPL's attention and under plain attention.

Folders below `Setup.out`:

    talks/, base/, prompts/, pairs/, arms/ARM-SEED/, rounds/N/, questions/, benchmark/balanced/MODEL/
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import BENCHMARKS, Data, Scores, get
from lvlm_jax.evaluation.run import Options, Run
from lvlm_jax.journal.record import checkpoint_hash, file_hash
from lvlm_jax.methods import Method
from lvlm_jax.methods.capl import CAPL
from lvlm_jax.pocket import balanced
from lvlm_jax.pocket.pairs import Mix, write_prompts
from lvlm_jax.pocket.stages import Setup
from lvlm_jax.training import finetune
from lvlm_jax.training.data import pairs, preferences
from lvlm_jax.training.data.pair_files import read_pairs, write_pairs
from lvlm_jax.training.data.pair_filters import Filters
from lvlm_jax.weights import names

PROTOCOL = "pocket/question-first"
BASE = "base"
ATTENTION = {
    "": "cross",
    ", plain attention": None,
    ", truncated": "truncated",
}  # ending of a row's name -> CAPL's mode


@dataclasses.dataclass(frozen=True)
class Arm:
    """One training.

    Attributes:
        recipe: its section of the settings, "sft" or "preference".
        rejected: where the rejected answers of its pairs come from, one of `preferences.REJECTED`.
        attention: whether it learns under CAPL's attention.
        likelihood: whether the loss of preferences also contains the likelihood of chosen answers (λ).
    """

    recipe: str
    rejected: str
    attention: bool
    likelihood: bool = True


ARMS = {
    "SFT": Arm("sft", "truncated", True),
    "DPO": Arm("preference", "plain", False),
    "CAPL's pairs": Arm("preference", "truncated", False),
    "CAPL's attention": Arm("preference", "plain", True),
    "CAPL": Arm("preference", "truncated", True),
}
ABLATIONS = {"CAPL, λ = 0": Arm("preference", "truncated", True, likelihood=False)}


@dataclasses.dataclass(frozen=True)
class Model:
    """A row of the table: checkpoints of one arm, one for each seed, under one attention."""

    paths: tuple[str, ...]
    method: Method | None
    folders: tuple[str, ...]


def attention(setup: Setup, mode: str | None) -> Method | None:
    """CAPL's attention with the settings of the run; None for plain attention."""
    of = setup.config.preference.preference
    return None if mode is None else CAPL(sigma=of.sigma, rho=of.rho, mode=mode)


def make_base(setup: Setup) -> str:
    """Writes conversations and trains the base on them; returns its checkpoint."""
    talks, config = setup.config.talks, setup.config.base.copy_and_resolve_references()
    draws = {"train": (talks.count, setup.config.seed + 100), "held-out": (talks.held_out, setup.config.seed + 101)}

    def draw() -> None:
        for name, (count, seed) in draws.items():
            folder = setup.out / "talks" / name
            mix = Mix(talks.single, talks.describe, balanced.KINDS, talks.one_word, question_first=True)
            prompts = write_prompts(folder, count, seed, mix)
            rows = [_conversation(row) for _, row in files.read_rows(prompts, "prompts")]
            files.write_whole(folder / "talks.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    setup.stage("talks", {"drawn": draws, "settings": talks.to_dict()}, draw)
    data = [setup.out / "talks" / name / "talks.jsonl" for name in draws]
    config.model, (config.data, config.validation) = setup.config.model, map(str, data)
    about = setup.about_model() | {"config": config.to_dict(), "data": [file_hash(path) for path in data]}
    setup.stage("base", about, lambda: finetune.train(config, setup.out / "base"))
    return str(setup.out / "base" / "export")


def _conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt and its truth as a conversation to learn."""
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["truth"]}]
    return {"id": row["id"], "images": row["images"], "messages": messages, "kind": row["kind"]}


def make_pairs(setup: Setup, model: str, folder: str, seed: int) -> dict[str, Path]:
    """Makes pairs of a model's answers to new prompts; returns a file of pairs for each origin of the rejected answers.
    All files have the same prompts."""
    new = setup.config.pairs
    prompts = setup.out / folder / "prompts"
    about = {"model": checkpoint_hash(model), "dtype": names.dtype("auto"), "settings": new.to_dict(), "seed": seed}
    paths = {rejected: setup.out / folder / f"{rejected}.jsonl" for rejected in preferences.REJECTED}

    def work() -> None:
        mix = Mix(new.single, kinds=balanced.KINDS, one_word=new.one_word, question_first=True)
        prompts_file = write_prompts(prompts, new.prompts, seed, mix)
        by_origin = {}
        for rejected in preferences.REJECTED:
            settings = dict(max_new_tokens=new.max_new_tokens, seed=setup.config.seed, laddered=True)
            plan = preferences.plan(attention(setup, "cross"), rejected, **settings)
            out = setup.out / folder / rejected
            several = preferences.answer_prompts(prompts_file, plan, model, "auto", out, "pocket", new.batch)
            figures = pairs.write(
                out, several.items, several.prompts, several.record, Filters(), seed=setup.config.seed, balanced=True,
                max_negation=new.max_negation,
            )  # fmt: skip
            print(preferences.table(figures))
            by_origin[rejected] = read_pairs(out / "pairs.jsonl")
        common = set.intersection(*({pair.id for pair in several} for several in by_origin.values()))
        for rejected, several in by_origin.items():
            write_pairs(paths[rejected], [pair for pair in several if pair.id in common])

    setup.stage(folder, about, work)
    return paths


def train(setup: Setup, name: str, arm: Arm, base: str, data: Mapping[str, Path], seed: int, folder: str) -> str:
    """Trains one arm, by the same code as `lvlm train`; returns its checkpoint."""
    config = setup.config[arm.recipe].copy_and_resolve_references()
    config.model, config.seed, config.data = base, seed, str(data[arm.rejected])
    if arm.recipe == "sft":
        config.sft.method = setup.config.base.sft.method if arm.attention else "none"
    else:
        config.preference.method = "capl" if arm.attention else "none"
        config.preference.nll = config.preference.nll if arm.likelihood else 0.0
    about = {"arm": name, "base": checkpoint_hash(base), "config": config.to_dict()}
    about |= {"data": file_hash(config.data), "dtype": names.dtype("auto")}
    setup.stage(folder, about, lambda: finetune.train(config, setup.out / folder))
    return str(setup.out / folder / "export")


def slug(name: str) -> str:
    """The name, changed so that it can be part of a folder's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower().replace("λ", "lambda")).strip("-")


def scores_of_row(setup: Setup, model: Model, load: Any) -> Scores:
    """The scores of a row's checkpoints on the balanced questions, all seeds together; `load` loads a checkpoint."""
    world, protocol, all_scores = setup.out / "questions", get(PROTOCOL), []
    for path, folder in zip(model.paths, model.folders, strict=True):
        options = Options(setup.batch_size, resamples=setup.resamples)
        data = Data(world, limit=setup.config.limit or None)
        out = setup.out / "benchmark" / "balanced" / folder
        run = Run(path, names.dtype("auto"), protocol, data, out, model.method, options)
        if not run.complete():
            run.ask(load(path))
        all_scores.append(stored(run.score()))
    return pooled(all_scores)


def seeds(setup: Setup, row_names: Mapping[str, Scores]) -> dict[str, list[float]]:
    """Name of a row -> the accuracy of each seed alone; `row_names` is the result of `run`."""
    folder = setup.out / "benchmark" / "balanced"
    single = {}
    for name in row_names:
        paths = sorted(folder.glob(f"{slug(name)}-[0-9]*/scores.json"))
        single[name] = [files.read_json(path, "scores")["figures"]["accuracy"]["value"] for path in paths]
    return single


def stored(document: Mapping[str, Any]) -> Scores:
    """The `Scores` behind the content of a `scores.json`."""
    protocol, counts = get(PROTOCOL), document["per_image"]["counts"]
    images = document["per_image"]["images"]
    groups = list(dict.fromkeys(group for group, _, _ in document["correct"]))
    figures = BENCHMARKS[protocol.benchmark].figures(groups, counts, protocol)
    return Scores(tuple(images), tuple(counts), np.array(list(images.values()), float), figures, {}, document["notes"])


def pooled(scores: list[Scores]) -> Scores:
    """Several runs over the same questions as one: the counts of each group of images are added up."""
    first = scores[0]
    return dataclasses.replace(first, table=sum(one.table for one in scores))


def rows(trained: Mapping[str, tuple[str, ...]], base: str, setup: Setup) -> Iterator[tuple[str, Model]]:
    """The rows of the table: the base under every attention, then each arm under CAPL's and under plain attention."""
    for name, paths in {BASE: (base,), **trained}.items():
        for ending, mode in ATTENTION.items():
            if mode == "truncated" and name != BASE:
                continue
            folders = tuple(f"{slug(name + ending)}-{number}" for number in range(len(paths)))
            yield name + ending, Model(paths, attention(setup, mode), folders)


def gate(setup: Setup, base: str, load: Any) -> dict[str, Scores]:
    """The scores of the base under every attention: its rows of the table. `load` loads a checkpoint.

    Raises:
        LVLMError: the base loses too little accuracy under truncated attention.
    """
    balanced.write(setup.out / "questions", setup.config.questions, setup.config.seed)
    by_row = {name: scores_of_row(setup, model, load) for name, model in rows({}, base, setup)}
    cross, truncated = (float(by_row[name].values()["accuracy"]) for name in (BASE, f"{BASE}, truncated"))
    if cross - truncated < setup.config.gate:
        raise LVLMError(
            f"the base has {100 * cross:.1f} % of the questions right, and {100 * truncated:.1f} % under truncated "
            f"attention: less than {100 * setup.config.gate:g} points lost, so no image needs another; train the "
            "base for longer (--config.base.steps), or lower --config.gate"
        )
    return by_row


def run(setup: Setup, load: Any) -> dict[str, Scores]:
    """Runs the missing stages; `load` loads a checkpoint.

    Returns:
        The scores of each row of the table, the base first.

    Raises:
        LVLMError: a model or folder that cannot be used, a folder of another run, or a gate that the base or the pairs
            do not pass.
    """
    base = make_base(setup)
    by_row = gate(setup, base, load)
    data = make_pairs(setup, base, "pairs", setup.config.seed)
    trained = {}
    for name, arm in (ARMS | (ABLATIONS if setup.config.ablations else {})).items():
        trained[name] = tuple(
            train(setup, name, arm, base, data, seed, f"arms/{slug(name)}-{seed}") for seed in setup.config.seeds
        )
    model = trained["CAPL"][0]
    for number in range(1, setup.config.rounds + 1):
        folder, seed = f"rounds/{number}", setup.config.seed + 10 * number
        further = make_pairs(setup, model, f"{folder}/pairs", seed)
        model = train(setup, "CAPL", ARMS["CAPL"], model, further, setup.config.seeds[0], f"{folder}/capl")
        trained[f"CAPL, {number} more round{'s' if number > 1 else ''}"] = (model,)
    return by_row | {
        name: scores_of_row(setup, model, load) for name, model in rows(trained, base, setup) if name not in by_row
    }
