"""KTO and ORPO: their losses by hand; and where KTO's labelled answers come from."""

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.training.data import labelled
from lvlm_jax.training.objectives import kto, orpo
from tests.training import pair_sets


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_three_answers_by_hand():
    """Δ is 2, -1 and 1, of the mismatched answers 1, -2 and 4: z is 1. β 0.5, λ_D 1, λ_U 2; the last row is bad."""
    delta = np.array([[[2.0], [1.0]], [[-1.0], [-2.0]], [[1.0], [4.0]]], np.float32)
    mask, weight = np.ones_like(delta, bool), jnp.array([1.0, 1.0, 3.0])
    found = kto.losses(delta - 2, jnp.full_like(delta, -2.0), mask, jnp.array([1.0, 1.0, 0.0]), weight, 0.5, 1.0, 2.0)
    bad = 2 * (1 - sigmoid(0.5 * (1 - 1)))
    expected = (1 - sigmoid(0.5 * (2 - 1)) + 1 - sigmoid(0.5 * (-1 - 1)) + 3 * bad) / 5
    assert {name: float(mean.value) for name, mean in found.items()} == pytest.approx(
        {"loss": expected, "rewards/chosen": 0.25, "rewards/rejected": 0.5, "z": 1.0}, rel=1e-6
    )
    low = kto.losses(delta - 9, jnp.full_like(delta, -2.0), mask, jnp.ones(3), jnp.ones(3), 0.5)
    assert low["z"].value == 0  # never below 0


def test_odds_by_hand():
    """p is ½ and ¼ a token: odds 1 and ⅓, whose ratio is 3."""
    policy = np.log(np.array([[[0.5, 0.5], [0.25, 0.9]]], np.float32))
    found = orpo.losses(policy, jnp.array([[[True, True], [True, False]]]), jnp.ones(1))
    assert float(found["preference"].value) == pytest.approx(np.log(4 / 3), rel=1e-5)
    assert float(found["log_odds"].value) == pytest.approx(np.log(3), rel=1e-5)
    assert float(found["sft"].value) == pytest.approx(np.log(2), rel=1e-6)
    sure = orpo.losses(jnp.zeros((1, 2, 1)), jnp.ones((1, 2, 1), bool), jnp.ones(1))
    assert np.isfinite(sure["preference"].value)  # an answer of probability 1


ROWS = [
    {"images": ["0.png"], "prompt": "What?", "completion": "a cat", "label": True},
    {"images": ["1.png"], "messages": [{"role": "user", "content": "<image>Who?"},
                                       {"role": "assistant", "content": "nobody"}], "kto_tag": False, "weight": 2},
    {"images": ["2.png"], "instruction": "<image>Why?", "output": "so", "kto_tag": True},
]  # fmt: skip


def test_labelled_answers_of_any_format(tmp_path):
    pair_sets.draw(tmp_path, 3)
    found = labelled.read(pair_sets.write_rows(tmp_path / "answers.jsonl", ROWS))
    assert [(row.answer, row.desirable, row.mismatched, row.weight) for row in found] == [
        ("a cat", True, "nobody", 1), ("nobody", False, "so", 2), ("so", True, "a cat", 1)
    ]  # fmt: skip
    assert [row.prompt[0]["content"][1]["text"] for row in found] == ["What?", "Who?", "Why?"]


def test_a_pair_is_a_good_and_a_bad_answer(tmp_path):
    found = labelled.read(pair_sets.write(tmp_path))
    assert len(found) == 2 * len(pair_sets.PAIRS)
    assert [(row.answer, row.desirable) for row in found[:2]] == [("a red cat", True), ("a dog", False)]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"label": 1}, "label is 1; expected true or false"), ({"completion": " "}, "the answer is empty")],
)
def test_a_row_without_label_or_answer_is_named(tmp_path, change, message):
    pair_sets.draw(tmp_path, 1)
    path = pair_sets.write_rows(tmp_path / "answers.jsonl", [ROWS[0], ROWS[0] | change])
    with pytest.raises(LVLMError, match=f"line 2 .*{message}"):
        labelled.read(path)
