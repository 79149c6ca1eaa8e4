"""The key table of Qwen2-VL: a tower over patches with fused query, key and value, a merger, a Qwen2 decoder."""

from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.weights.rows import BUFFERS, decoder_rows, linear_rows, norm_rows
from lvlm_jax.weights.tables import Axes, Piece, Row, Table

VOLUME: Axes = (1, 2, 3, 4, 0)  # torch has [out, in, frames, height, width], we have [in, frames, height, width, out]
LAYER, THEIR_LAYER = "vision_tower/layers_{i}", "blocks.{i}"


def qkv_shares(config: FamilyConfig) -> tuple[int, ...]:
    """The shares of query, key and value in a fused tensor."""
    return 1, 1, 1


def attention_rows(ours: str, theirs: str) -> list[Row]:
    """Fused query, key and value (`qkv`) and the output projection (`proj`) of the tower's attention."""
    rows = [*linear_rows("vision", f"{ours}/out_proj", f"{theirs}.proj")]
    for index, projection in enumerate(("q_proj", "k_proj", "v_proj")):
        for row in linear_rows("vision", f"{ours}/{projection}", f"{theirs}.qkv"):
            rows.append(Row(row.part, row.path, row.name, row.axes, Piece(index, qkv_shares)))
    return rows


def tower_rows(mlp: tuple[str, ...]) -> list[Row]:
    """The rows of a tower (part "vision") and its merger (part "connector") with linear maps `mlp` in its layers."""
    rows = [
        Row("vision", "vision_tower/patch_embedding/kernel", "patch_embed.proj.weight", VOLUME),
        *attention_rows(f"{LAYER}/self_attn", f"{THEIR_LAYER}.attn"),
        *norm_rows("connector", "connector/norm", "ln_q"),
        *linear_rows("connector", "connector/linear_1", "mlp.0"),
        *linear_rows("connector", "connector/linear_2", "mlp.2"),
    ]
    for norm in ("norm1", "norm2"):
        rows += norm_rows("vision", f"{LAYER}/{norm}", f"{THEIR_LAYER}.{norm}")
    for projection in mlp:
        rows += linear_rows("vision", f"{LAYER}/mlp/{projection}", f"{THEIR_LAYER}.mlp.{projection}")
    return rows


def table(mlp: tuple[str, ...]) -> Table:
    """The key table of a model whose tower has linear maps `mlp` in its layers."""

    def scheme(decoder: str, tower: str) -> dict[str, str]:
        return {"decoder": decoder, "head": "lm_head.", "vision": tower, "connector": f"{tower}merger."}

    return Table(
        rows=(*decoder_rows(), *tower_rows(mlp)),
        schemes={
            # The Qwen repositories on the hub, and files of every version of transformers.
            "hub": scheme("model.", "visual."),
            # The state dict of a model in memory, since transformers 4.52.
            "state_dict": scheme("model.language_model.", "model.visual."),
        },
        ignored=BUFFERS,
        tied=("language_model/lm_head/kernel", "language_model/embed_tokens/embedding"),
        vocabulary=("language_model/embed_tokens/embedding", "language_model/lm_head/kernel"),
    )


TABLE = table(("fc1", "fc2"))
