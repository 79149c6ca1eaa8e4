"""Answer files: read as others write them, written as others read them, matched to questions without guessing."""

import json

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import BENCHMARKS, Data, answers, get
from lvlm_jax.evaluation.benchmarks import amber, chair, mme, pope
from tests.evaluation.builders import (
    amber_folder,
    coco_folder,
    mme_folder,
    pope_answers,
    pope_folder,
    write_json,
    write_lines,
)


@pytest.fixture
def questions(tmp_path):
    return pope.read(Data(pope_folder(tmp_path / "data", {"random": "yn", "popular": "yn", "adversarial": "yn"})),
                     get("pope"))  # fmt: skip


def read(*paths, protocol="pope"):
    settings = get(protocol)
    return answers.read(list(paths), BENCHMARKS[settings.benchmark].answers, settings.groups)


def write(path, questions, said, protocol, model_id=""):
    settings = get(protocol)
    return BENCHMARKS[settings.benchmark].answers.write(path, questions, said, settings, model_id)


def test_one_file_for_each_split(tmp_path, questions):
    files = [(group, pope_answers(tmp_path / f"{group}.jsonl", [group, "no"])) for group in pope.SPLITS]
    found = answers.match(questions, read(*files))
    assert found["popular", "1"] == "popular" and len(found) == 6


def test_a_folder_with_one_file_for_each_split(tmp_path, questions):
    for group in pope.SPLITS:
        pope_answers(tmp_path / "answers" / f"llava15_coco_pope_{group}_answers.jsonl", [group, "no"])
    found = answers.match(questions, read((None, tmp_path / "answers")))
    assert found["adversarial", "1"] == "adversarial"
    pope_answers(tmp_path / "answers" / "random-2.jsonl", ["yes", "no"])
    with pytest.raises(LVLMError, match="both look like answers of random"):
        read((None, tmp_path / "answers"))


@pytest.mark.parametrize("where", [{"category": "popular"}, {"metadata": {"group": "popular"}}, {"group": "popular"}])
def test_rows_that_name_their_split(tmp_path, questions, where):
    path = write_lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "yes"} | where])
    assert answers.match(questions, read((None, path)), partial=True) == {("popular", "1"): "yes"}


def test_ids_that_several_splits_share_are_not_guessed(tmp_path, questions):
    path = pope_answers(tmp_path / "a.jsonl", ["yes", "no"])
    with pytest.raises(LVLMError, match="id 1 occurs in random, popular, adversarial; say which is meant with --group"):
        answers.match(questions, read((None, path)))


def test_image_and_prompt_tell_questions_of_one_id_apart(tmp_path):
    folder = pope_folder(tmp_path, {"random": "y", "popular": "y", "adversarial": "y"})
    write_lines(folder / "coco/coco_pope_popular.json",
                [{"question_id": 1, "image": "other.jpg", "text": "Is there a cat?", "label": "no"}])  # fmt: skip
    questions = pope.read(Data(folder, groups=("random", "popular")), get("pope"))
    rows = [
        {"question_id": 1, "text": "no", "prompt": "Is there a cat?\nAnswer.", "image": "val2014/other.jpg"},
        {"question_id": 1, "text": "yes", "image": "COCO_val2014_000000000000.jpg"},
    ]
    found = answers.match(questions, read((None, write_lines(tmp_path / "a.jsonl", rows))))
    assert found == {("popular", "1"): "no", ("random", "1"): "yes"}


def asking(number, group, **more):
    """A row that answers question `number` of a split whose questions are all about its own kind of thing."""
    return {"question_id": number, "prompt": f"Is there a {group} one?\nAnswer.", "text": f"{group} {number}"} | more


@pytest.fixture
def apart(tmp_path):
    """Questions 1 and 2 of each split, the second about an image of the split alone."""
    for group in pope.SPLITS:
        rows = [{"question_id": number, "image": f"{group if number > 1 else 'all'}.jpg", "label": "no",
                 "text": f"Is there a {group} one?"} for number in (1, 2)]  # fmt: skip
        write_lines(tmp_path / f"coco_pope_{group}.json", rows)
    return pope.read(Data(tmp_path), get("pope"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (asking(1, "popular"), "question 1 of random is 'Is there a random one[?]' about all.jpg, and this answers "
         "'Is there a popular one[?] Answer.'; is it the file of another split"),
        (asking(2, "random", image="popular.jpg"), "question 2 of random is .*this answers .*popular.jpg"),
        ({"question_id": 2, "text": "no", "image": "popular.jpg"}, "and this answers 'popular.jpg'"),
        (asking(1, "random", metadata={"group": "popular"}), "says that it answers popular, and is given as"),
    ],
)  # fmt: skip
def test_answers_to_another_split_are_refused(tmp_path, apart, row, message):
    random = [question for question in apart if question.group == "random"]
    path = write_lines(tmp_path / "a.jsonl", [row])
    with pytest.raises(LVLMError, match=f"line 1 of answer file .*{message}"):
        answers.match(random, read(("random", path)), partial=True)


