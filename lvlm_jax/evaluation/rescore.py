"""Scores answers of any model: no model runs, and no image is opened."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import BENCHMARKS, Benchmark, answers, margins, protocol, statistics, verdicts
from lvlm_jax.evaluation.question import Data, Question
from lvlm_jax.evaluation.scores import Scores
from lvlm_jax.journal.record import file_hash


def answer_paths(words: Sequence[str], groups: Sequence[str]) -> list[tuple[str | None, Path]]:
    """Parses `GROUP=FILE`, or a file or folder alone, as (group or None, path).

    Raises:
        LVLMError: the file exists, but the group does not.
    """
    pairs = []
    for word in words:
        group, equals, name = word.partition("=")
        # A path may contain an equals sign itself.
        if equals and group in groups and not files.exists(Path(word)):
            pairs.append((group, Path(name)))
        elif equals and groups and files.expand(name).exists() and not files.expand(word).exists():
            raise LVLMError(f"{word}: there is no group {group!r}; give GROUP=FILE with one of {', '.join(groups)}")
        else:
            pairs.append((None, Path(word)))
    return pairs


def rescore(
    settings: protocol.Protocol,
    data: Data,
    answer_files: Sequence[str],
    against: Sequence[str] = (),
    *,
    partial: bool = False,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
    model: str | None = None,
) -> dict:
    """Scores answer files, with intervals and the protocol record; with `against`, compares two runs.

    Args:
        settings: the protocol.
        answer_files: answer files, as for `answer_paths`.
        against: answer files of the run to compare with (for example greedy), over the same questions.
        partial: whether to score only the questions that have answers, instead of raising.
        resamples, seed: number of resamples and seed of the bootstrap.
        model: name of the model that answered, for the record; by default from the record beside the answers.

    Returns:
        The content of `scores.json`, plain JSON values.

    Raises:
        LVLMError: files are missing or malformed, or answers and questions do not belong together.
    """
    benchmark = BENCHMARKS[settings.benchmark]
    benchmark.check(data)
    paths = answer_paths(answer_files, settings.groups)
    groups = [group for group, _ in paths]
    if not data.groups and all(groups):
        data = dataclasses.replace(data, groups=tuple(dict.fromkeys(groups)))
    rows = answers.read(paths, benchmark.answers, settings.groups)
    data = benchmark.narrow(data, rows)
    everything = benchmark.read(data, settings)
    questions = data.limited(everything)

    def matched(rows: Sequence[answers.AnswerRow]) -> answers.Answers:
        """The answers in `rows` by question; every question within the limit must have one, unless `partial`."""
        all_answers = answers.match(everything, rows, True, settings.groups)
        if not partial:
            answers.complete(questions, all_answers)
        return all_answers

    matched_texts = matched(rows)
    answered_questions = [question for question in questions if question.key in matched_texts]
    scores = _scored(benchmark, answered_questions, matched_texts, settings, paths)
    origin = _origin(paths)
    sent = origin.get("generation", {}).get("system")
    if isinstance(sent, str):  # the system prompt that was sent, whatever the protocol says
        settings = dataclasses.replace(settings, system=sent)
    more = {
        "questions_given": len(everything),
        "limit": data.limit,
        "bootstrap": {"resamples": resamples, "seed": seed, "level": statistics.LEVEL, "over": "images"},
        "answers": [{"name": path.name, "sha256": _hash(path)} for _, path in paths],
        # How other programs decoded their answers is unknown; the protocol says how they should have been decoded.
        "decoding_known": bool(origin),
        "answered_by": origin or None,
    } | {name: getattr(data, name) for name in benchmark.recorded}
    document = {
        "record": protocol.record(
            settings,
            answered_questions,
            benchmark.question_files(data, settings),
            model=model or origin.get("model"),
            model_sha256=origin.get("model_sha256"),
            method=origin.get("method"),
            seed=origin.get("seed"),
            more=more,
        )
    } | report(scores, resamples, seed)
    if against:
        others = answer_paths(against, settings.groups)
        theirs = matched(answers.read(others, benchmark.answers, settings.groups))
        common = [question for question in answered_questions if question.key in theirs]
        both = ((matched_texts, settings, paths), (theirs, settings, others))
        pair = [_scored(benchmark, common, *one) for one in both]
        document["against"] = {"questions": len(common)} | compare(*pair, resamples, seed)
        names = ["these answers", f"those of {others[0][1].name}"]
        document["against"] |= judged(benchmark, *names, *pair, document["against"]["differences"])
        document["record"]["against"] = [{"name": path.name, "sha256": _hash(path)} for _, path in others]
    return document


def _scored(
    benchmark: Benchmark,
    questions: Sequence[Question],
    texts: answers.Answers,
    settings: protocol.Protocol,
    paths: Sequence[tuple[str | None, Path]],
) -> Scores:
    """The scores of answers, with the margins that lie beside their files."""
    scores = benchmark.score(questions, texts, settings)
    if not benchmark.margins:
        return scores
    return margins.added(benchmark, scores, questions, margins.beside([path for _, path in paths]), settings)


def _hash(path: Path) -> str:
    path = files.expand(path)
    return (
        protocol.files_hash([entry for entry in path.iterdir() if entry.is_file()])
        if path.is_dir()
        else file_hash(path)
    )


def _origin(paths: Sequence[tuple[str | None, Path]]) -> dict:
    """The record that our own runs write beside their answers, if there is one."""
    beside = paths[0][1].with_name(paths[0][1].name + ".run.json") if paths else None
    if beside is None or not beside.is_file():
        return {}
    record_of_run = files.read_json(beside, "record of the run")
    return record_of_run if isinstance(record_of_run, dict) else {}


def _number(value) -> float | None:
    """A number for JSON; nan becomes None."""
    return None if math.isnan(value) else round(float(value), 6)


def report(scores: Scores, resamples: int = statistics.RESAMPLES, seed: int = 0) -> dict:
    """Figures with intervals, notes, and the counts of each image, as plain JSON values."""
    values, sizes = scores.values(), scores.sizes()
    intervals = statistics.bootstrap(scores, resamples, seed)
    return {
        "figures": {
            name: {
                "value": _number(values[name]),
                "interval": [_number(bound) for bound in intervals[name]],
                "n": sizes[name],
                "unit": figure.unit,
            }
            for name, figure in scores.figures.items()
        },
        "notes": dict(scores.notes),
        "per_image": {
            "counts": list(scores.counts),
            "images": {unit: row.tolist() for unit, row in zip(scores.units, scores.table, strict=True)},
        },
        "correct": [[group, number, bool(right)] for (group, number), right in scores.correct.items()],
    }


def compare(first: Scores, second: Scores, resamples: int = statistics.RESAMPLES, seed: int = 0) -> dict:
    """The difference first minus second of every figure, with a paired interval; and McNemar's test over questions."""
    differences = statistics.paired_bootstrap(first, second, resamples, seed)
    test = statistics.mcnemar(first.correct, second.correct)
    return {
        "differences": {
            name: {
                "value": _number(difference.value),
                "interval": [_number(bound) for bound in difference.interval],
                "p": _number(difference.p),
            }
            for name, difference in differences.items()
        },
        "mcnemar": {"only_first_right": test.first, "only_second_right": test.second, "p": _number(test.p)},
    }


