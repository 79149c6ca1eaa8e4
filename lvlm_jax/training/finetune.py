"""Fine-tuning of a checkpoint: load, adapt, train by an objective, export."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from lvlm_jax import models, parallel, weights
from lvlm_jax.errors import LVLMError
from lvlm_jax.lvlm import LVLM
from lvlm_jax.models.layers import LORA_LEAVES
from lvlm_jax.training import loop, records, registry
from lvlm_jax.training import settings as fields
from lvlm_jax.training.registry import Recipe
from lvlm_jax.weights import lora, names, parts, peft, peft_settings, quantize
from lvlm_jax.weights.tables import flatten, unflatten


def train(config: ConfigDict, workdir: Path) -> Path:
    """Trains according to `config` (`training.settings`), from the newest checkpoint in `workdir` if there is one.

    A `registry.Recipe` trains by itself; the following applies to objectives.

    Returns:
        The folder of the Hugging Face checkpoint with merged adapters, `export` in `workdir`. With LoRA, `adapter`
        beside it contains the adapters alone, in PEFT's format. If the objective has its own `export`, the path
        that it returns.

    Raises:
        LVLMError: a setting, a model or data cannot be used; see also `loop.train`.
        SystemExit: a signal requests a stop.
    """
    objective = registry.find(config.recipe)
    if isinstance(objective, Recipe):
        return objective.train(config, workdir)
    fields.check(config)
    mesh = parallel.make_mesh(**config.mesh)
    model = load(config, mesh)
    trainable, frozen = (objective.divide or _divided)(model, config)
    remat = model.config.text.large if config.remat is None else config.remat
    module = models.build(model.config, jnp.dtype(config.dtype), remat=remat)
    task = objective.task(model, module, config, workdir)
    beside = frozen
    if objective.with_base and (config.lora.start or not config.lora.enabled):
        beside = objective.with_base(trainable, frozen)
    settings = loop_settings(config, task)
    trained = loop.train(task, trainable, beside, settings, workdir, mesh, config.to_dict())
    if objective.export:
        return objective.export(trained, model, config, workdir)
    return export(trained, frozen, model, config, workdir)


def _divided(model: LVLM, config: ConfigDict) -> tuple[Any, Any]:
    return divide(model.params, config)


def load(config: ConfigDict, mesh: jax.sharding.Mesh) -> LVLM:
    """The model to train, on the mesh; in the master dtype if parameters beside adapters are trained.

    The model has the adapter from which training continues, if there is one.

    Raises:
        LVLMError: there is no such model or adapter, or the adapter's settings differ from those of the run.
    """
    dtype = config.master if config.train and not config.lora.enabled else config.dtype
    start, quant = config.lora.start or None, config.quant or None
    if start:
        _check_start(config.lora)
    return LVLM.from_pretrained(config.model, dtype=dtype, mesh=mesh, adapter=start, quant=quant)


def _check_start(of: ConfigDict) -> None:
    """Refuses a start adapter whose settings differ from those of the run, with an `LVLMError`."""
    folder = weights.resolve_checkpoint(of.start)
    own = peft_settings.read_settings(folder)
    pairs = {"rank": int(own["r"]), "alpha": float(own["lora_alpha"]), "rslora": own["use_rslora"]}
    if other := {name: value for name, value in pairs.items() if of[name] != value}:
        settings = ", ".join(f"{name} {of[name]}" for name in other)
        flags = " ".join(f"--config.lora.{name}={value}" for name, value in other.items())
        raise LVLMError(
            f"the adapter of lora.start, {folder}, has other settings than the run ({settings}); set {flags}"
        )
    if brought := peft.brings_whole(folder):
        raise LVLMError(
            f"lora.start {folder} contains {brought} besides its adapter, which a new adapter would lack; merge it "
            "(lvlm convert --adapter), and train the merged model"
        )


def divide(params: dict, config: ConfigDict) -> tuple[Any, Any]:
    """(trainable, frozen): with LoRA, adapters and `params`; else, parameters that match `config.train` and the rest.

    If training continues from an adapter, the adapters are those of `params`, else new ones. The first part has the
    master dtype, the second the dtype of products.
    """
    if config.lora.enabled:
        of = config.lora
        key = jax.random.key(config.seed)
        if of.start:
            trainable, frozen = lora.detach_adapters(params, of.targets, of.dropout)
        else:
            trainable, frozen = lora.attach_adapters(params, of.rank, of.alpha, of.targets, of.dropout, key, of.rslora)
    else:
        trainable, frozen = parts.split(params, config.train)
        frozen = _cast(frozen, config.dtype)
    return _cast(trainable, config.master), frozen


def loop_settings(config: ConfigDict, task: loop.Task) -> ConfigDict:
    """The settings of `loop.train`: fields of the loop and of the optimizer, and the number of steps."""
    steps = config.steps or task.source.steps(config.epochs)
    own = dict(steps=steps, seed=config.seed, accumulate=config.accumulate)
    return ConfigDict({**config.loop, **config.optimizer, **own})


def export(trained: Any, frozen: Any, model: LVLM, config: ConfigDict, workdir: Path) -> Path:
    """Writes the merged checkpoint and, with LoRA, the adapter; the first process writes for all.

    An int8 base is written as the floating-point weights that it stands for: the adapters were trained on these.
    """
    params, folder, source = parts.join(trained, frozen), workdir / "export", names.checkpoint(config.model)
    leaves = {path: leaf for path, leaf in flatten(params).items() if path.endswith(LORA_LEAVES)}
    first = jax.process_index() == 0
    if config.quant:
        params = quantize.dequantize(params, config.dtype)
    adapter, merged = parallel.local(unflatten(leaves), first), parallel.local(lora.merge(params), first)
    if first:
        about = records.of(config, source)
        if config.lora.enabled:
            peft.save_adapter(workdir / "adapter", adapter, model.config, source, config.lora.rslora)
            records.write(workdir / "adapter", about)
        dtype = jnp.dtype(config.dtype)
        weights.save_checkpoint(folder, merged, model.config, model.folder, dtype=dtype, overwrite=True, training=about)
    multihost_utils.sync_global_devices("export")
    return folder


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
