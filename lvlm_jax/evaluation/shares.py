"""Several processes that answer one benchmark: which process answers what, with one log each in a shared folder.

The processes do not communicate. Each appends to `NAME.PROCESS.jsonl` and reads all of them, so a killed run may resume
with another number of processes, and the totals depend on neither the number nor the order of the processes.

Processes that share one model (`parallel`, a mesh over the devices of all) answer every question together instead, and
the first keeps the log.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation.question import Question
from lvlm_jax.journal.log import expect, read_log

Key = tuple[str, str]  # Question.key

# The fields of an answer, by the name of the log.
_KINDS = {
    "log": {"text": str, "tokens": int, "ended": bool},
    "odds": {"odds": (int, float)},
    "margins": {"margin": (int, float)},
}


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of the work that process `index` of `processes` does.

    Attributes:
        together: whether all processes that JAX has joined do the whole work together; `index` and `processes` count
            them as one.
    """

    index: int = 0
    processes: int = 1
    together: bool = False

    def __post_init__(self):
        if not 0 <= self.index < self.processes:
            raise LVLMError(
                f"process {self.index} of {self.processes} was asked for; processes are counted from 0 to "
                f"{max(self.processes, 1) - 1}"
            )

    @classmethod
    def of(cls, processes: int | None = None, index: int | None = None) -> "Share":
        """The share with these numbers; by default those of `jax.distributed`, which are 0 of 1 if it is not set up.

        Raises:
            LVLMError: one number is given without the other, or the index is out of range.
        """
        if (processes is None) != (index is None):
            raise LVLMError("give both the number of processes and the index of this one, or neither")
        return cls(jax.process_index(), jax.process_count()) if processes is None else cls(index, processes)

    @property
    def writes(self) -> bool:
        """Whether this process keeps the log and writes scores."""
        return not self.together or jax.process_index() == 0

    def meet(self) -> None:
        """Returns when all processes that work together have called it."""
        if self.together:
            multihost_utils.sync_global_devices("share")

    def path(self, folder: Path, name: str) -> Path:
        """This process's log called `name`."""
        return folder / f"{name}.{self.index}.jsonl"


ALONE = Share()


@dataclasses.dataclass(frozen=True)
class LoggedAnswers:
    """The content of the logs of all processes.

    Attributes:
        answers: the answers, by question.
        batches: the cost of each batch.
    """

    answers: dict[Key, dict]
    batches: list[dict]

    def complete(self, questions: Sequence[Question]) -> bool:
        """Whether every question has an answer."""
        return all(question.key in self.answers for question in questions)


def read(folder: Path, name: str, record: Mapping, questions: Sequence[Question]) -> LoggedAnswers:
    """Reads the logs called `name` in a folder; an incomplete last line is skipped.

    Args:
        questions: the questions of the run.

    Raises:
        LVLMError: a file is not a log, was edited, or belongs to a run with other settings.
    """
    logged = LoggedAnswers({}, [])
    keys = {question.key for question in questions}

    def entry(row: dict) -> tuple[Key, dict] | None:
        if "batch" in row:
            expect(row["batch"], {"tokens": int, "seconds": (int, float)})
            logged.batches.append(row["batch"])
            return None
        expect(row, _KINDS.get(name, {}))
        if name == "odds" and "yes" in row:  # older logs have only the odds
            expect(row, {"yes": (int, float), "no": (int, float)})
        return (row["group"], row["id"]), row

    for path in sorted(folder.glob(f"{name}.*.jsonl")):
        for key, row in read_log(path, record, entry, keys).items():
            logged.answers.setdefault(key, row)
    return logged
