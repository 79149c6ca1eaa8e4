"""Answer files: reading and writing in the formats of other programs, and matching to questions without guessing."""

import json

import pytest

from lvlm_jax.evaluation import BENCHMARKS, answers, get
from lvlm_jax.evaluation.benchmarks import pope
from tests.evaluation import builders
from tests.evaluation.builders import (
    amber_folder,
    coco_folder,
    mme_folder,
    pope_answers,
    pope_folder,
    write_json,
    write_lines,
)
from tests.refusals import refused


@pytest.fixture
def questions(tmp_path):
    return builders.read("pope", pope_folder(tmp_path / "data", dict.fromkeys(pope.SPLITS, "yn")))


def read(*paths, protocol="pope"):
    settings = get(protocol)
    return answers.read(list(paths), BENCHMARKS[settings.benchmark].answers, settings.groups)


def write(path, questions, said, protocol, model_id=""):
    settings = get(protocol)
    return BENCHMARKS[settings.benchmark].answers.write(path, questions, said, settings, model_id)


def match(questions, way, path, rows, **more):
    """Matches the rows of a file, given as answers of the group `way`."""
    return answers.match(questions, read((way, write_lines(path / "a.jsonl", rows))), **more)


def of(group, questions):
    return [question for question in questions if question.group == group]


def test_files_and_rows_that_name_their_split(tmp_path, questions):
    files = []
    for group in pope.SPLITS:
        path = tmp_path / "answers" / f"llava15_coco_pope_{group}_answers.jsonl"
        files.append((group, pope_answers(path, [group, "no"])))
    found = answers.match(questions, read(*files))
    assert found["popular", "1"] == "popular" and len(found) == 6
    folder = (None, tmp_path / "answers")
    assert answers.match(questions, read(folder)) == found
    pope_answers(tmp_path / "answers" / "random-2.jsonl", ["yes", "no"])
    refused("both look like answers of random", read, folder)
    row = {"question_id": 1, "text": "yes"}
    for where in ({"category": "popular"}, {"metadata": {"group": "popular"}}, {"group": "popular"}):
        assert match(questions, None, tmp_path, [row | where], partial=True) == {("popular", "1"): "yes"}
    shared = "id 1 occurs in random, popular, adversarial; choose one with --group"
    refused(shared, match, questions, None, tmp_path, [row, row | {"question_id": 2}])


def test_image_and_prompt_tell_questions_of_one_id_apart(tmp_path):
    folder = pope_folder(tmp_path, {"random": "y", "popular": "y", "adversarial": "y"})
    other = builders.pope_row(1, "other.jpg", "no", "Is there a cat?")
    write_lines(folder / "coco/coco_pope_popular.json", [other])
    questions = builders.read("pope", folder, groups=("random", "popular"))
    rows = [
        {"question_id": 1, "text": "no", "prompt": "Is there a cat?\nAnswer.", "image": "val2014/other.jpg"},
        {"question_id": 1, "text": "yes", "image": "COCO_val2014_000000000000.jpg"},
    ]
    assert match(questions, None, tmp_path, rows) == {("popular", "1"): "no", ("random", "1"): "yes"}


def asking(number, kind, **more):
    """A row that answers question `number` of a split whose questions are all about its own kind of thing."""
    return {"question_id": number, "prompt": f"Is there a {kind} one?\nAnswer.", "text": f"{kind} {number}"} | more


@pytest.fixture
def apart(tmp_path):
    """Questions 1 and 2 of each split, the second about an image of the split alone."""
    for group in pope.SPLITS:
        images = ("all.jpg", f"{group}.jpg")
        rows = [builders.pope_row(i, image, "no", f"Is there a {group} one?") for i, image in enumerate(images, 1)]
        write_lines(tmp_path / f"coco_pope_{group}.json", rows)
    return builders.read("pope", tmp_path)


