"""The training recipe of the pocket model, in three stages.

1. `tower`: the vision tower learns which object, or which kind of place, each patch shows.
2. `connector`: image tokens become similar to the decoder's embeddings of words: the word for the object or the kind of
   place that the patch shows, and "left", "middle" or "right", according to the patch's column.
3. `everything`: conversations about one to four images, with loss on the answers, and a share of stage 2's loss.

Without the first two stages, the decoder learns to speak long before it learns to look.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from lvlm_jax import models, weights
from lvlm_jax.errors import LVLMError
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import Method
from lvlm_jax.methods.parse import as_method
from lvlm_jax.models.config import DecoderConfig
from lvlm_jax.models.llava import LlavaConfig
from lvlm_jax.pocket import recipe_data as pocket_data
from lvlm_jax.pocket import recipe_losses as sft
from lvlm_jax.pocket import tokenizer
from lvlm_jax.training import loop, records, registry, trained_under
from lvlm_jax.training.losses import Mean, accuracy, cross_entropy

STAGES = ("tower", "connector", "everything")
CLASSIFIER = "classifier"  # a further parameter, only in the first stage
# Projections into the residual stream are smaller at the start, so that the stream's size does not grow with depth.
RESIDUAL = ("o_proj", "down_proj", "out_proj", "fc2")


def hf_config(settings: Any, encoder: Any) -> dict:
    """The model's `config.json`, with sizes from `settings` (the config's `model`) and token ids from the tokenizer."""
    image_token = encoder.convert_tokens_to_ids(tokenizer.IMAGE)
    special = {
        "bos_token_id": encoder.bos_token_id,
        "eos_token_id": encoder.eos_token_id,
        "pad_token_id": encoder.pad_token_id,
    }
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": image_token,
        "image_seq_length": tokenizer.IMAGE_TOKENS,
        "vision_feature_layer": settings.vision_feature_layer,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": True,
        **special,
        "text_config": {
            "model_type": "llama",
            "vocab_size": len(encoder),
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
            **special,
            **settings.text,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": tokenizer.SIZE,
            "patch_size": tokenizer.PATCH,
            "hidden_act": "quick_gelu",
            **settings.vision,
        },
    }


def initial_parameters(config: LlavaConfig, seed: int) -> dict:
    """Initial parameters: kernels scaled by fan-in, norms one, biases zero, embeddings of about unit length.

    The first half of each layer's heads attends to similar tokens from the start (`_look_for_alike`).
    """
    depth = {"language_model": config.text.num_layers, "vision_tower": config.vision.num_layers}
    shapes = models.abstract_parameters(config)
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def fill(path: tuple, shape: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        names = [entry.key for entry in path]
        if names[-1] == "scale":
            return jnp.ones(shape.shape)
        if names[-1] == "bias":
            return jnp.zeros(shape.shape)
        if names[-1] != "kernel":  # embeddings
            return jax.random.normal(key, shape.shape) * shape.shape[-1] ** -0.5
        scale = np.prod(shape.shape[:-1]) ** -0.5
        if names[-2] in RESIDUAL:
            scale *= (2 * depth[names[0]]) ** -0.5
        return jax.random.normal(key, shape.shape) * scale

    params = jax.tree.unflatten(
        structure, [fill(path, shape, key) for (path, shape), key in zip(leaves, keys, strict=True)]
    )
    for index in range(config.text.num_layers):
        _look_for_alike(params["language_model"][f"layers_{index}"]["self_attn"], config.text)
    return params


def _look_for_alike(attention: dict, config: DecoderConfig) -> None:
    """Initialises the first half of a layer's heads to attend to similar tokens, in place.

    With equal query and key projections, a token's logit with a similar token is far above other logits (mimetic
    initialisation, arXiv 2305.09828). So the word in a question attends to matching image tokens from the start.
    """
    width = config.num_kv_heads // 2 * config.head_dim
    query, key = attention["q_proj"]["kernel"], attention["k_proj"]["kernel"]
    attention["k_proj"]["kernel"] = key.at[:, :width].set(query[:, :width])


def patch_metrics(logits: jax.Array, labels: jax.Array) -> dict[str, Mean]:
    """`patch_loss` over all labelled patches, `patch_accuracy` over those that show an object."""
    is_labelled = labels >= 0
    safe = jnp.maximum(labels, 0)
    return {
        "patch_loss": cross_entropy(logits, safe, is_labelled),
        "patch_accuracy": accuracy(logits, safe, is_labelled & (labels < pocket_data.CATEGORY_COUNT)),
    }


def word_logits(module: nn.Module, params: dict, image_tokens: jax.Array, words: np.ndarray) -> jax.Array:
    """Logits of image tokens over the decoder's embeddings of the label words."""
    embedded = module.apply({"params": params}, jnp.asarray(words)[None], method="embed")[0]
    return jnp.einsum("IPE,LE->IPL", image_tokens, embedded)


