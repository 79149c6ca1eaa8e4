"""The key table of InternVL: a LLaMA-like decoder, an InternViT, a connector with a norm; two layouts of each."""

from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.weights.rows import BUFFERS, decoder_rows, linear_rows, norm_rows
from lvlm_jax.weights.tables import CONVOLUTION, LINEAR, Piece, Row, Table

_LAYER = "vision_tower/layers_{i}"
_DECODER_LAYER = "language_model/layers_{i}"


def _vision_rows() -> tuple[Row, ...]:
    theirs = "encoder.layer.{i}"
    rows = [
        Row("vision", "vision_tower/class_embedding", "embeddings.cls_token"),
        Row("vision", "vision_tower/mask_token", "embeddings.mask_token"),
        Row("vision", "vision_tower/position_embedding", "embeddings.position_embeddings"),
        *_patch_rows("embeddings.patch_embeddings.projection"),
        *norm_rows("vision", "vision_tower/post_layernorm", "layernorm"),
        Row("vision", f"{_LAYER}/scale1", f"{theirs}.lambda_1"),
        Row("vision", f"{_LAYER}/scale2", f"{theirs}.lambda_2"),
        *norm_rows("vision", f"{_LAYER}/layer_norm1", f"{theirs}.layernorm_before"),
        *norm_rows("vision", f"{_LAYER}/layer_norm2", f"{theirs}.layernorm_after"),
        *linear_rows("vision", f"{_LAYER}/self_attn/out_proj", f"{theirs}.attention.projection_layer"),
    ]
    for projection in ("q_proj", "k_proj", "v_proj"):
        rows += linear_rows("vision", f"{_LAYER}/self_attn/{projection}", f"{theirs}.attention.{projection}")
    for norm in ("q_norm", "k_norm"):
        rows.append(Row("vision", f"{_LAYER}/self_attn/{norm}/scale", f"{theirs}.attention.{norm}.weight"))
    for layer in ("fc1", "fc2"):
        rows += linear_rows("vision", f"{_LAYER}/mlp/{layer}", f"{theirs}.mlp.{layer}")
    return tuple(rows)


def _patch_rows(name: str) -> tuple[Row, Row]:
    ours = "vision_tower/patch_embedding"
    return (
        Row("vision", f"{ours}/kernel", f"{name}.weight", CONVOLUTION),
        Row("vision", f"{ours}/bias", f"{name}.bias"),
    )


def _fused_rows(part: str, path: str, name: str, pieces: tuple[Piece, ...]) -> list[Row]:
    """Rows for query, key and value projections that are stored as one tensor."""
    rows = []
    for projection, piece in zip(("q_proj", "k_proj", "v_proj"), pieces, strict=True):
        rows.append(Row(part, f"{path}/{projection}/kernel", f"{name}.weight", LINEAR, piece))
        rows.append(Row(part, f"{path}/{projection}/bias", f"{name}.bias", piece=piece))
    return rows


def _chat_vision_rows() -> tuple[Row, ...]:
    """The rows in which OpenGVLab's tower differs. It has no mask token and no final norm."""
    theirs = "encoder.layers.{i}"
    rows = [
        Row("vision", "vision_tower/class_embedding", "embeddings.class_embedding"),
        Row("vision", "vision_tower/position_embedding", "embeddings.position_embedding"),
        *_patch_rows("embeddings.patch_embedding"),
        Row("vision", f"{_LAYER}/scale1", f"{theirs}.ls1"),
        Row("vision", f"{_LAYER}/scale2", f"{theirs}.ls2"),
        *norm_rows("vision", f"{_LAYER}/layer_norm1", f"{theirs}.norm1"),
        *norm_rows("vision", f"{_LAYER}/layer_norm2", f"{theirs}.norm2"),
        *linear_rows("vision", f"{_LAYER}/self_attn/out_proj", f"{theirs}.attn.proj"),
        *_fused_rows(
            "vision",
            f"{_LAYER}/self_attn",
            f"{theirs}.attn.qkv",
            tuple(Piece(index, lambda config: (1, 1, 1)) for index in range(3)),
        ),
    ]
    for norm in ("q_norm", "k_norm"):
        rows.append(Row("vision", f"{_LAYER}/self_attn/{norm}/scale", f"{theirs}.attn.{norm}.weight"))
    for layer in ("fc1", "fc2"):
        rows += linear_rows("vision", f"{_LAYER}/mlp/{layer}", f"{theirs}.mlp.{layer}")
    return tuple(rows)


