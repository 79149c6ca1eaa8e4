"""The key table of LLaVA-1.5: a LLaMA-like decoder, a CLIP vision tower, a two-layer connector."""

from lvlm_jax.weights.tables import CONVOLUTION, LINEAR, Row, Table


def _linear(part: str, path: str, name: str) -> tuple[Row, Row]:
    return Row(part, f"{path}/kernel", f"{name}.weight", LINEAR), Row(part, f"{path}/bias", f"{name}.bias")


def _layer_norm(path: str, name: str) -> tuple[Row, Row]:
    return Row("vision", f"{path}/scale", f"{name}.weight"), Row("vision", f"{path}/bias", f"{name}.bias")


def _decoder_rows() -> list[Row]:
    ours, theirs = "language_model/layers_{i}", "layers.{i}"
    rows = [
        Row("decoder", "language_model/embed_tokens/embedding", "embed_tokens.weight"),
        Row("decoder", "language_model/norm/scale", "norm.weight"),
        Row("head", "language_model/lm_head/kernel", "weight", LINEAR),
    ]
    for norm in ("input_layernorm", "post_attention_layernorm", "self_attn/q_norm", "self_attn/k_norm"):
        rows.append(Row("decoder", f"{ours}/{norm}/scale", f"{theirs}.{norm.replace('/', '.')}.weight"))
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        rows += _linear("decoder", f"{ours}/self_attn/{projection}", f"{theirs}.self_attn.{projection}")
    for projection in ("gate_proj", "up_proj", "down_proj"):
        rows += _linear("decoder", f"{ours}/mlp/{projection}", f"{theirs}.mlp.{projection}")
    return rows


def _clip_rows() -> list[Row]:
    ours, theirs = "vision_tower/layers_{i}", "encoder.layers.{i}"
    patches, positions = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
    rows = [
        Row("vision", "vision_tower/class_embedding", "embeddings.class_embedding"),
        Row("vision", "vision_tower/patch_embedding/kernel", patches, CONVOLUTION),
        Row("vision", "vision_tower/position_embedding/embedding", positions),
        *_layer_norm("vision_tower/pre_layernorm", "pre_layrnorm"),  # the missing "e" is transformers' own
        *_layer_norm("vision_tower/post_layernorm", "post_layernorm"),
    ]
    for norm in ("layer_norm1", "layer_norm2"):
        rows += _layer_norm(f"{ours}/{norm}", f"{theirs}.{norm}")
    for projection in ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "self_attn/out_proj"):
        rows += _linear("vision", f"{ours}/{projection}", f"{theirs}.{projection.replace('/', '.')}")
    for layer in ("mlp/fc1", "mlp/fc2"):
        rows += _linear("vision", f"{ours}/{layer}", f"{theirs}.{layer.replace('/', '.')}")
    return rows


def _scheme(decoder: str, head: str, vision: str, connector: str, numbers: tuple[str, str]) -> dict[str, str]:
    return {
        "decoder": decoder,
        "head": head,
        "vision": vision,
        "connector_1": f"{connector}{numbers[0]}.",
        "connector_2": f"{connector}{numbers[1]}.",
    }


def _unread(config) -> tuple[str, ...]:
    """What no chosen feature layer reads: the tower's last layers.

    Hidden state 0 is the embedding and hidden state i the output of layer i - 1, so reading hidden state i takes the
    layers before i; `post_layernorm` acts on the last state only after it was taken.
    """
    layers = config.vision.num_layers
    read = max(layer % (layers + 1) for layer in config.feature_layers)
    return "vision_tower/post_layernorm/", *(f"vision_tower/layers_{i}/" for i in range(read, layers))


_LINEAR = ("linear_1", "linear_2")
_BUFFERS = (
    r"\.rotary_emb\.inv_freq$",  # computed from the configuration
    r"(^|\.)embeddings\.position_ids$",  # 0, 1, 2, ...
)

# A CLIP checkpoint on its own: the tower of an original checkpoint that has none inside.
CLIP_TABLE = Table(
    rows=tuple(_clip_rows()),
    schemes={
        "clip": {"vision": "vision_model."},
        "clip_5": {"vision": ""},
    },  # transformers 5 drops the prefix
    ignored=(
        *_BUFFERS,
        r"^(text_model|visual_projection|text_projection)\.|^logit_scale$",
    ),  # CLIP's other half
)

TABLE = Table(
    rows=(
        *_decoder_rows(),
        *_clip_rows(),
        Row("connector_1", "connector/linear_1/kernel", "weight", LINEAR),
        Row("connector_1", "connector/linear_1/bias", "bias"),
        Row("connector_2", "connector/linear_2/kernel", "weight", LINEAR),
        Row("connector_2", "connector/linear_2/bias", "bias"),
    ),
    schemes={
        # The llava-hf repositories of the hub, and files that transformers 4 wrote. Every version loads it.
        "hub": _scheme(
            "language_model.model.",
            "language_model.lm_head.",
            "vision_tower.vision_model.",
            "multi_modal_projector.",
            _LINEAR,
        ),
        # Files that transformers 5 writes.
        "transformers": _scheme(
            "language_model.model.",
            "language_model.lm_head.",
            "vision_tower.",
            "multi_modal_projector.",
            _LINEAR,
        ),
        # The state dict of a model in memory: transformers 5, and 4.52 to 4.57.
        "state_dict": _scheme(
            "model.language_model.",
            "lm_head.",
            "model.vision_tower.",
            "model.multi_modal_projector.",
            _LINEAR,
        ),
        "state_dict_4": _scheme(
            "model.language_model.",
            "lm_head.",
            "model.vision_tower.vision_model.",
            "model.multi_modal_projector.",
            _LINEAR,
        ),
        # The authors' own repositories (liuhaotian), with the vision tower inside.
        "original": _scheme(
            "model.",
            "lm_head.",
            "model.vision_tower.vision_tower.vision_model.",
            "model.mm_projector.",
            ("0", "2"),
        ),
    },
    ignored=_BUFFERS,
    tied=("language_model/lm_head/kernel", "language_model/embed_tokens/embedding"),
    vocabulary=("language_model/embed_tokens/embedding", "language_model/lm_head/kernel"),
    optional=_unread,
    tower=CLIP_TABLE,
)
