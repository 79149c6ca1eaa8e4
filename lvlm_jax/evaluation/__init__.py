"""Benchmarks and their scores: protocols, readers, scorers, statistics. Scoring needs no model."""

from lvlm_jax.evaluation.benchmark import Benchmark
from lvlm_jax.evaluation.benchmarks import BENCHMARKS
from lvlm_jax.evaluation.protocol import Protocol, get, names, record
from lvlm_jax.evaluation.question import Data, Question
from lvlm_jax.evaluation.scores import Figure, Scores

__all__ = ["BENCHMARKS", "Benchmark", "Data", "Figure", "Protocol", "Question", "Scores", "get", "names", "record"]
