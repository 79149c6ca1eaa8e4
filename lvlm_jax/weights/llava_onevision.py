"""The key table of LLaVA-OneVision: LLaVA-NeXT's with a SigLIP tower."""

import dataclasses

from lvlm_jax.weights.llava_next import TABLE as LLAVA_NEXT
from lvlm_jax.weights.rows import siglip_rows

TABLE = dataclasses.replace(
    LLAVA_NEXT, rows=(*(row for row in LLAVA_NEXT.rows if row.part != "vision"), *siglip_rows()), tower=None
)
