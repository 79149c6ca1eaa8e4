"""The key table of Qwen3-VL. All versions of transformers write the same names."""

from lvlm_jax.weights.qwen2_vl import LAYER, THEIR_LAYER, VOLUME, attention_rows
from lvlm_jax.weights.rows import BUFFERS, decoder_rows, linear_rows, norm_rows
from lvlm_jax.weights.tables import Row, Table


def _merger_rows(path: str, name: str) -> list[Row]:
    return [
        *norm_rows("vision", f"{path}/norm", f"{name}.norm"),
        *linear_rows("vision", f"{path}/linear_1", f"{name}.linear_fc1"),
        *linear_rows("vision", f"{path}/linear_2", f"{name}.linear_fc2"),
    ]


def _tower_rows() -> list[Row]:
    return [
        Row("vision", "vision_tower/patch_embedding/kernel", "patch_embed.proj.weight", VOLUME),
        Row("vision", "vision_tower/patch_embedding/bias", "patch_embed.proj.bias"),
        Row("vision", "vision_tower/position_embedding/embedding", "pos_embed.weight"),
        *norm_rows("vision", f"{LAYER}/norm1", f"{THEIR_LAYER}.norm1"),
        *norm_rows("vision", f"{LAYER}/norm2", f"{THEIR_LAYER}.norm2"),
        *attention_rows(f"{LAYER}/self_attn", f"{THEIR_LAYER}.attn"),
        *linear_rows("vision", f"{LAYER}/mlp/fc1", f"{THEIR_LAYER}.mlp.linear_fc1"),
        *linear_rows("vision", f"{LAYER}/mlp/fc2", f"{THEIR_LAYER}.mlp.linear_fc2"),
    ]


_NAMES = {"decoder": "model.language_model.", "head": "lm_head.", "vision": "model.visual."}

TABLE = Table(
    rows=(
        *decoder_rows(),
        *_tower_rows(),
        *_merger_rows("connector/merger", "merger"),
        *_merger_rows("connector/deepstack_layers_{i}", "deepstack_merger_list.{i}"),
    ),
    schemes={"hub": _NAMES, "state_dict": _NAMES},
    ignored=BUFFERS,
    tied=("language_model/lm_head/kernel", "language_model/embed_tokens/embedding"),
    vocabulary=("language_model/embed_tokens/embedding", "language_model/lm_head/kernel"),
)
