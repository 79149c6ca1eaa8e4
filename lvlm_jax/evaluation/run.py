"""A run: a model answers a benchmark with a method, beside its controls; one folder contains all results.

OUT/log.PROCESS.jsonl          answers in the order in which they ended; a stopped run resumes from it
OUT/answers.jsonl (or in the benchmark's format: a file for each split, answers.json, a folder)
OUT/margins.jsonl              how much the right answers are preferred, if the benchmark has options
OUT/scores.json                figures, controls, cost, and the record of everything that determined them
CONTROLS/greedy/, ...          logs of the controls; one folder may serve all methods of one model and protocol
"""

import dataclasses
import json
import statistics as numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import BENCHMARKS, controls, engine, margins, options, rescore, shares, statistics
from lvlm_jax.evaluation.controls import RUNS, ControlAnswers
from lvlm_jax.evaluation.engine import Work
from lvlm_jax.evaluation.protocol import Protocol, record
from lvlm_jax.evaluation.question import Data, Question
from lvlm_jax.evaluation.shares import ALONE, Share
from lvlm_jax.journal.lock import locked
from lvlm_jax.journal.record import run_record
from lvlm_jax.methods import Method
from lvlm_jax.processors.templates import check_system


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings of a run that do not belong to its protocol.

    Attributes:
        batch_size: number of prompts that are answered together.
        seed: seed of sampling.
        controls: folder for the controls' logs; None for no controls.
        share: the part of the questions that this process answers.
        against: answer files of another run to compare with.
        resamples, bootstrap_seed: number of resamples and seed of the bootstrap for the intervals.
        schedule: as in `engine.Work`.
        runs: which of `controls.RUNS` to make; greedy decoding is always made.
    """

    batch_size: int = 16
    seed: int = 0
    controls: Path | None = None
    share: Share = ALONE
    against: Sequence[str] = ()
    resamples: int = statistics.RESAMPLES
    bootstrap_seed: int = 0
    schedule: str = "auto"
    runs: Sequence[str] = RUNS


DEFAULT = Options()


@dataclasses.dataclass(frozen=True)
class RunPart:
    """Questions under one protocol and method, and the folder of their answers."""

    questions: Sequence[Question]
    protocol: Protocol
    method: Method | None
    work: Work

    def logged(self) -> shares.LoggedAnswers:
        """The answers that all processes have logged so far."""
        return shares.read(self.work.folder, "log", self.work.record, self.questions)

    def complete(self) -> bool:
        """Whether all answers exist."""
        return self.logged().complete(self.questions)

    def texts(self) -> dict[shares.Key, str]:
        """The answers' texts, by question."""
        return {key: row["text"] for key, row in self.logged().answers.items()}


