"""The key table of SmolVLM and Idefics3: a LLaMA-like decoder, a SigLIP vision tower, one projection."""

from lvlm_jax.weights.rows import BUFFERS, decoder_rows, siglip_rows
from lvlm_jax.weights.tables import LINEAR, Row, Table

_NAMES = {
    "decoder": "model.text_model.",
    "head": "lm_head.",
    "vision": "model.vision_model.",
    "connector": "model.connector.modality_projection.",
}

TABLE = Table(
    rows=(*decoder_rows(), *siglip_rows(), Row("connector", "connector/kernel", "proj.weight", LINEAR)),
    # Files have always used the names of the model in memory.
    schemes={"hub": _NAMES, "state_dict": _NAMES},
    ignored=BUFFERS,
    tied=("language_model/lm_head/kernel", "language_model/embed_tokens/embedding"),
)
