"""What a benchmark is: one object that says how it is read, asked, scored and reported.

A file of `lvlm_jax.evaluation.benchmarks` makes one of it, called `BENCHMARK`. No other file knows its name: engine,
rescoring, controls and report ask the object.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation.answers import AnswerFormat, Row
from lvlm_jax.evaluation.protocol import Protocol
from lvlm_jax.evaluation.question import Data, Question
from lvlm_jax.evaluation.scores import Figure, Scores


def _all_of_them(data: Data, rows: Sequence[Row]) -> Data:
    return data


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Figures are named "group: word" or "word" alone ("random: accuracy", "C_S"); what is said here of a figure is said
    of its word. The text put to a model is the protocol's (`Protocol.prompt`).

    Attributes:
        name: what `Protocol.benchmark` says, and what the names of its protocols begin with.
        protocols: the first is the default.
        links: where its files come from.
        question_files: (data, protocol) -> role -> the files that decide the figures.
        read: (data, protocol, need_images=False) -> questions.
        score: (questions, answers, protocol) -> scores; answers are texts by `Question.key`.
        figures: (groups, counts, protocol) -> the figures that `score` makes of questions of these groups, given the
          names of what it counted. A report calls it to compute figures again from stored counts.
        directions: word -> 1 where a high value is good, -1 where a low one is; other figures are neither.
        headlines: the words that stand for the benchmark in an overview.
        judged: by what a method is judged against a control: of each tuple the first figure that a run has.
        uses: the fields of `Data` it looks at, besides `folder`.
        recorded: those of them that the record of a score names.
        answers: the format of its answer files.
        image_places: folders below the data folder that may hold its pictures; `{group}` is the question's group.
        descriptions: groups of descriptions; the id of such a question is the number of its image.
        narrow: (data, rows of the answer files) -> data, where the answers decide which questions were asked.
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
    narrow: Callable[[Data, Sequence[Row]], Data] = _all_of_them

    def direction(self, figure: str) -> int:
        """1 where a high value of a figure is good, -1 where a low one is, 0 where neither is."""
        return self.directions.get(word_of(figure), 0)

    def judged_by(self, figures: Sequence[str]) -> list[str]:
        """Those of the figures by which a method is judged."""
        fitting = ([name for name in figures if word_of(name) in words] for words in self.judged)
        return [names[0] for names in fitting if names]

    def check(self, data: Data) -> None:
        """Refuses settings that this benchmark would pass over in silence.

        Raises:
            LVLMError: a field of `data` is set that is not among `uses`.
        """
        for field in dataclasses.fields(data):
            if field.name in ("folder", "limit", *self.uses) or getattr(data, field.name) == field.default:
                continue
            raise LVLMError(
                f"{self.name} has no use for {field.name.replace('_', ' ')} {getattr(data, field.name)!s:.60}; "
                f"beside the data folder it takes {', '.join(self.uses).replace('_', ' ')}"
            )


def word_of(figure: str) -> str:
    """What a figure is of every group: "accuracy" of "random: accuracy"."""
    return figure.rpartition(": ")[2]