class Run:
    """The run of a model with a method on a benchmark. Call `ask`, then `score`; only `ask` needs the model.

    Attributes:
        questions: questions of the benchmark, with their images.
        about: the record beside the answers.
    """

    def __init__(
        self,
        path: str,
        dtype: str,
        protocol: Protocol,
        data: Data,
        out: Path,
        method: Method | None = None,
        options: Options = DEFAULT,
    ):
        """Reads the questions.

        Args:
            path, dtype: path and number format of the model, for the records.
            out: folder of the run.

        Raises:
            LVLMError: an unusable benchmark folder, a setting that the benchmark does not use, or controls without a
                method.
        """
        if options.controls is not None and method is None:
            raise LVLMError("controls need a method; give a method, or no controls")
        self.protocol, self.data, self.out, self.options = protocol, data, out, options
        self._benchmark = BENCHMARKS[protocol.benchmark]
        self._benchmark.check(data)
        self.questions = data.limited(self._benchmark.read(data, protocol, need_images=True))
        settings = {"protocol": protocol.name, "batch_size": options.batch_size, "system": protocol.system}
        place = str(files.expand(data.folder).resolve())  # where a report finds the images
        self.about = run_record(path, dtype, method, settings) | {"seed": options.seed, "data": place}
        question_files = self._benchmark.question_files(data, protocol)

        def decoded(rule: Protocol, how: Method | None, folder: Path, questions: Sequence[Question]) -> RunPart:
            about = record(rule, questions, question_files, model=path, model_sha256=self.about["model_sha256"],
                           method=how, seed=options.seed, more={"dtype": dtype, "limit": data.limit})  # fmt: skip
            work = Work(options.batch_size, options.seed, folder, about, options.share, options.schedule)
            return RunPart(questions, rule, how, work)

        self._own = decoded(protocol, method, out, self.questions)
        self._controls: dict[str, RunPart] = {}
        self._yes_no = [question for question in self.questions if controls.is_yes_no(question)]
        if options.controls is not None:
            for one in controls.decodings(protocol, method):
                questions = self._yes_no if one.yes_no else self.questions
                if questions and one.name in ("greedy", *options.runs):
                    self._controls[one.name] = decoded(
                        one.protocol, one.method, options.controls / one.folder, questions
                    )

    def complete(self) -> bool:
        """Whether all answers exist, so that `score` has nothing to wait for.

        Raises:
            LVLMError: the folder has a log of another run.
        """
        everything = [self._own, *self._controls.values()]
        if not all(one.complete() for one in everything):
            return False
        if self._margins and not self._preferences().complete(self.questions):
            return False
        return not self._controls or self._odds().complete(self._yes_no)

    @property
    def _margins(self) -> bool:
        """Whether margins are measured; the answers of a search have no likelihood."""
        method = self._own.method
        return self._benchmark.margins and (method is None or method.search is None)

    def _preferences(self) -> shares.LoggedAnswers:
        work = self._own.work
        return shares.read(work.folder, options.LOG, work.record, self.questions)

    def _odds(self) -> shares.LoggedAnswers:
        work = self._controls["greedy"].work
        return shares.read(work.folder, "odds", work.record, self._yes_no)

    def ask(self, model: Any) -> None:
        """Has the model answer this process's share, controls included.

        Raises:
            LVLMError: an unreadable image, a method that the model does not support, or a log of another run.
        """
        check_system(model.processor, self.protocol.system)
        name = self.protocol.name
        for title, one in {"": self._own, **self._controls}.items():
            engine.ask(model, one.questions, one.protocol, one.method, one.work, f"{name} {title}".strip())
        if self._margins:
            method, work = self._own.method, self._own.work
            options.log_margins(model, self.questions, self.protocol, method, work, f"{name} margins")
        if self._controls and self._yes_no:
            work = self._controls["greedy"].work
            controls.log_odds(model, self._yes_no, self.protocol, work, f"{name} log-odds")

    def score(self) -> dict | None:
        """Scores the answers and writes all files.

        Returns:
            The content of `scores.json`; None if other processes have not finished their shares, or if another process
            writes it.
        """
        if not self.options.share.writes or not self.complete():
            return None
        options, texts = self.options, self._own.texts()
        # Two processes that finish at the same moment write the same files, so they take turns.
        with locked(self.out / "scores.json", wait=True):
            answer_files = write_answers(self.out, self.questions, texts, self.protocol, self.about)
            if self._margins:
                margins.write(self.out, self._preferences().answers)
            scores = rescore.rescore(
                self.protocol, self.data, answer_files, options.against, resamples=options.resamples,
                seed=options.bootstrap_seed,
            )  # fmt: skip
            scores["cost"] = cost(self._own.logged())
            if self._controls:
                scores["controls"] = controls.report(
                    self._benchmark, self.questions, texts, self.protocol, self._control_answers(), options.resamples,
                    options.bootstrap_seed,
                )  # fmt: skip
            rescore.write(scores, self.out)
        return scores

    def _control_answers(self) -> ControlAnswers:
        odds = self._odds().answers
        return ControlAnswers(
            {name: one.texts() for name, one in self._controls.items()},
            {key: row["odds"] for key, row in odds.items()},
            {key: (row["yes"], row["no"]) for key, row in odds.items() if "yes" in row},
        )


def write_answers(out: Path, questions: Sequence[Question], texts: dict, protocol: Protocol, about: dict) -> list[str]:
    """Writes answers in the benchmark's own format, each file with the record of the run beside it.

    Returns:
        The files as for `--rescore`: `GROUP=FILE` if each group has its own file.
    """
    form = BENCHMARKS[protocol.benchmark].answers
    groups = list(dict.fromkeys(question.group for question in questions))
    apart = form.by_group and len(groups) > 1 and set(groups) <= set(protocol.groups)
    words = []
    for group in groups if apart else [None]:
        target = out / (f"{group}.jsonl" if apart else form.name)
        chosen = [question for question in questions if group in (None, question.group)]
        form.write(target, chosen, texts, protocol, model_id=Path(about["model"]).name)
        beside = target.with_name(target.name + ".run.json")
        files.write_whole(beside, json.dumps(about, indent=1) + "\n")
        words.append(f"{group}={target}" if apart else str(target))
    return words


def cost(logged: shares.LoggedAnswers) -> dict:
    """The cost of answers: mean tokens, milliseconds per token, total seconds, device, commit and machine.

    The time per token is that of the median batch, because the first batch of a shape waits for compilation. Times
    include images and prompts. Commit and machine are those of the batches; different ones are joined, unknown ones are
    None.
    """
    timed = [1000 * batch["seconds"] / batch["tokens"] for batch in logged.batches if batch["tokens"]]
    lengths = [row["tokens"] for row in logged.answers.values()]
    return {
        "tokens": round(sum(lengths) / len(lengths), 3) if lengths else None,
        "milliseconds": round(numbers.median(timed), 3) if timed else None,
        "seconds": round(sum(batch["seconds"] for batch in logged.batches), 1),
        "device": jax.devices()[0].device_kind,
    } | {
        name: " and ".join(dict.fromkeys(str(batch[name]) for batch in logged.batches if batch.get(name))) or None
        for name in ("commit", "machine")
    }
