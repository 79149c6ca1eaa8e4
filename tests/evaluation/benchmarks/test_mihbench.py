"""MIHBench and other yes/no or one-word questions over several images."""

import pytest

from lvlm_jax.evaluation import Data, get, record
from lvlm_jax.evaluation.benchmarks import mihbench
from tests.evaluation.builders import read, scored, write_lines, write_pictures
from tests.refusals import refused

PROTOCOLS = ["mihbench/short"]


def sample(folder):
    rows = [
        {"question_id": i, "images": [f"{i}.png"], "text": f"Is it {i}?", "label": ("yes", "no", "red")[i % 3],
         "kind": "colour" if i % 3 == 2 else "existence"}
        for i in range(9)
    ]  # fmt: skip
    return Data(folder, write_lines(folder / "q.jsonl", rows))


def rows(labels):
    pairs = enumerate(labels)
    return [{"question_id": i, "images": [f"{i}a.jpg", f"{i}b.jpg"], "question": "?", "label": one} for i, one in pairs]


def test_all_kinds(tmp_path):
    for group in mihbench.GROUPS:
        write_lines(tmp_path / "MIHBench" / f"{group}.jsonl", rows(["yes", "no"]))
    questions = read("mihbench", tmp_path)
    assert [q.group for q in questions[::2]] == list(mihbench.GROUPS)
    assert [image.name for image in questions[0].images] == ["0a.jpg", "0b.jpg"]
    found, scores = scored("mihbench", questions, "Yes.")
    assert found["accuracy"] == found["mean: accuracy"] == found["count: precision"] == 0.5
    assert found["identity: recall"] == found["mean: yes ratio"] == 1.0
    assert scores.units == ("0a.jpg+0b.jpg", "1a.jpg+1b.jpg")
    (tmp_path / "MIHBench" / "count.jsonl").unlink()
    refused("MIHBench count is missing: no file count.jsonl or", read, "mihbench", tmp_path)
    refused("no kind 'smell'", read, "mihbench", tmp_path, groups=("smell",))
    for listed, message in ((2, "id q 0 occurs twice"), (1, "image '0a.jpg' of mihbench/strict is missing")):
        path = write_lines(tmp_path / "q.jsonl", rows(["yes"]) * listed)
        refused(message, read, "mihbench", tmp_path, question_file=path, need_images=True)


@pytest.fixture
def published(tmp_path):
    """The folder as its authors publish it, with COCO's and CO3D's pictures beside: two rows of each kind."""
    frames = [[f"{name}/frame{number}.jpg" for number in (1, 5)] for name in ("vase/64_43", "ball/20_78")]
    for group, name in mihbench.RELEASED.items():
        images = frames if group == "identity" else [["1.jpg", "2.jpg"], ["2.jpg", "3.jpg"]]
        write_lines(tmp_path / "DAB/Questions" / name, [
            {"question_id": 1 + i, "label": label, "text": "In all 2 images?", "num_images": 2, "image_list": images[i]}
            for i, label in enumerate(("yes", "no"))
        ])  # fmt: skip
    write_pictures(tmp_path / "val2014", "1.jpg", "2.jpg", "3.jpg")
    write_pictures(tmp_path / "CO3D", *frames[0], *frames[1])
    return tmp_path


def test_the_published_folder(published):
    questions = read("mihbench", published, need_images=True)
    assert [q.group for q in questions[::2]] == list(mihbench.GROUPS)
    assert questions[0].images == (published / "val2014/1.jpg", published / "val2014/2.jpg")
    assert questions[-1].images[0] == published / "CO3D/ball/20_78/frame1.jpg"
    # Four pairs of pictures, though the two of identity have the same file names.
    scores = scored("mihbench", questions, "yes")[1]
    frames = [f"{name}/frame1.jpg+{name}/frame5.jpg" for name in ("vase/64_43", "ball/20_78")]
    assert scores.units == ("1.jpg+2.jpg", "2.jpg+3.jpg", *frames)
    assert scores.table[:, list(scores.counts).index("asked")].tolist() == [4, 4, 1, 1]
    assert record(get("mihbench"), questions, {})["images"]["count"] == 3 + 4
    path = published / "DAB/Questions" / mihbench.RELEASED["count"]  # one file alone
    alone = read("mihbench", published, question_file=path, groups=("count",))
    assert [q.key for q in alone] == [("count", "1"), ("count", "2")]


def test_words_and_yes_no_mixed(tmp_path):
    which, there = {"kind": "which", "text": "Which?"}, {"kind": "there", "text": "Is it?"}
    listed = [
        {"question_id": 1, "images": ["a.jpg"], **which, "label": "second"},
        {"question_id": 2, "images": ["a.jpg"], **which, "label": "cat"},
        {"question_id": 3, "image": "a.jpg", **there, "label": "Yes"},
        {"question_id": 4, "image": "a.jpg", **there, "label": "No"},
    ]
    questions = read("mihbench/short", tmp_path, question_file=write_lines(tmp_path / "mixed.jsonl", listed))
    found, scores = scored("mihbench/short", questions, ["The first", "A cat.", "yes", "both yes and no"])
    figures = ("accuracy", "which: accuracy", "there: unparsed")
    assert [found[name] for name in figures] == [0.5] * 3 and scores.notes["unparsed"] == 1
