"""Runs for a report: every `scores.json` below a folder."""

import dataclasses
import functools
import math
import os
import re
import typing
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lvlm_jax import files
from lvlm_jax.errors import LVLMError, shown
from lvlm_jax.evaluation import BENCHMARKS, Benchmark, verdicts
from lvlm_jax.evaluation.protocol import Protocol
from lvlm_jax.evaluation.statistics import Difference
from lvlm_jax.version import __version__

LONGEST_SETTING = 6  # numbers; a method's list beyond that (steering vectors) is given by its length


@dataclasses.dataclass(frozen=True)
class Value:
    """A scored figure, nan if it is not defined; `n` is the number of questions or objects that it is about."""

    value: float
    interval: tuple[float, float]
    unit: str
    n: int


@dataclasses.dataclass(frozen=True)
class Control:
    """A control: its description and figures, the differences method minus control, and the verdict in words."""

    about: str
    figures: Mapping[str, Value]
    differences: Mapping[str, Difference]
    words: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a run's answers; None for everything that was not recorded.

    Attributes:
        tokens: mean number of tokens of an answer.
        milliseconds: time per token of an answer; the time for prompts and images is included.
        device: kind of the device.
        batch: number of prompts that were answered together.
        seconds: time of all answers.
        commit, machine: the code and the machine that answered.
    """

    tokens: float | None = None
    milliseconds: float | None = None
    device: str | None = None
    batch: int | None = None
    seconds: float | None = None
    commit: str | None = None
    machine: str | None = None

    @property
    def answer(self) -> float | None:
        """Milliseconds of an answer of mean length."""
        return self.tokens * self.milliseconds if self.tokens and self.milliseconds else None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The figures of a run minus those of another run over the same questions.

    Attributes:
        to: name of the other run.
        baseline: the other run; None for a stored comparison.
        differences: differences of the figures, by their names.
        only_here, only_there: number of questions that only the first run got right, and that only the other one did.
        p: p-value of McNemar's exact test.
    """

    to: str
    baseline: "Run | None"
    differences: Mapping[str, Difference]
    only_here: int
    only_there: int
    p: float


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One scored run.

    Attributes:
        path: path of its `scores.json`.
        name: path of its folder, relative to the folder of the report.
        protocol: the protocol with the settings of this run.
        record: the record in the scores.
        figures: name -> value, in the order of the benchmark.
        notes: notes of the scorer ("unparsed": 3, ...).
        counts, units, table: names of the counts [C], images [U], and the counts of each image [U, C].
        correct: (group, id) -> whether the answer was right.
        controls: the controls of the method, by name.
        cost: cost of the answers.
        against: the comparison that was made when the run was scored (`--against`).
    """

    path: Path
    name: str
    protocol: Protocol
    record: Mapping
    figures: Mapping[str, Value]
    notes: Mapping
    counts: tuple[str, ...]
    units: tuple[str, ...]
    table: np.ndarray
    correct: Mapping[tuple[str, str], bool]
    controls: Mapping[str, Control]
    cost: Cost
    against: Comparison | None

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark of the protocol."""
        return BENCHMARKS[self.protocol.benchmark]

    @property
    def answered_by(self) -> Mapping:
        """The record that our runs write beside their answers; empty for answers of other programs."""
        return self.record.get("answered_by") or {}

    @property
    def is_baseline(self) -> bool:
        """Whether the model answered without any method."""
        return not self.record.get("method") and bool(self.answered_by)

    @property
    def model(self) -> tuple[str, str]:
        """The model's name, and what distinguishes it from others of that name: hash or revision, number format."""
        entry = self.record["model"]
        version = entry.get("sha256") or entry.get("revision") or ""
        more = version[:8], self.answered_by.get("dtype")
        # As much of a path as a hub id has: "llava-hf/llava-1.5-7b-hf".
        name = "/".join(Path(entry.get("name") or "model not recorded").parts[-2:]).lstrip("/")
        return name, ", ".join(filter(None, more))

    @property
    def method(self) -> tuple[str, str]:
        """The method's name and its settings, in words; without a method, how the model decoded."""
        if self.record.get("method"):
            return _method_words(self.record["method"])
        if not self.is_baseline:
            return "method not recorded", ""
        temperature = self.protocol.temperature
        return ("greedy" if not temperature else f"temperature {temperature:g}"), ""

    @functools.cached_property
    def size(self) -> str:
        """The numbers of questions and images, in words."""
        groups = Counter(group for group, _ in self.correct)
        by_group = f" ({', '.join(f'{group} {count}' for group, count in groups.items())})" if len(groups) > 1 else ""
        return f"{self.record['questions']} questions{by_group}, {self.record['images']['count']} images"

    @property
    def data_set(self) -> str:
        """The data set in words: the folder, and the question file or the number of files."""
        listed = [entry["name"] for entry in self.record["files"].values()]
        folder = Path(str(self.answered_by.get("data") or "")).name
        return ": ".join(filter(None, (folder, listed[0] if len(listed) == 1 else f"{len(listed)} files")))

    def questions(self, figure: str) -> int:
        """How many questions a figure is about."""
        return verdicts.questions_behind(figure, {name: value.n for name, value in self.figures.items()}, self.correct)

    @functools.cached_property
    def conditions(self) -> Mapping[str, str]:
        """Everything besides model and method that determines the figures: name -> value."""
        settings = dataclasses.asdict(self.protocol)
        fields = {name: repr(value) for name, value in settings.items() if name not in ("name", "about")}
        listed = self.record["files"].items()
        return fields | {f"file {role}": entry["sha256"][:12] for role, entry in listed} | {
            "image list": self.record["images"]["list_sha256"][:12],
            "questions": str(self.record["questions"]),
            "limit": str(self.record.get("limit")),
            "matching of words": str(self.notes.get("matching", "exact")),
        }  # fmt: skip


