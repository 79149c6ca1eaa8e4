"""Prompts for preference pairs: the same from the same seed, with pictures and answers that belong to them."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket import balanced, pairs, questions
from lvlm_jax.pocket.scenes import render


@pytest.fixture(scope="module")
def drawn():
    return [asked for _, asked in pairs.sample_prompts(300)]


def test_kinds_and_numbers_of_pictures(drawn):
    counts = Counter(len(asked.scenes) for asked in drawn)
    assert set(counts) == {1, 2, 3, 4} and 40 <= counts[1] <= 80  # 60 expected, 7 the standard deviation
    for asked in drawn:
        assert asked.kind in [maker.replace("colour", "color") for maker in (*questions.SINGLE, *questions.MULTI)]
        assert (len(asked.scenes) > 1) == (asked.kind in questions.MULTI)
        assert (" word" in asked.text or "yes or no" in asked.text) != asked.truth.endswith(".")
        assert asked.wrong and asked.truth not in asked.wrong
    by_kind = Counter(asked.kind for asked in drawn if len(asked.scenes) > 1)
    assert set(by_kind) == set(questions.MULTI) and max(by_kind.values()) < 1.5 * min(by_kind.values())


def test_truths_and_wrong_answers_follow_from_the_scenes(drawn):
    checked = 0
    for asked in drawn:
        if asked.kind == "which_image":
            named = [name for scene in asked.scenes for name in scene.counts if f" {name}?" in asked.text]
            (holder,) = [i for i, scene in enumerate(asked.scenes) if max(named, key=len) in scene.counts]
            assert questions.ORDINALS[holder] in asked.truth and len(asked.wrong) == len(asked.scenes) - 1
            assert not any(questions.ORDINALS[holder] in wrong for wrong in asked.wrong)
            checked += 1
        elif asked.kind == "same_object":
            shared = set.intersection(*(set(scene.counts) for scene in asked.scenes))
            assert asked.truth.startswith("Yes" if shared else "No")
            assert asked.wrong[0].startswith("No" if shared else "Yes")
            checked += 1
    assert checked > 50


def test_written_prompts(tmp_path):
    mix = pairs.Mix(0.0, question_first=True)
    path = pairs.write_prompts(tmp_path, 6, seed=3, mix=mix)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    drawn = pairs.sample_prompts(6, 3, mix)
    assert len({row["id"] for row in rows}) == 6
    for index, (row, (group, asked)) in enumerate(zip(rows, drawn, strict=True)):
        assert row["id"] == f"{asked.kind}/{index:06d}" and (row["prompt"], row["truth"]) == (asked.text, asked.truth)
        assert "?" + "<image>" * len(row["images"]) in row["prompt"] and len(row["images"]) == len(asked.scenes) > 1
        for name, scene in zip(row["images"], asked.scenes, strict=True):
            assert name.startswith(f"images/{group}_")
            np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name)), render(scene))
    kept, lost = (tmp_path / rows[0]["images"][place] for place in (0, 1))
    written = kept.stat().st_mtime_ns
    lost.unlink()
    assert pairs.write_prompts(tmp_path, 6, 3, mix) == path  # as after a kill
    assert lost.exists() and kept.stat().st_mtime_ns == written
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(LVLMError, match="has prompts of other settings"):
        pairs.write_prompts(tmp_path, 6, seed=4, mix=mix)
    (tmp_path / "file").touch()
    with pytest.raises(LVLMError, match="prompts cannot be written"):
        pairs.write_prompts(tmp_path / "file", 1)


def test_balanced_questions(tmp_path):
    """Equal numbers of every kind, and of each answer within a kind; no image occurs in more than four questions."""
    count = balanced.write(tmp_path, 300, seed=1)
    rows = [json.loads(line) for line in (tmp_path / balanced.FILE).read_text().splitlines()]
    assert len(rows) == count >= 300
    uses = Counter(name for row in rows for name in row["images"])
    assert max(uses.values()) <= 4 and all((tmp_path / "images" / name).is_file() for name in uses)
    for kind in balanced.KINDS:
        own = [row for row in rows if row["kind"] == kind]
        assert count / len(balanced.KINDS) * 0.7 < len(own) < count / len(balanced.KINDS) * 1.5
        assert all(row["options"][0] == row["label"] and len(set(row["options"])) > 1 for row in own)
        if kind == "shared_object":
            continue
        for images in (2, 3, 4):
            labels = Counter(row["label"] for row in own if len(row["images"]) == images)
            assert set(labels) <= set(balanced.answers(kind, images)) and len(set(labels.values())) <= 2
    before = (tmp_path / balanced.FILE).stat().st_mtime_ns
    assert balanced.write(tmp_path, 300, seed=1) == count
    with pytest.raises(LVLMError, match="holds other questions"):
        balanced.write(tmp_path, 300, seed=2)
    assert before


def test_comparisons_follow_from_the_scenes():
    for group in balanced.draw(60, 2, "test", questions.COMPARISON):
        has, places = [set(scene.counts) for scene in group.scenes], [scene.kind for scene in group.scenes]
        for question in group.questions:
            if question.kind == "same_place":
                assert question.short == ("Yes" if len(set(places)) == 1 else "No")
            elif question.kind == "shared_object":
                assert {question.short} == set.intersection(*has)
            elif question.kind == "odd_one_out":
                assert places.count(places[questions.ORDINALS.index(question.short)]) == 1 and len(set(places)) == 2
            else:
                name = question.text.removeprefix("Which image has no ").rstrip("?")
                assert [name in names for names in has].index(False) == questions.ORDINALS.index(question.short)
                assert sum(name not in names for names in has) == 1
