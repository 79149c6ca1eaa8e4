"""Questions: each answer is checked against the scene by rules written apart from the makers."""

import re

import numpy as np

from lvlm_jax.pocket import questions
from lvlm_jax.pocket.conversations import sample_conversation, sample_text
from lvlm_jax.pocket.scenes import sample_scene, scene_at
from tests.pocket.words import categories_in

SCENES = [scene_at("test", index) for index in range(300)]
NUMBERS = {"only one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}


def ask(kind):
    rng = np.random.default_rng(3)
    for scene in SCENES:
        for _ in range(4):
            question = questions.SINGLE[kind](scene, rng)
            if question is not None:
                yield scene, question


def yes_rate(answers):
    return np.mean([answer == "Yes" for answer in answers])


def test_existence():
    answers = []
    for scene, question in ask("existence"):
        (name,) = categories_in(question.text)
        assert question.short == ("Yes" if name in scene.counts else "No")
        assert question.full.startswith(question.short + ",") and categories_in(question.full) == [name]
        answers.append(question.short)
    assert 0.45 < yes_rate(answers) < 0.55


def test_choice():
    first = []
    for scene, question in ask("choice"):
        pair = categories_in(question.text)
        assert [name for name in pair if name in scene.counts] == [question.short]
        assert categories_in(question.full) == [question.short]
        first.append(pair[0] == question.short)
    assert 0.45 < np.mean(first) < 0.55


def test_counting():
    answers = []
    for scene, question in ask("counting"):
        (name,) = categories_in(question.text)
        count = scene.counts.get(name, 0)
        claimed = re.search("only one|two|three|four|five|six|seven", question.text)
        if question.text.startswith(("Are there", "Is there")):
            assert question.short == ("Yes" if NUMBERS[claimed.group()] == count else "No"), (question, count)
            answers.append(question.short)
        else:
            assert question.short == str(count)
    assert 0.35 < yes_rate(answers) < 0.6


def test_position():
    answers = []
    for scene, question in ask("position"):
        names = categories_in(question.text)
        places = [scene.of(name)[0].centre for name in names]
        assert all(scene.counts[name] == 1 for name in names)
        (side,) = re.findall(r"\b(?:left|right|top|bottom)\b", question.text) or [None]
        if question.text.startswith("Where"):
            assert question.short == ("left", "middle", "right")[min(2, int(places[0][0] * 3))]
            continue
        axis = int(side in ("top", "bottom"))
        beyond = places[1][0] if len(places) == 2 else 0.5
        holds = places[0][axis] < beyond if side in ("left", "top") else places[0][axis] > beyond
        if question.text.startswith("Which"):
            assert question.short == (names[0] if holds else names[1])
        else:
            assert question.short == ("Yes" if holds else "No"), question
            answers.append(question.short)
    assert 0.4 < yes_rate(answers) < 0.6


def test_colour():
    answers = []
    for scene, question in ask("colour"):
        (name,) = categories_in(question.text)
        (placed,) = scene.of(name)
        if question.text.startswith("What color"):
            assert question.short == placed.colour
        else:
            assert question.short == ("Yes" if f" {placed.colour} " in question.text else "No")
            answers.append(question.short)
    assert 0.4 < yes_rate(answers) < 0.6


def test_questions_over_several_images():
    """Of two to four scenes of one place, so that they share objects."""
    rng, answers = np.random.default_rng(5), {}
    ordinals = ("first", "second", "third", "fourth")
    for number in range(120):
        group = [sample_scene(rng, "test", "a farm") for _ in range(2 + number % 3)]
        has = [set(scene.counts) for scene in group]
        for kind, make in questions.MULTI.items():
            if (question := make(group, rng)) is None:
                continue
            holds = [name in names for name in categories_in(question.text) for names in has]
            assert len(holds) == (0 if kind == "same_object" else len(group))
            if kind == "same_object":
                expected = "Yes" if set.intersection(*has) else "No"
            elif kind == "which_image":
                assert sum(holds) == 1
                expected = ordinals[holds.index(True)]
            elif kind == "how_many_images":
                expected = str(sum(holds))
            elif kind == "in_all_images":
                expected = "Yes" if all(holds) else "No"
            else:
                (ordinal,) = re.findall("first|second|third|fourth", question.text)
                expected = "Yes" if holds[ordinals.index(ordinal)] else "No"
            assert question.short == expected, question
            answers.setdefault(kind, set()).add(expected)
    assert all(len(found) > 1 for found in answers.values()) and len(answers) == len(questions.MULTI)


def test_conversations_are_reproducible_and_mixed():
    images, turns = sample_conversation(0, 12)
    again, turns_again = sample_conversation(0, 12)
    assert turns == turns_again and len(images) == len(again)
    for one, other in zip(images, again, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.shape == (96, 96, 3) and one.dtype == np.uint8
    texts = [sample_text(1, index) for index in range(1000)]
    sizes = np.array([len(scenes) for scenes, _ in texts])
    assert 0.11 < np.mean(sizes > 1) < 0.19 and set(sizes) == {1, 2, 3, 4}
    single = [turns for scenes, turns in texts if len(scenes) == 1]
    asked = [question for turns in single for question, _ in turns]
    assert len(asked) / len(single) > 6.5
    whether = re.compile(r"Is there an? (?!red|blue|green|yellow|purple)|Does|Can|Do you")
    existence = np.mean([bool(whether.match(question)) for question in asked])
    choice = np.mean([" or a" in question for question in asked])
    assert 0.2 < choice < 0.4 and 0.2 < existence < 0.4
    suffix = np.mean(["\nAnswer the question using a single word or phrase." in question for question in asked])
    assert 0.05 < suffix < 0.2
    assert all(len({question for question, _ in turns}) == len(turns) for _, turns in texts)
