"""The training recipe of `smol`: the pocket model's tower with SmolLM2, in LLaVA's two stages.

1. `connector`: the token of every patch is trained to equal the language model's embedding of the patch's object, plus
   a little of "left", "middle" or "right". The tower and the embeddings are frozen; the rest of the model does not run.
2. `language`: the connector and low-rank adapters of the language model learn from the answers of conversations. The
   frozen kernels are bfloat16, which CPUs with AMX multiply many times faster than XLA multiplies float32.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from lvlm_jax import models
from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket import recipe, recipe_data, recipe_losses, smol_data
from lvlm_jax.training import forward, loop, registry
from lvlm_jax.training.losses import Mean, accuracy, cross_entropy
from lvlm_jax.weights import lora, parts, smol
from lvlm_jax.weights.tables import flatten, unflatten

STAGES = ("connector", "language")
PLACE = 0.3  # weight of the word for a patch's column in the target of its token


def connector_metrics(module: nn.Module, labels: np.ndarray, columns: np.ndarray, params: dict, batch: dict) -> dict:
    """`patch_loss` and `patch_accuracy` of patch labels, and `distance`: mean squared distance of tokens from targets.

    Args:
        labels, columns: from `smol_data.label_vectors` and `smol_data.column_vectors`.
    """
    tokens = recipe_losses.encode(module, params, batch["images"])
    metrics = recipe.patch_metrics(jnp.einsum("IPE,LE->IPL", tokens, labels), batch["labels"])
    is_object = batch["labels"] < recipe_data.CATEGORY_COUNT
    side = len(columns)
    place = jnp.tile(jnp.asarray(columns), (side, 1)) * is_object[..., None]
    target = jnp.asarray(labels)[batch["labels"]] + PLACE * place
    return metrics | {"distance": Mean(jnp.sum((tokens - target) ** 2), jnp.float32(is_object.size))}


def chat_metrics(seeing: nn.Module, speaking: nn.Module, params: dict, batch: dict) -> dict[str, Mean]:
    """`loss` over the answers' tokens; `word_loss` and `word_accuracy` over the first tokens of one-word answers.

    Args:
        seeing, speaking: the module in the tower's dtype, and in the decoder's.
    """
    image_tokens = recipe_losses.encode(seeing, params, batch["images"])
    config = speaking.config
    image_id = recipe_losses.image_id_of(batch["tokens"], config.image_token_id, config.tokens_per_image)
    embedded = forward.embed(speaking, params, batch["tokens"], image_tokens)
    hidden = forward.decode(speaking, params, image_id, embedded).hidden[0]
    sequence = {"tokens": batch["tokens"], "columns": batch["columns"], "answers": batch["tokens"] >= 0}
    logits, targets, _ = forward.answer_logits(speaking, params, hidden, sequence)
    learned = batch["columns"] > 0
    return {
        "loss": cross_entropy(logits, targets, learned),
        "word_loss": cross_entropy(logits, targets, batch["words"] & learned),
        "word_accuracy": accuracy(logits, targets, batch["words"] & learned),
    }


def joined(metrics: Callable[[dict, dict], dict], trainable: dict, frozen: dict, batch: dict, key: jax.Array) -> dict:
    """A stage's metrics as an objective for `loop.Task`; joins the two parts of the parameters."""
    del key
    return metrics(parts.join(trainable, frozen), batch)


