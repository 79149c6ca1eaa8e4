"""CHAIR: word rules, figures counted by hand, ground truth from annotations and from pickles, good and bad."""

import collections
import json
import os
import pickle
import pickletools
import sys
import types

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import Data, get
from lvlm_jax.evaluation.benchmarks import chair
from lvlm_jax.evaluation.chair_truth import read_chair_pickle
from lvlm_jax.evaluation.chair_words import DOUBLE_WORDS, parse_synonyms, plain_lexicon, singular, tokens
from lvlm_jax.evaluation.parsers import truncated
from lvlm_jax.evaluation.rescore import rescore
from tests.evaluation.builders import CATEGORIES, SYNONYMS, coco_folder, write_lines

PROTOCOLS = ["chair/opera-512", "chair/opera-64", "chair/repaired-512"]


def sample(folder):
    images = (1, 2, 3)
    coco_folder(folder, {1: ["dog"], 2: ["cat"], 3: ["dog"]}, {number: ["A bear."] for number in images})
    return Data(folder, synonyms=folder / "synonyms.txt")


OFFICIAL = parse_synonyms(SYNONYMS, repair=False, origin="test")
REPAIRED = parse_synonyms(SYNONYMS, repair=True, origin="test")


def named(text, lexicon=OFFICIAL):
    return [category for _, category in lexicon.mentions(lexicon.words(text))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two puppies and a kitten.", ["dog", "cat"]),
        ("A man's dog, and the dogs.", ["person", "dog", "dog"]),
        ("Men, women, people", ["person", "person"]),  # "women" is not on this list
        ("baby bear", ["bear"]),  # and no person, even where "baby" names one
        ("a teddy bear", ["teddy bear"]),  # not a bear
        ("teddy bears", ["teddy bear"]),
        ("a hot dog", ["hot dog"]),  # not a dog
        ("wine glasses on the table", ["wine glass"]),
        ("a glass of wine", []),
        ("a wine glas", ["wine glass"]),  # what some singularisers make of it
        ("a bow tie", ["tie"]),
        ("passenger train", ["train"]),
        ("passenger jet", ["airplane"]),
        ("a train track", []),  # a track is no train
        ("the toilet seat", ["toilet"]),
        ("a toilet with its seat up", ["toilet"]),  # not a chair
        ("a seat", ["chair"]),
        ("knives", ["knife"]),
        ("skis and ski", ["skis", "skis"]),
        ("dog-like", []),
        ("", []),
    ],
)
def test_words(text, expected):
    assert named(text) == expected


@pytest.mark.parametrize(
    ("text", "official", "repaired"),
    [
        ("a motor bike", [], ["motorcycle"]),  # a key with a leading blank
        ("a motorbike", ["motorcycle"], ["motorcycle"]),
        ("an iPhone", [], ["cell phone"]),  # a key with a capital
        ("a stove top oven", ["oven"], ["oven"]),  # three words never match, but the last one does
    ],
)
def test_slips_of_the_list(text, official, repaired):
    assert named(text) == official
    assert named(text, REPAIRED) == repaired


def test_the_empty_key_matches_nothing():
    assert "" not in OFFICIAL.categories and OFFICIAL.categories["dog"] == "dog"


@pytest.mark.parametrize(
    ("word", "expected"),
    [("buses", "bus"), ("bus", "bus"), ("scissors", "scissors"), ("children", "child"), ("policemen", "policeman"),
     ("leaves", "leaf"), ("ponies", "pony"), ("benches", "bench"), ("canoes", "canoe"), ("glass", "glass"),
     ("taxis", "taxi"), ("zebus", "zebu"), ("axis", "axis"),
     ("grandchildren", "grandchild")],
)  # fmt: skip
def test_singular(word, expected):
    known = {"bus", "scissors", "child", "policeman", "leaf", "pony", "bench", "canoe", "taxi", "zebu"}
    assert singular(word, known) == expected


def test_tokens():
    assert tokens("The dog's here, isn't it?") == ["The", "dog", "'s", "here", ",", "is", "n't", "it", "?"]


def test_a_word_of_two_categories_is_refused():
    message = "line 2 of the synonym list gives 'pup' to 'cat', an earlier one to 'dog'"
    with pytest.raises(LVLMError, match=message):
        parse_synonyms("dog, pup\ncat, pup", repair=False, origin="test")


def test_names_alone():
    assert named("two hot dogs and a puppy", plain_lexicon(CATEGORIES)) == ["hot dog"]


@pytest.fixture
def folder(tmp_path):
    objects = {1: ["dog", "dog"], 2: ["cat", "person"], 3: []}
    return coco_folder(tmp_path, objects, {1: ["A puppy on a chair."], 2: ["A kitten."], 3: ["A field."]})


def read(folder, name="chair/opera-512", **where):
    return chair.read(Data(folder, **{"synonyms": folder / "synonyms.txt"} | where), get(name))


def score(questions, captions, name="chair/opera-512"):
    answers = {q.key: captions[q.id] for q in questions}
    scores = chair.score(questions, answers, get(name))
    return {figure: float(value) for figure, value in scores.values().items()}, scores