def test_answers_to_another_split_are_refused(tmp_path, apart):
    random = of("random", apart)
    for row, message in (
        (asking(1, "popular"), "question 1 of random is 'Is there a random one[?]' about all.jpg, and this answers "
         "'Is there a popular one[?] Answer.'; is it the file of another split"),
        (asking(2, "random", image="popular.jpg"), "question 2 of random is .*this answers .*popular.jpg"),
        ({"question_id": 2, "text": "no", "image": "popular.jpg"}, "and this answers 'popular.jpg'"),
        (asking(1, "random", metadata={"group": "popular"}), "says that it answers popular, and is given as"),
    ):  # fmt: skip
        refused(f"line 1 of answer file .*{message}", match, random, "random", tmp_path, [row], partial=True)
    others = "line 1 .* are to popular; the questions are of random"
    refused(others, match, random, None, tmp_path, [asking(1, "popular", group="popular")], known=pope.SPLITS)
    # Prompts may have words around the question.
    first = asking(1, "random", prompt="<image>\nIs there a  Random one? One word.")
    found = match(random, "random", tmp_path, [first, asking(2, "random", image="x/random.png")])
    assert list(found.values()) == ["random 1", "random 2"]


def test_splits_in_one_file_by_blocks_of_ids(tmp_path, apart):
    """As LLaVA numbers them: the adversarial split from 1, random from 10000001, popular from 20000001."""
    starts = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
    rows = [asking(i, group) | {"question_id": start + i} for group, start in starts.items() for i in (1, 2)]
    found = match(apart, None, tmp_path, rows, known=pope.SPLITS)
    assert found == {(group, str(i)): f"{group} {i}" for group in pope.SPLITS for i in (1, 2)}
    for way in (None, "popular"):  # the one asked is picked out
        found = match(of("popular", apart), way, tmp_path, rows, known=pope.SPLITS)
        assert found == {("popular", "1"): "popular 1", ("popular", "2"): "popular 2"}
    beyond = "id 30000001 is beyond the blocks of adversarial, random, popular"
    refused(beyond, match, apart, None, tmp_path, [asking(30_000_001, "popular")])


def test_missing_doubled_and_foreign_answers(tmp_path, questions):
    for ids, message in (
        ([1], "1 of 2 questions have no answer, first 2 of random; complete the file"),
        ([1, 1], "line 2 of answer file .* 1 has two answers"),
        ([77], "77 is none of the 2 questions; is it the right file"),
        ([""], "is none of the 2 questions"),  # an empty id is an id
    ):
        rows = [{"question_id": number, "text": "a"} for number in ids]
        refused(message, match, of("random", questions), "random", tmp_path, rows)


def test_popes_own_format_goes_by_order(tmp_path, questions):
    texts = [question.text for question in of("random", questions)]
    rows = [{"question": texts[0].lower(), "answer": "yes"}, {"question": texts[1], "answer": "No, none."}]
    found = match(questions, "random", tmp_path, rows, partial=True)
    assert found == {("random", "1"): "yes", ("random", "2"): "No, none."}
    for way, listed, message in (
        (None, rows, "line 1 of .* occurs in random, popular, adversarial; choose one"),
        ("random", [rows[0], {"question": "Is there a whale?", "answer": "no"}],
         "line 2 of .*: question 'Is there a whale[?]' is none of the 6 questions"),
        ("random", [{"question": "Is there?"}], "line 1 of .* has no answer"),
    ):  # fmt: skip
        refused(message, match, questions, way, tmp_path, listed)


def test_a_question_is_not_taken_for_its_answer(tmp_path, questions):
    """A question file to which somebody added the answers has the question in the column that answers have here."""
    row = {"question_id": 1, "text": questions[0].text}
    message = "line 1 of .*: the answer is the question itself; is it in answer"
    filled = [row | {"label": "yes", "answer": "no"}]
    refused(message, match, questions, "random", tmp_path, filled, partial=True)
    # A model may repeat the question.
    assert match(questions, "random", tmp_path, [row], partial=True)["random", "1"] == questions[0].text


