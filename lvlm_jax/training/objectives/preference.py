"""CAPL and DPO as a task: pairs in, one forward for both answers, the base weights as the reference.

For recipe "capl" policy and reference both run under CAPL's selective cross-image attention (arXiv 2603.07048), for
"dpo" both run plainly; `preference.method` says which.

The reference costs no second copy of the weights. With LoRA it is the frozen part of the parameters, that is the model
without the adapters, in a second forward through which no gradient flows; or its log-probabilities are computed before
training and read from disk (`preference.reference="precomputed"`), which full fine-tuning needs.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from lvlm_jax.errors import LVLMError
from lvlm_jax.journal.record import method_record
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import CAPL, Method
from lvlm_jax.training import forward, loop
from lvlm_jax.training import preference_losses as preference
from lvlm_jax.training.data import pair_batches, pair_files, reference
from lvlm_jax.training.data.pair_batches import PAIR, Batch, Batches, Encoder, Row
from lvlm_jax.training.losses import Mean
from lvlm_jax.training.validation import evaluation
from lvlm_jax.weights import parts

METHODS = ("capl", "none")
REFERENCES = ("adapter_off", "precomputed")
# Where an adapter is that leaves the image tokens alone.
TEXT_PARTS = {"language_model"}


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Log-probabilities of both answers of each pair.

    Attributes:
        module: the model.
        method: whose attention is active, or None.
        image_count: no pair has more images.
    """

    module: nn.Module
    method: Method | None
    image_count: int

    def image_tokens(self, params: Any, batch: Batch, rngs: forward.Rngs = None) -> Float[Array, "*N E"]:
        """The tower over each picture once, for both answers."""
        return forward.image_tokens(self.module, params, batch, rngs)

    def logprobs(
        self, params: Any, batch: Batch, image_tokens: Float[Array, "*N E"], rngs: forward.Rngs = None
    ) -> tuple[Float[Array, "B 2 A"], Bool[Array, "B 2 A"]]:
        """Of every answer token, chosen first, and which of the A places hold one. One pass through the decoder."""
        embedded = {
            name: forward.embed(self.module, params, batch[name]["tokens"], image_tokens) for name in PAIR
        }
        both = _side_by_side(*(batch[name] for name in PAIR))
        decoded = forward.decode(
            self.module,
            params,
            both["image_id"],
            _side_by_side(*embedded.values()),
            self.method,
            self.image_count,
            rngs=rngs,
            axes=both.get("axes"),
        )
        logits, targets, mask = forward.answer_logits(self.module, params, decoded.hidden[0], both, rngs)
        found = forward.token_logprobs(logits, targets, mask)
        return found.reshape(-1, 2, found.shape[-1]), mask.reshape(-1, 2, found.shape[-1])

    def alone(self, params: Any, batch: Batch) -> Float[Array, "B 2 A"]:
        """`logprobs` of a batch from its pictures on, without dropout."""
        return self.logprobs(params, batch, self.image_tokens(params, batch))[0]


def objective(
    scorer: Scorer,
    settings: Mapping[str, Any],
    trainable: Any,
    frozen: Any,
    batch: Batch,
    key: jax.Array | None,
) -> dict[str, Mean]:
    """`preference.metrics` of a batch. Pure.

    Args:
        settings: `loss`, `beta`, `label_smoothing` of `preference.metrics`.
        trainable, frozen: the two parts of the parameters; `frozen` alone is the reference unless the batch brings
            the reference's log-probabilities.
        key: of the adapters' dropout; None for none.
    """
    rngs = None if key is None else {"dropout": key}
    params = parts.join(trainable, frozen)
    image_tokens = scorer.image_tokens(params, batch, rngs)
    policy, mask = scorer.logprobs(params, batch, image_tokens, rngs)
    if "reference" in batch:
        base = batch["reference"]
    elif set(trainable) <= TEXT_PARTS:
        base, _ = scorer.logprobs(frozen, batch, image_tokens)
    else:
        base = scorer.alone(frozen, batch)
    return preference.metrics(policy, jax.lax.stop_gradient(base), mask, batch["weight"], **settings)


