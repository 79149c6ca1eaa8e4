"""Multiple choice: the formats and column names that circulate, interleaving, answers, and rows that are wrong."""

import base64
import csv
import importlib.util
import json

from lvlm_jax.evaluation import Data, get, tables
from tests.evaluation.builders import read, scored, write_lines
from tests.refusals import refused

PROTOCOLS = ["choices/any"]
PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 40
JPEG = b"\xff\xd8\xff\xe0" + b"1" * 400


def row(number, **more):
    """A question with two options; a column given as None is left out."""
    whole = {"id": number, "question": "?", "options": ["x", "y"], "answer": "A"} | more
    return {name: value for name, value in whole.items() if value is not None}


def sample(folder):
    rows = [row(i, answer="AB"[i % 2], category=("one", "two")[i // 4], image=f"{i % 3}.jpg") for i in range(8)]
    return Data(folder, write_lines(folder / "q.jsonl", rows))


def tsv(path, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def read_lines(tmp_path, *rows, **more):
    return read("choices/any", tmp_path, question_file=write_lines(tmp_path / "q.jsonl", rows), **more)


def names(question):
    return [image.name for image in question.images]


def test_vlmevalkit_table(tmp_path):
    """Several pictures in one cell, quoted line ends, empty options, and a reference to another row's picture."""
    png, jpeg = (base64.b64encode(picture).decode() for picture in (PNG, JPEG))
    common = {"A": "dog", "B": "cat", "answer": "A", "category": "objects"}
    tsv(
        tmp_path / "BLINK.tsv",
        {"index": "0", "image": jpeg, "question": 'What "is"\nit?', **common, "answer": "B", "hint": "an animal"},
        {"index": "1", "image": json.dumps([png, jpeg]), "question": "Alike?", **common, "C": "perhaps"},
        {"index": "2", "image": "0", "question": "Again?", **common},
    )
    first, second, third = read("choices/blink", tmp_path)
    assert first.text == 'Hint: an animal\nWhat "is"\nit?\nA. dog\nB. cat'
    assert (first.label, first.group, first.extra["options"]) == ("B", "objects", ("A", "B"))
    assert first.images == third.images == (JPEG,) and second.images == (PNG, JPEG)
    asked = get("choices/any").prompt(third)
    assert asked.endswith("B. cat\nAnswer with the option's letter from the given choices directly.")


def test_columns_of_hugging_face_sets(tmp_path):
    pair, sharper = {"image1": "a.png", "image2": "b.png"}, {"option0": "first", "option1": "second"}
    found = read_lines(
        tmp_path,
        {"idx": "v1", "question": "?", "choices": ["x", "y"], "answer": "(B)", "sub_task": "Depth",
         "image_1": "a.png", "image_2": "b.png", "image_3": None},
        {"question_id": 2, "question": "Both are dogs.", "answer": "False", "left_image": "l.png",
         "right_image": "r.png"},
        {"id": 3, "question": "Sharper?", **sharper, "correct_choice": "0", **pair},
        row(4, options={"A": "cat", "B": "dog"}, answer="Dog", images=["a.png"]),
        # Q-Bench2 writes N/A into the columns of options that a question does not have.
        {"id": 5, "question": "Sharper?", **sharper, "option2": "N/A", "option3": "N/A", "correct_choice": "B", **pair},
        image_folder=tmp_path,
    )  # fmt: skip
    assert [q.label for q in found] == ["B", "B", "A", "B", "B"]
    pairs = [["a.png", "b.png"], ["l.png", "r.png"], ["a.png", "b.png"], ["a.png"], ["a.png", "b.png"]]
    assert list(map(names, found)) == pairs
    assert found[1].text == "Both are dogs.\nA. True\nB. False" and found[0].group == "Depth"
    assert found[4].text == "Sharper?\nA. first\nB. second"


def test_interleaved_placeholders(tmp_path):
    text, images = tables.interleave("See <image 2> and <img1>: <image>", ("a", "b", "c", "d"), "row 1")
    assert text == "<image>See <image> and <image>: <image>" and images == ("d", "b", "a", "c")
    assert tables.interleave("none", ("a", "b"), "row 1") == ("none", ("a", "b"))
    message = "row 1 has the placeholder '<image>' but 1 images"
    refused(message, tables.interleave, "<image> <image>", ("a",), "row 1")
    among = row(1, question="Which fits <image>?", options=["<image>"] * 2, image_list=["q", "a", "b"])
    (question,) = read_lines(tmp_path, among)
    assert question.text == "Which fits <image>?\nA. <image>\nB. <image>" and names(question) == ["q", "a", "b"]


def test_figures_by_hand(tmp_path):
    kinds = ["near", "near", "far", "far"]
    rows = (row(i, answer="B", category=kind, image=f"{i}.png") for i, kind in enumerate(kinds))
    found, scores = scored("choices/any", read_lines(tmp_path, *rows), ["B", "A", "y", "(b)"])
    expected = {"accuracy": 0.5, "unparsed": 0.25, "near: accuracy": 0.5, "near: unparsed": 0.0}
    assert found == expected | {"far: accuracy": 0.5, "far: unparsed": 0.5}
    assert scores.notes == {"parser": "letter", "unparsed": 1}
    # Pictures of one name in different folders are different images.
    questions = read_lines(tmp_path, *(row(i, images=[f"{i}/a.png", f"{i}/b.png"]) for i in range(2)))
    assert questions[1].images == (tmp_path / "1/a.png", tmp_path / "1/b.png")
    assert scored("choices/any", questions, "A")[1].units == ("0/a.png+0/b.png", "1/a.png+1/b.png")


def test_bad_rows_and_files(tmp_path):
    for more, message in (
        ({"answer": None}, "has no answer"),
        ({"answer": "C"}, "answer 'C' is not one of the options A, B"),
        ({"options": None}, "has no options"),
        ({"options": ["x"]}, "has no options"),
        ({"question": None}, "has no question"),
        ({"image": [{}]}, "expected a file name or an"),
        ({"image": "?" * 400}, "nor base64"),
        ({"options": "[x"}, "begins like a list but is not a list"),
    ):
        refused(message, read_lines, tmp_path, row(1, **more))
    refused("occurs twice", read_lines, tmp_path, row(1), row(1))
    missing = r"no muirbench\*\.tsv, muirbench\*\.jsonl or folder muirbench\*/"
    refused(missing, read, "choices/muirbench", tmp_path)
    refused("a.png' of question 1 is missing", read_lines, tmp_path, row(1, image="a.png"), need_images=True)
    for name, content, message in (
        ("q.xlsx", "x", "another ending than .tsv, .parquet"),
        ("q.tsv", "index\tquestion\n1\n", "row 1 .* does not have the heading's cells"),
    ):
        (tmp_path / name).write_text(content)
        refused(message, read, "choices/any", tmp_path, question_file=tmp_path / name)
    for name in ("MUIRBench.tsv", "muirbench_small.tsv"):
        tsv(tmp_path / name, {"index": 1, "question": "?", "A": "x", "B": "y", "answer": "A"})
    refused("2 files fit choices/muirbench .* --question-file", read, "choices/muirbench", tmp_path)


def test_parquet_folder(tmp_path):
    folder = tmp_path / "BLINK" / "Depth"
    folder.mkdir(parents=True)
    if importlib.util.find_spec("pyarrow") is None:
        (folder / "val.parquet").write_bytes(b"PAR1")
        refused("needs the package pyarrow; install it", read, "choices/blink", tmp_path)
        return
    import pyarrow
    from pyarrow import parquet

    common = {"question": "?", "choices": ["x", "y"], "answer": "(A)", "image_1": {"bytes": PNG, "path": None}}
    rows = [{"idx": str(i)} | common for i in range(4)]
    for i in range(2):
        parquet.write_table(pyarrow.Table.from_pylist(rows[2 * i : 2 * i + 2]), folder / f"val-0000{i}.parquet")
    questions = read("choices/blink", tmp_path)
    assert [q.id for q in questions] == ["0", "1", "2", "3"] and questions[0].images == (PNG,)