def tower_metrics(module: nn.Module, params: dict, batch: dict) -> dict[str, Mean]:
    """Metrics of stage 1, from a linear classifier on the tower; the classifier is discarded after the stage."""
    features = module.apply({"params": params}, sft.pixels(batch["images"]), method="image_features")
    logits = features @ params[CLASSIFIER]["kernel"] + params[CLASSIFIER]["bias"]
    return patch_metrics(logits, batch["labels"])


def connector_metrics(
    module: nn.Module, words: np.ndarray, columns: np.ndarray, params: dict, batch: dict
) -> dict[str, Mean]:
    """Metrics of stage 2, about the objects and the columns of patches; `words` and `columns` as in `Recipe`."""
    image_tokens = sft.encode(module, params, batch["images"])
    metrics = patch_metrics(word_logits(module, params, image_tokens, words), batch["labels"])
    metrics["place_loss"] = place_loss(module, params, image_tokens, batch["labels"], columns)
    return metrics


def place_loss(
    module: nn.Module, params: dict, image_tokens: jax.Array, labels: jax.Array, columns: np.ndarray
) -> Mean:
    """Loss of the image tokens of patches with an object: each should resemble the word for its column (`columns`)."""
    thirds, targets = np.unique(columns, return_inverse=True)
    logits = word_logits(module, params, image_tokens, thirds)
    side = len(columns)
    targets = jnp.broadcast_to(jnp.tile(targets, side), labels.shape)
    return cross_entropy(logits, targets, (labels >= 0) & (labels < pocket_data.CATEGORY_COUNT))


def conversation_metrics(
    module: nn.Module, words: np.ndarray, columns: np.ndarray, params: dict, batch: dict, method: Method | None = None
) -> dict[str, Mean]:
    """Metrics of stage 3, over all answer tokens and patches of the batch; `words` and `columns` as in `Recipe`."""
    total: dict[str, Mean] = {}
    for part in batch.values():
        image_tokens = sft.encode(module, params, part["images"])
        logits = sft.next_token_logits(module, params, part["tokens"], image_tokens, method)
        metrics = sft.answer_metrics(logits, part)
        metrics |= patch_metrics(word_logits(module, params, image_tokens, words), part["labels"])
        metrics["place_loss"] = place_loss(module, params, image_tokens, part["labels"], columns)
        total = {name: total[name] + mean if total else mean for name, mean in metrics.items()}
    return total


def objective(
    metrics: Callable[[dict, dict], dict[str, Mean]], params: dict, frozen: dict, batch: dict, key: jax.Array
) -> dict[str, Mean]:
    """A stage's metrics as an objective for `loop.Task`: all parameters are trained, and nothing is random."""
    del frozen, key
    return metrics(params, batch)


