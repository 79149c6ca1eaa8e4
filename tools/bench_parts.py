"""What the benchmarks share: models with random weights, prompts, timers, and the peak speeds of the machine."""

import dataclasses
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax import LVLM, models
from lvlm_jax.models.pictures import whole_pictures
from lvlm_jax.processors.layout import lay_out

CLIP_LARGE = dict(
    model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
    num_attention_heads=16, image_size=336, patch_size=14,
)  # fmt: skip
SIZES = {
    # LLaVA-1.5's shape at half a billion decoder parameters, and LLaVA-1.5-7B itself: CLIP ViT-L/14 at 336 pixels in
    # front (576 image tokens), multi-head attention, untied embeddings of 32064 tokens.
    "0.5b": dict(
        model_type="llava", image_token_index=32000, vision_config=CLIP_LARGE,
        text_config=dict(
            model_type="llama", hidden_size=1024, intermediate_size=4864, num_hidden_layers=24,
            num_attention_heads=16, num_key_value_heads=16, vocab_size=32064, max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ),
    ),
    "1b": dict(
        model_type="llava", image_token_index=32000, vision_config=CLIP_LARGE,
        text_config=dict(
            model_type="llama", hidden_size=1536, intermediate_size=7168, num_hidden_layers=24,
            num_attention_heads=24, num_key_value_heads=24, vocab_size=32064, max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ),
    ),
    "7b": dict(
        model_type="llava", image_token_index=32000, vision_config=CLIP_LARGE,
        text_config=dict(
            model_type="llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=32, vocab_size=32064, max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ),
    ),
}  # fmt: skip
TEXT_TOKENS = (8, 40)  # before and after the image, as in a chat template with a question


def random_parameters(config, dtype: jnp.dtype) -> dict:
    """Normal weights with standard deviation 0.02, made on the device; the scales of norms are 1."""
    leaves, tree = jax.tree.flatten_with_path(models.abstract_parameters(config, dtype))
    draw = jax.jit(lambda key, shape: (0.02 * jax.random.normal(key, shape)).astype(dtype), static_argnums=1)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(
        tree,
        [
            jnp.ones(leaf.shape, dtype) if path[-1].key == "scale" else draw(key, leaf.shape)
            for (path, leaf), key in zip(leaves, keys, strict=True)
        ],
    )


def model_of(size: str, dtype: str) -> tuple[dict, object]:
    """Parameters and configuration: the pocket model, or random weights of a size in SIZES."""
    if size == "pocket":
        model = LVLM.from_pretrained("pocket", dtype=dtype)
        return model.params, model.config
    config = models.config_from_hf(SIZES[size])
    return random_parameters(config, jnp.dtype(dtype)), config


def words_of(config) -> np.ndarray:
    """All token ids except the image placeholder."""
    return np.setdiff1d(np.arange(config.text.vocab_size, dtype=np.int32), config.image_token_id)


def with_context(config, images: int) -> object:
    """The configuration, with a context that is long enough for prompts of so many images and 512 tokens more."""
    least = images * config.tokens_per_image + 512
    text = dataclasses.replace(config.text, max_position_embeddings=max(least, config.text.max_position_embeddings))
    return dataclasses.replace(config, text=text)


def random_prompt(config, batch: int, images: int = 1) -> tuple:
    """Inputs of `batch` conversations of equal length with so many images each, and their tokens [batch, T]."""
    rng, words = np.random.default_rng(0), words_of(config)
    before, after = TEXT_TOKENS
    rows = [
        np.concatenate(
            [
                rng.choice(words, before),
                np.full(images * config.tokens_per_image, config.image_token_id),
                rng.choice(words, after),
            ]
        )
        for _ in range(batch)
    ]
    side = config.vision.image_size
    pixels = rng.standard_normal((batch * images, 3, side, side)).astype(np.float32)
    columns = [np.arange(len(row)) for row in rows]
    inputs = lay_out(
        rows, columns, len(rows[0]), whole_pictures(pixels, config.tokens_per_image), config.image_token_id, 0,
        config.text.max_position_embeddings,
    )  # fmt: skip
    return inputs, np.stack(rows)


def seconds(call) -> tuple[float, object]:
    """Seconds from a call until its arrays are ready, and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def summary(values: list[float], digits: int = 2) -> dict:
    """Median, minimum and maximum, rounded."""
    rounded = [round(value, digits) for value in values]
    return {"median": round(statistics.median(values), digits), "min": min(rounded), "max": max(rounded)}


def bandwidth(copy: bool) -> float:
    """GB/s of a pass over a gibibyte that reads it, or reads and writes it (`copy`)."""
    array = jnp.ones((2**28,), jnp.float32)
    call = jax.jit((lambda x: x + 1) if copy else jnp.sum)
    call(array).block_until_ready()
    typical = statistics.median(seconds(lambda: call(array))[0] for _ in range(5))
    return array.nbytes * (2 if copy else 1) / typical / 1e9


def peak(dtype: str) -> float:
    """GFLOP/s of one large matrix product; float32 matrices are multiplied in full float32 precision."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    matrix = jnp.ones((side, side), dtype)
    call = jax.jit(lambda x: jnp.dot(x, x, precision="highest"))
    call(matrix).block_until_ready()
    return 2 * side**3 / statistics.median(seconds(lambda: call(matrix))[0] for _ in range(3)) / 1e9


def program_bytes(compiled) -> int:
    """Peak bytes of a program: arguments, temporaries, and results that do not reuse the arguments' memory."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def machine() -> str:
    """The device in words."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{len(jax.devices())} x {device.device_kind}"
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if pathlib.Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()
