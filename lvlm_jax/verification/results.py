"""The results of a verification: a table for people, and a JSON record."""

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
_WIDTH, _NAME = 120, 15  # widths of a table and of its first column


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one check.

    Attributes:
        name: name of the check.
        status: PASSED, FAILED, LEFT_OUT or MEASURED.
        words: the comparison and its outcome, or the reason why the check was left out.
        figures: the numbers, as plain JSON values.
    """

    name: str
    status: str
    words: str
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)


def compared(name: str, faults: Sequence[str], words: str, **figures: Any) -> Result:
    """A result: PASSED with `words` if there are no faults, else FAILED with the first three."""
    if not faults:
        return Result(name, PASSED, words, figures)
    rest = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    return Result(name, FAILED, "; ".join(faults[:3]) + rest, figures | {"faults": len(faults)})


def line(result: Result) -> str:
    """A result as a line of a table; long texts take several lines."""
    head = f"{result.name:{_NAME}}  {result.status:{len(MEASURED)}}  "
    return textwrap.fill(
        result.words, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
    )


def summary(results: Sequence[Result]) -> str:
    """How many checks had which outcome."""
    counts = {status: sum(result.status == status for result in results) for status in (PASSED, FAILED, LEFT_OUT)}
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def record(model: str, sha256: str | None, results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """The record of a verification: the checks, the versions, the machine.

    Args:
        model: the user's name for the model.
        sha256: hash of the model's files (`journal.record.checkpoint_hash`).
        seconds: duration of all checks.
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
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _processor() -> str:
    """The processor's name, if the system reports it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        lines = []
    return lines[0] if lines else platform.processor() or platform.machine()
