"""The pocket training command from an empty folder to its page; a second call repeats nothing."""

import pytest

from lvlm_jax.cli import pocket_training as command
from lvlm_jax.pocket import experiment, training
from lvlm_jax.training import records

pytestmark = [pytest.mark.slow, pytest.mark.full_compiler]  # its programs run for minutes


def test_the_whole_path(tmp_path, monkeypatch):
    target = tmp_path / "page.md"
    words = [
        "--out", str(tmp_path / "run"), "--steps", "2", "--images", "10", "--captions", "10", "--resamples", "20",
        "--batch-size", "16", "--markdown", str(target),
        "--config.talks.count=16", "--config.talks.held_out=4", "--config.base.batch=4", "--config.gate=-1",
        "--config.pairs.prompts=24", "--config.pairs.batch=8", "--config.pairs.max_negation=1", "--config.seeds=(0,)",
        "--config.sft.batch=2", "--config.preference.batch=2", "--config.questions=60", "--config.rounds=1",
        "--config.answers.prompts=8", "--config.answers.held_out=4", "--config.flow_alignment.batch=4",
    ]  # fmt: skip
    assert command.main(words) == 0
    page = target.read_text()
    for title in ("CAPL: pairs, attention, and both", "Descriptions (CHAIR)", "How close to the edited"):
        assert f"## {title}" in page
    assert "- Of 4 comparisons with the base" in page and "model checkpoint" in page
    capl = records.read(tmp_path / "run" / "arms" / "capl-0" / "export")
    assert capl["method"]["name"] == capl["model"]["training"]["method"]["name"] == "CAPL"
    for module in (experiment, training):
        monkeypatch.setattr(module.finetune, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(experiment.preferences, "answer_prompts", lambda *_: pytest.fail("asked again"))
    assert command.main(words) == 0
    tables = [text[text.index("## CAPL") :] for text in (page, target.read_text())]
    assert tables[0] == tables[1]
