"""Benchmarks, one file each: every module in this folder has a `BENCHMARK`."""

import importlib
import pkgutil

from lvlm_jax.evaluation import protocol
from lvlm_jax.evaluation.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {}

for _module in pkgutil.iter_modules(__path__):
    _benchmark = importlib.import_module(f"{__name__}.{_module.name}").BENCHMARK
    BENCHMARKS[_benchmark.name] = _benchmark
    protocol.register(*_benchmark.protocols)
