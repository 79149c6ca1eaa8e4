"""Controls beside a method: each changes one thing, and the verdicts follow from the intervals."""

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
from lvlm_jax.evaluation import BENCHMARKS, Data, Question, controls, get
from lvlm_jax.evaluation.controls import ControlAnswers, PlausibilityCut
from lvlm_jax.evaluation.engine import Work
from lvlm_jax.evaluation.run import Options, Run
from lvlm_jax.methods import Readout
from tests import small
from tests.evaluation.builders import coco_folder, read, scored
from tests.evaluation.fakes import NO, YES, Oracle, tokenizer
from tests.refusals import refused


def yes_no(labels, group="random"):
    """One question for each label ("y" or "n"), two about each image."""
    words = [{"y": "yes", "n": "no"}[label] for label in labels]
    return [Question(i, (Path(f"{i // 2}.jpg"),), f"Is it {i}?", word, group) for i, word in enumerate(words)]


# The plausibility cut


def test_the_cut_keeps_what_is_nearly_as_likely_as_the_best(model):
    logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 3
    cut = jax.jit(lambda method, main: method.combine(Readout(main, None, None, ()), ())[0])
    probabilities = torch.tensor(logits).softmax(dim=-1).numpy()
    for beta in (0.0, 0.1, 0.5, 1.0):
        kept = probabilities >= beta * probabilities.max(axis=1, keepdims=True) * (1 - 1e-6)
        combined = cut(PlausibilityCut(beta), jnp.asarray(logits))
        np.testing.assert_array_equal(np.asarray(combined), np.where(kept, logits, -np.inf))
    # It is drawn from, and is no method of the registry.
    assert not any("cut" in name or "plausib" in name for name in methods.names())
    conversations = [small.conversation("Is it so?", seed=1)] * 40
    _, step = model.prefill(conversations, PlausibilityCut(0.01))
    allowed = {int(token) for token in np.flatnonzero(np.isfinite(np.asarray(step.combined)[0]))}
    drawn = model.generate(conversations, PlausibilityCut(0.01), 1, temperature=1.0, seed=list(range(40)))
    found = {tokens[0] for tokens in drawn.tokens}
    assert 1 < len(allowed) < 50 and 1 < len(found) and found <= allowed


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
    assert by_name["greedy"].method is by_name["temperature"].method is None
    question = Question(1, (), "Is it so?", "yes", "random")
    asked = get("pope/vcd").prompt(question) + " Answer yes whenever possible."
    for one in (by_name["pba"], by_name["pba-sampled"]):
        assert one.yes_no and one.protocol.prompt(question) == asked


# The yes/no threshold


def test_first_tokens_of_yes_and_no():
    assert controls.answer_words(tokenizer) == ([YES], [NO])
    # Single bytes: only the first pieces tell the words apart, and the blank before both does not.
    processor = small.build_processor()
    found = [list(map(processor.tokenizer.decode, tokens)) for tokens in controls.answer_words(processor.tokenizer)]
    assert found == [["Y", "y"], ["N", "n"]]
    message = "gives yes and no the same first token"
    refused(message, controls.answer_words, lambda text, add_special_tokens: {"input_ids": [7, 8]})


