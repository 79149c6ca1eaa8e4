"""The programs that `LVLM.generate` runs for an answer, compiled without a model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lvlm_jax import models, parallel
from lvlm_jax.attention import Tap
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import decode_loop, searches
from lvlm_jax.generation.sampling import Sampling, sample_keys
from lvlm_jax.generation.state import Prompt
from lvlm_jax.lvlm import LVLM
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.models.pictures import Pictures
from lvlm_jax.planning import programs
from lvlm_jax.planning.programs import Compiled, Program, size
from lvlm_jax.processors.layout import Inputs, bucket
from lvlm_jax.training import placement
from lvlm_jax.weights import quantize

TEXT_BEFORE, TEXT_BEHIND = 8, 40  # tokens around the images, as in a chat template with a question


def inference(job: Any, config: FamilyConfig, mesh: Mesh, target: str) -> tuple[Program, ...]:
    """Image encoding, embedding, a method's warm-up, prefill, decoding.

    Args:
        job: a `plan.Job`.
        config: the model's configuration, of any depth.
        mesh: the devices.
        target: see `programs.compile_for`.

    Raises:
        LVLMError: the method cannot be planned, or the prompt has no room for its images.
    """
    if reason := searches.obstacle(job.method):
        raise LVLMError(f"{reason}, which cannot be planned; expected another method")
    prompt, params = example(job, config, job.batch), parameters(config, job.dtype, mesh, job.quant)
    parameter_bytes, read = size(params), size(programs.weights_read(params))
    planned: list[Program] = []

    def compiled(
        function: Any, *arguments: Any, donated: int | None = None, per_round: bool = False, **static: Any
    ) -> Compiled:
        with parallel.ambient(mesh):
            traced = function.trace(params, config, *arguments, **static)
        inputs = (params, *arguments, static.get("contrast"))
        return programs.compile_for(traced, inputs, mesh.size, target, donated, per_round=per_round)

    def add(
        name: str, result: Compiled, rest: float, weights: float, moved: float, cache: float = 0.0, runs: int = 1
    ) -> None:
        parts = {"parameters": parameter_bytes, "cache": cache, "inputs and results": rest}
        planned.append(
            Program(
                name,
                parts,
                result.orders,
                runs * result.flops,
                runs * max(weights + moved, result.moved),
                {reach: runs * one for reach, one in result.messages.received.items()},
                runs * result.messages.count,
            )
        )

    pixels, image_tokens = None, None
    if prompt.pixels is not None:
        pixels, geometry = _spread(jax.tree.map(_shape, (prompt.pixels, prompt.geometry)), mesh)
        edit = None if job.method is None else job.method.tower_edit()
        result = compiled(decode_loop.encode_images, pixels, geometry, edit)
        image_tokens, own = result.results, size((pixels, geometry)) + result.fresh
        beside = sum(size(part) for name, part in params.items() if name != "language_model")
        other = job.method is not None and len(job.method.branches()) > 1
        twice = other and job.method.contrast_prompt() in ("pixels", "altered")
        add("images", result, own, beside, own, runs=1 + twice)
    tokens = _spread(_shape(prompt.tokens), mesh)
    result = compiled(decode_loop.embed, tokens, image_tokens)
    embeddings, own = result.results, size((tokens, image_tokens)) + result.fresh
    add("embed", result, own, 0, own)

    options: dict[str, Any] = {}
    answer_columns = bucket(job.new_tokens)

    def prepared(params: dict, pixels: Any) -> tuple:
        prompt_with_pixels = dataclasses.replace(prompt, pixels=pixels)
        length = int(prompt.lengths.max()) + answer_columns
        (_, _, *traced), static = LVLM(params, config, job.folder).prefill_arguments(
            prompt_with_pixels, job.method, length
        )
        contrast = static.pop("contrast")
        options.update(static)
        return *traced, contrast

    main, method, contrast = jax.eval_shape(prepared, params, pixels)
    main, contrast = _spread(main, mesh), _spread(contrast, mesh)
    if main.embeddings.sharding is None:
        main = dataclasses.replace(main, embeddings=embeddings)
    if job.method is not None and job.method.warm_up_fields:
        looks = {name: options[name] for name in ("tail_rows", "image_count")}
        # All hidden states, with and without images; the last row's attention, with images.
        taps = {
            "hidden": (Tap(hidden=tuple(range(config.text.num_layers + 1))), 2),
            "attention": (Tap(layers=None, mean_heads=True), 1),
        }
        for name, (tap, runs) in taps.items():
            if name in job.method.warm_up_fields:
                result = compiled(decode_loop.full_forward, main, None, **looks, tap=tap)
                own = size(main) + result.fresh
                add("prime", result, own, read, own, runs=runs)
        if "probe" in job.method.warm_up_fields:
            pairs = _twice(main)
            result = compiled(decode_loop.probe, pairs, job.method.probe(), image_count=looks["image_count"])
            own = size(pairs) + result.fresh
            add("probe", result, own, read, own)

    arguments = (main, method, contrast)
    result = compiled(decode_loop.prefill, main, method, contrast=contrast, **options)
    state, step = result.results
    cache, own = size(state.caches), size(arguments) + result.fresh
    add("prefill", result, own - cache, read, own, cache)

    answers = jax.eval_shape(functools.partial(_begun, room=answer_columns), state, step.combined, tokens)
    answers, limit = dataclasses.replace(answers, state=state), jax.ShapeDtypeStruct((), jnp.int32)
    result = compiled(decode_loop.run, answers, limit, donated=1, per_round=True)
    add("decode", result, size(answers) - cache + result.fresh, read, size(answers), cache)
    return tuple(planned)


def _twice(prompt: Prompt) -> Prompt:
    """The shapes of prompts with and without their images."""

    def doubled(leaf: jax.ShapeDtypeStruct, axis: int) -> jax.ShapeDtypeStruct:
        shape = tuple(2 * side if place == axis else side for place, side in enumerate(leaf.shape))
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

    axes = None if prompt.axes is None else doubled(prompt.axes, 1)
    return Prompt(doubled(prompt.embeddings, 0), doubled(prompt.image_id, 0), axes)


def parameters(config: FamilyConfig, dtype: str, mesh: Mesh, quant: str | None = None) -> dict:
    """The shapes of a model's parameters, with the sharding of `LVLM.from_pretrained`."""
    params = models.abstract_parameters(config, dtype)
    if quant is not None:
        params = jax.eval_shape(quantize.quantize, params)
    return placed(params, placement.of_parameters(params, mesh))