def judged(
    benchmark: Benchmark, first: str, second: str, ours: Scores, theirs: Scores, differences: Mapping
) -> dict[str, dict[str, str] | str]:
    """Verdicts on the differences (ours minus theirs) of the figures by which the benchmark judges, as JSON values.

    Args:
        first, second: names of the two runs.

    Returns:
        "verdicts": figure -> verdict, without undefined figures; "words": the verdicts as sentences.
    """
    by_figure, sentences = {}, []
    values, others, sizes = ours.values(), theirs.values(), ours.sizes()
    for name in benchmark.judged_by(list(differences)):
        count = verdicts.questions_behind(name, sizes, ours.correct)
        interval = differences[name]["interval"]
        verdict = verdicts.verdict(interval, benchmark.direction(name), count)
        if verdict == verdicts.NOT_DEFINED:
            continue
        by_figure[name] = verdict
        scale = 100 if ours.figures[name].unit == "share" else 1
        difference = [scale * number for number in (differences[name]["value"], *interval)]
        pair = (float(values[name]) * scale, float(others[name]) * scale)
        about = f"{count} questions, {len(ours.units)} images"
        sentences.append(verdicts.sentence(verdict, first, second, name, pair, difference, about))
    return {"verdicts": by_figure, "words": " ".join(sentences)}


def table(document: dict) -> str:
    """The figures as a table for a terminal; shares are in per cent."""
    figures = document["figures"]
    against = document.get("against", {}).get("differences", {})
    wide = max(map(len, figures), default=0)
    heading = f"{'figure':{wide}}  {'value':>8}  {'95 % interval':>17}  {'n':>6}"
    lines = [heading + ("  difference (95 %, p)" if against else "")]
    for name, figure in figures.items():
        scale = 100 if figure["unit"] == "share" else 1
        low, high = (_shown(bound, scale) for bound in figure["interval"])
        line = f"{name:{wide}}  {_shown(figure['value'], scale):>8}  {f'{low} to {high}':>17}  {figure['n']:>6}"
        if name in against:
            other = against[name]
            low, high = (_shown(bound, scale) for bound in other["interval"])
            line += f"  {_shown(other['value'], scale)} ({low} to {high}, p {_p(other['p'])})"
        lines.append(line)
    if against:
        test = document["against"]["mcnemar"]
        lines.append(
            f"McNemar: right only here {test['only_first_right']}, only there {test['only_second_right']}, "
            f"p {_p(test['p'])}"
        )
        lines += filter(None, [document["against"].get("words")])
    return "\n".join(lines)


def _shown(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{value * scale:.1f}"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def summary(document: dict) -> str:
    """The lines below a table: protocol, files and images of the figures."""
    record = document["record"]
    settings = record["protocol"]
    lines = [
        f"protocol {settings['name']} (parser {settings['parser']}), lvlm_jax {record['version']}",
        f"{record['questions']} questions of {record['questions_given']}, {record['images']['count']} images, "
        f"image list {record['images']['list_sha256'][:12]}",
    ]
    if record["limit"]:
        lines.append(f"limit {record['limit']}: only the first questions, not to be compared with complete runs")
    if record["decoding_known"]:
        lines.append(f"system prompt: {settings['system'] or 'none'}")
    lines += [f"{role} {entry['name']} {entry['sha256'][:12]}" for role, entry in record["files"].items()]
    lines += [f"{name}: {_plain(value)}" for name, value in document["notes"].items()]
    return "\n".join(lines)


def _plain(value) -> str:
    return ", ".join(f"{key} {count}" for key, count in value.items()) if isinstance(value, dict) else str(value)


def write(document: dict, folder: Path) -> Path:
    """Writes `scores.json` into a folder, completely or not at all."""
    path = folder / "scores.json"
    files.write_whole(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return path
