"""Benchmarks and how they are scored: protocols, readers, scorers, statistics. No model is needed here."""

from lvlm_jax.evaluation.benchmark import Benchmark
from lvlm_jax.evaluation.benchmarks import BENCHMARKS
from lvlm_jax.evaluation.protocol import Protocol, get, names, record
from lvlm_jax.evaluation.question import Data, Question
from lvlm_jax.evaluation.scores import Figure, Scores

__all__ = ["BENCHMARKS", "Benchmark", "Data", "Figure", "Protocol", "Question", "Scores", "get", "names", "record"]
