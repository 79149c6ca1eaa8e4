"""`Benchmark`: one object that says how a benchmark is read, asked, scored and reported.

Each file of `lvlm_jax.evaluation.benchmarks` makes one such object, called `BENCHMARK`. No other module depends on
the name of a benchmark: engine, rescoring, controls and report use the object.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation.answers import AnswerFormat, AnswerRow
from lvlm_jax.evaluation.protocol import Protocol
from lvlm_jax.evaluation.question import Data, Question
from lvlm_jax.evaluation.scores import Figure, Scores


def _all_of_them(data: Data, rows: Sequence[AnswerRow]) -> Data:
    return data


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Figures are named "group: word" or just "word" ("random: accuracy", "C_S"); `directions`, `headlines` and
    `judged` name figures by their words. The text that the model receives is the protocol's (`Protocol.prompt`).

    Attributes:
        name: the value of `Protocol.benchmark`, and the beginning of the names of its protocols.
        protocols: its protocols; the first is the default.
        links: where its files can be downloaded.
        question_files: (data, protocol) -> the files that determine the figures, by role.
        read: (data, protocol, need_images=False) -> questions.
        score: (questions, answers, protocol) -> scores; answers are texts by `Question.key`.
        figures: (groups, counts, protocol) -> the figures that `score` makes for questions of these groups, given the
            names of its counts. A report calls it to recompute figures from stored counts.
        directions: word -> 1 if a high value is good, -1 if a low one is; other figures are neither.
        headlines: the words that represent the benchmark in an overview.
        judged: the figures that judge a method against a control: from each tuple, the first figure that a run has.
        uses: the fields of `Data` that it uses, besides `folder`.
        recorded: the fields in `uses` that the record of a score names.
        answers: the format of its answer files.
        image_places: folders below the data folder that may contain its images; `{group}` is the question's group.
        descriptions: groups of descriptions; the id of such a question is the number of its image.
        margins: whether questions have `options`, the right answer first, so that a run measures by how much the model
            prefers the right answer (`evaluation.options`).
        narrow: (data, rows of the answer files) -> data, if the answers determine which questions were asked.
    """

    name: str
    protocols: tuple[Protocol, ...]
    links: tuple[str, ...]
    question_files: Callable[[Data, Protocol], dict[str, list[Path]]]
    read: Callable[..., list[Question]]
    score: Callable[[Sequence[Question], Mapping, Protocol], Scores]
    figures: Callable[[Sequence[str], Sequence[str], Protocol], dict[str, Figure]]
    directions: Mapping[str, int]
    headlines: tuple[str, ...]
    judged: tuple[tuple[str, ...], ...]
    uses: tuple[str, ...]
    recorded: tuple[str, ...] = ()
    answers: AnswerFormat = AnswerFormat()
    image_places: tuple[str, ...] = (".",)
    descriptions: tuple[str, ...] = ()
    margins: bool = False
    narrow: Callable[[Data, Sequence[AnswerRow]], Data] = _all_of_them

    def direction(self, figure: str) -> int:
        """1 if a high value of a figure is good, -1 if a low one is, 0 if neither."""
        return self.directions.get(word_of(figure), 0)

    def judged_by(self, figures: Sequence[str]) -> list[str]:
        """The figures by which a method is judged."""
        fitting = ([name for name in figures if word_of(name) in words] for words in self.judged)
        return [names[0] for names in fitting if names]

    def check(self, data: Data) -> None:
        """Refuses settings that this benchmark would ignore.

        Raises:
            LVLMError: a field of `data` is set and is not in `uses`.
        """
        for field in dataclasses.fields(data):
            if field.name in ("folder", "limit", *self.uses) or getattr(data, field.name) == field.default:
                continue
            raise LVLMError(
                f"{self.name} does not use {field.name.replace('_', ' ')} {getattr(data, field.name)!s:.60}; "
                f"beside the data folder it takes {', '.join(self.uses).replace('_', ' ')}"
            )


def word_of(figure: str) -> str:
    """A figure's name without its group: "accuracy" for "random: accuracy"."""
    return figure.rpartition(": ")[2]
