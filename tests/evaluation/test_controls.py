"""Controls beside a method: each does one thing, and the words follow from the intervals."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from lvlm_jax import methods
from lvlm_jax.cli import evaluate
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import BENCHMARKS, Data, Question, controls, get
from lvlm_jax.evaluation.controls import Answered, PlausibilityCut
from lvlm_jax.evaluation.engine import Work
from lvlm_jax.evaluation.run import Options, Run
from lvlm_jax.methods import Readout
from lvlm_jax.pocket.splits import write_split
from tests import small
from tests.evaluation.builders import coco_folder
from tests.evaluation.fakes import NO, YES, Oracle, tokenizer

ROOT = Path(__file__).resolve().parents[2]


def yes_no(labels, group="random", start=0):
    """One question for each label ("y" or "n"), two about each image."""
    return [
        Question(start + i, (Path(f"{i // 2}.jpg"),), f"Is it {i}?", {"y": "yes", "n": "no"}[label], group)
        for i, label in enumerate(labels)
    ]


# The plausibility cut


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_the_cut_keeps_what_is_nearly_as_likely_as_the_best(beta):
    logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 3
    cut = jax.jit(lambda method, main: method.combine(Readout(main, None, None, ()), ())[0])
    combined = cut(PlausibilityCut(beta), jnp.asarray(logits))
    probabilities = torch.tensor(logits).softmax(dim=-1).numpy()
    kept = probabilities >= beta * probabilities.max(axis=1, keepdims=True) * (1 - 1e-6)
    np.testing.assert_array_equal(np.asarray(combined), np.where(kept, logits, -np.inf))


def test_the_cut_is_drawn_from_and_is_no_method_of_the_registry(model):
    assert not any("cut" in name or "plausib" in name for name in methods.names())
    conversations = [small.conversation("Is it so?", seed=1)] * 40
    _, step = model.prefill(conversations, PlausibilityCut(0.01))
    allowed = {int(token) for token in np.flatnonzero(np.isfinite(np.asarray(step.combined)[0]))}
    assert 1 < len(allowed) < 50
    drawn = model.generate(conversations, PlausibilityCut(0.01), 1, temperature=1.0, seed=list(range(40)))
    assert 1 < len({tokens[0] for tokens in drawn.tokens})
    assert {tokens[0] for tokens in drawn.tokens} <= allowed


@pytest.mark.parametrize(
    ("method", "beta"),
    [
        (methods.CMAC(beta=0.25), 0.25),
        (methods.VCD.preset("pope"), 0.2),
        (methods.EAH(beta=0.018), 0.1),  # another β
        (methods.chain(methods.EAH(beta=0.018), methods.CMAC(beta=0.3)), 0.3),
        (methods.VISTA(), 0.1),
    ],
    ids=lambda value: getattr(value, "label", value),
)
def test_the_cut_is_the_methods_own(method, beta):
    assert controls.own_cut(method) == beta
    by_name = {one.name: one for one in controls.decodings(get("pope/vcd"), method)}
    assert by_name["plausibility"].method.beta == np.float32(beta)
    assert by_name["plausibility"].folder == f"plausibility-{beta:g}"
    assert [one.protocol.temperature for one in by_name.values()] == [0.0, 1.0, 1.0, 0.0, 1.0]
    question = Question(1, (), "Is it so?", "yes", "random")
    for name in ("pba", "pba-sampled"):
        own = get("pope/vcd").prompt(question)
        assert (
            by_name[name].yes_no and by_name[name].protocol.prompt(question) == own + " Answer yes whenever possible."
        )
    assert by_name["greedy"].method is by_name["temperature"].method is None


# The yes/no threshold


def test_first_tokens_of_yes_and_no():
    assert controls.answer_words(tokenizer) == ([YES], [NO])
    # Single bytes: only the first pieces tell the words apart, and the blank before both does not.
    processor = small.build_processor()
    yes, no = controls.answer_words(processor.tokenizer)
    assert [processor.tokenizer.decode([token]) for token in yes] == ["Y", "y"]
    assert [processor.tokenizer.decode([token]) for token in no] == ["N", "n"]
    with pytest.raises(LVLMError, match="gives yes and no the same first token"):
        controls.answer_words(lambda text, add_special_tokens: {"input_ids": [7, 8]})


def test_log_odds_are_those_of_transformers(model, torch_model, tmp_path):
    """And do not depend on the batch, nor are they computed twice."""
    questions = []
    for number, text in enumerate(["Is it so?", "Is it?", "So it is, is it not?"]):
        picture = small.conversation(text, seed=number)[0]["content"][0]["image"]
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        questions.append(Question(number, (tmp_path / f"{number}.png",), text, "yes", "random"))
    protocol = dataclasses.replace(get("pope/strict"), suffix="")
    work = Work(batch_size=2, folder=tmp_path / "out", record={"who": "small"})
    found = controls.log_odds(model, questions, protocol, work)
    yes, no = controls.answer_words(model.processor.tokenizer)
    for question in questions:
        text = model.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}],
            add_generation_prompt=True,
        )
        arrays = model.processor(images=Image.open(question.images[0]), text=text, return_tensors="pt")
        with torch.no_grad():
            logits = torch_model(**arrays).logits[0, -1].double()
        expected = torch.logsumexp(logits[yes], 0) - torch.logsumexp(logits[no], 0)
        assert found[question.key] == pytest.approx(float(expected), abs=1e-3)
        rows = [json.loads(line) for line in (tmp_path / "out" / "odds.0.jsonl").read_text().splitlines()]
        row = next(row for row in rows if row.get("id") == str(question.id))
        chances = torch.softmax(logits, 0)
        assert row["yes"] == pytest.approx(float(chances[yes].sum()), abs=1e-4)
        assert row["no"] == pytest.approx(float(chances[no].sum()), abs=1e-4)
    assert controls.log_odds(SimpleNamespace(processor=model.processor), questions, protocol, work) == found


def test_log_odds_of_logits_that_are_not_finite_are_refused(model):
    broken = SimpleNamespace(
        processor=model.processor,
        config=model.config,
        encode_images=None,
        prefill=lambda messages: (None, SimpleNamespace(combined=np.full((len(messages), 300), np.nan))),
    )
    with pytest.raises(LVLMError, match="first answer token are not finite"):
        controls.log_odds(broken, [Question(1, (), "Is it so?", "yes", "random")], get("pope/strict"))


def test_the_threshold_gives_the_share_asked_for():
    generator = np.random.default_rng(1)
    for _ in range(50):
        odds = np.round(generator.normal(size=generator.integers(1, 12)), 1)  # ties occur
        wanted = int(generator.integers(0, len(odds) + 1))
        threshold = controls.fitted_threshold(odds, wanted)
        possible = {int((odds > level).sum()) for level in [*odds, odds.min() - 1]}
        assert abs((odds > threshold).sum() - wanted) == min(abs(count - wanted) for count in possible)
    assert (np.array([0.3, 2.0, -1.0]) > controls.fitted_threshold([0.3, 2.0, -1.0], 0)).sum() == 0
    assert controls.fitted_threshold([0.0, 1.0, 3.0], 1) == 2.0


def test_each_group_has_a_threshold_of_its_own():
    questions = yes_no("yynn") + yes_no("ynyn", "popular")
    keys = [q.key for q in questions]
    said = dict(zip(keys, ["Yes", "Yes", "Yes", "No", "Yes", "no way", "maybe", "No"], strict=True))
    odds = dict(zip(keys, [4, 1, 3, 2, -1, -2, -3, -4], strict=True))
    texts, thresholds = controls.thresholded(questions, odds, said, get("pope/strict"))
    assert list(texts.values()) == ["Yes", "No", "Yes", "Yes", "Yes", "No", "No", "No"]
    assert thresholds == {"random": 1.5, "popular": -1.5}


def test_olm_says_yes_where_yes_and_no_are_near():
    chances = {"near": (0.2, 0.4), "far": (0.1, 0.7), "unsure": (0.1, 0.1), "edge": (0.25, 0.75), "yes": (0.9, 0.1)}
    texts = dict.fromkeys(chances, "no")
    assert controls.near_to_yes(chances, texts) == texts | {"near": "Yes"}


# Captions of the same length


def test_greedy_captions_are_cut_to_the_words_of_the_others():
    greedy = "A dog sits. A cat sleeps near a chair."
    assert controls.length_matched(greedy, "One two three four") == "A dog sits. A"
    assert controls.length_matched(greedy, "word " * 20) == greedy
    assert controls.length_matched(greedy, "") == ""
    # Under "sentence" the unfinished end of both does not count.
    assert controls.length_matched(greedy, "One two three. Four", "sentence") == "A dog sits."
    assert controls.length_matched(greedy + " And a", "word " * 20 + ".", "sentence") == greedy


def test_chair_at_equal_length(tmp_path):
    """The method says less: it is better than greedy, and not than greedy cut to its length."""
    images = range(1, 31)
    folder = coco_folder(tmp_path, {i: ["dog"] for i in images}, {i: ["A dog."] for i in images})
    protocol = get("chair/512")
    questions = BENCHMARKS["chair"].read(Data(folder, synonyms=folder / "synonyms.txt"), protocol)
    short = {q.key: "There is a dog." for q in questions}
    greedy = {q.key: "There is a dog. And a cat." for q in questions}
    answered = Answered({name: greedy for name in ("greedy", "temperature", "plausibility")}, {})
    found = controls.report(BENCHMARKS["chair"], questions, short, protocol, answered, 50)
    assert set(found) == {"greedy", "temperature", "plausibility", "length"}
    assert found["greedy"]["verdicts"] == {"C_S": "significantly better"}
    assert found["greedy"]["words"] == (
        "The method is significantly better than greedy decoding on C_S: 0.0 against 100.0, difference -100.0 "
        "(95 % interval -100.0 to -100.0; 30 questions, 30 images)."
    )
    length = found["length"]
    assert length["verdicts"] == {"C_S": "no difference shown"}
    few = controls.report(BENCHMARKS["chair"], questions[:29], short, protocol, answered, 50)["greedy"]
    assert few["verdicts"] == {"C_S": "no verdict below 30 questions"} and few["images"] == 29
    assert few["words"].startswith("No verdict below 30 questions: the method against greedy decoding on C_S: 0.0 ")
    assert length["figures"]["C_S"]["value"] == 0.0 and length["figures"]["words"]["value"] == 4.0
    assert length["shorter_than_the_method"] == 0
    worse = controls.report(BENCHMARKS["chair"], questions, greedy, protocol, dataclasses.replace(
        answered, texts=dict.fromkeys(answered.texts, short)), 50)  # fmt: skip
    assert worse["greedy"]["verdicts"] == {"C_S": "significantly worse"}
    assert worse["length"]["shorter_than_the_method"] == 30


# The report


def test_a_method_that_only_says_yes_more_often_is_found_out():
    """Greedy says no too often but orders the questions rightly; the method moves the threshold, no more."""
    labels = "yn" * 40
    questions = yes_no(labels)
    generator = np.random.default_rng(0)
    odds = {q.key: (1.0 if q.label == "yes" else -1.0) + generator.normal() * 0.5 - 1.0 for q in questions}
    greedy = {key: "Yes" if value > 0 else "No" for key, value in odds.items()}
    method = {key: "Yes." if value > -1.0 else "No." for key, value in odds.items()}
    drawn = {q.key: ("Yes", "No")[int(generator.integers(2))] for q in questions}
    chances = {key: (1 / (1 + np.exp(-value)), 1 / (1 + np.exp(value))) for key, value in odds.items()}
    said = {"greedy": greedy, "temperature": drawn, "plausibility": method, "pba": method}
    answered = Answered(said, odds, chances)
    found = controls.report(BENCHMARKS["pope"], questions, method, get("pope/strict"), answered, 300)
    verdicts = {name: one["verdicts"]["random: accuracy"] for name, one in found.items()}
    assert verdicts == dict.fromkeys(("greedy", "temperature", "olm-sampled"), "significantly better") | dict.fromkeys(
        ("plausibility", "threshold", "olm", "pba"), "no difference shown"
    )
    # |p(yes) - p(no)| < 1/2 where the log-odds lie between -ln 3 and ln 3, so OLM is a threshold at -ln 3.
    texts = {key: "Yes" if value > -np.log(3) else "No" for key, value in odds.items()}
    own = BENCHMARKS["pope"].score(questions, texts, get("pope/strict")).values()
    assert found["olm"]["figures"]["random: accuracy"]["value"] == pytest.approx(own["random: accuracy"], abs=1e-6)
    # Logs from before OLM have no probabilities.
    older = controls.report(BENCHMARKS["pope"], questions, method, get("pope/strict"), Answered(said, odds), 300)
    assert older == {name: one for name, one in found.items() if "olm" not in name}
    threshold = found["threshold"]
    right = sum(method[q.key].startswith(q.label.capitalize()) for q in questions)
    assert threshold["figures"]["random: accuracy"]["value"] == pytest.approx(right / 80)
    assert threshold["figures"]["random: F1"]["n"] == 80
    assert threshold["against"]["differences"]["random: yes ratio"]["value"] == 0.0
    assert threshold["against"]["mcnemar"] == {"only_first_right": 0, "only_second_right": 0, "p": 1.0}
    json.dumps(found)


# A whole run

FOR_YES = ["olm", "olm-sampled", "pba", "pba-sampled"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pocket") / "world"
    write_split(folder, "test", 12)
    return folder


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("pope/vcd", ["threshold", *FOR_YES]),
        ("mme/hallucination", ["threshold", *FOR_YES]),
        ("chair/64-sentence", ["length"]),
    ],
)
def test_controls_stand_in_the_scores(world, tmp_path, name, kinds):
    oracle = Oracle(caption="A dog on a chair. A cat." if name.startswith("chair") else "")
    options = Options(8, controls=tmp_path / "controls", resamples=20)
    run = Run("oracle", "float32", get(name), Data(world), tmp_path / "vcd", methods.VCD(), options)
    assert not run.complete() and run.score() is None
    run.ask(oracle)
    found = run.score()
    assert list(found["controls"]) == ["greedy", "temperature", "plausibility", *kinds]
    for control in found["controls"].values():
        assert "the method " in control["words"].lower() and control["figures"]
        assert set(control["against"]) == {"differences", "mcnemar"}
    assert json.loads((tmp_path / "vcd" / "scores.json").read_text())["controls"] == found["controls"]
    # Another method shares what does not depend on it, a finished run asks nothing, and no control is in the way.
    before = oracle.asked
    other = Run("oracle", "float32", get(name), Data(world), tmp_path / "icd", methods.ICD(), options)
    other.ask(oracle)
    once = oracle.asked - before
    assert other.complete() and once < before
    other.ask(oracle)
    assert oracle.asked - before == once
    if "olm" in kinds:  # a folder from before OLM
        log = tmp_path / "controls" / "greedy" / "odds.0.jsonl"
        log.write_text(re.sub(r', "yes": [^,}]+, "no": [^,}]+', "", log.read_text()))
        assert other.complete() and not {"olm", "olm-sampled"} & set(other.score()["controls"])


def test_what_controls_are_asked_of(world, tmp_path):
    with pytest.raises(LVLMError, match="controls run beside a method, and there is none"):
        Run("oracle", "float32", get("pope"), Data(world), tmp_path, None, Options(controls=tmp_path))
    with pytest.raises(LVLMError, match="are about a model that answers"):
        evaluate.main(["--protocol", "pope", "--data", str(world), "--rescore", "a.jsonl", "--controls"])


def test_from_the_command_line(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.LVLM, "from_pretrained", lambda *_, **__: Oracle())
    words = ["--protocol", "pope/pocket", "--data", str(world), "--model", "pocket", "--method", "vcd", "--alpha", "2",
             "--out", str(tmp_path / "out"), "--resamples", "20", "--controls"]  # fmt: skip
    assert evaluate.main(words) == 0
    out = capsys.readouterr().out
    assert out.lower().count("the method ") == 8 and "greedy decoding on mean: accuracy" in out
    assert (tmp_path / "out" / "controls" / "greedy" / "odds.0.jsonl").is_file()
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert found["cost"]["tokens"] == 4.0 and found["record"]["method"]["alpha"] == 2.0
    monkeypatch.setattr(evaluate.LVLM, "from_pretrained", None)
    assert evaluate.main(words) == 0  # all is there: no model is loaded
