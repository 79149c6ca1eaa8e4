"""Losses, gradients and metrics beside those that TRL 1.16 gives for the same log-probabilities, as kept in trl.json.

They are those of its own trainers in float64 (`_compute_loss` of DPO and KTO, `odds_ratio_loss` of ORPO, `cpo_loss` of
CPO with the loss of SimPO), for answers as `drawn` gives them.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.training import pairwise
from lvlm_jax.training import preference_losses as preference
from lvlm_jax.training.objectives import kto, orpo, simpo

CASES = json.loads(Path(__file__).with_name("trl.json").read_text())
PAIRS, ANSWER = 3, 5


def drawn(seed):
    """Log-probabilities [B, 2, A] of policy and reference, and which places hold a token."""
    rng = np.random.default_rng(seed)
    policy, reference = -rng.exponential(size=(2, PAIRS, 2, ANSWER))
    return policy, reference, np.arange(ANSWER) < rng.integers(1, ANSWER + 1, (PAIRS, 2, 1))


def losses(objective, settings, policy, reference, mask):
    """(the loss, metrics)"""
    weight = jnp.ones(PAIRS)
    if objective == "dpo":
        found = preference.metrics(policy, reference, mask, weight, **settings)
        terms = pairwise.terms({"loss": settings["loss"], "nll": 0.0})
        return sum(share * found[name].value for name, share in terms.items()), found
    if objective == "kto":
        found = kto.losses(policy, reference, mask, jnp.array([1, 0, 1]), weight, *settings.values())
        return found["loss"].value, found
    found = (
        simpo.losses(policy, mask, weight, **settings) if objective == "simpo" else orpo.losses(policy, mask, weight)
    )
    return found["preference"].value, found


def test_every_loss_is_compared():
    assert {case["settings"].get("loss") for case in CASES} >= set(preference.LOSSES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['objective']} {[*case['settings'].values()]}")
def test_losses_are_those_of_trl(case):
    policy, reference, mask = drawn(case["seed"])
    policy[:, 1] += float(case["objective"] == "kto")  # so that z is above 0
    with jax.enable_x64(True):
        total = jax.value_and_grad(lambda policy: losses(*given, policy, reference, jnp.asarray(mask)), has_aux=True)
        given = case["objective"], case["settings"]
        (value, found), gradient = total(jnp.asarray(policy))
        logged = {name: found[name].value for name in case["logged"]}
    np.testing.assert_allclose(value, case["value"], atol=1e-6)
    np.testing.assert_allclose(np.where(mask, gradient, 0), case["gradient"], atol=1e-6)
    assert logged == pytest.approx(case["logged"], abs=1e-5)