def placed(shapes: Any, shardings: Any) -> Any:
    """Adds shardings to shapes."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
    )


def example(job: Any, config: FamilyConfig, rows: int) -> Inputs:
    """`rows` prompts of the planned size: some text, the images, text. Pixels take no memory.

    Raises:
        LVLMError: too few tokens for the images, or more than the model's context.
    """
    images = pictures(config, rows * job.images)
    counts = [] if images is None else images.token_counts[: len(images.token_counts) // rows].tolist()
    least = TEXT_BEFORE + sum(counts)
    length = least + TEXT_BEHIND if job.prompt_tokens is None else job.prompt_tokens
    context = config.text.max_position_embeddings
    if not least < length < context:
        raise LVLMError(
            f"a prompt of {length} tokens is not possible; expected more than {least} ({sum(counts)} of images and "
            f"{TEXT_BEFORE} before them) and less than the context of {context}"
        )
    row = np.full(bucket(length), -1, np.int32)
    row[len(row) - length :] = 0
    start = len(row) - length + TEXT_BEFORE
    row[start : start + sum(counts)] = np.repeat(np.arange(len(counts)) + 1, counts)
    image_id = np.tile(row, (rows, 1))
    tokens = np.where(image_id > 0, config.image_token_id, 0).astype(np.int32)
    inputs = Inputs(tokens, image_id, None, np.zeros((rows, 0), np.int64))
    if images is None:
        return inputs
    return dataclasses.replace(
        inputs, pixels=images.pixels, owner=images.owner, geometry=images.geometry, grids=images.grids
    )


def pictures(config: FamilyConfig, count: int) -> Pictures | None:
    """`count` of the smallest images of a family; for families with one image size, of that size."""
    if count == 0:
        return None
    blank = config.blank()

    def repeated(array: np.ndarray) -> np.ndarray:
        return np.tile(array, (count, *[1] * (array.ndim - 1)))

    pixels = np.broadcast_to(np.float32(0), (count * len(blank.pixels), *blank.pixels.shape[1:]))
    images = len(blank.token_counts)
    owner = np.concatenate([np.where(blank.owner < 0, -1, blank.owner + i * images) for i in range(count)])
    geometry = {name: repeated(array) for name, array in blank.geometry.items()}
    grids = None if blank.grids is None else repeated(blank.grids)
    return Pictures(pixels, owner, repeated(blank.token_counts), geometry, grids)


def _begun(state: Any, logits: Any, tokens: Any, room: int) -> decode_loop.Answers:
    stop = jnp.zeros((1,), jnp.int32)
    keys = sample_keys(0, logits.shape[0])
    return decode_loop.choose_first(state, logits, tokens, Sampling.of(), keys, stop, room)


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))


def _spread(batch: Any, mesh: Mesh) -> Any:
    """Shards a batch as `parallel.spread` would shard it."""
    shards, place = mesh.shape["data"] * mesh.shape["fsdp"], parallel.batch_sharding(mesh)

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=None if leaf.shape[0] % shards else place)

    return jax.tree.map(shape, batch)
