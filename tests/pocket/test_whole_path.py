"""The pocket training command from nothing to its page, and once more without doing anything again."""

import pytest

from lvlm_jax.cli import pocket_training as command
from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket import training as tool

pytestmark = [pytest.mark.slow, pytest.mark.full_compiler]  # its programs run for minutes


def test_the_whole_path(tmp_path, monkeypatch):
    target = tmp_path / "page.md"
    words = [
        "--out", str(tmp_path / "run"), "--steps", "2", "--images", "10", "--captions", "10", "--resamples", "20",
        "--batch-size", "16",
        "--markdown", str(target), "--config.pairs.prompts=24", "--config.pairs.held_out=16",
        "--config.pairs.batch=8", "--config.answers.prompts=8", "--config.answers.held_out=4",
        "--config.capl.batch=2", "--config.dpo.batch=2", "--config.flow_alignment.batch=4",
    ]  # fmt: skip
    assert command.main(words) == 0
    page = target.read_text()
    for title in ("What came of it", "Descriptions (CHAIR)", "Held-out pairs", "How close to the edited"):
        assert f"## {title}" in page
    assert "- Of 8 comparisons with the base" in page and "model checkpoint" in page
    for recipe in tool.RECIPES:
        assert (tmp_path / "run" / recipe / "adapter" / "adapter_config.json").is_file()
    monkeypatch.setattr(tool.finetune, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(tool.preferences, "answered", lambda *_: pytest.fail("asked again"))
    assert command.main(words) == 0
    tables = [text[text.index("## What came of it") :] for text in (page, target.read_text())]
    assert tables[0] == tables[1]
    with pytest.raises(LVLMError, match=r"capl' was made with other settings \(config.optimizer.peak"):
        command.main([*words, "--config.capl.optimizer.peak=1e-3"])
