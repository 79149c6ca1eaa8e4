"""Which files a run learns from and how often, and which of their columns it may leave unread."""

import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lvlm_jax import files as disk
from lvlm_jax.errors import LVLMError

# Columns that say where a row comes from or what it is about; what is learned does not depend on them.
DESCRIBING = frozenset(
    "idx question_id image_id source dataset ds_name origin_dataset origin_split split subset category kind task topic "
    "language url license truth answer_type model chosen_model rejected_model".split()
)


def words(text: str) -> tuple[str, ...]:
    """The words of a list separated by commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def files(text: str) -> tuple[str, ...]:
    """The files of a list separated by commas; a file whose name has a comma is one."""
    return (text,) if disk.is_file(Path(os.path.expanduser(text))) else words(text)


def shares(text: str, counts: Sequence[int]) -> tuple[tuple[int, float], ...]:
    """The rows of each file with its share of what is drawn; empty where all rows are drawn equally often.

    Args:
        text: numbers separated by commas, one for each file; "" for none.
        counts: rows of each file.

    Raises:
        LVLMError: not as many numbers as files, or one that is not above 0.
    """
    given = words(text)
    if not given:
        return ()
    try:
        found = tuple(float(word) for word in given)
    except ValueError:
        found = ()
    if len(found) != len(counts) or not all(0 < share < math.inf for share in found):
        raise LVLMError(
            f"data_shares is {text[:60]!r} and data names {len(counts)} files; expected one number above 0 for each, "
            "separated by commas"
        )
    return tuple(zip(counts, found, strict=True)) if len(found) > 1 else ()


def refuse_unused(examples: Sequence[Any], ignored: Collection[str], path: str) -> None:
    """Raises an `LVLMError` if an example has a column in `extra` that is neither describing nor ignored."""
    for example in examples:
        for name, value in example.extra.items():
            if name not in DESCRIBING and name not in ignored and value not in (None, "", [], {}):
                raise LVLMError(
                    f"row {example.id} of {path!r} has the column {name[:60]!r}, which training does not use; remove "
                    f"it, or say so with --config.ignore={name[:60]}"
                )
