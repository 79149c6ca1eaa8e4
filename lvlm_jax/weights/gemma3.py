"""The key table of Gemma 3: a Gemma decoder, a SigLIP vision tower, a norm and a projection."""

from lvlm_jax.weights.rows import BUFFERS, DECODER_NORMS, decoder_rows, siglip_rows
from lvlm_jax.weights.tables import Row, Table


def _scheme(decoder: str, head: str, vision: str, connector: str) -> dict[str, str]:
    return {"decoder": decoder, "head": head, "vision": vision, "connector": connector}


# Gemma normalises before and after attention and MLP, and names the norms by their places.
_NORMS = DECODER_NORMS | {
    "attention_output_norm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}

TABLE = Table(
    rows=(
        *decoder_rows(norms=_NORMS),
        *siglip_rows(),
        Row("connector", "connector/norm/scale", "mm_soft_emb_norm.weight"),
        # Stored as [in, out], like ours.
        Row("connector", "connector/projection/kernel", "mm_input_projection_weight"),
    ),
    schemes={
        # The repositories on the hub, and files of transformers 4. Every version loads them.
        "hub": _scheme(
            "language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.", "multi_modal_projector."
        ),
        # Files of transformers 5.
        "transformers": _scheme(
            "language_model.model.", "language_model.lm_head.", "vision_tower.", "multi_modal_projector."
        ),
        # The state dict of a model in memory: transformers 5, and 4.52 to 4.57.
        "state_dict": _scheme(
            "model.language_model.", "lm_head.", "model.vision_tower.", "model.multi_modal_projector."
        ),
        "state_dict_4": _scheme(
            "model.language_model.", "lm_head.", "model.vision_tower.vision_model.", "model.multi_modal_projector."
        ),
    },
    ignored=BUFFERS,
    tied=("language_model/lm_head/kernel", "language_model/embed_tokens/embedding"),
)
