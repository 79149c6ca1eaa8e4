"""The step of `lvlm train`, compiled without a model and without data."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lvlm_jax import models
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.planning import programs
from lvlm_jax.planning.inference import example, placed
from lvlm_jax.planning.programs import Program, size
from lvlm_jax.processors.layout import bucket
from lvlm_jax.training import optimizer, pairwise, placement, settings
from lvlm_jax.training.data.pair_batches import CONVERSATION, PAIR
from lvlm_jax.training.objectives import sft
from lvlm_jax.training.step import make_step
from lvlm_jax.weights import lora, parts, quantize
from lvlm_jax.weights.tables import flatten, unflatten

RECIPES = ("sft", "dpo", "capl")


def training(job: Any, config: FamilyConfig, mesh: Mesh, target: str) -> tuple[Program, ...]:
    """One update over all rows of a batch.

    Args:
        job: a `plan.Job` with `training`.
        config: the model's configuration, of any depth.
        mesh: the devices.
        target: see `programs.compile_for`.

    Raises:
        LVLMError: see `example`, `lora.attach_adapters` and `parts.split`.
    """
    traced, arguments, shardings, copy_bytes = traced_update(job, config, mesh)
    state, frozen, rows = arguments
    compiled = programs.compile_for(traced, arguments, mesh.size, target, donated=0, shardings=shardings)
    memory = {
        "parameters": size((state.trainable, frozen)),
        "optimizer": size(state.optimizer),
        "copy": copy_bytes,
        "batch and results": size(rows) + compiled.fresh,
    }
    moved = max(2 * size(state) + size((frozen, rows)), compiled.moved)
    messages = compiled.messages
    return (Program("step", memory, compiled.orders, compiled.flops, moved, messages.received, messages.count),)


def traced_update(job: Any, config: FamilyConfig, mesh: Mesh) -> tuple[Any, tuple, tuple, float]:
    """The traced program of an update, its arguments (state, frozen, rows), shardings, and the copy's bytes (see
    `divided`)."""
    defaults = settings.base(job.training.recipe)
    trainable, frozen, copy_bytes = divided(job, config, mesh)
    transformation = optimizer.make(ConfigDict({**defaults.optimizer, "steps": 1000}))
    state = placement.of_state(trainable, transformation, mesh)
    rows = batch(job, config, mesh)
    objective, terms = _objective(job, config, defaults)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state), placement.everywhere(mesh)
    update = make_step(objective, terms, transformation, 0, job.training.accumulate, shardings)
    with jax.set_mesh(mesh):  # as in the training loop
        traced = update.trace(state, frozen, rows)
    return traced, (state, frozen, rows), shardings, copy_bytes


def divided(job: Any, config: FamilyConfig, mesh: Mesh) -> tuple[Any, Any, float]:
    """(trainable, frozen, copy_bytes): shapes as `finetune` splits a model, and the bytes that it stores besides.

    The loop trains a copy, so the original stays in memory (`copy_bytes`): the initial adapters, or with full
    fine-tuning the loaded weights, including the frozen ones in the master dtype if products use another dtype.
    """
    of = job.training
    if not of.lora:
        loaded_parts = parts.split(models.abstract_parameters(config, of.master), of.train)
        trainable, first = (placed(part, placement.of_parameters(part, mesh)) for part in loaded_parts)
        frozen = _cast(first, job.dtype)
        return trainable, frozen, size(trainable) + size(first) * (job.dtype != of.master)

    base = models.abstract_parameters(config, job.dtype)
    if job.quant is not None:
        base = jax.eval_shape(quantize.quantize, base)

    def attached(kind: tuple[str, ...]) -> dict:
        key = jax.random.key(0)
        with_adapters = lora.attach_adapters(base, of.rank, 2.0 * of.rank, lora.TARGETS, of.dropout, key)
        return {path: leaf for part in with_adapters for path, leaf in flatten(part).items() if path.endswith(kind)}

    adapters, constants = (
        jax.eval_shape(functools.partial(attached, kind))
        for kind in (("/lora_a", "/lora_b"), ("/lora_scale", "/lora_dropout"))
    )
    trainable, frozen = unflatten(adapters), unflatten(flatten(base) | constants)
    trainable, frozen = (placed(part, placement.of_parameters(part, mesh)) for part in (trainable, frozen))
    trainable = _cast(trainable, of.master)
    return trainable, frozen, size(trainable)


def batch(job: Any, config: FamilyConfig, mesh: Mesh) -> dict[str, Any]:
    """The shapes of a batch from `pair_batches`, with shardings."""
    of = job.training
    length, answers = row_length(job, config), bucket(job.new_tokens)
    count = job.batch // of.accumulate
    prompts = example(job, config, count)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(((of.accumulate,) if of.accumulate > 1 else ()) + shape, dtype)

    def sequence() -> dict[str, Any]:
        arrays = {"tokens": array(jnp.int32, count, length), "answers": array(bool, count, length)}
        arrays["image_id"] = array(jnp.int32, count, length)
        arrays["columns"] = array(jnp.int32, count, answers)
        return arrays | ({} if prompts.grids is None else {"axes": array(jnp.int32, count, 3, length)})

    blank = config.blank()
    images = (count, *blank.pixels.shape[1:]) if prompts.pixels is None else prompts.pixels.shape
    leaves = {"images": array(jnp.float32, *images), "ids": array(jnp.int32, count)}
    leaves["weight"] = array(jnp.float32, count)
    geometry = blank.geometry if prompts.pixels is None else prompts.geometry
    if geometry:
        leaves["geometry"] = {
            name: array(jax.dtypes.canonicalize_dtype(leaf.dtype), *leaf.shape) for name, leaf in geometry.items()
        }
    leaves |= {name: sequence() for name in (CONVERSATION if of.recipe == "sft" else PAIR)}
    if of.recipe != "sft" and not of.lora:
        leaves["reference"] = array(jnp.float32, count, 2, answers)
    return placed(leaves, placement.of_batch(leaves, mesh, of.accumulate))


def row_length(job: Any, config: FamilyConfig) -> int:
    """Tokens of a padded row, prompt and answer."""
    return bucket(int(example(job, config, 1).lengths.max()) + job.new_tokens)


def tokens(job: Any, config: FamilyConfig) -> int:
    """Tokens of all rows of an update."""
    return job.batch * row_length(job, config) * (1 if job.training.recipe == "sft" else 2)


def _objective(job: Any, config: FamilyConfig, defaults: ConfigDict) -> tuple[Any, dict[str, float]]:
    module = models.build(config, jnp.dtype(job.dtype), remat=job.training.remat)
    images = 1 << max(job.images - 1, 0).bit_length()
    if job.training.recipe == "sft":
        return functools.partial(sft.metrics, module, method=job.method, image_count=images), {"loss": 1.0}
    preference = defaults.preference
    scorer = pairwise.Scorer(module, job.method or pairwise.method_of(preference), images)
    chosen = {name: preference[name] for name in ("loss", "beta", "label_smoothing")}
    return functools.partial(pairwise.metrics, scorer, chosen), pairwise.terms(preference)


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding), tree)
