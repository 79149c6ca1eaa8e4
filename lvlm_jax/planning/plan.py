"""Plans what a model needs on a mesh of devices, and how fast it can be there, before any device is rented.

The programs that `LVLM.generate` or `lvlm train` would run are compiled for the planned number of absent or simulated
devices, from shapes alone: nothing is allocated. Each program gives the bytes in one device's memory, and what the
device computes, moves and receives; the device's ceilings turn these into times.

    memory of a program  =  parameters + cache + inputs and results + temporaries              (inference)
                            parameters + optimizer + copy + batch + temporaries                (training)
    memory of the job    =  memory of its largest program; programs run one after the other

    time of a program    =  max(bytes moved / bandwidth, FLOPs / peak) + bytes received / link

The decoder's layers are alike and unrolled. So two small depths are compiled, at the model's own widths and on the
whole mesh, and every figure is extrapolated by what one layer adds. Arguments and results grow linearly. Temporaries
depend on the compiler's choices, which are stable from the second layer on; a test compares both ways. All layers are
compiled with `exact`, or if a method edits only some of them.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax

from lvlm_jax import files, models, parallel, weights
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import CAPL, Method
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.planning import compilers
from lvlm_jax.planning.devices import Device
from lvlm_jax.planning.inference import inference
from lvlm_jax.planning.programs import Program
from lvlm_jax.planning.sizes import SHORT, SIZES
from lvlm_jax.planning.training import RECIPES, tokens, training
from lvlm_jax.training import settings, trained_under
from lvlm_jax.weights import names

# Depths that are compiled instead of the whole model. They differ by two, because some methods edit every second layer.
DEPTHS = (2, 4)


@dataclasses.dataclass(frozen=True)
class Training:
    """How a model is trained; fields as in `training.settings`.

    Attributes:
        recipe: one of RECIPES.
        lora: train adapters on all projections of the decoder; otherwise the parameters that match `train`.
        remat: recompute layers in the backward pass; None: if the decoder is large.
    """

    recipe: str
    lora: bool = True
    rank: int = 16
    dropout: float = 0.0
    train: str = settings.base().train
    master: str = "float32"
    accumulate: int = 1
    remat: bool | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """The job to plan, and its number of devices.

    Attributes:
        name: name of the model.
        config: its configuration.
        devices: number of devices.
        mesh: sizes of the axes data, fsdp and tensor; one may be -1.
        dtype: dtype of weights and products.
        batch: number of conversations, or of rows (pairs) per update.
        images: number of images per conversation.
        prompt_tokens: prompt tokens per conversation, image tokens included; None: the image tokens plus 48.
        new_tokens: longest answer.
        method: the method of inference, or the one whose attention a model is trained with (sft: CAPL, VAF and similar
            ones; dpo: CAPL).
        quant: None, or "int8" for the decoder's weights; in training, only with adapters.
        training: None for inference.
        folder: the checkpoint's folder, if there is one; methods that add words need its tokenizer.
    """

    name: str
    config: FamilyConfig
    devices: int = 1
    mesh: tuple[int, int, int] = (1, 1, -1)
    dtype: str = "bfloat16"
    batch: int = 1
    images: int = 1
    prompt_tokens: int | None = None
    new_tokens: int = 128
    method: Method | None = None
    quant: str | None = None
    training: Training | None = None
    folder: Path | None = None

    def __post_init__(self):
        of = self.training
        if of is not None and of.recipe not in RECIPES:
            raise LVLMError(f"objective {of.recipe!r} cannot be planned; expected infer, {', '.join(RECIPES)}")
        if of is not None and self.batch % of.accumulate:
            raise LVLMError(
                f"batch is {self.batch} and accumulate {of.accumulate}; expected a batch that is a multiple "
                "of accumulate"
            )
        if of is not None and self.quant is not None and not of.lora:
            raise LVLMError(f"quant is {self.quant!r} and the parameters themselves are trained; expected adapters")
        if of is not None and self.method is not None:
            self._check_method(of.recipe)

    def _check_method(self, recipe: str) -> None:
        """Raises an LVLMError if this recipe cannot train under the method."""
        trained_under.refuse(self.method, self.config.text.num_layers)
        if recipe != "sft" and not (recipe == "dpo" and isinstance(self.method, CAPL)):
            raise LVLMError(
                f"{recipe} cannot be trained with {self.method.label}; expected capl with dpo, or no method with capl, "
                "which has its own"
            )

    def replaced(self, **changes: Any) -> "Job":
        """The same job with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Figures for one of the devices.

    Attributes:
        job: the planned job.
        mesh: sizes of data, fsdp and tensor.
        parameters: of the model, on all devices together, without adapters.
        programs: in the order in which they run.
        compiler: the compiler from which the figures come.
    """

    job: Job
    mesh: tuple[int, int, int]
    parameters: float
    programs: tuple[Program, ...]
    compiler: str

    @property
    def largest(self) -> Program:
        """The program that takes the most memory."""
        return max(self.programs, key=lambda program: program.total)

    @property
    def total(self) -> float:
        """Bytes that a device needs."""
        return self.largest.total

    @property
    def tokens(self) -> int:
        """Tokens per update; for inference, one per conversation."""
        return self.job.batch if self.job.training is None else tokens(self.job, self.job.config)

    def seconds(self, device: Device) -> dict[str, float]:
        """Seconds by name: `prefill` (images included) and `token`; in training, `step`."""
        seconds = {
            program.name: device.seconds(program.moved, program.flops, self.job.dtype, program.received)
            for program in self.programs
        }
        if self.job.training is not None:
            return seconds
        last = seconds.pop("decode")
        return {"prefill": sum(seconds.values()), "token": last}


def plan(job: Job, target: str = compilers.STAND_IN, exact: bool = False) -> Plan:
    """Plans a job. If the target is a CPU compiler, this process must have the job's number of devices, see `simulate`.

    Args:
        target: one of `compilers.TARGETS`.
        exact: compile all layers.

    Raises:
        LVLMError: the mesh does not match the devices or splits heads, or the job cannot be planned.
    """
    devices = compilers.absent_devices(target, job.devices) if target in compilers.NAMES else jax.devices()
    if len(devices) < job.devices:
        raise LVLMError(f"{job.devices} devices are planned for and this process has {len(devices)}")
    mesh = parallel.make_mesh(*job.mesh, devices=devices[: job.devices])
    parallel.refuse_cut_heads(mesh, job.config.text.num_heads, job.config.text.num_kv_heads)
    if job.training is not None and job.training.remat is None:
        job = dataclasses.replace(job, training=dataclasses.replace(job.training, remat=job.config.text.large))
    layers, build = job.config.text.num_layers, inference if job.training is None else training
    if exact or layers <= DEPTHS[1] or not alike_in_all_layers(job.method, layers):
        programs = build(job, job.config, mesh, target)
        parameters = _count(job.config)
    else:
        near, other = (at_depth(job.config, depth) for depth in DEPTHS)
        steps = (layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
        pairs = zip(*(build(job, config, mesh, target) for config in (near, other)), strict=True)
        programs = tuple(one.extended(two, steps) for one, two in pairs)
        parameters = _count(near) + (_count(other) - _count(near)) * steps
    return Plan(job, tuple(mesh.shape.values()), parameters, programs, compilers.label(target))


def alike_in_all_layers(method: Method | None, layers: int) -> bool:
    """Whether a method's edits repeat every two layers. Then figures for all layers follow from programs of two depths.

    Raises:
        LVLMError: it edits layers that the model does not have.
    """
    if method is None:
        return True
    edits = [transform for transform in method.branches() if transform is not None]
    active = [
        [transform.active(layer, layers, phase) for layer in range(layers)]
        for transform in edits
        for phase in ("prefill", "decode")
    ]
    return all(stages[2:] == stages[:-2] for stages in active) and not method.exits(layers)


def at_depth(config: FamilyConfig, layers: int) -> FamilyConfig:
    """The same model with fewer layers in its decoder."""
    text = config.text
    windows = text.sliding_window[:layers]
    return dataclasses.replace(config, text=dataclasses.replace(text, num_layers=layers, sliding_window=windows))


def simulate(count: int) -> None:
    """Gives this process `count` simulated CPU devices; call it before anything uses a device.

    Raises:
        LVLMError: JAX has already started with fewer devices.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    jax.config.update("jax_platforms", "cpu")
    if len(jax.devices()) < count:
        raise LVLMError(
            f"JAX has started with {len(jax.devices())} devices and {count} are planned for; plan in a new process"
        )


def read(name: str) -> tuple[str, Any, Path | None]:
    """Resolves a published size, a checkpoint folder or a config.json to (name, configuration, folder).

    Raises:
        LVLMError: it is none of these, or the configuration is not a model's.
    """
    if (size := SHORT.get(name, name)) in SIZES:
        return size, models.config_from_hf(SIZES[size]), None
    path = Path(names.checkpoint(name))
    if path.is_dir():
        return path.name, models.config_from_hf(weights.read_config(path)), path
    if path.is_file():
        return (
            path.parent.name or path.stem,
            models.config_from_hf(files.read_json(path, "configuration", dict)),
            None,
        )
    raise LVLMError(
        f"model {name!r} is not known; expected a checkpoint folder, a config.json, or one of {', '.join(SHORT)}"
    )


def _count(config: FamilyConfig) -> float:
    return float(sum(leaf.size for leaf in jax.tree.leaves(models.abstract_parameters(config, "float32"))))
