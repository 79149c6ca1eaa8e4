import base64
import json

import numpy as np
import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.processors.images import open_image
from lvlm_jax.training.data import pair_files
from tests.training import pair_sets
from tests.training.pair_sets import user, write_rows

TEXT = {"type": "text", "text": "What?"}
ANSWERS = {"chosen": "a cat", "rejected": "a dog"}


@pytest.fixture
def folder(tmp_path):
    pair_sets.draw(tmp_path, 2)
    return tmp_path


def read_one(folder, row):
    (pair,) = pair_files.read_pairs(write_rows(folder / "pairs.jsonl", [row]))
    assert (pair.chosen, pair.rejected) == ("a cat", "a dog")
    return pair


def said(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


TRL = {
    "strings": {"images": ["0.png"], "prompt": "What?", **ANSWERS},
    "a single image": {"image": "0.png", "prompt": "What?", **ANSWERS},
    "messages": {
        "images": ["0.png"],
        "prompt": [user("What?", 1)],
        "chosen": [{"role": "assistant", "content": "a cat"}],
        "rejected": [said("assistant", "a dog")],
    },
    "plain messages": {
        "images": ["0.png"],
        "prompt": [{"role": "user", "content": "What?"}],
        "chosen": [{"role": "assistant", "content": "a cat"}],
        "rejected": [{"role": "assistant", "content": "a dog"}],
    },
    "no prompt": {
        "images": ["0.png"],
        "chosen": [user("What?", 1), said("assistant", "a cat")],
        "rejected": [user("What?", 1), said("assistant", "a dog")],
    },
}
LLAMA_FACTORY = {
    "conversations": {
        "conversations": [{"from": "human", "value": "<image>What?"}],
        "chosen": {"from": "gpt", "value": "a cat"},
        "rejected": {"from": "gpt", "value": "a dog"},
        "images": ["0.png"],
    },
    "instruction": {"instruction": "What?", "input": "", **ANSWERS, "images": ["0.png"]},
}
RLHF_V = {
    "question": {"question": "What?", **ANSWERS, "image": "0.png"},
    "text": {"text": json.dumps({"question": "What?", **ANSWERS}), "image_path": "0.png"},
    "a dict": {"question": "What?", **ANSWERS, "image": {"bytes": None, "path": "0.png"}},
}


@pytest.mark.parametrize("row", [*TRL.values(), *LLAMA_FACTORY.values(), *RLHF_V.values()])
def test_every_format_gives_the_same_pair(folder, row):
    pair = read_one(folder, row)
    assert pair.prompt == [{"role": "user", "content": [{"type": "image"}, TEXT]}]
    assert pair.images == (folder / "0.png",)
    assert pair.id == "1" and pair.extra == {}


def test_placeholders_in_text_are_the_places_of_the_images(folder):
    row = {"images": ["0.png", "1.png"], "prompt": "Is <image>\nlike <image>?", **ANSWERS}
    (message,) = read_one(folder, row).prompt
    words = [part.get("text", part["type"]) for part in message["content"]]
    assert words == ["Is ", "image", "like ", "image", "?"]


def test_turns_before_the_question_and_a_system_message_are_kept(folder):
    turns = [("human", "<image>Hello"), ("gpt", "Hi"), ("human", "What?")]
    row = LLAMA_FACTORY["conversations"] | {
        "conversations": [{"from": who, "value": what} for who, what in turns],
        "system": "Be brief.",
    }
    assert [message["role"] for message in read_one(folder, row).prompt] == ["system", "user", "assistant", "user"]


def test_a_list_of_pairs_ids_and_other_fields(folder):
    rows = [TRL["strings"] | {"id": 7, "judge": {"score": 3}}, RLHF_V["question"] | {"idx": 9}]
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    first, second = pair_files.read_pairs(folder / "pairs.json")
    assert (first.id, first.extra, second.id) == ("7", {"judge": {"score": 3}}, "9")


def test_pictures_inside_the_file(folder):
    data = (folder / "1.png").read_bytes()
    row = RLHF_V["question"] | {"image": {"bytes": base64.b64encode(data).decode()}}
    pair = read_one(folder, row)
    (picture,) = map(open_image, pair.images)
    np.testing.assert_array_equal(open_image(picture), open_image(folder / "1.png"))
    pair_files.write_pairs(folder / "again.jsonl", [pair])
    assert pair_files.read_pairs(folder / "again.jsonl")[0].images == (data,)


def dataset_info(folder, **entries):
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder / "dataset_info.json"


def test_llama_factory_describes_its_file(folder):
    (folder / "sets").mkdir()
    row = {
        "messages": [{"role": "user", "content": "<image>What?"}],
        "good": {"role": "assistant", "content": "a cat"},
        "bad": {"role": "assistant", "content": "a dog"},
        "pictures": ["0.png"],
    }
    write_rows(folder / "sets" / "mine.jsonl", [row])
    columns = {"messages": "messages", "chosen": "good", "rejected": "bad", "images": "pictures"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {
        "file_name": "sets/mine.jsonl",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": columns,
        "tags": tags,
    }
    path = dataset_info(folder, mine=entry, other={"file_name": "other.json"})
    (pair,) = pair_files.read_pairs(path)
    assert (pair.chosen, pair.images) == ("a cat", (folder / "0.png",))
    assert pair_files.read_pairs(f"{path}:mine") == [pair]
    with pytest.raises(LVLMError, match="names no data set; expected dataset_info.json:NAME.*mine"):
        pair_files.read_pairs(f"{path}:yours")


def test_written_pairs_come_back(folder):
    pairs = [read_one(folder, row | {"id": "x", "note": "é"}) for row in (TRL["messages"], RLHF_V["text"])]
    pair_files.write_pairs(folder / "new" / "pairs.jsonl", pairs)
    written = [json.loads(line) for line in (folder / "new" / "pairs.jsonl").read_text().splitlines()]
    assert written[0]["images"] == [str(folder / "0.png")]
    assert written[0]["chosen"] == [said("assistant", "a cat")] and written[0]["note"] == "é"
    assert pair_files.read_pairs(folder / "new" / "pairs.jsonl") == pairs
    pair_files.write_pairs(folder / "here.jsonl", pairs)
    assert json.loads((folder / "here.jsonl").read_text().splitlines()[0])["images"] == ["0.png"]


def test_the_prompt_of_a_pair_can_be_asked(folder):
    pair = read_one(folder, {"images": ["0.png", "1.png"], "prompt": "<image>and <image>What?", **ANSWERS})
    (message,) = pair.conversation()
    shown = [part["image"].name for part in message["content"] if part["type"] == "image"]
    assert shown == ["0.png", "1.png"]


GOOD = TRL["strings"]
BAD = {
    "no image": ({**GOOD, "images": []}, "has no image; a preference pair needs at least one"),
    "missing image": ({**GOOD, "images": ["9.png"]}, "9.png' does not exist"),
    "image without name": ({**GOOD, "images": [3]}, "an image is 3; expected a path"),
    "no picture": ({**GOOD, "images": [{"bytes": "AAAA"}]}, "no base64 of a picture"),
    "equal": ({**GOOD, "chosen": "a dog "}, "chosen and rejected are equal"),
    "empty": ({**GOOD, "rejected": "  "}, "rejected is empty"),
    "no answer": ({"images": ["0.png"], "prompt": "What?", "chosen": "a"}, "has no rejected"),
    "placeholders": ({**GOOD, "prompt": "<image><image>What?"}, "2 image placeholders and 1 images"),
    "placeholder in an answer": ({**GOOD, "chosen": "<image>"}, "chosen contains <image>"),
    "another format": ({"a": 1}, "has no prompt; expected the keys"),
    "two answers": ({**GOOD, "chosen": [said("assistant", "a")] * 2}, "chosen has 2 messages"),
    "the wrong role": ({**GOOD, "chosen": [said("user", "a")]}, "chosen is a message of 'user'"),
    "nothing asked": ({**GOOD, "prompt": [said("assistant", "a")]}, "does not end with a user message"),
    "a strange part": (
        {**GOOD, "prompt": [{"role": "user", "content": [{"type": "audio"}]}]},
        "a part of a message is",
    ),
    "a strange message": ({**GOOD, "prompt": ["hello"]}, "a message is 'hello'"),
    "text that is no JSON": ({"text": "hello", "image": "0.png"}, "text is no JSON string"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_named_by_its_line(folder, row, message):
    path = write_rows(folder / "pairs.jsonl", [GOOD, row])
    with pytest.raises(LVLMError, match=message) as error:
        pair_files.read_pairs(path)
    assert str(error.value).startswith(f"line 2 of '{path}'") and "\n" not in str(error.value)


def test_a_malformed_line_and_a_missing_file(folder):
    path = write_rows(folder / "pairs.jsonl", [GOOD])
    path.write_text(path.read_text() + "\n{oops\n", encoding="utf-8")
    with pytest.raises(LVLMError, match="line 3 of preference file .* is not JSON"):
        pair_files.read_pairs(path)
    with pytest.raises(LVLMError, match="cannot be read: No such file"):
        pair_files.read_pairs(folder / "nothing.jsonl")


def test_conversations(folder):
    turns = [user("What?", 1), said("assistant", "a cat"), said("user", "Sure?"), said("assistant", "yes")]
    path = write_rows(folder / "talks.jsonl", [{"images": ["1.png"], "messages": turns, "source": "me"}])
    (found,) = pair_files.read_conversations(path)
    assert found.messages == turns
    assert (found.images, found.extra) == ((folder / "1.png",), {"source": "me"})


def test_the_chosen_answers_of_pairs_are_conversations(folder):
    (found,) = pair_files.read_conversations(write_rows(folder / "pairs.jsonl", [GOOD]))
    assert found.messages == [user("What?", 1), said("assistant", "a cat")]


def test_a_conversation_without_an_answer_at_its_end_is_refused(folder):
    rows = [{"images": ["0.png"], "messages": [user("What?", 1)]}]
    with pytest.raises(LVLMError, match="line 1 .* does not end with an assistant message"):
        pair_files.read_conversations(write_rows(folder / "talks.jsonl", rows))


ASKED = [said("user", "And now?"), said("assistant", "a cat")]
DIALOGUES = {
    "LLaVA": {
        "id": "7",
        "image": "0.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "a cup"},
            {"from": "human", "value": "And now?"},
            {"from": "gpt", "value": "a cat"},
        ],
    },
    "alpaca": {
        "id": "7",
        "images": ["0.png"],
        "instruction": "And now?",
        "input": "",
        "output": "a cat",
        "history": [["<image>What?", "a cup"]],
        "videos": [],
    },
    "images in messages": {
        "id": "7",
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "0.png"}, TEXT]},
            said("assistant", "a cup"),
            *ASKED,
        ],
    },
    "LLaMA-Factory 1": {
        "id": "7",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "value": "0.png"}, {"type": "text", "value": "What?"}],
                "loss_weight": 0.0,
            },
            {"role": "assistant", "content": [{"type": "text", "value": "a cup"}], "loss_weight": 1.0},
            *ASKED,
        ],
    },
}


