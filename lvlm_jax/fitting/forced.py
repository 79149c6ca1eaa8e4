"""Prompts followed by the good or the bad answer of a pair, laid out for one forward pass."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from lvlm_jax import LVLM
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import branches
from lvlm_jax.generation.state import Prompt
from lvlm_jax.training.data.pair_files import Pair

SIDES = ("good", "bad")


class ForcedBatch(NamedTuple):
    """B prompts with their answers.

    Attributes:
        prompt: the decoder's input.
        tokens: token ids of its columns.
        answer: the columns of the answer.
        static: options of `forward.full_forward`.
    """

    prompt: Prompt
    tokens: Int[np.ndarray, "B T"]
    answer: Bool[np.ndarray, "B T"]
    static: dict[str, int]


def answer_tokens(model: LVLM, pairs: Sequence[Pair], side: str) -> list[list[int]]:
    """The tokens of the pairs' good or bad answers.

    Raises:
        LVLMError: an answer has no tokens.
    """
    texts = [pair.chosen if side == "good" else pair.rejected for pair in pairs]
    tokens = [model.processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for pair, token_ids in zip(pairs, tokens, strict=True):
        if not token_ids:
            raise LVLMError(f"pair {pair.id}: the {side} answer has no token; remove the pair")
    return tokens


def forced(model: LVLM, pairs: Sequence[Pair], side: str) -> ForcedBatch:
    """The pairs' prompts, each followed by its good or its bad answer.

    Raises:
        LVLMError: an answer without tokens, an unreadable image, or a prompt beyond the context.
    """
    answers = answer_tokens(model, pairs, side)
    prompts = model.prepare([pair.conversation() for pair in pairs])
    laid_out = prompts.with_answers(answers, model.config.pad_token_id)
    longest, context = int(laid_out.lengths.max()), model.config.text.max_position_embeddings
    if longest > context:
        raise LVLMError(f"a prompt with its answer has {longest} tokens and the model's context is {context}")
    total = laid_out.tokens.shape[1]
    lengths = np.array([len(answer) for answer in answers])
    answer = np.arange(total)[None] >= total - lengths[:, None]
    prompt = branches.embed_prompt(model.params, model.config, laid_out, model.mesh)
    return ForcedBatch(prompt, laid_out.tokens, answer, {"tail_rows": total, "image_count": laid_out.image_count})


def producing(forced: ForcedBatch) -> Bool[np.ndarray, "B T"]:
    """The rows that predict the answer's tokens; the row for a token is one column before the token."""
    return np.pad(forced.answer[:, 1:], ((0, 0), (0, 1)))


def targets(forced: ForcedBatch) -> Int[jnp.ndarray, "B T"]:
    """The token that each row should produce."""
    return jnp.asarray(np.pad(forced.tokens[:, 1:], ((0, 0), (0, 1))).astype(np.int32))
