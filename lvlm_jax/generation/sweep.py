"""Runs many strengths of one method at once: the same prompts, one program, one pass over the weights for all of them.

    G grid points, B samples, M new tokens

The grid is a `vmap` axis of everything that a strength can change (caches, tokens, memory). The other arrays
(columns, positions, the step) have no such axis, so a decode step writes its caches in place as usual. Memory: G times
the caches of one generation; split a large grid.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from lvlm_jax.compilation import jit
from lvlm_jax.errors import LVLMError, shown
from lvlm_jax.generation import branches, decode_loop, forward, searches
from lvlm_jax.generation.branches import PrefillInputs
from lvlm_jax.generation.host import ALONE, Host
from lvlm_jax.generation.output import Output
from lvlm_jax.generation.sampling import Sampling, sample_keys
from lvlm_jax.generation.settings import GREEDY, Decoding
from lvlm_jax.generation.state import Prompt
from lvlm_jax.methods import Method
from lvlm_jax.methods.base import OTHER_PICTURES, contrast_kind
from lvlm_jax.methods.tower import edit_key
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.layout import Inputs, bucket

SHARED = ("tracks", "count", "stop", "keys", "sampling")  # fields of Answers and State without a grid axis


def as_list(methods: Sequence[Any]) -> Sequence[Any]:
    """Returns the methods of a sweep; raises an `LVLMError` if they are not a list."""
    if not isinstance(methods, Sequence) or isinstance(methods, str):
        raise LVLMError(f"methods are {shown(methods)}; expected a list of methods")
    return methods


def generate(
    params: dict,
    config: FamilyConfig,
    prompt: Inputs,
    methods: Sequence[Method],
    decoding: Decoding = GREEDY,
    host: Host = ALONE,
) -> list[Output]:
    """Answers a batch of prompts once for every setting of a method.

    Args:
        params, config: those of the model.
        prompt: the prompts.
        methods: one method with different strengths.
        decoding: how the answers are decoded.
        host: devices and tokenizers.

    Returns:
        One output per setting, equal to that of `answer.generate`.

    Raises:
        LVLMError: the methods differ in more than strengths, or the method is a search.
    """
    for method in methods:
        if reason := searches.obstacle(method, decoding):
            raise LVLMError(f"{reason}, so it cannot be swept; call generate for every setting")
    check_alike(methods)
    keys = sample_keys(decoding.seed, prompt.batch)
    limit = decoding.limit(config, prompt)
    capacity = bucket(limit)
    inputs, *axes = prefill_inputs(params, config, prompt, methods, capacity, host)
    answers = run(
        params,
        config,
        inputs.main,
        inputs.method,
        inputs.contrast,
        prompt.tokens,
        decoding.sampling,
        keys,
        host.stops(config, decoding),
        jnp.int32(limit),
        answer_capacity=capacity,
        embedding_axes=tuple(axes),
        options=tuple(inputs.options.items()),
    )
    by_point = ("tokens", "logprobs", "length", "finished")

    def output(point: int) -> Output:
        fields = {name: getattr(answers, name)[point] for name in by_point}
        try:
            return host.read(dataclasses.replace(answers, **fields), decoding.stop)
        except LVLMError as error:
            raise LVLMError(f"setting {point} of the sweep: {error}") from error

    return [output(point) for point in range(len(methods))]


def check_alike(methods: Sequence[Method]) -> None:
    """Raises an `LVLMError` unless methods differ only in strengths.

    Raises:
        LVLMError: there are no methods, None is among them, or they differ in more than strengths.
    """
    structures = {jax.tree.structure(method) for method in methods}
    if len(structures) != 1:
        raise LVLMError(
            f"a sweep takes one method with different strengths and got {len(structures)} structures; "
            "switches, layers and variants must be the same"
        )
    if methods[0] is None:
        raise LVLMError("a sweep takes one method with different strengths and got None; use generate")


def stack(methods: Sequence[Method]) -> Method:
    """Stacks methods of equal structure into one whose strengths have a leading grid axis."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *methods)