def test_prompts_may_have_words_around_the_question(tmp_path, apart):
    rows = [
        asking(1, "random", prompt="<image>\nIs there a  Random one? One word."),
        asking(2, "random", image="x/random.png"),
    ]
    random = [question for question in apart if question.group == "random"]
    found = answers.match(random, read(("random", write_lines(tmp_path / "a.jsonl", rows))))
    assert list(found.values()) == ["random 1", "random 2"]


def test_splits_in_one_file_by_blocks_of_ids(tmp_path, apart):
    """As LLaVA numbers them: the adversarial split from 1, random from 10000001, popular from 20000001."""
    rows = [
        asking(number, group) | {"question_id": start + number}
        for start, group in ((0, "adversarial"), (10_000_000, "random"), (20_000_000, "popular"))
        for number in (1, 2)
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    found = answers.match(apart, read((None, path)), known=pope.SPLITS)
    assert found == {(group, str(i)): f"{group} {i}" for group in pope.SPLITS for i in (1, 2)}
    popular = [question for question in apart if question.group == "popular"]
    for way in (None, "popular"):  # the one asked is picked out
        found = answers.match(popular, read((way, path)), known=pope.SPLITS)
        assert found == {("popular", "1"): "popular 1", ("popular", "2"): "popular 2"}
    path = write_lines(tmp_path / "b.jsonl", [asking(30_000_001, "popular")])
    with pytest.raises(LVLMError, match="id 30000001 is beyond the blocks of adversarial, random, popular"):
        read((None, path))


def test_a_file_of_other_groups_alone_is_refused(tmp_path, apart):
    path = write_lines(tmp_path / "a.jsonl", [asking(1, "popular") | {"group": "popular"}])
    random = [question for question in apart if question.group == "random"]
    with pytest.raises(LVLMError, match="line 1 .* answers popular, as do all the others; asked are random"):
        answers.match(random, read((None, path)), known=pope.SPLITS)


def test_missing_doubled_and_foreign_answers(tmp_path, questions):
    random = [question for question in questions if question.group == "random"]
    for ids, message in (
        ([1], "1 of 2 questions have no answer, first 2 of random; complete the file"),
        ([1, 1], "line 2 of answer file .* 1 is answered twice"),
        ([77], "77 is none of the 2 questions; is it the right file"),
    ):
        path = write_lines(tmp_path / "a.jsonl", [{"question_id": number, "text": "a"} for number in ids])
        with pytest.raises(LVLMError, match=message):
            answers.match(random, read(("random", path)))


def test_popes_own_format_goes_by_order(tmp_path, questions):
    texts = [question.text for question in questions if question.group == "random"]
    rows = [{"question": texts[0].lower(), "answer": "yes"}, {"question": texts[1], "answer": "No, none."}]
    found = answers.match(questions, read(("random", write_lines(tmp_path / "a.jsonl", rows))), partial=True)
    assert found == {("random", "1"): "yes", ("random", "2"): "No, none."}
    with pytest.raises(LVLMError, match="line 1 of .* occurs in random, popular, adversarial; say which"):
        answers.match(questions, read((None, tmp_path / "a.jsonl")))
    path = write_lines(tmp_path / "b.jsonl", [rows[0], {"question": "Is there a whale?", "answer": "no"}])
    with pytest.raises(LVLMError, match="line 2 of .*: question 'Is there a whale[?]' is none of the 6 questions"):
        answers.match(questions, read(("random", path)))
    with pytest.raises(LVLMError, match="line 1 of .* has no answer"):
        read(("random", write_lines(tmp_path / "c.jsonl", [{"question": "Is there?"}])))


def test_a_question_is_not_taken_for_its_answer(tmp_path, questions):
    """A question file to which somebody added the answers has the question in the column that answers have here."""
    row = {"question_id": 1, "text": questions[0].text, "label": "yes", "answer": "no"}
    path = write_lines(tmp_path / "a.jsonl", [row])
    with pytest.raises(LVLMError, match="line 1 of .*: the answer is the question itself; is it in answer"):
        answers.match(questions, read(("random", path)), partial=True)
    # A model may repeat the question.
    path = write_lines(tmp_path / "b.jsonl", [{"question_id": 1, "text": questions[0].text}])
    assert answers.match(questions, read(("random", path)), partial=True)["random", "1"] == questions[0].text


def test_chair_goes_by_the_image(tmp_path):
    """By its number in any writing, whatever other ids and texts a row has."""
    rows = [
        {"question_id": 1, "image_id": 7, "text": "Describe it.", "caption": "a"},
        {"image_id": "COCO_val2014_000000000042.jpg", "caption": "b"},
        {"image_id": "000000000043", "caption": "c"},
        {"image_id": "x", "caption": "d"},
    ]
    found = read((None, write_lines(tmp_path / "c.jsonl", rows)), protocol="chair")
    assert [(row.id, row.text) for row in found] == [("7", "a"), ("42", "b"), ("43", "c"), ("x", "d")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("[]", "is an empty list"),
        ('{"question_id": 1, "text": "a"}\n{"question_id": 2, "te', "line 2 of answer file .* is not JSON"),
        ('{"question_id": 1}', "has no text or caption or response"),
        ('{"text": "a"}', "has no question_id or image_id"),
        ('{"question_id": 1, "text": null}', "text is None; expected a string"),
        ('"text"', "is a JSON str; expected an object"),
    ],
)
def test_bad_answer_files(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(LVLMError, match=message):
        read((None, path))
    with pytest.raises(LVLMError, match="cannot be read: No such file"):
        read((None, tmp_path / "none.jsonl"))


def test_files_as_others_read_them(tmp_path, questions):
    """Each benchmark's own form, to the letter; `test_benchmarks` reads them back."""
    (path,) = write(tmp_path / "answers.jsonl", questions, {questions[0].key: 'No "ü"'}, "pope/vcd", "pocket")
    assert json.loads(path.read_text()) == {
        "question_id": 1,
        "prompt": "Is there a dog in the image? Please answer this question with one word.",
        "text": 'No "ü"',
        "model_id": "pocket",
        "image": "COCO_val2014_000000000000.jpg",
        "metadata": {"group": "random"},
    }
    folder = coco_folder(tmp_path / "coco", {1: ["dog"], 2: []}, {1: ["A dog."], 2: ["Grass."]})
    captioned = chair.read(Data(folder), get("chair"))
    said = {question.key: "A dog.\nAnd a cat." for question in captioned}
    (path,) = write(tmp_path / "c.jsonl", captioned, said, "chair")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"image_id": 1, "caption": "A dog.\nAnd a cat."}
    listed = write_json(tmp_path / "c.json", lines)  # others write a list
    assert answers.match(captioned, read((None, listed), protocol="chair")) == said
    asked = amber.read(Data(amber_folder(tmp_path)), get("amber"))
    (path,) = write(tmp_path / "a.json", asked, {question.key: "Yes" for question in asked}, "amber")
    assert json.loads(path.read_text())[2] == {"id": 1005, "response": "Yes"}


