"""The key table of LLaVA-1.5: a LLaMA-like decoder, a CLIP vision tower, a two-layer connector."""

from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.weights.rows import BUFFERS, clip_rows, decoder_rows
from lvlm_jax.weights.tables import LINEAR, Row, Table


def _scheme(decoder: str, head: str, vision: str, connector: str, numbers: tuple[str, str]) -> dict[str, str]:
    return {
        "decoder": decoder,
        "head": head,
        "vision": vision,
        "connector_1": f"{connector}{numbers[0]}.",
        "connector_2": f"{connector}{numbers[1]}.",
    }


def _unread(config: FamilyConfig) -> tuple[str, ...]:
    """Layers of the tower that no chosen feature layer needs: the last ones.

    Hidden state 0 is the embedding and hidden state i the output of layer i - 1, so hidden state i needs the layers
    before i. `post_layernorm` acts on the last state only after it was read.
    """
    layers = config.vision.num_layers
    read = max(layer % (layers + 1) for layer in config.feature_layers)
    return "vision_tower/post_layernorm/", *(f"vision_tower/layers_{i}/" for i in range(read, layers))


_LINEAR = ("linear_1", "linear_2")

# A separate CLIP checkpoint: the tower of an original checkpoint that contains no tower.
CLIP_TABLE = Table(
    rows=tuple(clip_rows()),
    schemes={"clip": {"vision": "vision_model."}, "clip_5": {"vision": ""}},  # transformers 5 drops the prefix
    ignored=(*BUFFERS, r"^(text_model|visual_projection|text_projection)\.|^logit_scale$"),  # CLIP's text half
)

TABLE = Table(
    rows=(
        *decoder_rows(),
        *clip_rows(),
        Row("connector_1", "connector/linear_1/kernel", "weight", LINEAR),
        Row("connector_1", "connector/linear_1/bias", "bias"),
        Row("connector_2", "connector/linear_2/kernel", "weight", LINEAR),
        Row("connector_2", "connector/linear_2/bias", "bias"),
    ),
    schemes={
        # The llava-hf repositories on the hub, and files of transformers 4. Every version loads them.
        "hub": _scheme(
            "language_model.model.",
            "language_model.lm_head.",
            "vision_tower.vision_model.",
            "multi_modal_projector.",
            _LINEAR,
        ),
        # Files of transformers 5.
        "transformers": _scheme(
            "language_model.model.", "language_model.lm_head.", "vision_tower.", "multi_modal_projector.", _LINEAR
        ),
        # The state dict of a model in memory: transformers 5, and 4.52 to 4.57.
        "state_dict": _scheme(
            "model.language_model.", "lm_head.", "model.vision_tower.", "model.multi_modal_projector.", _LINEAR
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
            "model.", "lm_head.", "model.vision_tower.vision_tower.vision_model.", "model.mm_projector.", ("0", "2")
        ),
    },
    ignored=BUFFERS,
    tied=("language_model/lm_head/kernel", "language_model/embed_tokens/embedding"),
    vocabulary=("language_model/embed_tokens/embedding", "language_model/lm_head/kernel"),
    optional=_unread,
    tower=CLIP_TABLE,
)
