"""The key table of GLM-4.1V.

Gate and up projections of the decoder are one tensor, and so are queries, keys and values of the tower. All versions of
transformers write the same names.
"""

from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.weights.qwen2_vl import LAYER, THEIR_LAYER, VOLUME, attention_rows
from lvlm_jax.weights.rows import BUFFERS, decoder_rows, linear_rows, norm_rows
from lvlm_jax.weights.tables import CONVOLUTION, LINEAR, Piece, Row, Table

NORMS = {
    "input_layernorm": "input_layernorm",
    "attention_output_norm": "post_self_attn_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp_output_norm": "post_mlp_layernorm",
}


def _halves(config: FamilyConfig) -> tuple[int, ...]:
    return 1, 1


def _decoder_rows() -> list[Row]:
    fused = {
        f"language_model/layers_{{i}}/mlp/{projection}/kernel": Piece(index, _halves)
        for index, projection in enumerate(("gate_proj", "up_proj"))
    }
    return [
        *(row for row in decoder_rows(NORMS) if row.path not in fused),
        *(Row("decoder", path, "layers.{i}.mlp.gate_up_proj.weight", LINEAR, piece) for path, piece in fused.items()),
    ]


def _tower_rows() -> list[Row]:
    positions = "embeddings.position_embedding.weight"
    rows = [
        Row("vision", "vision_tower/patch_embedding/kernel", "patch_embed.proj.weight", VOLUME),
        Row("vision", "vision_tower/patch_embedding/bias", "patch_embed.proj.bias"),
        Row("vision", "vision_tower/position_embedding/embedding", positions),
        *norm_rows("vision", "vision_tower/embedding_norm", "post_conv_layernorm"),
        *norm_rows("vision", "vision_tower/output_norm", "post_layernorm"),
        *norm_rows("vision", f"{LAYER}/norm1", f"{THEIR_LAYER}.norm1"),
        *norm_rows("vision", f"{LAYER}/norm2", f"{THEIR_LAYER}.norm2"),
        *attention_rows(f"{LAYER}/self_attn", f"{THEIR_LAYER}.attn"),
    ]
    for projection in ("gate_proj", "up_proj", "down_proj"):
        rows += linear_rows("vision", f"{LAYER}/mlp/{projection}", f"{THEIR_LAYER}.mlp.{projection}")
    return rows


def _connector_rows() -> list[Row]:
    rows = [
        Row("vision", "connector/downsample/kernel", "downsample.weight", CONVOLUTION),
        Row("vision", "connector/downsample/bias", "downsample.bias"),
        *norm_rows("vision", "connector/norm", "merger.post_projection_norm"),
    ]
    for projection in ("proj", "gate_proj", "up_proj", "down_proj"):
        rows += linear_rows("vision", f"connector/{projection}", f"merger.{projection}")
    return rows


_NAMES = {"decoder": "model.language_model.", "head": "lm_head.", "vision": "model.visual."}

TABLE = Table(
    rows=(*_decoder_rows(), *_tower_rows(), *_connector_rows()),
    schemes={"hub": _NAMES, "state_dict": _NAMES},
    ignored=BUFFERS,
    tied=("language_model/lm_head/kernel", "language_model/embed_tokens/embedding"),
    vocabulary=("language_model/embed_tokens/embedding", "language_model/lm_head/kernel"),
)
