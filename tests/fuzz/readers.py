"""All readers, and cases for them."""

import importlib.util
import math
from collections.abc import Callable, Collection
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz import calls, checkpoints, commands, pictures, questions, samples
from tests.fuzz.engine import Reader

ROOMS = (questions, samples, checkpoints, pictures, calls, commands)
NEEDS = {"parquet": "pyarrow"}
READERS = {
    reader.name: reader
    for room in ROOMS
    for reader in room.READERS
    if reader.name not in NEEDS or importlib.util.find_spec(NEEDS[reader.name])
}


def shared(total: int, names: Collection[str] = tuple(READERS)) -> dict[str, int]:
    """The number of cases for each reader; at least `total` together."""
    whole = sum(READERS[name].share for name in names)
    return {name: math.ceil(total * READERS[name].share / whole) for name in names}


def feed(reader: Reader, count: int, number: int, take: Callable[[Any], None], shrink: bool = False) -> None:
    """Calls `take` with `count` cases of a reader, which are those of `number`; with `shrink`, looks for a small one
    of those for which it raises."""

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(reader.cases)
    def cases(case):
        take(case)

    cases()