@pytest.mark.parametrize("name", DIALOGUES)
def test_conversations_of_every_format_are_the_same(name, folder):
    path = write_rows(folder / "sft.jsonl", [DIALOGUES[name]])
    (found,) = pair_files.read_conversations(path)
    assert found.images == (folder / "0.png",) and found.id == "7"
    assert found.messages == [user("What?", 1), said("assistant", "a cup"), *ASKED]


def test_a_system_prompt_and_a_row_without_image(folder):
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": "Be."}
    (found,) = pair_files.read_conversations(write_rows(folder / "sft.jsonl", [row]))
    assert found.messages == [said("system", "Be."), said("user", "Hi"), said("assistant", "Ho")]
    assert found.images == () and found.extra == {}


def test_earlier_turns_of_a_pair_stay(folder):
    row = {"instruction": "And now?", "images": ["0.png"], "history": [["<image>What?", "a cup"]], **ANSWERS}
    pair = read_one(folder, row)
    assert pair.prompt == [user("What?", 1), said("assistant", "a cup"), said("user", "And now?")]
    assert pair.extra == {}


def test_pairs_of_llama_factory_1(folder):
    asked = {"role": "user", "content": [{"type": "image_url", "value": "0.png"}, {"type": "text", "value": "What?"}]}
    answers = {
        f"{name}_messages": [asked, {"role": "assistant", "content": [{"type": "text", "value": text}]}]
        for name, text in ANSWERS.items()
    }
    pair = read_one(folder, answers)
    assert pair.prompt == [user("What?", 1)] and pair.images == (folder / "0.png",) and pair.extra == {}


