"""What all methods share: layers, presets, static settings."""

import jax
import numpy as np
import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import SEVI, VAF
from lvlm_jax.methods.base import layer_range


@pytest.mark.parametrize(
    ("start", "end", "layers", "expected"),
    [
        (2, None, None, (2, 3, 4, 5, 6, 7)),
        (2, 4, None, (2, 3)),
        (0.25, 0.5, None, (2, 3)),
        (np.float32(0.25), np.float32(0.5), None, (2, 3)),
        (0.5, 7, None, (4, 5, 6)),
        (0.0, 1.0, None, tuple(range(8))),
        (6, 99, None, (6, 7)),
        (2, 4, (1, 5, 99), (1, 5)),
        (2, 4, 3, (3,)),
    ],
)
def test_layers_are_numbers_or_shares_of_the_depth(start, end, layers, expected):
    assert layer_range(start, end, layers, 8) == expected


def test_no_layer_left_is_refused():
    with pytest.raises(LVLMError, match="layers from 9 to 15 are none of this model's 4 layers"):
        layer_range(9, 15, None, 4)
    with pytest.raises(LVLMError, match=r"layers \[8\] are none"):
        layer_range(0, None, 8, 4)


def test_a_list_of_layers_is_structure_like_a_tuple():
    listed, given = VAF(layers=[1, 2]), VAF(layers=(1, 2))
    assert listed.layers == (1, 2)
    assert hash(jax.tree.structure(listed)) == hash(jax.tree.structure(given))


def test_an_unknown_preset_is_refused():
    with pytest.raises(LVLMError, match="SEVI has no preset 'bold'; expected one of focused, balanced"):
        SEVI.preset("bold")
    with pytest.raises(LVLMError, match="VAF has no preset 'bold'; it has none at all"):
        VAF.preset("bold")
