"""SimPO, KTO and ORPO: their losses by hand; SimPO has no reference; where KTO's labelled answers come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.training import pairwise
from lvlm_jax.training.data import labelled
from lvlm_jax.training.objectives import kto, orpo, simpo
from lvlm_jax.weights import lora
from tests.training import pair_sets
from tests.training.pair_sets import values

# Two pairs: (log-probabilities of the chosen answer's tokens, of the rejected one's).
HAND = [((-1.0, -2.0), (-3.0,)), ((-4.0,), (-1.0, -1.0, -1.0))]


def arrays(pairs, padding=0.0, places=3):
    policy = np.full((len(pairs), 2, places), padding, np.float32)
    mask = np.zeros(policy.shape, bool)
    for index in np.ndindex(len(pairs), 2):
        logps = pairs[index[0]][index[1]]
        policy[index][: len(logps)], mask[index][: len(logps)] = logps, True
    return jnp.asarray(policy), jnp.asarray(mask)


def test_two_pairs_of_simpo():
    """Rewards 2·(-1.5) = -3 and 2·(-3) = -6, h = 3 - 0.5; then -8 and -2, h = -6 - 0.5."""
    found = values(simpo.losses(*arrays(HAND), jnp.ones(2), beta=2.0, gamma=0.5))
    wanted = {"chosen": -5.5, "rejected": -4.0, "margin": -1.5, "accuracy": 0.5}
    wanted = {f"rewards/{name}": value for name, value in wanted.items()}
    wanted |= {"logps/chosen": -3.5, "logps/rejected": -3.0}
    wanted["preference"] = (np.log1p(np.exp(-2.5)) + np.log1p(np.exp(6.5))) / 2  # 0.0789 and 6.5015
    assert found == pytest.approx(wanted, rel=1e-6)
    smooth = values(simpo.losses(*arrays(HAND), jnp.ones(2), beta=2.0, gamma=0.5, label_smoothing=0.1))
    # -(1 - ε) log σ(h) - ε log σ(-h) is -log σ(h) + ε h.
    assert smooth["preference"] == pytest.approx(found["preference"] + 0.1 * (2.5 - 6.5) / 2, rel=1e-6)
    # Places without a token and pairs of weight 0 change nothing.
    padded = simpo.losses(*arrays(HAND, padding=-9.0, places=5), jnp.array([1.0, 0.0]), 2.0, 0.5)
    alone = simpo.losses(*arrays(HAND[:1]), jnp.ones(1), 2.0, 0.5)
    assert values(padded) == pytest.approx(values(alone), rel=1e-6) and padded["preference"].count == 1
    empty = simpo.losses(*arrays([((), ())]), jnp.zeros(1), 2.0, 0.5)
    assert all(mean.total == 0 and mean.count == 0 for mean in empty.values())


def test_simpo_computes_no_reference(model, data, tmp_path, monkeypatch):
    """One pass through the decoder, where DPO needs two; also with adapters on the connector."""
    passes, logprobs = [], pairwise.Scorer.logprobs
    monkeypatch.setattr(pairwise.Scorer, "logprobs", lambda *given: passes.append(given) or logprobs(*given))
    made = pair_sets.task(model, data, tmp_path, "simpo")
    adapters = lora.attach_adapters(model.params, 2, 4.0, r"connector/linear_1$|q_proj$", 0.0, jax.random.key(0))
    batch = made.source(0)
    found = jax.eval_shape(lambda *given: made.objective(*given, None), *adapters, batch)
    assert len(passes) == 1 and "reference" not in batch and made.terms == {"preference": 1.0}
    assert found.keys() == simpo.losses(*arrays(HAND), jnp.ones(2), 2.0, 0.5).keys()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_three_answers_of_kto():
    """Δ is 2, -1 and 1, of the mismatched answers 1, -2 and 4: z is 1. β 0.5, λ_D 1, λ_U 2; the last row is bad."""
    delta = np.array([[[2.0], [1.0]], [[-1.0], [-2.0]], [[1.0], [4.0]]], np.float32)
    mask, weight, base = np.ones_like(delta, bool), jnp.array([1.0, 1.0, 3.0]), jnp.full_like(delta, -2.0)
    found = kto.losses(delta - 2, base, mask, jnp.array([1.0, 1.0, 0.0]), weight, 0.5, 1.0, 2.0)
    bad = 2 * (1 - sigmoid(0.5 * (1 - 1)))
    loss = (1 - sigmoid(0.5 * (2 - 1)) + 1 - sigmoid(0.5 * (-1 - 1)) + 3 * bad) / 5
    wanted = {"loss": loss, "rewards/chosen": 0.25, "rewards/rejected": 0.5, "z": 1.0}
    assert values(found) == pytest.approx(wanted, rel=1e-6)
    assert kto.losses(delta - 9, base, mask, jnp.ones(3), jnp.ones(3), 0.5)["z"].value == 0  # never below 0


def test_odds_of_orpo():
    """p is ½ and ¼ a token: odds 1 and ⅓, whose ratio is 3."""
    policy = np.log(np.array([[[0.5, 0.5], [0.25, 0.9]]], np.float32))
    found = values(orpo.losses(policy, jnp.array([[[True, True], [True, False]]]), jnp.ones(1)))
    wanted = {"preference": np.log(4 / 3), "log_odds": np.log(3), "sft": np.log(2)}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    sure = orpo.losses(jnp.zeros((1, 2, 1)), jnp.ones((1, 2, 1), bool), jnp.ones(1))
    assert np.isfinite(sure["preference"].value)  # an answer of probability 1


TALK = [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "nobody"}]
ROWS = [
    {"images": ["0.png"], "prompt": "What?", "completion": "a cat", "label": True},
    {"images": ["1.png"], "messages": TALK, "kto_tag": False, "weight": 2},
    {"images": ["2.png"], "instruction": "<image>Why?", "output": "so", "kto_tag": True},
]


def test_labelled_answers_of_any_format(tmp_path, data):
    pair_sets.draw(tmp_path, 3)
    found = labelled.read(pair_sets.write_rows(tmp_path / "answers.jsonl", ROWS))
    assert [(row.answer, row.desirable, row.mismatched, row.weight) for row in found] == [
        ("a cat", True, "nobody", 1), ("nobody", False, "so", 2), ("so", True, "a cat", 1)
    ]  # fmt: skip
    assert [row.prompt[0]["content"][1]["text"] for row in found] == ["What?", "Who?", "Why?"]
    found = labelled.read(data)  # a pair is a good and a bad answer
    assert len(found) == 2 * len(pair_sets.PAIRS)
    assert [(row.answer, row.desirable) for row in found[:2]] == [("a red cat", True), ("a dog", False)]
    for change, message in (
        ({"label": 1}, "label is 1; expected true or false"),
        ({"completion": " "}, "the answer is empty"),
    ):
        with pytest.raises(LVLMError, match=f"line 2 .*{message}"):
            labelled.read(pair_sets.write_rows(tmp_path / "answers.jsonl", [ROWS[0], ROWS[0] | change]))
