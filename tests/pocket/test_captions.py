"""Captions: true ones name what is there and nothing else, a quarter of train's are wrong in one object."""

import re

import numpy as np
import pytest

from lvlm_jax.pocket import catalogue
from lvlm_jax.pocket.captions import STYLES, caption, five_captions, third
from lvlm_jax.pocket.conversations import sample_text
from lvlm_jax.pocket.scenes import scene_at
from tests.pocket.words import categories_in

SCENES = [scene_at("train", index) for index in range(400)]
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}


@pytest.mark.parametrize("style", [*STYLES, "list"])
def test_true_captions_name_present_objects_and_counts_only(style):
    complete = 0
    for scene in SCENES:
        text = caption(scene, style, np.random.default_rng(0))
        named = categories_in(text)
        assert named and set(named) <= set(scene.counts), text
        complete += set(named) == set(scene.counts)
        for word, number in NUMBERS.items():
            for follow in re.findall(rf"\b{word} (?:pairs of )?((?:\w+ ){{0,2}}\w+)", text.lower()):
                assert scene.counts[categories_in(follow)[0]] == number, text
    assert complete == len(SCENES) if style not in STYLES[:3] else complete > 0.4 * len(SCENES)


def test_detailed_captions_are_short_and_put_objects_on_the_right_side():
    checked, lengths = 0, []
    for scene in SCENES:
        text = caption(scene, "detailed", np.random.default_rng(1))
        lengths.append(len(text.split()))
        for side in ("left", "middle", "right"):
            for sentence in re.findall(rf"(?:On|In) the {side} there [^.]*\.", text):
                for name in categories_in(sentence):
                    assert side in {third(placed) for placed in scene.of(name)}, text
                    checked += 1
    assert checked > 500 and np.mean(lengths) < 32 and max(lengths) < 60


def test_wrong_captions_add_exactly_one_absent_object_typical_of_the_place():
    for style in STYLES:
        for index, scene in enumerate(SCENES[:100]):
            named = set(categories_in(caption(scene, style, np.random.default_rng(index), noisy=True)))
            (absent,) = named - set(scene.counts)
            assert absent in catalogue.SCENE_TYPES[catalogue.SCENE_NAMES.index(scene.kind)].objects


def test_a_quarter_of_train_captions_and_of_caption_turns_are_wrong():
    rng, wrong = np.random.default_rng(0), []
    for scene in SCENES:
        for text, noisy in five_captions(scene, rng, 0.25):
            wrong.append(bool(set(categories_in(text)) - set(scene.counts)))
            assert wrong[-1] == noisy
    assert 0.2 < np.mean(wrong) < 0.3
    wrong = []
    for index in range(1500):
        scenes, turns = sample_text(5, index)
        for question, answer in turns:
            if re.search(r"[Dd]escri|caption|What is shown|What do you see|[Ll]ist the|objects", question):
                wrong.append(not set(categories_in(answer)) <= set(scenes[0].counts))
    assert len(wrong) > 1000 and 0.2 < np.mean(wrong) < 0.3