def _method_words(record: Mapping) -> tuple[str, str]:
    if "members" in record:
        members = [_method_words(member) for member in record["members"]]
        settings = "; ".join(f"{name}: {words}" for name, words in members if words)
        return " + ".join(name for name, _ in members), settings
    shown = []
    for name, value in record.items():
        if name == "name" or value is None:
            continue
        if isinstance(value, list):
            value = f"{len(value)} numbers" if len(value) > LONGEST_SETTING else ",".join(map(str, value))
        shown.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return str(record.get("name", "?")), ", ".join(shown)


def collect(folder: Path) -> list[Run]:
    """All runs below a folder, sorted by path. Unreadable scores are left out with a warning that names them.

    Raises:
        LVLMError: `folder` is not a folder, or it contains no readable `scores.json`.
    """
    folder = files.expand(folder)
    if not folder.is_dir():
        raise LVLMError(f"{str(folder)!r} is not a folder; give the one that holds the runs (lvlm evaluate --out)")
    paths = sorted(folder.rglob("scores.json"))
    if not paths:
        raise LVLMError(f"no scores.json in {str(folder)!r} or below; lvlm evaluate writes them")
    runs, wrong = [], []
    for path in paths:
        try:
            runs.append(load(path, os.path.relpath(path.parent, folder)))
        except LVLMError as error:
            wrong.append(error)
    if not runs:
        more = f" ({len(wrong) - 1} more cannot be read either)" if len(wrong) > 1 else ""
        raise LVLMError(f"{wrong[0]}{more}")
    for error in wrong:
        warnings.warn(f"left out: {error}", stacklevel=2)
    return runs


