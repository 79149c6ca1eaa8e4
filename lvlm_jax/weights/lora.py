"""LoRA (arXiv 2106.09685): a kernel W [in, out] is fixed, and W + scale · A B is trained through A and B.

An adapter is a set of leaves beside a kernel, `{"kernel", "lora_a", "lora_b", "lora_scale", "lora_dropout"}`, which
`models.layers.Linear` reads. So a tree with adapters runs wherever one without does; without `lora_a` and `lora_b`, the
same arrays are the base model; and training, saving and placement treat adapters like other parameters.
"""

import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.layers import INT8_LEAVES, LORA_LEAVES, projections
from lvlm_jax.parallel.mesh import sharding_beside
from lvlm_jax.weights.parts import match_paths
from lvlm_jax.weights.tables import flatten, unflatten

# All linear layers of the language model except its head.
TARGETS = r"language_model/.*(q|k|v|o|gate|up|down)_proj$"


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """The factor of A B: alpha / rank, or alpha / √rank (rsLoRA, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def attach_adapters(
    params: Mapping, rank: int, alpha: float, targets: str, dropout: float, key: jax.Array, rslora: bool = False
) -> tuple[dict, dict]:
    """New adapters for the kernels that match `targets`; the model computes the same as before, bit for bit.

    A is uniform in ±1/√in (Kaiming's rule as in PEFT), B is zero. Both are float32 whatever the kernel's dtype, because
    small updates must not be lost to rounding.

    Args:
        params: nested dict of parameters without adapters, of arrays or of their shapes.
        rank: columns of A and rows of B.
        alpha: determines the factor of A B; see `scale_of`.
        targets: a regular expression, searched in paths such as "language_model/layers_0/mlp/up_proj".
        dropout: rate at which inputs of A are dropped in training; at 0 there is no `lora_dropout` leaf and nothing is
            drawn.
        key: random key for A.
        rslora: see `scale_of`.

    Returns:
        (adapters, frozen): the trainable leaves `lora_a` and `lora_b`; all of `params` with the constants `lora_scale`
        and `lora_dropout`. `parts.join` merges them into one tree. They are on the mesh of `params`, if there is one.

    Raises:
        LVLMError: a setting is out of range, targets match nothing or something that is not a matrix, or the parameters
            already have adapters.
    """
    _check_settings(rank, alpha, dropout)
    flat = flatten(params)
    if present := next((path for path in flat if path.endswith(LORA_LEAVES)), None):
        raise LVLMError(f"the parameters already have a LoRA adapter ({present}); merge it before adding another")
    kernels = _target_kernels(flat, targets)

    leaves = {}
    for path, fresh in zip(kernels, jax.random.split(key, len(kernels)), strict=True):
        kernel, (inputs, outputs) = kernels[path]
        shapes = {"lora_a": (inputs, rank), "lora_b": (rank, outputs), "lora_scale": ()}
        place = {name: sharding_beside(kernel, f"{path}/{name}", shape) for name, shape in shapes.items()}
        draw = jax.jit(_uniform, static_argnames="shape", out_shardings=place["lora_a"])
        leaves[f"{path}/lora_a"] = draw(fresh, shape=shapes["lora_a"])
        leaves[f"{path}/lora_b"] = jnp.zeros(shapes["lora_b"], device=place["lora_b"])
        leaves[f"{path}/lora_scale"] = jax.device_put(np.float32(scale_of(alpha, rank, rslora)), place["lora_scale"])
        if dropout > 0:
            leaves[f"{path}/lora_dropout"] = jax.device_put(np.float32(dropout), place["lora_scale"])
    return _divided(flat | leaves)


def detach_adapters(params: Mapping, targets: str, dropout: float) -> tuple[dict, dict]:
    """Divides a tree that already has adapters, so that they can be trained further.

    Args:
        params: nested dict of parameters with adapters, as `peft.load_adapter` returns it.
        targets: as in `attach_adapters`; it must match the modules that have an adapter and no other ones.
        dropout: as in `attach_adapters`; it replaces the rate that the adapters had.

    Returns:
        (adapters, frozen), as `attach_adapters` does.

    Raises:
        LVLMError: a rate out of range, or targets that match other modules.
    """
    _check_dropout(dropout)
    flat = flatten(params)
    adapted = [path.removesuffix("/lora_a") for path in flat if path.endswith("/lora_a")]
    base = {path: leaf for path, leaf in flat.items() if not path.endswith(LORA_LEAVES)}
    targeted = _target_kernels(base, targets)
    if odd := sorted(set(adapted).symmetric_difference(targeted)):
        what = "does not change" if odd[0] in targeted else "also changes"
        raise LVLMError(
            f"the pattern of LoRA targets, {targets!r}, does not match the modules of the adapter, which {what} "
            f"{odd[0]}; set {_pattern(adapted, base)}"
        )
    rate = np.float32(dropout)
    for module in adapted:
        flat.pop(f"{module}/lora_dropout", None)
        if dropout > 0:
            flat[f"{module}/lora_dropout"] = jax.device_put(rate, flat[f"{module}/lora_scale"].sharding)
    return _divided(flat)


def _divided(flat: Mapping) -> tuple[dict, dict]:
    """(adapters, frozen) of a flat tree."""
    adapters = {path: leaf for path, leaf in flat.items() if path.endswith(("/lora_a", "/lora_b"))}
    return unflatten(adapters), unflatten({path: leaf for path, leaf in flat.items() if path not in adapters})


def _pattern(modules: list[str], base: Mapping) -> str:
    """How to set lora.targets so that it matches these modules and no other ones."""
    names = "|".join(sorted({module.rpartition("/")[2] for module in modules}))
    for pattern in (rf"language_model/.*({names})$", rf"({names})$"):
        if {module for module in projections(base) if re.search(pattern, module)} == set(modules):
            return f"lora.targets={pattern!r}"
    return "lora.targets to a pattern of the adapter's modules"


def _uniform(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def merge(params: Mapping) -> dict:
    """The parameters with every adapter merged into its kernel, W + scale · A B in float32, and without adapter leaves.

    Kernels keep their dtype and place. A tree without adapters is returned unchanged, apart from the constants
    `lora_scale` and `lora_dropout`, which are removed.

    Raises:
        LVLMError: an adapter is beside an int8 kernel, whose steps are larger than the adapter's changes.
    """
    flat, merged = flatten(params), {}
    for path, leaf in flat.items():
        module, _, name = path.rpartition("/")
        if name == INT8_LEAVES[0] and f"{module}/lora_a" in flat:
            raise LVLMError(
                f"the adapter of {module} cannot be merged into an int8 kernel; save the adapter alone "
                "(weights.peft.save_adapter), or merge it into the model loaded without quant"
            )
        if name == "kernel" and f"{module}/lora_a" in flat:
            factors = (flat[f"{module}/{factor}"] for factor in ("lora_a", "lora_b", "lora_scale"))
            sharding = getattr(leaf, "sharding", None)
            place = sharding if isinstance(sharding, NamedSharding) else None
            leaf = jax.jit(_sum, out_shardings=place)(leaf, *factors)
        if name not in LORA_LEAVES:
            merged[path] = leaf
    return unflatten(merged)


def _sum(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    low_rank = jnp.dot(a.astype(jnp.float32) * scale, b, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + low_rank).astype(kernel.dtype)


def _check_settings(rank: int, alpha: float, dropout: float) -> None:
    if rank < 1:
        raise LVLMError(f"LoRA rank {rank} is out of range; expected at least 1, such as 16")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise LVLMError(f"LoRA alpha {alpha} is out of range; expected a number above 0, such as twice the rank")
    _check_dropout(dropout)


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise LVLMError(f"LoRA dropout {dropout} is out of range; expected a rate from 0 to below 1")


def _target_kernels(flat: Mapping, targets: str) -> dict[str, tuple[jax.Array, tuple[int, int]]]:
    """Path of a targeted module -> its matrix and the numbers of inputs and outputs (`models.layers.projections`)."""
    modules = dict.fromkeys(path.rpartition("/")[0] for path in flat)
    kernels = projections(flat)
    modules_found = match_paths(targets, modules, "the pattern of LoRA targets")
    if others := [path for path in modules_found if path not in kernels]:
        raise LVLMError(
            f"the pattern of LoRA targets, {targets!r}, also matches {others[0]!r}, which has no matrix to adapt; "
            f"expected one that finds only linear layers, such as {TARGETS!r}"
        )
    return {path: kernels[path] for path in modules_found}
