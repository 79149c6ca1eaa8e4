"""C++ products and attention that are faster than XLA's on a CPU; compiled on the user's machine on first use.

They are optional: without a C++ compiler, and on every other platform, XLA computes the same.
"""

from lvlm_jax.native.attention import attention, attention_gradient
from lvlm_jax.native.build import available
from lvlm_jax.native.columns import write_columns
from lvlm_jax.native.each_rows import each_rows_dot
from lvlm_jax.native.few_rows import FEW_ROWS, SOME_ROWS, few_rows_dot
from lvlm_jax.native.many_rows import converted_late

__all__ = [
    "FEW_ROWS", "SOME_ROWS", "attention", "attention_gradient", "available", "converted_late", "each_rows_dot",
    "few_rows_dot", "write_columns",
]  # fmt: skip
