"""Flow alignment on the pocket model: data, the stages, the benchmark, the page."""

import json
import re
from pathlib import Path

import jax
import pytest

from lvlm_jax import models
from lvlm_jax.cli import pocket_training as command
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import get, rescore
from lvlm_jax.methods.sevi import SEVI
from lvlm_jax.pocket import training as tool
from lvlm_jax.pocket import training_report as pocket_training
from lvlm_jax.pocket.pairs import Mix, sample_prompts
from lvlm_jax.pocket.stages import Setup
from lvlm_jax.pocket.training_report import BASE, Arm, Findings
from lvlm_jax.training import held_out, settings
from lvlm_jax.training.data import pair_batches
from lvlm_jax.training.data.pair_batches import Encoder
from lvlm_jax.training.data.pair_files import Conversation, assistant, read_pairs
from lvlm_jax.training.objectives import flow_alignment
from lvlm_jax.weights import names
from tests.evaluation.fakes import Oracle
from tests.training import pair_sets

SMALL = ["--config.answers.prompts=3", "--config.answers.held_out=2", "--config.answers.describe=0.5"]


def setup(out, *words):
    return Setup(settings.read(command.SETTINGS, [*SMALL, *words]), out, 16, 20, 10, 10)


def test_the_settings_are_recipes():
    config = settings.read(command.SETTINGS)
    recipes = [recipe for part in command.PARTS for recipe in command.RECIPES[part]]
    for recipe in recipes:
        settings.check(config[recipe])
        assert config[recipe].steps > 0
    assert (config.base.sft.method, config.preference.recipe) == ("capl", "capl")
    lines = list(pocket_training.changes(config))
    assert "model pocket" in lines[0] and "pairs prompts 5000" in lines[0]
    assert {line.split(":")[0] for line in lines[1:]} == {f"- {recipe}" for recipe in recipes}


def test_a_stage_is_done_once_and_goes_on(tmp_path):
    done, own = [], setup(tmp_path)

    def broken():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own.stage("a", {"n": 1}, broken)
    own.stage("a", {"n": 1}, lambda: done.append(1))
    own.stage("a", {"n": 1}, lambda: done.append(2))
    assert done == [1] and own.seconds["a"] >= 0
    with pytest.raises(LVLMError, match=r"a' was made with other settings \(n: 1, now 2\); repeat those"):
        own.stage("a", {"n": 2}, lambda: done.append(3))


def test_prompts_to_learn_from_and_held_out(tmp_path):
    own = setup(tmp_path)
    tool.draw_prompts(own)
    for name, seed, count in (("one", 0, 3), ("one-held-out", 1, 2)):
        prompts = [json.loads(line) for line in tool.prompts_of(own, name).read_text().splitlines()]
        drawn = [asked for _, asked in sample_prompts(count, seed, Mix(1.0, 0.5))]
        assert [row["prompt"] for row in prompts] == [asked.text for asked in drawn]
        assert all(len(row["images"]) == 1 for row in prompts)
    with pytest.raises(LVLMError, match=r"prompts' was made with other settings"):
        tool.draw_prompts(setup(tmp_path, "--config.answers.prompts=5"))


def test_models_on_the_benchmark(tmp_path):
    own, oracle, sevi = setup(tmp_path), Oracle(), SEVI()
    asked_of = {BASE: None, "other": sevi, "same": None}
    arms = {name: Arm(own.base, method, name) for name, method in asked_of.items()}
    for part in pocket_training.PARTS:
        found = tool.benchmark(own, part, arms, lambda path: oracle)
        assert "against" not in found.scores[BASE]
        figures, against = found.scores["other"]["figures"], found.scores["other"]["against"]["differences"]
        for name in part.columns.values():
            if figures[name]["value"] is not None:
                change = figures[name]["value"] - found.scores[BASE]["figures"][name]["value"]
                assert against[name]["value"] == pytest.approx(change, abs=1e-5)
                assert found.scores["same"]["against"]["differences"][name]["value"] == 0
        assert found.compare("other", "same") == against
        given = tool.answer_files(tmp_path / "benchmark" / part.name / "other", get(part.protocol))
        assert all(Path(name.rpartition("=")[2]).is_file() for name in given)
    asked = oracle.asked
    tool.benchmark(own, part, arms, lambda path: pytest.fail("a model was loaded"))
    assert oracle.asked == asked


def values(scores, resamples=20):
    return {name: figure["value"] for name, figure in rescore.report(scores, resamples)["figures"].items()}


