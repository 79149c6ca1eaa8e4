"""The key table of InstructBLIP: EVA-CLIP tower, Q-Former, projection, decoder.

The names are the same in the Salesforce repositories on the hub, in files of transformers 4 and 5, and in a model in
memory. The tower's queries, keys and values are fused.
"""

from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.weights.rows import BUFFERS, decoder_rows, linear_rows, norm_rows
from lvlm_jax.weights.tables import CONVOLUTION, LINEAR, Piece, Row, Table


def _thirds(config: FamilyConfig) -> tuple[int, ...]:
    return (1, 1, 1)


def _tower_rows() -> list[Row]:
    ours, theirs = "vision_tower/layers_{i}", "encoder.layers.{i}"
    patches = "embeddings.patch_embedding"
    rows = [
        Row("vision", "vision_tower/class_embedding", "embeddings.class_embedding"),
        Row("vision", "vision_tower/position_embedding", "embeddings.position_embedding"),
        Row("vision", "vision_tower/patch_embedding/kernel", f"{patches}.weight", CONVOLUTION),
        Row("vision", "vision_tower/patch_embedding/bias", f"{patches}.bias"),
        *norm_rows("vision", "vision_tower/post_layernorm", "post_layernorm"),
    ]
    for norm in ("layer_norm1", "layer_norm2"):
        rows += norm_rows("vision", f"{ours}/{norm}", f"{theirs}.{norm}")
    for index, projection in enumerate(("q_proj", "k_proj", "v_proj")):
        path, name, piece = f"{ours}/self_attn/{projection}", f"{theirs}.self_attn.qkv", Piece(index, _thirds)
        rows += [
            Row("vision", f"{path}/kernel", f"{name}.weight", LINEAR, piece),
            Row("vision", f"{path}/bias", f"{name}.bias", piece=piece),
        ]
    rows += linear_rows("vision", f"{ours}/self_attn/out_proj", f"{theirs}.self_attn.projection")
    for layer in ("fc1", "fc2"):
        rows += linear_rows("vision", f"{ours}/mlp/{layer}", f"{theirs}.mlp.{layer}")
    return rows


def _qformer_rows() -> list[Row]:
    ours, theirs = "qformer/layers_{i}", "encoder.layer.{i}"
    rows = [
        Row("qformer", "qformer/word_embedding/embedding", "embeddings.word_embeddings.weight"),
        Row("qformer", "qformer/position_embedding/embedding", "embeddings.position_embeddings.weight"),
        *norm_rows("qformer", "qformer/embedding_norm", "embeddings.layernorm"),
    ]
    for kind, name in (("self", "attention"), ("cross", "crossattention")):
        for projection, theirs_name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            rows += linear_rows(
                "qformer", f"{ours}/{kind}_attn/{projection}", f"{theirs}.{name}.attention.{theirs_name}"
            )
        rows += linear_rows("qformer", f"{ours}/{kind}_attn/out_proj", f"{theirs}.{name}.output.dense")
        rows += norm_rows("qformer", f"{ours}/{kind}_norm", f"{theirs}.{name}.output.LayerNorm")
    for kind, suffix in (("text", ""), ("query", "_query")):
        rows += linear_rows("qformer", f"{ours}/{kind}_mlp/fc1", f"{theirs}.intermediate{suffix}.dense")
        rows += linear_rows("qformer", f"{ours}/{kind}_mlp/fc2", f"{theirs}.output{suffix}.dense")
        rows += norm_rows("qformer", f"{ours}/{kind}_norm", f"{theirs}.output{suffix}.LayerNorm")
    return rows


_NAMES = {
    "decoder": "language_model.model.",
    "head": "language_model.lm_head.",
    "vision": "vision_model.",
    "qformer": "qformer.",
    "whole": "",
}

TABLE = Table(
    rows=(
        *decoder_rows(),
        *_tower_rows(),
        *_qformer_rows(),
        Row("whole", "qformer/query_tokens", "query_tokens"),
        *linear_rows("whole", "connector", "language_projection"),
    ),
    schemes={"hub": _NAMES, "state_dict": _NAMES},
    ignored=BUFFERS,
    tied=("language_model/lm_head/kernel", "language_model/embed_tokens/embedding"),
    vocabulary=("language_model/embed_tokens/embedding", "language_model/lm_head/kernel"),
)
