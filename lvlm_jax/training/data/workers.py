"""Batches by step number, made ahead of time in worker processes.

A source is any picklable callable from a step number to a batch (a pytree of NumPy arrays). Because a batch
depends on nothing but its number, a run that is resumed sees exactly what an uninterrupted one sees, and no
iterator state needs saving.

grain's `mp_prefetch` is no faster, and its workers and their shared memory outlive a training process that is killed
(grain 0.2.18). So the processes here are our own.
"""

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from lvlm_jax.errors import LVLMError

_source: Callable[[int], Any] | None = None


def _adopt(source: Callable[[int], Any]) -> None:
    global _source
    _source = source
    # Schedulers and terminals signal a whole process group, but only the training process decides when to stop.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Ends this process if the training process is killed; otherwise it would wait for the pool's pipes for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _make(step: int) -> Any:
    return _source(step)


def batches(source: Callable[[int], Any], start: int, stop: int, workers: int = 1) -> Iterator[Any]:
    """The batches of steps `start` to `stop - 1`, in order.

    Args:
        source: step number -> batch.
        workers: number of processes that prepare batches, two each; 0 makes every batch in this process.

    Raises:
        LVLMError: a worker was killed, for example because memory ran out.
    """
    if workers == 0:
        yield from map(source, range(start, stop))
        return
    # Spawned, because forking a process with XLA's threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_adopt, initargs=(source,))
    pending: collections.deque = collections.deque()
    try:
        upcoming = iter(range(start, stop))
        for step in upcoming:
            pending.append(pool.submit(_make, step))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise LVLMError(
            f"a process that makes batches has ended ({error}); if memory ran out, lower loop.workers"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
