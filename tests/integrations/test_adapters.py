"""Adapters for lmms-eval and VLMEvalKit, against stand-ins that follow their documented contracts, and the real one."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvlm_jax import LVLM, methods
from lvlm_jax import integrations as adapters
from lvlm_jax.evaluation import engine, get
from lvlm_jax.generation.questions import conversation
from lvlm_jax.generation.settings import Decoding
from lvlm_jax.pocket.scenes import render, scene_at
from lvlm_jax.pocket.splits import write_split
from tests.evaluation.builders import read, scored
from tests.integrations import stand_ins
from tests.integrations.stand_ins import Bigrams, Recording, Request, adapter, independent
from tests.refusals import refused

REPOSITORY = Path(__file__).resolve().parents[2]
SUFFIX = "\nAnswer the question using a single word or phrase."
DOG, BOTH = f"Is there a dog in the image?{SUFFIX}", f"Is there a cup in both images?{SUFFIX}"


@pytest.fixture(scope="module")
def lmms_eval():
    yield from adapter(stand_ins.of_lmms_eval(), "lmms_eval")


@pytest.fixture(scope="module")
def vlmevalkit():
    yield from adapter(stand_ins.of_vlmevalkit(), "vlmevalkit")


@pytest.fixture(scope="module")
def pocket():
    return LVLM.from_pretrained("pocket")


@pytest.fixture(scope="module")
def pictures():
    return [Image.fromarray(render(scene_at("test", index))) for index in range(3)]


@pytest.fixture(scope="module")
def documents(pictures):
    """One picture, two pictures, none."""
    return [{"pictures": pictures[:1]}, {"pictures": pictures[1:]}, {"pictures": None}]


@pytest.fixture(scope="module")
def questions(pictures):
    """(document, text, conversation): one batch of all kinds, so that tests share its programs."""
    between = "First <image> then <image>. How many of the images show a dog?"
    return [
        (1, BOTH, conversation(pictures[1:], BOTH)),
        (0, DOG, conversation(pictures[:1], DOG)),
        (1, between, conversation(pictures[1:], between)),
        (2, "Hello", conversation([], "Hello")),
    ]


@pytest.fixture(scope="module")
def said(pocket, questions):
    """What the model itself answers to them."""
    return pocket.generate([messages for *_, messages in questions], max_new_tokens=6)


def visuals(document):
    return document["pictures"]


def ready(module, documents, model, **settings):
    """The adapter around `model`, with a task loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load", lambda pretrained, dtype: model)
        made = module.LVLMJax(pretrained="pocket", **settings)
    made.task_dict = {"task": {"test": documents}}
    return made


@pytest.fixture
def recorded(lmms_eval, documents):
    """recorded(**settings): the adapter, and the `Recording` that it asks."""

    def build(**settings):
        model = Recording()
        return ready(lmms_eval, documents, model, **settings), model

    return build


def hooked(made):
    """What the adapter gave to lmms-eval's cache: (name, request, answer)."""
    return [call.args for call in made.cache_hook.add_partial.call_args_list]


def ask(text, settings, document=0):
    """A request to generate, with its settings, or to score a continuation."""
    return Request((text, settings, visuals, document, "task", "test"))


def ends_with(answer):
    """The continuation, as a function of the document."""
    return lambda _: answer


def test_entry_point_leads_to_the_model(lmms_eval):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["lvlm_jax"].partition(":")
    manifest = getattr(importlib.import_module(module), name)()
    assert manifest.model_id == "lvlm_jax"
    module, _, name = manifest.simple_class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    base = sys.modules["lmms_eval.api.model"].lmms
    assert issubclass(found, base) and found.is_simple and not found.__abstractmethods__


