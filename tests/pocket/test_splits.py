"""Splits on disk: COCO, POPE and MME as real data comes, and POPE's rule recomputed from the files alone."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket.catalogue import CATEGORIES
from lvlm_jax.pocket.splits import file_name, write_split
from tests.pocket.words import categories_in

IMAGES = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    write_split(folder, "test", IMAGES)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def present(folder):
    """File name -> categories, from the COCO file."""
    coco = json.loads((folder / "annotations/instances_test.json").read_text())
    names = {category["id"]: category["name"] for category in coco["categories"]}
    found = {image["id"]: (image["file_name"], []) for image in coco["images"]}
    for annotation in coco["annotations"]:
        name = names[annotation["category_id"]]
        if name not in found[annotation["image_id"]][1]:
            found[annotation["image_id"]][1].append(name)
    return dict(found.values())


def test_instances(folder):
    coco = json.loads((folder / "annotations/instances_test.json").read_text())
    assert len(coco["images"]) == IMAGES == len(list((folder / "images").iterdir()))
    assert {"id": 18, "name": "dog"} in coco["categories"] and len(coco["categories"]) == len(CATEGORIES)
    assert len({annotation["id"] for annotation in coco["annotations"]}) == len(coco["annotations"])
    ids = {image["id"] for image in coco["images"]}
    for image in coco["images"]:
        with Image.open(folder / "images" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (96, 96) and picture.mode == "RGB"
    for annotation in coco["annotations"]:
        assert annotation["image_id"] in ids
        runs = annotation["segmentation"]["counts"]
        assert sum(runs) == 96 * 96 and sum(runs[1::2]) == annotation["area"]
        mask = np.repeat(np.arange(len(runs)) % 2, runs).reshape(96, 96).T  # column by column
        rows, columns = np.nonzero(mask)
        left, top, width, height = annotation["bbox"]
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width - 1, top + height - 1) == (columns.max(), rows.max())


def test_captions(folder, present):
    coco = json.loads((folder / "annotations/captions_test.json").read_text())
    files = {image["id"]: image["file_name"] for image in coco["images"]}
    per_image = Counter(annotation["image_id"] for annotation in coco["annotations"])
    assert set(per_image.values()) == {5} and set(per_image) == set(files)
    for annotation in coco["annotations"]:
        assert set(categories_in(annotation["caption"])) <= set(present[files[annotation["image_id"]]])


def test_train_captions_are_noisy(tmp_path):
    write_split(tmp_path / "train", "train", 100)
    captions = json.loads((tmp_path / "train/annotations/captions_train.json").read_text())
    instances = json.loads((tmp_path / "train/annotations/instances_train.json").read_text())
    names = {category["id"]: category["name"] for category in instances["categories"]}
    there = {}
    for annotation in instances["annotations"]:
        there.setdefault(annotation["image_id"], set()).add(names[annotation["category_id"]])
    wrong = [not set(categories_in(a["caption"])) <= there[a["image_id"]] for a in captions["annotations"]]
    assert 0.2 < np.mean(wrong) < 0.3


@pytest.mark.parametrize("strategy", ["random", "popular", "adversarial"])
def test_pope_is_balanced_and_true(folder, present, strategy):
    rows = lines(folder / f"pope/pope_{strategy}.json")
    assert [row["question_id"] for row in rows] == list(range(1, len(rows) + 1))
    labels = Counter((row["image"], row["label"]) for row in rows)
    assert set(labels.values()) == {3}
    assert {image for image, _ in labels} == {image for image, names in present.items() if len(names) >= 3}
    for row in rows:
        (name,) = categories_in(row["text"])
        article = "an" if name[0] in "aeiou" else "a"
        assert row["text"] == f"Is there {article} {name} in the image?"
        assert row["label"] == ("yes" if name in present[row["image"]] else "no")
    assert len({(row["image"], row["text"]) for row in rows}) == len(rows)


def _negatives(folder, strategy):
    """(image, category asked just before, absent category) in file order."""
    rows = lines(folder / f"pope/pope_{strategy}.json")
    for positive, negative in zip(rows[::2], rows[1::2], strict=True):
        assert (positive["label"], negative["label"]) == ("yes", "no")
        yield positive["image"], categories_in(positive["text"])[0], categories_in(negative["text"])[0]


def test_popular_negatives_are_the_most_frequent_absent_objects(folder, present):
    frequency = Counter(name for names in present.values() for name in names)
    asked = {}
    for image, _, absent in _negatives(folder, "popular"):
        left = [name for name in CATEGORIES if name not in present[image] and name not in asked.get(image, [])]
        assert frequency[absent] == max(frequency[name] for name in left)
        asked.setdefault(image, []).append(absent)


def test_adversarial_negatives_co_occur_most_with_the_object_asked_before(folder, present):
    together = Counter((a, b) for names in present.values() for a in names for b in names if a != b)
    asked = {}
    for image, positive, absent in _negatives(folder, "adversarial"):
        left = [name for name in CATEGORIES if name not in present[image] and name not in asked.get(image, [])]
        assert together[positive, absent] == max(together[positive, name] for name in left)
        asked.setdefault(image, []).append(absent)


def test_random_negatives_spread(folder):
    assert len({absent for _, _, absent in _negatives(folder, "random")}) > 40


def test_further_questions_point_at_files(folder):
    kinds = {}
    for path in (folder / "questions").iterdir():
        rows = lines(path)
        kinds[path.stem] = len(rows)
        for row in rows:
            files = row["images"] if "images" in row else [row["image"]]
            assert len(set(files)) == len(files) and all((folder / "images" / name).is_file() for name in files)
            assert row["label"] and row["answer"] and row["text"]
    assert set(kinds) == {"choice", "counting", "position", "color", "place", "multi_image"}
    assert min(kinds.values()) > 20


@pytest.mark.parametrize("task", ["existence", "count", "position", "color"])
def test_mme_has_a_yes_and_a_no_for_each_picture(folder, task):
    texts = sorted((folder / "MME_Benchmark_release_version" / task).glob("*.txt"))
    assert len(texts) > 20
    for path in texts:
        assert path.with_suffix(".png").read_bytes() == (folder / "images" / path.with_suffix(".png").name).read_bytes()
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        assert [answer for _, answer in rows] == ["Yes", "No"]
        assert all(question.endswith("? Please answer yes or no.") for question, _ in rows)


def test_the_same_arguments_write_the_same_files(folder, tmp_path):
    write_split(tmp_path / "again", "test", IMAGES)
    first = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = {p.relative_to(tmp_path / "again"): p.read_bytes() for p in (tmp_path / "again").rglob("*") if p.is_file()}
    assert first == again


def test_of_several_seeds_one_image_of_each_in_turn(folder, tmp_path):
    write_split(tmp_path / "two", "test", 12, (0, 1))
    write_split(tmp_path / "other", "test", 6, 1)
    for place in range(6):
        ours = [(tmp_path / "two" / "images" / file_name("test", 2 * place + seed)).read_bytes() for seed in (0, 1)]
        theirs = [(one / "images" / file_name("test", place)).read_bytes() for one in (folder, tmp_path / "other")]
        assert ours == theirs


@pytest.mark.parametrize(
    ("split", "images", "message"),
    [("dev", 3, "'dev' is unknown"), ("test", 0, "0 images"), ("val", 20, "not an empty folder")],
)
def test_bad_arguments(folder, split, images, message):
    with pytest.raises(LVLMError, match=message):
        write_split(folder, split, images)


def test_too_few_images_for_pope_write_nothing(tmp_path):
    with pytest.raises(LVLMError, match="none of the 1 images shows 3 categories"):
        write_split(tmp_path / "few", "test", 1, seed=1)
    assert not (tmp_path / "few").exists()