def test_log_odds_are_those_of_transformers(model, torch_model, tmp_path):
    """Log-odds do not depend on the batch size and are computed only once."""
    questions = []
    for number, text in enumerate(["Is it so?", "Is it?", "So it is, is it not?"]):
        path = tmp_path / f"{number}.png"
        Image.fromarray(small.conversation(text, seed=number)[0]["content"][0]["image"]).save(path)
        questions.append(Question(number, (path,), text, "yes", "random"))
    protocol = dataclasses.replace(get("pope/strict"), suffix="")
    work = Work(batch_size=2, folder=tmp_path / "out", record={"who": "small"})
    found = controls.log_odds(model, questions, protocol, work)
    rows = [json.loads(line) for line in (tmp_path / "out" / "odds.0.jsonl").read_text().splitlines()]
    yes, no = controls.answer_words(model.processor.tokenizer)
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        text = model.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        arrays = model.processor(images=Image.open(question.images[0]), text=text, return_tensors="pt")
        with torch.no_grad():
            logits = torch_model(**arrays).logits[0, -1].double()
        expected = torch.logsumexp(logits[yes], 0) - torch.logsumexp(logits[no], 0)
        assert found[question.key] == pytest.approx(float(expected), abs=1e-3)
        row = next(row for row in rows if row.get("id") == str(question.id))
        chances = [float(torch.softmax(logits, 0)[tokens].sum()) for tokens in (yes, no)]
        assert [row["yes"], row["no"]] == pytest.approx(chances, abs=1e-4)
    unused = SimpleNamespace(processor=model.processor, config=model.config)  # it can compute nothing
    assert controls.log_odds(unused, questions, protocol, work) == found
    logits = SimpleNamespace(combined=np.full((1, 300), np.nan))
    broken = SimpleNamespace(processor=model.processor, config=model.config, encode_images=None)
    broken.prefill = lambda messages: (None, logits)
    asked = [Question(1, (), "Is it so?", "yes", "random")]
    refused("first answer token are not finite", controls.log_odds, broken, asked, get("pope/strict"))


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
    # Each group has a threshold of its own.
    questions = yes_no("yynn") + yes_no("ynyn", "popular")
    keys = [q.key for q in questions]
    said = dict(zip(keys, ["Yes", "Yes", "Yes", "No", "Yes", "no way", "maybe", "No"], strict=True))
    odds = dict(zip(keys, [4, 1, 3, 2, -1, -2, -3, -4], strict=True))
    texts, thresholds = controls.thresholded(questions, odds, said, get("pope/strict"))
    assert list(texts.values()) == ["Yes", "No", "Yes", "Yes", "Yes", "No", "No", "No"]
    assert thresholds == {"random": 1.5, "popular": -1.5}
    # OLM says yes where yes and no are near.
    chances = {"near": (0.2, 0.4), "far": (0.1, 0.7), "unsure": (0.1, 0.1), "edge": (0.25, 0.75), "yes": (0.9, 0.1)}
    texts = dict.fromkeys(chances, "no")
    assert controls.near_to_yes(chances, texts) == texts | {"near": "Yes"}


# Captions of the same length


def test_chair_at_equal_length(tmp_path):
    """Greedy captions are cut to the length of the others. A method with shorter captions is better than greedy
    decoding, but not than greedy captions of its length."""
    text = "A dog sits. A cat sleeps near a chair."
    assert controls.length_matched(text, "One two three four") == "A dog sits. A"
    assert controls.length_matched(text, "word " * 20) == text
    assert controls.length_matched(text, "") == ""
    # Under "sentence" the unfinished end of both does not count.
    assert controls.length_matched(text, "One two three. Four", "sentence") == "A dog sits."
    assert controls.length_matched(text + " And a", "word " * 20 + ".", "sentence") == text
    images = range(1, 31)
    folder = coco_folder(tmp_path, {i: ["dog"] for i in images}, {i: ["A dog."] for i in images})
    questions = read("chair/512", folder, synonyms=folder / "synonyms.txt")
    short = {q.key: "There is a dog." for q in questions}
    greedy = {q.key: "There is a dog. And a cat." for q in questions}

    def report(asked, said, plain):
        answered = ControlAnswers(dict.fromkeys(("greedy", "temperature", "plausibility"), plain), {})
        return controls.report(BENCHMARKS["chair"], asked, said, get("chair/512"), answered, 50)

    found = report(questions, short, greedy)
    assert set(found) == {"greedy", "temperature", "plausibility", "length"}
    assert found["greedy"]["verdicts"] == {"C_S": "significantly better"}
    assert found["greedy"]["words"] == (
        "The method is significantly better than greedy decoding on C_S: 0.0 against 100.0, difference -100.0 "
        "(95 % interval -100.0 to -100.0; 30 questions, 30 images)."
    )
    length = found["length"]
    assert length["verdicts"] == {"C_S": "no difference shown"} and length["shorter_than_the_method"] == 0
    assert length["figures"]["C_S"]["value"] == 0.0 and length["figures"]["words"]["value"] == 4.0
    few = report(questions[:29], short, greedy)["greedy"]
    assert few["verdicts"] == {"C_S": "no verdict below 30 questions"} and few["images"] == 29
    assert few["words"].startswith("No verdict below 30 questions: the method against greedy decoding on C_S: 0.0 ")
    worse = report(questions, greedy, short)
    assert worse["greedy"]["verdicts"] == {"C_S": "significantly worse"}
    assert worse["length"]["shorter_than_the_method"] == 30


# The report