def test_answers_are_those_of_generate(lmms_eval, documents, questions, said):
    made = lmms_eval.LVLMJax(pretrained="pocket", batch_size=4)
    made.task_dict = {"task": {"test": documents}}
    settings = {"max_new_tokens": 6, "temperature": 0, "top_p": 0, "do_sample": False, "num_beams": 1}
    requests = [ask(text, settings, document) for document, text, _ in questions]
    assert made.generate_until(requests) == said.text and len(set(said.text)) > 2
    assert (made.rank, made.world_size) == (0, 1)

    word = said.text[3].split()[1]
    for until in (word, [word, "never"]):
        requests = [ask(text, settings | {"until": until}, document) for document, text, _ in questions]
        cut = [text.partition(word)[0] for text in said.text]
        assert made.generate_until(requests) == cut != said.text


def test_batches_are_of_alike_settings_and_lengths(recorded):
    made, model = recorded(batch_size=2)
    few, many = {"max_new_tokens": 4, "until": "."}, {"max_new_tokens": 4.0, "until": ["."], "temperature": 0}
    texts = ["ccc", "a", "<image> b", "eeeee", "bb", "dddd", "other"]
    requests = [ask(text, many if index % 2 else few) for index, text in enumerate(texts[:-1])]
    requests.append(ask("other", {"max_new_tokens": 5}))
    answers = made.generate_until(requests)
    assert model.texts() == [["a", "bb"], ["ccc", "dddd"], ["eeeee", "b"], ["other"]]
    assert answers == ["2", "0", "5", "4", "1", "3", "6"]
    for _, options in model.calls[:3]:
        same = Decoding(temperature=0.0, stop=(".",), max_new_tokens=4, seed=options["seed"])
        assert options == {"method": None} | vars(same)
    assert model.calls[3][1]["max_new_tokens"] == 5 and model.calls[3][1]["stop"] == ()
    assert ("generate_until", ("a", many), "0") in hooked(made) and len(hooked(made)) == 7
    model.calls.clear()
    made.generate_until([ask(text, few) for text in ("a", "b", "c")])
    assert model.texts() == [["a", "b"], ["c", "c"]]  # the last batch keeps the shape of those before


def test_sampling_depends_on_the_document_alone(recorded):
    def seeds(numbers, **settings):
        made, model = recorded(**settings)
        made.generate_until([ask(f"question {n}", {"temperature": 1.0, "do_sample": True}, n) for n in numbers])
        given = [seed for _, options in model.calls for seed in options["seed"]]
        return dict(zip([text for batch in model.texts() for text in batch], given, strict=True)), given

    first, _ = seeds([0, 1, 2], batch_size=3)
    assert first == seeds([2, 1, 0], batch_size=1)[0] and len(set(first.values())) == 3
    assert not set(first.values()) & set(seeds([0, 1, 2], seed=1)[1])
    repeated = seeds([0, 0, 0])[1]
    assert repeated[0] == first["question 0"] and len(set(repeated)) == 3


def test_settings_that_mean_nothing_here_are_named_once(recorded):
    made, model = recorded()
    request = ask(DOG, {"max_new_tokens": 1, "image_aspect_ratio": "pad"})
    with pytest.warns(UserWarning, match="does not use the generation settings image_aspect_ratio"):
        made.generate_until([request])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.generate_until([request])
    assert model.calls[0][1] == model.calls[1][1] and "image_aspect_ratio" not in model.calls[0][1]


def test_rounds_go_on_until_the_task_says_so(recorded, pictures, documents):
    """The second document has two rounds more than the first; its rounds show another picture, or none."""
    (made, model), seen = recorded(batch_size=2), []

    def next_round(document, previous_output, round_idx, previous_round_info):
        number = documents.index(document)
        seen.append((number, round_idx, tuple(previous_output), previous_round_info))
        shown = [pictures[0]] if round_idx == 1 else None
        return shown, f"round {round_idx}", round_idx > 2 * number, previous_output, f"after {round_idx}"

    requests = [Request((DOG, {}, visuals, next_round, number, "task", "test")) for number in range(2)]
    assert made.generate_until_multi_round(requests) == [["0"], ["1", "2", "3"]]
    assert model.texts() == [[DOG, DOG], ["round 1"], ["round 2"]]
    counts = [[len(one[0]["content"]) - 1 for one in messages] for messages, _ in model.calls]
    assert counts == [[1, 2], [1], [0]]
    second = [(1, 1, ("1",), None), (1, 2, ("1", "2"), "after 1"), (1, 3, ("1", "2", "3"), "after 2")]
    assert seen == [(0, 1, ("0",), None), *second]
    found = [(name, answers) for name, _, answers in hooked(made)]
    assert found == [("generate_until_multi_round", answers) for answers in (["0"], ["1", "2", "3"])]


