"""Answers that are known already, scored as a method would have written them, and differentiably in its strengths.

The prompt is run as for a generation, then the rows of an answer all at once: `attention.each_row` gives each of them
the edits of its own decode step, both branches go through, and `combine` runs along the tokens. Where a step's edits
hang on the step before (SPARC), the steps are run one after the other. What is computed equals a generation that is
made to write these tokens; only a cut that rules tokens out may be soft (`methods.cuts`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention import Tap
from lvlm_jax.attention.each_row import EachRow
from lvlm_jax.generation import branches, drivers, forward
from lvlm_jax.generation.host import ALONE, Host
from lvlm_jax.generation.state import Prompt, State, Step
from lvlm_jax.methods import Method, Readout
from lvlm_jax.methods.base import OTHER_LAYOUTS, WarmUp, contrast_kind
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.layout import Inputs


class Forced(NamedTuple):
    """Logits of A answer tokens: those that each was chosen from.

    Attributes:
        main, contrast: raw logits of the branches; `contrast` is None without a second one.
        combined: the method's combination.
    """

    main: Float[Array, "B A V"]
    contrast: Float[Array, "B A V"] | None
    combined: Float[Array, "B A V"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Opened:
    """B prompts, N answers to each, and what does not depend on strengths: towers, warm-up passes, contrast prompts.

    Attributes:
        main: what the main branch reads.
        contrast: what the contrast branch reads, where that is another prompt.
        hidden, attention, tower: fields of `WarmUp` that the method's warm-up asks for.
        both: prompts with and without images, for a method's probe.
        window: `Inputs.window`, as the size of an axis, because it is static: `Bool[B, window]`.
        tokens: of the answers, padded on the right.
        answered: which of them are tokens of the answer.
    """

    main: Prompt
    contrast: Prompt | None
    hidden: Any
    attention: Any
    tower: Any
    both: Prompt | None
    window: Bool[Array, "B W"]
    tokens: Int[Array, "B N A"]
    answered: Bool[Array, "B N A"]


def opened(
    params: dict,
    config: FamilyConfig,
    prompt: Inputs,
    method: Method | None,
    answers: Sequence[Sequence[Sequence[int]]],
    host: Host = ALONE,
    length: int = 0,
) -> Opened:
    """Everything up to the decoder, of a batch of prompts and answers.

    Args:
        answers: of each prompt N answers, by their tokens.
        length: how many tokens to make room for, if the longest answer has fewer.

    Raises:
        LVLMError: the contrast branch's prompt exceeds the context.
    """
    main = branches.embedded(params, config, prompt, host.mesh)
    warm_up_fields = () if method is None else method.warm_up_fields
    seen = branches.seen(params, config, prompt, main, warm_up_fields, host.mesh)
    tower = None
    if "tower" in warm_up_fields:
        tower = branches.through_edited_tower(params, config, prompt, main, method, host.mesh)
    both = branches.with_and_without(params, config, prompt, main, host.mesh) if "probe" in warm_up_fields else None
    contrast, kind = None, contrast_kind(method)
    if kind == "fewer_tokens":
        contrast = branches.with_fewer_tokens(params, config, prompt, main, method)
    elif kind not in ("same", "tokens"):
        reads = branches.contrast_inputs(config, prompt, method, host)
        contrast = main if reads is prompt else branches.embedded(params, config, reads, host.mesh)
    longest = max(length, 2, *(len(answer) for several in answers for answer in several))
    tokens = np.full((len(answers), len(answers[0]), longest), config.pad_token_id, np.int32)
    answered = np.zeros(tokens.shape, bool)
    for row, several in enumerate(answers):
        for place, answer in enumerate(several):
            tokens[row, place, : len(answer)], answered[row, place, : len(answer)] = answer, True
    window = np.zeros((prompt.batch, prompt.window), bool)
    return Opened(
        main, contrast, seen.hidden, seen.attention, tower, both, *map(jnp.asarray, (window, tokens, answered))
    )


def logits(params: dict, config: FamilyConfig, given: Opened, method: Method | None, image_count: int) -> Forced:
    """Logits of every token of every answer, `[B, N, A, V]` each. Pure.

    Args:
        image_count: no prompt has more images.
    """
    contrast, total = given.contrast, given.main.image_id.shape[1]
    length = given.tokens.shape[2]
    if method is not None and method.warm_up_fields:
        probe = None
        if given.both is not None:
            probe = forward.probed(params, config, given.both, method.probe(), image_count)
        method = method.after_warm_up(WarmUp(given.hidden, given.attention, given.tower, probe))
    kind = contrast_kind(method)
    if kind == "tokens":
        contrast = drivers.contrast_tokens(method, given.main)
    apart = kind in OTHER_LAYOUTS
    state, step = forward.prefill(
        params,
        config,
        given.main,
        method,
        window=given.window.shape[1],
        capacity=total + length,
        contrast=contrast,
        contrast_capacity=contrast.image_id.shape[1] + length if apart else 0,
        image_count=image_count,
    )
    return jax.vmap(lambda tokens: forced(params, config, state, step, tokens), in_axes=1, out_axes=1)(given.tokens)


def logprobs(
    params: dict, config: FamilyConfig, given: Opened, method: Method | None, image_count: int
) -> Float[Array, "B N A"]:
    """Log-probability in nats of every token of every answer; 0 behind its end."""
    found = jax.nn.log_softmax(logits(params, config, given, method, image_count).combined, axis=-1)
    chosen = jnp.take_along_axis(found, given.tokens[..., None], axis=-1)[..., 0]
    return jnp.where(given.answered, chosen, 0)


def forced(params: dict, config: FamilyConfig, state: State, step: Step, tokens: Int[Array, "B A"]) -> Forced:
    """Logits of given tokens behind a prompt: what `forward.decode_step` gives, one token after the other.

    Args:
        state, step: what `forward.prefill` returned, of a capacity that holds the tokens.
    """
    if state.method is not None and state.method.step_by_step:
        _, steps = jax.lax.scan(
            lambda state, fed: forward.decode_step(params, config, state, fed), state, tokens[:, :-1].T
        )
        rows = [getattr(steps, name) for name in Forced._fields]
        rows = [None if each is None else each.swapaxes(0, 1) for each in rows]
        firsts = [getattr(step, name) for name in Forced._fields]
        return Forced(*(_behind(first, rest) for first, rest in zip(firsts, rows, strict=True)))
    main, contrast, others, exits, carries = _rows(params, config, state, tokens[:, :-1])
    if state.method is None:
        return Forced(_behind(step.main, main), None, _behind(step.main, main))
    method = state.method

    def combine(memory: Any, row: Readout) -> tuple[Any, Float[Array, "B V"]]:
        combined, memory = method.combine(row, memory)
        return memory, combined

    by_row = Readout(_rows_first(main), _rows_first(contrast), exits, carries, others)
    _, combined = jax.lax.scan(combine, state.memory.logits, by_row)
    return Forced(
        _behind(step.main, main), _behind(step.contrast, contrast), _behind(step.combined, combined.swapaxes(0, 1))
    )


def _rows(params: dict, config: FamilyConfig, state: State, tokens: Int[Array, "B A"]) -> tuple:
    """A decode steps at once: logits `[B, A, V]` of the first branches, of the others `[A, N, B, V]`, exits, carry."""
    method = state.method and state.method.recall(state.memory.edits)
    transforms = tuple(edit and EachRow(edit) for edit in forward.transforms_of(method))
    contexts = tuple(track.with_tokens(tokens.shape[1]) for track in state.tracks)
    embedded = forward.embed(params, config, tokens, None)
    exits = () if method is None else method.exits(config.text.num_layers)
    decoded = forward.apply(
        params,
        config,
        "decode",
        jnp.broadcast_to(embedded[None], (len(transforms), *embedded.shape)),
        contexts[0] if len(contexts) == 1 else contexts,
        state.caches,
        transforms,
        Tap(hidden=exits, rows="all"),
    )
    found = forward.apply(params, config, "head", decoded.hidden)
    early = None
    if exits:
        early = forward.apply(params, config, "exit_logits", decoded.tapped.hidden[:, 0], method.exit_norm)
        early = jnp.moveaxis(early, 2, 0)
    others = jnp.moveaxis(found[2:], 2, 0) if len(transforms) > 2 else None
    return found[0], found[1] if len(transforms) > 1 else None, others, early, decoded.carries[0]


def _behind(first: Float[Array, "B V"] | None, rest: Float[Array, "B A V"] | None) -> Float[Array, "B A V"] | None:
    return None if first is None else jnp.concatenate([first[:, None], rest], axis=1)


def _rows_first(array: Float[Array, "B A V"] | None) -> Float[Array, "A B V"] | None:
    return None if array is None else array.swapaxes(0, 1)
