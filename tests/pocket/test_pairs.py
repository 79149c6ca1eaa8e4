"""Prompts for preference pairs: the same from the same seed, with pictures and answers that belong to them."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket import pairs, questions
from lvlm_jax.pocket.scenes import render


@pytest.fixture(scope="module")
def drawn():
    return [pairs.sample_prompt(index) for index in range(300)]


def test_kinds_and_numbers_of_pictures(drawn):
    counts = Counter(len(scenes) for scenes, *_ in drawn)
    assert set(counts) == {1, 2, 3, 4} and 40 <= counts[1] <= 80  # 60 expected, 7 the standard deviation
    for scenes, kind, text, truth in drawn:
        assert kind in [maker.replace("colour", "color") for maker in (*questions.SINGLE, *questions.MULTI)]
        assert (len(scenes) > 1) == (kind in questions.MULTI)
        assert (" word" in text or "yes or no" in text) != truth.endswith(".")
    assert {kind for _, kind, _, _ in drawn} >= set(questions.MULTI)


def test_truths_follow_from_the_scenes(drawn):
    checked = 0
    for scenes, kind, text, truth in drawn:
        if kind == "which_image":
            named = [name for scene in scenes for name in scene.counts if f" {name}?" in text]
            (holder,) = [i for i, scene in enumerate(scenes) if max(named, key=len) in scene.counts]
            assert questions.ORDINALS[holder] in truth
            checked += 1
        elif kind == "same_object":
            shared = set.intersection(*(set(scene.counts) for scene in scenes))
            assert truth.startswith("Yes" if shared else "No")
            checked += 1
    assert checked > 50


def test_written_prompts(tmp_path):
    path = pairs.write_prompts(tmp_path, 6, seed=3, single=0.0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == 6
    for index, row in enumerate(rows):
        scenes, kind, text, truth = pairs.sample_prompt(index, 3, 0.0)
        assert row["id"] == f"{kind}/{index:06d}" and (row["prompt"], row["truth"]) == (text, truth)
        assert len(row["images"]) == len(scenes) > 1
        for name, scene in zip(row["images"], scenes, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name)), render(scene))
    kept, lost = (tmp_path / rows[0]["images"][place] for place in (0, 1))
    written = kept.stat().st_mtime_ns
    lost.unlink()
    assert pairs.write_prompts(tmp_path, 6, seed=3, single=0.0) == path  # as after a kill
    assert lost.exists() and kept.stat().st_mtime_ns == written
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(LVLMError, match="has prompts of other settings"):
        pairs.write_prompts(tmp_path, 6, seed=4, single=0.0)
    (tmp_path / "file").touch()
    with pytest.raises(LVLMError, match="prompts cannot be written"):
        pairs.write_prompts(tmp_path / "file", 1)