def test_loglikelihood_is_that_of_an_independent_computation(lmms_eval, pocket, pictures, documents, said):
    greedy = said.text[1]
    cases = [
        (pictures[:1], DOG, "There is a dog on the left."),
        (pictures[:1], DOG, greedy),
        (pictures[1:], BOTH, {"Yes": "No", "No": "Yes"}[said.text[0]]),
        ([], "", "Yes"),
    ]
    expected = independent(pocket, cases)
    assert [best for *_, best in expected] == [False, True, False, False]
    requests = [ask(text, f" {answer}", int(len(images) == 2)) for images, text, answer in cases[:3]]
    requests.append(Request(("", "Yes")))  # a choice by itself comes without a document
    made = ready(lmms_eval, documents, pocket, batch_size=4)
    with pytest.warns(UserWarning, match="lowest value"):
        found = made.loglikelihood(requests)
    np.testing.assert_allclose([value for value, _ in found], [total for total, *_ in expected], rtol=0, atol=2e-4)
    assert [best for _, best in found] == [best for *_, best in expected]
    assert ("loglikelihood", (DOG, greedy), found[1]) in hooked(made)

    # The same as functions of the document, and as the loss that lmms-eval's own models return.
    made = ready(lmms_eval, documents, pocket, batch_size=4, likelihood="loss")
    computed = [ask(text, ends_with(answer), int(len(images) == 2)) for images, text, answer in cases[:3]]
    losses = [loss for loss, _ in made.loglikelihood([*computed, requests[3]])]
    np.testing.assert_allclose(losses, [-total / count for total, count, _ in expected], rtol=0, atol=2e-4)


def test_with_a_method_each_token_is_scored_by_the_step_that_would_choose_it(lmms_eval, pocket, documents):
    model = Bigrams(pocket)
    made = ready(lmms_eval, documents, model, batch_size=3, method="cmac")
    answers = ["Yes", "There is a dog on the left.", "A cup"]
    requests = [ask(DOG, ends_with(answer)) for answer in answers]
    expected, paths = [], []
    for answer in answers:
        ends = (f"{DOG} ASSISTANT:{end}" for end in ("", f" {answer}"))
        before, whole = (pocket.processor.tokenizer(text)["input_ids"] for text in ends)
        assert whole[: len(before)] == before
        path = np.array(whole[len(before) - 1 :])
        rows = model.table[path[:-1]]
        expected.append((rows[np.arange(len(rows)), path[1:]] - np.log(np.exp(rows).sum(axis=-1))).sum())
        paths.append(path)
    found = made.loglikelihood(requests)
    np.testing.assert_allclose([value for value, _ in found], expected, rtol=1e-5)
    assert not any(best for _, best in found)
    # Make the second answer what greedy decoding writes: each of its tokens the best after the one before.
    assert len(set(paths[1].tolist())) == len(paths[1])
    model.table[paths[1][:-1], paths[1][1:]] = 99.0
    model.table[paths[2][-2], paths[2][-1]] = -np.inf  # below the cut of plausible tokens
    found = made.loglikelihood(requests)
    assert [best for _, best in found] == [False, True, False] and found[2][0] == -np.inf