def evaluation(score: Callable[[dict, dict], dict[str, Mean]], batches: dict[str, dict]) -> Callable:
    """An `evaluate` for `loop.Task`: the metrics of each named batch, as `name/metric`."""
    score = jax.jit(score)

    def evaluate(params: dict, frozen: dict) -> dict[str, Mean]:
        del frozen
        return {
            f"{name}/{metric}": mean for name, batch in batches.items() for metric, mean in score(params, batch).items()
        }

    return evaluate


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The parts that the stages share.

    Attributes:
        config: the recipe's configuration.
        encoder: the tokenizer.
        module: the model.
        words: the token of each patch label, from `label_words`.
        columns: the token of each column of patches, from `column_words`.
    """

    config: ConfigDict
    encoder: Any
    module: nn.Module
    words: np.ndarray
    columns: np.ndarray

    @classmethod
    def create(cls, config: ConfigDict) -> "Recipe":
        """Trains the tokenizer and builds the module according to `config.model`."""
        encoder = tokenizer.pocket_tokenizer()
        module = models.build(models.config_from_hf(hf_config(config.model, encoder)))
        words, columns = pocket_data.label_words(encoder), pocket_data.column_words(encoder)
        return cls(config, encoder, module, words, columns)

    def initial(self, stage: str, params: dict) -> dict:
        """The initial parameters of a stage: `params`, with a classifier in the tower stage, without one in others."""
        if stage != "tower":
            return {key: value for key, value in params.items() if key != CLASSIFIER}
        shape = (self.module.config.vision.hidden_size, pocket_data.LABEL_COUNT)
        return params | {CLASSIFIER: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])}}

    def start(self, checkpoint: str) -> dict:
        """The parameters of an existing pocket checkpoint, from which training starts.

        Raises:
            LVLMError: the checkpoint has other sizes or another vocabulary; see also `LVLM.from_pretrained`.
        """
        model = LVLM.from_pretrained(checkpoint)
        if model.config != self.module.config:
            raise LVLMError(f"{checkpoint} has other sizes than config.model: {model.config} and {self.module.config}")
        if model.processor.tokenizer.get_vocab() != self.encoder.get_vocab():
            raise LVLMError(f"{checkpoint} has another vocabulary than the one trained for the pocket world")
        return model.params

    def method(self) -> Method | None:
        """The method under whose attention the last stage learns; None for plain attention.

        Raises:
            LVLMError: the method is unknown, or no model can be trained under it.
        """
        method = as_method(self.config.everything.method)
        if method is not None:
            trained_under.refuse(method, self.module.config.text.num_layers)
        return method

    def task(self, stage: str, settings: ConfigDict) -> loop.Task:
        """The task of one of `STAGES`."""
        seed, rows = self.config.seed, self.config.evaluation_rows
        shared = (self.module, self.words, self.columns)
        if stage == "everything":
            method = self.method()
            metrics = functools.partial(conversation_metrics, *shared, method=method)
            terms = {"loss": 1.0, "patch_loss": settings.patch_weight, "place_loss": settings.patch_weight}
            parts = {name: pocket_data.Part(**settings[name]) for name in ("single", "several")}
            source = pocket_data.Conversations(
                seed + 2, self.encoder, **parts, drill=settings.drill, hard=settings.hard
            )
            score = functools.partial(sft.metrics, self.module, method=method)
            held_out = pocket_data.held_out(self.encoder, rows)
        else:
            if stage == "tower":
                metrics, terms = functools.partial(tower_metrics, self.module), {"patch_loss": 1.0}
            else:
                metrics = functools.partial(connector_metrics, *shared)
                terms = {"patch_loss": 1.0, "place_loss": 1.0}
                seed += 1
            source, score = pocket_data.Pictures(seed, settings.batch), metrics
            held_out = {"pictures": pocket_data.Pictures(0, rows, "val")(0)}
        pure = functools.partial(objective, metrics)
        return loop.Task(stage, pure, terms, source, evaluation(score, held_out))

    def export(self, params: dict, folder: Path, workdir: Path) -> Path:
        """Writes the Hugging Face checkpoint with its tokenizer and processor, in float16 for a small file."""
        processor = workdir / "processor"
        tokenizer.write_processor(processor, self.encoder)
        about = records.record(self.config, self.method() if STAGES[-1] in self.config.stages else None)
        return weights.save_checkpoint(
            folder, params, self.module.config, processor, dtype=jnp.float16, overwrite=True, training=about
        )


def settings_of(config: ConfigDict, stage: str) -> ConfigDict:
    """The settings of a stage for `loop.train`: the fields of `config.loop` and of the stage, and the seed.

    `config.steps`, if it is not 0, replaces the stage's number of steps.
    """
    settings = ConfigDict({**config.loop, **config.get(stage, {})})
    settings.steps = config.steps or settings.get("steps", 0)
    settings.seed = config.seed
    return settings


def train(config: ConfigDict, workdir: Path) -> Path:
    """Runs the stages of `config.stages` in order, each from its newest checkpoint, and exports the result.

    Returns:
        The folder of the Hugging Face checkpoint: `config.export`, or `export` in `workdir`.

    Raises:
        LVLMError: an unknown stage; see also `loop.train`.
        SystemExit: a signal requests a stop.
    """
    for stage in config.stages:
        if stage not in STAGES:
            raise LVLMError(f"stage {stage!r} is unknown; expected some of {', '.join(STAGES)}")
    workdir.mkdir(parents=True, exist_ok=True)
    recipe = Recipe.create(config)
    recipe.method()  # raises for an unusable method before the first stage
    params = recipe.start(config.start) if config.start else initial_parameters(recipe.module.config, config.seed)
    for stage in config.stages:
        settings = settings_of(config, stage)
        task, initial = recipe.task(stage, settings), recipe.initial(stage, params)
        params = loop.train(task, initial, {}, settings, workdir, config=config.to_dict())
    params = recipe.initial("", params)
    return recipe.export(params, Path(config.export or workdir / "export"), workdir)


RECIPE = registry.Recipe("pocket", train)
