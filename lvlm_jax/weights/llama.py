"""The key table of a text-only LLaMA."""

from lvlm_jax.weights.rows import BUFFERS, decoder_rows
from lvlm_jax.weights.tables import Table

_NAMES = {"decoder": "model.", "head": "lm_head."}

TABLE = Table(
    rows=tuple(decoder_rows()),
    schemes={"hub": _NAMES, "state_dict": _NAMES},
    ignored=BUFFERS,
    tied=("language_model/lm_head/kernel", "language_model/embed_tokens/embedding"),
    vocabulary=("language_model/embed_tokens/embedding", "language_model/lm_head/kernel"),
)