def test_a_method_that_only_says_yes_more_often_is_found_out():
    """Greedy decoding says no too often but orders the questions correctly; the method only moves the threshold."""
    questions = yes_no("yn" * 40)
    generator = np.random.default_rng(0)
    odds = {q.key: (1.0 if q.label == "yes" else -1.0) + generator.normal() * 0.5 - 1.0 for q in questions}
    greedy = {key: "Yes" if value > 0 else "No" for key, value in odds.items()}
    method = {key: "Yes." if value > -1.0 else "No." for key, value in odds.items()}
    drawn = {q.key: ("Yes", "No")[int(generator.integers(2))] for q in questions}
    chances = {key: (1 / (1 + np.exp(-value)), 1 / (1 + np.exp(value))) for key, value in odds.items()}
    said = {"greedy": greedy, "temperature": drawn, "plausibility": method, "pba": method}

    def report(answered):
        return controls.report(BENCHMARKS["pope"], questions, method, get("pope/strict"), answered, 300)

    found = report(ControlAnswers(said, odds, chances))
    verdicts = {name: one["verdicts"]["random: accuracy"] for name, one in found.items()}
    better = dict.fromkeys(("greedy", "temperature", "olm-sampled"), "significantly better")
    same = dict.fromkeys(("plausibility", "threshold", "olm", "pba"), "no difference shown")
    assert verdicts == better | same
    # |p(yes) - p(no)| < 1/2 where the log-odds lie between -ln 3 and ln 3, so OLM is a threshold at -ln 3.
    texts = {key: "Yes" if value > -np.log(3) else "No" for key, value in odds.items()}
    own, _ = scored("pope/strict", questions, texts)
    assert found["olm"]["figures"]["random: accuracy"]["value"] == pytest.approx(own["random: accuracy"], abs=1e-6)
    # Logs from before OLM have no probabilities.
    assert report(ControlAnswers(said, odds)) == {name: one for name, one in found.items() if "olm" not in name}
    threshold = found["threshold"]
    right = sum(method[q.key].startswith(q.label.capitalize()) for q in questions)
    assert threshold["figures"]["random: accuracy"]["value"] == pytest.approx(right / 80)
    assert threshold["figures"]["random: F1"]["n"] == 80
    assert threshold["against"]["differences"]["random: yes ratio"]["value"] == 0.0
    assert threshold["against"]["mcnemar"] == {"only_first_right": 0, "only_second_right": 0, "p": 1.0}
    json.dumps(found)


# A whole run


@pytest.mark.parametrize("name", ["pope/vcd", "mme/hallucination", "chair/64-sentence"])
def test_controls_stand_in_the_scores(world, tmp_path, name):
    described = name.startswith("chair")
    oracle = Oracle(caption="A dog on a chair. A cat." if described else "")
    options = Options(8, controls=tmp_path / "controls", resamples=20)
    run = Run("oracle", "float32", get(name), Data(world), tmp_path / "vcd", methods.VCD(), options)
    assert not run.complete() and run.score() is None
    run.ask(oracle)
    found = run.score()["controls"]
    kinds = ["length"] if described else ["threshold", "olm", "olm-sampled", "pba", "pba-sampled"]
    assert list(found) == ["greedy", "temperature", "plausibility", *kinds]
    for control in found.values():
        assert "the method " in control["words"].lower() and control["figures"]
        assert set(control["against"]) == {"differences", "mcnemar"}
    assert json.loads((tmp_path / "vcd" / "scores.json").read_text())["controls"] == found
    # Another method shares what does not depend on it, a finished run asks nothing, and no control is in the way.
    before = oracle.asked
    other = Run("oracle", "float32", get(name), Data(world), tmp_path / "icd", methods.ICD(), options)
    other.ask(oracle)
    once = oracle.asked - before
    assert other.complete() and once < before
    other.ask(oracle)
    assert oracle.asked - before == once
    if not described:  # a folder from before OLM
        log = tmp_path / "controls" / "greedy" / "odds.0.jsonl"
        log.write_text(re.sub(r', "yes": [^,}]+, "no": [^,}]+', "", log.read_text()))
        assert other.complete() and not {"olm", "olm-sampled"} & set(other.score()["controls"])


def test_from_the_command_line(world, tmp_path, monkeypatch, capsys):
    given = get("pope"), Data(world), tmp_path, None, Options(controls=tmp_path)
    refused("controls need a method", Run, "oracle", "float32", *given)
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
