"""Benchmarks and how they are scored: protocols, readers, scorers, statistics. No model is needed here.

Every module of `BENCHMARKS` offers the same four functions:

    question_files(data, protocol) -> dict[str, list[Path]]                   which files decide the figures
    read(data, protocol, need_images=False) -> list[Question]
    prompt(question, protocol) -> str
    score(questions, answers, protocol) -> Scores                             answers: Question.key -> text
"""

from lvlm_jax.evaluation.benchmarks import amber, chair, choices, mihbench, mme, pope
from lvlm_jax.evaluation.protocol import Protocol, get, names, record
from lvlm_jax.evaluation.question import Data, Question
from lvlm_jax.evaluation.scores import Figure, Scores
from lvlm_jax.pocket import benchmark as pocket

BENCHMARKS = {
    "pope": pope,
    "chair": chair,
    "mme": mme,
    "amber": amber,
    "mihbench": mihbench,
    "choices": choices,
}

__all__ = [
    "BENCHMARKS",
    "Data",
    "Figure",
    "Protocol",
    "Question",
    "Scores",
    "get",
    "names",
    "pocket",
    "record",
]