def _internlm2_shares(config: FamilyConfig) -> tuple[int, ...]:
    """The shares of q, k and v: InternLM2 stores, for every key head, its query heads, the key head, its value head."""
    return config.text.num_heads // config.text.num_kv_heads, 1, 1


def _internlm2_rows() -> tuple[Row, ...]:
    theirs = "layers.{i}"
    pieces = tuple(Piece(index, _internlm2_shares, lambda config: config.text.num_kv_heads) for index in range(3))
    rows = [
        Row("decoder", "language_model/embed_tokens/embedding", "tok_embeddings.weight"),
        Row("decoder", f"{_DECODER_LAYER}/input_layernorm/scale", f"{theirs}.attention_norm.weight"),
        Row("decoder", f"{_DECODER_LAYER}/post_attention_layernorm/scale", f"{theirs}.ffn_norm.weight"),
        *_fused_rows("decoder", f"{_DECODER_LAYER}/self_attn", f"{theirs}.attention.wqkv", pieces),
        *linear_rows("decoder", f"{_DECODER_LAYER}/self_attn/o_proj", f"{theirs}.attention.wo"),
    ]
    for projection, name in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        rows += linear_rows("decoder", f"{_DECODER_LAYER}/mlp/{projection}", f"{theirs}.feed_forward.{name}")
    return tuple(rows)


def _scheme(decoder: str, head: str, vision: str, connector: str, numbers: tuple[str, ...]) -> dict[str, str]:
    names = ("connector_norm", "connector_1", "connector_2")
    connectors = {part: f"{connector}{number}." for part, number in zip(names, numbers, strict=True)}
    return {"decoder": decoder, "head": head, "vision": vision, **connectors}


def _unread(config: FamilyConfig) -> tuple[str, ...]:
    """The tower's layers and norm after the hidden state that the connector reads."""
    layers = config.vision.num_layers
    if config.feature_layer > layers:
        return ()
    return "vision_tower/post_layernorm/", *(f"vision_tower/layers_{i}/" for i in range(config.feature_layer, layers))


_CONNECTOR = ("layer_norm", "linear_1", "linear_2")
_NUMBERS = ("0", "1", "3")

TABLE = Table(
    rows=(
        *decoder_rows(),
        *_vision_rows(),
        Row("connector_norm", "connector/layer_norm/scale", "weight"),
        Row("connector_norm", "connector/layer_norm/bias", "bias"),
        Row("connector_1", "connector/linear_1/kernel", "weight", LINEAR),
        Row("connector_1", "connector/linear_1/bias", "bias"),
        Row("connector_2", "connector/linear_2/kernel", "weight", LINEAR),
        Row("connector_2", "connector/linear_2/bias", "bias"),
    ),
    schemes={
        # The "-hf" repositories on the hub, and files of any version of transformers.
        "hub": _scheme(
            "language_model.model.", "language_model.lm_head.", "vision_tower.", "multi_modal_projector.", _CONNECTOR
        ),
        # The state dict of a model in memory.
        "state_dict": _scheme(
            "model.language_model.", "lm_head.", "model.vision_tower.", "model.multi_modal_projector.", _CONNECTOR
        ),
        # OpenGVLab's own repositories: with a LLaMA-like decoder, and with InternLM2.
        "chat": _scheme("language_model.model.", "language_model.lm_head.", "vision_model.", "mlp1.", _NUMBERS),
        "chat_internlm2": _scheme(
            "language_model.model.", "language_model.output.", "vision_model.", "mlp1.", _NUMBERS
        ),
    },
    ignored=BUFFERS,
    tied=("language_model/lm_head/kernel", "language_model/embed_tokens/embedding"),
    vocabulary=("language_model/embed_tokens/embedding", "language_model/lm_head/kernel"),
    optional=_unread,
    own={"chat": _chat_vision_rows(), "chat_internlm2": (*_chat_vision_rows(), *_internlm2_rows())},
)