def task(model: LVLM, module: nn.Module, config: ConfigDict, workdir: Path) -> loop.Task:
    """The task of recipes "capl" and "dpo".

    Args:
        model: the base model, which is the reference.
        module: its module for training.
        config: fields `recipe`, `seed`, `data`, `validation`, `batch`, `accumulate`, `length`, `too_long`,
            `lora.enabled` and `preference`, see `training.settings`.
        workdir: of the run; precomputed log-probabilities are kept in its folder `reference`.

    Raises:
        LVLMError: a setting out of range, or pairs that cannot be used.
    """
    check(config)
    settings = config.preference
    encoder = Encoder(model.processor, model.config)
    rows = _rows(config.data, encoder, config)
    held_out = _rows(config.validation, encoder, config) if config.validation else ()
    images = pair_batches.image_count((*rows, *held_out))
    scorer = Scorer(module, method_of(settings), images)
    size = config.batch // config.accumulate
    if settings.reference == "precomputed":
        identity = {"method": method_record(scorer.method), "dtype": str(module.dtype)}

        def known(rows: tuple[Row, ...]) -> tuple[Row, ...]:
            return reference.with_reference(
                rows, encoder, scorer.alone, model.params, identity, workdir / "reference", size, model.mesh
            )

        rows, held_out = known(rows), known(held_out) if held_out else ()
    chosen = {name: settings[name] for name in ("loss", "beta", "label_smoothing")}
    pure = functools.partial(objective, scorer, chosen)
    source = Batches(rows, encoder, config.batch, config.accumulate, config.seed)
    return loop.Task(
        name=config.recipe,
        objective=pure,
        terms={"preference": 1.0} | ({"nll": settings.nll} if settings.nll else {}),
        source=source,
        evaluate=evaluation(pure, held_out, encoder, size, model.mesh),
        describe=source.describe,
    )


def method_of(settings: ConfigDict) -> Method | None:
    """The attention that policy and reference run under."""
    return None if settings.method == "none" else CAPL(sigma=settings.sigma, rho=settings.rho)


def check(config: ConfigDict) -> None:
    """Refuses settings of `config.preference` that mean nothing.

    Raises:
        LVLMError: naming the setting and what it may be.
    """
    settings = config.preference
    for name, choices in (("loss", preference.LOSSES), ("method", METHODS), ("reference", REFERENCES)):
        if settings[name] not in choices:
            raise LVLMError(f"preference.{name} is {settings[name]!r}; expected one of {', '.join(choices)}")
    if not settings.beta > 0:
        raise LVLMError(f"preference.beta is {settings.beta}; expected a number above 0, such as 0.1")
    if not settings.nll >= 0:
        raise LVLMError(f"preference.nll is {settings.nll}; expected a weight of at least 0")
    if not 0 <= settings.label_smoothing < 0.5:
        raise LVLMError(
            f"preference.label_smoothing is {settings.label_smoothing}; expected the share of pairs whose order "
            "is wrong, from 0 to below 0.5"
        )
    if settings.label_smoothing and settings.loss != "sigmoid":
        raise LVLMError(
            f"preference.label_smoothing belongs to the sigmoid loss and preference.loss is {settings.loss!r}; "
            "set one of them otherwise"
        )
    if settings.reference == "adapter_off" and not config.lora.enabled:
        raise LVLMError(
            "preference.reference is 'adapter_off' and there is no LoRA adapter to leave out (lora.enabled is False); "
            "set preference.reference='precomputed'"
        )


def _rows(path: str, encoder: Encoder, config: ConfigDict) -> tuple[Row, ...]:
    if not path:
        raise LVLMError("data is not set; give a file of preference pairs, as in --config.data=pairs.jsonl")
    pairs = pair_files.read_pairs(path)
    return pair_batches.rows_of(pairs, encoder.pair, encoder, config.length, config.too_long)


def _side_by_side(first: Any, second: Any) -> Any:
    """Two batches as one, rows of a pair next to each other: a device that holds a pair's rows keeps both answers."""

    def merged(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

    return jax.tree.map(merged, first, second)