def test_llama_factory_describes_conversations(folder):
    row = {"q": "And now?", "a": "a cat", "past": [["What?", "a cup"]], "pics": ["0.png"]}
    write_rows(folder / "mine.jsonl", [row])
    columns = {"prompt": "q", "response": "a", "history": "past", "images": "pics", "query": None}
    path = dataset_info(folder, mine={"file_name": "mine.jsonl", "columns": columns})
    (found,) = pair_files.read_conversations(path)
    assert found.messages == [user("What?", 1), said("assistant", "a cup"), *ASKED]


LOST = {
    "videos": ({"videos": ["v.mp4"]}, "has videos, which is not supported"),
    "tools": ({"tools": "[{}]"}, "has tools"),
    "history": ({"history": "What?"}, "history is 'What"),
    "a turn of history": ({"history": [["What?"]]}, r"a turn of history is \['What\?'\]; expected"),
    "two columns of images": ({"image": "1.png"}, "images under images and image"),
}


@pytest.mark.parametrize("name", LOST)
def test_no_column_is_lost_in_silence(name, folder):
    change, message = LOST[name]
    row = {"instruction": "What?", "images": ["0.png"]} | change
    for answer in (ANSWERS, {"output": "a cat"}):
        path = write_rows(folder / "rows.jsonl", [row | answer])
        with pytest.raises(LVLMError, match=f"line 1 of .*{message}"):
            (pair_files.read_conversations if "output" in answer else pair_files.read_pairs)(path)


