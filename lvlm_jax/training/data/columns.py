"""Lists of data files with their shares, and the columns that training may ignore."""

import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lvlm_jax import files as disk
from lvlm_jax.errors import LVLMError

# Columns that describe a row; training does not depend on them.
DESCRIBING = frozenset(
    "idx question_id image_id source dataset ds_name origin_dataset origin_split split subset category kind task topic "
    "language url license truth answer_type wrong model chosen_model rejected_model".split()
)


def words(text: str) -> tuple[str, ...]:
    """The items of a comma-separated list."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def files(text: str) -> tuple[str, ...]:
    """The files of a comma-separated list; an existing file with a comma in its name is one item."""
    return (text,) if disk.is_file(Path(os.path.expanduser(text))) else words(text)


def shares(text: str, counts: Sequence[int]) -> tuple[tuple[int, float], ...]:
    """The number of rows of each file with its share of the batches; empty if all rows are drawn equally often.

    Args:
        text: comma-separated numbers, one per file; "" for none.
        counts: number of rows of each file.

    Raises:
        LVLMError: there is not one number per file, or one is not above 0.
    """
    numbers = words(text)
    if not numbers:
        return ()
    try:
        shares_found = tuple(float(word) for word in numbers)
    except ValueError:
        shares_found = ()
    if len(shares_found) != len(counts) or not all(0 < share < math.inf for share in shares_found):
        raise LVLMError(
            f"data_shares is {text[:60]!r} and data names {len(counts)} files; expected one number above 0 for each, "
            "separated by commas"
        )
    return tuple(zip(counts, shares_found, strict=True)) if len(shares_found) > 1 else ()


def refuse_unused(examples: Sequence[Any], ignored: Collection[str], path: str) -> None:
    """Raises an `LVLMError` if an example has a column in `extra` that is neither descriptive nor ignored."""
    for example in examples:
        for name, value in example.extra.items():
            if name not in DESCRIBING and name not in ignored and value not in (None, "", [], {}):
                raise LVLMError(
                    f"row {example.id} of {path!r} has the column {name[:60]!r}, which training does not use; remove "
                    f"it, or set --config.ignore={name[:60]}"
                )
