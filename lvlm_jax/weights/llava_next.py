"""The key table of LLaVA-NeXT: LLaVA-1.5's, with the token that ends a row of patches."""

import dataclasses

from lvlm_jax.weights.llava import TABLE as LLAVA
from lvlm_jax.weights.tables import Row

# Scheme -> prefix of the newline token's name.
NEWLINE = {"hub": "", "transformers": "", "state_dict": "model.", "state_dict_4": "model."}
NEWLINE_ROW = Row("newline", "connector/image_newline", "image_newline")

TABLE = dataclasses.replace(
    LLAVA,
    rows=(*LLAVA.rows, NEWLINE_ROW),
    schemes={scheme: {**LLAVA.schemes[scheme], "newline": prefix} for scheme, prefix in NEWLINE.items()},
)