def load(path: Path, name: str) -> Run:
    """The run of one `scores.json`.

    Raises:
        LVLMError: the file is not JSON, has another form, or was written by a newer version of this package.
    """
    where = f"scores file {str(path)!r}"
    document = files.read_json(path, "scores file")
    try:
        record = document["record"]
        if _version(record["version"]) > _version(__version__):
            raise LVLMError(
                f"{where} was written by lvlm_jax {record['version']}; this is {__version__}: "
                "update it, or score the answers again"
            )
        settings = record["protocol"]
        protocol = Protocol(**settings | {"groups": tuple(settings["groups"])})
        for field, kind in typing.get_type_hints(Protocol).items():
            if not typing.get_args(kind) and not isinstance(getattr(protocol, field), kind):
                raise TypeError(f"{field} of its protocol is of another kind")
        if protocol.benchmark not in BENCHMARKS:
            raise LVLMError(f"{where} is of benchmark {protocol.benchmark!r}, which this version does not know")
        images = document["per_image"]["images"]
        counts = tuple(document["per_image"]["counts"])
        run = Run(
            path, name, protocol, record, _values(document["figures"]), dict(document["notes"]), counts, tuple(images),
            np.array(list(images.values()), float).reshape(len(images), len(counts)),
            {(group, number): bool(right) for group, number, right in document["correct"]},
            {control: _control(entry) for control, entry in (document.get("controls") or {}).items()},
            _cost(document.get("cost") or {}, record),
            _stored(document["against"], record) if document.get("against") else None,
        )  # fmt: skip
        _look_at(run)
        return run
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise LVLMError(f"{where} is not of the form that lvlm evaluate writes ({reason}); score it again") from error


def _look_at(run: Run) -> tuple:
    """Everything that the report reads later; reading it now refuses malformed files early."""
    bootstrap, entries = run.record["bootstrap"], run.record["answers"]
    for name, least in (("resamples", 1), ("seed", 0)):
        if type(bootstrap[name]) is not int or not least <= bootstrap[name] < 2**32:
            raise TypeError(f"{name} of its bootstrap is {shown(bootstrap[name])}")
    listed = [entry["name"] + entry["sha256"] for entry in entries]
    keys = hash((run.counts, tuple(run.conditions.items())))  # lists and objects cannot be compared
    return keys, run.size, run.data_set, run.model, run.method, bootstrap["resamples"], bootstrap["seed"], listed


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _interval(bounds: Sequence[float | None]) -> tuple[float, float]:
    low, high = bounds
    return _number(low), _number(high)


def _values(entries: Mapping) -> dict[str, Value]:
    return {
        name: Value(_number(entry["value"]), _interval(entry["interval"]), str(entry["unit"]), int(entry["n"]))
        for name, entry in entries.items()
    }


def _differences(entries: Mapping) -> dict[str, Difference]:
    return {
        name: Difference(_number(entry["value"]), _interval(entry["interval"]), _number(entry["p"]))
        for name, entry in entries.items()
    }


def _control(entry: Mapping) -> Control:
    differences = _differences((entry.get("against") or {}).get("differences", {}))
    about, verdict = (str(entry.get(name) or "") for name in ("about", "words"))
    return Control(about, _values(entry["figures"]), differences, verdict)


def _cost(entry: Mapping, record: Mapping) -> Cost:
    tokens, milliseconds, seconds = (
        None if entry.get(name) is None else float(entry[name]) for name in ("tokens", "milliseconds", "seconds")
    )
    settings = (record.get("answered_by") or {}).get("generation") or {}
    commit, machine = (str(entry[name]) if entry.get(name) else None for name in ("commit", "machine"))
    return Cost(tokens, milliseconds, entry.get("device"), settings.get("batch_size"), seconds, commit, machine)


def _stored(comparison: Mapping, record: Mapping) -> Comparison:
    names = ", ".join(entry["name"] for entry in record.get("against", [])) or "another file"
    return comparison_of(f"the answers in {names}", None, comparison)


def comparison_of(to: str, baseline: Run | None, comparison: Mapping) -> Comparison:
    """A `Comparison` with a run called `to`, from the result of `rescore.compare`."""
    test = comparison["mcnemar"]
    return Comparison(
        to, baseline, _differences(comparison["differences"]),
        test["only_first_right"], test["only_second_right"], _number(test["p"]),
    )  # fmt: skip