BAD_MESSAGES = {
    "a tool's": ({"from": "observation", "value": "3"}, "a message is of 'observation'"),
    "calls": ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "a message has tool_calls"),
    "weight": ({"role": "assistant", "content": "x", "loss_weight": 0}, "loss_weight of a message"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_messages_that_cannot_be_learned_as_they_are(name, folder):
    message, said_of_it = BAD_MESSAGES[name]
    row = {"images": ["0.png"], "messages": [user("What?", 1), message, *ASKED]}
    with pytest.raises(LVLMError, match=f"line 1 of .*{said_of_it}"):
        pair_files.read_conversations(write_rows(folder / "rows.jsonl", [row]))


def test_rows_that_are_nothing_we_know(folder):
    path = write_rows(folder / "rows.jsonl", [{"question": "What?", "answer": "a cat"}])
    with pytest.raises(LVLMError, match="neither a conversation .* nor a pair .*; it has question, answer"):
        pair_files.read_conversations(path)


ENTRIES = {
    "a number": (3, "expected an object with a file_name"),
    "no file": ({"columns": {}}, "has no file_name"),
    "a file of another kind": ({"file_name": 3}, "file_name is 3"),
    "on the hub": ({"hf_hub_url": "a/b"}, "takes its rows from a hf_hub_url"),
    "tags": ({"file_name": "p.json", "tags": 1.0}, "tags is 1.0"),
    "columns": ({"file_name": "p.json", "columns": ["a"]}, "columns is"),
    "a column": ({"file_name": "p.json", "columns": {"messages": ["a"]}}, "messages of columns is"),
    "an unknown column": ({"file_name": "p.json", "columns": {"mesages": "a"}}, "columns has 'mesages'"),
    "a tag": ({"file_name": "p.json", "tags": {"role_tag": ["a"]}}, "role_tag of tags is"),
    "samples": ({"file_name": "p.json", "num_samples": 3}, "num_samples, which is not supported"),
    "a format": ({"file_name": "p.json", "formatting": ["alpaca"]}, "formatting is"),
    "a folder": ({"file_name": "."}, "cannot be read|is not a file"),
}


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("read", [pair_files.read_pairs, pair_files.read_conversations])
def test_descriptions_of_any_shape(read, name, folder):
    entry, message = ENTRIES[name]
    path = dataset_info(folder, mine=entry)
    with pytest.raises(LVLMError, match=message) as caught:
        read(f"{path}:mine")
    assert "\n" not in str(caught.value)


def test_two_columns_of_one_name(folder):
    write_rows(folder / "mine.jsonl", [{"pics": ["0.png"], "images": ["1.png"], "question": "What?", **ANSWERS}])
    path = dataset_info(folder, mine={"file_name": "mine.jsonl", "columns": {"images": "pics"}})
    with pytest.raises(LVLMError, match="two columns that dataset_info.json calls images"):
        pair_files.read_pairs(path)


@pytest.mark.parametrize(
    "image", [{"bytes": "é"}, "a" * 300, "a\0b", "\ud800", {"path": 3}, {"bytes": "AAAA"}], ids=ascii
)
def test_images_that_no_file_can_be(image, folder):
    path = write_rows(folder / "rows.jsonl", [{"question": "What?", "image": image, **ANSWERS}])
    with pytest.raises(LVLMError, match="line 1 of ") as caught:
        pair_files.read_pairs(path)
    assert len(str(caught.value)) < 450 and "\n" not in str(caught.value)
