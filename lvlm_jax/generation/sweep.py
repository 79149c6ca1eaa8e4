"""Many strengths of one method at once: the same prompts, one program, one pass over the weights for all of them.

    G grid points, B samples, M new tokens

The grid is an axis of `vmap` over everything a strength can change (caches, tokens, memory); what it cannot change
(columns, positions, the step) has no such axis, so a decode step writes its caches in place as an ordinary one does.
Memory: G times the caches of one generation; split a large grid.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import drivers, forward
from lvlm_jax.generation.sampling import Sampling
from lvlm_jax.generation.state import Prompt
from lvlm_jax.methods import Method
from lvlm_jax.models.family import FamilyConfig

SHARED = ("tracks", "count", "stop", "keys", "sampling")  # fields of Answers and State without a grid axis


def stack(methods: Sequence[Method]) -> Method:
    """One method whose strengths have a leading grid axis.

    Raises:
        LVLMError: no methods, or methods that differ in more than strengths.
    """
    structures = {jax.tree.structure(method) for method in methods}
    if len(structures) != 1:
        raise LVLMError(
            f"a sweep takes one method with different strengths and got {len(structures)} structures; "
            "switches, layers and variants must be the same"
        )
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *methods)


def generate(
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
    room: int,
    contrast_axis: int | None,
    options: tuple[tuple[str, Any], ...],
) -> drivers.Answers:
    """Answers with a leading grid axis in every field that a strength can change.

    Args:
        methods: from `stack`.
        contrast: the contrast branch's prompt, with a grid axis in its embeddings if `contrast_axis` is 0.
        tokens: the prompt's token ids.
        limit: how many tokens to write at most.
        room: how many tokens fit in the caches.
        options: static options of `forward.prefill`.
    """

    def begin(method: Method, embeddings: Array | None) -> drivers.Answers:
        other = contrast if embeddings is None else dataclasses.replace(contrast, embeddings=embeddings)
        state, step = forward.prefill(params, config, prompt, method, contrast=other, **dict(options))
        return drivers.choose_first(state, step.combined, tokens, sampling, keys, stop, room)

    embeddings = None if contrast is None else contrast.embeddings
    one = jax.tree.map(lambda leaf: leaf[0], methods)
    first = embeddings if contrast_axis is None else embeddings[0]
    shapes = jax.eval_shape(begin, one, first)
    axes = jax.tree_util.tree_map_with_path(_axis, shapes, is_leaf=lambda node: isinstance(node, Method))
    answers = jax.vmap(begin, in_axes=(0, contrast_axis), out_axes=axes)(methods, embeddings)
    advance = jax.vmap(functools.partial(drivers.advance, params, config), in_axes=(axes,), out_axes=axes)

    def unfinished(answers: drivers.Answers) -> Array:
        return (answers.count < limit) & ~answers.finished.all()

    return jax.lax.while_loop(unfinished, advance, answers)


def _axis(path: tuple, leaf: Any) -> int | None:
    names = {entry.name for entry in path if isinstance(entry, jax.tree_util.GetAttrKey)}
    return None if names & set(SHARED) else 0


run = jax.jit(generate, static_argnames=("config", "room", "contrast_axis", "options"))
