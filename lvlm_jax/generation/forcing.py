"""Scores known answers as a method would have written them, differentiably in its strengths.

The prompt runs as for a generation, then all rows of an answer at once: `attention.each_row` gives each row the edits
of its own decode step, both branches run, and `combine` is applied token by token. If a step's edits depend on the step
before (SPARC), the steps run one after another. The result equals a generation that is forced to write these tokens,
except that cuts may be soft (`methods.cuts`).
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
from lvlm_jax.generation import branches, decode_loop, forward
from lvlm_jax.generation.host import ALONE, Host
from lvlm_jax.generation.state import Prompt, State, Step
from lvlm_jax.methods import Method, Readout
from lvlm_jax.methods.base import OTHER_LAYOUTS, WarmUp, contrast_kind
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.layout import Inputs


class ForcedLogits(NamedTuple):
    """Logits of A answer tokens; each token's logits come from the row before the token.

    Attributes:
        main, contrast: raw logits of the branches; `contrast` is None without a second branch.
        combined: the method's combination.
    """

    main: Float[Array, "B A V"]
    contrast: Float[Array, "B A V"] | None
    combined: Float[Array, "B A V"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForcedInputs:
    """B prompts with N answers each, and everything that does not depend on strengths: tower outputs, plain warm-up
    passes, contrast prompts.

    Attributes:
        main: the main branch's input.
        contrast: the contrast branch's input, if it is another prompt.
        hidden, attention, tower: fields of `WarmUp` that the method needs.
        both: prompts with and without images, for a method's probe.
        tail_rows: an empty array of shape `[B, Inputs.tail_rows]`, whose shape makes that number static.
        tokens: tokens of the answers, padded on the right.
        in_answer: which tokens belong to the answer and are not padding.
    """

    main: Prompt
    contrast: Prompt | None
    hidden: Any
    attention: Any
    tower: Any
    both: Prompt | None
    tail_rows: Bool[Array, "B W"]
    tokens: Int[Array, "B N A"]
    in_answer: Bool[Array, "B N A"]


def forced_inputs(
    params: dict,
    config: FamilyConfig,
    prompt: Inputs,
    method: Method | None,
    answers: Sequence[Sequence[Sequence[int]]],
    host: Host = ALONE,
    length: int = 0,
) -> ForcedInputs:
    """Runs everything that precedes the decoder, for a batch of prompts and answers.

    Args:
        answers: N answers for each prompt, as tokens.
        length: the smallest number of answer columns.

    Raises:
        LVLMError: the contrast branch's prompt exceeds the context.
    """
    main = branches.embed_prompt(params, config, prompt, host.mesh, branches.tower_edit(method))
    warm_up_fields = () if method is None else method.warm_up_fields
    warm_up = branches.warm_up_results(params, config, prompt, main, warm_up_fields, host.mesh)
    tower = None
    if "tower" in warm_up_fields:
        tower = branches.embed_with_edited_tower(params, config, prompt, main, method, host.mesh)
    pairs = (
        branches.with_and_without_images(params, config, prompt, main, host.mesh) if "probe" in warm_up_fields else None
    )
    contrast, kind = None, contrast_kind(method)
    if kind == "fewer_tokens":
        contrast = branches.with_fewer_tokens(params, config, prompt, main, method)
    elif kind not in ("same", "tokens"):
        contrast_prompt = branches.make_contrast_prompt(config, prompt, method, host)
        contrast = (
            main if contrast_prompt is prompt else branches.embed_prompt(params, config, contrast_prompt, host.mesh)
        )
    longest = max(length, 2, *(len(answer) for several in answers for answer in several))
    tokens = np.full((len(answers), len(answers[0]), longest), config.pad_token_id, np.int32)
    in_answer = np.zeros(tokens.shape, bool)
    for row, several in enumerate(answers):
        for place, answer in enumerate(several):
            tokens[row, place, : len(answer)], in_answer[row, place, : len(answer)] = answer, True
    tail_rows = np.zeros((prompt.batch, prompt.tail_rows), bool)
    return ForcedInputs(
        main,
        contrast,
        warm_up.hidden,
        warm_up.attention,
        tower,
        pairs,
        *map(jnp.asarray, (tail_rows, tokens, in_answer)),
    )


def logits(
    params: dict, config: FamilyConfig, inputs: ForcedInputs, method: Method | None, image_count: int
) -> ForcedLogits:
    """Logits of every token of every answer, `[B, N, A, V]` each. Pure.

    Args:
        inputs: the inputs from `forced_inputs`.
        image_count: the largest number of images in a prompt.
    """
    contrast, total = inputs.contrast, inputs.main.image_id.shape[1]
    length = inputs.tokens.shape[2]
    if method is not None and method.warm_up_fields:
        probe = None
        if inputs.both is not None:
            probe = forward.probe(params, config, inputs.both, method.probe(), image_count)
        method = method.after_warm_up(WarmUp(inputs.hidden, inputs.attention, inputs.tower, probe))
    kind = contrast_kind(method)
    if kind == "tokens":
        contrast = decode_loop.contrast_tokens(method, inputs.main)
    apart = kind in OTHER_LAYOUTS
    state, step = forward.prefill(
        params,
        config,
        inputs.main,
        method,
        tail_rows=inputs.tail_rows.shape[1],
        capacity=total + length,
        contrast=contrast,
        contrast_capacity=contrast.image_id.shape[1] + length if apart else 0,
        image_count=image_count,
    )
    return jax.vmap(lambda tokens: forced_logits(params, config, state, step, tokens), in_axes=1, out_axes=1)(
        inputs.tokens
    )


def logprobs(
    params: dict, config: FamilyConfig, inputs: ForcedInputs, method: Method | None, image_count: int
) -> Float[Array, "B N A"]:
    """Log-probability in nats of every token of every answer; 0 after an answer's end."""
    logprob = jax.nn.log_softmax(logits(params, config, inputs, method, image_count).combined, axis=-1)
    chosen = jnp.take_along_axis(logprob, inputs.tokens[..., None], axis=-1)[..., 0]
    return jnp.where(inputs.in_answer, chosen, 0)


