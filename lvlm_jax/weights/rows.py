"""Rows of key tables that several model families share: linear maps, norms, the decoder, CLIP and SigLIP towers."""

from lvlm_jax.weights.tables import CONVOLUTION, LINEAR, Row


def linear_rows(part: str, path: str, name: str) -> tuple[Row, Row]:
    """Kernel and bias of a linear map; a row without a parameter in the configuration is not used."""
    return Row(part, f"{path}/kernel", f"{name}.weight", LINEAR), Row(part, f"{path}/bias", f"{name}.bias")


def norm_rows(part: str, path: str, name: str) -> tuple[Row, Row]:
    """Scale and bias of a layer norm (only the scale for a root-mean-square norm)."""
    return Row(part, f"{path}/scale", f"{name}.weight"), Row(part, f"{path}/bias", f"{name}.bias")


# Our norm of a decoder layer -> its name in LLaMA-like checkpoints.
DECODER_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "self_attn/q_norm": "self_attn.q_norm",
    "self_attn/k_norm": "self_attn.k_norm",
}


def decoder_rows(norms: dict[str, str] = DECODER_NORMS) -> list[Row]:
    """The rows of a decoder (part "decoder") and its output layer (part "head")."""
    ours, theirs = "language_model/layers_{i}", "layers.{i}"
    rows = [
        Row("decoder", "language_model/embed_tokens/embedding", "embed_tokens.weight"),
        Row("decoder", "language_model/norm/scale", "norm.weight"),
        Row("head", "language_model/lm_head/kernel", "weight", LINEAR),
    ]
    for path, name in norms.items():
        rows.append(Row("decoder", f"{ours}/{path}/scale", f"{theirs}.{name}.weight"))
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        rows += linear_rows("decoder", f"{ours}/self_attn/{projection}", f"{theirs}.self_attn.{projection}")
    for projection in ("gate_proj", "up_proj", "down_proj"):
        rows += linear_rows("decoder", f"{ours}/mlp/{projection}", f"{theirs}.mlp.{projection}")
    return rows


def clip_rows() -> list[Row]:
    """The rows of a CLIP tower (part "vision")."""
    return [
        Row("vision", "vision_tower/class_embedding", "embeddings.class_embedding"),
        *norm_rows("vision", "vision_tower/pre_layernorm", "pre_layrnorm"),  # the missing "e" is transformers' own
        *_encoder_rows(),
    ]


def siglip_rows() -> list[Row]:
    """The rows of a SigLIP tower (part "vision")."""
    bias = "embeddings.patch_embedding.bias"
    return [Row("vision", "vision_tower/patch_embedding/bias", bias), *_encoder_rows()]


def _encoder_rows() -> list[Row]:
    """The rows that CLIP and SigLIP towers share: embeddings, layers and the last norm."""
    ours, theirs = "vision_tower/layers_{i}", "encoder.layers.{i}"
    patches, positions = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
    rows = [
        Row("vision", "vision_tower/patch_embedding/kernel", patches, CONVOLUTION),
        Row("vision", "vision_tower/position_embedding/embedding", positions),
        *norm_rows("vision", "vision_tower/post_layernorm", "post_layernorm"),
    ]
    for norm in ("layer_norm1", "layer_norm2"):
        rows += norm_rows("vision", f"{ours}/{norm}", f"{theirs}.{norm}")
    for projection in ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "self_attn/out_proj"):
        rows += linear_rows("vision", f"{ours}/{projection}", f"{theirs}.{projection.replace('/', '.')}")
    for layer in ("mlp/fc1", "mlp/fc2"):
        rows += linear_rows("vision", f"{ours}/{layer}", f"{theirs}.{layer.replace('/', '.')}")
    return rows


# Buffers of older versions.
BUFFERS = (
    r"\.rotary_emb\.inv_freq$",  # computed from the configuration
    r"(^|\.)embeddings\.position_ids$",  # 0, 1, 2, ...
)
