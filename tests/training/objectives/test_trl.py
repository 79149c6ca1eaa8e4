"""Losses, gradients and rewards beside those of TRL's own DPO trainer, from the same log-probabilities.

TRL is none of the test requirements (it brings a dozen packages); where it is installed this test runs.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lvlm_jax.training import pairwise
from lvlm_jax.training import preference_losses as preference
from lvlm_jax.training.objectives import kto, orpo, simpo

trl = pytest.importorskip("trl")

PAIRS, PROMPT, ANSWER = 5, 3, 9


def trainer(words, beta, smoothing):
    """What TRL's loss reads of its trainer: one process, no mixture of experts, reverse KL."""
    alone = {"device": "cpu", "gather": lambda x: x, "gather_for_metrics": lambda x: x}
    return types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=types.SimpleNamespace(**alone),
        loss_types=list(words), loss_weights=list(words.values()), beta=beta, label_smoothing=smoothing,
        f_divergence_type="reverse_kl",
        ld_alpha=None, use_weighting=False, aux_loss_enabled=False, precompute_ref_logps=True,
        _metrics={"train": collections.defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip


def trl_loss(policy, reference, mask, loss, beta, smoothing):
    """TRL's loss, its gradient for the log-probabilities, and what it logs; arrays are [B, 2, A]."""

    def stacked(array, kind):  # chosen answers, then rejected ones, each behind a prompt
        array = torch.tensor(np.concatenate([array[:, 0], array[:, 1]]), dtype=kind)
        return torch.nn.functional.pad(array, (PROMPT, 0))

    completion = stacked(mask, torch.long)
    logprobs = stacked(np.where(mask, policy, 0), torch.float64)[:, 1:].requires_grad_()
    told = np.where(mask, reference, 0).sum(axis=-1)
    inputs = {
        "input_ids": torch.ones_like(completion), "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": torch.tensor(told[:, 0]), "ref_rejected_logps": torch.tensor(told[:, 1]),
    }  # fmt: skip
    nothing = torch.zeros_like(logprobs)
    answers = types.SimpleNamespace(log_probs=logprobs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    state = trainer(preference.mixture(loss), beta, smoothing)
    value = trl.DPOTrainer._compute_loss(state, lambda **_: answers, inputs, False)
    value.backward()
    chosen, rejected = logprobs.grad[:, PROMPT - 1 :].chunk(2)
    logged = {name: values[-1] for name, values in state._metrics["train"].items()}
    return value.item(), np.stack([chosen, rejected], axis=1), logged


def drawn(seed, answers=2):
    """Log-probabilities [B, S, A] of policy and reference, and which places hold a token."""
    rng = np.random.default_rng(seed)
    policy, reference = -rng.exponential(size=(2, PAIRS, answers, ANSWER))
    return policy, reference, np.arange(ANSWER) < rng.integers(1, ANSWER + 1, (PAIRS, answers, 1))


def ours(losses, policy):
    """(the loss, its gradient, metrics) in float64; `losses` from log-probabilities to (the loss, metrics)."""
    with jax.enable_x64(True):
        (value, found), gradient = jax.value_and_grad(losses, has_aux=True)(jnp.asarray(policy))
    return value, gradient, {name: entry.value for name, entry in found.items()}


@pytest.mark.parametrize(
    ("loss", "beta", "smoothing"),
    [(name, 0.3, 0.0) for name in preference.LOSSES if name != "exo_pair"]
    + [(name, 2.0, 0.2) for name in ("robust", "exo_pair")]  # TRL does not smooth sigmoid
    + [("0.8*sigmoid + 0.2*bco_pair + sft", 0.1, 0.0), ("robust + 0.5*ipo", 0.4, 0.1)],
)
def test_losses_are_those_of_trl(loss, beta, smoothing):
    policy, reference, mask = drawn(0)
    expected, slope, logged = trl_loss(policy, reference, mask, loss, beta, smoothing)
    terms = pairwise.terms({"loss": loss, "nll": 0.0})

    def losses(policy):
        found = preference.metrics(policy, reference, jnp.asarray(mask), jnp.ones(PAIRS), loss, beta, smoothing)
        return sum(weight * found[name].value for name, weight in terms.items()), found

    value, gradient, found = ours(losses, policy)
    np.testing.assert_allclose(value, expected, atol=1e-6)
    np.testing.assert_allclose(np.where(mask, gradient, 0), np.where(mask, slope, 0), atol=1e-6)
    assert np.abs(slope).max() > 1e-3
    for name in ("rewards/margins", "rewards/accuracies", "rewards/chosen", "logps/chosen", "logps/rejected"):
        same = {"rewards/margins": "rewards/margin", "rewards/accuracies": "rewards/accuracy"}.get(name, name)
        np.testing.assert_allclose(found[same], logged[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("beta", "good", "bad"), [(0.1, 1.0, 1.0), (0.5, 1.3, 0.7)])
def test_kto_is_that_of_trl(beta, good, bad):
    policy, reference, mask = drawn(2)
    policy[:, 1] += 1.0  # so that z is above 0
    desirable = np.array([1, 0, 0, 1, 0])
    logprobs = torch.tensor(np.where(mask, policy, 0)[:, 0], requires_grad=True)
    known = torch.tensor(np.where(mask, reference, 0).sum(-1))
    nothing = torch.zeros_like(logprobs)
    answers = types.SimpleNamespace(log_probs=logprobs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    completion = torch.nn.functional.pad(torch.tensor(mask[:, 0], dtype=torch.long), (1, 0))
    state = trainer({"kto": 1.0}, beta, 0.0)
    vars(state).update(
        loss_type="kto", calculate_KL=True, desirable_weight=good, undesirable_weight=bad,
        _compute_kl_logps=lambda *_: torch.tensor(np.where(mask, policy, 0)[:, 1].sum(-1)),
    )  # fmt: skip
    inputs = {
        "input_ids": torch.ones_like(completion), "attention_mask": torch.ones_like(completion),
        "completion_mask": completion, "label": torch.tensor(desirable), "ref_logps": known[:, 0],
        "ref_KL_logps": known[:, 1],
    }  # fmt: skip
    model = lambda **_: answers  # noqa: E731
    model.training = True
    expected = trl.KTOTrainer._compute_loss(state, model, inputs, False)
    expected.backward()

    def losses(policy):
        found = kto.losses(
            policy, reference, jnp.asarray(mask), jnp.asarray(desirable), jnp.ones(PAIRS), beta, good, bad
        )
        return found["loss"].value, found

    value, gradient, found = ours(losses, policy)
    np.testing.assert_allclose(value, expected.item(), atol=1e-6)
    np.testing.assert_allclose(np.where(mask, gradient, 0)[:, 0], np.where(mask[:, 0], logprobs.grad, 0), atol=1e-6)
    assert not gradient[:, 1].any() and found["z"] > 0
    np.testing.assert_allclose(found["z"], state._metrics["train"]["kl"][-1], atol=1e-6)


def test_the_odds_ratio_is_that_of_trl():
    trainer_of_orpo = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    policy, _, mask = drawn(3)
    logprobs = torch.tensor(policy, requires_grad=True)
    means = (logprobs * torch.tensor(mask)).sum(-1) / torch.tensor(mask).sum(-1)
    state = types.SimpleNamespace(beta=0.3, accelerator=types.SimpleNamespace(device="cpu"))
    found = trainer_of_orpo.odds_ratio_loss(state, means[:, 0], means[:, 1])
    (-found[0].mean()).backward()

    def losses(policy):
        metrics = orpo.losses(policy, jnp.asarray(mask), jnp.ones(PAIRS))
        return 0.3 * metrics["preference"].value, metrics

    value, gradient, metrics = ours(losses, policy)
    np.testing.assert_allclose(value, -found[0].mean().item(), atol=1e-6)
    np.testing.assert_allclose(metrics["log_odds"], found[4].item(), atol=1e-5)
    np.testing.assert_allclose(gradient, logprobs.grad, atol=1e-6)


@pytest.mark.parametrize(("beta", "gamma", "smoothing"), [(2.0, 0.5, 0.0), (2.5, 1.4, 0.1)])
def test_simpo_is_that_of_trl(beta, gamma, smoothing):
    """TRL's loss of the mean log-probabilities that it takes per answer."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    policy, _, mask = drawn(1)
    state = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(device="cpu"), loss_type="simpo", beta=beta, simpo_gamma=gamma, alpha=0.0,
        label_smoothing=smoothing,
    )  # fmt: skip
    logprobs = torch.tensor(policy, requires_grad=True)
    means = (logprobs * torch.tensor(mask)).sum(-1) / torch.tensor(mask).sum(-1)
    losses, chosen, rejected = cpo.CPOTrainer.cpo_loss(state, means[:, 0], means[:, 1])
    losses.mean().backward()

    def own(policy):
        found = simpo.losses(policy, jnp.asarray(mask), jnp.ones(PAIRS), beta, gamma, smoothing)
        return found["preference"].value, found

    value, gradient, found = ours(own, policy)
    np.testing.assert_allclose(value, losses.mean().item(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(gradient, logprobs.grad, rtol=0, atol=1e-6)
    for name, rewards in {"rewards/chosen": chosen, "rewards/rejected": rejected}.items():
        np.testing.assert_allclose(found[name], rewards.mean().item(), rtol=0, atol=1e-6)