def evaluation(metrics: Callable[[dict, dict], dict], batches: Mapping[str, dict]) -> Callable:
    """An `evaluate` for `loop.Task`: the metrics of each named batch, as `name/metric`."""
    score = jax.jit(lambda trainable, frozen, batch: metrics(parts.join(trainable, frozen), batch))
    return lambda trainable, frozen: {
        f"{name}/{metric}": mean
        for name, batch in batches.items()
        for metric, mean in score(trainable, frozen, batch).items()
    }


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The parts that the stages share: configuration, tokenizer, and the parameters before training (`still`)."""

    config: ConfigDict
    encoder: Any
    still: dict[str, np.ndarray]

    @classmethod
    def create(cls, config: ConfigDict, workdir: Path) -> "Recipe":
        """Reads the language model; writes its tokenizer below `workdir`."""
        from transformers import AutoTokenizer

        folder = workdir / "processor"
        folder.mkdir(parents=True, exist_ok=True)
        smol.write_processor(folder)
        return cls(config, AutoTokenizer.from_pretrained(folder, local_files_only=True), smol.untrained())

    def module(self, dtype: str) -> nn.Module:
        """The model, which multiplies in `dtype`."""
        return models.build(smol.config(), jnp.dtype(dtype))

    def initial(self, stage: str, before: dict) -> tuple[dict, dict]:
        """The trainable and the frozen parameters at the start of a stage; `before` are those trained so far."""
        if stage == "connector":
            keep = ("vision_tower/",)
            frozen = {path: leaf for path, leaf in self.still.items() if path.startswith(keep)}
            return before, unflatten(frozen)
        of = self.config.lora
        shapes = unflatten({path: jnp.asarray(leaf) for path, leaf in self.still.items()})
        adapters, frozen = lora.attach_adapters(
            shapes, of.rank, of.alpha, of.targets, 0.0, jax.random.key(self.config.seed)
        )
        narrow = {path: self._narrow(path, leaf) for path, leaf in flatten(frozen).items()}
        return parts.join(adapters, {"connector": before["connector"]}), unflatten(narrow)

    def _narrow(self, path: str, leaf: jax.Array) -> jax.Array:
        wide = path.startswith("vision_tower/") or path.endswith(("/scale", "/lora_scale"))
        return leaf if wide else leaf.astype(self.config.dtype)

    def fresh_connector(self) -> dict:
        """Initial parameters of the connector: kernels scaled by fan-in, biases zero."""
        shapes = models.abstract_parameters(smol.config())["connector"]
        leaves, structure = jax.tree.flatten(shapes)
        keys = jax.random.split(jax.random.key(self.config.seed), len(leaves))
        fill = [
            jnp.zeros(leaf.shape) if leaf.ndim == 1 else jax.random.normal(key, leaf.shape) * leaf.shape[0] ** -0.5
            for leaf, key in zip(leaves, keys, strict=True)
        ]
        return {"connector": jax.tree.unflatten(structure, fill)}

    def task(self, stage: str, settings: ConfigDict) -> loop.Task:
        """The task of one of `STAGES`."""
        seed = self.config.seed
        seeing = self.module("float32")
        if stage == "connector":
            table = self.still["language_model/embed_tokens/embedding"]
            vectors = (
                function(table, self.encoder) for function in (smol_data.label_vectors, smol_data.column_vectors)
            )
            metrics = functools.partial(connector_metrics, seeing, *vectors)
            terms = {"patch_loss": 1.0, "distance": settings.distance}
            source: Callable = recipe_data.Pictures(seed, settings.batch)
            held_out = {"pictures": recipe_data.Pictures(0, self.config.evaluation_rows, "val")(0)}
        else:
            metrics = functools.partial(chat_metrics, seeing, self.module(self.config.dtype))
            terms = {"loss": 1.0, "word_loss": settings.word_weight}
            source = smol_data.Chats(seed + 1, self.encoder, settings.rows, settings.length, settings.hard)
            held_out = smol_data.held_out(self.encoder, self.config.evaluation_rows)
        return loop.Task(stage, functools.partial(joined, metrics), terms, source, evaluation(metrics, held_out))

    def export(self, trained: dict, workdir: Path) -> Path:
        """Writes the trained parameters to `workdir`, and the checkpoint to `config.export` or `workdir/export`."""
        smol.write_trained(workdir, flatten(trained), self.config.lora.alpha / self.config.lora.rank)
        return smol.write_checkpoint(Path(self.config.export or workdir / "export"), smol.trained(workdir))


def train(config: ConfigDict, workdir: Path) -> Path:
    """Runs the stages of `config.stages` in order, each from its newest checkpoint, and exports the result.

    Returns:
        The folder of the Hugging Face checkpoint: `config.export`, or `export` in `workdir`.

    Raises:
        LVLMError: a stage is unknown, or SmolLM2 is missing; see also `loop.train`.
        SystemExit: a signal requests a stop.
    """
    if unknown := [stage for stage in config.stages if stage not in STAGES]:
        raise LVLMError(f"stage {unknown[0]!r} is unknown; expected some of {', '.join(STAGES)}")
    own = Recipe.create(config, workdir)
    params = own.fresh_connector()
    for stage in config.stages:
        settings = recipe.settings_of(config, stage)
        task, (trainable, frozen) = own.task(stage, settings), own.initial(stage, params)
        params = loop.train(task, trainable, frozen, settings, workdir, config=config.to_dict())
    return own.export(params, workdir)


RECIPE = registry.Recipe("smol", train)