def forced_logits(
    params: dict, config: FamilyConfig, state: State, step: Step, tokens: Int[Array, "B A"]
) -> ForcedLogits:
    """Logits of given tokens after a prompt, equal to those of `forward.decode_step` for one token after the other.

    Args:
        state, step: results of `forward.prefill`, with room for the tokens.
    """
    if state.method is not None and state.method.step_by_step:
        _, steps = jax.lax.scan(
            lambda state, fed: forward.decode_step(params, config, state, fed), state, tokens[:, :-1].T
        )
        rows = [getattr(steps, name) for name in ForcedLogits._fields]
        rows = [None if each is None else each.swapaxes(0, 1) for each in rows]
        firsts = [getattr(step, name) for name in ForcedLogits._fields]
        return ForcedLogits(*(_append_rows(first, rest) for first, rest in zip(firsts, rows, strict=True)))
    main, contrast, others, exits, carries = _rows(params, config, state, tokens[:, :-1])
    if state.method is None:
        return ForcedLogits(_append_rows(step.main, main), None, _append_rows(step.main, main))
    method = state.method

    def combine(memory: Any, row: Readout) -> tuple[Any, Float[Array, "B V"]]:
        combined, memory = method.combine(row, memory)
        return memory, combined

    by_row = Readout(_rows_first(main), _rows_first(contrast), exits, carries, others)
    _, combined = jax.lax.scan(combine, state.memory.logits, by_row)
    return ForcedLogits(
        _append_rows(step.main, main),
        _append_rows(step.contrast, contrast),
        _append_rows(step.combined, combined.swapaxes(0, 1)),
    )


def _rows(params: dict, config: FamilyConfig, state: State, tokens: Int[Array, "B A"]) -> tuple:
    """Runs A decode steps at once: returns logits `[B, A, V]` (later branches `[A, N, B, V]`), exits and carry."""
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
    early = decoded.tapped.hidden[:, 0] if exits else None
    further = None
    if jax.tree.leaves(decoded.carries[0]):
        further = jax.vmap(method.further_exits, out_axes=2)(decoded.carries[0])
    logits, early = forward.logits_with_exits(params, config, method, decoded.hidden, early, further)
    early = None if early is None else jnp.moveaxis(early, 2, 0)
    later_branches = jnp.moveaxis(logits[2:], 2, 0) if len(transforms) > 2 else None
    return logits[0], logits[1] if len(transforms) > 1 else None, later_branches, early, decoded.carries[0]


def _append_rows(first: Float[Array, "B V"] | None, rest: Float[Array, "B A V"] | None) -> Float[Array, "B A V"] | None:
    return None if first is None else jnp.concatenate([first[:, None], rest], axis=1)


def _rows_first(array: Float[Array, "B A V"] | None) -> Float[Array, "A B V"] | None:
    return None if array is None else array.swapaxes(0, 1)
