"""The experiment about CAPL: its stages once each, whatever stops them, equal arms, gates, and the page."""

import json
import shutil

import numpy as np
import pytest

from lvlm_jax.cli import pocket_training as command
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import options, run
from lvlm_jax.evaluation.engine import collect
from lvlm_jax.pocket import experiment
from lvlm_jax.training.data import preferences
from lvlm_jax.training.data.pair_files import read_pairs
from lvlm_jax.weights import names
from tests.evaluation.fakes import Oracle
from tests.training.stand_in import StandIn

WORDS = [
    "--parts", "capl", "--steps", "1", "--resamples", "20", "--config.talks.count=4", "--config.talks.held_out=2",
    "--config.pairs.prompts=12", "--config.pairs.batch=4", "--config.questions=40", "--config.gate=-1",
    "--config.seeds=(0,1)", "--config.rounds=1",
]  # fmt: skip


@pytest.fixture
def trained(monkeypatch):
    """The configurations that were trained with; models, answers and margins are stand-ins."""
    found = []

    def train(config, workdir):
        found.append(config)
        shutil.copytree(names.checkpoint("pocket"), workdir / "export")
        (workdir / "export" / "training.json").write_text(json.dumps([config.recipe, config.seed, str(workdir)]))

    def margins(model, questions, protocol, method, work, title):
        def respond(messages, seeds, asked):
            return [{"margin": float(len(question.text) % 5 - 1)} for question in asked]

        collect(model, questions, protocol, respond, work, options.LOG, title)

    monkeypatch.setattr(experiment.finetune, "train", train)
    # Pairs are made by a model in the dtype that stands in their record, questions answered by one in "auto".
    loaded = {"auto": Oracle, "float32": StandIn}
    monkeypatch.setattr(preferences.LVLM, "from_pretrained", lambda path, dtype: loaded[dtype]())
    monkeypatch.setattr(run.options, "log_margins", margins)
    return found


def test_arms_are_equal_but_for_what_they_are_about_and_nothing_is_done_twice(trained, tmp_path):
    words = ["--out", str(tmp_path), *WORDS]
    assert command.main(words) == 0
    base, *arms = trained
    assert (base.recipe, base.sft.method, base.lora.enabled, base.seed) == ("sft", "capl", False, 0)
    assert len(arms) == 2 * len(experiment.ARMS | experiment.ABLATIONS) + 1
    told = [
        (arm.recipe, arm.seed, arm.data.rsplit("/", 1)[1].removesuffix(".jsonl"),
         arm.sft.method if arm.recipe == "sft" else arm.preference.method, arm.get("preference", {}).get("nll"))
        for arm in arms
    ]  # fmt: skip
    expected = [
        ("sft", "truncated", "capl", None), ("capl", "plain", "none", 1.0), ("capl", "truncated", "none", 1.0),
        ("capl", "plain", "capl", 1.0), ("capl", "truncated", "capl", 1.0), ("capl", "truncated", "capl", 0.0),
    ]  # fmt: skip
    assert told[:-1] == [(recipe, seed, *rest) for recipe, *rest in expected for seed in (0, 1)]
    assert arms[-1].model.endswith("arms/capl-0/export") and "rounds/1/pairs" in arms[-1].data
    assert {(arm.steps, arm.batch, arm.optimizer.peak) for arm in arms} == {(1, 16, 2e-4)}
    assert {arm.model for arm in arms[:-1]} == {str(tmp_path / "base" / "export")}
    files = [read_pairs(tmp_path / "pairs" / f"{name}.jsonl") for name in preferences.REJECTED]
    assert [pair.id for pair in files[0]] == [pair.id for pair in files[1]] and len(files[0]) > 3
    assert [pair.chosen for pair in files[0]] == [pair.chosen for pair in files[1]]
    row = json.loads((tmp_path / "talks" / "train" / "talks.jsonl").read_text().splitlines()[0])
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    page = (tmp_path / "table.md").read_text()
    for text in ("| CAPL, 1 more round |", "| DPO, plain attention |", "- CAPL, seed by seed: ", "and DPO on accuracy"):
        assert text in page
    count = len(trained)
    assert command.main(words) == 0 and len(trained) == count
    again = (tmp_path / "table.md").read_text()
    assert again[again.index("## CAPL") :] == page[page.index("## CAPL") :]
    with pytest.raises(LVLMError, match=r"arms/dpo-0' was made with other settings \(config.optimizer.peak"):
        command.main([*words, "--config.preference.optimizer.peak=1e-3"])


def test_a_base_that_does_not_need_other_images_is_told_with_its_figures(trained, tmp_path):
    with pytest.raises(LVLMError, match=r"the base has [\d.]+ % .* % under truncated attention: less than 101 points"):
        command.main(["--out", str(tmp_path), *WORDS, "--config.gate=1.01"])
    assert len(trained) == 1  # the base


def test_seeds_are_counted_together():
    counts = [f"{prefix}{name}" for prefix in ("", "which_image/") for name in ("asked", "right", "constant")]

    def stored(images):
        one = {name: values * 2 for name, values in images.items()}
        correct = [["which_image", "1", True]]
        return experiment.stored({"per_image": {"counts": counts, "images": one}, "correct": correct, "notes": {}})

    both = experiment.pooled([stored({"a": [2, 1, 1], "b": [2, 2, 1]}), stored({"a": [2, 0, 1], "b": [2, 0, 1]})])
    np.testing.assert_array_equal(both.table[:, :3], [[4, 1, 2], [4, 2, 2]])
    assert both.values()["accuracy"] == both.values()["which_image: accuracy"] == 3 / 8
