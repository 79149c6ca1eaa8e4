"""Random transforms of an image's pixel values, normalised as by CLIP's processor; the strengths are RITUAL's."""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, Key

from lvlm_jax.pixels import CLIP

Picture = Float[Array, "3 Y X"]

BLUR = 13  # pixels
DEVIATIONS = (1.5, 2.0)
AREAS = (0.08, 1.0)
SIDES = (3 / 4, 4 / 3)
LUMA = (0.2989, 0.587, 0.114)


def flip(key: Key[Array, ""], picture: Picture) -> Picture:
    """Mirrors left and right."""
    return picture[:, :, ::-1]


def flip_down(key: Key[Array, ""], picture: Picture) -> Picture:
    """Mirrors up and down."""
    return picture[:, ::-1]


def rotate(key: Key[Array, ""], picture: Picture) -> Picture:
    """Rotates about the middle by up to half a turn either way; pixels from outside are black."""
    return turned(picture, jax.random.uniform(key, (), minval=-jnp.pi, maxval=jnp.pi))


def turned(picture: Picture, angle: Float[Array, ""]) -> Picture:
    """Rotates counter-clockwise by an angle in radians."""
    height, width = picture.shape[1:]
    down, right = jnp.meshgrid(
        jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij"
    )
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    places = [down * cosine + right * sine + (height - 1) / 2, right * cosine - down * sine + (width - 1) / 2]
    black = -jnp.asarray(CLIP.mean) / jnp.asarray(CLIP.deviation)
    rest = [map_coordinates(one - dark, places, order=0) + dark for one, dark in zip(picture, black, strict=True)]
    return jnp.stack(rest).astype(picture.dtype)


def colour(key: Key[Array, ""], picture: Picture) -> Picture:
    """Changes brightness, contrast, saturation and hue, in this order."""
    factors = jax.random.uniform(key, (4,))
    return recoloured(picture, *(2 * factors[:3]), factors[3] - 0.5)


def recoloured(
    picture: Picture,
    brightness: Float[Array, ""],
    contrast: Float[Array, ""],
    saturation: Float[Array, ""],
    hue: Float[Array, ""],
) -> Picture:
    """Scales brightness, distance from the mean grey, and distance from each pixel's grey; shifts the hue."""
    mean, deviation = (jnp.asarray(part)[:, None, None] for part in CLIP)

    def grey(values: Picture) -> Float[Array, "Y X"]:
        return jnp.einsum("C,CYX->YX", jnp.asarray(LUMA), values, precision=jax.lax.Precision.HIGHEST)

    def mixed(values: Picture, other: Array, share: Float[Array, ""]) -> Picture:
        return jnp.clip(share * values + (1 - share) * other, 0, 1)

    values = mixed(picture * deviation + mean, jnp.zeros(()), brightness)
    values = mixed(values, grey(values).mean(), contrast)
    values = mixed(values, grey(values), saturation)
    return ((_hue_turned(values, hue) - mean) / deviation).astype(picture.dtype)


def _hue_turned(values: Picture, turns: Float[Array, ""]) -> Picture:
    """Shifts the hue of values in [0, 1] by a share of the circle, in the HSV model."""
    high, low = values.max(axis=0), values.min(axis=0)
    chroma = high - low
    red, green, blue = (values - low) / jnp.where(chroma > 0, chroma, 1)
    sixths = jnp.where(
        high == values[0], (green - blue) % 6, jnp.where(high == values[1], blue - red + 2, red - green + 4)
    )
    sixths = (sixths + 6 * turns) % 6
    steps = (jnp.asarray([5.0, 3.0, 1.0])[:, None, None] + sixths) % 6
    return high - chroma * jnp.clip(jnp.minimum(steps, 4 - steps), 0, 1)


def blur(key: Key[Array, ""], picture: Picture) -> Picture:
    """Smooths by a random deviation, with reflected borders."""
    low, high = DEVIATIONS
    return smoothed(picture, jax.random.uniform(key, (), minval=low, maxval=high))


def smoothed(picture: Picture, deviation: Float[Array, ""]) -> Picture:
    """Smooths with a Gaussian over `BLUR` pixels along both axes; `deviation` is in pixels."""
    offsets = jnp.arange(BLUR) - BLUR // 2
    kernel = jnp.exp(-0.5 * (offsets / deviation) ** 2)
    kernel = kernel / kernel.sum()
    for axis in (1, 2):
        width = [(0, 0)] * 3
        width[axis] = (BLUR // 2, BLUR // 2)
        padded = jnp.pad(picture, width, mode="reflect")
        parts = [jax.lax.slice_in_dim(padded, i, i + picture.shape[axis], axis=axis) for i in range(BLUR)]
        picture = sum(share * part for share, part in zip(kernel, parts, strict=True)).astype(picture.dtype)
    return picture


def crop(key: Key[Array, ""], picture: Picture) -> Picture:
    """Crops a random part and enlarges it to the size of the whole."""
    area, side, down, right = jax.random.uniform(key, (4,))
    height, width = picture.shape[1:]
    share = AREAS[0] + area * (AREAS[1] - AREAS[0])
    ratio = jnp.exp(jnp.log(SIDES[0]) + side * (jnp.log(SIDES[1]) - jnp.log(SIDES[0])))
    wide, high = (jnp.sqrt(share * height * width * each) for each in (ratio, 1 / ratio))
    wide, high = (jnp.clip(jnp.round(size), 1, most) for size, most in ((wide, width), (high, height)))
    top, left = (
        jnp.floor(place * (most - size + 1)) for place, most, size in ((down, height, high), (right, width, wide))
    )
    return enlarged(picture, top, left, high, wide)


def enlarged(
    picture: Picture, top: Float[Array, ""], left: Float[Array, ""], high: Float[Array, ""], wide: Float[Array, ""]
) -> Picture:
    """The part of `high` x `wide` pixels at `top`, `left`, enlarged to the full size by linear interpolation."""
    height, width = picture.shape[1:]

    def places(start: Float[Array, ""], size: Float[Array, ""], count: int) -> Float[Array, "N"]:
        inside = jnp.clip((jnp.arange(count) + 0.5) * size / count - 0.5, 0, size - 1)
        return start + inside

    grid = jnp.meshgrid(places(top, high, height), places(left, wide, width), indexing="ij")
    sample = functools.partial(map_coordinates, coordinates=grid, order=1, mode="nearest")
    return jnp.stack([sample(one) for one in picture]).astype(picture.dtype)


ALL = {"flip": flip, "flip_down": flip_down, "rotate": rotate, "colour": colour, "blur": blur, "crop": crop}