def test_model_arguments(lmms_eval):
    """They take precedence over flags; a fault in one is reported in one line."""
    created = lmms_eval.LVLMJax.create_from_arg_string
    words = "pretrained=pocket,method=vcd+middle_layers,vcd_seed=3,layers=[2,3],batch_size=4,seed=7"
    made = created(words, {"batch_size": 1, "max_batch_size": None})
    assert (made.batch_size, made.seed) == (4, 7)
    vcd, middle = made.method.members
    assert vcd.seed == 3 and tuple(middle.layers) == (2, 3)
    for given, message in (
        ("pretrained", r"expected key=value,key=value"),
        ("method=cmac", r"no model is named; give pretrained="),
        ("pretrained=/nowhere/at/all", r"/nowhere/at/all"),
        ("pretrained=pocket,dtype=int8", r"dtype 'int8' is not supported"),
        ("pretrained=pocket,method=magic", r"there is no method 'magic'"),
        ("pretrained=pocket,alpha=3", r"alpha is not a setting of the adapter or of method none; .*batch_size"),
        ("pretrained=pocket,method=cmac,device=cuda", r"device is not a setting .*, alpha, beta, gamma"),
        ("pretrained=pocket,method=cmac,alpha=much", r"invalid float value: 'much'"),
        ("pretrained=pocket,method=cmac,beta=2", r"CMAC: beta is 2.0; expected a number in \[0, 1\]"),
        ("pretrained=pocket,batch_size=auto", r"batch_size is 'auto'; expected a whole number from 1"),
        ("pretrained=pocket,batch_size=0", r"batch_size is 0; expected"),
        ("pretrained=pocket,seed=-1", r"seed is -1.0; expected a whole number from 0"),
        ("pretrained=pocket,likelihood=high", r"likelihood is 'high'; expected one of logprob, loss"),
    ):
        refused(message, created, given, {"batch_size": 1, "device": None})


def test_bad_requests_are_one_clear_line(lmms_eval, pocket, documents):
    made = ready(lmms_eval, documents, pocket)
    for request, message in (
        (ask(DOG, {"temperature": "hot"}), "temperature is 'hot'; expected 0, or a number"),
        (ask(DOG, {"max_new_tokens": 0}), "max_new_tokens is 0"),
        (ask("<image> <image> Same?", {}), "2 <image> placeholders but 1 images"),
        (Request((DOG, {}, lambda _: [7], 0, "task", "test")), r"given as int; expected a path, a PIL image"),
    ):
        refused(message, made.generate_until, [request])
    refused("continuation is empty", made.loglikelihood, [ask(DOG, ends_with(" "))])
    searching = ready(lmms_eval, documents, pocket, method="opera")
    refused("OPERA is a search", searching.loglikelihood, [ask(DOG, "Yes")])


def test_settings_of_a_generation():
    for given, expected in (
        ({}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"temperature": 0.7, "do_sample": False, "top_k": 5}, {"temperature": 0.0}),
        ({"do_sample": True, "top_k": 5.0}, {"temperature": 1.0, "top_k": 5}),
        ({"do_sample": True, "temperature": 0, "top_p": 0}, {"temperature": 0}),
        ({"max_new_tokens": 8, "top_p": None, "num_beams": 3},
         {"max_new_tokens": 8, "num_beams": 3, "temperature": 0.0}),
    ):  # fmt: skip
        assert adapters.decoding(given, 64) == Decoding(**{"max_new_tokens": 64} | expected)