def test_chair_goes_by_the_image(tmp_path):
    """A row is matched by its number, however written, whatever other ids and texts it has."""
    rows = [{"question_id": 1, "image_id": 7, "text": "Describe it.", "caption": "a"}]
    names = {"COCO_val2014_000000000042.jpg": "b", "000000000043": "c", "x": "d"}
    rows += [{"image_id": name, "caption": text} for name, text in names.items()]
    found = read((None, write_lines(tmp_path / "c.jsonl", rows)), protocol="chair")
    assert [(row.id, row.text) for row in found] == [("7", "a"), ("42", "b"), ("43", "c"), ("x", "d")]


def test_bad_answer_files(tmp_path):
    path = tmp_path / "a.jsonl"
    refused("cannot be read: No such file", read, (None, path))
    for content, message in (
        ("", "is empty"),
        ("[]", "is an empty list"),
        ('{"question_id": 1, "text": "a"}\n{"question_id": 2, "te', "line 2 of answer file .* is not JSON"),
        ('{"question_id": 1}', "has no text or caption or response"),
        ('{"text": "a"}', "has no question_id or image_id"),
        ('{"question_id": 1, "text": null}', "text is None; expected a string"),
        ('"text"', "is a JSON str; expected an object"),
    ):
        path.write_text(content)
        refused(message, read, (None, path))


def test_files_as_others_read_them(tmp_path, questions):
    """The exact form of each benchmark; `test_benchmarks` reads them back."""
    (path,) = write(tmp_path / "answers.jsonl", questions, {questions[0].key: 'No "ü"'}, "pope/vcd", "pocket")
    asked = "Is there a dog in the image? Please answer this question with one word."
    expected = {"question_id": 1, "prompt": asked, "text": 'No "ü"', "model_id": "pocket"}
    expected |= {"image": "COCO_val2014_000000000000.jpg", "metadata": {"group": "random"}}
    assert json.loads(path.read_text()) == expected
    refused("cannot be written", write, path / "a.jsonl", questions, {}, "pope")  # in a file: nothing is left
    assert not list(tmp_path.glob("*.part"))
    captioned = builders.read("chair", coco_folder(tmp_path / "coco", {1: ["dog"], 2: []}, {1: ["A dog."], 2: ["A."]}))
    said = {question.key: "A dog.\nAnd a cat." for question in captioned}
    (path,) = write(tmp_path / "c.jsonl", captioned, said, "chair")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"image_id": 1, "caption": "A dog.\nAnd a cat."}
    listed = write_json(tmp_path / "c.json", lines)  # others write a list
    assert answers.match(captioned, read((None, listed), protocol="chair")) == said
    asked = builders.read("amber", amber_folder(tmp_path))
    (path,) = write(tmp_path / "a.json", asked, {question.key: "Yes" for question in asked}, "amber")
    assert json.loads(path.read_text())[2] == {"id": 1005, "response": "Yes"}


def test_text_files_of_mme(tmp_path):
    tasks = {"existence": ["1", "2"], "count": ["1"], "position": ["3"], "color": ["4"]}
    asked = builders.read("mme", mme_folder(tmp_path, tasks))
    written = write(tmp_path / "mme", asked, {question.key: "Yes, it\tis.\n" for question in asked}, "mme")
    assert [path.stem for path in written] == list(tasks)
    first = written[0].read_text().splitlines()[0]
    assert first == "1.jpg\tIs it so? Please answer yes or no.\tYes\tYes, it is."
    # One subtask's file alone; others' name the picture as it was, whatever we know of it.
    file = tmp_path / "count.txt"
    file.write_text(written[1].read_text().replace("1.jpg", "1.png"))
    found = answers.match(of("count", asked), read((None, file), protocol="mme"))
    assert list(found.values()) == ["Yes, it is."] * 2
    file.write_text("1.jpg\tquestion\tYes\n")
    message = "line 1 .* has 3 cells; expected image, question, truth, answer"
    refused(message, read, (None, file), protocol="mme")
