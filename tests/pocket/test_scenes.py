"""Scenes: reproducible, drawn where their annotations say, typical of their place."""

import collections

import numpy as np
import pytest
from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket import catalogue, scenes, splits
from lvlm_jax.pocket.scenes import SIZE, patch_labels, render, scene_at


@pytest.fixture(scope="module")
def many():
    return [scene_at("train", index) for index in range(300)]


def drawn(scene, objects):
    """The picture with these objects alone."""
    place = scene.kind, False, scene.horizon, scene.upper, scene.lower, scene.texture_seed
    return render(scenes.Scene(*place, objects, scene.owner)).astype(int)


def test_a_scene_is_the_same_every_time_and_others_differ():
    first, again = scene_at("val", 7), scene_at("val", 7)
    assert first == again
    picture = render(first)
    assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, render(again))
    np.testing.assert_array_equal(first.owner, again.owner)
    others = [scene_at("val", 8), scene_at("test", 7), scene_at("val", 7, seed=1)]
    assert all(other != first for other in others)
    with pytest.raises(LVLMError, match="'dev'.*train, val, test"):
        scene_at("dev", 0)


def test_one_to_seven_objects_with_many_in_between(many):
    sizes = [len(scene.objects) for scene in many]
    assert min(sizes) == 1 and 6 <= max(sizes) <= 7 and 3 < np.mean(sizes) < 4.5


def test_boxes_hold_exactly_the_pixels_that_the_object_changed(many):
    """The image is drawn without the object; pixels that differ, outside other objects, belong to it."""
    for scene in many[:60]:
        picture = render(scene).astype(int)
        for i, placed in enumerate(scene.objects):
            mask = scene.owner == i + 1
            rows, columns = np.nonzero(mask)
            left, top, width, height = placed.box
            assert (columns.min(), rows.min()) == (left, top)
            assert (columns.max() - left + 1, rows.max() - top + 1) == (width, height)
            assert mask.sum() == placed.area and placed.visible >= scenes.MIN_VISIBLE - 0.001
            without = drawn(scene, scene.objects[:i] + scene.objects[i + 1 :])
            changed = np.abs(picture - without).max(axis=2) > 12
            assert (changed & mask).sum() > 0.5 * mask.sum(), placed
            near = np.zeros_like(mask)  # soft edges reach a pixel or two further
            near[max(0, top - 3) : top + height + 3, max(0, left - 3) : left + width + 3] = True
            overlapped = scene.owner > i + 1
            assert not (changed & ~near & ~overlapped).any(), placed


def test_background_shows_where_no_object_is(many):
    for scene in many[:20]:
        difference, solid = np.abs(render(scene).astype(int) - drawn(scene, ())).max(axis=2), scene.owner > 0
        assert difference[~solid].mean() < 12 < difference[solid].mean()


def test_patch_labels_are_the_category_that_covers_most(many):
    for scene in many[:40]:
        labels = patch_labels(scene)
        assert labels.shape == (64,) and labels.dtype == np.int32
        for label, patch in zip(labels, scene.owner.reshape(8, 12, 8, 12).swapaxes(1, 2).reshape(64, 144), strict=True):
            covered = collections.Counter(scene.objects[owner - 1].category for owner in patch if owner)
            most = max(covered.values(), default=0)
            largest = {catalogue.LABELS[name] for name, count in covered.items() if count == most}
            assert label == 0 if most <= 144 // 5 else label in largest


def test_places_have_their_own_objects_and_test_goes_against_type_at_times():
    own = dict(zip(catalogue.SCENE_NAMES, catalogue.SCENE_TYPES, strict=True))

    def typical_share(split):
        chosen = [scene_at(split, index) for index in range(500)]
        typical = [placed.category in own[scene.kind].objects for scene in chosen for placed in scene.objects]
        return np.mean(typical), np.mean([scene.against_type for scene in chosen])

    train, train_against = typical_share("train")
    test, test_against = typical_share("test")
    assert train_against == 0 and 0.1 < test_against < 0.2
    assert 0.7 < train < 0.9 and test < train - 0.05


def test_every_category_and_drawing_occurs():
    seen = {placed.sprite for index in range(4000) for placed in scene_at("train", index).objects}
    assert seen == set(range(len(catalogue.sprites())))
    assert {sprite.category for sprite in catalogue.sprites()} == set(catalogue.CATEGORIES)
    named = {name for kind in catalogue.SCENE_TYPES for name in kind.objects}
    named |= set(catalogue.COMPANIONS) | {name for name, _ in catalogue.COMPANIONS.values()}
    assert named <= set(catalogue.CATEGORIES)
    assert {sprite.colour for sprite in catalogue.sprites()} == {None, *catalogue.COLOURS}


def test_the_shipped_sample_is_its_scene():
    with Image.open(catalogue.HERE / "sample.png") as picture:
        shipped = np.asarray(picture).astype(int)
    difference = np.abs(shipped - render(splits.demo_scene()))
    assert difference.max() <= 8, "another Pillow may round differently, no more"