def close_row(number, tokens, base, own, base_agreement, agreement):
    kl = {"base_answer_kl": base, "answer_kl": own}
    return {"id": number, "tokens": tokens, "base_agreement": base_agreement, "agreement": agreement} | kl


def test_closeness_is_of_tokens():
    scores = held_out.closeness([close_row("a", 3, 0.6, 0.1, 1, 3), close_row("b", 1, 0.2, 0.1, 1, 1)])
    expected = {"base": 200, "student": 50, "closer": 4, "base agrees": 0.5, "student agrees": 1}
    assert values(scores) == pytest.approx(expected)
    low, high = rescore.report(scores, 50)["figures"]["closer"]["interval"]
    assert 2 <= low <= high <= 6


def test_distances_of_a_model(model, tmp_path):
    encoder = Encoder(model.processor, model.config)
    pairs = read_pairs(pair_sets.write(tmp_path))
    chosen = [Conversation(pair.images, [*pair.prompt, assistant(pair.chosen)], pair.id) for pair in pairs]
    conversations = pair_batches.rows_of(chosen, encoder.conversation, encoder, 95, "error")
    sevi = SEVI(omega=2.0, kappa=0.4, start_layer=0)
    measured = held_out.distances(model, model, conversations, encoder, sevi)
    assert [row["id"] for row in measured] == [row.id for row in conversations]
    for row in measured:
        assert row["answer_kl"] == pytest.approx(row["base_answer_kl"], rel=1e-4, abs=1e-7)
    (batch,) = pair_batches.in_order(conversations, encoder, 5)
    alignment = flow_alignment.Alignment(models.build(model.config), sevi, 1.0)
    whole = jax.jit(alignment.measure)(model.params, {flow_alignment.BASE: model.params}, batch)
    assert sum(row["tokens"] for row in measured) == whole["answer_kl"].count
    total = sum(row["base_answer_kl"] for row in measured)
    assert total == pytest.approx(float(whole["base_answer_kl"].total), rel=1e-3) and total > 1e-3


def findings(names, change, *figures):
    """Every model is better than the one before by `change`, which is certain."""
    values = {name: 0.5 + change * place for place, name in enumerate(names)}

    def scores(value):
        figure = {"value": value, "interval": [value, value], "n": 40, "unit": "share"}
        record = {"questions": 40, "images": {"count": 20}}
        return {"figures": dict.fromkeys(figures, figure), "cost": {"seconds": 1.0}, "record": record}

    def compare(one, other):
        apart = values[one] - values[other]
        return dict.fromkeys(figures, {"value": apart, "interval": [apart - 0.01, apart + 0.01], "p": 0.0})

    return Findings({name: scores(value) for name, value in values.items()}, compare)


def test_what_is_said_follows_from_the_intervals():
    one = list(pocket_training.arms("base", "student", None))
    found = {
        "pope": findings(one, 0.0, "mean: accuracy"),
        "chair": findings(one, 0.05, "C_S"),  # here less is better
    }
    close = {"all": rescore.report(held_out.closeness([close_row(name, 2, 0.4, 0.1, 1, 2) for name in "ab"]), 20)}
    said = list(pocket_training.words(found, close))
    for sentence in (
        "- pope: No difference shown between flow-aligned and base on mean: accuracy",
        "- chair: Flow-aligned is significantly worse than base on C_S: 60.0 against 50.0, difference +10.0",
        "- closer to the teacher (all): the student is closer than the base, by the factor 4.00 (4.00 to 4.00)",
    ):
        assert any(line.startswith(sentence) for line in said)
    assert "Of 4 comparisons with the base, 0 are for the model (none)" in said[-1]
    assert "2 against it (base, SEVI (chair), flow-aligned (chair))" in said[-1]
    given = settings.read(command.SETTINGS), names.checkpoint("pocket"), "command", {"prompts": 2.0}
    page = pocket_training.document(*given, [pocket_training.section(found, close)])
    assert "prompts 2." in page and "## How close to the edited teacher" in page
    assert len(re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE)) == 3


def test_settings_that_cannot_be(tmp_path):
    for word, message in (
        ("--config.nothing=1", "has no key nothing"),
        ("--config.preference.lora.rank=0", "lora.rank is 0; expected at least 1"),
        ("--steps=0", "0 is out of range"),
    ):
        with pytest.raises(LVLMError, match=message):
            command.main(["--out", str(tmp_path), word])
    assert not list(tmp_path.iterdir())
