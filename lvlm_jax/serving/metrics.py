"""Metrics for Prometheus; they contain no prompt, answer or key."""

import time
from typing import Any

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from lvlm_jax.errors import LVLMError
from lvlm_jax.serving.engine import Engine
from lvlm_jax.serving.work import Job, Update

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event for a program that was compiled or read from disk
LABELS = 100  # methods with their own label; clients may chain methods in any number of ways
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class Compiles:
    """Counts programs that this process compiled or read from the disk cache.

    Attributes:
        total: number of programs since the object was made.
        before: number of programs before the server was ready.
    """

    def __init__(self):
        self.total = self.before = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: Any) -> None:
        self.total += event == COMPILED

    @property
    def since_ready(self) -> int:
        """Number of programs that requests had to wait for."""
        return self.total - self.before


class Metrics:
    """The server's registry of metrics."""

    def __init__(self, engine: Engine, compiles: Compiles):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("lvlm_requests", "requests by path and status", ["path", "status"], registry=registry)
        self.answers = Counter("lvlm_answers", "answers by method and how they ended", ["method", "reason"],
                               registry=registry)  # fmt: skip
        self.tokens = Counter("lvlm_tokens", "tokens of prompts and of answers", ["kind"], registry=registry)
        self.first = Histogram("lvlm_first_token_seconds", "seconds from a request's arrival to its first token",
                               buckets=SECONDS, registry=registry)  # fmt: skip
        self.whole = Histogram("lvlm_answer_seconds", "seconds from a request's arrival to the end of its answer",
                               buckets=SECONDS, registry=registry)  # fmt: skip
        gauges = {
            "waiting": ("answers that wait for a row", lambda: engine.waiting),
            "under_way": ("answers that have a row", lambda: engine.under_way),
            "compiles": ("programs compiled since the start", lambda: compiles.total),
            "compiles_after_ready": ("programs compiled since the server was ready", lambda: compiles.since_ready),
            "image_cache_bytes": ("bytes of cached image tokens", lambda: engine.prefill.images.size),
            "image_cache_hits": ("images whose tokens were in the cache", lambda: engine.prefill.images.hits),
            "prefix_cache_bytes": ("bytes of cached prompt prefixes", lambda: engine.prefill.prefixes.size),
            "prefix_cache_hits": ("prompts whose prefix was in the cache", lambda: engine.prefill.prefixes.hits),
        }
        for name, (words, value) in gauges.items():
            Gauge(f"lvlm_{name}", words, registry=registry).set_function(value)
        self._labels: set[str] = set()
        engine.on_update = self.update

    def update(self, job: Job, update: Update | LVLMError) -> None:
        """Counts an update of a job; for `Engine.on_update`."""
        if isinstance(update, LVLMError):
            self.answers.labels(self._label(job), "error").inc()
        elif update.reason is not None:
            self.answers.labels(self._label(job), update.reason).inc()
            self.tokens.labels("prompt").inc(job.prompt.length)
            self.tokens.labels("answer").inc(len(update.tokens))
            self.first.observe(max(0.0, (job.began or job.arrived) - job.arrived))
            self.whole.observe(time.monotonic() - job.arrived)

    def text(self) -> tuple[bytes, str]:
        """The page of metrics, and its media type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def _label(self, job: Job) -> str:
        name = "none" if job.method is None else job.method.label
        if len(self._labels) < LABELS:
            self._labels.add(name)
        return name if name in self._labels else "other"