def test_text_files_of_mme(tmp_path):
    tasks = {"existence": ["1", "2"], "count": ["1"], "position": ["3"], "color": ["4"]}
    asked = mme.read(Data(mme_folder(tmp_path, tasks)), get("mme"))
    written = write(tmp_path / "mme", asked, {question.key: "Yes, it\tis.\n" for question in asked}, "mme")
    assert [path.name for path in written] == ["existence.txt", "count.txt", "position.txt", "color.txt"]
    first = written[0].read_text().splitlines()[0]
    assert first == "1.jpg\tIs it so? Please answer yes or no.\tYes\tYes, it is."
    # One subtask's file alone; others' name the picture as it was, whatever we know of it.
    alone = [question for question in asked if question.group == "count"]
    (tmp_path / "count.txt").write_text(written[1].read_text().replace("1.jpg", "1.png"))
    found = answers.match(alone, read((None, tmp_path / "count.txt"), protocol="mme"))
    assert list(found.values()) == ["Yes, it is."] * 2
    (tmp_path / "count.txt").write_text("1.jpg\tquestion\tYes\n")
    with pytest.raises(LVLMError, match="line 1 .* has 3 cells; expected image, question, truth, answer"):
        read((None, tmp_path / "count.txt"), protocol="mme")


def test_an_answer_that_cannot_be_written_leaves_nothing(tmp_path, questions):
    (tmp_path / "file").write_text("")
    with pytest.raises(LVLMError, match="cannot be written"):
        write(tmp_path / "file" / "a.jsonl", questions, {}, "pope")
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix == ".part"] == []
