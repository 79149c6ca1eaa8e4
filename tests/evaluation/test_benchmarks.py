"""Every benchmark of the registry, on the small folder that its own test file makes (`sample`, `PROTOCOLS`)."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from lvlm_jax.evaluation import BENCHMARKS, Data, answers, get, names, protocol, rescore
from lvlm_jax.evaluation.chair_words import READINGS
from lvlm_jax.evaluation.parsers import YES_NO
from lvlm_jax.evaluation.report import comparisons, examples
from lvlm_jax.evaluation.report import runs as report_runs
from tests.evaluation.builders import file_of, scored_run
from tests.refusals import refused

ROOT = Path(__file__).resolve().parents[2]
TESTS = {name: file_of(name) for name in BENCHMARKS}
ASKED = [name for tests in TESTS.values() for name in tests.PROTOCOLS]
WORDS = ["Yes", "No", "yes", "A", "B", "A dog and a bear", "red", "A tree."]


def asked(name, folder):
    """The protocol called `name`, its benchmark, a small folder of it, and the questions in there."""
    settings = get(name)
    benchmark = BENCHMARKS[settings.benchmark]
    data = TESTS[benchmark.name].sample(folder)
    return settings, benchmark, data, benchmark.read(data, settings)


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda benchmark: benchmark.name)
def test_what_a_benchmark_says_of_itself(benchmark):
    for settings in benchmark.protocols:
        assert get(settings.name) is settings and settings.benchmark == benchmark.name
        assert settings.name.startswith(f"{benchmark.name}/") and settings.max_new_tokens > 0
        assert settings.about and settings.parser in {*YES_NO, *READINGS, "letter", "short", "none"}
        with pytest.raises(dataclasses.FrozenInstanceError):
            settings.suffix = "other"
    assert get(benchmark.name) is benchmark.protocols[0]
    assert benchmark.links and all(link.startswith("https://") for link in benchmark.links)
    fields = {field.name for field in dataclasses.fields(Data)} - {"folder"}
    assert set(benchmark.recorded) <= set(benchmark.uses) <= fields
    assert set(benchmark.directions.values()) <= {1, -1}
    assert benchmark.headlines and benchmark.judged
    assert all(benchmark.direction(name) for names in benchmark.judged for name in names)
    page = (ROOT / "docs" / "evaluation.md").read_text()
    assert re.search(rf"^\| `{benchmark.name}` \|", page, re.MULTILINE), "docs/evaluation.md has a row for each"


def test_names():
    assert names() == [settings.name for benchmark in BENCHMARKS.values() for settings in benchmark.protocols]
    refused("'pope/vdc' is unknown; choose one of pope/strict, pope/official", get, "pope/vdc")
    refused("'poop' is unknown; choose one of .*pope", get, "poop")
    with pytest.raises(ValueError, match="registered already"):
        protocol.register(get("pope"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_settings_that_a_benchmark_has_no_use_for(name, tmp_path):
    benchmark = BENCHMARKS[name]
    paths = ("question_file", "image_folder", "image_list", "synonyms", "chair_pickle")
    others = {"source": "gqa", "groups": ("g",), "only": (1,), "matching": "spacy"}
    for field, value in (dict.fromkeys(paths, Path("given")) | others).items():
        data = Data(tmp_path, **{field: value})
        if field in benchmark.uses:
            benchmark.check(data)
            continue
        refused(f"{name} does not use {field.replace('_', ' ')} .* it takes ", benchmark.check, data)
        refused("does not use", rescore.rescore, benchmark.protocols[0], data, ["a.jsonl"])


@pytest.mark.parametrize("name", ASKED)
def test_answers_and_figures_come_back_from_the_files(name, tmp_path):
    settings, benchmark, data, questions = asked(name, tmp_path / "data")
    # Answers, as they were written.
    said = {question.key: f'{question.id} "ü\u2028' for question in questions}
    target = tmp_path / "out" / benchmark.answers.name
    written = benchmark.answers.write(target, questions, said | {("none", "9"): "?"}, settings, "pocket")
    assert sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file()) == sorted(written)
    found = answers.match(questions, answers.read([(None, target)], benchmark.answers, settings.groups))
    assert {key: text.split() for key, text in found.items()} == {key: text.split() for key, text in said.items()}
    # Figures by groups, which a report makes from stored counts alone, are those of the score; right answers are right.
    labelled = [question for question in questions if question.label is not None]
    scores = benchmark.score(labelled, {one.key: one.label.capitalize() for one in labelled}, settings)
    assert all(scores.correct[question.key] for question in labelled)
    if labelled:
        again = benchmark.figures(list(dict.fromkeys(group for group, _ in scores.correct)), scores.counts, settings)
        assert list(again) == list(scores.figures) and benchmark.judged_by(list(again))
    assert all(question.label for question in questions if question.group not in benchmark.descriptions)
    # Differences of two runs are those of their answers.
    rng = np.random.default_rng(0)
    ours, theirs = ([str(word) for word in rng.choice(WORDS, len(questions))] for _ in range(2))
    scored_run(tmp_path / "runs/greedy", data, theirs, protocol=name)
    scored_run(tmp_path / "runs/cmac", data, ours, {"name": "CMAC"}, protocol=name)
    pair = [benchmark.score(questions, dict(zip(said, texts, strict=True)), settings) for texts in (ours, theirs)]
    expected = rescore.compare(*pair, resamples=200)
    ((_, found),) = comparisons.compare(report_runs.collect(tmp_path / "runs")).items()
    assert found.differences.keys() == expected["differences"].keys()
    for figure, entry in expected["differences"].items():
        numbers = [np.nan if number is None else number for number in (entry["value"], *entry["interval"])]
        difference = found.differences[figure]
        np.testing.assert_allclose([difference.value, *difference.interval], numbers, atol=1e-6)
    assert found.only_here == expected["mcnemar"]["only_first_right"]


@pytest.mark.parametrize("name", [tests.PROTOCOLS[0] for tests in TESTS.values()])
def test_examples_come_back_with_their_questions_and_images(name, tmp_path):
    settings, benchmark, data, questions = asked(name, tmp_path / "data")
    said = {question.key: f"answer {i}" for i, question in enumerate(questions)}
    scored_run(tmp_path / "runs/greedy", data, list(said.values()), protocol=name)
    (one,) = report_runs.collect(tmp_path / "runs")
    found = examples.read(one)
    assert {key: answer.text for key, answer in found.items()} == said
    for question in questions:
        entry = benchmark.answers.entry(question, "", settings, "")
        asked_as = settings.prompt(question) if "prompt" in entry else question.text
        if benchmark.answers.columns:  # id and answer alone: no prompt, unless it is the same for all
            asked_as = None if "{question}" in settings.template else settings.prompt(question)
        known = not benchmark.answers.columns or question.group in benchmark.descriptions
        expected = (asked_as, question.image_names if known else ())
        assert (found[question.key].prompt, found[question.key].images) == expected
