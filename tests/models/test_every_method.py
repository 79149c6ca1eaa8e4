"""Every method on every family; what ran is in docs/models.md, whose tables `method_tables` writes."""

import dataclasses
import functools
import re

import numpy as np
import pytest

from lvlm_jax import methods, models
from lvlm_jax.generation import decode_loop
from tests.models import zoo
from tests.models.method_tables import (
    FIELD,
    FIELD_FAMILIES,
    METHODS,
    MORE,
    ONE,
    PARTS,
    QUICK,
    RAN,
    TWO,
    assert_generates,
    build,
    committed,
    committed_row,
    measured,
    program_table,
    stepped,
    table,
)
from tests.slow import named


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Gives the tiny model of a family."""
    return functools.cache(lambda name: zoo.load(name, tmp_path_factory.mktemp(name)))


def test_the_zoo_has_every_family():
    assert set(zoo.FAMILIES) == {*models.FAMILIES, "internvl_chat"} - {"llama"} == set(QUICK)  # sees no images
    assert {name for name, _ in (METHODS | FIELD | MORE).values()} == set(methods.names())
    assert set(QUICK.values()) | {"cmac", "opera", "vcd"} == set(METHODS)


def test_the_table_has_every_family_and_method():
    for part, (columns, names) in PARTS.items():
        header, _, *rows = committed(part).split("\n\n")[0].strip().splitlines()
        assert header == table({}, columns).splitlines()[0]
        assert [re.match(r"\| `(\w+)` \|", row)[1] for row in rows] == sorted(names)


# Their positions, masks and decoder are those of another family here, or of the methods' own tests.
ALIKE = ("idefics3", "internvl_chat", "llava", "llava_next", "llava_onevision", "qwen2_vl")


@pytest.mark.parametrize("name", named(zoo.FAMILIES, ALIKE))
def test_cmac_and_one_more(load, name):
    """One generates, and the first token of the other has finite logits."""
    assert_generates(load(name), build("cmac"))
    step = stepped(load(name), build(QUICK[name]))
    assert np.isfinite(step.main).all() and not np.isnan(step.combined).any()
    cells = dict(zip(METHODS, committed_row(name).split(" | ")[1:], strict=True))
    assert cells["cmac"] == RAN and cells[QUICK[name]].startswith(RAN)


@pytest.mark.parametrize("column", named(["opera", "vcd"], slow=["opera"]))
def test_methods_that_no_family_above_has(load, column):
    assert_generates(load("qwen2_vl"), build(column))


ROWS = [("methods", name) for name in zoo.FAMILIES]
ROWS += [(part, name) for part in ("field", "more") for name in FIELD_FAMILIES]


@pytest.mark.slow
@pytest.mark.parametrize(("part", "name"), ROWS)
def test_every_method(load, name, part):
    """What the committed table says of a family is what runs."""
    columns, _ = PARTS[part]
    row = table({name: measured(load(name), columns)}, columns).splitlines()[2]
    assert row == committed_row(name, part)


# Methods whose second branch is another one in each family: pixels, pictures, no images, words.
@pytest.mark.slow
@pytest.mark.parametrize("column", ["vcd", "sevi + cicd", "m3id", "icd"])
@pytest.mark.parametrize("name", list(zoo.FAMILIES))
def test_a_batch_equals_its_samples_alone(load, name, column):
    together, alone = stepped(load(name), build(column)), stepped(load(name), build(column), ONE)
    for logits in ("main", "contrast"):
        np.testing.assert_allclose(getattr(together, logits)[ONE], getattr(alone, logits)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", list(zoo.FAMILIES))
def test_noise_belongs_to_a_sample_and_its_rows(load, name):
    """Each row of a sample has noise of its own, the same in a batch as alone, whatever bucket it is in."""
    case = load(name)

    def noise(*rows):
        prompt = case.prompt(*rows)
        pixels = decode_loop.contrast_pixels(methods.VCD(), np.zeros_like(prompt.pixels), prompt.image_index)
        return prompt, np.asarray(pixels)

    prompt, together = noise()
    samples = np.repeat([TWO, ONE], [2, 1])[prompt.owner]
    for sample in (TWO, ONE):
        mine = together[(samples == sample) & (prompt.owner >= 0)]
        alone, own = noise(sample)
        own = own[alone.owner >= 0]
        assert len(own) == len(mine) and (len(mine) > 1 or sample == ONE)
        np.testing.assert_array_equal(mine[:, : own.shape[1]], own)
        assert len({row.tobytes() for row in own}) == len(own)
        assert own.std() > 0.5


def test_the_other_picture_stands_in_the_place_of_each(load):
    """Loose patches show it as the processor would cut it, at the size of each picture."""
    case = load("qwen2_vl")
    prompt, vision = case.prompt(), case.model.config.vision
    asked = []

    def picture(height, width):
        asked.append((height, width))
        return np.arange(3 * height * width, dtype=np.float32).reshape(3, height, width)

    pixels = case.model.config.shown(prompt.pictures, picture)
    side = vision.patch_size
    assert asked == [(4 * side, 20 * side), (8 * side, 4 * side), (4 * side, 4 * side)]
    assert pixels.shape == prompt.pixels.shape and not pixels[~prompt.geometry["valid"]].any()
    # The second picture, 8 x 4 patches: its third patch begins the second row of the first block.
    patch = pixels[1, 2].reshape(3, vision.frames, side, side)
    np.testing.assert_array_equal(patch[:, 0], picture(8 * side, 4 * side)[:, side : 2 * side, :side])
    np.testing.assert_array_equal(patch[:, 0], patch[:, 1])
    shown, received = dataclasses.replace(prompt.pictures, pixels=pixels), []

    def change(given, index):
        received.append((np.asarray(given), int(index)))
        return given

    again = case.model.config.altered(shown, prompt.picture_index, change)
    np.testing.assert_array_equal(again, pixels)
    for (given, _), size in zip(received, asked[:3], strict=True):
        np.testing.assert_array_equal(given, picture(*size))
    assert [index for _, index in received] == [0, 1, 0]
    tiles = load("internvl")
    np.testing.assert_array_equal(
        tiles.model.config.shown(tiles.prompt().pictures, picture)[3], picture(*tiles.prompt().pixels.shape[2:])
    )


@pytest.mark.parametrize("name", list(zoo.FAMILIES))
def test_the_map_of_an_image_is_made_of_its_tokens(load, name):
    case = load(name)
    pictures = case.prompt().pictures
    assert pictures.token_counts.sum() == (case.prompt().image_id > 0).sum()
    for image, count in enumerate(pictures.token_counts):
        places = case.model.config.token_map(pictures, image)
        if name == "instructblip":
            assert places is None
            continue
        if pictures.grids is not None:
            assert places.shape == tuple(pictures.grids[image]) and places.size == count
        np.testing.assert_array_equal(places.ravel(), places.min() + np.arange(places.size))
        # Whole views stand first where newlines are tokens, last where pictures are cut otherwise.
        assert places.min() == 0 or places.max() == count - 1


def test_the_number_of_programs():
    assert committed("programs") == program_table()
