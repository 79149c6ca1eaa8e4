"""What a verification found: a table for people, and a record as JSON."""

import dataclasses
import datetime
import os
import platform
import textwrap
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax

from lvlm_jax.version import __version__

PASSED, FAILED, LEFT_OUT, MEASURED = "passed", "failed", "left out", "measured"
_LIBRARIES = ("jax", "flax", "numpy", "transformers", "tokenizers", "pillow", "torch", "torchvision")
_WIDTH, _NAME = 120, 15  # of a table, and of its first column


@dataclasses.dataclass(frozen=True)
class Result:
    """What one check found.

    Attributes:
        name: of the check.
        status: PASSED, FAILED, LEFT_OUT or MEASURED.
        words: what was compared and came out, or why not.
        figures: the numbers behind the words, as plain JSON values.
    """

    name: str
    status: str
    words: str
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)


def compared(name: str, faults: Sequence[str], words: str, **figures: Any) -> Result:
    """PASSED with `words`, or FAILED with the first faults."""
    if not faults:
        return Result(name, PASSED, words, figures)
    more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    return Result(name, FAILED, "; ".join(faults[:3]) + more, figures | {"faults": len(faults)})


def line(result: Result) -> str:
    """A result as a line of a table; long words take several."""
    head = f"{result.name:{_NAME}}  {result.status:{len(MEASURED)}}  "
    return textwrap.fill(
        result.words, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
    )


def summary(results: Sequence[Result]) -> str:
    """How many checks came out in which way."""
    counts = {status: sum(result.status == status for result in results) for status in (PASSED, FAILED, LEFT_OUT)}
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def record(model: str, sha256: str | None, results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Everything that somebody else needs to compare: the checks, the versions, the machine.

    Args:
        model: what the user called it.
        sha256: of its files (`journal.record.checkpoint_hash`).
        seconds: how long all took.
    """
    return {
        "command": "lvlm verify",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "model": model,
        "model_sha256": sha256,
        "versions": {"lvlm_jax": __version__, "python": platform.python_version()} | _versions(),
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "devices": [f"{device.platform} {device.device_kind}" for device in jax.devices()],
        },
        "seconds": round(seconds, 1),
        "result": summary(results),
        "checks": [dataclasses.asdict(result) for result in results],
    }


def _versions() -> dict[str, str | None]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _processor() -> str:
    """The processor's name, where the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        lines = []
    return lines[0] if lines else platform.processor() or platform.machine()
