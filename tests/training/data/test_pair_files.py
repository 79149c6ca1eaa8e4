import base64
import json
from pathlib import Path

import numpy as np
import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.processors.images import open_image
from lvlm_jax.training.data.pair_files import read_conversations, read_pairs, write_pairs
from tests.training import pair_sets
from tests.training.pair_sets import user, write_rows

TEXT = {"type": "text", "text": "What?"}
ANSWERS = {"chosen": "a cat", "rejected": "a dog"}
GOOD = {"images": ["0.png"], "prompt": "What?"} | ANSWERS


@pytest.fixture
def folder(tmp_path):
    pair_sets.draw(tmp_path, 2)
    return tmp_path


@pytest.fixture
def read(folder):
    """Reads the only row of a file, which holds a pair with those answers."""

    def read_one(row):
        (pair,) = read_pairs(write_rows(folder / "pairs.jsonl", [row]))
        assert (pair.chosen, pair.rejected) == ("a cat", "a dog")
        return pair

    return read_one


@pytest.fixture
def talk(folder):
    """Reads the only row of a file of conversations."""

    def read_one(row):
        (found,) = read_conversations(write_rows(folder / "talks.jsonl", [row]))
        return found

    return read_one


def said(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


def plain(role, text):
    return {"role": role, "content": text}


def turns(*texts):
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


# Rows by their names: a pair with those answers, and the conversation WHOLE, in every format; and what is wrong with
# others, by words of the message.
ROWS = [json.loads(row) for row in Path(__file__).with_name("formats.jsonl").read_text(encoding="utf-8").splitlines()]
KINDS = ("pair", "conversation", "bad pair", "bad conversation", "bad description")
PAIRS, DIALOGUES, BAD, BAD_TALKS, BAD_INFOS = (
    {row["name"]: row["row"] for row in ROWS if row["kind"] == kind} for kind in KINDS
)
QUESTION, SHAREGPT, MESSAGES = {"question": "What?"} | ANSWERS, PAIRS["LLaMA-Factory"], PAIRS["messages"]


@pytest.mark.parametrize("name", PAIRS)
def test_every_format_gives_the_same_pair(folder, read, name):
    pair = read(PAIRS[name])
    assert pair.prompt == [{"role": "user", "content": [{"type": "image"}, TEXT]}]
    assert pair.images == (folder / "0.png",)
    assert pair.id == "1" and pair.extra == {}


def test_placeholders_in_text_are_the_places_of_the_images(read):
    pair = read(GOOD | {"images": ["0.png", "1.png"], "prompt": "Is <image>\nlike <image>?"})
    words = [part.get("text", part["type"]) for part in pair.prompt[0]["content"]]
    assert words == ["Is ", "image", "like ", "image", "?"]
    (message,) = pair.conversation()  # which can be asked
    assert [part["image"].name for part in message["content"] if part["type"] == "image"] == ["0.png", "1.png"]


def test_earlier_turns_and_a_system_message_are_kept(read, talk):
    row = SHAREGPT | {"conversations": turns("<image>Hello", "Hi", "What?"), "system": "Be brief."}
    assert [message["role"] for message in read(row).prompt] == ["system", "user", "assistant", "user"]
    row = {"instruction": "And now?", "images": ["0.png"], "history": [["<image>What?", "a cup"]]} | ANSWERS
    pair = read(row)
    assert pair.prompt == [user("What?", 1), said("assistant", "a cup"), said("user", "And now?")] and not pair.extra
    found = talk({"conversations": turns("Hi", "Ho"), "system": "Be."})
    assert found.messages == [said("system", "Be."), said("user", "Hi"), said("assistant", "Ho")]
    assert found.images == () and found.extra == {}


def test_a_list_of_pairs_ids_and_other_fields(folder):
    rows = [GOOD | {"id": 7, "judge": {"score": 3}}, QUESTION | {"image": "0.png", "idx": 9}]
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    first, second = read_pairs(folder / "pairs.json")
    assert (first.id, first.extra, second.id) == ("7", {"judge": {"score": 3}}, "9")


def test_written_pairs_come_back(folder, read):
    """With pictures inside the file as well."""
    data = (folder / "1.png").read_bytes()
    inside = QUESTION | {"image": {"bytes": base64.b64encode(data).decode()}}
    pairs = [read(row | {"id": "x", "note": "é"}) for row in (MESSAGES, inside)]
    np.testing.assert_array_equal(open_image(pairs[1].images[0]), open_image(folder / "1.png"))
    for path, image in ((folder / "new" / "pairs.jsonl", str(folder / "0.png")), (folder / "here.jsonl", "0.png")):
        write_pairs(path, pairs)
        first = json.loads(path.read_text().splitlines()[0])
        assert first["images"] == [image] and first["note"] == "é"
        assert first["chosen"] == [said("assistant", "a cat")]
        assert read_pairs(path) == pairs and read_pairs(path)[1].images == (data,)


def test_addresses_of_images(folder, read, talk):
    data = (folder / "1.png").read_bytes()
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    part = {"type": "image_url", "image_url": {"url": uri}}
    assert talk({"messages": [said("user", "x") | {"content": [part, TEXT]}, said("assistant", "y")]}).images == (data,)
    assert read(GOOD | {"images": [(folder / "1.png").as_uri()]}).images == (folder / "1.png",)


@pytest.mark.parametrize("message", BAD)
def test_a_bad_row_is_named_by_its_line(folder, message):
    path = write_rows(folder / "pairs.jsonl", [GOOD, BAD[message]])
    with pytest.raises(LVLMError, match=f"^line 2 of '{path}'[^\n]*{message}[^\n]*\\Z"):
        read_pairs(path)


def test_a_malformed_line_and_a_missing_file(folder):
    path = write_rows(folder / "pairs.jsonl", [GOOD])
    path.write_text(path.read_text() + "\n{oops\n", encoding="utf-8")
    with pytest.raises(LVLMError, match="line 3 of preference file .* is not JSON"):
        read_pairs(path)
    with pytest.raises(LVLMError, match="cannot be read: No such file"):
        read_pairs(folder / "nothing.jsonl")


ASKED = [said("user", "And now?"), said("assistant", "a cat")]
WHOLE = [user("What?", 1), said("assistant", "a cup"), *ASKED]


@pytest.mark.parametrize("name", DIALOGUES)
def test_conversations_of_every_format_are_the_same(folder, talk, name):
    found = talk(DIALOGUES[name] | {"id": "7", "source": "me"})
    assert found.images == (folder / "0.png",) and found.id == "7" and found.extra["source"] == "me"
    assert found.messages == WHOLE


def test_the_chosen_answers_of_pairs_are_conversations(talk):
    assert talk(GOOD).messages == [user("What?", 1), said("assistant", "a cat")]


@pytest.mark.parametrize("message", BAD_TALKS)
def test_conversations_that_cannot_be_learned_as_they_are(talk, message):
    with pytest.raises(LVLMError, match=f"line 1 of .*{message}"):
        talk(BAD_TALKS[message])


@pytest.fixture
def described(folder):
    """Writes dataset_info.json about data sets, and a row into mine.jsonl."""

    def write(row=None, **entries):
        write_rows(folder / "mine.jsonl", [row or GOOD])
        (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
        return folder / "dataset_info.json"

    return write


def test_llama_factory_describes_its_file(folder, described):
    row = {
        "messages": [plain("user", "<image>What?")], "pictures": ["0.png"],
        "good": plain("assistant", "a cat"), "bad": plain("assistant", "a dog"),
    }  # fmt: skip
    (folder / "sets").mkdir()
    write_rows(folder / "sets" / "mine.jsonl", [row])
    columns = {"messages": "messages", "chosen": "good", "rejected": "bad", "images": "pictures"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    kind = {"formatting": "sharegpt", "ranking": True}
    mine = {"file_name": "sets/mine.jsonl", "columns": columns, "tags": tags} | kind
    path = described(mine=mine, other={"file_name": "other.json"})
    (pair,) = read_pairs(path)
    assert (pair.chosen, pair.images) == ("a cat", (folder / "0.png",))
    assert read_pairs(f"{path}:mine") == [pair]
    with pytest.raises(LVLMError, match="names no data set; expected dataset_info.json:NAME.*mine"):
        read_pairs(f"{path}:yours")
    row = {"q": "And now?", "a": "a cat", "past": [["What?", "a cup"]], "pics": ["0.png"]}
    columns = {"prompt": "q", "response": "a", "history": "past", "images": "pics", "query": None}
    (found,) = read_conversations(described(row, mine={"file_name": "mine.jsonl", "columns": columns}))
    assert found.messages == WHOLE


@pytest.mark.parametrize("message", BAD_INFOS)
def test_descriptions_that_cannot_be_followed(described, message):
    path = described(QUESTION | {"pics": ["0.png"], "images": ["1.png"]}, mine=BAD_INFOS[message])
    for read in (read_pairs, read_conversations):
        with pytest.raises(LVLMError, match=message):
            read(f"{path}:mine")


@pytest.mark.parametrize("image", [{"bytes": "é"}, "a" * 300, "a\0b", "\ud800", {"path": 3}], ids=ascii)
def test_images_that_no_file_can_be(read, image):
    with pytest.raises(LVLMError, match=r"^line 1 of [^\n]{,440}\Z"):
        read(QUESTION | {"image": image})
