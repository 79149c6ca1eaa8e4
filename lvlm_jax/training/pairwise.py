"""Learning from pairs, a chosen and a rejected answer to one prompt: shared by the objectives "capl" and "dpo".

Policy and reference both run under CAPL's selective cross-image attention (arXiv 2603.07048), or both under plain
attention, according to `preference.method`. One forward pass scores both answers; short answers share one prompt
(`one_row`).

The reference is the model as training begins, and needs no second copy of the weights. Its log-probabilities are
computed before training and read from disk (`preference.reference="precomputed"`). Or, with LoRA, it is the model
without the adapters, in a second forward pass without gradient ("adapter_off"). "auto" chooses the cheaper one.
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
from lvlm_jax.training import forward, loop, one_row
from lvlm_jax.training import preference_losses as preference
from lvlm_jax.training.data.pair_batches import PAIR, Batch, pictures_of
from lvlm_jax.training.losses import Mean
from lvlm_jax.training.registry import Check, Objective, one_of
from lvlm_jax.training.samples import Samples
from lvlm_jax.weights import parts

# Training of these parts alone leaves the image tokens unchanged.
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
    "reference": "auto",
}
DOCS = {
    "loss": f"{', '.join(preference.LOSSES)}; several with weights as in '0.8*sigmoid + 0.2*bco_pair + sft'",
    "beta": "how strongly the policy is tied to the reference",
    "label_smoothing": f"for {', '.join(preference.SMOOTHED)}: share of pairs whose order is wrong",
    "nll": "weight of the chosen answer's negative log-likelihood",
    "method": "attention of policy and reference: capl, or none",
    "sigma": "for capl: weight of the cross-image softmax",
    "rho": "for capl: share of each image's tokens that is selected",
    "reference": "adapter_off (the model without an adapter, in each step), precomputed (the model that training "
    "begins with, once), or auto: precomputed if samples are seen again, with lora.start, and without LoRA",
}
REFERENCE = one_of("reference", ("auto", "adapter_off", "precomputed"))
BETA = Check("beta", "a number above 0, such as 0.1", lambda value: value > 0)
CHECKS = (
    one_of("method", ("capl", "none")),
    REFERENCE,
    BETA,
    Check("nll", "a weight of at least 0", lambda value: value >= 0),
    Check(
        "label_smoothing",
        "the share of pairs whose order is wrong, from 0 to below 0.5",
        lambda value: 0 <= value < 0.5,
    ),
)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Log-probabilities of the answers of each sample.

    Attributes:
        module: the model.
        method: the method whose attention is active; None for plain attention.
        image_count: the largest number of images in a sample.
        sequences: the names of a batch's S sequences; by default those of pairs.
    """

    module: nn.Module
    method: Method | None
    image_count: int
    sequences: tuple[str, ...] = PAIR

    def image_tokens(self, params: Any, batch: Batch, rngs: forward.Rngs = None) -> dict[str, Float[Array, "*N E"]]:
        """The image tokens of each sequence; the tower encodes shared images once."""
        shared = forward.image_tokens(self.module, params, batch, rngs)
        tokens = {}
        for name in self.sequences:
            own = batch.get(pictures_of(name))
            tokens[name] = shared if own is None else forward.image_tokens(self.module, params, own, rngs)
        return tokens

    def logprobs(
        self, params: Any, batch: Batch, image_tokens: Mapping[str, Float[Array, "*N E"]], rngs: forward.Rngs = None
    ) -> tuple[Float[Array, "B S A"], Bool[Array, "B S A"]]:
        """Log-probabilities of the answer tokens, and which of the A places have a token, from one decoder pass."""
        sequences = [batch[name] for name in self.sequences]
        if self.in_one_row(batch):
            rows = one_row.joined(*sequences, self.module.config.pad_token_id)
            embedded = forward.embed(self.module, params, rows["tokens"], image_tokens[PAIR[0]])
        else:
            tokens = [(batch[name]["tokens"], image_tokens[name]) for name in self.sequences]
            embedded = _side_by_side(*(forward.embed(self.module, params, *both) for both in tokens))
            rows = _side_by_side(*sequences)
        decoded = forward.decode(
            self.module,
            params,
            rows["image_id"],
            embedded,
            self.method,
            self.image_count,
            rngs=rngs,
            **{name: rows[name] for name in ("axes", "positions", "answer") if name in rows},
        )
        logits, targets, mask = forward.answer_logits(self.module, params, decoded.hidden[0], rows, rngs)
        logprobs = forward.token_logprobs(logits, targets, mask)
        shape = (-1, len(self.sequences), sequences[0]["columns"].shape[-1])
        return logprobs.reshape(shape), mask.reshape(shape)

    def in_one_row(self, batch: Batch) -> bool:
        """Whether the two answers of a pair share one prompt in one row (`one_row`); the same for a whole batch."""
        if self.sequences != PAIR or any(pictures_of(name) in batch for name in PAIR):
            return False
        length, answer = (batch[PAIR[0]][name].shape[1] for name in ("tokens", "columns"))
        return one_row.pays(self.module.config, self.module.dtype, self.method, length, answer)

    def alone(self, params: Any, batch: Batch) -> Float[Array, "B S A"]:
        """The log-probabilities that `logprobs` returns, from the images of a batch, without dropout."""
        return self.logprobs(params, batch, self.image_tokens(params, batch))[0]

    def beside_reference(
        self, trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[Float[Array, "B S A"], Float[Array, "B S A"], Bool[Array, "B S A"]]:
        """Log-probabilities under policy and reference, and which of the A places have a token.

        Args:
            trainable, frozen: the two parts of the parameters; `frozen` is the reference unless the batch contains the
                reference's log-probabilities. No gradient flows through the reference.
            key: PRNG key of the adapters' dropout; None to disable it.
        """
        rngs = None if key is None else {"dropout": key}
        params = parts.join(trainable, frozen)
        image_tokens = self.image_tokens(params, batch, rngs)
        policy, mask = self.logprobs(params, batch, image_tokens, rngs)
        if "reference" in batch:
            base = batch["reference"]
        elif set(trainable) <= TEXT_PARTS:
            base, _ = self.logprobs(frozen, batch, image_tokens)
        else:
            base = self.alone(frozen, batch)
        return policy, jax.lax.stop_gradient(base), mask


def metrics(
    scorer: Scorer, settings: Mapping[str, Any], trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None
) -> dict[str, Mean]:
    """The loss and metrics of a batch, from `preference_losses.metrics`. Pure.

    Args:
        settings: `loss`, `beta`, `label_smoothing` of `preference_losses.metrics`.
        trainable, frozen, key: as in `Scorer.beside_reference`.
    """
    policy, base, mask = scorer.beside_reference(trainable, frozen, batch, key)
    return preference.metrics(policy, base, mask, batch["weight"], **settings)


def objective(name: str, **defaults: Any) -> Objective:
    """An objective called `name` with the fields of `FIELDS`; `defaults` replace some of their defaults."""
    return Objective(
        name, task, SECTION, FIELDS | defaults, DOCS, CHECKS, _check, method=lambda config: method_of(config.preference)
    )


def task(model: LVLM, module: nn.Module, config: ConfigDict, workdir: Path) -> loop.Task:
    """See `registry.Objective`; precomputed log-probabilities are stored in the folder `reference` of `workdir`."""
    settings, samples = config.preference, Samples.pairs(model, config)
    scorer = Scorer(module, method_of(settings), samples.image_count)
    samples = with_reference(samples, scorer, settings.reference, workdir)
    chosen = {name: settings[name] for name in ("loss", "beta", "label_smoothing")}
    pure = functools.partial(metrics, scorer, chosen)
    return samples.task(pure, terms(settings), method=scorer.method)


def with_reference(samples: Samples, scorer: Scorer, reference: str, workdir: Path) -> Samples:
    """The samples, with the log-probabilities of their answers if `reference` is "precomputed" or "auto" chooses that.

    Precomputing pays if samples are used more than once: one pass over all samples replaces the reference's pass in
    every step.
    """
    of = samples.config.lora
    chosen = samples.seen_again or of.start or not of.enabled
    if reference == "adapter_off" or (reference == "auto" and not chosen):
        return samples
    identity = {"method": method_record(scorer.method), "dtype": str(scorer.module.dtype)}
    return samples.with_reference(scorer.alone, identity, workdir / "reference")


def terms(settings: Mapping[str, Any]) -> dict[str, float]:
    """The metrics to minimise, with weights."""
    weights = {}
    losses = preference.mixture(settings["loss"])
    if set(losses) - {preference.SFT}:
        weights["preference"] = 1.0
    if preference.SFT in losses:
        weights[preference.SFT] = losses[preference.SFT]
    return weights | ({"nll": settings["nll"]} if settings["nll"] else {})


def method_of(settings: ConfigDict) -> Method | None:
    """The method whose attention policy and reference have; None for plain attention."""
    return None if settings.method == "none" else CAPL(sigma=settings.sigma, rho=settings.rho)


def _check(config: ConfigDict) -> None:
    settings = config.preference
    losses = preference.mixture(settings.loss)
    if settings.label_smoothing and not set(losses) & set(preference.SMOOTHED):
        raise LVLMError(
            f"preference.label_smoothing belongs to {', '.join(preference.SMOOTHED)} and preference.loss is "
            f"{settings.loss!r}; set one of them otherwise"
        )
    if "exo_pair" in losses and not settings.label_smoothing:
        raise LVLMError("the loss exo_pair needs preference.label_smoothing above 0, such as 0.001")
    check_reference(SECTION, config)


def check_reference(section: str, config: ConfigDict) -> None:
    """Raises an `LVLMError` if the reference is the model without its adapter and there is no adapter."""
    if config[section].reference == "adapter_off" and not config.lora.enabled:
        raise LVLMError(
            f"{section}.reference is 'adapter_off' and there is no LoRA adapter to leave out (lora.enabled is False); "
            f"set {section}.reference='precomputed'"
        )


def _side_by_side(*sequences: Any) -> Any:
    """Interleaves sequences: the rows of a sample are next to each other, so that one device has all of them."""

    def merged(*rows: jax.Array) -> jax.Array:
        return jnp.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:])

    return jax.tree.map(merged, *sequences)
