"""Splits on disk: COCO, POPE and MME as real data comes, and POPE's rule recomputed from the files alone."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket.catalogue import CATEGORIES
from lvlm_jax.pocket.splits import file_name, write_split
from tests.killing import contents
from tests.pocket.words import categories_in

IMAGES = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    write_split(folder, "test", IMAGES)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def categories_of(folder, split):
    """File name -> categories, from the COCO file; and image id -> file name."""
    coco = json.loads((folder / f"annotations/instances_{split}.json").read_text())
    names = {category["id"]: category["name"] for category in coco["categories"]}
    files = {image["id"]: image["file_name"] for image in coco["images"]}
    found = {name: [] for name in files.values()}
    for annotation in coco["annotations"]:
        here, name = found[files[annotation["image_id"]]], names[annotation["category_id"]]
        here += [] if name in here else [name]
    return found, files


@pytest.fixture(scope="module")
def present(folder):
    return categories_of(folder, "test")[0]


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


def wrong_captions(folder, split):
    """Whether a caption names what is not there, for five captions of each image."""
    coco = json.loads((folder / f"annotations/captions_{split}.json").read_text())
    present, files = categories_of(folder, split)
    assert Counter(annotation["image_id"] for annotation in coco["annotations"]) == dict.fromkeys(files, 5)
    return [
        not set(categories_in(one["caption"])) <= set(present[files[one["image_id"]]]) for one in coco["annotations"]
    ]


def test_captions_are_noisy_in_train_alone(folder, tmp_path):
    assert not any(wrong_captions(folder, "test"))
    write_split(tmp_path / "train", "train", 100)
    assert 0.2 < np.mean(wrong_captions(tmp_path / "train", "train")) < 0.3


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


@pytest.mark.parametrize("strategy", ["random", "popular", "adversarial"])
def test_negatives_follow_their_strategy(folder, present, strategy):
    """Absent objects are the most frequent ones, those that co-occur most with the object before, or random ones."""
    frequency = Counter(name for names in present.values() for name in names)
    together = Counter((a, b) for names in present.values() for a in names for b in names if a != b)
    rows, asked = lines(folder / f"pope/pope_{strategy}.json"), {}
    for yes, no in zip(rows[::2], rows[1::2], strict=True):
        assert (yes["label"], no["label"]) == ("yes", "no")
        (before,), (absent,) = categories_in(yes["text"]), categories_in(no["text"])
        here = asked.setdefault(no["image"], [])
        left = [name for name in CATEGORIES if name not in present[no["image"]] and name not in here]
        if strategy == "popular":
            assert frequency[absent] == max(frequency[name] for name in left)
        elif strategy == "adversarial":
            assert together[before, absent] == max(together[before, name] for name in left)
        here.append(absent)
    assert strategy != "random" or len({name for names in asked.values() for name in names}) > 40


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
        picture = path.with_suffix(".png")
        assert picture.read_bytes() == (folder / "images" / picture.name).read_bytes()
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        assert [answer for _, answer in rows] == ["Yes", "No"]
        assert all(question.endswith("? Please answer yes or no.") for question, _ in rows)


def test_the_same_arguments_write_the_same_files(folder, tmp_path):
    write_split(tmp_path / "again", "test", IMAGES)
    assert contents(tmp_path / "again") == contents(folder)


def test_of_several_seeds_one_image_of_each_in_turn(folder, tmp_path):
    write_split(tmp_path / "two", "test", 12, (0, 1))
    write_split(tmp_path / "other", "test", 6, 1)
    for place in range(6):
        ours = [(tmp_path / "two" / "images" / file_name("test", 2 * place + seed)).read_bytes() for seed in (0, 1)]
        theirs = [(one / "images" / file_name("test", place)).read_bytes() for one in (folder, tmp_path / "other")]
        assert ours == theirs


def test_bad_arguments(folder, tmp_path):
    for split, images, message in (
        ("dev", 3, "'dev' is unknown"), ("test", 0, "0 images"), ("val", 20, "not an empty folder"),
    ):  # fmt: skip
        with pytest.raises(LVLMError, match=message):
            write_split(folder, split, images)
    with pytest.raises(LVLMError, match="none of the 1 images shows 3 categories"):
        write_split(tmp_path / "few", "test", 1, seed=1)
    assert not (tmp_path / "few").exists()
