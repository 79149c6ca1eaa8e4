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

from lvlm_jax.training import preference_losses as preference
from lvlm_jax.training.objectives import simpo

trl = pytest.importorskip("trl")

PAIRS, PROMPT, ANSWER = 5, 3, 9


def trainer(loss, beta):
    """What TRL's loss reads of its trainer: one process, no mixture of experts, reverse KL."""
    alone = {"device": "cpu", "gather": lambda x: x, "gather_for_metrics": lambda x: x}
    return types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=types.SimpleNamespace(**alone),
        loss_types=[loss], loss_weights=[1.0], beta=beta, label_smoothing=0.0, f_divergence_type="reverse_kl",
        ld_alpha=None, use_weighting=False, aux_loss_enabled=False, precompute_ref_logps=True,
        _metrics={"train": collections.defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip


def trl_loss(policy, reference, mask, loss, beta):
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
    state = trainer(loss, beta)
    value = trl.DPOTrainer._compute_loss(state, lambda **_: answers, inputs, False)
    value.backward()
    chosen, rejected = logprobs.grad[:, PROMPT - 1 :].chunk(2)
    logged = {name: values[-1] for name, values in state._metrics["train"].items()}
    return value.item(), np.stack([chosen, rejected], axis=1), logged


@pytest.mark.parametrize(("loss", "beta"), [("sigmoid", 0.1), ("sigmoid", 2.0), ("ipo", 0.3), ("hinge", 0.4)])
def test_losses_are_those_of_trl(loss, beta):
    rng = np.random.default_rng(0)
    policy, reference = -rng.exponential(size=(2, PAIRS, 2, ANSWER))
    mask = np.arange(ANSWER) < rng.integers(1, ANSWER + 1, (PAIRS, 2, 1))
    expected, slope, logged = trl_loss(policy, reference, mask, loss, beta)

    def ours(policy):
        found = preference.metrics(policy, reference, jnp.asarray(mask), jnp.ones(PAIRS), loss, beta)
        return found["preference"].value, {name: entry.value for name, entry in found.items()}

    with jax.enable_x64(True):
        (value, found), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(policy))
    np.testing.assert_allclose(value, expected, atol=1e-6)
    np.testing.assert_allclose(np.where(mask, gradient, 0), np.where(mask, slope, 0), atol=1e-6)
    assert np.abs(slope).max() > 1e-3
    for name in ("rewards/margins", "rewards/accuracies", "rewards/chosen", "logps/chosen", "logps/rejected"):
        if loss == "ipo" and name.startswith("rewards/"):
            continue  # ours are per token there, like the loss
        same = {"rewards/margins": "rewards/margin", "rewards/accuracies": "rewards/accuracy"}.get(name, name)
        np.testing.assert_allclose(found[same], logged[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("beta", "gamma", "smoothing"), [(2.0, 0.5, 0.0), (2.5, 1.4, 0.1)])
def test_simpo_is_that_of_trl(beta, gamma, smoothing):
    """TRL's loss of the mean log-probabilities that it takes per answer."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    rng = np.random.default_rng(1)
    policy = -rng.exponential(size=(PAIRS, 2, ANSWER))
    mask = np.arange(ANSWER) < rng.integers(1, ANSWER + 1, (PAIRS, 2, 1))
    state = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(device="cpu"), loss_type="simpo", beta=beta, simpo_gamma=gamma, alpha=0.0,
        label_smoothing=smoothing,
    )  # fmt: skip
    logprobs = torch.tensor(policy, requires_grad=True)
    means = (logprobs * torch.tensor(mask)).sum(-1) / torch.tensor(mask).sum(-1)
    losses, chosen, rejected = cpo.CPOTrainer.cpo_loss(state, means[:, 0], means[:, 1])
    losses.mean().backward()

    def ours(policy):
        found = simpo.losses(policy, jnp.asarray(mask), jnp.ones(PAIRS), beta, gamma, smoothing)
        return found["preference"].value, {name: entry.value for name, entry in found.items()}

    with jax.enable_x64(True):
        (value, found), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(policy))
    np.testing.assert_allclose(value, losses.mean().item(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(gradient, logprobs.grad, rtol=0, atol=1e-6)
    for name, rewards in {"rewards/chosen": chosen, "rewards/rejected": rejected}.items():
        np.testing.assert_allclose(found[name], rewards.mean().item(), rtol=0, atol=1e-6)
