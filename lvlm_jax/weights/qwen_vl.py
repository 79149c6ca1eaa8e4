"""The key table of Qwen-VL: the authors' names, with q, k and v in one tensor."""

from lvlm_jax.weights.rows import linear_rows, norm_rows
from lvlm_jax.weights.tables import CONVOLUTION, LINEAR, SAME, Axes, Piece, Row, Table

_THIRDS = (1, 1, 1)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _blocks(index: int) -> Piece:
    """The piece of q, k or v in a tensor that has all of q, then all of k, then all of v."""
    return Piece(index, lambda config: _THIRDS)


def _by_head(index: int) -> Piece:
    """The piece of q, k or v in a tensor of the tower, which has q, k and v of each head in turn."""
    return Piece(index, lambda config: _THIRDS, lambda config: config.vision.num_heads)


def _fused_rows(part: str, path: str, weight: str, bias: str, piece) -> list[Row]:
    """Rows for the three projections that one tensor contains."""
    tensors: tuple[tuple[str, str, Axes], ...] = (("kernel", weight, LINEAR), ("bias", bias, SAME))
    return [
        Row(part, f"{path}/{projection}/{leaf}", name, axes, piece(index))
        for index, projection in enumerate(_PROJECTIONS)
        for leaf, name, axes in tensors
    ]


def _decoder_rows() -> list[Row]:
    ours, theirs = "language_model/layers_{i}", "h.{i}"
    return [
        Row("decoder", "language_model/embed_tokens/embedding", "wte.weight"),
        Row("decoder", "language_model/norm/scale", "ln_f.weight"),
        Row("head", "language_model/lm_head/kernel", "weight", LINEAR),
        Row("decoder", f"{ours}/input_layernorm/scale", f"{theirs}.ln_1.weight"),
        Row("decoder", f"{ours}/post_attention_layernorm/scale", f"{theirs}.ln_2.weight"),
        *_fused_rows(
            "decoder", f"{ours}/self_attn", f"{theirs}.attn.c_attn.weight", f"{theirs}.attn.c_attn.bias", _blocks
        ),
        *linear_rows("decoder", f"{ours}/self_attn/o_proj", f"{theirs}.attn.c_proj"),
        *linear_rows("decoder", f"{ours}/mlp/up_proj", f"{theirs}.mlp.w1"),
        *linear_rows("decoder", f"{ours}/mlp/gate_proj", f"{theirs}.mlp.w2"),  # the one after silu
        *linear_rows("decoder", f"{ours}/mlp/down_proj", f"{theirs}.mlp.c_proj"),
    ]


def _tower_rows() -> list[Row]:
    ours, theirs = "vision_tower/layers_{i}", "transformer.resblocks.{i}"
    return [
        Row("vision", "vision_tower/patch_embedding/kernel", "conv1.weight", CONVOLUTION),
        Row("vision", "vision_tower/position_embedding", "positional_embedding"),
        *norm_rows("vision", "vision_tower/pre_layernorm", "ln_pre"),
        *norm_rows("vision", f"{ours}/layer_norm1", f"{theirs}.ln_1"),
        *norm_rows("vision", f"{ours}/layer_norm2", f"{theirs}.ln_2"),
        *_fused_rows(
            "vision", f"{ours}/self_attn", f"{theirs}.attn.in_proj.weight", f"{theirs}.attn.in_proj.bias", _by_head
        ),
        *linear_rows("vision", f"{ours}/self_attn/out_proj", f"{theirs}.attn.out_proj"),
        *linear_rows("vision", f"{ours}/mlp/fc1", f"{theirs}.mlp.c_fc"),
        *linear_rows("vision", f"{ours}/mlp/fc2", f"{theirs}.mlp.c_proj"),
    ]


def _resampler_rows() -> list[Row]:
    return [
        Row("vision", "connector/query", "attn_pool.query"),
        Row("vision", "connector/position_embedding", "attn_pool.pos_embed"),
        Row("vision", "connector/kv_proj/kernel", "attn_pool.kv_proj.weight", LINEAR),
        *norm_rows("vision", "connector/ln_q", "attn_pool.ln_q"),
        *norm_rows("vision", "connector/ln_kv", "attn_pool.ln_kv"),
        *_fused_rows("vision", "connector", "attn_pool.attn.in_proj_weight", "attn_pool.attn.in_proj_bias", _blocks),
        *linear_rows("vision", "connector/out_proj", "attn_pool.attn.out_proj"),
        *norm_rows("vision", "connector/ln_post", "ln_post"),
        Row("vision", "connector/proj/kernel", "proj"),  # multiplied from the right: already [in, out]
    ]


_PREFIXES = {"decoder": "transformer.", "head": "lm_head.", "vision": "transformer.visual."}

TABLE = Table(
    rows=(*_decoder_rows(), *_tower_rows(), *_resampler_rows()),
    schemes={"hub": _PREFIXES, "state_dict": _PREFIXES},
    ignored=(r"\.rotary_emb\.inv_freq$", r"\.attn\.masked_bias$"),  # buffers of older versions
    tied=("language_model/lm_head/kernel", "language_model/embed_tokens/embedding"),
    vocabulary=("language_model/embed_tokens/embedding", "language_model/lm_head/kernel"),
)