def test_ground_truth_is_instances_and_reference_captions(folder):
    truth = {q.id: q.extra["objects"] for q in read(folder)}
    assert truth == {1: {"dog", "chair"}, 2: {"cat", "person"}, 3: set()}


def test_figures_by_hand(folder):
    captions = {1: "A dog, a dog and a cat.", 2: "A cat and a bear. Two bears", 3: "Grass."}
    found, scores = score(read(folder), captions)
    # mentions: dog dog CAT | cat BEAR BEAR | none
    assert found["C_S"] == 2 / 3
    assert found["C_I"] == 3 / 6
    assert found["recall"] == 2 / 4
    assert found["F1"] == pytest.approx(0.5)
    assert found["F1 (distinct)"] == pytest.approx(0.5)  # precision: dog, cat of dog, CAT, cat, BEAR
    assert found["coverage"] == pytest.approx((1 / 2 + 1 / 2) / 2)  # image 3 shows nothing to cover
    assert found["length"] == pytest.approx((9 + 8 + 2) / 3)
    assert found["words"] == pytest.approx((7 + 7 + 1) / 3)
    assert scores.correct == {("captions", "1"): False, ("captions", "2"): False, ("captions", "3"): True}
    assert scores.notes["without_ground_truth"] == 1


def test_the_two_f1_differ_when_mentions_repeat(folder):
    found, _ = score(read(folder), {1: "dog dog dog cat", 2: "", 3: ""})
    assert found["F1"] == pytest.approx(2 * 0.75 * 0.25 / (0.75 + 0.25))
    assert found["F1 (distinct)"] == pytest.approx(2 * 0.5 * 0.25 / (0.5 + 0.25))


def test_truncation_drops_the_unfinished_sentence(folder):
    captions = {1: "A dog. A ca cat", 2: "A bear without a stop", 3: ""}
    found, _ = score(read(folder, "chair/opera-64"), captions, "chair/opera-64")
    assert found["C_S"] == 0.0 and found["recall"] == 1 / 4
    found, _ = score(read(folder), captions)
    assert found["C_S"] == 2 / 3


def test_truncation_rules():
    assert truncated("One. Two. Thr", "sentence") == "One. Two."
    assert truncated("no stop", "sentence") == ""
    assert truncated("One. Thr", "none") == "One. Thr"
    with pytest.raises(LVLMError, match="'words' is unknown"):
        truncated("", "words")


@pytest.mark.parametrize(
    "content",
    [
        "COCO_val2014_000000000002.jpg\n1\n",
        '["COCO_val2014_000000000002.jpg", 1]',
        '{"image_id": 2}\n{"image": "x_1.jpg"}',
        '[{"image": "x_2.jpg", "id": 9},\n {"image_id": 1}]',
    ],
)
def test_image_list_decides_images_and_order(folder, content):
    (folder / "list.txt").write_text(content)
    assert [q.id for q in read(folder, image_list=folder / "list.txt")] == [2, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\n1\n", "id 1 occurs twice"),
        ("9\n", "1 of 1 images are not in the annotations, first 9"),
        ("dog.jpg\n", "has no number in its name"),
        ("[]", "is an empty list; expected names or ids"),
    ],
)
def test_image_lists_that_are_wrong(folder, content, message):
    (folder / "list.txt").write_text(content)
    with pytest.raises(LVLMError, match=message):
        read(folder, image_list=folder / "list.txt")


