"""SimPO: its loss by hand, no reference, and that it is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import models
from lvlm_jax.training import finetune, pairwise
from lvlm_jax.training.objectives import simpo
from lvlm_jax.weights import lora
from tests.training import line, pair_sets

# Two pairs: (log-probabilities of the chosen answer's tokens, of the rejected one's).
HAND = [((-1.0, -2.0), (-3.0,)), ((-4.0,), (-1.0, -1.0, -1.0))]


def arrays(pairs, padding=0.0, places=3):
    policy = np.full((len(pairs), 2, places), padding, np.float32)
    mask = np.zeros(policy.shape, bool)
    for index, pair in enumerate(pairs):
        for side, logps in enumerate(pair):
            policy[index, side, : len(logps)], mask[index, side, : len(logps)] = logps, True
    return jnp.asarray(policy), jnp.asarray(mask)


def values(found):
    return {name: float(mean.value) for name, mean in found.items()}


def test_two_pairs_by_hand():
    """Rewards 2·(-1.5) = -3 and 2·(-3) = -6, h = 3 - 0.5; then -8 and -2, h = -6 - 0.5."""
    found = values(simpo.losses(*arrays(HAND), jnp.ones(2), beta=2.0, gamma=0.5))
    assert found == pytest.approx(
        {
            "preference": (np.log1p(np.exp(-2.5)) + np.log1p(np.exp(6.5))) / 2,  # 0.0789 and 6.5015
            "rewards/chosen": -5.5,
            "rewards/rejected": -4.0,
            "rewards/margin": -1.5,
            "rewards/accuracy": 0.5,
            "logps/chosen": -3.5,
            "logps/rejected": -3.0,
        },
        rel=1e-6,
    )
    smooth = values(simpo.losses(*arrays(HAND), jnp.ones(2), beta=2.0, gamma=0.5, label_smoothing=0.1))
    # -(1 - ε) log σ(h) - ε log σ(-h) is -log σ(h) + ε h.
    assert smooth["preference"] == pytest.approx(found["preference"] + 0.1 * (2.5 - 6.5) / 2, rel=1e-6)


def test_places_without_a_token_and_pairs_of_weight_0_change_nothing():
    padded = simpo.losses(*arrays(HAND, padding=-9.0, places=5), jnp.array([1.0, 0.0]), 2.0, 0.5)
    alone = simpo.losses(*arrays(HAND[:1]), jnp.ones(1), 2.0, 0.5)
    assert values(padded) == pytest.approx(values(alone), rel=1e-6) and padded["preference"].count == 1
    empty = simpo.losses(*arrays([((), ())]), jnp.zeros(1), 2.0, 0.5)
    assert all(mean.total == 0 and mean.count == 0 for mean in empty.values())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pair_sets.write(tmp_path_factory.mktemp("pairs"), side=96)


def test_no_reference_is_computed(model, tmp_path, monkeypatch):
    """One pass through the decoder, with adapters on the connector too, where DPO makes two."""
    passes, logprobs = [], pairwise.Scorer.logprobs

    def counted(self, params, *rest):
        passes.append(params)
        return logprobs(self, params, *rest)

    monkeypatch.setattr(pairwise.Scorer, "logprobs", counted)
    made = simpo.task(
        model, models.build(model.config), pair_sets.config(pair_sets.write(tmp_path), recipe="simpo"), tmp_path
    )
    adapters = lora.attach(model.params, 2, 4.0, r"connector/linear_1$|q_proj$", 0.0, jax.random.key(0))
    batch = made.source(0)
    found = jax.eval_shape(lambda *given: made.objective(*given, None), *adapters, batch)
    assert len(passes) == 1 and "reference" not in batch and made.terms == {"preference": 1.0}
    assert found.keys() == simpo.losses(*arrays(HAND), jnp.ones(2), 2.0, 0.5).keys()


@pytest.mark.slow
def test_a_few_steps_on_the_pocket_model_lower_the_loss(data, tmp_path):
    config = pair_sets.config(data, recipe="simpo", steps=4, batch=5, length=512)
    config.optimizer.peak = 1e-3
    config.loop.update(workers=0, log_every=1)
    finetune.train(config, tmp_path)
    losses = [record["preference"] for record in line.records(tmp_path)]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.2
