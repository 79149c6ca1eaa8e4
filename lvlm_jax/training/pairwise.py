"""Learning from pairs, a chosen and a rejected answer to one prompt: what the objectives "capl" and "dpo" share.

Policy and reference both run under CAPL's selective cross-image attention (arXiv 2603.07048), or both plainly;
`preference.method` says which. One forward pass scores both answers.

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
from lvlm_jax.training.data.pair_batches import PAIR, Batch
from lvlm_jax.training.losses import Mean
from lvlm_jax.training.registry import Check, Objective, one_of
from lvlm_jax.training.samples import Samples
from lvlm_jax.weights import parts

# Where an adapter is that leaves the image tokens alone.
TEXT_PARTS = {"language_model"}

SECTION = "preference"
FIELDS = {
    "loss": "sigmoid",
    "beta": 0.1,
    "label_smoothing": 0.0,
    "nll": 0.0,
    "method": "none",
    "sigma": 0.5,
    "rho": 0.95,
    "reference": "adapter_off",
}
DOCS = {
    "loss": "sigmoid, ipo or hinge",
    "beta": "how strongly the policy is held to the reference",
    "label_smoothing": "of the sigmoid loss: share of pairs whose order is wrong",
    "nll": "weight of the chosen answer's negative log-likelihood",
    "method": "attention of policy and reference: capl, or none",
    "sigma": "of capl: weight of the cross-image softmax",
    "rho": "of capl: share of each image's tokens that is selected",
    "reference": "adapter_off (the model without its adapter), or precomputed",
}
CHECKS = (
    one_of("loss", preference.LOSSES),
    one_of("method", ("capl", "none")),
    one_of("reference", ("adapter_off", "precomputed")),
    Check("beta", "a number above 0, such as 0.1", lambda value: value > 0),
    Check("nll", "a weight of at least 0", lambda value: value >= 0),
    Check(
        "label_smoothing",
        "the share of pairs whose order is wrong, from 0 to below 0.5",
        lambda value: 0 <= value < 0.5,
    ),
)


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
        embedded = {name: forward.embed(self.module, params, batch[name]["tokens"], image_tokens) for name in PAIR}
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


def metrics(
    scorer: Scorer, settings: Mapping[str, Any], trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None
) -> dict[str, Mean]:
    """`preference_losses.metrics` of a batch. Pure.

    Args:
        settings: `loss`, `beta`, `label_smoothing` of `preference_losses.metrics`.
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


def objective(name: str, **defaults: Any) -> Objective:
    """The objective of that name, with the fields of `FIELDS` and these defaults of its own."""
    return Objective(name, task, SECTION, FIELDS | defaults, DOCS, CHECKS, _check)


def task(model: LVLM, module: nn.Module, config: ConfigDict, workdir: Path) -> loop.Task:
    """See `registry.Objective`; precomputed log-probabilities are kept in the folder `reference` of `workdir`."""
    settings, samples = config.preference, Samples.pairs(model, config)
    scorer = Scorer(module, method_of(settings), samples.image_count)
    if settings.reference == "precomputed":
        identity = {"method": method_record(scorer.method), "dtype": str(module.dtype)}
        samples = samples.with_reference(scorer.alone, identity, workdir / "reference")
    chosen = {name: settings[name] for name in ("loss", "beta", "label_smoothing")}
    pure = functools.partial(metrics, scorer, chosen)
    return samples.task(pure, terms(settings))


def terms(settings: Mapping[str, Any]) -> dict[str, float]:
    """What is minimised, with weights."""
    return {"preference": 1.0} | ({"nll": settings["nll"]} if settings["nll"] else {})


def method_of(settings: ConfigDict) -> Method | None:
    """The attention that policy and reference run under."""
    return None if settings.method == "none" else CAPL(sigma=settings.sigma, rho=settings.rho)


def _check(config: ConfigDict) -> None:
    settings = config.preference
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


def _side_by_side(first: Any, second: Any) -> Any:
    """Two batches as one, rows of a pair next to each other: a device that holds a pair's rows keeps both answers."""

    def merged(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

    return jax.tree.map(merged, first, second)