def test_vlmevalkit_keeps_pictures_and_text_in_their_order(vlmevalkit, pocket, pictures, questions, tmp_path):
    paths = [str(tmp_path / f"{index}.png") for index in range(2)]
    for path, picture in zip(paths, pictures, strict=False):
        picture.save(path)
    parts = [("text", "First "), ("image", paths[0]), ("text", "then "), ("image", paths[1]), ("text", BOTH)]
    message = [{"type": kind, "value": value} for kind, value in parts]
    expected = [{"role": "user", "content": [{"type": kind, kind: value} for kind, value in parts]}]
    others = [messages for *_, messages in questions[1:]]

    class InCompany(Recording):
        """The pocket model, asked together with the questions whose program is compiled already."""

        def generate(self, messages, **options):
            super().generate(messages, **options)
            return pocket.generate([*messages, *others], **options | {"seed": 0})

    made = vlmevalkit.LVLMJax("pocket", max_new_tokens=6, do_sample=False, temperature=0, top_p=None)
    made.model = InCompany()
    answer = made.generate(message, dataset="POPE")
    assert made.model.calls[0][0] == [expected]
    assert answer == pocket.generate([expected, *others], max_new_tokens=6).text[0] != ""
    base = sys.modules["vlmeval.vlm.base"].BaseModel
    assert isinstance(made, base) and made.INTERLEAVE and not made.INSTALL_REQ


def test_vlmevalkit_draws_alike_wherever_the_pictures_lie(vlmevalkit):
    made = vlmevalkit.LVLMJax("pocket", do_sample=True)
    made.model = Recording()
    for folder, text in (("/a/LMUData/images/POPE", DOG), ("/b/data", DOG), ("/b/data", BOTH)):
        made.generate([{"type": "image", "value": f"{folder}/7.jpg"}, {"type": "text", "value": text}], "POPE")
    first, moved, other = (options["seed"] for _, options in made.model.calls)
    assert first == moved != other


def test_vlmevalkit_passes_methods_and_settings_on(vlmevalkit):
    made = vlmevalkit.LVLMJax("pocket", method="cmac", alpha=1.0, imd=False, gamma=None, stop=["."], num_beams=2)
    assert made.method == methods.CMAC(alpha=1.0, imd=False)
    assert made.decoding == Decoding(max_new_tokens=512, num_beams=2, temperature=0.0, stop=["."])
    message = "use_vllm is not a setting of the adapter or of method none"
    refused(message, vlmevalkit.LVLMJax, "pocket", use_vllm=True)
    refused("type 'video'; expected", made.generate_inner, [{"type": "video", "value": "a.mp4"}])
    refused("the message is empty", made.generate_inner, [])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_lmms_eval_itself_gives_our_score(pocket, tmp_path):
    """The task of the documentation, asked by lmms-eval through the entry point and by our own engine."""
    folder = tmp_path / "data"
    write_split(folder, "test", 14)
    text = (REPOSITORY / "docs" / "adapters.md").read_text()
    files = dict(re.findall(r"```(?:yaml|python)\n# (\S+)\n(.*?)```", text, re.DOTALL))
    assert set(files) == {"pope_local.yaml", "local.py"}
    for name, text in files.items():
        (folder / name).write_text(text)
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "lvlm_jax", "--model_args", "pretrained=pocket,dtype=float32",
        "--tasks", "pope_local", "--batch_size", "12", "--include_path", str(folder),
        "--output_path", str(tmp_path / "out"), "--log_samples",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    subprocess.run(command, check=True, env=os.environ | offline, cwd=folder)
    (results,) = (tmp_path / "out").rglob("*_results.json")
    theirs = json.loads(results.read_text())["results"]["pope_local"]

    protocol = get("pope/lmms-eval")
    questions = read(protocol.name, folder, need_images=True, groups=("random",))
    answers = {key: one.text for key, one in engine.ask(pocket, questions, protocol).items()}
    ours, _ = scored(protocol.name, questions, answers)
    assert len(questions) == 60
    for name in ("accuracy", "precision", "recall", "f1_score"):
        figure = "F1" if name == "f1_score" else name
        assert theirs[f"pope_{name},none"] == pytest.approx(ours[f"random: {figure}"], abs=1e-9)
    (samples,) = (tmp_path / "out").rglob("*_samples_pope_local.jsonl")
    rows = [json.loads(line)["pope_accuracy"] for line in samples.read_text().splitlines()]
    asked = {("random", str(row["question_id"])): row["prediction"] for row in rows}
    assert asked == {key: text.lower() for key, text in answers.items()}