def test_annotations_that_are_wrong(folder):
    path = folder / "annotations" / "instances_val2014.json"
    good = json.loads(path.read_text())
    one = {"id": 77, "image_id": 1}
    for change, message in (
        ({"annotations": [*good["annotations"], one]}, r"annotation 77 \(image 1\) .* has no category_id"),
        ({"annotations": [one | {"category_id": 99}]}, "category_id 99 is not among the categories"),
        ({"images": None}, "'images' of annotations .* is no list of objects"),
        ({"categories": [1]}, "'categories' of annotations .* is no list of objects"),
        ({"annotations": {}}, "have no list 'annotations'"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(LVLMError, match=message):
            read(folder)
    path.write_text("{")
    with pytest.raises(LVLMError, match="is not JSON"):
        read(folder)
    path.unlink()
    with pytest.raises(LVLMError, match="CHAIR needs instances_val2014.json too"):
        read(folder)
    (folder / "empty").mkdir()
    with pytest.raises(LVLMError, match="no instances_val2014.json and captions_val2014.json"):
        read(folder / "empty", synonyms=None)


def test_synonym_list_must_know_every_category(folder):
    (folder / "short.txt").write_text("dog, puppy\n")
    with pytest.raises(LVLMError, match="lacks 16 categories of the annotations, first 'person'"):
        read(folder, synonyms=folder / "short.txt")


# ---------------------------------------------------------- chair.pkl


class CHAIR:
    """As the scorer that people pickle."""

    def __init__(self):
        self.imid_to_objects = collections.defaultdict(list)
        self.imid_to_objects[1] = {"dog", "chair"}
        self.imid_to_objects[2] = {"cat", "person"}
        self.coco_path = "coco_annotations"
        self.mscoco_objects = list(OFFICIAL.categories)
        self.inverse_synonym_dict = {"": ""} | dict(OFFICIAL.categories)
        self.double_word_dict = dict(DOUBLE_WORDS)


@pytest.fixture(params=range(pickle.HIGHEST_PROTOCOL + 1))
def chair_pickle(request, tmp_path, monkeypatch):
    """A scorer pickled the way `python chair.py` does it, in every protocol of pickle."""
    module = types.ModuleType("chair")
    scorer = type("CHAIR", (), {"__module__": "chair"})
    module.CHAIR = scorer
    monkeypatch.setitem(sys.modules, "chair", module)
    stored = scorer()
    stored.__dict__.update(CHAIR().__dict__)
    path = tmp_path / "chair.pkl"
    path.write_bytes(pickle.dumps(stored, protocol=request.param))
    return path


def test_pickle_gives_the_same_scores_as_annotations(folder, chair_pickle):
    (folder / "list.txt").write_text("1\n2\n3\n")
    where = dict(image_list=folder / "list.txt", chair_pickle=chair_pickle)
    captions = {1: "A dog, a teddy bear and a cat.", 2: "A motor bike and a bear.", 3: "Grass."}
    from_pickle, _ = score(read(folder, **where), captions)
    from_files, _ = score(read(folder), captions)
    assert from_pickle == from_files


def test_pickle_needs_an_image_list_and_the_right_images(folder, chair_pickle):
    with pytest.raises(LVLMError, match="give an image list too"):
        read(folder, chair_pickle=chair_pickle)
    with pytest.raises(LVLMError, match="none of the 1 images is in the chair.pkl"):
        read(folder, chair_pickle=chair_pickle, only=(9,))


class Reduced:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def dangerous(marker):
    """Pickles that would create `marker`, by different opcodes."""
    command = f"touch {marker}"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.dumps(Reduced(os.system, (command,)), protocol=protocol)
        yield pickle.dumps(
            {"imid_to_objects": Reduced(eval, (f"open({str(marker)!r}, 'w')",))}, protocol=protocol
        )
    yield b"(S'" + command.encode() + b"'\nios\nsystem\n."  # INST
    yield b"(cos\nsystem\nS'" + command.encode() + b"'\no."  # OBJ
    yield b"\x80\x02cbuiltins\ngetattr\ncbuiltins\n__import__\nX\x02\x00\x00\x00os\x85RX\x06\x00\x00\x00system\x86R."
    yield b"\x80\x04\x8c\x0echair.__init__\x8c\x05CHAIR\x93."
    yield b"\x80\x04\x8c\x05chair\x8c\x12CHAIR.__class__.mro\x93."  # attribute path in STACK_GLOBAL
    yield b"\x80\x02\x82\x01."  # EXT1
    yield b"\x80\x02X\x01\x00\x00\x00xQ."  # BINPERSID


def test_dangerous_pickles_are_refused(tmp_path):
    path, marker = tmp_path / "chair.pkl", tmp_path / "owned"
    refused = 0
    for content in dangerous(marker):
        path.write_bytes(content)
        with pytest.raises(LVLMError) as caught:
            read_chair_pickle(path)
        message = str(caught.value)
        assert "is refused" in message or "damaged" in message
        assert "\n" not in message
        refused += "is refused" in message
    assert not marker.exists()
    assert refused >= 15
    # The first of them is a working attack on a plain unpickler.
    pickle.loads(next(dangerous(marker)))
    assert marker.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04K\x01.", pickle.dumps({"a": 1}), b"\x80\x04]"])
def test_other_pickles_are_named_as_what_they_are(tmp_path, content):
    path = tmp_path / "chair.pkl"
    path.write_bytes(content)
    with pytest.raises(LVLMError, match="damaged or no pickle|holds no CHAIR scorer"):
        read_chair_pickle(path)


def test_scorers_class_does_not_leak_from_file_to_file(tmp_path):
    """BUILD with a slot state sets attributes on a class; the next file must not see them."""
    attack = b"\x80\x02cchair\nCHAIR\nq\x00N}X\x04\x00\x00\x00evilK\x01s\x86b."
    assert "BUILD" in [opcode.name for opcode, _, _ in pickletools.genops(attack)]
    path = tmp_path / "chair.pkl"
    path.write_bytes(attack)
    with pytest.raises(LVLMError, match="holds no CHAIR scorer"):
        read_chair_pickle(path)


def test_captions_of_images_in_no_order(folder):
    captions = [{"image_id": 2, "caption": "cat"}, {"image_id": 1, "caption": "dog"}]
    path = write_lines(folder / "c.jsonl", captions)
    data = Data(folder, synonyms=folder / "synonyms.txt")
    found = rescore(get("chair/opera-512"), data, [str(path)], resamples=10)
    assert found["figures"]["C_S"]["value"] == 0.0
    assert found["record"]["questions"] == 2
