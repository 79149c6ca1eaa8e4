"""MIHBench and other yes/no or one-word questions over several images."""

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import Data, get, record
from lvlm_jax.evaluation.benchmarks import mihbench
from tests.evaluation.builders import write_lines

PROTOCOLS = ["mihbench/short"]


def sample(folder):
    rows = [
        {"question_id": i, "images": [f"{i}.png"], "text": f"Is it {i}?", "label": ("yes", "no", "red")[i % 3],
         "kind": "colour" if i % 3 == 2 else "existence"}
        for i in range(9)
    ]  # fmt: skip
    return Data(folder, write_lines(folder / "q.jsonl", rows))


def rows(labels):
    return [
        {"question_id": i, "images": [f"{i}a.jpg", f"{i}b.jpg"], "question": "In both?", "label": label}
        for i, label in enumerate(labels)
    ]


@pytest.fixture
def folder(tmp_path):
    for group in mihbench.GROUPS:
        write_lines(tmp_path / "MIHBench" / f"{group}.jsonl", rows(["yes", "no"]))
    return tmp_path


def test_all_kinds(folder):
    questions = mihbench.read(Data(folder), get("mihbench"))
    assert [q.group for q in questions[::2]] == list(mihbench.GROUPS)
    assert [image.name for image in questions[0].images] == ["0a.jpg", "0b.jpg"]
    scores = mihbench.score(questions, {q.key: "Yes." for q in questions}, get("mihbench"))
    found = scores.values()
    assert found["accuracy"] == found["mean: accuracy"] == found["count: precision"] == 0.5
    assert found["identity: recall"] == found["mean: yes ratio"] == 1.0
    assert scores.units == ("0a.jpg+0b.jpg", "1a.jpg+1b.jpg")


@pytest.fixture
def published(tmp_path):
    """The folder as its authors publish it, with COCO's and CO3D's pictures beside: two rows of each kind."""
    frames = [["vase/64_43/frame1.jpg", "vase/64_43/frame5.jpg"], ["ball/20_78/frame1.jpg", "ball/20_78/frame5.jpg"]]
    for group, name in mihbench.RELEASED.items():
        images = frames if group == "identity" else [["1.jpg", "2.jpg"], ["2.jpg", "3.jpg"]]
        write_lines(tmp_path / "DAB/Questions" / name, [
            {"question_id": 1 + i, "label": label, "text": "In all 2 images?", "num_images": 2, "image_list": images[i]}
            for i, label in enumerate(("yes", "no"))
        ])  # fmt: skip
    for folder, names in (("val2014", ["1.jpg", "2.jpg", "3.jpg"]), ("CO3D", [*frames[0], *frames[1]])):
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_bytes(b"picture")
    return tmp_path


def test_the_published_folder(published):
    questions = mihbench.read(Data(published), get("mihbench"), need_images=True)
    assert [q.group for q in questions[::2]] == list(mihbench.GROUPS)
    assert questions[0].images == (published / "val2014/1.jpg", published / "val2014/2.jpg")
    assert questions[-1].images[0] == published / "CO3D/ball/20_78/frame1.jpg"


def test_one_published_file_alone(published):
    path = published / "DAB/Questions" / mihbench.RELEASED["count"]
    questions = mihbench.read(Data(published, path, groups=("count",)), get("mihbench"))
    assert [q.key for q in questions] == [("count", "1"), ("count", "2")]


def test_frames_of_one_number_are_different_images(published):
    """Four pairs of pictures, though the two of identity have the same file names."""
    questions = mihbench.read(Data(published), get("mihbench"))
    scores = mihbench.score(questions, {q.key: "yes" for q in questions}, get("mihbench"))
    assert scores.units == ("1.jpg+2.jpg", "2.jpg+3.jpg", "vase/64_43/frame1.jpg+vase/64_43/frame5.jpg",
                            "ball/20_78/frame1.jpg+ball/20_78/frame5.jpg")  # fmt: skip
    asked = list(scores.counts).index("asked")
    assert scores.table[:, asked].tolist() == [4, 4, 1, 1]
    assert record(get("mihbench"), questions, {})["images"]["count"] == 3 + 4


def test_words_and_yes_no_mixed(tmp_path):
    listed = [
        {"question_id": 1, "images": ["a.jpg"], "kind": "which", "text": "Which?", "label": "second"},
        {"question_id": 2, "images": ["a.jpg"], "kind": "which", "text": "Which?", "label": "cat"},
        {"question_id": 3, "image": "a.jpg", "kind": "there", "text": "Is it?", "label": "Yes"},
        {"question_id": 4, "image": "a.jpg", "kind": "there", "text": "Is it?", "label": "No"},
    ]
    protocol = get("mihbench/short")
    data = Data(tmp_path, write_lines(tmp_path / "mixed.jsonl", listed))
    questions = mihbench.read(data, protocol)
    said = ["The first", "A cat.", "yes", "both yes and no"]
    scores = mihbench.score(questions, {q.key: text for q, text in zip(questions, said, strict=True)}, protocol)
    figures = ("accuracy", "which: accuracy", "there: unparsed")
    assert [scores.values()[name] for name in figures] == [0.5] * 3 and scores.notes["unparsed"] == 1


def test_missing_and_bad(folder):
    (folder / "MIHBench" / "count.jsonl").unlink()
    with pytest.raises(LVLMError, match="MIHBench count is missing: no file count.jsonl or"):
        mihbench.read(Data(folder), get("mihbench"))
    with pytest.raises(LVLMError, match="no kind 'smell'"):
        mihbench.read(Data(folder, groups=("smell",)), get("mihbench"))
    for listed, message in ((2, "id q 0 occurs twice"), (1, "image '0a.jpg' of mihbench/strict is missing")):
        path = write_lines(folder / "q.jsonl", rows(["yes"]) * listed)
        with pytest.raises(LVLMError, match=message):
            mihbench.read(Data(folder, path), get("mihbench"), need_images=True)
