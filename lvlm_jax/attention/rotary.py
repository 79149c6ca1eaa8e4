"""Rotary positions: frequencies of every supported scaling kind, and the rotation itself.

A head vector is split into two halves (the convention of the Hugging Face LLaMA family): component i of the first half
and component i of the second half span a plane, which is rotated by `position * frequency_i`. Angles, cosines and sines
are float32 whatever the model's dtype.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from lvlm_jax.errors import LVLMError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Frequencies of a decoder's rotary positions.

    Attributes:
        theta: base wavelength.
        kind: one of `KINDS`. `dynamic` equals `default` up to the context length, and longer prompts are refused
            anyway.
        factor: how many times the context is stretched (`linear`, `llama3`, `yarn`).
        original_length: context length of the pre-training (`llama3`, `yarn`).
        low_frequency_factor, high_frequency_factor: the band in which `llama3` blends.
        beta_fast, beta_slow, truncate: the ramp of `yarn` (arXiv 2309.00071, section 3.2).
        attention_factor: factor on cosine and sine (`yarn`); None derives it from `factor`.
        mscale, mscale_all_dim: `yarn` variants of that derivation.
        share: the fraction of each head vector that is rotated; the remaining components stay as they are.
        pairs: a plane consists of two neighbouring components instead of one from each half.
        sections: how many planes belong to the first, second and third axis of multimodal positions; empty for one
            axis.
        interleaved: the axes alternate from plane to plane instead of forming blocks; the remaining planes belong to
            the first axis.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    share: float = 1.0
    pairs: bool = False
    sections: tuple[int, ...] = ()
    interleaved: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise LVLMError(f"rope scaling kind {self.kind!r} is not supported; expected one of {', '.join(KINDS)}")

    def scale(self) -> float:
        """Factor on cosine and sine; attention logits are multiplied by its square (1 except for `yarn`)."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor

        def magnitude(weight: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return magnitude(self.mscale) / magnitude(self.mscale_all_dim)
        return magnitude(1.0)


def plane_axes(rope: RopeConfig, planes: int) -> np.ndarray | None:
    """The axis of multimodal positions that rotates each plane, `Int[planes]`; None if positions have one axis."""
    if not rope.sections:
        return None
    count = len(rope.sections)
    if not rope.interleaved:
        return np.repeat(np.arange(count), rope.sections)
    axes = np.zeros(planes, np.int64)
    for axis in range(1, count):
        axes[axis : count * rope.sections[axis] : count] = axis
    return axes


def frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position, `Float[np.ndarray, "head_dim * share / 2"]`, float32."""
    head_dim = int(head_dim * rope.share)
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / np.power(np.float32(rope.theta), exponent)).astype(np.float32)
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_dim)
    return plain


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones are kept, and the band between is blended linearly."""
    wavelength = 2 * np.pi / plain
    turns = rope.original_length / wavelength  # rotations of a plane within the original context
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - keep) * plain / rope.factor + keep * plain).astype(np.float32)


def _yarn(rope: RopeConfig, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """Ramp from kept (fast) planes to stretched (slow) planes, arXiv 2309.00071 equation 23."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    stretched = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (plain / rope.factor * stretched + plain * (1 - stretched)).astype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """Cosine and sine of some positions, `Float[Array, "*positions planes"]` each; `pairs` as in `RopeConfig`."""

    cosine: jax.Array
    sine: jax.Array
    pairs: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def at(cls, positions: Num[Array, "*P"], frequency: np.ndarray, scale: float = 1.0) -> "Rotation":
        """The rotation to `positions`, which may be fractional or negative."""
        angle = positions.astype(jnp.float32)[..., None] * frequency
        return cls(jnp.cos(angle) * scale, jnp.sin(angle) * scale)

    @classmethod
    def of(
        cls,
        rope: RopeConfig,
        head_dim: int,
        positions: Num[Array, "..."],
        axes: Num[Array, "A ..."] | None = None,
        scale: float = 1.0,
    ) -> "Rotation":
        """A decoder's rotation to `positions`, or to multimodal positions `axes` if given."""
        frequency = frequencies(rope, head_dim)
        if axes is not None:
            positions = jnp.moveaxis(axes[plane_axes(rope, len(frequency))], 0, -1)
        else:
            positions = positions[..., None]
        angle = positions.astype(jnp.float32) * frequency
        return cls(jnp.cos(angle) * scale, jnp.sin(angle) * scale, rope.pairs)

    def heads(self, axis: int) -> "Rotation":
        """The same rotation with a head axis inserted at `axis`, to broadcast over heads."""
        return Rotation(jnp.expand_dims(self.cosine, axis), jnp.expand_dims(self.sine, axis), self.pairs)


def rotate(vector: Float[Array, "*S D"], rotation: Rotation) -> Float[Array, "*S D"]:
    """Rotates head vectors; `rotation` broadcasts against the vectors' leading axes. Rotations compose exactly."""
    turning = 2 * rotation.cosine.shape[-1]
    if turning < vector.shape[-1]:
        rotated = rotate(vector[..., :turning], rotation)
        return jnp.concatenate([rotated, vector[..., turning:]], axis=-1)
    wide = vector.astype(jnp.float32)
    first, second = (wide[..., ::2], wide[..., 1::2]) if rotation.pairs else jnp.split(wide, 2, axis=-1)
    parts = [first * rotation.cosine - second * rotation.sine, second * rotation.cosine + first * rotation.sine]
    rotated = jnp.stack(parts, axis=-1).reshape(wide.shape) if rotation.pairs else jnp.concatenate(parts, axis=-1)
    return rotated.astype(vector.dtype)