def prefill_inputs(
    params: dict,
    config: FamilyConfig,
    prompt: Inputs,
    methods: Sequence[Method],
    answer_capacity: int,
    host: Host = ALONE,
) -> tuple[PrefillInputs, int | None, int | None]:
    """`branches.prefill_inputs` for all settings together: towers, contrast prompt and warm-up pass run once.

    The exceptions: contrast images that depend on a strength go through the tower once per setting; and each different
    edit of the tower has its own run of the tower and its own warm-up pass.

    Returns:
        The inputs, whose method is the `stack` of all settings; and the grid axes in the embeddings of the main branch
        and of the contrast branch, None if the embeddings do not depend on a strength.
    """
    edits = {edit_key(edit): edit for edit in map(branches.tower_edit, methods if prompt.pixels is not None else [])}
    if len(edits) > 1:
        return _with_edited_towers(params, config, prompt, methods, answer_capacity, host)
    main = branches.embed_prompt(params, config, prompt, host.mesh, *edits.values())
    warmed_up = branches.after_warm_up(params, config, prompt, main, methods, host.mesh)
    first, *others = [
        branches.make_contrast_prompt(config, prompt, method, host) for method in _contrast_methods(methods, prompt)
    ]
    contrast, contrast_axis = None, None
    if contrast_kind(methods[0]) == "tokens":
        grid = [decode_loop.contrast_tokens(method, main).embeddings for method in warmed_up]
        contrast, contrast_axis = dataclasses.replace(main, embeddings=jnp.stack(grid)), 0
    elif contrast_kind(methods[0]) == "fewer_tokens":
        contrast = branches.with_fewer_tokens(params, config, prompt, main, warmed_up[0])
    elif first is not None:
        contrast = main if first is prompt else branches.embed_prompt(params, config, first, host.mesh)
    if any(not jnp.array_equal(first.pixels, other.pixels) for other in others):
        grid = [branches.embed_prompt(params, config, other, host.mesh).embeddings for other in others]
        contrast = dataclasses.replace(contrast, embeddings=jnp.stack([contrast.embeddings, *grid]))
        contrast_axis = 0
    options = branches.prefill_options(prompt, answer_capacity, first, methods[0])
    return PrefillInputs(main, contrast, stack(warmed_up), options), None, contrast_axis


def _with_edited_towers(
    params: dict, config: FamilyConfig, prompt: Inputs, methods: Sequence[Method], answer_capacity: int, host: Host
) -> tuple[PrefillInputs, int | None, int | None]:
    """`prefill_inputs` of settings that differ in their edits of the tower."""
    each = [branches.prefill_inputs(params, config, prompt, method, answer_capacity, host) for method in methods]

    def joined(prompts: Sequence[Prompt | None]) -> Prompt | None:
        first = prompts[0]
        return first and dataclasses.replace(first, embeddings=jnp.stack([one.embeddings for one in prompts]))

    main, contrast = joined([one.main for one in each]), joined([one.contrast for one in each])
    inputs = PrefillInputs(main, contrast, stack([one.method for one in each]), each[0].options)
    return inputs, 0, None if contrast is None else 0


def _contrast_methods(methods: Sequence[Method], prompt: Inputs) -> Sequence[Method]:
    """The methods for which a contrast prompt is made.

    If strengths may change the contrast branch's images, these are all methods; else the first, because all contrast
    prompts are equal.
    """
    varies = contrast_kind(methods[0]) in OTHER_PICTURES and prompt.pixels is not None
    return methods if varies else methods[:1]


def _run(
    params: dict,
    config: FamilyConfig,
    prompt: Prompt,
    methods: Method,
    contrast: Prompt | None,
    tokens: Int[Array, "B T"],
    sampling: Sampling,
    keys: Key[Array, "B"],
    stop: Int[Array, "N"],
    limit: Int[Array, ""],
    answer_capacity: int,
    embedding_axes: tuple[int | None, int | None],
    options: tuple[tuple[str, Any], ...],
) -> decode_loop.Answers:
    """Answers with a leading grid axis in every field that a strength can change.

    Args:
        methods: from `stack`.
        contrast: the contrast branch's prompt.
        tokens: the prompt's token ids.
        limit: largest number of tokens to write.
        answer_capacity: how many tokens fit in the caches after the prompt.
        embedding_axes: the grid axis in the embeddings of `prompt`, and in those of `contrast`; None if they have none.
        options: static options of `forward.prefill`.
    """

    def begin(method: Method, embeddings: Array, other: Array | None) -> decode_loop.Answers:
        main = dataclasses.replace(prompt, embeddings=embeddings)
        second = contrast and dataclasses.replace(contrast, embeddings=other)
        state, step = forward.prefill(params, config, main, method, contrast=second, **dict(options))
        return decode_loop.choose_first(state, step.combined, tokens, sampling, keys, stop, answer_capacity)

    embeddings = (prompt.embeddings, None if contrast is None else contrast.embeddings)
    one = jax.tree.map(lambda leaf: leaf[0], methods)
    first = (whole if axis is None else whole[0] for whole, axis in zip(embeddings, embedding_axes, strict=True))
    shapes = jax.eval_shape(begin, one, *first)
    axes = jax.tree_util.tree_map_with_path(_grid_axis, shapes, is_leaf=lambda node: isinstance(node, Method))
    answers = jax.vmap(begin, in_axes=(0, *embedding_axes), out_axes=axes)(methods, *embeddings)
    advance = jax.vmap(functools.partial(decode_loop.advance, params, config), in_axes=(axes,), out_axes=axes)

    def unfinished(answers: decode_loop.Answers) -> Array:
        return (answers.count < limit) & ~answers.finished.all()

    return jax.lax.while_loop(unfinished, advance, answers)


def _grid_axis(path: tuple, leaf: Any) -> int | None:
    names = {entry.name for entry in path if isinstance(entry, jax.tree_util.GetAttrKey)}
    return None if names & set(SHARED) else 0


run = jit(_run, static_argnames=("config", "answer_capacity", "embedding_axes", "options"))
